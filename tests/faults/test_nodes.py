"""A head and four nodes on one machine, each in a folder and with a cache of its own. A node is killed in each stage that works
on several, and the driver too: the IDs and the release are, bit for bit, those of a run that nobody disturbed.
"""

import re
import time

import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from tests.command import write_recipe
from tests.faults.conftest import digests
from tests.faults.nodes import Job
from tests.in_process import without_ray

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture
def nodes(make_nodes):
    """Two nodes for data, two for training with room for one worker each."""
    return make_nodes({"cpu-data": (2, 2), "gpu-train": (2, 1)})


def test_nodes_that_are_killed_in_every_stage_and_a_killed_driver_change_no_byte(nodes, tiny, tmp_path, fault):
    two = {"workers": 2, "zero_stage": 1, "max_failures": 3}
    # Many parts, so that the exchange lasts some seconds and its files are seen.
    tiny["catalog"] |= {"synthetic": {"products": 960, "queries": 120, "seed": 3}, "rows_per_part": 20}
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
    job = Job(tmp_path / "driver", "jobs.reindex", "--recipe", str(recipe))

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
    job.kill()
    before, job = job, Job(tmp_path / "driver", "jobs.reindex", "--recipe", str(recipe))
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
    recipe = write_recipe(tmp_path, tiny | {"store": "only_here"})
    job = Job(tmp_path / "driver", "jobs.reindex", "--recipe", str(recipe))
    assert job.end(300) == 2 and "store 'only_here' is a relative path, but this job runs on a cluster" in job.shown()
    fault("a path that only the driver sees", times=1, outcome="refused by name, exit code 2", lost_s=0)
