"""Which differences are more than chance: paired bootstrap over queries, Holm's correction, letters for tables.

A method with several seeds enters with the mean over its seeds for each query: intervals are of queries; what another training
would give shows in the seeds' range alone. p is two-sided: twice the smaller share of resamples whose mean difference lies on
the other side of 0, counting the sample itself once (Davison and Hinkley 1997, 4.2.3), so that it is never 0.

Q queries, M methods, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from catid2_ray.evaluation.metrics import RESAMPLES, Interval, resampled_means

LEVEL = 0.05
# p is no smaller than 2/(R + 1), and Holm multiplies it by the pairs: with fewer resamples a large table could show nothing.
_A_PAIR = 200


class Difference(NamedTuple):
    """`mean`, `low`, `high`: of `one` less `other`; `p`: before correction, `corrected`: after it."""

    one: str
    other: str
    mean: float
    low: float
    high: float
    p: float
    corrected: float

    @property
    def shown(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.corrected < LEVEL


class Compared(NamedTuple):
    """`intervals`: by method; `differences`: of every pair, by (one, other), one before the other in the given order."""

    intervals: dict[str, Interval]
    differences: dict[tuple[str, str], Difference]

    def less(self, one: str, other: str) -> Difference:
        """`one` less `other`, whichever came first."""
        if (one, other) in self.differences:
            return self.differences[one, other]
        turned = self.differences[other, one]
        return turned._replace(one=one, other=other, mean=0 - turned.mean, low=0 - turned.high, high=0 - turned.low)

    def letters(self) -> dict[str, str]:
        """Method → the letters of those that it finds shown more than; the first method is a, the second b …"""
        names = list(self.intervals)
        return {
            name: "".join(
                letter_of(place)
                for place, other in enumerate(names)
                if other != name and (less := self.less(name, other)).shown and less.mean > 0
            )
            for name in names
        }


def letter_of(place: int) -> str:
    """a … z, then A … Z, then numbers in brackets."""
    return "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[place] if place < 52 else f"({place})"


def compare(values: Mapping[str, np.ndarray], *, resamples: int | None = None, seed: int = 0) -> Compared:
    """`values`: method → Q numbers of the same queries, all finite. Holm over all pairs of methods. `resamples`: None = 10,000, and
    200 a pair where that is more.

    Raises InputError as `metrics.resampled_means` does.
    """
    names = list(values)
    value_QM = np.stack([np.asarray(values[name], float) for name in names], 1)
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    resamples = resamples or max(RESAMPLES, _A_PAIR * len(pairs))
    mean_RM = resampled_means(value_QM, resamples=resamples, seed=seed)
    low_M, high_M = np.quantile(mean_RM, (0.025, 0.975), axis=0)
    intervals = {
        name: Interval(float(value_QM[:, place].mean()), float(low_M[place]), float(high_M[place]))
        for place, name in enumerate(names)
    }
    found = []
    for i, j in pairs:
        # In whole resamples: equal rankings differ by exactly 0, and rounding must not say otherwise.
        less_R = mean_RM[:, i] - mean_RM[:, j]
        less_R[np.abs(less_R) < 1e-12] = 0.0
        tail = min((less_R <= 0).sum(), (less_R >= 0).sum())
        low, high = np.quantile(less_R, (0.025, 0.975))
        mean = float((value_QM[:, i] - value_QM[:, j]).mean())
        found.append((mean, float(low), float(high), min(1.0, 2 * (tail + 1) / (resamples + 1))))
    corrected = holm([p for *_, p in found])
    differences = {
        (names[i], names[j]): Difference(names[i], names[j], *one, after)
        for (i, j), one, after in zip(pairs, found, corrected)
    }
    return Compared(intervals, differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p after Holm's step-down correction (1979), in the order given: the error of the family is that of one test."""
    order, corrected, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
