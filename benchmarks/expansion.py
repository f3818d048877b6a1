"""What it costs a query to expand clusters and re-score their products, beside dense retrieval by brute force.

    python benchmarks/expansion.py [--rows 1e6] [--width 384] [--clusters 50] [--queries 8] [--repeats 5] [--json FILE]
        [--out benchmarks/results/expansion.md]

A catalogue in clusters of 1 to 2,000 products (uniform), random vectors of length 1, `--clusters` random clusters a query.
Unusual: brute force is timed twice, as one writes it (a float32 matrix in memory, one matrix-vector product, top-k) and
over the same float16 rows on disk. Both must find what re-scoring finds among the clusters' rows before anything is
timed; queries and ways take turns, pages are warm, medians are compared. One thread. The last line is one JSON object.

Shape letters: N rows, D width of a vector, B queries, K clusters or results.
"""

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import finish, in_turns, medians, parser_of, rounded, table, where, whole

from catid2_ray.retrieval.beam import BeamResult
from catid2_ray.retrieval.expansion import expand, rescore
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

LARGEST, TOP_K, QUOTA = 2000, 100, 100


def clustered_trie(rows: int, rng) -> Trie:
    """IDs (cluster, i // 256, i % 256), clusters of 1 to LARGEST products."""
    size = rng.integers(1, LARGEST + 1, 2 * rows // LARGEST + 100)
    cluster_N = np.repeat(np.arange(len(size)), size)[:rows]
    first_N = np.searchsorted(cluster_N, cluster_N)
    place_N = np.arange(len(cluster_N)) - first_N
    codes_NL = np.stack((cluster_N, place_N // 256, place_N % 256), 1)
    return Trie.build(codes_NL, codes_per_level=(len(size), 256, 256))


def blocks(rows: int, width: int, rng):
    for start in range(0, rows, 50_000):
        yield rng.standard_normal((min(50_000, rows - start), width), dtype=np.float32)


def beams(trie: Trie, level: int, queries: int, count: int, rng) -> BeamResult:
    """`count` random nodes of a level for each query, with log-probabilities that fall."""
    chosen = [rng.choice(trie.nodes(level), count, replace=False) for _ in range(queries)]
    docid = torch.from_numpy(np.stack([trie.prefixes(level, nodes) for nodes in chosen]))
    ranges = np.stack([np.stack([trie.row_start[level][nodes + i] for i in (0, 1)], 1) for nodes in chosen])
    logp = torch.from_numpy(-np.sort(rng.exponential(3, (queries, count))).astype(np.float32))
    return BeamResult(docid, torch.from_numpy(ranges.astype(np.int64)), logp, torch.full((queries,), count))


def one(result: BeamResult, query: int) -> BeamResult:
    return BeamResult(*(None if field is None else field[query : query + 1] for field in result))


def taken_by(ways: dict, queries: int, repeats: int) -> dict:
    """Median microseconds per query of each way."""
    runs = {(name, query): partial(way, query) for query in range(queries) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    in_turns({name: partial(way, 0) for name, way in ways.items()}, turns=1)
    for (name, _), seconds in in_turns(runs, turns=repeats).items():
        taken[name] += seconds
    return medians(taken, unit=1e6)


def agree(trie: Trie, result: BeamResult, store: VectorStore, query_BD: np.ndarray, full_ND: torch.Tensor) -> None:
    """Raise SystemExit unless the best products of the clusters are those that brute force puts first among them."""
    for b, query_D in enumerate(torch.from_numpy(query_BD)):
        alone = one(result, b)
        candidates = expand(alone, trie, vectors=store, query_BD=query_D[None])
        best_found = rescore(candidates, alone, trie, top_k=TOP_K, a=0.0, dense="dot").dense_BK[0]
        inside_N = torch.zeros(trie.rows, dtype=torch.bool)
        inside_N[candidates.row_BC[0]] = True
        for score_N in (full_ND @ query_D, torch.from_numpy(store.scores(query_D[None], np.arange(trie.rows)))):
            best = score_N.masked_fill(~inside_N, -torch.inf).topk(TOP_K).values
            if not torch.allclose(best, best_found, atol=1e-5):
                raise SystemExit(f"query {b}: brute force and re-scoring disagree")


def measured(folder: str, options) -> dict:
    rng = np.random.default_rng(0)
    trie = clustered_trie(options.rows, rng)
    start = time.perf_counter()
    store = VectorStore.write(folder, blocks(trie.rows, options.width, rng), normalize=True)
    written = time.perf_counter() - start
    start = time.perf_counter()
    store = VectorStore.open(folder)
    opened = time.perf_counter() - start
    full_ND = torch.from_numpy(store.vectors_ND).float()
    query_BD = next(blocks(options.queries, options.width, rng))
    query_BD /= np.linalg.norm(query_BD, axis=1, keepdims=True)
    clusters = beams(trie, 1, options.queries, options.clusters, rng)
    full_ids = beams(trie, 3, options.queries, min(100, trie.rows), rng)
    agree(trie, clusters, store, query_BD, full_ND)
    value_N, every = rng.random(trie.rows), np.arange(trie.rows)
    stocked = Filter.of(rng.random(trie.rows) < 0.8)

    def expanded(b, result=clusters, **bounds):
        return expand(one(result, b), trie, vectors=store, query_BD=query_BD[b : b + 1], **bounds)

    kept = [expanded(b) for b in range(options.queries)]
    ascending = [np.sort(candidates.row_BC[0].numpy()) for candidates in kept]

    def ranked(b, candidates, result=clusters):
        return rescore(candidates, one(result, b), trie, top_k=TOP_K)

    ways = {
        "scores_of_the_clusters_rows": lambda b: store.scores(query_BD[b : b + 1], ascending[b]),
        "expand": expanded,
        "rescore": lambda b: ranked(b, kept[b]),
        "expand_and_rescore": lambda b: ranked(b, expanded(b)),
        "expand_and_rescore_quota": lambda b: ranked(b, expanded(b, quota=QUOTA)),
        "expand_and_rescore_quota_filter": lambda b: ranked(b, expanded(b, quota=QUOTA, allowed=stocked)),
        "expand_and_rescore_quota_by_value": lambda b: ranked(
            b, expanded(b, quota=QUOTA, order="value", value_N=value_N)
        ),
        "expand_and_rescore_full_ids": lambda b: ranked(b, expanded(b, full_ids), full_ids),
        "brute_force_float32_in_memory": lambda b: (full_ND @ torch.from_numpy(query_BD[b])).topk(TOP_K),
        "brute_force_float16_on_disk": lambda b: torch.from_numpy(store.scores(query_BD[b : b + 1], every)).topk(TOP_K),
    }
    times = taken_by(ways, options.queries, options.repeats)
    ours = times["expand_and_rescore"]
    return {
        "rows": trie.rows,
        "rows_of_the_clusters": statistics.mean(int(candidates.count_B[0]) for candidates in kept),
        "bytes_per_row": os.path.getsize(Path(folder) / "vectors.npy") / trie.rows,
        "write_us_per_row": written / trie.rows * 1e6,
        "open_ms": opened * 1e3,
        "us_per_query": times,
        "brute_force_float32_over_ours": times["brute_force_float32_in_memory"] / ours,
        "brute_force_float16_over_ours": times["brute_force_float16_on_disk"] / ours,
    }


def rendered(report: dict) -> str:
    rows = [[name.replace("_", " "), us / 1e3] for name, us in report["us_per_query"].items()]
    return (
        "# Expanding clusters and re-scoring\n\nWritten by `benchmarks/expansion.py`: "
        f"{report['rows']:,} products of width {report['width']} in clusters of 1 to {report['largest_cluster']:,}, "
        f"{report['clusters']} clusters a query ({report['rows_of_the_clusters']:,.0f} products), the best {report['top_k']} "
        f"kept, quota {report['quota']}; one thread, medians. Machine: {report['machine']}, torch {report['torch']}.\n\n"
        + table(["way", "ms a query"], rows)
        + f"\nBrute force over all products ÷ ours: {report['brute_force_float32_over_ours']:.1f} in memory, "
        f"{report['brute_force_float16_over_ours']:.1f} over the same float16 rows on disk. Opening: {report['open_ms']:.1f} ms; "
        f"{report['bytes_per_row']:.0f} bytes a product.\n"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=whole, default=10**6, help="N")
    parser.add_argument("--width", type=int, default=384, help="D")
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        **where("expansion"), "width": options.width, "clusters": options.clusters, "largest_cluster": LARGEST,
        "quota": QUOTA, "top_k": TOP_K, "queries": options.queries,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        report |= measured(folder, options)
    report = rounded(report)
    for name, us in report["us_per_query"].items():
        print(f"{name}: {us} us a query")
    finish(report, rendered, options)


if __name__ == "__main__":
    main()
