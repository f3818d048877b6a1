"""From beams to products, re-scored: the rows of each beam's range become candidates, dense and path scores one ranking.

A beam is a full ID or a cluster, a prefix of m < L codes: `BeamResult.row_range_BK2` is all that expansion reads, so a
search that stops early needs nothing else. Every product of a range is a candidate, also one that the generator has never
seen; of a live view the inserted ones too, withdrawn ones not. What is kept of a query's candidates is exact: all are
scored, then cut.

B queries, K beams (or results), C candidates of the query that has most, L levels, D width of a vector, N trie rows,
M candidates of one query.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import BeamResult
from catid2_ray.retrieval.live_view import LiveView, codes_of, result_rows
from catid2_ray.retrieval.products import Values
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore

# METHODS 6.6 (GDR, arXiv 2401.10487): tanh, or sigmoid; cosine is the plain product of vectors of length 1.
DENSE = {"tanh": np.tanh, "sigmoid": lambda x: 0.5 + 0.5 * np.tanh(0.5 * x), "dot": lambda x: x}
_PATHS = ("softmax", "logp", "root")


class Candidates(NamedTuple):
    """CPU tensors, best first by the order of expansion. Beyond `count_B`: row −1, beam −1, dense −inf.

    `row_BC` int64 trie rows; `beam_BC` int64, which of the K beams holds the row; `dense_BC` float32, q · d (0 where
    there are no vectors); `count_B` int64.
    """

    row_BC: Tensor
    beam_BC: Tensor
    dense_BC: Tensor
    count_B: Tensor


class Rescored(NamedTuple):
    """CPU tensors, best first, equal final scores by row. Beyond `count_B`: row and docid −1, every score −inf.

    `row_BK` int64 trie rows; `docid_BKL` int64, all L codes of the product's ID; `logp_BK` float32, log P of the beam
    that holds it; `dense_BK` float32, q · d; `lexical_BK` float32 (0 without lexical scores); `final_BK` float64, so
    that a large `a` leaves the dense order inside a beam; `count_B` int64.
    """

    row_BK: Tensor
    docid_BKL: Tensor
    logp_BK: Tensor
    dense_BK: Tensor
    lexical_BK: Tensor
    final_BK: Tensor
    count_B: Tensor


def expand(
    result: BeamResult,
    trie: Trie | LiveView,
    *,
    vectors: VectorStore | GrownVectors | None = None,
    query_BD=None,
    value_N=None,
    order: str = "dense",
    quota: int | None = None,
    most: int | None = None,
    allowed=None,
) -> Candidates:
    """The products of each query's beams: at most `quota` per beam, at most `most` per query (None: all).

    Kept are the best by `order`: "dense" (q · d, then `value_N`, then the lower row) or "value" (`value_N`, then the
    lower row; only what is kept is then scored by vectors, if there are any). `vectors` with `query_BD` (floats B×D) give
    dense scores. `value_N`: a number per trie row, or `Values`; more is better. `allowed`: a `Filter` or bool N, for a
    live view a `LiveFilter`; or a list with one of them, or None, per query. Of a live view, vectors and values may have
    more rows than the view has.

    Cost per query: one dot product and up to 70 bytes per row of its ranges. Raises InputError for a result that does
    not fit the trie or whose ranges overlap, for vectors, queries, values or a filter that do not fit, NaN among them,
    and bounds below 1. (METHODS 6.6, 2.6.)
    """
    live = isinstance(trie, LiveView)
    _check_ranges(result, trie.base.rows if live else trie.rows)
    query_BD, value_N = _order_inputs(order, vectors, query_BD, value_N, trie.rows, len(result.count_B), live)
    for name, bound in (("quota", quota), ("most", most)):
        if bound is not None and bound < 1:
            raise InputError(f"{name} must be ≥ 1, or None for no bound, found {bound}")
    parts = []
    for b, (row_M, beam_M) in enumerate(result_rows(result, trie, allowed=allowed)):
        # Ascending, so that equal scores are ordered by row and vectors are read where they lie.
        order_M = np.argsort(row_M, kind="stable")
        row_M, beam_M = row_M[order_M], beam_M[order_M]
        value_M = None if value_N is None else _values(value_N, row_M)
        dense_M = vectors.scores(query_BD[b : b + 1], row_M) if order == "dense" else None
        best = _best_first(value_M) if dense_M is None else _best_first(dense_M, value_M)
        best = _first_of_beams(best, beam_M, quota)[:most]
        row_M, beam_M = row_M[best], beam_M[best]
        if dense_M is not None:
            dense_M = dense_M[best]
        elif vectors is not None:
            dense_M = vectors.scores(query_BD[b : b + 1], row_M)
        else:
            dense_M = np.zeros(len(row_M), np.float32)
        parts.append((row_M, beam_M, dense_M))
    shape = (len(parts), max((len(row_M) for row_M, _, _ in parts), default=0))
    return Candidates(*_filled([torch.full(shape, filler) for filler in (-1, -1, -torch.inf)], parts))


def rescore(
    candidates: Candidates,
    result: BeamResult,
    trie: Trie | LiveView,
    *,
    top_k: int,
    a: float = 1.0,
    path: str = "softmax",
    dense: str = "tanh",
    lexical_BC=None,
    lexical_weight: float = 1.0,
) -> Rescored:
    """The `top_k` best candidates by final = dense + a · path + lexical_weight · lexical; equal ones by row.

    `candidates`: what `expand` made of `result`. `dense`: "tanh" or "sigmoid" of q · d, or "dot", q · d itself (a
    cosine where both vectors have length 1). tanh of products beyond about 19 is 1 in float64: it is meant for vectors
    of length about 1. `path`: "softmax" of log P over the query's returned beams, "logp", log P itself, or "root", √P, in which
    beams that are all but impossible are equal: how impossible is noise. `lexical_BC`:
    a number per candidate, such as BM25, in the order of `candidates.row_BC` (read up to `count_B`).

    Fewer than `top_k` come back where there are no more. Raises InputError for unknown choices, `top_k` below 1,
    candidates of another result, and scores or weights that are not finite. (METHODS 6.6: a from 0 to 3.)
    """
    if top_k < 1 or path not in _PATHS or dense not in DENSE:
        raise InputError(
            f"top_k must be ≥ 1, path one of {', '.join(_PATHS)} and dense one of {', '.join(DENSE)}, found {top_k}, "
            f"{path!r} and {dense!r}"
        )
    row_BC, beam_BC, dense_BC, count_B = (tensor.numpy() for tensor in candidates)
    real_BC = np.arange(row_BC.shape[1]) < count_B[:, None]
    path_BK, logp_BK = _path(result, path)
    live = isinstance(trie, LiveView)
    # Where inserted products stand, the view alone knows.
    known_BC = real_BC & (row_BC < trie.base.rows) if live else real_BC
    _check_same(result, row_BC, beam_BC, known_BC)
    lexical_BC = _lexical(lexical_BC, real_BC)
    beam_BC = np.where(real_BC, beam_BC, 0)
    final_BC = np.full(row_BC.shape, -np.inf)
    if row_BC.size:
        final_BC = DENSE[dense](np.where(real_BC, dense_BC, 0).astype(np.float64))
        with np.errstate(over="ignore", invalid="ignore"):
            final_BC += a * np.take_along_axis(path_BK, beam_BC, 1) + lexical_weight * lexical_BC
        if not np.isfinite(final_BC[real_BC]).all():
            query = int(np.argmin((np.isfinite(final_BC) | ~real_BC).all(1)))
            raise InputError(
                f"a final score of query {query} is not finite; check a = {a}, lexical_weight = {lexical_weight} and "
                "the candidates' dense scores"
            )
    parts = []
    for b, count in enumerate(count_B.tolist()):
        best = _top(final_BC[b, :count], row_BC[b, :count], top_k)
        codes_KL = codes_of(trie, row_BC[b, best])
        scores = (logp_BK[b, beam_BC[b, best]], dense_BC[b, best], lexical_BC[b, best].astype(np.float32))
        parts.append((row_BC[b, best], codes_KL, *scores, final_BC[b, best]))
    shape = (len(parts), top_k)
    columns = [torch.full(shape, -1), torch.full((*shape, trie.levels), -1)]
    columns += [torch.full(shape, -torch.inf) for _ in range(3)]
    columns.append(torch.full(shape, -torch.inf, dtype=torch.float64))
    return Rescored(*_filled(columns, parts))


def _check_ranges(result: BeamResult, rows: int) -> None:
    """Raise InputError unless the row ranges of the result's beams fit the trie and each other."""
    range_BK2, count_B = result.row_range_BK2.cpu().numpy().astype(np.int64), result.count_B.cpu().numpy()
    beams = range_BK2.shape[1]
    if range_BK2.shape != (len(count_B), beams, 2) or (count_B < 0).any() or (count_B > beams).any():
        raise InputError(
            f"row_range_BK2 must be B×K×2 and count_B B numbers 0…K, found {range_BK2.shape} and {count_B.tolist()[:5]}"
        )
    range_BK2[np.arange(beams) >= count_B[:, None]] = 0
    start_BK, end_BK = range_BK2[..., 0], range_BK2[..., 1]
    wrong_BK = (start_BK < 0) | (start_BK > end_BK) | (end_BK > rows)
    if wrong_BK.any():
        query, beam = (int(i[0]) for i in np.nonzero(wrong_BK))
        raise InputError(
            f"beam {beam} of query {query} has rows {start_BK[query, beam]} to {end_BK[query, beam]}, the trie has "
            f"{rows}; take the result and the trie from one release"
        )
    sorted_BK = np.argsort(start_BK, axis=1, kind="stable")
    start_BK, end_BK = (np.take_along_axis(x, sorted_BK, 1) for x in (start_BK, end_BK))
    reach_BK = np.maximum.accumulate(end_BK, 1)
    overlap_BK = (start_BK[:, 1:] < reach_BK[:, :-1]) & (start_BK[:, 1:] < end_BK[:, 1:])
    if overlap_BK.any():
        query, at = (int(i[0]) for i in np.nonzero(overlap_BK))
        raise InputError(
            f"beam {sorted_BK[query, at + 1]} of query {query} shares row {start_BK[query, at + 1]} with another beam; "
            "beams of one level never do"
        )


