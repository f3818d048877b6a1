"""Ranks of a training as processes of their own, without Ray: forked from one process that has imported all they need.

Four files start ranks, ten in all; each rank would import torch, transformers and DeepSpeed for itself, six seconds of a core.
"""

import os
import time

import pytest
import torch
import torch.multiprocessing as mp

NEEDED = ["catid2_ray.on_ray.stages.train_quantizer", "catid2_ray.on_ray.stages.train_generator", "deepspeed"]


def run_ranks(function, *groups: tuple, within_s: float = 300) -> None:
    """Run groups of ranks side by side to their ends: `function(rank, *arguments)` for each rank of (world, arguments).

    The ranks see the environment as it is now. Raises AssertionError where they have not ended after `within_s`, and
    torch.multiprocessing's ProcessRaisedException, which quotes the traceback, where one raises: no error of ours comes out of
    ranks as itself.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        environment = dict(os.environ)
        started = [
            mp.start_processes(
                _rank, args=(function, world, environment, arguments), nprocs=world, join=False, start_method="forkserver"
            )
            for world, arguments in groups
        ]  # fmt: skip
    deadline = time.monotonic() + within_s
    try:
        for group in started:
            while not group.join(timeout=1):
                assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in (process for group in started for process in group.processes if process.is_alive()):
            process.kill()


def _rank(rank: int, function, world: int, environment: dict, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment | {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)})
    torch.set_num_threads(1)
    function(rank, *arguments)
