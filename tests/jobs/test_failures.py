"""What a training's failures lead to: what is the same on a rerun ends the job at once, the rest goes on from a checkpoint.

The same in a job: test_through_ray.py.
"""

import pytest

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
