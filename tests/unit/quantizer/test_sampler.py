"""Batches: no row twice, every row in its turn, and in balanced ones anchors for eq. 4 at every depth.

Unusual: anchors are counted by a plain loop that knows nothing of trees, and compared with uniform batches of the same
catalogue.
"""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.quantizer import sampler
from catid2_ray.quantizer.sampler import category_balanced_order


def catalogue(rows: int = 6000, tops: int = 6, branch: int = 15, seed: int = 0) -> np.ndarray:
    """`tops` roots of very unequal size, `branch` children each, `branch` leaves each: ids unique per path."""
    rng = np.random.default_rng(seed)
    top_N = (tops * rng.random(rows) ** 3).astype(int)
    middle_N = top_N * branch + rng.integers(0, branch, rows)
    leaf_N = middle_N * branch + rng.integers(0, branch, rows)
    return np.stack((top_N, 1000 + middle_N, 10_000 + leaf_N), 1)


def anchors_of(category_BH: np.ndarray) -> list[int]:
    """Rows per depth that have another row of their category and a row of another category under the same parent."""
    counts = []
    for depth in range(category_BH.shape[1]):
        children = collections.Counter(path[depth] for path in category_BH.tolist())
        under = collections.Counter((depth and path[depth - 1]) for path in category_BH.tolist() if path[depth] >= 0)
        counts.append(
            sum(
                path[depth] >= 0
                and children[path[depth]] > 1
                and under[depth and path[depth - 1]] > children[path[depth]]
                for path in category_BH.tolist()
            )
        )
    return counts


def check_batches(order: np.ndarray, rows: int, batch: int, steps: int) -> np.ndarray:
    assert order.dtype == np.int64 and order.shape == (steps * batch,)
    assert order.size == 0 or (order.min() >= 0 and order.max() < rows)
    order_SB = order.reshape(steps, batch)
    assert all(len(set(step.tolist())) == batch for step in order_SB)
    return order_SB


@st.composite
def tables(draw):
    """Small tables of paths with unequal depths; a deeper category stands under one parent only."""
    rows = draw(st.integers(1, 40))
    tree = draw(
        st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 2), st.integers(-1, 2)), min_size=rows, max_size=rows)
    )
    category_NH = np.array(tree)[:, : draw(st.integers(0, 3))]
    for depth in range(1, category_NH.shape[1]):
        category_NH[category_NH[:, depth - 1] < 0, depth] = -1
        known_N = category_NH[:, depth] >= 0
        category_NH[known_N, depth] += 10 * category_NH[known_N, depth - 1]
    return category_NH


@settings(max_examples=150, deadline=None)
@given(category_NH=tables(), data=st.data())
def test_any_table_gives_whole_batches_without_repeats(category_NH, data):
    rows = len(category_NH)
    batch, steps, seed = data.draw(st.integers(1, rows)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 2**63))
    uniform = data.draw(st.integers(0, batch))
    shape = {"fan_out": data.draw(st.integers(1, 4)), "rows_per_leaf": data.draw(st.integers(1, 4))}
    order = category_balanced_order(category_NH, batch=batch, steps=steps, uniform=uniform, seed=seed, **shape)
    order_SB = check_batches(order, rows, batch, steps)
    again = category_balanced_order(category_NH, batch=batch, steps=steps, uniform=uniform, seed=seed, **shape)
    np.testing.assert_array_equal(order, again)
    count_N = np.bincount(order_SB[:, :uniform].ravel(), minlength=rows)
    assert count_N.max() - count_N.min() <= 1


def test_balanced_batches_hold_more_anchors_at_every_depth():
    category_NH = catalogue(20_000, branch=25)
    batch, steps, uniform = 256, 12, 128
    balanced = category_balanced_order(category_NH, batch=batch, steps=steps, uniform=uniform, seed=1)
    plain = np.random.default_rng(1).permutation(len(category_NH))[: batch * steps]
    found, usual = (
        np.mean(
            [anchors_of(category_NH[step]) for step in check_batches(order, len(category_NH), batch, steps)], axis=0
        )
        for order in (balanced, plain)
    )
    # Nearly all of the 128 drawn rows count at the deepest level, where a uniform batch of 256 has few.
    assert found[2] > 0.85 * (batch - uniform) and found[2] > 2 * usual[2]
    assert found[1] > 0.9 * (batch - uniform) and found[0] > 0.9 * batch


