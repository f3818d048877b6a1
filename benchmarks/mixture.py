"""What each term of the served mixture brings, fitted on validation, tried on test, beside BM25 + adapted dense of all products.

    python benchmarks/mixture.py --store URI [--json FILE] [--out benchmarks/results/mixture.md]

`--store` holds a release of jobs/recipes/home_depot.yaml (`benchmarks/home_depot.py --store` leaves one); without it this says so
and ends. One process, no Ray. Fitted weights are those of `retrieval/mixture.py`; "validation" is cross-fitted. The candidates
are the first 200 of each query by the recipe's weights. The rivals' weights of BM25 are chosen on validation: BM25 + adapted
dense, and BM25 + dense as it is, that is without the adapter.

N products, Q queries.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from harness import RESULTS, finish, parser_of, table, where

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.evaluation.protocol import Judgements, per_query_recalls
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages import evaluate
from catid2_ray.retrieval.mixture import Judged, cross_fitted, fitted
from catid2_ray.retrieval.rescoring import Expansion, Hit
from catid2_ray.retrieval.retriever import Retriever

KS = (10, 50, 100)
CANDIDATES, BATCH = 200, 32
STATED = Expansion(a=0.1, path="root", dense="dot", lexical_weight=0.05, most=None)
LEXICAL = (0.02, 0.03, 0.05, 0.08, 0.1, 0.15)
TERMS = {
    "dense": lambda hit, named: hit.dense,
    "BM25": lambda hit, named: hit.lexical,
    "√P": lambda hit, named: np.exp(hit.logp / 2),
    "P": lambda hit, named: np.exp(hit.logp),
    "log P": lambda hit, named: hit.logp,
    "√P where named": lambda hit, named: named * np.exp(hit.logp / 2),
    "not named": lambda hit, named: 1.0 - named,
}
WAYS = (
    ("dense", "BM25"), ("dense", "BM25", "log P"), ("dense", "BM25", "P"), ("dense", "BM25", "√P"),
    ("dense", "BM25", "√P", "√P where named"), ("dense", "BM25", "√P", "not named"),
)  # fmt: skip
SERVED = ("dense", "BM25", "√P")


class Asked(NamedTuple):
    judgements: Judgements
    hits: list[list[Hit]]

    def judged(self, terms: tuple[str, ...], named: set[str]) -> list[Judged]:
        return [
            Judged(
                np.array([[TERMS[term](hit, hit.product_id in named) for term in terms] for hit in hits], float),
                np.array([hit.product_id in wanted for hit in hits], bool),
            )
            for hits, wanted in zip(self.hits, self.judgements.relevant)
        ]

    def ranked(self, scores: list[np.ndarray]) -> list[list[str]]:
        return [
            [hits[at].product_id for at in np.argsort(-score_M, kind="stable")[: max(KS)]]
            for hits, score_M in zip(self.hits, scores)
        ]


def searched(retriever: Retriever, judgements: Judgements, k: int) -> list[list[Hit]]:
    queries = judgements.queries
    return [hits for at in range(0, len(queries), BATCH) for hits in retriever.retrieve(queries[at : at + BATCH], k=k)]


def as_they_are(store: Store, parts: dict[str, Manifest], retriever: Retriever) -> np.ndarray:
    """float32 N×D, rows of length 1: the products' vectors before the adapter, in the trie's order."""
    of = ProductVectors(store, parts["embeddings"], None)
    table = pa.concat_tables([of.read(part["name"], ["product_id", "embedding"]) for part in of.embeddings.parts()])
    row_N = pc.index_in(retriever.products.product_ids, table["product_id"].combine_chunks()).to_numpy()
    vector_ND = matrix(table["embedding"]).astype(np.float32)[row_N]
    return vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)


def rivals(
    retriever: Retriever, judgements: Judgements, lexical: tuple[float, ...], raw_ND: np.ndarray | None = None
) -> dict[float, list[list[str]]]:
    """By weight of BM25, the 100 products of each query that are best by cosine + weight · BM25, of all. `raw_ND`: the
    products' vectors where the adapter has no say, neither in the queries'."""
    products, ranked = retriever.products, {weight: [] for weight in lexical}
    adapter, retriever.adapter = retriever.adapter, None if raw_ND is not None else retriever.adapter
    vector_ND = products.base_vectors.vectors_ND.astype(np.float32) if raw_ND is None else raw_ND
    names = products.product_ids.to_pylist()
    for at in range(0, len(judgements.queries), BATCH):
        queries = judgements.queries[at : at + BATCH]
        query_BD = torch.nn.functional.normalize(retriever._asked(queries)[-1], dim=-1).numpy()
        for query_D, lexical_N in zip(query_BD, products.all_lexical_scores(queries)):
            dense_N = vector_ND @ query_D
            for weight, lists in ranked.items():
                best = np.argsort(-(dense_N + weight * lexical_N), kind="stable")[: max(KS)]
                lists.append([names[row] for row in best])
    retriever.adapter = adapter
    return ranked


def differences(judgements: Judgements, ranked: list[list[str]], rival: list[list[str]]) -> dict[str, list]:
    """Group → per k (mean, low, high) of the difference of recall over the same queries."""
    recalls = per_query_recalls(judgements, {"ours": ranked, "rival": rival}, KS)
    found = {}
    for group, by_method in recalls.items():
        difference_QK = by_method["ours"] - by_method["rival"]
        found[group] = [list(one) for one in bootstrap_means(difference_QK[np.isfinite(difference_QK[:, 0])])]
    return found


def mean_recall(judgements: Judgements, ranked: list[list[str]]) -> list[float]:
    return per_query_recalls(judgements, {"it": ranked}, KS)["all"]["it"].mean(0).tolist()


def measured(store: Store, cache: Path) -> dict:
    release = releases.current(store)
    parts = release.manifests(store)
    retriever = open_retriever(releases.release_folder(store, release, cache))
    retriever.expansion = STATED
    taught = pc.field("relevance") >= parts["examples"].settings["min_relevance"]
    named = set(evaluate.pairs_of_split(store, parts["pairs"], "train").filter(taught)["product_id"].to_pylist())
    asked = {}
    for split in ("validation", "test"):
        pairs = evaluate.pairs_of_split(store, parts["pairs"], split)
        judged = evaluate.judge(store, parts, pairs, split=split, min_relevance=2.67)
        asked[split] = Asked(judged, searched(retriever, judged, CANDIDATES))
    validation, test = asked.values()
    by_weight = rivals(retriever, validation.judgements, LEXICAL)
    weight = max(LEXICAL, key=lambda one: np.mean(mean_recall(validation.judgements, by_weight[one])))
    rival = rivals(retriever, test.judgements, (weight,))[weight]
    rows = []

    def add(name: str, weights: str, of_validation: list[list[str]], of_test: list[list[str]]) -> None:
        found = [mean_recall(one.judgements, lists) for one, lists in ((validation, of_validation), (test, of_test))]
        rows.append([name, weights, *found, differences(test.judgements, of_test, rival)])
        print(*rows[-1][:4], rows[-1][4]["all"], sep=" | ", flush=True)

    add("BM25 + adapted dense, all products", f"1 {weight:g}", by_weight[weight], rival)
    as_listed = [[[hit.product_id for hit in hits[: max(KS)]] for hits in one.hits] for one in (validation, test)]
    add("as the recipe states", "1 0.05 0.1", *as_listed)
    for terms in WAYS:
        judged = validation.judged(terms, named)
        weight_F = fitted(judged)
        weight_F /= weight_F[0]
        of_test = [one.feature_MF @ weight_F for one in test.judged(terms, named)]
        shown = " ".join(f"{one:.3g}" for one in weight_F)
        add("fitted: " + ", ".join(terms), shown, validation.ranked(cross_fitted(judged)), test.ranked(of_test))
        if terms == SERVED:
            retriever.expansion = Expansion(
                a=weight_F[2], path="root", dense="dot", lexical_weight=weight_F[1], most=None
            )
            hits = searched(retriever, test.judgements, max(KS))
            served = [[hit.product_id for hit in one] for one in hits]
            rows.append(["… as served, all products of the beams", shown, None, mean_recall(test.judgements, served)])
            rows[-1].append(differences(test.judgements, served, rival))
    raw_ND = as_they_are(store, parts, retriever)
    by_weight = rivals(retriever, validation.judgements, LEXICAL, raw_ND)
    weight = max(LEXICAL, key=lambda one: np.mean(mean_recall(validation.judgements, by_weight[one])))
    of_raw = rivals(retriever, test.judgements, (weight,), raw_ND)[weight]
    raw = {"weight": weight, "recall": mean_recall(test.judgements, of_raw), "less": {}}
    for name, lists in (("served", served), ("BM25 + adapted dense", rival)):
        raw["less"][name] = differences(test.judgements, lists, of_raw)
    print(raw, flush=True)
    queries = {split: len(one.judgements.queries) for split, one in asked.items()}
    settings = {"release": release.name, "seed": parts["generator"].recipe["seed"]}
    return {**where("mixture"), **settings, "queries": queries, "rows": rows, "raw": raw}


def report(figures: dict) -> str:
    def recall(values: list[float] | None) -> list:
        return ["–"] * 3 if values is None else [f"{value:.3f}" for value in values]

    asked = figures["queries"]
    text = [
        "# The mixture that ranks what the beams found\n",
        f"Written by `benchmarks/mixture.py`: Home Depot, release {figures['release']}, seed {figures['seed']}, "
        f"{asked['validation']:,} validation and {asked['test']:,} test queries. Weights are in the order of the terms, "
        "dense = 1. P: of the path to depth 2. *Named*: by a training pair, as *seen*. 95 % intervals, paired, over "
        f"queries. {figures['machine']}.\n",
    ]
    head = ("ranked by", "weights", *(f"{split} @{k}" for split in ("validation", "test") for k in KS))
    rows = [[name, weights, *recall(one), *recall(two)] for name, weights, one, two, _ in figures["rows"]]
    text.append(table(head, rows, title="Recall"))
    for group in ("all", "seen", "unseen"):
        rows = [
            [name, *(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in differ[group])]
            for name, *_, differ in figures["rows"][1:]
        ]
        title = f"Test, {group} products: less BM25 + adapted dense"
        text.append(table(("ranked by", *(f"@{k}" for k in KS)), rows, title=title))
    raw = figures["raw"]
    rows = [
        [f"{name}, {group} products", *(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in differ[group])]
        for name, differ in raw["less"].items()
        for group in ("all", "seen", "unseen")
    ]
    found = " ".join(f"{value:.3f}" for value in raw["recall"])
    title = f"Test: less BM25 + dense as it is, which finds {found} with weights 1 {raw['weight']:g}"
    text.append(table(("", *(f"@{k}" for k in KS)), rows, title=title))
    return "\n".join(text)


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "mixture.md")
    parser.add_argument("--store", help="folder or s3:// prefix with a release of the Home Depot recipe")
    options = parser.parse_args()
    if not options.store:
        print(json.dumps({"skipped": "no release: give --store"}))
        return
    torch.set_num_threads(1)
    finish(measured(Store(options.store), releases.default_cache()), report, options)


if __name__ == "__main__":
    main()
