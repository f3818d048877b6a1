"""Whom a query's nearest products would name: the soft half of what a generator learns from a training query.

P(d | q) = softmax( score(q, d) / TEMPERATURE ) over the query's best MOST products; the score is the cosine of their vectors.
A label names a few products that someone judged; the teacher names what lies around them, which the search must find too.
(As distillation from a dense teacher, RIPOR 2311.09134; here as more examples and not as another loss.)

Q queries, N products of a block, M best, D width, C draws.
"""

from dataclasses import dataclass, field

import numpy as np

MOST, TEMPERATURE = 64, 0.05
_QUERIES = 1024  # whose products are compared with a block at a time


@dataclass
class Nearest:
    """The best `most` products of each query among all blocks shown so far: `score_QM` float32, best first, and `row_QM` int64,
    −1 where there are fewer. Equal scores stand in the order of their rows."""

    query_QD: np.ndarray
    most: int = MOST
    score_QM: np.ndarray = field(init=False)
    row_QM: np.ndarray = field(init=False)

    def __post_init__(self):
        shape = len(self.query_QD), self.most
        self.score_QM, self.row_QM = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)

    def show(self, vector_ND: np.ndarray, first_row: int, more_QN: np.ndarray | None = None) -> None:
        """Compare all queries with the products `first_row` … of one block; blocks come in the order of their rows. `more_QN`: what
        is added to the products of vectors. Memory: 1,024 queries × the block."""
        for start in range(0, len(self.query_QD), _QUERIES):
            some = slice(start, start + _QUERIES)
            score_QN = self.query_QD[some] @ vector_ND.T
            if more_QN is not None:
                score_QN += more_QN[some]
            row_N = np.arange(first_row, first_row + len(vector_ND))
            if self.most < len(vector_ND):
                # Ties at the edge are cut by row: what equals the last is kept by the stable sort below.
                edge_Q1 = -np.partition(-score_QN, self.most - 1, axis=1)[:, self.most - 1 : self.most]
                best_QM = np.argsort(score_QN < edge_Q1, axis=1, kind="stable")[:, : self._kept(score_QN, edge_Q1)]
                best_QM.sort(axis=1)
            else:
                best_QM = np.broadcast_to(np.arange(len(vector_ND)), score_QN.shape)
            score_QX = np.concatenate([self.score_QM[some], np.take_along_axis(score_QN, best_QM, 1)], 1)
            row_QX = np.concatenate([self.row_QM[some], row_N[best_QM]], 1)
            order_QM = np.argsort(-score_QX, axis=1, kind="stable")[:, : self.most]
            self.score_QM[some] = np.take_along_axis(score_QX, order_QM, 1)
            self.row_QM[some] = np.take_along_axis(row_QX, order_QM, 1)

    @staticmethod
    def _kept(score_QN: np.ndarray, edge_Q1: np.ndarray) -> int:
        return int((score_QN >= edge_Q1).sum(1).max())


def shares(score_QM: np.ndarray, *, temperature: float = TEMPERATURE) -> np.ndarray:
    """float64 Q×M: softmax(score / temperature) over each row; −inf has 0."""
    score_QM = score_QM.astype(np.float64) / temperature
    weight_QM = np.exp(score_QM - score_QM.max(1, keepdims=True))
    return weight_QM / weight_QM.sum(1, keepdims=True)


def drawn(share_QM: np.ndarray, count_Q: np.ndarray, offset_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(query_C, place_C) int64: `count_Q` places 0 … M − 1 of each query, by systematic sampling.

    The points (offset + i) / count, 0 ≤ offset < 1, are looked up in the row's cumulative shares, so that a place is drawn as
    often as its share says, to the next whole number above or below.
    """
    query_C = np.repeat(np.arange(len(count_Q)), count_Q)
    number_C = np.arange(len(query_C)) - np.repeat(np.cumsum(count_Q) - count_Q, count_Q)
    point_C = (number_C + offset_Q[query_C]) / count_Q[query_C]
    before_QM = np.cumsum(share_QM, axis=1)
    before_QM /= before_QM[:, -1:]
    place_C = (before_QM[query_C] <= point_C[:, None]).sum(1)
    return query_C, np.minimum(place_C, (share_QM > 0).sum(1)[query_C] - 1)
