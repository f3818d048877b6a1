"""The dense vectors of all products, memory-mapped as float16 in trie-row order, and their dot products with queries.

Rows are widened to float32 in blocks that stay in the processor's cache, and each row is summed by itself: a score does
not depend on which rows are asked beside it, so equal vectors tie exactly.

N rows (products), D width of a vector, B queries, M rows asked for.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.retrieval.arrays import Growing, read_header

FORMAT = 1
HEADER = "vectors.json"
ARRAY = "vectors.npy"
_AGAIN = "Write the vectors again"
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class VectorStore:
    """`vectors_ND`: float16; `normalized`: whether rows have length 1 (rows of zeros stay zeros).

    float16 keeps 11 bits: numbers are off by at most 2⁻¹¹ of their size, dot products of vectors of length 1 by about
    1e-4.
    """

    vectors_ND: np.ndarray
    normalized: bool

    @property
    def rows(self) -> int:
        return self.vectors_ND.shape[0]

    @property
    def width(self) -> int:
        return self.vectors_ND.shape[1]

    @classmethod
    def write(cls, folder, blocks: Iterable, *, normalize: bool = False) -> "VectorStore":
        """Write `blocks` (float arrays N_i×D, one after the other in trie-row order) and open what was written.

        `normalize` scales each row to length 1. Memory: a few times one block. The folder is made if absent; its
        header is written last. Raises InputError, naming the row, for NaN, infinity or a number beyond float16
        (65504), and for blocks that are not matrices of one width or hold no row at all.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HEADER).unlink(missing_ok=True)
        rows, width = 0, None
        with (folder / ARRAY).open("wb") as file:
            for block in blocks:
                half_ND = _half(block, rows, width, normalize)
                if width is None:
                    width = half_ND.shape[1]
                    start = _npy_header(file, 0, width)
                file.write(half_ND)
                rows += len(half_ND)
            if not rows:
                raise InputError("a vector store needs at least one row, found none; pass the catalogue's vectors")
            file.seek(0)
            if _npy_header(file, rows, width) != start:
                raise ArtifactError(f"{folder / ARRAY}: its header grew over the first row; use a newer NumPy")
        header = {"format": FORMAT, "rows": rows, "width": width, "normalized": bool(normalize)}
        (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        return cls.open(folder)

    @classmethod
    def open(cls, folder) -> "VectorStore":
        """Memory-map a written store. Raises ArtifactError for a folder that is missing, half-written or inconsistent.

        Checked are header, type, length, and the first and last row, whatever N.
        """
        folder = Path(folder)
        rows, width, normalized = _read_header(folder)
        path = folder / ARRAY
        try:
            # Copy-on-write, as the trie's arrays: pages stay shared, and torch sees a writable array.
            mapped = np.load(path, mmap_mode="c", allow_pickle=False)
            spare = path.stat().st_size - mapped.offset - mapped.nbytes
        except (OSError, ValueError, EOFError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}). {_AGAIN}") from None
        vectors_ND = np.asarray(mapped)
        if (
            vectors_ND.dtype != np.float16
            or vectors_ND.shape != (rows, width)
            or not vectors_ND.flags.c_contiguous
            or spare
        ):
            raise ArtifactError(
                f"{path}: expected {rows}×{width} float16 numbers and no byte more, found {vectors_ND.dtype} of shape "
                f"{vectors_ND.shape} and {spare} bytes more. {_AGAIN}"
            )
        for row in (0, rows - 1):
            length = float(np.linalg.norm(vectors_ND[row].astype(np.float64)))
            if not np.isfinite(length) or (normalized and length and abs(length - 1) > 0.01):
                expected = "1 or 0" if normalized else "a finite number"
                raise ArtifactError(
                    f"{path}: expected row {row} to have length {expected}, found {length:.4g}. {_AGAIN}"
                )
        return cls(vectors_ND, normalized)

    def unit(self, row_M) -> torch.Tensor:
        """float16 M×D, the vectors of some rows, scaled to length 1 where the store's are not."""
        half_MD = _rows(torch.from_numpy(self.vectors_ND), np.asarray(row_M, np.int64))
        return half_MD if self.normalized else torch.nn.functional.normalize(half_MD.float(), dim=1).half()

    def check_queries(self, query_BD) -> np.ndarray:
        """`query_BD` as float32. Raises InputError for another width, NaN or infinity."""
        query_BD = torch.as_tensor(query_BD)
        if query_BD.ndim != 2 or query_BD.shape[1] != self.width or not query_BD.is_floating_point():
            raise InputError(
                f"query vectors must be floats B×{self.width}, as wide as the products' vectors, found "
                f"{query_BD.dtype} of shape {tuple(query_BD.shape)}; use the encoder that made the vectors"
            )
        query_BD = query_BD.detach().to("cpu", torch.float32).contiguous().numpy()
        _check_finite(query_BD, "the query vector of", 0)
        return query_BD

    def scores(self, query_1D, row_M) -> np.ndarray:
        """float32 M, dot products of one query (1×D) with the rows `row_M` (integers, any order, repeats allowed),
        summed in float32.

        Rows that ascend without gaps are read in place, others are gathered; memory beside the result is one block of
        256 rows. Raises InputError for a query that does not fit or is not finite, rows outside 0 … N−1 and a score
        that is not finite.
        """
        query_BD, row_M = self.check_queries(query_1D), np.asarray(row_M)
        if len(query_BD) != 1 or row_M.ndim != 1:
            raise InputError(
                f"scores are of one query 1×{self.width} and one list of rows, found {len(query_BD)} queries and rows of "
                f"shape {row_M.shape}"
            )
        if len(row_M) and (row_M.dtype.kind not in "iu" or not 0 <= row_M.min() <= row_M.max() < self.rows):
            raise InputError(f"rows must be whole numbers 0…{self.rows - 1}, found {row_M.min()} to {row_M.max()}")
        row_M, score_M = row_M.astype(np.int64, copy=False), np.empty(len(row_M), np.float32)
        half_ND, wide = torch.from_numpy(self.vectors_ND), torch.empty(min(_BLOCK, len(row_M)), self.width)
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range(0, len(row_M), _BLOCK):
                row_R = row_M[begin : begin + _BLOCK]
                # torch widens float16 about thirty times as fast as NumPy does.
                wide_RD = wide[: len(row_R)].copy_(_rows(half_ND, row_R))
                np.vecdot(wide_RD.numpy(), query_BD[0], out=score_M[begin : begin + len(row_R)])
        if not np.isfinite(score_M).all():
            at = int(np.argmin(np.isfinite(score_M)))
            raise InputError(
                f"the dense score of row {row_M[at]} is {score_M[at]}; the stored vector is damaged (write the vectors "
                "again) or the query's numbers are too large"
            )
        return score_M


