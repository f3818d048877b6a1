"""A trie written range of IDs after range of IDs, so that nobody holds more of it than one range.

What lies in the folder is byte for byte what `Trie.from_sorted(…).save(…)` writes of all IDs at once. Until the end it is
kept as raw numbers in files of their own: one starts where a node starts, the other says its code.

N rows (products), n rows of a range, L levels, K codes of a level.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.arrays import FORMAT, HEADER, Starts, pointer_type, token_type

_BLOCK = 1 << 20  # numbers that are copied at a time


class TrieWriter:
    """`with TrieWriter(…) as writer`: `add` ranges in the order of IDs, then `finish`. `rows`: N, all that will be added; the
    folder is made if absent.

    Memory: about 40 bytes for each row of the range that is added. Raises InputError as `Trie.from_sorted` does.
    """

    def __init__(self, folder, rows: int, *, codes_per_level, shared: bool = False):
        self.folder, self.space, self.shared, self.rows = Path(folder), DocidSpace(tuple(codes_per_level)), shared, rows
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / HEADER).unlink(missing_ok=True)
        self.done, self.last = 0, None
        levels = range(self.space.levels + 1)
        self.nodes = [0 for _ in levels]
        self._files = {}
        for name in ("row_start", "child_start", "token"):
            for level in levels[name == "token" : len(levels) - (name == "child_start")]:
                self._files[f"{name}_{level}"] = open(self._raw(f"{name}_{level}"), "wb")  # noqa: SIM115

    def __enter__(self) -> "TrieWriter":
        return self

    def __exit__(self, *_error) -> None:
        for file in self._files.values():
            file.close()

    def _raw(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    def add(self, packed_n) -> None:
        """The next packed IDs (int64 n, ascending, none below what was added before)."""
        packed_n, space = np.asarray(packed_n), self.space
        if not len(packed_n):
            return
        above = packed_n[0] if self.last is None else self.last
        new_n = np.concatenate(([self.last is None or packed_n[0] != self.last], packed_n[1:] != packed_n[:-1]))
        if above > packed_n[0] or (packed_n[1:] < packed_n[:-1]).any():
            raise InputError("packed IDs must ascend, from range to range too; sort them")
        if not 0 <= packed_n[0] <= packed_n[-1] < space.capacity:
            raise InputError(
                f"packed IDs run from {packed_n[0]} to {packed_n[-1]}, but codes_per_level "
                f"{list(space.codes_per_level)} has 0 to {space.capacity - 1}"
            )
        if not self.shared and not new_n.all():
            twin = int(np.argmin(new_n))
            raise InputError(
                f"rows {self.done + twin - 1} and {self.done + twin} share the ID "
                f"{space.text(space.unpack(packed_n[[twin]])[0])}; resolve collisions first, or pass shared=True"
            )
        # From the IDs up: of each depth the nodes that begin in this range, and the row where each begins.
        first = np.flatnonzero(new_n)
        nodes, row = packed_n[first], self.done + first
        self._write(f"row_start_{space.levels}", row, pointer_type(self.rows))
        for level in range(space.levels - 1, -1, -1):
            codes = space.codes_per_level[level]
            parent = nodes // codes
            self._write(f"token_{level + 1}", nodes - parent * codes, token_type(codes))
            known = None if self.last is None else self.last // int(space.radix_L[level]) // codes
            first = np.flatnonzero(np.concatenate((parent[:1] != known, parent[1:] != parent[:-1])))
            self._write(f"child_start_{level}", self.nodes[level + 1] + first, pointer_type(self.rows))
            self.nodes[level + 1] += len(nodes)
            nodes, row = parent[first], row[first]
            self._write(f"row_start_{level}", row, pointer_type(self.rows))
        self.nodes[0] += len(nodes)
        self.done, self.last = self.done + len(packed_n), int(packed_n[-1])

    def _write(self, name: str, numbers: np.ndarray, dtype: type) -> None:
        self._files[name].write(numbers.astype(dtype).tobytes())

    def finish(self, *, identity: str | None = None) -> None:
        """Put the files in their last form and, last, write trie.json (`identity` as in `Trie.save`)."""
        self.__exit__()
        if not self.done or self.done != self.rows:
            raise InputError(f"a trie of {self.rows} IDs was told of {self.done}; pass the IDs of the catalogue")
        levels = self.space.levels
        widest = [self._starts(f"child_start_{level}", self.nodes[level + 1]) for level in range(levels)]
        for level in range(levels + 1):
            # Where each ID has one row, the rows of the last nodes are their children.
            if level != levels - 1 or self.nodes[levels] != self.rows:
                self._starts(f"row_start_{level}", self.rows)
        for level, codes in enumerate(self.space.codes_per_level, 1):
            name, dtype, count = f"token_{level}", token_type(codes), self.nodes[level]
            self._save(name, count, dtype, (self._block(name, dtype, at, _BLOCK) for at in range(0, count, _BLOCK)))
        for name in self._files:
            self._raw(name).unlink()
        header = {
            "format": FORMAT, "codes_per_level": list(self.space.codes_per_level), "shared": self.shared, "sorted": True,
            "rows": self.rows, "nodes": self.nodes, "widest": widest, "identity": identity,
        }  # fmt: skip
        (self.folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")

    def _block(self, name: str, dtype: type, at: int, most: int) -> np.ndarray:
        """Numbers of a raw file. Read, not mapped: mapped pages would count as this process's memory."""
        return np.fromfile(self._raw(name), dtype, most, offset=at * np.dtype(dtype).itemsize)

    def _starts(self, name: str, total: int) -> int:
        """Write `arrays.Starts` of the first entries in a raw file, over `total` entries; the entries of the largest range."""
        count = self.nodes[int(name.rpartition("_")[2])]
        stored, widest = Starts.stored(count, total), 0

        def blocks(whole: bool):
            nonlocal widest
            for at in range(0, count, _BLOCK):
                start = self._block(name, pointer_type(self.rows), at, _BLOCK + 1).astype(np.int64)
                start = np.append(start, total) if at + _BLOCK >= count else start
                size = np.diff(start)
                widest = max(widest, int(size.max()))
                yield start[: len(size)] if whole else at + np.repeat(np.arange(len(size)), size - 1)
            if whole:
                yield np.array([total])

        self._save(name, stored, pointer_type(total), blocks(stored > count))
        return widest

    def _save(self, name: str, length: int, dtype: type, blocks: Iterable[np.ndarray]) -> None:
        """One .npy file out of blocks; none where there is nothing to store."""
        path = self.folder / f"{name}.npy"
        with open(path, "wb") as file:
            described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(file, described)
            for block in blocks:
                file.write(block.astype(dtype).tobytes())
        if not length:
            path.unlink()
