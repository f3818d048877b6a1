"""Prefixes with more products than free codes: who leaves, for which prefix, and how far such moves can reach.

Moves are taken one by one in the order of (added cost, product_id) over all prefixes. An offer changes only when the
prefix it names fills up, so products wait in one sorted queue per prefix, and only a full prefix's queue is made anew.
It is made anew at once, since a later offer may be cheaper. Exact copies share offers, so time grows linearly with
them; in one crowd of products that all differ it grows with the square of their number.

N products, P products in question, H prefixes with too many, L levels, K codes of a level, Z latent width. A node of
depth d is a prefix of d codes as one integer; depth L − 1 are the homes, in which products share all codes but the last.
"""

import heapq
from typing import NamedTuple

import numpy as np

from catid2_ray.errors import CapacityError

BLOCK_NUMBERS = 2**17  # products × codes looked at together
BLOCK_ROWS = 2**14  # products compared together
BLAS_SLACK = 1e-12  # more than the rounding of a matrix product, in units of the squared lengths


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
    surplus = members - (last - np.diff(np.searchsorted(taken_M, [homes * last, (homes + 1) * last]), axis=0)[0])
    homes, excess_H = homes[surplus > 0], surplus[surplus > 0]
    row_P = np.flatnonzero(is_member(homes, home_N))
    if not len(row_P):
        return Moves(row_P, row_P)
    source_P = np.searchsorted(homes, home_N[row_P])
    rooms, groups = _Rooms(space, home_N, taken_M), _Groups(space.pack(codes_NL[row_P]), residual_NZ, row_P)
    offers = _Offers(space, books, codes_NL, residual_NZ, taken_M, rooms)
    waiting = _Queues(groups, rooms)
    lowest_G = row_P[groups.member_P[groups.next_G]]
    waiting.add(np.arange(len(lowest_G)), *offers.make(lowest_G))
    went_P, open_sources = np.full(len(row_P), -1, np.int64), len(homes)
    while open_sources:
        p, target = waiting.pop()
        source = source_P[p]
        if not excess_H[source]:
            waiting.keep(target, lambda p_Q: excess_H[source_P[p_Q]] > 0)
            continue
        went_P[p] = target
        groups.next_G[groups.of_P[p]] += 1
        excess_H[source] -= 1
        open_sources -= not excess_H[source]
        if rooms.settle(target):
            # The group that took the last place may have more members than its queue was given.
            left_Q = np.append(waiting.close(target), p)
            again = np.unique(groups.of_P[left_Q[excess_H[source_P[left_Q]] > 0]])
            again = again[groups.next_G[again] < groups.end_G[again]]
            if len(again):
                waiting.add(again, *offers.make(lowest_G[again]))
    moved = np.flatnonzero(went_P >= 0)
    return Moves(row_P[moved], went_P[moved])