def _order_inputs(order: str, vectors, query_BD, value_N, rows: int, queries: int, live: bool):
    """(`query_BD` float32 or None, `value_N` or None), once they fit each other, the trie and `order`."""
    if order not in ("dense", "value"):
        raise InputError(f"order must be 'dense' or 'value', found {order!r}")
    if (vectors is None) != (query_BD is None):
        raise InputError("dense scores need both vectors and query_BD, found one of them; give both or neither")
    if (vectors if order == "dense" else value_N) is None:
        needed = "vectors and query_BD" if order == "dense" else "value_N"
        raise InputError(f"order={order!r} needs {needed}, found none")
    if vectors is not None:
        if vectors.rows != rows and not (live and vectors.rows > rows):
            raise InputError(f"{vectors.rows} vectors for {rows} trie rows; take both from one release")
        query_BD = vectors.check_queries(query_BD)
        if len(query_BD) != queries:
            raise InputError(f"{len(query_BD)} query vectors for {queries} queries of the result; give one for each")
    if value_N is not None and not isinstance(value_N, Values):
        value_N = np.asarray(value_N)
        if (
            value_N.ndim != 1
            or (len(value_N) != rows and not (live and len(value_N) > rows))
            or value_N.dtype.kind not in "fiub"
        ):
            raise InputError(
                f"value_N must be one number for each of {rows} trie rows, found {value_N.dtype} of {value_N.shape}"
            )
    return query_BD, value_N


