"""One job at a time on a store: who holds the lease, when it ends, and what a holder that hung may still do.

Unusual: time is moved by hand, in what the store's clock seems to say, so nothing here waits for an expiry.
"""

import concurrent.futures
import os
import subprocess
import sys
import threading
import time

import pytest

from catid2_ray.artifacts import holder, lease, uses
from catid2_ray.artifacts.manifest import Attempt, find
from catid2_ray.errors import LeaseError, StorageError
from tests.command import ROOT

HOLD = """
import sys, time
from catid2_ray.artifacts import lease
from catid2_ray.artifacts.store import Store
lease.take(Store(sys.argv[1]), command="killed job")
print("held", flush=True)
time.sleep(600)
"""


class Clock:
    ahead_s = 0.0


@pytest.fixture
def clock(monkeypatch):
    """Set `ahead_s`: how much later than now the store's clock says it is."""
    clock, real = Clock(), holder.listing_now

    def later(store, folder):
        listed, now = real(store, folder)
        return listed, now + clock.ahead_s

    monkeypatch.setattr(holder, "listing_now", later)
    return clock


def of_another_machine(store, monkeypatch, **options) -> lease.Lease:
    """A lease whose holder cannot be looked at from here, and whose heart beats no more."""
    with monkeypatch.context() as patch:
        patch.setattr(holder.socket, "gethostname", lambda: "node7")
        hung = lease.take(store, command="catid2 reindex", **options)
    hung._heartbeat.stop()
    return hung


