"""Stage 0a: read the source tables once, check every row at the door, and lay products and pairs out in parts, an artefact each.

A row's part is a hash of its product_id, for products and pairs alike. Three things follow: the layout is a pure function
of the set of rows, duplicates meet in one part, and later joins of pairs with products are local to a part. Parts are also
uniform random samples of the catalogue, which fits of bounded size use. The queries of all parts then meet by their ids and by
their texts, so that what only shows with all pairs of a query together is known before anything trains (`door.py`).
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.columns import commonest_width, list_column
from catid2_ray.catalog.pairs import HARMLESS, SPLITS, check_pairs, plain_pairs, training_pairs
from catid2_ray.catalog.products import COLUMNS, check_products, plain_products
from catid2_ray.catalog.queries import Findings, added, find_faults, keyed_queries
from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.config import CatalogRecipe, ExamplesRecipe
from catid2_ray.errors import InputError
from catid2_ray.hashing import hash_of_text
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages import source as sources
from catid2_ray.on_ray.stages.source import Columns, Source
from catid2_ray.tables import PAIRS
from catid2_ray.tables import pairs as pairs_schema

PAIR_FILES = "pairs/part-"  # how the names of files of pairs begin
_NAMED_BAD_ROWS = 10
_SEEN = "live_changes"  # in the metrics: how many each release had before the tables were read
_GROUP_PAIRS = 500_000  # pairs whose queries are looked at together
_PAIR_COLUMNS = Columns(tuple(PAIRS.names), (*PAIRS.names, "user", "recent", "behaviour"))


def _product_columns(recipe: CatalogRecipe) -> Columns:
    return Columns(("product_id", "title"), COLUMNS, recipe.filter_columns)


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The catalog artefact: products in part-*.parquet, what was set aside in rejected/, taxonomy.json. Sets `seen` of the job."""
    recipe, width = job.recipe.catalog, _given_width(job)
    settings = {**recipe.identity(), "width": width}
    if not recipe.filter_columns:
        del settings["filter_columns"]  # so that catalogues without them are those of before
    if recipe.root is not None:
        source = _checked(recipe.root)
        settings["source"] = _fingerprints(source, sources.products_of(source))
    made = job.produce("catalog", settings, {}, lambda attempt: _make_products(job, attempt, width))
    # Of one that is found, perhaps days old, those that there were when it was read: what came since is not in it.
    job.seen = made.metrics.get(_SEEN, job.seen)
    return made


