"""Stage 5b: recall of the beam search, and of what is served, beside BM25 and dense search: all, seen, unseen products.

Searching is spread over actors that map the trie into memory; judgements are small and stay in the driver. BM25 and dense
search are in-memory baselines of one actor, left out above `evaluation.bm25_max_products`. As many validation queries as
`evaluation.diagnose_rows` pays for are searched without pruning too, to say where relevant products are lost.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import default_cache, parts_folder, retriever_settings, tuned
from catid2_ray.artifacts.stages import ANSWERS, STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.text import join_text
from catid2_ray.config import EvaluationRecipe, Recipe
from catid2_ray.errors import InputError
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.diagnosis import Diagnosis, diagnose, diagnosis_figures, rows_per_query
from catid2_ray.evaluation.protocol import Judgements, evaluate
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.query_encoder import open_retriever, stored_encoder
from catid2_ray.on_ray.machine.vectors import ProductVectors, adapted_queries, open_adapter
from catid2_ray.on_ray.stages.catalog import PAIR_FILES, part_specs, read_sample
from catid2_ray.on_ray.stages.lay_out import encoder_of
from catid2_ray.retrieval.arrays import HEADER

KS = (5, 10, 20, 50, 100)
METHODS = ("beam", "lookahead", "bm25", "dense", "served")
IN_MEMORY = ("bm25", "dense")  # one process holds the catalogue
_QUERIES_PER_SPEC, _DIAGNOSED_PER_SPEC = 64, 16
_SAMPLES, _SAMPLE_CHARACTERS = 3, 200
_KEPT_QUERIES, _KEPT_PRODUCTS = 50, 10  # of answers.json


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The evaluation artefact: figures.json and, of what is served, answers.json, which a replica must be able to give back."""
    settings = {**job.recipe.evaluation.identity(), "seed": job.recipe.seed}
    if not settings["diagnose_rows"]:
        del settings["diagnose_rows"]  # evaluations of before there was a diagnosis keep their keys
    sometimes = []
    if "dense" in job.recipe.evaluation.methods:
        sometimes += ["embeddings", *(["adapter"] if "adapter" in parts else [])]
        settings["encoder"] = job.recipe.serving.query_encoder or job.recipe.embedding.encoder
    nodes = ["node_vectors"] if "node_vectors" in parts else []
    mixture = ["mixture"] if "mixture" in parts else []
    if "lookahead" in job.recipe.evaluation.methods and nodes:
        sometimes += [*nodes, *mixture]
        settings["ahead"] = ahead_of(job.recipe, parts)
    if "served" in job.recipe.evaluation.methods:
        sometimes += ["serving", *(nodes if job.recipe.serving.looks_ahead else []), *mixture]
    parents = STAGES["evaluation"].reads(parts, *dict.fromkeys(sometimes))
    return job.produce("evaluation", settings, parents, lambda attempt: _evaluate(job, attempt, parts))


def ahead_of(recipe: Recipe, parts: dict[str, Manifest]) -> dict | None:
    """What the method lookahead searches with, beside beams: weights and encoder; None without node vectors. Words count where
    the release is served so, and has an index of them."""
    if "node_vectors" not in parts:
        return None
    weights = recipe.serving.lookahead.weights
    if "mixture" in parts:
        weights |= parts["mixture"].metrics.get("lookahead", {})
    if not recipe.serving.looks_ahead:
        weights["lexical_weight"] = 0.0
    return {"lookahead": weights, "encoder": encoder_of(recipe, parts)}


def _evaluate(job: Job, attempt: Attempt, parts: dict[str, Manifest]) -> Manifest:
    recipe = job.recipe.evaluation
    if not recipe.methods or not parts["pairs"].metrics["pairs_table"]:
        figures = _nothing(job, parts)
    else:
        pairs = pairs_of_split(job.store, parts["pairs"], recipe.split)
        diagnosed = to_diagnose(job, parts)
        figures = score(
            job.store,
            parts,
            judge(job.store, parts, pairs, split=recipe.split, min_relevance=recipe.min_relevance),
            beam_width=recipe.beam_width,
            methods=recipe.methods,
            workers=recipe.workers,
            max_queries=recipe.max_queries,
            seed=job.recipe.seed,
            bm25_max=recipe.bm25_max_products,
            query_encoder=job.recipe.serving.query_encoder,
            diagnosed=diagnosed if isinstance(diagnosed, Judgements) else None,
            ahead=ahead_of(job.recipe, parts) if "lookahead" in recipe.methods else None,
        )
        if isinstance(diagnosed, str):
            figures["diagnosis"] = {"queries": 0, "reason": diagnosed}
    contents = {ANSWERS: figures.pop("answers", None), "figures.json": figures}
    entries = [
        job.store.write_file(attempt.name(name), json.dumps(content, indent=1).encode())
        for name, content in contents.items()
        if content is not None
    ]
    return attempt.commit(entries, metrics=figures)