@dataclass(frozen=True, eq=False)
class GrownVectors:
    """The vectors of a release, and those of products inserted since: rows N … N + D − 1. Scores as `VectorStore`."""

    base: VectorStore
    grown: Growing

    @classmethod
    def of(cls, base: VectorStore, inserted_DD) -> "GrownVectors":
        """`inserted_DD`: floats D×width, scaled to length 1 if the base's are. Raises InputError as `VectorStore.write`."""
        return cls(base, Growing.of(np.empty((0, base.width), np.float16))).with_halves(halves(inserted_DD, base))

    def with_halves(self, half_MD: np.ndarray) -> "GrownVectors":
        """These and M more, as `halves` gives them."""
        return GrownVectors(self.base, self.grown.with_rows(half_MD))

    @cached_property
    def inserted(self) -> VectorStore:
        return VectorStore(self.grown.rows, self.base.normalized)

    @property
    def rows(self) -> int:
        return self.base.rows + self.inserted.rows

    @property
    def width(self) -> int:
        return self.base.width

    def unit(self, row_M) -> torch.Tensor:
        """As `VectorStore.unit`, over all rows."""
        row_M = np.asarray(row_M, np.int64)
        half_MD, new_M = torch.empty(len(row_M), self.width, dtype=torch.float16), row_M >= self.base.rows
        for part, mine_M, first in ((self.base, ~new_M, 0), (self.inserted, new_M, self.base.rows)):
            if mine_M.any():
                half_MD[torch.from_numpy(mine_M)] = part.unit(row_M[mine_M] - first)
        return half_MD

    def check_queries(self, query_BD) -> np.ndarray:
        return self.base.check_queries(query_BD)

    def scores(self, query_1D, row_M) -> np.ndarray:
        """As `VectorStore.scores`, over all rows."""
        row_M = np.asarray(row_M)
        new_M = row_M >= self.base.rows
        if not new_M.any():
            return self.base.scores(query_1D, row_M)
        score_M = np.empty(len(row_M), np.float32)
        score_M[~new_M] = self.base.scores(query_1D, row_M[~new_M])
        score_M[new_M] = self.inserted.scores(query_1D, row_M[new_M] - self.base.rows)
        return score_M


