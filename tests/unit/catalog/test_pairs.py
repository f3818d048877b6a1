"""The check of judged pairs: faults set aside, duplicates dropped, one order."""

import pyarrow as pa
import pytest

from catid2_ray.catalog.pairs import check_pairs, pair_weights, training_pairs
from catid2_ray.errors import InputError
from catid2_ray.tables import PAIRS


def pairs(*rows):
    return pa.table([pa.array(column) for column in zip(*rows)], names=PAIRS.names)


def test_faults_are_set_aside_duplicates_dropped_and_rows_sorted():
    checked = check_pairs(
        pairs(
            ("q2", "lock", "b", 3.0, "test"),
            ("q1", " hinge ", "b", 2.5, "train"),
            ("q1", "hinge", "b", 2.5, "train"),
            ("q1", "hinge", "a", 1.0, "train"),
            ("q3", " ", "a", 1.0, "train"),
            ("q4", "x", None, 1.0, "train"),
            ("q5", "x", "a", float("inf"), "train"),
            ("q6", "x", "a", None, "train"),
            ("q7", "x", "a", 1.0, "dev"),
            (None, "x", "a", 1.0, "test"),
        )
    )
    assert checked.good.schema == PAIRS
    assert [tuple(row.values()) for row in checked.good.to_pylist()] == [
        ("q1", "hinge", "a", 1.0, "train"),
        ("q1", "hinge", "b", 2.5, "train"),
        ("q2", "lock", "b", 3.0, "test"),
    ]
    assert checked.duplicates == 1
    assert {row["query_id"]: row["reason"] for row in checked.bad.to_pylist()} == {
        "q3": "empty query",
        "q4": "missing product_id",
        "q5": "relevance is not a finite number",
        "q6": "relevance is not a finite number",
        "q7": "split is none of train, validation, test",
        None: "missing query_id",
    }


def test_a_missing_or_unreadable_column_is_named():
    table = pairs(("q", "x", "a", 1.0, "train"))
    with pytest.raises(InputError, match="pairs table: column split is missing"):
        check_pairs(table.drop_columns(["split"]))
    with pytest.raises(InputError, match="column relevance: expected numbers, found string"):
        check_pairs(table.set_column(3, "relevance", pa.array(["high"])))


def test_an_empty_table_gives_empty_tables():
    checked = check_pairs(PAIRS.empty_table())
    assert checked.good.num_rows == checked.bad.num_rows == checked.duplicates == 0


def with_users(users, recent):
    table = pairs(*(("q", "hinge", "a", 2.0, "train") for _ in users))
    return table.append_column("user", pa.array(users)).append_column("recent", pa.array(recent))


def test_who_asked_makes_two_rows_of_one_pair_and_empty_entries_are_faults():
    checked = check_pairs(
        with_users(
            [["f"], [" f "], ["m"], None, ["x", " "], ["y"]],
            [["p1", "p2"], ["p1", "p2"], ["p1", "p2"], None, [], ["p", None]],
        )
    )
    assert [(row["user"], row["recent"]) for row in checked.good.to_pylist()] == [
        ([], []), (["f"], ["p1", "p2"]), (["m"], ["p1", "p2"])
    ]  # fmt: skip
    assert checked.duplicates == 1
    assert checked.bad["reason"].to_pylist() == ["a product_id in recent is empty", "an attribute of user is empty"]
    with pytest.raises(InputError, match="column recent: expected a list of string per row, found string"):
        check_pairs(pairs(("q", "x", "a", 1.0, "train")).append_column("recent", pa.array(["p1"])))


def test_a_pair_weighs_as_the_highest_grade_that_it_reaches():
    table = pairs(*(("q", "hinge", name, grade, "train") for name, grade in zip("abcd", (1.0, 2.0, 2.5, 3.0))))
    assert pair_weights(table["relevance"], {"3.0": 1.0, "2.0": 0.5}).tolist() == [0.0, 0.5, 0.5, 1.0]
    assert pair_weights(table["relevance"], None).tolist() == [1.0] * 4
    assert training_pairs(table, 2.0)["product_id"].to_pylist() == ["b", "c", "d"]
    assert training_pairs(table, 1.0, {1: 1.0, 2: 0.0, 3: 1.0})["product_id"].to_pylist() == ["a", "d"]


def test_behaviour_stays_where_it_is_given_and_the_strongest_counts():
    rows = pairs(
        ("q1", "hinge", "a", 3.0, "train"),
        ("q1", "hinge", "a", 3.0, "train"),
        ("q1", "hinge", "b", 1.0, "train"),
        ("q2", "lock", "b", 1.0, "train"),
    )
    checked = check_pairs(rows.append_column("behaviour", pa.array(["exposed", "paid", None, "stared"])))
    assert [(row["product_id"], row["behaviour"]) for row in checked.good.to_pylist()] == [("a", "paid"), ("b", None)]
    assert checked.duplicates == 1
    assert checked.bad["reason"].to_pylist() == ["behaviour is none of exposed, clicked, paid"]
