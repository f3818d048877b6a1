"""A tuned text encoder on Home Depot: the rivals' table. BM25; dense as it is, adapted, tuned, tuned and adapted; BM25 + each.

    python benchmarks/encoder.py --root DATA/home_depot --encoder FOLDER --vectors FOLDER [--products 54667] [--pairs 20000]
        [--epochs 1] [--batch 32] [--learning-rate 5e-5] [--seed 0] [--json F] [--render F …]

Tuned by `catalog.tuning.fine_tune` in one process from pairs of relevance ≥ 2.33, in-batch and BM25 negatives; epochs are judged by
recall@50 of validation queries among their products and a sample of others. Adapters are learned as in `adapter.py`, the weight of
BM25 is chosen on validation queries; figures are of test queries among all products. `--vectors`: keeps products.npy and
queries.npy, and by seed the tuned encoder and its vectors, so that a stopped run goes on. `--products`: a smaller shop, of the
products that validation and test queries ask for and a sample of the others, with the pairs that name them. `--render`: of one
run or more, whose recall is averaged query by query.
Data and encoder are not part of the project: without --root this says so and ends.

Q queries, N products, P pairs.
"""

import json
import os
import time
from pathlib import Path

import adapter
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from adapter import KS, RAW
from harness import RESULTS, finish, parser_of, table, where

from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.catalog.tuning import NEGATIVES_FROM, Taught, fine_tune, pairs_with_negatives
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.quantizer.adapter import CUT, Probe

SAMPLE = 2000  # products among which epochs are judged, beside the relevant ones
BASE, KINDS = "adapted dense", ("dense", "adapted dense", "tuned dense", "tuned and adapted dense")


def smaller(options) -> Path:
    """A folder with the tables of `options.products` products."""
    products = pq.read_table(options.root / "products.parquet").sort_by("product_id")
    pairs = pq.read_table(options.root / "pairs.parquet")
    asked = pairs.filter((pc.field("split") != "train") & (pc.field("relevance") >= adapter.RELEVANT))["product_id"]
    asked_N = pc.is_in(products["product_id"], asked.combine_chunks()).to_numpy()
    order = np.argsort(np.random.default_rng(0).random(len(products)) - asked_N, kind="stable")
    products = products.take(np.sort(order[: options.products]))
    folder = options.vectors / "shop"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(products, folder / "products.parquet")
    known = pc.is_in(pairs["product_id"], products["product_id"].combine_chunks())
    pq.write_table(pairs.filter(known), folder / "pairs.parquet")
    return folder


def taught(options, products, pairs) -> list[Taught]:
    titles, ids = products["title"].to_pylist(), products["product_id"].combine_chunks()
    rows = pairs.filter((pc.field("split") == "train") & (pc.field("relevance") >= adapter.TAUGHT))
    place = pc.index_in(rows["product_id"], ids).to_pylist()
    index = Bm25(products["product_id"].to_pylist(), titles)

    def found(query: str) -> list[int]:
        score_N = index.scores(query)
        first = np.argsort(-score_N, kind="stable")[:NEGATIVES_FROM]
        return first[score_N[first] > 0].tolist()

    known = [(query, row) for query, row in zip(rows["query"].to_pylist(), place) if row is not None]
    return pairs_with_negatives(known, titles, found, seed=options.seed, most=options.pairs)


