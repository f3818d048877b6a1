"""Where a generator's weights come from: a small T5 from a config, a pretrained T5 or causal model given the ID tokens, or
a text encoder under our own decoder; `build_generator` makes any of them.

In all the ID tokens are the model's last ΣK vocabulary rows, and the config says so in `docid_codes_per_level`, which
survives `save_pretrained`; padded vocabularies (T5 has 32,128 rows for 32,100 tokens) are trimmed first.

Pretrained weights are safetensors, or where a model has none (mT5) tensors that `torch.load` reads with `weights_only`.

L levels, K codes, Z width of a codeword, D width of a row, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, RecipeError
from catid2_ray.generator.causal import CausalGenerator
from catid2_ray.generator.encoder_decoder import encoder_decoder, pretrained, t5_config
from catid2_ray.generator.logits import READ_VECTORS, with_head
from catid2_ray.generator.vocabulary import EOS, PAD

_LEAST_TEXT_ROWS = 16  # fewer say nothing about where text lies


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
    config = t5_config(
        vocabulary, width=width, layers=(layers, layers) if isinstance(layers, int) else layers, heads=heads,
        feed_forward=feed_forward, dropout=dropout, codes_per_level=codes_per_level, activation=activation,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
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

    New rows come from `codebooks`, or are the mean embedding plus noise (`init_docid_rows`), drawn from `seed`. A
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
    name = str(name_or_folder)
    model = pretrained(AutoModelForCausalLM, name, "causal language model", attn_implementation="sdpa")
    grown = _grow(model, name, tokenizer, space)
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
    remedy = "fix the id, or build a small T5 from a config instead"
    model = pretrained(T5ForConditionalGeneration, name_or_folder, "T5", remedy=remedy)
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
    head_width: int = 256,
    head_share: float = 0.5,
    codebooks: Sequence[np.ndarray | None] | None = None,
    begin: tuple[Sequence[np.ndarray | None], np.ndarray | None] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A generator of any kind, ready to train: what a recipe's section says, in plain values.

    `model`: "small" (a T5 of `width`, `layers`, `heads`, `feed_forward`), "encoder_decoder" (text encoder `encoder`, frozen or
    "tuned", under `decoder_layers` or else `layers` layers of the same sizes), "causal" (the language model `causal`), or
    a T5's id or folder. `dropout` is a small T5's and a decoder's; pretrained models bring their own. `codebooks`: per
    level K×Z, from which ID rows begin; None = the mean embedding of a pretrained model, random rows in one made
    here. `head`: "plain", "pawa", or "dense" or "experts", which begin from `begin`: codewords per level and the adapter's W; sizes
    as in `logits.with_head`. `tokenizer` has the ID tokens as last entries, but for an encoder_decoder, which does not look for
    them.
    """
    sizes = {"width": width, "heads": heads, "feed_forward": feed_forward, "dropout": dropout, "seed": seed,
             "codes_per_level": space.codes_per_level}  # fmt: skip
    depth = decoder_layers or layers
    if model == "small":
        base = len(tokenizer) - sum(space.codes_per_level)
        generator = small_t5(vocabulary=base, layers=(layers, depth), **sizes)
    elif model == "encoder_decoder":
        if encoder is None or encoder_mode not in ("frozen", "tuned"):
            raise RecipeError(
                f"an encoder_decoder needs an encoder and encoder_mode frozen or tuned, found {encoder!r} and {encoder_mode!r}"
            )
        frozen = encoder_mode == "frozen"
        generator = encoder_decoder(encoder, layers=depth, frozen=frozen, pad=tokenizer.pad_token_id, **sizes)
    elif model == "causal":
        if causal is None:
            raise RecipeError("model causal needs `causal`, the language model's id or folder")
        generator = pretrained_causal(causal, tokenizer=tokenizer, space=space, codebooks=codebooks, seed=seed)
    else:
        generator = pretrained_t5(model, tokenizer=tokenizer, space=space, codebooks=codebooks, seed=seed)
    if model in ("small", "encoder_decoder") and codebooks is not None:
        init_docid_rows(generator, codebooks, space=space, seed=seed)
    with_head(generator, head, rank=head_rank, width=head_width, share=head_share, seed=seed)
    if begin is not None and head in READ_VECTORS:
        getattr(generator, head).begin(*begin)
    return generator


def init_docid_rows(
    model: nn.Module, codebooks: Sequence[np.ndarray | None] | None, *, space: DocidSpace, seed: int = 0
) -> None:
    """Set the last ΣK rows of the input table, and of the output table where that is another, in place: codewords projected
    into the embedding's space, so that near codes begin near.

    `codebooks`: per level K×Z or None. A level with codewords gets them centred, projected by D×Z orthonormal columns drawn
    from `seed` (columns of one matrix for all levels where ΣZ ≤ D, so that levels do not overlap), scaled to the spread
    of the table's text rows and set around their mean. Others get the mean plus noise of a fifth of the spread. A table
    without text rows (an EncoderDecoder's) keeps the mean 0 and the spread that it was drawn with, and its rows where
    there are no codewords. Raises RecipeError when a codebook has another number of codes than the level.
    """
    books = list(codebooks or [])[: space.levels]
    books += [None] * (space.levels - len(books))
    for level, (book_KZ, k) in enumerate(zip(books, space.codes_per_level)):
        if book_KZ is not None and len(book_KZ) != k:
            raise RecipeError(
                f"level {level + 1} has {k} codes but a codebook of {len(book_KZ)} codewords; take IDs and codebooks from one "
                "quantizer"
            )
    tables = {id(table): table for table in (model.shared.weight, model.lm_head.weight)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table_VD in tables.values():
            _set_rows(table_VD, books, space, generator)


def _set_rows(table_VD: Tensor, books, space: DocidSpace, generator: torch.Generator) -> None:
    base, width = len(table_VD) - sum(space.codes_per_level), table_VD.shape[1]
    text = base >= _LEAST_TEXT_ROWS
    mean_D = table_VD[:base].mean(0) if text else torch.zeros_like(table_VD[0])
    spread_D = table_VD[:base].std(0) if text else table_VD[base:].std().expand(width)
    noise_KD = torch.randn(len(table_VD) - base, width, generator=generator).to(table_VD)
    projections = iter(_projections([book.shape[1] for book in books if book is not None], width, generator))
    first = 0
    for book_KZ, k in zip(books, space.codes_per_level):
        rows = slice(base + first, base + first + k)
        if book_KZ is not None:
            codeword_KZ = torch.as_tensor(np.asarray(book_KZ, np.float32))
            row_KD = ((codeword_KZ - codeword_KZ.mean(0)) @ next(projections).T).to(table_VD)
            table_VD[rows] = mean_D + row_KD * (spread_D.square().mean().sqrt() / row_KD.std().clamp(min=1e-12))
        elif text:
            table_VD[rows] = mean_D + 0.2 * spread_D * noise_KD[first : first + k]
        first += k


def _projections(widths: list[int], width: int, generator: torch.Generator) -> list[Tensor]:
    """D×Z per level with orthonormal columns (rows where Z > D), of one draw where all columns fit into D."""

    def orthonormal(z: int) -> Tensor:
        q = torch.linalg.qr(torch.randn(max(width, z), min(width, z), generator=generator))[0]
        return q if z <= width else q.T

    if widths and sum(widths) <= width:
        return list(orthonormal(sum(widths)).split(widths, 1))
    return [orthonormal(z) for z in widths]
