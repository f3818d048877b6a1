"""Unique IDs on known catalogues: quality beside the optimum, blocks, overflow, occupied IDs, and bad input.

Brute force and random cases: test_collision_properties.py.
"""

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError, InputError
from catid2_ray.identifiers import collisions, overflow
from catid2_ray.identifiers.collisions import assign_unique, colliding_prefixes
from catid2_ray.identifiers.overflow import nearest


def resolve(case, method="sinkhorn", rows=slice(None)):
    return assign_unique(
        case["codes"][rows],
        case["residual"][rows],
        case["books"],
        np.asarray(case["product_ids"])[rows],
        occupied=case["occupied"],
        method=method,
    )


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


def test_sinkhorn_is_within_a_thousandth_of_exact_and_mostly_by_itself(catalogue):
    found, best = resolve(catalogue), resolve(catalogue, "exact")
    assert (totals(catalogue, found) <= 1.001 * totals(catalogue, best) + 1e-12).all()
    assert found.report["duplicates_after"] == 0 and found.report["overflowed"] == 0
    assert found.report["solved_exactly_instead"] < 0.1 * found.report["colliding_prefixes"]
    assert totals(catalogue, best).sum() <= totals(catalogue, resolve(catalogue, "greedy")).sum()


def test_block_size_and_absent_prefixes_change_nothing(catalogue, monkeypatch):
    whole = resolve(catalogue)
    space = DocidSpace((16, 16, 24))
    packed = space.pack(catalogue["codes"])
    rows = np.flatnonzero(np.isin(space.prefix_of(packed, 2), colliding_prefixes(packed, space)))
    monkeypatch.setattr(collisions, "BLOCK_NUMBERS", 2000)
    monkeypatch.setattr(collisions, "PLAN_NUMBERS", 300)
    parts = [resolve(catalogue, rows=rows[space.prefix_of(packed[rows], 2) % 3 == part]) for part in range(3)]
    for part, found in enumerate(parts):
        mine = rows[space.prefix_of(packed[rows], 2) % 3 == part]
        assert np.array_equal(whole.codes_NL[mine], found.codes_NL)
        assert np.array_equal(whole.cost_N[mine], found.cost_N)
    assert not np.delete(whole.moved_N, rows).any()


def test_a_plan_that_cannot_be_computed_is_replaced_by_the_optimum(catalogue, monkeypatch):
    monkeypatch.setattr(collisions, "SINKHORN_REGS", (1e-9,))
    found, best = resolve(catalogue), resolve(catalogue, "exact")
    assert found.report["solved_exactly_instead"] > 0
    assert (totals(catalogue, found) <= 1.001 * totals(catalogue, best) + 1e-12).all()


@pytest.mark.parametrize("convert", [list, pa.array, lambda ids: pa.chunked_array([ids[:7], ids[7:]])])
def test_product_ids_may_be_a_list_or_arrow(catalogue, convert):
    from_numpy = resolve(catalogue)
    found = assign_unique(
        catalogue["codes"], catalogue["residual"], catalogue["books"], convert(catalogue["product_ids"])
    )
    assert np.array_equal(found.codes_NL, from_numpy.codes_NL) and found.report == from_numpy.report


def test_nearest_codeword_is_chosen_by_the_row_alone_and_skips_barred_codes():
    rng = np.random.default_rng(5)
    book = np.concatenate([rng.normal(size=(30, 8)), np.zeros((2, 8))])
    point = np.concatenate([rng.normal(size=(500, 8)), np.zeros((20, 8))])
    barred = rng.random((520, 32)) < 0.5
    barred[-1] = [True] * 30 + [False] * 2
    code, distance = nearest(point, book, barred)
    every = np.where(barred, np.inf, ((point[:, None] - book) ** 2).sum(axis=2))
    assert np.array_equal(code, every.argmin(axis=1)) and code[-1] == 30
    for rows in (slice(0, 1), slice(7, 10), slice(100, 520)):
        assert np.array_equal(distance[rows], nearest(point[rows], book, barred[rows])[1])


@pytest.mark.parametrize("method", ["sinkhorn", "exact"])
def test_forty_crowded_families_fill_their_prefixes_and_nobody_is_lost(method):
    rng = np.random.default_rng(6)
    books = [rng.normal(size=(16, 4)) * scale for scale in (1.0, 0.6, 0.3)]
    codes = np.repeat(np.column_stack([rng.integers(0, 16, (40, 2)), np.zeros(40, int)]), 50, axis=0)
    residual = rng.normal(size=(2000, 4)) * 0.05
    found = assign_unique(codes, residual, books, [f"p{i}" for i in rng.permutation(2000)], method=method)
    assert found.report["duplicates_after"] == 0 and found.report["overflowed"] >= 40 * 34


def test_a_family_larger_than_its_prefix_spills_to_the_nearest_siblings():
    rng = np.random.default_rng(0)
    books = [np.arange(4.0)[:, None] * 100, np.arange(8.0)[:, None] * 10, np.arange(8.0)[:, None]]
    residual = np.full((20, 1), 3.0) + rng.normal(size=(20, 1)) * 1e-3
    found = assign_unique(np.tile([1, 4, 3], (20, 1)), residual, books, [f"p{i:02d}" for i in range(20)])
    assert found.report["overflowed"] == 12 and found.report["largest_prefix"] == 20
    assert np.bincount(found.codes_NL[:, 1], minlength=8).tolist() == [0, 0, 0, 4, 8, 8, 0, 0]
    assert (found.codes_NL[:, 0] == 1).all()


