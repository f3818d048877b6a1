"""The published ESCI files and a file of categories → products.parquet and pairs.parquet in the house schema.

One process and no cluster: the files are a few gigabytes, read once. Rows are shuffled by product through local files, so
memory holds a record batch, one of 64 parts (30,000 products of 1.8 M, about 60 MB) and the ids of the queries; the
temporary folder takes about as much as the texts of the locale. The result is the same bytes for any order of the rows.

products.parquet is written last and is the commit: no job can read a folder without it, and before it stands `esci.json`,
which says with size and digest what belongs to it.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from catid2_ray.artifacts.manifest import digest_of
from catid2_ray.artifacts.store import Store, sha256_of
from catid2_ray.catalog.sources import category_lines, esci, esci_rules
from catid2_ray.errors import InputError, StorageError
from catid2_ray.evaluation.report import NOTE, table_one
from catid2_ray.evaluation.tables import Table, markdown
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.stages.catalog import part_of

MANIFEST, REPORT = "esci.json", "table1.md"
_FORMAT = 1
_PARTS = 64
_BATCH_ROWS = 16_384
_BUFFER = 1 << 20
_MAX_UNREADABLE = 0.01  # share of the category lines
_CODECS = {".zst": "zstd", ".gz": "gzip"}
_PRODUCTS = pa.schema(
    [(name, pa.string()) for name in ("product_id", "title", "description")]
    + [("category_path", pa.list_(pa.string()))]
)


class Spill:
    """`parts` Arrow stream files in a folder, one per hash of `product_id`; rows of a part keep the order they came in.

    Write, then read: the first `read` ends writing. Holds `parts` open files.
    """

    def __init__(self, folder: Path, schema: pa.Schema, *, parts: int):
        self.folder, self.schema, self.parts = folder, schema, parts
        folder.mkdir(parents=True)
        self._writers: dict[int, pa.RecordBatchStreamWriter] = {}
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        part_N = part_of(table["product_id"], self.parts)
        order_N = np.argsort(part_N, kind="stable")
        bounds = np.searchsorted(part_N[order_N], np.arange(self.parts + 1)).tolist()
        ordered = table.take(pa.array(order_N)).combine_chunks()
        for part, (first, end) in enumerate(zip(bounds, bounds[1:])):
            if end > first:
                if part not in self._writers:
                    self._writers[part] = pa.ipc.new_stream(str(self._path(part)), self.schema)
                self._writers[part].write_table(ordered.slice(first, end - first))
        self.rows += table.num_rows

    def read(self, part: int) -> pa.Table:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        if not self._path(part).exists():
            return self.schema.empty_table()
        with pa.memory_map(str(self._path(part))) as source:
            return pa.ipc.open_stream(source).read_all()

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.arrows"


class Prepared(NamedTuple):
    """`made`: whether this run wrote it, or found it; `tables`: Table 1 and what was dropped, for a report."""

    root: str
    counts: dict
    tables: list[Table]
    made: bool


class _Inputs(NamedTuple):
    source: Store
    categories: Store
    categories_name: str
    locale: str
    version: str


def prepare_esci(
    source: str, categories: str, out: str, *, locale: str, version: str = "small", corpus: str = "judged",
    validation: float = 0.02, seed: int = 0, keep_unseen: bool = False,
) -> Prepared:  # fmt: skip
    """Prepare one locale and version of ESCI into `out`, a folder or s3:// prefix that becomes a recipe's `catalog.root`.

    `source`: folder or prefix with the two published parquet files; `categories`: JSON lines in the manner of ESCI-S, plain,
    .gz or .zst; the rest as in `esci_rules.Rules`. A rerun finds what it made. Raises InputError for a missing column, an
    unknown locale or version, categories that fit no product, no pair left, or an `out` that holds something else; StorageError
    for a missing file.
    """
    esci.check_choice("locale", locale, esci.LOCALES)
    esci.check_choice("version", version, esci.VERSIONS)
    esci.check_choice("corpus", corpus, esci_rules.CORPORA)
    if not 0 <= validation < 1:
        raise InputError(f"validation {validation}: expected a share of the training queries, 0 to below 1")
    rules = esci_rules.Rules(corpus, validation, seed, keep_unseen)
    folder, _, name = categories.rpartition("/")
    inputs = _Inputs(
        Store(source), Store(folder or ("/" if categories.startswith("/") else ".")), name, locale, version
    )
    target = Store(out)
    record = {
        "format": _FORMAT,
        "settings": {"locale": locale, "version": version, **rules._asdict()},
        "sources": _fingerprints(inputs),
    }
    earlier = _found(target, record)
    if earlier and _is_whole(target, earlier):
        return Prepared(target.uri, earlier["counts"], table_one(earlier["counts"], locale=locale), made=False)
    with scratch.folder("esci") as temporary:
        counts = _prepare(inputs, rules, temporary)
        tables = table_one(counts, locale=locale)
        _commit(target, temporary, {**record, "counts": counts}, tables, replace=earlier is not None)
    return Prepared(target.uri, counts, tables, made=True)


def _fingerprints(inputs: _Inputs) -> dict[str, str]:
    where = "https://github.com/amazon-science/esci-data has the data set"
    wanted = [(inputs.source, esci.PRODUCTS_FILE, where), (inputs.source, esci.EXAMPLES_FILE, where)]
    wanted.append(
        (inputs.categories, inputs.categories_name, "https://github.com/shuttie/esci-s has categories of ESCI")
    )
    for store, name, hint in wanted:
        if not name or not store.exists(name):
            raise StorageError(f"{store.uri_of(name)} does not exist; {hint}")
    columns = (
        (esci.PRODUCTS_FILE, esci.PRODUCT_COLUMNS),
        (esci.EXAMPLES_FILE, esci.example_columns(inputs.version)),
    )
    for name, needed in columns:
        present = inputs.source.parquet_file(name).schema_arrow.names
        if missing := [column for column in needed if column not in present]:
            raise InputError(
                f"{inputs.source.uri_of(name)}: missing column {', '.join(missing)}; found {', '.join(present)}. Take the file "
                "as it was published"
            )
    return {name: store.fingerprint(name) for store, name, _ in wanted}


def _found(target: Store, record: dict) -> dict | None:
    """The manifest in `target` if it is this preparation's; refuses a folder that holds anything else."""
    if not target.exists(MANIFEST):
        for name in ("products.parquet", "pairs.parquet", "products", "pairs"):
            if target.exists(name):
                raise InputError(
                    f"{target.uri_of(name)} exists without {MANIFEST} beside it, so it is no preparation of ESCI: choose "
                    "another --out"
                )
        return None
    earlier = json.loads(target.read(MANIFEST))
    differ = [
        f"{name} {earlier.get(part, {}).get(name)!r} instead of {value!r}"
        for part in ("settings", "sources")
        for name, value in record[part].items()
        if earlier.get(part, {}).get(name) != value
    ]
    if differ or earlier["format"] != record["format"]:
        raise InputError(
            f"{target.uri} holds another preparation of ESCI: {'; '.join(differ) or 'another format'}. Choose another --out, or "
            "delete that folder"
        )
    return earlier


