"""Columns as many writers write them, made plain at the door: one chunk of strings, numbers or lists, and UTF-8 throughout.

Large, dictionary and view types become plain ones, also inside lists; tensor columns become the lists that they wrap. What
could mean two things is refused with the conversion to write. N rows.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError
from catid2_ray.scripts import says_something

NOT_UTF8 = "not UTF-8"  # the column that `plain_table` adds: the first column of a row that held other bytes
_LETTER = r"[\p{L}\p{N}]"
_UNDRAWN_LETTERS = "[\u115f\u1160\u3164\uffa0]"  # of category L, but drawn as nothing
_CONVERSIONS = (
    (pa.types.is_binary, "numpy.frombuffer(row, numpy.float32).tolist() for each row"),
    (pa.types.is_large_binary, "numpy.frombuffer(row, numpy.float32).tolist() for each row"),
    (pa.types.is_fixed_size_binary, "numpy.frombuffer(row, numpy.float32).tolist() for each row"),
    (pa.types.is_string, "json.loads(row) for each row"),
    (pa.types.is_struct, "write the list inside of the struct, such as table['{name}'].combine_chunks().field(0)"),
    (pa.types.is_list, "write one flat list a row, such as sum(row, [])"),
)


def require_columns(table: pa.Table, names: Sequence[str], *, what: str) -> None:
    """Raise InputError naming the columns that `table` lacks and those it has."""
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InputError(
            f"{what}: column {', '.join(missing)} is missing; found columns {', '.join(table.column_names) or 'none'}; "
            f"rename or add it, the table needs {', '.join(names)}"
        )


def refuse_repeated(names: Sequence[str], *, what: str) -> None:
    """Raise InputError where two columns have one name."""
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise InputError(
            f"{what}: {len(repeated)} column name{'s' if len(repeated) > 1 else ''} occur more than once, "
            f"{', '.join(repeated)}; which one counts cannot be told: drop or rename the others"
        )


def plain_table(table: pa.Table) -> pa.Table:
    """`table` with one chunk a column, and plain types: see the head of this file.

    Where a text has bytes that are not UTF-8, they become U+FFFD, and a column NOT_UTF8 names the first such column of each
    row (null in sound ones).
    """
    columns, broken = {}, np.full(table.num_rows, None, dtype=object)
    for name in table.column_names:
        column = plain(table[name])
        if name != NOT_UTF8:
            column, broken_N = _readable(column)
            broken[broken_N & np.equal(broken, None)] = name
        columns[name] = column
    if (found := pa.array(broken, pa.string())).null_count < len(found):
        columns[NOT_UTF8] = pc.coalesce(columns[NOT_UTF8], found) if NOT_UTF8 in columns else found
    return pa.table(columns) if columns else table


def plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One column as one chunk of a plain type; what has no plain type comes back as it is."""
    column = _one_chunk(column)
    if isinstance(column.type, pa.BaseExtensionType):
        return plain(_unwrapped(column))
    if pa.types.is_run_end_encoded(column.type):
        return plain(pc.run_end_decode(column))
    if pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
        # Arrow's own cast of views takes their offsets for those of lists.
        column = _lists(column, column.flatten())
    kind = plain_type(column.type)
    return column if kind == column.type else column.cast(kind)


def _one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        combined = combined.chunk(0) if combined.num_chunks else pa.array([], combined.type)
    return combined


def _unwrapped(column: pa.ExtensionArray) -> pa.Array:
    """UUIDs as text; of a tensor its numbers, whether all rows have one shape or each its own."""
    if str(column.type.extension_name) == "arrow.uuid":
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    storage = column.storage
    if pa.types.is_struct(storage.type) and {"data", "shape"} <= {field.name for field in storage.type}:
        return pc.struct_field(storage, "data")
    return storage


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, views and 64-bit offsets, also inside lists."""
    is_ = pa.types
    if is_.is_dictionary(kind):
        return plain_type(kind.value_type)
    if is_.is_large_string(kind) or is_.is_string_view(kind):
        return pa.string()
    if is_.is_large_list(kind) or is_.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    return kind


def _readable(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The column with other bytes than UTF-8 replaced, and bool N: the rows that had any."""
    sound_N = np.zeros(len(column), bool)
    nested = pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type)
    if not (nested or pa.types.is_string(column.type)):
        return column, sound_N
    try:
        column.validate(full=True)
        return column, sound_N
    except pa.ArrowInvalid:
        texts = column.flatten() if nested else column
    bytes_ = texts.cast(pa.binary()).to_pylist()
    broken_C = np.array([value is not None and not _is_utf8(value) for value in bytes_], bool)
    texts = pa.array([None if value is None else value.decode("utf-8", "replace") for value in bytes_], pa.string())
    if not nested:
        return texts, broken_C
    row_C = np.repeat(np.arange(len(column)), _lengths(column))
    return _lists(column, texts), np.bincount(row_C[broken_C], minlength=len(column)) > 0


