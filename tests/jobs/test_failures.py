"""What a training's failures lead to: what is the same on a rerun ends the job at once, the rest goes on from a checkpoint.

The same through Ray: test_through_ray.py.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import (
    ArtifactError,
    CollapseError,
    CommitConflict,
    EncoderError,
    InputError,
    RecipeError,
    StorageError,
    TrainingError,
    WorkerDied,
)
from catid2_ray.on_ray.commands import run_verb
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.stages import train_quantizer
from catid2_ray.on_ray.training import worker
from catid2_ray.on_ray.training.worker import _cause, tried_again


@pytest.mark.parametrize("kind", [WorkerDied, StorageError, CommitConflict])
def test_what_may_pass_by_itself_is_tried_again_so_often(kind):
    assert [tried_again(kind("x"), failures, 2) for failures in (1, 2, 3)] == [True, True, False]
    assert not tried_again(kind("x"), 1, 0)


@pytest.mark.parametrize("kind", [TrainingError, CollapseError, RecipeError, InputError, EncoderError, ArtifactError])
def test_what_is_the_same_on_a_rerun_is_not_tried_again(kind):
    assert not tried_again(kind("x"), 1, 9)


class Failed(Exception):
    """As Ray Train raises it: what each worker met, by rank."""

    def __init__(self, *failures: Exception):
        super().__init__("Training failed\nthe last words")
        self.worker_failures = dict(enumerate(failures))


@pytest.mark.parametrize(
    "failures, kind",
    [
        ([OSError("disk")], WorkerDied),
        ([OSError("reset by peer"), TrainingError("the loss is nan")], TrainingError),
        ([StorageError("no answer"), RecipeError("no such model")], RecipeError),
        ([StorageError("no answer"), OSError("reset by peer")], StorageError),
        ([], TrainingError),
    ],
)
def test_the_cause_is_the_error_that_decides(failures, kind):
    cause = _cause(Failed(*failures), "training")
    assert type(cause) is kind
    assert kind is not WorkerDied or "training failed: the last words" in str(cause)


@pytest.mark.parametrize(
    "lost", [ray.exceptions.RayActorError(), ray.exceptions.ActorUnschedulableError("no worker started after 5 tries")]
)
def test_a_training_whose_controller_is_lost_is_tried_again_and_then_named(lost, tmp_path, monkeypatch, capfd):
    """Ray raises these as they are, not as a training that failed: seen on a machine too busy to start a process."""

    def fit():
        raise lost

    run = SimpleNamespace(
        store=Store(tmp_path),
        settings=SimpleNamespace(workers=1, max_failures=2),
        batches=lambda workers: SimpleNamespace(plan=SimpleNamespace(steps=1, epochs=1), arithmetic="1"),
    )
    monkeypatch.setattr(worker, "_trainer", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(progress, "remote_bar", progress.bar)
    with pytest.raises(WorkerDied, match="training the adapter lost its controller: .*Rerun to resume") as raised:
        worker._fit(run, None, "training the adapter")
    assert str(lost).splitlines()[0] in str(raised.value) and raised.value.exit_code == 6
    assert capfd.readouterr().err.count("event=retry") == 2


def failing_once(builds: Path):
    """The quantizer's task; each worker that starts leaves a line, and the first finds a full disk."""

    class FailingOnce(train_quantizer.QuantizerTask):
        def build(self):
            with open(builds, "a") as file:
                file.write("built\n")
            if len(builds.read_text().splitlines()) == 1:
                raise OSError("no space left")
            return super().build()

    return FailingOnce


@pytest.mark.faults
def test_a_disk_that_fails_once_is_tried_again_and_the_training_succeeds(
    no_ray, tiny, tmp_path, monkeypatch, capfd, fault
):
    tiny["store"] = str(tmp_path / "store")
    tiny["quantizer"] |= {"max_failures": 2, "epochs": 2}
    run_verb(Recipe.build(tiny), "embed_catalog")
    monkeypatch.setattr(train_quantizer, "QuantizerTask", failing_once(tmp_path / "builds"))
    _, manifest = run_verb(Recipe.build(tiny), "train_quantizer")
    assert manifest.kind == "quantizer" and manifest.metrics["epochs_done"] == 2
    assert (tmp_path / "builds").read_text().count("built") == 2, "one more attempt, though two were left"
    log = capfd.readouterr().err
    assert log.count("event=retry") == 1 and "failure=1 of=2" in log and "no space left" in log
    fault("a disk that fails once in a training", times=1, outcome="tried again from the last checkpoint", lost_s=0)
