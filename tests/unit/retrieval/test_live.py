"""A live trie after any sequence of changes against a trie rebuilt from the products that are left, by the real search.

Tiny spaces on purpose: inserted IDs meet old prefixes, new ones, withdrawn ones and each other.
"""

import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import ArtifactError, CapacityError, InputError, QueryError
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.filters import Filter, FilterIndex, LiveFilter
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import codes_of, result_rows
from catid2_ray.retrieval.products import ProductNames
from catid2_ray.retrieval.trie import Trie
from tests.oracles.beam import Table
from tests.unit.retrieval.test_beam import model_for, random_ids, random_queries


@st.composite
def histories(draw):
    most = draw(st.sampled_from((3, 3, 6)))
    codes_per_level = tuple(draw(st.lists(st.integers(1, most), min_size=1, max_size=3)))
    one_id = st.tuples(*(st.integers(0, k - 1) for k in codes_per_level))
    shared = draw(st.booleans())
    ids = draw(st.lists(one_id, min_size=1, max_size=12, unique=not shared))
    change = st.tuples(st.sampled_from(["insert", "withdraw", "restore"]), one_id, st.integers(0, 19), st.booleans())
    return codes_per_level, sorted(ids), shared, draw(st.lists(change, max_size=12))


def tied_table(codes_per_level, queries, seed):
    """A decoder with so few different scores that many IDs tie."""
    table = Table(codes_per_level, queries, seed)
    table.logits = [logits.round() for logits in table.logits]
    return table


def same_as_rebuilt(view, products, shared, seed, allowed=None):
    """`products`: (row, codes) of what should be found, in the order of rows; searched at several widths and depths."""
    codes_per_level = view.codes_per_level
    table, (query, mask) = tied_table(codes_per_level, 2, seed), random_queries([3, 2], seed)
    if products:
        rows, codes = zip(*products)
        rebuilt = Trie.build(codes, codes_per_level=codes_per_level, shared=shared)
    for width, levels in ((1, len(codes_per_level)), (3, len(codes_per_level)), (4, 1), (99, len(codes_per_level))):
        search = {"beam_width": width, "top_k": 30, "levels": levels}
        mine = constrained_beam_search(table, view, query, mask, allowed=allowed, **search)
        found = result_rows(mine, view, allowed=allowed)
        if not products:
            assert mine.count_B.tolist() == [0, 0] and (mine.docid_BKL == -1).all()
            assert (mine.row_range_BK2 == 0).all() and [len(one.row_M) for one in found] == [0, 0]
            continue
        plain = constrained_beam_search(table, rebuilt, query, mask, **search)
        assert torch.equal(mine.docid_BKL, plain.docid_BKL) and torch.equal(mine.count_B, plain.count_B)
        torch.testing.assert_close(mine.logp_BK, plain.logp_BK, atol=1e-6, rtol=0)
        for one, other in zip(found, result_rows(plain, rebuilt)):
            expected = [rows[rebuilt.order_N[row]] for row in other.row_M.tolist()]
            if levels < len(codes_per_level):
                # Rows of a cluster lie in two ranges.
                pairs = zip(one.result_M.tolist(), one.row_M.tolist()), zip(other.result_M.tolist(), expected)
                assert sorted(pairs[0]) == sorted(pairs[1])
            else:
                assert one.row_M.tolist() == expected and one.result_M.tolist() == other.result_M.tolist()


def live_rows(view):
    """All live products in the order of their IDs; equal IDs: base first, then as inserted."""
    rows = np.flatnonzero(view.is_live(np.arange(view.rows))).tolist()
    ids = dict(zip(rows, map(tuple, codes_of(view, rows).tolist())))
    return sorted(rows, key=lambda row: (ids[row], row))


def listed(view):
    rows = live_rows(view)
    return [(tuple(docid), row) for docid, row in zip(codes_of(view, rows).tolist(), rows)]


def tried(change, *arguments):
    """Whether the change was accepted."""
    try:
        change(*arguments)
    except InputError:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(history=histories(), seed=st.integers(0, 50))
