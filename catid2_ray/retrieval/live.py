"""New, withdrawn and returned products in a trie that serves, without a rebuild: base + small delta + bits of live rows.

The base stays memory-mapped and untouched. Inserted products are a small trie of their own, built anew on each insert,
and every one of its nodes either is a node of the base (same prefix) or is new: base nodes keep their numbers, new
nodes of depth l are numbered from n_l on. So a search over base and delta keeps one number per beam, and finds what it
would in a trie rebuilt from the live products. The next release merges them (`ids`).

N rows of the base, D inserted products, L levels, n_l base nodes at depth l, M nodes of one question.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError, InputError
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.trie import Children, Trie


class LiveIds(NamedTuple):
    """All live products in ID order: int64 codes, and rows (below N of the base, N + i the i-th inserted product)."""

    codes_NL: np.ndarray
    row_N: np.ndarray


class _Depth(NamedTuple):
    """The delta's nodes of one depth, in ID order: `node` the number in the view; `fresh`: not in the base; `at`: the
    base node that it is, or before which it stands. `known`: `node` ascending, and `known_index` whose each is."""

    node: np.ndarray
    fresh: np.ndarray
    at: np.ndarray
    known: np.ndarray
    known_index: np.ndarray


@dataclass(frozen=True, eq=False)
class LiveView:
    """One state of a live trie; immutable, so that a search sees no change half-way.

    `delta`: trie of all inserted products (its `order_N` tells which), or None. `live_base` and `live_delta`: the rows
    of base and delta that count, in the order of their tries.
    """

    base: Trie
    delta: Trie | None
    live_base: Filter
    live_delta: Filter

    @cached_property
    def depths(self) -> list[_Depth]:
        """How the delta's nodes stand among the base's, for each depth 0 … L."""
        zero = np.zeros(1, np.int64)
        depths = [_Depth(zero, zero.astype(bool), zero, zero, zero)]
        for level in range(self.base.levels):
            above = depths[-1]
            parent = np.repeat(np.arange(len(above.node)), np.diff(self.delta.child_start[level]))
            code = self.delta.token[level + 1].astype(np.int64)
            at, found = _place(self.base, level, above.at[parent], code, ~above.fresh[parent])
            # New nodes are numbered by parent and code: children of one node stay neighbours.
            new = np.flatnonzero(~found)
            new = new[np.argsort(above.node[parent[new]], kind="stable")]
            node = at.copy()
            node[new] = self.base.nodes(level + 1) + np.arange(len(new))
            known_index = np.argsort(node)
            depths.append(_Depth(node, ~found, at, node[known_index], known_index))
        return depths

    def restricted(self, base: Filter | None = None, delta: Filter | None = None) -> "LiveView":
        """This view with only the rows that the filters allow, too (None: all)."""
        return self.with_rows(
            self.live_base if base is None else self.live_base & base,
            self.live_delta if delta is None else self.live_delta & delta,
        )

    def with_rows(self, live_base: Filter, live_delta: Filter) -> "LiveView":
        """The same products with other rows live."""
        view = replace(self, live_base=live_base, live_delta=live_delta)
        if self.delta is not None:
            view.__dict__["depths"] = self.depths
        return view

    def _in_delta(self, level: int, nodes_M: np.ndarray) -> np.ndarray:
        """The delta's node of each node of the view, −1 where it has none."""
        if self.delta is None:
            return np.full(nodes_M.shape, -1)
        depth = self.depths[level]
        found_M = np.minimum(np.searchsorted(depth.known, nodes_M), len(depth.known) - 1)
        return np.where(depth.known[found_M] == nodes_M, depth.known_index[found_M], -1)

    def row_ranges(self, level: int, nodes_M) -> np.ndarray:
        """int64 M×2×2: start and end of each node's rows in the base, then in the delta's trie; (0, 0) where none."""
        nodes_M = np.asarray(nodes_M, np.int64)
        ranges_M22 = np.zeros((len(nodes_M), 2, 2), np.int64)
        both = ((self.base, np.where(nodes_M < self.base.nodes(level), nodes_M, -1)),)
        if self.delta is not None:
            both += ((self.delta, self._in_delta(level, nodes_M)),)
        for side, (trie, inner_M) in enumerate(both):
            has_M = inner_M >= 0
            for end in (0, 1):
                ranges_M22[has_M, side, end] = trie.row_start[level][inner_M[has_M] + end]
        return ranges_M22

    def count(self, level: int, nodes_M) -> np.ndarray:
        """int64 M, the live rows of each node."""
        ranges_M22 = self.row_ranges(level, nodes_M)
        base, delta = ranges_M22[:, 0].T, ranges_M22[:, 1].T
        return self.live_base.count(*base) + (0 if self.delta is None else self.live_delta.count(*delta))

    def children(self, level: int, nodes_M) -> Children:
        """The children of nodes `nodes_M` of depth `level` that have a live row, in the order of `Trie.children`."""
        nodes_M = np.asarray(nodes_M, np.int64)
        old_M = np.flatnonzero(nodes_M < self.base.nodes(level))
        base = self.base.children(level, nodes_M[old_M])
        parts = [(old_M[base.parent_index], base.token, base.child)]
        if self.delta is not None:
            inner_M = self._in_delta(level, nodes_M)
            has_M = np.flatnonzero(inner_M >= 0)
            delta, below = self.delta.children(level, inner_M[has_M]), self.depths[level + 1]
            new = below.fresh[delta.child]
            parts.append((has_M[delta.parent_index[new]], delta.token[new], below.node[delta.child[new]]))
        parent_index, token, child = (np.concatenate(arrays) for arrays in zip(*parts))
        live = self.count(level + 1, child) > 0
        parent_index, token, child = parent_index[live], token[live], child[live]
        order = np.lexsort((token, parent_index))
        return Children(parent_index[order], token[order], child[order])

    def rank(self, level: int, nodes_M) -> np.ndarray:
        """int64 M, the place of each node in ID order among all nodes of its depth, live or not: breaks ties by ID."""
        nodes_M, size = np.asarray(nodes_M, np.int64), self.base.nodes(level)
        if self.delta is None:
            return nodes_M
        depth = self.depths[level]
        new_at = depth.at[depth.fresh]
        rank_new = np.empty(len(new_at), np.int64)
        rank_new[depth.node[depth.fresh] - size] = new_at + np.arange(len(new_at))
        old_M = nodes_M < size
        rank_M = nodes_M + np.searchsorted(new_at, nodes_M, side="right")
        rank_M[~old_M] = rank_new[nodes_M[~old_M] - size]
        return rank_M

    def ids(self) -> LiveIds:
        """Every live product, for the next release and for tests. O(N + D); equal IDs: base first, then as inserted."""
        space = DocidSpace(self.base.codes_per_level)
        codes, rows = [], []
        for trie, live in ((self.base, self.live_base), (self.delta, self.live_delta)):
            if trie is None:
                continue
            row_N = np.flatnonzero(live.allowed_N)
            codes.append(trie.prefixes(trie.levels, trie.row_start[-1].holding(row_N)))
            rows.append(row_N if trie is self.base else self.base.rows + trie.order_N[row_N])
        codes_NL, row_N = np.concatenate(codes), np.concatenate(rows)
        order_N = np.argsort(space.pack(codes_NL), kind="stable")
        return LiveIds(codes_NL[order_N], row_N[order_N])


