"""Jobs in this process: what Ray does for a job, done here, one thing after the other.

A pass over parts costs Ray half a second and a training ten; here they cost their work alone. Stages, training loop,
checkpoints and store are those of a real job, and what a worker gets is pickled, as for another process: a release made so has
the digests of the one that Ray made (tests/end_to_end/test_s3_to_http.py; by two workers: tests/jobs/test_kill_and_resume.py).
One worker trains in this process, more of them in processes of their own.
"""

import atexit
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch.distributed as dist

from catid2_ray.config import ClusterRecipe
from catid2_ray.on_ray.machine import cluster, parts, progress
from catid2_ray.on_ray.training import shards, worker
from catid2_ray.on_ray.training.engine import share_objects
from catid2_ray.on_ray.training.loop import Seat, run_training
from catid2_ray.on_ray.training.task import Run
from tests.ranks import run_ranks


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
    """Stands in for the trainer that `worker._fit` makes and calls."""

    def __init__(self, run: Run, recipe: ClusterRecipe):
        self.run = run

    def fit(self) -> None:
        world = self.run.settings.workers
        if world > 1:
            with tempfile.TemporaryDirectory() as folder:
                run_ranks(_sit, (world, (ray.cloudpickle.dumps(self.run), world, f"file://{folder}/meet")))
            return
        # Until the process ends: DeepSpeed goes on with the first group that it saw.
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            atexit.register(dist.destroy_process_group)
        try:
            _train(_shipped(self.run), 0, 1)
        except Exception as error:
            raise TrainingFailed(error) from error


def _sit(rank: int, run: bytes, world: int, meet: str) -> None:
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    with without_ray():
        _train(ray.cloudpickle.loads(run), rank, world)
    dist.destroy_process_group()


def _train(run: Run, rank: int, world: int) -> None:
    def hand_in(figures: dict, folder: Path, name: str) -> None:
        """All ranks lay their files into the folder that rank 0 names, as Ray Train does."""
        (name,) = share_objects([name], world, run.device)
        run.store.upload(folder, f"{run.folder}/{name}")
        if world > 1:
            dist.barrier()

    spans = worker._spans(run)
    rows = spans[rank % len(spans)].dataset(run.store, run.task.reader)
    run_training(run, Seat(rank=rank, world=world, rows=rows, hand_in=hand_in))


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Jobs that this process runs inside the block start no Ray, whether one is running or not."""
    data = SimpleNamespace(data=SimpleNamespace(from_items=Dataset.from_items, Dataset=Dataset))
    environment = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"} | cluster.worker_environment(ClusterRecipe())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():  # what is set already stays: a rank knows which one it is
            patch.setenv(name, os.environ.get(name, value))
        patch.setattr(cluster, "connect", lambda *_, **__: None)
        patch.setattr(cluster, "disconnect", lambda: None)
        patch.setattr(parts, "ray", data)
        patch.setattr(shards, "ray", data)
        patch.setattr(worker, "_trainer", Trainer)
        patch.setattr(progress, "remote_bar", progress.bar)
        yield
