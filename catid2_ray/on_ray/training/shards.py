"""Training rows on the node: Ray Data streams them once into a memory-mapped shard per worker, epochs read that by index.

A pass of Ray Data costs seconds to start, so hundreds of epochs cannot be hundreds of passes. A worker's shard is a
contiguous range of the artefact's rows, each row at a place that follows from its part and index, so arrival order does not
matter. `StreamedRows` is the other way, for nodes whose disk is too small: every epoch is a pass.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray.data

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import StorageError
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

    def epoch(self, order: np.ndarray, *, steps: int, batch: int, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches `first` … `steps` − 1 of `batch` rows in the given order, from its start again where it is too short."""
        for step in range(first, steps):
            yield self.take(np.take(order, np.arange(step * batch, (step + 1) * batch), mode="wrap"))


class StreamedRows:
    """The same rows, streamed anew each epoch and shuffled inside a window of a few batches; needs no disk.

    Deterministic, because the pass keeps the order of files and rows. `order` only says how many rows an epoch has.
    """

    def __init__(self, iterator, span: RankRange, columns: list[str], *, seed: int):
        self.rows, self._iterator, self._span, self._columns, self._seed = span.rows, iterator, span, columns, seed
        self._epoch = 0

    def seek(self, epoch: int) -> None:
        self._epoch = epoch

    def epoch(self, order: np.ndarray, *, steps: int, batch: int, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches `first` … `steps` − 1 of the epoch; those before are read too, as the shuffle goes on from them."""
        generator = np.random.default_rng([self._seed, self._epoch])
        self._epoch += 1
        given = 0
        while given < steps:
            # What is left of a pass is dropped: with the next pass it could put one row into a batch twice.
            window = None
            for block in self._blocks():
                window = (
                    block if window is None else {name: np.concatenate([window[name], block[name]]) for name in block}
                )
                size = len(next(iter(window.values())))
                if size < _WINDOW_BATCHES * batch and size < self.rows:
                    continue
                shuffled = generator.permutation(size)
                whole = size // batch
                for number in range(min(whole, steps - given)):
                    if given >= first:
                        chosen = shuffled[number * batch : (number + 1) * batch]
                        yield {name: values[chosen] for name, values in window.items()}
                    given += 1
                window = {name: values[shuffled[whole * batch :]] for name, values in window.items()}
                if given == steps:
                    return

    def _blocks(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._iterator.iter_batches(batch_size=_STREAM_BATCH, batch_format="pyarrow"):
            mine, _ = self._span.places(batch)
            yield {name: matrix(batch[name])[mine] for name in self._columns}


@contextlib.contextmanager
def open_rows(iterator, span: RankRange, columns: list[str], *, mode: str, seed: int):
    """ShardRows on this node's temporary disk, removed at the end, or StreamedRows."""
    if mode == "stream":
        yield StreamedRows(iterator, span, columns, seed=seed)
        return
    with tempfile.TemporaryDirectory(prefix="catid2-shard-") as folder:
        yield ShardRows(iterator, span, columns, Path(folder))