def run_pairs(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The pairs artefact: pairs/part-*.parquet, in part i those that name products of part i of the catalogue, and what was
    set aside in rejected/. An artefact of its own: new pairs leave all that is made of products alone as it is."""
    recipe = job.recipe.catalog
    settings, parents = recipe.pairs_identity(), STAGES["pairs"].reads(parts)
    if recipe.root is not None:
        source = _checked(recipe.root)
        table = sources.files_of(source, "pairs")
        settings["source"] = _fingerprints(source, table)
        if table and "behaviour" in sources.names_of(source, table, _PAIR_COLUMNS):
            settings["behaviour"] = True
    return job.produce("pairs", settings, parents, lambda attempt: _make_pairs(job, attempt, parents["catalog"]))


def teaching_pairs(store: Store, pairs: Manifest, recipe: ExamplesRecipe) -> int:
    """Training pairs that the generator learns from."""
    columns = ["split", "relevance"]
    tables = (store.read_table(pairs.file(entry["name"]), columns) for entry in pairs.named(PAIR_FILES))
    return sum(training_pairs(table, recipe.min_relevance, recipe.relevance_weights).num_rows for table in tables)


def _checked(root: str) -> Store:
    source = Store(root)
    source.check()
    return source


def _fingerprints(source: Store, table) -> list[list[str]]:
    return [[name, source.fingerprint(name)] for name in (table.files if table else [])]


def _given_width(job: Job) -> int | None:
    """Width of the embedding column, or None when embeddings are computed: the recipe's, or else that of most of the first
    vectors of the first file that has any."""
    embedding, root = job.recipe.embedding, job.recipe.catalog.root
    if embedding.source == "encoder" or root is None:
        if embedding.source == "given":
            raise InputError("embedding.source is 'given', but the generated catalogue has no embedding column")
        return None
    source, columns = Store(root), Columns((), COLUMNS)
    found = sources.products_of(source)
    names = sources.names_of(source, found, columns)
    where = source.uri_of(found.files[0])
    if "embedding" not in names:
        if embedding.source == "given":
            raise InputError(
                f"embedding.source is 'given', but {where} has no column 'embedding'; "
                f"found {', '.join(names)}. Add it (list<float>) or set embedding.source=encoder"
            )
        return None
    if embedding.width:
        return embedding.width
    for vectors in sources.vectors(source, found, columns):
        if not pa.types.is_null(vectors.type):
            width = commonest_width(list_column(pa.table({"embedding": vectors}), "embedding", pa.float32()))
            if width:
                return width
    raise InputError(f"{where}: the column 'embedding' holds no vector; set embedding.source=encoder to compute")


def _refuse_changed(source: Store, name: str, attempt: Attempt) -> None:
    """Raise InputError where a table's files are others now than when the artefact was named after them."""
    named = attempt.settings.get("source")
    if named is None:  # generated
        return
    table = sources.files_of(source, name)
    now = {file: print_ for file, print_ in _fingerprints(source, table)}
    for file, before in named:
        if now.pop(file, None) != before:
            raise InputError(
                f"{source.uri_of(file)} was changed or deleted while the job read it: run it again when {name} is whole"
            )
    for file in now:
        raise InputError(f"{source.uri_of(file)} came while the job read {name}: run it again when {name} is whole")


@contextlib.contextmanager
def _source(job: Job, attempt: Attempt) -> Iterator[Store]:
    """Where the tables lie; a generated catalogue is written for the time of the reading."""
    wanted = job.recipe.catalog.synthetic
    if wanted is None:
        yield Store(job.recipe.catalog.root)
        return
    generated = generate(products=wanted.products, queries=wanted.queries, seed=wanted.seed)
    for table in ("products", "pairs"):
        job.store.write_table(attempt.name(f"source/{table}.parquet"), getattr(generated, table))
    yield Store(f"{job.store.uri}/{attempt.name('source')}")
    job.store.delete_folder(attempt.name("source"))


def _make_products(job: Job, attempt: Attempt, width: int | None) -> Manifest:
    recipe = job.recipe.catalog
    with _source(job, attempt) as source:
        table = _inspect(job, attempt, source, "products", sources.products_of(source), _product_columns(recipe))
        if table.rows == 0:
            raise InputError(f"the catalogue {source.uri} is empty: products has no rows")
        part_count = -(-table.rows // recipe.rows_per_part)
        arguments = {"store": job.store, "folder": attempt.folder, "recipe": recipe, "width": width}
        products = _partition(source, table, part_count, _WriteProducts, arguments)
        _refuse_changed(source, "products", attempt)
    _refuse_bad(source, "products", table.rows, products, recipe)
    job.store.delete_folder(attempt.name("exchange"))

    paths = Counter()
    for result in products:
        paths.update({tuple(path): count for path, count in result["paths"]})
    taxonomy = Taxonomy.build(paths, depth=recipe.max_category_depth)
    files = [job.store.write_file(attempt.name("taxonomy.json"), taxonomy.to_json().encode())]
    files += [entry for result in products for entry in result["files"]]
    metrics = {
        "products": _total(products, "good"),
        "parts": part_count,
        "products_set_aside": _total(products, "bad"),
        "reasons": _reasons(products),
        "paths_cut": _total(products, "cut_paths"),
        "set_aside": {"products": _set_aside(table.rows, products)},
        "categories": list(taxonomy.sizes),
        "taxonomy": taxonomy.digest,
        "width": width,
        **({} if job.seen is None else {_SEEN: job.seen}),
    }
    schema = schemas.fingerprint(schemas.products(width, recipe.filter_columns))
    return attempt.commit(files, rows=metrics["products"], schema=schema, metrics=metrics)


def _make_pairs(job: Job, attempt: Attempt, catalog: Manifest) -> Manifest:
    recipe, part_count, pairs, findings = job.recipe.catalog, catalog.metrics["parts"], [], added([])
    with _source(job, attempt) as source:
        table = _inspect(job, attempt, source, "pairs", sources.files_of(source, "pairs"), _PAIR_COLUMNS)
        if table.rows:
            groups = -(-table.rows // _GROUP_PAIRS)
            arguments = {"store": job.store, "folder": attempt.folder, "recipe": recipe, "width": None}
            arguments |= {"catalog": catalog.folder, "groups": groups}
            pairs = _partition(source, table, part_count, _WritePairs, arguments)
            _refuse_changed(source, "pairs", attempt)
            _refuse_bad(source, "pairs", table.rows, pairs, recipe)
            findings = _find_faults(job, attempt, groups, part_count)
    job.store.delete_folder(attempt.name("exchange"))
    metrics = {
        "pairs_table": bool(table.files),
        "pairs": _total(pairs, "good"),
        "behaviour": "behaviour" in table.columns,
        "splits": _splits(pairs, findings),
        "train_relevance_max": max(
            (result["splits"]["train"]["relevance_max"] or 0.0 for result in pairs), default=0.0
        ),
        **_of_queries(findings),
        "set_aside": {"pairs": _set_aside(table.rows, pairs)},
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


def _inspect(job: Job, attempt: Attempt, source: Store, table: str, found, columns: Columns) -> Source:
    """A table before it is read; one that is not there has no file."""
    return sources.inspect(
        source, found, columns, store=job.store, exchange=attempt.name(f"exchange/source-{table}"),
        workers=job.recipe.catalog.workers, label=f"reading {table} as text",
    )  # fmt: skip


def _find_faults(job: Job, attempt: Attempt, groups: int, parts: int) -> Findings:
    """What the queries of all pairs show, group by group."""
    arguments = {"store": job.store, "exchange": attempt.name("exchange/queries"), "parts": parts}
    results = map_parts(
        _LookAtQueries, arguments, [{"rows": 1} for _ in range(groups)], workers=job.recipe.catalog.workers,
        label="looking at queries", unit="groups",
    )  # fmt: skip
    return added(Findings(**result["findings"]) for result in results)


class _LookAtQueries:
    """Worker: the queries of one group from all parts in, what they show out."""

    def __init__(self, *, store: Store, exchange: str, parts: int):
        self.store, self.exchange, self.parts = store, exchange, parts

    def __call__(self, spec: dict) -> dict:
        tables = [
            read_group(self.store, f"{self.exchange}-{part:05d}.arrow", spec["position"]) for part in range(self.parts)
        ]
        return {"position": spec["position"], "findings": find_faults(pa.concat_tables(tables))._asdict()}


def _splits(pairs: list[dict], findings: Findings) -> dict:
    """Of each split: the pairs that name a product of the catalogue, their highest relevance (None without any), its queries."""
    described = {}
    for split in SPLITS:
        found = [result["splits"][split] for result in pairs]
        described[split] = {
            "pairs": sum(each["pairs"] for each in found),
            "relevance_max": max((e["relevance_max"] for e in found if e["relevance_max"] is not None), default=None),
            "queries": findings.queries.get(split, 0),
        }
    return described


def _of_queries(findings: Findings) -> dict:
    return {
        "query_ids_with_two_texts": findings.two_texts,
        "first_with_two_texts": findings.first_two_texts,
        "queries_in_two_splits": findings.shared,
        "first_in_train_and_test": findings.first_leaked,
    }


def _set_aside(rows: int, results: list[dict]) -> dict:
    """Of one table, for the log and the closing table: rows set aside of how many, why, and the first of them."""
    return {
        "rows": _total(results, "bad"),
        "of": rows,
        "reasons": _reasons(results),
        "first": [text for result in results for text in result["first_bad"]][:_NAMED_BAD_ROWS],
    }


def part_of(product_ids: pa.ChunkedArray, parts: int) -> np.ndarray:
    """int32 N, the part that each product belongs to."""
    return (hash_of_text(product_ids.cast(pa.string()).fill_null("")) % np.uint64(parts)).astype(np.int32)


class _Spread:
    """Worker: a piece of a source file in, its rows by part out, with plain types."""

    def __init__(
        self, *, source: Store, store: Store, exchange: str, columns: list[str], parts: int, table: str,
        recipe: CatalogRecipe,
    ):  # fmt: skip
        self.source, self.store, self.exchange, self.columns, self.parts = source, store, exchange, columns, parts
        self.table, self.recipe = table, recipe

    def __call__(self, spec: dict) -> dict:
        filters = self.recipe.filter_columns if self.table == "products" else {}
        table = sources.read_piece(self.source, self.store, spec, self.columns, filters)
        try:
            if self.table == "products":
                table = plain_products(table, separator=self.recipe.category_separator)
            else:
                table = plain_pairs(table)
        except InputError as error:
            raise InputError(f"{self.source.uri_of(spec['of'])}: {error}") from None
        name = f"{self.exchange}-{spec['position']:05d}.arrow"
        write_groups(self.store, name, table, part_of(table["product_id"], self.parts), self.parts)
        return {"position": spec["position"]}


class _WriteProducts:
    table = "products"

    def __init__(
        self, *, store: Store, folder: str, recipe: CatalogRecipe, width: int | None, exchange: str, pieces: int,
        catalog: str = "", groups: int = 0,
    ):  # fmt: skip
        self.store, self.folder, self.recipe, self.width = store, folder, recipe, width
        self.exchange, self.pieces, self.catalog, self.groups = exchange, pieces, catalog, groups

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
        harmless = pc.is_in(checked.bad["reason"], pa.array(sorted(HARMLESS)))
        return {
            "good": table.num_rows,
            "bad": checked.bad.num_rows,
            "faulty": checked.bad.num_rows - (pc.sum(harmless).as_py() or 0),
            "first_bad": [f"{row['product_id']!r}: {row['reason']}" for row in rows],
            "reasons": dict(Counter(_general(reason) for reason in checked.bad["reason"].to_pylist())),
            "cut_paths": getattr(checked, "cut_paths", 0),
            "duplicates": getattr(checked, "duplicates", 0),
            "files": files,
            **more,
        }


class _WritePairs(_WriteProducts):
    table = "pairs"

    def write(self, part: int, group: pa.Table) -> dict:
        """Check the pairs of a part against its products; hand its queries on to the groups where they meet those of others."""
        checked = check_pairs(group, known=self._known(part))
        table = schemas.conform(checked.good, pairs_schema(checked.good.column_names), where=f"pairs, part {part}")
        queries = keyed_queries(table)
        name = f"{self.folder}/exchange/queries-{part:05d}.arrow"
        write_groups(self.store, name, queries, part_of(queries["key"], self.groups), self.groups)
        splits = {}
        for split in SPLITS:
            grades = table.filter(pc.field("split") == split)["relevance"]
            splits[split] = {"pairs": len(grades), "relevance_max": pc.max(grades).as_py()}
        return self._result(part, table, checked, PAIR_FILES.removesuffix("-"), splits=splits)

    def _known(self, part: int) -> pa.Array:
        """The product_ids of the same part: of products and pairs alike, a product's rows lie in one."""
        name = f"{self.catalog}/part-{part:05d}.parquet"
        if not self.store.exists(name):
            return pa.array([], pa.string())
        return self.store.read_table(name, columns=["product_id"])["product_id"].combine_chunks()


def _general(reason: str) -> str:
    """The reason without the row's own numbers, for counting."""
    return " ".join("…" if any(c.isdigit() for c in word) else word for word in reason.split())


def _partition(source: Store, found: Source, part_count: int, writer: type, arguments: dict) -> list[dict]:
    """Bring the rows of each part together, then check and write it. Results in order of parts."""
    store, folder, recipe = arguments["store"], arguments["folder"], arguments["recipe"]
    columns = [name for name in found.columns if name != "embedding" or arguments["width"]]
    exchange = f"{folder}/exchange/{writer.table}"
    map_parts(
        _Spread,
        {"source": source, "store": store, "exchange": exchange, "columns": columns, "parts": part_count,
         "table": writer.table, "recipe": recipe},
        found.pieces, workers=recipe.workers, label=f"reading {writer.table}", unit="rows",
    )  # fmt: skip
    specs = [{"rows": found.rows // part_count} for _ in range(part_count)]
    arguments = {**arguments, "exchange": exchange, "pieces": len(found.pieces)}
    return map_parts(
        writer, arguments, specs, workers=recipe.workers, label=f"checking {writer.table}", unit="rows"
    )  # fmt: skip


def _refuse_bad(source: Store, table: str, rows: int, results: list[dict], recipe: CatalogRecipe) -> None:
    bad = sum(result["faulty"] for result in results)
    if bad > recipe.max_bad_fraction * max(rows, 1):
        first = [text for result in results for text in result["first_bad"]][:_NAMED_BAD_ROWS]
        raise InputError(
            f"{source.uri}: {bad} of {rows} rows of {table} are bad, more than catalog.max_bad_fraction "
            f"{recipe.max_bad_fraction} allows. The first {len(first)}:\n  " + "\n  ".join(first)
        )


def part_specs(catalog: Manifest, pairs: Manifest | None = None) -> list[dict]:
    """The parts of a catalogue as work for `map_parts`: part number, file name, rows and, where `pairs` is given and has some
    for the part, the store name of their file."""
    of_part = {entry["part"]: pairs.file(entry["name"]) for entry in pairs.named(PAIR_FILES)} if pairs else {}
    return [
        {"part": entry["part"], "file": entry["name"], "rows": entry["rows"], "pairs": of_part.get(entry["part"])}
        for entry in catalog.parts()
    ]


def read_sample(store: Store, manifest: Manifest, columns: list[str], *, rows: int, seed: int) -> pa.Table:
    """A uniform sample of at most `rows` rows: whole parts in a seeded order, of the last one a seeded choice of rows."""
    read = functools.partial(_read_columns, store, manifest)
    return _sample(manifest, read, columns, rows=rows, seed=seed)


def read_vectors(vectors: ProductVectors, columns: list[str], *, rows: int, seed: int) -> pa.Table:
    """The same rows of the embeddings artefact, with their vectors adapted."""
    return _sample(vectors.embeddings, vectors.read, columns, rows=rows, seed=seed)


def _read_columns(store: Store, manifest: Manifest, name: str, columns: list[str]) -> pa.Table:
    return store.read_table(manifest.file(name), columns=columns)


def _sample(
    manifest: Manifest, read: Callable[[str, list[str]], pa.Table], columns: list[str], *, rows: int, seed: int
) -> pa.Table:
    parts, generator = manifest.parts(), np.random.default_rng([seed, 2])
    tables, missing = [], rows
    for position in generator.permutation(len(parts)):
        table = read(parts[position]["name"], columns)
        if table.num_rows > missing:
            table = table.take(np.sort(generator.choice(table.num_rows, missing, replace=False)))
        tables.append(table)
        missing -= table.num_rows
        if missing <= 0:
            break
    return pa.concat_tables(tables)
