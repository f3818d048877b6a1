"""Products inserted into a serving trie, in ID order: what a live search walks beside the base trie.

Unusual: kept per product is how many codes it shares with the product before it, so that one more product changes two
entries; the nodes of a depth are where that number is smaller than the depth. Taking one product into 49,000 copies
about 1.5 MB. Nodes are made at the first search of a view, not at each change.

D inserted products, L levels, n nodes of a depth.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.retrieval.arrays import pointer_type, token_type
from catid2_ray.retrieval.trie import Trie


class InsertedArrays(NamedTuple):
    """As `Trie`'s fields, for each depth; `twin[l]` (n): the base's node of the same prefix, −1 where it has none."""

    child_start: list[np.ndarray]
    row_start: list[np.ndarray]
    token: list[np.ndarray]
    twin: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Inserted:
    """Immutable. `order_D`: which insertion (0 … D − 1) each row is, rows in ID order, equal IDs as inserted; `packed_D`
    int64, the IDs; `shared_D`: codes that each has in common with the row before; `twin_DL`: the base's node of each of
    its prefixes, −1 where the base has none."""

    space: DocidSpace
    order_D: np.ndarray
    packed_D: np.ndarray
    shared_D: np.ndarray
    twin_DL: np.ndarray

    @classmethod
    def none(cls, base: Trie) -> "Inserted":
        twin_DL = np.empty((0, base.levels), pointer_type(base.rows))
        empty = np.empty(0, np.int64)
        return cls(DocidSpace(base.codes_per_level), empty, empty, np.empty(0, np.uint8), twin_DL)

    def __len__(self) -> int:
        return len(self.packed_D)

    def with_products(self, base: Trie, codes_ML: np.ndarray) -> "Inserted":
        """These and M ≥ 1 more, numbered from D on. O(D) copying, O(M log N) look-ups."""
        packed_M, twin_ML = self.space.pack(codes_ML), base.nodes_of(codes_ML)
        sorted_M = np.argsort(packed_M, kind="stable")
        at_M = np.searchsorted(self.packed_D, packed_M[sorted_M], side="right")
        # One place is a plain copy in two pieces; NumPy takes many by a mask.
        at = int(at_M[0]) if len(at_M) == 1 else at_M
        order_D, packed_D, shared_D, twin_DL = (
            np.insert(old, at, new[sorted_M], axis=0)
            for old, new in (
                (self.order_D, len(self) + np.arange(len(codes_ML))),
                (self.packed_D, packed_M),
                (self.shared_D, np.zeros(len(codes_ML), np.uint8)),
                (self.twin_DL, twin_ML),
            )
        )
        new_M = at_M + np.arange(len(at_M))
        changed = np.unique(np.append(new_M, new_M + 1))
        changed = changed[(changed > 0) & (changed < len(packed_D))]
        same = self.space.unpack(packed_D[changed]) == self.space.unpack(packed_D[changed - 1])
        shared_D[changed] = np.logical_and.accumulate(same, 1).sum(1)
        # The first row begins a node at every depth; it may have stood elsewhere before.
        shared_D[0] = 0
        return Inserted(self.space, order_D, packed_D, shared_D, twin_DL)

    @cached_property
    def arrays(self) -> InsertedArrays:
        codes_per_level, count = self.space.codes_per_level, len(self)
        dtype = pointer_type(count)
        first = [np.zeros(1, dtype), *(np.flatnonzero(self.shared_D < level) for level in range(1, self._depths))]
        row_start = [np.append(rows, count).astype(dtype) for rows in first]
        child_start, token, twin = [], [np.empty(0, np.uint8)], [np.zeros(1, self.twin_DL.dtype)]
        for level, k in enumerate(codes_per_level):
            rows = first[level + 1]
            node_D = np.cumsum(self.shared_D <= level, dtype=dtype) - 1
            child_start.append(np.append(node_D[first[level]], len(rows)).astype(dtype))
            token.append((self.packed_D[rows] // self.space.radix_L[level] % k).astype(token_type(k)))
            twin.append(self.twin_DL[rows, level])
        return InsertedArrays(child_start, row_start, token, twin)

    @property
    def _depths(self) -> int:
        return self.space.levels + 1

    @cached_property
    def widest(self) -> tuple[int, ...]:
        """L numbers: the most children of a node, to the next power of two, so that shapes seldom change."""
        return tuple(1 << int(np.diff(start).max() - 1).bit_length() for start in self.arrays.child_start)

    def range_of(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of the rows that have each packed ID. O(log D) each."""
        return tuple(np.searchsorted(self.packed_D, packed, side=side) for side in ("left", "right"))
