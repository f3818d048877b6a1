"""Answers of other searches, read from TREC's run files: what is written is read, and what cannot be read says where."""

import numpy as np
import pytest

from catid2_ray.errors import InputError
from catid2_ray.evaluation.reproduce.conditions import plan
from catid2_ray.evaluation.reproduce.trec import read_run, run_lines

PRODUCTS = ["a", "b 1", "c%", "d", "e\u3000f"]
ROW_OF = {name: row for row, name in enumerate(PRODUCTS)}


def read(text: str, queries=("q1", "q 2"), returned: int = 3):
    return read_run(text, query_ids=queries, row_of=ROW_OF, returned=returned, name="shop.trec")


def test_what_is_written_is_read():
    ranked = [["d", "b 1", "a", "c%"], ["c%", "e\u3000f"]]
    run = read(run_lines(["q1", "q 2"], ranked, "tag"))
    assert run.rows_QC.tolist() == [[3, 1, 0], [2, 4, -1]] and run[1:] == (0, 0, 0)


def test_the_score_ranks_and_ties_stand_in_the_order_of_rows():
    run = read("q1 Q0 d 1 0.5 x\nq1 Q0 a 2 0.5 x\n\nq1\tQ0\tc%25\t3\t7e1\tx\n", returned=5)
    assert run.rows_QC.tolist() == [[2, 0, 3, -1, -1], [-1] * 5] and run.unanswered == 1


def test_an_id_is_taken_as_it_stands_and_else_resolved():
    rows = {"a%2Fb": 0, "c d": 1, "e\u00a0f": 2}
    text = "q%201 Q0 a%2Fb 1 3 x\nq%201 Q0 c%20d 2 2 x\r\nq%201 Q0 e\u00a0f 3 1 x\n"
    for query in ("q%201", "q 1"):
        run = read_run(text, query_ids=[query], row_of=rows, returned=3, name="shop.trec")
        assert run.rows_QC.tolist() == [[0, 1, 2]] and run.unknown_products == 0


def test_what_is_not_of_this_catalogue_is_counted_and_left_out():
    run = read("q1 Q0 a 1 3 x\nq1 Q0 sold 2 2 x\nother Q0 a 1 1 x\nother Q0 b 2 1 x\n")
    assert np.array_equal(run.rows_QC[0], [0, -1, -1])
    assert (run.unanswered, run.not_asked, run.unknown_products) == (1, 1, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("q1 Q0 a 1\n", r"shop.trec, line 1: expected `query Q0 product rank score tag`, found 'q1 Q0 a 1'"),
        ("q1 Q0 a 1 1 x\nq1 Q0 b%201 2 high x\n", "line 2: expected"),
        ("q1 Q0 oak door 1 7.5 x\n", "line 1: expected"),
        ("q1 Q0 a 1 1 x\nq1 Q0 d 2 1 x\n", "shop.trec: all products of a query have one score"),
        ("q1 Q0 a 1 nan x\n", "line 1: the score nan is no finite number"),
        ("q1 Q0 a 1 2 x\nq1 Q0 a 2 1 x\n", "line 2: query 'q1' has product 'a' twice"),
        (
            "7 Q0 a 1 2 x\n",
            "answers none of the 2 queries that are asked, such as 'q1'; its queries are '7': use the query_id",
        ),
        ("", "its queries are none"),
        (
            "q1 Q0 SKU-a 1 2 x\nq1 Q0 SKU-b 2 1 x\n",
            "no product of the catalogue; its products are 'SKU-a', 'SKU-b': use the product_id",
        ),
    ],
)
def test_what_is_no_run_says_where(text, message):
    with pytest.raises(InputError, match=message):
        read(text)


def test_runs_stand_first_in_table_2_and_cannot_take_a_method_s_name():
    cells = plan(["2", "5"], ["bm25"], "shop", runs=["elastic"])
    assert [cell.name for cell in cells][:2] == ["T2/elastic/shop", "T2/bm25/shop"] and len(cells) == 9
    with pytest.raises(InputError, match="reproduce.runs: bm25 is a method's name; call the run otherwise"):
        plan(["2"], ["bm25"], "shop", runs=["bm25"])
