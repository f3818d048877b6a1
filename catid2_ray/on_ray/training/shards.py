"""Training rows on the node: Ray Data streams them once into a memory-mapped shard per worker, epochs read that by index.

A pass of Ray Data costs seconds to start, so hundreds of epochs cannot be hundreds of passes. A worker's shard is a
contiguous range of the artefact's rows, each row at a place that follows from its part and index, so arrival order does not
matter. `StreamedRows` is the other way, for nodes whose disk is too small: pass after pass.
"""

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray.data

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import StorageError, TrainingError
from catid2_ray.on_ray.machine import scratch
from catid2_ray.on_ray.machine.arrays import matrix

_STREAM_BATCH = 8192
_WINDOW_BATCHES = 8


@dataclass(frozen=True)
class PartReader:
    """How one part becomes rows for training: these columns, and the part and index that give a row its place."""

    columns: tuple[str, ...]

    def __call__(self, store: Store, file: str) -> pa.Table:
        return store.read_table(file, columns=[*self.columns, "part", "index"])


class RankRange:
    """Which rows, and so which files, a worker reads: rows ⌊r·N/W⌋ … ⌊(r+1)·N/W⌋ of the artefact's parts in order."""

    def __init__(self, manifest: Manifest, *, rank: int, world: int):
        parts = manifest.parts()
        rows = np.array([entry["rows"] for entry in parts])
        starts = np.concatenate([[0], np.cumsum(rows)])
        total = int(starts[-1])
        self.low, self.high = rank * total // world, (rank + 1) * total // world
        wanted = (starts[:-1] < self.high) & (starts[1:] > self.low)
        self.files = [manifest.file(entry["name"]) for entry, take in zip(parts, wanted) if take]
        self._offset = {entry["part"]: int(start) for entry, start in zip(parts, starts[:-1])}

    @property
    def rows(self) -> int:
        return self.high - self.low

    def dataset(self, store: Store, reader: PartReader) -> ray.data.Dataset:
        """One read task a part. The manifest names the files, so nothing is listed and no footer is read beforehand."""
        files = [{"file": name} for name in self.files]
        return ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
            _read_part, batch_size=1, fn_kwargs={"store": store, "reader": reader}
        )

    def places(self, batch) -> tuple[np.ndarray, np.ndarray]:
        """(mask over the batch's rows that are this worker's, their places 0 … rows − 1)."""
        part = batch["part"].to_numpy()
        numbers, inverse = np.unique(part, return_inverse=True)
        offset = np.array([self._offset[int(number)] for number in numbers], dtype=np.int64)
        row = offset[inverse] + batch["index"].to_numpy() - self.low
        mine = (row >= 0) & (row < self.rows)
        return mine, row[mine]


def _read_part(batch: dict, *, store: Store, reader: PartReader) -> pa.Table:
    return reader(store, batch["file"][0])


