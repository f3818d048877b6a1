"""The product table's check at the door: good rows in the house schema, bad rows set aside with one reason each.

Everything is a column operation, so a million rows take seconds. A row is judged by its own faults first and as a
duplicate only afterwards: of two rows with one id, of which one has no title, the one with a title stays. A column for filters
that has another type than the recipe names is refused as a whole; in a row, a missing value of it stays missing.

N rows.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.catalog.columns import (
    NOT_UTF8,
    list_column,
    lists_of,
    number_column,
    path_column,
    plain,
    plain_table,
    refuse_repeated,
    require_columns,
    silent,
    string_column,
)
from catid2_ray.catalog.taxonomy import PATH_SEPARATOR
from catid2_ray.errors import InputError
from catid2_ray.tables import FILTER_TYPES

COLUMNS = ("product_id", "title", "description", "category_path", "value", "embedding")
_SEPARATOR = ". "  # between texts of a product


class Checked(NamedTuple):
    """`good`: house schema, sorted by product_id. `bad`: product_id, reason, title. `cut_paths`: good rows cut."""

    good: pa.Table
    bad: pa.Table
    cut_paths: int


def check_products(
    table: pa.Table, *, width: int | None, min_category_depth: int, max_category_depth: int,
    filter_columns: Mapping[str, str] | None = None, category_separator: str | None = None,
) -> Checked:  # fmt: skip
    """Split a product table of N rows into good and bad rows.

    `table`: product_id and title (strings; integers are taken as ids), optionally description (string), category_path
    (list of strings, root first, or one text with `category_separator` between two names), value (number: what the
    business gains by the product, larger = more), embedding (list of floats). `width`: the embeddings' width D, or None
    where the table's embeddings are not used. Depths count category names from the root. `filter_columns`: further
    columns to keep, name → type, as `catalog.filter_columns` reads them.

    The good table has product_id, title, description (null where unknown), category_path (cut to
    `max_category_depth`, empty where unknown), value (float32, null where unknown), the filter columns and, with a width,
    embedding (fixed_size_list<float32>[D]). Names and texts are stripped; an empty category name ends its path; product ids
    stay as they are. Of the rows with one product_id that have no other fault, the first by (title, description,
    category_path, embedding) stays, so neither result depends on the order of the rows.

    Raises InputError when a required column is missing or of a type that cannot be read.
    """
    required = ("product_id", "title") if width is None else ("product_id", "title", "embedding")
    require_columns(table, required, what="product table")
    refuse_repeated(table.column_names, what="product table")
    used = {*COLUMNS, *(filter_columns or {}), NOT_UTF8} - ({"embedding"} if width is None else set())
    table = plain_products(
        table.select([name for name in table.column_names if name in used]), separator=category_separator
    )
    rows = table.num_rows
    product_id = table["product_id"].combine_chunks()
    title = pc.utf8_trim_whitespace(table["title"].combine_chunks())
    description = _description(table)
    path, depth_N = _clean_paths(table, max_category_depth)

    reason = np.full(rows, None, dtype=object)
    if NOT_UTF8 in table.column_names:
        broken_N = table[NOT_UTF8].is_valid().to_numpy()
        _mark(reason, broken_N, [f"{name} is {NOT_UTF8}" for name in table[NOT_UTF8].drop_null().to_pylist()])
    _mark(reason, _blank(product_id), "missing product_id")
    _mark(reason, silent(title), "empty title")
    columns = {"product_id": product_id, "title": title, "description": description, "category_path": path}
    columns["value"] = _value(table, reason)
    kept, faults = check_columns(table, filter_columns or {})
    for text, fault_N in faults.items():
        _mark(reason, fault_N, text)
    if width is not None:
        columns["embedding"] = _check_embeddings(table["embedding"].combine_chunks(), width, reason)
    shallow_N = depth_N < min_category_depth
    _mark(
        reason,
        shallow_N,
        [
            f"category path of depth {d}, shorter than min_category_depth {min_category_depth}"
            for d in depth_N[shallow_N]
        ],
    )
    columns |= kept
    _mark_duplicates(reason, columns)

    good_N = np.equal(reason, None)
    good = pa.table(columns).filter(pa.array(good_N)).sort_by("product_id")
    bad = pa.table({"product_id": product_id, "reason": pa.array(reason, pa.string()), "title": title})
    bad = bad.filter(pa.array(~good_N)).sort_by([(name, "ascending") for name in bad.column_names])
    return Checked(good, bad, int(np.count_nonzero(good_N & (depth_N > max_category_depth))))


def plain_products(table: pa.Table, *, separator: str | None = None) -> pa.Table:
    """`table` with the types that `check_products` works on, one by one: ids and texts as strings, paths as lists, numbers as
    float64, embeddings as lists of float32; other columns plain. See `columns.plain_table` for texts that are not UTF-8.

    `separator`: what stands between two names of a category path that is one text. Raises InputError for what cannot be read.
    """
    table = plain_table(table)
    read = {
        **{name: string_column for name in ("product_id", "title", "description")},
        "category_path": partial(path_column, separator=separator),
        "value": number_column,
        "embedding": partial(list_column, item=pa.float32()),
    }
    return pa.table({name: read[name](table, name) if name in read else table[name] for name in table.column_names})


def joined(parts: Sequence[pa.Array | pa.ChunkedArray]) -> pa.Array | pa.ChunkedArray:
    """Texts of several columns joined row by row with ". "; null and empty parts are left out."""
    # Arrow's own joining that skips nulls drops rows that are null throughout, so each part brings its separator.
    parts = [pc.fill_null(part, "") for part in parts]
    parts = [pc.if_else(pc.equal(part, ""), "", pc.binary_join_element_wise(_SEPARATOR, part, "")) for part in parts]
    return pc.utf8_slice_codeunits(pc.binary_join_element_wise(*parts, ""), len(_SEPARATOR))


def or_null(column: pa.Array) -> pa.Array:
    """Strings, null where they are empty."""
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _blank(column: pa.Array) -> np.ndarray:
    blank = pc.equal(pc.utf8_trim_whitespace(column), "")
    return pc.fill_null(blank, True).to_numpy(zero_copy_only=False)


def _mark(reason: np.ndarray, fault_N: np.ndarray, text) -> None:
    """Give rows with a fault their reason, unless they have one. `text`: one for all, or one per faulty row."""
    texts = np.full(fault_N.shape, None, dtype=object)
    texts[fault_N] = text
    first_N = fault_N & np.equal(reason, None)
    reason[first_N] = texts[first_N]


def _description(table: pa.Table) -> pa.Array:
    if "description" not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    return or_null(pc.utf8_trim_whitespace(table["description"].combine_chunks()))


def _value(table: pa.Table, reason: np.ndarray) -> pa.Array:
    """float32, null where there is no value or it is NaN; an infinite one is a fault of the row."""
    if "value" not in table.column_names:
        return pa.nulls(table.num_rows, pa.float32())
    column = table["value"].combine_chunks()
    value_N = pc.fill_null(column.cast(pa.float32(), safe=False), float("nan")).to_numpy(zero_copy_only=False)
    _mark(reason, np.isinf(value_N), "value is infinite")
    return pa.array(value_N, pa.float32(), mask=np.isnan(value_N))


def _clean_paths(table: pa.Table, max_depth: int) -> tuple[pa.Array, np.ndarray]:
    """The stripped paths cut to `max_depth`, and int64 N, each path's depth before the cut."""
    rows = table.num_rows
    if "category_path" not in table.column_names:
        return lists_of(np.zeros(rows, np.int64), pa.array([], pa.string())), np.zeros(rows, np.int64)
    column = table["category_path"].combine_chunks()
    length_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    names = pc.replace_substring(pc.list_flatten(column), PATH_SEPARATOR, " ")
    names = pc.fill_null(pc.utf8_trim_whitespace(names), "")
    row_C = np.repeat(np.arange(rows), length_N)
    position_C = np.arange(len(names)) - (np.cumsum(length_N) - length_N)[row_C]
    empty_C = pc.equal(names, "").to_numpy(zero_copy_only=False)
    depth_N = length_N.copy()
    np.minimum.at(depth_N, row_C[empty_C], position_C[empty_C])
    kept_N = np.minimum(depth_N, max_depth)
    return lists_of(kept_N, names.filter(pa.array(position_C < kept_N[row_C]))), depth_N


