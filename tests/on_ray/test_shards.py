import itertools

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.errors import StorageError, TrainingError
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.training.shards import RankRange, ShardRows, StreamedRows, index_batches
from tests.oracles.streams import deal, faults

ROWS = [7, 1, 12, 5]


def manifest() -> Manifest:
    files = [{"name": f"part-{part:05d}.parquet", "part": part, "rows": rows} for part, rows in zip((0, 2, 3, 9), ROWS)]
    return Manifest(kind="k", key="k", digest="d", folder="f", files=files, parents={}, settings={}, recipe={})


class Blocks:
    """Stands in for Ray's iterator: the parts of a rank in any order, in blocks of any size."""

    def __init__(self, span: RankRange, block: int, seed: int | None = None):
        tables = []
        for entry in manifest().files:
            if f"f/{entry['name']}" in span.files:
                index = np.arange(entry["rows"], dtype=np.int32)
                value = entry["part"] * 100 + index
                tables.append(
                    pa.table(
                        {
                            "value": fixed_lists(np.stack([value, -value], 1).astype(np.float32), pa.float32()),
                            "part": np.full(entry["rows"], entry["part"], np.int32),
                            "index": index,
                        }
                    )
                )
        self.table, self.block = pa.concat_tables(tables), block
        if seed is not None:
            self.table = self.table.take(np.random.default_rng(seed).permutation(self.table.num_rows))

    def iter_batches(self, *, batch_size, batch_format):
        for start in range(0, self.table.num_rows, self.block):
            yield self.table.slice(start, self.block)


def expected() -> np.ndarray:
    return np.concatenate([np.arange(rows) + part * 100 for part, rows in zip((0, 2, 3, 9), ROWS)])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("block, seed", [(100, None), (3, 1), (1, 2)])
def test_shards_of_all_ranks_hold_every_row_once_in_order_whatever_arrives_first(tmp_path, world, block, seed):
    found = []
    for rank in range(world):
        span = RankRange(manifest(), rank=rank, world=world)
        folder = tmp_path / str(rank)
        folder.mkdir()
        rows = ShardRows(Blocks(span, block, seed), span, ["value"], folder)
        assert rows.rows == span.rows and abs(span.rows - sum(ROWS) / world) <= 1
        found.append(np.asarray(rows.take(slice(None))["value"]))
    found = np.concatenate(found)
    np.testing.assert_array_equal(found[:, 0], expected())
    np.testing.assert_array_equal(found[:, 1], -expected())


def test_an_epoch_has_exactly_its_steps_and_wraps_a_short_order(tmp_path):
    span = RankRange(manifest(), rank=0, world=1)
    rows = ShardRows(Blocks(span, 4), span, ["value"], tmp_path)
    order = np.arange(25)[::-1]
    batches = list(rows.epoch(order, steps=4, batch=8))
    assert [len(batch["value"]) for batch in batches] == [8, 8, 8, 8]
    np.testing.assert_array_equal(batches[3]["value"][1:, 0], expected()[order[:7]])


def test_rows_that_do_not_arrive_are_an_error_not_a_shorter_epoch(tmp_path):
    span = RankRange(manifest(), rank=0, world=1)
    blocks = Blocks(span, 4)
    blocks.table = blocks.table.slice(0, 20)
    with pytest.raises(StorageError, match="streamed 20 rows for this worker, expected 25"):
        ShardRows(blocks, span, ["value"], tmp_path)


def test_a_disk_that_is_too_small_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    span = RankRange(manifest(), rank=0, world=1)
    with pytest.raises(StorageError, match="quantizer.input=stream"):
        ShardRows(Blocks(span, 4), span, ["value"], tmp_path)


STREAM_BATCH, STREAM_EPOCHS = 16, 7


class Stream:
    """Stands in for Ray's iterator and for the range of a rank: rows 0 … rows − 1 in blocks of odd size; counts its passes."""

    def __init__(self, rows: int):
        self.rows, self.passes = rows, 0

    def places(self, batch) -> tuple[np.ndarray, np.ndarray]:
        mine = batch["index"].to_numpy() >= 0  # each block also has a row of another rank
        return mine, batch["index"].to_numpy()[mine]

    def iter_batches(self, *, batch_size, batch_format):
        self.passes += 1
        for start in range(0, self.rows, 23):
            index = np.append(np.arange(start, min(start + 23, self.rows)), -1)
            value = fixed_lists(np.stack([index, -index], 1).astype(np.float32), pa.float32())
            yield pa.table({"value": value, "index": index})

    def open(self, seed: int = 5) -> StreamedRows:
        return StreamedRows(self, self, ["value"], seed=seed)


