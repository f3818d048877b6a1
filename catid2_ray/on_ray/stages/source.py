"""The tables of a catalogue as they lie at their source: which files, which columns, and pieces of them to be read at a time.

A piece is some row groups of a parquet file. Text files (CSV, TSV, JSON lines) are first written anew as parquet, a file a
worker, block by block, since no place inside of them can be read without all before it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.columns import plain, refuse_repeated
from catid2_ray.catalog.table_files import TableFiles, is_table, partition_values, table_files
from catid2_ray.catalog.text_files import read_text
from catid2_ray.errors import InputError, StorageError
from catid2_ray.on_ray.machine.parts import map_parts

_PIECE_ROWS = 262_144  # read at a time, or one row group of the source where that is larger
_FILTER_TYPES = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


class Columns(NamedTuple):
    """Of a table: `needed`, without which it is refused; `wanted`, all that are used where they are there; `filters`: further
    ones that are needed too, name → type as in `catalog.filter_columns`."""

    needed: tuple[str, ...]
    wanted: tuple[str, ...]
    filters: Mapping[str, str] = {}

    @property
    def all(self) -> list[str]:
        return [*self.wanted, *self.filters]


class Source(NamedTuple):
    """A table before it is read: its files, the columns that they share, and its pieces (see `read_piece`)."""

    files: list[str]
    columns: list[str]
    pieces: list[dict]

    @property
    def rows(self) -> int:
        return sum(piece["rows"] for piece in self.pieces)


def files_of(source: Store, table: str) -> TableFiles | None:
    """The table's files; None where there are none. Raises InputError where there are two tables of that name."""
    names = []
    for entry in source.names(""):
        if is_table(entry, table):
            below = source.sizes(entry)
            names += [f"{entry}/{name}" if name else entry for name in below] if below else [entry]
    return table_files(names, table, where=source.uri)


def products_of(source: Store) -> TableFiles:
    """As `files_of`, but StorageError where there is no table of products."""
    found = files_of(source, "products")
    if found is None:
        raise StorageError(
            f"no table 'products' in {source.uri}: expected products.parquet, .csv, .tsv or .jsonl, or a folder of that name "
            "or products/ with such files"
        )
    return found


def blocks(source: Store, found: TableFiles, name: str, columns: Columns) -> Iterator[pa.Table]:
    """The rows of one file, in their order, some at a time, with those of the columns that it has."""
    if found.format == "parquet":
        opened = source.parquet_file(name)
        present = [column for column in columns.all if column in opened.schema_arrow.names]
        for batch in opened.iter_batches(1024, columns=present):
            yield pa.Table.from_batches([batch])
        return
    yield from read_text(
        lambda: decompressed(source, name), format=found.format, columns=columns.all, filter_columns=columns.filters,
        where=source.uri_of(name),
    )  # fmt: skip


@contextmanager
def decompressed(source: Store, name: str):
    """A binary stream of a file, from its start."""
    with source.open_stream(name) as stream:
        yield pa.CompressedInputStream(stream, "gzip") if name.lower().endswith(".gz") else stream


def names_of(source: Store, found: TableFiles, columns: Columns) -> list[str]:
    """The columns of the first file, without reading more of it than its beginning."""
    name = found.files[0]
    if found.format == "parquet":
        return [*source.parquet_file(name).schema_arrow.names, *partition_values(name)]
    for block in blocks(source, found, name, columns):
        return [column for column in block.column_names if _is_there(block[column], found.format)]
    return []


def _is_there(column: pa.ChunkedArray, format: str) -> bool:
    """A key that no object of JSON lines has is no column."""
    return format != "jsonl" or column.null_count < len(column)