def _values(value_N: np.ndarray | Values, row_M: np.ndarray) -> np.ndarray:
    value_M = (value_N.of(row_M) if isinstance(value_N, Values) else value_N[row_M]).astype(np.float64)
    missing_M = np.isnan(value_M)
    if missing_M.any():
        raise InputError(f"the value of row {row_M[np.argmax(missing_M)]} is NaN; give every product a number")
    return value_M


def _path(result: BeamResult, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(path score float64 B×K, 0 beyond the count; logp float32 B×K)."""
    logp_BK, count_B = result.logp_BK.cpu().numpy(), result.count_B.cpu().numpy()
    real_BK = np.arange(logp_BK.shape[1]) < count_B[:, None]
    if not np.isfinite(logp_BK[real_BK]).all():
        query = int(np.argmin((np.isfinite(logp_BK) | ~real_BK).all(1)))
        raise InputError(f"a beam of query {query} has a log-probability that is not finite; search again")
    if path == "logp":
        return np.where(real_BK, logp_BK, 0).astype(np.float64), logp_BK
    if path == "root":
        return np.exp(np.where(real_BK, logp_BK, -np.inf).astype(np.float64) / 2), logp_BK
    masked_BK = np.where(real_BK, logp_BK, -np.inf).astype(np.float64)
    best_B1 = masked_BK.max(1, keepdims=True, initial=-np.inf)
    weight_BK = np.exp(masked_BK - np.where(best_B1 > -np.inf, best_B1, 0))
    # The best beam weighs 1, so only a query without beams has a sum below 1.
    return weight_BK / np.maximum(weight_BK.sum(1, keepdims=True), 1), logp_BK


def _check_same(result: BeamResult, row_BC: np.ndarray, beam_BC: np.ndarray, real_BC: np.ndarray) -> None:
    range_BK2 = result.row_range_BK2.cpu().numpy()
    same = len(range_BK2) == len(row_BC) and bool((beam_BC[real_BC] < range_BK2.shape[1]).all())
    if same and real_BC.any():
        beam_BC = np.where(real_BC, beam_BC, 0)
        start_BC, end_BC = (np.take_along_axis(range_BK2[..., i], beam_BC, 1) for i in (0, 1))
        same = bool((((start_BC <= row_BC) & (row_BC < end_BC)) | ~real_BC).all())
    if not same:
        raise InputError("the candidates are not of this result: a row lies outside its beam; expand the result anew")


def _lexical(lexical_BC, real_BC: np.ndarray) -> np.ndarray:
    """float64, 0 beyond the count."""
    if lexical_BC is None:
        return np.zeros(real_BC.shape)
    lexical_BC = np.asarray(lexical_BC)
    if lexical_BC.shape != real_BC.shape or lexical_BC.dtype.kind not in "fiu":
        raise InputError(
            f"lexical_BC must be one number per candidate, {real_BC.shape}, found {lexical_BC.dtype} of "
            f"{lexical_BC.shape}; score candidates.row_BC"
        )
    lexical_BC = np.where(real_BC, lexical_BC, 0).astype(np.float64)
    if not np.isfinite(lexical_BC).all():
        query, at = (int(i[0]) for i in np.nonzero(~np.isfinite(lexical_BC)))
        raise InputError(
            f"the lexical score of candidate {at} of query {query} is {lexical_BC[query, at]}; give finite scores, 0 where "
            "there is none"
        )
    return lexical_BC


def _filled(columns: list[Tensor], parts: list[tuple[np.ndarray, ...]]) -> tuple[Tensor, ...]:
    """`columns` (B×C of fillers) with the values of each query's part at their beginning, and the counts B."""
    for b, part in enumerate(parts):
        for column, values in zip(columns, part):
            column[b, : len(values)] = torch.from_numpy(values)
    return *columns, torch.tensor([len(part[0]) for part in parts], dtype=torch.int64)


def _best_first(score_M: np.ndarray, value_M: np.ndarray | None = None) -> np.ndarray:
    """Positions by score, then value, both descending, then position, however the sort breaks ties.

    A plain sort, then a sort of the ties alone: several times as fast as a stable sort by all keys.
    """
    best_M = np.argsort(-score_M)
    same = score_M[best_M[1:]] == score_M[best_M[:-1]]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    if len(tied):
        at = best_M[tied]
        keys = (at,) if value_M is None else (at, -value_M[at])
        best_M[tied] = at[np.lexsort((*keys, -score_M[at]))]
    return best_M


def _first_of_beams(best_M: np.ndarray, beam_M: np.ndarray, quota: int | None) -> np.ndarray:
    """Of positions, best first, those that are among the `quota` first of their beam."""
    if quota is None or not len(best_M):
        return best_M
    # Numbers of 8 or 16 bits are sorted by radix.
    beam_M = beam_M[best_M].astype(np.min_scalar_type(int(beam_M.max())))
    by_beam_M = np.argsort(beam_M, kind="stable")
    size_K = np.bincount(beam_M)
    place_M = np.arange(len(best_M)) - np.repeat(np.cumsum(size_K) - size_K, size_K)
    kept_M = np.zeros(len(best_M), bool)
    kept_M[by_beam_M[place_M < quota]] = True
    return best_M[kept_M]


def _top(final_M: np.ndarray, row_M: np.ndarray, top_k: int) -> np.ndarray:
    """Positions of the `top_k` highest scores, equal ones by row."""
    at = np.arange(len(final_M))
    if len(at) > top_k:
        # All that tie with the last are kept, so that the cut does not depend on the partition's order.
        at = np.flatnonzero(final_M >= np.partition(final_M, len(at) - top_k)[len(at) - top_k])
    return at[np.lexsort((row_M[at], -final_M[at]))][:top_k]
