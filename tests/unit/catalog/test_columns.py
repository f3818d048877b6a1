"""Columns as writers write them: every type that is taken, and what is refused with the conversion to write."""

import decimal
import uuid

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.catalog.columns import NOT_UTF8, commonest_width, plain, plain_table
from catid2_ray.catalog.pairs import LOWER_GRADE, UNKNOWN_PRODUCT, check_pairs
from catid2_ray.catalog.products import check_products
from catid2_ray.errors import InputError
from catid2_ray.tables import PAIRS

TITLES = ["oak shelf", "steel hinge", "grey sofa", "brass lock"]
IDS, VECTORS = ["a", "b", "c", "d"], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
PATHS = [["Home", "Shelves"], ["Hardware"], [], None]
DEPTHS = {"min_category_depth": 0, "max_category_depth": 3}


def good(width=None, separator=None, **columns):
    table = pa.table({"product_id": IDS, "title": TITLES} | columns)
    checked = check_products(table, width=width, category_separator=separator, **DEPTHS)
    assert checked.bad.num_rows == 0, checked.bad.to_pylist()
    return checked.good


def not_utf8(texts, row):
    """The texts as Arrow strings, that of `row` in Latin-1."""
    bytes_ = pa.array(
        [text.encode() for text in texts[:row]] + [b"Caf\xe9"] + [text.encode() for text in texts[row + 1 :]]
    )
    return pa.Array.from_buffers(pa.string(), len(bytes_), bytes_.buffers())


def tensor_of_other_shapes():
    """As Ray Data writes rows that may differ in shape: data and shape of each."""

    class Variable(pa.ExtensionType):
        def __init__(self):
            super().__init__(
                pa.struct([("data", pa.large_list(pa.float32())), ("shape", pa.list_(pa.int64()))]), "test.var"
            )

        def __arrow_ext_serialize__(self):
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            return cls()

    kind = Variable()
    rows = [{"data": vector, "shape": [2]} for vector in VECTORS]
    return pa.ExtensionArray.from_storage(kind, pa.array(rows, kind.storage_type))


EMBEDDINGS = {
    "list<double>": pa.array(VECTORS),
    "large_list": pa.array(VECTORS, pa.large_list(pa.float64())),
    "list_view": pa.array(VECTORS, pa.list_view(pa.float32())),
    "large_list_view": pa.array(VECTORS, pa.large_list_view(pa.float32())),
    "fixed_size_list": pa.array(VECTORS, pa.list_(pa.float64(), 2)),
    "half": pa.array([[np.float16(x) for x in v] for v in VECTORS], pa.list_(pa.float16())),
    "int8": pa.array([[int(x) for x in v] for v in VECTORS], pa.list_(pa.int8())),
    "decimal": pa.array([[decimal.Decimal(int(x)) for x in v] for v in VECTORS]),
    "fixed_shape_tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(VECTORS, np.float32)),
    "tensor of other shapes": tensor_of_other_shapes(),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_of_any_list_are_taken_sliced_or_not(name):
    column = EMBEDDINGS[name]
    assert good(2, embedding=column)["embedding"].to_pylist() == VECTORS
    table = pa.table({"product_id": IDS, "title": TITLES, "embedding": column}).slice(1, 2)
    assert check_products(table, width=2, **DEPTHS).good["embedding"].to_pylist() == VECTORS[1:3]


@pytest.mark.parametrize(
    "column, message",
    [
        (pa.array([b"\0" * 8] * 4), "found binary; convert it: numpy.frombuffer"),
        (pa.array([{"list": v} for v in VECTORS]), r"found struct.*; convert it: write the list inside"),
        (pa.array(["a"] * 4), r"found string; convert it: json.loads"),
        (pa.array([[v] for v in VECTORS]), r"found list<item: list.*; convert it: write one flat list"),
    ],
)
def test_embeddings_that_are_no_lists_are_refused_with_the_conversion(column, message):
    with pytest.raises(InputError, match=f"column embedding: expected a list of float per row, {message}"):
        good(2, embedding=column)


def test_the_width_that_most_vectors_have():
    kind = pa.list_(pa.float32())
    assert commonest_width(pa.array([[], [1.0], [1.0, 2.0], None, [3.0, 4.0]], kind)) == 2
    assert commonest_width(pa.array([[1.0], [1.0, 2.0]], kind)) == 2
    assert commonest_width(pa.array([[], None], kind)) is None


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int32(), pa.large_string())),
        pa.list_view(pa.string()),
        pa.list_(pa.string_view()),
        pa.large_list(pa.string_view()),
    ],
)
def test_paths_of_any_list(kind):
    assert good(category_path=pa.array(PATHS, kind))["category_path"].to_pylist() == [*PATHS[:3], []]


