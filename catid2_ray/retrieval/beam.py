"""Constrained beam search: the best IDs of a batch of queries, in log space, with array operations alone.

Only children of a beam's own trie node are ever candidates, so no invalid ID can appear and nothing is renormalised
after the constraint. Equal scores are ordered by ID, at the edge of the beam too, so results do not depend on how a
device breaks ties. Shapes depend on the trie and the widths only; the host waits once, at the end.

B batch, T query tokens, M beams, L levels, K codes (or results), C children of the widest node of a level, N rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.decoders import checked_queries, decoder_for
from catid2_ray.retrieval.live import LiveView, filters_for
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import LiveTensors, TrieTensors, filter_tensors, tensors

_DEAD = torch.iinfo(torch.int64).min


class BeamResult(NamedTuple):
    """CPU tensors, best first. Beyond `count_B`: docid −1, range (0, 0), logp −inf.

    `docid_BKL` int64 codes 0…K_l−1, as many as levels were searched; `row_range_BK2` int64, trie rows start … end−1 that
    carry the ID (or begin with it); `logp_BK` float32, natural log of P(ID | query); `count_B` int64, number of
    results. Of a live view with inserted products also `inserted_range_BK2` int64: N + j, for the j-th inserted product
    in the view's ID order; (0, 0) for both ranges where that part has none. `live.result_rows` lists the products.
    """

    docid_BKL: Tensor
    row_range_BK2: Tensor
    logp_BK: Tensor
    count_B: Tensor
    inserted_range_BK2: Tensor | None = None


def _sort_key(score: Tensor, rank: Tensor, live: Tensor) -> Tensor:
    """int64 that orders candidates by score, then by ID (`rank`): the bits of a float, made to ascend."""
    bits = (score + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return torch.where(live, (ascending << 32) + (0xFFFFFFFF - rank), _DEAD)


class _Beams(NamedTuple):
    """After a step: each beam's place in the trie, score, the beam it extends, its codes; dead beams at −inf."""

    place: tuple[Tensor, ...]
    logp_BM: Tensor
    parent_BM: Tensor
    prefix_BML: Tensor


def _extend(beams: _Beams, step_logp_BMK: Tensor, arrays: TrieTensors | LiveTensors, width: int, filters) -> _Beams:
    """The `width` best children of all beams of each query; `filters` as `filter_tensors` gives them."""
    level = beams.prefix_BML.shape[-1]
    children = arrays.children(level, beams.place, beams.logp_BM > -torch.inf, beams.prefix_BML, filters)
    score_BMC = beams.logp_BM[..., None] + step_logp_BMK.gather(-1, children.code_BMC)
    live_BMC = children.live_BMC & (score_BMC > -torch.inf)
    key_BC = _sort_key(score_BMC, children.rank_BMC, live_BMC).flatten(1)
    best = key_BC.topk(min(width, key_BC.shape[1]), dim=1)
    parent_BM = best.indices // children.widest
    code_BM, logp_BM = (x.flatten(1).gather(1, best.indices) for x in (children.code_BMC, score_BMC))
    kept_BML = beams.prefix_BML.gather(1, parent_BM[..., None].expand(-1, -1, level))
    prefix_BML = torch.cat((kept_BML, code_BM[..., None]), 2)
    place = arrays.kept(level, children, best.indices, code_BM)
    return _Beams(place, logp_BM.masked_fill(best.values == _DEAD, -torch.inf), parent_BM, prefix_BML)


def _result(beams: _Beams, arrays: TrieTensors | LiveTensors, top_k: int) -> BeamResult:
    real_BM = beams.logp_BM > -torch.inf
    docid_BML = beams.prefix_BML.masked_fill(~real_BM[..., None], -1)
    missing = max(0, top_k - real_BM.shape[1])

    def cut(values: Tensor, filler: float) -> Tensor:
        padding = (0, 0) * (values.ndim - 2) + (0, missing)
        return torch.nn.functional.pad(values[:, :top_k], padding, value=filler).cpu()

    base_BM2, inserted_BM2 = (
        None if range_BM2 is None else cut(range_BM2.masked_fill(~real_BM[..., None], 0), 0)
        for range_BM2 in arrays.ranges(docid_BML.shape[-1], beams.place)
    )
    count_B = real_BM.sum(1).clamp(max=top_k).cpu()
    return BeamResult(cut(docid_BML, -1), base_BM2, cut(beams.logp_BM, -torch.inf), count_B, inserted_BM2)


