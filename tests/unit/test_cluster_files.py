"""cluster.yaml against Ray's own schema; serve_config.yaml against Serve's, and against the inequalities that keep it stable."""

import json
from pathlib import Path

import pytest
import ray
import ray.autoscaler
import torch
import yaml
from jsonschema import Draft7Validator
from ray import serve
from ray.serve._private.application_state import override_deployment_info
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from catid2_ray.errors import RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_file_fits_rays_schema(cluster):
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert not [error.message for error in Draft7Validator(schema).iter_errors(cluster)]


def test_the_head_does_no_work_and_the_pools_exist(cluster):
    nodes = cluster["available_node_types"]
    assert nodes[cluster["head_node_type"]]["resources"]["CPU"] == 0
    assert set(nodes) == {"head", "cpu-data", "gpu-train", "gpu-serve"}
    assert nodes["gpu-train"]["resources"]["GPU"] and nodes["gpu-serve"]["resources"]["GPU"]
    assert sum(node.get("max_workers", 0) for node in nodes.values()) <= cluster["max_workers"]


MEMORY_GB = {"m6i.large": 8, "m6i.4xlarge": 64, "g6e.4xlarge": 128, "g6.2xlarge": 32}  # as AWS lists them


def test_object_stores_leave_the_memory_to_workers_and_what_spills_has_a_disk(cluster):
    for name, node in cluster["available_node_types"].items():
        memory = MEMORY_GB[node["node_config"]["InstanceType"]] * 1e9
        store = node["resources"]["object_store_memory"]
        assert 80_000_000 < store <= 0.15 * memory, f"{name}: Ray takes 30 % where nothing is said"
        (disk,) = [one["Ebs"]["VolumeSize"] for one in node["node_config"]["BlockDeviceMappings"]]
        assert disk * 1e9 > 10 * store
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--object-spilling-directory=/tmp/spilled" in cluster[commands][-1]


def test_the_settings_of_health_and_memory_are_settings_of_this_ray(cluster):
    """Ray passes over a variable that it does not know."""
    inside = Path(ray.__file__).parent
    known = (inside / "core" / "src" / "ray" / "gcs" / "gcs_server").read_bytes()
    known += (inside / "dashboard" / "modules" / "job" / "job_supervisor.py").read_bytes()
    asked = {
        word.split("=")[0]
        for commands in ("head_start_ray_commands", "worker_start_ray_commands")
        for word in cluster[commands][-1].split()
        if word.startswith("RAY_")
    }
    assert len(asked) == 6 and all(name.encode() in known for name in asked)


def test_nobody_gets_in_without_the_token_that_every_node_has(cluster):
    """`ray start` takes everybody where nothing is said and no token lies at hand, as on a new machine."""
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in cluster[commands][-1].partition("ray start")[0]


def test_serve_file_is_valid_and_its_numbers_fit_each_other():
    from catid2_ray.on_ray.serve import app as serve_app

    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    deployment = config["applications"][0]["deployments"][0]
    scaling, user = deployment["autoscaling_config"], deployment["user_config"]
    assert deployment["max_surge_percent"] > 0, "else one replica stops before the next starts"
    assert user["max_batch_size"] <= scaling["target_ongoing_requests"] <= deployment["max_ongoing_requests"]
    assert scaling["min_replicas"] >= 1 and scaling["max_replicas"] > scaling["min_replicas"]
    # Scaling down must be slower than the window that the load is averaged over, else replicas come and go in a loop.
    assert scaling["metrics_interval_s"] < scaling["upscale_delay_s"] < scaling["downscale_delay_s"]
    assert scaling["look_back_period_s"] < scaling["downscale_delay_s"]
    assert config["http_options"]["host"] == "127.0.0.1"
    # Replicas that are busy must be seen to be: more may be under way in one than autoscaling aims at, by as much as makes it add.
    assert deployment["max_ongoing_requests"] >= 2 * scaling["target_ongoing_requests"]
    assert scaling["metrics_interval_s"] * 2 <= scaling["look_back_period_s"], "an average of one report is none"
    # A replica that goes must have time for what it has taken; and one that is busy must not be taken for dead.
    assert deployment["graceful_shutdown_timeout_s"] >= config["http_options"]["request_timeout_s"]
    assert serve_app.RetrieverReplica.func_or_class.canary_deadline_s < deployment["health_check_timeout_s"]
    assert user["batch_wait_timeout_s"] * 20 <= config["http_options"]["request_timeout_s"]
    # Requests wait in the replica, not at proxies, which try again only now and then; and it is the replica that refuses.
    assert serve_app.BATCHES["most_waiting"] + user["max_batch_size"] < deployment["max_ongoing_requests"]


