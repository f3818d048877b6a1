"""A job that is killed in either training and run again ends in the same IDs and the same release content, and so does one whose
training workers die. The job that nobody disturbs, and the last one, run without Ray.

Workers that die while IDs are assigned: tests/on_ray/test_assign_workers.py.
"""

import threading
import time

import psutil
import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from tests.command import run_until, write_recipe
from tests.in_process import without_ray

pytestmark = pytest.mark.cluster
# Two training workers: resuming then has to put ZeRO's partitions of both ranks back.
TWO_WORKERS = {"workers": 2, "zero_stage": 1}


def digests(uri) -> dict[str, str]:
    store = Store(uri)
    return {part: manifest.digest for part, manifest in releases.current(store).manifests(store).items()}


class WorkerKiller(threading.Thread):
    """SIGKILLs one training worker of this process's jobs as soon as the generator's run has handed in a checkpoint."""

    def __init__(self, store: Store):
        super().__init__(daemon=True)
        self.store, self.before, self.killed = store, self.checkpoints(store), None

    @staticmethod
    def checkpoints(store: Store) -> set[str]:
        runs = [name for name in store.names("runs") if name.startswith("generator-")]
        return {name for run in runs for name in store.names(f"runs/{run}") if name.startswith("step-")}

    def run(self):
        while self.checkpoints(self.store) <= self.before:
            time.sleep(0.02)
        family = psutil.Process().children(recursive=True)
        worker = next(process for process in family if "RayTrainWorker" in " ".join(process.cmdline()))
        worker.kill()
        self.killed = worker.pid


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_killed_jobs_end_in_the_same_digests(tiny, tmp_path, fault):
    tiny["quantizer"] |= TWO_WORKERS
    tiny["generator"] |= TWO_WORKERS | {"checkpoint_every_steps": 3, "validate_queries": 20, "epochs": 10}
    undisturbed = write_recipe(tmp_path, tiny)
    with without_ray():
        reindex(Recipe.load(undisturbed, [f"store={tmp_path}/a"]))

    # Other numbers of actors, too: what they make does not depend on them.
    others = [f"store={tmp_path}/b", "ids.workers=2", "embedding.workers=2", "generator.max_failures=1"]
    job = ["jobs.reindex", "--recipe", undisturbed, *(word for change in others for word in ("--set", change))]
    started = time.monotonic()
    run_until(r"event=checkpoint stage=training_the_quantizer_\(cat_id2\) epochs_done=[345]", *job)
    killer = WorkerKiller(Store(tmp_path / "b"))
    killer.start()
    seen = run_until("event=checkpoint stage=training_the_generator epochs_done=[5-9]", *job)
    assert not any("stage=training_the_quantizer_(cat_id2) epochs_done=1" in line for line in seen), "it went on"
    assert killer.killed and sum("event=retry stage=training_the_generator" in line for line in seen) == 1
    with without_ray():
        last = reindex(Recipe.load(undisturbed, others))
    assert "ids" not in last.made and "generator" in last.made
    assert last.parts["generator"].metrics["best_score"] > 0
    before, after = digests(f"{tmp_path}/a"), digests(f"{tmp_path}/b")
    assert before["ids"] == after["ids"]
    assert before == after
    lost_s = max(0.0, time.monotonic() - started - last.parts["generator"].metrics["seconds"])
    fault("a training's driver, then a worker, then the driver killed", times=3, outcome="same digests", lost_s=lost_s)
    assert not (tmp_path / "b" / "runs").exists() or not any((tmp_path / "b" / "runs").iterdir())
