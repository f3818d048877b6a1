"""What a search finds that looks ahead by node vectors, without any generator, beside dense search, BM25 and both.

    python benchmarks/lookahead.py --root DATA/home_depot --vectors FOLDER [--splits validation,test] [--beams 100]
        [--spaces adapted_,] [--keep FOLDER] [--lexical 0.05] [--seeds 0] [--json FILE] [--out benchmarks/results/lookahead.md]

`--vectors` holds float32 matrices of unit rows: products.npy in the order of products.parquet, queries.npy in that of its own
queries.parquet (query_id, …), and where a linear adapter was learned adapted_products.npy and adapted_queries.npy; `--spaces`
are the beginnings of these names. IDs are those of residual k-means (K 256, L 4) made unique; `--keep` keeps them between runs.
A seed s is that of k-means, and beyond 0 the adapter's too: adapted_1_products.npy …, as `benchmarks/adapter.py` leaves them.
Recall is averaged over seeds query by query. Data and vectors are not part of the project. Recall of relevant products
(relevance ≥ 2.67), 95 % intervals over queries. Times
are of one thread and of batches of 16, all ways in turns; the generator timed is an untrained T5 of the recipe's size.

The functions are for other benchmarks too: `codes_of`, `Tree`, `Asked`, `looked_ahead`, `mixed`.

N products, Q queries, D width of a vector, M products of a query's beams.
"""

import json
import tempfile
import time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from harness import RESULTS, finish, in_turns, medians, parser_of, rounded, table, where, wholes

from catid2_ray.catalog.text import join_text
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.metrics import bootstrap_means, recalls
from catid2_ray.evaluation.protocol import Judgements
from catid2_ray.generator.model import small_t5
from catid2_ray.identifiers.collisions import assign_unique
from catid2_ray.quantizer.kmeans import nearest, residual_kmeans
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.live_view import result_rows
from catid2_ray.retrieval.lookahead import Ahead, Lookahead, best_words
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

KS = (10, 50, 100)
CODES = (256, 256, 256, 256)
BATCH = 32
ONLY_VECTORS = Lookahead(logp_weight=0.0, vector_weight=1.0)


class Asked(NamedTuple):
    """The queries of a split: `query_QD` their vectors, `bm25_QN` in the order of the products, `judgements`."""

    judgements: Judgements
    query_QD: np.ndarray
    bm25_QN: np.ndarray


def codes_of(vector_ND: np.ndarray, product_ids: list[str], *, seed: int) -> np.ndarray:
    """int64 N×L, unique IDs of residual k-means."""
    residual_ND, codes = torch.from_numpy(vector_ND), []
    books = residual_kmeans(residual_ND, codes_per_level=CODES, seed=seed, iterations=15)
    for level, book_KD in enumerate(books):
        codes.append(nearest(residual_ND, book_KD))
        if level < len(books) - 1:
            residual_ND = residual_ND - book_KD[codes[-1]]
    return assign_unique(
        torch.stack(codes, 1).numpy(), residual_ND.numpy(), [b.numpy() for b in books], product_ids
    ).codes_NL


class Tree:
    """A trie over products with their vectors in its order, and node vectors of any depth, in a temporary folder."""

    def __init__(self, codes_NL: np.ndarray, vector_ND: np.ndarray):
        self.trie = Trie.build(codes_NL, codes_per_level=CODES)
        self._folder, self._nodes, self.seconds = tempfile.TemporaryDirectory(), {}, {}
        folder = Path(self._folder.name)
        self.vectors = VectorStore.write(folder / "vectors", [vector_ND[self.trie.order_N]], normalize=True)

    def nodes(self, depth: int) -> NodeVectors:
        if depth not in self._nodes:
            start = time.perf_counter()
            folder = Path(self._folder.name) / f"nodes_{depth}"
            self._nodes[depth] = NodeVectors.write(folder, self.trie, self.vectors, depth=depth)
            self.seconds[depth] = time.perf_counter() - start
        return self._nodes[depth]


