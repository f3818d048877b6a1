"""Recall at k against the count by hand, and the inputs that have no answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.evaluation import metrics
from catid2_ray.evaluation.metrics import bootstrap_means, recall_at, recalls, resampled_means
from tests.oracles import bootstrap as bootstrap_oracle
from tests.oracles import metrics as oracle

products = st.sampled_from("abcdefgh")
query = st.tuples(st.lists(products, unique=True), st.sets(products))


@settings(max_examples=100, deadline=None)
@given(st.lists(query, min_size=1, max_size=6).filter(lambda qs: any(wanted for _, wanted in qs)))
def test_recall_equals_the_count_by_hand(queries):
    ranked, relevant = zip(*queries)
    found = recall_at(ranked, relevant, (1, 3, 10))
    assert found == pytest.approx({k: oracle.recall_at(ranked, relevant, k) for k in (1, 3, 10)})


def test_it_is_recall_and_not_the_hit_rate():
    assert recall_at([["a", "x", "b"]], [{"a", "b", "c", "d"}], (1, 3)) == {1: 0.25, 3: 0.5}


def test_arrays_serve_as_lists_and_a_query_without_relevant_products_is_not_counted():
    ranked = np.array([["a", "b"], ["c", "d"]])
    assert recall_at(ranked, [{"b"}, set()], (2,)) == {2: 1.0}
    assert np.isnan(recalls(ranked, [{"b"}, set()], (2,))[1, 0])


def test_wrong_inputs_are_named():
    with pytest.raises(InputError, match="query 1: product 'c' is ranked twice"):
        recall_at([["a"], ["c", "d", "c"]], [{"a"}, {"c"}], (1,))
    with pytest.raises(InputError, match="1 ranked lists for 2 queries"):
        recall_at([["a"]], [{"a"}, {"b"}], (1,))
    with pytest.raises(InputError, match="at least 1"):
        recall_at([["a"]], [{"a"}], (0, 5))
    with pytest.raises(InputError, match="none of the 1 queries has a relevant product"):
        recall_at([["a"]], [set()], (1,))


@pytest.mark.parametrize("queries, block", [(1, 7), (5, 1), (7, 100), (13, 2**21)])
def test_means_and_intervals_equal_one_resample_at_a_time(queries, block, monkeypatch):
    monkeypatch.setattr(metrics, "_DRAWS", block)
    value_QM = np.random.default_rng(1).random((queries, 3))
    drawn = np.random.default_rng(4).integers(queries, size=(50, queries)).tolist()
    expected = bootstrap_oracle.resampled_means(value_QM.tolist(), drawn)
    # Blocks continue one stream of draws, so their size changes nothing.
    np.testing.assert_allclose(resampled_means(value_QM, resamples=50, seed=4), expected, rtol=1e-12)
    intervals = bootstrap_means(value_QM, level=0.9, resamples=50, seed=4)
    for column, interval in enumerate(intervals):
        means = [row[column] for row in expected]
        ends = [bootstrap_oracle.quantile(means, share) for share in (0.05, 0.95)]
        assert interval == pytest.approx((value_QM[:, column].mean(), *ends))


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    hardness_Q = rng.random(400)
    better_Q = hardness_Q + 0.01 + 0.01 * rng.standard_normal(400)
    difference = bootstrap_means((better_Q - hardness_Q)[:, None], resamples=1000, seed=3)[0]
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.mean == pytest.approx((better_Q - hardness_Q).mean())
    # Unpaired, the spread of hardness would hide it.
    assert bootstrap_means(better_Q[:, None], resamples=1000)[0].low < hardness_Q.mean()
    mean_RM = resampled_means(np.stack((better_Q, hardness_Q), 1), resamples=1000, seed=3)
    expected = np.quantile(mean_RM[:, 0] - mean_RM[:, 1], (0.025, 0.975))
    assert (difference.low, difference.high) == pytest.approx(tuple(expected))


def test_the_width_is_that_of_the_mean():
    value_Q1 = np.random.default_rng(2).random((900, 1))
    interval = bootstrap_means(value_Q1, resamples=4000, seed=5)[0]
    assert interval == bootstrap_means(value_Q1, resamples=4000, seed=5)[0]
    assert interval != bootstrap_means(value_Q1, resamples=4000, seed=6)[0]
    expected = 2 * 1.96 * value_Q1.std() / np.sqrt(900)
    assert interval.high - interval.low == pytest.approx(expected, rel=0.1)


def test_bad_input_of_the_bootstrap():
    with pytest.raises(InputError, match=r"at least one query .* found shape \(0, 1\)"):
        bootstrap_means(np.empty((0, 1)))
    with pytest.raises(InputError, match="query 1 has nan in column 0; leave out queries"):
        bootstrap_means([[0.5], [float("nan")]])
    with pytest.raises(InputError, match="level must lie between 0 and 1, found 95"):
        bootstrap_means([[1.0]], level=95)
    with pytest.raises(InputError, match="0 resamples"):
        bootstrap_means([[1.0]], resamples=0)
