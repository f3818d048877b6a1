"""Dense, lexical and path scores of every pair of query and product, fused; weights chosen by recall on given queries.

final = dense + a · path + b · lexical over a pool of products: all, those of the beams, or those of the beams and the first
LISTED of BM25 + dense. Outside the beams the path is the least that a beam could give: softmax 0, log P that of the last.
Choosing needs the ranks of the relevant products alone, a comparison instead of a sort; lists are sorted in full, and where
the pool is the beams', by `retrieval.expansion` itself.

Q queries, N products (trie rows), M products of a pool, K beams, R relevant products of a query.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from catid2_ray.evaluation.protocol import Judgements
from catid2_ray.retrieval.beam import BeamResult
from catid2_ray.retrieval.expansion import expand, rescore
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

KS = (10, 50, 100)
RETURNED = max(KS)
FOUND = ("docid_BKL", "row_range_BK2", "logp_BK", "count_B")
LISTED = 1000
LEXICAL = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3)
BESIDE_PATH = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)  # shares of the weight that was best without a path
# METHODS 6.6 (GDR) sweeps 0 to 3 for softmax over 100 beams; over more beams each share is smaller.
PATHS = {"softmax": (0, 0.1, 0.3, 1, 3, 10), "logp": (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2)}
RAW = 20.0  # BM25 of a good match of three words; brings raw scores and shares of the best score to one scale


class Split(NamedTuple):
    """The queries of one split. `dense_QN`: cosine; `lexical_QN`: BM25; `relevant`: trie rows of each query's products."""

    judgements: Judgements
    query_QD: np.ndarray
    dense_QN: np.ndarray
    lexical_QN: np.ndarray
    relevant: list[np.ndarray]

    def lexical(self, query: int, scale: str) -> np.ndarray:
        """float32 N. `scale`: "best", shares of the query's best score, or "raw", BM25 / RAW."""
        score_N = self.lexical_QN[query]
        return score_N / np.float32(RAW if scale == "raw" else score_N.max() or 1)


class Search(NamedTuple):
    """What a beam of `width` found, stopped after `level` codes, for every query of a split."""

    level: int
    width: int
    result: BeamResult


class Setting(NamedTuple):
    """One way of fusing; `value`: mean recall over KS on the queries that chose it. `quota`: products per beam."""

    value: float
    lexical: float = 0.0
    path: str = "softmax"
    a: float = 0.0
    level: int = 0
    width: int = 0
    quota: int | None = None


