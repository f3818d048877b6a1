"""The training loop without Ray: kills, changes of workers, accumulation, early stopping, on a generator of a few thousand weights.

Unusual: one process and two gloo ranks run side by side, each all of its cases; they hand each other stopped runs by the
store. A worker's death is an exception in a step, and what a checkpoint loses then is a file taken away.
"""

import datetime
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import GeneratorRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError, TrainingError
from catid2_ray.generator.vocabulary import tokenize, train_tokenizer, with_docid_tokens
from catid2_ray.on_ray.machine.arrays import fixed_lists
from catid2_ray.on_ray.stages.examples import KIND
from catid2_ray.on_ray.stages.train_generator import GeneratorTask
from catid2_ray.on_ray.training import checkpoints
from catid2_ray.on_ray.training.engine import share_objects, start_engine
from catid2_ray.on_ray.training.loop import Seat, run_training
from catid2_ray.on_ray.training.task import Run
from catid2_ray.schedule import Phase
from tests.ranks import run_ranks
from tests.s3_server import new_bucket, s3_server

pytestmark = pytest.mark.faults
SPACE, ROWS, TOKENS = DocidSpace((4, 4)), 60, 10
PATIENCE_S = 5
TEXTS = [
    f"{a} {b} {c}" for a in ("steel", "copper", "oak") for b in ("hinge", "pipe") for c in ("small", "wide", "10 ft")
]


