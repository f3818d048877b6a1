"""One atomic change: newcomers that take the place of what is live, columns and values that change in place, refusals."""

from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import CapacityError, InputError
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import codes_of
from catid2_ray.retrieval.products import Newcomer, Products
from catid2_ray.retrieval.retriever import Retriever
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore
from tests.oracles.filters import allowed_rows
from tests.unit.retrieval.conftest import TITLES
from tests.unit.retrieval.test_filters import EXPRESSION, ROW, numbered, table_of
from tests.unit.retrieval.test_live import live_rows
from tests.unit.retrieval.test_served import copy, encode, names_of, served  # noqa: F401

NO_PRODUCT = ROW.map(lambda row: {name: value for name, value in row.items() if name != "product_id"})
PART = st.tuples(NO_PRODUCT, st.sets(st.sampled_from(["brand", "price", "stock", "category_path", "cost", "added"])))


def live_of(ids, names, **options):
    return LiveTrie(Trie.build(np.array(ids), codes_per_level=(9, 9)), product_ids=names, **options)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=70), expression=EXPRESSION,
    steps=st.lists(st.tuples(st.lists(ROW, max_size=3), st.dictionaries(st.integers(0, 99), PART, max_size=4)), max_size=6),
)  # fmt: skip
def test_columns_that_change_in_place_are_those_of_an_index_made_anew(rows, expression, steps):
    rows = numbered(rows)
    live = LiveTrie(
        Trie.build(np.zeros((len(rows), 1), int), codes_per_level=(1,), shared=True),
        product_ids=[row["product_id"] for row in rows], index=FilterIndex(table_of(rows)),
    )  # fmt: skip
    seen = []
    for newcomers, changed in steps:
        seen.append((live.view, [dict(row) for row in rows]))
        changes = {}
        for number, (row, names) in changed.items():
            number %= len(rows)
            name = rows[number]["product_id"]
            changes[name] = changes.get(name, {}) | {column: row[column] for column in names}
            rows[number] = rows[number] | changes[name]
        made = numbered([*rows, *newcomers])[len(rows) :]
        columns = table_of(made).drop(["product_id"])
        live.put(
            [Newcomer(row["product_id"], "") for row in made], np.zeros((len(made), 1), int), columns, changed=changes
        )
        rows += made
        live.compile(expression)
        expected = table_of(rows).drop(["product_id"]).to_pylist()
        assert [live.filters.values_of(row) for row in range(len(rows))] == expected
    for view, expected in [*seen, (live.view, rows)]:
        made = view.compile(expression)
        found = [*made.base.allowed_N.tolist(), *made.inserted.allowed_N.tolist()]
        assert found == allowed_rows(expression, expected)
    assert live.filters.inserted_rows().to_pylist() == [
        {name: row[name] for name in table_of([]).column_names} for row in rows[live.base.rows :]
    ]


@settings(max_examples=60, deadline=None)
@given(
    puts=st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=3, unique_by=lambda one: one[0]
        ), max_size=8,
    )
)  # fmt: skip
def test_a_put_is_a_dictionary_of_names_to_ids(puts):
    live, expected = live_of([(0, 0), (0, 1), (0, 2)], ["p0", "p1", "p2"]), {"p0": 0, "p1": 1, "p2": 2}
    for one in puts:
        wanted = expected | {f"p{name}": code for name, code in one}
        before = live.view
        if len(set(wanted.values())) < len(wanted):
            for check_only in (True, False):
                with pytest.raises(InputError, match="would share the ID"):
                    live.put(
                        [Newcomer(f"p{name}", "") for name, _ in one],
                        [(0, code) for _, code in one],
                        check_only=check_only,
                    )
            assert live.view is before
            continue
        rows = live_rows(before)
        live.put([Newcomer(f"p{name}", "") for name, _ in one], [(0, code) for _, code in one])
        expected = wanted
        assert live_rows(before) == rows
        named = {live._name(row): codes_of(live.view, [row])[0, 1] for row in live_rows(live.view)}
        assert named == expected and all(live.row(name) in live_rows(live.view) for name in expected)


def test_a_day_of_prices_costs_no_row_and_loses_no_product():
    index = FilterIndex({"product_id": pa.array(["a", "b"]), "price": pa.array([1.0, 2.0]), "stock": pa.array([5, 6])})
    live = live_of([(0, 0), (1, 1)], ["a", "b"], index=index, most=2)
    live.insert("n", (2, 2), {"price": 3.0, "stock": 7})
    for price in range(1000):
        live.put([], [], changed={"a": {"price": price}, "n": {"price": -price}})
    allowed = live.compile({"all": [{"column": "price", "from": 999}, {"column": "stock", "in": [5]}]})
    assert allowed.allows([0, 1, 2]).tolist() == [True, False, False]
    assert live.compile({"column": "price", "to": -999}).allows([0, 1, 2]).tolist() == [False, False, True]
    assert live.view.rows == 3 and live.products == 3
    # Rows whose name has got another row count no more towards the limit.
    for number in range(10):
        live.put([Newcomer("a", "")], [(3, number % 2)])
    assert live.products == 3
    with pytest.raises(CapacityError, match="2 products are inserted already, 1 more pass the limit of 2"):
        live.put([Newcomer("c", "")], [(4, 4)], check_only=True)


