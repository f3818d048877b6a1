"""Category paths from JSON lines in the manner of ESCI-S (github.com/shuttie/esci-s), of which most bytes are of no interest.

A line has `asin` (or `product_id`), `category` (names, top first) and perhaps `locale`; reviews and the rest are skipped by
Arrow's parser, which takes a block of lines at a time. A block that it refuses is read line by line instead, so that one
damaged line costs itself alone.
"""

import io
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from catid2_ray.catalog.columns import lists_of, plain
from catid2_ray.catalog.taxonomy import PATH_SEPARATOR
from catid2_ray.errors import InputError
from catid2_ray.tables import CATEGORY_PATH

LINES = pa.schema([("product_id", pa.string()), ("locale", pa.string()), ("category_path", CATEGORY_PATH)])
BLOCK_BYTES = 8 << 20
_LONGEST_LINE = 64 << 20
_FIELDS = pa.schema(
    [("asin", pa.string()), ("product_id", pa.string()), ("locale", pa.string()), ("category", CATEGORY_PATH)]
)


class CategoryLines(NamedTuple):
    """`table`: LINES; `lines` that were read, and those among them without a product id or that are no JSON object."""

    table: pa.Table
    lines: int
    unreadable: int


def blocks(stream, *, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Whole lines of a binary stream, about `size` bytes at a time; memory: one block, or the longest line.

    Raises InputError where there is no line break in 64 MiB.
    """
    rest = b""
    while data := stream.read(size):
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += data
        if len(rest) > _LONGEST_LINE:
            raise InputError(
                f"no line break in {_LONGEST_LINE >> 20} MiB: expected JSON lines, one object per product and line "
                f"(ESCI-S), found {rest[:40]!r}…"
            )
    if rest.strip():
        yield rest


def read_lines(block: bytes) -> CategoryLines:
    """The category paths of a block of lines, in their order; empty lines do not count. Locales in lower case."""
    options = pj.ParseOptions(explicit_schema=_FIELDS, unexpected_field_behavior="ignore")
    lines = sum(1 for line in block.split(b"\n") if line.strip())
    try:
        table = pj.read_json(io.BytesIO(block), pj.ReadOptions(block_size=max(len(block), 1) + 1), options)
        if table.num_rows != lines:  # several objects on one line, or one over several
            table = _line_by_line(block)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        table = _line_by_line(block)
    product_id = pc.coalesce(table["asin"], table["product_id"])
    paths = pa.table([product_id, pc.ascii_lower(table["locale"]), table["category"]], schema=LINES)
    paths = paths.filter(pc.fill_null(pc.not_equal(product_id, ""), False))
    return CategoryLines(paths, lines, lines - paths.num_rows)


def _line_by_line(block: bytes) -> pa.Table:
    """_FIELDS of every line that is an object of the expected types."""
    rows = []
    for line in block.split(b"\n"):
        try:
            value = json.loads(line)
            row = {name: value.get(name) for name in _FIELDS.names}
            if isinstance(row["category"], str):  # which Arrow would take for a list of letters
                continue
            pa.Table.from_pylist([row], schema=_FIELDS)
        except (ValueError, AttributeError, TypeError, pa.ArrowException):
            continue
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_FIELDS)


def best_paths(table: pa.Table) -> pa.Table:
    """product_id and category_path, one row a product: of several that which names its locale, then the deepest, then the first
    in order of its names. `table`: LINES, of one locale or without. Sorted by product_id; a pure function of the set of rows."""
    keys = pa.table(
        {
            "product_id": table["product_id"],
            "named": pc.cast(pc.is_valid(table["locale"]), pa.int8()),
            "depth": pc.fill_null(pc.list_value_length(table["category_path"]), 0),
            "path": pc.fill_null(pc.binary_join(_without_nulls(table["category_path"]), PATH_SEPARATOR), ""),
        }
    )
    order = pc.sort_indices(
        keys, [("product_id", "ascending"), ("named", "descending"), ("depth", "descending"), ("path", "ascending")]
    )
    ids = table["product_id"].take(order).to_numpy(zero_copy_only=False)
    first = np.concatenate((np.ones(min(len(ids), 1), bool), ids[1:] != ids[:-1]))
    return table.take(order.filter(pa.array(first))).select(["product_id", "category_path"])


def _without_nulls(column: pa.ChunkedArray) -> pa.Array:
    """Lists with "" for null names, over which Arrow would join to null."""
    column = plain(column)
    length_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return lists_of(length_N, pc.fill_null(pc.list_flatten(column), ""))
