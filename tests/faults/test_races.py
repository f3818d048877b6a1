"""Several jobs and replicas work on one store at once, and some of them are killed or stand still: at every moment `current`
names a release that is whole, one job wins, and the others say why they did not."""

import contextlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from catid2_ray.artifacts import gc, lease
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import prove
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, CatidError, LeaseError, ReleaseError
from tests.command import ROOT
from tests.s3_server import new_bucket
from tests.storage.conftest import commit_chain

# What a process that did not win may be told, by what it does.
LEASE = "another job works on|lost its lease|a job reads from"
MAY_SAY = {
    "reindex": f"{LEASE}|another job published",
    "publish_alone": "another job published|its part .* is gone|is missing though its manifest",
    "go_back": f"{LEASE}|no release of .* comes before|another job published",
    "collect": LEASE,
    "serve": "no release|is gone|is missing though its manifest is committed|does not exist",
    "compare": "never",
}


class Watcher(threading.Thread):
    """Reads what is current again and again; `faults`: what was wrong with it."""

    def __init__(self, store: Store):
        super().__init__(daemon=True)
        self.store, self.faults, self.looks, self.ended = store, [], 0, threading.Event()

    def run(self):
        while not self.ended.is_set():
            number, name = releases.pointer(self.store)
            try:
                for manifest in releases.load(self.store, name).manifests(self.store).values():
                    prove(self.store, manifest)
                self.looks += 1
            except CatidError as error:
                # It was current when the look began; gc may take it once it is not.
                if releases.pointer(self.store)[0] == number:
                    self.faults.append(str(error))
            time.sleep(0.02)


@contextlib.contextmanager
def racing(store: Store, kinds: list[str], rounds: int, cache):
    """Processes of these kinds that start together; yields them by name."""
    racers = {}
    for seed, kind in enumerate(kinds):
        words = [
            sys.executable,
            "-m",
            "tests.faults.racer",
            store.uri,
            kind,
            str(seed),
            str(rounds),
            str(cache / str(seed)),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        racers[f"{kind} {seed}"] = subprocess.Popen(words, cwd=ROOT, text=True, **pipes)
    try:
        for racer in racers.values():
            line = racer.stdout.readline()
            assert line == "ready\n", racer.stderr.read()[-2000:]
        for racer in racers.values():
            racer.stdin.write("go\n")
            racer.stdin.flush()
        yield racers
    finally:
        for racer in racers.values():
            racer.kill()
            racer.wait()


def said(racers) -> dict[str, list[str]]:
    lines = {}
    for name, racer in racers.items():
        out, err = racer.communicate(timeout=240)
        assert racer.returncode in (0, -signal.SIGKILL), f"{name}: {err[-2000:]}"
        lines[name] = out.splitlines()
    return lines


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path, monkeypatch) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store")
    environment, _ = request.getfixturevalue("s3")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Store(f"{new_bucket(environment)}/races")


def where(store: Store) -> str:
    return "S3" if store.is_s3 else "a disk"


