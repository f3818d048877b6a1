"""Stage 0a: read the source tables once, check every row at the door, and lay products and pairs out in parts.

A row's part is a hash of its product_id, for products and pairs alike. Three things follow: the layout is a pure function
of the set of rows, duplicates meet in one part, and later joins of pairs with products are local to a part. Parts are also
uniform random samples of the catalogue, which fits of bounded size use.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray import tables
from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import check_pairs
from catid2_ray.catalog.products import check_products
from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.config import CatalogRecipe
from catid2_ray.errors import InputError
from catid2_ray.hashing import hash_of_text
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.parts import map_parts

PAIRS = "pairs/part-"  # how the names of files of pairs begin
_NAMED_BAD_ROWS = 10
_PIECE_ROWS = 262_144  # read at a time, or one row group of the source where that is larger


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The catalog artefact: products in part-*.parquet, what was set aside in rejected/, taxonomy.json."""
    recipe, width = job.recipe.catalog, _given_width(job)
    settings = {**recipe.identity(), "width": width}
    if not recipe.filter_columns:
        del settings["filter_columns"]  # so that catalogues without any are those of before
    if recipe.root is not None:
        settings["source"] = _fingerprints(recipe.root, "products")
    return job.produce("catalog", settings, {}, lambda attempt: _make_products(job, attempt, width))


