"""Join the cluster that the job runs in, or start a Ray of its own; and watch what memory the job takes.

A job started by `ray job submit` (or with RAY_ADDRESS set) joins that cluster. Any other run starts a private Ray that
ends with it, and never joins one that happens to run on the host.
"""

import contextlib
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import psutil
import ray

from catid2_ray.artifacts.store import S3_ENVIRONMENT
from catid2_ray.config import ClusterRecipe
from catid2_ray.on_ray.machine import preflight, progress, ranker, signals

# For a Ray of our own only. Workers inherit this process's environment, which spares the set-up of a runtime_env; and idle
# ones are kept, since on few cores Python was seen starting anew, second after second, for tasks that are short.
_PRIVATE_RAY = {
    "RAY_idle_worker_killing_time_threshold_ms": "120000",
    "RAY_num_workers_soft_limit": "8",
    # Notices of Ray's C++ side (restarts of actors, number of workers) would tear the progress display.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_maximum_startup_concurrency": "4",
    # An epoch's checkpoint waits for the controller's next look; and nobody takes the machine that one runs on oneself away.
    # A task that the machine has no memory for would else be tried for ever.
    "RAY_task_oom_retries": "2",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

_SAMPLING_SHARE = 0.02  # of a core, that watching the memory may take


def worker_environment(cluster: ClusterRecipe) -> dict[str, str]:
    """Environment of every worker. Holds no secrets: Ray shows it in its dashboard."""
    threads = str(cluster.threads_per_worker)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(cluster.worker_start_timeout_s),
        **S3_ENVIRONMENT,
    }
    if not cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    if os.environ.get("RAY_ADDRESS"):  # elsewhere workers run what this process runs
        environment[preflight.VERSIONS] = preflight.versions()
    if permitted := os.environ.get(ranker.VARIABLE):
        environment[ranker.VARIABLE] = permitted
    return environment


_WITHOUT_RAY = False


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Inside, no Ray is started and `map_parts` works in this process, part after part: for a look at small tables."""
    global _WITHOUT_RAY
    before, _WITHOUT_RAY = _WITHOUT_RAY, True
    try:
        yield
    finally:
        _WITHOUT_RAY = before


def is_without_ray() -> bool:
    return _WITHOUT_RAY


def connect(cluster: ClusterRecipe, *, workers: int = 0, dashboard: bool = False) -> None:
    """Idempotent. Logs of workers stay in Ray's files; what they have to say reaches the terminal as progress. The handlers of
    SIGINT and SIGTERM stay as they are.

    `workers`: the largest training. A Ray started here offers two CPUs more, or the data tasks that feed the workers would
    wait for CPUs that the workers hold, for ever.
    """
    if ray.is_initialized() or _WITHOUT_RAY:
        return
    for name in ("ray", "ray.data", "ray.train", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    environment, quietly = worker_environment(cluster), contextlib.nullcontext()
    if os.environ.get("RAY_ADDRESS"):
        address = {"address": "auto", "runtime_env": {"env_vars": environment}}
    else:
        os.environ.update(environment)
        for name, value in _PRIVATE_RAY.items():
            os.environ.setdefault(name, value)
        quietly = without_notice()
        address = {
            "address": "local",
            "num_cpus": max(cluster.logical_cpus, (os.cpu_count() or 1) + 2, workers + 2),
            "object_store_memory": cluster.object_store_mb * 1_000_000,
            "include_dashboard": dashboard,
        }
    with signals.kept(), quietly:
        ray.init(**address, **quiet)
    if os.environ.get("RAY_ADDRESS"):
        _tell_of_lack(cluster, workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = on_pool(cluster.data_pool)
    context.set_config(_GPU_POOL, on_pool(cluster.training_pool))


def _tell_of_lack(cluster: ClusterRecipe, workers: int) -> None:
    """One line in the log where less is free than the largest training takes at once: a CPU a worker, and one for the task that
    reads its rows. Ray waits for what is missing without a word and for ever; an autoscaler brings it, so it is no error here."""
    free = ray.available_resources()
    wanted = {"CPU": workers + 1, "GPU": workers * cluster.gpus_per_worker}
    if all(free.get(name, 0) >= count for name, count in wanted.items()):
        return
    figures = {}
    for name, count in wanted.items():
        if count:
            figures |= {f"free_{name.lower()}s": f"{free.get(name, 0):g}", f"wanted_{name.lower()}s": f"{count:g}"}
    progress.event("few_resources", **figures, means="'the job waits until nodes come or other jobs end'")


_GPU_POOL = "catid2_gpu_pool"


def on_pool(pool: str | None) -> dict[str, str] | None:
    """What a task must ask for to run on the nodes of a pool; None for any node, as in a Ray that this job started."""
    return {"pool": pool} if pool and os.environ.get("RAY_ADDRESS") else None


def on_gpu_pool() -> dict[str, str] | None:
    """`on_pool` for data work that needs a GPU."""
    return ray.data.DataContext.get_current().get_config(_GPU_POOL)


@contextlib.contextmanager
def without_notice() -> Iterator[None]:
    """Drop the line in which Ray's C++ side tells that it heeds RAY_BACKEND_LOG_LEVEL, which no setting silences. What else is
    written to standard error in this block, by whatever thread, comes at its end."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            caught.seek(0)
            for line in caught:
                if b"RAY_BACKEND_LOG_LEVEL" not in line:
                    os.write(2, line)


def disconnect() -> None:
    if ray.is_initialized():
        ray.shutdown()


class PeakMemory:
    """Samples the summed PSS of this job's processes on this node, each second or as often as takes two hundredths of a core
    (the kernel walks all pages of a process to tell its PSS); the object store is part of it.

    PSS counts a shared page once over all who map it, so the pages of the object store, which the raylet maps, are in the
    sum exactly once. On a running cluster the processes are this one's and those below the node's raylet.
    """

    def __init__(self, interval_s: float = 1.0):
        self.bytes = 0
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def lap(self) -> int:
        """The peak since the last lap."""
        self._sample()
        peak, self.bytes = self.bytes, 0
        return peak

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self):
        while not self._stop.is_set():
            started = time.thread_time()
            self._sample()
            self._stop.wait(max(self._interval, (time.thread_time() - started) / _SAMPLING_SHARE))

    def _sample(self):
        self.bytes = max(self.bytes, sum(_pss(process.pid) for process in _job_processes()))


def _job_processes() -> list[psutil.Process]:
    me = psutil.Process()
    processes = {process.pid: process for process in [me, *me.children(recursive=True)]}
    if os.environ.get("RAY_ADDRESS"):
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "raylet":
                try:
                    processes |= {child.pid: child for child in [process, *process.children(recursive=True)]}
                except psutil.NoSuchProcess:
                    continue
    return list(processes.values())


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            for line in lines:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
