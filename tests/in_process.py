"""Jobs in this process: what Ray does for a job, done here, one thing after the other.

A pass over parts costs Ray half a second and a training ten; here they cost their work alone. Stages, training loop,
checkpoints and store are those of a real job, and what a worker gets is pickled, as for another process: see
tests/end_to_end/test_s3_to_http.py, where a release made so has the digests of the one that Ray made. One worker trains, and
nothing dies.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch.distributed as dist

from catid2_ray.config import ClusterRecipe
from catid2_ray.on_ray.machine import cluster, parts, progress
from catid2_ray.on_ray.training import shards, worker
from catid2_ray.on_ray.training.loop import Seat, run_training
from catid2_ray.on_ray.training.task import Run


def _shipped(value):
    """As another process would get it."""
    return ray.cloudpickle.loads(ray.cloudpickle.dumps(value))


class Dataset:
    """As much of `ray.data.Dataset` as jobs use; a pass is made anew whenever it is read."""

    def __init__(self, blocks: Callable[[], Iterator]):
        self.blocks = blocks

    @classmethod
    def from_items(cls, items: list[dict], *, override_num_blocks: int) -> "Dataset":
        assert override_num_blocks == len(items)
        return cls(lambda: ({name: [value] for name, value in item.items()} for item in items))

    def map_batches(self, work, *, batch_size: int, fn_constructor_args=None, fn_kwargs=None, **_limits) -> "Dataset":
        assert batch_size == 1

        def blocks():
            function, first, named = _shipped((work, fn_constructor_args, fn_kwargs or {}))
            call = function if first is None else function(*first)
            for block in self.blocks():
                yield call(block, **named)

        return Dataset(blocks)

    def iter_rows(self) -> Iterator[dict]:
        for block in self.blocks():
            for values in zip(*block.values()):
                yield dict(zip(block, values))

    def iter_batches(self, *, batch_size: int, batch_format: str) -> Iterator:
        yield from self.blocks()


class TrainingFailed(ray.train.TrainingFailedError):
    """As Ray Train raises it: what each worker met, by rank."""

    def __init__(self, failure: Exception):
        super().__init__(str(failure))
        self.worker_failures = {0: failure}


class Trainer:
    """One worker, which is this process."""

    def __init__(self, run: Run, recipe: ClusterRecipe):
        assert run.settings.workers == 1, "a training in this process has one worker"
        self.run = run

    def fit(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        run = _shipped(self.run)

        def hand_in(figures: dict, folder: Path, name: str) -> None:
            run.store.upload(folder, f"{run.folder}/{name}")

        rows = worker._spans(run)[0].dataset(run.store, run.task.reader)
        try:
            run_training(run, Seat(rank=0, world=1, rows=rows, hand_in=hand_in))
        except Exception as error:
            raise TrainingFailed(error) from error


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Jobs that this process runs inside the block start no Ray, whether one is running or not."""
    data = SimpleNamespace(data=SimpleNamespace(from_items=Dataset.from_items, Dataset=Dataset))
    environment = cluster.worker_environment(ClusterRecipe()) | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(cluster, "connect", lambda *_, **__: None)
        patch.setattr(cluster, "disconnect", lambda: None)
        patch.setattr(parts, "ray", data)
        patch.setattr(shards, "ray", data)
        patch.setattr(worker, "_trainer", Trainer)
        patch.setattr(progress, "remote_bar", progress.bar)
        yield
