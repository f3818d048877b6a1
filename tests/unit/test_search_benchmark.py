"""The searches that `benchmarks/search.py` compares: all of the budget is all products, and every dot product is counted."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def bench():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("search")
    finally:
        sys.path.remove(folder)
        for name in ("search", "harness"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def shelf(bench):
    return bench.synthetic(1500, 16, 20)


@pytest.fixture(scope="module")
def tree(bench, shelf):
    bench.CODES = (32,) * 4
    return bench.Tree(shelf.product_ND)


def nearest(shelf, query_D):
    return np.argsort(-(shelf.product_ND @ query_D), kind="stable")[:10]


def test_a_beam_that_keeps_all_is_exact_and_a_narrow_one_counts_what_it_scored(shelf, tree):
    for query_D in shelf.test.vector_QD[:5]:
        whole = tree.search(query_D, widths=(32, 10_000), k=10)
        assert whole.rows.tolist() == nearest(shelf, query_D).tolist()
        assert (whole.products, whole.others) == (1500, sum(tree.nodes[:2]))
        narrow = tree.search(query_D, widths=(1,), k=10, spread=0.0)
        score_n = tree.mean[0] @ query_D
        below = tree.order_N[slice(*tree.row[1][int(score_n.argmax()) :][:2])]
        assert narrow.products == len(below) and narrow.others == tree.nodes[0]
        assert set(narrow.rows.tolist()) <= set(below.tolist())


def test_spread_prefers_the_wider_of_two_nodes_that_are_equally_near(tree):
    assert tree.reach[0].max() > 0.3 and (tree.reach[2][np.diff(tree.row[3]) == 1] < 0.01).all()


def test_faiss_is_counted_by_its_own_numbers_and_the_page_has_a_row_a_budget(bench, shelf, tree, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(bench, "LISTS", {10**7: (16,)})
    answers = {name: search(shelf.test.vector_QD[0]) for name, search in bench.of_ivf(shelf)}
    all_but_none = answers["8 of 16 lists"]
    assert 0 < answers["1 of 16 lists"].products < all_but_none.products < 1500 and all_but_none.others == 16
    case = bench.rounded(bench.plain(bench.compared(shelf)))
    page = bench.rendered({"cases": [case], "faiss": "1", "machine": "a machine"})
    assert page.count("| 30 % |") == 2 and "scoring every product finds 1.000" in page
