"""What a generator should learn from and by which loss, by the proxy generator on Home Depot; writes benchmarks/results/targets.md.

    python benchmarks/targets.py --catalog DATA/home_depot --encoder FOLDER --store STORE --work FOLDER [--seeds 3] [--arms A,B]
        [--test A,B]

STORE is one to which `jobs.assign_ids` (or `reindex`) of the recipe home_depot gave vectors, adapter and IDs. `--work` keeps
queries' vectors and the recall of every run, which is not run again. Arms are compared on the 593 validation queries; `--test`
names those that are then measured on the test queries. A run is one process and one thread.

Q queries, N products, P pairs, M best products of a query, E examples.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from generator import manifests
from harness import RESULTS, finish, machine, parser_of, spread, table

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.evaluation.proxy import Questions, ranked, recall_of, train
from catid2_ray.generator.teacher import Nearest, drawn, shares
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.vectors import ProductVectors, open_adapter
from catid2_ray.retrieval.trie import Trie

KS, LEARN_FROM, RELEVANT = (10, 50, 100), 2.33, 2.67
BASE = "labels"
BM25_DIVISOR = 10


class Arm(NamedTuple):
    """`teacher`: none, dense or dense_bm25; `share`: of a query's targets that it draws; `titles`: of a title's, from the products
    nearest to it; `loss`: level or trie; `normalize`: of the search."""

    teacher: str = "none"
    share: float = 0.5
    titles: float = 0.0
    loss: str = "level"
    normalize: str = "level"


ARMS = {
    "labels": Arm(), "dense": Arm("dense"), "dense, titles": Arm("dense", titles=0.5), "dense + BM25": Arm("dense_bm25"),
    "dense 25 %": Arm("dense", 0.25), "dense 75 %": Arm("dense", 0.75), "dense alone": Arm("dense", 1.0),
    "titles alone": Arm("none", titles=0.5),
    "labels, trie": Arm(loss="trie", normalize="trie"), "dense, trie": Arm("dense", loss="trie", normalize="trie"),
    "dense, titles, trie": Arm("dense", titles=0.5, loss="trie", normalize="trie"),
    "labels, searched by trie": Arm(normalize="trie"), "labels, trie, searched by level": Arm(loss="trie"),
    "dense, titles 25 %": Arm("dense", titles=0.25), "dense + BM25, titles": Arm("dense_bm25", titles=0.5),
    "dense, titles 75 %": Arm("dense", titles=0.75),
}  # fmt: skip


class Data(NamedTuple):
    product_ids: list[str]
    titles: list[str]
    vector_ND: np.ndarray
    codes_NL: np.ndarray
    codes_per_level: tuple[int, ...]
    texts: list[str]
    learn: Questions
    asked: dict[str, Questions]


def load(options) -> Data:
    store = Store(options.store)
    found = {role: manifests(store, role)[-1] for role in ("embeddings", "adapter", "ids")}
    vectors = ProductVectors.of(store, found)
    tables = [
        vectors.read(part["name"], ["product_id", "embedding"]).append_column(
            "codes", store.read_table(found["ids"].file(part["name"]), columns=["codes"])["codes"]
        )
        for part in found["ids"].parts()
    ]
    products = pa.concat_tables(tables).sort_by("product_id").combine_chunks()
    texts = pq.read_table(options.catalog / "products.parquet", columns=["product_id", "title"])
    ids = products["product_id"].combine_chunks()
    titles = texts["title"].take(pc.index_in(ids, texts["product_id"].combine_chunks())).to_pylist()
    pairs = pq.read_table(options.catalog / "pairs.parquet")
    pairs = pairs.filter(pc.is_in(pairs["product_id"], ids))
    queries = pairs.group_by(["query_id", "query"]).aggregate([]).sort_by("query_id")
    kept = options.work / "queries.npy"
    if not kept.exists():
        np.save(kept, HuggingFaceEncoder(options.encoder, batch=64, tokens=64).encode(queries["query"].to_pylist()))
    query_QD = open_adapter(store, found["adapter"]).queries(np.load(kept))

    def questions(split: str, least: float) -> tuple[Questions, list[str]]:
        chosen = pairs.filter((pc.field("split") == split) & (pc.field("relevance") >= least))
        chosen = chosen.group_by(["query_id", "product_id"]).aggregate([])
        row_P = pc.index_in(chosen["query_id"].combine_chunks(), queries["query_id"].combine_chunks()).to_numpy()
        query_Q, place_P = np.unique(row_P, return_inverse=True)
        product_P = pc.index_in(chosen["product_id"].combine_chunks(), ids).to_numpy().astype(np.int64)
        return Questions(query_QD[query_Q], place_P, product_P), queries["query"].take(pa.array(query_Q)).to_pylist()

    learn, said = questions("train", LEARN_FROM)
    return Data(
        ids.to_pylist(), titles, matrix(products["embedding"]), matrix(products["codes"]).astype(np.int64),
        tuple(found["ids"].metrics["codes_per_level"]), said, learn,
        {split: questions(split, RELEVANT)[0] for split in ("validation", "test")},
    )  # fmt: skip


class Teacher(NamedTuple):
    share_QM: np.ndarray
    row_QM: np.ndarray

    @classmethod
    def of(cls, data: Data, query_QD: np.ndarray, texts: list[str] | None) -> "Teacher":
        """`texts`: of the queries where BM25 is asked too."""
        nearest, index = Nearest(query_QD), None if texts is None else Bm25(data.product_ids, data.titles)
        if index is None:
            nearest.show(data.vector_ND, 0)
            return cls(shares(nearest.score_QM), nearest.row_QM)
        score_QM, row_QM = [], []
        for start in range(0, len(query_QD), 256):
            one = Nearest(query_QD[start : start + 256])
            lexical_QN = np.stack([index.scores(text) for text in texts[start : start + 256]])
            one.show(data.vector_ND, 0, lexical_QN / np.float32(BM25_DIVISOR))
            score_QM.append(one.score_QM)
            row_QM.append(one.row_QM)
        return cls(shares(np.concatenate(score_QM)), np.concatenate(row_QM))

    def draw(self, query_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64 E, a product for each of these queries."""
        _, place_E = drawn(self.share_QM[query_E], np.ones(len(query_E), np.int64), rng.random(len(query_E)))
        return self.row_QM[query_E, place_E]