def test_after_any_changes_it_is_the_trie_rebuilt(history, seed):
    codes_per_level, ids, shared, changes = history
    base = Trie.build(np.array(ids), codes_per_level=codes_per_level, shared=shared)
    live = LiveTrie(base, product_ids=[f"p{row}" for row in range(len(ids))])
    codes, alive = [tuple(docid) for docid in ids], [True] * len(ids)
    for what, docid, number, by_name in changes:
        before, rows_before = live.view, live_rows(live.view)
        if what == "insert":
            free = shared or docid not in [one for one, lives in zip(codes, alive) if lives]
            assert tried(live.insert, f"p{len(codes)}", docid) == free
            if free:
                codes.append(docid)
                alive.append(True)
        else:
            row = number % len(codes)
            clash = [one for one, lives in zip(codes, alive) if lives].count(codes[row]) and not shared
            accepted = what == "withdraw" or alive[row] or not clash
            assert tried(getattr(live, what), [f"p{row}" if by_name else row]) == accepted
            alive[row] = (what == "restore") if accepted else alive[row]
        assert live_rows(before) == rows_before
        products = [(i, one) for i, one in enumerate(codes) if alive[i]]
        assert listed(live.view) == sorted((docid, row) for row, docid in products)
        if number % 3 == 0:
            same_as_rebuilt(live.view, products, shared, seed)
    same_as_rebuilt(live.view, [(i, one) for i, one in enumerate(codes) if alive[i]], shared, seed)


@settings(max_examples=40, deadline=None)
@given(history=histories(), seed=st.integers(0, 50))
def test_a_request_restricts_base_and_inserted(history, seed):
    codes_per_level, ids, _, changes = history
    live = LiveTrie(Trie.build(np.array(ids), codes_per_level=codes_per_level, shared=True))
    codes = [*ids, *(docid for _, docid, _, _ in changes)]
    new_codes = np.array(codes[len(ids) :], np.int64).reshape(-1, len(codes_per_level))
    live.insert_many([f"n{i}" for i in range(len(changes))], new_codes)
    wanted = np.random.default_rng(seed).random(len(codes)) < 0.5
    later = LiveFilter(Filter.of(wanted[: len(ids)]), Filter.of(np.append(wanted[len(ids) :], True)))
    products = [(i, one) for i, one in enumerate(codes) if wanted[i]]
    for chosen in (later, LiveFilter.of(wanted, len(ids))):
        same_as_rebuilt(live.view, products, True, seed, chosen)
    table, (query, mask) = tied_table(codes_per_level, 2, seed), random_queries([3, 2], seed)
    mixed, whole, part = (
        constrained_beam_search(table, live.view, query, mask, beam_width=5, top_k=9, allowed=allowed)
        for allowed in ([None, later], None, wanted)
    )
    for row, alone in enumerate((whole, part)):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(mixed[:4], alone[:4]))


def test_a_t5_searches_a_view_as_it_searches_the_trie_rebuilt():
    codes_per_level = (5, 6, 7)
    ids, model = random_ids(codes_per_level, 90, 0), model_for(codes_per_level)
    old = np.arange(len(ids)) % 3 > 0
    base = Trie.build(ids[old], codes_per_level=codes_per_level)
    live, (query, mask) = LiveTrie(base), random_queries([5, 3], 0)
    live.insert_many([f"n{row}" for row in range((~old).sum())], ids[~old])
    live.withdraw([3, 8, base.rows + 4])
    rebuilt = Trie.build(codes_of(live.view, live_rows(live.view)), codes_per_level=codes_per_level)
    for normalize in ("level", "vocabulary"):
        mine, plain = (
            constrained_beam_search(model, trie, query, mask, beam_width=[3, 8, 20], top_k=20, normalize=normalize)
            for trie in (live.view, rebuilt)
        )
        assert torch.equal(mine.docid_BKL, plain.docid_BKL)
        torch.testing.assert_close(mine.logp_BK, plain.logp_BK, atol=1e-5, rtol=0)


def live_of(ids, names=None, **options):
    base = Trie.from_sorted(np.array([3 * a + b for a, b in ids]), codes_per_level=(3, 3))
    return LiveTrie(base, product_ids=names, **options)


def test_a_view_does_not_change_after_it_was_taken():
    live = live_of([(0, 0), (1, 1)])
    before = live.view
    live.insert("new", [2, 2])
    live.withdraw([0])
    assert live_rows(before) == [0, 1] and live_rows(live.view) == [1, 2]
    assert codes_of(live.view, live_rows(live.view)).tolist() == [[1, 1], [2, 2]]
    assert live.view.is_live([0, 1, 2]).tolist() == [False, True, True] and live.view.rows == 3


