"""Where a generator's weights come from: a small T5 from a config, a pretrained T5 or causal model given the ID tokens, or
a text encoder under our own decoder; `build_generator` makes any of them.

In all the ID tokens are the model's last ΣK vocabulary rows, and the config says so in `docid_codes_per_level`, which
survives `save_pretrained`; padded vocabularies (T5 has 32,128 rows for 32,100 tokens) are trimmed first.

Pretrained weights are safetensors, or where a model has none (mT5) tensors that `torch.load` reads with `weights_only`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, RecipeError
from catid2_ray.generator.causal import CausalGenerator
from catid2_ray.generator.encoder_decoder import encoder_decoder
from catid2_ray.generator.heads import with_head
from catid2_ray.generator.initial import init_docid_rows
from catid2_ray.generator.vocabulary import EOS, PAD


def small_t5(
    *,
    vocabulary: int,
    width: int,
    layers: int | tuple[int, int],
    heads: int,
    feed_forward: int,
    dropout: float,
    codes_per_level: tuple[int, ...],
    activation: str = "relu",
    seed: int = 0,
) -> T5ForConditionalGeneration:
    """A T5 with random weights and `vocabulary + ΣK` rows; `vocabulary` counts the tokenizer WITHOUT its ID tokens.

    `layers`: encoder and decoder alike, or a pair (transformers' own `generate` fails where the decoder is the deeper
    one; our search does not); `activation`: "relu" or "gated-gelu" (twice the inner weights).
    Weights depend on `seed` alone. Raises RecipeError when `width` does not divide by `heads`.
    """
    if width % heads:
        raise RecipeError(f"generator width {width} does not divide by {heads} heads; choose a multiple of {heads}")
    encoder_layers, decoder_layers = (layers, layers) if isinstance(layers, int) else layers
    space = DocidSpace(codes_per_level)
    config = T5Config(
        vocab_size=vocabulary + sum(space.codes_per_level),
        d_model=width,
        d_kv=width // heads,
        d_ff=feed_forward,
        num_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        dropout_rate=dropout,
        feed_forward_proj=activation,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        docid_codes_per_level=list(space.codes_per_level),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config)


def pretrained_t5(
    name_or_folder: str,
    *,
    tokenizer: PreTrainedTokenizerFast,
    space: DocidSpace,
    codebooks: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
) -> T5ForConditionalGeneration:
    """Any T5 by hub id or folder, in float32, its vocabulary made to fit `tokenizer`, which must have the ID tokens.

    New rows come from `codebooks`, or are the mean embedding plus noise (`initial.init_docid_rows`), drawn from `seed`. A
    model that already carries these ID tokens keeps their rows. Raises EncoderError when it cannot be loaded, is no T5, or
    its vocabulary is smaller than the tokenizer's; RecipeError when the tokenizer lacks the ID tokens.
    """
    _check_tokenizer(tokenizer, space)
    model = _load(str(name_or_folder))
    if _grow(model, name_or_folder, tokenizer, space):
        init_docid_rows(model, codebooks, space=space, seed=seed)
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = PAD
    return model


def pretrained_causal(
    name_or_folder: str,
    *,
    tokenizer: PreTrainedTokenizerFast,
    space: DocidSpace,
    codebooks: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
) -> CausalGenerator:
    """Any causal language model by hub id or folder, in float32, given the ID tokens as `pretrained_t5` gives them."""
    _check_tokenizer(tokenizer, space)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(name_or_folder), dtype=torch.float32, attn_implementation="sdpa"
        )
    except Exception as error:
        raise EncoderError(
            f"no causal language model could be loaded from {str(name_or_folder)!r} ({type(error).__name__}: {error}); "
            "offline, or an unknown id or folder: give a folder written by save_pretrained, or fix the id"
        ) from error
    grown = _grow(model, name_or_folder, tokenizer, space)
    model.config.pad_token_id = tokenizer.pad_token_id
    causal = CausalGenerator(model, space)
    if grown:
        init_docid_rows(causal, codebooks, space=space, seed=seed)
    return causal


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, space: DocidSpace) -> None:
    docid_rows = sum(space.codes_per_level)
    if tokenizer.convert_tokens_to_ids(space.tokens()[0]) != len(tokenizer) - docid_rows:
        raise RecipeError(
            f"the tokenizer's last {docid_rows} entries are not the ID tokens; call with_docid_tokens first"
        )


def _grow(model, name_or_folder: str, tokenizer: PreTrainedTokenizerFast, space: DocidSpace) -> bool:
    """Give the model the tokenizer's rows, the last of them without a meaning yet; False when it carried them already."""
    base = len(tokenizer) - sum(space.codes_per_level)
    carried = getattr(model.config, "docid_codes_per_level", None)
    if model.config.vocab_size == len(tokenizer) and carried == list(space.codes_per_level):
        return False
    if model.config.vocab_size < base:
        raise EncoderError(
            f"{str(name_or_folder)!r} has {model.config.vocab_size} vocabulary rows, fewer than the tokenizer's "
            f"{base}; use the tokenizer that belongs to the model"
        )
    model.resize_token_embeddings(base, mean_resizing=False)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.docid_codes_per_level = list(space.codes_per_level)
    return True


