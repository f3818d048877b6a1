"""What a trie's node vectors find at equal work, beside faiss IVF-Flat and HNSW: recall against dot products, and milliseconds.

Every search ends by scoring some products exactly and gives the best of them. What it costs is counted in dot products of the
vectors' width: products scored, and beside them what led there (the trie's nodes, IVF's centroids; HNSW compares products alone).
Trie: a beam over node vectors, `widths` per depth, then all products below the beams. A node's score is ⟨q, v_n⟩ + spread ·
√(1 − ‖v_n‖²): v_n is the mean of unit vectors, so the root is how far the products below lie from it (0 for one product), and a
wide node's best product is further above its mean than a narrow one's.

"No spread": the same widths by ⟨q, v_n⟩ alone.

For each budget every method uses the setting that finds most of the exact nearest products of other queries; what is shown is
recall of the test queries' relevant products.
Synthetic: seeded nested clusters; relevant are the ten nearest products. Home Depot: --home-depot FOLDER with products.npy
(order of DATA/products.parquet), queries.npy, queries.parquet (query_id, split) and, where adapters were learned,
adapted_products.npy and adapted_queries.npy; DATA/pairs.parquet says what is relevant (from relevance 2.67 on).

    python benchmarks/search.py --home-depot /data/vectors --data /data/home_depot --out benchmarks/results/search.md
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from harness import RESULTS, finish, parser_of, rounded, table, where, whole

from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.quantizer.kmeans import nearest, residual_kmeans
from catid2_ray.retrieval.trie import Trie

BUDGETS = (0.1, 0.3, 1, 2, 3, 5, 10, 20, 30)  # per cent of the products
CODES, SAMPLE, BLOCK = (256, 256, 256, 256), 20_000, 16_384
BEAMS = ((1, 2, 4, 8, 16, 32, 64, 128), (25, 50, 100, 200, 400, 800, 1600), (25, 100, 400))
SPREAD = 0.2
LISTS, PROBES = {10**5: (256, 1024, 4096), 10**7: (1024, 4096)}, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CHOOSING = 60  # queries at most
EFS, LINKS = (4, 8, 16, 32, 64, 100, 200, 400, 800, 1600), 32


class Queries(NamedTuple):
    vector_QD: np.ndarray
    relevant: list[np.ndarray]


class Shelf(NamedTuple):
    """Products and queries of unit length; recall counts the first `k`. `choosing`: their nearest `k` count as relevant."""

    name: str
    product_ND: np.ndarray
    choosing: Queries
    test: Queries
    k: int


class Answer(NamedTuple):
    rows: np.ndarray
    products: float  # scored
    others: float  # dot products that led there


Search = Callable[[np.ndarray], Answer]


def unit(vector_ND: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True), np.float32)


def synthetic(products: int, width: int, queries: int, *, seed: int = 0) -> Shelf:
    """Clusters in clusters (200 × 50), dimensions ever less important, as in the vectors of a text encoder."""
    rng = np.random.default_rng(seed)
    scale_D = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    outer, inner = (rng.standard_normal((count, width), np.float32) * scale_D for count in (200, 10_000))
    leaf_N = rng.integers(0, 10_000, products)
    product_ND = outer[leaf_N // 50] + 0.7 * inner[leaf_N]
    product_ND += 0.5 * rng.standard_normal((products, width), np.float32) * scale_D
    product_ND = unit(product_ND)
    chosen = rng.choice(products, CHOOSING + queries, replace=False)
    query_QD = unit(
        product_ND[chosen] + 0.5 * unit(rng.standard_normal((len(chosen), width)).astype(np.float32) * scale_D)
    )
    relevant = [np.argpartition(-(product_ND @ query_D), 10)[:10] for query_D in query_QD]
    splits = [Queries(query_QD[part], relevant[part]) for part in (slice(CHOOSING), slice(CHOOSING, None))]
    return Shelf(f"{products:,} synthetic vectors of {width} numbers", product_ND, *splits, k=10)


def home_depot(folder: Path, data: Path, prefix: str) -> Shelf:
    ids = pq.read_table(data / "products.parquet", columns=["product_id"])["product_id"].to_pylist()
    row_of = {product_id: row for row, product_id in enumerate(ids)}
    judged: dict[str, list[int]] = {}
    for pair in pq.read_table(data / "pairs.parquet", columns=["query_id", "product_id", "relevance"]).to_pylist():
        if pair["relevance"] >= 2.67 and pair["product_id"] in row_of:
            judged.setdefault(pair["query_id"], []).append(row_of[pair["product_id"]])
    asked = pq.read_table(folder / "queries.parquet").to_pylist()
    query_QD = unit(np.load(folder / f"{prefix}queries.npy"))
    splits = []
    for split, most in (("validation", CHOOSING), ("test", None)):
        at = [i for i, one in enumerate(asked) if one["split"] == split and one["query_id"] in judged][:most]
        splits.append(Queries(query_QD[at], [np.array(sorted(set(judged[asked[i]["query_id"]]))) for i in at]))
    product_ND, choosing_QD = unit(np.load(folder / f"{prefix}products.npy")), splits[0].vector_QD
    splits[0] = Queries(choosing_QD, [np.argpartition(-(product_ND @ one_D), 100)[:100] for one_D in choosing_QD])
    name = f"Home Depot, {'adapted' if prefix else 'raw'} vectors"
    return Shelf(name, product_ND, *splits, k=100)


def best(rows: np.ndarray, score: np.ndarray, k: int) -> np.ndarray:
    if len(rows) > k:
        at = np.argpartition(-score, k - 1)[:k]
        rows, score = rows[at], score[at]
    return rows[np.argsort(-score)]


class Tree:
    """Node vectors of residual k-means IDs, products in trie order."""

    def __init__(self, product_ND: np.ndarray, *, seed: int = 0):
        vector_ND = torch.from_numpy(product_ND)
        chosen = np.random.default_rng(seed).permutation(len(product_ND))[:SAMPLE]
        books = residual_kmeans(vector_ND[torch.from_numpy(chosen)], codes_per_level=CODES, seed=seed)
        codes = []
        for block_ND in vector_ND.split(BLOCK):
            levels = []
            for book_KD in books:
                levels.append(nearest(block_ND, book_KD))
                block_ND = block_ND - book_KD[levels[-1]]
            codes.append(torch.stack(levels, 1))
        trie = Trie.build(torch.cat(codes).numpy(), codes_per_level=CODES, shared=True)
        self.order_N, self.nodes = trie.order_N, [trie.nodes(depth) for depth in range(1, trie.levels + 1)]
        self.product_ND = product_ND[self.order_N]
        self.child, self.row = ([np.asarray(starts) for starts in part] for part in (trie.child_start, trie.row_start))
        self.mean, self.reach = [], []
        for depth in (1, 2, 3):
            size_n1 = np.diff(self.row[depth])[:, None]
            self.mean.append(np.add.reduceat(self.product_ND, self.row[depth][:-1], axis=0) / size_n1)
            self.reach.append(np.sqrt(np.maximum(0, 1 - (self.mean[-1] ** 2).sum(1))))

    def search(self, query_D: np.ndarray, *, widths: tuple[int, ...], k: int, spread: float = SPREAD) -> Answer:
        node_M, others = np.zeros(1, np.int64), 0
        for depth, width in enumerate(widths):
            start = self.child[depth]
            node_C = np.concatenate([np.arange(start[node], start[node + 1]) for node in node_M.tolist()])
            others += len(node_C)
            if len(node_C) > width:
                score_C = self.mean[depth][node_C] @ query_D + spread * self.reach[depth][node_C]
                node_C = node_C[np.argpartition(-score_C, width - 1)[:width]]
            node_M = node_C
        start = self.row[len(widths)]
        row_C = np.concatenate([np.arange(start[node], start[node + 1]) for node in node_M.tolist()])
        return Answer(self.order_N[best(row_C, self.product_ND[row_C] @ query_D, k)], len(row_C), others)


def of_tree(shelf: Shelf, tree: Tree) -> Iterator[tuple[str, Search]]:
    for depth in (1, 2, 3):
        for widths in itertools.product(*BEAMS[:depth]):
            # A beam much wider or narrower than the one before it is never on the front.
            if depth == 1 or widths[0] * 4 <= widths[1] <= widths[0] * 32:
                yield "/".join(map(str, widths)), partial(tree.search, widths=widths, k=shelf.k)


def of_ivf(shelf: Shelf) -> Iterator[tuple[str, Search]]:
    import faiss

    stats, (products, width) = faiss.cvar.indexIVF_stats, shelf.product_ND.shape
    for lists in next(lists for most, lists in LISTS.items() if products <= most):
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid = 64
        index.train(shelf.product_ND)
        index.add(shelf.product_ND)

        def search(query_D: np.ndarray, probes: int, index=index, lists=lists) -> Answer:
            index.nprobe = probes
            before = stats.ndis
            rows = index.search(query_D[None], shelf.k)[1][0]
            return Answer(rows[rows >= 0], stats.ndis - before, lists)

        for probes in PROBES:
            if probes <= lists // 2:
                yield (
                    f"{probes} of {lists} lists",
                    lambda query_D, probes=probes, search=search: search(query_D, probes),
                )


def of_hnsw(shelf: Shelf) -> Iterator[tuple[str, Search]]:
    import faiss

    stats = faiss.cvar.hnsw_stats
    index = faiss.IndexHNSWFlat(shelf.product_ND.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(shelf.product_ND)

    def search(query_D: np.ndarray, ef: int) -> Answer:
        index.hnsw.efSearch = ef
        before = stats.ndis
        rows = index.search(query_D[None], shelf.k)[1][0]
        return Answer(rows[rows >= 0], stats.ndis - before, 0)

    for ef in EFS:
        yield f"ef {ef}", lambda query_D, ef=ef: search(query_D, ef)


def recall_of(answers: list[Answer], relevant: list[np.ndarray]) -> np.ndarray:
    return np.array([np.isin(wanted, one.rows).mean() for one, wanted in zip(answers, relevant)])


def measured(search: Search, queries: Queries) -> dict:
    """Recall per query, means of what was scored, and milliseconds."""
    start = time.perf_counter()
    answers = [search(query_D) for query_D in queries.vector_QD]
    seconds = time.perf_counter() - start
    products, others = (np.mean([getattr(one, name) for one in answers]) for name in ("products", "others"))
    return {
        "recall_Q": recall_of(answers, queries.relevant), "products": float(products), "work": float(products + others),
        "ms": seconds / len(answers) * 1e3,
    }  # fmt: skip


def compared(shelf: Shelf) -> dict:
    """Budget by budget and by both counts, every method at the setting that was best on the choosing queries; the trie also
    without spread, at the trie's own settings."""
    tree, products = Tree(shelf.product_ND), len(shelf.product_ND)
    methods = {"trie": of_tree(shelf, tree), "IVF-Flat": of_ivf(shelf), "HNSW": of_hnsw(shelf)}
    budgets = {count: {share: {} for share in BUDGETS} for count in ("products", "work")}
    for method, settings in methods.items():
        tried = [(setting, search, measured(search, shelf.choosing)) for setting, search in settings]
        tested = {}
        for count, share in itertools.product(budgets, BUDGETS):
            fits = [one for one in tried if one[2][count] <= share / 100 * products]
            if not fits:
                continue
            # Of settings that find all alike the one that spends most: a budget is there to be used.
            setting, search, _ = max(fits, key=lambda one: (one[2]["recall_Q"].mean(), one[2]["work"]))
            if setting not in tested:
                tested[setting] = {"setting": setting, **measured(search, shelf.test)}
                if method == "trie":
                    flat = measured(partial(search, spread=0.0), shelf.test)
                    tested[setting]["without_spread"] = {name: flat[name] for name in ("recall_Q", "work")}
            budgets[count][share][method] = tested[setting]
        print(f"{shelf.name}: {method}, {len(tried)} settings", flush=True)
    dense = [Answer(best(np.arange(products), shelf.product_ND @ q, shelf.k), 0, 0) for q in shelf.test.vector_QD]
    return {
        "name": shelf.name, "products": products, "k": shelf.k, "queries": len(shelf.test.relevant), "nodes": tree.nodes,
        "all": float(recall_of(dense, shelf.test.relevant).mean()), "budgets": budgets,
        "differences": {count: _differences(shares) for count, shares in budgets.items()},
    }  # fmt: skip


