"""Scores of all products into ranked lists of equal length, and the numbers of a method chosen on validation queries.

What is tuned is tuned on the validation split alone, by the mean recall at TUNED_AT; of equal values the first in the grid wins.

Q queries, N products in the order of their ids, C products returned.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from catid2_ray.evaluation.baselines.bm25 import Bm25

RETURNED = 100  # products of every ranked list
TUNED_AT = 50
K1_GRID, B_GRID = (1.2, 0.6, 0.9, 2.0), (0.75, 0.3, 0.5, 0.9)  # the default comes first and wins ties
WEIGHT_GRID = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4)  # of BM25 beside a cosine
CLUSTERS_GRID = (4, 8, 16, 32)  # of GDR: clusters whose products are scored
LOGP_GRID = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # of GDR: the weight of a cluster's log P beside the cosine
_QUERIES = 32  # scored at a time

Scores = Callable[[int, int], np.ndarray]  # queries from … to … in, float32 rows × N out


class Asked(NamedTuple):
    """Queries with a relevant product. `relevant`: Q arrays of rows among the N products."""

    texts: Sequence[str]
    relevant: Sequence[np.ndarray]


class Ranking(NamedTuple):
    """`rows_QC`: int64, best first, −1 beyond the last. `ids`: Q lists of the IDs found, of methods that search IDs. `cost`:
    seconds to train and to index, milliseconds a query on one core, bytes that searching reads. `tuned`: what validation chose."""

    rows_QC: np.ndarray
    cost: dict
    tuned: dict
    ids: list[list[str]] | None = None


def top(score_QN: np.ndarray, k: int = RETURNED, *, above: float | None = None) -> np.ndarray:
    """int64 Q×k: the rows of the highest scores, equal ones by their row; only those `above` a score, −1 beyond them."""
    out_QC = np.full((len(score_QN), k), -1, np.int64)
    for query, score_N in enumerate(score_QN):
        at = np.arange(len(score_N)) if above is None else np.flatnonzero(score_N > above)
        if len(at) > k:
            least = np.partition(score_N[at], len(at) - k)[len(at) - k]
            at = at[
                score_N[at] >= least
            ]  # all that tie with the last, so that the cut does not depend on the partition
        best = at[np.argsort(-score_N[at], kind="stable")[:k]]
        out_QC[query, : len(best)] = best
    return out_QC


def ranked_by(scores: Scores, queries: int, *, above: float | None = None) -> tuple[np.ndarray, float]:
    """Q×RETURNED and the milliseconds that a query took."""
    start = time.monotonic()
    blocks = [top(scores(*part), above=above) for part in _parts(queries)]
    return np.concatenate(blocks), 1000 * (time.monotonic() - start) / max(1, queries)


def _parts(queries: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _QUERIES, queries)) for start in range(0, queries, _QUERIES))


def recall_by_rank(score_QN: np.ndarray, relevant: Sequence[np.ndarray], k: int = TUNED_AT) -> np.ndarray:
    """float64 Q: recall@k by counting, for each relevant product, the products before it (higher, or equal with a lower row);
    those without a score above 0 are as found as others."""
    recall_Q = np.empty(len(score_QN))
    for query, (score_N, rows) in enumerate(zip(score_QN, relevant)):
        hits = 0
        for row in rows:
            own = score_N[row]
            hits += (score_N > own).sum() + (score_N[:row] == own).sum() < k
        recall_Q[query] = hits / len(rows)
    return recall_Q


def tune_bm25(build: Callable[[float, float], Bm25], asked: Asked) -> tuple[Bm25, dict]:
    """The BM25 whose k1 and b find most, and what was chosen."""
    best, most, chosen = None, -1.0, {}
    for k1, b in itertools.product(K1_GRID, B_GRID):
        index = build(k1, b)
        score = lexical_scores(index, asked.texts)
        recall = np.concatenate(
            [recall_by_rank(score(*part), asked.relevant[slice(*part)]) for part in _parts(len(asked.texts))]
        ).mean()
        if recall > most:
            best, most, chosen = index, recall, {"k1": k1, "b": b, "validation_recall": round(float(recall), 4)}
    return best, chosen


def tune_weight(lexical: Scores, dense: Scores, asked: Asked) -> dict:
    """The weight of BM25 beside the cosine that finds most."""
    total_W = np.zeros(len(WEIGHT_GRID))
    for part in _parts(len(asked.texts)):
        lexical_QN, dense_QN = lexical(*part), dense(*part)
        for place, weight in enumerate(WEIGHT_GRID):
            total_W[place] += recall_by_rank(dense_QN + weight * lexical_QN, asked.relevant[slice(*part)]).sum()
    mean_W = total_W / len(asked.texts)
    best = int(np.argmax(mean_W))
    return {"weight": WEIGHT_GRID[best], "validation_recall": round(float(mean_W[best]), 4)}


class ClusterScores(NamedTuple):
    """Of one query the products below its clusters. `rows`: among the N products; `cosine`, `logp` of the cluster, `place` of the
    cluster, 0 = the likeliest; all of one length."""

    rows: np.ndarray
    cosine: np.ndarray
    logp: np.ndarray
    place: np.ndarray


def clusters_scored(
    clusters: Iterator[tuple[np.ndarray, np.ndarray]], query_QD: np.ndarray, product_ND: np.ndarray, order_N: np.ndarray
) -> Iterator[ClusterScores]:
    """`clusters`: for each query ranges C×2 among `order_N`, and log P. Both vectors are of length 1."""
    for (ranges_C2, logp_C), query_D in zip(clusters, query_QD):
        sizes_C = ranges_C2[:, 1] - ranges_C2[:, 0]
        place = np.repeat(np.arange(len(ranges_C2)), sizes_C)
        rows = np.concatenate([order_N[first:last] for first, last in ranges_C2])
        yield ClusterScores(rows, product_ND[rows] @ query_D, logp_C[place], place)


def best_of(scored: ClusterScores, clusters: int, weight: float, k: int = RETURNED) -> np.ndarray:
    """int64 k: the rows of the first `clusters` by cosine + weight · log P, equal ones by their row; −1 beyond the last."""
    kept = scored.place < clusters
    rows, score = scored.rows[kept], scored.cosine[kept] + np.float32(weight) * scored.logp[kept]
    best = rows[np.lexsort((rows, -score))[:k]]
    return np.pad(best, (0, k - len(best)), constant_values=-1)


def tune_clusters(scored: Iterator[ClusterScores], relevant: Sequence[np.ndarray]) -> dict:
    """How many clusters and which weight find most."""
    choices = list(itertools.product(CLUSTERS_GRID, LOGP_GRID))
    total_C, queries = np.zeros(len(choices)), 0
    for one, rows in zip(scored, relevant):
        queries += 1
        for place, (clusters, weight) in enumerate(choices):
            total_C[place] += np.isin(rows, best_of(one, clusters, weight, TUNED_AT)).mean()
    clusters, weight = choices[int(np.argmax(total_C))]
    recall = round(float(total_C.max() / max(1, queries)), 4)
    return {"clusters": clusters, "weight": weight, "validation_recall": recall}


def lexical_scores(index: Bm25, texts: Sequence[str]) -> Scores:
    """Of an index whose products are in the order of their ids, as all N are here."""
    return lambda start, end: np.stack([index.scores(text) for text in texts[start:end]])


def dense_scores(query_QD: np.ndarray, product_ND: np.ndarray) -> Scores:
    """Cosines; both are brought to length 1."""
    queries, products = torch.from_numpy(unit(query_QD)), torch.from_numpy(unit(product_ND))
    return lambda start, end: (queries[start:end] @ products.T).numpy()


def unit(rows_ND: np.ndarray) -> np.ndarray:
    """float32, rows of length 1."""
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(rows_ND, np.float32)), dim=-1).numpy()


def fused_scores(lexical: Scores, dense: Scores, weight: float) -> Scores:
    return lambda start, end: dense(start, end) + np.float32(weight) * lexical(start, end)


def blanks(text: str, *, indexed: bool) -> list[str]:
    """Words as a program finds them that knows no script without spaces: lower case, cut at blanks."""
    return text.lower().split()