def tune(options) -> tuple[HuggingFaceEncoder, dict]:
    """The tuned encoder, and how that went; kept in `options.vectors`."""
    kept = options.vectors / f"tuned_{options.seed}"
    if (kept / "run.json").exists():
        return HuggingFaceEncoder(kept, batch=64, tokens=64), json.loads((kept / "run.json").read_text())
    products = pq.read_table(options.root / "products.parquet", columns=["product_id", "title"]).sort_by("product_id")
    pairs = pq.read_table(options.root / "pairs.parquet")
    titles, ids = products["title"].to_pylist(), products["product_id"].combine_chunks()
    judged = pairs.filter((pc.field("split") == "validation") & (pc.field("relevance") >= adapter.RELEVANT))
    judged = judged.filter(pc.is_in(judged["product_id"], ids))
    queries, query_P = np.unique(judged["query"].to_numpy().astype(object), return_inverse=True)
    row_P = pc.index_in(judged["product_id"], ids).to_numpy()
    others = np.random.default_rng(0).choice(len(titles), min(SAMPLE, len(titles)), replace=False)
    rows = np.unique(np.concatenate([row_P, others]))
    encoder = HuggingFaceEncoder(options.encoder, batch=64, tokens=64)

    def score() -> float:
        probe = Probe(
            query_QD=encoder.encode(queries.tolist()), product_ND=encoder.encode([titles[row] for row in rows]),
            query_P=query_P, product_P=np.searchsorted(rows, row_P),
        )  # fmt: skip
        return probe.recall(None, (CUT,))[str(CUT)]

    def say(step: int, steps: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step}/{steps} loss {loss:.3f} {time.process_time():.0f} s", flush=True)

    lessons, start, cpu = taught(options, products, pairs), time.perf_counter(), time.process_time()
    history = fine_tune(
        encoder, lessons, epochs=options.epochs, batch=options.batch, learning_rate=options.learning_rate, seed=options.seed,
        score=score, say=say,
    )  # fmt: skip
    about = {
        "seed": options.seed, "pairs": len(lessons), "batch": options.batch, "epochs": options.epochs,
        "learning_rate": options.learning_rate, "judged_among": len(rows), "history": history,
        "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip
    print(json.dumps(about), flush=True)
    encoder.save(kept)
    (kept / "run.json").write_text(json.dumps(about))
    return encoder, about


def with_tuned(options, data: adapter.Data, encoder: HuggingFaceEncoder) -> adapter.Data:
    """The same pairs with vectors of the tuned encoder."""
    folder = options.vectors / f"tuned_{options.seed}"
    for name, column in (("products", "title"), ("queries", "query")):
        if not (folder / f"{name}.npy").exists():
            read = options.root / "products.parquet" if name == "products" else options.vectors / "queries.parquet"
            texts = pq.read_table(read).sort_by("product_id" if name == "products" else "query_id")[column].to_pylist()
            np.save(folder / f"{name}.npy", encoder.encode(texts))
    return adapter.load(type(options)(**{**vars(options), "vectors": folder}))


def measure(options) -> dict:
    start = time.perf_counter()
    encoder, run = tune(options)
    plain = adapter.load(options)
    tuned = with_tuned(options, plain, encoder)
    test, found, weights = plain.splits["test"], {}, {}
    found["BM25"] = adapter.recalls(test, test.lexical_QN)
    for data, name in ((plain, "dense"), (tuned, "tuned dense")):
        linear, about = adapter.learned(data, adapter.W_AND_V, options.seed)
        print(json.dumps(about), flush=True)
        for kind, one in ((name, None), ("adapted dense" if data is plain else "tuned and adapted dense", linear)):
            weights[kind] = adapter.best_weight(data.splits["validation"], one)
            for method, weight in ((kind, 0.0), (f"BM25 + {kind}", weights[kind])):
                found[method] = adapter.recalls(data.splits["test"], adapter.scores(data.splits["test"], one, weight))
    unseen_Q = ~np.isnan(adapter.recalls(test, test.lexical_QN, test.unseen_P)[:, 0])
    return {
        **where("encoder"), "products": len(test.probe.product_ND), "encoder": Path(options.encoder).name,
        "taught_pairs": len(plain.train[0]), "validation_queries": len(plain.splits["validation"].probe.query_QD),
        "run": run, "weights": weights,
        "asked_unseen": unseen_Q.tolist(), "seconds": time.perf_counter() - start,
        "recall": {method: value_QK.tolist() for method, value_QK in found.items()},
    }  # fmt: skip


def text_of(runs: list[dict]) -> str:
    first, names = runs[0], list(runs[0]["recall"])
    mean = {name: np.mean([run["recall"][name] for run in runs], axis=0) for name in names}
    tuning, queries = first["run"], len(mean["BM25"])
    minutes = np.mean([run["run"]["cpu_seconds"] for run in runs]) / 60
    seeds = f"seed{'s' * (len(runs) > 1)} {', '.join(str(run['run']['seed']) for run in runs)}"
    lines = [
        "# A tuned text encoder on Home Depot\n",
        f"Written by `benchmarks/encoder.py`: {first['products']:,} products (titles), {queries:,} test queries, encoder "
        f"{first['encoder']}, {seeds}. Tuned on {tuning['pairs']:,} of {first['taught_pairs']:,} training pairs (relevance ≥ "
        f"{adapter.TAUGHT}), from all of which adapters are learned, for {tuning['epochs']} epoch(s), batch "
        f"{tuning['batch']}, learning rate {tuning['learning_rate']:g}: {minutes:.0f} minutes of one core, its "
        f"validation included. Relevant: ≥ {adapter.RELEVANT}. In brackets the 95 % interval of the bootstrap over test "
        f"queries (10,000 resamples), of differences the paired one. Epoch and weight of BM25 were chosen on "
        f"{first['validation_queries']} validation queries. Machine: {first['machine']}; one thread.\n",
        table(["", *(f"recall@{k}" for k in KS)], [[name, *map(_interval, _cells(mean[name]))] for name in names]),
    ]
    rival = f"BM25 + {BASE}"
    rows = [
        [f"{name} − {rival}", *(_interval(cell, "+") for cell in _cells(mean[name] - mean[rival]))]
        for name in names
        if name.startswith("BM25") and name != rival
    ]
    lines.append(table(["difference", *(f"@{k}" for k in KS)], rows))
    rows = [
        [f"seed {run['run']['seed']}", *(f"{record['score']:.3f}" for record in run["run"]["history"])] for run in runs
    ]
    epochs = [str(record["epoch"]) for record in tuning["history"]]
    lines.append(
        table(
            [f"recall@{CUT} of validation queries among {tuning['judged_among']:,} products, by epoch", *epochs], rows
        )
    )
    chosen = "; ".join(f"{kind}: {_joined(run['weights'][kind] for run in runs)}" for kind in KINDS)
    lines.append(f"Weight of BM25 / {RAW:g} beside the cosine: {chosen}.")
    return "\n".join(lines)


def _joined(numbers) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _cells(value_QK: np.ndarray) -> list[list[float]]:
    return [list(interval) for interval in bootstrap_means(value_QK)]


def _interval(cell: list[float], sign: str = "") -> str:
    mean, low, high = cell
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "encoder.md")
    parser.add_argument(
        "--render", type=Path, nargs="+", help="measure nothing: write the page from earlier runs (--json)"
    )
    parser.add_argument(
        "--root", type=Path, default=os.environ.get("HOME_DEPOT"), help="folder with products.parquet and pairs.parquet"
    )
    parser.add_argument("--encoder", help="sentence encoder: id or folder")
    parser.add_argument("--vectors", type=Path, help="folder that keeps encoder and vectors between runs")
    parser.add_argument("--pairs", type=int, default=20000, help="training pairs, a seeded sample")
    parser.add_argument("--products", type=int, help="of a smaller shop; left out: all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.render:
        finish([json.loads(path.read_text()) for path in options.render], text_of, options)
    elif not (options.root and options.encoder and options.vectors):
        print(
            json.dumps(
                {"skipped": "give --root, the folder of Home Depot (or set HOME_DEPOT), --encoder and --vectors"}
            )
        )
    else:
        options.root = smaller(options) if options.products else options.root
        finish(measure(options), lambda figures: text_of([figures]), options)


if __name__ == "__main__":
    main()
