"""Which files are a table, and the values that their folders' names say: products.parquet, products/*.csv, products/market=de/….

Many writers make a folder of that name, and leave logs, check sums and half-written attempts beside the data: names that begin
with "_" or "." are no data (Spark's rule, by which a partition such as _x=1 is).
"""

from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote

from catid2_ray.errors import InputError

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
_COMPRESSED = ".gz"
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class TableFiles(NamedTuple):
    """`files`: their names below the root, sorted; `format`: parquet, csv, tsv or jsonl."""

    files: list[str]
    format: str


def is_table(entry: str, table: str) -> bool:
    """Whether an entry of the root may hold the table: products, products.parquet, products.csv.gz and so on."""
    return entry == table or (entry.startswith(f"{table}.") and format_of(entry) is not None)


def format_of(name: str) -> str | None:
    """By the end of a file's name; None for what no table is written as."""
    name = name.lower().removesuffix(_COMPRESSED)
    return next((kind for end, kind in FORMATS.items() if name.endswith(end)), None)


def table_files(names: Iterable[str], table: str, *, where: str) -> TableFiles | None:
    """The data among `names`, which begin with an entry that `is_table`; None where there is none.

    Raises InputError where there are two tables of that name, or files of several formats in one.
    """
    data = sorted(name for name in names if format_of(name) and not _is_hidden(name))
    entries = sorted({name.split("/")[0] for name in data})
    if len(entries) > 1:
        raise InputError(
            f"{where} holds {' and '.join(entries)}, and which of them is the table {table} cannot be told: move one away"
        )
    formats = sorted({format_of(name) for name in data})
    if len(formats) > 1:
        raise InputError(
            f"{where}/{entries[0]} holds files of several formats ({', '.join(formats)}): keep those of one"
        )
    return TableFiles(data, formats[0]) if data else None


def _is_hidden(name: str) -> bool:
    return any(step.startswith((".", "_")) and "=" not in step for step in name.split("/")[1:])


def partition_values(name: str) -> dict[str, str | None]:
    """The columns that the folders of a file stand for: {"market": "de"} of products/market=de/a.parquet."""
    steps = [step.partition("=") for step in name.split("/")[1:-1] if "=" in step]
    return {unquote(key): None if value == _NO_VALUE else unquote(value) for key, _, value in steps}
