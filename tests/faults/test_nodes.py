"""A head and four nodes on one machine, each in a folder and with a cache of its own. A node is killed in each stage that works
on several, and the driver too: the IDs and the release are, bit for bit, those of a run that nobody disturbed.
"""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from tests.command import ROOT, kill_tree, write_recipe
from tests.faults.conftest import digests
from tests.in_process import without_ray

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3000)]


class Nodes:
    """A cluster of which single nodes can be killed and replaced: two for data, two for training with room for one worker each."""

    def __init__(self, folder: Path):
        from ray.cluster_utils import Cluster

        self.folder, self.number, self.killed = folder, 0, []
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False},
        )
        self.pools = {
            "cpu-data": [self.add("cpu-data", 2) for _ in range(2)],
            "gpu-train": [self.add("gpu-train", 1) for _ in range(2)],
        }

    def add(self, pool: str, cpus: int):
        """A node that starts in an empty folder: a relative path that only the driver's folder has is not found there."""
        self.number += 1
        own, before = self.folder / f"node{self.number}", os.getcwd()
        own.mkdir()
        os.chdir(own)
        try:
            return self.cluster.add_node(
                num_cpus=cpus, object_store_memory=100_000_000, labels={"pool": pool},
                env_vars={"CATID2_CACHE": str(own / "cache"), "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        finally:
            os.chdir(before)

    def kill(self, pool: str, *, busy: str = "") -> None:
        """The node of this pool, or the one below whose raylet a process of this name runs, and a new one in its place."""
        node = next((node for node in self.pools[pool] if busy and self.runs(node, busy)), self.pools[pool][0])
        self.pools[pool].remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.killed.append(pool)
        self.pools[pool].append(self.add(pool, {"cpu-data": 2, "gpu-train": 1}[pool]))

    @staticmethod
    def runs(node, name: str) -> bool:
        raylet = node.all_processes["raylet"][0].process.pid
        return any(name in " ".join(one.cmdline()) for one in psutil.Process(raylet).children(recursive=True))


@pytest.fixture
def nodes(tmp_path_factory, monkeypatch):
    monkeypatch.setenv(
        "RAY_AUTH_MODE", "disabled"
    )  # as this process was when it imported Ray; tokens: jobs/test_submit.py
    monkeypatch.setenv("RAY_worker_maximum_startup_concurrency", "2")
    made = Nodes(tmp_path_factory.mktemp("nodes"))
    monkeypatch.setenv("RAY_ADDRESS", made.cluster.address)
    yield made
    made.cluster.shutdown()


class Job:
    """`python -m jobs.reindex` in a folder of its own; `lines`: its output so far."""

    def __init__(self, recipe: Path, folder: Path, **environment):
        folder.mkdir(exist_ok=True)
        self.lines, self.started = [], time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.reindex", "--recipe", str(recipe)], cwd=folder, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CATID2_CACHE": str(folder / "cache"), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def shown(self) -> str:
        return "".join(self.lines)

    def until(self, true, what: str, seconds: float = 900) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None and time.monotonic() < deadline, (
                f"{what} did not come in:\n{self.shown()[-4000:]}"
            )
            time.sleep(0.01)

    def end(self, seconds: float = 1200) -> int:
        try:
            return self.process.wait(timeout=seconds)
        finally:
            kill_tree(self.process.pid)


def test_nodes_that_are_killed_in_every_stage_and_a_killed_driver_change_no_byte(nodes, tiny, tmp_path, fault):
    two = {"workers": 2, "zero_stage": 1, "max_failures": 3}
    tiny["catalog"] |= {"rows_per_part": 20}
    tiny["embedding"] |= {"workers": 2}
    tiny["ids"] |= {"workers": 3}
    tiny["quantizer"] |= two
    tiny["generator"] |= two | {"checkpoint_every_steps": 3}
    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        reindex(Recipe.build(tiny | {"store": str(tmp_path / "undisturbed")}))
    expected = digests(Store(tmp_path / "undisturbed"))

    store = Store(tmp_path / "store")
    recipe = write_recipe(
        tmp_path, tiny | {"store": store.uri, "cluster": {"data_pool": "cpu-data", "training_pool": "gpu-train"}}
    )
    job = Job(recipe, tmp_path / "driver")

    def files(pattern: str) -> list[str]:
        return store.fs.glob(f"{store.uri}/{pattern}")

    def kill_at(pattern: str, pool: str, stage: str, *, busy: str) -> None:
        """When the first such file is there, and before the stage is committed."""
        job.until(lambda: files(pattern), stage)
        nodes.kill(pool, busy=busy)
        assert not any(f"event=commit stage={stage}" in line for line in job.lines), (
            f"{stage} was done before its node was dead"
        )

    kill_at("artifacts/embeddings/*/*/part-*.parquet", "cpu-data", "embeddings", busy="MapWorker")
    job.until(lambda: "epochs_done=1" in job.shown(), "a checkpoint of the quantizer")
    assert [nodes.runs(node, "RayTrainWorker") for node in nodes.pools["gpu-train"]] == [True, True], (
        "one worker on each of two nodes"
    )
    nodes.kill("gpu-train", busy="RayTrainWorker")
    kill_at("artifacts/ids/*/*/exchange/codes-*.arrow", "cpu-data", "ids", busy="MapBatches")
    kill_at("artifacts/ids/*/*/exchange/moves-*.arrow", "cpu-data", "ids", busy="MapBatches")
    job.until(
        lambda: re.search("event=checkpoint stage=training_the_generator epochs_done=[1-9]", job.shown()),
        "the generator",
    )
    kill_tree(job.process.pid)
    before, job = job, Job(recipe, tmp_path / "driver")
    assert job.end() == 0, job.shown()[-4000:]
    assert digests(store) == expected
    shown = before.shown()
    assert (
        "event=retry stage=training_the_quantizer" in shown
        and "event=resume stage=training_the_generator" in job.shown()
    )
    assert "event=start stage=ids" not in job.shown()
    for name in ("embedding", "training", "coding", "the collision exchange"):
        fault(
            f"a node killed during {name}",
            times=1,
            outcome="same digests, a new node took its place",
            lost_s=_lost(shown, name),
        )
    fault(
        "the driver killed during a training",
        times=1,
        outcome="the same command ends in the same digests",
        lost_s=_again(job),
    )


def _lost(shown: str, name: str) -> float:
    """Seconds of the stage, which is at most what was lost in it."""
    stage = {"embedding": "embeddings", "training": "quantizer"}.get(name, "ids")
    return float(re.search(rf"event=commit stage={stage} .*seconds=([\d.]+)", shown)[1])


def _again(job: Job) -> float:
    """Seconds until the training went on, from where its last checkpoint was."""
    return next((time.monotonic() - job.started for line in job.lines if "event=resume" in line), 0.0)


def test_a_path_that_only_the_driver_sees_is_found_out(nodes, tiny, tmp_path, fault):
    driver = tmp_path / "driver"
    recipe = write_recipe(tmp_path, tiny | {"store": "only_here"})
    job = Job(recipe, driver)
    assert job.end(300) == 2 and "store 'only_here' is a relative path, but this job runs on a cluster" in job.shown()
    fault("a path that only the driver sees", times=1, outcome="refused by name, exit code 2", lost_s=0)