class Teachers:
    """Made once and kept for all runs."""

    def __init__(self, data: Data, work: Path):
        self.data, self.work, self.made = data, work, {}

    def of(self, name: str) -> Teacher:
        path = self.work / f"teacher-{name}.npz"
        if name not in self.made:
            if not path.exists():
                data = self.data
                query_QD = data.vector_ND if name == "titles" else data.learn.query_QD
                made = Teacher.of(data, query_QD, data.texts if name == "dense_bm25" else None)
                np.savez(path, share=made.share_QM.astype(np.float32), row=made.row_QM)
            arrays = np.load(path)
            self.made[name] = Teacher(arrays["share"], arrays["row"])
        return self.made[name]

    def draws(self, arm: Arm, seed: int):
        """What `proxy.train` draws its targets by."""
        own_E = np.concatenate([self.data.learn.product_P, np.arange(len(self.data.vector_ND))])
        sources = [(arm.teacher, arm.share, self.data.learn.query_P, 0)]
        sources.append(
            ("titles" if arm.titles else "none", arm.titles, np.arange(len(self.data.vector_ND)), len(sources[0][2]))
        )

        def draw(epoch: int) -> np.ndarray:
            rng, product_E = np.random.default_rng((seed, epoch)), own_E.copy()
            for name, share, query_X, first in sources:
                if name != "none":
                    taught_X = np.flatnonzero(rng.random(len(query_X)) < share)
                    product_E[first + taught_X] = self.of(name).draw(query_X[taught_X], rng)
            return product_E

        return draw


def run(data: Data, teachers: Teachers, arm: Arm, seed: int, splits: list[str], path: Path) -> None:
    """Recall Q×len(KS) of each split, and how long it took, into `path`."""
    start, trie = time.process_time(), Trie.build(data.codes_NL, codes_per_level=data.codes_per_level)
    torch.set_float32_matmul_precision("medium")
    model = train(
        data.vector_ND, data.codes_NL, data.codes_per_level, data.learn, seed=seed, draws=teachers.draws(arm, seed),
        trie=trie if arm.loss == "trie" else None,
    )  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    taught = time.process_time()
    found = {
        split: recall_of(
            ranked(model, trie, data.asked[split].query_QD, normalize=arm.normalize), data.asked[split], KS
        )
        for split in splits
    }
    np.savez(path, seconds=[taught - start, time.process_time() - taught], **found)


