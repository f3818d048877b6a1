"""The one training loop, run by every Ray Train worker: DeepSpeed engine, resume, steps, checkpoints, export.

What is trained is a Task (quantizer or generator). Rows, learning rate and dropout of a step are pure functions of (seed,
epoch, step, rank), so a run that was killed and resumed ends in the same weights as an undisturbed one. All ranks take
the same number of steps, whatever their shards hold.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import ClusterRecipe, TrainingRecipe
from catid2_ray.errors import CatidError, CollapseError, TrainingError
from catid2_ray.on_ray import checkpoints, progress
from catid2_ray.on_ray.parts import our_error
from catid2_ray.on_ray.shards import PartReader, RankRange, open_rows
from catid2_ray.schedule import learning_rate_at, seed_from


class Task(Protocol):
    """What the loop trains. Picklable; built anew in every worker."""

    columns: list[str]
    reader: PartReader

    def build(self) -> torch.nn.Module: ...

    def parameter_groups(self, module: torch.nn.Module, *, weight_decay: float) -> list[dict]: ...

    def start(self, module: torch.nn.Module) -> None:
        """Before the first epoch of a run that is not resumed; on rank 0, the others get its weights."""

    def rows_per_epoch(self, rows: int) -> int: ...

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray: ...

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        """The batch as it is fed: augmentation goes here, a pure function of its arguments."""

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]: ...

    def end_epoch(self, module: torch.nn.Module, *, epoch: int, means: dict, history: list[dict]) -> tuple[dict, bool]:
        """(figures for the history, whether weights were changed in place); on rank 0, the others get both.

        A figure `stop` ends the training with a CollapseError of that text. `means`: the epoch's mean loss and terms, which
        go into the history too unless taken out; `history`: the records of the epochs before.
        """

    def export(self, module: torch.nn.Module, folder: Path, history: list[dict]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run as the workers see it."""

    task: Task
    settings: TrainingRecipe
    seed: int
    threads: int
    device: str
    store: Store
    rows: Manifest

    def geometry(self, world: int) -> tuple[int, int]:
        """(rows of a rank's batch, steps per epoch), equal on all ranks.

        The batch shrinks to the smallest shard, since a row met twice in one batch would be its own positive.
        """
        smallest = self.task.rows_per_epoch(self.rows.rows // world)
        batch = max(1, min(self.settings.batch // world, smallest))
        return batch, max(1, -(-self.task.rows_per_epoch(self.rows.rows) // (batch * world)))


def train(run: Run, cluster: ClusterRecipe, attempt: Attempt, *, label: str) -> tuple[list[dict], dict]:
    """Run to the end, resuming where an earlier job was killed. Returns (manifest entries of the export, last figures).

    The run's name is the artefact's key, so a rerun of the same recipe finds its checkpoints; they are deleted once the
    export is in the attempt. Raises TrainingError when the workers failed more often than max_failures.
    """
    settings, store = run.settings, run.store
    name = f"{attempt.kind}-{attempt.key}"
    if not store.is_s3:
        os.makedirs(store.path("runs"), exist_ok=True)
    spans = [RankRange(run.rows, rank=rank, world=settings.workers) for rank in range(settings.workers)]
    datasets = {f"rows-{rank}": span.dataset(store, run.task.reader) for rank, span in enumerate(spans)}
    options = ray.data.DataContext.get_current().execution_options
    gpus = cluster.gpus_per_worker
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        datasets=datasets,
        dataset_config=DataConfig(datasets_to_split=[], execution_options=options),
        run_config=RunConfig(
            name=name,
            storage_path=store.path("runs"),
            storage_filesystem=store.arrow_fs if store.is_s3 else None,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    _, steps = run.geometry(settings.workers)
    with progress.remote_bar(label, settings.epochs * steps, "steps"):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error, label) from error
    if result.metrics and result.metrics.get("stop"):
        raise CollapseError(result.metrics["stop"])
    if result.checkpoint is None:
        raise TrainingError(f"{label} ended without a checkpoint; see the logs of the workers")
    with tempfile.TemporaryDirectory() as local:
        result.checkpoint.to_directory(local)
        files = store.upload(Path(local) / "export", attempt.folder)
    return files, result.metrics


def clean(store: Store, attempt: Attempt) -> None:
    """Delete the run's checkpoints; call after the commit."""
    store.delete_folder(f"runs/{attempt.kind}-{attempt.key}")


def _cause(error: Exception, label: str) -> CatidError:
    """The error of ours inside Ray's, as it was raised, or a TrainingError that quotes the worker's last words."""
    for failure in getattr(error, "worker_failures", {}).values():
        # Ray Train hands over what a worker raised inside a wrapper that has no public way in.
        if inner := our_error(getattr(failure, "_base_exc", failure)):
            return inner
    text = str(error).strip().splitlines()
    return TrainingError(
        f"{label} failed: {text[-1] if text else type(error).__name__}. Rerun to resume from the last checkpoint"
    )


class _Gather(torch.autograd.Function):
    """Rows of all ranks along dim 0; the backward pass sums the gradient of a rank's rows over all ranks."""

    @staticmethod
    def forward(ctx, rows):
        ctx.rows = rows.shape[0]
        pieces = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows : (dist.get_rank() + 1) * ctx.rows]


def _engine(run: Run, module: torch.nn.Module, batch: int):
    import deepspeed

    # The shared-memory op would be compiled with g++ on first use; plain gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = run.settings
    groups = run.task.parameter_groups(module, weight_decay=settings.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(groups, lr=settings.learning_rate),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.clip,
            "zero_optimization": {
                "stage": settings.zero_stage,
                "reduce_bucket_size": 20_000_000,
                "allgather_bucket_size": 20_000_000,
            },
            "bf16": {"enabled": settings.precision == "bf16"},
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine


def _loop(config: dict) -> None:
    run: Run = config["run"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(run.threads)
    torch.manual_seed(seed_from(run.seed, 0))
    module = run.task.build().to(run.device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        if rank == 0:
            run.task.start(module)
        _share_weights(module, world)
    batch, steps = run.geometry(world)
    engine = _engine(run, module, batch)
    epochs_done, history = 0, []
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = checkpoints.load(Path(folder), engine, rank=rank, world=world)
        epochs_done, history = state["epochs_done"], state["history"]
        progress.event("resume", rank=rank, epochs_done=epochs_done)
    span = RankRange(run.rows, rank=rank, world=world)
    iterator = ray.train.get_dataset_shard(f"rows-{rank}")
    if epochs_done >= run.settings.epochs:
        _hand_in(run, engine, rank, world, epochs_done, history)
        return
    with open_rows(
        iterator, span, run.task.columns, mode=getattr(run.settings, "input", "shard"), seed=seed_from(run.seed, rank)
    ) as rows:
        if hasattr(rows, "seek"):
            rows.seek(epochs_done)
        for epoch in range(epochs_done, run.settings.epochs):
            history.append(_epoch(run, engine, rows, epoch, history, batch=batch, steps=steps, rank=rank, world=world))
            # A figure that asks to stop is the same on all ranks; raised by a worker, Ray would try it all again.
            last = epoch + 1 == run.settings.epochs or "stop" in history[-1]
            if last or (epoch + 1) % run.settings.checkpoint_every_epochs == 0:
                _hand_in(run, engine, rank, world, epoch + 1, history)
            if last:
                return


def _share_weights(module: torch.nn.Module, world: int) -> None:
    """All ranks get rank 0's parameters and buffers: what is computed in place need not round alike everywhere."""
    if world > 1:
        for _, tensor in checkpoints.tensors(module):
            dist.broadcast(tensor.detach(), src=0)


def _epoch(
    run: Run, engine, rows, epoch: int, history: list[dict], *, batch: int, steps: int, rank: int, world: int
) -> dict:
    settings, sums = run.settings, {}
    report = progress.reporter() if rank == 0 else None
    gather = _Gather.apply if world > 1 else None
    order = run.task.order(rows, seed=seed_from(run.seed, rank), epoch=epoch, batch=batch, steps=steps)
    engine.train()
    for step, columns in enumerate(rows.epoch(order, steps=steps, batch=batch)):
        done = epoch * steps + step
        rate = learning_rate_at(
            done, settings.epochs * steps, peak=settings.learning_rate, warmup_share=settings.warmup_share
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_from(run.seed, done, rank))
        columns = run.task.prepare(columns, seed=seed_from(run.seed, done, rank))
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(values)).to(run.device) for name, values in columns.items()
        }
        loss, terms = run.task.loss(engine, tensors, gather=gather)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}: lower this stage's learning_rate"
            )
        engine.backward(loss)
        engine.step()
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums.get(name, 0.0) + float(value) / steps
        if report and (step + 1) % max(1, steps // 10) == 0:
            report(done + 1, f"epoch {epoch + 1} loss {sums['loss'] * steps / (step + 1):.3f}")
    engine.eval()
    shared = [None, None, None]
    if rank == 0:
        shared = [*run.task.end_epoch(engine.module, epoch=epoch, means=sums, history=history), sums]
    if world > 1:
        dist.broadcast_object_list(shared, src=0, device=torch.device(run.device))
    figures, changed, sums = shared
    if changed:
        _share_weights(engine.module, world)
        checkpoints.weights_changed(engine)
    if report:
        report((epoch + 1) * steps, f"epoch {epoch + 1} loss {sums['loss']:.3f}")
        progress.event("epoch", epoch=epoch + 1, **{name: f"{value:.5g}" for name, value in sums.items()})
    return {"epoch": epoch, **sums, **figures}


def _hand_in(run: Run, engine, rank: int, world: int, epochs_done: int, history: list[dict]) -> None:
    """Checkpoint of all ranks; the last one also holds what the stage publishes, in export/."""
    with tempfile.TemporaryDirectory() as local:
        folder = Path(local)
        checkpoints.save(folder, engine, rank=rank, world=world, epochs_done=epochs_done, history=history)
        if epochs_done >= run.settings.epochs and rank == 0:
            (folder / "export").mkdir()
            run.task.export(engine.module, folder / "export", history)
        ray.train.report({"epochs_done": epochs_done, **history[-1]}, checkpoint=Checkpoint.from_directory(local))
    if rank == 0:
        _, steps = run.geometry(world)
        progress.reporter()(epochs_done * steps, f"epoch {epochs_done} loss {history[-1]['loss']:.3f}", epochs_done)
