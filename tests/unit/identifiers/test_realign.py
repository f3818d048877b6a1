"""Renaming against all permutations and against a dense linear assignment; churn against a dictionary, also summed over
parts of a catalogue; exact errors."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.identifiers.realign import (
    apply,
    arrived,
    churn_counts,
    churn_of,
    common_products,
    inverse,
    realign,
)
from tests.oracles import realign as oracle


def churn(old_ids, old_codes_NL, new_ids, new_codes_NL, codes_per_level):
    """Of a whole catalogue at once."""
    pack = DocidSpace(tuple(codes_per_level)).pack
    counts = churn_counts(old_ids, old_codes_NL, new_ids, new_codes_NL, codes_per_level)
    came_N = arrived(old_ids, old_codes_NL, new_ids, new_codes_NL)
    before = np.unique(pack(old_codes_NL))
    reused = np.intersect1d(before, pack(np.asarray(new_codes_NL)[came_N]))
    return churn_of([counts], addresses=len(before), addresses_reused=len(reused))


@st.composite
def releases(draw):
    """Codes of the same products in two releases, a few codes per level, some of them used by no product."""
    codes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    count = draw(st.integers(0, 25))
    row = st.tuples(*(st.integers(0, k - 1) for k in codes))
    old, new = (draw(st.lists(row, min_size=count, max_size=count)) for _ in range(2))
    return [np.array(rows, np.int64).reshape(count, len(codes)) for rows in (old, new)], codes


@settings(max_examples=150, deadline=None)
@given(case=releases(), seed=st.integers(0, 2**32 - 1))
def test_no_permutation_agrees_more_or_keeps_more_numbers(case, seed):
    (old_NL, new_NL), codes = case
    found = realign(old_NL, new_NL, codes)
    renamed_NL = apply(new_NL, found.rename_LK)
    for level, rename_K in enumerate(found.rename_LK):
        assert rename_K.dtype == np.int64 and sorted(rename_K.tolist()) == list(range(codes[level]))
        old, new = old_NL[:, level].tolist(), new_NL[:, level].tolist()
        best = oracle.best_worth(old, new, codes[level])
        assert oracle.worth(old, new, rename_K.tolist()) == best
        share = best[0] / len(old) if old else 1.0
        assert found.agreement_after_L[level] == pytest.approx(share)
        assert found.agreement_after_L[level] >= found.agreement_before_L[level]
        assert renamed_NL[:, level].tolist() == [rename_K[code] for code in new]
    order = np.random.default_rng(seed).permutation(len(old_NL))
    again = realign(old_NL[order], new_NL[order], codes)
    assert all(np.array_equal(a, b) for a, b in zip(again.rename_LK, found.rename_LK, strict=True))


def test_equals_a_dense_assignment_on_a_skewed_level():
    rng = np.random.default_rng(0)
    old_N = (300 * rng.random(5000) ** 3).astype(int)
    new_N = np.where(rng.random(5000) < 0.4, rng.permutation(300)[old_N], rng.integers(0, 300, 5000))
    counts_KK = np.zeros((300, 300), int)
    np.add.at(counts_KK, (new_N, old_N), 1)
    best = counts_KK[linear_sum_assignment(counts_KK, maximize=True)].sum()
    found = realign(old_N[:, None], new_N[:, None], [300])
    assert round(found.agreement_after_L[0] * 5000) == best


def test_a_permuted_release_gets_its_old_names_back_at_8192_codes():
    rng = np.random.default_rng(1)
    codes = (8192, 512)
    old_NL = rng.integers(0, codes, (20000, 2))
    shuffle_LK = [rng.permutation(k) for k in codes]
    new_NL = apply(old_NL, shuffle_LK)
    found = realign(old_NL, new_NL, codes)
    assert found.agreement_before_L.max() < 0.01
    assert found.agreement_after_L.tolist() == [1.0, 1.0]
    assert np.array_equal(apply(new_NL, found.rename_LK), old_NL)


def test_unused_codes_keep_free_numbers_and_fill_the_others_in_order():
    found = realign([[4], [4]], [[1], [1]], [6])
    # 1 takes 4; 0, 2, 3, 5 keep their numbers; 4 has lost its own and takes the only one left.
    assert found.rename_LK[0].tolist() == [0, 4, 2, 3, 1, 5]
    found = realign([[0], [1]], [[4], [5]], [6])
    assert found.rename_LK[0].tolist() == [4, 5, 2, 3, 0, 1]


def test_equal_counts_keep_the_number():
    found = realign([[0], [1], [0], [1]], [[1], [1], [0], [0]], [2])
    assert found.rename_LK[0].tolist() == [0, 1]


def test_without_common_products_nothing_is_renamed():
    empty = np.empty((0, 2), np.int64)
    found = realign(empty, empty, [3, 2])
    assert [rename_K.tolist() for rename_K in found.rename_LK] == [[0, 1, 2], [0, 1]]
    assert found.agreement_before_L.tolist() == found.agreement_after_L.tolist() == [1.0, 1.0]


@st.composite
def histories(draw):
    row = st.tuples(st.integers(0, 2), st.integers(0, 3))
    return [draw(st.dictionaries(st.text("abé1", min_size=1, max_size=3), row, max_size=20)) for _ in range(2)]


def shuffled(case, random):
    """The arguments old_ids, old_codes_NL, new_ids, new_codes_NL of a pair of releases."""
    tables = []
    for release in case:
        ids = random.sample(sorted(release), len(release))
        tables += [ids, np.array([release[product_id] for product_id in ids], np.int64).reshape(-1, 2)]
    return tables


@settings(max_examples=150, deadline=None)
@given(case=histories(), random=st.randoms(use_true_random=False))
def test_churn_equals_its_oracle_in_any_order_with_shared_ids(case, random):
    found = churn(*shuffled(case, random), [3, 4])
    expected = oracle.churn(*case) | ({} if any(case) else {"prefix_churn": [0.0, 0.0]})
    assert found == expected
    assert json.loads(json.dumps(found)) == found


@settings(max_examples=150, deadline=None)
@given(case=histories(), parts=st.integers(1, 4), random=st.randoms(use_true_random=False))
def test_counts_of_parts_add_up_to_the_churn_of_the_catalogue(case, parts, random):
    old, new = case
    counts, before, now = [], set(old.values()), set()
    for part in range(parts):
        cut = [{p: docid for p, docid in release.items() if sum(map(ord, p)) % parts == part} for release in case]
        tables = shuffled(cut, random)
        counts.append(churn_counts(*tables, [3, 4]))
        assert counts[-1] == {
            "common": len(set(cut[0]) & set(cut[1])),
            "new": len(set(cut[1]) - set(cut[0])),
            "retired": len(set(cut[0]) - set(cut[1])),
            "changed": oracle.changed(*cut) or [0, 0],
        }
        assert {type(count) for count in [*counts[-1]["changed"], counts[-1]["common"]]} == {int}
        arrived_N = arrived(*tables)
        assert arrived_N.dtype == bool
        assert dict(zip(tables[2], arrived_N.tolist(), strict=True)) == oracle.arrived(*cut)
        now |= {tuple(docid) for docid in tables[3][arrived_N].tolist()}
    found = churn_of(counts, addresses=len(before), addresses_reused=len(before & now))
    assert found == churn(*shuffled(case, random), [3, 4])
    assert json.loads(json.dumps(found)) == found


def test_a_side_without_rows_is_all_new_or_all_retired():
    none = ([], np.empty((0, 2), np.int32))
    some = (["b", "a"], np.array([[0, 1], [2, 0]]))
    assert arrived(*none, *some).tolist() == [True, True]
    assert arrived(*some, *none).shape == (0,)
    assert churn_counts(*none, *some, [3, 2]) == {"common": 0, "new": 2, "retired": 0, "changed": [0, 0]}
    assert churn_counts(*some, *none, [3, 2]) == {"common": 0, "new": 0, "retired": 2, "changed": [0, 0]}


def test_the_inverse_undoes_a_renaming():
    rng = np.random.default_rng(2)
    codes_NL = rng.integers(0, (7, 4), (30, 2))
    rename_LK = [rng.permutation(7), rng.permutation(4).tolist()]
    back_LK = inverse(rename_LK)
    assert [back_K.dtype for back_K in back_LK] == [np.int64, np.int64]
    assert np.array_equal(apply(apply(codes_NL, rename_LK), back_LK), codes_NL)
    assert np.array_equal(apply(apply(codes_NL, back_LK), rename_LK), codes_NL)


def test_common_products_are_in_product_id_order():
    found = common_products(["c", "a", "b"], ["b", "d", "c"])
    assert (found.old_N.tolist(), found.new_N.tolist()) == ([2, 0], [0, 2])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: realign([[0]], [[0], [1]], [2]), "1 rows of old codes beside 2 of new ones"),
        (lambda: realign([[2]], [[0]], [2]), r"old codes: row 0: code 2 at level 0 is outside 0…1"),
        (lambda: realign([[0]], [[0, 1]], [2]), "new codes: codes must be an integer array N×1"),
        (lambda: apply([[0]], [[0, 0]]), r"renaming of level 0 is no permutation of 0…1: some code would be lost"),
        (lambda: inverse([[0], [1, 2]]), r"renaming of level 1 is no permutation of 0…1: some code would be lost"),
        (lambda: churn_counts(["a"], [[5]], [], np.empty((0, 1), int), [2]), "old codes: row 0: code 5 at level 0"),
        (lambda: churn_counts([], np.empty((0, 1), int), [], [[1]], [2]), "0 new product_ids need as many rows of cod"),
        (lambda: arrived(["a"], [[0, 1]], ["a"], [[0]]), r"new codes must be .* N×L, with one L .* of shape \(1, 1\)"),
        (lambda: arrived([], [], ["a"], [[0]]), r"old codes must be an integer array N×L, .* has shape \(0, L\)"),
        (lambda: arrived(["a", "a"], [[0], [1]], [], np.empty((0, 1), int)), "'a' occurs more than once in the old"),
        (lambda: churn_of([], addresses=0, addresses_reused=0), r"at least one part, .* found \[\] levels"),
        (
            lambda: churn_of(
                [{"common": 0, "new": 0, "retired": 0, "changed": [0] * levels} for levels in (2, 3)],
                addresses=0,
                addresses_reused=0,
            ),
            r"all of the same number of levels, found \[2, 3\] levels: hand over what churn_counts returned",
        ),
        (
            lambda: churn_counts(["a"], [[0], [1]], ["a"], [[0]], [2]),
            "1 old product_ids need as many rows of codes, found 2",
        ),
        (
            lambda: churn_counts(["a"], [[0]], ["b", "b"], [[0], [1]], [2]),
            r"product_id 'b' occurs more than once in the new release \(1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
