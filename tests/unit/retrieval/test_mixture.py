"""Fitted weights: the loss of the oracle, a minimum that no weight below 0 could better, the same in any units."""

import numpy as np
import pytest

from catid2_ray.errors import InputError
from catid2_ray.retrieval.mixture import Judged, cross_fitted, fitted, loss_of
from tests.oracles import mixture as oracle

TRUE = np.array([1.0, 0.05, 0.3])


def queries(count: int, seed: int = 0, *, noise: float = 0.3) -> list[Judged]:
    """Queries whose relevant candidates are those of the highest noisy score by TRUE; features of very different sizes."""
    random, judged = np.random.default_rng(seed), []
    for _ in range(count):
        feature_MF = np.column_stack([random.normal(size=30), random.gamma(3, 4, 30), random.random(30)])
        score_M = feature_MF @ TRUE + noise * random.normal(size=30)
        judged.append(Judged(feature_MF, score_M >= np.sort(score_M)[-4]))
    return judged


def as_lists(judged):
    return [list(zip(one.feature_MF.tolist(), one.relevant_M.tolist())) for one in judged]


def test_loss_and_gradient_are_those_of_all_pairs_one_by_one():
    judged = queries(5)
    for weight_F in (np.zeros(3), TRUE, np.array([0.2, 0, 2.0])):
        loss = loss_of(judged, weight_F, l2=0.1)
        assert loss.value == pytest.approx(oracle.loss(as_lists(judged), weight_F.tolist(), l2=0.1), rel=1e-12)
        np.testing.assert_allclose(
            loss.gradient_F, oracle.gradient(as_lists(judged), weight_F.tolist(), l2=0.1), atol=1e-12
        )
        for feature in range(3):
            near = 1e-5 * np.eye(3)[feature]
            change_F = (
                loss_of(judged, weight_F + near, l2=0.1).gradient_F
                - loss_of(judged, weight_F - near, l2=0.1).gradient_F
            )
            np.testing.assert_allclose(loss.hessian_FF[feature], change_F / 2e-5, rtol=1e-5, atol=1e-7)


def test_the_fit_finds_the_weights_that_made_the_data():
    weight_F = fitted(queries(200))
    np.testing.assert_allclose(weight_F / weight_F[0], TRUE, rtol=0.25)
    assert np.array_equal(weight_F, fitted(queries(200)))


def test_the_fit_is_the_minimum_among_weights_of_at_least_0():
    judged = [
        Judged(one.feature_MF * [1, -1, 1], one.relevant_M) for one in queries(40)
    ]  # less of the second is better
    weight_F = fitted(judged)
    spread_F = np.concatenate([one.feature_MF for one in judged]).std(0)
    scaled = [Judged(one.feature_MF / spread_F, one.relevant_M) for one in judged]
    gradient_F = np.array(oracle.gradient(as_lists(scaled), (weight_F * spread_F).tolist(), l2=1e-4))
    assert weight_F[1] == 0 and gradient_F[1] > 0
    np.testing.assert_allclose(gradient_F[[0, 2]], 0, atol=1e-8)


def test_weights_follow_the_units_of_their_features_and_a_constant_one_gets_none():
    judged = queries(30)
    unit_F = np.array([1, 1000, 0.01])
    others = [Judged(np.column_stack([one.feature_MF * unit_F, np.full(30, 7.0)]), one.relevant_M) for one in judged]
    np.testing.assert_allclose(fitted(others), [*(fitted(judged) / unit_F), 0], rtol=1e-6)
    rounded = np.random.default_rng(0)
    for one in others:
        one.feature_MF[:, -1] += 1e-15 * rounded.normal(size=30)
    np.testing.assert_allclose(fitted(others), [*(fitted(judged) / unit_F), 0], rtol=1e-6)


def test_relevance_that_follows_perfectly_gives_finite_weights():
    assert np.isfinite(fitted(queries(20, noise=0))).all()


def test_a_query_is_scored_by_weights_fitted_without_it():
    judged = queries(12) + [Judged(np.ones((2, 3)), np.zeros(2, bool))]
    scores = cross_fitted(judged, folds=4)
    without = [one for i, one in enumerate(judged) if i % 4 != 2]
    np.testing.assert_array_equal(scores[6], judged[6].feature_MF @ fitted(without))
    assert [len(score_M) for score_M in scores] == [30] * 12 + [2]


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(InputError, match="no query has candidates that are relevant and others that are not"):
        fitted([Judged(np.ones((2, 1)), np.ones(2, bool))])
    with pytest.raises(InputError, match="a feature of a candidate is not finite"):
        fitted([Judged(np.array([[np.nan], [1.0]]), np.array([True, False]))])
