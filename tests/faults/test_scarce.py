"""A full disk, a full object store, too little memory: the error names the setting to change, and the job goes on when it was."""

import errno
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
import ray.exceptions
import torch

from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError, MachineError, StorageError
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.machine import preflight, scarce
from catid2_ray.on_ray.training.worker import _cause
from tests.command import run, write_recipe
from tests.faults.conftest import digests


@pytest.fixture
def small_disk(tmp_path, request):
    """A disk of 400 kB or what the test's parameter says, and how to make it larger; skipped where this user may mount nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '400k')}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_store_whose_disk_is_full_and_then_larger(no_ray, small_disk, small, undisturbed, monkeypatch, fault):
    disk, enlarge = small_disk
    recipe = Recipe.build(small | {"store": str(disk / "store")})
    with pytest.raises(StorageError, match=r"only 0\.0 GB are free where the store lies"):
        reindex(recipe)
    monkeypatch.setattr(preflight, "LEAST_FREE", 0)
    started = time.monotonic()
    with pytest.raises(
        StorageError, match="No space left on device.*; the disk is full: free some .*CATID2_CACHE.*run the same"
    ):
        reindex(recipe)
    enlarge()
    reindex(recipe)
    assert digests(Store(recipe.store)) == undisturbed[0]
    lost_s = max(0.0, time.monotonic() - started - undisturbed[1])
    fault(
        "the store's disk full in a job", times=1, outcome="named; a rerun on a larger one: same digests", lost_s=lost_s
    )


def test_what_is_scarce_is_named_with_the_setting():
    disk = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
    for error, words in (
        (disk, "ids: a disk is full .*/tmp/x.*CATID2_CACHE .*TMPDIR .*--temp-dir"),
        (ray.exceptions.OutOfDiskError("spilled"), "ids: a disk is full .*--temp-dir of `ray start`"),
        (
            ray.exceptions.ObjectStoreFullError("full"),
            "object store is full .*cluster.object_store_mb .*catalog.rows_per_part",
        ),
        (
            ray.exceptions.OutOfMemoryError("killed"),
            "ids: a worker ran out of memory .*lower ids.workers, ids.bucket_rows",
        ),
        (torch.OutOfMemoryError("CUDA"), "lower ids.workers"),
        (MemoryError(), "lower ids.workers"),
        (ray.exceptions.WorkerCrashedError(), "ids: Ray lost workers or nodes .*Rerun to go on"),
        (ray.exceptions.RayActorError(), "ids: Ray lost workers .*ray status"),
        (ray.exceptions.NodeDiedError("10.0.0.7"), r"lost workers or nodes .*10\.0\.0\.7.*ray logs"),
    ):
        try:
            try:
                raise error
            except type(error) as inner:
                raise RuntimeError("as Ray wraps it") from inner
        except RuntimeError as wrapped:
            found = scarce.named(wrapped, "ids")
        assert isinstance(found, MachineError) and found.exit_code == 11
        assert re.search(words, str(found)), str(found)
    for other in (ValueError("x"), OSError(errno.EIO, "x"), InputError("ours")):
        assert scarce.named(other, "ids") is None
    task = ray.exceptions.RayTaskError("f", "text", disk)
    assert "CATID2_CACHE" in str(scarce.named(task.as_instanceof_cause(), "catalog"))


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["150m"], indirect=True)
def test_a_full_object_store_spills_and_where_that_disk_is_full_too_the_setting_is_named(small_disk, fault):
    disk, held, started = small_disk[0], [], time.monotonic()
    spills = json.dumps({"type": "filesystem", "params": {"directory_path": str(disk)}})
    ray.init(
        address="local", num_cpus=1, object_store_memory=80_000_000, _system_config={"object_spilling_config": spills},
        include_dashboard=False, log_to_driver=False,
    )  # fmt: skip
    try:
        for number in range(4):
            held.append(ray.put(np.full(3_750_000, number, np.float64)))  # 30 MB
        spilled = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
        assert spilled > 30e6 and [ray.get(one)[0] for one in held] == [0, 1, 2, 3]
        with pytest.raises(ray.exceptions.RayError) as full:
            for number in range(20):
                held.append(ray.put(np.full(3_750_000, number, np.float64)))
        found = scarce.named(full.value, "quantizer")
        assert isinstance(found, MachineError) and re.search("--temp-dir|cluster.object_store_mb", str(found))
    finally:
        held.clear()
        ray.shutdown()
    fault(
        "the object store full, then the disk that it spills to", times=2,
        outcome="objects come back from the disk; then the setting is named, exit code 11", lost_s=time.monotonic() - started,
    )  # fmt: skip


def test_a_worker_of_a_training_that_ran_out_of_memory_says_what_to_lower():
    class Failed(Exception):
        worker_failures = {0: torch.OutOfMemoryError("CUDA out of memory")}

    cause = _cause(Failed("x"), "training the generator")
    assert cause.transient and "lower generator.micro_batch" in str(cause)


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_that_ray_kills_for_want_of_memory_end_the_job_and_name_the_setting(tiny, tmp_path, fault):
    """Ray's memory monitor, told that the machine may use next to nothing of its memory."""
    recipe, started = write_recipe(tmp_path, tiny | {"store": str(tmp_path / "store")}), time.monotonic()
    tight = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50", "RAY_task_oom_retries": "1"}
    result = run("jobs.reindex", "--recipe", recipe, env=tight)
    shown = result.stdout + result.stderr
    assert result.returncode == 11, shown[-3000:]
    assert "catalog: a worker ran out of memory" in shown and "lower catalog.rows_per_part or catalog.workers" in shown
    fault(
        "a worker killed for want of memory",
        times=2,
        outcome="the setting is named, exit code 11",
        lost_s=time.monotonic() - started,
    )
