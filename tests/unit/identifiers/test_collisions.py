"""Unique IDs against brute force: every prefix's total, every overflow move, and independence of order and blocks.

Coordinates of the small cases are whole numbers, so sums are exact and ties are real ties.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError, InputError
from catid2_ray.identifiers import collisions
from catid2_ray.identifiers.collisions import assign_unique, colliding_prefixes
from tests.oracles.collisions import final_homes, latent, least_cost, path, squared


@st.composite
def crowded_catalogues(draw):
    """Up to 9 products in a space of at most 36 IDs, crowded into few codes, some IDs occupied."""
    codes_per_level = draw(st.lists(st.integers(1, 3), min_size=0, max_size=2)) + [draw(st.integers(1, 4))]
    capacity = int(np.prod(codes_per_level))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, min(9, capacity)))
    occupied = rng.permutation(capacity)[: draw(st.integers(0, min(6, capacity - count)))]
    space = DocidSpace(tuple(codes_per_level))
    crowd = rng.integers(0, np.array(codes_per_level), (draw(st.integers(1, 3)), len(codes_per_level)))
    return {
        "codes": crowd[rng.integers(0, len(crowd), count)],
        "residual": rng.integers(-2, 3, (count, 2)).astype(float),
        "books": [rng.integers(-3, 4, (k, 2)).astype(float) for k in codes_per_level],
        "product_ids": [f"p{number}" for number in rng.permutation(20)[:count]],
        "occupied": space.unpack(occupied),
    }


def resolve(case, method="sinkhorn", rows=None):
    rows = np.arange(len(case["codes"])) if rows is None else rows
    return assign_unique(
        case["codes"][rows],
        case["residual"][rows],
        case["books"],
        [case["product_ids"][row] for row in rows],
        occupied=case["occupied"],
        method=method,
    )


@settings(max_examples=150, deadline=None)
@given(case=crowded_catalogues())
def test_every_prefix_reaches_the_brute_force_optimum(case):
    homes, touched = final_homes(**case)
    for method, slack in (("sinkhorn", 1.01), ("exact", 1.0), ("greedy", np.inf)):
        found = resolve(case, method)
        ids = [tuple(row) for row in found.codes_NL.tolist()]
        assert len({*ids, *map(tuple, case["occupied"].tolist())}) == len(ids) + len(case["occupied"])
        assert [docid[:-1] for docid in ids] == homes
        points, spent = {}, {}
        for row, docid in enumerate(ids):
            z = latent(case["books"], case["codes"][row], case["residual"][row])
            before = squared(case["residual"][row], case["books"][-1][case["codes"][row][-1]])
            after = squared(z, path(case["books"], docid))
            assert found.cost_N[row] == after - before
            assert found.moved_N[row] == (docid != tuple(case["codes"][row]))
            if docid[:-1] in touched:
                rest = [a - b for a, b in zip(z, path(case["books"], docid[:-1]))]
                points.setdefault(docid[:-1], []).append(rest)
                spent[docid[:-1]] = spent.get(docid[:-1], 0.0) + after
            else:
                assert not found.moved_N[row]
        for prefix, total in spent.items():
            best = least_cost(prefix, points[prefix], case["books"][-1], case["occupied"].tolist())
            assert best <= total + 1e-9
            assert slack == np.inf or total <= slack * best + 1e-9


@settings(max_examples=60, deadline=None)
@given(case=crowded_catalogues(), seed=st.integers(0, 99))
def test_order_of_rows_does_not_matter(case, seed):
    rows = np.random.default_rng(seed).permutation(len(case["codes"]))
    for method in collisions.SOLVERS:
        straight, shuffled = resolve(case, method), resolve(case, method, rows)
        assert np.array_equal(straight.codes_NL[rows], shuffled.codes_NL)
        assert np.array_equal(straight.cost_N[rows], shuffled.cost_N)
        assert straight.report == shuffled.report


@pytest.fixture
def catalogue():
    """2,000 products of 16 × 16 × 24 codes, nearest last codes, exact duplicates, crowded but without overflow."""
    rng = np.random.default_rng(3)
    books = [rng.normal(size=(k, 8)) * scale for k, scale in ((16, 1.0), (16, 0.7), (24, 0.5))]
    codes = np.column_stack([rng.integers(0, 16, 2000), rng.integers(0, 16, 2000), rng.integers(0, 24, 2000)])
    residual = books[2][codes[:, 2]] + rng.normal(size=(2000, 8)) * 0.1
    twin = rng.permutation(2000)[:75]
    codes[twin], residual[twin] = codes[twin[0]], residual[twin[0]]
    spread = np.arange(75) % 15
    codes[twin, 0], codes[twin, 1] = spread, 15 - spread
    product_ids = [f"sku-{number:04d}" for number in rng.permutation(2000)]
    return {"codes": codes, "residual": residual, "books": books, "product_ids": product_ids, "occupied": None}


def totals(case, found):
    """Summed squared distance of every prefix (no prefix overflows, so residuals stay as they are)."""
    distance = ((case["residual"] - case["books"][-1][found.codes_NL[:, -1]]) ** 2).sum(axis=1)
    space = DocidSpace((16, 16, 24))
    home = space.prefix_of(space.pack(found.codes_NL), 2)
    return np.bincount(home, weights=distance, minlength=256)


def test_sinkhorn_is_within_one_percent_of_exact_and_mostly_by_itself(catalogue):
    found, best = resolve(catalogue), resolve(catalogue, "exact")
    assert (totals(catalogue, found) <= 1.01 * totals(catalogue, best) + 1e-12).all()
    assert found.report["duplicates_after"] == 0 and found.report["overflowed"] == 0
    assert found.report["solved_exactly_instead"] < 0.1 * found.report["colliding_prefixes"]
    assert totals(catalogue, best).sum() <= totals(catalogue, resolve(catalogue, "greedy")).sum()


def test_block_size_and_absent_prefixes_change_nothing(catalogue, monkeypatch):
    whole = resolve(catalogue)
    space = DocidSpace((16, 16, 24))
    packed = space.pack(catalogue["codes"])
    rows = np.flatnonzero(np.isin(space.prefix_of(packed, 2), colliding_prefixes(packed, space)))
    monkeypatch.setattr(collisions, "BLOCK_NUMBERS", 2000)
    parts = [resolve(catalogue, rows=rows[space.prefix_of(packed[rows], 2) % 3 == part]) for part in range(3)]
    for part, found in enumerate(parts):
        mine = rows[space.prefix_of(packed[rows], 2) % 3 == part]
        assert np.array_equal(whole.codes_NL[mine], found.codes_NL)
        assert np.array_equal(whole.cost_N[mine], found.cost_N)
    assert not np.delete(whole.moved_N, rows).any()


def test_a_family_larger_than_its_prefix_spills_to_the_nearest_siblings():
    rng = np.random.default_rng(0)
    books = [np.arange(4.0)[:, None] * 100, np.arange(8.0)[:, None] * 10, np.arange(8.0)[:, None]]
    residual = np.full((20, 1), 3.0) + rng.normal(size=(20, 1)) * 1e-3
    found = assign_unique(np.tile([1, 4, 3], (20, 1)), residual, books, [f"p{i:02d}" for i in range(20)])
    assert found.report["overflowed"] == 12 and found.report["largest_prefix"] == 20
    assert np.bincount(found.codes_NL[:, 1], minlength=8).tolist() == [0, 0, 0, 4, 8, 8, 0, 0]
    assert (found.codes_NL[:, 0] == 1).all()


def test_quiet_products_may_stay_away_as_occupied_ids(catalogue):
    catalogue["codes"][:40] = catalogue["codes"][0]
    space = DocidSpace((16, 16, 24))
    packed = space.pack(catalogue["codes"])
    loud = np.isin(space.prefix_of(packed, 2), colliding_prefixes(packed, space))
    catalogue["occupied"] = catalogue["codes"][~loud]
    found = resolve(catalogue, rows=np.flatnonzero(loud))
    assert found.report["overflowed"] > 0 and found.report["duplicates_after"] == 0
    assert len(np.unique(np.concatenate([found.codes_NL, catalogue["occupied"]]), axis=0)) == 2000


def test_a_full_catalogue_uses_every_id():
    rng = np.random.default_rng(1)
    books = [rng.normal(size=(k, 3)) for k in (3, 4, 5)]
    found = assign_unique(np.zeros((60, 3), int), rng.normal(size=(60, 3)), books, [f"p{i}" for i in range(60)])
    assert len(np.unique(found.codes_NL, axis=0)) == 60
    assert found.report["overflowed"] == 55


def test_without_collisions_nothing_moves():
    books = np.zeros((2, 3, 4))
    found = assign_unique([[0, 0], [0, 1]], np.zeros((2, 4)), books, ["a", "b"], occupied=[[0, 2]])
    assert found.codes_NL.tolist() == [[0, 0], [0, 1]] and not found.moved_N.any()
    assert found.report["moved"] == found.report["colliding_prefixes"] == found.report["collisions_before"] == 0


def test_colliding_prefixes_are_sorted_and_only_those():
    space = DocidSpace((3, 3, 3))
    packed = space.pack(np.array([[2, 1, 0], [2, 1, 0], [0, 0, 1], [0, 0, 2], [1, 0, 1], [1, 0, 1]]))
    assert colliding_prefixes(packed, space).tolist() == [3, 7]
    assert colliding_prefixes(packed[2:4], space).tolist() == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": [[0, 0]] * 2 + [[0, 3]]}, InputError, "row 2: code 3 at level 1"),
        ({"residual": [[0.0], [np.nan], [0.0]]}, InputError, "residual of product_id 'b' .row 1. is not finite"),
        ({"residual": [[0.0]] * 2}, InputError, "residuals of shape .3, 1."),
        ({"product_ids": ["a", "b", "a"]}, InputError, "product_id 'a' occurs twice"),
        ({"occupied": [[0, 1], [0, 1]]}, InputError, "occupied IDs: <a_0><b_1> occurs twice"),
        ({"occupied": [[1, 1], [2, 0]]}, InputError, "occupied IDs: row 1: code 2 at level 0"),
        ({"occupied": [[0, 0], [0, 1], [0, 2], [1, 0]]}, CapacityError, "need 7 IDs, but .* has only 6"),
        ({"books": [[[0.0], [1.0]], [[0.0], [1.0], [np.inf]]]}, InputError, "codebooks must be finite"),
        ({"method": "simplex"}, InputError, "method 'simplex' is unknown"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    case = {
        "codes": [[0, 0]] * 3,
        "residual": [[0.0]] * 3,
        "books": [[[0.0], [1.0]], [[0.0], [1.0], [2.0]]],
        "product_ids": ["a", "b", "c"],
        "occupied": None,
        "method": "sinkhorn",
    } | change
    with pytest.raises(error, match=message) as raised:
        assign_unique(
            case["codes"],
            case["residual"],
            case["books"],
            case["product_ids"],
            occupied=case["occupied"],
            method=case["method"],
        )
    assert isinstance(raised.value, ValueError)
