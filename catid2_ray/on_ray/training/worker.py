"""A training run on Ray Train: workers, their rows, failures, and what is published of the result. The loop is loop.py."""

import itertools
import os
from dataclasses import replace
from pathlib import Path

import ray.data
import ray.exceptions
import ray.train
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.artifacts.store import Store
from catid2_ray.config import ClusterRecipe
from catid2_ray.errors import CatidError, CollapseError, TrainingError, WorkerDied
from catid2_ray.on_ray.machine import preflight, progress, scarce, signals
from catid2_ray.on_ray.machine.cluster import on_pool
from catid2_ray.on_ray.machine.parts import our_error
from catid2_ray.on_ray.training import checkpoints
from catid2_ray.on_ray.training.checkpoints import State
from catid2_ray.on_ray.training.loop import Seat, run_training
from catid2_ray.on_ray.training.meter import FOLDER as TENSORBOARD
from catid2_ray.on_ray.training.shards import RankRange
from catid2_ray.on_ray.training.task import Run

# A training's controller, an actor beside the job's own process, died or could not be started.
_CONTROLLER_LOST = (ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError)
_COLLECTIVE_S = 1800  # ranks wait that long for each other; while rank 0 validates, it bids them wait on


def train(run: Run, cluster: ClusterRecipe, attempt: Attempt, *, label: str) -> tuple[list[dict], dict]:
    """Run to the end, resuming where an earlier job was killed. Returns (manifest entries of the export, last figures).

    The checkpoints lie in the run's folder, which is named by the artefact's key, so a rerun of the same recipe finds them;
    they are deleted once the export is in the attempt. TensorBoard's files come to lie beside the export, outside the
    manifest. Raises TrainingError when the workers failed more often than max_failures, CollapseError when the task stopped,
    and an error of ours that a worker raised: at once, unless it is transient.
    """
    run, store = replace(run, name=run_name(attempt)), run.store
    found = checkpoints.newest_whole(store, run.folder)
    if found is None or not found[1].finished:
        if found is not None:
            progress.event(
                "resume", stage=label.replace(" ", "_"), epochs_done=found[1].epoch, step=found[1].step,
                checkpoint=store.uri_of(found[0]),
            )  # fmt: skip
        _fit(run, cluster, label)
        found = checkpoints.newest_whole(store, run.folder)
    folder, state = found or ("", State())
    if state.history and "stop" in state.history[-1]:
        raise CollapseError(state.history[-1]["stop"])
    if not state.finished:
        raise TrainingError(
            f"{label} ended after {state.epoch} epochs without a whole last checkpoint in {store.uri_of(run.folder)}; see the "
            "logs of the workers, and rerun to go on"
        )
    with checkpoints.opened(store, folder, state, ("export/", TENSORBOARD)) as files:
        entries = store.upload(files / "export", attempt.folder)
        store.upload(files / TENSORBOARD, attempt.name(TENSORBOARD))
    return entries, {"epochs_done": state.epoch, **state.history[-1]}


class _Trainer(TorchTrainer):
    """TorchTrainer without two of its habits.

    Where Ray is this job's own and ends with it: the actor that frees the resources of a controller that died. It asks the
    dashboard, which is not there, and each training waited 12 s for it to give up. And everywhere: a handler of SIGINT, which
    swallowed Ctrl-C in all stages after a training.
    """

    def _register_sigint_handler(self, controller) -> None:
        """The job's own handler stays."""

    def _create_default_callbacks(self) -> list:
        callbacks = super()._create_default_callbacks()
        if os.environ.get("RAY_ADDRESS"):
            return callbacks
        return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]


def _fit(run: Run, cluster: ClusterRecipe, label: str) -> None:
    """Train, and again from the last checkpoint after a failure, where `tried_again` says so.

    Ray Train would do all failures alike: also those that come again, as a loss that turns to NaN.
    """
    if not run.store.is_s3:
        os.makedirs(run.store.path("runs"), exist_ok=True)
    batches, stage = run.batches(run.settings.workers), label.replace(" ", "_")
    progress.event(
        "batches",
        stage=stage,
        arithmetic=f"'{batches.arithmetic}'",
        epochs=batches.plan.epochs,
        steps=batches.plan.steps,
    )
    with progress.remote_bar(label, batches.plan.steps, "steps"), signals.kept():
        for failures in itertools.count(1):
            try:
                _trainer(run, cluster).fit()
                return
            except (ray.train.TrainingFailedError, *_CONTROLLER_LOST) as error:
                cause = _cause(error, label)
                if not tried_again(cause, failures, run.settings.max_failures):
                    raise cause from error
                progress.event(
                    "retry", stage=stage, failure=failures, of=run.settings.max_failures, reason=f"'{cause}'"
                )


