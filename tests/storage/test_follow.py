"""From one release to the next under a replica: what is opened, refused, kept, and what a request is answered from."""

import hashlib
import json
import time
from types import SimpleNamespace

import pytest
import torch

from catid2_ray.artifacts import history, uses
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import InputError, ReleaseError, StorageError
from catid2_ray.on_ray.serve import app, follow
from catid2_ray.on_ray.serve import opened as opened_module
from catid2_ray.on_ray.serve.follow import Serving
from catid2_ray.on_ray.serve.keys import VARIABLE
from catid2_ray.on_ray.serve.opened import (
    AnswersDiffer,
    Opened,
    OutOfMemory,
    check_answers,
    check_memory,
    free_memory,
    stored_answers,
)
from catid2_ray.on_ray.serve.settings import AppSettings
from tests.stored import two_releases, unpack


class Fake:
    """A release as `Opened`, without its files."""

    def __init__(self, store, name, settings, *, beside=False, checked=True, wrong=()):
        self.watched = []
        self.carrier = SimpleNamespace(watch=self.watched.append)
        for kind, names in wrong:
            if name in names and (checked or kind is not AnswersDiffer):
                raise kind(f"{name} is not good")
        self.name, self.beside, self.ended, self.caught_up = name, beside, False, 0

    def follow(self):
        pass

    def catch_up(self, *, waits):
        self.caught_up += 1

    def end(self):
        self.ended = True