class _Groups:
    """Products of equal codes and equal residuals: they share every offer, and the lowest product_id leaves first."""

    def __init__(self, packed_P, residual_NZ, row_P):
        blocks = np.split(row_P, range(BLOCK_ROWS, len(row_P), BLOCK_ROWS))
        length_P = np.concatenate([squared(residual_NZ[rows].astype(np.float64)) for rows in blocks])
        self.member_P = np.lexsort((length_P, packed_P))  # stable: ascending p in a group
        keys = packed_P[self.member_P], length_P[self.member_P]
        new_P = np.append(True, (keys[0][1:] != keys[0][:-1]) | (keys[1][1:] != keys[1][:-1]))
        maybe = np.flatnonzero(~new_P)
        for place in np.split(maybe, range(BLOCK_ROWS, len(maybe), BLOCK_ROWS)):
            one, other = row_P[self.member_P[place]], row_P[self.member_P[place - 1]]
            new_P[place] = (residual_NZ[one] != residual_NZ[other]).any(axis=1)
        self.next_G = np.flatnonzero(new_P)  # places in member_P, of the first that has not left
        self.end_G = np.append(self.next_G[1:], len(row_P))
        self.of_P = np.empty(len(row_P), np.int64)
        self.of_P[self.member_P] = np.cumsum(new_P) - 1

    def front(self, group_Q, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `most` products p of each group, or all that are left, and each one's place in `group_Q`."""
        count_Q = np.minimum(self.end_G[group_Q] - self.next_G[group_Q], most)
        which = np.repeat(np.arange(len(group_Q)), count_Q)
        place = np.arange(len(which)) + (self.next_G[group_Q] - (np.cumsum(count_Q) - count_Q))[which]
        return self.member_P[place], which


class _Queues:
    """Products p waiting for target homes, each queue sorted by (cost, p); a heap of their first entries.

    Of a group only as many wait in a queue as its home has room for: when those have left, the home is full.
    """

    def __init__(self, groups, rooms):
        self.groups, self.rooms = groups, rooms
        self.queue: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}  # costs, products, how many of them are gone
        self.heap: list[tuple[float, int, int]] = []

    def add(self, group_Q, cost_Q, target_Q):
        order = np.argsort(target_Q, kind="stable")
        targets, first = np.unique(target_Q[order], return_index=True)
        for target, part in zip(targets.tolist(), np.split(order, first[1:])):
            new, which = self.groups.front(group_Q[part], self.rooms.left(-1, target))
            cost, p, gone = self.queue.get(target, (cost_Q[:0], new[:0], 0))
            cost, p = np.concatenate([cost[gone:], cost_Q[part][which]]), np.concatenate([p[gone:], new])
            sort = np.lexsort((p, cost))
            self._store(target, cost[sort], p[sort], 0)

    def pop(self) -> tuple[int, int]:
        """The first product of all queues and its target; it leaves its queue."""
        while True:
            _, p, target = heapq.heappop(self.heap)
            cost_Q, p_Q, gone = self.queue.get(target, ((), (), 0))
            # An entry is stale when its queue has a new first entry or is no more.
            if gone < len(p_Q) and p_Q[gone] == p:
                self._store(target, cost_Q, p_Q, gone + 1)
                return p, target

    def keep(self, target: int, wanted):
        """Drop from one queue the products for which `wanted` is false."""
        cost, p, gone = self.queue[target]
        mask = wanted(p[gone:])
        self._store(target, cost[gone:][mask], p[gone:][mask], 0)

    def close(self, target: int) -> np.ndarray:
        """Remove a queue and return who still waited in it."""
        _, p, gone = self.queue.pop(target)
        return p[gone:]

    def _store(self, target, cost, p, gone):
        self.queue[target] = cost, p, gone
        if gone < len(p):
            heapq.heappush(self.heap, (cost[gone].item(), p[gone].item(), target))


