"""Filter columns at the door: kept in the type that the recipe names, refused where they are of another."""

import pyarrow as pa
import pytest

from catid2_ray.catalog.products import check_products
from catid2_ray.errors import InputError

KINDS = {"brand": "string", "price": "float", "stock": "int", "in_stock": "bool", "market": "list<string>"}
TABLE = pa.table(
    {
        "product_id": ["b", "a", "c"],
        "title": ["B", "A", "C"],
        "brand": pa.array(["x", None, "y"]).dictionary_encode(),
        "price": pa.array([1.5, float("nan"), float("inf")], pa.float32()),
        "stock": pa.array([1, None, 3], pa.int8()),
        "in_stock": [True, None, False],
        "market": pa.array([["us", " de\x1f ", "", None], None, []], pa.large_list(pa.string())),
    }
)


def checked(table=TABLE, **kinds):
    return check_products(table, width=None, min_category_depth=0, max_category_depth=3, filter_columns=kinds or KINDS)


def test_values_keep_their_meaning_and_missing_ones_stay_missing():
    good, bad, _ = checked()
    assert good.select(list(KINDS)).to_pylist() == [
        {"brand": None, "price": None, "stock": None, "in_stock": None, "market": None},
        {"brand": "x", "price": 1.5, "stock": 1, "in_stock": True, "market": ["us", "de"]},
    ]
    assert bad.to_pylist() == [{"product_id": "c", "reason": "price is infinite", "title": "C"}]
    assert [str(good.schema.field(name).type) for name in KINDS] == [
        "string", "double", "int64", "bool", "list<item: string>",
    ]  # fmt: skip


def test_of_twins_one_stays_whatever_the_order():
    twins = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(0, 1).set_column(4, "stock", [pa.array([0], pa.int8())])])
    found = [checked(table)[0].to_pylist() for table in (twins, twins.take([1, 0]))]
    assert found[0] == found[1] and len(found[0]) == 1


@pytest.mark.parametrize(
    "kinds, message",
    [
        ({"colour": "string"}, "column colour is missing, which catalog.filter_columns names; found product_id"),
        ({"brand": "float"}, "column brand is string, but catalog.filter_columns says float"),
        ({"price": "bool"}, "column price is float, but catalog.filter_columns says bool"),
        ({"price": "int"}, "column price is float, but catalog.filter_columns says int"),
        ({"brand": "list<string>"}, "column brand is string, but catalog.filter_columns says list<string>"),
    ],
)
def test_columns_of_other_types_are_refused(kinds, message):
    with pytest.raises(InputError, match=message):
        checked(**kinds)
