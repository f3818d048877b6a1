"""The lease of a store: one job at a time makes, publishes, rolls back or removes.

`lease/0000000001.json`, …: a numbered series, each created only if absent; the highest number holds the lease until
`NUMBER.released` is there, or until the heartbeat beside it, which the holder rewrites, is older than the record's `expires_s` by
the store's clock. Then the next number may be created. A holder that hung wakes up to a higher number than its own and must
neither commit nor publish: `check` says so.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from catid2_ray.artifacts import holder
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import CommitConflict, LeaseError, StorageError

BEAT_S, EXPIRES_S, POLL_S = 5.0, 60.0, 2.0
_SAY_AGAIN_S = 60.0
_RECORD = re.compile(r"(\d{10})\.json")

Say = Callable[..., None]  # of an event: its name, then keyword arguments; `progress.event`


def unsaid(name: str, **values) -> None:
    pass


class State(NamedTuple):
    """`number` 0 and `record` None: nobody ever held it. `silent_s`: seconds since the last heartbeat."""

    number: int
    record: dict | None
    silent_s: float
    released: bool

    @property
    def is_free(self) -> bool:
        return self.record is None or self.released or self.is_dead

    @property
    def is_dead(self) -> bool:
        return self.silent_s > self.record.get("expires_s", EXPIRES_S) or holder.is_gone(self.record)


def look(store: Store) -> State:
    """Who holds the lease of a store, or held it last."""
    while True:
        listed, now = holder.listing_now(store, "lease")
        number = _highest(listed)
        if not number:
            return State(0, None, 0.0, True)
        if (record := _read(store, number)) is not None:
            break
    name = f"{number:010d}"
    beats = [listed[file].modified for file in (f"{name}.json", f"{name}.heartbeat") if file in listed]
    return State(number, record, max(0.0, now - max(beats)), f"{name}.released" in listed)


def _highest(names) -> int:
    return max((int(match[1]) for match in map(_RECORD.fullmatch, names) if match), default=0)


def _read(store: Store, number: int) -> dict | None:
    """A record; empty where it cannot be read, which its heartbeat survives; None where it is gone, because others took the lease
    since it was listed."""
    name = f"lease/{number:010d}.json"
    try:
        record = json.loads(store.read(name))
    except ValueError:
        return {}
    except StorageError:
        if store.exists(name):
            raise
        return None
    return record if isinstance(record, dict) else {}


class Lease:
    """A lease that this process holds, until `release`."""

    def __init__(self, store: Store, number: int, record: dict, *, beat_s: float):
        self.store, self.number, self.record = store, number, record
        self._heartbeat = holder.Heartbeat(self._beat, beat_s)

    def _name(self, ending: str) -> str:
        return f"lease/{self.number:010d}.{ending}"

    def _beat(self) -> None:
        self.store.write(self._name("heartbeat"), b"")

    def check(self) -> None:
        """Raise LeaseError where another job has taken the lease since: what was being made must not be committed."""
        record = None
        while record is None:
            number = _highest(self.store.names("lease"))
            record = _read(self.store, number) if number else {}
        if record.get("id") != self.record["id"]:
            taken = f"{holder.sentence(record)} has taken it" if record else "its record was deleted"
            raise LeaseError(
                f"this job lost its lease of {self.store.uri}: {taken}, because its own heartbeat was older than "
                f"{self.record['expires_s']:g} s (a process or a machine that stood still, a store that could not be reached). "
                "What was committed stays, nothing more was; rerun to go on from it"
            )

    def release(self) -> None:
        """Give the lease back. Where the store cannot be reached, it expires by itself."""
        self._heartbeat.stop()
        with contextlib.suppress(StorageError), self.store.impatient():
            self.store.write(self._name("released"), b"")


def take(
    store: Store, *, wait: bool = False, command: str | None = None, removes: bool = False, say: Say = unsaid,
    beat_s: float = BEAT_S, expires_s: float = EXPIRES_S, poll_s: float = POLL_S,
) -> Lease:  # fmt: skip
    """The lease of a store. LeaseError where another job holds it, unless `wait`, which comes back when it is free.

    `removes`: its holder deletes what no release names, so that even those without a lease (`uses.job`) wait for its end.
    """
    said = -_SAY_AGAIN_S
    while True:
        state = look(store)
        if state.is_free:
            record = holder.describe(command) | {"expires_s": expires_s, "removes": removes}
            if _create(store, state.number + 1, record):
                if state.record and not state.released:
                    say("lease_taken_over", of=f"'{holder.sentence(state.record)}'", silent_s=round(state.silent_s))
                return Lease(store, state.number + 1, record, beat_s=beat_s)
            continue
        if not wait:
            raise LeaseError(_refusal(store, state))
        if time.monotonic() - said >= _SAY_AGAIN_S:
            said = time.monotonic()
            say("lease_wait", of=f"'{holder.sentence(state.record)}'", silent_s=round(state.silent_s))
        time.sleep(poll_s)


def _create(store: Store, number: int, record: dict) -> bool:
    """Whether this record holds the lease now; what came before it is deleted."""
    try:
        store.create(f"lease/{number:010d}.json", json.dumps(record).encode())
    except CommitConflict:
        return False
    names = store.names("lease")
    if _highest(names) != number:  # looked long ago: others came, went, and deleted the number that was there then
        store.delete(f"lease/{number:010d}.json")
        return False
    for name in names:
        if name[:10].isdigit() and int(name[:10]) < number:
            store.delete(f"lease/{name}")
    return True


def _refusal(store: Store, state: State) -> str:
    expires_s = state.record.get("expires_s", EXPIRES_S)
    return (
        f"another job works on {store.uri}: {holder.sentence(state.record)}; its last heartbeat was {state.silent_s:.0f} s ago. "
        "Wait for its end: a command that has --wait does. If it was killed on another machine, its lease ends "
        f"{expires_s:g} s after its last heartbeat: rerun then"
    )


@contextlib.contextmanager
def holding(store: Store, **options) -> Iterator[Lease]:
    """`take` for the time of a block, given back whatever way it ends."""
    lease = take(store, **options)
    try:
        yield lease
    finally:
        lease.release()