def _is_whole(target: Store, earlier: dict) -> bool:
    sizes = target.sizes("")
    return all(sizes.get(entry["name"]) == entry["bytes"] for entry in earlier["files"])


def _prepare(inputs: _Inputs, rules: esci_rules.Rules, folder: Path) -> dict:
    """Write both tables into `folder`/out; the counts."""
    texts = Spill(folder / "texts", esci.TEXTS, parts=_PARTS)
    judged = Spill(folder / "judged", esci.JUDGEMENTS, parts=_PARTS)
    lines = Spill(folder / "lines", category_lines.LINES, parts=_PARTS)
    for table in _batches(inputs.source, esci.EXAMPLES_FILE, esci.example_columns(inputs.version), "judgements"):
        judged.write(esci.judgements(table, locale=inputs.locale, version=inputs.version))
    for table in _batches(inputs.source, esci.PRODUCTS_FILE, esci.PRODUCT_COLUMNS, "products"):
        texts.write(esci.product_texts(table, locale=inputs.locale))
    for spill, name in ((judged, esci.EXAMPLES_FILE), (texts, esci.PRODUCTS_FILE)):
        if not spill.rows:
            raise InputError(
                f"{inputs.source.uri_of(name)} has no row of locale {inputs.locale!r} in the {inputs.version} version"
            )
    counts = _read_categories(inputs, lines)
    (folder / "out").mkdir()
    queries = [esci_rules.QUERIES.empty_table()]
    with (
        _writer(folder / "out" / "products.parquet", _PRODUCTS) as products,
        _writer(folder / "out" / "pairs.parquet", esci_rules.JUDGED_PAIRS) as pairs,
        progress.bar("joining categories", texts.rows, "products") as shown,
    ):
        for part in range(_PARTS):
            prepared = esci_rules.prepare_part(texts.read(part), lines.read(part), judged.read(part), rules)
            products.write_table(prepared.products.select(_PRODUCTS.names).cast(_PRODUCTS))
            pairs.write_table(prepared.pairs)
            queries.append(prepared.queries)
            counts.update(prepared.counts)
            shown.advance(prepared.counts["products_read"])
    counts.update(esci_rules.query_counts(pa.concat_tables(queries)))
    _refuse_empty(inputs, counts)
    return dict(sorted(counts.items()))


