"""Stage 0c: one vector a product, as given by the table or from the recipe's encoder, in a pool of Ray Data actors.

For kinds of IDs that learn from queries (CQ-SID) also one query a product, embedded by the same encoder.
"""

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray import tables
from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest, digest_of, tree_of
from catid2_ray.artifacts.release import tuned, tuned_role
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store, sha256_of
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.catalog.text import HuggingFaceEncoder, LsaEncoder, join_text
from catid2_ray.config import EmbeddingRecipe
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.query_encoder import tuned_folder
from catid2_ray.on_ray.machine.vectors import adapted_queries, open_adapter
from catid2_ray.on_ray.stages.catalog import part_specs, read_sample
from catid2_ray.on_ray.stages.embedded_before import EmbeddedBefore, embed_texts, nothing_known, open_before

_LSA_WIDTH = 128


def run(job: Job, parts: dict[str, Manifest], *, frozen: dict[str, Manifest] | None = None) -> Manifest:
    """The embeddings artefact: part-*.parquet of schemas.embeddings; for lsa the fitted encoder in encoder/.

    `frozen`: parts of a release whose fitted encoder and category tree are used instead of new ones (append); the tree
    then lies beside the vectors. A fitted encoder is kept from release to release until the job's `refit_encoder`, so that a
    product whose text stays has the vector that it had. Texts that the release before embedded by the same encoder are not
    encoded again (`embedded_before.py`); the metrics say how many texts were `encoded`, and how many vectors `reused`.
    """
    recipe, catalog = job.recipe.embedding, parts["catalog"]
    parents, history = STAGES["embeddings"].reads(parts, *tuned_role(parts)), {}
    if catalog.metrics["width"]:
        settings = {"given": True}
    else:
        settings = {**recipe.vectors_identity(), "seed": job.recipe.seed, **model_identity(recipe.encoder)}
        settings |= {role: parts[role].digest for role in tuned_role(parts)}
        if recipe.encoder == "lsa" and not frozen and job.previous and not job.refit_encoder:
            history = _kept_encoder(job, settings, catalog)
    if frozen:
        parents, history = parents | {"tree": frozen["catalog"]}, {"encoder": frozen["embeddings"]}
        _refuse_another_encoder(settings, catalog, frozen["embeddings"], "`catid2 reindex` instead of append")
    return job.produce(
        "embeddings", settings, parents, lambda attempt: _embed(job, attempt, parents | history), history=history,
        anew=job.refit_encoder,
    )  # fmt: skip


def _kept_encoder(job: Job, settings: dict, catalog: Manifest) -> dict[str, Manifest]:
    """The embeddings of the release before, whose fitted encoder is used again; none where this recipe's is another."""
    before = job.previous.parts["embeddings"]
    if job.recipe.quantizer.warm_start:  # it would not know the vectors of another encoder
        _refuse_another_encoder(settings, catalog, before, "quantizer.warm_start=false")
    same = {**before.asked, "seed": None} == {**settings, "seed": None} and before.named("encoder/")
    return {"encoder": before} if same else {}


def model_identity(name: str | None) -> dict:
    """For a model in a local folder, the digest of its files, so that exchanging it under the same path is noticed."""
    if name in (None, "lsa", "small") or not (folder := Path(name).expanduser()).is_dir():
        return {}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {"model_files": digest_of([[path.relative_to(folder).as_posix(), sha256_of(path)] for path in files])}


def _refuse_another_encoder(settings: dict, catalog: Manifest, before: Manifest, way_out: str) -> None:
    """Vectors of another encoder mean nothing to the quantizer of the release whose embeddings are `before`."""
    had = before.asked
    differ = [
        f"{name} is {settings.get(name)!r}, the release has {had.get(name)!r}"
        for name in sorted((settings.keys() | had.keys()) - {"seed"})
        if settings.get(name) != had.get(name)
    ]
    if catalog.metrics["width"] not in (None, before.metrics["width"]):
        differ.append(f"the column embedding has width {catalog.metrics['width']}, there {before.metrics['width']}")
    if differ:
        raise RecipeError(
            f"the release's quantizer reads vectors of the release's encoder, but today's are others: {'; '.join(differ)} "
            f"(given = a column of the table, model_files = the files of a local encoder). Bring the same ones, or use {way_out}"
        )