def test_the_pool_that_the_serve_file_offers_is_one_of_the_cluster():
    """Its lines are a comment, because one machine has no pools: uncommented they must fit both files of clusters."""
    text = (ROOT / "serve_config.yaml").read_text().replace("# ray_actor_options:", "ray_actor_options:")
    text = text.replace("#   num_", "  num_").replace("#   label_", "  label_")
    options = yaml.safe_load(text)["applications"][0]["deployments"][0]["ray_actor_options"]
    assert options.keys() == {"num_cpus", "num_gpus", "label_selector"}
    asked = options["label_selector"]
    ServeDeploySchema(**yaml.safe_load(text))
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert asked == cluster["available_node_types"]["gpu-serve"]["labels"]
    service = yaml.safe_load((ROOT / "deploy" / "kuberay" / "rayservice.yaml").read_text())["spec"]
    deployment = yaml.safe_load(service["serveConfigV2"])["applications"][0]["deployments"][0]
    assert asked == deployment["ray_actor_options"]["label_selector"]


@pytest.mark.parametrize("device, gpus", [("cpu", None), ("cuda", 1)])
def test_one_field_of_the_serve_file_makes_gpu_replicas(device, gpus, monkeypatch):
    from catid2_ray.on_ray.serve import app as serve_app

    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]
    config["args"]["device"] = device
    asked = dict(serve_app.RetrieverReplica.ray_actor_options)
    monkeypatch.setattr(
        serve.Deployment, "options", lambda self, **given: asked.update(given["ray_actor_options"]) or self
    )
    monkeypatch.setattr(serve.Deployment, "bind", lambda self, settings: settings)
    settings = serve_app.build(serve_app.AppSettings(**config["args"]))

    def started(**deployment) -> dict:
        """What Ray makes of the code's options and of the file's."""
        code = DeploymentInfo(
            version="1", deployment_config=DeploymentConfig(), start_time_ms=0, deployer_job_id="",
            replica_config=ReplicaConfig.create(lambda: None, ray_actor_options=dict(asked)),
        )  # fmt: skip
        (own,) = config["deployments"]
        schema = ServeApplicationSchema.model_validate({**config, "deployments": [{**own, **deployment}]})
        return override_deployment_info({own["name"]: code}, schema)[own["name"]].replica_config.ray_actor_options

    options = started()
    assert settings.device == device and options["num_cpus"] == 1 and options.get("num_gpus") == gpus
    # As before there was the field: what the file says wins.
    assert started(ray_actor_options={"num_cpus": 2, "num_gpus": 0.25})["num_gpus"] == 0.25


def test_a_replica_without_its_gpu_says_what_to_change(monkeypatch):
    from catid2_ray.on_ray.serve import app as serve_app

    kind = serve_app.RetrieverReplica.func_or_class.__mro__
    own = next(one for one in kind if one.__init__.__qualname__ == "RetrieverReplica.__init__")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="device is cuda, but Ray gave this replica no GPU: ray_actor_options"):
        own(serve_app.AppSettings(store="s", device="cuda"))


@pytest.mark.parametrize("wrong", [{"store": "catid2_store"}, {"store": "~/store"}, {"keys": "keys.txt"}])
def test_a_relative_path_in_the_serve_file_is_refused(wrong):
    from catid2_ray.on_ray.serve import app as serve_app

    ((name, path),) = wrong.items()
    with pytest.raises(RecipeError, match=f"{name} '{path}' of the serve file is a relative path.*every node reaches"):
        serve_app.build(serve_app.AppSettings(**{"store": "/shared/store"} | wrong))


def test_serve_file_names_what_the_code_has():
    from catid2_ray.on_ray.serve import app as serve_app

    application = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["applications"][0]
    serve_app.AppSettings(**application["args"])
    assert application["import_path"] == f"{serve_app.__name__}:{serve_app.build.__name__}"
    assert application["deployments"][0]["name"] == serve_app.RetrieverReplica.name
    deployment = application["deployments"][0]
    assert deployment["max_ongoing_requests"] == serve_app.MAX_ONGOING
    assert deployment["max_queued_requests"] == serve_app.MAX_QUEUED
