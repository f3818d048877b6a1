"""Recall at k, as the paper counts it: the share of a query's relevant products found in the first k, averaged; how sure it is.

It is not the hit rate: a query with 10 relevant products of which 1 was found counts 0.1. Independent of the number of workers as
long as each query is counted once.

The bootstrap over queries is paired: all columns share one draw of queries per resample, so a column of differences of two methods
is that of the same queries, whose common hardness cancels. Percentile intervals (Efron 1979; for retrieval Sakai 2006); nothing
assumes a normal error.

Q queries, M columns (methods × cut-offs), R resamples.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from catid2_ray.errors import InputError

RESAMPLES = 10_000
_DRAWS = 2**21  # queries drawn at once: 16 MiB of indices, whatever Q


def recalls(ranked: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], ks: Sequence[int]) -> np.ndarray:
    """float64 Q×len(ks), |relevant ∩ top k| / |relevant| per query; NaN in the rows of queries without any relevant.

    `ranked`: Q lists of product ids, best first, of any length; `relevant`: Q sets. The metric of CAT-ID²
    (arXiv 2511.01461), independent of the order of the queries.
    Raises InputError for lists of different length, a product that is ranked twice, or a k below 1.
    """
    if len(ranked) != len(relevant):
        raise InputError(
            f"{len(ranked)} ranked lists for {len(relevant)} queries; give one list per query, in their order"
        )
    if not ks or min(ks) < 1:
        raise InputError(f"recall@k needs cut-offs of at least 1, found {list(ks)}")
    recall_QK = np.full((len(ranked), len(ks)), np.nan)
    for row, (products, wanted) in enumerate(zip(ranked, relevant)):
        products = list(products)
        if len(set(products)) != len(products):
            twice = next(p for i, p in enumerate(products) if p in products[:i])
            raise InputError(f"query {row}: product {twice!r} is ranked twice; a list names every product at most once")
        if wanted:
            hits = np.cumsum([0, *(product in wanted for product in products[: max(ks)])])
            recall_QK[row] = hits[np.minimum(ks, len(hits) - 1)] / len(wanted)
    return recall_QK


def recall_at(
    ranked: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], ks: Sequence[int]
) -> dict[int, float]:
    """{k: recall@k}, `recalls` averaged over the queries that have at least one relevant product.

    Raises InputError as `recalls` does, and where no query has a relevant product.
    """
    recall_QK = recalls(ranked, relevant, ks)
    counted = np.array([len(wanted) > 0 for wanted in relevant], bool)
    if not counted.any():
        raise InputError(f"none of the {len(relevant)} queries has a relevant product; recall is not defined")
    return {int(k): float(x) for k, x in zip(ks, recall_QK[counted].mean(0))}


class Interval(NamedTuple):
    """The mean over the queries and the ends of its interval."""

    mean: float
    low: float
    high: float


def resampled_means(value_QM, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """float64 R×M: each row the columns' means over Q queries drawn with replacement, one draw for all columns.

    A pure function of its arguments. Cost: R·Q draws and one R×Q by Q×M product, in blocks of about 16 MiB. Raises
    InputError for no query, for fewer than 1 resample, and for values that are not finite.
    """
    value_QM = np.asarray(value_QM, np.float64)
    if value_QM.ndim != 2 or not len(value_QM) or resamples < 1:
        raise InputError(
            f"the bootstrap needs Q×M values of at least one query and at least one resample, found shape "
            f"{value_QM.shape} and {resamples} resamples"
        )
    if not np.isfinite(value_QM).all():
        query, column = (int(i) for i in np.argwhere(~np.isfinite(value_QM))[0])
        raise InputError(
            f"query {query} has {value_QM[query, column]} in column {column}; leave out queries that a figure is not "
            "defined for"
        )
    queries, rng = len(value_QM), np.random.default_rng(seed)
    mean_RM = np.empty((resamples, value_QM.shape[1]))
    block = max(1, _DRAWS // queries)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn_RQ = rng.integers(queries, size=(rows, queries)) + queries * np.arange(rows)[:, None]
        count_RQ = np.bincount(drawn_RQ.ravel(), minlength=rows * queries).reshape(rows, queries)
        mean_RM[start : start + rows] = count_RQ.astype(np.float64) @ value_QM / queries
    return mean_RM


def bootstrap_means(value_QM, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval]:
    """The mean of each column and its percentile interval, from one set of draws. Raises InputError as `resampled_means` does."""
    if not 0 < level < 1:
        raise InputError(f"an interval's level must lie between 0 and 1, found {level}")
    value_QM = np.asarray(value_QM, np.float64)
    mean_RM = resampled_means(value_QM, resamples=resamples, seed=seed)
    low_M, high_M = np.quantile(mean_RM, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return [Interval(*map(float, row)) for row in zip(value_QM.mean(0), low_M, high_M)]
