"""Changes to a serving release, in the store: a numbered series of small objects, each created only if absent.

`live/RELEASE/0000000001.json`, …: every replica of the release applies them in order, so all come to the same state, also
after a restart; a change that does not fit (a product that is live already, say) is refused by all of them alike. A change
belongs to the release that it was made on: a release published later starts from its own catalogue and an empty series. An
append on top of it lets new products keep the IDs that they were given here (`assign/served.py`).
"""

import contextlib
import json
import threading
import uuid
from collections.abc import Callable

import numpy as np

from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, CommitConflict, InputError, StorageError
from catid2_ray.on_ray.machine import progress
from catid2_ray.retrieval.products import Newcomer
from catid2_ray.retrieval.retriever import Retriever

KINDS = ("insert", "withdraw", "restore")
_ATTEMPTS = 20  # writers that may come first before a change is given up


class LiveLog:
    """The series of one release."""

    def __init__(self, store: Store, release: str):
        self.store, self.release = store, release

    def _name(self, number: int) -> str:
        return f"live/{self.release}/{number:010d}.json"

    def read(self, number: int) -> dict | None:
        """The change of this number (from 1 on), None where there is none yet: one look-up, however long the series is."""
        if not self.store.exists(self._name(number)):
            return None
        try:
            record = json.loads(self.store.read(self._name(number)))
            if record["kind"] not in KINDS or not isinstance(record["products"], list):
                raise ValueError(f"kind {record['kind']!r}")
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self.store.uri_of(self._name(number))} is no change of products ({error!r}); publish a release that holds "
                "the changes after it, or delete it and those after it"
            ) from None
        return record

    def given(self) -> dict[str, str]:
        """Product → ID (text) of what was inserted and is live at the end of the series.

        An insert of a product or an ID that an earlier one holds counts for nothing, as replicas refuse it; what the
        release itself holds is not known here. Raises ArtifactError for a damaged change, StorageError.
        """
        had: dict[str, str] = {}
        live: dict[str, str] = {}
        number = 1
        while (record := self.read(number)) is not None:
            number += 1
            if record["kind"] == "insert":
                new = {one["product_id"]: one["docid"] for one in record["products"]}
                if not (new.keys() & live.keys() or set(new.values()) & set(live.values())):
                    had |= new
                    live |= new
            elif record["kind"] == "withdraw":
                for name in record["products"]:
                    live.pop(name, None)
            else:
                live |= {name: had[name] for name in record["products"] if name in had}
        return live

    def write(self, number: int, record: dict) -> None:
        """Raises CommitConflict where the number is taken."""
        self.store.create(self._name(number), json.dumps({**record, "by": uuid.uuid4().hex}).encode())


class LiveUpdates:
    """Keeps a retriever at the end of its release's series, and adds to it. `applied`: changes seen so far."""

    def __init__(self, retriever: Retriever, log: LiveLog):
        self.retriever, self.log, self.applied = retriever, log, 0
        self._lock, self._ended = threading.Lock(), threading.Event()

    def catch_up(self) -> int:
        """Apply what others wrote; returns how many changes that were. Raises StorageError."""
        with self._lock:
            return self._catch_up()

    def _catch_up(self) -> int:
        before = self.applied
        while (record := self.log.read(self.applied + 1)) is not None:
            with contextlib.suppress(InputError):  # whoever wrote it was told
                self._apply(record)
            self.applied += 1
        return self.applied - before

    def change(self, build: Callable[[], dict]) -> dict:
        """Write the change that `build` makes of the state as it is now, and apply it; returns it, with its number.

        `build` is called again where another writer came first. Raises InputError where the change does not fit,
        CommitConflict where others always come first, StorageError.
        """
        with self._lock:
            for _ in range(_ATTEMPTS):
                self._catch_up()
                record = build()
                try:
                    self.log.write(self.applied + 1, record)
                except CommitConflict:
                    continue
                self.applied += 1
                self._apply(record)
                return record | {"number": self.applied}
        raise CommitConflict(f"{_ATTEMPTS} other changes came first; try again")

    def _apply(self, record: dict) -> None:
        retriever, products = self.retriever, record["products"]
        if record["kind"] == "withdraw":
            retriever.live.withdraw(products)
        elif record["kind"] == "restore":
            retriever.live.restore(products)
        else:
            names = sorted({name for one in products for name in one.get("columns", {})})
            columns = {name: [one.get("columns", {}).get(name) for one in products] for name in names}
            newcomers = [
                Newcomer(one["product_id"], one["title"], _vector(one.get("vector")), one.get("value"))
                for one in products
            ]
            codes = np.array([retriever.space.parse(one["docid"]) for one in products], np.int64)
            retriever.insert(newcomers, codes, columns or None)

    def follow(self, every_s: float) -> None:
        """Catch up now and then, in a thread of this process, until `end`. A store that cannot be reached is tried again."""

        def work() -> None:
            while not self._ended.wait(every_s):
                try:
                    self.catch_up()
                except StorageError as error:
                    progress.event("live_changes_not_read", release=self.log.release, reason=repr(str(error)))

        threading.Thread(target=work, name="live-changes", daemon=True).start()

    def end(self) -> None:
        self._ended.set()


def _vector(values: list[float] | None) -> np.ndarray | None:
    return None if values is None else np.array(values, np.float32)