def dealt(rows: StreamedRows, *, epochs=range(STREAM_EPOCHS), first: int = 0) -> list[list[int]]:
    """The batches of these epochs, of the first of them from its step `first` on."""
    steps, found = -(-rows.rows // STREAM_BATCH), []
    for epoch in epochs:
        begin = first if epoch == epochs[0] else 0
        for batch in rows.epoch(np.empty(0), steps=steps, batch=STREAM_BATCH, first=begin, before=epoch * steps):
            assert (batch["value"][:, 0] == -batch["value"][:, 1]).all(), "a row's values stay together"
            found.append(batch["value"][:, 0].astype(int).tolist())
    return found


BATCHES = (1, 1.1, 1.5, 2, 3.7, 8.5, 15, 23.9, 24, 40.3)  # of a worker's rows


@pytest.mark.parametrize("batches", BATCHES)
def test_a_stream_shows_every_row_equally_often_and_never_twice_in_a_batch(batches):
    stream = Stream(round(batches * STREAM_BATCH))
    found = dealt(stream.open())
    assert {len(hand) for hand in found} == {STREAM_BATCH}
    for steps in range(1, len(found) + 1):
        assert faults(found[:steps], stream.rows) == []
    assert found == dealt(stream.open()) and found != dealt(stream.open(seed=6))
    once = stream.rows // STREAM_BATCH
    assert found[:once] != found[once : 2 * once], "each pass has an order of its own"


@pytest.mark.parametrize("batches", BATCHES)
def test_a_resumed_stream_goes_on_with_the_same_batches(batches):
    stream = Stream(round(batches * STREAM_BATCH))
    steps, whole = -(-stream.rows // STREAM_BATCH), dealt(stream.open())
    for epoch, first in ((0, steps - 1), (1, 0), (2, steps // 2), (5, steps // 3)):
        assert dealt(stream.open(), epochs=range(epoch, STREAM_EPOCHS), first=first) == whole[epoch * steps + first :]


@pytest.mark.parametrize("rows, batch", [(16, 16), (17, 16), (24, 16), (31, 16), (32, 16), (61, 7), (5, 2), (4, 1)])
def test_few_rows_are_dealt_as_from_a_deck_of_cards(rows, batch):
    passes = [np.random.default_rng([9, number]).permutation(rows).tolist() for number in range(70)]
    found = [hand.tolist() for hand in itertools.islice(index_batches(rows, batch, 9), 60)]
    assert found == deal(passes, batch, 60)


def test_a_long_stream_is_read_once_a_pass_and_a_short_one_once_in_all():
    for batches, passes in ((40.5, STREAM_EPOCHS + 1), (8.5, 1)):
        stream = Stream(round(batches * STREAM_BATCH))
        dealt(stream.open())
        assert stream.passes == passes


def test_a_stream_in_windows_is_a_permutation_that_mixes_only_near_rows():
    stream = Stream(100 * STREAM_BATCH)
    order = np.concatenate(dealt(stream.open(), epochs=range(1)))
    assert sorted(order) == list(range(stream.rows))
    moved = np.abs(order - np.arange(stream.rows))
    assert moved.max() < 2 * 8 * STREAM_BATCH and moved.mean() > STREAM_BATCH


def test_a_stream_that_ends_early_and_a_batch_above_its_rows_are_errors():
    stream = Stream(100)
    stream.rows = 120
    rows = StreamedRows(Stream(100), stream, ["value"], seed=5)
    with pytest.raises(StorageError, match="a pass ended before this worker's 120 rows: the artefact changed"):
        dealt(rows)
    with pytest.raises(TrainingError, match="a batch of 16 of this worker's 15 rows would hold a row twice"):
        dealt(Stream(15).open())


def test_matrix_reads_chunked_fixed_size_lists():
    column = pa.chunked_array(
        [
            fixed_lists(np.ones((2, 3), np.float32), pa.float32()),
            fixed_lists(np.zeros((1, 3), np.float32), pa.float32()),
        ]
    )
    assert matrix(column).tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert matrix(column.slice(1, 1)).tolist() == [[1, 1, 1]]
    assert matrix(pa.chunked_array([[1, 2]])).tolist() == [1, 2]
