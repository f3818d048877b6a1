"""deploy/kuberay/ against the fields that its kinds have, against cluster.yaml's numbers, and against the files that it repeats.

No cluster and no network: the fields of KubeRay's kinds are listed here. Their source is docs/reference/api.md of
ray-project/kuberay at commit 0057210ed5a94e830c864af372577328c3542b44, and for `authOptions` and a group's `labels` the pages "API
Reference" and "KubeRay label-based scheduling" of docs.ray.io, which name KubeRay 1.5.1. What the autoscaler makes of a cluster is
asked of Ray.
"""

from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from catid2_ray.config import Recipe
from catid2_ray.on_ray.serve.settings import AppSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
GROUP = {"rayStartParams": None, "template": "Pod", "labels": None, "resources": None}
FIELDS = {
    "RayCluster": {
        "rayVersion": None, "enableInTreeAutoscaling": None, "autoscalerOptions": "Autoscaler", "headGroupSpec": "Head",
        "workerGroupSpecs": ["Worker"], "authOptions": "Auth", "gcsFaultToleranceOptions": None, "suspend": None, "managedBy": None,
        "headServiceAnnotations": None,
    },
    "Autoscaler": dict.fromkeys(
        ["version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy", "securityContext", "env",
         "envFrom", "volumeMounts"]
    ),
    "Auth": {"mode": {"token", "disabled"}, "secretName": None},
    "Head": GROUP | dict.fromkeys(["serviceType", "headService", "enableIngress"]),
    "Worker": GROUP
    | dict.fromkeys(["groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts", "scaleStrategy"]),
    "RayJob": {
        "rayClusterSpec": "RayCluster", "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode"},
        **dict.fromkeys(
            ["entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "runtimeEnvYAML", "backoffLimit",
             "activeDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submitterPodTemplate",
             "submitterConfig", "metadata", "clusterSelector", "suspend", "jobId", "managedBy", "deletionStrategy"]
        ),
    },
    "RayService": {
        "rayClusterConfig": "RayCluster", "serveConfigV2": None, "upgradeStrategy": "Upgrade", "serveService": None,
        "excludeHeadPodFromServeSvc": None,
    },
    "Upgrade": {"type": {"NewCluster", "None"}},
    # Of Kubernetes 1.34 (its API reference), what these files may use.
    "Pod": {"metadata": None, "spec": "PodSpec"},
    "PodSpec": {
        "containers": ["Container"], "volumes": None, "nodeSelector": None, "tolerations": None, "serviceAccountName": None,
        "restartPolicy": {"Never", "OnFailure", "Always"},
    },
    "Container": dict.fromkeys(["name", "image", "command", "args", "env", "envFrom", "resources", "volumeMounts", "ports"]),
    "CronJob": {
        "schedule": None, "timeZone": None, "concurrencyPolicy": {"Allow", "Forbid", "Replace"}, "jobTemplate": "JobTemplate",
        "startingDeadlineSeconds": None, "successfulJobsHistoryLimit": None, "failedJobsHistoryLimit": None,
    },
    "JobTemplate": {"metadata": None, "spec": "Job"},
    "Job": {"template": "Pod", "backoffLimit": None},
    "NetworkPolicy": {"podSelector": None, "policyTypes": None, "ingress": ["Ingress"]},
    "Ingress": {"from": None, "ports": None},
}  # fmt: skip
VERSIONS = {
    "RayJob": "ray.io/v1", "RayService": "ray.io/v1", "CronJob": "batch/v1", "NetworkPolicy": "networking.k8s.io/v1",
    "ConfigMap": "v1", "ServiceAccount": "v1", "Role": "rbac.authorization.k8s.io/v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1", "Kustomization": "kustomize.config.k8s.io/v1beta1",
}  # fmt: skip


def unknown(value, kind, where: str) -> list[str]:
    """Fields that the kind does not have, and values that it does not take."""
    if kind is None:
        return []
    if isinstance(kind, set):
        return [] if value in kind else [f"{where} is {value!r}, expected one of {sorted(kind)}"]
    if isinstance(kind, list):
        return [fault for place, one in enumerate(value) for fault in unknown(one, kind[0], f"{where}[{place}]")]
    fields = FIELDS[kind]
    faults = [f"{where} has no field {name}" for name in value.keys() - fields.keys()]
    return faults + [
        fault
        for name in value.keys() & fields.keys()
        for fault in unknown(value[name], fields[name], f"{where}.{name}")
    ]


