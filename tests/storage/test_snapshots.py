"""Snapshots of a series of live changes: the state from one is the state from all changes, and a damaged one is passed over."""

import contextlib

import numpy as np
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.errors import InputError, StorageError
from catid2_ray.on_ray.machine import live_log
from catid2_ray.on_ray.machine.live_log import LiveLog, apply
from catid2_ray.on_ray.machine.live_snapshot import Snapshot
from catid2_ray.retrieval.live_view import codes_of
from tests.storage.test_carry import CODES, Replica, catalogue

CATALOGUE = catalogue(*range(12))


@pytest.fixture
def every_20(monkeypatch):
    monkeypatch.setattr(live_log, "SNAPSHOT_EVERY", 20)


def replica(store) -> Replica:
    return Replica(store, "r-1", CATALOGUE)


def random_change(rng, one: Replica) -> None:
    """Often one that does not fit. IDs are chosen, so that withdrawn products and live ones have the same."""
    kind = rng.choice(["insert", "put", "price", "withdraw", "restore"])
    names = [f"p{n}" for n in rng.choice(18, rng.integers(1, 3), replace=False)]
    docids = [f"<a_{n % CODES[0]}><b_{n // CODES[0]}>" for n in rng.choice(14, len(names), replace=False)]
    if kind in ("withdraw", "restore"):
        one.say(str(kind), *names)
        return
    more = {"value": float(rng.integers(9))} if rng.random() < 0.5 else {}
    more |= {"columns": {"price": int(rng.integers(20))}} if more == {} or rng.random() < 0.5 else {}
    asked = [{"product_id": name, **more} for name in names]
    if kind != "price":
        asked = [{**a, "title": f"t{rng.integers(99)}", "docid": docid} for a, docid in zip(asked, docids)]
    if kind == "insert":
        prepared = [{**a, "vector": rng.random(3).tolist()} for a in asked]
        one.updates.change(lambda: {"kind": "insert", "products": prepared, "of": ["r-0", int(rng.integers(9))]})
    else:
        one.puts.put(asked, key=f"k{rng.integers(999)}" if rng.random() < 0.3 else None)


def changed(rng, one: Replica, count: int) -> None:
    end = one.updates.applied + count
    while one.updates.applied < end:
        with contextlib.suppress(InputError):
            random_change(rng, one)
        if one.updates.snapshotting:
            one.updates.snapshotting.join()


def state(one: Replica) -> tuple:
    updates = one.updates
    names = sorted({one.shop.products.name(row) for row in range(one.shop.live.view.rows)})
    rows = np.array([one.shop.live.row(name) for name in names])
    codes = dict(zip(names, codes_of(one.shop.live.view, rows).tolist()))  # of products that are withdrawn, too
    known = (updates.carried, updates.contents, updates.keys, updates.touched, updates.changes)
    return one.shop.all, codes, updates.applied, *known


@pytest.mark.parametrize("seed", range(6))
def test_the_state_by_snapshot_is_the_state_by_all_changes(local_store, every_20, seed):
    rng, one = np.random.default_rng(seed), replica(local_store)
    changed(rng, one, 110)
    assert local_store.names("live/r-1/snapshots") == ["0000000080", "0000000100"], "of five the newest two"
    two = replica(local_store)
    assert two.updates.catch_up() == 10 and state(two) == state(one), "ten changes after the last snapshot"
    shop = replica(local_store).shop
    for record in LiveLog(local_store, "r-1").after(0):
        apply(shop, record)
    assert shop.all == two.shop.all
    # It goes on alike, and writes the next ones.
    changed(rng, two, 20)
    one.updates.catch_up()
    assert state(one) == state(two) and "0000000120" in local_store.names("live/r-1/snapshots")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_snapshot_gives_way_to_the_one_before_and_that_to_the_changes(local_store, every_20, damage, capfd):
    rng, one = np.random.default_rng(9), replica(local_store)
    changed(rng, one, 45)
    for left, name in ((20, "live/r-1/snapshots/0000000040"), (0, "live/r-1/snapshots/0000000020")):
        data = local_store.read(name)
        bad = {"cut": data[:-9], "flipped": data[:-5] + b"x" + data[-4:], "empty": b""}
        local_store.delete(name) if damage == "gone" else local_store.write(name, bad[damage])
        two = replica(local_store)
        assert two.updates.catch_up() == 45 - left and state(two) == state(one)
        assert ("event=snapshot_passed_over" in capfd.readouterr().err) == (damage != "gone")
    # The next one is made of all changes, by a replica that saw them all.
    changed(rng, two, 15)
    assert Snapshot.of_bytes(local_store.read("live/r-1/snapshots/0000000060")).number == 60


