"""PUT of products: idempotent, in place where the text stays, a new row under the same ID where it does not."""

import pytest

from catid2_ray.errors import InputError
from catid2_ray.on_ray.machine import live_log
from catid2_ray.on_ray.machine.live_log import LiveLog
from catid2_ray.on_ray.serve.carry import Carried, _Fitting
from catid2_ray.on_ray.serve.puts import Puts
from tests.storage.test_carry import Publisher, Replica, catalogue, series

NONE = float("-inf")


@pytest.fixture
def one(local_store):
    return Replica(local_store, "r-1", catalogue(1, 2, 3))


def said(done) -> dict[str, str]:
    return {product["product_id"]: product["did"] for product in done.products}


def product(name, title=None, **more):
    return {"product_id": name, "title": title, "description": None, "category_path": [], "docid": None, **more}


def test_what_is_put_is_inserted_changed_in_place_or_replaced(one, local_store):
    puts, shop = Puts(one.updates, one.newcomers), one.shop
    rows = shop.live.view.rows
    done = puts.put([product("p2", columns={"price": 7.0}), product("p3", "p3", value=2.0), product("p9", "nine")])
    assert done.number == 1 and said(done) == {"p2": "changed", "p3": "changed", "p9": "inserted"}
    assert [p["docid"] for p in done.products] == [shop.held[name] for name in ("p2", "p3", "p9")]
    assert shop.live.view.rows == rows + 1, "a price that changes uses up nothing"
    assert shop.all["p2"] == (one.shop.base["p2"], "p2", 0.0, 7) and shop.all["p3"][2:] == (2.0, 1)
    assert shop.all["p9"][1:] == ("nine", NONE, None)

    done = puts.put(
        [product("p2", "another title", columns={"price": 3.0}, value=5.0), product("p9", docid="<a_7><b_7>")]
    )
    assert said(done) == {"p2": "replaced", "p9": "replaced"} and done.number == 2
    assert shop.all["p2"] == (one.shop.base["p2"], "another title", 5.0, 3), "under the same ID"
    assert shop.all["p9"] == ("<a_7><b_7>", "nine", NONE, None)
    other = Replica(local_store, "r-1", catalogue(1, 2, 3))
    assert other.updates.catch_up() == 2 and other.shop.all == shop.all


def test_the_same_content_again_writes_nothing_and_a_whole_product_changes_its_price_in_place(one, local_store):
    puts, log = Puts(one.updates, one.newcomers), LiveLog(local_store, "r-1")
    whole = product("p9", "nine", description="d", columns={"price": 1.0})
    assert said(puts.put([whole, product("p1", value=1.0)])) == {"p9": "inserted", "p1": "changed"}
    again = puts.put([product("p1", value=1.0), whole])
    assert again.number == 1 and said(again) == {"p1": "unchanged", "p9": "unchanged"} and log.count() == 1
    assert again.products[1]["docid"] == one.shop.held["p9"]
    other = Puts(*(lambda r: (r.updates, r.newcomers))(Replica(local_store, "r-1", catalogue(1, 2, 3))))
    assert said(other.put([whole])) == {"p9": "unchanged"}, "whichever replica is asked"
    assert said(puts.put([product("p2")])) == {"p2": "unchanged"} and log.count() == 1, "nothing is asked for"

    rows = one.shop.live.view.rows
    for number, price in enumerate((2.0, 3.0, 2.0), 2):
        assert said(puts.put([whole | {"columns": {"price": price}}])) == {"p9": "changed"}
        assert one.shop.all["p9"][3] == price and log.count() == number
    assert one.shop.live.view.rows == rows
    assert said(puts.put([product("p9", columns={"price": 4.0})])) == {"p9": "changed"}
    assert said(puts.put([whole])) == {"p9": "changed"} and one.shop.all["p9"][3] == 1, "its text is known still"
    assert one.shop.live.view.rows == rows
    assert said(puts.put([whole | {"description": "e"}])) == {"p9": "replaced"}

    one.say("withdraw", "p9")
    held = other.updates.retriever.held["p9"]
    assert said(puts.put([whole])) == {"p9": "inserted"} and one.shop.held["p9"] == held, "the ID that it had"
    one.say("withdraw", "p9")
    one.say("restore", "p9")
    assert said(puts.put([whole])) == {"p9": "replaced"}, "what it is now was not put"


