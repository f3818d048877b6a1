"""The mean vector of the products below each trie node down to a depth, memory-mapped as float16: what a search that looks
ahead compares with the query (`lookahead.py`).

Below the last of these depths, d, all nodes of one level share a vector per code, a tail: the mean of what the mean at depth
d and the tails above leave of the products that have the code. Unusual: every sum is exact. float16 numbers are multiples of
2⁻²⁴, so float64 holds the sum of up to 2²⁹ numbers between −1 and 1, and no order of rows or size of blocks changes a byte.

N rows (products), D width of a vector, n nodes of a depth, K codes of a level, L levels, d the deepest depth with means.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from catid2_ray.errors import ArtifactError, InputError, ReleaseError
from catid2_ray.retrieval.arrays import read_header
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore

FORMAT = 1
HEADER = "node_vectors.json"
_AGAIN = "Make the node vectors again"
_BLOCK = 8192


@dataclass(frozen=True, eq=False)
class NodeVectors:
    """`means[l − 1]`: float16 n×D, nodes of depth l = 1 … d in trie order. `tails[i]`: float16 K×D, codes of level d + 1 + i
    (of a code that no product has: zeros)."""

    means: tuple[np.ndarray, ...]
    tails: tuple[np.ndarray, ...]

    @property
    def depth(self) -> int:
        return len(self.means)

    @property
    def width(self) -> int:
        return self.means[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.means, *self.tails))

    @classmethod
    def write(cls, folder, trie: Trie, vectors: VectorStore, *, depth: int) -> "NodeVectors":
        """Write the vectors of all nodes of depths 1 … `depth`, and the tails of the levels below, and open them.

        `vectors`: of the products, of length 1, in trie order. Reads them L times at most; memory is a few blocks of 8192
        rows. Raises InputError for vectors of other length or number, and for a depth outside 1 … L.
        """
        if vectors.rows != trie.rows or not vectors.normalized or not 1 <= depth <= trie.levels:
            raise InputError(
                f"node vectors need {trie.rows} vectors of length 1 and a depth from 1 to {trie.levels}, found {vectors.rows} "
                f"vectors, normalized={vectors.normalized}, and depth {depth}"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADER).unlink(missing_ok=True)
        means = []
        for level in range(1, depth + 1):
            path = folder / f"depth_{level}.npy"
            shape = (trie.nodes(level), vectors.width)
            mean_nD = np.lib.format.open_memmap(path, "w+", np.float16, shape)
            at = 0
            for block_nD in _means(trie, level, vectors):
                mean_nD[at : at + len(block_nD)] = block_nD
                at += len(block_nD)
            mean_nD.flush()
            means.append(mean_nD)
        for level, tail_KD in enumerate(_tails(trie, vectors, means[-1], depth), depth + 1):
            np.save(folder / f"tail_{level}.npy", tail_KD, allow_pickle=False)
        header = {
            "format": FORMAT,
            "depth": depth,
            "width": vectors.width,
            "codes_per_level": list(trie.codes_per_level),
        }
        header["nodes"] = [trie.nodes(level) for level in range(1, depth + 1)]
        (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        return cls.open(folder)

    @classmethod
    def open(cls, folder) -> "NodeVectors":
        """Memory-map what `write` wrote. Raises ArtifactError for a folder that is missing, half-written or inconsistent."""
        folder = Path(folder)
        header = read_header(folder / HEADER, "node vectors", version=FORMAT, again=_AGAIN)
        depth, width, nodes = header["depth"], header["width"], header["nodes"]
        tails = header["codes_per_level"][depth:]
        return cls(
            tuple(_mapped(folder / f"depth_{level}.npy", (count, width)) for level, count in enumerate(nodes, 1)),
            tuple(_mapped(folder / f"tail_{level}.npy", (k, width)) for level, k in enumerate(tails, depth + 1)),
        )

    def check(self, trie: Trie) -> None:
        """Raise ReleaseError where these are the vectors of another trie."""
        sizes = [len(mean_nD) for mean_nD in self.means] + [len(tail_KD) for tail_KD in self.tails]
        expected = [trie.nodes(level) for level in range(1, self.depth + 1)] + list(trie.codes_per_level[self.depth :])
        if sizes != expected:
            raise ReleaseError(
                f"node vectors of {sizes} nodes and codes, the trie has {expected}; take both from one release"
            )


def mean_of(vectors: VectorStore | GrownVectors, row_M: np.ndarray) -> np.ndarray:
    """float16 D, the mean of some products' vectors, scaled to length 1 where they are not; zeros for no product."""
    total_D = torch.zeros(vectors.width, dtype=torch.float64)
    for start in range(0, len(row_M), _BLOCK):
        total_D += vectors.unit(row_M[start : start + _BLOCK]).double().sum(0)
    return (total_D / max(1, len(row_M))).numpy().astype(np.float16)


