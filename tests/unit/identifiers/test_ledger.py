"""Histories of releases against a dictionary: statuses, tombstones, quarantine, returns; damage and its messages.

Unusual: the quarantine is another one in every release of a history.
"""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.identifiers.ledger import STATUSES, advance, counts, first, held, occupied, schema, withheld
from tests.oracles import ledger as oracle

IDS = st.text("abé0", min_size=1, max_size=2)
QUARANTINES = st.integers(0, 6)
COSTS = st.sampled_from([0.0, 0.5, -0.25])


@st.composite
def histories(draw):
    """Releases {product_id: (codes, cost)} without shared IDs, at growing numbers, each with a quarantine."""
    releases = []
    for _ in range(draw(st.integers(1, 5))):
        ids = draw(st.lists(IDS, unique=True, max_size=12))
        packed = draw(st.lists(st.integers(0, 19), unique=True, min_size=len(ids), max_size=len(ids)))
        releases.append({p: ((code // 5, code % 5), draw(COSTS)) for p, code in zip(ids, packed, strict=True)})
        if len(releases) > 1 and draw(st.booleans()):  # else hardly any product would keep its ID
            before = releases[-2]
            taken = {codes for codes, _ in before.values()}
            releases[-1] = before | {
                p: row for p, row in releases[-1].items() if p not in before and row[0] not in taken
            }
    numbers = np.cumsum(draw(st.lists(st.integers(1, 3), min_size=len(releases), max_size=len(releases))))
    return releases, numbers.tolist(), draw(st.lists(QUARANTINES, min_size=len(releases), max_size=len(releases)))


def arrays(release, random=None):
    ids = sorted(release) if random is None else random.sample(sorted(release), len(release))
    codes_NL = np.array([release[p][0] for p in ids], np.int64).reshape(len(ids), 2)
    return ids, codes_NL, np.array([release[p][1] for p in ids])


def at(number, quarantine):
    return {"number": number, "quarantine": quarantine}


def as_dictionary(table):
    return {
        row["product_id"]: (tuple(row["codes"]), row["status"], row["since"], row["until"], row["cost"])
        for row in table.to_pylist()
    }


def part_of(product_id, parts):
    return sum(map(ord, product_id)) % parts


def cut(table, parts):
    part_M = np.array([part_of(p, parts) for p in table["product_id"].to_pylist()], int)
    return [table.filter(pa.array(part_M == part)) for part in range(parts)]


def as_tuples(codes_ML):
    return [tuple(codes) for codes in codes_ML.tolist()]


@settings(max_examples=150, deadline=None)
@given(case=histories(), random=st.randoms(use_true_random=False))
def test_histories_equal_the_oracle(case, random):
    table, expected = None, None
    for release, number, quarantine in zip(*case, strict=True):
        if table is None:
            table, expected = first(*arrays(release, random), number=number), oracle.first(release, number)
        else:
            asked = [*release, "zz"]
            found = held(table, asked, number=number)
            codes = oracle.held(expected, asked, number)
            assert found.held_N.tolist() == [row is not None for row in codes]
            assert as_tuples(found.codes_NL) == [row or (-1, -1) for row in codes]
            kept_back_ML = withheld(table, random.sample(sorted(release), len(release)), **at(number, quarantine))
            assert kept_back_ML.dtype == np.int32
            kept_back = oracle.withheld(expected, release, number, quarantine)
            assert as_tuples(kept_back_ML) == kept_back
            # They are the reserved tombstones of the ledger that the release leaves behind.
            after = as_dictionary(advance(table, *arrays(release), **at(number, quarantine))).values()
            assert kept_back == sorted({row[0] for row in after if row[1] == "retired" and number < row[3]})
            table = advance(table, *arrays(release, random), **at(number, quarantine))
            expected = oracle.advance(expected, release, number, quarantine)
        assert table.schema.equals(schema(2))
        table.validate(full=True)
        assert table["product_id"].to_pylist() == sorted(expected)
        assert as_dictionary(table) == expected
        taken_ML = occupied(table, number=number + 1)
        assert taken_ML.dtype == np.int32
        assert as_tuples(taken_ML) == oracle.occupied(expected, number + 1)
        statuses = Counter(row[1] for row in expected.values())
        assert counts(table) == {s: statuses[s] for s in STATUSES} | {"live": len(release)}


@st.composite
def visits(draw):
    """Releases of an append or a full re-ID: (products that are there, number, quarantine, full re-ID or not)."""
    steps, number = [], 0
    for _ in range(draw(st.integers(2, 8))):
        number += draw(st.integers(1, 3))
        there = sorted(draw(st.sets(st.sampled_from("abcdef"), max_size=4)))
        steps.append((there, number, draw(QUARANTINES), draw(st.integers(0, 3)) == 0))
    return steps


@settings(max_examples=200, deadline=None)
@given(steps=visits(), parts=st.integers(1, 3), random=st.randoms(use_true_random=False))
def test_no_id_has_two_products_or_a_new_one_too_early_while_the_quarantine_changes(steps, parts, random):
    table = first([], np.empty((0, 1), np.int64), [], number=0)
    live, left = {}, {}  # {product_id: code}, {product_id: (code, first release in which it is free again)}
    for there, number, quarantine, anew in steps:
        if anew:
            had, taken_ML = {}, withheld(table, there, **at(number, quarantine))
        else:
            found = held(table, there, number=number)
            had = {p: row[0] for p, h, row in zip(there, found.held_N, found.codes_NL.tolist(), strict=True) if h}
            taken_ML = occupied(table, number=number)
            in_parts = [row for part in cut(table, parts) for row in as_tuples(occupied(part, number=number))]
            assert sorted(in_parts) == as_tuples(taken_ML)  # so the parts hold no ID twice
            own = {p: code for p, (code, until) in left.items() if number < until} | live
            assert had == {p: own[p] for p in there if p in own}
        # 12 IDs are enough for 6 products and their tombstones, and so few that free ones are soon given again.
        free = iter(random.sample(sorted(set(range(12)) - set(taken_ML.ravel().tolist())), len(there) - len(had)))
        now = {p: had[p] if p in had else next(free) for p in there}
        assert len(set(now.values())) == len(now)
        left = {p: row for p, row in left.items() if p not in now}
        left |= {p: (code, number + quarantine) for p, code in live.items() if p not in now}
        assert not set(now.values()) & {code for code, until in left.values() if number < until}
        codes_NL = np.array(list(now.values()), np.int64).reshape(-1, 1)
        table, live = advance(table, list(now), codes_NL, np.zeros(len(now)), **at(number, quarantine)), now


def test_a_product_leaves_its_id_rests_and_it_returns():
    one = first(["a", "b"], [[0, 0], [0, 1]], [0.0, 0.5], number=1)
    two = advance(one, ["a"], [[0, 0]], [0.0], number=2, quarantine=2)
    assert as_dictionary(two)["b"] == ((0, 1), "retired", 2, 4, 0.5)
    assert occupied(two, number=3).tolist() == [[0, 0], [0, 1]]
    assert occupied(two, number=4).tolist() == [[0, 0]]
    assert occupied(advance(one, ["a"], [[0, 0]], [0.0], **at(2, 0)), number=3).tolist() == [[0, 0]]
    back = held(two, ["b", "c"], number=3)
    assert (back.held_N.tolist(), back.codes_NL.tolist(), back.cost_N.tolist()) == (
        [True, False],
        [[0, 1], [-1, -1]],
        [0.5, 0.0],
    )
    assert not held(two, ["b"], number=4).held_N.any()
    for number, status in ((3, "kept"), (4, "new")):  # 3: its tombstone reserves the ID, 4: the quarantine is over
        three = advance(two, ["a", "b"], [[0, 0], [0, 1]], [0.0, 0.5], **at(number, 2))
        assert as_dictionary(three) == {"a": ((0, 0), "kept", 1, 0, 0.0), "b": ((0, 1), status, number, 0, 0.5)}
    other = advance(two, ["a", "b"], [[0, 0], [1, 1]], [0.0, 0.0], number=3, quarantine=2)
    assert as_dictionary(other)["b"] == ((1, 1), "new", 3, 0, 0.0)


def test_a_raised_quarantine_does_not_claim_an_id_again():
    table = first(["a"], [[7]], [0], number=1)
    table = advance(table, [], np.empty((0, 1), int), [], number=2, quarantine=1)
    assert as_dictionary(table)["a"] == ((7,), "retired", 2, 3, 0.0)
    table = advance(table, ["b"], [[7]], [0], number=3, quarantine=9)
    assert held(table, ["a", "b"], number=4).held_N.tolist() == [False, True]
    assert withheld(table, ["b"], number=4, quarantine=9).shape == (0, 1)
    assert [occupied(part, number=4).tolist() for part in cut(table, 2)] == [[[7]], []]  # b is 98, a is 97


def test_a_lowered_quarantine_does_not_free_an_id_early():
    table = advance(first(["a"], [[7]], [0], number=1), ["b"], [[1]], [0], number=2, quarantine=5)
    table = advance(table, ["b"], [[1]], [0], number=3, quarantine=0)
    assert as_dictionary(table)["a"] == ((7,), "retired", 2, 7, 0.0)
    assert [occupied(table, number=n).tolist() for n in (6, 7)] == [[[1], [7]], [[1]]]
    assert [withheld(table, ["b"], number=n, quarantine=0).tolist() for n in (6, 7)] == [[[7]], []]


def test_a_quarantine_beyond_the_last_release_number():
    table = advance(first(["a"], [[7]], [0], number=1), ["b"], [[1]], [0], number=2, quarantine=2**31 - 1)
    assert as_dictionary(table)["a"] == ((7,), "retired", 2, 2**31 - 1, 0.0)
    assert occupied(table, number=2**31 - 2).tolist() == [[1], [7]]


@settings(max_examples=50, deadline=None)
@given(case=histories(), parts=st.integers(1, 4))
def test_what_parts_withhold_is_together_what_the_catalogue_withholds(case, parts):
    *before, (last, number, quarantine) = zip(*case, strict=True)
    table = first(*arrays({}), number=0)
    for release, *when in before:
        table = advance(table, *arrays(release), **at(*when))
    found = set()
    for part, rows in enumerate(cut(table, parts)):
        ids = [p for p in last if part_of(p, parts) == part]
        found |= set(as_tuples(withheld(rows, ids, **at(number, quarantine))))
    assert sorted(found) == as_tuples(withheld(table, list(last), **at(number, quarantine)))


def test_a_full_re_id_withholds_the_ids_of_those_who_left():
    one = first(["a", "b", "c"], [[0, 0], [0, 1], [1, 0]], [0, 0, 0], number=1)
    short, long = (advance(one, ["a", "b"], [[0, 0], [0, 1]], [0, 0], **at(2, quarantine)) for quarantine in (1, 2))
    # b leaves in release 3, c left in release 2; a stays and withholds nothing.
    assert withheld(short, ["d", "a"], number=3, quarantine=0).shape == (0, 2)
    assert withheld(short, ["d", "a"], number=3, quarantine=1).tolist() == [[0, 1]]
    assert withheld(long, ["d", "a"], number=3, quarantine=0).tolist() == [[1, 0]]
    assert withheld(long, ["d", "a"], number=3, quarantine=2).tolist() == [[0, 1], [1, 0]]
    assert withheld(long, ["a", "c"], number=3, quarantine=2).tolist() == [[0, 1]]
    assert withheld(long, [], number=3, quarantine=2).tolist() == [[0, 0], [0, 1], [1, 0]]
    # An append gives nobody the ID of b in release 3, with any quarantine: b has it in the release before.
    assert occupied(short, number=3).tolist() == [[0, 0], [0, 1]]


def test_an_id_with_two_tombstones_is_withheld_by_the_young_one_when_the_other_product_returns():
    table = first(["a"], [[7]], [0], number=1)
    table = advance(table, ["x"], [[0]], [0], number=2, quarantine=3)
    table = advance(table, ["x", "b"], [[0], [7]], [0, 0], number=9, quarantine=3)
    assert withheld(table, ["x", "a"], number=10, quarantine=3).tolist() == [[7]]
    assert withheld(table, ["x", "b"], number=10, quarantine=3).tolist() == []
    table = advance(table, ["x"], [[0]], [0], number=10, quarantine=3)
    assert withheld(table, ["x", "a"], number=12, quarantine=0).tolist() == [[7]]
    assert withheld(table, ["x", "b"], number=12, quarantine=9).tolist() == []


def test_a_reused_id_does_not_collide_with_the_tombstone_that_had_it():
    table = first(["a", "b"], [[0], [1]], [0, 0], number=1)
    table = advance(table, ["a"], [[0]], [0], number=2, quarantine=2)
    table = advance(table, ["a", "c"], [[0], [1]], [0, 0], number=4, quarantine=2)
    assert occupied(table, number=5).tolist() == [[0], [1]]
    assert counts(table) == {"kept": 1, "new": 1, "moved": 0, "retired": 0, "live": 2}


def test_a_tombstone_whose_quarantine_is_over_leaves_the_ledger():
    table, code, tombstones = first(["a", "b", "c"], [[0], [1], [2]], [0, 0, 0], number=1), {"a": 0, "b": 1}, []
    for number, there in enumerate(["ab", "a", "a", "a"], start=2):
        table = advance(table, list(there), [[code[p]] for p in there], [0] * len(there), number=number, quarantine=2)
        tombstones.append([p for p, row in as_dictionary(table).items() if row[1] == "retired"])
    assert tombstones == [["c"], ["b", "c"], ["b"], []]  # c is gone since release 2, b since 3
    # One that leaves is noted in that release, whatever the quarantine, and in no later one.
    left = advance(first(["a"], [[0]], [0], number=1), [], np.empty((0, 1), int), [], number=2, quarantine=0)
    assert counts(left)["retired"] == 1
    assert advance(left, [], np.empty((0, 1), int), [], number=3, quarantine=0).num_rows == 0


def test_tombstones_that_older_ledgers_keep_for_good_change_nothing():
    old = pa.concat_tables([GOOD, first(["c"], [[0, 3]], [0.0], number=1)]).sort_by("product_id").combine_chunks()
    for column, value in (("status", "retired"), ("until", 2)):
        index = old.schema.get_field_index(column)
        values = [*old[column].to_pylist()[:2], value]
        old = old.set_column(index, column, pa.array(values, old.schema.types[index]))
    for there in (["a", "b"], ["a", "b", "c"]):
        release = (there, [[0, 1], [0, 2], [0, 3]][: len(there)], [0.0] * len(there))
        assert advance(old, *release, **at(4, 3)).equals(advance(GOOD, *release, **at(4, 3)))
    assert not held(old, ["c"], number=4).held_N.any() and occupied(old, number=4).tolist() == [[0, 1], [0, 2]]


def test_cluster_releases_may_share_ids():
    table = first(["a", "b"], [[0], [0]], [0, 0], number=1, shared=True)
    table = advance(table, ["a", "b", "c"], [[0], [0], [0]], [0, 0, 0], number=2, quarantine=0, shared=True)
    assert counts(table)["kept"] == 2
    assert occupied(table, number=3, shared=True).tolist() == [[0]]
    for call in (occupied, lambda *args, **more: withheld(*args, ["a"], quarantine=1, **more)):
        with pytest.raises(InputError, match=r"'a' and 'b' both hold the ID \[0\] \(2 such repeats"):
            call(table, number=3)


def test_a_ledger_survives_parquet_slices_chunks_and_plain_strings(tmp_path):
    table = first([f"p{n}" for n in range(9)], np.arange(27).reshape(9, 3), np.zeros(9), number=1)
    table = advance(table, [f"p{n}" for n in range(5)], np.arange(15).reshape(5, 3), np.zeros(5), **at(2, 9))
    pq.write_table(table, tmp_path / "ledger.parquet", row_group_size=4)
    assert pq.read_table(tmp_path / "ledger.parquet").equals(table)
    pieces = pa.concat_tables([table.slice(0, 2), table.slice(2, 3), table.slice(5)])
    plain = pieces.set_column(2, "status", pieces["status"].cast(pa.string()))
    assert counts(plain) == counts(table)
    assert np.array_equal(occupied(plain, number=3), np.arange(27).reshape(9, 3))
    column = pa.chunked_array([["p3"], ["p0", "q"]], pa.large_string())
    assert held(pieces, column, number=3).codes_NL.tolist() == [[9, 10, 11], [0, 1, 2], [-1, -1, -1]]


def test_empty_releases():
    table = first([], np.empty((0, 2), np.int64), [], number=0)
    assert occupied(table, number=1).shape == (0, 2)
    table = advance(table, ["a"], [[1, 2]], [0.0], number=1, quarantine=3)
    table = advance(table, [], np.empty((0, 2), np.int64), [], number=2, quarantine=3)
    assert counts(table) == {"kept": 0, "new": 0, "moved": 0, "retired": 1, "live": 0}


GOOD = first(["a", "b"], [[0, 1], [0, 2]], [0.0, 0.0], number=3)


def changed(column, values):
    index = GOOD.schema.get_field_index(column)
    return GOOD.set_column(index, column, pa.array(values, GOOD.schema.types[index]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: first(["a", "a"], [[0], [1]], [0, 0], number=1), r"'a' occurs more than once in the release \(1 rep"),
        (lambda: first(["a", None], [[0], [1]], [0, 0], number=1), "1 of 2 product_ids are null"),
        (lambda: first(["a"], [[0], [1]], [0], number=1), r"1 product_ids need as many codes and costs, found shapes"),
        (lambda: first(["a"], [[0.0]], [0], number=1), "codes must be an integer array N×L, found float64"),
        (lambda: first(["a"], [[-1]], [0], number=1), "product_id 'a': code -1 at level 0 is outside"),
        (lambda: first(["a"], [[1]], [np.nan], number=1), "product_id 'a': cost nan is not finite, one of 1"),
        (lambda: first(["a"], [[1]], [0], number=-1), "number must be a whole number from 0 to .*, found -1"),
        (lambda: first(["b", "a"], [[1], [1]], [0, 0], number=1), r"'a' and 'b' both hold the ID \[1\]"),
        (lambda: advance(GOOD, ["a"], [[1]], [0], **at(4, 1)), "IDs of 1 levels, the previous ledger of 2"),
        (lambda: advance(GOOD, ["a"], [[0, 1]], [0], **at(3, 1)), "number 3 does not follow: .* knows release 3"),
        (lambda: advance(GOOD, ["a"], [[0, 1]], [0], **at(4, -1)), "quarantine must be a whole number from 0 to"),
        (lambda: occupied(GOOD, number=2), "release number 2 does not follow"),
        (lambda: held(GOOD, ["a"], number=2), "release number 2 does not follow"),
        (lambda: withheld(GOOD, [], number=2, quarantine=1), "release number 2 does not follow"),
        (lambda: withheld(GOOD, [], number=4, quarantine=-1), "quarantine must be a whole number from 0"),
        (lambda: withheld(GOOD, ["a", "a"], number=4, quarantine=1), "'a' occurs more than once in the release"),
        (lambda: withheld(GOOD, ["a", None], number=4, quarantine=1), "1 of 2 product_ids are null"),
        (lambda: withheld(changed("since", [3, None]), [], number=4, quarantine=1), "damaged: nulls in since"),
        (lambda: held(GOOD, ["a", "a"], number=4), "'a' occurs more than once in the release"),
        (lambda: occupied(changed("codes", [[0, 1]] * 2), number=4), r"both hold the ID \[0, 1\]"),
        (lambda: counts(changed("product_id", ["b", "a"])), "damaged: its product_ids are not in ascending order"),
        (lambda: counts(changed("product_id", ["a", "a"])), "damaged: its product_ids are not in ascending order"),
        (lambda: counts(changed("since", [3, None])), "damaged: nulls in since"),
        (lambda: counts(changed("until", [0, None])), "damaged: nulls in until"),
        (
            lambda: counts(changed("until", [0, 5])),
            "damaged: product_id 'b' is new since release 3 and has until 5, one of 1: live products have 0, tombstones",
        ),
        (
            lambda: counts(changed("status", ["retired", "new"])),
            "damaged: product_id 'a' is retired since release 3 and has until 0, one of 1: .* no less than since; restore",
        ),
        (lambda: counts(GOOD.drop_columns(["until"])), "does not have the columns product_id, .*since, until, cost"),
        (lambda: counts(changed("codes", [[0, 1], [0, None]])), "damaged: nulls in codes"),
        (lambda: counts(changed("status", ["new", "lost"])), "damaged: a status is none of kept, new, moved, retired"),
        (lambda: counts(GOOD.drop_columns(["cost"])), "does not have the columns product_id, codes, .*cost"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