def _load(name_or_folder: str) -> T5ForConditionalGeneration:
    try:
        model = T5ForConditionalGeneration.from_pretrained(name_or_folder, dtype=torch.float32)
    except Exception as error:
        raise EncoderError(
            f"no T5 could be loaded from {name_or_folder!r} ({type(error).__name__}: {error}); offline, or an "
            "unknown id or folder: give a folder written by save_pretrained, fix the id, or build a small T5 from a "
            "config instead"
        ) from error
    # mT5 is T5 v1.1 with another vocabulary: the same modules and names, and no scaling of the last state.
    if model.config.model_type == "mt5":
        model.config.scale_decoder_outputs = False
    if model.config.model_type not in ("t5", "mt5"):
        raise EncoderError(
            f"{name_or_folder!r} is a {model.config.model_type!r} model, expected a T5; choose a T5 checkpoint"
        )
    return model


def build_generator(
    model: str,
    *,
    tokenizer: PreTrainedTokenizerFast,
    space: DocidSpace,
    width: int,
    layers: int,
    heads: int,
    feed_forward: int,
    dropout: float,
    encoder: str | None = None,
    encoder_mode: str = "frozen",
    decoder_layers: int | None = None,
    causal: str | None = None,
    head: str = "plain",
    head_rank: int = 64,
    codebooks: Sequence[np.ndarray | None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A generator of any kind, ready to train: what a recipe's section says, in plain values.

    `model`: "small" (a T5 of `width`, `layers`, `heads`, `feed_forward`), "encoder_decoder" (text encoder `encoder`, frozen or
    "tuned", under `decoder_layers` or else `layers` layers of the same sizes), "causal" (the language model `causal`), or
    a T5's id or folder. `dropout` is a small T5's and a decoder's; pretrained models bring their own. `codebooks`: per
    level K×Z, from which ID rows begin; None = the mean embedding of a pretrained model, random rows in one made
    here. `head`: "plain" or "pawa". `tokenizer` has the ID tokens
    as last entries, but for an encoder_decoder, which does not look for them.
    """
    sizes = {"width": width, "heads": heads, "feed_forward": feed_forward, "dropout": dropout, "seed": seed,
             "codes_per_level": space.codes_per_level}  # fmt: skip
    depth = decoder_layers or layers
    if model == "small":
        base = len(tokenizer) - sum(space.codes_per_level)
        made = small_t5(vocabulary=base, layers=(layers, depth), **sizes)
    elif model == "encoder_decoder":
        if encoder is None or encoder_mode not in ("frozen", "tuned"):
            raise RecipeError(
                f"an encoder_decoder needs an encoder and encoder_mode frozen or tuned, found {encoder!r} and {encoder_mode!r}"
            )
        frozen = encoder_mode == "frozen"
        made = encoder_decoder(encoder, layers=depth, frozen=frozen, pad=tokenizer.pad_token_id, **sizes)
    elif model == "causal":
        if causal is None:
            raise RecipeError("model causal needs `causal`, the language model's id or folder")
        made = pretrained_causal(causal, tokenizer=tokenizer, space=space, codebooks=codebooks, seed=seed)
    else:
        made = pretrained_t5(model, tokenizer=tokenizer, space=space, codebooks=codebooks, seed=seed)
    if model in ("small", "encoder_decoder") and codebooks is not None:
        init_docid_rows(made, codebooks, space=space, seed=seed)
    return with_head(made, head, rank=head_rank, seed=seed)
