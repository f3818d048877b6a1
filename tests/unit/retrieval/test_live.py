"""A live trie after any sequence of changes against a trie rebuilt from the products that are left.

Tiny spaces on purpose: inserted IDs meet old prefixes, new ones, withdrawn ones and each other.
"""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import CapacityError, InputError
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.trie import Trie
from tests.oracles.trie import DictTrie


@st.composite
def histories(draw):
    most = draw(st.sampled_from((4, 4, 60)))
    codes_per_level = tuple(draw(st.lists(st.integers(1, most), min_size=1, max_size=3)))
    one_id = st.tuples(*(st.integers(0, k - 1) for k in codes_per_level))
    shared = draw(st.booleans())
    ids = draw(st.lists(one_id, min_size=1, max_size=12, unique=not shared))
    change = st.tuples(st.sampled_from(["insert", "withdraw", "restore"]), one_id, st.integers(0, 19), st.booleans())
    return codes_per_level, sorted(ids), shared, draw(st.lists(change, max_size=12))


def walked(children, levels):
    """(prefix of each leaf, leaf) by asking for the children of everything, from the root."""
    prefixes, nodes = [()], np.zeros(1, np.int64)
    for level in range(levels):
        found = children(level, nodes)
        prefixes = [(*prefixes[i], code) for i, code in zip(found.parent_index.tolist(), found.token.tolist())]
        nodes = found.child
    return prefixes, nodes


def searched(children, rank, logp, levels, width):
    """A plain beam search: IDs and scores, best first; equal scores by ID."""
    beams = [((), 0, 0.0)]
    for level in range(levels):
        found = children(level, [node for _, node, _ in beams])
        place = rank(level + 1, found.child).tolist()
        grown = []
        for i, code, child, order in zip(
            found.parent_index.tolist(), found.token.tolist(), found.child.tolist(), place
        ):
            prefix, _, score = beams[i]
            grown.append((-(score + logp[level][code]), order, (*prefix, code), child))
        beams = [(prefix, child, -score) for score, _, prefix, child in sorted(grown)[:width]]
    return [(prefix, score) for prefix, _, score in beams]


def same_as_rebuilt(live, products, codes_per_level, seed, view=None):
    """`products`: (row, codes) of what should be live, in the order of rows."""
    view, levels = view or live.view, len(codes_per_level)
    codes, rows = view.ids()
    expected = sorted((tuple(docid), row) for row, docid in products)
    assert [(tuple(docid), row) for docid, row in zip(codes.tolist(), rows.tolist())] == expected
    if not products:
        assert len(view.children(0, [0]).child) == 0
        return
    oracle = DictTrie([docid for _, docid in products])
    prefixes, leaves = walked(view.children, levels)
    assert prefixes == oracle.prefixes(levels)
    assert (np.diff(view.rank(levels, leaves)) > 0).all()
    assert view.count(levels, leaves).sum() == view.count(0, [0])[0] == len(products)
    for prefix, ranges in zip(prefixes, view.row_ranges(levels, leaves).tolist()):
        found = [*range(*ranges[0])]
        if view.delta is not None:
            found += [live.base.rows + view.delta.order_N[row] for row in range(*ranges[1])]
        assert {row for row, docid in products if tuple(docid) == prefix} <= set(found)
    rebuilt = Trie.build([docid for _, docid in products], codes_per_level=codes_per_level, shared=live.base.shared)
    logp = [np.random.default_rng(seed).integers(-3, 0, k) for k in codes_per_level]
    for width in (1, 2, 5):
        plain = searched(rebuilt.children, lambda level, nodes: nodes, logp, levels, width)
        assert searched(view.children, view.rank, logp, levels, width) == plain


def tried(change, *arguments):
    """Whether the change was accepted."""
    try:
        change(*arguments)
    except InputError:
        return False
    return True


@settings(max_examples=120, deadline=None)
@given(history=histories(), seed=st.integers(0, 50))
def test_after_any_changes_it_is_the_trie_rebuilt(history, seed):
    codes_per_level, ids, shared, changes = history
    base = Trie.build(np.array(ids), codes_per_level=codes_per_level, shared=shared)
    live = LiveTrie(base, product_ids=[f"p{row}" for row in range(len(ids))])
    codes, alive = [list(docid) for docid in ids], [True] * len(ids)
    for what, docid, number, by_name in changes:
        before, rows_before = live.view, live.view.ids().row_N.tolist()
        if what == "insert":
            free = shared or list(docid) not in [one for one, lives in zip(codes, alive) if lives]
            assert tried(live.insert, f"p{len(codes)}", docid) == free
            if free:
                codes.append(list(docid))
                alive.append(True)
        else:
            row = number % len(codes)
            clash = [one for one, lives in zip(codes, alive) if lives].count(codes[row]) and not shared
            accepted = what == "withdraw" or alive[row] or not clash
            assert tried(getattr(live, what), [f"p{row}" if by_name else row]) == accepted
            alive[row] = (what == "restore") if accepted else alive[row]
        assert before.ids().row_N.tolist() == rows_before
        same_as_rebuilt(live, [(i, one) for i, one in enumerate(codes) if alive[i]], codes_per_level, seed)


