"""A first recipe for a catalogue: what a bounded look at its tables shows goes to the arithmetic of `config.suggest`.

Of parquet tables the footers say how many rows there are, and a seeded choice of row groups what is in them; text files are read
from their beginning, a gigabyte at most, and counted on from there. Nothing is written, and no Ray is started.
"""

import os
from collections import Counter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog import first_look
from catid2_ray.catalog.columns import plain, silent
from catid2_ray.catalog.pairs import check_pairs
from catid2_ray.catalog.products import COLUMNS
from catid2_ray.catalog.table_files import TableFiles, partition_values
from catid2_ray.catalog.text_files import columns_in
from catid2_ray.config import Recipe, suggest
from catid2_ray.errors import InputError
from catid2_ray.on_ray.stages import source as sources
from catid2_ray.on_ray.stages.source import Columns
from catid2_ray.scripts import normalised
from catid2_ray.tables import PAIRS

_ROWS, _PAIRS = 50_000, 2_000_000  # that are looked at, at most
_TEXT_BYTES = 1 << 30  # of text files, read at most
_HTML = 0.05  # share of texts with HTML from which a column is left out


class Looked(NamedTuple):
    """`recipe`: YAML with comments; `found`: what there is, in a sentence or two; `store`: where the recipe's job would write."""

    recipe: str
    found: str
    store: str


def first_recipe(root: str) -> Looked:
    """A recipe for the catalogue below `root`, a folder or s3:// prefix.

    Raises StorageError where there is no table of products, InputError where a needed column is missing or a table cannot be
    read.
    """
    root = root if "://" in root else os.path.abspath(root)
    facts = look(root)
    pairs = sum(facts.grades.values())
    queries = f"{pairs:,} pairs of {facts.queries:,} queries" if pairs else "no pairs"
    about = "" if facts.exact else "about "
    found = f"{root} holds {about}{facts.products:,} products and {queries}. {facts.language}".strip()
    title = f"Written by `catid2 init`: {found} What the numbers come to, `catid2 check --recipe FILE` says."
    text = suggest.as_yaml(suggest.suggest(facts), title)
    recipe = Recipe.from_yaml(text, where="the recipe that was made")
    return Looked(text, found, recipe.store)


def look(root: str) -> suggest.Facts:
    """What a recipe needs to know of a catalogue."""
    source = Store(root)
    source.check()
    found = sources.products_of(source)
    types = _columns(source, found)
    _require(source, found, types, ("product_id", "title"))
    sample = _sample(source, found, types, rows=_ROWS)
    table, filters, left_out = sample.table, {}, {}
    for name in [name for name in table.column_names if name not in COLUMNS]:
        kind, why = first_look.filter_type(table[name])
        if kind:
            filters[name] = kind
        else:
            left_out[name] = why
    paths = _paths(table)
    texts, html = _texts(table, paths)
    return suggest.Facts(
        name=os.path.basename(root.rstrip("/")) or "catalogue", root=root, products=sample.rows, exact=sample.exact,
        separator=paths.separator, depth=paths.depth, texts=texts, html=html, given=_width(source, found, types),
        filters=filters, left_out=left_out, has_value="value" in types, language=first_look.language_of(_strings(table["title"])),
        cores=os.cpu_count() or 1, **_pairs(source),
    )  # fmt: skip


def _columns(source: Store, found: TableFiles) -> dict[str, str | None]:
    """The columns of the first file, and their types where the file says them in a way that the reading needs."""
    name = found.files[0]
    if found.format == "parquet":
        columns = dict.fromkeys(source.parquet_file(name).schema_arrow.names)
    else:
        columns = columns_in(lambda: sources.decompressed(source, name), format=found.format, where=source.uri_of(name))
    return columns | dict.fromkeys(partition_values(name), "string")


def _require(source: Store, found: TableFiles, types: dict, needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in types]
    if missing:
        hint = first_look.renaming(list(types), missing)
        raise InputError(
            f"{source.uri_of(found.files[0])}: missing column {', '.join(missing)}; found {', '.join(types)}. "
            + (hint or "Rename your columns to the house schema (docs/your-data.md)")
        )


class _Sample(NamedTuple):
    """`rows`: of the whole table, an estimate unless `exact`."""

    table: pa.Table
    rows: int
    exact: bool