class ShardRows:
    """The worker's rows as memory-mapped arrays, `rows` of them. `take(index)` gives the columns at those places."""

    def __init__(self, iterator, span: RankRange, columns: list[str], folder: Path):
        self.rows, self._arrays = span.rows, {}
        written = 0
        for batch in iterator.iter_batches(batch_size=_STREAM_BATCH, batch_format="pyarrow"):
            mine, place = span.places(batch)
            for name in columns:
                values = matrix(batch[name])
                if name not in self._arrays:
                    self._arrays[name] = self._allocate(folder, name, (span.rows, *values.shape[1:]), values.dtype)
                self._arrays[name][place] = values[mine]
            written += len(place)
        if written != span.rows:
            raise StorageError(
                f"streamed {written} rows for this worker, expected {span.rows}: the artefact changed; rerun"
            )

    @staticmethod
    def _allocate(folder: Path, name: str, shape: tuple, dtype) -> np.ndarray:
        needed, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
        if needed > 0.9 * free:
            raise StorageError(
                f"the shard's column {name} needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free: point TMPDIR "
                "to a larger disk, use more workers, or, for the quantizer, set quantizer.input=stream"
            )
        return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)

    def take(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self._arrays.items()}

    def epoch(
        self, order: np.ndarray, *, steps: int, batch: int, first: int = 0, before: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches `first` … `steps` − 1 of `batch` rows in the given order, from its start again where it is too short.
        Steps `before` the epoch change nothing, as the order is the epoch's own."""
        for step in range(first, steps):
            yield self.take(np.take(order, np.arange(step * batch, (step + 1) * batch), mode="wrap"))


class StreamedRows:
    """The same rows, streamed anew in every pass and shuffled inside windows of a few batches; needs no disk.

    Passes follow each other without a gap: where a pass ends inside a batch, the next one fills it. So over any S steps of B
    rows each of N rows is seen ⌊S·B/N⌋ or ⌈S·B/N⌉ times, and never twice in a batch. What a step gets is a pure function of
    (seed, step), because a pass of Ray Data keeps the order of files and rows. Memory holds three windows and a block at most.
    """

    def __init__(self, iterator, span: RankRange, columns: list[str], *, seed: int):
        self.rows, self._iterator, self._span, self._columns, self._seed = span.rows, iterator, span, columns, seed
        self._running: Iterator[dict[str, np.ndarray]] | None = None
        self._next = (0, 0)  # the step that `_running` gives next, and the rows of its batches

    def epoch(
        self, order: np.ndarray, *, steps: int, batch: int, first: int = 0, before: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """The batches `first` … `steps` − 1 of the epoch that follows `before` steps of the training; `order` is not used.

        TrainingError where a batch has more rows than this worker.
        """
        if batch > self.rows:
            raise TrainingError(
                f"a batch of {batch} of this worker's {self.rows} rows would hold a row twice: lower quantizer.batch"
            )
        for step in range(before + first, before + steps):
            if self._running is None or self._next != (step, batch):
                self.close()
                self._running = self._batches(step, batch)
            columns = next(self._running)
            self._next = (step + 1, batch)
            yield columns

    def close(self) -> None:
        """End the pass that is being read; the next epoch starts one anew."""
        if self._running is not None:
            self._running.close()
        self._running = None

    def _batches(self, step: int, batch: int) -> Iterator[dict[str, np.ndarray]]:
        """The batches from a step of the training on, without end."""
        window = _WINDOW_BATCHES * batch
        if self.rows < 3 * window:  # one window, which is read once and kept
            values = next(self._cut([self.rows]))
            for index in itertools.islice(index_batches(self.rows, batch, self._seed), step, None):
                yield {name: column[index] for name, column in values.items()}
        number, drawn = divmod(step * batch, self.rows)
        left: dict[str, np.ndarray] = {}
        while True:
            # The last window of a pass and the first of the next have no row in common, so no batch holds a row twice.
            for values, order in self._windows(number, drawn, window):
                start = 0
                while (taken := batch - _length(left)) <= len(order) - start:
                    yield _joined(left, values, order[start : start + taken])
                    left, start = {}, start + taken
                left = _joined(left, values, order[start:])
            number, drawn = number + 1, 0

    def _windows(self, number: int, drawn: int, window: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """(a window's rows, the order in which they are drawn) of a pass, without the first `drawn` that it drew."""
        # The first width differs from pass to pass, so that other rows meet in a window.
        first = int(np.random.default_rng([self._seed, number]).integers(window // 2, window, endpoint=True))
        whole = (self.rows - first) // window - 1
        sizes = [first, *[window] * whole, self.rows - first - whole * window]
        for place, values in enumerate(self._cut(sizes)):
            order = np.random.default_rng([self._seed, number, place]).permutation(sizes[place])[drawn:]
            drawn = max(0, drawn - sizes[place])
            yield values, order

    def _cut(self, sizes: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """A pass of the rows in their order, as windows of these sizes. StorageError where it has fewer rows."""
        blocks, block, start = self._blocks(), {}, 0
        for size in sizes:
            window, filled = {}, 0
            while filled < size:
                if start == _length(block):
                    block, start = next(blocks, None), 0
                    if block is None:
                        raise StorageError(
                            f"a pass ended before this worker's {self.rows} rows: the artefact changed; rerun"
                        )
                count = min(size - filled, _length(block) - start)
                for name, values in block.items():
                    if name not in window:
                        window[name] = np.empty((size, *values.shape[1:]), values.dtype)
                    window[name][filled : filled + count] = values[start : start + count]
                filled, start = filled + count, start + count
            yield window

    def _blocks(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._iterator.iter_batches(batch_size=_STREAM_BATCH, batch_format="pyarrow"):
            mine, _ = self._span.places(batch)
            yield {name: matrix(batch[name])[mine] for name in self._columns}


def index_batches(rows: int, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of `batch` ≤ `rows` places 0 … rows − 1 without end, out of one permutation after another.

    A batch that a permutation leaves unfilled takes, of the next one, the first places that it lacks; those passed over come
    right after it.
    """
    left = np.empty(0, np.int64)
    for number in itertools.count():
        order = np.random.default_rng([seed, number]).permutation(rows)
        taken = np.zeros(rows, bool)
        taken[left] = True
        fresh = order[~taken[order]][: batch - len(left)]
        yield np.concatenate([left, fresh])
        taken[left], taken[fresh] = False, True
        rest = order[~taken[order]]
        whole = len(rest) // batch * batch
        yield from rest[:whole].reshape(-1, batch)
        left = rest[whole:]


def _length(columns: dict[str, np.ndarray]) -> int:
    return len(next(iter(columns.values()), ()))


def _joined(left: dict[str, np.ndarray], values: dict[str, np.ndarray], index: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of `left`, where there are any, and those of `values` at these places."""
    if not left:
        return {name: column[index] for name, column in values.items()}
    return {name: np.concatenate([left[name], column[index]]) for name, column in values.items()}


@contextlib.contextmanager
def open_rows(iterator, span: RankRange, columns: list[str], *, mode: str, seed: int):
    """ShardRows on this node's temporary disk, removed at the end, or StreamedRows."""
    if mode == "stream":
        with contextlib.closing(StreamedRows(iterator, span, columns, seed=seed)) as rows:
            yield rows
        return
    with scratch.folder("shard") as folder:
        yield ShardRows(iterator, span, columns, folder)
