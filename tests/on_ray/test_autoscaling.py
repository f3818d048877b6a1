"""The pools of cluster.yaml under Ray's autoscaler, with nodes that its fake provider starts on this machine: labels decide which
pool is started and what runs there."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.command import ROOT, write_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
# A machine of one's own, as far as processes and ports go: Ray's ports are its defaults, and the end of the first process ends all.
NAMESPACES = [
    "unshare",
    *([] if os.geteuid() == 0 else ["--map-root-user"]),
    "--pid",
    "--fork",
    "--mount-proc",
    "--net",
]


@pytest.fixture
def in_namespaces():
    """Words before a command; skipped where this machine lets nobody in."""
    words = [*NAMESPACES, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this machine refuses namespaces for processes and network (unshare)")
    return words


def test_labels_of_the_cluster_file_decide_what_starts_and_what_runs_where(in_namespaces, tiny, tmp_path):
    pools = {"data_pool": "cpu-data", "training_pool": "gpu-train"}
    recipe = write_recipe(tmp_path, tiny | {"store": str(tmp_path / "store"), "cluster": pools})
    words = [*in_namespaces, sys.executable, "-m", "tests.on_ray.autoscaled", str(recipe)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["code"] == 0, done.stderr[-6000:]
    ran = figures["pools"]
    assert [*ran] == ["head", "cpu-data", "gpu-train"], (
        "each pool when it was first asked for, and nobody asked for gpu-serve"
    )

    def where(work: str) -> list[str]:
        return [pool for pool, names in ran.items() if any(work in name for name in names)]

    assert where("MapBatches") == ["cpu-data"], "no data work on the head or a node with a GPU"
    assert where("RayTrainWorker") == ["gpu-train"]
    assert where("JobSupervisor") == ["cpu-data"], "the job's own process, by --entrypoint-resources"
