"""All valid IDs as a trie of plain arrays, so that the children of many nodes are found by array operations alone.

Products are sorted by ID, so every node is a contiguous range of rows. Nothing is built but by one sort and L scans
(about 0.3 µs per ID on one core), and an opened trie is memory-mapped: replicas of one node share its pages.

N rows (products), L levels, K_l codes at level l, n_l nodes at depth l, M nodes of one question.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, InputError

FORMAT = 1
HEADER = "trie.json"


class Children(NamedTuple):
    """All children of M nodes, flattened: entry i says that `child[i]`, reached by code `token[i]`, is a child of
    node number `parent_index[i]` (0 … M−1) of the question. Three int64 arrays of one length; parents in the order
    asked, codes ascending."""

    parent_index: np.ndarray
    token: np.ndarray
    child: np.ndarray


@dataclass(frozen=True, eq=False)
class Trie:
    """Depth 0 is the root, depth L the IDs; nodes of a depth are numbered in ID order. All arrays are int64.

    `order_N`: input row of each trie row (rows are in ID order; equal IDs, if `shared`, in input order).
    `child_start[l]`, l = 0 … L−1, n_l + 1: node i's children are nodes child_start[l][i] … child_start[l][i+1] − 1 of
    depth l + 1. `token[l]`, l = 1 … L, n_l: the code on the edge into each node (`token[0]` is empty).
    `row_start[l]`, l = 0 … L, n_l + 1: node i holds rows row_start[l][i] … row_start[l][i+1] − 1.
    """

    codes_per_level: tuple[int, ...]
    shared: bool
    order_N: np.ndarray
    child_start: tuple[np.ndarray, ...]
    token: tuple[np.ndarray, ...]
    row_start: tuple[np.ndarray, ...]

    @property
    def levels(self) -> int:
        return len(self.codes_per_level)

    @property
    def rows(self) -> int:
        return len(self.order_N)

    @classmethod
    def build(cls, codes_NL, *, codes_per_level, shared: bool = False) -> "Trie":
        """A trie over the IDs `codes_NL` (integers N×L, any order).

        Raises InputError for an empty table, a code out of range, or, unless `shared`, an ID that occurs twice.
        """
        space = DocidSpace(tuple(codes_per_level))
        packed_N = space.pack(codes_NL)
        if not len(packed_N):
            raise InputError("a trie needs at least one ID, found an empty table; pass the IDs of the catalogue")
        # Stable only where equal IDs may meet: for int64 the unstable sort is several times faster.
        order_N = np.argsort(packed_N, kind="stable" if shared else None)
        sorted_N = packed_N[order_N]
        fresh_N = np.concatenate(([True], sorted_N[1:] != sorted_N[:-1]))
        if not shared and not fresh_N.all():
            twin = int(np.flatnonzero(~fresh_N)[0])
            first, second = sorted(order_N[twin - 1 : twin + 1].tolist())
            raise InputError(
                f"rows {first} and {second} share the ID {space.text(space.unpack(sorted_N[[twin]])[0])}; "
                "resolve collisions first, or pass shared=True where products may share an ID"
            )
        first_row = np.flatnonzero(fresh_N)
        nodes = sorted_N[first_row]
        row_start, token, child_start = [np.append(first_row, len(sorted_N))], [], []
        for k in reversed(space.codes_per_level):
            parent = nodes // k
            token.append(nodes - parent * k)
            first_child = np.flatnonzero(np.concatenate(([True], parent[1:] != parent[:-1])))
            child_start.append(np.append(first_child, len(nodes)))
            row_start.append(row_start[-1][child_start[-1]])
            nodes = parent[first_child]
        token.append(np.empty(0, np.int64))
        return cls(
            space.codes_per_level,
            bool(shared),
            order_N,
            tuple(child_start[::-1]),
            tuple(token[::-1]),
            tuple(row_start[::-1]),
        )

    def nodes(self, level: int) -> int:
        """n_level: the number of distinct prefixes of `level` codes (1 at level 0)."""
        return len(self.row_start[level]) - 1

    def children(self, level: int, nodes_M) -> Children:
        """The children of nodes `nodes_M` of depth `level` (0 … L−1), by array operations only."""
        nodes_M = np.asarray(nodes_M, dtype=np.int64)
        first_M = self.child_start[level][nodes_M]
        count_M = self.child_start[level][nodes_M + 1] - first_M
        parent_index = np.repeat(np.arange(len(nodes_M)), count_M)
        skipped_M = np.cumsum(count_M) - count_M
        child = np.arange(len(parent_index)) + (first_M - skipped_M)[parent_index]
        return Children(parent_index, np.asarray(self.token[level + 1])[child], child)

    def prefixes(self, level: int, nodes_M) -> np.ndarray:
        """int64 M×level, the codes on the way from the root to nodes `nodes_M` of depth `level`."""
        nodes_M = np.asarray(nodes_M, dtype=np.int64)
        codes = np.empty((len(nodes_M), level), np.int64)
        for depth in range(level, 0, -1):
            codes[:, depth - 1] = self.token[depth][nodes_M]
            nodes_M = np.searchsorted(self.child_start[depth - 1], nodes_M, side="right") - 1
        return codes

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
            first, end = self.child_start[level][node : node + 2]
            node = int(first + np.searchsorted(self.token[level + 1][first:end], code))
            if node == end or self.token[level + 1][node] != code:
                row = int(self.row_start[level + 1][node])
                return row, row
        start, end = self.row_start[len(prefix)][node : node + 2]
        return int(start), int(end)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"order": self.order_N}
        arrays |= {f"child_start_{level}": array for level, array in enumerate(self.child_start)}
        arrays |= {f"token_{level}": array for level, array in enumerate(self.token) if level}
        return arrays | {f"row_start_{level}": array for level, array in enumerate(self.row_start)}

    def save(self, folder) -> None:
        """Write one .npy file per array and, last, `trie.json`; the folder is made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADER).unlink(missing_ok=True)
        for name, array in self._arrays().items():
            np.save(folder / f"{name}.npy", np.asarray(array), allow_pickle=False)
        header = {
            "format": FORMAT,
            "codes_per_level": list(self.codes_per_level),
            "shared": self.shared,
            "rows": self.rows,
            "nodes": [self.nodes(level) for level in range(self.levels + 1)],
        }
        (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder) -> "Trie":
        """Memory-map a saved trie. Raises ArtifactError for a folder that is missing, half-written or inconsistent.

        Checked here are lengths, types and both ends of every array, whatever N; `check` reads everything.
        """
        folder = Path(folder)
        header = _header(folder)
        levels, nodes, rows = len(header["codes_per_level"]), header["nodes"], header["rows"]

        def part(name: str, length: int, first: int | None = None, last: int | None = None) -> np.ndarray:
            return _part(folder / f"{name}.npy", length, first, last)

        return cls(
            tuple(header["codes_per_level"]),
            header["shared"],
            part("order", rows),
            tuple(part(f"child_start_{lv}", nodes[lv] + 1, 0, nodes[lv + 1]) for lv in range(levels)),
            (np.empty(0, np.int64), *(part(f"token_{lv}", nodes[lv]) for lv in range(1, levels + 1))),
            tuple(part(f"row_start_{lv}", nodes[lv] + 1, 0, rows) for lv in range(levels + 1)),
        )

    def check(self) -> None:
        """Read every array and raise ArtifactError where two of them disagree. Reads the whole trie: O(N)."""
        seen_N = np.zeros(self.rows, bool)
        inside_N = (self.order_N >= 0) & (self.order_N < self.rows)
        seen_N[self.order_N[inside_N]] = True
        sound = {"order is a permutation": bool(seen_N.all())}
        for level, k in enumerate(self.codes_per_level):
            start, token = self.child_start[level], np.asarray(self.token[level + 1])
            rising = np.diff(token) > 0
            rising[start[1:-1] - 1] = True
            sound[f"child_start of level {level} ascends"] = bool((np.diff(start) > 0).all())
            sound[f"codes of level {level + 1} are in order"] = bool(rising.all())
            sound[f"codes of level {level + 1} are in range"] = bool(token.min() >= 0 and token.max() < k)
            sound[f"rows of level {level} are those of its children"] = np.array_equal(
                self.row_start[level], self.row_start[level + 1][start]
            )
        rows_per_id = np.diff(self.row_start[-1])
        sound["every ID has its rows"] = bool((rows_per_id > 0).all() and (self.shared or (rows_per_id == 1).all()))
        broken = [claim for claim, holds in sound.items() if not holds]
        if broken:
            raise ArtifactError(
                f"the trie contradicts itself; not true: {'; '.join(broken)}. Build it again from the IDs"
            )


