"""What releases of the Home Depot recipe find, beside every rival over all products: the table that decides.

    python benchmarks/retrieval.py --release frozen=URI [--release frozen=URI@r-0123456789ab] [--release tuned=URI …]
        [--json FILE] [--out benchmarks/results/retrieval.md] [--render JSON …]

One label names releases that differ by their seed: their recall is averaged query by query. The first label is the base whose
BM25 + adapted dense all others are compared with. A release gives its rivals too: vectors as its encoder makes them (*dense*) and
after the adapter, each alone and beside BM25, scored exhaustively over all products, the weight of BM25 chosen on validation; then
the generator alone with a beam of 100, looking ahead, and what is served; of some queries what 8-bit weights change. One process,
no Ray, one thread. `--render`: the page of one earlier run or more, in their order. Without either this says so and ends.

K cut-offs, Q queries.
"""

import json
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS, finish, parser_of, table, where
from mixture import KS, LEXICAL, as_they_are, mean_recall, rivals, searched

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.evaluation.protocol import Judgements, per_query_recalls
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.stages import evaluate
from catid2_ray.retrieval.rescoring import Hit
from catid2_ray.retrieval.retriever import Retriever

RETURNED = max(KS)
IN_8_BITS = 64  # queries
WORDS, RIVAL, SERVED = "BM25", "BM25 + adapted dense", "served"
GROUPS = {"all": "All products", "seen": "Products that a training pair names", "unseen": "The other products"}


def opened(place: str):
    """(store, release, its parts) of URI or URI@NAME."""
    uri, _, name = place.partition("@")
    store = Store(uri)
    release = releases.load(store, name) if name else releases.current(store)
    return store, release, release.manifests(store)


def judged(store: Store, parts: dict, split: str, recipe: Recipe) -> Judgements:
    pairs = evaluate.pairs_of_split(store, parts["pairs"], split)
    return evaluate.judge(store, parts, pairs, split=split, min_relevance=recipe.evaluation.min_relevance)


def lists_of(place: str) -> tuple[Judgements, dict, dict]:
    """(test queries, method → Q lists of product ids, about the release)."""
    store, release, parts = opened(place)
    recipe, cache = Recipe.stored(parts["generator"].recipe), releases.default_cache()
    validation, test = (judged(store, parts, split, recipe) for split in ("validation", "test"))
    retriever = open_retriever(releases.release_folder(store, release, cache))
    found, weights = {}, {}
    found[WORDS] = by_words(retriever, test)
    for name, raw_ND in (("dense", as_they_are(store, parts, retriever)), ("adapted dense", None)):
        by_weight = rivals(retriever, validation, LEXICAL, raw_ND)
        weights[name] = max(LEXICAL, key=lambda one: np.mean(mean_recall(validation, by_weight[one])))
        alone_and_beside = rivals(retriever, test, (0.0, weights[name]), raw_ND)
        found[name], found[f"{WORDS} + {name}"] = alone_and_beside[0.0], alone_and_beside[weights[name]]
    beam = releases.retriever_settings(parts, release=release.name, beam_width=RETURNED)
    ahead = releases.retriever_settings(
        parts, release=release.name, beam_width=RETURNED, ahead=evaluate.ahead_of(recipe, parts)
    )
    for name, settings in (("generator alone", beam), ("looking ahead", ahead)):
        way = open_retriever(releases.parts_folder(store, parts, cache, settings))
        found[name] = names_of(searched(way, test, RETURNED))
    found[SERVED] = names_of(searched(retriever, test, RETURNED))
    way = open_retriever(releases.parts_folder(store, parts, cache, beam | {"weights": "int8"}))
    in_8_bits = names_of(way.retrieve(test.queries[:IN_8_BITS], k=RETURNED))
    same = [len({*one} & {*other}) / len(one) for one, other in zip(in_8_bits, found["generator alone"])]
    about = {
        "release": release.name, "seed": recipe.seed, "head": recipe.generator.head, "weights": weights,
        "encoder_mode": recipe.embedding.encoder_mode, "products": retriever.trie.rows,
        "same_in_8_bits": float(np.mean(same)), "validation_queries": len(validation.queries),
    }  # fmt: skip
    return test, found, about


def by_words(retriever: Retriever, judgements: Judgements) -> list[list[str]]:
    """BM25 alone: of each query at most RETURNED products, all of which share a word with it."""
    names, lists = retriever.products.product_ids.to_pylist(), []
    for query in judgements.queries:
        (lexical_N,) = retriever.products.all_lexical_scores([query])
        best = np.argsort(-lexical_N, kind="stable")[:RETURNED]
        lists.append([names[row] for row in best[lexical_N[best] > 0]])
    return lists


def names_of(hits: list[list[Hit]]) -> list[list[str]]:
    return [[hit.product_id for hit in one] for one in hits]