@settings(max_examples=80, deadline=None)
@given(history=histories(), seed=st.integers(0, 50))
def test_a_request_restricts_base_and_delta(history, seed):
    codes_per_level, ids, _, changes = history
    live = LiveTrie(Trie.build(np.array(ids), codes_per_level=codes_per_level, shared=True))
    codes = [*ids, *(docid for _, docid, _, _ in changes)]
    new_codes = np.array(codes[len(ids) :], np.int64).reshape(-1, len(codes_per_level))
    live.insert_many([f"n{i}" for i in range(len(changes))], new_codes)
    wanted = np.random.default_rng(seed).random(len(codes)) < 0.5
    new = wanted[len(ids) :]
    delta = Filter.of(new[live.view.delta.order_N] if changes else new)
    view = live.view.restricted(Filter.of(wanted[: len(ids)]), delta)
    same_as_rebuilt(live, [(i, one) for i, one in enumerate(codes) if wanted[i]], codes_per_level, seed, view)


def live_of(ids, names=None, **options):
    base = Trie.from_sorted(np.array([3 * a + b for a, b in ids]), codes_per_level=(3, 3))
    return LiveTrie(base, product_ids=names, **options)


def test_a_view_does_not_change_after_it_was_taken():
    live = live_of([(0, 0), (1, 1)])
    before = live.view
    live.insert("new", [2, 2])
    live.withdraw([0])
    assert before.ids().row_N.tolist() == [0, 1] and live.view.ids().row_N.tolist() == [1, 2]
    assert live.view.ids().codes_NL.tolist() == [[1, 1], [2, 2]]


def test_a_product_may_come_back_with_another_id_and_its_name_follows():
    live = live_of([(0, 0), (1, 1)], pa.chunked_array([["a"], ["b"]]))
    live.withdraw("a")
    assert live.insert("a", [2, 0]) == 2
    with pytest.raises(InputError, match="product 'a' is live already"):
        live.restore([0])
    live.withdraw(["a"])
    live.restore([0])
    live.withdraw("a")
    assert live.view.ids().row_N.tolist() == [1]
    live.restore("a")
    assert live.view.ids().row_N.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.insert("c", [1, 1]), "'c' would share the ID <a_1><b_1> with a live product"),
        (lambda t: t.insert("new", [0, 1]), "product 'new' is live already"),
        (lambda t: t.insert("b", [0, 1]), "product 'b' is live already"),
        (lambda t: t.insert_many(["c", "c"], [[0, 1], [0, 2]]), "given twice"),
        (lambda t: t.insert_many(["c", "d"], [[0, 1], [0, 1]]), "'c' would share the ID <a_0><b_1>"),
        (lambda t: t.insert("c", [2, 2]), "'c' would share the ID <a_2><b_2>"),
        (lambda t: t.insert("c", [0, 3]), "row 0: code 3 at level 1 is outside"),
        (lambda t: t.insert_many(["c"], [[0, 1], [0, 2]]), "1 products to insert, but 2 IDs"),
        (lambda t: t.withdraw(["b", "zz"]), "no product 'zz' in this trie"),
        (lambda t: t.withdraw([3]), r"by product id or by row 0…2, found \[3\]"),
        (lambda t: t.withdraw([1.5]), "by product id or by row"),
        (lambda t: t.withdraw(["b", 1]), "by product id or by row"),
    ],
)
def test_changes_that_are_refused_change_nothing(change, message):
    live = live_of([(0, 0), (1, 1)], ["a", "b"])
    live.insert("new", [2, 2])
    before = live.view
    with pytest.raises(InputError, match=message):
        change(live)
    assert live.view is before and live.inserted == ["new"]


def test_the_delta_is_bounded():
    live = live_of([(0, 0)], most=1)
    live.insert("a", [0, 1])
    with pytest.raises(CapacityError, match="publish a release that holds them"):
        live.insert("b", [0, 2])
    with pytest.raises(InputError, match="2 product ids for 1 trie rows"):
        live_of([(0, 0)], ["a", "b"])
