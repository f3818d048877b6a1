import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.errors import StorageError
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.training.shards import RankRange, ShardRows, StreamedRows

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


def test_streamed_rows_give_equal_epochs_again_and_other_epochs_another_order():
    def epoch(number):
        span = RankRange(manifest(), rank=0, world=1)
        rows = StreamedRows(Blocks(span, 4), span, ["value"], seed=5)
        rows.seek(number)
        return [batch["value"][:, 0] for batch in rows.epoch(np.empty(0), steps=3, batch=8)]

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert [len(values) for values in first] == [8, 8, 8]
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))
    assert len(np.unique(np.concatenate(first))) == 24


def test_streaming_goes_round_when_the_rows_end_before_the_steps():
    span = RankRange(manifest(), rank=0, world=1)
    rows = StreamedRows(Blocks(span, 4), span, ["value"], seed=5)
    assert sum(len(batch["value"]) for batch in rows.epoch(np.empty(0), steps=9, batch=8)) == 72


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
