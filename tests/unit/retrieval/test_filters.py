"""Filters against an oracle that asks every product, counts of ranges against slices, and the text of every refusal."""

import json
import threading
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError, QueryError
from catid2_ray.retrieval import filters
from catid2_ray.retrieval.filters import Filter, FilterIndex, allowed_before
from tests.oracles.filters import allowed_between, allowed_rows

BRANDS, NAMES = ["x", "y", "Ångström", ""], ["Home", "Kitchen", "Ho", ""]
TYPES = {
    "product_id": pa.string(),
    "brand": pa.string(),
    "market": pa.dictionary(pa.int8(), pa.string()),
    "price": pa.float64(),
    "stock": pa.int64(),
    "small": pa.int8(),
    "in_stock": pa.bool_(),
    "category_path": pa.list_(pa.string()),
    "cost": pa.decimal128(9, 2),
    "added": pa.date32(),
}


def maybe(values):
    return st.none() | values


ROW = st.fixed_dictionaries(
    {
        "brand": maybe(st.sampled_from(BRANDS)),
        "market": maybe(st.sampled_from(BRANDS)),
        "price": maybe(st.sampled_from([-1.5, 0.0, 2.0, 2.5, 1e300])),
        "stock": maybe(st.sampled_from([-3, 0, 2, 2**53, 2**53 + 1])),
        "small": maybe(st.sampled_from([-128, 0, 127])),
        "in_stock": maybe(st.booleans()),
        "category_path": maybe(st.lists(st.sampled_from(NAMES), max_size=3)),
        "cost": maybe(st.sampled_from([Decimal("-1.50"), Decimal("0.10"), Decimal("19.99"), Decimal("9999999.99")])),
        "added": maybe(st.sampled_from([date(1, 1, 1), date(1969, 12, 31), date(2024, 2, 29), date(9999, 12, 31)])),
    }
)
NUMBER = st.sampled_from([-200, -3, 0, 2, 127, 2**53, 2**53 + 1, 10**30, -1.5, 2.25, 1e300])
WHOLE = st.sampled_from([-200, -3, 0, 2, 2**53 + 1, 10**30])


@st.composite
def ranges(draw):
    bounds = draw(st.dictionaries(st.sampled_from(["from", "to"]), NUMBER, min_size=1))
    return {"column": draw(st.sampled_from(["price", "stock", "small"]))} | bounds


def bounded(column, values):
    bounds = st.dictionaries(st.sampled_from(["from", "to"]), st.sampled_from(values), min_size=1)
    return bounds.map(lambda chosen: {"column": column} | chosen)


CONDITION = (
    st.builds(
        lambda column, values: {"column": column, "in": values},
        st.sampled_from(["brand", "market"]),
        st.lists(st.sampled_from([*BRANDS, "none"]), max_size=3),
    )
    | st.builds(
        lambda column, values: {"column": column, "in": values},
        st.sampled_from(["stock", "small"]),
        st.lists(WHOLE, max_size=3),
    )
    | ranges()
    | st.builds(lambda value: {"column": "in_stock", "is": value}, st.booleans())
    | st.builds(
        lambda path: {"column": "category_path", "under": path},
        st.lists(st.sampled_from([*NAMES, "none", "Home\x1fKitchen"]), min_size=1, max_size=3),
    )
    | st.builds(
        lambda names: {"column": "category_path", "has": names},
        st.lists(st.sampled_from([*NAMES, "none"]), max_size=3),
    )
    | bounded("cost", [0.1, 19.99, 19.991, -1.5, -2, 10**30, 1e300, 1e-300])
    | bounded("added", ["0001-01-01", "1969-12-31", "2024-02-29", "2024-03-01"])
    | st.builds(lambda ids: {"products": ids}, st.lists(st.sampled_from(["p0", "p3", "p70", "q"]), max_size=3))
)
EXPRESSION = st.recursive(
    CONDITION,
    lambda inner: (
        st.builds(lambda part: {"not": part}, inner)
        | st.builds(lambda parts: {"all": parts}, st.lists(inner, max_size=3))
        | st.builds(lambda parts: {"any": parts}, st.lists(inner, max_size=3))
    ),
    max_leaves=6,
)


def table_of(rows):
    return pa.table({name: pa.array([row[name] for row in rows], dtype) for name, dtype in TYPES.items()})


def numbered(rows):
    return [{"product_id": f"p{number}"} | row for number, row in enumerate(rows)]


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(ROW, max_size=80), expression=EXPRESSION, cut=st.integers(0, 80))
def test_every_expression_allows_what_the_oracle_allows(rows, expression, cut):
    rows = numbered(rows)
    table = pa.concat_tables([table_of(rows[:cut]), table_of(rows[cut:])])
    made = FilterIndex(table).compile(expression)
    expected = allowed_rows(expression, rows)
    assert made.allowed_N.tolist() == expected
    assert (made.total, len(made)) == (sum(expected), len(rows))