def test_an_idempotency_key_is_answered_with_its_first_change(one, local_store):
    puts = Puts(one.updates, one.newcomers)
    asked = [product("p9", "nine"), product("p1", columns={"price": 2.0})]
    first = puts.put(asked, key="k1")
    puts.put([product("p1", columns={"price": 3.0})], key="k2")
    other = Replica(local_store, "r-1", catalogue(1, 2, 3))
    assert Puts(other.updates, other.newcomers).put(asked, key="k1") == puts.put(asked, key="k1") == first
    assert one.shop.all["p1"][3] == 3 and LiveLog(local_store, "r-1").count() == 2
    with pytest.raises(InputError, match="the idempotency key 'k1' was used for other products; take a new key"):
        puts.put([product("p1", columns={"price": 4.0})], key="k1")


def test_what_cannot_be_put_leaves_nothing(one, local_store):
    puts = Puts(one.updates, one.newcomers)
    one.insert("p9")
    one.say("withdraw", "p9")
    before = one.shop.all
    for asked, message in [
        ([product("p8", columns={"price": 1.0})], "product 'p8' is not live, so it needs a title"),
        ([product("p9", value=1.0)], "product 'p9' is not live, so it needs a title"),
        ([product("p1", value=1.0), product("p1", value=2.0)], "product 'p1' is put twice in one request"),
        ([product("p1", "new", docid=one.shop.base["p2"])], "product 'p1' would share the ID"),
        ([product("p1", value=1.0), product("p2", columns={"weight": 1.0})], "weight"),
        ([product("p1", value=1.0), product("p2", columns={"price": "x"})], "price"),
        ([product("p8", "eight", docid="<a_9><b_0>")], "code 9 at level 0"),
    ]:
        with pytest.raises(InputError, match=message):
            puts.put([product("p3", columns={"price": 9.0}), *asked])
    assert one.shop.all == before and one.updates.applied == LiveLog(local_store, "r-1").count() == 2


def test_what_was_put_is_carried_over(local_store, chain, make):
    publisher = Publisher(local_store, chain, make)
    a = publisher.publish(publisher.begin(), catalogue(1, 2, 3, 4))
    begun = publisher.begin()
    old = publisher.replica(a)
    puts = Puts(old.updates, old.newcomers)
    asked = [
        product("p1", columns={"price": 5.0}), product("p2", "other", description="d", value=3.0),
        product("p5", "five", columns={"price": 6.0}), product("p6", "six", description="e"), product("p4", value=9.0),
    ]  # fmt: skip
    puts.put(asked, key="k")
    puts.put([product("p4", value=8.0)])
    b = publisher.publish(begun, catalogue(1, 2, 3, 5, shift=2))
    new = publisher.replica(b)
    assert new.carrier.carry() == Carried(1, 1)
    now, base = new.shop.all, new.shop.base
    assert now["p1"] == (base["p1"], "p1", 0.0, 5) and now["p2"] == (base["p2"], "other", 3.0, None)
    assert now["p5"] == (base["p5"], "p5", 0.0, 6), "the catalogue has it: only its price is as it was put"
    assert now["p6"][1:] == ("six", NONE, None) and now.keys() == {"p1", "p2", "p3", "p5", "p6"}
    first, second = series(local_store, b)
    assert first["left_out"] == {"p4": f"it is not live in release {b}"} == second["left_out"]
    more = Puts(new.updates, new.newcomers)
    assert said(more.put([asked[0], asked[3]])) == {"p1": "unchanged", "p6": "unchanged"}
    answered = more.put(asked, key="k")
    assert answered.number == 1 and said(answered) == {
        "p1": "changed",
        "p2": "replaced",
        "p5": "changed",
        "p6": "inserted",
    }
    other = publisher.replica(b)
    assert other.updates.catch_up() == 1 and other.shop.all == now


def test_a_category_that_was_made_of_a_path_comes_not_over_the_catalogues_own(one):
    put = product("p1", "one", columns={"category_path": ["x"], "price": 5.0}, said={"category_path": ["x"]})
    record = {"answer": [{"product_id": "p1", "did": "inserted"}], "changed": [], "products": [put], "content": {}}
    candidates, _ = _Fitting(one.updates, one.newcomers, lambda release: "q")._puts("r-0", record, {})
    assert candidates == [{"product_id": "p1", "columns": {"price": 5.0}}], "its catalogue says where it belongs"


def test_the_newest_idempotency_keys_are_known(one, local_store, monkeypatch):
    monkeypatch.setattr(live_log, "KEPT_KEYS", 3)
    for n in range(5):
        one.puts.put([product("p1", columns={"price": float(n)})], key=f"k{n}")
    assert list(one.updates.keys) == ["k2", "k3", "k4"]
    assert one.puts.put([product("p1", columns={"price": 2.0})], key="k2").number == 3
    two = Replica(local_store, "r-1", catalogue(1, 2, 3))
    two.updates.catch_up()
    assert two.updates.keys == one.updates.keys