def test_subtrees_are_few_roots_with_the_asked_fan_out():
    category_NH = catalogue()
    order = category_balanced_order(category_NH, batch=64, steps=50, uniform=0, seed=2)
    for step in category_NH[order.reshape(50, 64)][:10]:
        assert len(np.unique(step[:, 0])) <= 3
        # Leaves of two or three rows exist, so a few more than 64 / 4.
        assert 16 <= len(np.unique(step[:, 2])) <= 26
    roots = np.bincount(category_NH[order, 0], minlength=6) / len(order)
    true = np.bincount(category_NH[:, 0], minlength=6) / len(category_NH)
    assert true.max() > 0.5 and roots.max() < 0.3 and roots.min() > 0.07


def test_nodes_and_rows_are_drawn_evenly():
    """Three roots with 1, 2 and 7 leaves of 8 rows: equal chances for leaves of a root and for rows of a leaf."""
    leaf_N = np.repeat(np.arange(10), 8)
    category_NH = np.stack((np.searchsorted([1, 3], leaf_N, side="right"), leaf_N), 1)
    tree = sampler._Tree.build(category_NH)
    drawn = tree.draw(9000, 2, 3, np.random.default_rng(0))
    count_N = np.bincount(drawn, minlength=80)
    expected = np.where(leaf_N < 3, 3000 * 3 / 8, 3000 * 2 / 7 * 3 / 8)
    assert (abs(count_N - expected) < 5 * np.sqrt(expected)).all()
    assert tree.rows_per_root(2, 3) == pytest.approx((3 + 6 + 6) / 3)


def test_distinct_draws_cover_all_subsets_alike():
    picked_GF = sampler._draw_distinct(np.array([5, 2, 1, 0] * 5000), 3, np.random.default_rng(0)).reshape(5000, 4, 3)
    subsets = collections.Counter(frozenset(row) for row in picked_GF[:, 0].tolist())
    assert len(subsets) == 10 and all(len(subset) == 3 for subset in subsets)
    assert max(subsets.values()) < 600 and min(subsets.values()) > 400
    assert {frozenset(row) for row in picked_GF[:, 1].tolist()} == {frozenset({-1, 0, 1})}
    assert (np.sort(picked_GF[:, 2]) == [-1, -1, 0]).all() and (picked_GF[:, 3] == -1).all()


def test_unequal_depths_stand_side_by_side():
    """Rows that end at the root are one leaf of it among others; rows without any category are not drawn."""
    category_NH = np.array([[0, -1]] * 10 + [[0, 1]] * 10 + [[2, 3]] * 10 + [[-1, -1]] * 30)
    order = category_balanced_order(category_NH, batch=8, steps=200, uniform=0, seed=0)
    assert order.max() < 30
    share = np.bincount(order // 10) / len(order)
    assert share[0] == pytest.approx(share[1], abs=0.05) and share[2] > 0.3


def test_without_leaves_of_two_rows_everything_is_uniform():
    for category_NH in (np.full((50, 2), -1), np.arange(50)[:, None], np.zeros((50, 0), int)):
        order = category_balanced_order(category_NH, batch=20, steps=100, uniform=5, seed=0)
        count_N = np.bincount(check_batches(order, 50, 20, 100).ravel(), minlength=50)
        assert count_N.min() > 20 and count_N.max() < 60


def test_another_seed_gives_other_rows():
    category_NH = catalogue(500)
    one, two = (category_balanced_order(category_NH, batch=50, steps=3, uniform=20, seed=seed) for seed in (1, 2))
    assert (one != two).mean() > 0.9


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="a batch of 9 cannot be drawn from 8 rows without one twice"):
        category_balanced_order(np.zeros((8, 1), int), batch=9, steps=1, uniform=4, seed=0)
    with pytest.raises(InputError, match="uniform must be from 0 to the batch of 4, found 5"):
        category_balanced_order(np.zeros((8, 1), int), batch=4, steps=1, uniform=5, seed=0)
