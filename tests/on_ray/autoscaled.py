"""`python -m tests.on_ray.autoscaled RECIPE`: the pools of cluster.yaml under Ray's autoscaler, whose fake provider starts nodes as
processes of this machine; one reindex submitted as docs/operations.md says; what started and what ran where, as JSON.

Only as the first process of process and network namespaces of its own, whose end ends all that it started: Ray's own tools for this
(AutoscalingCluster) stop every Ray of the machine, and ports are Ray's defaults.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from tests.command import ROOT

BIN = Path(sys.executable).parent
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
STORE_BYTES = 100_000_000
LONGEST_S = 500
DASHBOARD = "http://127.0.0.1:8265"


def fake_config() -> dict:
    """cluster.yaml with the fake provider; pools, labels and bounds are its own, nodes have two CPUs and a small object store."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    nodes = config["available_node_types"]
    for node in nodes.values():
        node["node_config"] = {}
        node["resources"] |= {name: min(2, count) for name, count in node["resources"].items()}
        node["resources"]["object_store_memory"] = STORE_BYTES
    nodes["ray.head.default"] = nodes.pop(config["head_node_type"])  # the name that the fake provider gives the head
    provider = {
        "type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True, "head_node_id": HEAD_ID, "gcs_address": "127.0.0.1:6379",
        "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    kept = ("cluster_name", "max_workers", "upscaling_speed", "idle_timeout_minutes", "available_node_types")
    unused = (
        "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands", "cluster_synced_files",
    )  # fmt: skip
    return {name: config[name] for name in kept} | dict.fromkeys(unused, []) | {
        "provider": provider, "head_node_type": "ray.head.default",
    }  # fmt: skip


def start_head(folder: Path) -> None:
    file = folder / "autoscaling.json"
    file.write_text(json.dumps(fake_config()))
    os.environ |= {
        "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_worker_maximum_startup_concurrency": "2",
    }  # fmt: skip
    os.environ.pop("RAY_ADDRESS", None)
    own = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    subprocess.run(
        [BIN / "ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--autoscaling-config={file}", "--num-cpus=0",
         f"--object-store-memory={STORE_BYTES}", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats"],
        check=True, env=os.environ | own, stdout=sys.stderr,
    )  # fmt: skip


def look(seen: dict[str, set[str]]) -> None:
    """Add to each pool's set the names of the processes that work below its raylets."""
    for raylet in psutil.process_iter(["name"]):
        if raylet.info["name"] != "raylet":
            continue
        try:
            pool = raylet.environ().get("RAY_NODE_TYPE_NAME", "head")
            titles = [" ".join(one.cmdline()) for one in raylet.children(recursive=True)]
        except psutil.Error:
            continue
        seen.setdefault(pool, set()).update(one.split()[0] for one in titles if one.startswith("ray::"))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="as-", dir="/tmp") as folder:  # short: sockets lie below it
        start_head(Path(folder))
        job = subprocess.Popen(
            [BIN / "ray", "job", "submit", "--address", DASHBOARD, "--entrypoint-num-cpus", "1", "--entrypoint-resources",
             '{"data": 1}', "--", sys.executable, "-m", "jobs.reindex", "--recipe", sys.argv[1]],
            stdout=sys.stderr,
        )  # fmt: skip
        seen: dict[str, set[str]] = {}
        until = time.monotonic() + LONGEST_S
        while job.poll() is None and time.monotonic() < until:
            look(seen)
            time.sleep(0.3)
        if job.returncode != 0:
            sys.stderr.write(next(Path(folder).glob("ray/session_2*/logs/monitor.log")).read_text()[-2000:])
        print(json.dumps({"code": job.returncode, "pools": {pool: sorted(names) for pool, names in seen.items()}}))


if __name__ == "__main__":
    main()
