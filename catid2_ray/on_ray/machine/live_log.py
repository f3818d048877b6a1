"""Changes to a serving release, in the store: a numbered series of small objects, each created only if absent.

`live/RELEASE/0000000001.json`, …: every replica of the release applies them in order, so all come to the same state, also
after a restart. Whoever writes a change first tries it on the state at exactly the position that it writes to, so that what does
not fit (a product that is live already, say) is refused and leaves nothing. Series of older versions may hold such changes: all
replicas pass them over. An append on top of the release lets new products keep the IDs that they were given here (`assign`).

A change says when it was made (`at`): later than all that its writer knew, so that no clock which is behind turns two changes
around. Changes that come from another release (`of`) lie many to a record, of the kind "carried"; they keep what they said.

`live/RELEASE/snapshots/0000001000`, …: the net state after every thousand, from which a replica starts (`live_snapshot.py`).
Without it all changes give the same.
"""

import contextlib
import copy
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, CommitConflict, InputError, StorageError
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.live_names import Step
from catid2_ray.on_ray.machine.live_snapshot import Snapshot
from catid2_ray.retrieval.products import Newcomer
from catid2_ray.retrieval.retriever import Retriever

KINDS = ("insert", "withdraw", "restore", "put", "skipped", "carried")
_ATTEMPTS = 20  # writers that may come first before a change is given up
_AT_ONCE = 256  # changes in memory while a series is read
SNAPSHOT_EVERY = 1000  # changes
_SNAPSHOTS = 2  # kept of a release: the newest, and one more should it be damaged
KEPT_KEYS = 10_000  # idempotency keys of a release: the newest
_TICK_S = 1e-6  # between two changes of which the second knew the first
_LONGEST_WAIT_S = 30.0  # between two attempts to follow a series that cannot be read or applied


class Content(NamedTuple):
    """What a product was last put as: digests of its text and of all of it, and the number of that change."""

    text: str
    whole: str
    number: int


class Touched(NamedTuple):
    """When somebody last said whether a product can be found, and when what it is: text, ID, columns, value. 0: never."""

    live: float = 0.0
    content: float = 0.0

    def later(self, other: "Touched") -> "Touched":
        return Touched(max(self.live, other.live), max(self.content, other.content))


