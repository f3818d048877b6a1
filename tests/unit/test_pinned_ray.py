"""What the training rim relies on inside Ray Train: two private methods that are overridden, and so a pin below the next minor."""

import inspect
import tomllib
from pathlib import Path

import pytest
import ray
from ray.train.torch import TorchTrainer

from catid2_ray.on_ray.training.worker import _Trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name, parameters", [("_create_default_callbacks", ["self"]), ("_register_sigint_handler", ["self", "controller"])]
)
def test_the_overridden_methods_of_ray_train_are_there_with_their_signatures(name, parameters):
    assert [*inspect.signature(getattr(TorchTrainer, name)).parameters] == parameters
    assert [*inspect.signature(getattr(_Trainer, name)).parameters] == parameters
    assert name in vars(_Trainer), "no longer overridden: delete its line here, and the pin with the last one"


def test_the_callback_that_is_left_out_is_one_of_rays():
    from ray.train.v2.api import data_parallel_trainer

    assert "PlacementGroupCleanerCallback" in vars(data_parallel_trainer)


def test_ray_is_pinned_below_the_next_minor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "ray[train,data,serve]>=2.60,<2.61" in project["dependencies"]
    assert ray.__version__.split(".")[:2] == ["2", "60"]
