"""Changes of a serving release: a numbered series that every replica follows, one winner per number, and the same end."""

import threading

import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, CommitConflict, InputError
from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates


class Shop:
    """Stands for a retriever: keeps what is applied to it, and refuses a product that is live already."""

    def __init__(self):
        self.live, self.space, self.products = self, DocidSpace((4, 4)), {}

    def insert(self, newcomers, codes, columns):
        if taken := [one.product_id for one in newcomers if one.product_id in self.products]:
            raise InputError(f"product {taken[0]!r} is live already")
        self.products |= {one.product_id: tuple(code) for one, code in zip(newcomers, codes.tolist())}

    def withdraw(self, names):
        for name in names:
            self.products.pop(name, None)

    def restore(self, names):
        self.products |= dict.fromkeys(names, "restored")


def replica(store, release="r-1") -> tuple[Shop, LiveUpdates]:
    shop = Shop()
    return shop, LiveUpdates(shop, LiveLog(store, release))


def insert(name, docid="<a_0><b_1>"):
    return lambda: {"kind": "insert", "products": [{"product_id": name, "title": name, "docid": docid}]}


def test_changes_reach_other_replicas_and_survive_a_restart(store):
    (one, updates), (two, others) = replica(store), replica(store)
    assert updates.change(insert("a"))["number"] == 1
    assert others.change(lambda: {"kind": "withdraw", "products": ["a"]})["number"] == 2
    assert two.products == {} and one.products == {"a": (0, 1)}
    assert updates.catch_up() == 1 and one.products == {} and updates.catch_up() == 0
    updates.change(lambda: {"kind": "restore", "products": ["a"]})
    restarted, again = replica(Store(store.uri))
    assert again.catch_up() == 3 and restarted.products == {"a": "restored"}
    assert replica(store, "r-2")[1].catch_up() == 0, "another release starts from its catalogue"
    assert store.names("live/r-1") == [f"{number:010d}.json" for number in (1, 2, 3)]


def test_a_change_that_does_not_fit_is_told_to_its_writer_and_passed_over_by_all(local_store):
    (one, updates), (two, others) = replica(local_store), replica(local_store)
    updates.change(insert("a"))
    with pytest.raises(InputError, match="product 'a' is live already"):
        others.change(insert("a", "<a_0><b_2>"))
    others.change(insert("b", "<a_0><b_3>"))
    updates.catch_up()
    assert one.products == two.products == {"a": (0, 1), "b": (0, 3)} and updates.applied == others.applied == 3


def test_what_the_series_gave_is_what_replicas_hold_at_its_end(local_store):
    shop, updates = replica(local_store)
    assert updates.log.given() == {}
    updates.change(insert("a"))
    with pytest.raises(InputError, match="product 'a' is live already"):
        updates.change(insert("a", "<a_0><b_2>"))
    updates.change(insert("b", "<a_0><b_3>"))
    updates.change(lambda: {"kind": "withdraw", "products": ["a", "p17"]})
    assert updates.log.given() == {"b": "<a_0><b_3>"} and set(shop.products) == {"b"}
    updates.change(lambda: {"kind": "restore", "products": ["a", "p17"]})  # p17 is the release's own
    updates.change(insert("c", "<a_0><b_1>"))  # a trie refuses it: the ID is a's
    assert updates.log.given() == {"a": "<a_0><b_1>", "b": "<a_0><b_3>"}
    updates.change(lambda: {"kind": "withdraw", "products": ["a"]})
    updates.change(insert("a", "<a_2><b_2>"))
    assert updates.log.given() == {"a": "<a_2><b_2>", "b": "<a_0><b_3>"}
    assert LiveLog(local_store, "r-2").given() == {}


def test_a_change_that_cannot_be_made_is_not_written(local_store):
    _, updates = replica(local_store)

    def build():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        updates.change(build)
    assert local_store.names("live") == []


def test_writers_at_once_all_get_a_number_and_come_to_one_state(local_store):
    replicas = [replica(local_store) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda updates=updates, n=n: [updates.change(insert(f"{n}-{i}")) for i in range(5)])
        for n, (_, updates) in enumerate(replicas)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shop, updates in replicas:
        updates.catch_up()
        assert updates.applied == 20 and len(shop.products) == 20 and shop.products == replicas[0][0].products


def test_a_writer_that_never_comes_first_gives_up(local_store, monkeypatch):
    _, updates = replica(local_store)

    def taken(self, number, record):
        raise CommitConflict("taken")

    monkeypatch.setattr(LiveLog, "write", taken)
    with pytest.raises(CommitConflict, match="20 other changes came first; try again"):
        updates.change(insert("a"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": "sell", "products": []}', b'{"kind": "insert"}'])
def test_a_damaged_change_is_named(local_store, content):
    local_store.write("live/r-1/0000000001.json", content)
    with pytest.raises(ArtifactError, match=r"live/r-1/0000000001\.json is no change of products"):
        replica(local_store)[1].catch_up()


def test_following_applies_what_others_write(local_store):
    (_, updates), (shop, others) = replica(local_store), replica(local_store)
    seen = threading.Event()
    inner = shop.insert
    shop.insert = lambda *given: (inner(*given), seen.set())
    others.follow(0.01)
    updates.change(insert("a"))
    assert seen.wait(10) and "a" in shop.products
    others.end()