ROUNDS = 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        ["reindex", "reindex"],
        ["publish_alone", "publish_alone", "publish_alone"],
        ["reindex", "go_back", "collect", "serve", "compare"],
    ],
    ids=["two reindex at once", "publish against publish", "reindex, rollback, gc, a replica and a reader"],
)
def test_one_wins_the_others_say_why_and_current_is_always_whole(store, kinds, tmp_path, fault, request):
    releases.publish(store, commit_chain(store, "first"))
    watcher = Watcher(store)
    watcher.start()
    with racing(store, kinds, ROUNDS, tmp_path) as racers:
        lines = said(racers)
    watcher.ended.set()
    watcher.join(60)
    assert watcher.faults == [] and watcher.looks
    told = 0
    for name, heard in lines.items():
        kind = name.split()[0]
        assert len(heard) == ROUNDS
        lost = [line for line in heard if line != "won"]
        assert [line for line in lost if not re.search(MAY_SAY[kind], line)] == []
        told += len(lost)
    assert any("won" in heard for heard in lines.values())
    fault(
        f"{request.node.callspec.id.split('-', 1)[-1]} ({where(store)})", times=len(kinds) * ROUNDS,
        outcome=f"{told} were told why not; `current` whole in {watcher.looks} looks", lost_s=0,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_and_stopped_at_random_the_store_stays_whole(store, tmp_path, fault):
    """SIGKILL, or SIGSTOP for longer than a lease lasts, at random moments."""
    draw = random.Random(21)
    releases.publish(store, commit_chain(store, "first"))
    watcher, kills, stops = Watcher(store), 0, 0
    watcher.start()
    for _ in range(3):
        with racing(store, ["reindex", "reindex", "collect", "serve"], 40, tmp_path) as racers:
            victims = [racer for name, racer in racers.items() if not name.startswith("serve")]
            time.sleep(draw.uniform(0.2, 1.0))
            stopped, killed = draw.sample(victims, 2)
            stopped.send_signal(signal.SIGSTOP)
            time.sleep(draw.uniform(3.5, 4.5))
            killed.kill()
            stopped.send_signal(signal.SIGCONT)
            time.sleep(draw.uniform(0.5, 1.5))
            for racer in racers.values():
                racer.kill()
            kills, stops = kills + len(racers), stops + 1
    watcher.ended.set()
    watcher.join(60)
    assert watcher.faults == []
    # What the killed left does not stand in the way of those who come.
    before = releases.pointer(store)[0]
    with lease.holding(store):
        releases.publish(store, commit_chain(store, "last"), after=before)
    freed = gc.collect(store, keep=1)
    assert releases.current(store).name in freed.kept
    for manifest in releases.current(store).manifests(store).values():
        prove(store, manifest)
    fault(
        f"a job killed at a random moment ({where(store)})",
        times=kills,
        outcome="the next one works; `current` whole throughout",
        lost_s=0,
    )
    fault(
        f"a job stood still for longer than its lease ({where(store)})",
        times=stops,
        outcome="it commits nothing more",
        lost_s=0,
    )


def test_an_append_that_began_before_a_reindex_published_is_not_published(store, fault):
    first = commit_chain(store, "first")
    releases.publish(store, first)
    number, _ = releases.pointer(store)
    appended = commit_chain(store, "appended")
    releases.publish(store, commit_chain(store, "reindexed"), after=number)
    with pytest.raises(CatidError, match="another job published .* while this one ran.*nothing was lost"):
        releases.publish(store, appended, after=number)
    reindexed = releases.current(store)
    assert reindexed.parts["ids"]["digest"] != appended["ids"].digest and len(store.names("releases")) == 3
    fault(
        f"append against reindex ({where(store)})", times=1, outcome="the later one is told; nothing is lost", lost_s=0
    )


def test_gc_does_not_begin_beside_a_job_nor_a_job_beside_gc(store, fault):
    releases.publish(store, commit_chain(store, "first"))
    with lease.holding(store, command="catid2 reindex"), pytest.raises(LeaseError, match="catid2 reindex by .* pid"):
        gc.collect(store, keep=1)
    with (
        lease.holding(store, command="catid2 gc", removes=True),
        pytest.raises(LeaseError, match="catid2 gc by .* pid"),
    ):
        lease.take(store)
    fault(
        f"gc against a running job ({where(store)})",
        times=2,
        outcome="the second is told who holds the lease",
        lost_s=0,
    )


def test_a_release_whose_name_exists_is_that_release_or_refused(store, fault):
    made = commit_chain(store, "first")
    release, moved = releases.publish(store, made)
    releases.publish(store, commit_chain(store, "second"))
    assert moved and releases.publish(store, made)[0] == release, "the same parts are the same release: current again"
    store.write(f"releases/{release.name}.json", b'{"name": "r-000000000000", "parts": {}}')
    releases.publish(store, commit_chain(store, "third"))
    with pytest.raises((ArtifactError, ReleaseError), match=release.name):
        releases.publish(store, made)
    assert releases.pointer(store)[1] not in (release.name, None)
    fault(
        f"a release name that exists ({where(store)})",
        times=2,
        outcome="the same release, or refused by name",
        lost_s=0,
    )
