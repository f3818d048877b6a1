"""Labels steer: data work keeps to its pool, and what needs a GPU to the training pool; a Ray of the job's own knows no pools."""

from types import SimpleNamespace

import pytest
import ray
import ray.data
import yaml

from catid2_ray.config import ClusterRecipe
from catid2_ray.on_ray.machine import cluster, parts
from catid2_ray.on_ray.training import worker
from tests.unit.test_cluster_files import ROOT

POOLS = ClusterRecipe(data_pool="cpu-data", training_pool="gpu-train", gpus_per_worker=1)


@pytest.fixture
def joined(monkeypatch):
    """Connects as to a running cluster; returns what `ray.init` was given."""
    given, before = {}, ray.data.DataContext.get_current().copy()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0, "GPU": 1.0, "memory": 1e9})
    yield lambda recipe, workers=0: cluster.connect(recipe, workers=workers) or given
    ray.data.DataContext._set_current(before)


def asked_for(monkeypatch, **options) -> dict:
    """What `map_parts` asks of Ray Data for its tasks or actors."""
    asked = {}
    items = SimpleNamespace(iter_rows=lambda: [])
    dataset = SimpleNamespace(map_batches=lambda work, **limits: asked.update(limits) or items)
    monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: dataset)
    parts.map_parts(print, {}, [{"rows": 1}], workers=2, label="a", unit="rows", **options)
    return asked


def test_data_work_keeps_to_its_pool_and_work_on_gpus_to_the_training_pool(joined, monkeypatch):
    assert joined(POOLS)["address"] == "auto"
    options = ray.data.DataContext.get_current().execution_options
    assert options.label_selector == {"pool": "cpu-data"}
    for task in ({}, {"actors": True}):
        assert "label_selector" not in asked_for(monkeypatch, **task), "it would win over that of all data work"
    assert asked_for(monkeypatch, num_gpus=1)["label_selector"] == {"pool": "gpu-train"}


def test_training_asks_for_its_pool_by_name_and_its_rows_are_read_on_the_data_pool(joined, monkeypatch):
    joined(POOLS)
    made = {}
    monkeypatch.setattr(worker, "_Trainer", lambda loop, **options: made.update(options))
    monkeypatch.setattr(worker, "_spans", lambda run: [])
    store = SimpleNamespace(path=lambda name: f"/tmp/{name}", is_s3=False)
    worker._trainer(SimpleNamespace(settings=SimpleNamespace(workers=2), store=store, name="r"), POOLS)
    scaling = made["scaling_config"]
    assert scaling.label_selector == {"pool": "gpu-train"}
    assert scaling.resources_per_worker == {"CPU": 1, "GPU": 1}
    assert made["dataset_config"]._get_user_execution_options("rows-0").label_selector == {"pool": "cpu-data"}


def test_without_pools_any_node_does(joined, monkeypatch):
    joined(ClusterRecipe(gpus_per_worker=1))
    assert ray.data.DataContext.get_current().execution_options.label_selector is None
    assert asked_for(monkeypatch, num_gpus=1)["label_selector"] is None


@pytest.mark.parametrize(
    "workers, gpus, told",
    [
        (1, 1, None),
        (2, 0, "free_cpus=2 wanted_cpus=3 means="),
        (1, 2, "free_cpus=2 wanted_cpus=2 free_gpus=1 wanted_gpus=2 means="),
    ],
)
def test_a_cluster_without_room_for_the_largest_training_is_a_line_in_the_log(joined, capfd, workers, gpus, told):
    """Ray waits for ever, and says nothing: a worker that holds the last CPU waits for the task that reads its rows."""
    joined(ClusterRecipe(gpus_per_worker=gpus), workers)
    said = capfd.readouterr().err
    assert f"event=few_resources {told}" in said if told else "few_resources" not in said


def test_a_ray_of_its_own_knows_no_pools(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.on_pool("cpu-data") is None


def test_the_pools_of_the_cluster_file_are_those_that_work_can_ask_for():
    nodes = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    pools = {name: node["labels"]["pool"] for name, node in nodes.items() if "labels" in node}
    assert pools == {name: name for name in ("cpu-data", "gpu-train", "gpu-serve")}
    assert "labels" not in nodes["head"] and "GPU" not in nodes["cpu-data"]["resources"]
    assert [name for name, node in nodes.items() if "data" in node["resources"]] == ["cpu-data"]
