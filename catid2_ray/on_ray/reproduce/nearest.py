"""Vectors of queries and products, faiss's search among them, and what another search found.

Q queries, N products, D width of a vector.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from catid2_ray.errors import InputError
from catid2_ray.evaluation.reproduce import ranking, trec
from catid2_ray.evaluation.reproduce.ranking import RETURNED, Ranking
from catid2_ray.on_ray.reproduce.bench import Bench
from catid2_ray.on_ray.reproduce.costs import cost_of


@dataclass(frozen=True)
class Pair:
    """`queries`: texts → float32 Q×D. Seconds to train and to embed the products; `milliseconds`: what encoding a query takes."""

    queries: Callable[[list[str]], np.ndarray]
    product_ND: np.ndarray
    train: float
    index: float
    milliseconds: Callable[[], float]


def read_file(path: str, named_in: str = "reproduce.runs") -> bytes:
    """A file of this machine. Raises InputError, which says where it was named."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{named_in}: {path} cannot be read ({error.strerror or error}): name a file of the machine that runs the command"
        ) from None


def given(path: str, bench: Bench) -> Ranking:
    """What another search answered, as its file says; nobody knows here what it cost."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"reproduce.runs: {path} is no UTF-8 text ({error}): write it anew") from None
    run = trec.read_run(
        text, query_ids=bench.judged["test"].query_ids, row_of=bench.row_of, returned=RETURNED, name=path
    )
    return Ranking(run.rows_QC, {}, {name: getattr(run, name) for name in run._fields[1:]})


def approximate(index: str, query_QD: np.ndarray, pair: Pair, encoding: float) -> Ranking:
    """faiss's HNSW or IVF over the same vectors, by inner product of rows of length 1."""
    try:
        import faiss
    except ImportError:
        raise InputError("faiss is not installed: pip install 'catid2-ray[baselines]'") from None
    product_ND = ranking.unit(pair.product_ND)
    start, lists = time.monotonic(), int(4 * len(product_ND) ** 0.5)
    found = faiss.index_factory(
        product_ND.shape[1], "HNSW32" if index == "hnsw" else f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT
    )
    found.train(product_ND)
    found.add(product_ND)
    if index == "hnsw":
        found.hnsw.efSearch = 2 * RETURNED
    else:
        found.nprobe = max(1, lists // 32)
    indexed = time.monotonic()
    rows_QC = found.search(ranking.unit(query_QD), min(RETURNED, len(product_ND)))[1].astype(np.int64)
    milliseconds = 1000 * (time.monotonic() - indexed) / max(1, len(query_QD))
    rows_QC = np.pad(rows_QC, ((0, 0), (0, RETURNED - rows_QC.shape[1])), constant_values=-1)
    return Ranking(
        rows_QC, cost_of(pair.train, pair.index + indexed - start, encoding + milliseconds, product_ND.nbytes), {}
    )
