"""Folders on the temporary disk: gone with their work, and where a process was killed, with the next one that comes by."""

import re
import subprocess
import sys
import tempfile

import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.machine import preflight, scratch
from tests.command import ROOT

# Holds a folder with a file until its standard input ends.
HOLDER = """
import sys
from catid2_ray.on_ray.machine import scratch
with scratch.folder("shard") as folder:
    (folder / "rows.npy").write_bytes(bytes(100))
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def disk(tmp_path, monkeypatch):
    disk = tmp_path / "tmp"
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    monkeypatch.setenv("TMPDIR", str(disk))
    return disk


@pytest.fixture
def holder(disk):
    """`holder()` → (a process, the folder that it holds)."""
    started = []

    def start():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", HOLDER], cwd=ROOT, text=True, **pipes))
        return started[-1], disk / started[-1].stdout.readline().strip()

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_a_folder_is_there_for_the_block_and_not_after(disk):
    with scratch.folder("shard") as folder:
        (folder / "deep").mkdir()
        assert folder.parent == disk and "shard" in folder.name
    with pytest.raises(ValueError), scratch.folder("shard"):
        raise ValueError
    assert list(disk.iterdir()) == []


def test_the_next_job_removes_what_killed_processes_left_and_nothing_else(holder, disk, tmp_path, capfd):
    (killed, left), (_, held) = holder(), holder()
    killed.kill()
    killed.wait()
    others = [disk / "tmpabc", disk / "catid2-other"]
    for other in others:
        other.mkdir()
    assert left.exists()
    with scratch.folder("mine") as mine:
        preflight.check_store(Store(tmp_path / "store"))
        assert set(disk.iterdir()) == {held, mine, *others} and (held / "rows.npy").exists()
    assert re.search(f"event=left_behind_removed folders=1 below={disk}", capfd.readouterr().err)


def test_a_folder_that_was_swept_before_it_was_locked_is_made_anew(disk, monkeypatch):
    made, mkdtemp = [], tempfile.mkdtemp

    def swept_at_once(**named) -> str:
        made.append(mkdtemp(**named))
        if len(made) == 1:
            scratch.sweep()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept_at_once)
    with scratch.folder("shard") as folder:
        assert str(folder) == made[1] and folder.is_dir() and len(made) == 2
