"""Arrays of a release's folders: their types, ranges kept as their exceptions, and how they are read from disk, checked.

Types are the smallest that NumPy and torch both index by. Reading maps files copy-on-write: pages stay shared and files
untouched, and torch sees a writable array.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError

FORMAT = 2
HEADER = "trie.json"
_AGAIN = "Build and save the trie again"


def pointer_type(last: int) -> type:
    """For numbers 0 … `last`."""
    return np.int32 if last < 2**31 else np.int64


def token_type(codes: int) -> type:
    """For codes 0 … `codes` − 1."""
    return np.uint8 if codes <= 2**8 else np.int16 if codes <= 2**15 else np.int32


def entries(first_R: np.ndarray, count_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(all entries of R ranges, one range after the other; the range of each), from where each begins and its length."""
    range_M = np.repeat(np.arange(len(count_R)), count_R)
    skipped_R = np.cumsum(count_R) - count_R
    return np.arange(len(range_M)) + (first_R - skipped_R)[range_M], range_M


@dataclass(frozen=True, eq=False)
class Starts:
    """Where `count` consecutive ranges begin that cover 0 … `total` − 1, none empty: count + 1 numbers s_0 = 0 < … <
    s_count = `total`, read by index, slice or index array.

    Kept as the numbers themselves (`whole`), or, where at most one entry in nine is not the first of its range, as
    those entries' range numbers in order (`extra`): then s_i = i + (how many of `extra` are below i), a binary search.
    The other field is None. int32 unless `total` needs int64.
    """

    count: int
    total: int
    whole: np.ndarray | None
    extra: np.ndarray | None

    @staticmethod
    def stored(count: int, total: int) -> int:
        """How many numbers are stored for `count` ranges over `total` entries; count + 1 means as `whole`."""
        extra = total - count
        return extra if extra <= count // 8 else count + 1

    @classmethod
    def of(cls, first: np.ndarray, total: int) -> "Starts":
        """From the first entry of every range (integers, ascending, the first of them 0)."""
        count, dtype = len(first), pointer_type(total)
        if cls.stored(count, total) > count:
            whole = np.empty(count + 1, dtype)
            whole[:-1], whole[-1] = first, total
            return cls(count, total, whole, None)
        later = np.ones(total, bool)
        later[first] = False
        later = np.flatnonzero(later)
        return cls(count, total, None, (later - np.arange(1, len(later) + 1)).astype(dtype))

    @property
    def array(self) -> np.ndarray:
        """What is stored."""
        return self.extra if self.whole is None else self.whole

    def __len__(self) -> int:
        return self.count + 1

    def __getitem__(self, index):
        if self.whole is not None:
            return self.whole[index]
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        index = np.asarray(index)
        index = np.where(index < 0, index + len(self), index)
        if index.size and not 0 <= index.min() <= index.max() <= self.count:
            raise IndexError(f"index outside the {len(self)} starts")
        return index + np.searchsorted(self.extra, index.astype(self.extra.dtype))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All numbers. Made anew where only exceptions are stored: then O(count) memory."""
        return np.asarray(self[:], dtype=dtype)

    def __iter__(self):
        return iter(np.asarray(self))

    def widest(self) -> int:
        """Entries in the largest range."""
        if self.whole is not None:
            return int(np.diff(self.whole).max())
        return 1 + (int(np.unique(self.extra, return_counts=True)[1].max()) if len(self.extra) else 0)

    def sound(self) -> bool:
        """Whether the stored numbers are what the class says."""
        if self.whole is not None:
            ends = (int(self.whole[0]), int(self.whole[-1]))
            return ends == (0, self.total) and bool((self.whole[1:] > self.whole[:-1]).all())
        inside = (self.extra >= 0) & (self.extra < self.count)
        return bool(inside.all() and (self.extra[1:] >= self.extra[:-1]).all())

    def holding(self, entries) -> np.ndarray:
        """The range that holds each entry. For a few entries O(log count) each, for many one pass of the exceptions."""
        entries = np.asarray(entries)
        if self.whole is not None:
            return np.searchsorted(self.whole, entries.astype(self.whole.dtype), side="right") - 1
        if entries.size * 50 > len(self.extra):
            later = self.extra + np.arange(1, len(self.extra) + 1)
            return entries - np.searchsorted(later, entries, side="right")
        low, high = np.zeros(entries.shape, np.int64), np.full(entries.shape, len(self.extra))
        for _ in range(len(self.extra).bit_length()):
            middle = np.minimum((low + high) // 2, len(self.extra) - 1)
            open_, below = low < high, self.extra[middle] + middle < entries
            low, high = np.where(open_ & below, middle + 1, low), np.where(open_ & ~below, middle, high)
        return entries - low


class _Shared:
    """An array with room at its end, of which the first `used` rows are written."""

    def __init__(self, array: np.ndarray):
        self.array, self.used = array, len(array)


@dataclass(frozen=True, eq=False)
class Growing:
    """Rows to which more are appended: those with more share the memory of those before, which stay as they were.

    Adding M rows copies M, and now and then all, so D rows cost O(D) in all. One thread at a time adds rows.
    """

    shared: _Shared
    count: int

    @classmethod
    def of(cls, rows: np.ndarray) -> "Growing":
        return cls(_Shared(rows), len(rows))

    def __len__(self) -> int:
        return self.count

    @property
    def rows(self) -> np.ndarray:
        return self.shared.array[: self.count]

    def with_rows(self, more: np.ndarray) -> "Growing":
        """With `more` at the end, of the same type and width."""
        shared, end = self.shared, self.count + len(more)
        # Another may have grown from these rows before: then the room behind them is taken.
        if shared.used != self.count or end > len(shared.array):
            array = np.empty((max(64, 2 * end), *shared.array.shape[1:]), shared.array.dtype)
            array[: self.count] = self.rows
            shared = _Shared(array)
        shared.array[self.count : end] = more
        shared.used = end
        return Growing(shared, end)


def read_header(path: Path, what: str, *, version: int, again: str) -> dict:
    """The JSON header at `path`, which is written last. Raises ArtifactError where it is missing, no header, or not of
    format `version`; the message says `what` lies in its folder, and to make it `again`."""
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != version:
            raise ArtifactError(f"{path} has format {header['format']}, this version reads {version}. {again}")
    except FileNotFoundError:
        raise ArtifactError(f"{path.parent} holds no finished {what}: {path.name} is missing. {again}") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}). {again}") from None
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is no header of this kind: {what} ({error!r}). {again}") from None
    return header


def read_trie_header(folder: Path) -> dict:
    """What `trie.json` says, once its numbers fit each other."""
    header = read_header(folder / HEADER, "trie", version=FORMAT, again=_AGAIN)
    try:
        codes, nodes, rows, widest = (header[name] for name in ("codes_per_level", "nodes", "rows", "widest"))
        DocidSpace(tuple(codes))
        fits = len(nodes) == len(codes) + 1 and len(widest) == len(codes) and nodes[0] == 1
        fits = fits and all(a <= b <= a * k for a, b, k in zip(nodes, nodes[1:], codes)) and rows >= nodes[-1]
        fits = fits and all(-(-b // a) <= w <= k for a, b, w, k in zip(nodes, nodes[1:], widest, codes))
        fits = fits and isinstance(header["sorted"], bool) and isinstance(header["shared"], bool)
        fits = fits and (header["shared"] or rows == nodes[-1])
        # Tries saved before there was an identity have none.
        fits = fits and isinstance(header.setdefault("identity", None), (str, type(None)))
        fits = fits and all(type(number) is int for number in (rows, *codes, *nodes, *widest))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / HEADER} is no header of this kind: trie ({error!r}). {_AGAIN}") from None
    if not fits:
        raise ArtifactError(f"{folder / HEADER} contradicts itself: {header}. {_AGAIN}")
    return header


def read_array(folder: Path, name: str, length: int, dtype: type, bounds: tuple[int, int]) -> np.ndarray:
    """One array whose two ends lie within `bounds`, mapped into memory."""
    path = folder / f"{name}.npy"
    try:
        array = np.asarray(np.load(path, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}). {_AGAIN}") from None
    if array.dtype != dtype or array.shape != (length,):
        raise ArtifactError(
            f"{path}: expected {length} {np.dtype(dtype)} numbers, found {array.dtype} of shape {array.shape}. {_AGAIN}"
        )
    first, last = bounds
    if not (first <= array[0] <= last and first <= array[-1] <= last):
        raise ArtifactError(
            f"{path}: expected numbers from {first} to {last}, found {array[0]} and {array[-1]} at the ends. {_AGAIN}"
        )
    return array


def read_starts(folder: Path, name: str, count: int, total: int) -> Starts:
    """`Starts` from its file; there is none where each range holds one entry."""
    length, dtype = Starts.stored(count, total), pointer_type(total)
    if length <= count:
        extra = read_array(folder, name, length, dtype, (0, count - 1)) if length else np.empty(0, dtype)
        return Starts(count, total, None, extra)
    whole = read_array(folder, name, length, dtype, (-np.inf, np.inf))
    if (int(whole[0]), int(whole[-1])) != (0, total):
        raise ArtifactError(
            f"{folder / name}.npy: expected to run from 0 to {total}, found {whole[0]} to {whole[-1]}. {_AGAIN}"
        )
    return Starts(count, total, whole, None)