def test_a_second_job_is_refused_with_holder_and_heartbeat_until_the_first_ends(store):
    with lease.holding(store, command="catid2 reindex"):
        with pytest.raises(
            LeaseError,
            match=rf"another job works on {store.uri}: catid2 reindex by \S+@\S+, pid {os.getpid()}, started 20\d\d-\S+Z; its "
            r"last heartbeat was [0-9] s ago\. Wait for its end: a command that has --wait",
        ) as refusal:
            lease.take(store)
        assert refusal.value.exit_code == 9 and isinstance(refusal.value, StorageError)
    for _ in range(3):
        with lease.holding(store) as held:
            held.check()
    assert held.number == 4 and store.names("lease") == ["0000000004.json", "0000000004.released"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_is_given_back_whatever_way_a_job_ends(local_store, error):
    with pytest.raises(error), lease.holding(local_store):
        raise error
    assert lease.look(local_store).released
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_of_many_at_once_one_gets_it(store):
    def attempt(number):
        try:
            return lease.take(store, command=f"job {number}")
        except LeaseError:
            return None

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        held = [one for one in pool.map(attempt, range(6)) if one]
    assert len(held) == 1
    held[0].check()
    held[0].release()


@pytest.mark.faults
def test_it_may_be_taken_when_the_heartbeat_is_older_than_the_expiry_and_not_before(store, clock, monkeypatch, fault):
    hung = of_another_machine(store, monkeypatch, expires_s=60)
    clock.ahead_s = 50
    with pytest.raises(LeaseError, match="by .*@node7.*its last heartbeat was 5[01] s ago.*its lease ends 60 s after"):
        lease.take(store)
    hung._beat()
    clock.ahead_s = 62
    said = []
    with lease.holding(store, command="catid2 append", say=lambda name, **values: said.append((name, values))) as taken:
        assert taken.number == hung.number + 1
        taken.check()
        assert said[0][0] == "lease_taken_over" and "catid2 reindex by" in said[0][1]["of"]
        # The one that hung wakes up: it may neither commit nor publish, and its end frees nothing.
        attempt = Attempt(store, "ids", settings={}, parents={}, recipe={})
        attempt.guard = hung.check
        with pytest.raises(
            LeaseError, match="this job lost its lease of .*: catid2 append by .* has taken it, because its own"
        ):
            attempt.commit([store.write_file(attempt.name("a"), b"a")], metrics={})
        assert find(store, "ids", attempt.key) is None
        hung._beat()
        hung.release()
        clock.ahead_s = 0
        with pytest.raises(LeaseError, match="catid2 append"):
            lease.take(store)
    fault(
        "a holder of the lease on another machine hangs",
        times=1,
        outcome="taken after 60 s; it commits nothing",
        lost_s=60,
    )


@pytest.mark.faults
def test_the_clocks_of_machines_do_not_matter(local_store, monkeypatch, fault):
    of_another_machine(local_store, monkeypatch)
    for wrong in (-1e6, 1e6):
        with monkeypatch.context() as patch:
            now = time.time()
            patch.setattr(time, "time", lambda now=now, wrong=wrong: now + wrong)
            with pytest.raises(LeaseError, match=r"last heartbeat was \d s ago"):
                lease.take(local_store)
    fault("a clock that is 12 days off", times=2, outcome="the lease goes by the store's clock", lost_s=0)


def test_a_heart_that_beats_keeps_it(store):
    with lease.holding(store, beat_s=0.2, expires_s=2.5):
        for _ in range(4):  # the times of S3 have whole seconds
            time.sleep(1)
            assert not lease.look(store).is_free


@pytest.mark.faults
def test_a_killed_process_of_this_machine_holds_nothing(store, fault):
    process = subprocess.Popen([sys.executable, "-c", HOLD, store.uri], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LeaseError, match=f"killed job by .* pid {process.pid}"):
        lease.take(store)
    process.kill()
    process.wait()
    started = time.monotonic()
    lease.take(store).release()
    fault("the holder of a lease killed", times=1, outcome="free at once", lost_s=time.monotonic() - started)


def test_a_process_that_got_the_number_of_a_dead_one_is_another():
    record = holder.describe()
    assert not holder.is_gone(record)
    assert holder.is_gone({**record, "process": {**record["process"], "born": "1"}})
    assert not holder.is_gone({**record, "process": {**record["process"], "born": "1", "boot": "another"}})
    assert not holder.is_gone({**record, "process": None}) and not holder.is_gone({})


def test_wait_begins_when_the_holder_ends(store):
    first, said = lease.take(store, command="first"), []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        later = pool.submit(lease.take, store, wait=True, poll_s=0.05, say=lambda name, **values: said.append(name))
        time.sleep(0.5)
        assert not later.done()
        first.release()
        later.result(timeout=20).release()
    assert said == ["lease_wait"]


@pytest.mark.faults
def test_a_store_that_is_away_for_a_while_costs_nothing(local_store, monkeypatch, fault):
    failures = []

    def fails(*_, **__):
        failures.append(1)
        raise StorageError("away")

    with lease.holding(local_store, beat_s=0.01) as held:
        with monkeypatch.context() as patch:
            patch.setattr(local_store, "write", fails)
            while len(failures) < 3:
                time.sleep(0.01)
        time.sleep(0.1)
        assert "0000000001.heartbeat" in local_store.names("lease")
        held.check()
    fault("heartbeats that cannot be written", times=len(failures), outcome="the lease is kept", lost_s=0)


def test_one_that_looked_long_ago_does_not_take_a_number_of_the_past(local_store):
    for _ in range(3):
        lease.take(local_store).release()
    with lease.holding(local_store) as held:
        assert not lease._create(local_store, 2, holder.describe())
        held.check()
    assert lease.look(local_store).number == 4


def test_a_record_that_others_remove_after_it_was_listed_is_looked_for_again(store, monkeypatch):
    """Seen where several jobs raced on S3: the next holder deletes what came before it, between a job's listing and its reading."""
    first = lease.take(store, command="first")
    first.release()
    read, coming = store.read, ["second"]

    def others_first(name: str) -> bytes:
        if coming:
            lease.take(store, command=coming.pop())
        return read(name)

    monkeypatch.setattr(store, "read", others_first)
    with pytest.raises(LeaseError, match="another job works on .*: second by"):
        lease.take(store, command="late")
    store.write("lease/0000000002.released", b"")
    coming.append("third")
    with pytest.raises(LeaseError, match="this job lost its lease .*: third by .* has taken it"):
        first.check()


def test_a_job_without_a_lease_registers_and_waits_for_gc_alone(store):
    with lease.holding(store, command="catid2 reindex"), uses.job(store, command="catid2 compare-ids"):
        records, stale = uses.alive(store, "uses/jobs")
        assert [record["command"] for record in records.values()] == ["catid2 compare-ids"] and stale == []
    assert uses.alive(store, "uses/jobs") == ({}, [])
    gc, began = lease.take(store, command="catid2 gc", removes=True), threading.Event()

    def compare():
        with uses.job(store, poll_s=0.05):
            began.set()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(compare)
        assert not began.wait(0.5) and len(uses.alive(store, "uses/jobs")[0]) == 1
        gc.release()
        waiting.result(timeout=20)
    assert began.is_set()


def test_a_release_in_use_counts_until_its_replica_ends_or_is_long_silent(store, clock):
    one, other = (uses.served(store, "r-1", command="serve") for _ in range(2))
    third = uses.served(store, "r-2", command="serve")
    assert uses.of_releases(store) == {"r-1": 2, "r-2": 1}
    other.end()
    third.end()
    assert uses.of_releases(store) == {"r-1": 1}
    clock.ahead_s = uses.SERVED_EXPIRES_S + 2
    assert uses.of_releases(store) == {} and len(uses.alive(store, "uses/releases")[1]) == 1
    one.end()
    one.end()


def test_a_use_that_cannot_be_read_is_not_taken_for_one_that_ended(store, monkeypatch):
    """gc asks for uses, and removes what nobody uses."""
    uses.served(store, "r-1", command="serve")
    ended = uses.served(store, "r-2", command="serve")
    read = store.read

    def fails(name: str) -> bytes:
        if "r-2" in name:
            ended.end()
            return read(name)
        raise StorageError("the store is away")

    monkeypatch.setattr(store, "read", fails)
    with pytest.raises(StorageError, match="away"):
        uses.of_releases(store)
    monkeypatch.setattr(store, "read", lambda name: fails(name) if "r-2" in name else read(name))
    assert uses.of_releases(store) == {"r-1": 1}


def test_a_store_without_write_rights_is_served_with_one_line_in_the_log(local_store, monkeypatch):
    def refuse(*_, **__):
        raise StorageError("cannot write: AccessDenied")

    said = []
    monkeypatch.setattr(local_store, "write", refuse)
    use = uses.served(local_store, "r-1", command="serve", say=lambda name, **values: said.append((name, values)))
    use.end()
    assert [name for name, _ in said] == ["use_not_registered"] and "AccessDenied" in said[0][1]["reason"]
    assert uses.of_releases(local_store) == {}