class Blocks:
    """Stands in for Ray's iterator: all examples in one part."""

    def __init__(self, tokenizer):
        row_N = np.arange(ROWS)
        input_ids = tokenize(tokenizer, [TEXTS[row % len(TEXTS)] for row in row_N], length=TOKENS)
        self.table = pa.table(
            {
                "kind": np.where(row_N < 40, KIND["query"], KIND["title"]).astype(np.int8),
                "weight": np.where(row_N % 3, 1.0, 0.5).astype(np.float32),
                "input_ids": fixed_lists(input_ids, pa.int32()),
                "codes": fixed_lists(np.stack((row_N % 4, row_N // 4 % 4), 1), pa.int32()),
                "part": np.zeros(ROWS, np.int32),
                "index": row_N.astype(np.int32),
            }
        )

    def iter_batches(self, *, batch_size, batch_format):
        yield self.table


class Watched(GeneratorTask):
    """A generator's task in two phases that dies before a given step, and whose validations are scripted."""

    dies_at: int | None = None
    scores: tuple[float, ...] = ()

    def phases(self, rows: int) -> list[Phase]:
        return [Phase(1, 40, 3e-3), Phase(max(1, len(self.scores) - 1), ROWS, 2e-3)]

    def loss(self, engine, batch, *, gather):
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == self.dies_at:
            raise InterruptedError(f"step {self.dies_at}")
        return super().loss(engine, batch, gather=gather)


class Scored(Watched):
    def validate(self, module, epoch: int, *, beat) -> dict:
        self.kept = getattr(self, "kept", []) + [checkpoints.copies(module)]
        return {"score": self.scores[epoch], "queries": 7}


class Slow(Watched):
    """Validates for longer than the other rank waits for anything; both begin to wait so briefly with their first step."""

    def loss(self, engine, batch, *, gather):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=PATIENCE_S), dist.group.WORLD)
        return super().loss(engine, batch, gather=gather)

    def validate(self, module, epoch: int, *, beat) -> dict:
        start = time.monotonic()
        while time.monotonic() < start + PATIENCE_S + 2:
            time.sleep(0.1)
            beat()
        return {"score": 0.5}


def run_of(folder: str, name: str, *, world: int, kind=Watched, scores=(), dies_at=None, **changes) -> Run:
    settings = {
        "width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "dropout": 0.0, "word_keep": 0.5, "batch": 16, "clip": 0.5,
        "workers": world, "checkpoint_every_steps": 2, "query_tokens": TOKENS, "decay": "inverse_sqrt", "vocabulary": 100,
    }  # fmt: skip
    recipe = GeneratorRecipe(**settings | changes)
    tokenizer = with_docid_tokens(train_tokenizer(TEXTS, size=100), SPACE)
    task = kind(recipe, tokenizer, SPACE, {"query": 40, "title": 20}, seed=3)
    task.scores, task.dies_at = scores, dies_at
    files = [{"name": "part-00000.parquet", "part": 0, "rows": ROWS}]
    rows = Manifest(
        kind="k", key="k", digest="d", folder="f", files=files, parents={}, settings={}, recipe={}, rows=ROWS
    )
    return Run(
        task=task, settings=recipe, seed=3, threads=1, device="cpu", store=Store(folder), rows=rows, name=name
    )  # fmt: skip


def one_slow_run(rank: int, folder: str, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    run = run_of(folder, "slow", world=world, kind=Slow, scores=(0, 0), validate_queries=7, validate_every_epochs=2)
    train(run, rank, world)
    if rank == 0:
        torch.save(found(run), f"{folder}/slow.pt")
    dist.destroy_process_group()


def train(run: Run, rank: int, world: int) -> None:
    """To the end, or to the scripted death."""

    def hand_in(figures: dict, folder: Path, name: str) -> None:
        (name,) = share_objects([name], world, "cpu")
        run.store.upload(folder, f"{run.folder}/{name}")
        if world > 1:
            dist.barrier()

    seat = Seat(rank=rank, world=world, rows=Blocks(run.task.tokenizer), hand_in=hand_in)
    try:
        run_training(run, seat)
    except InterruptedError:
        assert run.task.dies_at


def found(run: Run) -> dict:
    folder, state = checkpoints.newest_whole(run.store, run.folder)
    with checkpoints.opened(run.store, folder, state, ("export/",)) as local:
        weights = load_file(local / "export" / "model.safetensors")
    return {"state": state, "weights": weights, "files": sorted(state.files)}


def all_cases(rank: int, folder: str, world: int, bucket: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    results = {}

    def case(name: str, *deaths: int, root: str = folder, take_away: str = "", **settings) -> Run:
        for dies_at in (*deaths, None):
            run = run_of(root, f"{name}-{world}", world=world, dies_at=dies_at, **settings)
            train(run, rank, world)
            if world > 1:
                dist.barrier()
            if dies_at and take_away and rank == 0:
                newest, _ = checkpoints.newest_whole(run.store, run.folder)
                Path(run.store.path(f"{newest}/{take_away}")).unlink()
        if rank == 0:
            results[name] = found(run)
        return run

    # Stopped first, for the others to go on with; 2 + 4 steps follow the checkpoint after step 4.
    stopped = run_of(folder, f"moving-{world}", world=world, dies_at=6)
    train(stopped, rank, world)
    case("undisturbed")
    # Steps 3 and 4 are lost with the checkpoint, from step 2 on it is done again.
    case("killed", 5, 4, take_away="optimiser-0.pt")
    case("killed in S3", 5, root=bucket)
    case("accumulated", micro_batch=4, activation_checkpointing=True, zero_stage=2)
    if world > 1:
        half = {"precision": "bf16", "zero_stage": 2, "dropout": 0.1}
        case("half", **half)
        case("half killed", 5, **half)
    else:
        run = case("scored", 6, kind=Scored, scores=(0.1, 0.5, 0.2, 0.4, 0.9), patience=2, validate_queries=7)
        results["scored"]["kept"] = run.task.kept
        results["to the end"] = None
        case("to the end", kind=Scored, scores=(0.5, 0.2))
    Path(folder, f"done-{world}-{rank}").touch()
    for other in range(3 - world):
        deadline = time.monotonic() + 200
        while not Path(folder, f"done-{3 - world}-{other}").exists():
            assert time.monotonic() < deadline, "the other world did not finish"
            time.sleep(0.05)
    moved = run_of(folder, f"moving-{3 - world}", world=world)
    train(moved, rank, world)
    if rank == 0:
        results["moved"] = found(moved)
        torch.save(results, f"{folder}/{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[int, dict]:
    folder = str(tmp_path_factory.mktemp("loop"))
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        bucket = new_bucket(environment)
        run_ranks(all_cases, *((world, (folder, world, bucket)) for world in (1, 2)), within_s=400)
    return {world: torch.load(f"{folder}/{world}.pt", weights_only=False) for world in (1, 2)}


@pytest.mark.slow
def test_the_other_ranks_wait_for_a_validation_that_lasts_longer_than_their_patience(tmp_path):
    run_ranks(one_slow_run, (2, (str(tmp_path), 2)), within_s=200)
    result = torch.load(tmp_path / "slow.pt", weights_only=False)
    assert result["state"].finished and [record.get("score") for record in result["state"].history] == [None, 0.5]


def losses(result: dict) -> list[float]:
    return [record["loss"] for record in result["state"].history]


def same(one: dict, other: dict) -> bool:
    """Bit for bit: weights and history."""
    weights, others = one["weights"], other["weights"]
    return one["state"].history == other["state"].history and all(torch.equal(weights[k], others[k]) for k in weights)


def close(one: dict, other: dict) -> None:
    """Losses to 1e-5, weights to 1e-3 of their length: float32 added up in another order, through Adam."""
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    for name, weight in one["weights"].items():
        assert torch.linalg.vector_norm(weight - other["weights"][name]) < 1e-3 * weight.norm(), name


def test_a_run_ends_after_its_phases_with_everything_that_is_published(trained):
    result = trained[1]["undisturbed"]
    assert (
        result["state"].finished
        and result["state"].epoch == 2
        and [r["epoch"] for r in result["state"].history] == [0, 1]
    )
    assert losses(result)[1] < losses(result)[0]
    for file in ("model.safetensors", "optimiser-0.pt", "export/model.safetensors", "export/history.json"):
        assert file in result["files"]
    assert any(file.startswith("tensorboard/events") for file in result["files"])


@pytest.mark.parametrize("world", [1, 2])
def test_it_makes_no_difference_that_checkpoints_lie_in_s3(trained, world):
    assert same(trained[world]["killed in S3"], trained[world]["undisturbed"])


@pytest.mark.parametrize("world", [1, 2])
def test_killed_inside_epochs_a_run_ends_in_the_same_bits_though_the_newest_checkpoint_is_partial(
    trained, world, fault
):
    assert same(trained[world]["killed"], trained[world]["undisturbed"])
    fault(
        f"a training of {world} killed inside an epoch, its newest checkpoint partial",
        times=1,
        outcome="same bits",
        lost_s=0,
    )


def test_two_ranks_and_one_rank_give_the_same_loss_curve(trained):
    close(trained[2]["undisturbed"], trained[1]["undisturbed"])


@pytest.mark.parametrize("world", [1, 2])
def test_accumulated_and_recomputed_the_batch_is_the_same(trained, world):
    close(trained[world]["accumulated"], trained[world]["undisturbed"])


@pytest.mark.parametrize("world", [1, 2])
def test_another_number_of_workers_goes_on_from_the_checkpoint(trained, world):
    moved = trained[world]["moved"]
    assert moved["state"].world == world and moved["state"].finished
    close(moved, trained[1]["undisturbed"])


def test_bfloat16_goes_on_exactly_too(trained):
    assert same(trained[2]["half killed"], trained[2]["half"])
    assert losses(trained[2]["half"]) != losses(trained[2]["undisturbed"])


def test_training_stops_when_the_score_does_not_rise_and_publishes_the_best_epoch(trained):
    result = trained[1]["scored"]
    history = result["state"].history
    assert [record["score"] for record in history] == [0.1, 0.5, 0.2, 0.4] and history[0]["queries"] == 7
    assert history[-1]["best_epoch"] == 1 and history[-1]["best_score"] == 0.5 and history[-1]["stopped_early"]
    # Killed in the second epoch: the task that went on kept the weights of epochs 1, 2 and 3.
    best = result["kept"][0]
    assert len(result["kept"]) == 3
    assert all(torch.equal(weight, best[f"model.{name}"]) for name, weight in result["weights"].items())
    assert not torch.equal(best["model.shared.weight"], result["kept"][-1]["model.shared.weight"])


def test_without_patience_all_epochs_run_and_the_best_is_published(trained):
    last = trained[1]["to the end"]["state"].history[-1]
    assert (last["epoch"], last["best_epoch"], last["stopped_early"]) == (1, 0, False)


def test_a_batch_is_cut_as_its_arithmetic_says():
    batches = run_of("unused", "a", world=2, micro_batch=4).batches(2)
    assert (batches.micro, batches.accumulation, batches.rank_rows) == (4, 2, 8)
    assert batches.arithmetic == "micro_batch 4 x accumulation 2 x workers 2 = batch 16"
    assert run_of("unused", "a", world=2, batch=1000, micro_batch=100).batches(2).plan.batch == 60, (
        "the largest phase's rows"
    )


def test_a_small_phase_leaves_the_batch_as_it_is():
    run = run_of("unused", "a", world=2)
    run.task.phases = lambda rows: [Phase(1, 3, 1e-3), Phase(2, 40, 1e-3)]
    batches = run.batches(2)
    assert batches.plan.batch == 16 and [batches.plan.place(epoch).steps for epoch in range(3)] == [1, 3, 3]


def test_phases_of_nothing_are_refused():
    run = run_of("unused", "a", world=1)
    run.task.phases = lambda rows: [Phase(1, 40, 1e-3), Phase(2, 0, 1e-3)]
    with pytest.raises(
        TrainingError, match=r"at least one epoch and one row, found \[\(1, 40, 0.001\), \(2, 0, 0.001\)\]"
    ):
        run.batches(1)


def test_activation_checkpointing_needs_a_model_that_offers_it():
    run = run_of("unused", "a", world=1, activation_checkpointing=True)
    with pytest.raises(RecipeError, match="activation_checkpointing: Linear holds no model that offers it"):
        start_engine(run, torch.nn.Linear(2, 2), run.batches(1))
