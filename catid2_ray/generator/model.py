"""Where a generator's weights come from: a small T5 from a config, or any pretrained T5 given the ID tokens.

In both the ID tokens are the model's last ΣK vocabulary rows, and the config says so in `docid_codes_per_level`, which
survives `save_pretrained`; padded vocabularies (T5 has 32,128 rows for 32,100 tokens) are trimmed first.
"""

import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, RecipeError
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
    name_or_folder: str, *, tokenizer: PreTrainedTokenizerFast, space: DocidSpace, seed: int = 0
) -> T5ForConditionalGeneration:
    """Any T5 by hub id or folder, in float32, its vocabulary made to fit `tokenizer`, which must have the ID tokens.

    New rows are the mean embedding plus noise of a fifth of the rows' spread, drawn from `seed`. A model that already
    carries these ID tokens keeps their rows. Raises EncoderError when it cannot be loaded, is no T5, or its
    vocabulary is smaller than the tokenizer's; RecipeError when the tokenizer lacks the ID tokens.
    """
    docid_rows = sum(space.codes_per_level)
    base = len(tokenizer) - docid_rows
    if tokenizer.convert_tokens_to_ids(space.tokens()[0]) != base:
        raise RecipeError(
            f"the tokenizer's last {docid_rows} entries are not the ID tokens; call with_docid_tokens first"
        )
    model = _load(str(name_or_folder))
    carried = getattr(model.config, "docid_codes_per_level", None)
    if model.config.vocab_size == len(tokenizer) and carried == list(space.codes_per_level):
        return model
    if model.config.vocab_size < base:
        raise EncoderError(
            f"{str(name_or_folder)!r} has {model.config.vocab_size} vocabulary rows, fewer than the tokenizer's "
            f"{base}; use the tokenizer that belongs to the model"
        )
    model.resize_token_embeddings(base, mean_resizing=False)
    model.resize_token_embeddings(base + docid_rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tables = {id(module.weight): module.weight for module in (model.shared, model.lm_head)}
    with torch.no_grad():
        for table_VD in tables.values():
            mean_D, spread_D = table_VD[:base].mean(0), table_VD[:base].std(0)
            noise_KD = torch.randn(docid_rows, table_VD.shape[1], generator=generator)
            table_VD[base:] = mean_D + 0.2 * spread_D * noise_KD
    model.config.docid_codes_per_level = list(space.codes_per_level)
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = PAD
    return model


def _load(name_or_folder: str) -> T5ForConditionalGeneration:
    try:
        model = T5ForConditionalGeneration.from_pretrained(name_or_folder, dtype=torch.float32, use_safetensors=True)
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