def looked_ahead(
    tree: Tree,
    asked: Asked,
    *,
    depth: int,
    beam: int,
    settings: Lookahead = ONLY_VECTORS,
    top_k: int | None = None,
    levels=None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each query the products (row numbers of the input) that the beams hold, best S first, and their S."""
    products, scores = [], []
    for start in range(0, len(asked.query_QD), BATCH):
        part, words = slice(start, start + BATCH), None
        query_BD = asked.query_QD[part]
        if settings.lexical_weight:
            words = best_words(asked.bm25_QN[part][:, tree.trie.order_N], tree.trie, [None] * len(query_BD))
        ahead = Ahead(settings, tree.nodes(depth), query_BD, words=words)
        found = constrained_beam_search(
            None, tree.trie, None, None, beam_width=beam, top_k=top_k or beam, ahead=ahead, levels=levels
        )
        for b, rows in enumerate(result_rows(found, tree.trie)):
            products.append(tree.trie.order_N[rows.row_M])
            scores.append(found.score_BK[b].numpy()[rows.result_M])
    return products, scores


def mixed(
    asked: Asked, vector_ND: np.ndarray, lexical: float, pool: list[np.ndarray] | None = None
) -> list[np.ndarray]:
    """The 100 products of each query that are best by cosine + lexical · BM25, of the `pool` or of all."""
    ranked = []
    for q, query_D in enumerate(asked.query_QD):
        row_M = np.arange(len(vector_ND)) if pool is None else np.sort(pool[q])
        score_M = vector_ND[row_M] @ query_D + lexical * asked.bm25_QN[q, row_M]
        ranked.append(row_M[np.argsort(-score_M, kind="stable")[: max(KS)]])
    return ranked


class Data:
    """Home Depot's tables, and BM25 of every query that is judged."""

    def __init__(self, root: Path, vectors: Path):
        self.products = pq.read_table(root / "products.parquet")
        self.pairs = pq.read_table(root / "pairs.parquet")
        self.product_ids = self.products["product_id"].to_pylist()
        self.queries = pq.read_table(vectors / "queries.parquet")["query_id"].to_pylist()
        self._asked: dict[str, tuple[Judgements, np.ndarray]] = {}

    @cached_property
    def _bm25(self) -> Bm25:
        return Bm25(self.product_ids, join_text(self.products, ("title", "description")))

    @cached_property
    def seen(self) -> pa.Array:
        taught = self.pairs.filter((pc.field("split") == "train") & (pc.field("relevance") >= 2.33))
        return taught["product_id"].unique()

    def asked(self, split: str, query_ND: np.ndarray) -> Asked:
        if split not in self._asked:
            judged = Judgements.from_pairs(
                self.pairs, split=split, min_relevance=2.67, seen=self.seen, known=self.product_ids
            )
            place = {product_id: row for row, product_id in enumerate(self._bm25.product_ids)}
            at = [place[product_id] for product_id in self.product_ids]
            self._asked[split] = judged, np.stack([self._bm25.scores(query)[at] for query in judged.queries])
        judged, bm25_QN = self._asked[split]
        row_of = {query_id: row for row, query_id in enumerate(self.queries)}
        return Asked(judged, query_ND[[row_of[query_id] for query_id in judged.query_ids]], bm25_QN)

    def recall(self, asked: Asked, ranked: list[np.ndarray], group: str = "relevant") -> np.ndarray:
        """float64 Q×len(KS), of queries with a relevant product in the group."""
        names = [[self.product_ids[row] for row in rows[: max(KS)]] for rows in ranked]
        wanted = getattr(asked.judgements, group)
        recall_QK = recalls(names, wanted, KS)
        return recall_QK[[len(one) > 0 for one in wanted]]


class Found(NamedTuple):
    """`read`: products whose vectors are read a query; `recall_QK`: recall at KS."""

    read: float
    recall_QK: np.ndarray


def rows_of(seeds: list[dict[str, Found]]) -> list[list]:
    """Rows of a table: name, products read, recall at KS over the seeds with intervals, the recall at 50 of each seed."""
    rows = []
    for name in seeds[0]:
        found = [of_seed[name] for of_seed in seeds]
        means = bootstrap_means(np.mean([one.recall_QK for one in found], 0))
        rows.append([
            name, round(float(np.mean([one.read for one in found]))),
            *(f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in means),
            " ".join(f"{one.recall_QK[:, KS.index(50)].mean():.3f}" for one in found),
        ])  # fmt: skip
    return rows


def measured(
    data: Data, tree: Tree, vector_ND: np.ndarray, asked: Asked, beams: list[int], lexical: float
) -> dict[str, Found]:
    """What each way finds. `lexical`: the weight of BM25 beside the cosine, in S and in the re-scoring."""
    rows = {}

    def add(name: str, ranked: list[np.ndarray], pool: list[np.ndarray] | None = None) -> None:
        size = len(vector_ND) if pool is None else float(np.mean([len(products) for products in pool]))
        rows[name] = Found(size, data.recall(asked, ranked))
        print(name, f"{size:.0f}", rows[name].recall_QK.mean(0).round(4), flush=True)

    add("dense", mixed(asked, vector_ND, 0.0))
    add("BM25 + dense", mixed(asked, vector_ND, lexical))
    words = replace(ONLY_VECTORS, lexical_weight=lexical)
    for beam in beams:
        for depth in (1, 2, 3, 4):
            pool, _ = looked_ahead(tree, asked, depth=depth, beam=beam)
            add(f"whole IDs, vectors to depth {depth}, beam {beam}", pool, pool)
        for depth in (2, 3):
            pool, _ = looked_ahead(tree, asked, depth=depth, beam=beam, settings=words)
            add(f"whole IDs, vectors to depth {depth} and words, beam {beam}", pool, pool)
        for level in (2, 3):
            pool, _ = looked_ahead(tree, asked, depth=level, beam=beam, levels=level, settings=words)
            add(f"stop at level {level}, then BM25 + dense, beam {beam}", mixed(asked, vector_ND, lexical, pool), pool)
    return rows


def milliseconds(tree: Tree, asked: Asked, *, beam: int, turns: int = 5) -> dict[str, float]:
    """Median milliseconds per query of a beam search, alone and looking ahead, with and without the generator."""
    model = small_t5(
        vocabulary=5000, width=192, layers=4, heads=6, feed_forward=768, dropout=0.0, codes_per_level=CODES
    ).eval()
    query_BD, token_BT = (
        asked.query_QD[:16],
        torch.randint(2, 5000, (16, 8), generator=torch.Generator().manual_seed(0)),
    )

    def search(settings: Lookahead | None, depth: int = 2):
        ahead = None if settings is None else Ahead(settings, tree.nodes(depth), query_BD)
        constrained_beam_search(
            model, tree.trie, token_BT, torch.ones_like(token_BT), beam_width=beam, top_k=beam, ahead=ahead
        )

    both = Lookahead(logp_weight=1.0, vector_weight=20.0)
    runs = {
        "beam": partial(search, None), "look ahead, with the generator": partial(search, both),
        "look ahead by vectors alone": partial(search, ONLY_VECTORS),
        "look ahead by vectors alone, depth 3": partial(search, ONLY_VECTORS, 3),
    }  # fmt: skip
    for run in runs.values():
        run()
    return medians(in_turns(runs, turns=turns), unit=1e3 / len(query_BD))


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "lookahead.md")
    parser.add_argument("--root", type=Path, help="folder with products.parquet and pairs.parquet")
    parser.add_argument("--vectors", type=Path, help="folder with products.npy, queries.npy and queries.parquet")
    parser.add_argument("--splits", default="validation,test")
    parser.add_argument("--spaces", default="adapted_,", help="beginnings of the names of vectors")
    parser.add_argument("--beams", type=wholes, default=[100])
    parser.add_argument("--lexical", type=float, default=0.05, help="weight of BM25 beside the cosine")
    parser.add_argument("--keep", type=Path, help="folder for codes")
    parser.add_argument("--seeds", type=wholes, default=[0])
    options = parser.parse_args()
    if not (options.root and options.vectors):
        print(json.dumps({"skipped": "no data: give --root and --vectors"}))
        return
    torch.set_num_threads(1)
    data, found, sizes, times = Data(options.root, options.vectors), {}, {}, {}
    for space, seed in ((space, seed) for space in options.spaces.split(",") for seed in options.seeds):
        begins = f"{space}{seed}_" if space and seed else space
        vector_ND, query_ND = (np.load(options.vectors / f"{begins}{name}.npy") for name in ("products", "queries"))
        kept = options.keep and options.keep / f"{space}codes_{seed}.npy"
        stored = kept and kept.exists()
        codes_NL = np.load(kept) if stored else codes_of(vector_ND, data.product_ids, seed=seed)
        if kept:
            np.save(kept, codes_NL)
        tree = Tree(codes_NL, vector_ND)
        for split in options.splits.split(","):
            asked = data.asked(split, query_ND)
            times = times or milliseconds(tree, asked, beam=100)
            name = f"{'Adapted vectors' if space else 'Vectors as they are'}, {split} ({len(asked.query_QD):,} queries)"
            found.setdefault(name, []).append(measured(data, tree, vector_ND, asked, options.beams, options.lexical))
        sizes |= {depth: [tree.nodes(depth).nbytes, tree.seconds[depth]] for depth in (1, 2, 3, 4)}
    figures = {
        **where("lookahead"),
        "seeds": options.seeds,
        "tables": {name: rows_of(seeds) for name, seeds in found.items()},
        "nodes": sizes,
        "milliseconds": rounded(times),
    }
    finish(figures, report, options)