def _embed(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, files, catalog = job.recipe.embedding, [], parents["catalog"]
    before, tree, given = None, catalog.file("taxonomy.json"), bool(catalog.metrics["width"])
    if "tree" in parents:
        tree = tree_of(parents["encoder"], parents["tree"])
        files.append(job.store.write_file(attempt.name("taxonomy.json"), job.store.read(tree)))
    if not given:
        before = open_before(job, attempt, parents)
        files += _encoder_files(job, attempt, parents, before)
    arguments = {
        "store": job.store,
        "catalog": catalog.folder,
        "folder": attempt.folder,
        "recipe": recipe,
        "given": given,
        "lsa_folder": attempt.name("encoder") if recipe.encoder == "lsa" else None,
        "tuned": tuned(parents),
        "tree": tree,
        "grown": "tree" in parents,
        "before": before,
    }
    results = map_parts(
        _EmbedPart,
        arguments,
        part_specs(catalog),
        workers=recipe.workers,
        label="embedding products",
        unit="products",
        actors=recipe.encoder != "lsa",
        num_gpus=recipe.gpus_per_worker,
    )
    job.store.delete_folder(attempt.name("exchange"))
    files += [result["file"] for result in results]
    width, depth = results[0]["width"], results[0]["depth"]
    metrics = {
        "width": width,
        "category_depth": depth,
        "categories": parents["encoder"].metrics["categories"] if "tree" in parents else catalog.metrics["categories"],
        "reached_depth": _sum([result["reached"] for result in results]),
        "unknown_categories": sum(result["unknown"] for result in results),
    }
    if not given:
        counts = {name: sum(result[name] for result in results) for name in ("encoded", "reused")}
        progress.event("embedded", **counts)
        metrics |= counts
    return attempt.commit(
        files,
        rows=sum(result["file"]["rows"] for result in results),
        schema=schemas.fingerprint(schemas.embeddings(width, depth)),
        metrics=metrics,
    )


def _encoder_files(
    job: Job, attempt: Attempt, parents: dict[str, Manifest], before: EmbeddedBefore | None
) -> list[dict]:  # fmt: skip
    """Makes the encoder ready for the workers; the entries of its files where it is part of the artefact."""
    recipe = job.recipe.embedding
    if recipe.encoder != "lsa":
        if before is None and tuned(parents) is None:
            # Loaded here once, so that an unknown encoder fails at once and by name, not in an actor far away.
            HuggingFaceEncoder(recipe.encoder, batch=recipe.batch, tokens=recipe.tokens)
        return []
    if "encoder" in parents:
        return _copy(job.store, parents["encoder"], "encoder/", attempt)
    return _fit_lsa(job, parents["catalog"], attempt.name("encoder"))


def _sum(rows: list[list[int]]) -> list[int]:
    return [int(total) for total in np.sum(rows, axis=0)]


def _copy(store: Store, source: Manifest, below: str, attempt: Attempt) -> list[dict]:
    return [
        store.write_file(attempt.name(entry["name"]), store.read(source.file(entry["name"])))
        for entry in source.named(below)
    ]


def _fit_lsa(job: Job, catalog: Manifest, folder: str) -> list[dict]:
    recipe = job.recipe.embedding
    sample = read_sample(job.store, catalog, list(tables.PRODUCTS.names), rows=recipe.sample_rows, seed=job.recipe.seed)
    progress.event("fit", what="lsa", rows=sample.num_rows)
    encoder = LsaEncoder.fit(
        join_text(sample, recipe.text),
        width=recipe.width or _LSA_WIDTH,
        vocabulary=recipe.lsa_vocabulary,
        seed=job.recipe.seed,
    )
    with scratch.folder("encoder") as local:
        encoder.save(local)
        return job.store.upload(local, folder)


def open_encoder(
    store: Store, recipe: EmbeddingRecipe, lsa_folder: str | None, tuned: Manifest | None = None
) -> LsaEncoder | HuggingFaceEncoder:
    """The recipe's encoder; a fitted one from its folder in the store, a tuned one from its artefact."""
    if lsa_folder is None:
        device = "cuda" if recipe.gpus_per_worker else "cpu"
        name = recipe.encoder if tuned is None else tuned_folder(store, tuned)
        return HuggingFaceEncoder(name, batch=recipe.batch, tokens=recipe.tokens, device=device)
    with scratch.folder("encoder") as local:
        for name in store.names(lsa_folder):
            store.download(f"{lsa_folder}/{name}", local / name)
        return LsaEncoder.load(local)


class _EmbedPart:
    """Actor: products part in, embeddings part out. The encoder is loaded for the first text that has no vector yet."""

    def __init__(
        self, *, store: Store, catalog: str, folder: str, recipe: EmbeddingRecipe, given: bool, lsa_folder: str | None,
        tree: str, grown: bool, before: EmbeddedBefore | None = None, tuned: Manifest | None = None,
    ):  # fmt: skip
        self.store, self.catalog, self.folder, self.recipe, self.given = store, catalog, folder, recipe, given
        self.taxonomy, self.grown = Taxonomy.from_json(store.read(tree).decode()), grown
        self.lsa_folder, self.before, self.tuned = lsa_folder, before, tuned

    @functools.cached_property
    def encoder(self) -> LsaEncoder | HuggingFaceEncoder:
        return open_encoder(self.store, self.recipe, self.lsa_folder, self.tuned)

    def _embedded(self, table: pa.Table, part: int) -> tuple[np.ndarray, dict]:
        """float32 N×D, and how many texts were encoded and vectors reused."""
        texts = join_text(table, self.recipe.text)
        known = self.before.look_up(part, texts) if self.before else nothing_known(len(texts))
        embedding_ND, encoded = embed_texts(texts, known, lambda new: self.encoder.encode(new))
        return embedding_ND, {"encoded": encoded, "reused": int((known.row_N >= 0).sum())}

    def __call__(self, spec: dict) -> dict:
        table = self.store.read_table(f"{self.catalog}/{spec['file']}")
        counts = {}
        if self.given:
            embedding_ND = matrix(table["embedding"])
        else:
            embedding_ND, counts = self._embedded(table, spec["part"])
        category_NH = self.taxonomy.category_ids(table["category_path"], grown=self.grown)
        depth_N = pc.fill_null(pc.list_value_length(table["category_path"]), 0).to_numpy()
        unknown_N = (category_NH >= 0).sum(1) < np.minimum(depth_N, self.taxonomy.depth)
        out = pa.table(
            {
                "product_id": table["product_id"],
                "part": pa.array(np.full(table.num_rows, spec["part"], np.int32)),
                "index": pa.array(np.arange(table.num_rows, dtype=np.int32)),
                "embedding": fixed_lists(embedding_ND, pa.float32()),
                "category": fixed_lists(category_NH, pa.int32()),
            }
        )
        width, depth = embedding_ND.shape[1], category_NH.shape[1]
        out = schemas.conform(out, schemas.embeddings(width, depth), where=f"embeddings, part {spec['part']}")
        entry = self.store.write_table(f"{self.folder}/{spec['file']}", out)
        return {
            "position": spec["position"],
            "file": {**entry, "part": spec["part"]},
            "width": width,
            "depth": depth,
            "reached": [int(n) for n in (category_NH >= 0).sum(0)],
            "unknown": int(unknown_N.sum()),
            **counts,
        }


def run_queries(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The queries artefact: part-*.parquet of schemas.queries, row by row beside the embeddings.

    A product's query is that of its most relevant training pair (generator.min_relevance and more); of several, the first
    by query_id. A catalogue without pairs has none, and the query–item term is then 0.
    """
    settings, parents = (
        {"min_relevance": job.recipe.generator.min_relevance},
        STAGES["queries"].reads(parts, *tuned_role(parts)),
    )
    return job.produce("queries", settings, parents, lambda attempt: _embed_queries(job, attempt, parents))


def _embed_queries(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, width = job.recipe.embedding, parents["embeddings"].metrics["width"]
    arguments = {
        "store": job.store, "folder": attempt.folder, "catalog": parents["catalog"].folder, "recipe": recipe, "width": width,
        "lsa_folder": parents["embeddings"].file("encoder") if recipe.encoder == "lsa" else None,
        "min_relevance": job.recipe.generator.min_relevance, "adapter": parents.get("adapter"), "tuned": tuned(parents),
    }  # fmt: skip
    results = map_parts(
        _EmbedQueries, arguments, part_specs(parents["catalog"], parents["pairs"]), workers=recipe.workers,
        label="embedding queries", unit="products", actors=recipe.encoder != "lsa", num_gpus=recipe.gpus_per_worker,
    )  # fmt: skip
    with_query = sum(result["found"] for result in results)
    if not with_query:
        progress.event("without_queries", products=parents["embeddings"].rows, note="the query-item term will be 0")
    return attempt.commit(
        [result["file"] for result in results], rows=parents["embeddings"].rows,
        schema=schemas.fingerprint(schemas.queries(width)), metrics={"with_query": with_query},
    )  # fmt: skip


class _EmbedQueries:
    """Actor: pairs and product ids of a part in, one query vector a product out."""

    def __init__(
        self, *, store: Store, folder: str, catalog: str, recipe: EmbeddingRecipe, width: int, lsa_folder: str | None,
        min_relevance: float, adapter: Manifest | None, tuned: Manifest | None,
    ):  # fmt: skip
        self.store, self.folder, self.catalog, self.width = store, folder, catalog, width
        self.min_relevance = min_relevance
        self.encode = adapted_queries(
            open_encoder(store, recipe, lsa_folder, tuned).encode, open_adapter(store, adapter)
        )

    def __call__(self, spec: dict) -> dict:
        names = self.store.read_table(f"{self.catalog}/{spec['file']}", columns=["product_id"])["product_id"]
        vector_ND = np.zeros((len(names), self.width), np.float32)
        asked_N = np.zeros(len(names), bool)
        if spec["pairs"]:
            pairs = training_pairs(self.store.read_table(spec["pairs"]), self.min_relevance)
            pairs = pairs.sort_by([("product_id", "ascending"), ("relevance", "descending"), ("query_id", "ascending")])
            ids, first = np.unique(pairs["product_id"].to_numpy().astype(str), return_index=True)
            place = pc.index_in(pa.array(ids, pa.string()), names.combine_chunks())
            known = place.is_valid().to_numpy(zero_copy_only=False)
            if known.any():
                place_Q = place.drop_null().to_numpy()
                texts = pairs["query"].take(pa.array(first[known])).to_pylist()
                vector_ND[place_Q], asked_N[place_Q] = self.encode(texts), True
        out = pa.table({"product_id": names, "query": fixed_lists(vector_ND, pa.float32()), "has_query": asked_N})
        out = schemas.conform(out, schemas.queries(self.width), where=f"queries, part {spec['part']}")
        entry = self.store.write_table(f"{self.folder}/{spec['file']}", out)
        return {"position": spec["position"], "file": {**entry, "part": spec["part"]}, "found": int(asked_N.sum())}