def _sample(source: Store, found: TableFiles, types: dict, *, rows: int) -> _Sample:
    """At most about `rows` rows, with all columns but the embeddings."""
    names = [name for name in types if name != "embedding"]
    if found.format == "parquet":
        return _of_parquet(source, found, names, rows)
    of_folders = partition_values(found.files[0])
    names = [name for name in names if name not in of_folders]
    filters = {name: types[name] for name in names if types[name] and name not in (*COLUMNS, *PAIRS.names)}
    columns = Columns((), tuple(name for name in names if name not in filters), filters)
    kept, count, read, generator = [], 0, 0, np.random.default_rng(0)
    for name in found.files:
        if read > _TEXT_BYTES:
            break
        for block in sources.blocks(source, found, name, columns):
            count += block.num_rows
            chosen = np.sort(generator.permutation(block.num_rows)[: max(100, rows // 10)])
            if sum(part.num_rows for part in kept) < rows:
                kept.append(_with_partitions(block.take(pa.array(chosen)), name))
        read += source.size(name)
    total = sum(source.size(name) for name in found.files)
    return _Sample(_together(kept), round(count * total / max(1, read)), read == total)


def _of_parquet(source: Store, found: TableFiles, names: list[str], rows: int) -> _Sample:
    groups, total = [], 0
    for name in found.files:
        metadata = source.parquet_file(name).metadata
        total += metadata.num_rows
        groups += [(name, group) for group in range(metadata.num_row_groups)]
    kept = []
    for place in np.random.default_rng(0).permutation(len(groups)):
        name, group = groups[place]
        opened = source.parquet_file(name)
        table = opened.read_row_group(group, columns=[one for one in names if one in opened.schema_arrow.names])
        kept.append(_with_partitions(table, name))
        if sum(part.num_rows for part in kept) >= rows:
            break
    return _Sample(_together(kept), total, True)


def _with_partitions(table: pa.Table, file: str) -> pa.Table:
    for name, value in partition_values(file).items():
        if name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(value, pa.string()), table.num_rows))
    return table


def _together(parts: list[pa.Table]) -> pa.Table:
    tables = [pa.table({name: plain(part[name]) for name in part.column_names}) for part in parts if part.num_rows]
    return (
        pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({"product_id": [], "title": []})
    )


def _strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


class _Paths(NamedTuple):
    separator: str | None
    depth: int


def _paths(table: pa.Table) -> _Paths:
    if "category_path" not in table.column_names or table["category_path"].null_count == table.num_rows:
        return _Paths(None, 0)
    column = pc.drop_null(table["category_path"])
    separator = first_look.separator_of(column) if pa.types.is_string(column.type) else None
    return _Paths(separator, first_look.depth_of(column, separator))


def _texts(table: pa.Table, paths: _Paths) -> tuple[tuple[str, ...], dict[str, float]]:
    """The columns to embed, and those left out for their HTML with its share. The title stays, whatever is in it."""
    texts, html = ["title"], {}
    if paths.depth:
        texts.append("category_path")
    if "description" in table.column_names:
        column = _strings(table["description"])
        share = first_look.html_share(column)
        if share > _HTML:
            html["description"] = share
        elif not silent(column.combine_chunks()).all():
            texts.append("description")
    return tuple(texts), html


def _width(source: Store, found: TableFiles, types: dict) -> int | None:
    """Numbers of the first vector of the column embedding."""
    if "embedding" not in types:
        return None
    for column in sources.vectors(source, found, Columns((), COLUMNS)):
        for vector in column.to_pylist():
            if vector:
                return len(vector)
    return None


def _pairs(source: Store) -> dict:
    """What Facts says of the pairs: nothing where there are none."""
    found = sources.files_of(source, "pairs")
    if found is None:
        return {}
    types = _columns(source, found)
    _require(source, found, types, tuple(PAIRS.names))
    used = {name: kind for name, kind in types.items() if name in PAIRS.names}
    sample = _sample(source, found, used, rows=_PAIRS)
    good = check_pairs(sample.table).good if sample.table.num_rows else PAIRS.empty_table()
    if not good.num_rows:
        raise InputError(
            f"{source.uri_of(found.files[0])} holds no pair that can be used; `catid2 check` names the faults"
        )
    scale = sample.rows / max(1, sample.table.num_rows)
    train = good.filter(pc.field("split") == "train")
    texts = {
        split: {
            " ".join(normalised(text).split())
            for text in pc.unique(good.filter(pc.field("split") == split)["query"]).to_pylist()
        }
        for split in ("train", "test")
    }

    def counted(table: pa.Table, name: str) -> dict:
        return {value: round(count * scale) for value, count in Counter(table[name].to_pylist()).items()}

    return {
        "grades": counted(good, "relevance"), "splits": counted(good, "split"), "teaching": counted(train, "relevance"),
        "queries": pc.count_distinct(good["query_id"]).as_py(), "leaked": len(texts["train"] & texts["test"]),
    }  # fmt: skip
