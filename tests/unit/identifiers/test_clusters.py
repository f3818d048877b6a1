"""Groups of oversized clusters against one-row-at-a-time oracles; T_max always holds; any order, any partition."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.identifiers import suffixes
from catid2_ray.identifiers.suffixes import METHODS, split_clusters
from tests.oracles import clusters as oracle

VALUES = st.sampled_from([0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan")])


@st.composite
def catalogues(draw):
    """Prefixes, residuals with exact twins, product_ids of mixed lengths, values, t_max."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(0, 60))
    prefix_N = rng.integers(-2, draw(st.integers(0, 4)), count)
    residual_NZ = rng.normal(size=(count, draw(st.integers(1, 5))))
    if count:
        residual_NZ = residual_NZ[np.minimum(rng.integers(0, count, count), draw(st.integers(0, count)))]
    ids = [f"{'x' * (number % 3)}{number}" for number in rng.permutation(count)]
    values = draw(st.lists(VALUES, min_size=count, max_size=count))
    return prefix_N, residual_NZ, ids, np.array(values, np.float64), draw(st.integers(1, 9))


def split(case, rows, method, **settings):
    prefix_N, residual_NZ, ids, value_N, t_max = case
    return split_clusters(
        prefix_N[rows],
        residual_NZ[rows],
        [ids[row] for row in rows],
        t_max=t_max,
        method=method,
        value_N=value_N[rows],
        **settings,
    )


