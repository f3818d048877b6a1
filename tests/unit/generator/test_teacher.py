"""What a teacher names: the nearest products in blocks equal all at once, shares and draws equal the oracle's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.generator.teacher import Nearest, drawn, shares
from tests.oracles import teacher as oracle


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 6), products=st.integers(1, 40), most=st.integers(1, 12), block=st.integers(1, 15),
    seed=st.integers(0, 999), more=st.booleans(),
)  # fmt: skip
def test_products_shown_in_blocks_are_ranked_as_if_all_lay_together(queries, products, most, block, seed, more):
    rng = np.random.default_rng(seed)
    # Whole numbers tie often.
    query_QD = rng.integers(-1, 2, (queries, 3)).astype(np.float32)
    vector_ND = rng.integers(-1, 2, (products, 3)).astype(np.float32)
    more_QN = rng.integers(0, 3, (queries, products)).astype(np.float32) if more else None
    nearest = Nearest(query_QD, most)
    for start in range(0, products, block):
        nearest.show(vector_ND[start : start + block], start, more_QN[:, start : start + block] if more else None)
    expected = oracle.nearest(query_QD @ vector_ND.T + (more_QN if more else 0), most)
    found = [
        [(-float(score), int(row)) for score, row in zip(*line) if row >= 0]
        for line in zip(nearest.score_QM, nearest.row_QM)
    ]
    assert found == expected


def test_many_queries_are_compared_in_several_goes():
    rng = np.random.default_rng(0)
    query_QD, vector_ND = rng.normal(size=(2100, 2)).astype(np.float32), rng.normal(size=(9, 2)).astype(np.float32)
    nearest = Nearest(query_QD, 3)
    nearest.show(vector_ND, 5)
    assert np.array_equal(nearest.row_QM[:, 0], 5 + (query_QD @ vector_ND.T).argmax(1))


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.floats(-1, 1), min_size=1, max_size=8), count=st.integers(1, 20), offset=st.floats(0, 0.999),
    temperature=st.sampled_from([0.05, 0.3, 1.0]),
)  # fmt: skip
def test_shares_and_draws_are_the_oracles(scores, count, offset, temperature):
    score_1M = np.array([[*scores, -np.inf]], np.float32)
    share_1M = shares(score_1M, temperature=temperature)
    np.testing.assert_allclose(
        share_1M[0, :-1], oracle.shares(score_1M[0, :-1].astype(float).tolist(), temperature), atol=1e-9
    )
    assert share_1M[0, -1] == 0
    query_C, place_C = drawn(share_1M, np.array([count]), np.array([offset]))
    assert query_C.tolist() == [0] * count and place_C.max() < len(scores)
    # Each place is drawn as often as its share says, to the next whole number.
    times_M = np.bincount(place_C, minlength=len(scores))
    assert (np.abs(times_M - count * share_1M[0, : len(scores)]) < 1 + 1e-9).all()
    slow = oracle.draws(share_1M[0, :-1].tolist(), count, offset)
    assert (
        sum(one != other for one, other in zip(place_C.tolist(), slow)) <= 1
    )  # a point on an edge may round either way


def test_each_query_has_its_own_number_of_draws():
    share_QM = np.array([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]])
    query_C, place_C = drawn(share_QM, np.array([2, 0, 4]), np.array([0.1, 0.9, 0.5]))
    assert query_C.tolist() == [0, 0, 2, 2, 2, 2] and place_C.tolist() == [0, 1, 0, 1, 1, 1]
    assert pytest.approx(1.0) == shares(np.array([[3.0, 1.0]])).sum()
