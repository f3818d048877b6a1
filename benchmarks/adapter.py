"""Adapters on Home Depot: dense search and BM25 + dense, with the encoder's vectors as they are, with W alone, with W and V.

    python benchmarks/adapter.py --root DATA/home_depot --encoder FOLDER [--vectors FOLDER] [--seeds 3] [--json F] [--render F]

Learned by `quantizer.adapter.fit` in one process from pairs of relevance ≥ 2.33; epochs and the weight of BM25 are chosen on
validation queries, figures are of test queries. `--vectors`: a folder that keeps products.npy and queries.npy between runs, the
rows of the one in the order of product_id, of the other in that of queries.parquet, and gets adapted_products.npy and
adapted_queries.npy (W and V, seed 0; adapted_1_products.npy … of other seeds), which other benchmarks read.
Data and encoder are not part of the project: without --root this says so and ends.

Q queries, N products, P pairs, S seeds.
"""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from harness import RESULTS, finish, parser_of, table, where

from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.quantizer.adapter import CUT, LinearAdapter, Probe, fit

TAUGHT, RELEVANT = 2.33, 2.67
KS = (10, 50, 100)
RAW = 20.0  # BM25 of a good match of three words: BM25 / RAW and a cosine are of one scale
LEXICAL = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3)  # weights of BM25 / RAW beside a cosine
PLAIN, W_ALONE, W_AND_V = "as it is", "W alone", "W and V"


class Split(NamedTuple):
    """`probe`: queries and relevant pairs; `lexical_QN`: BM25 / RAW; `unseen_P`: pairs whose product no training pair names."""

    probe: Probe
    lexical_QN: np.ndarray
    unseen_P: np.ndarray


class Data(NamedTuple):
    train: tuple[torch.Tensor, ...]
    splits: dict[str, Split]


def load(options) -> Data:
    products = pq.read_table(options.root / "products.parquet", columns=["product_id", "title"]).sort_by("product_id")
    pairs = pq.read_table(options.root / "pairs.parquet")
    queries = pairs.group_by(["query_id", "query"]).aggregate([]).sort_by("query_id")
    texts = queries["query"].to_pylist()
    product_ND = encoded(options, "products", products["title"].to_pylist())
    query_TD = encoded(options, "queries", texts)
    if options.vectors:
        pq.write_table(queries, options.vectors / "queries.parquet")
    pairs = pairs.filter(pc.is_in(pairs["product_id"], products["product_id"].combine_chunks()))
    query_P = pc.index_in(pairs["query_id"], queries["query_id"].combine_chunks()).to_numpy()
    product_P = pc.index_in(pairs["product_id"], products["product_id"].combine_chunks()).to_numpy()
    split_P, relevance_P = pairs["split"].to_numpy(), pairs["relevance"].to_numpy()
    teaches_P = (split_P == "train") & (relevance_P >= TAUGHT)
    seen = np.unique(product_P[teaches_P])
    columns = (query_TD[query_P], product_ND[product_P], query_P, product_P)
    train = tuple(torch.from_numpy(column[teaches_P]) for column in columns)
    index, splits = Bm25(products["product_id"].to_pylist(), products["title"].to_pylist()), {}
    for name in ("validation", "test"):
        here_P = (split_P == name) & (relevance_P >= RELEVANT)
        asked, place_P = np.unique(query_P[here_P], return_inverse=True)
        probe = Probe(
            query_QD=query_TD[asked],
            product_ND=product_ND,
            query_P=place_P,
            product_P=product_P[here_P].astype(np.int64),
        )
        lexical_QN = np.stack([index.scores(texts[query]) for query in asked]) / np.float32(RAW)
        splits[name] = Split(probe, lexical_QN, ~np.isin(probe.product_P, seen))
    return Data(train, splits)


