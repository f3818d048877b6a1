"""One release as a replica holds it: found whole, asked what it was asked when it was evaluated, and kept from gc.

Opening says no before anybody is answered from it: parts that do not belong together, files that are not what their manifests
say, a machine that has not the memory for one release more, answers that are not those of the evaluation.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts import uses
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import CatidError
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.canary import AnswersDiffer, check_answers, stored_answers
from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.serve import metrics
from catid2_ray.on_ray.serve.carry import Carrier
from catid2_ray.on_ray.serve.newcomers import Newcomers
from catid2_ray.on_ray.serve.puts import Puts
from catid2_ray.on_ray.serve.settings import AppSettings

_SLACK = 1.2  # memory that one more release takes, over the bytes of what is not mapped
# Parts of which a replica holds copies; trie, vectors and columns are mapped, and their pages are the machine's to drop.
_HELD = ("generator", "embeddings", "tuned_encoder", "adapter")
_WAY_OUT = (
    "the one before is served on, and this one is tried again: give replicas more memory, or set follow: false and deploy anew "
    "after a publication"
)


class OutOfMemory(CatidError):
    """There is no room for a second release now; there may be later."""

    transient = True


class Opened:
    """A release, its retriever, and the series of its changes.

    `beside`: another one is served meanwhile, and goes on where this one is refused. `checked`: refuse a release whose answers are
    not those of its evaluation; else that is only said. `given_back`: the share of them that it gave
    back, None where none were kept. Raises ArtifactError, AnswersDiffer, StorageError, OutOfMemory.
    """

    def __init__(
        self, store: Store, name: str, settings: AppSettings, *, beside: bool = False, checked: bool = True
    ):  # fmt: skip
        release = releases.load(store, name)
        self.name, self.created, self.settings = release.name, release.created, settings
        # Before it is opened: gc keeps the releases that replicas name.
        self.use = uses.served(store, name, command="catid2 serve", say=progress.event)
        try:
            self.parts = release.manifests(store)
            if beside:
                check_memory(self.parts, free_memory())
                if settings.device == "cuda":
                    check_gpu_memory(self.parts, free_gpu_memory())
            folder = releases.release_folder(store, release, releases.default_cache())
            try:
                self.retriever = open_retriever(
                    folder, device=settings.device, dtype=settings.dtype, weights=settings.weights, normalize=settings.normalize
                )  # fmt: skip
            except (torch.OutOfMemoryError, MemoryError) as error:
                if not beside:
                    raise
                raise OutOfMemory(f"release {name} does not fit the memory ({error}); {_WAY_OUT}") from error
            try:
                self.given_back = check_answers(self.retriever, stored_answers(store, self.parts), name)
            except AnswersDiffer as error:
                # A deployment that asks for other numbers than were evaluated gets other answers.
                if checked and not settings.other_numbers:
                    raise
                progress.event("answers_differ", release=name, reason=repr(str(error)))
                self.given_back = error.share
            self.retriever.tell = _count_survivors
            self.newcomers = Newcomers(store, self.parts)
            self.updates = LiveUpdates(self.retriever, LiveLog(store, name))
            self.puts = Puts(self.updates, self.newcomers)
            self.carrier, self.carried = Carrier(store, self.updates, self.newcomers), False
            self.updates.catch_up()
            self.catch_up(waits=beside)
        except BaseException:
            self.use.end()
            raise

    def catch_up(self, *, waits: bool) -> None:
        """Take over the changes of this release and, of the releases before, those that are younger than its catalogue.

        With `waits`, an error that may pass (the store is away) is raised, so that the release is not served without them. Any
        other error is logged, the release is served, and the follower tries again."""
        try:
            self._take_over()
        except CatidError as error:
            if waits and error.transient:
                raise
            progress.event("live_changes_not_carried", release=self.name, reason=repr(str(error)))

    def _take_over(self) -> None:
        self.carried = False
        self.carrier.carry()
        self.carried = True
        self.updates.catch_up()

    def follow(self) -> None:
        """Go on doing so in a thread, until `end`."""
        self.updates.follow(self.settings.poll_s, lambda: self.carrier.late() if self.carried else self._take_over())

    def end(self) -> None:
        """Others may delete the release now; who still searches it may go on."""
        self.updates.end()
        self.use.end()


def _count_survivors(alive_B: np.ndarray) -> None:
    for one in alive_B.tolist():
        metrics.observe("catid2_beam_survivors_pct", 100 * one)


def free_memory(
    cgroup: Path = Path("/sys/fs/cgroup"), available: Callable[[], int] = lambda: psutil.virtual_memory().available
) -> int:
    """Bytes that a process may still take: of the machine, and of its control group (version 2) where that is less. Pages of files
    count as free: the kernel drops them when it needs room."""
    try:
        limit, used, lines = (
            (cgroup / name).read_text().strip() for name in ("memory.max", "memory.current", "memory.stat")
        )
        stat = dict(line.split() for line in lines.splitlines())
        used = int(used) - sum(int(stat.get(name, 0)) for name in ("inactive_file", "active_file"))
        return available() if limit == "max" else min(available(), int(limit) - used)
    except (OSError, ValueError):
        return available()


def free_gpu_memory() -> int:
    """Bytes of the replica's GPU that are free, and those that torch keeps of what was freed."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def check_memory(parts: dict[str, Manifest], free: int) -> None:
    """Raise OutOfMemory where the parts that a replica copies do not fit `free` bytes."""
    _check([file for name in _HELD if name in parts for file in _loaded(parts[name])], free, of="memory")


def check_gpu_memory(parts: dict[str, Manifest], free: int) -> None:
    """Raise OutOfMemory where the parts that lie on a GPU, the generator and the trie, do not fit `free` bytes."""
    _check([*parts["generator"].files, *parts["ids"].named("trie/")], free, of="GPU memory")


def _check(files: list[dict], free: int, *, of: str) -> None:
    needed = int(_SLACK * sum(file["bytes"] for file in files))
    if needed > free:
        raise OutOfMemory(
            f"one more release needs about {needed / 1e6:,.0f} MB of {of} beside the one that is served, and {free / 1e6:,.0f} MB "
            f"are free; {_WAY_OUT}"
        )


def _loaded(part: Manifest) -> list[dict]:
    return part.named("encoder/") if part.kind == "embeddings" else part.files
