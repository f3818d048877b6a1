"""Two workers with B/2 rows each train what one process with B rows trains, and unequal shards hang nobody.

Unusual: the ranks are real gloo processes outside Ray. One group of them runs every case, since starting one costs
seconds; a collective that lacks a partner fails after a minute instead of waiting for ever.
"""

import datetime
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import QuantizerRecipe
from catid2_ray.on_ray.machine.arrays import fixed_lists
from catid2_ray.on_ray.stages.train_quantizer import QuantizerTask
from catid2_ray.on_ray.training.engine import Gather, start_engine
from catid2_ray.on_ray.training.loop import Seat, Training
from catid2_ray.on_ray.training.shards import RankRange, ShardRows
from catid2_ray.on_ray.training.task import Run
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.step import Extras, LossWeights, parameter_groups, training_loss
from tests.ranks import run_ranks

WORLD, BATCH, STEPS, WIDTH = 2, 64, 20, 12
WEIGHTS = {"dispersion": 0.5, "hierarchical": 0.3, "cluster_scale": 0.5, "temperature": 0.2}
TERMS = {"residual_quantization", "dispersion", "hierarchical", "cluster_scale"}
CODES = (8, 8, 8)
# name: (weights that differ, settings of the model, rows of a global batch that all terms see)
EXACT = {
    "all terms": ({}, {}, BATCH),
    "half of the rows for eq. 4 alone": ({}, {}, BATCH // 2),
    "moving averages": ({}, {"ema": 0.9}, BATCH),
    "queries of some rows": ({"query_item": 0.3}, {}, BATCH),
}


def catalogue(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 embeddings around 3 × 2 × 2 categories; unequal depths, half of the first batch without any."""
    rng = np.random.default_rng(5)
    leaf_N = rng.integers(0, 12, rows)
    embedding_ND = rng.normal(size=(12, WIDTH))[leaf_N] + 0.7 * rng.normal(size=(rows, WIDTH))
    category_NH = np.stack((leaf_N // 4, 3 + leaf_N // 2, 9 + leaf_N), 1)
    category_NH[rng.random(rows) < 0.2, 2] = -1
    category_NH[BATCH // 2 : BATCH] = -1
    return torch.from_numpy(embedding_ND), torch.from_numpy(category_NH)


def rows_of(step: int, rank: int, world: int, uniform: int) -> torch.Tensor:
    """Indices of a rank's batch: its share of the global head, which all terms see, then its share of the tail."""
    head, tail = torch.arange(step * BATCH, (step + 1) * BATCH).split((uniform, BATCH - uniform))
    return torch.cat([part.chunk(world)[rank] for part in (head, tail) if len(part)])


def train_exactly(rank: int, world: int, changes: dict, settings: dict, uniform: int) -> dict:
    """20 steps in float64 with plain AdamW on gradients averaged over the ranks."""
    embedding_ND, category_NH = catalogue(STEPS * BATCH)
    torch.manual_seed(1)
    model = ResidualQuantizer(width=WIDTH, hidden=(10,), latent=6, codes_per_level=CODES, **settings).double()
    model.initialise_codebooks(embedding_ND[:400], seed=2)
    optimiser = torch.optim.AdamW(parameter_groups(model, weight_decay=1e-2), lr=3e-3)
    weights, losses = LossWeights(**WEIGHTS | changes, level_power=1.0), []
    for step in range(STEPS):
        mine = rows_of(step, rank, world, uniform)
        # The two ranks differ in how many of their rows have a query.
        extras = Extras(
            uniform=uniform // world, query_BD=embedding_ND[mine].flip(1), has_query_B=mine % BATCH < BATCH // 3
        )
        loss = training_loss(
            model, embedding_ND[mine], category_NH[mine], weights=weights, extras=extras,
            gather=Gather.apply if world > 1 else None,
        )  # fmt: skip
        assert set(loss.terms) >= TERMS - set(changes)
        optimiser.zero_grad()
        loss.total.backward()
        for parameter in model.parameters():
            if world > 1:
                dist.all_reduce(parameter.grad)
            parameter.grad /= world
        optimiser.step()
        losses.append([loss.total.detach(), *loss.terms.values(), *(anchors.double() for anchors in loss.anchors)])
    return {"losses": torch.tensor(losses), "state": model.state_dict()}


def run_of(*, rows: int, workers: int, batch: int = BATCH, **changes) -> Run:
    """Run of a `QuantizerTask` with all terms, ZeRO-1 and float32."""
    recipe = QuantizerRecipe(
        codes_per_level=CODES, hidden=(10,), latent=6, batch=batch, epochs=2, workers=workers, zero_stage=1,
        clip=1e6, learning_rate=3e-3, weight_decay=1e-2, **WEIGHTS, **changes,
    )  # fmt: skip
    embedding_ND, category_NH = catalogue(400)
    task = QuantizerTask(
        recipe, width=WIDTH, categories=(3, 6, 12), sample_ND=embedding_ND.float().numpy(),
        category_NH=category_NH.numpy(), seed=0,
    )  # fmt: skip
    sizes = (rows // 2, rows - rows // 2)
    files = [{"name": f"part-{part:05d}.parquet", "part": part, "rows": size} for part, size in enumerate(sizes)]
    manifest = Manifest(
        kind="k", key="k", digest="d", folder="f", files=files, parents={}, settings={}, recipe={}, rows=rows
    )
    return Run(
        task=task, settings=recipe, seed=0, threads=1, device="cpu", store=Store(tempfile.gettempdir()), rows=manifest
    )


def started_module(run: Run) -> torch.nn.Module:
    torch.manual_seed(1)
    module = run.task.build()
    run.task.start(module)
    return module


def train_with_deepspeed(rank: int, world: int) -> dict:
    """The same 20 steps in float32 through the engine of the training loop."""
    embedding_ND, category_NH = catalogue(STEPS * BATCH)
    run, losses = run_of(rows=STEPS * BATCH, workers=world), []
    engine = start_engine(run, started_module(run), run.batches(world))
    for step in range(STEPS):
        mine = rows_of(step, rank, world, BATCH)
        batch = {"embedding": embedding_ND[mine].float(), "category": category_NH[mine]}
        loss, terms = run.task.loss(engine, batch, gather=Gather.apply if world > 1 else None)
        assert set(terms) >= TERMS
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "state": engine.module.state_dict()}


class Blocks:
    """Stands in for Ray's iterator: all parts of the run's rows in one table."""

    def __init__(self, run: Run):
        embedding_ND, category_NH = catalogue(run.rows.rows)
        places = [(entry["part"], index) for entry in run.rows.files for index in range(entry["rows"])]
        part_N, index_N = np.array(places, np.int32).T
        self.table = pa.table(
            {
                "embedding": fixed_lists(embedding_ND.float().numpy(), pa.float32()),
                "category": fixed_lists(category_NH.int().numpy(), pa.int32()),
                "part": part_N,
                "index": index_N,
            }
        )

    def iter_batches(self, *, batch_size, batch_format):
        yield self.table


def train_unequal_shards(rank: int, world: int, sampler: str) -> dict:
    """Two epochs of the training loop on 83 rows, 41 and 42 of them: 16 rows a step and rank, three steps an epoch."""
    run, seen = run_of(rows=83, workers=world, batch=32, sampler=sampler), []
    if rank:  # stands for a machine that rounds otherwise: what it would revive and refit must not count
        run.task.sample_ND = run.task.sample_ND[::-1] + np.float32(0.1)
    span = RankRange(run.rows, rank=rank, world=world)
    with tempfile.TemporaryDirectory() as folder:
        rows = ShardRows(Blocks(run), span, run.task.columns, Path(folder))
        watched = rows.take
        rows.take = lambda index: seen.append(index) or watched(index)
        seat = Seat(rank=rank, world=world, rows=None, hand_in=lambda *_: None)
        training = Training(run, seat, started_module(run), Path(folder))
        with training.metered():
            while not training.epoch(rows):
                pass
    drawn = [len(np.unique(index)) for index in seen if not isinstance(index, slice)]
    losses = torch.tensor([record["loss"] for record in training.state.history])
    return {"rows": span.rows, "drawn": drawn, "losses": losses, "state": training.engine.module.state_dict()}


def run_rank(rank: int, folder: str, world: int) -> None:
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world, timeout=patience
    )
    found = {name: train_exactly(rank, world, *case) for name, case in EXACT.items()}
    found["deepspeed"] = train_with_deepspeed(rank, world)
    if world > 1:
        found |= {name: train_unequal_shards(rank, world, name) for name in ("uniform", "category_balanced")}
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, list[dict]]:
    """What one process found, and what each of two ranks found, per case."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    run_ranks(run_rank, *((world, (folder, world)) for world in (1, WORLD)))
    names = ["1-0", *(f"{WORLD}-{rank}" for rank in range(WORLD))]
    return dict(zip(("one", "first", "second"), [torch.load(f"{folder}/{name}.pt") for name in names], strict=True))


@pytest.mark.parametrize("case", EXACT)
def test_two_ranks_train_what_one_process_trains_to_1e_8(trained, case):
    one = trained["one"][case]
    assert (one["losses"][0] - one["losses"][-1]).abs()[0] > 1e-2
    for rank in ("first", "second"):
        torch.testing.assert_close(trained[rank][case]["losses"], one["losses"], rtol=0, atol=1e-8)
        torch.testing.assert_close(trained[rank][case]["state"], one["state"], rtol=0, atol=1e-8)


def test_two_ranks_with_zero_1_train_what_one_process_trains(trained):
    one = trained["one"]["deepspeed"]
    for rank in ("first", "second"):
        found = trained[rank]["deepspeed"]
        torch.testing.assert_close(found["losses"], one["losses"], rtol=0, atol=1e-4)
        for name, parameter in one["state"].items():
            assert torch.linalg.vector_norm(found["state"][name] - parameter) < 1e-3 * parameter.norm(), name


@pytest.mark.parametrize("sampler", ["uniform", "category_balanced"])
def test_shards_of_unequal_length_take_equal_steps_and_end(trained, sampler):
    first, second = trained["first"][sampler], trained["second"][sampler]
    assert (first["rows"], second["rows"]) == (41, 42)
    assert run_of(rows=83, workers=WORLD, batch=32).batches(WORLD).plan.place(0).steps == 3
    assert first["drawn"] == second["drawn"] == [16] * 6
    torch.testing.assert_close(first["losses"], second["losses"])
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
