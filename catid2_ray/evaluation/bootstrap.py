"""How sure a mean over queries is, and how sure one method is ahead of another: the paired bootstrap over queries.

All columns share one draw of queries per resample, so a difference of two methods is that of the same queries: their
common hardness cancels. Percentile intervals (Efron 1979; for retrieval Sakai 2006); nothing assumes a normal error.

Q queries, M columns (methods × cut-offs), R resamples.
"""

from typing import NamedTuple

import numpy as np

from catid2_ray.errors import InputError

RESAMPLES = 10_000
_DRAWS = 2**21  # queries drawn at once: 16 MiB of indices, whatever Q


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


def bootstrap_mean(value_Q, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of Q numbers and its percentile interval. Raises InputError as `resampled_means` does."""
    return bootstrap_means(np.asarray(value_Q)[:, None], level=level, resamples=resamples, seed=seed)[0]


def bootstrap_means(value_QM, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval]:
    """`bootstrap_mean` of each column, from one set of draws."""
    if not 0 < level < 1:
        raise InputError(f"an interval's level must lie between 0 and 1, found {level}")
    value_QM = np.asarray(value_QM, np.float64)
    mean_RM = resampled_means(value_QM, resamples=resamples, seed=seed)
    low_M, high_M = np.quantile(mean_RM, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return [Interval(*map(float, row)) for row in zip(value_QM.mean(0), low_M, high_M)]


def bootstrap_difference(
    first_Q, second_Q, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """`first` − `second` on the same Q queries, in one order; above 0 throughout where the first is surely ahead.

    Raises InputError when the two differ in length, and as `resampled_means` does.
    """
    first_Q, second_Q = np.asarray(first_Q, np.float64), np.asarray(second_Q, np.float64)
    if first_Q.shape != second_Q.shape or first_Q.ndim != 1:
        raise InputError(
            f"a paired difference needs one number per query from both methods, found shapes {first_Q.shape} and "
            f"{second_Q.shape}"
        )
    return bootstrap_mean(first_Q - second_Q, level=level, resamples=resamples, seed=seed)
