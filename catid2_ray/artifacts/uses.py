"""What is in use without a lease: jobs that only read or compare, and releases that are served. gc leaves both alone.

`uses/jobs/ID.json` and `uses/releases/RELEASE/ID.json`: records that their holders rewrite now and then, as a heartbeat, and
delete at the end. One that was not rewritten for its `expires_s` counts no more. Where nothing may be written, one line in the
log says that the use is not known to others, and the work goes on.
"""

import contextlib
import json
import time
from collections.abc import Iterator

from catid2_ray.artifacts import holder, lease
from catid2_ray.artifacts.lease import Say, unsaid
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import StorageError

JOB_BEAT_S, JOB_EXPIRES_S = 5.0, 60.0
# A replica may be cut off from the store for a while and still answer from its release.
SERVED_BEAT_S, SERVED_EXPIRES_S = 120.0, 1800.0


class Use:
    """One registered use, from its making until `end`."""

    def __init__(self, store: Store, folder: str, *, beat_s: float, expires_s: float, command: str | None, say: Say):
        record = holder.describe(command) | {"expires_s": expires_s}
        self.store, self.name = store, f"{folder}/{record['id']}.json"
        self._data, self._heartbeat = json.dumps(record).encode(), None
        try:
            self._beat()
        except StorageError as error:
            say("use_not_registered", reason=f"'{error}'", means="'gc does not know of it'")
            return
        self._heartbeat = holder.Heartbeat(self._beat, beat_s)

    def _beat(self) -> None:
        self.store.write(self.name, self._data)

    def end(self) -> None:
        if self._heartbeat is None:
            return
        self._heartbeat.stop()
        self._heartbeat = None
        with contextlib.suppress(StorageError), self.store.impatient():
            self.store.delete(self.name)


@contextlib.contextmanager
def job(store: Store, *, command: str | None = None, say: Say = unsaid, poll_s: float = lease.POLL_S) -> Iterator[None]:
    """Register a job that takes no lease for the time of a block; begins when no gc is at work.

    It registers first and looks for a gc then; gc takes its lease first and looks for jobs then: one of them sees the other.
    """
    use = Use(store, "uses/jobs", beat_s=JOB_BEAT_S, expires_s=JOB_EXPIRES_S, command=command, say=say)
    try:
        while not (state := lease.look(store)).is_free and state.record.get("removes"):
            say("lease_wait", of=f"'{holder.sentence(state.record)}'")
            time.sleep(poll_s)
        yield
    finally:
        use.end()


def served(store: Store, release: str, *, command: str, say: Say = unsaid, beat_s: float = SERVED_BEAT_S) -> Use:
    """Register a replica that serves a release; `end` it when it stops."""
    expires_s = SERVED_EXPIRES_S
    return Use(store, f"uses/releases/{release}", beat_s=beat_s, expires_s=expires_s, command=command, say=say)


def alive(store: Store, folder: str) -> tuple[dict[str, dict], list[str]]:
    """Records of the uses below a folder that count, and the names of those that do not any more, both relative to it."""
    listed, now = holder.listing_now(store, folder)
    records, stale = {}, []
    for name in sorted(
        entry for entry in listed if entry.endswith(".json") and not entry.rpartition("/")[2].startswith(".")
    ):
        try:
            record = json.loads(store.read(f"{folder}/{name}"))
        except ValueError:
            continue
        except StorageError:
            if store.exists(f"{folder}/{name}"):
                raise
            continue  # it ended since the folder was listed
        if now - listed[name].modified > record["expires_s"] or holder.is_gone(record):
            stale.append(name)
        else:
            records[name] = record
    return records, stale


def of_releases(store: Store) -> dict[str, int]:
    """Release → replicas that serve it."""
    counts: dict[str, int] = {}
    for name in alive(store, "uses/releases")[0]:
        release = name.partition("/")[0]
        counts[release] = counts.get(release, 0) + 1
    return counts
