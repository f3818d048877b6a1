"""What an ID is worth to a query: graded by behaviour or by relevance, plus a bounded bonus from a downstream ranker.

A query's judgements are one row of packed IDs with their rewards, best first, so that the rewards of B groups are one
comparison of small arrays. An ID that several products share takes the best of those that are judged.

P pairs, Q queries, J judged IDs a query, B groups, N members, E expert candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import RecipeError

BEHAVIOURS = ("paid", "clicked", "exposed")


def relevance_rewards(
    relevance_P: np.ndarray, *, grades: Sequence[tuple[float, float]] | None, low: float, high: float
):
    """float32 P. `grades`: (relevance, reward) pairs by rising relevance, straight lines between, flat outside; by
    default (relevance − low) / (high − low), and 1 where all grades are equal."""
    relevance_P = np.asarray(relevance_P, np.float64)
    if grades is None:
        reward_P = (relevance_P - low) / (high - low) if high > low else np.ones_like(relevance_P)
        return reward_P.clip(0, 1).astype(np.float32)
    at, worth = np.array(grades, np.float64).T
    if (np.diff(at) <= 0).any():
        raise RecipeError(f"grades must rise in relevance, found {list(at)}")
    return np.interp(relevance_P, at, worth).astype(np.float32)


class JudgedRows(NamedTuple):
    """One row a query, in the order of the query numbers given. `judged_QJ` int64 packed IDs, −1 = none; `reward_QJ`
    float32; `relevant_QJ` int32, relevant products of that ID; `cut`: judged IDs beyond J, left out."""

    judged_QJ: np.ndarray
    reward_QJ: np.ndarray
    relevant_QJ: np.ndarray
    cut: int


def judged_rows(query_P, packed_P, reward_P, relevant_P, *, queries: int, width: int) -> JudgedRows:
    """Bring pairs together by query: each ID once with its best reward, best first (equal ones by ID), at most `width`.

    `query_P`: 0 … queries − 1; `packed_P`: int64 IDs; `relevant_P`: bool. By two sorts, whatever the number of pairs.
    """
    query_P, packed_P = np.asarray(query_P, np.int64), np.asarray(packed_P, np.int64)
    order_P = np.lexsort((packed_P, query_P))
    query_P, packed_P, reward_P = query_P[order_P], packed_P[order_P], np.asarray(reward_P, np.float32)[order_P]
    relevant_P = np.asarray(relevant_P, np.int32)[order_P]
    fresh_P = np.ones(len(query_P), bool)
    fresh_P[1:] = (query_P[1:] != query_P[:-1]) | (packed_P[1:] != packed_P[:-1])
    first_U = np.flatnonzero(fresh_P)
    query_U, packed_U = query_P[first_U], packed_P[first_U]
    reward_U = np.maximum.reduceat(reward_P, first_U) if len(first_U) else reward_P
    relevant_U = np.add.reduceat(relevant_P, first_U) if len(first_U) else relevant_P
    order_U = np.lexsort((packed_U, -reward_U, query_U))
    query_U = query_U[order_U]
    place_U = np.arange(len(query_U)) - np.searchsorted(query_U, query_U)
    kept_U = place_U < width
    at = query_U[kept_U], place_U[kept_U]
    rows = JudgedRows(
        np.full((queries, width), -1, np.int64), np.zeros((queries, width), np.float32),
        np.zeros((queries, width), np.int32), int((~kept_U).sum()),
    )  # fmt: skip
    for table_QJ, values_U in zip(rows, (packed_U, reward_U, relevant_U)):
        table_QJ[at] = values_U[order_U][kept_U]
    return rows


def looked_up(packed_BN: Tensor, known_BJ: Tensor, value_BJ: Tensor, *, missing: float) -> Tensor:
    """float32 B×N, the value that a query's row has for each ID, or `missing`; empty places (−1) match nothing."""
    same_BNJ = (packed_BN[:, :, None] == known_BJ[:, None]) & (known_BJ >= 0)[:, None]
    value_BN = torch.where(same_BNJ, value_BJ[:, None].float(), -torch.inf).amax(-1)
    return torch.where(same_BNJ.any(-1), value_BN, missing)


def graded(
    packed_BN: Tensor, judged_BJ: Tensor, reward_BJ: Tensor, valid_BN: Tensor, *, valid: float, invalid: float
) -> Tensor:
    """float32 B×N: what the judgement says, `valid` for an unjudged ID of the catalogue, `invalid` for any other.

    (CQ-SID: the first match of paid, clicked, exposed, valid, invalid.)
    """
    return torch.where(valid_BN, looked_up(packed_BN, judged_BJ, reward_BJ, missing=valid), invalid)


def ranker_bonus(score_BN: Tensor, *, bound: float) -> Tensor:
    """float32 B×N in [0, bound): bound · tanh(max(z, 0)), z the score's deviation from its group in standard deviations.

    NaN = no score: no bonus, and no part in the mean. Any monotone scale of scores will do, and a ranker cannot outvote
    the judgements by more than `bound`. (VARG, arXiv 2609.14493: at most 0.2.)
    """
    scored_BN = ~score_BN.isnan()
    count_B1 = scored_BN.sum(1, keepdim=True).clamp(min=1)
    filled_BN = score_BN.nan_to_num(0.0)
    mean_B1 = filled_BN.sum(1, keepdim=True) / count_B1
    off_BN = (filled_BN - mean_B1).masked_fill(~scored_BN, 0)
    std_B1 = (off_BN.square().sum(1, keepdim=True) / count_B1).sqrt()
    z_BN = torch.where(std_B1 > 1e-12, off_BN / std_B1.clamp(min=1e-12), 0.0)
    return bound * z_BN.clamp(min=0).tanh()


def expert_candidates(
    judged_BJ: Tensor, reward_BJ: Tensor, *, least: float, most: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(packed int64 B×E, how many count B): each query's judged IDs of reward ≥ `least`, at most `most`, in an order drawn
    from `seed`, so that over the steps all have their turn."""
    draw_BJ = torch.rand(judged_BJ.shape, generator=torch.Generator().manual_seed(seed)).to(judged_BJ.device)
    good_BJ = (judged_BJ >= 0) & (reward_BJ >= least)
    place_BE = draw_BJ.masked_fill(~good_BJ, 2.0).argsort(1)[:, :most]
    return judged_BJ.gather(1, place_BE), good_BJ.sum(1).clamp(max=most)


def unpack(packed_BN: Tensor, codes_per_level: Sequence[int], radix_L: np.ndarray) -> Tensor:
    """int64 B×N×L, `DocidSpace.unpack` on a device; empty places (−1) give zeros."""
    device = packed_BN.device
    radix_L, most_L = torch.from_numpy(radix_L).to(device), torch.tensor(list(codes_per_level), device=device)
    return packed_BN.clamp(min=0)[..., None] // radix_L % most_L