def _header(folder: Path) -> dict:
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no finished trie: {HEADER} is missing. Build and save it again") from None
    except ValueError as error:
        raise ArtifactError(f"{folder / HEADER} is not JSON ({error}). Build and save the trie again") from None
    try:
        if header["format"] != FORMAT:
            raise ArtifactError(
                f"{folder / HEADER} has format {header['format']}, this version reads {FORMAT}. Build the trie again"
            )
        DocidSpace(tuple(header["codes_per_level"]))
        fits = len(header["nodes"]) == len(header["codes_per_level"]) + 1 and header["nodes"][0] == 1
        fits = fits and header["rows"] >= header["nodes"][-1] >= 1 and isinstance(header["shared"], bool)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / HEADER} is no trie header ({error!r}). Build and save the trie again") from None
    if not fits:
        raise ArtifactError(f"{folder / HEADER} contradicts itself: {header}. Build and save the trie again")
    return header


def _part(path: Path, length: int, first: int | None, last: int | None) -> np.ndarray:
    """One array, mapped copy-on-write: pages stay shared and the file untouched, and torch sees a writable array."""
    try:
        array = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). Build and save the trie again") from None
    if array.dtype != np.int64 or array.shape != (length,):
        raise ArtifactError(
            f"{path}: expected {length} int64 numbers, found {array.dtype} of shape {array.shape}. "
            "Build and save the trie again"
        )
    ends = (first, last)
    if first is not None and (int(array[0]), int(array[-1])) != ends:
        raise ArtifactError(
            f"{path}: expected to run from {first} to {last}, found {array[0]} to {array[-1]}. "
            "Build and save the trie again"
        )
    return array