@settings(max_examples=200, deadline=None)
@given(allowed=st.lists(st.booleans(), max_size=200), seed=st.integers(0, 100))
def test_counts_of_ranges_are_those_of_slices(allowed, seed):
    made, rng = Filter.of(np.array(allowed, bool)), np.random.default_rng(seed)
    start, end = np.sort(rng.integers(0, len(allowed) + 1, (2, 40)), axis=0)
    start[0], end[0] = 0, len(allowed)
    expected = [allowed_between(allowed, a, b) for a, b in zip(start, end)]
    assert made.count(start, end).tolist() == expected
    before = allowed_before(made.tensors(), torch.from_numpy(np.stack((start, end))))
    assert before.dtype == torch.int64 and (before[1] - before[0]).tolist() == expected
    assert allowed_before(made.tensors(), torch.from_numpy(end.astype(np.int32))).tolist() == before[1].tolist()
    assert made.allows(np.arange(len(allowed))).tolist() == allowed == made.allowed_N.tolist()
    assert made.tensors() is made.tensors("cpu")


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), max_size=150))
def test_filters_combine_row_by_row(pairs):
    one_N, two_N = np.array(pairs, bool).reshape(-1, 2).T
    one, two = Filter.of(one_N), Filter.of(two_N)
    for made, expected in ((one & two, one_N & two_N), (one | two, one_N | two_N), (~one, ~one_N)):
        assert made.allowed_N.tolist() == expected.tolist() and made.total == expected.sum()


def test_a_filter_is_a_fraction_of_a_byte_a_row():
    made = Filter.of(np.ones(64_000, bool))
    assert (made.words_W.nbytes + made.before_W.nbytes) / 64_000 < 1 / 8 + 1 / 16 + 0.001


def test_filters_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="one boolean per trie row"):
        Filter.of([0, 1])
    with pytest.raises(InputError, match="over 2 and 3 rows do not combine"):
        Filter.of([True, False]) & Filter.of([True] * 3)
    for ask in (lambda f: f.count(0, 3), lambda f: f.count(-1, 0), lambda f: f.allows(2)):
        with pytest.raises(IndexError, match="is outside 0…"):
            ask(Filter.of([True, False]))


ROWS = numbered(
    [
        {"brand": "x", "market": "de", "price": 1.0, "stock": 1, "small": 1, "in_stock": True, "category_path": ["A"]}
        | {"cost": Decimal("1.00"), "added": date(2024, 1, 31)},
        {"brand": None, "market": None, "price": None, "stock": None, "small": None, "in_stock": None}
        | {"category_path": None, "cost": None, "added": None},
    ]
)


@pytest.fixture
def index():
    return FilterIndex(table_of(ROWS), kept=2)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (None, r'filter at \$: expected an object with "all", "any", "not", "column" or "products", found null'),
        ({}, r"filter at \$: expected exactly one of .*, found \[\]"),
        ({"all": [], "any": []}, r'exactly one of .*, found \["all", "any"\]'),
        ({"not": {"all": []}, "in": []}, r'"not" stands alone, found beside it \["in"\]'),
        ({"all": {}}, r"filter at \$\.all: expected a list of expressions, found \{\}"),
        ({"all": [{"any": []}, 3]}, r"filter at \$\.all\[1\]: expected an object .*, found 3"),
        (
            {"any": [{"not": {"column": "colour", "in": []}}]},
            r'filter at \$\.any\[0\]\.not\.column: unknown column "colour"; there are \["added", "brand", "category_path",',
        ),
        ({"column": ["brand"], "in": []}, r'unknown column \["brand"\]'),
        ({"column": "brand"}, r'column "brand" \(strings\) takes "in", found \[\]'),
        ({"column": "brand", "under": ["x"]}, r'takes "in", found \["under"\]'),
        ({"column": "brand", "in": "x"}, r"filter at \$\.in: column \"brand\" \(strings\) expects a list of strings, found 'x'"),
        ({"column": "brand", "in": ["x", 1]}, r"filter at \$\.in\[1\]: .* expects strings, found 1"),
        ({"column": "brand", "in": ["\ud800"]}, r"filter at \$\.in\[0\]: .* expects strings"),
        ({"column": "price", "in": [1]}, r'\(numbers\) takes "from" or "to" or "from" with "to", found \["in"\]'),
        ({"column": "price", "from": "1"}, r"filter at \$\.from: .* expects a number, found '1'"),
        ({"column": "price", "to": True}, r"filter at \$\.to: .* expects a number, found True"),
        ({"column": "price", "to": None}, "expects a number, found None"),
        ({"column": "price", "to": float("nan")}, "must be JSON"),
        ({"column": "stock", "in": [1.0]}, r"\(whole numbers\) expects whole numbers, found 1.0"),
        ({"column": "in_stock", "is": 1}, r"\(booleans\) expects true or false, found 1"),
        ({"column": "category_path", "under": []}, r"\(lists of strings\) expects at least one name"),
        ({"column": "category_path", "under": "A"}, "expects a list of names from the root, found 'A'"),
        ({"column": "category_path", "has": "A"}, "expects a list of names, found 'A'"),
        ({"column": "category_path", "in": []}, r'takes "under" or "has", found \["in"\]'),
        ({"column": "cost", "from": "1"}, r"\(decimals\) expects a number, found '1'"),
        ({"column": "added", "from": "31.1.2024"}, r"""\(dates\) expects a date as "2024-01-31", found '31.1.2024'"""),
        ({"column": "added", "to": "2023-02-29"}, "expects a date"),
        ({"column": "added", "to": 5}, "expects a date"),
        ({"products": ["p"] * 10_001}, r"filter at \$: a filter may hold 10000 values, found 10001"),
        ({"any": [{"products": ["p"] * 9_000}, {"column": "brand", "in": ["x"] * 1001}]}, r"any\[1\]: .* found 10001"),
        ({"products": "p0"}, r'filter at \$\.products: column "product_id" \(product ids\) expects a list'),
        ({"products": ["p0", 5]}, r"filter at \$\.products\[1\]: .* expects strings, found 5"),
        ({"column": {1}}, "must be JSON"),
        ({"all": [{"any": []}] * 3 + [{"products": []}] * 101}, r"filter at \$\.all\[103\]: .* hold 100 conditions"),
    ],
)  # fmt: skip
def test_what_is_no_expression_is_refused_with_its_place(index, expression, message):
    with pytest.raises(QueryError, match=message):
        index.compile(expression)


