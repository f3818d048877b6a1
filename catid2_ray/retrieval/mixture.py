"""The weights of the mixture that ranks what the beams found, fitted to judged queries: pairwise logistic regression.

    loss(w) = mean over queries of the mean over pairs (r relevant, n not) of log(1 + exp(−w · (x_r − x_n))) + ½ l2 |w σ|²

RankNet's loss (Burges et al. 2005, section 3, target 1) of a linear score. Features are divided by their standard deviation σ
over all candidates, so that `l2` means the same for each, and w comes back in raw units. All features are such that more is
better, so no weight is below 0: projected Newton steps (Bertsekas 1982) on a strictly convex loss, some ten of them, from 0.
Nothing is random.

Candidates are the first of each query by weights that are good already: pairs far below what anybody sees would outnumber the
others and blur what matters (with √P as a term, fitted to all products of the beams, Home Depot finds .007 less at 10).

M candidates, R relevant and N other ones of a query, F features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from catid2_ray.errors import InputError

L2 = 1e-4
FOLDS = 5
_STEPS, _NEAR, _SHORTEST = 100, 1e-9, 2.0**-30
_FLAT = 1e-6  # spread of a feature, in its largest number, below which it is the same everywhere


class Judged(NamedTuple):
    """The candidates of one query: `feature_MF` floats, `relevant_M` bool."""

    feature_MF: np.ndarray
    relevant_M: np.ndarray

    @property
    def says_something(self) -> bool:
        """Whether some candidates are relevant and some are not."""
        return bool(self.relevant_M.any() and not self.relevant_M.all())


class Loss(NamedTuple):
    value: float
    gradient_F: np.ndarray
    hessian_FF: np.ndarray


def loss_of(judged: Sequence[Judged], weight_F: np.ndarray, *, l2: float = L2) -> Loss:
    """The loss above with σ = 1, its gradient and its Hessian. Every query must say something."""
    value, gradient_F, hessian_FF = 0.5 * l2 * weight_F @ weight_F, l2 * weight_F, l2 * np.eye(len(weight_F))
    for feature_MF, relevant_M in judged:
        relevant_RF, other_NF = feature_MF[relevant_M], feature_MF[~relevant_M]
        behind_RN = (other_NF @ weight_F) - (relevant_RF @ weight_F)[:, None]
        share = 1 / (behind_RN.size * len(judged))
        soft_RN = np.logaddexp(0, behind_RN)
        wrong_RN = np.exp(behind_RN - soft_RN)  # the sigmoid, whatever the size of its argument
        curve_RN = wrong_RN * (1 - wrong_RN) * share
        value += share * soft_RN.sum()
        gradient_F = gradient_F + share * (wrong_RN.sum(0) @ other_NF - wrong_RN.sum(1) @ relevant_RF)
        both_FF = relevant_RF.T @ curve_RN @ other_NF
        hessian_FF = hessian_FF + (relevant_RF.T * curve_RN.sum(1)) @ relevant_RF - both_FF - both_FF.T
        hessian_FF += (other_NF.T * curve_RN.sum(0)) @ other_NF
    return Loss(float(value), gradient_F, hessian_FF)


def fitted(judged: Sequence[Judged], *, l2: float = L2) -> np.ndarray:
    """float64 F ≥ 0, the weights of least loss. A feature that is the same everywhere gets 0.

    Raises InputError where no query has both relevant and other candidates, and for features that are not finite.
    """
    judged = [one for one in judged if one.says_something]
    if not judged:
        raise InputError(
            "no query has candidates that are relevant and others that are not, so no weight can be fitted"
        )
    every_F = np.concatenate([one.feature_MF for one in judged])
    if not np.isfinite(every_F).all():
        raise InputError("a feature of a candidate is not finite, so no weight can be fitted")
    spread_F = every_F.std(0)
    flat_F = spread_F <= _FLAT * np.abs(every_F).max(0)  # what differs is how its numbers were rounded
    spread_F[flat_F] = 1
    scaled = [Judged(np.where(flat_F, 0, one.feature_MF / spread_F), one.relevant_M) for one in judged]
    weight_F = np.zeros(every_F.shape[1])
    here = loss_of(scaled, weight_F, l2=l2)
    for _ in range(_STEPS):
        free_F = (weight_F > 0) | (here.gradient_F < 0)
        if not free_F.any() or np.abs(here.gradient_F[free_F]).max() < _NEAR:
            break
        step_F, length = np.zeros_like(weight_F), 1.0
        step_F[free_F] = np.linalg.solve(here.hessian_FF[np.ix_(free_F, free_F)], here.gradient_F[free_F])
        there_F = np.maximum(weight_F - step_F, 0)
        while (there := loss_of(scaled, there_F, l2=l2)).value > here.value and length > _SHORTEST:
            length /= 2
            there_F = np.maximum(weight_F - length * step_F, 0)
        if there.value >= here.value:
            break
        weight_F, here = there_F, there
    return weight_F / spread_F


def cross_fitted(judged: Sequence[Judged], *, folds: int = FOLDS, l2: float = L2) -> list[np.ndarray]:
    """Per query float64 M: its candidates' scores by weights that were fitted without it. Query i is in fold i mod `folds`."""
    score_M: list[np.ndarray] = [np.empty(0)] * len(judged)
    for fold in range(folds):
        weight_F = fitted([one for i, one in enumerate(judged) if i % folds != fold], l2=l2)
        for i in range(fold, len(judged), folds):
            score_M[i] = judged[i].feature_MF @ weight_F
    return score_M