def _check_embeddings(column: pa.Array, width: int, reason: np.ndarray) -> pa.Array:
    """Mark rows whose embedding is unusable; the others' vectors as fixed_size_list<float32>[width], N rows."""
    length_N = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    _mark(reason, length_N < 1, "embedding missing")
    wrong_N = length_N != width
    _mark(reason, wrong_N, [f"embedding of width {w} instead of {width}" for w in length_N[wrong_N]])
    right_N = ~wrong_N
    values = pc.list_flatten(column.filter(pa.array(right_N))).to_numpy(zero_copy_only=False)
    vector_ND = np.zeros((len(column), width), np.float32)
    vector_ND[right_N] = values.reshape(-1, width)
    _mark(reason, ~np.isfinite(vector_ND).all(1), "embedding with NaN or infinity")
    _mark(reason, right_N & ~vector_ND.any(1), "embedding of all zeros")
    return pa.FixedSizeListArray.from_arrays(pa.array(vector_ND.ravel()), width)


def _mark_duplicates(reason: np.ndarray, columns: dict[str, pa.Array]) -> None:
    """Mark all but one of the rows that share a product_id; only rows without another fault compete."""
    candidate = np.flatnonzero(np.equal(reason, None))
    _, group, count = np.unique(
        columns["product_id"].take(pa.array(candidate)).dictionary_encode().indices.to_numpy(zero_copy_only=False),
        return_inverse=True,
        return_counts=True,
    )
    candidate = candidate[count[group] > 1]
    if not candidate.size:
        return
    keys = {name: column.take(pa.array(candidate)) for name, column in columns.items()}
    for name, column in keys.items():
        if pa.types.is_list(column.type):
            keys[name] = pc.binary_join(column, PATH_SEPARATOR)
    if "embedding" in keys:
        width = keys["embedding"].type.list_size
        data = np.ascontiguousarray(keys["embedding"].flatten().to_numpy(zero_copy_only=False))
        keys["embedding"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(4 * width), len(candidate), [None, pa.py_buffer(data)]
        )
    order = pc.sort_indices(pa.table(keys), [(name, "ascending") for name in keys]).to_numpy()
    ids = keys["product_id"].take(pa.array(order)).to_numpy(zero_copy_only=False)
    repeated = np.concatenate(([False], ids[1:] == ids[:-1]))
    reason[candidate[order[repeated]]] = "duplicate product_id"


