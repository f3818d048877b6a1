"""Stage 5: recall of the constrained beam search beside BM25, at product level, for all, seen and unseen products.

Searching is spread over actors that map the trie into memory; judgements are small and stay in the driver. BM25 is an
in-memory baseline in one actor, left out above `evaluation.bm25_max_products`.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import default_cache, retriever_settings, serving_folder
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.text import join_text
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.protocol import Judgements, evaluate
from catid2_ray.on_ray import progress
from catid2_ray.on_ray.catalog import part_specs
from catid2_ray.on_ray.parts import map_parts
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.retrieval.retriever import Retriever

KS = (5, 10, 20, 50, 100)
_QUERIES_PER_SPEC = 64
_SAMPLES = 3


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The evaluation artefact: figures.json."""
    settings = {**job.recipe.evaluation.identity(), "seed": job.recipe.seed}
    parents = {role: parts[role] for role in ("catalog", "ids", "examples", "generator")}
    return job.produce("evaluation", settings, parents, lambda attempt: _evaluate(job, attempt, parents))


def _evaluate(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe = job.recipe.evaluation
    pairs = _pairs_of_split(job.store, parents["catalog"], recipe.split)
    figures = score(
        job.store,
        parents,
        pairs,
        split=recipe.split,
        min_relevance=recipe.min_relevance,
        beam_width=recipe.beam_width,
        methods=recipe.methods,
        workers=recipe.workers,
        max_queries=recipe.max_queries,
        seed=job.recipe.seed,
        bm25_max=recipe.bm25_max_products,
    )
    entry = job.store.write_file(attempt.name("figures.json"), json.dumps(figures, indent=1).encode())
    return attempt.commit([entry], metrics=figures)


def _pairs_of_split(store: Store, catalog: Manifest, split: str) -> pa.Table:
    tables = [store.read_table(catalog.file(entry["name"])) for entry in catalog.named("pairs/part-")]
    return pa.concat_tables([table.filter(pc.field("split") == split) for table in tables])


def score(
    store: Store, parts: dict[str, Manifest], pairs: pa.Table, *, split: str, min_relevance: float, methods: tuple[str, ...],
    beam_width: int, workers: int, seed: int, max_queries: int | None = None, bm25_max: int = 5_000_000,
) -> dict:  # fmt: skip
    """Figures of `evaluation.protocol.evaluate` plus `sample_queries`, for any table of pairs against these parts."""
    judgements = _judge(store, parts, pairs, split=split, min_relevance=min_relevance)
    if max_queries and max_queries < len(judgements.queries):
        chosen = np.sort(np.random.default_rng([seed, 3]).permutation(len(judgements.queries))[:max_queries])
        judgements = _only(judgements, chosen)
    queries, ranked = judgements.queries, {}
    for method in methods:
        if method == "bm25" and parts["catalog"].rows > bm25_max:
            progress.event("skip", method="bm25", products=parts["catalog"].rows, limit=bm25_max)
            continue
        handler, arguments, pool = {
            "beam": (_BeamSearch, {"parts": parts, "beam_width": beam_width}, workers),
            "bm25": (_Bm25Search, {"catalog": parts["catalog"]}, 1),
        }[method]
        specs = [
            {
                "queries": queries[start : start + _QUERIES_PER_SPEC],
                "rows": len(queries[start : start + _QUERIES_PER_SPEC]),
            }
            for start in range(0, len(queries), _QUERIES_PER_SPEC)
        ]
        results = map_parts(
            handler,
            {"store": store, **arguments},
            specs,
            workers=pool,
            label=f"searching with {method}",
            unit="queries",
            actors=True,
        )
        ranked[method] = [row for result in results for row in result["ranked"]]
    return evaluate(judgements, ranked, KS) | {
        "sample_queries": queries[:: max(1, len(queries) // _SAMPLES)][:_SAMPLES]
    }


def _judge(
    store: Store, parts: dict[str, Manifest], pairs: pa.Table, *, split: str, min_relevance: float
) -> Judgements:
    catalog, named = parts["catalog"], pairs["product_id"].unique()
    known = pa.concat_tables(
        [
            table.filter(pc.is_in(table["product_id"], named))
            for table in (store.read_table(catalog.file(e["name"]), columns=["product_id"]) for e in catalog.parts())
        ]
    )["product_id"]
    taught = {
        "min_relevance": parts["examples"].settings["min_relevance"],
        "weights": parts["examples"].settings.get("relevance_weights"),
    }
    seen = pa.concat_arrays(
        [
            pc.unique(training_pairs(table, **taught)["product_id"].combine_chunks())
            for table in (
                store.read_table(catalog.file(e["name"]), columns=["product_id", "split", "relevance"])
                for e in catalog.named("pairs/part-")
            )
        ]
    )
    seen = _known_to_the_generator(store, parts, seen)
    return Judgements.from_pairs(
        pairs, split=split, min_relevance=min_relevance, seen=seen.filter(pc.is_in(seen, named)), known=known
    )


def _known_to_the_generator(store: Store, parts: dict[str, Manifest], seen: pa.Array) -> pa.Array:
    """After an append: those of `seen` that were in the catalogue which the generator learned from."""
    ids, learned = parts["ids"], parts["generator"].parents["ids"]
    if ids.digest == learned:
        return seen
    number = ids.metrics["number"] - 1 - ids.extends["ids"].index(learned)
    known = []
    for entry in ids.named("ledger/"):
        table = store.read_table(ids.file(entry["name"]), columns=["product_id", "since"])
        known.append(table.filter(pc.field("since") <= number)["product_id"])
    return seen.filter(
        pc.is_in(seen, pa.chunked_array([chunk for column in known for chunk in column.chunks], pa.string()))
    )


def _only(judgements: Judgements, chosen: np.ndarray) -> Judgements:
    columns = ("query_ids", "queries", "relevant", "seen", "unseen")
    return Judgements(
        **{name: [getattr(judgements, name)[i] for i in chosen] for name in columns},
        dropped_pairs=judgements.dropped_pairs,
    )


class _BeamSearch:
    """Actor: a retriever over the candidate release, on this node's cache."""

    def __init__(self, *, store: Store, parts: dict[str, Manifest], beam_width: int):
        settings = retriever_settings(parts, release="candidate", beam_width=beam_width)
        self.retriever = Retriever.open(
            serving_folder(store, parts["ids"], parts["generator"], default_cache(), settings)
        )

    def __call__(self, spec: dict) -> dict:
        texts = [query[: self.retriever.max_query_chars] for query in spec["queries"]]
        # A larger k would widen the beam beyond what is served.
        hits = self.retriever.retrieve(texts, k=min(max(KS), self.retriever.beam_width))
        return {"position": spec["position"], "ranked": [[hit.product_id for hit in row] for row in hits]}


class _Bm25Search:
    """Actor: the whole catalogue's titles and descriptions in memory."""

    def __init__(self, *, store: Store, catalog: Manifest):
        tables = [
            store.read_table(catalog.file(spec["file"]), columns=["product_id", "title", "description"])
            for spec in part_specs(catalog)
        ]
        products = pa.concat_tables(tables)
        self.index = Bm25(products["product_id"].to_pylist(), join_text(products, ("title", "description")))

    def __call__(self, spec: dict) -> dict:
        return {"position": spec["position"], "ranked": self.index.retrieve(spec["queries"], k=max(KS))}
