"""The paired bootstrap against one resample at a time, and against what theory says of its width."""

import numpy as np
import pytest

from catid2_ray.errors import InputError
from catid2_ray.evaluation import bootstrap
from catid2_ray.evaluation.bootstrap import bootstrap_difference, bootstrap_mean, bootstrap_means, resampled_means
from tests.oracles import bootstrap as oracle


@pytest.mark.parametrize("queries, block", [(1, 7), (5, 1), (7, 100), (13, 2**21)])
def test_means_and_intervals_equal_one_resample_at_a_time(queries, block, monkeypatch):
    monkeypatch.setattr(bootstrap, "_DRAWS", block)
    value_QM = np.random.default_rng(1).random((queries, 3))
    drawn = np.random.default_rng(4).integers(queries, size=(50, queries)).tolist()
    expected = oracle.resampled_means(value_QM.tolist(), drawn)
    # Blocks continue one stream of draws, so their size changes nothing.
    np.testing.assert_allclose(resampled_means(value_QM, resamples=50, seed=4), expected, rtol=1e-12)
    found = bootstrap_means(value_QM, level=0.9, resamples=50, seed=4)
    for column, interval in enumerate(found):
        means = [row[column] for row in expected]
        ends = [oracle.quantile(means, share) for share in (0.05, 0.95)]
        assert interval == pytest.approx((value_QM[:, column].mean(), *ends))


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    hardness_Q = rng.random(400)
    better_Q = hardness_Q + 0.01 + 0.01 * rng.standard_normal(400)
    difference = bootstrap_difference(better_Q, hardness_Q, resamples=1000, seed=3)
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.mean == pytest.approx((better_Q - hardness_Q).mean())
    # Unpaired, the spread of hardness would hide it.
    assert bootstrap_mean(better_Q, resamples=1000).low < hardness_Q.mean()
    mean_RM = resampled_means(np.stack((better_Q, hardness_Q), 1), resamples=1000, seed=3)
    expected = np.quantile(mean_RM[:, 0] - mean_RM[:, 1], (0.025, 0.975))
    assert (difference.low, difference.high) == pytest.approx(tuple(expected))


def test_the_width_is_that_of_the_mean():
    value_Q = np.random.default_rng(2).random(900)
    interval = bootstrap_mean(value_Q, resamples=4000, seed=5)
    assert interval == bootstrap_mean(value_Q, resamples=4000, seed=5)
    assert interval != bootstrap_mean(value_Q, resamples=4000, seed=6)
    expected = 2 * 1.96 * value_Q.std() / np.sqrt(900)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)


def test_bad_input():
    with pytest.raises(InputError, match=r"at least one query .* found shape \(0, 1\)"):
        bootstrap_mean([])
    with pytest.raises(InputError, match="query 1 has nan in column 0; leave out queries"):
        bootstrap_mean([0.5, float("nan")])
    with pytest.raises(InputError, match=r"found shapes \(2,\) and \(3,\)"):
        bootstrap_difference([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="level must lie between 0 and 1, found 95"):
        bootstrap_mean([1.0], level=95)
    with pytest.raises(InputError, match="0 resamples"):
        bootstrap_mean([1.0], resamples=0)