def page(figures: dict) -> str:
    text = (
        "# What to learn from, and by which loss\n\nWritten by `benchmarks/targets.py`: the proxy generator (a perceptron over "
        "adapted query vectors, eight epochs of 34,781 pairs and 54,667 titles) over the IDs of the recipe `home_depot`, beam 100, "
        "whole IDs. *Dense*: half of a query's targets are drawn from softmax(cosine / .05) over its 64 nearest; "
        f"*+ BM25*: of cosine + BM25 / {BM25_DIVISOR}; *titles*: half of a title's targets are drawn likewise, from the products "
        "nearest. Other shares are named. *Trie*: the loss, or the search, compares the children of a node alone. Budgets are "
        "equal in examples. Mean over seeds ± half the range; differences are paired over queries, seeds averaged, with the 95 % "
        f"interval. {machine()}; one thread.\n"
    )
    tables = []
    for split, arms in figures.items():
        rows = [
            [arm, of["seeds"], *(spread(column, ".3f") for column in zip(*of["recall"])), *of["gain"], f"{of['seconds']:.0f}"]
            for arm, of in arms.items()
        ]  # fmt: skip
        names = ["targets, loss", "seeds", *(f"@{k}" for k in KS), *(f"@{k} − {BASE}" for k in KS), "seconds"]
        tables.append(table(names, rows, title=f"{split} queries"))
    return "\n".join([text, *tables])


def gathered(work: Path) -> dict:
    """Per split and arm the recall of each seed, and the gain over BASE."""
    figures = {}
    for split in ("validation", "test"):
        recall = {}
        for arm in ARMS:
            for path in sorted(work.glob(f"{slug(arm)}-[0-9].npz")):
                arrays = np.load(path)
                if split in arrays:
                    recall.setdefault(arm, {})[int(path.stem[-1])] = arrays[split], float(arrays["seconds"][0])
        for arm, by_seed in recall.items():
            both = sorted(by_seed.keys() & recall.get(BASE, {}).keys())
            gain = ["–"] * len(KS)
            if arm != BASE and both:
                less_QK = np.mean([by_seed[seed][0] - recall[BASE][seed][0] for seed in both], 0)
                gain = [f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for i in bootstrap_means(less_QK)]
            figures.setdefault(split, {})[arm] = {
                "seeds": len(by_seed), "recall": [one.mean(0).tolist() for one, _ in by_seed.values()], "gain": gain,
                "seconds": float(np.mean([seconds for _, seconds in by_seed.values()])),
            }  # fmt: skip
    return figures


def slug(arm: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in arm)


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "targets.md")
    parser.add_argument("--catalog", type=Path, help="folder with products.parquet and pairs.parquet")
    parser.add_argument("--encoder")
    parser.add_argument("--store")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", help="A,B,… separated by semicolons; default: all; none = only write the page")
    parser.add_argument("--test", default="", help="arms that the test queries are asked of, separated by semicolons")
    options = parser.parse_args()
    if not (options.catalog and options.store and options.work):
        print(json.dumps({"skipped": "no data: give --catalog FOLDER --encoder FOLDER --store STORE --work FOLDER"}))
        return
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    arms = list(ARMS) if options.arms is None else [arm for arm in options.arms.split(";") if arm in ARMS]
    data = teachers = None
    for seed in range(options.seeds):
        for arm in arms:
            tested = arm in options.test.split(";")
            path = options.work / f"{slug(arm)}-{seed}.npz"
            if path.exists() and (not tested or "test" in np.load(path)):
                continue
            if data is None:
                data = load(options)
                teachers = Teachers(data, options.work)
            run(data, teachers, ARMS[arm], seed, ["validation", *(["test"] if tested else [])], path)
            arrays = np.load(path)
            print(
                arm,
                seed,
                arrays["seconds"].round(1).tolist(),
                arrays["validation"].mean(0).round(4).tolist(),
                flush=True,
            )
    finish(gathered(options.work), page, options)


if __name__ == "__main__":
    main()
