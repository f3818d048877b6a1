"""The shop's own tables, products and judged pairs: the columns that the check at the door and every later stage agree on."""

from collections.abc import Iterable

import pyarrow as pa

CATEGORY_PATH = pa.list_(pa.string())  # root first
PRODUCTS = pa.schema(
    [
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("description", pa.string()),
        pa.field("category_path", CATEGORY_PATH),
        pa.field("value", pa.float32()),
    ]
)
PAIRS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("query", pa.string(), nullable=False),
        pa.field("product_id", pa.string(), nullable=False),
        pa.field("relevance", pa.float64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
# The types that `catalog.filter_columns` can name.
FILTER_TYPES = {
    "string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(),
    "list<string>": pa.list_(pa.string()),
}  # fmt: skip


def pairs(columns: Iterable[str]) -> pa.Schema:
    """PAIRS, with those of the optional columns that are among `columns`: `user` and `recent` (lists of strings), and
    `behaviour`, what searchers did (paid, clicked, exposed or null)."""
    lists = [pa.field(name, pa.list_(pa.string())) for name in ("user", "recent") if name in columns]
    return pa.schema([*PAIRS, *lists, *([pa.field("behaviour", pa.string())] if "behaviour" in columns else [])])


def nullable(schema: pa.Schema) -> pa.Schema:
    """The same columns where any value may be missing: a table that is not checked yet."""
    return pa.schema([field.with_nullable(True) for field in schema])
