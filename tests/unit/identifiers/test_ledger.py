"""Histories of releases against a dictionary: statuses, tombstones, quarantine, returns; damage and its messages."""

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
COSTS = st.sampled_from([0.0, 0.5, -0.25])


@st.composite
def histories(draw):
    """Releases {product_id: (codes, cost)} without shared IDs, at growing numbers, and a quarantine."""
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
    return releases, numbers.tolist(), draw(st.integers(0, 4))


def arrays(release, random=None):
    ids = sorted(release) if random is None else random.sample(sorted(release), len(release))
    codes_NL = np.array([release[p][0] for p in ids], np.int64).reshape(len(ids), 2)
    return ids, codes_NL, np.array([release[p][1] for p in ids])


def at(number, quarantine):
    return {"number": number, "quarantine": quarantine}


def as_dictionary(table):
    return {
        row["product_id"]: (tuple(row["codes"]), row["status"], row["since"], row["cost"]) for row in table.to_pylist()
    }


@settings(max_examples=150, deadline=None)
@given(case=histories(), random=st.randoms(use_true_random=False))
def test_histories_equal_the_oracle(case, random):
    releases, numbers, quarantine = case
    table, expected = None, None
    for release, number in zip(releases, numbers, strict=True):
        if table is None:
            table, expected = first(*arrays(release, random), number=number), oracle.first(release, number)
        else:
            asked = [*release, "zz"]
            found = held(table, asked, number=number, quarantine=quarantine)
            codes = oracle.held(expected, asked, number, quarantine)
            assert found.held_N.tolist() == [row is not None for row in codes]
            assert [tuple(row) for row in found.codes_NL.tolist()] == [row or (-1, -1) for row in codes]
            kept_back_ML = withheld(table, random.sample(sorted(release), len(release)), **at(number, quarantine))
            assert kept_back_ML.dtype == np.int32
            kept_back = oracle.withheld(expected, release, number, quarantine)
            assert [tuple(row) for row in kept_back_ML.tolist()] == kept_back
            # They are the tombstones in quarantine of the ledger that the release leaves behind.
            after = as_dictionary(advance(table, *arrays(release), number=number)).values()
            young = {codes for codes, status, since, _ in after if status == "retired" and number - since < quarantine}
            assert kept_back == sorted(young)
            table = advance(table, *arrays(release, random), number=number)
            expected = oracle.advance(expected, release, number)
        assert table.schema.equals(schema(2))
        table.validate(full=True)
        assert table["product_id"].to_pylist() == sorted(expected)
        assert as_dictionary(table) == expected
        taken_ML = occupied(table, number=number + 1, quarantine=quarantine)
        assert taken_ML.dtype == np.int32
        assert [tuple(row) for row in taken_ML.tolist()] == oracle.occupied(expected, number + 1, quarantine)
        statuses = Counter(status for _, status, _, _ in expected.values())
        assert counts(table) == {s: statuses[s] for s in STATUSES} | {"live": len(release)}


def test_a_product_leaves_its_id_rests_and_it_returns():
    one = first(["a", "b"], [[0, 0], [0, 1]], [0.0, 0.5], number=1)
    two = advance(one, ["a"], [[0, 0]], [0.0], number=2)
    assert as_dictionary(two)["b"] == ((0, 1), "retired", 2, 0.5)
    assert occupied(two, number=3, quarantine=2).tolist() == [[0, 0], [0, 1]]
    assert occupied(two, number=4, quarantine=2).tolist() == [[0, 0]]
    assert occupied(two, number=3, quarantine=0).tolist() == [[0, 0]]
    back = held(two, ["b", "c"], number=3, quarantine=2)
    assert (back.held_N.tolist(), back.codes_NL.tolist(), back.cost_N.tolist()) == (
        [True, False],
        [[0, 1], [-1, -1]],
        [0.5, 0.0],
    )
    assert not held(two, ["b"], number=4, quarantine=2).held_N.any()
    three = advance(two, ["a", "b"], [[0, 0], [0, 1]], [0.0, 0.5], number=3)
    assert as_dictionary(three) == {"a": ((0, 0), "kept", 1, 0.0), "b": ((0, 1), "kept", 3, 0.5)}
    other = advance(two, ["a", "b"], [[0, 0], [1, 1]], [0.0, 0.0], number=3)
    assert as_dictionary(other)["b"] == ((1, 1), "new", 3, 0.0)


@settings(max_examples=50, deadline=None)
@given(case=histories(), parts=st.integers(1, 4))
def test_what_parts_withhold_is_together_what_the_catalogue_withholds(case, parts):
    releases, numbers, quarantine = case
    *before, last = releases
    table = first(*arrays({}), number=0)
    for release, number in zip(before, numbers, strict=False):
        table = advance(table, *arrays(release), number=number)
    part_M = np.array([sum(map(ord, p)) % parts for p in table["product_id"].to_pylist()], int)
    found = set()
    for part in range(parts):
        ids = [p for p in last if sum(map(ord, p)) % parts == part]
        part_ML = withheld(table.filter(pa.array(part_M == part)), ids, **at(numbers[-1], quarantine))
        found |= set(map(tuple, part_ML.tolist()))
    whole_ML = withheld(table, list(last), **at(numbers[-1], quarantine))
    assert sorted(found) == [tuple(row) for row in whole_ML.tolist()]