def _differences(shares: dict) -> dict:
    """Budget → peer → the trie's recall less the peer's, with its paired 95 % interval."""
    found = {}
    for share, by_method in shares.items():
        peers = [peer for peer in ("IVF-Flat", "HNSW") if peer in by_method] if "trie" in by_method else []
        if peers:
            value_QM = np.stack([by_method["trie"]["recall_Q"] - by_method[peer]["recall_Q"] for peer in peers], 1)
            found[share] = dict(zip(peers, map(list, bootstrap_means(value_QM))))
    return found


def plain(value):
    """Per-query recalls become their means, keys texts."""
    if isinstance(value, dict):
        return {
            "recall" if key == "recall_Q" else str(key): float(inner.mean()) if key == "recall_Q" else plain(inner)
            for key, inner in value.items()
        }
    return value


def rendered(report: dict) -> str:
    blocks = [
        "# Search at equal work\n\nWritten by `benchmarks/search.py`: residual k-means IDs of "
        f"{len(CODES)} levels of {CODES[0]} codes; one thread, one query at a time; IVF-Flat and HNSW ({LINKS} links) are faiss "
        f"{report['faiss']}, the trie's search is NumPy. Per budget the setting that found most of other queries' nearest "
        f"products. A dash: no setting is that cheap. Machine: {report['machine']}.\n"
    ]
    for case in report["cases"]:
        k = case["k"]
        blocks.append(
            f"## {case['name']}\n\n{case['queries']:,} test queries, {case['products']:,} products, nodes by depth "
            f"{case['nodes']}; scoring every product finds {case['all']:.3f} of what is relevant at {k}.\n"
        )
        titles = {
            "work": f"Recall@{k} by all dot products, of the number of products",
            "products": f"Recall@{k} by products scored alone, nodes and centroids free",
        }
        for count, title in titles.items():
            blocks.append(table(_HEADINGS, _rows(case, count), title=title))
    return "\n".join(blocks)