def encoded(options, name: str, texts: list[str]) -> np.ndarray:
    """float32, rows of length 1 in the order of the texts."""
    kept = options.vectors / f"{name}.npy" if options.vectors else None
    if kept and kept.exists():
        return np.load(kept)
    vectors = HuggingFaceEncoder(options.encoder, batch=64, tokens=64).encode(texts)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, vectors)
    return vectors


def keep(folder: Path, adapter: LinearAdapter, seed: int) -> None:
    for name, adapted in (("products", adapter.products), ("queries", adapter.queries)):
        np.save(folder / f"adapted_{f'{seed}_' * (seed > 0)}{name}.npy", adapted(np.load(folder / f"{name}.npy")))


def learned(data: Data, kind: str, seed: int) -> tuple[LinearAdapter, dict]:
    adapter = LinearAdapter(data.train[0].shape[1])
    adapter.product_DD.requires_grad_(kind == W_AND_V)
    probe, start = data.splits["validation"].probe, time.perf_counter()
    adapter, history = fit(
        *data.train, recall=lambda one: probe.recall(one, (CUT,))[str(CUT)], seed=seed, adapter=adapter
    )  # fmt: skip
    scores = [record["score"] for record in history]
    about = {"epoch": int(np.argmax(scores)), "validation": scores, "seconds": time.perf_counter() - start}
    return adapter, {"kind": kind, "seed": seed, **about}


def scores(split: Split, adapter: LinearAdapter | None, weight: float) -> np.ndarray:
    """float32 Q×N: cosine + weight · BM25 / RAW."""
    query_QD, product_ND = split.probe.query_QD, split.probe.product_ND
    if adapter is not None:
        query_QD, product_ND = adapter.queries(query_QD), adapter.products(product_ND)
    return query_QD @ product_ND.T + np.float32(weight) * split.lexical_QN


def recalls(split: Split, score_QN: np.ndarray, counts_P: np.ndarray | None = None) -> np.ndarray:
    """float64 Q×len(KS), of the relevant pairs that count (all where None); NaN for a query without one."""
    query_P, product_P = split.probe.query_P, split.probe.product_P
    own_P = score_QN[query_P, product_P]
    # Equal scores stand in the order of their rows: BM25 gives many products the same.
    rank_P = np.array(
        [
            np.count_nonzero(score_QN[q] > own) + np.count_nonzero(score_QN[q, :row] == own)
            for q, row, own in zip(query_P, product_P, own_P)
        ]
    )
    counts_P = np.ones(len(query_P), bool) if counts_P is None else counts_P
    wanted_Q = np.bincount(query_P, counts_P, minlength=len(score_QN))
    with np.errstate(invalid="ignore"):
        return np.stack(
            [np.bincount(query_P, counts_P * (rank_P < k), minlength=len(score_QN)) / wanted_Q for k in KS], 1
        )


def best_weight(split: Split, adapter: LinearAdapter | None) -> float:
    """Of BM25, by mean recall over KS; of equals the first."""
    return max(LEXICAL, key=lambda weight: recalls(split, scores(split, adapter, weight)).mean())