def _batches(source: Store, name: str, columns: tuple[str, ...], unit: str) -> Iterator[pa.Table]:
    opened = source.parquet_file(name, buffer=_BUFFER)
    with progress.bar(f"reading {unit}", opened.metadata.num_rows, unit) as shown:
        for batch in opened.iter_batches(_BATCH_ROWS, columns=list(columns)):
            yield pa.table(batch)
            shown.advance(batch.num_rows)


def _read_categories(inputs: _Inputs, spill: Spill) -> Counter:
    """Spill the lines of the locale, and those that name none."""
    store, name, counts = inputs.categories, inputs.categories_name, Counter()
    codec = next((codec for ending, codec in _CODECS.items() if name.endswith(ending)), None)
    with progress.bar("reading categories", store.size(name) >> 20, "MiB") as shown, store.open_stream(name) as raw:
        stream = pa.CompressedInputStream(raw, codec) if codec else raw
        for block in category_lines.blocks(stream):
            read = category_lines.read_lines(block)
            ours = read.table.filter(
                pc.equal(pc.coalesce(read.table["locale"], pa.scalar(inputs.locale)), inputs.locale)
            )
            spill.write(ours)
            counts.update(
                lines_read=read.lines,
                lines_unreadable=read.unreadable,
                lines_of_other_locales=read.table.num_rows - ours.num_rows,
            )
            shown.show(raw.tell() >> 20)
    if counts["lines_unreadable"] > _MAX_UNREADABLE * counts["lines_read"]:
        raise InputError(
            f"{store.uri_of(name)}: {counts['lines_unreadable']:,} of {counts['lines_read']:,} lines are no JSON object with "
            "texts asin (or product_id) and locale and a list category; expected one object a line in the manner of ESCI-S"
        )
    return counts


@contextlib.contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield writer


def _refuse_empty(inputs: _Inputs, counts: Counter) -> None:
    corpus, matched = counts["products_in_corpus"], counts["products_with_category"]
    where = inputs.categories.uri_of(inputs.categories_name)
    if not matched:
        raise InputError(
            f"{where} gives none of the {corpus:,} products of locale {inputs.locale!r} a category: {counts['lines_read']:,} "
            f"lines, {counts['lines_of_other_locales']:,} of other locales. Is it a category file of this data set, keyed by asin?"
        )
    if matched < corpus / 2:
        progress.event("few_categories", products=corpus, with_category=matched, file=where)
    for split in ("train", "test"):
        if not counts[f"{split}_queries"]:
            dropped = {
                name: n for name, n in sorted(counts.items()) if name.startswith("dropped: ") or "unseen" in name
            }
            raise InputError(
                f"no {split} pair labelled E or S is left of {counts['judgements_read']:,} judgements: "
                f"{counts['judgements_of_dropped_products']:,} name dropped products ({matched:,} of {corpus:,} products have a "
                f"category); dropped: {dropped}. Check the category file, or lower --validation"
            )


def _commit(target: Store, folder: Path, record: dict, tables: list[Table], *, replace: bool) -> None:
    settings = record["settings"]
    text = f"# ESCI-{settings['locale']}, {settings['version']} version\n\n{markdown(tables)}\n{NOTE}\n"
    local = [folder / "out" / name for name in ("pairs.parquet", "products.parquet")]
    files = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in local]
    record = {
        **record,
        "files": files,
        "digest": digest_of([[entry["name"], entry["sha256"]] for entry in files]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (target.write if replace else target.create)(MANIFEST, json.dumps(record, indent=1, ensure_ascii=False).encode())
    target.write(REPORT, text.encode())
    for path in local:
        target.put(path, path.name)
