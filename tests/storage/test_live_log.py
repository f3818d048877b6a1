"""Changes of a serving release: a numbered series that every replica follows, one winner per number, and the same end."""

import threading
import time

import numpy as np
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, CommitConflict, InputError, StorageError
from catid2_ray.on_ray.machine import live_log, live_names
from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates
from tests.live_shop import Shop

BASE = {"p17": "<a_3><b_0>", "p18": "<a_3><b_1>"}


def replica(store, release="r-1") -> tuple[Shop, LiveUpdates]:
    shop = Shop(BASE)
    return shop, LiveUpdates(shop, LiveLog(store, release))


def insert(name, docid="<a_0><b_1>"):
    return lambda: {"kind": "insert", "products": [{"product_id": name, "title": name, "docid": docid}]}


def withdraw(*names):
    return lambda: {"kind": "withdraw", "products": list(names)}


def restore(*names):
    return lambda: {"kind": "restore", "products": list(names)}


def given(log) -> dict[str, str]:
    return live_names.given(log.steps(), BASE)


def test_changes_reach_other_replicas_and_survive_a_restart(store):
    (one, updates), (two, others) = replica(store), replica(store)
    assert updates.change(insert("a"))["number"] == 1
    assert others.change(withdraw("a"))["number"] == 2
    assert two.inserted == {} and one.inserted == {"a": "<a_0><b_1>"}
    assert updates.catch_up() == 1 and one.inserted == {} and updates.catch_up() == 0
    updates.change(restore("a"))
    restarted, again = replica(Store(store.uri))
    assert again.catch_up() == 3 and restarted.inserted == {"a": "<a_0><b_1>"}
    assert replica(store, "r-2")[1].catch_up() == 0, "another release has its own series"
    assert store.names("live/r-1") == [f"{number:010d}.json" for number in (1, 2, 3)] and updates.log.count() == 3


@pytest.mark.parametrize(
    "refused, message",
    [
        (insert("a", "<a_0><b_2>"), "product 'a' is live already"),
        (insert("b", "<a_0><b_1>"), "product 'b' would share the ID <a_0><b_1>"),
        (insert("b", "<a_3><b_0>"), "product 'b' would share the ID <a_3><b_0>"),
        (insert("p17", "<a_0><b_2>"), "product 'p17' is live already"),
        (insert("b", "<a_9><b_2>"), "code 9 at level 0 is outside"),
        (withdraw("a", "nobody"), "no product 'nobody'"),
        (restore("gone", "nobody"), "no product 'nobody'"),
        (restore("gone"), "product 'gone' would share the ID <a_0><b_1>"),
    ],
)
def test_a_change_that_does_not_fit_leaves_nothing(local_store, refused, message):
    (one, updates), (two, others) = replica(local_store), replica(local_store)
    updates.change(insert("gone"))
    updates.change(withdraw("gone"))
    updates.change(insert("a"))
    with pytest.raises(InputError, match=message):
        others.change(refused)
    assert two.held == one.held == BASE | {"a": "<a_0><b_1>"} and others.applied == 3, "it caught up, and no more"
    assert others.log.count() == 3 and given(others.log) == {"a": "<a_0><b_1>"}


def test_what_the_series_gave_is_what_replicas_hold_at_its_end(local_store):
    """Also of a series that an older version wrote, in which changes lie that all replicas refuse."""
    log, rng = LiveLog(local_store, "r-1"), np.random.default_rng(5)
    names, docids = [f"n{i}" for i in range(4)] + list(BASE), [f"<a_{a}><b_{b}>" for a in (0, 3) for b in range(3)]
    for number in range(1, 201):
        some = [str(name) for name in rng.choice([*names, "nobody"], rng.integers(1, 3), replace=bool(number % 9 == 0))]
        kind = str(rng.choice(["insert", "withdraw", "restore"]))
        ids = [str(docid) for docid in rng.choice(docids, len(some))]
        products = [{"product_id": name, "title": "t", "docid": docid} for name, docid in zip(some, ids)]
        log.write(number, {"kind": kind, "products": products if kind == "insert" else some})
    shop, updates = replica(local_store)
    replayed, taken = live_names.Names(BASE), 0
    for number, record in enumerate(log.after(0), 1):
        try:
            live_log.apply(shop, record)
            fits = True
        except InputError:
            fits = False
        assert replayed.take(live_names.Step.of(record)) == fits, (number, record)
        assert {name: replayed.docid_of[name] for name in replayed.live.values()} == shop.held
        taken += fits
    assert 50 < taken < 150
    fresh, updates = replica(local_store)
    assert updates.catch_up() == 200 and fresh.held == shop.held
    assert given(log).items() <= shop.held.items() and shop.inserted.items() <= given(log).items()
    assert live_names.given(LiveLog(local_store, "r-2").steps(), BASE) == {}


def test_a_change_that_cannot_be_made_is_not_written(local_store):
    _, updates = replica(local_store)

    def build():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        updates.change(build)
    assert local_store.names("live") == []