@pytest.mark.parametrize(("depth", "message"), [(30, "20 levels deep"), (100_000, "must be JSON of at most 20 levels")])
def test_a_deep_expression_is_refused(index, depth, message):
    expression = {"all": []}
    for _ in range(depth):
        expression = {"not": expression}
    with pytest.raises(QueryError, match=message):
        index.compile(expression)


def test_products_need_their_column():
    index = FilterIndex({"sku": pa.array(["a", "b"])}, product_column="id")
    with pytest.raises(QueryError, match=r'filter at \$\.products: unknown column "id"; there are \["sku"\]'):
        index.compile({"products": ["a"]})
    index = FilterIndex({"sku": pa.array(["a", "b"])}, product_column="sku")
    assert index.compile({"products": ["b"]}).allowed_N.tolist() == [False, True]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": pa.array([1]), "b": pa.array([1, 2])}, "Arrow arrays of one length"),
        ({"when": pa.array([0], pa.timestamp("s"))}, r'column "when" is timestamp\[s\]; filters take strings'),
        ({"cost": pa.array([None], pa.decimal128(19, 2))}, "decimals of at most 18 digits; cast it"),
        ({"sizes": pa.array([[1]])}, r'column "sizes" is list<.*int64>'),
        ({"product_id": pa.array([7])}, "holds the product ids and must be strings, found int64"),
        ({"path": pa.array([["a\x1fb"]])}, "U\\+001F"),
    ],
)
def test_columns_that_no_filter_can_read_are_refused(columns, message):
    with pytest.raises(InputError, match=message):
        FilterIndex(columns)


@pytest.mark.parametrize(
    "dtype", [pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.list_(pa.dictionary(pa.int8(), pa.string()))]
)  # fmt: skip
def test_paths_of_every_kind_of_list(dtype):
    index = FilterIndex({"path": pa.array([["A", "B"], ["AB", "B"], None], dtype)})
    assert index.compile({"column": "path", "under": ["A"]}).allowed_N.tolist() == [True, False, False]
    assert index.compile({"column": "path", "under": ["AB", "B"]}).allowed_N.tolist() == [False, True, False]


def test_text_of_more_values_than_a_byte_holds():
    names = [f"brand {number}" for number in range(300)]
    index = FilterIndex({"brand": pa.array([*names, None]), "size": pa.array([1.5] * 301, pa.float32())})
    for asked in (names[:1], names[290:], ["none"], []):
        expected = [name in asked for name in [*names, None]]
        assert index.compile({"column": "brand", "in": asked}).allowed_N.tolist() == expected
    assert index.compile({"column": "size", "from": 1.5, "to": 10**400}).total == 301


def test_no_row_and_no_column():
    index = FilterIndex({})
    assert index.compile({"all": []}).total == 0 and index.compile({"any": []}).count(0, 0) == 0


def test_equal_expressions_are_compiled_once_and_few_are_kept(index):
    first = index.compile({"column": "price", "from": 1, "to": 5})
    assert index.compile(json.loads('{"to": 5, "from": 1, "column": "price"}')) is first
    index.compile({"all": []})
    assert index.compile({"column": "price", "from": 1, "to": 5}) is first
    index.compile({"any": []})
    index.compile({"not": {"any": []}})
    assert index.compile({"column": "price", "from": 1, "to": 5}) is not first


def test_many_threads_share_an_index(index):
    wrong = []

    def ask(number):
        for turn in range(50):
            brand = ["x"] if (number + turn) % 2 else ["y"]
            if index.compile({"column": "brand", "in": brand}).total != (brand == ["x"]):
                wrong.append(brand)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_limits_are_those_that_messages_name():
    assert (filters.MAX_DEPTH, filters.MAX_CONDITIONS, filters.MAX_VALUES) == (20, 100, 10_000)
