"""Ray nodes on one machine, each in a folder and with a cache of its own, that can be killed and replaced; and jobs on them."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.command import ROOT, kill_tree


class Nodes:
    """A head without work, and pools of nodes with a label: {pool: (nodes, CPUs of each)}. `killed`: the pools of killed nodes."""

    def __init__(self, folder: Path, pools: dict[str, tuple[int, int]]):
        from ray.cluster_utils import Cluster

        self.folder, self.number, self.killed = folder, 0, []
        self.cpus = {pool: cpus for pool, (_, cpus) in pools.items()}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False,
                "env_vars": {"PYTHONPATH": str(ROOT)},
            },
        )  # fmt: skip
        self.pools = {pool: [self.add(pool) for _ in range(count)] for pool, (count, _) in pools.items()}

    def add(self, pool: str):
        """A node that starts in an empty folder: a relative path that only the driver's folder has is not found there."""
        self.number += 1
        own, before = self.folder / f"node{self.number}", os.getcwd()
        own.mkdir()
        os.chdir(own)
        try:
            return self.cluster.add_node(
                num_cpus=self.cpus[pool], object_store_memory=100_000_000, labels={"pool": pool},
                env_vars={"CATID2_CACHE": str(own / "cache"), "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        finally:
            os.chdir(before)

    def remove(self, node) -> None:
        """SIGKILL to all that runs on a node."""
        (pool,) = [pool for pool, nodes in self.pools.items() if node in nodes]
        self.pools[pool].remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.killed.append(pool)

    def kill(self, pool: str, *, busy: str = "") -> None:
        """The node of this pool, or the one below whose raylet a process of this name runs, and a new one in its place."""
        self.remove(next((node for node in self.pools[pool] if busy and self.runs(node, busy)), self.pools[pool][0]))
        self.pools[pool].append(self.add(pool))

    @staticmethod
    def processes(node, name: str) -> list[psutil.Process]:
        """Those below the node's raylet that have this in their command line."""
        raylet = node.all_processes["raylet"][0].process.pid
        return [one for one in psutil.Process(raylet).children(recursive=True) if name in " ".join(one.cmdline())]

    def runs(self, node, name: str) -> bool:
        return bool(self.processes(node, name))


class Job:
    """`python -m WORDS` in a folder of its own; `lines`: its output so far."""

    def __init__(self, folder: Path, *words: str, **environment: str):
        folder.mkdir(exist_ok=True)
        self.lines, self.started = [], time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=folder, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CATID2_CACHE": str(folder / "cache"), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def shown(self) -> str:
        return "".join(self.lines)

    def reaches(self, true: Callable[[], bool], seconds: float = 900) -> bool:
        """Wait until it is so; False where the job ended, or the time passed, before."""
        deadline = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def until(self, true: Callable[[], bool], what: str) -> None:
        assert self.reaches(true), f"{what} did not come in:\n{self.shown()[-4000:]}"

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait(timeout=60)

    def end(self, seconds: float = 1200) -> int:
        try:
            return self.process.wait(timeout=seconds)
        finally:
            kill_tree(self.process.pid)
            self._reader.join(60)
