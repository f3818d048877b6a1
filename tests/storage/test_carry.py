"""Changes outlive a swap: what is younger than a release's catalogue is carried over to it, once, in one order for all."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from catid2_ray.artifacts import gc, history
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.history import Entry, Left
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CommitConflict, InputError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import live_log
from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates, changes_of
from catid2_ray.on_ray.serve import carry
from catid2_ray.on_ray.serve.carry import Carried, Carrier
from catid2_ray.on_ray.serve.puts import Puts
from catid2_ray.on_ray.stages import catalog as catalogs
from catid2_ray.retrieval.live_view import codes_of
from tests.live_shop import Shop
from tests.oracles.carry import World

CODES = (8, 32)


class Newcomers:
    """Stands for an encoder and a quantizer: a product belongs below its number, modulo the codes."""

    def __init__(self, quantizer: str):
        self.parts = {"quantizer": SimpleNamespace(digest=quantizer)}

    def _used(self, view) -> set[str]:
        return set(map(DocidSpace(CODES).text, codes_of(view, np.arange(view.rows)).tolist()))

    def may_have(self, docid, product_id, view):
        return docid not in self._used(view)

    def prepare(self, asked, view, *, vectors, keeps=None):
        asked = [
            {**one, "docid": docid} if (docid := one.get("docid") or (keeps or {}).get(one["product_id"])) else one
            for one in asked
        ]
        used, made = self._used(view) | {one["docid"] for one in asked if "docid" in one}, []
        for one in asked:
            if "description" in one:
                one = {**one, "said": {"description": one["description"]}}
            head = int(one["product_id"][1:]) % CODES[0]
            free = [docid for code in range(CODES[1]) if (docid := f"<a_{head}><b_{code}>") not in used]
            if "docid" not in one and not free:
                raise InputError(f"all IDs below <a_{head}> are taken")
            made.append({**one, "docid": one.get("docid") or free[0]})
            used.add(made[-1]["docid"])
        return made


class Replica:
    def __init__(self, store, release, catalogue, quantizer="q"):
        self.shop = Shop(catalogue, codes_per_level=CODES)
        self.newcomers = Newcomers(quantizer)
        self.updates = LiveUpdates(self.shop, LiveLog(store, release))
        self.puts = Puts(self.updates, self.newcomers)
        self.carrier = Carrier(store, self.updates, self.newcomers)

    def insert(self, *names, **more):
        asked = [{"product_id": name, "title": name, **more} for name in names]
        prepared = lambda: self.newcomers.prepare(asked, self.shop.live.view, vectors=False)  # noqa: E731
        return self.updates.change(lambda: {"kind": "insert", "products": prepared()})

    def say(self, kind, *names):
        return self.updates.change(lambda: {"kind": kind, "products": list(names)})


class Publisher:
    """Publishes releases that differ in their evaluation alone, with a catalogue of their own beside."""

    def __init__(self, store, chain, make):
        self.store, self.make, self.parts, self.catalogues = store, make, chain(store, "all"), {}

    def begin(self) -> dict:
        return {"after": releases.pointer(self.store)[0], "seen": releases.live_changes(self.store)}

    def publish(self, begun: dict, catalogue: dict) -> str:
        word = str(len(self.catalogues))
        evaluation = self.make(
            self.store, "evaluation", {"figures": word.encode()}, settings={"word": word},
            parents=self.parts["evaluation"].parents,
        )  # fmt: skip
        name = releases.publish(self.store, self.parts | {"evaluation": evaluation}, **begun)[0].name
        self.catalogues[name] = catalogue
        return name

    def replica(self, release, **choices) -> Replica:
        return Replica(self.store, release, self.catalogues[release], **choices)


@pytest.fixture
def publisher(local_store, chain, make):
    return Publisher(local_store, chain, make)


def catalogue(*numbers, shift=0):
    return {f"p{n}": f"<a_{n % CODES[0]}><b_{n // CODES[0] + shift}>" for n in numbers}


def series(store, release) -> list[dict]:
    return [change for record in LiveLog(store, release).after(0) for change in changes_of(record)]


def test_a_withdrawn_product_stays_withdrawn_and_an_inserted_one_stays(publisher, capfd):
    store = publisher.store
    a = publisher.publish(publisher.begin(), catalogue(1, 2, 3, 4))
    old = publisher.replica(a)
    old.say("withdraw", "p4")
    old.insert("p9", description="seen by the catalogue that is read next")
    begun = publisher.begin()
    old.say("withdraw", "p1", "p2")
    old.insert("p5", "p6", description="d")
    old.say("restore", "p4")
    old.say("withdraw", "p9")
    b = publisher.publish(begun, catalogue(1, 3, 4, 5, shift=2))
    moves = history.entries(store)
    assert moves[1].after == Left(a, 2, {}) and history.younger(store, moves, b) == 6

    new, other = publisher.replica(b), publisher.replica(b)
    assert new.carrier.carry() == Carried(3, 1) and new.carrier.carry() == new.carrier.late() == Carried()
    assert "event=live_changes_carried release=" in capfd.readouterr().err
    assert new.shop.held.keys() == {"p3", "p4", "p5", "p6"}
    written = series(store, b)
    assert LiveLog(store, b).count() == 1, "one object holds them all"
    assert [one["of"] for one in written] == [[a, number] for number in (3, 4, 5, 6)]
    assert written[0]["products"] == ["p1"] and written[0]["left_out"] == {"p2": f"release {b} lacks it"}
    assert [one["product_id"] for one in written[1]["products"]] == ["p6"]
    assert written[1]["left_out"] == {"p5": f"release {b} has it"}
    assert written[2]["kind"] == "restore" and written[2]["products"] == ["p4"], "it is live, and was said to be"
    assert written[3]["kind"] == "skipped" and written[3]["why"] == f"release {b} lacks it"
    assert old.shop.held["p6"] == new.shop.held["p6"], "the quantizer is the same, so it keeps its ID"

    old.say("withdraw", "p3")
    assert new.carrier.late() == Carried(1) and other.carrier.carry() == Carried(), "a late write, while replicas swap"
    other.updates.catch_up()
    assert other.shop.held == new.shop.held and "p3" not in new.shop.held

    new.say("withdraw", "p6")
    assert history.rollback(store, a).before == b and history.entries(store)[2].after == Left(b, 0, None)
    again = publisher.replica(a)
    again.updates.catch_up()
    assert again.carrier.carry() == Carried(1) and series(store, a)[-1]["of"] == [b, 3], (
        "what came from there stays there"
    )
    assert "p6" not in again.shop.held and "p3" not in again.shop.held


def test_a_catalogue_that_is_found_has_not_seen_what_came_since_it_was_read(tiny, tmp_path, no_ray):
    """A job that is resumed, or one whose tables nobody has written since, must not take younger changes for old ones."""
    recipe = Recipe.build(tiny | {"store": str(tmp_path / "store")})
    store = Store(recipe.store)
    for changes, seen in ((1, {"r-1": 1}), (2, {"r-1": 1})):
        LiveLog(store, "r-1").write(changes, {"kind": "withdraw", "products": [f"p{changes}"]})
        with Job.open(recipe) as job:
            job.look()
            assert job.seen == {"r-1": changes}
            catalogs.run(job, {})
            assert job.seen == seen
    other = Recipe.build(recipe.model_dump(mode="json") | {"catalog": tiny["catalog"] | {"rows_per_part": 120}})
    with Job.open(other) as job:
        job.look()
        catalogs.run(job, {})
        assert job.seen == {"r-1": 2}, "tables that are read anew hold what the operator brought into them"


def test_an_id_is_made_anew_where_the_quantizer_is_another_or_the_id_is_taken(publisher):
    a = publisher.publish(publisher.begin(), catalogue(1, 2))
    begun = publisher.begin()
    old = publisher.replica(a)
    first = old.insert("p9")["products"][0]["docid"]
    second = old.insert("p17")["products"][0]["docid"]
    quantizer = releases.load(publisher.store, a).parts["quantizer"]["digest"]
    b = publisher.publish(begun, catalogue(1, 2) | {"p3": second})
    new = publisher.replica(b, quantizer=quantizer)
    new.carrier.carry()
    assert new.shop.held["p9"] == first and new.shop.held["p17"] not in (first, second)


def test_what_does_not_fit_is_left_out_alone_and_said(publisher):
    a = publisher.publish(publisher.begin(), catalogue(1))
    begun = publisher.begin()
    old = publisher.replica(a)
    old.insert(*(f"p{n}" for n in (9, 2, 17, 3, 25)))
    old.insert("p33")
    full = {f"p{8 * n + 1}": f"<a_1><b_{n}>" for n in range(10, 41)}
    b = publisher.publish(begun, {name: f"<a_1><b_{n}>" for n, name in enumerate(full)})
    new = publisher.replica(b)
    assert new.carrier.carry() == Carried(1, 1)
    first, second = series(publisher.store, b)
    assert [one["product_id"] for one in first["products"]] == ["p9", "p2", "p3"]
    assert set(first["left_out"]) == {"p17", "p25"} and "all IDs below <a_1> are taken" in first["left_out"]["p17"]
    assert second["kind"] == "skipped" and second["why"] == "all IDs below <a_1> are taken" and second["of"] == [a, 2]
    assert publisher.replica(b).updates.catch_up() == 1


def test_replicas_that_carry_at_once_end_with_one_series(publisher):
    a = publisher.publish(publisher.begin(), catalogue(*range(20)))
    begun = publisher.begin()
    old = publisher.replica(a)
    for n in range(20, 32):
        old.insert(f"p{n}")
        old.say("withdraw", f"p{n - 20}")
    b = publisher.publish(begun, catalogue(*range(22), shift=3))
    replicas = [publisher.replica(b) for _ in range(4)]
    threads = [threading.Thread(target=replica.carrier.carry) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = series(publisher.store, b)
    assert [one["of"] for one in written] == [[a, number] for number in range(1, 25)]
    for replica in replicas:
        replica.updates.catch_up()
        assert replica.shop.held == replicas[0].shop.held
    assert replicas[0].shop.held.keys() == {f"p{n}" for n in range(12, 32)}


def test_an_older_change_that_comes_late_does_not_win(publisher):
    """In its last second a replica of the old release took changes, which are carried when the new one has changed already."""
    a = publisher.publish(publisher.begin(), catalogue(1, 2, 3, 4, 5))
    begun, old = publisher.begin(), publisher.replica(a)
    b = publisher.publish(begun, catalogue(1, 2, 3, 4, 5, shift=2))
    new = publisher.replica(b)
    new.carrier.carry()
    old.puts.put([{"product_id": f"p{n}", "columns": {"price": 2}} for n in (1, 2)])
    old.say("withdraw", "p3", "p4", "p5")
    new.puts.put([{"product_id": f"p{n}", "columns": {"price": 3}} for n in (1, 3)])
    new.say("restore", "p4")
    assert new.carrier.late() == Carried(2)
    prices = {name: price for name, (*_, price) in new.shop.all.items()}
    assert prices == {"p1": 3, "p2": 2, "p4": 1}, "a price that came later keeps no product from being withdrawn"
    assert [set(one["left_out"]) for one in series(publisher.store, b) if "of" in one] == [{"p1"}, {"p4"}]
    old.puts.put([{"product_id": "p1", "columns": {"price": 4}}])
    assert new.carrier.late() == Carried(1) and new.shop.all["p1"][3] == 4, "it is the younger one"


def test_a_clock_that_is_behind_turns_no_changes_around(publisher, monkeypatch):
    a = publisher.publish(publisher.begin(), catalogue(1, 2))
    old = publisher.replica(a)
    b = publisher.publish(publisher.begin(), catalogue(1, 2, shift=2))
    old.say("withdraw", "p1")
    new = publisher.replica(b)
    new.carrier.carry()
    with monkeypatch.context() as patch:
        patch.setattr(live_log.time, "time", lambda: 1000.0)
        new.say("restore", "p1")
    history.rollback(publisher.store, a)
    assert "p1" not in old.shop.held and old.carrier.carry() == Carried(1) and "p1" in old.shop.held


def test_many_changes_are_carried_in_few_records(publisher, monkeypatch):
    monkeypatch.setattr(carry, "MOST", 10)
    a = publisher.publish(publisher.begin(), catalogue(*range(8)))
    begun, old = publisher.begin(), publisher.replica(a)
    for n in range(24):
        old.say("restore" if n % 2 else "withdraw", f"p{n % 8 // 2}")
    old.say("withdraw", *(f"p{n}" for n in range(8)))
    b = publisher.publish(begun, catalogue(*range(8), shift=2))
    new = publisher.replica(b)
    assert new.carrier.carry() == Carried(25) and new.shop.held == {}
    assert [len(changes_of(record)) for record in LiveLog(publisher.store, b).after(0)] == [10, 10, 5]


def test_a_record_that_fails_in_the_middle_goes_on_there(publisher, monkeypatch):
    a = publisher.publish(publisher.begin(), catalogue(1))
    begun, old = publisher.begin(), publisher.replica(a)
    for n in range(2, 6):
        old.insert(f"p{n}")
    b = publisher.publish(begun, catalogue(1))
    publisher.replica(b).carrier.carry()
    other, applied = publisher.replica(b), []

    def apply(retriever, change, **options):
        if len(applied) == 2:
            applied.append("failed")
            raise RuntimeError("no memory")
        applied.append(change["products"][0]["product_id"])
        real(retriever, change, **options)

    real = live_log.apply
    monkeypatch.setattr(live_log, "apply", apply)
    with pytest.raises(RuntimeError, match="no memory"):
        other.updates.catch_up()
    assert other.updates.applied == 0 and other.updates.catch_up() == 1
    assert applied == ["p2", "p3", "failed", "p4", "p5"] and len(other.shop.held) == 5


class History:
    """Random releases, changes, publications of catalogues read long before, rollbacks, late writes and put-off carrying, with the
    slow model beside."""

    def __init__(self, publisher: Publisher, seed: int):
        self.publisher, self.rng, self.world = publisher, np.random.default_rng(seed), World()
        self.replicas: dict[str, list[Replica]] = {}
        self.jobs, self.texts, self.quantizer = [], 0, str(seed % 2)

    def begin(self):
        products = sorted(self.rng.choice(24, self.rng.integers(6, 16), replace=False).tolist())
        self.jobs.append((self.publisher.begin(), products, self.world.clock))

    def publish(self):
        if not self.jobs or len(self.replicas) == 4:
            return
        begun, products, read = self.jobs.pop(0)
        try:
            name = self.publisher.publish(begun, catalogue(*products, shift=len(self.replicas)))
        except CommitConflict:
            return
        self.world.publish(name, self.publisher.catalogues[name], read)
        self.replicas[name] = [self.publisher.replica(name, quantizer=self.quantizer) for _ in range(2)]

    def back(self):
        if others := sorted(self.replicas.keys() - {self.world.moves[-1]}):
            name = str(self.rng.choice(others))
            history.rollback(self.publisher.store, name)
            self.world.roll_back(name)

    def one(self) -> tuple[str, Replica]:
        """The current release more often than another."""
        release = self.world.moves[-1] if self.rng.random() < 0.7 else str(self.rng.choice(list(self.replicas)))
        return release, self.replicas[release][self.rng.integers(2)]

    def change(self):
        release, one = self.one()
        kind, price = (
            str(self.rng.choice(["insert", "put", "price", "withdraw", "restore"])),
            int(self.rng.integers(2, 20)),
        )
        names = [f"p{n}" for n in self.rng.choice(24, self.rng.integers(1, 4), replace=False)]
        try:
            if kind == "insert":
                one.insert(*names)
            elif kind in ("put", "price"):
                self.texts += 1
                text = {"title": f"text {self.texts}"} if kind == "put" else {}
                one.puts.put([{"product_id": name, "columns": {"price": price}, **text} for name in names])
            else:
                one.say(kind, *names)
            done = True
        except InputError:
            done = False
        assert self.world.change(release, kind, names, price) == done, (kind, names)

    def carry(self):
        release, one = self.one()
        one.carrier.carry()
        self.world.carry(release)
        one.updates.catch_up()
        self.compare(release, one)

    def compare(self, release, one):
        assert {name: price for name, (*_, price) in one.shop.all.items()} == self.world.releases[release].prices


@pytest.mark.parametrize("seed", range(10))
def test_random_histories_of_releases_hold_what_the_slow_model_holds(publisher, seed):
    past = History(publisher, seed)
    past.begin()
    past.publish()
    for _ in range(100):
        act = str(past.rng.choice(["change", "carry", "begin", "publish", "back"], p=[0.6, 0.22, 0.08, 0.06, 0.04]))
        getattr(past, act)()
    for release, pair in past.replicas.items():
        for one in pair:
            one.updates.catch_up()
            past.compare(release, one)
            assert one.shop.all == pair[0].shop.all


def test_a_job_counts_the_changes_that_came_since_it_began(publisher, capfd):
    store = publisher.store
    job = Job(recipe=Recipe.build({"catalog": {"root": "x"}}), store=store)
    assert job.look() is None and job.seen == {}
    a = publisher.publish(publisher.begin(), catalogue(1, 2))
    old = publisher.replica(a)
    old.say("withdraw", "p1")
    assert job.look() == a and (job.pointer, job.seen) == (1, {a: 1})
    old.say("withdraw", "p2")
    old.say("restore", "p1")
    parts = releases.load(store, a).manifests(store)
    assert job.publish(parts).name == a and job.younger == 0, "nothing moved, and its own changes stay"
    parts["evaluation"] = publisher.make(store, "evaluation", {"x": b"x"}, parents=parts["evaluation"].parents)
    b = job.publish(parts).name
    assert job.younger == 2 and f"event=changes_to_carry release={b} changes=2" in capfd.readouterr().err


def test_younger_changes_are_counted_by_products_however_they_lie_in_records(publisher, monkeypatch):
    store = publisher.store
    a = publisher.publish(publisher.begin(), catalogue(1, 2, 3, 4))
    begun, old = publisher.begin(), publisher.replica(a)

    def build(trial):
        made = [{"kind": "withdraw", "products": [f"p{n}", "p4"], "of": ["r-0", n], "at": 1.0 + n} for n in (1, 2, 3)]
        for one in made:
            trial.take(one)
        return made

    old.updates.change_many(build)
    old.puts.put([{"product_id": f"p{n}", "title": "new"} for n in (2, 7)] + [{"product_id": "p4", "title": "again"}])
    old.puts.put([{"product_id": "p4", "columns": {"price": 3}}])
    b = publisher.publish(begun, catalogue(1, 2, shift=2))
    moves = history.entries(store)
    assert history.younger(store, moves, b) == 6 + 3 + 1
    store.write(f"live/{a}/0000000002.json", b"damaged")
    assert history.younger(store, moves, b) == 6 + 1 + 1
    monkeypatch.setattr(history, "_READ", 1)
    assert history.younger(store, moves, b) == 6 + 2


def test_where_changes_come_from():
    def after(release, seen, **older):
        return Left(release, seen, older)

    first, second, third = (
        Entry(1, "a", False),
        Entry(2, "b", False, after("a", 3)),
        Entry(3, "c", False, after("b", 2, a=5)),
    )
    back = Entry(4, "a", True, Left("c", 0, None))
    assert history.sources([first], "a") == history.sources([first], "b") == {}
    assert history.sources([first, second], "b") == {"a": 3}
    assert history.sources([first, second, third], "c") == {"a": 5, "b": 2}
    assert history.sources([first, second, third, back], "a") == {"b": 0, "c": 0}
    assert history.sources([first, second, third, Entry(4, "b", True, Left("c", 0, None))], "b") == {"a": 3, "c": 0}
    again = Entry(5, "b", False, after("a", 9, b=7, c=1))
    assert history.sources([first, second, third, back, again], "b") == {"a": 9, "c": 1}, (
        "published anew, of a new catalogue"
    )
    assert history.sources([third], "c") == {"a": 5, "b": 2}, "gc removed the moves before"
    old = [Entry(1, "a", False), Entry(2, "b", False), Entry(3, "a", True)]
    assert history.sources(old, "a") == history.sources(old, "b") == {}
    # Of the catalogue of b nothing is known, so nothing of a, that was current before it.
    known = [*old, Entry(4, "b", True, Left("a", 0, None))]
    assert history.sources(known, "b") == {}
    assert history.left_since([first, second, third, back], ["c"]) == {"b", "c"}
    assert history.left_since([first, second, third], ["a"]) == {"a", "b"}


def test_gc_keeps_changes_that_may_still_be_carried(publisher):
    store = publisher.store
    a = publisher.publish(publisher.begin(), catalogue(1, 2))
    b = publisher.publish(publisher.begin(), catalogue(1, 2))
    publisher.replica(a).say("withdraw", "p1")
    begun = publisher.begin()
    publisher.replica(b).say("withdraw", "p2")
    c = publisher.publish(begun, catalogue(1, 2))
    assert gc.collect(store, keep=1).kept == [c] and store.names("live") == [b]
    new = publisher.replica(c)
    assert new.carrier.carry() == Carried(1) and new.shop.held.keys() == {"p1"}
    d = publisher.publish(publisher.begin(), catalogue(1, 2))
    gc.collect(store, keep=1)
    assert store.names("live") == [c] and publisher.replica(d).carrier.carry() == Carried()


def test_a_store_of_before_carries_nothing(publisher):
    store = publisher.store
    a = publisher.publish({}, catalogue(1, 2))
    b = publisher.publish({}, catalogue(1, 2))
    assert "after" not in json.loads(store.read("current/0000000002.json"))
    publisher.replica(a).say("withdraw", "p1")
    assert publisher.replica(b).carrier.carry() == Carried()