def _is_whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked_widths(beam_width: int | Sequence[int], levels: int) -> list[int]:
    """One width per level searched."""
    one = _is_whole(beam_width)
    given = [beam_width] * levels if one else beam_width
    if isinstance(given, (np.ndarray, Tensor)):
        given = given.tolist()
    if not isinstance(given, (list, tuple)) or len(given) != levels or not all(_is_whole(w) and w >= 1 for w in given):
        raise InputError(f"beam_width must be one whole number ≥ 1, or {levels} of them, found {beam_width!r}")
    return [int(width) for width in given]


def _checked_levels(levels: int | None, trie: Trie | LiveView) -> int:
    if levels is None:
        return trie.levels
    if not _is_whole(levels) or not 1 <= levels <= trie.levels:
        raise InputError(f"levels must be a whole number from 1 to {trie.levels}, or None for all, found {levels!r}")
    return int(levels)


@torch.inference_mode()
def constrained_beam_search(
    model,
    trie: Trie | LiveView,
    input_ids,
    attention_mask,
    *,
    beam_width: int | Sequence[int],
    top_k: int,
    levels: int | None = None,
    allowed=None,
    normalize: str = "level",
    memory=None,
) -> BeamResult:
    """The `top_k` most likely IDs of each query that a beam of `beam_width` (one number, or one per level) finds.

    `model`: any kind of generator whose last ΣK vocabulary rows are the ID tokens, or any `Decoder` of the trie's IDs.
    `trie`: a `Trie`, or a `LiveView`, whose live products alone are found, as in a trie rebuilt from them. `input_ids`,
    `attention_mask`: integers B×T. `memory`: what `decoder.encode` gave for these queries, where the caller has it
    already (an EncoderDecoder's holds the queries' dense vectors). `levels`: stop after so many, at clusters (None: all
    L); P is then that of the prefix. `allowed`: a `Filter`, or bool N over trie rows (of a live view: a `LiveFilter`, or
    bool over base rows and inserted products), or a list of B of these or None; IDs without an allowed row are never
    returned (a range may still hold rows that are not allowed). `normalize`: scores are log-probabilities over the
    "level"'s codes, as in training, or over the whole "vocabulary", as in `generate` with length_penalty 0; never over
    the survivors.

    With `beam_width` ≥ number of IDs this is the exact ranking. Fewer results than `top_k` come back when the trie,
    the filter or the last beam has no more. Raises InputError for a width, `top_k` or `levels` that is no whole number
    or out of range, no query or one without tokens, tokens beyond the vocabulary, a model or a filter that does not fit
    the trie, or logits that are not finite. (METHODS: softmax first, then the constraint.)
    """
    levels = _checked_levels(levels, trie)
    widths = _checked_widths(beam_width, levels)
    if not _is_whole(top_k) or top_k < 1 or normalize not in ("level", "vocabulary"):
        raise InputError(
            f"top_k must be a whole number ≥ 1 and normalize 'level' or 'vocabulary', found {top_k!r} and {normalize!r}"
        )
    decoder = decoder_for(model, codes_per_level=trie.codes_per_level)
    device = decoder.device
    ids_BT, mask_BT = checked_queries(input_ids, attention_mask, decoder)
    filters = filter_tensors(filters_for(allowed, trie, len(ids_BT)), trie, device)
    arrays = tensors(trie, device)
    memory, cache = decoder.encode(ids_BT, mask_BT) if memory is None else memory, None
    root_B1 = torch.zeros(len(ids_BT), 1, dtype=torch.long, device=device)
    beams = _Beams(arrays.root(len(ids_BT)), root_B1.float(), root_B1, root_B1[..., None][..., :0])
    code_BM, finite = root_B1, torch.ones((), dtype=torch.bool, device=device)
    for level in range(levels):
        hidden_BMD, cache = decoder.decode_step(level, memory, cache, beams.parent_BM, code_BM)
        logits_BMK = decoder.level_logits(level, hidden_BMD, beams.prefix_BML).float()
        if normalize == "level":
            total_BM = logits_BMK.logsumexp(-1)
        else:
            total_BM = decoder.log_partition(level, hidden_BMD, beams.prefix_BML).float()
            finite = finite & ~logits_BMK.isnan().any()
        finite = finite & total_BM.isfinite().all()
        beams = _extend(beams, logits_BMK - total_BM[..., None], arrays, widths[level], filters)
        code_BM = beams.prefix_BML[..., -1]
    if not finite:
        raise InputError("the model gives NaN or infinite logits; export it again, or serve it in float32")
    return _result(beams, arrays, top_k)
