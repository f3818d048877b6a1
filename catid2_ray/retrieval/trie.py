"""All valid IDs as a trie of plain arrays, so that the children of many nodes are found by array operations alone.

Products are sorted by ID, so every node is a contiguous range of rows. Nothing is built but by one sort and L scans, and
an opened trie is memory-mapped: replicas of one node share its pages. Arrays have the smallest type that fits, and
ranges that nearly all hold one entry are kept as their exceptions, so deep levels of a sparse trie cost almost nothing.

N rows (products), L levels, K_l codes at level l, n_l nodes at depth l, M nodes of one question.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, InputError, ReleaseError
from catid2_ray.retrieval.arrays import (
    FORMAT,
    HEADER,
    Starts,
    entries,
    pointer_type,
    read_array,
    read_starts,
    read_trie_header,
    token_type,
)


class Children(NamedTuple):
    """All children of M nodes, flattened: entry i says that `child[i]`, reached by code `token[i]`, is a child of
    node number `parent_index[i]` (0 … M−1) of the question. Three int64 arrays of one length; parents in the order
    asked, codes ascending."""

    parent_index: np.ndarray
    token: np.ndarray
    child: np.ndarray


@dataclass(frozen=True, eq=False)
class Trie:
    """Depth 0 is the root, depth L the IDs; nodes of a depth are numbered in ID order.

    `order`: input row of each trie row (rows are in ID order; equal IDs, if `shared`, in input order), or None where
    the IDs came in order. `child_start[l]`, l = 0 … L−1, n_l + 1: node i's children are nodes child_start[l][i] …
    child_start[l][i+1] − 1 of depth l + 1. `token[l]`, l = 1 … L, n_l (uint8, int16 or int32): the code on the edge
    into each node (`token[0]` is empty). `row_start[l]`, l = 0 … L, n_l + 1: node i holds rows row_start[l][i] …
    row_start[l][i+1] − 1. `widest[l]`, l = 0 … L−1: the most children that a node of depth l has. `identity`: what the
    saved trie says of the IDs that it is of (`save`), None where nothing was said.
    """

    codes_per_level: tuple[int, ...]
    shared: bool
    order: np.ndarray | None
    child_start: tuple[Starts, ...]
    token: tuple[np.ndarray, ...]
    row_start: tuple[Starts, ...]
    widest: tuple[int, ...]
    identity: str | None = None

    @property
    def levels(self) -> int:
        return len(self.codes_per_level)

    @property
    def rows(self) -> int:
        return self.row_start[0].total

    @property
    def order_N(self) -> np.ndarray:
        """Input row of each trie row; made anew where rows are in input order."""
        return np.arange(self.rows) if self.order is None else self.order

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays, the IDs' codes (`token`) and `order` included."""
        return sum(array.nbytes for array in self._arrays().values())

    @classmethod
    def build(cls, codes_NL, *, codes_per_level, shared: bool = False) -> "Trie":
        """A trie over the IDs `codes_NL` (integers N×L, any order).

        Peak memory beside `codes_NL`: about 45 bytes per ID. Raises InputError for an empty table, a code out of
        range, or, unless `shared`, an ID that occurs twice.
        """
        space = DocidSpace(tuple(codes_per_level))
        packed_N, order = space.pack(codes_NL), None
        if (packed_N[1:] < packed_N[:-1]).any():
            # Stable only where equal IDs may meet: for int64 the unstable sort is faster.
            order = np.argsort(packed_N, kind="stable" if shared else None)
            order = order.astype(pointer_type(len(order)))
            packed_N = packed_N[order]
        return cls._of(space, packed_N, order, shared)

    @classmethod
    def from_sorted(cls, packed_N, *, codes_per_level, shared: bool = False) -> "Trie":
        """A trie over packed IDs (int64 N, ascending, as `DocidSpace.pack` gives them); trie rows are input rows.

        Peak memory beside `packed_N`: about 32 bytes per ID. Raises InputError for an empty table, IDs that do not
        ascend or lie outside the space, or, unless `shared`, an ID that occurs twice.
        """
        space, packed_N = DocidSpace(tuple(codes_per_level)), np.asarray(packed_N)
        if packed_N.ndim != 1 or packed_N.dtype != np.int64:
            raise InputError(
                f"packed IDs must be one row of int64, found {packed_N.dtype} of shape {packed_N.shape}; use DocidSpace.pack"
            )
        falls = packed_N[1:] < packed_N[:-1]
        if falls.any():
            row = int(np.flatnonzero(falls)[0])
            raise InputError(
                f"packed IDs must ascend, found {packed_N[row + 1]} at row {row + 1} after {packed_N[row]}; "
                "sort them, or use Trie.build"
            )
        if len(packed_N) and not 0 <= packed_N[0] <= packed_N[-1] < space.capacity:
            raise InputError(
                f"packed IDs run from {packed_N[0]} to {packed_N[-1]}, but codes_per_level "
                f"{list(space.codes_per_level)} has 0 to {space.capacity - 1}"
            )
        return cls._of(space, packed_N, None, shared)

    @classmethod
    def _of(cls, space: DocidSpace, packed_N: np.ndarray, order: np.ndarray | None, shared: bool) -> "Trie":
        rows = len(packed_N)
        if not rows:
            raise InputError("a trie needs at least one ID, found an empty table; pass the IDs of the catalogue")
        first = _firsts(packed_N)
        if not shared and len(first) < rows:
            # The first row that is not the first of its ID: firsts count 0, 1, 2, … up to it.
            twin = int(np.argmin(np.append(first, rows + 1) == np.arange(len(first) + 1)))
            one, two = sorted([twin - 1, twin] if order is None else order[twin - 1 : twin + 1].tolist())
            raise InputError(
                f"rows {one} and {two} share the ID {space.text(space.unpack(packed_N[[twin]])[0])}; "
                "resolve collisions first, or pass shared=True where products may share an ID"
            )
        nodes = packed_N if len(first) == rows else packed_N[first]
        row_start, token, child_start = [Starts.of(first, rows)], [], []
        del packed_N, first
        for k in reversed(space.codes_per_level):
            parent = nodes // k
            code = parent * -k
            code += nodes
            token.append(code.astype(token_type(k)))
            del code
            first = _firsts(parent)
            child_start.append(Starts.of(first, len(nodes)))
            below, nodes = row_start[-1], parent[first]
            # Where each ID has one row, the rows of the last nodes are their children.
            row_start.append(child_start[-1] if below.count == rows else Starts.of(below[first], rows))
            del parent
        child_start, token, row_start = child_start[::-1], [*token, np.empty(0, np.uint8)][::-1], row_start[::-1]
        widest = tuple(starts.widest() for starts in child_start)
        return cls(
            space.codes_per_level, bool(shared), order, tuple(child_start), tuple(token), tuple(row_start), widest
        )

    def nodes(self, level: int) -> int:
        """n_level: the number of distinct prefixes of `level` codes (1 at level 0)."""
        return self.row_start[level].count

    def children(self, level: int, nodes_M) -> Children:
        """The children of nodes `nodes_M` of depth `level` (0 … L−1), by array operations only."""
        nodes_M = np.asarray(nodes_M, dtype=np.int64)
        first_M = self.child_start[level][nodes_M].astype(np.int64)
        count_M = self.child_start[level][nodes_M + 1] - first_M
        child, parent_index = entries(first_M, count_M)
        return Children(parent_index, self.token[level + 1][child].astype(np.int64), child)

    def prefixes(self, level: int, nodes_M) -> np.ndarray:
        """int64 M×level, the codes on the way from the root to nodes `nodes_M` of depth `level`."""
        nodes_M = np.asarray(nodes_M, dtype=np.int64)
        codes = np.empty((len(nodes_M), level), np.int64)
        for depth in range(level, 0, -1):
            codes[:, depth - 1] = self.token[depth][nodes_M]
            nodes_M = self.child_start[depth - 1].holding(nodes_M)
        return codes

    def nodes_of(self, codes_ML: np.ndarray) -> np.ndarray:
        """M×L, the node of every prefix of these IDs, −1 where there is none. O(log K) per code.

        Bisection among the children of all nodes at once. Of the last level the node is the number of the ID among the
        trie's; `row_start[L]` turns it into rows.
        """
        nodes_ML = np.full(codes_ML.shape, -1, pointer_type(self.rows))
        parent, inside = np.zeros(len(codes_ML), np.int64), np.ones(len(codes_ML), bool)
        for level in range(self.levels):
            code, token = codes_ML[:, level], self.token[level + 1]
            low = self.child_start[level][parent].astype(np.int64)
            end = np.where(inside, self.child_start[level][parent + 1], low)
            high = end.copy()
            for _ in range(int(self.widest[level]).bit_length()):
                middle = np.minimum((low + high) // 2, len(token) - 1)
                right = (low < high) & (token[middle] < code)
                low, high = np.where(right, middle + 1, low), np.where(right | (low >= high), high, middle)
            inside = inside & (low < end)
            inside[inside] = token[low[inside]] == code[inside]
            parent = np.where(inside, low, 0)
            nodes_ML[inside, level] = low[inside]
        return nodes_ML

    def item_range(self, prefix) -> tuple[int, int]:
        """Rows `start` … `end` − 1 are the products whose ID begins with the codes `prefix` (0 to L of them).

        A prefix that no product has gives an empty range, start = end, where its products would stand. Raises
        InputError for a prefix that is too long or holds a code outside 0 … K_l − 1.
        """
        prefix = [int(code) for code in prefix]
        if len(prefix) > self.levels or any(not 0 <= c < k for c, k in zip(prefix, self.codes_per_level)):
            raise InputError(f"{prefix} is no prefix of an ID with codes_per_level {list(self.codes_per_level)}")
        node = 0
        for level, code in enumerate(prefix):
            first, end = self.child_start[level][node : node + 2].tolist()
            node = first + int(np.searchsorted(self.token[level + 1][first:end], code))
            if node == end or self.token[level + 1][node] != code:
                row = int(self.row_start[level + 1][node])
                return row, row
        start, end = self.row_start[len(prefix)][node : node + 2].tolist()
        return start, end

    def _arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by name: each array once, empty ones not at all."""
        arrays = {} if self.order is None else {"order": self.order}
        arrays |= {f"token_{level}": array for level, array in enumerate(self.token)}
        for name, part in (("child_start", self.child_start), ("row_start", self.row_start)):
            arrays |= {f"{name}_{level}": starts.array for level, starts in enumerate(part)}
        if self.nodes(self.levels) == self.rows:
            del arrays[f"row_start_{self.levels - 1}"]
        return {name: array for name, array in arrays.items() if len(array)}

    def save(self, folder, *, identity: str | None = None) -> None:
        """Write one .npy file per array and, last, `trie.json`; the folder is made if absent.

        `identity`: a text that tells tries of equal geometry apart, such as the digest of the IDs' artefact, which the
        generator's manifest names too. Whoever opens the trie beside a model or a table compares it: `trie.identity`,
        or `Trie.open(folder, identity=…)`, which refuses another. None: the identity that this trie has.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADER).unlink(missing_ok=True)
        for name, array in self._arrays().items():
            np.save(folder / f"{name}.npy", np.asarray(array), allow_pickle=False)
        header = {
            "format": FORMAT,
            "codes_per_level": list(self.codes_per_level),
            "shared": self.shared,
            "sorted": self.order is None,
            "rows": self.rows,
            "nodes": [self.nodes(level) for level in range(self.levels + 1)],
            "widest": list(self.widest),
            "identity": self.identity if identity is None else identity,
        }
        (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder, *, identity: str | None = None) -> "Trie":
        """Memory-map a saved trie. Raises ArtifactError for a folder that is missing, half-written or inconsistent, and
        ReleaseError, where an `identity` is given, for a trie that was saved with another or with none.

        Checked here are lengths, types and both ends of every array, whatever N; `check` reads everything.
        """
        folder = Path(folder)
        header = read_trie_header(folder)
        if identity is not None and header["identity"] != identity:
            raise ReleaseError(
                f"{folder} is a trie of other IDs: it says {header['identity']!r}, expected {identity!r}; take all parts "
                "from one release"
            )
        codes_per_level, nodes, rows = header["codes_per_level"], header["nodes"], header["rows"]
        levels = len(codes_per_level)
        order = None if header["sorted"] else read_array(folder, "order", rows, pointer_type(rows), (0, rows - 1))
        token = [
            read_array(folder, f"token_{level}", nodes[level], token_type(k), (0, k - 1))
            for level, k in enumerate(codes_per_level, 1)
        ]
        child_start = [read_starts(folder, f"child_start_{lv}", nodes[lv], nodes[lv + 1]) for lv in range(levels)]
        row_start = [read_starts(folder, f"row_start_{lv}", nodes[lv], rows) for lv in range(levels - 1)]
        last = read_starts(folder, f"row_start_{levels}", nodes[-1], rows)
        aliased = nodes[-1] == rows
        row_start += [
            child_start[-1] if aliased else read_starts(folder, f"row_start_{levels - 1}", nodes[-2], rows),
            last,
        ]
        return cls(
            tuple(codes_per_level), header["shared"], order, tuple(child_start), (np.empty(0, np.uint8), *token),
            tuple(row_start), tuple(header["widest"]), header["identity"],
        )  # fmt: skip

    def check(self) -> None:
        """Read every array and raise ArtifactError where two of them disagree. Reads the whole trie: O(N)."""
        sound = {}
        if self.order is not None:
            seen_N = np.zeros(self.rows, bool)
            inside_N = (self.order >= 0) & (self.order < self.rows)
            seen_N[self.order[inside_N]] = True
            sound["order is a permutation"] = bool(seen_N.all())
        for level, k in enumerate(self.codes_per_level):
            token = self.token[level + 1]
            sound[f"child_start of level {level} ascends"] = ascends = self.child_start[level].sound()
            sound[f"codes of level {level + 1} are in range"] = bool(token.min() >= 0 and token.max() < k)
            if not ascends:
                continue
            start = np.asarray(self.child_start[level])
            rising = token[1:] > token[:-1]
            rising[start[1:-1] - 1] = True
            sound[f"codes of level {level + 1} are in order"] = bool(rising.all())
            sound[f"nodes of level {level} have at most {self.widest[level]} children"] = (
                self.child_start[level].widest() == self.widest[level]
            )
            rows = np.asarray(self.row_start[level + 1])[start]
            sound[f"rows of level {level} are those of its children"] = self.row_start[
                level
            ].sound() and np.array_equal(self.row_start[level], rows)
        sound["every ID has its rows"] = self.row_start[-1].sound()
        broken = [claim for claim, holds in sound.items() if not holds]
        if broken:
            raise ArtifactError(
                f"the trie contradicts itself; not true: {'; '.join(broken)}. Build it again from the IDs"
            )


def _firsts(values: np.ndarray) -> np.ndarray:
    """Positions where a run of equal values begins."""
    return np.flatnonzero(np.concatenate((np.ones(min(1, len(values)), bool), values[1:] != values[:-1])))
