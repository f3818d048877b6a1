"""Stage 3, a query becomes ID tokens: subword vocabulary, models of every kind, training examples, the loss, a one-process loop.

Pure torch, transformers and numpy; nothing here knows a store, a cluster or a recipe.
"""

from catid2_ray.generator.examples import Batch, EpochOrder, Examples, drop_words, epoch_order, tokenize
from catid2_ray.generator.model import build_generator, pretrained_t5, small_t5
from catid2_ray.generator.saved import load_generator, save_generator
from catid2_ray.generator.step import (
    DocidLoss,
    FitResult,
    docid_loss,
    fit,
    level_losses,
    parameter_groups,
)
from catid2_ray.generator.vocabulary import load_tokenizer, starts_word, train_tokenizer, with_docid_tokens

__all__ = [
    "Batch",
    "DocidLoss",
    "EpochOrder",
    "Examples",
    "FitResult",
    "build_generator",
    "docid_loss",
    "drop_words",
    "epoch_order",
    "fit",
    "level_losses",
    "load_generator",
    "load_tokenizer",
    "parameter_groups",
    "pretrained_t5",
    "save_generator",
    "small_t5",
    "starts_word",
    "tokenize",
    "train_tokenizer",
    "with_docid_tokens",
]