def documents() -> list[dict]:
    return [one for path in sorted(FOLDER.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]


def the(kind: str) -> dict:
    (found,) = [one for one in documents() if one["kind"] == kind]
    return found


@pytest.fixture
def launcher() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def clusters() -> dict[str, dict]:
    return {
        "RayJob": the("RayJob")["spec"]["rayClusterSpec"],
        "RayService": the("RayService")["spec"]["rayClusterConfig"],
    }


@pytest.mark.parametrize("document", documents(), ids=lambda one: one["kind"])
def test_every_document_has_fields_that_its_kind_knows(document):
    kind = document["kind"]
    assert document["apiVersion"] == VERSIONS[kind]
    if kind in FIELDS:
        assert unknown(document["spec"], kind, kind) == []


def test_the_field_lists_catch():
    spec = {"rayClusterSpec": {"authOptions": {"mode": "on"}, "workerGroupSpecs": [{"groupname": "a"}]}}
    assert sorted(unknown(spec, "RayJob", "RayJob")) == [
        "RayJob.rayClusterSpec.authOptions.mode is 'on', expected one of ['disabled', 'token']",
        "RayJob.rayClusterSpec.workerGroupSpecs[0] has no field groupname",
    ]


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_the_pools_are_those_of_the_cluster_file(kind, launcher):
    """As Ray's autoscaler reads both: bounds, resources and labels of each pool, and how long a node may idle."""
    spec = clusters()[kind]
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "a", "namespace": "b"}, "spec": spec})
    pools, ours = dict(derived["available_node_types"]), launcher["available_node_types"]
    head = pools.pop(derived["head_node_type"])
    assert head["resources"]["CPU"] == ours["head"]["resources"]["CPU"] == 0
    assert set(pools) == ({"cpu-data", "gpu-train"} if kind == "RayJob" else {"gpu-serve"})
    for name, pool in pools.items():
        resources = {
            key: value for key, value in pool["resources"].items() if key not in ("memory", "node:__internal_head__")
        }
        (group,) = [one for one in spec["workerGroupSpecs"] if one["groupName"] == name]
        resources["object_store_memory"] = int(group["rayStartParams"]["object-store-memory"])
        assert resources == ours[name]["resources"]
        assert pool["labels"] == ours[name]["labels"] == {"pool": name}
        assert (pool["min_workers"], pool["max_workers"]) == (ours[name]["min_workers"], ours[name]["max_workers"])
    assert derived["idle_timeout_minutes"] == launcher["idle_timeout_minutes"]


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_every_pod_has_the_image_and_the_ray_of_this_project_and_a_token_is_asked_for(kind, launcher):
    spec = clusters()[kind]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {launcher["docker"]["image"]}
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"]["mode"] == "token"
    assert spec["autoscalerOptions"]["version"] == "v2", "labels are nothing to the autoscaler v1"


def test_the_recipe_of_the_config_map_is_the_production_recipe_and_its_pools_exist(launcher):
    recipe = the("ConfigMap")["data"]["production.yaml"]
    assert recipe == (ROOT / "jobs" / "recipes" / "production.yaml").read_text()
    cluster = Recipe.from_yaml(recipe, where="production.yaml").cluster
    pools = launcher["available_node_types"]
    assert "GPU" not in pools[cluster.data_pool]["resources"] and pools[cluster.training_pool]["resources"]["GPU"]


def test_the_nightly_job_runs_the_mounted_recipe_on_a_data_node():
    spec = the("RayJob")["spec"]
    assert yaml.safe_load(spec["entrypointResources"]) == {"data": 1}
    path = spec["entrypoint"].split("--recipe ")[1]
    (data,) = [group for group in spec["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "cpu-data"]
    pod = data["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == the("ConfigMap")["metadata"]["name"]
    assert Path(path).parent == Path(pod["containers"][0]["volumeMounts"][0]["mountPath"])
    assert Path(path).name in the("ConfigMap")["data"]


def test_the_cron_job_creates_that_job_and_may_do_nothing_else():
    pod = the("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (made,) = [
        one
        for one in the("Kustomization")["configMapGenerator"]
        if one["name"] == pod["volumes"][0]["configMap"]["name"]
    ]
    assert made["files"] == ["rayjob.yaml"] and pod["containers"][0]["command"][-1] == "/etc/catid2/rayjob.yaml"
    assert the("RayJob")["metadata"].keys() == {"generateName"}, "each night has a name of its own"
    assert the("Role")["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert pod["serviceAccountName"] == the("RoleBinding")["subjects"][0]["name"]
    assert set(the("Kustomization")["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - {
        "kustomization.yaml", "rayjob.yaml",
    }  # fmt: skip


def test_the_service_is_that_of_the_serve_file_on_gpus():
    served = yaml.safe_load(the("RayService")["spec"]["serveConfigV2"])
    ours = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    ServeDeploySchema.model_validate(served)
    application, original = served["applications"][0], ours["applications"][0]
    AppSettings(**application["args"])
    assert (
        application["import_path"] == original["import_path"] and application["runtime_env"] == original["runtime_env"]
    )
    (deployment,), (base,) = application["deployments"], original["deployments"]
    options = deployment.pop("ray_actor_options")
    assert deployment == base, "numbers are changed in both files"
    assert options["num_gpus"] and options["label_selector"] == {"pool": "gpu-serve"}
    assert served["http_options"] == ours["http_options"] | {
        "host": "0.0.0.0"
    }  # a pod of its own; see networkpolicy.yaml


def test_nobody_but_the_cluster_the_operator_the_gateway_and_what_reads_metrics_may_talk_to_ray():
    rays, machinery, gateway, monitoring = the("NetworkPolicy")["spec"]["ingress"]
    assert "ports" not in rays and rays["from"] == [{"podSelector": the("NetworkPolicy")["spec"]["podSelector"]}]
    assert {port["port"] for port in machinery["ports"]} == {8265, 8000}
    assert [port["port"] for port in gateway["ports"]] == [8000]
    assert [port["port"] for port in monitoring["ports"]] == [8080], "the alerts of docs/operations.md read these"


def test_no_file_holds_a_secret():
    for path in FOLDER.glob("*.yaml"):
        assert "Secret" not in {one["kind"] for one in yaml.safe_load_all(path.read_text())}, path.name
