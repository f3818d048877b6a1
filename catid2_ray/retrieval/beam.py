"""Constrained beam search: the best IDs of a batch of queries, in log space, with array operations alone.

Only children of a beam's own trie node are ever candidates, so no invalid ID can appear and nothing is renormalised
after the constraint. Equal scores are ordered by ID, at the edge of the beam too, so results do not depend on how a
device breaks ties. Shapes depend on the trie and the widths only; the host waits once, at the end.

B batch, T query tokens, M beams, L levels, K codes (or results), C children of the widest node of a level, N rows.
"""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.filters import Filter, FilterTensors, allowed_before
from catid2_ray.retrieval.trie import Trie

_DEAD = torch.iinfo(torch.int64).min


class BeamResult(NamedTuple):
    """CPU tensors, best first. Beyond `count_B`: docid −1, range (0, 0), logp −inf.

    `docid_BKL` int64 codes 0…K_l−1; `row_range_BK2` int64, trie rows start … end−1 that carry the ID; `logp_BK`
    float32, natural log of P(ID | query); `count_B` int64, number of results.
    """

    docid_BKL: Tensor
    row_range_BK2: Tensor
    logp_BK: Tensor
    count_B: Tensor


class _Starts(NamedTuple):
    """`trie_arrays.Starts` as tensors of one device: the numbers themselves, or the exceptions to one entry a range."""

    whole: Tensor | None
    extra: Tensor | None

    def at(self, index: Tensor) -> Tensor:
        """int64, the start of each range `index` (int64, any shape)."""
        if self.whole is None:
            return index + torch.searchsorted(self.extra, index.to(self.extra.dtype))
        return taken(self.whole, index)


class _TrieTensors(NamedTuple):
    """A trie's arrays as tensors of one device (on CPU the same memory), of the small types that they are stored in."""

    child_start: list[_Starts]
    token: list[Tensor]
    row_start: list[_Starts]


def taken(table: Tensor, index: Tensor) -> Tensor:
    """int64 `table[index]`; only what was taken is widened."""
    return table.index_select(0, index.flatten()).view(index.shape).long()


_TENSORS: WeakKeyDictionary[Trie, dict[torch.device, _TrieTensors]] = WeakKeyDictionary()


def trie_tensors(trie: Trie, device: torch.device) -> _TrieTensors:
    """The trie on that device; kept as long as the trie lives."""
    cached = _TENSORS.setdefault(trie, {})
    if device not in cached:

        def move(array) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device)

        child_start, row_start = (
            [_Starts(move(starts.whole), move(starts.extra)) for starts in part]
            for part in (trie.child_start, trie.row_start)
        )
        cached[device] = _TrieTensors(child_start, [move(token) for token in trie.token], row_start)
    return cached[device]


def _widths(beam_width: int | Sequence[int], levels: int) -> list[int]:
    widths = [int(width) for width in (beam_width if np.ndim(beam_width) else [beam_width] * levels)]
    if len(widths) != levels or min(widths) < 1:
        raise InputError(f"beam_width must be one whole number ≥ 1, or {levels} of them, found {beam_width}")
    return widths


