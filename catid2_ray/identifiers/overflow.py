"""Prefixes with more products than free codes: who leaves, and for which prefix.

Moves are taken one by one in the order of (added cost, product_id) over all prefixes, from a heap; an offer changes
only when the prefix it names fills up, so only then is it made again. Few products overflow, so this loop is short.

N products, P products in question, L levels, K codes of a level, Z latent width. A node of depth d is a prefix of d
codes as one integer; depth L − 1 are the homes, in which products share all codes but the last.
"""

import heapq
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

BLOCK_NUMBERS = 2**20  # products × siblings looked at together


class Moves(NamedTuple):
    """`row_P`: ascending rows that leave their prefix; `home_P`: the prefixes that take them."""

    row_P: np.ndarray
    home_P: np.ndarray


def spill(space, books, codes_NL, residual_NZ, home_N, taken_M, touched) -> Moves:
    """Move products out of those of the prefixes `touched` that hold more of them than free codes.

    Rows are in product_id order; `home_N`: each row's prefix of L − 1 codes; `taken_M`: packed occupied IDs, sorted;
    `books`: one array K_l×Z per level. The nearest prefix with room is found by descent: at the deepest level that has
    room beside the product's own code, the code nearest to what the levels above leave over, then the nearest code of
    every level below. Its added cost is the squared distance to its nearest free ID there, minus that to its own ID.
    """
    last = space.codes_per_level[-1]
    homes, members = np.unique(home_N[is_member(touched, home_N)], return_counts=True)
    surplus = members - (last - taken_codes(taken_M, homes, last).sum(axis=1))
    excess = {int(home): int(more) for home, more in zip(homes, surplus) if more > 0}
    row_P = np.flatnonzero(is_member(np.array(sorted(excess), np.int64), home_N))
    if not excess:
        return Moves(row_P, row_P)
    offers = _Offers(space, books, codes_NL[row_P], residual_NZ[row_P], home_N, taken_M)
    cost_P, target_P = offers.make(np.arange(len(row_P)))
    heap = [(cost, p, target) for p, (cost, target) in enumerate(zip(cost_P.tolist(), target_P.tolist()))]
    heapq.heapify(heap)
    waiting = defaultdict(list)
    for _, p, target in heap:
        waiting[target].append(p)
    left: dict[int, int] = {}
    while excess:
        _, p, target = heapq.heappop(heap)
        source = int(home_N[row_P[p]])
        if source not in excess or offers.is_full(space.levels - 1, np.array([target]))[0]:
            continue
        left[p] = target
        excess[source] -= 1
        if not excess[source]:
            del excess[source]
        if offers.settle(target):
            again = [q for q in waiting.pop(target) if q not in left and int(home_N[row_P[q]]) in excess]
            if not again:
                continue
            cost_P, target_P = offers.make(np.array(again))
            for q, cost, target in zip(again, cost_P.tolist(), target_P.tolist()):
                heapq.heappush(heap, (cost, q, target))
                waiting[target].append(q)
    moved = sorted(left)
    return Moves(row_P[moved], np.array([left[p] for p in moved], np.int64))