def test_ranges_of_a_result_name_base_and_inserted_rows():
    live = LiveTrie(Trie.build([[0, 0], [0, 1], [1, 1]], codes_per_level=(3, 3), shared=True))
    live.insert_many(["c", "a", "b"], [[2, 0], [0, 1], [0, 0]])
    query, mask = random_queries([2], 0)
    table = Table((3, 3), 1, 0)
    table.logits = [-torch.arange(3.0).expand(logits.shape) for logits in table.logits]
    result = constrained_beam_search(table, live.view, query, mask, beam_width=9, top_k=9)
    found = zip(*(part[0, :4].tolist() for part in result[:2]), result.inserted_range_BK2[0].tolist())
    assert [*found] == [
        ([0, 0], [0, 1], [3, 4]),
        ([0, 1], [1, 2], [4, 5]),
        ([1, 1], [2, 3], [0, 0]),
        ([2, 0], [0, 0], [5, 6]),
    ]
    assert live.view.row_of([0, 3, 4, 5]).tolist() == [0, 5, 4, 3]
    assert result_rows(result, live.view, most=3)[0].row_M.tolist() == [0, 5, 1]
    assert result_rows(result, live.view)[0].result_M.tolist() == [0, 0, 1, 1, 2, 3]


def test_a_product_may_come_back_with_another_id_and_its_name_follows():
    live = live_of([(0, 0), (1, 1)], pa.chunked_array([["a"], ["b"]]))
    live.withdraw("a")
    assert live.insert("a", [2, 0]) == 2
    with pytest.raises(InputError, match="product 'a' is live already"):
        live.restore([0])
    live.withdraw(["a"])
    live.restore([0])
    live.withdraw("a")
    assert live_rows(live.view) == [1]
    live.restore("a")
    assert live_rows(live.view) == [0, 1]


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
        (lambda t: t.insert("c", [0, 1], {"price": "dear"}), 'column "price" of inserted products is not double'),
        (lambda t: t.insert("c", [0, 1], {"colour": 1}), r"unknown columns \['colour'\] of inserted products"),
        (lambda t: t.insert_many(["c"], [[0, 1]], {"price": []}), 'column "price" has 0 values for 1 inserted'),
        (lambda t: t.withdraw(["b", "zz"]), "no product 'zz': neither in .* check the product id"),
        (lambda t: t.withdraw([3]), r"by product id or by row 0…2, found \[3\]"),
        (lambda t: t.withdraw([1.5]), "by product id or by row"),
        (lambda t: t.withdraw(["b", 1]), "by product id or by row"),
    ],
)
def test_changes_that_are_refused_change_nothing(change, message):
    index = FilterIndex({"product_id": pa.array(["a", "b"]), "price": pa.array([1.0, 2.0])})
    live = live_of([(0, 0), (1, 1)], ["a", "b"], index=index)
    live.insert("new", [2, 2])
    before = live.view
    with pytest.raises(InputError, match=message):
        change(live)
    assert live.view is before and live.inserted == ["new"] and live.filters.inserted == 1