def test_missing_paths_are_empty_whatever_type_says_so():
    for column in (pa.nulls(4), pa.array([[]] * 4), pa.nulls(4, pa.list_(pa.string()))):
        assert good(category_path=column)["category_path"].to_pylist() == [[]] * 4


def test_a_path_that_is_one_text_needs_its_separator():
    paths = pa.array(["Home > Shelves", "Hardware", "", None])
    assert good(separator=" > ", category_path=paths)["category_path"].to_pylist() == [*PATHS[:3], []]
    assert good(separator="/", category_path=pa.array(["A/ B", "A", "/", None]))["category_path"].to_pylist() == [
        ["A", "B"], ["A"], [], []
    ]  # fmt: skip
    with pytest.raises(InputError, match="such as 'Home > Shelves'; set catalog.category_separator"):
        good(category_path=paths)


@pytest.mark.parametrize(
    "ids, expected",
    [
        (pa.array([3, 1, 2, 4]), ["1", "2", "3", "4"]),
        (pa.array([3, 1, 2, 4]).dictionary_encode(), ["1", "2", "3", "4"]),
        (pa.array(IDS, pa.string_view()), IDS),
        (pa.array(IDS, pa.large_string()), IDS),
        (pa.array([decimal.Decimal(n) for n in (3, 1, 2, 4)]), ["1", "2", "3", "4"]),
        (
            pa.array([bytes([n] * 16) for n in range(4)], pa.uuid()),
            [str(uuid.UUID(bytes=bytes([n] * 16))) for n in range(4)],
        ),
    ],
)
def test_ids_of_any_type_become_text(ids, expected):
    assert good(product_id=ids)["product_id"].to_pylist() == expected