def run_pairs(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The pairs artefact: pairs/part-*.parquet, in part i those that name products of part i of the catalogue, and what was
    set aside in rejected/. An artefact of its own: new pairs leave all that is made of products alone as it is."""
    recipe = job.recipe.catalog
    settings, parents = recipe.pairs_identity(), STAGES["pairs"].reads(parts)
    if recipe.root is not None:
        settings["source"] = _fingerprints(recipe.root, "pairs")
        if _logged(Store(recipe.root)):
            settings["behaviour"] = True
    return job.produce("pairs", settings, parents, lambda attempt: _make_pairs(job, attempt, parents["catalog"]))


def _fingerprints(root: str, table: str) -> list[list[str]]:
    source = Store(root)
    source.check()
    return [[name, source.fingerprint(name)] for name in _files(source, table)]


def _files(source: Store, table: str) -> list[str]:
    """The table's files; pairs may be missing, since codes and IDs need none."""
    if table == "pairs" and not (source.exists("pairs.parquet") or source.exists("pairs")):
        return []
    return source.parquet_files(table)


def _logged(source: Store) -> bool:
    """Whether the pairs say what searchers did."""
    files = _files(source, "pairs")
    return bool(files) and "behaviour" in source.parquet_file(files[0]).schema_arrow.names


def _given_width(job: Job) -> int | None:
    """Width of the embedding column, or None when embeddings are computed."""
    embedding, root = job.recipe.embedding, job.recipe.catalog.root
    if embedding.source == "encoder" or root is None:
        if embedding.source == "given":
            raise InputError("embedding.source is 'given', but the generated catalogue has no embedding column")
        return None
    source = Store(root)
    name = source.parquet_files("products")[0]
    opened = source.parquet_file(name)
    schema = opened.schema_arrow
    if "embedding" not in schema.names:
        if embedding.source == "given":
            raise InputError(
                f"embedding.source is 'given', but {source.uri_of(name)} has no column 'embedding'; "
                f"found {', '.join(schema.names)}. Add it (list<float>) or set embedding.source=encoder"
            )
        return None
    if embedding.width:
        return embedding.width
    kind = schema.field("embedding").type
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size
    for batch in opened.iter_batches(1024, columns=["embedding"]):
        lengths = batch.column(0).drop_null().value_lengths()
        if len(lengths):
            return lengths[0].as_py()
    raise InputError(
        f"{source.uri_of(name)}: the column 'embedding' holds no vector; set embedding.source=encoder to compute"
    )


@contextlib.contextmanager
def _source(job: Job, attempt: Attempt) -> Iterator[Store]:
    """Where the tables lie; a generated catalogue is written for the time of the reading."""
    recipe = job.recipe.catalog
    if recipe.synthetic is None:
        yield Store(recipe.root)
        return
    wanted = recipe.synthetic
    generated = generate(products=wanted.products, queries=wanted.queries, seed=wanted.seed)
    for table in ("products", "pairs"):
        job.store.write_table(attempt.name(f"source/{table}.parquet"), getattr(generated, table))
    yield Store(f"{job.store.uri}/{attempt.name('source')}")
    job.store.delete_folder(attempt.name("source"))


def _make_products(job: Job, attempt: Attempt, width: int | None) -> Manifest:
    recipe = job.recipe.catalog
    with _source(job, attempt) as source:
        table = _inspect(source, "products", _WriteProducts, recipe.filter_columns)
        if table.rows == 0:
            raise InputError(f"the catalogue {source.uri} is empty: products has no rows")
        part_count = -(-table.rows // recipe.rows_per_part)
        arguments = {"store": job.store, "folder": attempt.folder, "recipe": recipe, "width": width}
        products = _partition(source, table, part_count, _WriteProducts, arguments)
    _refuse_bad(source, "products", table.rows, products, recipe)
    job.store.delete_folder(attempt.name("exchange"))

    paths = Counter()
    for result in products:
        paths.update({tuple(path): count for path, count in result["paths"]})
    taxonomy = Taxonomy.build(paths, depth=recipe.max_category_depth)
    files = [job.store.write_file(attempt.name("taxonomy.json"), taxonomy.to_json().encode())]
    files += [entry for result in products for entry in result["files"]]
    good = _total(products, "good")
    metrics = {
        "products": good,
        "parts": part_count,
        "products_set_aside": _total(products, "bad"),
        "reasons": _reasons(products),
        "paths_cut": _total(products, "cut_paths"),
        "categories": list(taxonomy.sizes),
        "taxonomy": taxonomy.digest,
        "width": width,
    }
    return attempt.commit(
        files, rows=good, schema=schemas.fingerprint(schemas.products(width, recipe.filter_columns)), metrics=metrics
    )


def _make_pairs(job: Job, attempt: Attempt, catalog: Manifest) -> Manifest:
    recipe, pairs = job.recipe.catalog, []
    with _source(job, attempt) as source:
        table = _inspect(source, "pairs", _WritePairs)
        if table.rows:
            arguments = {"store": job.store, "folder": attempt.folder, "recipe": recipe, "width": None}
            pairs = _partition(source, table, catalog.metrics["parts"], _WritePairs, arguments)
    _refuse_bad(source, "pairs", table.rows, pairs, recipe)
    job.store.delete_folder(attempt.name("exchange"))
    metrics = {
        "pairs_table": bool(table.files),
        "pairs": _total(pairs, "good"),
        "behaviour": "behaviour" in table.columns,
        "train_relevance_max": max((result["train_relevance_max"] for result in pairs), default=0.0),
        "pairs_duplicate": _total(pairs, "duplicates"),
        "pairs_set_aside": _total(pairs, "bad"),
        "reasons": _reasons(pairs),
    }
    files = [entry for result in pairs for entry in result["files"]]
    return attempt.commit(files, rows=metrics["pairs"], metrics=metrics)


def _total(results: list[dict], name: str) -> int:
    return sum(result[name] for result in results)


def _reasons(results: list[dict]) -> dict[str, int]:
    return dict(sum((Counter(result["reasons"]) for result in results), Counter()))


class _Source(NamedTuple):
    """A source table before it is read: its files, the columns that they share, and pieces of them to be read at a time."""

    files: list[str]
    columns: list[str]
    pieces: list[dict]

    @property
    def rows(self) -> int:
        return sum(piece["rows"] for piece in self.pieces)


def _inspect(source: Store, table: str, writer: type, more: Iterable[str] = ()) -> _Source:
    """Read every footer. InputError where a needed column (`more` among them) is missing, or a used one is in some files
    only."""
    files, pieces, columns = _files(source, table), [], None
    for name in files:
        opened = source.parquet_file(name)
        for group in range(opened.metadata.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if not pieces or pieces[-1]["file"] != name or pieces[-1]["rows"] + rows > _PIECE_ROWS:
                pieces.append({"file": name, "groups": [], "rows": 0})
            pieces[-1]["groups"].append(group)
            pieces[-1]["rows"] += rows
        present = opened.schema_arrow.names
        missing = sorted({*writer.needed, *more} - set(present))
        if missing:
            raise InputError(
                f"{source.uri_of(name)}: missing column {', '.join(missing)}; found {', '.join(present)}. "
                "Rename your columns to the house schema (see the README, 'your own data'), or correct catalog.filter_columns"
            )
        used = [column for column in (*writer.wanted, *more) if column in present]
        if columns is not None and used != columns:
            raise InputError(
                f"{source.uri_of(name)} has the columns {', '.join(used)}, but {source.uri_of(files[0])} has "
                f"{', '.join(columns)}: all files of a table must agree"
            )
        columns = used
    return _Source(files, columns or [], pieces)


def part_of(product_ids: pa.ChunkedArray, parts: int) -> np.ndarray:
    """int32 N, the part that each product belongs to."""
    return (hash_of_text(product_ids.cast(pa.string()).fill_null("")) % np.uint64(parts)).astype(np.int32)


class _Spread:
    """Actor: a piece of a source file in, its rows by part out."""

    def __init__(self, *, source: Store, store: Store, exchange: str, columns: list[str], parts: int):
        self.source, self.store, self.exchange, self.columns, self.parts = source, store, exchange, columns, parts

    def __call__(self, spec: dict) -> dict:
        table = self.source.parquet_file(spec["file"]).read_row_groups(spec["groups"], columns=self.columns)
        table = table.cast(pa.schema([field.with_type(_plain(field.type)) for field in table.schema]))
        name = f"{self.exchange}-{spec['position']:05d}.arrow"
        write_groups(self.store, name, table, part_of(table["product_id"], self.parts), self.parts)
        return {"position": spec["position"]}


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, of which a file for groups can hold but one."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return pa.list_(_plain(kind.value_type)) if pa.types.is_list(kind) else kind


class _WriteProducts:
    table = "products"
    wanted = ("product_id", "title", "description", "category_path", "value", "embedding")
    needed = ("product_id", "title")

    def __init__(
        self, *, store: Store, folder: str, recipe: CatalogRecipe, width: int | None, exchange: str, pieces: int
    ):  # fmt: skip
        self.store, self.folder, self.recipe, self.width = store, folder, recipe, width
        self.exchange, self.pieces = exchange, pieces

    def __call__(self, spec: dict) -> dict:
        part = spec["position"]
        found = [
            read_group(self.store, f"{self.exchange}-{piece:05d}.arrow", part) for piece in range(self.pieces)
        ]  # fmt: skip
        return {"position": part, **self.write(part, pa.concat_tables(found, promote_options="permissive"))}

    def write(self, part: int, group: pa.Table) -> dict:
        """Check the rows of a part and write those that are good; what was found."""
        checked = check_products(
            group,
            width=self.width,
            min_category_depth=self.recipe.min_category_depth,
            max_category_depth=self.recipe.max_category_depth,
            filter_columns=self.recipe.filter_columns,
        )
        schema = schemas.products(self.width, self.recipe.filter_columns)
        table = schemas.conform(checked.good, schema, where=f"products, part {part}")
        paths = Counter(tuple(path) for path in table["category_path"].to_pylist())
        return self._result(
            part, table, checked, "part", paths=[[list(path), count] for path, count in sorted(paths.items())]
        )

    def _result(self, part: int, table: pa.Table, checked, prefix: str, **more) -> dict:
        files = []
        if table.num_rows:
            files.append({**self.store.write_table(f"{self.folder}/{prefix}-{part:05d}.parquet", table), "part": part})
        if checked.bad.num_rows:
            files.append(
                self.store.write_table(
                    f"{self.folder}/rejected/{prefix.replace('/', '-')}-{part:05d}.parquet", checked.bad
                )
            )
        rows = checked.bad.slice(0, _NAMED_BAD_ROWS).to_pylist()
        return {
            "good": table.num_rows,
            "bad": checked.bad.num_rows,
            "first_bad": [f"{row['product_id']!r}: {row['reason']}" for row in rows],
            "reasons": dict(Counter(_general(reason) for reason in checked.bad["reason"].to_pylist())),
            "cut_paths": getattr(checked, "cut_paths", 0),
            "duplicates": getattr(checked, "duplicates", 0),
            "files": files,
            **more,
        }


class _WritePairs(_WriteProducts):
    table = "pairs"
    needed = tuple(tables.PAIRS.names)
    wanted = (*needed, "user", "recent", "behaviour")

    def write(self, part: int, group: pa.Table) -> dict:
        checked = check_pairs(group)
        table = schemas.conform(checked.good, tables.pairs(checked.good.column_names), where=f"pairs, part {part}")
        highest = pc.max(table.filter(pc.field("split") == "train")["relevance"]).as_py()
        return self._result(part, table, checked, PAIRS.removesuffix("-"), train_relevance_max=highest or 0.0)


def _general(reason: str) -> str:
    """The reason without the row's own numbers, for counting."""
    return " ".join("…" if any(c.isdigit() for c in word) else word for word in reason.split())


def _partition(source: Store, found: _Source, part_count: int, writer: type, arguments: dict) -> list[dict]:
    """Bring the rows of each part together, then check and write it. Results in order of parts."""
    store, folder, recipe = arguments["store"], arguments["folder"], arguments["recipe"]
    columns = [name for name in found.columns if name != "embedding" or arguments["width"]]
    exchange = f"{folder}/exchange/{writer.table}"
    map_parts(
        _Spread,
        {"source": source, "store": store, "exchange": exchange, "columns": columns, "parts": part_count},
        found.pieces, workers=recipe.workers, label=f"reading {writer.table}", unit="rows",
    )  # fmt: skip
    specs = [{"rows": found.rows // part_count} for _ in range(part_count)]
    arguments = {**arguments, "exchange": exchange, "pieces": len(found.pieces)}
    return map_parts(
        writer, arguments, specs, workers=recipe.workers, label=f"checking {writer.table}", unit="rows"
    )  # fmt: skip


def _refuse_bad(source: Store, table: str, rows: int, results: list[dict], recipe: CatalogRecipe) -> None:
    bad = sum(result["bad"] for result in results)
    if bad > recipe.max_bad_fraction * max(rows, 1):
        first = [text for result in results for text in result["first_bad"]][:_NAMED_BAD_ROWS]
        raise InputError(
            f"{source.uri}: {bad} of {rows} rows of {table} are bad, more than catalog.max_bad_fraction "
            f"{recipe.max_bad_fraction} allows. The first {len(first)}:\n  " + "\n  ".join(first)
        )


def part_specs(catalog: Manifest, pairs: Manifest | None = None) -> list[dict]:
    """The parts of a catalogue as work for `map_parts`: part number, file name, rows and, where `pairs` is given and has some
    for the part, the store name of their file."""
    of_part = {entry["part"]: pairs.file(entry["name"]) for entry in pairs.named(PAIRS)} if pairs else {}
    return [
        {"part": entry["part"], "file": entry["name"], "rows": entry["rows"], "pairs": of_part.get(entry["part"])}
        for entry in catalog.parts()
    ]


def read_sample(store: Store, manifest: Manifest, columns: list[str], *, rows: int, seed: int) -> pa.Table:
    """A uniform sample of at most `rows` rows: whole parts in a seeded order, of the last one a seeded choice of rows."""
    parts, generator = manifest.parts(), np.random.default_rng([seed, 2])
    tables, missing = [], rows
    for position in generator.permutation(len(parts)):
        table = store.read_table(manifest.file(parts[position]["name"]), columns=columns)
        if table.num_rows > missing:
            table = table.take(np.sort(generator.choice(table.num_rows, missing, replace=False)))
        tables.append(table)
        missing -= table.num_rows
        if missing <= 0:
            break
    return pa.concat_tables(tables)