@settings(max_examples=150, deadline=None)
@given(case=catalogues(), method=st.sampled_from(METHODS), seed=st.integers(0, 2**32 - 1))
def test_the_fewest_groups_within_the_bound_in_any_order_and_any_partition(case, method, seed):
    prefix_N, _, ids, _, t_max = case
    rows = np.arange(len(ids))
    found = split(case, rows, method, seed=seed)
    size = Counter(prefix_N.tolist())
    members = Counter(zip(prefix_N.tolist(), found.group_N.tolist(), strict=True))
    assert found.group_N.dtype == np.int64
    assert found.groups == max((-(-c // t_max) for c in size.values()), default=1)
    for prefix, c in size.items():
        parts = -(-c // t_max)
        assert sorted(g for p, g in members if p == prefix) == list(range(parts))
        assert {members[prefix, g] for g in range(parts)} <= {c // parts, -(-c // parts)}
    assert max(members.values(), default=0) == found.report["largest_after"] <= t_max
    assert found.report["split"] == sum(c > t_max for c in size.values())

    order = np.random.default_rng(seed).permutation(len(ids))
    assert np.array_equal(split(case, order, method, seed=seed).group_N, found.group_N[order])
    for prefix in size:
        alone = np.flatnonzero(prefix_N == prefix)
        assert np.array_equal(split(case, alone, method, seed=seed).group_N, found.group_N[alone])


@settings(max_examples=150, deadline=None)
@given(case=catalogues())
def test_values_and_residuals_equal_their_oracles(case):
    prefix_N, residual_NZ, ids, value_N, t_max = case
    rows, prefixes = np.arange(len(ids)), prefix_N.tolist()
    keys = [oracle.by_value(*pair) for pair in zip(value_N.tolist(), ids, strict=True)]
    expected = oracle.ranked(prefixes, keys, t_max)
    assert split(case, rows, "value").group_N.tolist() == [expected[row] for row in rows]
    steps = suffixes.POWER_STEPS, suffixes.LLOYD_STEPS
    expected = oracle.by_residual(prefixes, residual_NZ, ids, t_max, *steps)
    assert split(case, rows, "kmeans").group_N.tolist() == [expected[row] for row in rows]


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_is_near_the_best_of_all_balanced_cuts(seed):
    point_NZ = np.random.default_rng(seed).normal(size=(8, 2))

    def spread(rows):
        return ((point_NZ[rows] - point_NZ[rows].mean(axis=0)) ** 2).sum()

    group_N = split_clusters(np.zeros(8, int), point_NZ, list("abcdefgh"), t_max=4).group_N
    best = min(
        spread(list(half)) + spread([r for r in range(8) if r not in half]) for half in combinations(range(8), 4)
    )
    assert spread(group_N == 0) + spread(group_N == 1) <= 1.25 * best


def test_similar_residuals_share_a_group_where_random_ones_do_not():
    rng = np.random.default_rng(0)
    home_N = rng.permutation(np.repeat(np.arange(4), 25))
    point_NZ = np.array([[0, 0], [0, 9], [30, 0], [30, 9]])[home_N] + rng.normal(size=(100, 2))
    ids = [f"p{number}" for number in range(100)]
    same = {
        method: len(
            set(zip(home_N, split_clusters(home_N * 0, point_NZ, ids, t_max=25, method=method).group_N, strict=True))
        )
        for method in ("kmeans", "random")
    }
    assert same == {"kmeans": 4, "random": 16}


def test_blocks_do_not_change_a_group(monkeypatch):
    rng = np.random.default_rng(1)
    prefix_N, residual_NZ = rng.integers(0, 9, 400), rng.normal(size=(400, 7)).astype(np.float32)
    ids = [f"p{number}" for number in range(400)]
    whole = split_clusters(prefix_N, residual_NZ, ids, t_max=6)
    monkeypatch.setattr(suffixes, "BLOCK_NUMBERS", 600)
    assert np.array_equal(split_clusters(prefix_N, residual_NZ, ids, t_max=6).group_N, whole.group_N)


def test_random_groups_follow_the_seed_and_neither_width_nor_neighbours():
    ids = [f"p{number}" for number in range(40)]
    first = split_clusters(np.zeros(40, int), None, ids, t_max=10, method="random", seed=3).group_N
    other = split_clusters(np.zeros(40, int), None, ids, t_max=10, method="random", seed=4).group_N
    wider = split_clusters([0] * 40 + [1], None, [*ids, "a" * 50], t_max=10, method="random", seed=3).group_N
    assert not np.array_equal(first, other)
    assert np.array_equal(first, wider[:40])


def test_exact_twins_beyond_the_bound_are_cut_by_product_id():
    found = split_clusters(np.zeros(5, int), np.full((5, 3), 0.1), list("edcba"), t_max=2)
    assert found.group_N.tolist() == [2, 2, 1, 1, 0]
    assert found.report == {
        "clusters": 1,
        "split": 1,
        "products_in_split": 5,
        "largest_before": 5,
        "largest_after": 2,
        "t_max": 2,
        "method": "kmeans",
    }


def test_more_than_a_hundred_groups_keep_the_bound():
    ids = [f"p{number:04d}" for number in range(605)]
    found = split_clusters(np.zeros(605, int), np.arange(605.0)[:, None], ids, t_max=5)
    assert found.groups == 121
    assert np.bincount(found.group_N).tolist() == [5] * 121


@pytest.mark.parametrize(
    "prefixes, residuals, ids, kwargs, message",
    [
        ([0], [[0.0]], ["a"], {"t_max": 0}, "t_max must be at least 1 product for each ID, found 0"),
        ([0], [[0.0]], ["a"], {"method": "best"}, "method 'best' is unknown; choose one of kmeans, value, random"),
        ([0, 0], [[0.0]], ["a"], {}, r"product_ids of shape \(1,\) need as many prefixes, found shape \(2,\)"),
        ([0.5], [[0.0]], ["a"], {}, "prefixes must be integers, found float64: pack the codes first"),
        ([0, 1], [[0.0], [0.0]], ["a", "a"], {}, r"product_id 'a' occurs more than once in the table \(1 repeats"),
        ([0, 1], [[0.0], [np.nan]], ["a", "b"], {}, r"residual of product_id 'b' \(row 1\) is not finite, one of 1"),
        ([0, 1], [[0.0]], ["a", "b"], {}, r'"kmeans" needs residuals, numbers of shape 2×Z, found float64 of .*1, 1'),
        ([0], None, ["a"], {}, '"kmeans" needs residuals'),
        ([0, 1], None, ["a", "b"], {"method": "value"}, '"value" needs one number for each of 2 products'),
    ],
)
def test_errors(prefixes, residuals, ids, kwargs, message):
    with pytest.raises(InputError, match=message):
        split_clusters(np.array(prefixes), residuals, ids, **{"t_max": 5} | kwargs)