def _place(base: Trie, level: int, parent: np.ndarray, code: np.ndarray, inside: np.ndarray):
    """For nodes of depth `level` + 1 with these codes below these parents: (the base node that each is or before which
    it stands, whether it is one). `inside`: whether the parent is itself in the base, or only a place before it."""
    low = base.child_start[level][parent].astype(np.int64)
    end = np.where(inside, base.child_start[level][parent + inside], low)
    high, token = end.copy(), base.token[level + 1]
    for _ in range(int(base.widest[level]).bit_length()):
        middle = np.minimum((low + high) // 2, len(token) - 1)
        right = (low < high) & (token[middle] < code)
        low, high = np.where(right, middle + 1, low), np.where(right | (low >= high), high, middle)
    return low, (low < end) & (token[np.minimum(low, len(token) - 1)] == code)


class LiveTrie:
    """A base trie that takes changes. `view` is its state; every change makes a new one, in O(D + N / 64).

    `product_ids`: of the base's rows, in trie order (sequence or Arrow array); without them the base's products are
    named by row. Rows 0 … N − 1 are the base's, N + i is the i-th inserted product; a product that was withdrawn may be
    inserted anew with another ID, and its name means the row that was live last. `most`: inserted products before the next
    release must take them over. Changes come from one thread at a time (a lock), views may be read from any.
    """

    def __init__(
        self, base: Trie, *, product_ids: Sequence[str] | pa.ChunkedArray | pa.Array | None = None, most=50_000
    ):
        if product_ids is not None and len(product_ids) != base.rows:
            raise InputError(f"{len(product_ids)} product ids for {base.rows} trie rows; take both from one release")
        arrow = product_ids is None or isinstance(product_ids, (pa.Array, pa.ChunkedArray))
        self.product_ids = product_ids if arrow else pa.array(list(product_ids), pa.string())
        self.most, self.space = most, DocidSpace(base.codes_per_level)
        self.inserted: list[str] = []
        self._row_of: dict[str, int] = {}
        self._codes_DL = np.empty((0, base.levels), np.int64)
        self._live_D = np.empty(0, bool)
        self._lock = threading.Lock()
        self.view = LiveView(base, None, Filter.of(np.ones(base.rows, bool)), Filter.of(self._live_D))

    @property
    def base(self) -> Trie:
        return self.view.base

    def insert(self, product_id: str, codes_L) -> int:
        """Add one product; returns its row. Raises as `insert_many`."""
        return self.insert_many([product_id], [codes_L])[0]

    def insert_many(self, product_ids: Sequence[str], codes_ML) -> list[int]:
        """Add products with their IDs (integers M×L), all or none; returns their rows.

        Raises InputError for a code out of range, a product that is live already, or, unless the trie is shared, an ID
        that a live product has; CapacityError beyond `most`.
        """
        codes_ML = self.space.check(codes_ML)
        if len(product_ids) != len(codes_ML):
            raise InputError(f"{len(product_ids)} products to insert, but {len(codes_ML)} IDs; give one ID per product")
        with self._lock:
            if len(self.inserted) + len(product_ids) > self.most:
                raise CapacityError(
                    f"{len(self.inserted)} products are inserted already, {len(product_ids)} more pass the limit of "
                    f"{self.most}; publish a release that holds them"
                )
            self._claim(list(product_ids), codes_ML)
            rows = [self.base.rows + len(self.inserted) + i for i in range(len(product_ids))]
            self.inserted += product_ids
            self._row_of |= dict(zip(product_ids, rows))
            self._codes_DL = np.concatenate((self._codes_DL, codes_ML))
            self._live_D = np.append(self._live_D, np.ones(len(rows), bool))
            delta = None
            if len(self._codes_DL):
                delta = Trie.build(self._codes_DL, codes_per_level=self.base.codes_per_level, shared=True)
            live = Filter.of(self._live_D[delta.order_N] if delta else self._live_D)
            view = LiveView(self.base, delta, self.view.live_base, live)
            # Made before the view is seen, so that no search waits for it.
            self.view = view.with_rows(view.live_base, live)
        return rows

    def withdraw(self, products: Sequence[str] | Sequence[int]) -> None:
        """Take products out of every answer, by product id or row; those already out stay out. Raises InputError."""
        with self._lock:
            self._set_live(self._rows(products), False)

    def restore(self, products: Sequence[str] | Sequence[int]) -> None:
        """Bring withdrawn products back with the IDs they had; those already live stay. Raises InputError where a live
        product is of the same name or, unless the trie is shared, has the same ID."""
        with self._lock:
            rows = np.unique(self._rows(products))
            rows = rows[~self._is_live(rows)]
            names = [self._name(row) for row in rows.tolist()]
            self._claim(names, self._codes(rows))
            self._row_of |= {name: row for name, row in zip(names, rows.tolist()) if name is not None}
            self._set_live(rows, True)

    def _set_live(self, rows: np.ndarray, live: bool) -> None:
        old, new = rows[rows < self.base.rows], rows[rows >= self.base.rows] - self.base.rows
        view, base, delta = self.view, self.view.live_base, self.view.live_delta
        if len(old):
            words_W, bit = base.words_W.copy(), np.uint64(1) << (old & 63).astype(np.uint64)
            (np.bitwise_or if live else np.bitwise_and).at(words_W, old >> 6, bit if live else ~bit)
            base = Filter(words_W, base.rows)
        if len(new):
            self._live_D[new] = live
            delta = Filter.of(self._live_D[view.delta.order_N])
        self.view = view.with_rows(base, delta)

    def _is_live(self, rows: np.ndarray) -> np.ndarray:
        old = rows < self.base.rows
        live = np.empty(len(rows), bool)
        live[old], live[~old] = self.view.live_base.allows(rows[old]), self._live_D[rows[~old] - self.base.rows]
        return live

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        codes, old, base = np.empty((len(rows), self.base.levels), np.int64), rows < self.base.rows, self.base
        codes[old] = base.prefixes(base.levels, base.row_start[-1].holding(rows[old]))
        codes[~old] = self._codes_DL[rows[~old] - base.rows]
        return codes

    def _name(self, row: int) -> str | None:
        if row >= self.base.rows:
            return self.inserted[row - self.base.rows]
        return None if self.product_ids is None else self.product_ids[row].as_py()

    def _found(self, names: list[str]) -> np.ndarray:
        """int64, the row that each name means, −1 where there is none. O(N) where the base has names."""
        rows = np.full(len(names), -1)
        if self.product_ids is not None and any(name not in self._row_of for name in names):
            asked = pa.array(names, self.product_ids.type)
            hits = pc.index_in(self.product_ids, asked)
            at = np.flatnonzero(pc.is_valid(hits).to_numpy(zero_copy_only=False)) if self.base.rows else []
            rows_of = dict(zip((self.product_ids[int(row)].as_py() for row in at), at))
            rows = np.array([rows_of.get(name, -1) for name in names], np.int64)
        return np.array([self._row_of.get(name, row) for name, row in zip(names, rows.tolist())], np.int64)

    def _rows(self, products) -> np.ndarray:
        products = [products] if isinstance(products, str) else list(products)
        if products and all(isinstance(one, str) for one in products):
            rows = self._found(products)
            if (rows < 0).any():
                missing = products[int(np.argmax(rows < 0))]
                raise InputError(f"no product {missing!r} in this trie; name it by its row, or insert it")
            return rows
        rows = np.asarray(products if products else np.empty(0, np.int64))
        last = self.base.rows + len(self.inserted) - 1
        if rows.dtype.kind not in "iu" or (len(rows) and not 0 <= rows.min() <= rows.max() <= last):
            raise InputError(f"products are named by product id or by row 0…{last}, found {products[:3]}")
        return rows.astype(np.int64)

    def _claim(self, names: list[str | None], codes_ML: np.ndarray) -> None:
        """Raise InputError unless these products with these IDs may become live together."""
        named = [name for name in names if name is not None]
        rows = self._found(named)
        taken = [name for name, row in zip(named, rows.tolist()) if row >= 0 and self._is_live(np.array([row]))[0]]
        taken += [name for name, count in Counter(named).items() if count > 1]
        if taken:
            raise InputError(f"product {taken[0]!r} is live already or given twice; withdraw it first")
        if self.base.shared or not len(codes_ML):
            return
        packed = self.space.pack(codes_ML)
        live = self.space.pack(self._codes_DL[self._live_D])
        at, found = np.zeros(len(packed), np.int64), np.ones(len(packed), bool)
        for level in range(self.base.levels):
            at, found = _place(self.base, level, at, codes_ML[:, level], found)
        clash = np.isin(packed, live)
        clash[found] |= self.view.live_base.allows(at[found])
        clash |= np.unique(packed, return_counts=True)[1][np.unique(packed, return_inverse=True)[1]] > 1
        if clash.any():
            first = int(np.argmax(clash))
            raise InputError(
                f"product {names[first]!r} would share the ID {self.space.text(codes_ML[first])} with a live product; "
                "give it another, withdraw the other, or build the trie with shared=True"
            )
