"""The catalogue as every method is given it: products in the order of their ids, judged queries, vectors, teaching pairs.

Read into memory once; vectors of another recipe (another encoder, another text) are read when a condition asks for them.

N products, Q queries, P teaching pairs, D embedding.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import tuned
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.text import join_text
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError
from catid2_ray.evaluation.protocol import Judgements
from catid2_ray.evaluation.proxy import Questions
from catid2_ray.evaluation.reproduce.measures import gains_of
from catid2_ray.evaluation.reproduce.ranking import Asked
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.query_encoder import stored_encoder
from catid2_ray.on_ray.machine.vectors import Encode, ProductVectors, open_adapter
from catid2_ray.on_ray.stages.catalog import PAIR_FILES
from catid2_ray.on_ray.stages.evaluate import sampled
from catid2_ray.quantizer.adapter import LinearAdapter


@dataclass
class Bench:
    """`products`: product_id, title, description, category_path. `pairs`: those of all splits. `judged`: by split, test (what
    evaluation.split says) and validation; `gains` of the judged queries of test. `unanswerable`: queries of the test split without
    a relevant product in the catalogue, which no method is asked."""

    recipe: Recipe
    products: pa.Table
    pairs: pa.Table
    judged: dict[str, Judgements]
    gains: list[dict[str, float]]
    unanswerable: int
    row_of: dict[str, int]
    _vectors: dict[str, "Vectors"] = field(default_factory=dict)

    @classmethod
    def open(cls, job: Job, parts: dict[str, Manifest]) -> "Bench":
        """Raises InputError where no query of the split asks for a product of the catalogue."""
        recipe = job.recipe
        columns = ["product_id", "title", "description", "category_path"]
        products = pa.concat_tables(
            [
                job.store.read_table(parts["catalog"].file(part["name"]), columns=columns)
                for part in parts["catalog"].parts()
            ]
        ).sort_by("product_id")
        names = ["query_id", "query", "product_id", "relevance", "split"]
        files = parts["pairs"].named(PAIR_FILES)
        if not files:
            raise InputError(
                "catid2 reproduce measures what judged queries find, but the catalogue has no pairs: bring pairs.parquet"
            )
        pairs = pa.concat_tables(
            [job.store.read_table(parts["pairs"].file(file["name"]), columns=names) for file in files]
        )
        ids = products["product_id"].combine_chunks()
        known = pairs.filter(pc.is_in(pairs["product_id"], ids))
        # Only now: what was judged may all be gone from the catalogue, and then the message is that of the judgements.
        taught = training_pairs(known, recipe.generator.min_relevance, recipe.generator.relevance_weights)
        judged = {
            "test": Judgements.from_pairs(
                pairs, split=recipe.evaluation.split, min_relevance=recipe.evaluation.min_relevance,
                seen=taught["product_id"].unique(), known=ids,
            )
        }  # fmt: skip
        of_split = pairs.filter(pc.field("split") == recipe.evaluation.split)
        unanswerable = len(of_split["query_id"].unique()) - len(judged["test"].query_ids)
        if recipe.evaluation.max_queries:
            judged["test"] = sampled(judged["test"], recipe.evaluation.max_queries, seed=recipe.seed)
        if pc.any(pc.equal(pairs["split"], "validation")).as_py():
            try:
                judged["validation"] = Judgements.from_pairs(
                    pairs, split="validation", min_relevance=recipe.evaluation.min_relevance, seen=[], known=ids
                )
            except InputError as error:
                progress.event("no_validation", reason=repr(str(error)))
        if unanswerable:
            progress.event("unanswerable", queries=unanswerable, reason="'no relevant product in the catalogue'")
        bench = cls(
            recipe, products, pairs, judged, [], unanswerable, {name: row for row, name in enumerate(ids.to_pylist())}
        )
        bench.gains = bench._gains(known)
        return bench

    def _gains(self, known: pa.Table) -> list[dict[str, float]]:
        of_split = known.filter(pc.field("split") == self.recipe.evaluation.split)
        gains: dict[str, dict[str, float]] = {name: {} for name in self.judged["test"].query_ids}
        rows = zip(
            of_split["query_id"].to_pylist(),
            of_split["product_id"].to_pylist(),
            gains_of(of_split["relevance"], self.zero_grade),
        )
        for query, product, gain in rows:
            if query in gains:
                gains[query][product] = max(float(gain), gains[query].get(product, 0.0))
        return list(gains.values())

    @property
    def zero_grade(self) -> float:
        """The relevance that has gain 0: the table's lowest grade, or 1 below it where that counts as relevant already."""
        lowest = pc.min(self.pairs["relevance"]).as_py()
        return lowest - 1 if lowest >= self.recipe.evaluation.min_relevance else lowest

    @property
    def product_ids(self) -> list[str]:
        return list(self.row_of)

    def texts(self) -> list[str]:
        """What BM25 reads: title and description, as in the job's evaluation."""
        return join_text(self.products, ("title", "description"))

    def asked(self, split: str) -> Asked:
        """InputError where the split has no query that can be judged, and for a validation split that is measured itself."""
        if split == "validation" == self.recipe.evaluation.split:
            raise InputError("evaluation.split is validation, and nothing is chosen on the queries that are measured")
        if split not in self.judged:
            raise InputError(
                f"nothing can be tuned: the pairs have no {split} query with a relevant product of the catalogue"
            )
        judged = self.judged[split]
        return Asked(judged.queries, [np.array(sorted(self.row_of[p] for p in wanted)) for wanted in judged.relevant])

    def vectors(self, job: Job, parts: dict[str, Manifest]) -> "Vectors":
        """Of these embeddings (and their adapter), by which they are kept."""
        key = parts["embeddings"].key
        if key not in self._vectors:
            self._vectors[key] = Vectors(job, parts, self)
        return self._vectors[key]