def test_writers_at_once_all_get_a_number_and_come_to_one_state(local_store):
    replicas = [replica(local_store) for _ in range(4)]

    def work(updates, n):
        for i in range(3):
            updates.change(insert(f"{n}-{i}", f"<a_{n}><b_{i}>" if n < 3 else f"<a_{i}><b_3>"))

    threads = [threading.Thread(target=work, args=(updates, n)) for n, (_, updates) in enumerate(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shop, updates in replicas:
        updates.catch_up()
        assert updates.applied == 12 and len(shop.inserted) == 12 and shop.held == replicas[0][0].held


def test_of_writers_that_want_the_same_id_one_gets_it(local_store):
    replicas, refused = [replica(local_store) for _ in range(4)], []

    def work(updates, n):
        try:
            updates.change(insert(f"n{n}"))
        except InputError:
            refused.append(n)

    threads = [threading.Thread(target=work, args=(updates, n)) for n, (_, updates) in enumerate(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and LiveLog(local_store, "r-1").count() == 1


def test_a_writer_that_never_comes_first_gives_up(local_store, monkeypatch):
    _, updates = replica(local_store)

    def taken(self, number, record):
        raise CommitConflict("taken")

    monkeypatch.setattr(LiveLog, "write", taken)
    with pytest.raises(CommitConflict, match="20 other changes came first; try again"):
        updates.change(insert("a"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"kind": "sell", "products": []}',
        b'{"kind": "insert"}',
        b'{"kind": "insert", "products": [1]}',
    ],
)
def test_a_damaged_change_is_named(local_store, content):
    local_store.write("live/r-1/0000000001.json", content)
    with pytest.raises(ArtifactError, match=r"live/r-1/0000000001\.json is no change of products"):
        replica(local_store)[1].catch_up()


def eventually(holds) -> bool:
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def test_following_applies_what_others_write(local_store):
    (_, updates), (shop, others) = replica(local_store), replica(local_store)
    called = threading.Event()
    others.follow(0.01, also=called.set)
    updates.change(insert("a"))
    assert eventually(lambda: "a" in shop.held) and called.wait(10)
    others.end()


def test_a_follower_survives_what_fails_says_so_once_and_loses_nothing(local_store, capfd, monkeypatch):
    """The writer, too: what it could not apply does not count, and is applied later."""
    monkeypatch.setattr(live_log, "_LONGEST_WAIT_S", 0.02)
    (_, updates), (shop, others) = replica(local_store), replica(local_store)
    shop.failing = RuntimeError("CUDA out of memory")
    others.follow(0.01)
    updates.change(insert("a"))
    assert eventually(lambda: others.failing is not None)
    lag_s = others.lag_s
    assert eventually(lambda: others.lag_s > lag_s + 0.1) and others.applied == 0, "it tries again, and still lags"
    updates.change(insert("b", "<a_0><b_2>"))
    shop.failing = None
    assert eventually(lambda: shop.inserted == {"a": "<a_0><b_1>", "b": "<a_0><b_2>"} and others.failing is None)
    others.end()
    said = capfd.readouterr().err
    assert said.count("event=live_changes_not_followed release=r-1 reason='RuntimeError: CUDA out of memory'") == 1
    assert said.count("event=live_changes_followed_again release=r-1 applied=2") == 1

    writer, mine = replica(local_store)
    mine.catch_up()
    writer.failing = RuntimeError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        mine.change(insert("c", "<a_0><b_3>"))
    assert mine.applied == 2 and mine.log.count() == 3
    writer.failing = None
    assert mine.catch_up() == 1 and updates.catch_up() == 1 and writer.held == updates.retriever.held


def test_a_follower_waits_for_a_store_and_names_a_damaged_change(local_store, capfd, monkeypatch):
    monkeypatch.setattr(live_log, "_LONGEST_WAIT_S", 0.02)
    shop, updates = replica(local_store)
    inner = Store.exists

    def unreachable(self, name):
        raise StorageError("no route")

    monkeypatch.setattr(Store, "exists", unreachable)
    updates.follow(0.01)
    assert eventually(lambda: isinstance(updates.failing, StorageError))
    monkeypatch.setattr(Store, "exists", inner)
    replica(local_store)[1].change(insert("a"))
    assert eventually(lambda: "a" in shop.held and updates.failing is None)
    local_store.write("live/r-1/0000000002.json", b"{")
    assert eventually(lambda: isinstance(updates.failing, ArtifactError))
    local_store.delete("live/r-1/0000000002.json")
    assert eventually(lambda: updates.failing is None)
    updates.end()
    assert "r-1/0000000002.json is no change of products" in capfd.readouterr().err


class Counted(Store):
    """Counts requests, and how many reads were under way at once."""

    def __init__(self, uri):
        super().__init__(uri)
        self.looks, self.reads, self.now, self.most, self._lock = 0, 0, 0, 0, threading.Lock()

    def exists(self, name):
        self.looks += 1
        return super().exists(name)

    def names(self, name, **choices):
        self.looks += 1
        return super().names(name, **choices)

    def read(self, name):
        with self._lock:
            self.reads, self.now = self.reads + 1, self.now + 1
            self.most = max(self.most, self.now)
        time.sleep(0.001)
        with self._lock:
            self.now -= 1
        return super().read(name)


def test_a_replica_starts_with_one_listing_of_changes_and_several_reads_at_a_time(local_store):
    log = LiveLog(local_store, "r-1")
    for number in range(1, 301):
        log.write(number, (restore if number % 2 else withdraw)("p17")())
    local_store.write("live/r-1/0000000302.json", b"after a gap")
    counted = Counted(local_store.uri)
    shop, updates = replica(counted)
    assert updates.catch_up() == 300 and "p17" not in shop.held
    assert (counted.looks, counted.reads) == (3, 300) and 1 < counted.most <= 8
    assert updates.catch_up() == 0 and (counted.looks, counted.reads) == (4, 300), "one request where nothing is new"


def test_a_listing_from_a_name_on(store):
    for name in ("a", "b", "c/d", "e"):
        store.write(f"folder/{name}", b"x")
    assert store.names("folder", after="a") == ["b", "c", "e"] and store.names("folder", after="e") == []
    assert store.read_many([f"folder/{name}" for name in ("b", "e", "c/d")]) == [b"x"] * 3 and store.read_many([]) == []