def test_ids_and_texts_that_could_mean_two_things_are_refused():
    with pytest.raises(InputError, match=r"column product_id: expected strings, found double; .*pyarrow.int64\(\)"):
        good(product_id=pa.array([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(
        InputError, match=r"column title: expected strings, found binary; cast it to string: pyarrow.compute"
    ):
        good(title=pa.array([b"x"] * 4))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([decimal.Decimal("1.5")] * 4),
        pa.array([1.5] * 4).dictionary_encode(),
        pa.array([np.float16(1.5)] * 4),
    ],
)
def test_values_of_any_number(column):
    assert good(value=column)["value"].to_pylist() == [1.5] * 4


def test_columns_of_one_name_are_refused():
    table = pa.Table.from_arrays(
        [pa.array(IDS), pa.array(TITLES), pa.array(TITLES)], names=["product_id", "title", "title"]
    )
    with pytest.raises(InputError, match="1 column name occur more than once, title"):
        check_products(table, width=None, **DEPTHS)


def test_a_pandas_index_is_no_column_of_ours():
    assert good(__index_level_0__=pa.array(range(4))).column_names == [
        "product_id", "title", "description", "category_path", "value"
    ]  # fmt: skip


def test_text_that_is_not_utf8_sets_its_row_aside():
    table = pa.table({"product_id": IDS, "title": not_utf8(TITLES, 1), "description": not_utf8(TITLES, 2)})
    offsets = pa.array([0, 1, 2, 3, 4], pa.int32())
    table = table.append_column("category_path", pa.ListArray.from_arrays(offsets, not_utf8(["A", "B", "C", "D"], 3)))
    checked = check_products(table, width=None, **DEPTHS)
    assert checked.good["product_id"].to_pylist() == ["a"]
    assert [(row["product_id"], row["reason"]) for row in checked.bad.to_pylist()] == [
        ("b", "title is not UTF-8"), ("c", "description is not UTF-8"), ("d", "category_path is not UTF-8")
    ]  # fmt: skip
    assert checked.bad["title"][0].as_py() == "Caf\ufffd"
    ids = check_products(pa.table({"product_id": not_utf8(IDS, 0), "title": TITLES}), width=None, **DEPTHS)
    assert ids.bad.to_pylist() == [
        {"product_id": "Caf\ufffd", "reason": "product_id is not UTF-8", "title": "oak shelf"}
    ]
    brand = check_products(
        pa.table({"product_id": IDS, "title": TITLES, "brand": not_utf8(IDS, 0)}), width=None,
        filter_columns={"brand": "string"}, **DEPTHS,
    )  # fmt: skip
    assert brand.bad["reason"].to_pylist() == ["brand is not UTF-8"]
    assert good(unused=not_utf8(IDS, 0)).num_rows == 4


def test_what_was_repaired_before_it_was_joined_is_still_known():
    first = plain_table(pa.table({"product_id": IDS, "title": not_utf8(TITLES, 1)}))
    second = plain_table(pa.table({"product_id": ["e"], "title": ["x"]}))
    assert first[NOT_UTF8].to_pylist() == [None, "title", None, None] and NOT_UTF8 not in second.column_names
    joined = pa.concat_tables([first, second], promote_options="permissive")
    assert check_products(joined, width=None, **DEPTHS).bad["reason"].to_pylist() == ["title is not UTF-8"]


def test_titles_that_say_nothing_are_empty():
    titles = pa.array(["\u200b\u200b", "\x00", "!!! ???", "ok"])
    checked = check_products(pa.table({"product_id": IDS, "title": titles}), width=None, **DEPTHS)
    assert checked.bad["reason"].to_pylist() == ["empty title"] * 3 and checked.good["title"].to_pylist() == ["ok"]


def test_run_end_encoding_and_empty_tables():
    encoded = pa.RunEndEncodedArray.from_arrays(pa.array([2, 4], pa.int32()), pa.array(["x", "y"]))
    assert good(description=encoded)["description"].to_pylist() == ["x", "x", "y", "y"]
    assert plain(pa.chunked_array([], pa.large_string())).type == pa.string()


def pairs(*rows, **columns):
    table = pa.table([pa.array(column) for column in zip(*rows)], names=PAIRS.names)
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


PAIR = ("q", "hinge", "a", 2.0, "train")


@pytest.mark.parametrize(
    "column",
    [pa.array([decimal.Decimal("2.0")]), pa.array([2]), pa.array([2.0]).dictionary_encode(), pa.array([np.float16(2)])],
)
def test_a_relevance_of_any_number(column):
    assert check_pairs(pairs(PAIR, relevance=column)).good.to_pylist() == [dict(zip(PAIRS.names, PAIR))]


def test_pairs_whose_ids_are_numbers_uuids_or_views():
    checked = check_pairs(
        pairs(
            PAIR,
            query_id=pa.array([7]),
            product_id=pa.array([b"0" * 16], pa.uuid()),
            split=pa.array(["test"], pa.string_view()),
        )
    )
    row = checked.good.to_pylist()[0]
    assert (row["query_id"], row["product_id"], row["split"]) == ("7", str(uuid.UUID(bytes=b"0" * 16)), "test")


def test_queries_that_say_nothing_or_are_not_utf8_are_set_aside():
    rows = [("q1", "???", "a", 1.0, "train"), ("q2", "\u200b", "a", 1.0, "train"), ("q3", "oak", "a", 1.0, "train")]
    assert check_pairs(pairs(*rows)).bad["reason"].to_pylist() == ["empty query"] * 2
    checked = check_pairs(pairs(*rows[2:], query=not_utf8(["oak"], 0)))
    assert checked.bad["reason"].to_pylist() == ["query is not UTF-8"]


def test_of_pairs_that_differ_in_their_grade_the_highest_stays():
    checked = check_pairs(
        pairs(
            ("q", "hinge", "a", 1.0, "train"),
            ("q", "hinge", "a", 3.0, "train"),
            ("q", "hinge", "a", 3.0, "train"),
            ("q", "hinge", "a", 2.0, "train"),
            ("q", "hinge", "b", 1.0, "train"),
        )
    )
    assert [(row["product_id"], row["relevance"]) for row in checked.good.to_pylist()] == [("a", 3.0), ("b", 1.0)]
    assert checked.duplicates == 1 and checked.bad["reason"].to_pylist() == [LOWER_GRADE] * 2


def test_pairs_of_products_that_the_catalogue_lacks_are_set_aside():
    checked = check_pairs(pairs(PAIR, ("q", "hinge", "z", 1.0, "train")), known=pa.array(["a", "b"]))
    assert checked.good["product_id"].to_pylist() == ["a"]
    assert [(row["product_id"], row["reason"]) for row in checked.bad.to_pylist()] == [("z", UNKNOWN_PRODUCT)]
    assert check_pairs(pairs(PAIR), known=pa.array([], pa.string())).good.num_rows == 0