def serving(store, wrong=(), **settings):
    asked = AppSettings(store=store.uri, **{"follow_s": 1e6, **settings})  # the thread sleeps: tests look themselves
    return Serving(store, asked, open=lambda *arguments, **options: Fake(*arguments, wrong=wrong, **options))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Its releases have names that are not made of their parts."""
    monkeypatch.setattr(releases, "_release", lambda fields, name: releases.Release(**fields))
    return Store(str(tmp_path / "store"))


def point_at(store, *names):
    number = releases.pointer(store)[0]
    for at, name in enumerate(names, number + 1):
        if not store.exists(f"releases/{name}.json"):
            store.write(f"releases/{name}.json", json.dumps({"name": name, "parts": {}, "created": ""}).encode())
        store.create(f"current/{at:010d}.json", json.dumps({"release": name}).encode())


def test_it_changes_to_what_becomes_current_and_keeps_the_last(store):
    point_at(store, "r-1")
    one = serving(store)
    assert one.now.name == "r-1" and one.last is None and not one.look()
    first = one.now
    point_at(store, "r-2")
    assert one.look() and (one.now.name, one.last) == ("r-2", first) and one.now.beside and not first.ended
    point_at(store, "r-1")  # a rollback
    second = one.now
    assert one.look() and one.now is first and one.last is second and first.caught_up == 1
    assert first.watched == ["r-2"]  # so that the way back finds the changes there already
    point_at(store, "r-3")
    assert one.look() and one.now.name == "r-3" and one.last is first and second.ended and one.swaps == 3
    one.end()
    assert one.now.ended and first.ended


def test_what_a_release_left_on_the_disk_goes_when_its_last_replica_has_left_it(store, monkeypatch, capfd):
    """After a change, and never so that a fault in it could be one of the change."""
    calls = []
    monkeypatch.setattr(follow.copies, "forget", lambda *_, serves: calls.append(serves) or 7)
    point_at(store, "r-1")
    one = serving(store)
    point_at(store, "r-2")
    assert one.look() and calls == [], "the way back is kept"
    point_at(store, "r-3")
    assert one.look() and calls == [["r-3", "r-2"]] and "event=copies_removed bytes=7" in capfd.readouterr().err
    monkeypatch.setattr(follow.copies, "forget", raising(OSError("a disk that fails")))
    point_at(store, "r-4")
    assert one.look() and one.now.name == "r-4" and one.failures == 0
    assert "event=copies_not_removed reason='OSError: a disk that fails'" in capfd.readouterr().err


def test_what_was_published_between_two_looks_is_passed_over(store):
    point_at(store, "r-1")
    one = serving(store)
    point_at(store, "r-2", "r-1")
    assert one.look() and one.now.name == "r-1" and one.swaps == 0 and one.now.caught_up == 1


def test_a_bad_release_is_refused_once_and_the_old_one_stays(store, capfd):
    point_at(store, "r-1")
    wrong = [(ReleaseError, {"r-2"})]
    one = serving(store, wrong)
    point_at(store, "r-2")
    assert not one.look() and one.now.name == "r-1" and one.refused == ("r-2", "r-2 is not good")
    assert not one.look() and capfd.readouterr().err.count("event=release_refused") == 1
    point_at(store, "r-3")
    assert one.look() and one.now.name == "r-3" and one.refused is None


def test_a_refused_candidate_costs_no_way_back(store):
    point_at(store, "r-1")
    one = serving(store, [(ReleaseError, {"r-3"})])
    point_at(store, "r-2")
    assert one.look()
    first = one.last
    point_at(store, "r-3")
    assert not one.look() and one.refused[0] == "r-3" and one.last is first and not first.ended
    point_at(store, "r-1")
    assert one.look() and one.now is first


@pytest.mark.parametrize("bad", [True, False])
def test_the_last_makes_room_where_three_do_not_fit_and_comes_back(store, bad):
    point_at(store, "r-1")
    full, asked = set(), AppSettings(store=store.uri, follow_s=1e6)

    def open_one(store, name, settings, **options):
        if name in full and one.last is not None:
            raise OutOfMemory("no room")
        return Fake(store, name, settings, wrong=[(ReleaseError, {"r-3"} if bad else ())], **options)

    one = Serving(store, asked, open=open_one)
    point_at(store, "r-2")
    assert one.look()
    first, second = one.last, one.now
    full.add("r-3")
    point_at(store, "r-3")
    assert one.look() != bad and first.ended
    if bad:
        assert one.now is second and one.last.name == "r-1" and not one.last.ended and one.last.watched == ["r-2"]
    else:
        assert one.now.name == "r-3" and one.last is second


@pytest.mark.parametrize("kind", [StorageError, OutOfMemory, RuntimeError])
def test_what_may_pass_is_tried_again(store, kind, capfd):
    point_at(store, "r-1")
    names = {"r-2"}
    one = serving(store, [(kind, names)])
    point_at(store, "r-2")
    for _ in range(2):
        with pytest.raises(kind):
            one.look()
        assert one.now.name == "r-1" and one.refused == ("r-2", "r-2 is not good")
    assert capfd.readouterr().err.count("event=release_refused") == 1
    names.clear()
    assert one.look() and one.now.name == "r-2" and one.refused is None


def test_a_replica_that_starts_while_the_current_release_is_bad_serves_the_one_before(store):
    point_at(store, "r-1", "r-2", "r-3")
    one = serving(store, [(ReleaseError, {"r-2", "r-3"})])
    assert one.now.name == "r-1" and one.refused[0] == "r-3" and not one.look()
    with pytest.raises(ReleaseError, match="r-3 is not good"):
        serving(store, [(ReleaseError, {"r-1", "r-2", "r-3"})])
    with pytest.raises(StorageError, match="r-3 is not good"):
        serving(store, [(StorageError, {"r-3"})])


def test_a_replica_that_starts_serves_what_others_serve(store):
    """What goes wrong with a release that others serve is no fault of the release."""
    point_at(store, "r-1", "r-2")
    use = uses.served(store, "r-2", command="catid2 serve")
    with pytest.raises(ReleaseError, match="r-2 is not good"):
        serving(store, [(ReleaseError, {"r-2"})])
    assert serving(store, [(AnswersDiffer, {"r-2"})]).now.name == "r-2"  # on another kind of processor, say
    use.end()
    assert serving(store, [(AnswersDiffer, {"r-2"})]).now.name == "r-1"
    assert serving(store, [(AnswersDiffer, {"r-1", "r-2"})]).now.name == "r-2"
    assert serving(store, [(AnswersDiffer, {"r-2"})], release="r-2").now.name == "r-2"


def test_a_named_release_stays(store):
    point_at(store, "r-1", "r-2")
    assert serving(store, release="r-1").now.name == "r-1"
    assert serving(store, follow=False).now.name == "r-2"
    empty = Store(store.uri + "-empty")
    for settings in ({}, {"follow": False}):
        with pytest.raises(ReleaseError, match="nothing was published"):
            serving(empty, **settings)


def test_the_thread_outlives_every_error(store, monkeypatch):
    point_at(store, "r-1")
    one = serving(store, follow_s=0.01)
    monkeypatch.setattr(releases, "pointer", lambda store: 1 / 0)
    while one.failures < 3:
        time.sleep(0.01)
    monkeypatch.undo()
    point_at(store, "r-2")
    while one.now.name != "r-2":
        time.sleep(0.01)
    one.end()


@pytest.fixture
def earlier(tmp_path):
    """The store of an earlier version."""
    store = Store(unpack(tmp_path).store)
    return store, releases.current(store).name


def test_a_real_release_is_opened_whole(earlier):
    store, name = earlier
    opened = Opened(store, name, AppSettings(store=store.uri))
    assert uses.of_releases(store) == {name: 1} and opened.retriever.retrieve(["hinge"], k=1)[0]
    opened.end()
    assert uses.of_releases(store) == {}


def test_changes_of_the_release_before_are_carried_before_the_new_one_is_served(tmp_path):
    """What was withdrawn stays withdrawn, after a swap and after the way back."""
    store, first, second = two_releases(tmp_path)
    history.rollback(store, first)
    one = Serving(store, AppSettings(store=store.uri, follow_s=1e6))
    gone = one.now.retriever.retrieve(["hinge"], k=1)[0][0].product_id
    one.now.updates.change(lambda: {"kind": "withdraw", "products": [gone]})
    history.rollback(store, second)
    assert one.look() and one.now.name == second
    assert gone not in [hit.product_id for hit in one.now.retriever.retrieve(["hinge"], k=50)[0]]
    one.now.updates.change(lambda: {"kind": "restore", "products": [gone]})
    history.rollback(store, first)
    assert one.look() and one.now.name == first
    assert gone in [hit.product_id for hit in one.now.retriever.retrieve(["hinge"], k=50)[0]]
    one.end()


def test_the_way_back_is_prepared_while_the_new_release_is_served(tmp_path):
    """The kept release takes over what the new one is told, so that a rollback carries no backlog."""
    store, first, second = two_releases(tmp_path)
    history.rollback(store, first)
    one = Serving(store, AppSettings(store=store.uri, follow_s=1e6, poll_s=1e6))
    kept, gone = one.now, one.now.retriever.retrieve(["hinge"], k=1)[0][0].product_id
    history.rollback(store, second)
    assert one.look()
    one.now.updates.change(lambda: {"kind": "withdraw", "products": [gone]})
    assert kept.carrier.late().count == 1 and kept.updates.applied == 1
    kept.catch_up(waits=True)  # all is carried anew, and the watch goes on
    one.now.updates.change(lambda: {"kind": "restore", "products": [gone]})
    assert kept.carrier.late().count == 1 and kept.updates.applied == 2
    one.end()


def test_the_first_release_is_served_where_changes_cannot_be_carried_and_a_second_is_not(earlier, monkeypatch, capfd):
    store, name = earlier
    monkeypatch.setattr(opened_module.Carrier, "carry", raising(StorageError("nothing may be written")))
    opened = Opened(store, name, AppSettings(store=store.uri))
    assert not opened.carried and "event=live_changes_not_carried" in capfd.readouterr().err
    with pytest.raises(StorageError, match="nothing may be written"):
        Opened(store, name, AppSettings(store=store.uri), beside=True)
    opened.end()


def raising(error):
    def call(*_, **__):
        raise error

    return call


def test_no_use_stays_where_opening_fails(earlier, monkeypatch):
    store, name = earlier
    monkeypatch.setattr(opened_module, "check_answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Opened(store, name, AppSettings(store=store.uri))
    assert uses.of_releases(store) == {}


def test_a_release_must_give_back_what_its_evaluation_found():
    def finds(*per_query):
        hits = iter([[SimpleNamespace(product_id=name) for name in names] for names in per_query])
        return SimpleNamespace(max_query_chars=100, retrieve=lambda asked, k: [next(hits) for _ in asked])

    answers = {"a": ["p1", "p2"], "b": ["p3"]}
    assert check_answers(finds(["p2", "p1"], ["p3", "p9"]), answers, "r-1") == 1
    with pytest.raises(ReleaseError, match="r-1 gives back 2 of the 3 products") as error:
        check_answers(finds(["p1", "p9"], ["p3"]), answers, "r-1")
    assert error.value.share == pytest.approx(2 / 3) and check_answers(finds(["any"]), {}, "r-1") is None


def test_an_append_s_release_is_not_asked_what_the_release_before_found():
    data = b'{"a": ["p1"]}'
    files = [{"name": "answers.json", "sha256": hashlib.sha256(data).hexdigest()}]
    evaluation = SimpleNamespace(named=lambda name: [name], parents={"ids": "old"}, file=str, files=files)
    store = SimpleNamespace(read=lambda name: data)
    parts = {"evaluation": evaluation, "ids": SimpleNamespace(digest="old")}
    assert stored_answers(store, parts) == {"a": ["p1"]}
    assert stored_answers(store, parts | {"ids": SimpleNamespace(digest="new")}) == {}
    assert stored_answers(store, parts | {"evaluation": SimpleNamespace(named=lambda name: [])}) == {}


def test_a_second_release_that_does_not_fit_the_gpu_is_not_loaded_and_is_tried_again(tmp_path, monkeypatch):
    store, first, second = two_releases(tmp_path)
    history.rollback(store, first)
    inner, free = opened_module.open_retriever, 1e9
    monkeypatch.setattr(opened_module, "open_retriever", lambda folder, *, device, **more: inner(folder, **more))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2_000)
    one = Serving(store, AppSettings(store=store.uri, follow_s=1e6, device="cuda"))
    parts = releases.load(store, second).manifests(store)
    needed = 1.2 * sum(file["bytes"] for file in [*parts["generator"].files, *parts["ids"].named("trie/")])
    assert needed > 100_000
    history.rollback(store, second)
    free = int(needed) - 1_001
    with pytest.raises(OutOfMemory, match="MB of GPU memory beside the one that is served, and 0 MB are free"):
        one.look()
    assert one.now.name == first and one.refused[0] == second and "give replicas more memory" in one.refused[1]
    free += 1
    assert one.look() and one.now.name == second and one.refused is None
    one.end()


def test_a_release_that_turns_out_too_large_is_tried_again(earlier, monkeypatch):
    """By what is thrown while it is loaded, where the look at what is free did not tell."""
    store, name = earlier

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(opened_module, "open_retriever", too_large)
    with pytest.raises(OutOfMemory, match=r"does not fit the memory \(CUDA out of memory\).*give replicas more"):
        Opened(store, name, AppSettings(store=store.uri), beside=True)


def test_memory_is_looked_at_before_a_second_release_is_loaded(tmp_path):
    part = SimpleNamespace(kind="generator", files=[{"bytes": 100_000_000}])
    check_memory({"generator": part}, 120_000_001)
    with pytest.raises(
        OutOfMemory, match="about 120 MB of memory beside the one that is served, and 120 MB are free"
    ) as error:
        check_memory({"generator": part}, 119_999_999)
    assert "give replicas more memory, or set follow: false" in str(error.value)
    assert free_memory(tmp_path / "none", lambda: 7) == 7
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 0\nactive_file 0\n")
    (tmp_path / "memory.current").write_text("300\n")
    for limit, free in (("max", 500), ("400", 100), ("4000", 500)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert free_memory(tmp_path, lambda: 500) == free
    # Pages of files are the kernel's to drop.
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 40\nactive_file 60\n")
    (tmp_path / "memory.max").write_text("400")
    assert free_memory(tmp_path, lambda: 500) == 200


def test_one_machine_takes_changes_of_its_own_alone_and_looks_at_its_port_before_ray_starts(
    earlier, monkeypatch, capsys
):
    store, name = earlier
    updates, stop = [], raising(KeyboardInterrupt())
    monkeypatch.delenv(VARIABLE, raising=False)
    for of, what in (
        (app.cluster, "connect"),
        (app.cluster, "disconnect"),
        (app.serve, "start"),
        (app.serve, "shutdown"),
    ):
        monkeypatch.setattr(of, what, lambda *_, **__: None)
    monkeypatch.setattr(app.serve, "run", stop)
    monkeypatch.setattr(app, "build", lambda settings: updates.append(settings.updates))
    monkeypatch.setattr(app, "check_port", lambda host, port: None)
    for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "10.1.2.3"):
        app.serve_here(store.uri, host=host, port=8000)
    monkeypatch.setenv(VARIABLE, "read " + "r" * 20)
    app.serve_here(store.uri, host="127.0.0.1", port=8000)
    assert updates == [True, True, True, None, None, None], "None: only with a key that may write"
    monkeypatch.setattr(app, "check_port", raising(InputError("somebody listens there")))
    monkeypatch.setattr(app.cluster, "connect", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match="somebody listens there"):
        app.serve_here(store.uri, host="127.0.0.1", port=8000)
