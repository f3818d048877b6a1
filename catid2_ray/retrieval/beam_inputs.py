"""What the beam search is asked, checked before the model runs: widths, tokens, filters, and whether model and trie fit.

Anything read from a device is read here, once, so that no step of the search waits for it.

B batch, T query tokens, N rows of the trie.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.filters import Filter, FilterTensors, stacked
from catid2_ray.retrieval.live import LiveView
from catid2_ray.retrieval.live_filters import LiveFilter
from catid2_ray.retrieval.t5_decoder import Decoder
from catid2_ray.retrieval.trie import Trie


class LiveFilterTensors(NamedTuple):
    """Allowed and live rows of a view: of the base (None: all), and inserted ones in ID order."""

    base: FilterTensors | None
    inserted: FilterTensors


def is_whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def checked_widths(beam_width: int | Sequence[int], levels: int) -> list[int]:
    """One width per level searched."""
    one = is_whole(beam_width)
    given = [beam_width] * levels if one else beam_width
    if isinstance(given, (np.ndarray, Tensor)):
        given = given.tolist()
    if not isinstance(given, (list, tuple)) or len(given) != levels or not all(is_whole(w) and w >= 1 for w in given):
        raise InputError(f"beam_width must be one whole number ≥ 1, or {levels} of them, found {beam_width!r}")
    return [int(width) for width in given]


def checked_levels(levels: int | None, trie: Trie | LiveView) -> int:
    if levels is None:
        return trie.levels
    if not is_whole(levels) or not 1 <= levels <= trie.levels:
        raise InputError(f"levels must be a whole number from 1 to {trie.levels}, or None for all, found {levels!r}")
    return int(levels)


def decoder_of(model, trie: Trie | LiveView) -> Decoder:
    """`model` itself if it is a Decoder for the trie's IDs, else what `decoder_for` makes of it."""
    if not hasattr(model, "decode_step"):
        return decoder_for(model, codes_per_level=trie.codes_per_level)
    carried = getattr(model, "codes_per_level", None)
    if carried is None or tuple(carried) != tuple(trie.codes_per_level):
        found = "does not say its codes_per_level" if carried is None else f"has codes per level {list(carried)}"
        raise InputError(
            f"the model does not fit the trie: the decoder {found}, the trie's IDs have {list(trie.codes_per_level)}; "
            "take model and trie from one release"
        )
    return model


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


def requested(
    allowed, trie: Trie | LiveView, batch: int, device: torch.device
) -> FilterTensors | LiveFilterTensors | None:
    """Which rows each query may find, on the device; None for all of a trie."""
    several = isinstance(allowed, (list, tuple)) and not all(isinstance(one, (bool, np.bool_)) for one in allowed)
    if several and len(allowed) != batch:
        raise InputError(f"allowed has {len(allowed)} filters for {batch} queries; give one for each, or None")
    parse = _live_filter if isinstance(trie, LiveView) else _filter
    # One object stays one object: it is put on the device once.
    parsed = {id(one): None if one is None else parse(one, trie) for one in (allowed if several else [allowed])}
    filters = [parsed[id(one)] for one in (allowed if several else [allowed])]
    if isinstance(trie, LiveView):
        return _of_view(filters, trie, device)
    if all(one is None for one in filters):
        return None
    everything = Filter.all_of(trie.rows) if None in filters else None
    return stacked([everything if one is None else one for one in filters], device)


def _of_view(filters: list[LiveFilter | None], view: LiveView, device: torch.device):
    pairs = [(view.live_base, view.live_sorted) if one is None else view.restricted(one) for one in filters]
    base, inserted = zip(*pairs)
    unfiltered = view.whole and all(one is None for one in filters)
    of_base = None if unfiltered else stacked(base, device)
    return of_base if view.inserted is None else LiveFilterTensors(of_base, stacked(inserted, device))


def _filter(allowed, trie: Trie) -> Filter:
    if not isinstance(allowed, Filter):
        allowed = Filter.of(_booleans(allowed, trie.rows))
    if len(allowed) != trie.rows:
        raise InputError(
            f"the filter is over {len(allowed)} rows, the trie has {trie.rows}; take both from one release"
        )
    return allowed


def _live_filter(allowed, view: LiveView) -> LiveFilter:
    if isinstance(allowed, LiveFilter):
        return allowed
    if isinstance(allowed, Filter):
        return LiveFilter(allowed, Filter.of(np.empty(0, bool)))
    return LiveFilter.of(_booleans(allowed, view.rows), view.base.rows)


def _booleans(allowed, rows: int) -> np.ndarray:
    try:
        allowed = torch.as_tensor(allowed)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"allowed must be a filter or {rows} booleans, one per trie row, found {type(allowed).__name__}"
        ) from None
    if allowed.dtype != torch.bool or allowed.shape != (rows,):
        raise InputError(
            f"allowed must be a filter or {rows} booleans, one per trie row, found {allowed.dtype} of "
            f"{tuple(allowed.shape)}"
        )
    return allowed.cpu().numpy()