def _blocks(trie: Trie, level: int, vectors: VectorStore) -> Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor]]:
    """(rows, the node of depth `level` of each, float64 vectors) of all rows, block by block."""
    half_ND = torch.from_numpy(vectors.vectors_ND)
    for start in range(0, trie.rows, _BLOCK):
        row_M = np.arange(start, min(start + _BLOCK, trie.rows))
        yield row_M, trie.row_start[level].holding(row_M), half_ND[start : start + _BLOCK].double()


def _means(trie: Trie, level: int, vectors: VectorStore) -> Iterator[np.ndarray]:
    """float16 n×D, block by block; a node that a block does not end is carried into the next."""
    carried_D = np.zeros(vectors.width)
    for row_M, node_M, vector_MD in _blocks(trie, level, vectors):
        first = np.flatnonzero(np.diff(node_M, prepend=-1))
        sum_nD = np.add.reduceat(vector_MD.numpy(), first, axis=0)
        sum_nD[0] += carried_D
        start, end = (trie.row_start[level][node_M[first] + i].astype(np.int64) for i in (0, 1))
        whole = len(first) - int(end[-1] > row_M[-1] + 1)
        carried_D = sum_nD[whole] if whole < len(first) else np.zeros(vectors.width)
        yield (sum_nD[:whole] / (end - start)[:whole, None]).astype(np.float16)


def _tails(trie: Trie, vectors: VectorStore, mean_nD: np.ndarray, depth: int) -> list[np.ndarray]:
    """float16 K×D for each level below `depth`."""
    mean_nD, tails = torch.from_numpy(np.asarray(mean_nD)), []
    for level in range(depth, trie.levels):
        codes = trie.codes_per_level[level]
        left_KD, count_K = torch.zeros(codes, vectors.width, dtype=torch.float64), np.zeros(codes)
        for row_M, node_M, left_MD in _blocks(trie, depth, vectors):
            codes_ML = torch.from_numpy(trie.prefixes(trie.levels, trie.row_start[-1].holding(row_M)))
            left_MD -= mean_nD[torch.from_numpy(np.asarray(node_M, np.int64))].double()
            for above, tail_KD in enumerate(tails, depth):
                left_MD -= tail_KD[codes_ML[:, above]].double()
            left_KD.index_add_(0, codes_ML[:, level], left_MD)
            count_K += np.bincount(codes_ML[:, level].numpy(), minlength=codes)
        left_KD /= torch.from_numpy(np.maximum(count_K, 1))[:, None]
        tails.append(torch.from_numpy(left_KD.numpy().astype(np.float16)))
    return [tail_KD.numpy() for tail_KD in tails]


def _mapped(path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        # Copy-on-write, as the trie's arrays: pages stay shared, and torch sees a writable array.
        array = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). {_AGAIN}") from None
    if array.dtype != np.float16 or array.shape != shape:
        raise ArtifactError(f"{path}: expected float16 {shape}, found {array.dtype} {array.shape}. {_AGAIN}")
    return array
