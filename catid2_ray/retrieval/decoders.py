"""What the search needs of a model, the decoder of each kind of generator, and the queries that it can read.

B batch, M beams, T query tokens, D width of a hidden state, K codes of a level, L levels.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.generator.causal import CausalGenerator
from catid2_ray.retrieval.causal_decoder import CausalDecoder
from catid2_ray.retrieval.t5_decoder import T5Decoder


class Decoder(Protocol):
    """What the search needs from a model. `memory` and `cache` are opaque to it. `codes_per_level`: of all its levels,
    compared with the trie's. `vocabulary`: how many token ids `encode` takes (may be absent: then only ids below 0 are
    refused before it runs)."""

    device: torch.device
    codes_per_level: tuple[int, ...]
    vocabulary: int

    def encode(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> object:
        """Whatever the steps need to know about the queries."""

    def decode_step(self, level: int, memory, cache, parent_BM: Tensor, code_BM: Tensor) -> tuple[Tensor, object]:
        """hidden_BMD and the new cache. At level 0 M is 1, `cache` None; later `code_BM` is the code just chosen and
        `parent_BM` the beam of the step before that it extends."""

    def level_logits(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        """B×M×K_level scores of the next code."""

    def log_partition(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        """B×M, the log of the sum over the whole vocabulary, on the scale of `level_logits`."""


def decoder_for(model, *, codes_per_level: Sequence[int], weights: str = "float32") -> Decoder:
    """What `constrained_beam_search` needs of `model`: a T5, an EncoderDecoder or a CausalGenerator; a Decoder as it is.

    `weights`: "float32" for the model's own, "int8" for 8-bit copies on CPUs (not of a causal model). Raises InputError
    when the model has other IDs than `codes_per_level`, cannot hold them, or cannot be made int8.
    """
    if hasattr(model, "decode_step"):
        carried = getattr(model, "codes_per_level", None)
        if carried is None or tuple(carried) != tuple(codes_per_level):
            says = "does not say its codes_per_level" if carried is None else f"has codes per level {list(carried)}"
            raise InputError(
                f"the model does not fit the trie: the decoder {says}, the trie's IDs have {list(codes_per_level)}; "
                "take model and trie from one release"
            )
        return model
    if isinstance(model, CausalGenerator):
        if weights != "float32":
            raise InputError(f"a causal model is searched with weights='float32' only, found {weights!r}")
        return CausalDecoder(model, codes_per_level=codes_per_level)
    return T5Decoder(model, codes_per_level=codes_per_level, weights=weights)


def checked_queries(input_ids, attention_mask, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Token ids and mask on the decoder's device."""
    ids_BT, mask_BT = torch.as_tensor(input_ids), torch.as_tensor(attention_mask)
    if ids_BT.ndim != 2 or mask_BT.shape != ids_BT.shape:
        raise InputError(
            f"input_ids and attention_mask must both be B×T, found {tuple(ids_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    if not len(ids_BT):
        raise InputError("the batch has no query; leave the search out where there is nothing to ask")
    if ids_BT.is_floating_point() or ids_BT.is_complex() or ids_BT.dtype == torch.bool:
        raise InputError(f"input_ids must be whole numbers, found {ids_BT.dtype}")
    empty_B = ~mask_BT.bool().any(1)
    if empty_B.any():
        raise InputError(f"query {int(empty_B.nonzero()[0])} of the batch has no token; leave empty queries out")
    size = getattr(decoder, "vocabulary", None)
    outside_BT = (ids_BT < 0) | (ids_BT >= size) if size is not None else ids_BT < 0
    if outside_BT.any():
        query, place = outside_BT.nonzero()[0].tolist()
        raise InputError(
            f"token {place} of query {query} is {int(ids_BT[query, place])}, the model knows 0 to "
            f"{'…' if size is None else size - 1}; use the tokenizer of the model's release"
        )
    return ids_BT.to(decoder.device, torch.long), mask_BT.to(decoder.device)
