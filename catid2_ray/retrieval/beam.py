"""Constrained beam search: the best IDs of a batch of queries, in log space, with array operations alone.

Only children of a beam's own trie node are ever candidates, so no invalid ID can appear. Scores are renormalised over a
node's children for a generator that was trained so alone (`normalize="trie"`), and never over what a filter leaves. Equal
scores are ordered by ID, at the edge of the beam too, so results do not depend on how a device breaks ties. Shapes
depend on the trie and the widths only, but where beams with one way to go are left out, on a CPU; the host waits once, at the end.

B batch, T query tokens, M beams, L levels, K codes (or results), C children of the widest node of a level, N rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.decoders import checked_queries, decoder_for
from catid2_ray.retrieval.live_view import LiveView, filters_for
from catid2_ray.retrieval.lookahead import Ahead
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import LiveTensors, TrieTensors, filter_tensors, tensors

NORMALIZE = ("level", "vocabulary", "trie")
_DEAD = torch.iinfo(torch.int64).min


class BeamResult(NamedTuple):
    """CPU tensors, best first. Beyond `count_B`: docid −1, range (0, 0), logp and score −inf.

    `docid_BKL` int64 codes 0…K_l−1, as many as levels were searched; `row_range_BK2` int64, trie rows start … end−1 that
    carry the ID (or begin with it); `logp_BK` float32, natural log of P(ID | query); `count_B` int64, number of
    results. Of a live view with inserted products also `inserted_range_BK2` int64: N + j, for the j-th inserted product
    in the view's ID order; (0, 0) for both ranges where that part has none. `live.result_rows` lists the products. Of a
    search that looks ahead `score_BK` float32, S, which orders them; `logp_BK` is 0 where it did not ask the generator.
    """

    docid_BKL: Tensor
    row_range_BK2: Tensor
    logp_BK: Tensor
    count_B: Tensor
    inserted_range_BK2: Tensor | None = None
    score_BK: Tensor | None = None


def _sort_key(score: Tensor, rank: Tensor, live: Tensor) -> Tensor:
    """int64 that orders candidates by score, then by ID (`rank`): the bits of a float, made to ascend."""
    bits = (score + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return torch.where(live, (ascending << 32) + (0xFFFFFFFF - rank), _DEAD)


class _Beams(NamedTuple):
    """After a step: each beam's place in the trie, the score that chose it (dead beams: −inf), log P, ⟨q, v⟩ of its node
    where the search looks ahead (None where not), the beam it extends, its codes."""

    place: tuple[Tensor, ...]
    score_BM: Tensor
    logp_BM: Tensor
    near_BM: Tensor | None
    parent_BM: Tensor
    prefix_BML: Tensor


def _extend(
    beams: _Beams,
    step: "_Step | None",
    arrays: TrieTensors | LiveTensors,
    width: int,
    filters,
    ahead: Ahead | None,
) -> _Beams:
    """The `width` best children of all beams of each query; `filters` as `filter_tensors` gives them. `step`: None where the
    generator is not asked."""
    level = beams.prefix_BML.shape[-1]
    children = arrays.children(level, beams.place, beams.score_BM > -torch.inf, beams.prefix_BML, filters)
    logp_BMC = near_BMC = None
    if step is not None:
        if step.over_children:
            step_BMC = arrays.renormalized(level, beams.place, children, step.score_BMK)
        else:
            step_BMC = step.score_BMK.gather(-1, children.code_BMC)
        if ahead is not None:
            step_BMC = arrays.fair(level, beams.place, children, step_BMC)
        logp_BMC = beams.logp_BM[..., None] + step_BMC
    score_BMC = logp_BMC
    if ahead is not None:
        score_BMC, near_BMC = ahead.scores(level + 1, arrays, children, beams.near_BM, logp_BMC)
    live_BMC = children.live_BMC & (score_BMC > -torch.inf)
    key_BC = _sort_key(score_BMC, children.rank_BMC, live_BMC).flatten(1)
    best = key_BC.topk(min(width, key_BC.shape[1]), dim=1)
    parent_BM = best.indices // children.widest

    def taken(values_BMC: Tensor) -> Tensor:
        return values_BMC.flatten(1).gather(1, best.indices)

    code_BM, score_BM = taken(children.code_BMC), taken(score_BMC).masked_fill(best.values == _DEAD, -torch.inf)
    kept_BML = beams.prefix_BML.gather(1, parent_BM[..., None].expand(-1, -1, level))
    prefix_BML = torch.cat((kept_BML, code_BM[..., None]), 2)
    place = arrays.kept(level, children, best.indices, code_BM)
    if ahead is None:
        return _Beams(place, score_BM, score_BM, None, parent_BM, prefix_BML)
    logp_BM = torch.zeros_like(score_BM) if logp_BMC is None else taken(logp_BMC)
    return _Beams(place, score_BM, logp_BM, taken(near_BMC), parent_BM, prefix_BML)


def _result(beams: _Beams, arrays: TrieTensors | LiveTensors, top_k: int, ahead: Ahead | None) -> BeamResult:
    real_BM = beams.score_BM > -torch.inf
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
    logp_BM = cut(beams.logp_BM.masked_fill(~real_BM, -torch.inf), -torch.inf)
    score_BM = None if ahead is None else cut(beams.score_BM, -torch.inf)
    return BeamResult(cut(docid_BML, -1), base_BM2, logp_BM, count_B, inserted_BM2, score_BM)


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


class _Step(NamedTuple):
    """Of every next code of every beam B×M×K: log p, or where the trie's children alone are compared (`over_children`) its
    logit, and any number for beams that have one way to go."""

    score_BMK: Tensor
    over_children: bool


class _Steps:
    """What the generator says of each step's codes. `levels`: how many the search has."""

    def __init__(self, model, trie: Trie | LiveView, input_ids, attention_mask, normalize: str, memory, levels: int):
        self.decoder, self.normalize = decoder_for(model, codes_per_level=trie.codes_per_level), normalize
        self.levels, self.slot_BM = levels, None
        ids_BT, mask_BT = checked_queries(input_ids, attention_mask, self.decoder)
        self.batch = len(ids_BT)
        self.memory, self.cache = self.decoder.encode(ids_BT, mask_BT) if memory is None else memory, None
        self.finite = torch.ones((), dtype=torch.bool, device=self.decoder.device)

    def ask(self, level: int, beams: _Beams, arrays: TrieTensors | LiveTensors) -> _Step:
        if self.normalize == "trie" and level and self.decoder.device.type == "cpu":
            return _Step(self._of_undecided(level, beams, arrays), True)
        prefix_BML = beams.prefix_BML
        code_BM = prefix_BML[..., -1] if level else beams.parent_BM
        hidden_BMD, self.cache = self.decoder.decode_step(level, self.memory, self.cache, beams.parent_BM, code_BM)
        logits_BMK = self.decoder.level_logits(level, hidden_BMD, prefix_BML).float()
        if self.normalize == "trie":
            self.finite = self.finite & logits_BMK.isfinite().all()
            self.slot_BM = torch.zeros_like(beams.parent_BM)
            return _Step(logits_BMK, True)
        if self.normalize == "level":
            total_BM = logits_BMK.logsumexp(-1)
        else:
            total_BM = self.decoder.log_partition(level, hidden_BMD, prefix_BML).float()
            self.finite = self.finite & ~logits_BMK.isnan().any()
        self.finite = self.finite & total_BM.isfinite().all()
        return _Step(logits_BMK - total_BM[..., None], False)

    def _of_undecided(self, level: int, beams: _Beams, arrays: TrieTensors | LiveTensors) -> Tensor:
        """B×M×K, the logits of beams with more than one way to the end, 0 of the others: what has one way has P = 1, so the decoder
        runs without them. A beam with two ways never comes from one with one, so none lacks its past.

        Beams that are asked are moved to the front; the host waits to count them, so a GPU runs all.
        """
        prefix_BML = beams.prefix_BML
        asked_BM = (beams.score_BM > -torch.inf) & ~arrays.decided(level, beams.place, self.levels)
        logits_BMK = torch.zeros(*asked_BM.shape, self.decoder.codes_per_level[level], device=self.decoder.device)
        most = int(asked_BM.sum(1).max())
        if not most:
            return logits_BMK
        at_BA = (~asked_BM).byte().argsort(dim=1, stable=True)[:, :most]
        parent_BA = self.slot_BM.gather(1, beams.parent_BM.gather(1, at_BA))
        prefix_BAL = prefix_BML.gather(1, at_BA[..., None].expand(-1, -1, level))
        hidden_BAD, self.cache = self.decoder.decode_step(
            level, self.memory, self.cache, parent_BA, prefix_BAL[..., -1]
        )
        logits_BAK = self.decoder.level_logits(level, hidden_BAD, prefix_BAL).float()
        self.finite = self.finite & logits_BAK.isfinite().all()
        self.slot_BM = torch.zeros_like(beams.parent_BM).scatter_(1, at_BA, torch.arange(most).expand_as(at_BA))
        return logits_BMK.scatter_(1, at_BA[..., None].expand_as(logits_BAK), logits_BAK)

    def check(self) -> None:
        if not self.finite:
            raise InputError("the model gives NaN or infinite logits; export it again, or serve it in float32")


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
    ahead: Ahead | None = None,
    at_level: Callable[[int, Callable[[int], BeamResult]], bool] | None = None,
) -> BeamResult:
    """The `top_k` most likely IDs of each query that a beam of `beam_width` (one number, or one per level) finds.

    `model`: any kind of generator whose last ΣK vocabulary rows are the ID tokens, or any `Decoder` of the trie's IDs.
    `trie`: a `Trie`, or a `LiveView`, whose live products alone are found, as in a trie rebuilt from them. `input_ids`,
    `attention_mask`: integers B×T. `memory`: what `decoder.encode` gave for these queries, where the caller has it
    already (an EncoderDecoder's holds the queries' dense vectors). `levels`: stop after so many, at clusters (None: all
    L); P is then that of the prefix. `allowed`: a `Filter`, or bool N over trie rows (of a live view: a `LiveFilter`, or
    bool over base rows and inserted products), or a list of B of these or None; IDs without an allowed row are never
    returned (a range may still hold rows that are not allowed). `normalize`: scores are log-probabilities over the
    "level"'s codes, as in training, over the whole "vocabulary", as in `generate` with length_penalty 0, or over the
    children of the beam's node in the "trie", for a generator of loss "trie"; never over what a filter leaves.
    `ahead`: what chooses and orders beams in place of log P alone (`lookahead.py`); where its weight of log P is 0, `model` and
    the queries' tokens are not looked at and may be None. `at_level`: called after each level but the last with its number
    and a function, `top_k` → what was found so far; the search ends there where it returns True.

    With `beam_width` ≥ number of IDs this is the exact ranking. Fewer results than `top_k` come back when the trie,
    the filter or the last beam has no more. Raises InputError for a width, `top_k` or `levels` that is no whole number
    or out of range, no query or one without tokens, tokens beyond the vocabulary, a model or a filter that does not fit
    the trie, another number of query vectors than of queries, or logits that are not finite. (METHODS: softmax first,
    then the constraint.)
    """
    levels = _checked_levels(levels, trie)
    widths = _checked_widths(beam_width, levels)
    if not _is_whole(top_k) or top_k < 1 or normalize not in NORMALIZE:
        raise InputError(
            f"top_k must be a whole number ≥ 1 and normalize one of {', '.join(NORMALIZE)}, found {top_k!r} and {normalize!r}"
        )
    if ahead is not None and not ahead.asks_the_generator:
        steps, batch, device = None, len(ahead.query_BD), ahead.device
    else:
        steps = _Steps(model, trie, input_ids, attention_mask, normalize, memory, levels)
        batch, device = steps.batch, steps.decoder.device
    if ahead is not None and len(ahead.query_BD) != batch:
        raise InputError(f"{len(ahead.query_BD)} query vectors for {batch} queries; give one for each")
    filters = filter_tensors(filters_for(allowed, trie, batch), trie, device)
    arrays = tensors(trie, device)
    root_B1 = torch.zeros(batch, 1, dtype=torch.long, device=device)
    nothing_B1 = root_B1.float()
    beams = _Beams(arrays.root(batch), nothing_B1, nothing_B1, nothing_B1, root_B1, root_B1[..., None][..., :0])
    for level in range(levels):
        step = None if steps is None else steps.ask(level, beams, arrays)
        beams = _extend(beams, step, arrays, widths[level], filters, ahead)
        if at_level is not None and level + 1 < levels:
            if device.type != "cpu":
                torch.cuda.synchronize(device)  # else only what was asked for has been done
            if at_level(level + 1, functools.partial(_result, beams, arrays, ahead=ahead)):
                break
    if steps is not None:
        steps.check()
    return _result(beams, arrays, top_k, ahead)
