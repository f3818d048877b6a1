"""One of several processes that work on a store at once: `python -m tests.faults.racer URI KIND SEED ROUNDS CACHE`.

Prints a line for each round: `won`, or the class and the text of the error that told it why not.
"""

import random
import sys
import time
from pathlib import Path

from catid2_ray.artifacts import gc, history, lease, uses
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import prove
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import CatidError, CommitConflict
from tests.storage.conftest import commit_chain


def reindex(store: Store, word: str, draw: random.Random) -> None:
    """As a job does: lease, pointer, artefacts, a look at the lease, publication."""
    with lease.holding(store, command=f"reindex {word}", beat_s=0.3, expires_s=3.0) as held:
        number, _ = releases.pointer(store)
        made = commit_chain(store, word)
        time.sleep(draw.uniform(0, 0.05))
        held.check()
        releases.publish(store, made, after=number)


def publish_alone(store: Store, word: str, draw: random.Random) -> None:
    """As a job whose lease is not asked: the pointer alone decides."""
    number, _ = releases.pointer(store)
    made = commit_chain(store, word)
    time.sleep(draw.uniform(0, 0.05))
    releases.publish(store, made, after=number)


def go_back(store: Store, word: str, draw: random.Random) -> None:
    with lease.holding(store, command="rollback", beat_s=0.3, expires_s=3.0):
        history.rollback(store)


def collect(store: Store, word: str, draw: random.Random) -> None:
    gc.collect(store, keep=draw.randint(1, 3))


def serve(store: Store, word: str, draw: random.Random) -> None:
    """As a replica: it registers, opens, and reads for a while; what it serves must stay."""
    name = releases.pointer(store)[1]
    use = uses.served(store, name, command="serve")
    try:
        release = releases.load(store, name)
        parts = release.manifests(store)
        releases.release_folder(store, release, Path(sys.argv[5]))
        for _ in range(5):
            time.sleep(draw.uniform(0, 0.05))
            for manifest in parts.values():
                prove(store, manifest)
    finally:
        use.end()


def compare(store: Store, word: str, draw: random.Random) -> None:
    """As a job that only reads: gc waits for it, or it for gc."""
    with uses.job(store, command="compare-ids", poll_s=0.05):
        parts = releases.current(store).manifests(store)
        for _ in range(3):
            time.sleep(draw.uniform(0, 0.05))
            for manifest in parts.values():
                prove(store, manifest)


KINDS = {one.__name__: one for one in (reindex, publish_alone, go_back, collect, serve, compare)}

if __name__ == "__main__":
    uri, kind, seed, rounds = sys.argv[1:5]
    store, draw = Store(uri), random.Random(f"{kind} {seed}")
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(rounds)):
        try:
            KINDS[kind](store, f"{kind}-{seed}-{number}", draw)
            print("won", flush=True)
        except CatidError as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
            assert isinstance(error, CommitConflict) or str(error)
        time.sleep(draw.uniform(0, 0.1))