def test_filters_know_inserted_products_by_their_columns():
    columns = {"product_id": ["a", "b"], "price": [1.0, 5.0], "markets": [["de"], ["de", "at"]]}
    types = {"price": pa.float64(), "markets": pa.list_(pa.string())}
    index = FilterIndex({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    live = live_of([(0, 0), (1, 1)], columns["product_id"], index=index)
    live.insert("c", [2, 2], {"price": 2, "markets": ["at"]})
    early, cheap = live.compile({"column": "markets", "has": ["at"]}), live.compile({"column": "price", "to": 2})
    assert live.compile({"column": "price", "to": 2}) is cheap
    live.insert_many(["d", "e"], [[0, 1], [0, 2]], pa.table({"price": pa.array([7, 1], pa.int32())}))
    live.insert("f", [1, 0])
    table, (query, mask) = Table((3, 3), 1, 0), random_queries([2], 0)

    def found(allowed):
        result = constrained_beam_search(table, live.view, query, mask, beam_width=9, top_k=9, allowed=allowed)
        return sorted(result_rows(result, live.view, allowed=allowed)[0].row_M.tolist())

    for expression, rows in (
        ({"column": "markets", "has": ["at"]}, [1, 2]),
        ({"column": "price", "to": 2}, [0, 2, 4]),
        ({"not": {"column": "price", "to": 2}}, [1, 3, 5]),
        ({"products": ["a", "d", "f"]}, [0, 3, 5]),
        ({"all": []}, [0, 1, 2, 3, 4, 5]),
    ):
        assert found(live.compile(expression)) == rows
    with pytest.raises(
        InputError, match="over 2 rows and 1 inserted products, the live trie has 2 and 4; take the view"
    ):
        found(early)
    with pytest.raises(InputError, match="over 2 rows and 0 inserted"):
        found(Filter.of([True, False]))
    with pytest.raises(InputError, match="or 6 booleans"):
        found([True, False])
    with pytest.raises(QueryError, match="unknown column"):
        live.compile({"column": "colour", "in": []})
    with pytest.raises(InputError, match="this live trie has no filter columns"):
        live_of([(0, 0)]).compile({"all": []})
    with pytest.raises(InputError, match="need index=FilterIndex"):
        live_of([(0, 0)]).insert("c", [1, 1], {"price": 1})


def test_many_inserts_are_few_blocks_of_filter_rows():
    index = FilterIndex({"stock": pa.array([1, 2])})
    live = LiveTrie(Trie.build([[0, 0], [1, 1]], codes_per_level=(3, 3), shared=True), index=index)
    for number in range(60):
        live.insert(f"n{number}", [0, 1], {"stock": number})
    assert len(live.filters._blocks) <= 6 and live.filters.inserted == 60
    assert live.compile({"column": "stock", "from": 50}).inserted.allowed_N.tolist() == [n >= 50 for n in range(60)]


def test_the_delta_is_bounded():
    live = live_of([(0, 0)], most=1)
    live.insert("a", [0, 1])
    with pytest.raises(CapacityError, match="publish a release that holds them"):
        live.insert("b", [0, 2])
    with pytest.raises(InputError, match="2 product ids for 1 trie rows"):
        live_of([(0, 0)], ["a", "b"])
    with pytest.raises(InputError, match="1 rows of filter columns for 2 trie rows"):
        live_of([(0, 0), (1, 1)], index=FilterIndex({"stock": pa.array([1])}))


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(
        st.none() | st.text(max_size=3), max_size=12, unique_by=lambda name: object() if name is None else name
    )
)
def test_names_are_found_as_in_a_dictionary(names):
    made = ProductNames(pa.chunked_array([names[:4], names[4:]], pa.string()))
    asked = [name for name in names if name is not None] + ["nothing", "\U0001f600z", "\uffff"]
    expected = [names.index(name) if name in names else -1 for name in asked]
    assert made.rows(asked).tolist() == expected
    assert made.rows(asked * 400).tolist() == expected * 400


def test_names_are_saved_with_a_release(tmp_path):
    ids = pa.array([f"p{number * 7 % 50}" for number in range(50)])
    ProductNames(ids).save(tmp_path)
    opened = ProductNames.open(tmp_path, ids)
    assert opened.rows(["p49", "p0", "none"]).tolist() == [7, 0, -1]
    live = LiveTrie(Trie.build(np.arange(50)[:, None], codes_per_level=(60,)), product_ids=opened)
    live.withdraw("p49")
    assert not live.view.is_live([7])[0]
    with pytest.raises(ArtifactError, match="expected 49 int32 numbers, found int32 of shape"):
        ProductNames.open(tmp_path, ids[:49])


def test_a_change_by_name_does_not_read_the_catalogue():
    """A binary search reads 18 or 19 of 200,000 names."""
    ids = pa.array(np.arange(200_000)).cast(pa.string())
    live = LiveTrie(Trie.from_sorted(np.arange(200_000), codes_per_level=(512, 512)), product_ids=ids)
    read = []
    live.names.name = lambda row, name=live.names.name: read.append(row) or name(row)
    for number in range(100):
        live.withdraw(str(number * 1999))
    assert len(read) <= 100 * 20 and live.view.live_base.total == 199_900


def test_inserting_one_product_into_many_takes_little_time():
    rng = np.random.default_rng(0)
    packed = np.unique(rng.integers(0, 256**4, 60_000))
    rng.shuffle(packed)
    base = Trie.from_sorted(np.sort(packed[:5000]), codes_per_level=(256,) * 4)
    live = LiveTrie(base, most=60_000)
    codes = live.space.unpack(packed[5000:])
    live.insert_many([f"n{row}" for row in range(len(codes) - 20)], codes[:-20])
    taken = []
    for number in range(20):
        start = time.perf_counter()
        live.insert(f"m{number}", codes[number - 20])
        taken.append(time.perf_counter() - start)
    # About 1 ms; building the delta anew takes about 60.
    assert min(taken) < 0.01
    arrays = live.view.inserted.arrays
    plain = Trie.build(codes, codes_per_level=(256,) * 4)
    for name in ("child_start", "row_start", "token"):
        assert all(np.array_equal(mine, other) for mine, other in zip(getattr(arrays, name), getattr(plain, name)))