class LiveLog:
    """The series of one release. Numbers count from 1 on, without a gap."""

    def __init__(self, store: Store, release: str):
        self.store, self.release = store, release

    def _name(self, number: int) -> str:
        return f"live/{self.release}/{number:010d}.json"

    def count(self, after: int = 0) -> int:
        """The number of the last change, `after` where there is none beyond it; one listing."""
        return releases.last_change(self.store, self.release, after)

    def after(self, number: int) -> Iterator[dict]:
        """The changes beyond this number, in order: one look-up where there is none, else one listing and several records at a
        time. Raises ArtifactError for a damaged one, StorageError."""
        if not self.store.exists(self._name(number + 1)):
            return
        last = self.count(number)
        while number < last:
            names = [self._name(n) for n in range(number + 1, min(number + _AT_ONCE, last) + 1)]
            yield from map(self._record, names, self.store.read_many(names))
            number += len(names)

    def find(self, number: int) -> dict | None:
        """The change of this number, None where there is none. Raises ArtifactError for a damaged one, StorageError."""
        name = self._name(number)
        return self._record(name, self.store.read(name)) if self.store.exists(name) else None

    def _record(self, name: str, data: bytes) -> dict:
        try:
            record = json.loads(data)
            for one in changes_of(record):
                if one["kind"] not in KINDS or not isinstance(one["products"], list):
                    raise ValueError(f"kind {one['kind']!r}")
                Step.of(one)
                if one["kind"] == "put":
                    [Content(*digests, 0) for digests in one["content"].values()]
                if "of" in one:
                    origin(one)
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self.store.uri_of(name)} is no change of products ({error!r}); publish a release that holds the changes after "
                "it, or delete it and those after it"
            ) from None
        return record

    def steps(self) -> list[Step]:
        """What the whole series does to names and IDs."""
        return [Step.of(one) for record in self.after(0) for one in changes_of(record)]

    def snapshot(self) -> Snapshot | None:
        """The newest state that can be read, None where there is none. One beyond the end of the series, of which somebody deleted
        changes, is none: its replica would write on behind a gap, where no other replica looks."""
        for name in reversed([one for one in self.store.names(f"live/{self.release}/snapshots") if one.isdigit()]):
            path = f"live/{self.release}/snapshots/{name}"
            if not self.store.exists(self._name(int(name))):
                progress.event("snapshot_passed_over", uri=self.store.uri_of(path), reason=repr("its change is gone"))
                continue
            try:
                return Snapshot.of_bytes(self.store.read(path))
            except StorageError as error:  # damaged, or deleted since it was listed
                progress.event("snapshot_passed_over", uri=self.store.uri_of(path), reason=repr(str(error)))
        return None

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Nothing happens where there is one already. The newest _SNAPSHOTS stay."""
        folder = f"live/{self.release}/snapshots"
        with contextlib.suppress(CommitConflict):
            self.store.create(f"{folder}/{snapshot.number:010d}", snapshot.to_bytes())
        for name in [name for name in self.store.names(folder) if name.isdigit()][:-_SNAPSHOTS]:
            self.store.delete(f"{folder}/{name}")

    def write(self, number: int, record: dict) -> None:
        """Raises CommitConflict where the number is taken."""
        self.store.create(self._name(number), json.dumps({**record, "by": uuid.uuid4().hex}).encode())


class LiveUpdates:
    """Keeps a retriever at the end of its release's series, and adds to it.

    `applied`: records that it has; `changes`: how many changes they hold; `carried`: release and number of those that were made on
    another release first; `contents`: what each product was last put as; `keys`: idempotency key → the number of its record, and a
    digest of what was asked, of the last KEPT_KEYS; `touched`: product → when its last changes were made. `failing`: why the
    follower cannot go on now, None where it can.
    """

    def __init__(self, retriever: Retriever, log: LiveLog):
        self.retriever, self.log, self.applied = retriever, log, 0
        self.carried: set[tuple[str, int]] = set()
        self.contents: dict[str, Content] = {}
        self.keys: dict[str, tuple[int, str]] = {}
        self.touched: dict[str, Touched] = {}
        self.changes, self._latest, self._part = 0, 0.0, 0  # `_part`: changes of the next record that it has
        self.failing: Exception | None = None
        self._begun = False
        self.snapshotting: threading.Thread | None = None
        self._at_end_s = time.monotonic()
        self._lock, self._ended = threading.Lock(), threading.Event()

    @property
    def lag_s(self) -> float:
        """Seconds since it last was at the end of the series."""
        return time.monotonic() - self._at_end_s

    def catch_up(self) -> int:
        """Apply what others wrote; returns how many changes that were. Raises StorageError, and what applying raised: the change
        does not count then, and is applied by the next call."""
        with self._lock:
            return self._catch_up()

    def _catch_up(self) -> int:
        if not self._begun:
            self._begin()
        before = self.applied
        for record in self.log.after(self.applied):
            for one in changes_of(record)[self._part :]:
                try:
                    apply(self.retriever, one)
                except InputError as error:  # an older version wrote first and validated then
                    self._say("live_change_refused", number=self.applied + 1, reason=repr(str(error)))
                self._note(one, self.applied + 1)
                self._part += 1
            self.applied, self._part = self.applied + 1, 0
        self._at_end_s = time.monotonic()
        return self.applied - before

    def change(self, build: Callable[[], dict | None]) -> dict | None:
        """Write the change that `build` makes of the state as it is now, and apply it; returns it, with its number. None where
        `build` finds that nothing is to be changed.

        `build` is called again where another writer came first. Raises InputError where the change does not fit, CommitConflict
        where others always come first, StorageError; then nothing is written. What else applying raises says that this replica
        does not have the change yet: the series has it.
        """
        with self._lock:
            for _ in range(_ATTEMPTS):
                self._catch_up()
                record = build()
                if record is None:
                    return None
                record = {"at": max(time.time(), self._latest + _TICK_S)} | record
                check(self.retriever, record)
                try:
                    self.log.write(self.applied + 1, record)
                except CommitConflict:
                    continue
                before = self.changes
                apply(self.retriever, record)
                self._note(record, self.applied + 1)
                self.applied += 1
                self._snapshot_after(before)
                return record | {"number": self.applied}
        raise CommitConflict(f"{_ATTEMPTS} other changes came first; try again")

    def change_many(self, build: Callable[["LiveUpdates"], list[dict]]) -> list[dict]:
        """Write several changes as one record; returns them. Nothing is written where there is none.

        `build` gets a copy of the state as it is now, and takes each change into it (`take`) before it makes the next. It is called
        again, with another copy, where another writer came first. Raises as `change`; what `build` raises leaves nothing.
        """
        with self._lock:
            for _ in range(_ATTEMPTS):
                self._catch_up()
                trial = self._copy()
                changes = build(trial)
                if not changes:
                    return []
                one = changes[0] if len(changes) == 1 else {"kind": "carried", "products": [], "changes": changes}
                try:
                    self.log.write(self.applied + 1, one)
                except CommitConflict:
                    continue
                before = self.changes
                self.retriever.live = trial.retriever.live
                for name in _STATE:
                    setattr(self, name, getattr(trial, name))
                self.applied += 1
                self._snapshot_after(before)
                return changes
        raise CommitConflict(f"{_ATTEMPTS} other changes came first; try again")

    def take(self, change: dict) -> None:
        """For `build` of `change_many`: apply a change to the copy. Raises as `apply`."""
        apply(self.retriever, change)
        self._note(change, self.applied + 1)

    def _copy(self) -> "LiveUpdates":
        """The same state; what happens to one of the two, the other does not see."""
        trial = LiveUpdates(copy.copy(self.retriever), self.log)
        trial.retriever.live, trial.applied, trial._begun = self.retriever.live.copy(), self.applied, True
        for name in _STATE:
            setattr(trial, name, copy.copy(getattr(self, name)))
        return trial

    def _begin(self) -> None:
        """Start from a snapshot, if there is one that fits: without it all changes give the same."""
        if (snapshot := self.log.snapshot()) is not None:
            try:
                known = snapshot.known
                carried = {(release, number) for release, number in known["carried"]}
                contents = {name: Content(*values) for name, values in known["contents"].items()}
                keys = {key: (number, request) for key, (number, request) in known["keys"].items()}
                # Earlier versions had no times, and one change a record.
                touched = {name: Touched(*times) for name, times in known.get("touched", {}).items()}
                changes = int(known.get("changes", snapshot.number))
                self.retriever.restore_state(snapshot.tables)
            except (InputError, KeyError, TypeError, ValueError) as error:
                self._say(
                    "snapshot_passed_over", number=snapshot.number, reason=repr(f"{type(error).__name__}: {error}")
                )
            else:
                self.carried, self.contents, self.keys, self.applied = carried, contents, keys, snapshot.number
                self.touched, self.changes, self._latest = (
                    touched,
                    changes,
                    max(map(max, touched.values()), default=0.0),
                )
        self._begun = True

    def _snapshot_after(self, before: int) -> None:
        """Where one of the changes that came on top of `before` is the last of its thousand."""
        if self.changes // SNAPSHOT_EVERY > before // SNAPSHOT_EVERY:
            self.snapshotting = threading.Thread(target=self._snapshot, name="live-snapshot", daemon=True)
            self.snapshotting.start()

    def _snapshot(self) -> None:
        """In a thread of its own: who waits for the change that completed the thousand need not wait for this. Changes that came
        meanwhile are in it, too."""
        try:
            with self._lock:
                if self._part:  # of a record that could not be applied whole
                    return
                tables, number = self.retriever.live_state(), self.applied
                known = {"carried": sorted(self.carried), "contents": dict(self.contents), "keys": dict(self.keys)}
                known |= {"touched": dict(self.touched), "changes": self.changes}
            self.log.write_snapshot(Snapshot(number, tables, known))
        except Exception as error:  # a replica does without; the next thousand is tried again
            self._say("snapshot_not_written", reason=repr(f"{type(error).__name__}: {error}"))

    def _note(self, change: dict, number: int) -> None:
        """What is to be known of a change of record `number`."""
        self.changes += 1
        step = Step.of(change)
        if (at := change.get("at")) is not None:
            self._latest = max(self._latest, at)
            whole = Touched(at, at if change["kind"] in ("insert", "put") else 0.0)
            touched = {one["product_id"]: Touched(content=at) for one in change.get("answer", ())}
            touched |= dict.fromkeys(step.names, whole)
            self.touched |= {name: times.later(self.touched.get(name, times)) for name, times in touched.items()}
        if "of" in change:
            self.carried.add(origin(change))
        if change["kind"] != "put":
            for name in step.names:
                self.contents.pop(name, None)
            return
        for name, digests in change["content"].items():
            self.contents[name] = Content(*digests, number)
        if "key" in change:
            self.keys.pop(change["key"], None)
            self.keys[change["key"]] = number, change["request"]
            if len(self.keys) > KEPT_KEYS:
                del self.keys[next(iter(self.keys))]

    def follow(self, every_s: float, also: Callable[[], object] | None = None) -> None:
        """Catch up now and then, and call `also`, in a thread of this process, until `end`.

        No error ends it: it is said once for each kind, and tried again after twice the time, _LONGEST_WAIT_S at most.
        """

        def work() -> None:
            wait_s, said = every_s, set()
            while not self._ended.wait(wait_s):
                try:
                    self.catch_up()
                    if also is not None:
                        also()
                except Exception as error:
                    self.failing, kind = error, type(error).__name__
                    if kind not in said:
                        self._say("live_changes_not_followed", reason=repr(f"{kind}: {error}"))
                    said.add(kind)
                    wait_s = max(every_s, min(2 * wait_s, _LONGEST_WAIT_S))
                else:
                    if said:
                        self._say("live_changes_followed_again", applied=self.applied)
                    self.failing, wait_s, said = None, every_s, set()

        threading.Thread(target=work, name="live-changes", daemon=True).start()

    def _say(self, event: str, **values) -> None:
        progress.event(event, release=self.log.release, **values)

    def end(self) -> None:
        self._ended.set()


_STATE = ("carried", "contents", "keys", "touched", "changes", "_latest")  # of LiveUpdates, beside its retriever


def changes_of(record: dict) -> list[dict]:
    """The changes that a record holds."""
    return record["changes"] if record["kind"] == "carried" else [record]


def origin(record: dict) -> tuple[str, int]:
    """Release and number of a change that was carried over from the release that it was made on."""
    release, number = record["of"]
    return release, number


def check(retriever: Retriever, record: dict) -> None:
    """Raise InputError where the retriever would refuse the change; nothing changes."""
    apply(retriever, record, check_only=True)


def apply(retriever: Retriever, record: dict, *, check_only: bool = False) -> None:
    """Raises InputError where the change does not fit; it is applied whole or not at all."""
    kind, products = record["kind"], record["products"]
    if kind == "withdraw":
        retriever.withdraw(products, check_only=check_only)
    elif kind == "restore":
        retriever.restore(products, check_only=check_only)
    elif kind == "insert":
        retriever.insert(*_newcomers(retriever, products), check_only=check_only)
    elif kind == "put":
        changed = record["changed"]
        retriever.put(
            *_newcomers(retriever, products),
            changed={one["product_id"]: one["columns"] for one in changed if one.get("columns")},
            values={one["product_id"]: one["value"] for one in changed if "value" in one},
            check_only=check_only,
        )


def _newcomers(retriever: Retriever, products: list[dict]) -> tuple[list[Newcomer], np.ndarray, dict | None]:
    """Newcomers, their codes M×L and columns, as `Retriever.put` takes them."""
    names = sorted({name for one in products for name in one.get("columns", {})})
    columns = {name: [one.get("columns", {}).get(name) for one in products] for name in names}
    newcomers = [
        Newcomer(one["product_id"], one["title"], _vector(one.get("vector")), one.get("value")) for one in products
    ]
    codes_ML = np.array([retriever.space.parse(one["docid"]) for one in products], np.int64)
    return newcomers, codes_ML.reshape(-1, retriever.space.levels), columns or None


def _vector(values: Sequence[float] | np.ndarray | None) -> np.ndarray | None:
    return None if values is None else np.array(values, np.float32)
