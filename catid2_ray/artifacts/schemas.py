"""The Arrow schemas of every table that a stage writes: the one documented format between stages.

Rows of all product-keyed tables lie in parts: a product's part is a hash of its product_id, inside a part rows are sorted
by product_id, and part i of one table holds the same products in the same order as part i of every other.
"""

import hashlib
from collections.abc import Mapping

import pyarrow as pa

from catid2_ray.errors import InputError
from catid2_ray.tables import FILTER_TYPES, PRODUCTS


def products(width: int | None, filter_columns: Mapping[str, str] | None = None) -> pa.Schema:
    """PRODUCTS, the recipe's filter columns, and a float32 embedding column of `width` numbers where embeddings are given."""
    schema = PRODUCTS
    for name, kind in (filter_columns or {}).items():
        schema = schema.append(pa.field(name, FILTER_TYPES[kind]))
    return schema if width is None else schema.append(pa.field("embedding", pa.list_(pa.float32(), width)))


def embeddings(width: int, depth: int) -> pa.Schema:
    """One row a product: its part and place in it, its vector, its category id per depth (−1 = none)."""
    return pa.schema(
        [
            ("product_id", pa.string()),
            ("part", pa.int32()),
            ("index", pa.int32()),
            ("embedding", pa.list_(pa.float32(), width)),
            ("category", pa.list_(pa.int32(), depth)),
        ]
    )


def queries(width: int) -> pa.Schema:
    """One row a product, in the order of its embeddings: the vector of one training query that asks for it, if any."""
    return pa.schema([("product_id", pa.string()), ("query", pa.list_(pa.float32(), width)), ("has_query", pa.bool_())])


def matched(width: int) -> pa.Schema:
    """One row a pair of query and product: which they are (hashes of their text and id) and their vectors."""
    return pa.schema(
        [
            ("part", pa.int32()),
            ("index", pa.int32()),
            ("query", pa.int64()),
            ("product", pa.int64()),
            ("query_vector", pa.list_(pa.float32(), width)),
            ("product_vector", pa.list_(pa.float32(), width)),
        ]
    )


def ids(levels: int) -> pa.Schema:
    """The IDs: `moved` tells whether de-duplication changed the codes in this run, `cost` how much squared distance that added
    when the product got its ID. ledger/part-*.parquet beside them has the schema of `identifiers.ledger`."""
    return pa.schema(
        [
            ("product_id", pa.string()),
            ("codes", pa.list_(pa.int32(), levels)),
            ("docid", pa.string()),
            ("moved", pa.bool_()),
            ("cost", pa.float32()),
        ]
    )


def examples(tokens: int, levels: int) -> pa.Schema:
    """Generator training rows: `kind` counts in config.EXAMPLE_KINDS (0 = query, 1 = title, 2 = span, 3 = user, 4 = synthetic,
    5 = teacher), `input_ids` are padded at their end, `weight` is what the row counts in the loss. A part's rows lie kind after
    kind."""
    return pa.schema(
        [
            ("part", pa.int32()),
            ("index", pa.int32()),
            ("kind", pa.int8()),
            ("weight", pa.float32()),
            ("input_ids", pa.list_(pa.int32(), tokens)),
            ("codes", pa.list_(pa.int32(), levels)),
        ]
    )


def prompts(tokens: int, judged: int, *, scored: bool) -> pa.Schema:
    """Alignment's rows, one a query: `number` = part · 2^32 + index; per place of a judged ID (packed, −1 = none) its reward
    and how many relevant products it has; where a table of a ranker's scores is given, the IDs that it names."""
    more = [("scored", pa.list_(pa.int64(), judged)), ("score", pa.list_(pa.float32(), judged))] if scored else []
    return pa.schema(
        [
            ("part", pa.int32()),
            ("index", pa.int32()),
            ("number", pa.int64()),
            ("query", pa.string()),
            ("input_ids", pa.list_(pa.int32(), tokens)),
            ("judged", pa.list_(pa.int64(), judged)),
            ("reward", pa.list_(pa.float32(), judged)),
            ("relevant", pa.list_(pa.int32(), judged)),
            *more,
        ]
    )


def fingerprint(schema: pa.Schema) -> str:
    """Sixteen hex digits that change with any column's name or type."""
    return hashlib.sha256("\n".join(f"{f.name}: {f.type}" for f in schema).encode()).hexdigest()[:16]


def conform(table: pa.Table, schema: pa.Schema, *, where: str) -> pa.Table:
    """`table` with exactly the columns of `schema`, or InputError that names what differs and where."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise InputError(f"{where}: missing column {', '.join(missing)}; found {', '.join(table.column_names)}")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise InputError(f"{where}: a column does not fit the schema {schema.names}: {error}") from None
