"""The product table's check: every reason for setting a row aside, and a result that ignores the order of the rows."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.catalog.products import check_products
from catid2_ray.errors import InputError

DEPTHS = {"min_category_depth": 0, "max_category_depth": 3}


def table(rows, **columns):
    names = ("product_id", "title", "description", "category_path", "embedding")
    kinds = {"category_path": pa.list_(pa.string()), "embedding": pa.list_(pa.float64())}
    used = [name for name in names if any(name in row for row in rows)]
    return pa.table({n: pa.array([row.get(n) for row in rows], kinds.get(n, pa.string())) for n in used} | columns)


def reasons(checked):
    return dict(zip(checked.bad["product_id"].to_pylist(), checked.bad["reason"].to_pylist()))


def test_good_rows_come_out_in_the_house_schema_and_sorted():
    checked = check_products(
        table(
            [
                {"product_id": "b", "title": " Hinge ", "description": " ", "category_path": [" Tools", "A", "B", "C"]},
                {"product_id": "a", "title": "Lock", "description": "x", "category_path": None},
                {"product_id": "c", "title": "Knob", "category_path": ["Tools", " ", "lost"]},
            ]
        ),
        width=None,
        **DEPTHS,
    )
    assert checked.good.to_pylist() == [
        {"product_id": "a", "title": "Lock", "description": "x", "category_path": [], "value": None},
        {"product_id": "b", "title": "Hinge", "description": None, "category_path": ["Tools", "A", "B"], "value": None},
        {"product_id": "c", "title": "Knob", "description": None, "category_path": ["Tools"], "value": None},
    ]
    assert checked.cut_paths == 1
    assert checked.bad.num_rows == 0
    assert checked.bad.column_names == ["product_id", "reason", "title"]


def test_each_fault_has_its_reason():
    good = [1.0, 0.0]
    rows = [
        {"product_id": None, "title": "x", "embedding": good, "category_path": ["A", "B"]},
        {"product_id": "b", "title": "  ", "embedding": good, "category_path": ["A", "B"]},
        {"product_id": "c", "title": "x", "embedding": None, "category_path": ["A", "B"]},
        {"product_id": "d", "title": "x", "embedding": [1.0, 2.0, 3.0], "category_path": ["A", "B"]},
        {"product_id": "e", "title": "x", "embedding": [1.0, float("nan")], "category_path": ["A", "B"]},
        {"product_id": "f", "title": "x", "embedding": [1.0, 1e300], "category_path": ["A", "B"]},
        {"product_id": "g", "title": "x", "embedding": [0.0, -0.0], "category_path": ["A", "B"]},
        {"product_id": "h", "title": "x", "embedding": good, "category_path": ["A"]},
        {"product_id": "i", "title": "x", "embedding": [None, 1.0], "category_path": ["A", "B"]},
        {"product_id": "j", "title": "x", "embedding": good, "category_path": ["A", "B"]},
    ]
    checked = check_products(table(rows), width=2, min_category_depth=2, max_category_depth=3)
    assert reasons(checked) == {
        None: "missing product_id",
        "b": "empty title",
        "c": "embedding missing",
        "d": "embedding of width 3 instead of 2",
        "e": "embedding with NaN or infinity",
        "f": "embedding with NaN or infinity",
        "g": "embedding of all zeros",
        "h": "category path of depth 1, shorter than min_category_depth 2",
        "i": "embedding with NaN or infinity",
    }
    assert checked.good["product_id"].to_pylist() == ["j"]
    assert checked.good.schema.field("embedding").type == pa.list_(pa.float32(), 2)
    assert checked.good["embedding"].to_pylist() == [[1.0, 0.0]]


def test_a_faulty_row_does_not_push_out_its_sound_duplicate():
    rows = [{"product_id": "a", "title": ""}, {"product_id": "a", "title": "Hinge"}, {"product_id": "a", "title": "Z"}]
    checked = check_products(table(rows), width=None, **DEPTHS)
    assert checked.good["title"].to_pylist() == ["Hinge"]
    assert sorted(checked.bad["reason"].to_pylist()) == ["duplicate product_id", "empty title"]


def test_values_are_numbers_or_unknown():
    rows = [{"product_id": name, "title": "x"} for name in "abcd"]
    value = pa.array([2, float("nan"), None, float("inf")], pa.float64())
    checked = check_products(table(rows, value=value), width=None, **DEPTHS)
    assert checked.good["value"].to_pylist() == [2.0, None, None]
    assert reasons(checked) == {"d": "value is infinite"}
    with pytest.raises(InputError, match="column value: expected numbers, found string"):
        check_products(table(rows, value=pa.array(["1"] * 4)), width=None, **DEPTHS)


row = st.fixed_dictionaries(
    {
        "product_id": st.sampled_from(["a", "b", "c", "", None]),
        "title": st.sampled_from(["x", "y", " "]),
        "description": st.sampled_from(["x", None]),
        "category_path": st.lists(st.sampled_from(["A", "B ", "", None]), max_size=5),
        "embedding": st.sampled_from([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [1.0], None]),
    }
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, max_size=8), order=st.randoms())
def test_no_row_is_lost_and_the_order_of_rows_does_not_matter(rows, order):
    mixed = list(rows)
    order.shuffle(mixed)
    first, second = (
        check_products(
            table(r) if r else table([dict.fromkeys(("product_id", "title", "embedding"))]), width=2, **DEPTHS
        )
        for r in (rows, mixed)
    )
    assert first.good.equals(second.good)
    assert first.bad.equals(second.bad)
    assert first.good.num_rows + first.bad.num_rows == max(len(rows), 1)
    ids = first.good["product_id"].to_pylist()
    assert ids == sorted(set(ids))
    sound = {
        r["product_id"]
        for r in rows
        if (r["product_id"] or "").strip() and r["title"].strip() and r["embedding"] and len(r["embedding"]) == 2
    }
    assert set(ids) == sound


def test_slices_chunks_large_strings_and_tensor_columns_read_the_same():
    rows = [{"product_id": f"p{i}", "title": f"t{i}", "category_path": ["A"] * (i % 4)} for i in range(9)]
    plain = table(rows)
    vectors = np.arange(1, 19, dtype=np.float32).reshape(9, 2)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2)
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)
    expected = check_products(plain.append_column("embedding", fixed).slice(2, 5), width=2, **DEPTHS).good
    assert expected["embedding"].to_pylist() == vectors[2:7].tolist()
    other = plain.set_column(1, "title", plain["title"].cast(pa.large_string())).append_column("embedding", tensor)
    chunked = pa.concat_tables([other.slice(2, 2), other.slice(4, 3)])
    assert check_products(chunked, width=2, **DEPTHS).good.equals(expected)


def test_an_empty_table_gives_empty_tables():
    checked = check_products(table([{"product_id": "a", "title": "t"}]).slice(0, 0), width=None, **DEPTHS)
    assert checked.good.num_rows == checked.bad.num_rows == checked.cut_paths == 0


def test_a_missing_column_is_named_with_those_found():
    with pytest.raises(InputError, match=r"column title is missing; found columns product_id; rename or add it"):
        check_products(table([{"product_id": "a"}]), width=None, **DEPTHS)
    with pytest.raises(InputError, match="column embedding is missing"):
        check_products(table([{"product_id": "a", "title": "t"}]), width=4, **DEPTHS)


def test_a_column_of_the_wrong_type_is_named():
    with pytest.raises(InputError, match="column category_path: expected a list of string per row, found string"):
        check_products(
            table([{"product_id": "a", "title": "t"}], category_path=pa.array(["A > B"])), width=None, **DEPTHS
        )
    with pytest.raises(InputError, match="column title: expected strings, found double"):
        check_products(pa.table({"product_id": ["a"], "title": [1.5]}), width=None, **DEPTHS)