class Vectors:
    """Products' and queries' vectors of one encoder, as it made them; `adapted` gives both through the adapter."""

    def __init__(self, job: Job, parts: dict[str, Manifest], bench: Bench):
        self.bench, self.encode = bench, encoder_of(job, parts)
        raw = ProductVectors(job.store, parts["embeddings"], None)
        tables = [raw.read(part["name"], ["product_id", "embedding"]) for part in parts["embeddings"].parts()]
        table = pa.concat_tables(tables).sort_by("product_id")
        if not table["product_id"].combine_chunks().equals(bench.products["product_id"].combine_chunks()):
            raise InputError("embeddings and catalogue do not hold the same products; rerun jobs.embed_catalog")
        self.product_ND = np.array(matrix(table["embedding"]), np.float32)
        self.adapter: LinearAdapter | None = open_adapter(job.store, parts.get("adapter"))
        self._query_of: dict[str, np.ndarray] = {}
        self._seconds = 0.0

    @property
    def milliseconds(self) -> float:
        """What encoding a query took, mean of all so far."""
        return 1000 * self._seconds / max(1, len(self._query_of))

    def queries(self, texts) -> np.ndarray:
        """float32 Q×D; each text is encoded once."""
        new, start = sorted({text for text in texts} - self._query_of.keys()), time.monotonic()
        if new:
            self._query_of |= zip(new, np.asarray(self.encode(new), np.float32))
            self._seconds += time.monotonic() - start
        return np.stack([self._query_of[text] for text in texts])

    def adapted(self) -> np.ndarray:
        return self.product_ND if self.adapter is None else self.adapter.products(self.product_ND)

    def adapted_queries(self, texts) -> np.ndarray:
        raw_QD = self.queries(texts)
        return raw_QD if self.adapter is None else self.adapter.queries(raw_QD)

    def questions(self) -> Questions:
        """The teaching pairs, with adapted queries; InputError where there are none."""
        generator = self.bench.recipe.generator
        taught = training_pairs(self.bench.pairs, generator.min_relevance, generator.relevance_weights)
        taught = taught.filter(pc.is_in(taught["product_id"], self.bench.products["product_id"].combine_chunks()))
        if not taught.num_rows:
            raise InputError("nothing teaches a generator: no pair of split train reaches generator.min_relevance "
                             f"{generator.min_relevance}")  # fmt: skip
        taught = taught.group_by(["query_id", "product_id"]).aggregate([("query", "min")])
        taught = taught.sort_by([("query_id", "ascending"), ("product_id", "ascending")])
        names = taught["query_id"].to_numpy().astype(object)
        _, first, query_P = np.unique(names, return_index=True, return_inverse=True)
        texts = taught["query_min"].take(pa.array(first)).to_pylist()
        product_P = np.array([self.bench.row_of[product] for product in taught["product_id"].to_pylist()], np.int64)
        return Questions(self.adapted_queries(texts), query_P, product_P)


def encoder_of(job: Job, parts: dict[str, Manifest]) -> Encode:
    """Texts → vectors of the encoder that made the products', not adapted."""
    named = job.recipe.serving.query_encoder or job.recipe.embedding.encoder
    if parts["catalog"].metrics["width"] and not job.recipe.serving.query_encoder:
        raise InputError(
            "the catalogue's embeddings are given and no encoder is known for queries: set serving.query_encoder to "
            "the one that made them"
        )
    encoder = {"name": named, "tokens": job.recipe.embedding.tokens}
    return stored_encoder(job.store, encoder, embeddings=parts["embeddings"], tuned=tuned(parts))
