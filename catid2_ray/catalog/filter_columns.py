"""Columns of the product table that the recipe names for filters: checked at the door, each of one plain type.

A column of another type than named is refused as a whole; in a row, a missing value stays missing and only an infinite
number is a fault. N rows.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.catalog.taxonomy import PATH_SEPARATOR
from catid2_ray.errors import InputError

TYPES = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "list<string>": pa.list_(pa.string()),
}


def check_columns(table: pa.Table, columns: Mapping[str, str]) -> tuple[dict[str, pa.Array], dict[str, np.ndarray]]:
    """({name: array of its type in TYPES}, {fault: bool N, rows that have it}).

    `columns`: name → key of TYPES. Names inside lists are stripped and empty ones left out; NaN is a missing value.
    Raises InputError for a column that is missing or whose values are of another type.
    """
    found, faults = {}, {}
    for name, kind in columns.items():
        if name not in table.column_names:
            raise InputError(
                f"product table: column {name} is missing, which catalog.filter_columns names; found "
                f"{', '.join(table.column_names)}. Add it, or take it out of catalog.filter_columns"
            )
        values = table[name].combine_chunks()
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
        found[name] = _typed(name, kind, values)
        if kind == "float":
            number_N = pc.fill_null(found[name], float("nan")).to_numpy(zero_copy_only=False)
            faults[f"{name} is infinite"] = np.isinf(number_N)
            found[name] = pa.array(number_N, pa.float64(), mask=np.isnan(number_N))
    return found, faults


def _typed(name: str, kind: str, values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    is_, given = pa.types, values.type
    fits = {
        "string": _is_text(given) or is_.is_integer(given),
        "int": is_.is_integer(given),
        "float": is_.is_floating(given) or is_.is_integer(given) or is_.is_decimal(given),
        "bool": is_.is_boolean(given),
        "list<string>": is_.is_nested(given) and hasattr(given, "value_type") and _is_text(_plain(given.value_type)),
    }
    if not (fits[kind] or is_.is_null(given)):
        raise InputError(
            f"product table: column {name} is {table_type(given)}, but catalog.filter_columns says {kind}: cast the column or "
            "correct the recipe"
        )
    try:
        values = values.cast(TYPES[kind])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"product table: column {name} cannot be read as {kind} ({error}); cast it") from error
    return _clean_lists(values) if kind == "list<string>" else values


def table_type(kind: pa.DataType) -> str:
    return str(kind).removeprefix("DataType").strip("()")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _clean_lists(lists: pa.Array) -> pa.Array:
    names = pc.utf8_trim_whitespace(pc.replace_substring(pc.list_flatten(lists), PATH_SEPARATOR, " "))
    kept_C = pc.fill_null(pc.not_equal(names, ""), False)
    row_C = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    length_N = np.bincount(row_C[kept_C.to_numpy(zero_copy_only=False)], minlength=len(lists))
    offsets = np.concatenate(([0], np.cumsum(length_N))).astype(np.int32)
    missing = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets), names.filter(kept_C), type=TYPES["list<string>"], mask=missing)