def halves(vector_MD, base: VectorStore) -> np.ndarray:
    """float16 M×width: floats M×width as the store `base` would hold them. Raises InputError as `VectorStore.write`."""
    vector_MD = np.asarray(vector_MD, np.float32).reshape(-1, base.width)
    return _half(vector_MD, base.rows, base.width, base.normalized) if len(vector_MD) else vector_MD.astype(np.float16)


def _rows(half_ND: torch.Tensor, row_R: np.ndarray) -> torch.Tensor:
    first, last = int(row_R[0]), int(row_R[-1])
    if last - first == len(row_R) - 1 and (row_R[1:] > row_R[:-1]).all():
        return half_ND[first : last + 1]
    return half_ND.index_select(0, torch.from_numpy(row_R))


def _check_finite(values_ND: np.ndarray, what: str, before: int) -> None:
    finite_N = np.isfinite(values_ND).all(1)
    if not finite_N.all():
        row = int(np.argmin(finite_N))
        column = int(np.argmin(np.isfinite(values_ND[row])))
        raise InputError(f"{what} row {before + row} holds {values_ND[row, column]} at place {column}; encode it again")


def _half(block, before: int, width: int | None, normalize: bool) -> np.ndarray:
    """One block as float16 in C order; `before` rows and the `width` of the blocks before it."""
    block_ND = np.asarray(block)
    expected = "N×D" if width is None else f"N×{width}"
    if (
        block_ND.ndim != 2
        or not block_ND.shape[1]
        or block_ND.dtype.kind != "f"
        or width not in (None, block_ND.shape[1])
    ):
        raise InputError(
            f"the block at row {before} must be floats {expected}, found {block_ND.dtype} of shape {block_ND.shape}"
        )
    _check_finite(block_ND, "the vector of", before)
    if normalize:
        block_ND = block_ND.astype(np.promote_types(block_ND.dtype, np.float32))
        # Scaled by the largest number first: squares of very large or small float32 numbers leave its range.
        largest_N1 = np.abs(block_ND).max(1, keepdims=True)
        block_ND = block_ND / np.where(largest_N1 > 0, largest_N1, 1)
        length_N1 = np.linalg.norm(block_ND, axis=1, keepdims=True)
        block_ND = block_ND / np.where(length_N1 > 0, length_N1, 1)
    with np.errstate(over="ignore"):
        half_ND = np.ascontiguousarray(block_ND, np.float16)
    beyond_N = np.isinf(half_ND).any(1)
    if beyond_N.any():
        row = int(np.argmax(beyond_N))
        raise InputError(
            f"the vector of row {before + row} holds numbers up to {np.abs(block_ND[row]).max():.6g}, float16 ends at "
            "65504; pass normalize=True, or scale the vectors"
        )
    return half_ND


def _npy_header(file, rows: int, width: int) -> int:
    """Write the header of a .npy file and return where the numbers begin: NumPy leaves room for `rows` to grow."""
    described = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, described)
    return file.tell()


def _read_header(folder: Path) -> tuple[int, int, bool]:
    path = folder / HEADER
    header = read_header(path, "vectors", version=FORMAT, again=_AGAIN)
    rows, width, normalized = (header.get(name) for name in ("rows", "width", "normalized"))
    if type(rows) is not int or type(width) is not int or type(normalized) is not bool or min(rows, width) < 1:
        raise ArtifactError(f"{path} contradicts itself: {header}. {_AGAIN}")
    return rows, width, normalized
