"""A generator of any kind as a folder of safetensors and JSON, with its tokenizer.

`generator.json` says the kind; a folder without it is a plain T5 as `T5ForConditionalGeneration.save_pretrained` leaves
it, and T5s and causal models stay readable by transformers itself.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError
from catid2_ray.generator.causal import CausalGenerator
from catid2_ray.generator.logits import with_head
from catid2_ray.generator.plain_t5 import PlainTokenizer, is_plain_t5, read_plain_t5

if TYPE_CHECKING:  # `load_to_search` does without transformers, which takes two seconds to import
    from transformers import PreTrainedTokenizerFast

_HEAD = "head.safetensors"


def save_generator(model: nn.Module, tokenizer: "PreTrainedTokenizerFast", folder: str | os.PathLike) -> None:
    """Write model and tokenizer into `folder`, in the precision that the weights have."""
    from catid2_ray.generator.encoder_decoder import EncoderDecoder

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {}
    if isinstance(model, CausalGenerator):
        about = {"kind": "causal", "codes_per_level": list(model.space.codes_per_level)}
        model.model.save_pretrained(folder)
    elif isinstance(model, EncoderDecoder):
        about = {"kind": "encoder_decoder", "frozen": model.encoder.frozen, "decoder": model.config.to_dict()}
        model.encoder.text.config.save_pretrained(folder / "text")
        save_file(_weights(model), folder / "model.safetensors")
    else:
        head = getattr(model, "pawa", None)
        weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("pawa.")}
        model.save_pretrained(folder, state_dict=weights)
        if head is not None:
            about = {"kind": "t5", "head": "pawa"}
            save_file(_weights(head), folder / _HEAD)
    if about:
        (folder / "generator.json").write_text(json.dumps(about, indent=1, sort_keys=True), encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The state, tied weights once, each with storage of its own: under ZeRO all weights are views of one buffer, which
    safetensors' own save_model refuses where some are tied."""
    tied = dict(module.named_parameters(remove_duplicate=False)).keys() - dict(module.named_parameters()).keys()
    return {name: weight.detach().clone() for name, weight in module.state_dict().items() if name not in tied}


def load_generator(folder: str | os.PathLike) -> tuple[nn.Module, "PreTrainedTokenizerFast"]:
    """(model in evaluation mode on CPU, tokenizer). Raises ArtifactError for a folder that holds no generator."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    with _readable(folder):
        about = _about(folder)
        model = _LOADERS[about["kind"]](folder, about)
        # AutoTokenizer would rebuild some tokenizers by the model's type and not as they were saved.
        saved = (folder / "tokenizer.json").exists()
        tokenizer = (PreTrainedTokenizerFast if saved else AutoTokenizer).from_pretrained(
            folder, trust_remote_code=False
        )
    return model.eval(), tokenizer


def load_to_search(folder: str | os.PathLike) -> tuple[nn.Module, "PreTrainedTokenizerFast | PlainTokenizer"]:
    """As `load_generator`, for one who only searches: a T5 comes without transformers, as a PlainT5 in float32."""
    folder = Path(folder)
    with _readable(folder):
        about = _about(folder)
        if about["kind"] == "t5" and is_plain_t5(folder):
            return _headed(read_plain_t5(folder), folder, about).eval(), PlainTokenizer(folder)
    return load_generator(folder)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers, safetensors and torch each have error trees of their own
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"{folder} holds no generator that can be read ({type(error).__name__}: {first_line}); export it again"
        ) from error


def _about(folder: Path) -> dict:
    path = folder / "generator.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"kind": "t5"}


def _load_t5(folder: Path, about: dict) -> nn.Module:
    from transformers import T5ForConditionalGeneration

    return _headed(T5ForConditionalGeneration.from_pretrained(folder, use_safetensors=True), folder, about)


def _headed(model: nn.Module, folder: Path, about: dict) -> nn.Module:
    if about.get("head", "plain") != "plain":
        with_head(model, about["head"], rank=model.config.docid_head_rank).pawa.to(model.lm_head.weight.dtype)
        _load_mapped(model.pawa, folder / _HEAD)
    return model


def _load_mapped(module: nn.Module, file: Path) -> None:
    """The weights as they lie in the pages of `file`, which all processes of a machine share; who writes to one gets a copy."""
    load_model(module, str(file))  # which checks names and shapes
    weights = load_file(file)
    for name, parameter in module.named_parameters():
        if name in weights and weights[name].dtype == parameter.dtype:
            parameter.data = weights[name]


def _load_encoder_decoder(folder: Path, about: dict) -> nn.Module:
    from transformers import AutoConfig, AutoModel, T5Config

    from catid2_ray.generator.encoder_decoder import EncoderDecoder, without_pooler

    config = AutoConfig.from_pretrained(folder / "text", trust_remote_code=False)
    text = without_pooler(AutoModel.from_config(config, trust_remote_code=False))
    model = EncoderDecoder(text, T5Config.from_dict(about["decoder"]), frozen=about["frozen"])
    sizes = {name: getattr(model.config, f"docid_head_{name}", None) for name in ("rank", "width", "share")}
    with_head(
        model,
        getattr(model.config, "docid_head", "plain"),
        **{name: size for name, size in sizes.items() if size is not None},
    )
    _load_mapped(model, folder / "model.safetensors")
    return model


def _load_causal(folder: Path, about: dict) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    return CausalGenerator(model, DocidSpace(about["codes_per_level"]))


_LOADERS = {"t5": _load_t5, "encoder_decoder": _load_encoder_decoder, "causal": _load_causal}