def tried_again(cause: CatidError, failures: int, max_failures: int) -> bool:
    """Whether a training that failed so often goes on from its last checkpoint: not where the cause is the same on a rerun."""
    return cause.transient and failures <= max_failures


def _trainer(run: Run, cluster: ClusterRecipe) -> TorchTrainer:
    settings, store, gpus = run.settings, run.store, cluster.gpus_per_worker
    options = ray.data.DataContext.get_current().execution_options
    return _Trainer(
        _loop,
        # As bytes: Ray's controller looks at the config, and would first import all that the workers need.
        train_loop_config={"run": ray.cloudpickle.dumps(run)},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=_COLLECTIVE_S),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
            label_selector=on_pool(cluster.training_pool),
        ),
        datasets={_rows_name(run, rank): span.dataset(store, run.task.reader) for rank, span in enumerate(_spans(run))},
        dataset_config=DataConfig(datasets_to_split=[], execution_options=options),
        run_config=RunConfig(
            name=run.name,
            storage_path=store.path("runs"),
            storage_filesystem=store.arrow_fs if store.is_s3 else None,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _spans(run: Run) -> list[RankRange]:
    world = 1 if run.whole else run.settings.workers
    return [RankRange(run.rows, rank=rank, world=world) for rank in range(world)]


def _rows_name(run: Run, rank: int) -> str:
    return "rows-0" if run.whole else f"rows-{rank}"


def run_name(attempt: Attempt) -> str:
    """Of the folder of checkpoints: kind-key of the artefact, so that a rerun of the same recipe finds them, and so that what is
    left of an abandoned training is known for what it is: no manifest of that kind and key is committed."""
    return f"{attempt.kind}-{attempt.key}"


def clean(store: Store, attempt: Attempt, *, alone: bool) -> None:
    """Delete the run's checkpoints, where the job is `alone` on the store: another may train the same at this moment. Call after
    the commit. What stays is removed by gc."""
    if alone:
        store.delete_folder(f"runs/{run_name(attempt)}")


def _cause(error: Exception, label: str) -> CatidError:
    """The error of ours inside Ray's, as it was raised, and of several one that is the same on a rerun; else a WorkerDied that
    quotes the worker's last words, or a TrainingError where no worker is to blame."""
    failures = getattr(error, "worker_failures", {}).values()
    # Ray Train hands over what a worker raised inside a wrapper that has no public way in.
    ours = [inner for failure in failures if (inner := our_error(getattr(failure, "_base_exc", failure)))]
    if ours:
        return min(ours, key=lambda one: one.transient)
    for failure in failures:
        stage = next((name for name in ("adapter", "quantizer") if name in label), "generator")
        if lack := scarce.named(getattr(failure, "_base_exc", failure), stage):
            return WorkerDied(str(lack))
    text = str(error).strip().splitlines()
    if isinstance(error, _CONTROLLER_LOST):
        return WorkerDied(f"{label} lost its controller: {text[0]}. Rerun to resume from the last checkpoint")
    return (WorkerDied if failures else TrainingError)(
        f"{label} failed: {text[-1] if text else type(error).__name__}. Rerun to resume from the last checkpoint"
    )


def _loop(config: dict) -> None:
    preflight.refuse_other_versions()
    run: Run = ray.cloudpickle.loads(config["run"])
    context = ray.train.get_context()
    rank = context.get_world_rank()

    def hand_in(figures: dict, folder: Path, name: str) -> None:
        ray.train.report(figures, checkpoint=Checkpoint.from_directory(str(folder)), checkpoint_dir_name=name)

    rows = ray.train.get_dataset_shard(_rows_name(run, rank))
    run_training(run, Seat(rank=rank, world=context.get_world_size(), rows=rows, hand_in=hand_in))