def measure(options) -> dict:
    data, runs, found, weights = load(options), [], {}, {}
    validation, test = data.splits["validation"], data.splits["test"]
    for kind in (PLAIN, W_ALONE, W_AND_V):
        for seed in range(1 if kind == PLAIN else options.seeds):
            adapter = None
            if kind != PLAIN:
                adapter, about = learned(data, kind, seed)
                runs.append(about)
                print(json.dumps(about), flush=True)
                if options.vectors and kind == W_AND_V:
                    keep(options.vectors, adapter, seed)
            weight = best_weight(validation, adapter)
            weights.setdefault(kind, []).append(weight)
            for method, of_bm25 in ((f"dense, {kind}", 0.0), (f"BM25 + dense, {kind}", weight)):
                score_QN = scores(test, adapter, of_bm25)
                cells = [recalls(test, score_QN), recalls(test, score_QN, test.unseen_P)]
                found.setdefault(method, []).append(cells)
    mean = {method: np.mean(seeds, axis=0) for method, seeds in found.items()}  # over seeds: 2×Q×len(KS)
    plain = {method: method.split(", ")[0] + f", {PLAIN}" for method in mean}
    groups = {}
    for place, name in enumerate(("all products", "unseen products")):
        asked_Q = ~np.isnan(mean[f"dense, {PLAIN}"][place][:, 0])
        of = {method: values[place][asked_Q] for method, values in mean.items()}
        groups[name] = {
            "queries": int(asked_Q.sum()),
            "recall": {method: cells_of(value_QK) for method, value_QK in of.items()},
            "difference": {m: cells_of(of[m] - of[plain[m]]) for m in of if m != plain[m]},
        }
    return {
        **where("adapter"), "products": len(test.probe.product_ND), "pairs": len(data.train[0]), "seeds": options.seeds,
        "encoder": Path(options.encoder).name, "validation_queries": len(validation.probe.query_QD), "runs": runs,
        "weights": weights, "groups": groups,
    }  # fmt: skip


def cells_of(value_QK: np.ndarray) -> list[list[float]]:
    return [list(interval) for interval in bootstrap_means(value_QK)]


def text_of(figures: dict) -> str:
    seconds = np.mean([run["seconds"] for run in figures["runs"]])
    lines = [
        "# Adapters on Home Depot\n",
        f"Written by `benchmarks/adapter.py`: {figures['products']:,} products (titles), {figures['pairs']:,} training pairs of "
        f"relevance ≥ {TAUGHT}; relevant: ≥ {RELEVANT}; encoder {figures['encoder']}. {figures['seeds']} seeds, whose recall is "
        f"averaged query by query; in brackets the 95 % interval of the bootstrap over test queries (10,000 resamples), of "
        f"differences the paired one. Epoch and weight of BM25 were chosen on {figures['validation_queries']} validation "
        f"queries. Machine: {figures['machine']}; one thread. One adapter: {seconds:.0f} s, validation included.\n",
    ]
    for name, group in figures["groups"].items():
        rows = [[method, *map(_interval, cells)] for method, cells in group["recall"].items()]
        lines.append(table([f"{name}, {group['queries']:,} queries", *(f"recall@{k}" for k in KS)], rows))
        rows = [
            [f"{method} − the same, {PLAIN}", *(_interval(c, "+") for c in cells)]
            for method, cells in group["difference"].items()
        ]
        lines.append(table(["difference", *(f"@{k}" for k in KS)], rows))
    rows = [
        [f"{run['kind']}, seed {run['seed']}", run["epoch"], *(f"{score:.3f}" for score in run["validation"])]
        for run in figures["runs"]
    ]
    epochs = range(len(figures["runs"][0]["validation"]))
    lines.append(table([f"validation recall@{CUT} by epoch", "taken", *map(str, epochs)], rows))
    chosen = "; ".join(f"{kind}: {', '.join(f'{w:g}' for w in ws)}" for kind, ws in figures["weights"].items())
    lines.append(f"Weight of BM25 / {RAW:g} beside the cosine: {chosen}.")
    return "\n".join(lines)


def _interval(cell: list[float], sign: str = "") -> str:
    mean, low, high = cell
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "adapter.md", stored="the figures of an earlier run (--json)")
    parser.add_argument(
        "--root", type=Path, default=os.environ.get("HOME_DEPOT"), help="folder with products.parquet and pairs.parquet"
    )
    parser.add_argument("--encoder", help="sentence encoder: id or folder")
    parser.add_argument("--vectors", type=Path, help="folder that keeps the vectors between runs")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.render:
        finish(json.loads(options.render.read_text()), text_of, options)
    elif not options.root:
        print(json.dumps({"skipped": "no Home Depot data: give --root FOLDER or set HOME_DEPOT"}))
    else:
        finish(measure(options), text_of, options)


if __name__ == "__main__":
    main()