def query_tensors(input_ids, attention_mask, device: torch.device) -> tuple[Tensor, Tensor]:
    ids_BT, mask_BT = torch.as_tensor(input_ids), torch.as_tensor(attention_mask)
    if ids_BT.ndim != 2 or mask_BT.shape != ids_BT.shape:
        raise InputError(
            f"input_ids and attention_mask must both be B×T, found {tuple(ids_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    empty_B = ~mask_BT.bool().any(1)
    if empty_B.any():
        raise InputError(f"query {int(empty_B.nonzero()[0])} of the batch has no token; leave empty queries out")
    return ids_BT.to(device, torch.long), mask_BT.to(device)


def _filter(allowed, rows: int, device: torch.device) -> FilterTensors:
    if not isinstance(allowed, Filter):
        allowed = torch.as_tensor(allowed)
        if allowed.dtype != torch.bool or allowed.shape != (rows,):
            raise InputError(
                f"allowed must be a filter or {rows} booleans, one per trie row, found {allowed.dtype} of "
                f"{tuple(allowed.shape)}"
            )
        allowed = Filter.of(allowed.cpu().numpy())
    if len(allowed) != rows:
        raise InputError(f"the filter is over {len(allowed)} rows, the trie has {rows}; take both from one release")
    return allowed.tensors(device)


def _sort_key(score: Tensor, child: Tensor, live: Tensor) -> Tensor:
    """int64 that orders candidates by score, then by ID (a node's number): the bits of a float, made to ascend."""
    bits = (score + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return torch.where(live, (ascending << 32) + (0xFFFFFFFF - child), _DEAD)


class _Beams(NamedTuple):
    """After a step: each beam's node of the new level, score, the beam it extends, its codes; dead beams at −inf."""

    node_BM: Tensor
    logp_BM: Tensor
    parent_BM: Tensor
    prefix_BML: Tensor


def _extend(beams: _Beams, step_logp_BMK: Tensor, trie: Trie, arrays: _TrieTensors, width: int, kept) -> _Beams:
    """The `width` best children of all beams of each query; `kept` FilterTensors or None."""
    level = beams.prefix_BML.shape[-1]
    start_BM1, end_BM1 = (arrays.child_start[level].at(beams.node_BM + i)[..., None] for i in (0, 1))
    # Children of a node lie end to end: C + 1 boundaries bound them all.
    edge_BMC1 = start_BM1 + torch.arange(trie.widest[level] + 1, device=start_BM1.device)
    child_BMC = edge_BMC1[..., :-1]
    live_BMC = (child_BMC < end_BM1) & (beams.logp_BM > -torch.inf)[..., None]
    if kept is not None:
        before_BMC1 = allowed_before(kept, arrays.row_start[level + 1].at(torch.minimum(edge_BMC1, end_BM1)))
        live_BMC &= before_BMC1[..., 1:] > before_BMC1[..., :-1]
    child_BMC = torch.where(live_BMC, child_BMC, 0)
    code_BMC = taken(arrays.token[level + 1], child_BMC)
    score_BMC = beams.logp_BM[..., None] + step_logp_BMK.gather(-1, code_BMC)
    live_BMC &= score_BMC > -torch.inf
    key_BC = _sort_key(score_BMC, child_BMC, live_BMC).flatten(1)
    best = key_BC.topk(min(width, key_BC.shape[1]), dim=1)
    dead_BM = best.values == _DEAD
    parent_BM = best.indices // trie.widest[level]
    code_BM, node_BM, logp_BM = (x.flatten(1).gather(1, best.indices) for x in (code_BMC, child_BMC, score_BMC))
    kept_BML = beams.prefix_BML.gather(1, parent_BM[..., None].expand(-1, -1, level))
    prefix_BML = torch.cat((kept_BML, code_BM[..., None]), 2)
    return _Beams(node_BM, logp_BM.masked_fill(dead_BM, -torch.inf), parent_BM, prefix_BML)


def _result(beams: _Beams, arrays: _TrieTensors, top_k: int) -> BeamResult:
    found_BM = beams.logp_BM > -torch.inf
    first_BM, last_BM = (arrays.row_start[-1].at(beams.node_BM + i) for i in (0, 1))
    docid_BML = beams.prefix_BML.masked_fill(~found_BM[..., None], -1)
    range_BM2 = torch.stack((first_BM, last_BM), 2).masked_fill(~found_BM[..., None], 0)
    missing = max(0, top_k - found_BM.shape[1])

    def cut(values: Tensor, filler: float) -> Tensor:
        padding = (0, 0) * (values.ndim - 2) + (0, missing)
        return torch.nn.functional.pad(values[:, :top_k], padding, value=filler).cpu()

    count_B = found_BM.sum(1).clamp(max=top_k).cpu()
    return BeamResult(cut(docid_BML, -1), cut(range_BM2, 0), cut(beams.logp_BM, -torch.inf), count_B)


@torch.inference_mode()
def constrained_beam_search(
    model,
    trie: Trie,
    input_ids,
    attention_mask,
    *,
    beam_width: int | Sequence[int],
    top_k: int,
    allowed=None,
    normalize: str = "level",
    memory=None,
) -> BeamResult:
    """The `top_k` most likely IDs of each query that a beam of `beam_width` (one number, or one per level) finds.

    `model`: any kind of generator whose last ΣK vocabulary rows are the ID tokens, or any `Decoder`. `memory`: what
    `decoder.encode` gave for these queries, where the caller has it already (an EncoderDecoder's holds the queries'
    dense vectors). `input_ids`, `attention_mask`:
    integers B×T. `allowed`: a `Filter`, or bool N over trie rows; IDs without an allowed row are never returned (a
    shared ID's range may still hold rows that are not allowed). `normalize`: scores are log-probabilities over the
    "level"'s codes, as in training, or over the whole "vocabulary", as in `generate` with length_penalty 0; never over
    the survivors.

    With `beam_width` ≥ number of IDs this is the exact ranking. Fewer results than `top_k` come back when the trie,
    the filter or the last beam has no more. Raises InputError for a width or `top_k` below 1, a query without tokens,
    a model that does not fit the trie, or logits that are not finite. (METHODS: softmax first, then the constraint.)
    """
    widths = _widths(beam_width, trie.levels)
    if top_k < 1 or normalize not in ("level", "vocabulary"):
        raise InputError(f"top_k must be ≥ 1 and normalize 'level' or 'vocabulary', found {top_k} and {normalize!r}")
    decoder = decoder_for(model, codes_per_level=trie.codes_per_level)
    device = decoder.device
    ids_BT, mask_BT = query_tensors(input_ids, attention_mask, device)
    kept = None if allowed is None else _filter(allowed, trie.rows, device)
    arrays = trie_tensors(trie, device)
    memory, cache = decoder.encode(ids_BT, mask_BT) if memory is None else memory, None
    root_B1 = torch.zeros(len(ids_BT), 1, dtype=torch.long, device=device)
    beams = _Beams(root_B1, root_B1.float(), root_B1, root_B1[..., None][..., :0])
    code_BM, finite = root_B1, torch.ones((), dtype=torch.bool, device=device)
    for level in range(trie.levels):
        hidden_BMD, cache = decoder.decode_step(level, memory, cache, beams.parent_BM, code_BM)
        logits_BMK = decoder.level_logits(level, hidden_BMD, beams.prefix_BML).float()
        if normalize == "level":
            total_BM = logits_BMK.logsumexp(-1)
        else:
            total_BM = decoder.log_partition(level, hidden_BMD, beams.prefix_BML).float()
            finite = finite & ~logits_BMK.isnan().any()
        finite = finite & total_BM.isfinite().all()
        beams = _extend(beams, logits_BMK - total_BM[..., None], trie, arrays, widths[level], kept)
        code_BM = beams.prefix_BML[..., -1]
    if not finite:
        raise InputError("the model gives NaN or infinite logits; its weights are damaged or its precision overflows")
    return _result(beams, arrays, top_k)