class _Rooms:
    """How many IDs are free below nodes, and which nodes are full."""

    def __init__(self, space, home_N, taken_M):
        self.size = [node_size(space, depth) for depth in range(space.levels)]
        # What overflows has no place yet, so a home counts at most all its codes as used.
        homes, used = np.unique(np.concatenate([home_N, taken_M // self.size[-1]]), return_counts=True)
        used = np.minimum(used, self.size[-1])
        self.node, self.used, self.full, self.free = [], [], [], [{} for _ in self.size]
        for size in self.size:
            node_H = homes // (size // self.size[-1])
            first = np.flatnonzero(np.diff(node_H, prepend=-1))
            self.node.append(node_H[first])
            self.used.append(np.add.reduceat(used, first))
            self.full.append(self.node[-1][self.used[-1] >= size])

    def is_full(self, depth: int, nodes: np.ndarray) -> np.ndarray:
        return is_member(self.full[depth], nodes)

    def left(self, depth: int, node: int) -> int:
        """IDs still free below a node."""
        if node not in self.free[depth]:
            place = np.searchsorted(self.node[depth], node)
            known = place < len(self.node[depth]) and self.node[depth][place] == node
            self.free[depth][node] = self.size[depth] - (int(self.used[depth][place]) if known else 0)
        return self.free[depth][node]

    def settle(self, home: int) -> bool:
        """One more product lives in `home`; true when that was its last free ID."""
        for depth, size in enumerate(self.size):
            node = home // (size // self.size[-1])
            self.free[depth][node] = self.left(depth, node) - 1
            if not self.free[depth][node]:
                self.full[depth] = np.insert(self.full[depth], np.searchsorted(self.full[depth], node), node)
        return not self.free[-1][home]


class _Offers:
    """To which prefix each of some products would move, at what added cost, as the rooms are now."""

    def __init__(self, space, books, codes_NL, residual_NZ, taken_M, rooms):
        self.space, self.books, self.codes_NL, self.residual_NZ = space, books, codes_NL, residual_NZ
        self.taken_M, self.rooms = taken_M, rooms

    def make(self, row_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Added cost float64 and target home int64 of the products in these rows."""
        step = max(1, BLOCK_NUMBERS // max(self.space.codes_per_level))
        blocks = np.split(row_Q, range(step, len(row_Q), step))
        cost, target = zip(*(self._make(self.codes_NL[rows], self.residual_NZ[rows]) for rows in blocks))
        return np.concatenate(cost), np.concatenate(target)

    def _make(self, codes_QL, residual_QZ):
        levels, books, codes_per_level = self.space.levels, self.books, self.space.codes_per_level
        residual_QZ = residual_QZ.astype(np.float64)
        own_cost_Q = squared(residual_QZ - books[-1][codes_QL[:, -1]])
        latent_QZ, point_QZ = residual_QZ + codeword_sum(books[:-1], codes_QL), np.empty_like(residual_QZ)
        home_Q, target_Q = self.space.pack(codes_QL) // codes_per_level[-1], np.full(len(codes_QL), -1, np.int64)
        for depth in range(levels - 2, -1, -1):
            node_Q = home_Q // (self.rooms.size[depth] // codes_per_level[-1])
            chosen = np.flatnonzero((target_Q < 0) & ~self.rooms.is_full(depth, node_Q))
            if not len(chosen):
                continue
            node, point = node_Q[chosen], latent_QZ[chosen] - codeword_sum(books[:depth], codes_QL[chosen])
            for level in range(depth, levels - 1):
                parent, which = np.unique(node, return_inverse=True)
                child_UK = parent[:, None] * codes_per_level[level] + np.arange(codes_per_level[level])
                code, _ = nearest(point, books[level], self.rooms.is_full(level + 1, child_UK)[which])
                node, point = child_UK[which, code], point - books[level][code]
            target_Q[chosen], point_QZ[chosen] = node, point
        targets, which = np.unique(target_Q, return_inverse=True)
        taken_QK = taken_codes(self.taken_M, targets, codes_per_level[-1])[which]
        return nearest(point_QZ, books[-1], taken_QK)[1] - own_cost_Q, target_Q


def closed_regions(overfull_H, count, space) -> list[tuple[int, int]]:
    """The nodes that moves out of overfull prefixes cannot leave: (depth, node), sorted, none inside another.

    `overfull_H`: int64, the prefixes of L − 1 codes with more products than free codes. `count(depth, nodes_M)`: int64
    M, products plus occupied IDs below each of the sorted nodes of one depth; called at most once per depth. The region
    of a prefix is its smallest ancestor whose count is at most its number of IDs: there every surplus product finds
    room before it would look further up. `assign_unique` on the rows and occupied IDs of one region, or of one prefix
    outside all regions, therefore gives what a call on everything gives them.

    Raises CapacityError when even the root holds more than there are IDs.
    """
    pending, regions = np.unique(np.asarray(overfull_H, np.int64)), []
    for depth in range(max(space.levels - 2, 0), -1, -1):
        if not len(pending):
            break
        pending = np.unique(pending // space.codes_per_level[depth])
        wanted, size = np.asarray(count(depth, pending)), node_size(space, depth)
        closed = pending[wanted <= size]
        below = [node_size(space, inner) for inner, _ in regions]
        regions = [
            region for region, small in zip(regions, below) if not is_member(closed, region[1] // (size // small))
        ] + [(depth, node) for node in closed.tolist()]
        pending = pending[wanted > size]
    if len(pending):
        raise CapacityError(
            f"{int(wanted[0])} products and occupied IDs need as many IDs, but codes_per_level "
            f"{list(space.codes_per_level)} has only {space.capacity}; train a quantizer with more levels or codes"
        )
    return sorted(regions)


def node_size(space, depth: int) -> int:
    """Number of IDs below a node of `depth` codes."""
    return int(space.radix_L[depth - 1]) if depth else space.capacity


def nearest(point_PZ, book_KZ, barred_PK) -> tuple[np.ndarray, np.ndarray]:
    """Code of the nearest codeword that is not barred, the lower one of equals, and its squared distance, float64 P.

    A matrix product leaves one or few candidates a row. Its rounding depends on the block's size, so the distances that
    decide are summed row by row.
    """
    length_K = squared(book_KZ)
    about_PK = point_PZ @ (-2 * book_KZ.T)
    about_PK += length_K
    np.copyto(about_PK, np.inf, where=barred_PK)
    slack_P = BLAS_SLACK * (squared(point_PZ) + length_K.max())
    row_C, code_C = np.divmod(np.flatnonzero(about_PK <= (about_PK.min(axis=1) + slack_P)[:, None]), len(book_KZ))
    distance_C = squared(point_PZ[row_C] - book_KZ[code_C])
    first_P = np.lexsort((distance_C, row_C))[np.searchsorted(row_C, np.arange(len(point_PZ)))]
    return code_C[first_P], distance_C[first_P]


def squared(difference_PZ: np.ndarray) -> np.ndarray:
    return (difference_PZ**2).sum(axis=1)


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