def test_a_full_re_id_withholds_the_ids_of_those_who_left():
    one = first(["a", "b", "c"], [[0, 0], [0, 1], [1, 0]], [0, 0, 0], number=1)
    two = advance(one, ["a", "b"], [[0, 0], [0, 1]], [0, 0], number=2)
    # b leaves in release 3, c left in release 2; a stays and withholds nothing.
    assert withheld(two, ["d", "a"], number=3, quarantine=0).shape == (0, 2)
    assert withheld(two, ["d", "a"], number=3, quarantine=1).tolist() == [[0, 1]]
    assert withheld(two, ["d", "a"], number=3, quarantine=2).tolist() == [[0, 1], [1, 0]]
    assert withheld(two, ["a", "c"], number=3, quarantine=2).tolist() == [[0, 1]]
    assert withheld(two, [], number=3, quarantine=2).tolist() == [[0, 0], [0, 1], [1, 0]]
    # An append gives nobody the ID of b in release 3, with any quarantine: b has it in the release before.
    assert [occupied(two, number=3, quarantine=q).tolist() for q in (0, 1)] == [[[0, 0], [0, 1]]] * 2


def test_an_id_with_two_tombstones_is_withheld_by_the_young_one_when_the_other_product_returns():
    table = first(["a"], [[7]], [0], number=1)
    table = advance(table, ["x"], [[0]], [0], number=2)
    table = advance(table, ["x", "b"], [[0], [7]], [0, 0], number=9)
    assert withheld(table, ["x", "a"], number=10, quarantine=3).tolist() == [[7]]
    assert withheld(table, ["x", "b"], number=10, quarantine=3).tolist() == []


def test_a_reused_id_does_not_collide_with_the_tombstone_that_had_it():
    table = first(["a", "b"], [[0], [1]], [0, 0], number=1)
    table = advance(table, ["a"], [[0]], [0], number=2)
    table = advance(table, ["a", "c"], [[0], [1]], [0, 0], number=4)
    assert occupied(table, number=5, quarantine=9).tolist() == [[0], [1]]
    assert counts(table) == {"kept": 1, "new": 1, "moved": 0, "retired": 1, "live": 2}


def test_cluster_releases_may_share_ids():
    table = first(["a", "b"], [[0], [0]], [0, 0], number=1, shared=True)
    table = advance(table, ["a", "b", "c"], [[0], [0], [0]], [0, 0, 0], number=2, shared=True)
    assert counts(table)["kept"] == 2
    assert occupied(table, number=3, quarantine=1, shared=True).tolist() == [[0]]
    for call in (occupied, lambda *args, **more: withheld(*args, ["a"], **more)):
        with pytest.raises(InputError, match=r"'a' and 'b' both hold the ID \[0\] \(2 such repeats"):
            call(table, number=3, quarantine=1)


def test_a_ledger_survives_parquet_slices_chunks_and_plain_strings(tmp_path):
    table = first([f"p{n}" for n in range(9)], np.arange(27).reshape(9, 3), np.zeros(9), number=1)
    table = advance(table, [f"p{n}" for n in range(5)], np.arange(15).reshape(5, 3), np.zeros(5), number=2)
    pq.write_table(table, tmp_path / "ledger.parquet", row_group_size=4)
    assert pq.read_table(tmp_path / "ledger.parquet").equals(table)
    pieces = pa.concat_tables([table.slice(0, 2), table.slice(2, 3), table.slice(5)])
    plain = pieces.set_column(2, "status", pieces["status"].cast(pa.string()))
    assert counts(plain) == counts(table)
    assert np.array_equal(occupied(plain, number=3, quarantine=9), np.arange(27).reshape(9, 3))
    column = pa.chunked_array([["p3"], ["p0", "q"]], pa.large_string())
    assert held(pieces, column, number=3, quarantine=0).codes_NL.tolist() == [[9, 10, 11], [0, 1, 2], [-1, -1, -1]]


def test_empty_releases():
    table = first([], np.empty((0, 2), np.int64), [], number=0)
    assert occupied(table, number=1, quarantine=3).shape == (0, 2)
    table = advance(table, ["a"], [[1, 2]], [0.0], number=1)
    table = advance(table, [], np.empty((0, 2), np.int64), [], number=2)
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
        (lambda: advance(GOOD, ["a"], [[1]], [0], number=4), "IDs of 1 levels, the previous ledger of 2"),
        (lambda: advance(GOOD, ["a"], [[0, 1]], [0], number=3), "number 3 does not follow: .* knows release 3"),
        (lambda: occupied(GOOD, number=2, quarantine=1), "release number 2 does not follow"),
        (lambda: occupied(GOOD, number=4, quarantine=-1), "quarantine must be a whole number from 0"),
        (lambda: withheld(GOOD, [], number=2, quarantine=1), "release number 2 does not follow"),
        (lambda: withheld(GOOD, [], number=4, quarantine=-1), "quarantine must be a whole number from 0"),
        (lambda: withheld(GOOD, ["a", "a"], number=4, quarantine=1), "'a' occurs more than once in the release"),
        (lambda: withheld(GOOD, ["a", None], number=4, quarantine=1), "1 of 2 product_ids are null"),
        (lambda: withheld(changed("since", [3, None]), [], number=4, quarantine=1), "damaged: nulls in since"),
        (lambda: held(GOOD, ["a", "a"], number=4, quarantine=1), "'a' occurs more than once in the release"),
        (lambda: occupied(changed("codes", [[0, 1]] * 2), number=4, quarantine=1), r"both hold the ID \[0, 1\]"),
        (lambda: counts(changed("product_id", ["b", "a"])), "damaged: its product_ids are not in ascending order"),
        (lambda: counts(changed("product_id", ["a", "a"])), "damaged: its product_ids are not in ascending order"),
        (lambda: counts(changed("since", [3, None])), "damaged: nulls in since"),
        (lambda: counts(changed("codes", [[0, 1], [0, None]])), "damaged: nulls in codes"),
        (lambda: counts(changed("status", ["new", "lost"])), "damaged: a status is none of kept, new, moved, retired"),
        (lambda: counts(GOOD.drop_columns(["cost"])), "does not have the columns product_id, codes, .*cost"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call()