class _Offers:
    """Which nodes are full, and so to which prefix each of P products would move, at what added cost."""

    def __init__(self, space, books, codes_PL, residual_PZ, home_N, taken_M):
        self.space, self.books, self.codes_PL, self.taken_M = space, books, codes_PL, taken_M
        residual_PZ = residual_PZ.astype(np.float64)
        self.latent_PZ = residual_PZ + codeword_sum(books[:-1], codes_PL)
        self.own_cost_P = ((residual_PZ - books[-1][codes_PL[:, -1]]) ** 2).sum(axis=1)
        self.size = [space.capacity, *space.radix_L.tolist()]
        # What overflows has no place yet, so a home counts at most all its codes as used.
        homes, used = np.unique(np.concatenate([home_N, taken_M // self.size[-2]]), return_counts=True)
        used = np.minimum(used, self.size[-2])
        self.used, self.full = [], []
        for depth in range(space.levels):
            node, which = np.unique(homes // (self.size[depth] // self.size[-2]), return_inverse=True)
            count = np.bincount(which, weights=used).astype(np.int64)
            self.used.append(Counter(dict(zip(node.tolist(), count.tolist()))))
            self.full.append(node[count >= self.size[depth]])

    def is_full(self, depth: int, nodes: np.ndarray) -> np.ndarray:
        return is_member(self.full[depth], nodes)

    def settle(self, home: int) -> bool:
        """One more product lives in `home`; true when that was its last free ID."""
        for depth in range(self.space.levels):
            node = home // (self.size[depth] // self.size[-2])
            self.used[depth][node] += 1
            if self.used[depth][node] == self.size[depth]:
                self.full[depth] = np.insert(self.full[depth], np.searchsorted(self.full[depth], node), node)
        return bool(self.is_full(self.space.levels - 1, np.array([home]))[0])

    def make(self, who_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Added cost float64 and target home int64 of the products `who_P`."""
        step = max(1, BLOCK_NUMBERS // max(self.space.codes_per_level))
        blocks = np.split(who_P, range(step, len(who_P), step))
        cost, target = zip(*(self._make(block) for block in blocks))
        return np.concatenate(cost), np.concatenate(target)

    def _make(self, who_P):
        levels, last = self.space.levels, self.space.codes_per_level[-1]
        target_P = np.full(len(who_P), -1, np.int64)
        point_PZ = self.latent_PZ[who_P]
        for depth in range(levels - 2, -1, -1):
            node_P = self.space.pack(self.codes_PL[who_P]) // self.size[depth]
            chosen = np.flatnonzero((target_P < 0) & ~self.is_full(depth, node_P))
            node, point = node_P[chosen], self.latent_PZ[who_P[chosen]]
            point = point - codeword_sum(self.books[:depth], self.codes_PL[who_P[chosen]])
            for level in range(depth, levels - 1):
                child = node[:, None] * self.space.codes_per_level[level] + np.arange(self.space.codes_per_level[level])
                distance = cdist(point, self.books[level], "sqeuclidean")
                distance[self.is_full(level + 1, child)] = np.inf
                code = distance.argmin(axis=1)
                node, point = child[np.arange(len(code)), code], point - self.books[level][code]
            target_P[chosen], point_PZ[chosen] = node, point
        cost_PK = cdist(point_PZ, self.books[-1], "sqeuclidean")
        cost_PK[taken_codes(self.taken_M, target_P, last)] = np.inf
        return cost_PK.min(axis=1) - self.own_cost_P[who_P], target_P


def codeword_sum(books, codes_PL) -> np.ndarray:
    """float64 P×Z, the sum of the codewords that the first `len(books)` codes of each row choose; 0.0 for no book."""
    total = 0.0
    for level, book in enumerate(books):
        total = total + book[codes_PL[:, level]]
    return total


def taken_codes(taken_M: np.ndarray, home_B: np.ndarray, codes: int) -> np.ndarray:
    """bool B×K: last codes of each prefix `home_B` that the sorted, packed IDs `taken_M` hold."""
    first_B = np.searchsorted(taken_M, home_B * codes)
    count_B = np.searchsorted(taken_M, (home_B + 1) * codes) - first_B
    row = np.repeat(np.arange(len(home_B)), count_B)
    index = np.arange(len(row)) + (first_B - (np.cumsum(count_B) - count_B))[row]
    mask_BK = np.zeros((len(home_B), codes), bool)
    mask_BK[row, taken_M[index] % codes] = True
    return mask_BK


def is_member(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool, for each of `values` whether `sorted_values` (ascending) holds it."""
    if not len(sorted_values):
        return np.zeros(np.shape(values), bool)
    place = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return sorted_values[place] == values