VALIDATION, _MOST_DIAGNOSED = "validation", 100


def to_diagnose(job: Job, parts: dict[str, Manifest]) -> Judgements | str | None:
    """The validation queries that the recipe pays for, seeded; or why there are none; or None where none are asked for."""
    recipe, ids = job.recipe.evaluation, parts["ids"]
    if not recipe.diagnose_rows:
        return None
    nodes = json.loads(job.store.read(ids.file(f"trie/{HEADER}")))["nodes"]
    cost = sum(nodes[: _retriever_settings(parts, recipe).get("stop_level") or len(nodes) - 1])
    queries = min(_MOST_DIAGNOSED, recipe.diagnose_rows // cost)
    if not queries:
        return f"a query costs {cost:,} decoder rows, evaluation.diagnose_rows is {recipe.diagnose_rows:,}"
    judged = judged_validation(job, parts)
    return judged if isinstance(judged, str) else sampled(judged, queries, seed=job.recipe.seed)


def judged_validation(job: Job, parts: dict[str, Manifest]) -> Judgements | str:
    """The validation queries that have a relevant product, or why there are none."""
    pairs = pairs_of_split(job.store, parts["pairs"], VALIDATION)
    if not pairs.num_rows:
        return f"the pairs have no {VALIDATION} split"
    try:
        return judge(job.store, parts, pairs, split=VALIDATION, min_relevance=job.recipe.evaluation.min_relevance)
    except InputError as error:
        return str(error)


def _retriever_settings(parts: dict[str, Manifest], recipe: EvaluationRecipe) -> dict:
    """What is served, where the recipe evaluates that; else the beam alone."""
    alone = None if "served" in recipe.methods else recipe.beam_width
    return retriever_settings(parts, release="candidate", beam_width=alone)


def sampled(judgements: Judgements, queries: int, *, seed: int) -> Judgements:
    """At most so many of the queries, seeded, in their order."""
    if queries >= len(judgements.queries):
        return judgements
    chosen = np.sort(np.random.default_rng([seed, 3]).permutation(len(judgements.queries))[:queries])
    columns = ("query_ids", "queries", "relevant", "seen", "unseen")
    return Judgements(
        **{name: [getattr(judgements, name)[i] for i in chosen] for name in columns},
        dropped_pairs=judgements.dropped_pairs,
    )


def _nothing(job: Job, parts: dict[str, Manifest]) -> dict:
    """The figures where nothing is evaluated, with the reason; some titles stand for queries."""
    table = parts["pairs"].metrics["pairs_table"]
    reason = "evaluation.methods is empty" if table else "the catalogue has no table of pairs"
    progress.event("not_evaluated", reason=repr(reason))
    titles = read_sample(job.store, parts["catalog"], ["title"], rows=_SAMPLES, seed=job.recipe.seed)[
        "title"
    ].to_pylist()
    queries = [title[:_SAMPLE_CHARACTERS] for title in titles]
    nothing = {"recall": {}, "recall_seen": {}, "recall_unseen": {}, "queries": {"all": 0, "seen": 0, "unseen": 0}}
    return {**nothing, "dropped_pairs": 0, "not_evaluated": reason, "sample_queries": queries}


def pairs_of_split(store: Store, pairs: Manifest, split: str) -> pa.Table:
    tables = [store.read_table(pairs.file(entry["name"])) for entry in pairs.named(PAIR_FILES)]
    return pa.concat_tables([table.filter(pc.field("split") == split) for table in tables])


def score(
    store: Store, parts: dict[str, Manifest], judgements: Judgements, *, methods: tuple[str, ...], beam_width: int, workers: int,
    seed: int, max_queries: int | None = None, bm25_max: int = 5_000_000, query_encoder: str | None = None,
    diagnosed: Judgements | None = None, ahead: dict | None = None,
) -> dict:  # fmt: skip
    """Figures of `evaluation.protocol.evaluate` plus `sample_queries`, for the judgements of any table of pairs; with
    `diagnosis` of the queries `diagnosed`, where they are given, and where "served" is a method `answers`: of some queries the
    products that were found.

    `query_encoder`: for "dense" where the products' vectors are given by the catalogue. `ahead`: what `ahead_of` gives, for
    "lookahead", which is left out without.
    """
    if max_queries:
        judgements = sampled(judgements, max_queries, seed=seed)
    handlers = {
        "beam": (_Search, {"parts": parts, "beam_width": beam_width}),
        "lookahead": (_Search, {"parts": parts, "beam_width": beam_width, "ahead": ahead}),
        "served": (_Search, {"parts": parts, "beam_width": None}),
        "bm25": (_Bm25Search, {"catalog": parts["catalog"]}),
        "dense": (DenseSearch, {"parts": parts, "query_encoder": query_encoder, "k": max(KS)}),
        "diagnosis": (_Diagnose, {"parts": parts, "beam_width": None if "served" in methods else beam_width}),
    }
    asked = {method: sliced(judgements, _QUERIES_PER_SPEC) for method in methods}
    if diagnosed is not None:
        asked["diagnosis"] = sliced(diagnosed, _DIAGNOSED_PER_SPEC, relevant=True)
    # One pool runs all of its methods, so what bounds the actors worth starting is the slices of one method.
    workers = min(workers, max(map(len, asked.values())))
    pools: dict[int, dict] = {}  # by number of actors, the methods that they run
    for method, slices in asked.items():
        if method in IN_MEMORY and parts["catalog"].rows > bm25_max:
            progress.event("skip", method=method, products=parts["catalog"].rows, limit=bm25_max)
            continue
        if method == "lookahead" and ahead is None:
            progress.event("skip", method=method, reason="'there are no node vectors'")
            continue
        pools.setdefault(1 if method in IN_MEMORY else workers, {})[method] = slices
    results = {}
    for size, together in pools.items():
        results |= _results(store, {name: handlers[name] for name in together}, together, workers=size)
    ranked = {
        method: [row for one in results[method] for row in one["ranked"]] for method in methods if method in results
    }
    figures = evaluate(judgements, ranked, KS) | {
        "sample_queries": judgements.queries[:: max(1, len(judgements.queries) // _SAMPLES)][:_SAMPLES]
    }
    if "served" in ranked:
        step = -(-len(judgements.queries) // _KEPT_QUERIES)
        figures["answers"] = {
            query: products[:_KEPT_PRODUCTS]
            for query, products in zip(judgements.queries[::step], ranked["served"][::step])
        }
    if "diagnosis" in results:
        figures["diagnosis"] = _joined(results["diagnosis"])
    return figures


def sliced(judgements: Judgements, size: int, *, relevant: bool = False) -> list[dict]:
    """The queries, with what is relevant if asked for, as specs of at most `size` of them."""
    specs = []
    for start in range(0, len(judgements.queries), size):
        part = slice(start, start + size)
        specs.append({"queries": judgements.queries[part], "rows": len(judgements.queries[part])})
        if relevant:
            specs[-1]["relevant"] = [sorted(wanted) for wanted in judgements.relevant[part]]
    return specs


def _results(
    store: Store, handlers: dict[str, tuple], slices: dict[str, list[dict]], *, workers: int
) -> dict[str, list[dict]]:
    """By method, what its handler gave for each slice; all in one pass over one pool, since a process that only starts costs
    more than most of the searching."""
    specs = [{"method": method, **part} for method in handlers for part in slices[method]]
    found = map_parts(
        _Rank, {"store": store, "handlers": handlers}, specs, workers=workers,
        label=f"searching with {', '.join(handlers)}", unit="queries", actors=True,
    )  # fmt: skip
    results = {method: [] for method in handlers}
    for spec, result in zip(specs, found):
        results[spec["method"]].append(result)
    return results


def _joined(results: list[dict]) -> dict:
    """The figures of a diagnosis, from those of its slices."""
    diagnosis = Diagnosis.joined([Diagnosis.from_json(result["diagnosis"]) for result in results])
    return diagnosis_figures(diagnosis, split=VALIDATION, rows_per_query=results[0]["rows_per_query"])


def judge(store: Store, parts: dict[str, Manifest], pairs: pa.Table, *, split: str, min_relevance: float) -> Judgements:
    """What counts as relevant in this table of pairs, and what of it the generator was taught.

    Raises InputError where no pair of the split names a product of the catalogue.
    """
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
        [pa.array([], pa.string())]
        + [
            pc.unique(training_pairs(table, **taught)["product_id"].combine_chunks())
            for table in (
                store.read_table(parts["pairs"].file(e["name"]), columns=["product_id", "split", "relevance"])
                for e in parts["pairs"].named(PAIR_FILES)
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


class _Rank:
    """Actor: the specs of one method after the other; it holds what one method needs."""

    def __init__(self, *, store: Store, handlers: dict[str, tuple]):
        self.store, self.handlers, self.method, self.handler = store, handlers, None, None

    def __call__(self, spec: dict) -> dict:
        if spec["method"] != self.method:
            handler_class, arguments = self.handlers[spec["method"]]
            self.handler = None  # given back before the next is opened
            self.handler, self.method = handler_class(store=self.store, **arguments), spec["method"]
        return self.handler(spec)


class _Search:
    """A retriever over the candidate release, on this node's cache: the beam alone, looking ahead or not, or what is served."""

    def __init__(self, *, store: Store, parts: dict[str, Manifest], beam_width: int | None, ahead: dict | None = None):
        settings = retriever_settings(parts, release="candidate", beam_width=beam_width, ahead=ahead)
        self.retriever = open_retriever(parts_folder(store, parts, default_cache(), settings))

    def __call__(self, spec: dict) -> dict:
        texts = [query[: self.retriever.max_query_chars] for query in spec["queries"]]
        # A larger k would widen the beam beyond what is served.
        hits = self.retriever.retrieve(texts, k=min(max(KS), self.retriever.beam_width))
        return {"position": spec["position"], "ranked": [[hit.product_id for hit in row] for row in hits]}


class _Diagnose:
    """A retriever over the candidate release, searched without pruning."""

    def __init__(self, *, store: Store, parts: dict[str, Manifest], beam_width: int | None):
        settings = retriever_settings(parts, release="candidate", beam_width=beam_width)
        self.retriever = open_retriever(parts_folder(store, parts, default_cache(), settings))

    def __call__(self, spec: dict) -> dict:
        diagnosis = diagnose(self.retriever, spec["queries"], spec["relevant"])
        return {
            "position": spec["position"],
            "diagnosis": diagnosis.as_json(),
            "rows_per_query": rows_per_query(self.retriever),
        }


class _Bm25Search:
    """The whole catalogue's titles and descriptions in memory."""

    def __init__(self, *, store: Store, catalog: Manifest):
        tables = [
            store.read_table(catalog.file(spec["file"]), columns=["product_id", "title", "description"])
            for spec in part_specs(catalog)
        ]
        products = pa.concat_tables(tables)
        self.index = Bm25(products["product_id"].to_pylist(), join_text(products, ("title", "description")))

    def __call__(self, spec: dict) -> dict:
        return {"position": spec["position"], "ranked": self.index.retrieve(spec["queries"], k=max(KS))}


_BLOCK = 65_536  # products scored at a time


class DenseSearch:
    """Actor: queries in, their `k` nearest products by cosine out."""

    def __init__(self, *, store: Store, parts: dict[str, Manifest], query_encoder: str | None, k: int):
        embeddings, self.k = parts["embeddings"], k
        made_by = Recipe.stored(embeddings.recipe).embedding
        if parts["catalog"].metrics["width"] and not query_encoder:
            raise InputError(
                "dense search needs vectors for queries, but the catalogue's embeddings are given and no encoder is known: set "
                "serving.query_encoder, or leave dense out of the methods"
            )
        encoder = {"name": query_encoder or made_by.encoder, "tokens": made_by.tokens}
        encode = stored_encoder(store, encoder, embeddings=embeddings, tuned=tuned(parts))
        self.encode = adapted_queries(encode, open_adapter(store, parts.get("adapter")))
        ids, blocks, vectors = [], [], ProductVectors.of(store, parts)
        for entry in embeddings.parts():
            table = vectors.read(entry["name"], ["product_id", "embedding"])
            vector_ND = torch.from_numpy(np.array(matrix(table["embedding"]), np.float32))
            blocks.append(torch.nn.functional.normalize(vector_ND, dim=-1).half())
            ids += table["product_id"].to_pylist()
        order = sorted(range(len(ids)), key=ids.__getitem__)
        self.product_ids = [ids[i] for i in order]
        self.vector_ND = torch.cat(blocks)[torch.tensor(order)]

    def __call__(self, spec: dict) -> dict:
        query_BD = torch.nn.functional.normalize(torch.from_numpy(np.asarray(self.encode(spec["queries"]))), dim=-1)
        if query_BD.shape[1] != self.vector_ND.shape[1]:
            raise InputError(
                f"queries have vectors of width {query_BD.shape[1]}, products of {self.vector_ND.shape[1]}: set "
                "serving.query_encoder to the encoder that made the products' vectors"
            )
        score_BN = torch.cat([query_BD @ block.float().T for block in self.vector_ND.split(_BLOCK)], 1).numpy()
        return {"position": spec["position"], "ranked": [self._best(score_N) for score_N in score_BN]}

    def _best(self, score_N: np.ndarray) -> list[str]:
        k, at = min(self.k, len(score_N)), np.arange(len(score_N))
        if k < len(score_N):
            # All that tie with the last are kept, so that the cut does not depend on the partition's order.
            at = np.flatnonzero(score_N >= np.partition(score_N, len(score_N) - k)[len(score_N) - k])
        return [self.product_ids[i] for i in at[np.argsort(-score_N[at], kind="stable")][:k]]