def measured(places: list[str]) -> dict:
    recall: dict[str, dict[str, list]] = {}  # by label and method: of each seed, group → Q×K
    about: dict[str, list] = {}
    for label, place in (one.split("=", 1) for one in places):
        test, found, of_release = lists_of(place)
        by_group = per_query_recalls(test, found, KS)
        about.setdefault(label, []).append(of_release)
        for method in found:
            of_method = {group: by_group[group][method].tolist() for group in GROUPS}
            recall.setdefault(label, {}).setdefault(method, []).append(of_method)
            print(label, of_release["release"], method, np.mean(of_method["all"], axis=0).round(3), flush=True)
    return {**where("retrieval"), "releases": about, "test_queries": len(test.queries), "recall": recall}


def joined(runs: list[dict]) -> dict:
    """Several runs as one."""
    figures = {**runs[0], "releases": {}, "recall": {}}
    for run in runs:
        for label, about in run["releases"].items():
            figures["releases"].setdefault(label, []).extend(about)
            for method, seeds in run["recall"][label].items():
                figures["recall"].setdefault(label, {}).setdefault(method, []).extend(seeds)
    return figures


def report(figures: dict) -> str:
    labels, base = list(figures["recall"]), next(iter(figures["recall"]))
    several = len(labels) > 1
    runs = [
        f"*{label}*: encoder {first['encoder_mode']}, head {first['head']}, "
        + ", ".join(f"{one['release']} (seed {one['seed']})" for one in figures["releases"][label])
        for label in labels
        for first in figures["releases"][label][:1]
    ]
    first = figures["releases"][base][0]
    chosen = "; ".join(
        f"{label}: " + ", ".join(f"{name} {weight:g}" for name, weight in one["weights"].items())
        for label in labels
        for one in figures["releases"][label]
    )
    same = np.mean([one["same_in_8_bits"] for label in labels for one in figures["releases"][label]])
    text = [
        "# Everything on, beside its rivals\n",
        f"Written by `benchmarks/retrieval.py`: Home Depot, {first['products']:,} products, {figures['test_queries']:,} test "
        f"queries. Releases: {'; '.join(runs)}. Machine: {figures['machine']}; one thread.\n",
        "Rivals score every product; the weight of BM25 beside a cosine was chosen on "
        f"{first['validation_queries']} validation queries ({chosen}), as were a release's own weights. All return "
        f"{RETURNED} products. *Dense* is as the release's encoder makes the vectors, *adapted* after the linear adapter. In "
        "brackets: 95 % interval of the bootstrap over queries (10,000 resamples), of differences the paired one; several "
        f"seeds are averaged query by query. With 8-bit weights the generator returns {same:.1%} of the products that it "
        f"returns in float32 ({IN_8_BITS} queries a release).\n",
    ]
    for group, title in GROUPS.items():
        mean = {
            label: {
                method: np.mean([np.array(one[group], float) for one in seeds], axis=0)
                for method, seeds in figures["recall"][label].items()
            }
            for label in labels
        }
        asked_Q = ~np.isnan(mean[base][WORDS][:, 0])
        rows, less, rival_QK = [], [], mean[base][RIVAL]
        for label in labels:
            for method, value_QK in mean[label].items():
                if method == WORDS and label != base:
                    continue
                name = f"{method}, {label}" if several and method != WORDS else method
                rows.append([name, *map(shown, bootstrap_means(value_QK[asked_Q]))])
                if value_QK is not rival_QK:
                    less.append([name, *(shown(one, "+") for one in bootstrap_means((value_QK - rival_QK)[asked_Q]))])
        for label in labels[1:]:
            own_QK = (mean[label][SERVED] - mean[label][RIVAL])[asked_Q]
            less.append([f"{SERVED} − {RIVAL}, both {label}", *(shown(one, "+") for one in bootstrap_means(own_QK))])
        text.append(f"## {title} ({asked_Q.sum():,} queries)\n")
        text.append(table(["", *(f"recall@{k}" for k in KS)], rows))
        text.append(table([f"less {RIVAL}{f', {base}' * several}", *(f"@{k}" for k in KS)], less))
    return "\n".join(text)


def shown(cell, sign: str = "") -> str:
    mean, low, high = cell
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "retrieval.md")
    parser.add_argument("--render", type=Path, nargs="+", metavar="JSON", help="measure nothing: render earlier runs")
    parser.add_argument("--release", action="append", metavar="LABEL=URI[@NAME]", help="a release; repeatable")
    options = parser.parse_args()
    if options.render:
        finish(joined([json.loads(path.read_text()) for path in options.render]), report, options)
    elif not options.release:
        print(json.dumps({"skipped": "no release: give --release LABEL=URI"}))
    else:
        torch.set_num_threads(1)
        finish(measured(options.release), report, options)


if __name__ == "__main__":
    main()
