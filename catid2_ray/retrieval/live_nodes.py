"""Vectors of a live trie's nodes, kept at the mean of their live products while products come and go.

Means are those of a trie rebuilt from the live products, to the last bit: sums are exact (`node_vectors.py`), so adding and
taking away gives what summing anew gives. Tails stay those of the release.

Immutable: a change writes the vectors of the nodes that it moves behind those there are, and points the nodes there. It
costs one vector per depth where a node's sum is known, else one pass over the products below the node. Sums are kept of
nodes with more than 256 products: others are as quick to sum anew, and are too many.

`view` is a `live_view.LiveView`, which holds these nodes and so imports this file.

N rows of the base, M rows that come or go, P nodes that move, n nodes of a depth, S vectors of moved nodes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.arrays import Growing, entries
from catid2_ray.retrieval.node_vectors import NodeVectors

if TYPE_CHECKING:
    from catid2_ray.retrieval.inserted import Inserted
    from catid2_ray.retrieval.vectors import GrownVectors, VectorStore

_FEW = 256
_BLOCK = 8192
_NODES = 4096  # nodes summed at a time: 12 MiB of sums at a width of 384


class Depth(NamedTuple):
    """One depth of a view: `changed_X` nodes of the base (ascending) have the vectors `slot_X` of `moved_SD` (float16), the
    inserted nodes the vectors `inserted_slot_n`, None while nothing is inserted."""

    changed_X: np.ndarray
    slot_X: np.ndarray
    inserted_slot_n: np.ndarray | None
    moved_SD: np.ndarray


@dataclass(frozen=True, eq=False)
class _Moved:
    """The moved nodes of one depth: packed prefixes (ascending), the base's node of each, −1 where it has none, and where its
    vector lies in `vectors`, whose first is zeros. `sums`: float64 D by prefix."""

    packed_M: np.ndarray
    node_M: np.ndarray
    slot_M: np.ndarray
    vectors: Growing
    sums: dict[int, np.ndarray]

    @classmethod
    def none(cls, width: int) -> _Moved:
        empty = np.empty(0, np.int64)
        return cls(empty, empty, empty, Growing.of(np.zeros((1, width), np.float16)), {})

    def with_vectors(self, packed_P: np.ndarray, node_P: np.ndarray, vector_PD: np.ndarray, sums: dict) -> _Moved:
        slot_P, vectors = len(self.vectors) + np.arange(len(packed_P)), self.vectors.with_rows(vector_PD)
        at_P = np.searchsorted(self.packed_M, packed_P)
        new_P = np.append(self.packed_M, -1)[at_P] != packed_P
        slot_M = self.slot_M.copy()
        slot_M[at_P[~new_P]] = slot_P[~new_P]
        packed_M, node_M, slot_M = (
            np.insert(old, at_P[new_P], more[new_P])
            for old, more in ((self.packed_M, packed_P), (self.node_M, node_P), (slot_M, slot_P))
        )
        if len(vectors) > 2 * len(packed_M) + 64:
            kept_SD = np.concatenate((vectors.rows[:1], vectors.rows[slot_M]))
            vectors, slot_M = Growing.of(kept_SD), 1 + np.arange(len(packed_M))
        return _Moved(packed_M, node_M, slot_M, vectors, sums)


@dataclass(frozen=True, eq=False)
class NodesOfView:
    """The vectors of a release's nodes, and of those that live changes have moved. `inserted`: the view's."""

    base: NodeVectors
    inserted: Inserted | None = None
    moved: tuple[_Moved, ...] = ()

    @cached_property
    def depths(self) -> tuple[Depth, ...]:
        """One for each depth with means, empty while nothing has changed. Made at the first search of a view."""
        moved = self.moved
        if not moved and self.inserted is not None:  # all that was inserted is withdrawn, and nothing else has moved
            moved = [_Moved.none(self.base.width) for _ in self.base.means]
        return tuple(self._depth(depth, one) for depth, one in enumerate(moved, 1))

    def _depth(self, depth: int, moved: _Moved) -> Depth:
        # Nodes of a depth are in the order of their prefixes.
        of_base, inserted = moved.node_M >= 0, self.inserted
        slot_n = None
        if inserted is not None:
            first_n = inserted.arrays.row_start[depth][:-1]
            packed_n = inserted.space.prefix_of(inserted.packed_D[first_n], depth)
            at_n = np.searchsorted(moved.packed_M, packed_n)
            known_n = np.append(moved.packed_M, -1)[at_n] == packed_n
            slot_n = np.where(known_n, np.append(moved.slot_M, 0)[at_n], 0)
        return Depth(moved.node_M[of_base], moved.slot_M[of_base], slot_n, moved.vectors.rows)

    @staticmethod
    def check(vectors: VectorStore | GrownVectors | None) -> None:
        """Raise InputError where products cannot come or go, as the release has no vectors of products."""
        if vectors is None:
            raise InputError(
                "products cannot come or go: the release has no vectors of products, so the vectors of its nodes could not "
                "follow; make its serving part again"
            )

    def with_rows(self, view, row_M: np.ndarray, come_M: np.ndarray, codes_ML: np.ndarray) -> NodesOfView:
        """The vectors in `view`, in which these rows, with these IDs, have come (`come_M` true) or gone."""
        space, moved = DocidSpace(view.codes_per_level), list(self.moved)
        moved = moved or [_Moved.none(self.base.width) for _ in self.base.means]
        packed_M, node_ML = space.pack(codes_ML), view.base.nodes_of(codes_ML)
        for depth, before in enumerate(moved, 1):
            packed_P, first_P, node_of_M = np.unique(
                space.prefix_of(packed_M, depth), return_index=True, return_inverse=True
            )
            node_P = node_ML[first_P, depth - 1].astype(np.int64)
            rows = _RowsBelow.of(view, depth, packed_P, node_P)
            for start in range(0, len(packed_P), _NODES):
                part = slice(start, start + _NODES)
                mine_M = (node_of_M >= start) & (node_of_M < start + _NODES)
                changed = row_M[mine_M], come_M[mine_M], node_of_M[mine_M] - start
                mean_PD, sums = _means(view, rows.taken(part), packed_P[part], before.sums, changed)
                before = before.with_vectors(packed_P[part], node_P[part], mean_PD, sums)
            moved[depth - 1] = before
        return NodesOfView(self.base, view.inserted, tuple(moved))


class _RowsBelow(NamedTuple):
    """Below each of P nodes: base rows `first_P` … `end_P` − 1, inserted ones `low_P` … `high_P` − 1 in ID order, and how
    many of them are live."""

    first_P: np.ndarray
    end_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray
    live_P: np.ndarray

    @classmethod
    def of(cls, view, depth: int, packed_P: np.ndarray, node_P: np.ndarray) -> _RowsBelow:
        starts, known_P = view.base.row_start[depth], np.maximum(node_P, 0)
        first_P, end_P = (np.where(node_P >= 0, starts[known_P + i], 0).astype(np.int64) for i in (0, 1))
        low_P = high_P = np.zeros(len(packed_P), np.int64)
        if view.inserted is not None:
            width = int(view.inserted.space.radix_L[depth - 1])
            low_P, high_P = (np.searchsorted(view.inserted.packed_D, (packed_P + i) * width) for i in (0, 1))
        live_P = view.live_base.count(first_P, end_P) + view.live_sorted.count(low_P, high_P)
        return cls(first_P, end_P, low_P, high_P, live_P)

    def taken(self, at) -> _RowsBelow:
        return _RowsBelow(*(part[at] for part in self))


def _means(view, rows: _RowsBelow, packed_P: np.ndarray, sums: dict, changed) -> tuple[np.ndarray, dict]:
    """(float16 P×D, the sums after it). `changed`: rows, whether each came, and below which node it lies."""
    vectors, (row_M, come_M, node_M) = view.products.vectors, changed
    known_P = np.array([packed in sums for packed in packed_P.tolist()], bool)
    total_PD = np.zeros((len(packed_P), vectors.width))
    _add_below(total_PD, view, rows, np.flatnonzero(~known_P))
    for at in np.flatnonzero(known_P).tolist():
        total_PD[at] = sums[int(packed_P[at])]
    of_known = np.flatnonzero(known_P[node_M])
    for start in range(0, len(of_known), _BLOCK):
        at = of_known[start : start + _BLOCK]
        sign_M1 = np.where(come_M[at], 1.0, -1.0)[:, None]
        np.add.at(total_PD, node_M[at], vectors.unit(row_M[at]).double().numpy() * sign_M1)
    sums = dict(sums)
    for at, packed in enumerate(packed_P.tolist()):
        if rows.live_P[at] > _FEW:
            sums[packed] = total_PD[at].copy()
        else:
            sums.pop(packed, None)
    return (total_PD / np.maximum(rows.live_P, 1)[:, None]).astype(np.float16), sums


def _add_below(total_PD: np.ndarray, view, rows: _RowsBelow, at: np.ndarray) -> None:
    """Add the vectors of the live products below the nodes `at`."""
    size = view.base.rows
    first_R = np.stack((rows.first_P[at], size + rows.low_P[at]), 1).ravel()
    end_R = np.stack((rows.end_P[at], size + rows.high_P[at]), 1).ravel()
    number_M, range_M = entries(first_R, end_R - first_R)
    row_M = view.row_of(number_M)
    live_M = view.is_live(row_M)
    row_M, node_M = row_M[live_M], at[range_M[live_M] // 2]
    for start in range(0, len(row_M), _BLOCK):
        part_M = node_M[start : start + _BLOCK]
        first = np.flatnonzero(np.diff(part_M, prepend=-1))
        vector_MD = view.products.vectors.unit(row_M[start : start + _BLOCK]).double().numpy()
        total_PD[part_M[first]] += np.add.reduceat(vector_MD, first, axis=0)
