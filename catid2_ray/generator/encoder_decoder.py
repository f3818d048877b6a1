"""A pretrained text encoder with a T5 decoder of our own: what the words mean is known before training begins.

The text encoder's states pass through one linear layer to the decoder's width, get the whole text's vector added through
another, and a norm. Frozen, the encoder costs a step nothing once its states are cached (`states.py`), and its mean state is
the query's dense vector in the same pass.
The decoder's vocabulary is a start row and then the ΣK ID rows: IDs need no place in the text's tokenizer.

B batch, T tokens, E width of the text encoder, D width of the decoder.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, T5Config, T5ForConditionalGeneration

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, RecipeError
from catid2_ray.generator.plain_t5 import T5Norm
from catid2_ray.generator.states import dense
from catid2_ray.generator.vocabulary import PAD

START = 0


class Encoded(NamedTuple):
    """`last_hidden_state` B×T×D, what the decoder attends to; `dense_BE`, the texts as unit vectors of the encoder."""

    last_hidden_state: Tensor
    dense_BE: Tensor


class ProjectedEncoder(nn.Module):
    """A Hugging Face text encoder and the way from its width to the decoder's.

    `frozen`: the text encoder has no gradients, is never in train mode, and its weights are in no parameter group.
    """

    def __init__(self, text: nn.Module, *, width: int, frozen: bool, pad: int, epsilon: float = 1e-6):
        super().__init__()
        self.text, self.frozen, self.pad = text, frozen, pad
        self.projection = nn.Linear(text.config.hidden_size, width, bias=False)
        self.sentence = nn.Linear(text.config.hidden_size, width, bias=False)
        self.norm = T5Norm(width, epsilon)
        self.text.requires_grad_(not frozen)
        self.train(self.training)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def vocabulary(self) -> int:
        """How many token ids the text encoder takes."""
        return len(self.text.get_input_embeddings().weight)

    def train(self, mode: bool = True) -> "ProjectedEncoder":
        super().train(mode)
        if self.frozen:
            self.text.eval()
        return self

    def token_states(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """B×T×E, the text encoder's last states."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.text(input_ids=input_ids_BT, attention_mask=attention_mask_BT.long()).last_hidden_state

    def encoded(self, states_BTE: Tensor, mask_BT: Tensor) -> Encoded:
        """From token states of any float type: each token's own, and the whole text's vector (scaled so that its numbers are of
        the order of 1) added to all, since IDs are functions of such vectors."""
        kind = self.norm.weight.dtype  # 8-bit copies of the matrices have no weight to ask
        dense_BE = dense(states_BTE, mask_BT)
        text_BD = self.sentence((dense_BE * dense_BE.shape[-1] ** 0.5).to(kind))
        return Encoded(self.norm(self.projection(states_BTE.to(kind)) + text_BD[:, None]), dense_BE)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return self.encoded(self.token_states(input_ids, attention_mask), attention_mask)

    @torch.no_grad()
    def digest(self) -> str:
        """SHA-256 of the text encoder's weights: what a cache of its states belongs to."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.text.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()


class EncoderDecoder(nn.Module):
    """`encoder` (ProjectedEncoder), `decoder` (T5Stack), `shared`, `lm_head` and `config` (T5Config), named as in a T5, so
    that losses and search take either. Made by `encoder_decoder`, or from configs by `saved.load_generator`."""

    def __init__(self, text: nn.Module, config: T5Config, *, frozen: bool):
        super().__init__()
        # A T5 without encoder layers: its decoder comes with T5's own initialisation.
        whole = T5ForConditionalGeneration(config)
        self.config, self.shared, self.decoder, self.lm_head = config, whole.shared, whole.decoder, whole.lm_head
        self.encoder = ProjectedEncoder(
            text, width=config.d_model, frozen=frozen, pad=config.pad_token_id, epsilon=config.layer_norm_epsilon
        )

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device


def t5_config(
    vocabulary: int,
    *,
    width: int,
    layers: tuple[int, int],
    heads: int,
    feed_forward: int,
    dropout: float,
    codes_per_level: tuple[int, ...],
    activation: str,
    **settings,
) -> T5Config:
    """A T5 of `vocabulary` rows and then the ΣK ID rows; `layers`: of the encoder and of the decoder; `settings`: T5Config's.

    Raises RecipeError when `width` does not divide by `heads`.
    """
    if width % heads:
        raise RecipeError(f"generator width {width} does not divide by {heads} heads; choose a multiple of {heads}")
    space, (encoder_layers, decoder_layers) = DocidSpace(codes_per_level), layers
    return T5Config(
        vocab_size=vocabulary + sum(space.codes_per_level),
        d_model=width,
        d_kv=width // heads,
        d_ff=feed_forward,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        dropout_rate=dropout,
        feed_forward_proj=activation,
        docid_codes_per_level=list(space.codes_per_level),
        **{"eos_token_id": None} | settings,
    )


def encoder_decoder(
    encoder: str,
    *,
    width: int,
    layers: int,
    heads: int,
    feed_forward: int,
    dropout: float,
    codes_per_level: tuple[int, ...],
    frozen: bool = True,
    activation: str = "relu",
    tied: bool = True,
    pad: int = PAD,
    seed: int = 0,
) -> EncoderDecoder:
    """A text encoder by hub id or folder, and a decoder of `layers` layers with random weights drawn from `seed`.

    `tied`: ID tokens are read and written by the same rows, as in the first T5; `pad`: the padding token of the
    encoder's tokenizer. Raises RecipeError when `width` does not divide by `heads`, EncoderError when the encoder cannot
    be loaded.
    """
    config = t5_config(
        START + 1, width=width, layers=(0, layers), heads=heads, feed_forward=feed_forward, dropout=dropout,
        codes_per_level=codes_per_level, activation=activation, tie_word_embeddings=tied, pad_token_id=pad,
        decoder_start_token_id=START,
    )  # fmt: skip
    text = load_text_encoder(str(encoder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EncoderDecoder(text, config, frozen=frozen)


def pretrained(kind, name_or_folder: str, what: str, *, remedy: str = "or fix the id", **settings) -> nn.Module:
    """A model of a transformers class by hub id or folder, in float32. Raises EncoderError when it cannot be loaded."""
    try:
        return kind.from_pretrained(name_or_folder, dtype=torch.float32, trust_remote_code=False, **settings)
    except Exception as error:  # the hub client, safetensors and torch each have error trees of their own
        raise EncoderError(
            f"no {what} could be loaded from {name_or_folder!r} ({type(error).__name__}: {error}); offline, or an unknown id or "
            f"folder: give a folder written by save_pretrained, {remedy}"
        ) from error


@torch.no_grad()
def unrounded(model: nn.Module, text: Callable[[], nn.Module]) -> nn.Module:
    """The generator in float32 on CPU. Of a frozen text encoder that training in bf16 rounded with all other weights the true ones
    are taken from `text()`, since the products' vectors are of the encoder as it was."""
    encoder = getattr(model, "encoder", None)
    rounded = getattr(encoder, "frozen", False) and next(encoder.text.parameters()).dtype != torch.float32
    model = model.float().cpu()
    if rounded:
        encoder.text.load_state_dict(text().state_dict())
    return model


def load_text_encoder(name_or_folder: str) -> nn.Module:
    """Any AutoModel that reads text, in float32, without a pooler; of an encoder-decoder its encoder."""
    return without_pooler(pretrained(AutoModel, name_or_folder, "text encoder"))


def without_pooler(model: nn.Module) -> nn.Module:
    """The part of a model that gives token states: a pooler's weights would never get a gradient."""
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