def check_columns(table: pa.Table, columns: Mapping[str, str]) -> tuple[dict[str, pa.Array], dict[str, np.ndarray]]:
    """({name: array of its type in FILTER_TYPES}, {fault: bool N, rows that have it}).

    `columns`: name → key of FILTER_TYPES. Names inside lists are stripped and empty ones left out; NaN is a missing value.
    Raises InputError for a column that is missing or whose values are of another type.
    """
    checked, faults = {}, {}
    for name, kind in columns.items():
        if name not in table.column_names:
            raise InputError(
                f"product table: column {name} is missing, which catalog.filter_columns names; found "
                f"{', '.join(table.column_names)}. Add it, or take it out of catalog.filter_columns"
            )
        checked[name] = _typed(name, kind, plain(table[name]))
        if kind == "float":
            number_N = pc.fill_null(checked[name], float("nan")).to_numpy(zero_copy_only=False)
            faults[f"{name} is infinite"] = np.isinf(number_N)
            checked[name] = pa.array(number_N, pa.float64(), mask=np.isnan(number_N))
    return checked, faults


def _typed(name: str, kind: str, values: pa.Array) -> pa.Array:
    is_, given = pa.types, values.type
    fits = {
        "string": is_.is_string(given) or is_.is_integer(given),
        "int": is_.is_integer(given),
        "float": is_.is_floating(given) or is_.is_integer(given) or is_.is_decimal(given),
        "bool": is_.is_boolean(given),
        "list<string>": is_.is_list(given) and (is_.is_string(given.value_type) or is_.is_null(given.value_type)),
    }
    if not (fits[kind] or is_.is_null(given)):
        given_as = str(given).removeprefix("DataType").strip("()")
        raise InputError(
            f"product table: column {name} is {given_as}, but catalog.filter_columns says {kind}: cast the column or "
            "correct the recipe"
        )
    try:
        values = values.cast(FILTER_TYPES[kind])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"product table: column {name} cannot be read as {kind} ({error}); cast it") from error
    return _clean_lists(values) if kind == "list<string>" else values


def _clean_lists(lists: pa.Array) -> pa.Array:
    names = pc.utf8_trim_whitespace(pc.replace_substring(pc.list_flatten(lists), PATH_SEPARATOR, " "))
    kept_C = pc.fill_null(pc.not_equal(names, ""), False)
    row_C = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    length_N = np.bincount(row_C[kept_C.to_numpy(zero_copy_only=False)], minlength=len(lists))
    return lists_of(length_N, names.filter(kept_C), missing=lists.is_null() if lists.null_count else None)