def test_changes_of_one_record_count_each(local_store, every_20):
    """What was carried in one record is in a snapshot soon, and the time of each change too."""
    one = replica(local_store)

    def build(trial):
        made = [
            {"kind": "withdraw", "products": [f"p{n % 11}"], "of": ["r-0", n + 1], "at": 5.0 + n} for n in range(30)
        ]
        for change in made:
            trial.take(change)
        return made

    assert len(one.updates.change_many(build)) == 30 and list(one.shop.all) == ["p11"]
    one.updates.snapshotting.join()
    assert local_store.names("live/r-1/snapshots") == ["0000000001"]
    two = replica(local_store)
    assert two.updates.catch_up() == 0 and state(two) == state(one) and two.updates.changes == 30
    assert two.updates.touched["p7"].live == 34.0
    one.say("restore", "p3")
    assert one.updates.snapshotting.is_alive() is False and local_store.names("live/r-1/snapshots") == ["0000000001"]
    two.updates.catch_up()
    assert state(two) == state(one) and two.updates.touched["p3"].live > 1e9


def test_a_snapshot_leaves_out_what_an_older_version_refused(local_store, every_20):
    log = LiveLog(local_store, "r-1")
    for number in range(1, 18):
        log.write(number, {"kind": "withdraw", "products": ["p1", "nobody"] if number % 2 else ["p2"]})
    one = replica(local_store)
    one.updates.catch_up()
    changed(np.random.default_rng(1), one, 3)
    two = replica(local_store)
    assert two.updates.catch_up() == 0 and two.shop.all == one.shop.all


def test_a_snapshot_that_does_not_fit_gives_way_to_the_changes(local_store, every_20, capfd):
    changed(np.random.default_rng(4), replica(local_store), 20)
    other = Replica(local_store, "r-1", catalogue(*range(3)))
    assert other.updates.catch_up() == 20 and "event=snapshot_passed_over" in capfd.readouterr().err
    alone = Replica(local_store, "r-1", catalogue(*range(3)))
    local_store.delete("live/r-1/snapshots/0000000020")
    assert alone.updates.catch_up() == 20 and state(alone) == state(other)


def test_a_snapshot_of_changes_that_were_deleted_is_none(local_store, every_20, capfd):
    """Who must delete a damaged change and those after it leaves a series that all replicas can go on with."""
    changed(np.random.default_rng(5), replica(local_store), 45)
    for number in range(31, 46):
        local_store.delete(f"live/r-1/{number:010d}.json")
    assert local_store.names("live/r-1/snapshots") == ["0000000020", "0000000040"]
    one = replica(local_store)
    assert one.updates.catch_up() == 10 and one.updates.applied == 30, "from the snapshot before"
    assert "event=snapshot_passed_over" in capfd.readouterr().err
    changed(np.random.default_rng(6), one, 1)
    assert local_store.exists("live/r-1/0000000031.json")


def test_a_snapshot_that_cannot_be_written_loses_nothing(local_store, every_20, monkeypatch, capfd):
    one = replica(local_store)

    def full(self, snapshot):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(LiveLog, "write_snapshot", full)
        changed(np.random.default_rng(2), one, 20)
    said = capfd.readouterr().err
    assert "event=snapshot_not_written release=r-1 reason='StorageError: the disk is full'" in said
    changed(np.random.default_rng(3), one, 20)
    assert local_store.names("live/r-1/snapshots") == ["0000000040"]
    two = replica(Store(local_store.uri))
    two.updates.catch_up()
    assert two.shop.all == one.shop.all
