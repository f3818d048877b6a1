"""Tables that were written as text: CSV, TSV and JSON lines, block by block, each column with the type that the house gives it.

Nothing is guessed: ids and texts stay as they were typed ("000123" keeps its zeros), numbers are numbers, and in CSV a list is
JSON: [0.1, 0.2] in `embedding`, ["a", "b"] in `user`. Columns that nobody asked for are not read.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from catid2_ray.catalog.columns import refuse_repeated
from catid2_ray.errors import InputError

_BLOCK = 16 << 20  # bytes read at a time
_NUMBERS = ("value", "relevance")
_LISTS = {"embedding": pa.float64(), "user": pa.string(), "recent": pa.string()}
_FILTERS = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
# Types of a key's values in JSON, and what they are as a column for filters.
_FROM_JSON = {
    frozenset({bool}): "bool", frozenset({int}): "int", frozenset({float}): "float", frozenset({int, float}): "float",
    frozenset({list}): "list<string>", frozenset({str}): "string",
}  # fmt: skip


def read_text(
    opened: Callable, *, format: str, columns: list[str], filter_columns: Mapping[str, str], where: str
) -> Iterator[pa.Table]:
    """The rows of one file in their order, as tables of those of `columns` that it has.

    `opened()` gives a new binary stream from the file's start; `format`: csv, tsv or jsonl; `filter_columns`: as the recipe
    has them. Raises InputError, naming `where`, for what cannot be read.
    """
    if format == "jsonl":
        return _json_lines(opened, columns, filter_columns, where)
    return _separated(opened, "\t" if format == "tsv" else ",", columns, filter_columns, where)


def columns_in(opened: Callable, *, format: str, where: str) -> dict[str, str | None]:
    """The columns of a file and their types as `catalog.filter_columns` names them: of JSON lines by the first 1,000 objects (keys
    of other or mixed values are texts), None in CSV, where all are texts. Raises InputError for what cannot be read."""
    try:
        with opened() as stream:
            if format != "jsonl":
                reading = pa.csv.ReadOptions(block_size=_BLOCK, use_threads=False)
                parsing = pa.csv.ParseOptions(delimiter="\t" if format == "tsv" else ",", newlines_in_values=True)
                names = pa.csv.open_csv(stream, reading, parsing, pa.csv.ConvertOptions(check_utf8=False)).schema.names
                refuse_repeated(names, what=where)
                return dict.fromkeys(names)
            lines = stream.read(_BLOCK).splitlines()[:1000]
        objects = [json.loads(line) for line in lines[: max(1, len(lines) - 1)] if line.strip()]
    except (pa.ArrowInvalid, ValueError) as error:
        raise InputError(f"{where} cannot be read as {format}: {error}") from None
    kinds: dict[str, set[type]] = {}
    for name, value in (item for one in objects for item in one.items() if item[1] is not None):
        kinds.setdefault(name, set()).add(type(value))
    return {name: _FROM_JSON.get(frozenset(types), "string") for name, types in kinds.items()}


def _separated(opened, delimiter: str, columns, filter_columns, where) -> Iterator[pa.Table]:
    lists = {**{name: kind for name, kind in _LISTS.items()}, **_list_filters(filter_columns)}
    types = {name: _FILTERS[kind] for name, kind in filter_columns.items() if kind in _FILTERS}
    types |= {name: pa.float64() if name in _NUMBERS else pa.string() for name in columns if name not in types}
    reading = pa.csv.ReadOptions(block_size=_BLOCK, use_threads=False)
    parsing = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        with opened() as stream:
            names = pa.csv.open_csv(stream, reading, parsing, pa.csv.ConvertOptions(check_utf8=False)).schema.names
        refuse_repeated(names, what=where)
        used = [name for name in names if name in columns]
        converting = pa.csv.ConvertOptions(
            check_utf8=False, column_types=types, include_columns=used, strings_can_be_null=True, null_values=[""]
        )
        if not used:
            yield pa.table({})
            return
        with opened() as stream:
            for batch in pa.csv.open_csv(stream, reading, parsing, converting):
                yield _with_lists(pa.Table.from_batches([batch]), lists, where)
    except pa.ArrowInvalid as error:
        raise InputError(f"{where} cannot be read as text with {delimiter!r} between columns: {error}") from None


def _with_lists(table: pa.Table, lists: Mapping[str, pa.DataType], where: str) -> pa.Table:
    for name in [name for name in table.column_names if name in lists]:
        texts = table[name].to_pylist()
        try:
            values = pa.array([None if text is None else json.loads(text) for text in texts], pa.list_(lists[name]))
        except (ValueError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
            example = "[0.1, 0.2]" if name == "embedding" else '["a", "b"]'
            first = next(text for text in texts if text is not None)
            raise InputError(
                f"{where}, column {name}: expected a list as JSON, such as {example}, found {first[:60]!r} ({error})"
            ) from None
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def _list_filters(filter_columns: Mapping[str, str]) -> dict[str, pa.DataType]:
    return {name: pa.string() for name, kind in filter_columns.items() if kind == "list<string>"}


def _json_lines(opened, columns, filter_columns, where) -> Iterator[pa.Table]:
    with opened() as stream:
        rest, before = b"", 0
        while True:
            block = stream.read(_BLOCK)
            lines, newline, rest = (rest + block).rpartition(b"\n") if block else (rest, b"", b"")
            if lines.strip():
                table = _parsed(lines + newline, columns, filter_columns, f"{where}, after row {before}")
                before += table.num_rows
                yield table
            if not block:
                return


def _parsed(lines: bytes, columns, filter_columns, where: str) -> pa.Table:
    """Ids may be texts or whole numbers and a path a list or a text, each alike in a block: so all four are tried."""
    fixed = {name: _FILTERS.get(kind, pa.list_(pa.string())) for name, kind in filter_columns.items()}
    fixed |= {name: pa.list_(kind) for name, kind in _LISTS.items()} | dict.fromkeys(_NUMBERS, pa.float64())
    first = None
    for id_type in (pa.string(), pa.int64()):
        for path_type in (pa.list_(pa.string()), pa.string()):
            types = {name: fixed.get(name, pa.string()) for name in columns}
            types |= {name: id_type for name in ("product_id", "query_id") if name in types}
            types |= {"category_path": path_type} if "category_path" in types else {}
            parsing = pa.json.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore")
            reading = pa.json.ReadOptions(block_size=len(lines) + 1, use_threads=False)
            try:
                return pa.json.read_json(io.BytesIO(lines), reading, parsing)
            except pa.ArrowInvalid as error:
                first = first or error
    raise InputError(
        f"{where}: not JSON lines that can be read: {first}. Write one object a line; ids as texts throughout, paths as lists"
    )