def test_copies_share_one_offer_each_time_a_prefix_fills(monkeypatch):
    rng, asked, make = np.random.default_rng(7), [], overflow._Offers.make
    monkeypatch.setattr(overflow._Offers, "make", lambda self, row_Q: (asked.append(len(row_Q)), make(self, row_Q))[1])
    books = [rng.normal(size=(8, 4)) * scale for scale in (1.0, 0.6, 0.3)]
    residual = np.repeat(rng.normal(size=(2, 4)) * 0.1, 200, axis=0)
    found = assign_unique(np.zeros((400, 3), int), residual, books, [f"p{i}" for i in rng.permutation(400)])
    assert found.report["overflowed"] == 392 and found.report["duplicates_after"] == 0
    assert 49 <= sum(asked) <= 2 * 50, "49 prefixes take them, and there are two kinds of product"


def test_a_later_offer_may_be_cheaper_and_counts_at_once():
    """Prefix 1 fills with the product of −0.6; those at 0 then look at prefix 2, further away but with an ID at 0."""
    books = [np.array([[0.0], [1.0], [2.0], [3.0], [-0.5], [50.0]]), np.array([[0.0], [-2.0]])]
    home = np.array([0, 0, 0, 2, 3, 3, 3, 4, 4, 4])
    latent = np.array([0.0, 0.0, 0.0, 2.0, 2.75, 2.75, 2.75, -0.6, -0.6, -0.6])
    codes, residual = np.column_stack([home, np.zeros(10, int)]), latent[:, None] - books[0][home]
    found = assign_unique(codes, residual, books, [*"abcdefghij"], occupied=[[1, 0]])
    assert found.codes_NL[:, 0].tolist() == [2, 0, 0, 2, 5, 3, 3, 1, 4, 4]


def test_quiet_products_may_stay_away_as_occupied_ids(catalogue):
    catalogue["codes"][:40] = catalogue["codes"][0]
    space = DocidSpace((16, 16, 24))
    packed = space.pack(catalogue["codes"])
    loud = np.isin(space.prefix_of(packed, 2), colliding_prefixes(packed, space))
    catalogue["occupied"] = catalogue["codes"][~loud]
    found = resolve(catalogue, rows=np.flatnonzero(loud))
    assert found.report["overflowed"] > 0 and found.report["duplicates_after"] == 0
    assert len(np.unique(np.concatenate([found.codes_NL, catalogue["occupied"]]), axis=0)) == 2000


@pytest.mark.parametrize("method", ["sinkhorn", "exact", "greedy"])
def test_of_twins_the_lower_product_id_gets_the_nearer_code_whoever_stands_between(method):
    rng = np.random.default_rng(11)
    for _ in range(50):
        one, other = np.zeros((2, 8))
        # √(2 + 0) · 2 = √(2 + 6) · 1: two points whose sums agree.
        one[0], other[6] = 2.0, 1.0
        residual = np.array([one, other, one, other, one])
        books = [np.zeros((1, 8)), rng.normal(size=(7, 8))]
        found = assign_unique(np.zeros((5, 2), int), residual, books, list("abcde"), method=method)
        cost_N = ((residual - books[1][found.codes_NL[:, 1]]) ** 2).sum(1)
        assert (np.diff(cost_N[[0, 2, 4]]) >= 0).all() and cost_N[1] <= cost_N[3]


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
        (
            {"residual": [[0.0], [0.0], [np.inf]]},
            InputError,
            "residual of product_id 'c' .row 2. is not finite, one of 1",
        ),
        ({"codes": [[0, 0], [-1, 0], [0, 0]]}, InputError, "row 1: code -1 at level 0 is outside 0…1"),
        ({"codes": [[0.0, 0.0]] * 3}, InputError, "codes must be an integer array N×2, found float64"),
        ({"product_ids": ["a", "b"]}, InputError, "as many product_ids, found .3, 1. and 2"),
        ({"product_ids": ["a", None, "c"]}, InputError, "1 of 3 product_ids are null"),
        (
            {"product_ids": ["a", "b", "a"]},
            InputError,
            "'a' occurs more than once in the catalogue .1 repeats in all.: give",
        ),
        ({"occupied": [[0, 1], [0, 1]]}, InputError, "occupied IDs: <a_0><b_1> occurs twice"),
        ({"occupied": [[1, 1], [2, 0]]}, InputError, "occupied IDs: row 1: code 2 at level 0"),
        ({"occupied": [[0, 0], [0, 1], [0, 2], [1, 0]]}, CapacityError, "need 7 IDs, but .* has only 6"),
        (
            {"codes": [[0, 0]] * 7, "residual": [[0.0]] * 7, "product_ids": [*"abcdefg"]},
            CapacityError,
            "7 products and 0 occupied IDs need 7 IDs, but codes_per_level .2, 3. has only 6; train a quantizer with more",
        ),
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