def report(figures: dict) -> str:
    text = [
        "# Looking ahead by node vectors\n",
        f"Written by `benchmarks/lookahead.py`, seeds {', '.join(map(str, figures['seeds']))}: Home Depot, 54,667 products, "
        "IDs of residual k-means (K 256, L 4, unique), no generator but where a time says so. Nothing is trained but the "
        "adapter. recall@k of relevant products, averaged over the seeds query by query, with 95 % intervals over queries; "
        f"in the last column @50 of each seed. One thread of {figures['machine']}.\n",
    ]
    head = ("", "vectors of products read", *(f"@{k}" for k in KS), "@50 by seed")
    text += [table(head, rows, title=name) for name, rows in figures["tables"].items()]
    rows = [[f"1 … {depth}", size, f"{seconds:.1f}"] for depth, (size, seconds) in figures["nodes"].items()]
    text.append(table(("depths with means", "bytes", "seconds to make"), rows, title="Node vectors"))
    beam = figures["milliseconds"]["beam"]
    rows = [[name, taken, f"{taken / beam:.2f}"] for name, taken in figures["milliseconds"].items()]
    text.append(table(("beam 100, batches of 16", "ms a query", "of the beam"), rows, title="Time"))
    return "\n".join(text)


if __name__ == "__main__":
    main()
