"""What queries find through the IDs of a kind: the proxy generator (`evaluation.proxy`) on a bounded part of the catalogue.

All kinds and seeds are given the same products, queries and vectors, so their recalls are paired query by query. Whole parts of the
catalogue are taken, for a product and its pairs lie in parts of one number; nothing is written to the store.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import tuned
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError, InputError, RecipeError
from catid2_ray.evaluation.proxy import Questions, score
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.query_encoder import stored_encoder
from catid2_ray.on_ray.machine.vectors import Encode, ProductVectors, adapted_queries, open_adapter
from catid2_ray.on_ray.stages.catalog import part_specs, read_sample, read_vectors
from catid2_ray.on_ray.stages.validation import keep_smallest

KS = (10, 50, 100)
_PRODUCTS = 60_000  # that the proxy learns and searches
_LEARNED, _ASKED = 10_000, 2_000  # queries, of the train and of the validation split


class Material(NamedTuple):
    """What every kind is scored on. `product_ids`: in the order of `vector_ND`'s rows, N×D."""

    product_ids: pa.Array
    vector_ND: np.ndarray
    learn: Questions
    ask: Questions


def refuse_without_queries(recipe: Recipe, parts: dict[str, Manifest]) -> None:
    """Raise RecipeError or InputError, before any work, where no query can be given a vector or none is there to be asked."""
    if parts["catalog"].metrics["width"] and not recipe.serving.query_encoder:
        raise RecipeError(
            "--score recall needs vectors for queries, but the catalogue's embeddings are given and no encoder is known: set "
            "serving.query_encoder to the encoder that made them, or leave --score out"
        )
    splits = parts["pairs"].metrics["splits"] if parts["pairs"].metrics["pairs_table"] else {}
    missing = [split for split in ("train", "validation") if not splits.get(split, {}).get("pairs")]
    if missing:
        raise InputError(
            f"--score recall learns from pairs of split train and asks those of split validation, but the catalogue has none of "
            f"{' and '.join(missing)}: bring some, or leave --score out"
        )


def material(job: Job, parts: dict[str, Manifest]) -> Material:
    """The products, queries and vectors; the queries are encoded in this process, once for all kinds."""
    columns = ["product_id", "embedding"]
    products = read_vectors(ProductVectors.of(job.store, parts), columns, rows=_PRODUCTS, seed=job.recipe.seed)
    ids, recipe = products["product_id"].combine_chunks(), job.recipe
    encode = _encoder(job, parts)
    pairs = pa.concat_tables(
        [
            job.store.read_table(spec["pairs"], columns=["query_id", "query", "product_id", "split", "relevance"])
            for spec in part_specs(parts["catalog"], parts["pairs"])
            if spec["pairs"]
        ]
    )
    pairs = pairs.filter(pc.is_in(pairs["product_id"], ids))

    def questions(split: str, least: float, most: int) -> Questions:
        chosen = pairs.filter((pc.field("split") == split) & (pc.field("relevance") >= least))
        if not chosen.num_rows:
            raise InputError(
                f"--score recall: no pair of split {split!r} with relevance ≥ {least} names one of the {len(ids)} products that "
                "are scored; check min_relevance of generator and evaluation"
            )
        chosen = keep_smallest(chosen, queries=most, seed=recipe.seed)
        chosen = chosen.group_by(["query_id", "product_id"]).aggregate([("query", "min")])
        chosen = chosen.sort_by([("query_id", "ascending"), ("product_id", "ascending")])
        _, first, query_P = np.unique(
            chosen["query_id"].to_numpy().astype(object), return_index=True, return_inverse=True
        )
        texts = chosen["query_min"].take(pa.array(first)).to_pylist()
        place_P = pc.index_in(chosen["product_id"].combine_chunks(), ids).to_numpy().astype(np.int64)
        progress.event("queries", split=split, queries=len(texts), pairs=len(query_P))
        return Questions(encode(texts), query_P, place_P)

    learn = questions("train", recipe.generator.min_relevance, _LEARNED)
    ask = questions("validation", recipe.evaluation.min_relevance, _ASKED)
    return Material(ids, np.array(matrix(products["embedding"]), np.float32), learn, ask)


def _encoder(job: Job, parts: dict[str, Manifest]) -> Encode:
    """Texts → vectors in the space of the products' vectors, adapted where they are."""
    named = job.recipe.serving.query_encoder or job.recipe.embedding.encoder
    encoder = {"name": named, "tokens": job.recipe.embedding.tokens}
    encode = stored_encoder(job.store, encoder, embeddings=parts["embeddings"], tuned=tuned(parts))
    return adapted_queries(encode, open_adapter(job.store, parts.get("adapter")))


def recall_of_kind(job: Job, ids: Manifest, given: Material, *, seed: int) -> np.ndarray:
    """Q×len(KS): recall at KS of each query of `given.ask` through these IDs. ArtifactError where the IDs are of other products."""
    table = read_sample(job.store, ids, ["product_id", "codes"], rows=_PRODUCTS, seed=seed)
    if not table["product_id"].combine_chunks().equals(given.product_ids):
        raise ArtifactError("parts of embeddings and ids do not hold the same products; rerun jobs.assign_ids")
    scored = score(
        given.vector_ND, matrix(table["codes"]).astype(np.int64), ids.metrics["codes_per_level"], learn=given.learn,
        ask=given.ask, ks=KS, seed=job.recipe.seed,
    )  # fmt: skip
    progress.event("scored", kind=job.recipe.quantizer.kind, seconds=round(scored.seconds, 1))
    return scored.recall_QK