def test_filters_of_other_columns_stay_compiled():
    live = live_of([(0, 0)], ["a"], index=FilterIndex({"price": pa.array([1.0]), "brand": pa.array(["x"])}))
    brand, price = {"column": "brand", "in": ["x"]}, {"column": "price", "to": 1}
    kept = live.compile(brand).base, live.compile(price).base
    live.put([], [], changed={"a": {"price": 2}})
    assert live.compile(brand).base is kept[0] and live.compile(price).base is not kept[1]


COLUMNS = {
    "product_id": pa.array(["a", "b"]), "price": pa.array([1.0, 2.0]), "stock": pa.array([1, 2]),
    "sale": pa.array([True, None]), "added": pa.array([date(2024, 1, 1), None]), "brand": pa.array(["x", None]),
    "cost": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)), "market": pa.array([["de"], None]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("newcomers", "options", "message"),
    [
        (["c", "c"], {}, "'c' is live already or given twice"),
        (["a"], {"changed": {"a": {"price": 1}}}, "'a' is put and changed in one request"),
        ([], {"changed": {"zz": {"price": 1}}}, "no product 'zz'"),
        ([], {"changed": {"gone": {"price": 1}}}, "'gone' is withdrawn; restore it"),
        ([], {"changed": {"a": {"colour": 1}}}, r"unknown columns \['colour'\] of product 'a'; there are"),
        ([], {"changed": {"a": {"product_id": "b"}}}, "is its name, which cannot change"),
        ([], {"changed": {"a": {"price": 1}, "b": {"price": "dear"}}}, "\"price\" of product 'b' is not double"),
        ([], {"changed": {"a": {"price": True}}}, "found True"),
        ([], {"changed": {"a": {"price": float("inf")}}}, "numbers must be finite"),
        ([], {"changed": {"a": {"price": float("nan")}}}, "numbers must be finite"),
        ([], {"changed": {"a": {"stock": 1.5}}}, "is not int64 .found 1.5"),
        ([], {"changed": {"a": {"stock": 2**70}}}, "is not int64"),
        ([], {"changed": {"a": {"sale": 1}}}, "is not bool"),
        ([], {"changed": {"a": {"added": "soon"}}}, "is not date32"),
        ([], {"changed": {"a": {"added": 5}}}, "is not date32"),
        ([], {"changed": {"a": {"cost": 1.555}}}, "is not decimal128"),
        ([], {"changed": {"a": {"market": "de"}}}, "is not list"),
        ([], {"changed": {"a": {"market": ["d\x1fe"]}}}, "control character U\\+001F"),
        ([], {"changed": {"a": {"brand": "\ud83d"}}}, "is not string"),
        ([], {"changed": {"a": {"price": 3}}, "values": {"b": float("nan")}}, "value of product 'b' must be a finite number"),
        ([], {"values": {"gone": 1.0}}, "'gone' is withdrawn"),
        (["c"], {"columns": {"price": ["dear"]}, "changed": {"a": {"price": 3}}}, "not double"),
        (["c"], {"columns": {"market": [["d\x1fe"]]}}, "control character"),
        (["\ud83d"], {}, "text that UTF-8 can hold"),
        (["new"], {"codes_ML": [[1, 1]]}, "'new' would share the ID <a_1><b_1> with a live product"),
        (["c"], {"vectors": [np.ones(3)]}, "the vector of product 'c' must be 2 finite numbers"),
        (["c"], {"vectors": [np.full(2, np.inf)]}, "the vector of product 'c' must be 2 finite numbers"),
        (["c"], {"value": float("nan")}, "the value of product 'c' must be a finite number"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_no_trace(newcomers, options, message):
    store = VectorStore(np.eye(2, dtype=np.float16), True)
    products = Products(COLUMNS["product_id"], values_N=np.zeros(2, np.float32), base_vectors=store)
    live = live_of([(0, 0), (1, 1)], ["a", "b"], index=FilterIndex(COLUMNS), products=products)
    live.put([Newcomer(name, "", np.ones(2)) for name in ("new", "gone")], [(2, 2), (3, 3)])
    live.withdraw(["gone"])
    before, names = live.view, list(live.inserted)
    vectors = options.get("vectors", [np.ones(2)] * len(newcomers))
    made = [Newcomer(name, "t", vector, options.get("value")) for name, vector in zip(newcomers, vectors)]
    codes = options.get("codes_ML", [(4, number) for number in range(len(made))])
    given_ = {name: one for name, one in options.items() if name in ("columns", "changed", "values")}
    for check_only in (True, False):
        with pytest.raises(InputError, match=message):
            live.put(made, codes, check_only=check_only, **given_)
    assert live.view is before and live.inserted == names
    # What is sound is applied afterwards, whole.
    live.put([Newcomer("c", "t", np.ones(2))], [(4, 0)], {"stock": [9]}, changed={"a": {"stock": 8}}, values={"b": 2.5})
    assert live.compile({"column": "stock", "from": 8}).allows(range(5)).tolist() == [True, False, False, False, True]
    assert live.view.products.values.of(np.arange(5)).tolist() == [0, 2.5, -np.inf, -np.inf, -np.inf]


def test_what_json_says_becomes_what_columns_hold():
    live = live_of([(0, 0), (1, 1)], ["a", "b"], index=FilterIndex(COLUMNS))
    live.put(
        [], [], changed={"a": {"cost": 19.99, "added": "2025-02-28", "stock": 3.0, "price": 4, "market": ["at", "ch"]}}
    )
    for condition in (
        {"column": "cost", "from": 19.99, "to": 19.99}, {"column": "added", "from": "2025-02-28"}, {"column": "stock", "in": [3]},
        {"column": "price", "from": 4}, {"column": "market", "has": ["ch"]},
    ):  # fmt: skip
        assert live.compile(condition).base.allowed_N.tolist() == [True, False]


def test_checks_change_nothing_and_raise_what_the_change_would():
    live = live_of([(0, 0), (1, 1)], ["a", "b"])
    for change in (live.withdraw, live.restore):
        with pytest.raises(InputError, match="no product 'zz'"):
            change(["a", "zz"], check_only=True)
    live.withdraw(["a"], check_only=True)
    assert live.products == 2
    live.withdraw(["a"])
    live.insert("c", (0, 0))
    with pytest.raises(InputError, match="'a' would share the ID"):
        live.restore(["a"], check_only=True)
    live.withdraw(["c"])
    live.restore(["a"], check_only=True)
    assert live.products == 1
    with pytest.raises(InputError, match="no product 'zz'"):
        live.withdraw(["b", "zz"])
    assert live.products == 1


def test_a_retriever_replaces_a_product_and_searches_that_run_see_the_old(served):  # noqa: F811
    retriever = Retriever.open(served, encode_query=encode)
    before, docid = retriever.live.view, retriever.retrieve(["oak table"], k=1)[0][0].docid_text
    retriever.put(
        [Newcomer("p4", "copper hose"), Newcomer("new", "oak table")],
        [(2, 0), retriever.space.parse(docid)], {"material": ["copper", "oak"], "price": [3.0, 4.0]},
        changed={"p3": {"price": 99.5}}, values={"p0": 100.0},
    )  # fmt: skip
    hits = retriever.retrieve(["oak table", "copper hose"], k=7)
    assert (hits[0][0].product_id, hits[0][0].docid_text) == ("new", docid)
    assert (hits[1][0].product_id, hits[1][0].title) == ("p4", "copper hose") and len(hits[1]) == 7
    assert sorted(names_of(hits)[0]) == sorted({"new", *(f"p{number}" for number in range(6))})
    assert names_of(retriever.retrieve(["oak"], k=6, filters=[{"column": "price", "from": 99}])) == [["p3"]]
    old = retriever._answers(["oak table"], before, before.products, 6, [None], retriever.widths_for(6))[0]
    assert old[0].product_id == "p4" and old[0].title == "oak table" and len(old) == 6
    retriever.expansion = type(retriever.expansion)(dense="none", order="value", a=0.0, most=1)
    assert names_of(retriever.retrieve(["oak"], k=6)) == [["p0"]]


def test_a_check_of_a_retriever_encodes_nothing(served):  # noqa: F811
    retriever = Retriever.open(served, encode_query=lambda texts: pytest.fail("encoded"))
    retriever.put([Newcomer("new", "oak")], [(2, 0)], check_only=True)
    retriever.insert([Newcomer("new", "oak")], [(2, 0)], check_only=True)
    with pytest.raises(InputError, match="'p0' is live already"):
        retriever.insert([Newcomer("p0", "oak")], [(2, 0)], check_only=True)
    for change in (retriever.withdraw, retriever.restore):
        with pytest.raises(InputError, match="no product 'zz'"):
            change(["zz"], check_only=True)
    assert retriever.products.newcomers == () and TITLES
