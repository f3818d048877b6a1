"""Files of a table among what writers leave beside it, and tables that were written as text; known answers."""

import io

import pyarrow as pa
import pytest

from catid2_ray.catalog import text_files
from catid2_ray.catalog.products import check_products
from catid2_ray.catalog.table_files import is_table, partition_values, table_files
from catid2_ray.errors import InputError


def files(*names):
    found = table_files(names, "products", where="shop")
    return found and (found.format, found.files)


def test_what_lies_beside_the_data_is_no_data():
    assert files(
        "products.parquet/part-1.parquet", "products.parquet/_SUCCESS", "products.parquet/_temporary/0/part-2.parquet",
        "products.parquet/_delta_log/10.checkpoint.parquet", "products.parquet/._part-1.parquet",
        "products.parquet/.part-1.parquet.crc", "products.parquet/_metadata.parquet",
    ) == ("parquet", ["products.parquet/part-1.parquet"])  # fmt: skip
    assert files("products/b.csv", "products/a.csv.gz") == ("csv", ["products/a.csv.gz", "products/b.csv"])
    assert files("products.ndjson") == ("jsonl", ["products.ndjson"])
    assert files("products/readme.md", "products/_x.parquet") is None and files() is None
    assert [is_table(name, "products") for name in ("products", "products.parquet", "products.TSV", "products.md", "pairs")] == [
        True, True, True, False, False
    ]  # fmt: skip


def test_two_tables_of_one_name_are_refused():
    with pytest.raises(InputError, match="shop holds products.csv and products.parquet, and which of them"):
        files("products.csv", "products.parquet")
    with pytest.raises(InputError, match=r"files of several formats \(csv, parquet\)"):
        files("products/a.csv", "products/b.parquet")


def test_folders_may_say_the_value_of_a_column():
    assert partition_values("products/market=de/size=10%20cm/a.parquet") == {"market": "de", "size": "10 cm"}
    assert partition_values("products/market=__HIVE_DEFAULT_PARTITION__/a.parquet") == {"market": None}
    assert files("products/_day=1/a.parquet") == ("parquet", ["products/_day=1/a.parquet"])
    assert partition_values("products/a=b.parquet") == {}


COLUMNS = ["product_id", "title", "description", "category_path", "value", "embedding"]


def read(text, format="csv", columns=COLUMNS, **filters):
    data = text if isinstance(text, bytes) else text.encode()
    blocks = text_files.read_text(
        lambda: io.BytesIO(data),
        format=format,
        columns=[*columns, *filters],
        filter_columns=filters,
        where="products.x",
    )
    return pa.concat_tables(blocks, promote_options="permissive")


def test_csv_keeps_what_was_typed():
    text = '\ufeffproduct_id,title,stars,category_path,value\n000123,"Shelf, 3"" wide\nin oak",x,Home > Shelves,1.5\nNA,null,y,,\n'
    table = read(text)
    assert table.to_pylist() == [
        {"product_id": "000123", "title": 'Shelf, 3" wide\nin oak', "category_path": "Home > Shelves", "value": 1.5},
        {"product_id": "NA", "title": "null", "category_path": None, "value": None},
    ]
    checked = check_products(table, width=None, min_category_depth=0, max_category_depth=3, category_separator=" > ")
    assert checked.good["category_path"].to_pylist() == [["Home", "Shelves"], []]


def test_lists_in_csv_are_json_and_filters_have_their_types():
    text = 'product_id\ttitle\tembedding\tbrand\tprice\tstock\ttags\n1\tx\t[0.5, 2]\tOak\t9.5\ttrue\t["a", "b"]\n2\ty\t\t7\t\t\t\n'
    table = read(text, "tsv", brand="string", price="float", stock="bool", tags="list<string>")
    assert table.to_pylist() == [
        {
            "product_id": "1",
            "title": "x",
            "embedding": [0.5, 2.0],
            "brand": "Oak",
            "price": 9.5,
            "stock": True,
            "tags": ["a", "b"],
        },
        {"product_id": "2", "title": "y", "embedding": None, "brand": "7", "price": None, "stock": None, "tags": None},
    ]
    with pytest.raises(
        InputError,
        match=r"column embedding: expected a list as JSON, such as \[0.1, 0.2\], found '0.1 0.2'",
    ):
        read("product_id,title,embedding\n1,x,0.1 0.2\n")


def test_what_is_no_csv_is_named():
    with pytest.raises(
        InputError, match="products.x cannot be read as text with ',' between columns: .*Expected 2 columns, got 3"
    ):
        read("product_id,title\n1,a,b\n")
    with pytest.raises(InputError, match="products.x cannot be read .*invalid value 'dear'"):
        read("product_id,title,value\n1,a,dear\n")
    with pytest.raises(InputError, match="1 column name occur more than once, title"):
        read("product_id,title,title\n1,a,b\n")
    with pytest.raises(InputError, match="products.x cannot be read"):
        read("")


def test_latin_1_in_csv_sets_its_row_aside():
    table = read("product_id,title\n1,Café\n2,oak\n".encode("latin-1"))
    checked = check_products(table, width=None, min_category_depth=0, max_category_depth=3)
    assert checked.bad["reason"].to_pylist() == ["title is not UTF-8"] and checked.good["product_id"].to_pylist() == [
        "2"
    ]


@pytest.mark.parametrize("size", [1, 40, 1 << 20])
def test_json_lines_of_any_block_size(size, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", size)
    text = (
        '{"product_id": "007", "title": "2020-01-01", "category_path": ["A", "B"], "other": {"x": 1}}\n\n'
        '{"product_id": "8", "title": "x", "embedding": [1, 2.5], "value": 3}'
    )
    first, second = read(text, "jsonl").to_pylist()
    assert (first["product_id"], first["title"], first["category_path"]) == ("007", "2020-01-01", ["A", "B"])
    assert (second["embedding"], second["value"], second["category_path"]) == ([1.0, 2.5], 3.0, None)


def test_ids_and_paths_in_json_are_of_either_type_but_not_of_both():
    row = read('{"product_id": 7, "title": "x", "category_path": "A > B"}\n', "jsonl").to_pylist()[0]
    assert (row["product_id"], row["category_path"]) == (7, "A > B")
    with pytest.raises(
        InputError, match="products.x, after row 0: not JSON lines that can be read: .*ids as texts throughout"
    ):
        read('{"product_id": 7, "title": "x"}\n{"product_id": "a", "title": "x"}\n', "jsonl")
    with pytest.raises(InputError, match="not JSON lines that can be read: JSON parse error"):
        read('{"product_id": 7, "title": \n', "jsonl")