def lists_of(length_N: np.ndarray, entries: pa.Array, *, missing: pa.Array | None = None) -> pa.Array:
    """Lists of so many of the entries each, one after the other; `missing`: bool N, null in their stead."""
    offsets = np.concatenate(([0], np.cumsum(length_N))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), entries, type=pa.list_(entries.type), mask=missing)


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)


def _lists(like: pa.Array, entries: pa.Array) -> pa.Array:
    """Plain lists of the lengths of `like`, and its nulls, with these entries one after the other."""
    return lists_of(_lengths(like), entries, missing=like.is_null() if like.null_count else None)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
        return True
    except UnicodeDecodeError:
        return False


def string_column(table: pa.Table, name: str) -> pa.Array:
    """One column as pa.string(), one chunk; strings, whole numbers and all-null columns pass."""
    column = plain(table[name])
    kind = column.type
    if pa.types.is_decimal(kind) and kind.scale <= 0:
        return column.cast(pa.string())
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_null(kind)):
        how = f"pyarrow.compute.cast(table['{name}'], pyarrow.string())"
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            how = f"pyarrow.compute.cast(table['{name}'], pyarrow.int64()) where they are whole numbers, else {how}"
        raise InputError(f"column {name}: expected strings, found {kind}; cast it to string: {how}")
    return column.cast(pa.string())


def number_column(table: pa.Table, name: str) -> pa.Array:
    """One column as float64, one chunk; whole numbers, floats, decimals and all-null columns pass."""
    column = plain(table[name])
    kind, is_ = column.type, pa.types
    if not (is_.is_integer(kind) or is_.is_floating(kind) or is_.is_decimal(kind) or is_.is_null(kind)):
        raise InputError(
            f"column {name}: expected numbers, found {kind}; cast it to double: pyarrow.compute.cast(table['{name}'], "
            "pyarrow.float64()), or give each name its number"
        )
    return column.cast(pa.float64(), safe=False)


def list_column(table: pa.Table, name: str, item: pa.DataType) -> pa.Array:
    """One column as lists of `item`, one chunk; lists of any type that can be read so pass."""
    column = plain(table[name])
    inner = getattr(column.type, "value_type", None)
    if pa.types.is_string(item) and (_is_binary(inner) or isinstance(inner, pa.BaseExtensionType)):
        raise InputError(
            f"column {name}: expected a list of {item} per row, found {column.type}; convert it: write lists of strings"
        )
    try:
        # Through numpy's rules a double beyond float32 becomes an infinity, which the check then names row by row.
        return column.cast(pa.list_(item), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        how = next((text for fits, text in _CONVERSIONS if fits(column.type)), "one list a row")
        raise InputError(
            f"column {name}: expected a list of {item} per row, found {column.type}; convert it: {how.format(name=name)}"
        ) from error


def _is_binary(kind: pa.DataType | None) -> bool:
    return kind is not None and any(fits(kind) for fits in (pa.types.is_binary, pa.types.is_large_binary))


def path_column(table: pa.Table, name: str, separator: str | None) -> pa.Array:
    """Category paths as lists of strings; where they are texts, cut at `separator`."""
    column = plain(table[name])
    if not pa.types.is_string(column.type):
        return list_column(table, name, pa.string())
    if separator is None:
        example = next((text for text in column.to_pylist() if text), "A > B")
        raise InputError(
            f"column {name}: expected a list of string per row, found string, such as {example[:80]!r}; set "
            "catalog.category_separator to what stands between two names, such as ' > ', or write lists"
        )
    return pc.split_pattern(column, separator)


def silent(column: pa.Array) -> np.ndarray:
    """bool N: texts that are missing, or of which no letter and no digit is left once they are normalised."""
    letters = pc.fill_null(pc.match_substring_regex(column, _LETTER), False)
    doubtful = pc.or_(pc.invert(letters), pc.fill_null(pc.match_substring_regex(column, _UNDRAWN_LETTERS), False))
    silent_N = np.zeros(len(column), bool)
    for row in np.flatnonzero(doubtful.to_numpy(zero_copy_only=False)):
        text = column[int(row)].as_py()
        silent_N[row] = text is None or not says_something(text)
    return silent_N


def commonest_width(lists: pa.Array) -> int | None:
    """The length that most of the lists have, those without an entry apart; None where there is none. Of two as common
    lengths the larger."""
    length_N = _lengths(lists).astype(np.int64)
    count_W = np.bincount(length_N[length_N > 0]) if (length_N > 0).any() else np.zeros(0, np.int64)
    return int(len(count_W) - 1 - np.argmax(count_W[::-1])) if len(count_W) else None
