"""A release on trial: replicas answer a share of the sessions from it, or ask it beside, before it becomes current.

A trial is a record in `trials/`, numbered like the moves of the pointer, and is of one of them: whatever becomes current, the
trial is over. It keeps what a move of the pointer would keep of live changes, so that the release carries the younger ones while
it is tried, and later when it is promoted.
"""

import json
import math
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from catid2_ray.artifacts import history
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.history import Entry, Left
from catid2_ray.artifacts.manifest import verify
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, CommitConflict, InputError, ReleaseError


class Shares(NamedTuple):
    """`percent` of the sessions are answered from the release on trial; `shadow` per cent of the others ask it beside."""

    percent: float = 0.0
    shadow: float = 0.0

    def check(self) -> "Shares":
        for name, value in self._asdict().items():
            if not (math.isfinite(value) and 0 <= value <= 100):
                raise InputError(f"{name} must be from 0 to 100 per cent, found {value:g}")
        return self


class Trial(NamedTuple):
    """`number` counts the records of trials; `pointer`: the move of the pointer that it is of; `after`, `rolled_back`: as of the
    move that would make the release current."""

    number: int
    release: str
    shares: Shares
    pointer: int
    after: Left | None
    rolled_back: bool


def running(store: Store) -> Trial | None:
    """The trial of now, None where there is none."""
    trial = _last(store)[1]
    return trial if trial is not None and trial.pointer == releases.pointer(store)[0] else None


def begin(store: Store, name: str, shares: Shares, *, seen: Mapping[str, int] | None = None) -> Trial:
    """Put a stored release on trial, or give the trial that it is on other shares. To be called with the store's lease.

    `seen`: release → how many live changes it had before the release's catalogue was read; left out, a trial of before says so,
    or the release was current once. Raises ReleaseError for one that is current, gone, or of which nobody knows that;
    ArtifactError where a part is gone or damaged.
    """
    shares.check()
    pointer, current = releases.pointer(store)
    if current is None:
        raise ReleaseError(f"nothing was published to {store.uri} yet: a trial is beside a release that is current")
    if name == current:
        raise ReleaseError(f"release {name} is current; only another release can be on trial")
    for manifest in releases.load(store, name).manifests(store).values():
        verify(store, manifest)
    number, before = _last(store, of=name)
    rolled_back = any(move.release == name for move in history.entries(store))
    if seen is not None:
        older = {release: count for release, count in seen.items() if release != current}
        after, rolled_back = Left(current, seen.get(current, 0), older), False
    elif before is not None and before.pointer == pointer:
        after, rolled_back = before.after, before.rolled_back
    elif rolled_back:
        after = Left(current, 0, None)
    else:
        raise ReleaseError(
            f"release {name} was never current, and its trial began before {current} was: which live changes it lacks is not "
            "known. Make it again with --trial"
        )
    trial = Trial(number + 1, name, shares, pointer, after, rolled_back)
    _write(store, trial.number, trial._asdict() | {"shares": shares._asdict(), "after": after._asdict()})
    return trial


def end(store: Store) -> Trial | None:
    """End the trial of now; returns it, None where there is none."""
    trial = running(store)
    if trial is not None:
        _write(store, trial.number + 1, {"release": None})
    return trial


def promote(store: Store) -> Trial:
    """Make the release on trial current. To be called with the store's lease. Raises ReleaseError where none is on trial, and
    CommitConflict where something else became current at this moment."""
    trial = running(store)
    if trial is None:
        raise ReleaseError(f"no release of {store.uri} is on trial; `catid2 trial RELEASE --percent 10` begins one")
    for manifest in releases.load(store, trial.release).manifests(store).values():
        verify(store, manifest)
    move = {"release": trial.release, "by": uuid.uuid4().hex, "after": trial.after._asdict()}
    if trial.rolled_back:
        move["rolled_back"] = True
    try:
        store.create(f"current/{trial.pointer + 1:010d}.json", json.dumps(move).encode())
    except CommitConflict:
        raise CommitConflict(
            f"another job published to {store.uri} at this moment, so the trial is over; look at what is current"
        ) from None
    return trial


def moves(store: Store, name: str) -> list[Entry]:
    """The moves of the pointer as they concern release `name`: where it is on trial, with the move that would make it current."""
    found, trial = history.entries(store), running(store)
    if trial is not None and trial.release == name:
        found.append(Entry(trial.pointer + 1, name, trial.rolled_back, trial.after))
    return found


def _write(store: Store, number: int, record: dict) -> None:
    try:
        store.create(f"trials/{number:010d}.json", json.dumps(record).encode())
    except CommitConflict:
        raise CommitConflict(
            f"somebody else changed the trial in {store.uri} at this moment; look and repeat"
        ) from None


def _last(store: Store, of: str | None = None) -> tuple[int, Trial | None]:
    """The number of the last record, 0 where there is none, and its trial; with `of`, the last trial of that release."""
    names = [name for name in store.names("trials") if name.endswith(".json") and name[:-5].isdigit()]
    last, found = int(names[-1][:-5]) if names else 0, None
    for name in reversed(names):
        found = _read(store, f"trials/{name}")
        if of is None or (found is not None and found.release == of):
            return last, found
    return last, None


def _read(store: Store, name: str) -> Trial | None:
    try:
        fields = json.loads(store.read(name))
        if fields["release"] is None:
            return None
        shares, after = Shares(**fields["shares"]), Left(**fields["after"])
        return Trial(**fields | {"shares": shares, "after": after})
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{store.uri_of(name)} is no record of a trial ({error!r}); delete it, then end the trial or begin it anew with "
            "`catid2 trial`"
        ) from None
