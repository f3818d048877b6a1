"""Every kind of generator is built from plain settings, and comes back from its folder with the same scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, RecipeError
from catid2_ray.generator.logits import docid_logits
from catid2_ray.generator.model import build_generator
from catid2_ray.generator.saved import load_generator, load_to_search, save_generator
from catid2_ray.generator.vocabulary import load_tokenizer, pad_of, tokenize, train_tokenizer, with_docid_tokens
from catid2_ray.retrieval.decoders import decoder_for
from tests.text_models import save_bert, save_qwen, word_tokenizer

SPACE = DocidSpace((4, 3, 5))
SIZES = {"space": SPACE, "width": 16, "layers": 1, "heads": 2, "feed_forward": 24, "dropout": 0.1, "seed": 1}
TEXTS = ["steel hinge", "oak door 10 ft"]
CODES_BL = torch.tensor([[0, 2, 4], [3, 1, 0]])
BOOKS = [np.random.default_rng(level).normal(size=(k, 4)) for level, k in enumerate(SPACE.codes_per_level)]


def made(kind, folder, **changes):
    """(generator, tokenizer) of a kind as a recipe would name it."""
    settings = {**SIZES, "codebooks": BOOKS, **changes}
    if kind == "small":
        tokenizer = with_docid_tokens(train_tokenizer(TEXTS * 3, size=70), SPACE)
        return build_generator("small", tokenizer=tokenizer, **settings), tokenizer
    if kind == "encoder_decoder":
        tokenizer = load_tokenizer(save_bert(folder / "bert"), kind=kind)
        model = build_generator(kind, tokenizer=tokenizer, encoder=str(folder / "bert"), decoder_layers=2, **settings)
        return model, tokenizer
    save_qwen(folder / "qwen", tied=True)
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with_docid_tokens(tokenizer, SPACE)
    return build_generator("causal", tokenizer=tokenizer, causal=str(folder / "qwen"), **settings), tokenizer


def in_one_buffer(model) -> None:
    """As ZeRO leaves trained weights: views of one buffer."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights])):
        weight.data = part.view_as(weight)


@pytest.mark.parametrize("flat", [False, True], ids=["as built", "under ZeRO"])
@pytest.mark.parametrize(
    "kind, head",
    [
        ("small", "plain"),
        ("small", "pawa"),
        ("encoder_decoder", "plain"),
        ("encoder_decoder", "pawa"),
        ("causal", "plain"),
    ],
)
def test_what_was_saved_scores_alike(kind, head, flat, tmp_path):
    model, tokenizer = made(kind, tmp_path, head=head, head_rank=4)
    if flat:
        in_one_buffer(model)
    if head == "pawa":
        torch.nn.init.normal_(model.pawa.up.weight)
    save_generator(model.eval(), tokenizer, tmp_path / "saved")
    again, words = load_generator(tmp_path / "saved")
    assert (tmp_path / "saved" / "generator.json").exists() == ((kind, head) != ("small", "plain"))
    assert not list(tmp_path.rglob("*.bin")) and not again.training
    ids_BT = torch.from_numpy(tokenize(words, TEXTS, length=8)).long()
    assert np.array_equal(ids_BT, tokenize(tokenizer, TEXTS, length=8)) and (ids_BT == pad_of(again)).any()
    for before, after in zip(*(docid_logits(m, ids_BT, CODES_BL, space=SPACE) for m in (model, again))):
        assert torch.equal(before, after)
    decoder_for(again, codes_per_level=SPACE.codes_per_level)
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    if kind == "small":
        plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "saved")
        assert torch.equal(plain.shared.weight, model.shared.weight)
    elif kind == "causal":
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def mapped(file) -> list[range]:
    """Where this process has mapped the file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "kind, head", [("small", "plain"), ("small", "pawa"), ("encoder_decoder", "pawa"), ("causal", "plain")]
)
@pytest.mark.parametrize("load", [load_generator, load_to_search])
def test_weights_are_the_pages_of_their_file_which_replicas_share(kind, head, load, tmp_path):
    model, tokenizer = made(kind, tmp_path, head=head, head_rank=4)
    save_generator(model.eval(), tokenizer, tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    pages = [part for file in (tmp_path / "saved").glob("*.safetensors") for part in mapped(file)]
    copied = [name for name, one in again.named_parameters() if not any(one.data_ptr() in part for part in pages)]
    assert pages and copied == []


def test_half_precision_stays_half(tmp_path):
    model, tokenizer = made("encoder_decoder", tmp_path)
    save_generator(model.bfloat16(), tokenizer, tmp_path / "saved")
    again, _ = load_generator(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.float())


def test_settings_and_folders_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="needs an encoder and encoder_mode frozen or tuned, found None and 'frozen'"):
        build_generator("encoder_decoder", tokenizer=None, **SIZES)
    with pytest.raises(RecipeError, match="model causal needs `causal`"):
        build_generator("causal", tokenizer=None, **SIZES)
    with pytest.raises(ArtifactError, match="holds no generator that can be read"):
        load_generator(tmp_path / "absent")
    (tmp_path / "generator.json").write_text('{"kind": "lstm"}')
    with pytest.raises(ArtifactError, match="KeyError: 'lstm'"):
        load_generator(tmp_path)