def inspect(
    source: Store, found: TableFiles | None, columns: Columns, *, store: Store, exchange: str, workers: int, label: str
) -> Source:
    """The table's pieces; text files are written anew below `exchange` in `store`.

    Raises InputError where a needed column is missing, two have one name, or a used one is in some files only.
    """
    if found is None:
        return Source([], [], [])
    if found.format == "parquet":
        described = [_describe(source, name) for name in found.files]
    else:
        specs = [{"file": name, "rows": source.size(name)} for name in found.files]
        arguments = {"source": source, "found": found, "columns": columns, "store": store, "exchange": exchange}
        described = map_parts(_Convert, arguments, specs, workers=workers, label=label, unit="bytes")
    shared = None
    if found.format == "jsonl":  # an object need not have every key, so that a column may be in some files only
        everywhere = list(dict.fromkeys(name for each in described for name in each["columns"]))
        described = [{**each, "columns": everywhere} for each in described]
    for name, each in zip(found.files, described):
        present = [*each["columns"], *partition_values(name)]
        refuse_repeated(each["columns"], what=source.uri_of(name))
        missing = sorted({*columns.needed, *columns.filters} - set(present))
        if missing:
            raise InputError(
                f"{source.uri_of(name)}: missing column {', '.join(missing)}; found {', '.join(present)}. "
                "Rename your columns to the house schema (docs/your-data.md), or correct catalog.filter_columns"
            )
        used = [column for column in columns.all if column in present]
        if shared is not None and used != shared:
            raise InputError(
                f"{source.uri_of(name)} has the columns {', '.join(used)}, but {source.uri_of(found.files[0])} has "
                f"{', '.join(shared)}: all files of a table must agree"
            )
        shared = used
    return Source(found.files, shared or [], [piece for each in described for piece in each["pieces"]])


def _describe(source: Store, name: str) -> dict:
    """A parquet file's columns and pieces, by its footer."""
    opened, pieces = source.parquet_file(name), []
    for group in range(opened.metadata.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        if not pieces or pieces[-1]["rows"] + rows > _PIECE_ROWS:
            pieces.append({"file": name, "of": name, "groups": [], "rows": 0})
        pieces[-1]["groups"].append(group)
        pieces[-1]["rows"] += rows
    return {"columns": opened.schema_arrow.names, "pieces": pieces}


class _Convert:
    """Worker: a text file in, parquet files of some blocks each out."""

    def __init__(self, *, source: Store, found: TableFiles, columns: Columns, store: Store, exchange: str):
        self.source, self.found, self.columns = source, found, columns
        self.store, self.exchange = store, exchange

    def __call__(self, spec: dict) -> dict:
        pieces, present = [], []
        for number, block in enumerate(blocks(self.source, self.found, spec["file"], self.columns)):
            there = [name for name in block.column_names if _is_there(block[name], self.found.format)]
            present += [name for name in there if name not in present]
            # A key that only the folder's name says would else be read as one that no row has.
            block = block.drop_columns(
                [name for name in partition_values(spec["file"]) if name not in there and name in block.column_names]
            )
            if block.num_rows:
                name = f"{self.exchange}-{spec['position']:05d}-{number:05d}.parquet"
                entry = self.store.write_table(name, block)
                pieces.append({"file": name, "of": spec["file"], "groups": None, "rows": entry["rows"]})
        return {"position": spec["position"], "columns": present, "pieces": pieces}


def read_piece(
    source: Store, store: Store, piece: dict, columns: Iterable[str], filters: Mapping[str, str]
) -> pa.Table:
    """The rows of a piece with these columns; those that the folders' names say have one value throughout."""
    written_anew = piece["groups"] is None
    opened = (store if written_anew else source).parquet_file(piece["file"])
    groups = range(opened.metadata.num_row_groups) if written_anew else piece["groups"]
    present = [name for name in columns if name in opened.schema_arrow.names]
    table = opened.read_row_groups(list(groups), columns=present)
    said = partition_values(piece["of"])
    for name in columns:
        if name in table.column_names:
            continue
        kind = pa.float64() if name in ("value", "relevance") else _FILTER_TYPES.get(filters.get(name), pa.string())
        try:
            value = pa.scalar(said.get(name), pa.string()).cast(kind)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{source.uri_of(piece['of'])}: its folder says {name}={said[name]}, which is no {kind} ({error})"
            ) from None
        table = table.append_column(name, pa.repeat(value, table.num_rows))
    return table


def vectors(source: Store, found: TableFiles, columns: Columns) -> Iterator[pa.Array]:
    """The embedding column of the files' first blocks, as plain as it can be made."""
    for name in found.files:
        for block in blocks(source, found, name, columns):
            if block.num_rows:
                yield plain(block["embedding"])
                break
