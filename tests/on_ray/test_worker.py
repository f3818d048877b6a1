"""The training loop's own pieces: gathering with gradients over real processes, equal steps on all ranks, checkpoints."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import QuantizerRecipe
from catid2_ray.errors import TrainingError
from catid2_ray.on_ray.stages.train_quantizer import QuantizerTask
from catid2_ray.on_ray.training import checkpoints
from catid2_ray.on_ray.training.checkpoints import State
from catid2_ray.on_ray.training.engine import Gather, start_engine
from catid2_ray.on_ray.training.task import Run
from tests.ranks import run_ranks

WORLD, SWITCH = 2, "TORCHDYNAMO_DISABLE"


def gather_rows(rank: int) -> dict:
    rows = torch.arange(6, dtype=torch.float64).reshape(WORLD, 3)[rank : rank + 1].clone().requires_grad_()
    everything = Gather.apply(rows)
    loss = (everything[0] * everything[1]).sum()
    loss.backward()
    return {"loss": loss.detach(), "grad": rows.grad}


def gather_beside_another_user(rank: int) -> torch.Tensor:
    """The gradients of z, which is added to the gathered rows, plainly and with a factor: autograd hands both one tensor.

    z's leaf lies one step further back, so that its gradient is read after the gather's backward pass."""
    found = []
    for factor in (1.0, torch.full((WORLD, 3), 2.0, dtype=torch.float64)):
        rows = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
        leaf = torch.zeros(WORLD, 3, dtype=torch.float64, requires_grad=True)
        z = leaf * 1.0
        (factor * (Gather.apply(rows) + z)).sum().backward()
        found.append(leaf.grad)
    return torch.stack(found)


def run_of(stage: int, *, rows: int = 40, workers: int = WORLD, batch: int = 8, **more) -> Run:
    recipe = QuantizerRecipe(
        codes_per_level=(4, 4), hidden=(8,), latent=4, batch=batch, epochs=3, workers=workers, zero_stage=stage, **more
    )
    sample = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).numpy()
    task = QuantizerTask(
        recipe, width=6, categories=(1,), sample_ND=sample, category_NH=np.zeros((32, 1), np.int32), seed=0
    )
    manifest = Manifest(
        kind="k", key="k", digest="d", folder="f", files=[], parents={}, settings={}, recipe={}, rows=rows
    )
    return Run(
        task=task, settings=recipe, seed=0, threads=1, device="cpu", store=Store(tempfile.gettempdir()), rows=manifest
    )


@pytest.mark.parametrize("rows, workers, batch, expected", [
    (40, 1, 8, (8, 5)), (41, 1, 8, (8, 6)), (40, 2, 8, (4, 5)), (10, 2, 4096, (5, 1)), (11, 2, 4096, (5, 2)), (3, 2, 4, (1, 2)),
])  # fmt: skip
def test_ranks_agree_on_batch_and_steps(rows, workers, batch, expected):
    found = run_of(0, rows=rows, workers=workers, batch=batch).batches(workers)
    assert (found.rank_rows, found.plan.place(0).steps) == expected


def continue_training(rank: int, folder: str, stage: int, ema: float | None) -> dict:
    """Six steps straight through, and three, a checkpoint, a new engine, three more: the weights must be equal bit for bit."""
    run = run_of(stage, ema=ema)
    rows = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(rank + 1))
    categories = torch.zeros(4, 1, dtype=torch.long)

    def fresh():
        torch.manual_seed(0)
        module = run.task.build()
        run.task.start(module)
        return start_engine(run, module, run.batches(WORLD))

    def steps(engine, numbers):
        for number in numbers:
            batch = {"embedding": rows[number], "category": categories}
            loss, _ = run.task.loss(engine, batch, gather=Gather.apply)
            engine.backward(loss)
            engine.step()

    straight = fresh()
    steps(straight, range(6))
    first = fresh()
    steps(first, range(3))
    saved = Path(folder) / "run" / "step-3"
    saved.mkdir(parents=True, exist_ok=True)
    checkpoints.save(saved, first, rank=rank)
    checkpoints.seal(saved, State(epoch=3, history=[{"loss": 1.0}], world=WORLD, batch=8), rank=rank)
    dist.barrier()
    _, state = checkpoints.newest_whole(Store(folder), "run")
    assert state.epoch == 3 and state.history == [{"loss": 1.0}]
    second = fresh()
    checkpoints.load(saved, second, state, rank=rank, world=WORLD, batch=8, whole_rows=False)
    steps(second, range(3, 6))
    one, other = straight.module.state_dict(), second.module.state_dict()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    refused = []
    for changes in ({"world": WORLD + 1, "batch": 12}, {"world": WORLD + 1, "batch": 12, "whole_rows": True}):
        try:
            checkpoints.load(saved, second, state, rank=rank, **{"whole_rows": False, **changes})
        except TrainingError as error:
            refused.append(str(error))
    return {"different": different, "refused": refused}


CASES = [(0, None), (1, None), (2, None), (1, 0.9)]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {"gather": gather_rows(rank), "beside": gather_beside_another_user(rank)}
    found |= {case: continue_training(rank, f"{folder}/{number}", *case) for number, case in enumerate(CASES)}
    found["compiler"] = {"imported": "torch._inductor.compile_fx" in sys.modules, "switch": os.environ.get(SWITCH)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two gloo processes found; one pair for all cases, since starting one costs seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, (WORLD, (str(folder),)))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_gather_gives_all_rows_and_gradients_summed_over_ranks(ranks):
    found = [rank["gather"] for rank in ranks]
    rows = torch.arange(6, dtype=torch.float64).reshape(WORLD, 3)
    assert found[0]["loss"] == found[1]["loss"] == (rows[0] * rows[1]).sum()
    # Each rank's loss is the same global scalar, so the sum over ranks is WORLD times its gradient.
    torch.testing.assert_close(found[0]["grad"], WORLD * rows[1:2])
    torch.testing.assert_close(found[1]["grad"], WORLD * rows[0:1])


def test_gathering_leaves_the_gradients_of_others_alone(ranks):
    for found in ranks:
        plain, doubled = found["beside"]
        torch.testing.assert_close(plain, torch.ones(WORLD, 3, dtype=torch.float64))
        torch.testing.assert_close(doubled, 2 * torch.ones(WORLD, 3, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_continues_exactly_and_refuses_another_world(ranks, case):
    for found in (rank[case] for rank in ranks):
        assert found["different"] == []
        by_workers, by_batch = found["refused"]
        assert "written by 2 workers, this run has 3: each worker draws from its own range" in by_workers
        assert "batch of 8 rows by 2 workers, this run with 3 has 12: its steps are others" in by_batch


def test_an_engine_starts_without_torchs_compiler_and_leaves_its_switch(ranks):
    assert all(rank["compiler"] == {"imported": False, "switch": os.environ.get(SWITCH)} for rank in ranks)