_HEADINGS = (
    "at most",
    "trie",
    "no spread",
    "IVF-Flat",
    "HNSW",
    "trie − IVF",
    "trie − HNSW",
    "ms: trie",
    "IVF",
    "HNSW",
)


def _rows(case: dict, count: str) -> list[list]:
    rows = []
    for share, by_method in case["budgets"][count].items():
        differences = case["differences"][count].get(share, {})
        cells = {
            method: f"{one['recall']:.3f} ({one['setting']})" if (one := by_method.get(method)) else None
            for method in ("trie", "IVF-Flat", "HNSW")
        }
        flat = by_method["trie"]["without_spread"]["recall"] if "trie" in by_method else None
        row = [f"{share} %", cells["trie"], flat, cells["IVF-Flat"], cells["HNSW"]]
        row += [
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*differences[peer]) if peer in differences else None
            for peer in ("IVF-Flat", "HNSW")
        ]
        rows.append(row + [f"{by_method[name]['ms']:.2f}" if name in by_method else None for name in cells])
    return rows


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "search.md", stored="an earlier --json")
    parser.add_argument("--products", type=whole, default=10**6, help="synthetic products; 0 = none")
    parser.add_argument("--width", type=int, default=96, help="of synthetic vectors")
    parser.add_argument("--queries", type=int, default=500, help="synthetic test queries")
    parser.add_argument("--home-depot", type=Path, metavar="FOLDER", help="vectors of Home Depot, as said above")
    parser.add_argument("--data", type=Path, help="products.parquet and pairs.parquet of Home Depot")
    options = parser.parse_args()
    if options.render:
        finish(json.loads(options.render.read_text()), rendered, options)
        return
    try:
        import faiss
    except ImportError:
        print("not measured: faiss is not installed; pip install 'catid2-ray[baselines]'")
        return
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    shelves = []
    if options.home_depot:
        prefixes = [prefix for prefix in ("adapted_", "") if (options.home_depot / f"{prefix}products.npy").exists()]
        shelves += [lambda prefix=prefix: home_depot(options.home_depot, options.data, prefix) for prefix in prefixes]
    if options.products:
        shelves.append(lambda: synthetic(options.products, options.width, options.queries))
    cases = [rounded(plain(compared(shelf()))) for shelf in shelves]
    finish({**where("search"), "faiss": faiss.__version__, "cases": cases}, rendered, options)


if __name__ == "__main__":
    main()
