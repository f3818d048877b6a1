"""What lives below a prefix is what a count product by product says, also after changes."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.errors import InputError
from catid2_ray.retrieval.below import below, top_words
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import codes_of
from catid2_ray.retrieval.products import Newcomer, Products
from catid2_ray.retrieval.trie import Trie
from tests.oracles import below as oracle

CODES_PER_LEVEL = (3, 4, 5)
PATHS = [["Home"], ["Home", "Garden"], ["Tools"], [], None]


def prefixes():
    return (prefix for depth in range(1, 4) for prefix in itertools.product(*map(range, CODES_PER_LEVEL[:depth])))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_a_count_says(seed):
    random = np.random.default_rng(seed)
    codes_NL = np.array(list(itertools.product(*map(range, CODES_PER_LEVEL))))
    random.shuffle(codes_NL)
    path_of = {tuple(codes): PATHS[random.integers(len(PATHS))] for codes in codes_NL.tolist()}
    trie = Trie.build(codes_NL[:30], codes_per_level=CODES_PER_LEVEL)
    ids = [f"p{row}" for row in range(30)]
    paths = pa.array([path_of[tuple(codes)] for codes in codes_of(trie, np.arange(30)).tolist()], pa.list_(pa.string()))
    live = LiveTrie(trie, product_ids=ids, index=FilterIndex({"product_id": pa.array(ids), "category_path": paths}))
    for row, codes in enumerate(codes_NL[30:42]):
        live.insert(f"n{row}", codes, {"category_path": path_of[tuple(codes.tolist())]})
    live.withdraw(["p3", "p17", "n2", "n11"])
    view = live.view
    rows = [row for row in range(view.rows) if view.is_live([row])[0]]
    products = [(codes, path_of[tuple(codes)]) for codes in codes_of(view, rows).tolist()]
    for prefix in prefixes():
        number, following, counts, by_path = oracle.below(products, prefix)
        seen = below(live, view, prefix)
        assert (seen.products, seen.next_codes) == (number, following)
        assert [count for _, count in seen.categories] == counts
        assert all(by_path[tuple(path)] == count for path, count in seen.categories)
        assert len(seen.rows) == min(number, 10) and set(seen.rows) <= set(rows)
        assert all(tuple(codes[: len(prefix)]) == prefix for codes in codes_of(view, seen.rows).tolist())


def test_words_are_those_of_the_titles_of_live_products():
    trie = Trie.build(np.array([[0, 1, n % 5] for n in range(5)] + [[2, 0, 0]]), codes_per_level=CODES_PER_LEVEL)
    titles = ["red door", "red red lamp", "blue lamp", "The blue sofa", "green sofa", "red chair"]
    ids = pa.array([f"p{row}" for row in range(6)])
    live = LiveTrie(trie, product_ids=ids, products=Products(ids, pa.array(titles)))
    live.put([Newcomer("new", "red sofa"), Newcomer("p4", "red sofa")], [[0, 1, 4], [0, 2, 0]])
    live.withdraw(["p2"])
    expected = [("red", 4), ("sofa", 3), ("blue", 1), ("door", 1), ("lamp", 1)]
    assert top_words(live.view, (0,)) == expected and top_words(live.view, (1,)) == []
    assert top_words(live.view, (0,), sample=2) == [("red", 2), ("door", 1), ("sofa", 1)]


def test_a_release_without_categories_names_none_and_a_wrong_prefix_is_refused():
    trie = Trie.build(np.array([[0, 1, 2], [2, 0, 0]]), codes_per_level=CODES_PER_LEVEL)
    live = LiveTrie(trie, product_ids=["a", "b"], index=FilterIndex({"product_id": pa.array(["a", "b"])}))
    assert below(live, live.view, (0,)) == (1, [(1, 1)], [], [0])
    assert below(live, live.view, (1,)) == (0, [], [], [])
    with pytest.raises(InputError, match="no prefix of an ID"):
        below(live, live.view, (3,))