def path_of(result: BeamResult, query: int, path: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 N path scores, outside the beams as the head of this file says; int64 M rows of the beams, best beam first)."""
    count = int(result.count_B[query])
    range_K2, logp_K = result.row_range_BK2[query, :count].numpy(), result.logp_BK[query, :count].numpy()
    share_K = np.exp(logp_K - logp_K.max(initial=-np.inf)) if count else logp_K
    score_K = logp_K if path == "logp" else share_K / max(share_K.sum(), 1)
    size_K = range_K2[:, 1] - range_K2[:, 0]
    row_M = np.arange(size_K.sum()) + np.repeat(range_K2[:, 0] - (np.cumsum(size_K) - size_K), size_K)
    path_N = np.full(rows, score_K.min(initial=0) if path == "logp" else 0, np.float32)
    path_N[row_M] = np.repeat(score_K, size_K)
    return path_N, row_M


def mean_recall(final_M: np.ndarray, place_R: np.ndarray, relevant: int) -> float:
    """Mean recall over KS of one query: `place_R`, where in the pool its relevant products are, of `relevant` in all."""
    rank_R = [np.count_nonzero(final_M > score) for score in final_M[place_R]]
    return sum(rank < k for rank in rank_R for k in KS) / (len(KS) * relevant)


def best_setting(split: Split, rows_of: Callable, *, scale: str, search: Search | None, paths, lexicals, quota=None):
    """The best `Setting` of a grid over all queries of a split. `rows_of(query)`: int M, the pool.

    `search` None leaves the path out. Of equals, the first of the grid.
    """
    grid = [(path, a, b) for path, steps in paths.items() for a in steps for b in lexicals]
    if search is None:
        grid = [("softmax", 0.0, b) for b in lexicals]
    total_G, rows = np.zeros(len(grid)), split.dense_QN.shape[1]
    for query, relevant_R in enumerate(split.relevant):
        row_M = rows_of(query)
        place_N = np.full(rows, -1)
        place_N[row_M] = np.arange(len(row_M))
        place_R = place_N[relevant_R][place_N[relevant_R] >= 0]
        if not len(place_R):
            continue
        dense_M, lexical_M = split.dense_QN[query][row_M], split.lexical(query, scale)[row_M]
        base_b = {b: dense_M + np.float32(b) * lexical_M for b in lexicals}
        path_p = {} if search is None else {p: path_of(search.result, query, p, rows)[0][row_M] for p in paths}
        for number, (path, a, b) in enumerate(grid):
            final_M = base_b[b] + np.float32(a) * path_p[path] if a else base_b[b]
            total_G[number] += mean_recall(final_M, place_R, len(relevant_R))
    path, a, b = grid[int(total_G.argmax())]
    level, width = (search.level, search.width) if search else (0, 0)
    return Setting(float(total_G.max() / len(split.relevant)), b, path, a, level, width, quota)


def best_rows(final_M: np.ndarray, row_M: np.ndarray, k: int) -> np.ndarray:
    """The `k` rows of the highest scores, equal ones by row."""
    if len(final_M) > k:
        kept = np.flatnonzero(final_M >= np.partition(final_M, len(final_M) - k)[len(final_M) - k])
        final_M, row_M = final_M[kept], row_M[kept]
    return row_M[np.lexsort((row_M, -final_M))][:k]


def fused_rows(split: Split, b: float, scale: str, k: int) -> list[np.ndarray]:
    """The best `k` rows of dense + b · lexical over all products, per query."""
    every_N = np.arange(split.dense_QN.shape[1])
    return [
        best_rows(dense_N + np.float32(b) * split.lexical(query, scale), every_N, k)
        for query, dense_N in enumerate(split.dense_QN)
    ]


def of_query(result: BeamResult, query: int) -> BeamResult:
    return BeamResult(**{name: getattr(result, name)[query : query + 1] for name in FOUND})


def joined(parts: Sequence[BeamResult]) -> BeamResult:
    """One result of the queries of all parts, in their order."""
    return BeamResult(**{name: torch.cat([getattr(part, name) for part in parts]) for name in FOUND})


def expanded_rows(
    split: Split, search: Search, trie: Trie, store: VectorStore, quota: int | None
) -> Iterator[np.ndarray]:
    """The rows that `expand` keeps of each query's beams."""
    for query in range(len(split.relevant)):
        if quota is None:
            yield path_of(search.result, query, "logp", trie.rows)[1]
        else:
            alone, query_1D = of_query(search.result, query), split.query_QD[query : query + 1]
            yield expand(alone, trie, vectors=store, query_BD=query_1D, quota=quota).row_BC[0].numpy()


def beam_lists(split: Split, search: Search) -> list[np.ndarray]:
    """The products of the beams, best beam first, in row order inside one: no other score."""
    rows = split.dense_QN.shape[1]
    return [path_of(search.result, query, "logp", rows)[1][:RETURNED] for query in range(len(split.relevant))]


def rescored_lists(split: Split, search: Search, setting: Setting, trie: Trie, store: VectorStore, scale: str):
    """Per query the best rows among the beams' products, by `retrieval.expansion` alone."""
    for query in range(len(split.relevant)):
        alone, query_1D = of_query(search.result, query), split.query_QD[query : query + 1]
        candidates = expand(alone, trie, vectors=store, query_BD=query_1D, quota=setting.quota)
        lexical_1C = split.lexical(query, scale)[candidates.row_BC.numpy()]
        best = rescore(
            candidates, alone, trie, top_k=RETURNED, a=setting.a, path=setting.path, dense="dot",
            lexical_BC=lexical_1C, lexical_weight=setting.lexical,
        )  # fmt: skip
        yield best.row_BK[0, : int(best.count_B[0])].numpy()


def union_lists(split: Split, search: Search, setting: Setting, rows_of: Callable, scale: str) -> Iterable[np.ndarray]:
    """Per query the best rows of the pool `rows_of(query)`, products outside the beams among them."""
    rows = split.dense_QN.shape[1]
    for query, dense_N in enumerate(split.dense_QN):
        row_M = rows_of(query)
        final_N = dense_N + np.float32(setting.lexical) * split.lexical(query, scale)
        if setting.a:
            final_N += np.float32(setting.a) * path_of(search.result, query, setting.path, rows)[0]
        yield best_rows(final_N[row_M], row_M, RETURNED)
