"""A replica under constant load while a release is swapped, rolled back and refused, while the store is away, and while changes
arrive: no request fails, and every answer is that of the one release that it names."""

import asyncio
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from ray import serve

from catid2_ray.artifacts import history, trials
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.errors import StorageError
from catid2_ray.on_ray.serve import metrics
from catid2_ray.on_ray.serve.app import AppSettings, RetrieverReplica, api
from catid2_ray.on_ray.serve.opened import Opened
from tests import load
from tests.stored import two_releases

QUERIES: list[str] = []  # titles of the release


class Load(load.Load):
    """Which no request may fail."""

    def __init__(self, base):
        super().__init__(base, QUERIES)

    def more(self, answers: int = 40, **options) -> None:
        super().more(answers, **options)
        assert not self.failed, self.failed[0]

    def end(self) -> None:
        super().end()
        assert not self.failed, self.failed[0]


@pytest.fixture
def replica(tmp_path, monkeypatch):
    """A replica behind a server of HTTP, in this process; `first` is current."""
    store, first, second = two_releases(tmp_path)
    expected = {}
    for name in (first, second):
        opened = Opened(store, name, AppSettings(store=store.uri))
        QUERIES[:] = [opened.retriever.products.title(row) for row in range(0, 150, 25)]
        expected[name] = {
            query: [hit.product_id for hit in opened.retriever.retrieve([query], k=5)[0]] for query in QUERIES
        }
        opened.end()
    assert expected[first] != expected[second]
    history.rollback(store, first)
    kind = RetrieverReplica.func_or_class.__mro__
    own = next(one for one in kind if one.__init__.__qualname__ == "RetrieverReplica.__init__")
    made = own(AppSettings(store=store.uri, updates=True, poll_s=0.05, follow_s=0.05))
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=made))
    monkeypatch.setattr(api, "middleware_stack", None)
    with served(api) as base:
        yield SimpleNamespace(store=store, first=first, second=second, expected=expected, own=made, base=base)
    made.serving.end()


class served:
    """The interface on a free port of this machine."""

    def __init__(self, app):
        import uvicorn

        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(20)


def until(true) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_release_is_swapped_rolled_back_and_refused_under_load(replica):
    serving, asked = replica.own.serving, Load(replica.base)
    asked.more()
    history.rollback(replica.store, replica.second)
    until(lambda: serving.now.name == replica.second)
    asked.more()
    history.rollback(replica.store, replica.first)
    until(lambda: serving.now.name == replica.first)
    asked.more()
    bad = releases.load(replica.store, replica.second).parts["ids"]["key"]
    (manifest,) = [
        one for one in releases.load(replica.store, replica.second).manifests(replica.store).values() if one.key == bad
    ]
    serving.last.end()
    serving.last = None  # so that it has to be opened anew
    lost = manifest.file("trie/trie.json")
    kept = replica.store.read(lost)
    replica.store.write(lost, kept + b" ")
    number = releases.pointer(replica.store)[0]
    replica.store.create(f"current/{number + 1:010d}.json", f'{{"release": "{replica.second}"}}'.encode())
    until(lambda: serving.refused is not None)
    asked.more()
    asked.end()
    assert serving.now.name == replica.first and serving.refused[0] == replica.second
    assert {name for name, _, _ in asked.seen} == {replica.first, replica.second}
    for name, query, products in asked.seen:
        assert products == replica.expected[name][query]


def test_a_release_is_tried_asked_beside_and_promoted_under_load(replica):
    serving, seen = replica.own.serving, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            metrics,
            "observe",
            lambda name, value, **tags: name == "catid2_shadow_overlap" and seen.append((tags, value)),
        )
        asked = Load(replica.base)
        trials.begin(replica.store, replica.second, Shares(0, 100))
        until(lambda: len(seen) > 3)
        assert {name for name, _, _ in asked.seen} == {replica.first}
        expected = {
            len(set(replica.expected[replica.first][query]) & set(replica.expected[replica.second][query])) / 5
            for query in QUERIES
        }
        assert {tags["release"] for tags, _ in seen} == {replica.second} and {value for _, value in seen} <= expected
    trials.begin(replica.store, replica.second, Shares(50))
    until(lambda: {name for name, _, _ in asked.seen[-100:]} == {replica.first, replica.second})
    with httpx.Client(base_url=replica.base, timeout=60) as client:
        assert client.get("/v1/release").json()["trial"] == {"release": replica.second, "percent": 50, "shadow": 0}
        for session in ("a", "b", "c", "d"):
            answers = [
                client.post("/v1/retrieve", json={"query": query}, headers={"x-session-id": session})
                for query in QUERIES
            ]
            assert len({answer.json()["release"] for answer in answers}) == 1
    trials.promote(replica.store)
    until(lambda: serving.now.name == replica.second)
    asked.more()  # those that were on their way have come
    before = len(asked.seen)
    asked.more()
    asked.end()
    assert {name for name, _, _ in asked.seen[before:]} == {replica.second}
    for name, query, products in asked.seen:
        assert products == replica.expected[name][query]


def test_it_answers_while_the_store_is_away_and_takes_changes_when_it_is_back(replica, monkeypatch):
    def away(*_, **__):
        raise StorageError("the store is away")

    asked = Load(replica.base)
    asked.more()
    updates = replica.own.serving.now.updates
    with monkeypatch.context() as patch:
        for name in ("names", "exists", "read", "create"):
            patch.setattr(Store, name, away)
        until(lambda: updates.lag_s > 0.5)
        asked.more()
        refused = httpx.post(f"{replica.base}/v1/withdraw", json={"product_ids": ["p1"]}, timeout=60)
        assert refused.status_code == 503
    gone = replica.expected[replica.first][QUERIES[0]][0]
    until(
        lambda: httpx.post(f"{replica.base}/v1/withdraw", json={"product_ids": [gone]}, timeout=60).status_code == 200
    )
    asked.more()
    asked.end()
    last = [products for _, query, products in asked.seen if query == QUERIES[0]][-1]
    assert gone not in last
    for _, query, products in asked.seen:
        assert products == replica.expected[replica.first][query] or gone in replica.expected[replica.first][query]


@pytest.mark.parametrize("turns", [6, pytest.param(40, marks=pytest.mark.slow, id="a thousand changes")])
def test_changes_arrive_under_load(replica, turns):
    """Prices in requests of many products and of one, products withdrawn, deleted and restored: an answer is that of the products
    before or after a change, and at the end all replicas hold the same."""
    opened = Opened(replica.store, replica.first, AppSettings(store=replica.store.uri))
    gone, other = (replica.expected[replica.first][query][0] for query in QUERIES[:2])
    assert gone != other
    right = {query: [products] for query, products in replica.expected[replica.first].items()}
    for one in (gone, other):
        opened.retriever.withdraw([one])
        for query in QUERIES:
            right[query].append([hit.product_id for hit in opened.retriever.retrieve([query], k=5)[0]])
        opened.retriever.restore([one])
    names = [opened.retriever.products.name(row) for row in range(20)]
    opened.end()
    asked, changed, records = Load(replica.base), 0, 0
    with httpx.Client(base_url=replica.base, timeout=60) as client:

        def said(verb: str, path: str, count: int, **body) -> list:
            nonlocal changed, records
            answer = client.request(verb, path, **({"json": body} if body else {}))
            assert answer.status_code == 200, answer.text
            changed, records = changed + count, records + bool(count)
            assert answer.json()["change"] == records
            return answer.json().get("products", [])

        def priced(*products: str, price: float) -> list[dict]:
            return [{"product_id": one, "columns": {"price": price}} for one in products]

        for turn in range(turns):
            said("PUT", "/v1/products", len(names), products=priced(*names, price=turn / 4))
            again = said("PUT", "/v1/products", 0, products=priced(*names, price=turn / 4))
            assert {one["did"] for one in again} == {"unchanged"}
            said("PUT", "/v1/products", 1, products=priced(names[turn % 20], price=100.0 + turn))
            said("POST", "/v1/withdraw", 1, product_ids=[gone])
            said("POST", "/v1/restore", 1, product_ids=[gone])
            said("DELETE", f"/v1/products/{other}", 1)
            said("POST", "/v1/restore", 1, product_ids=[other])
        assert changed == 25 * turns and client.get("/healthz").json()["changes"] == records == 6 * turns
        prices = [client.get(f"/v1/products/{name}").json()["columns"]["price"] for name in names]
        last = (turns - 1) % 20
        assert prices == [99.0 + turns if place == last else (turns - 1) / 4 for place in range(20)]
    asked.more()
    asked.end()
    assert len(asked.seen) > 100
    for _, query, products in asked.seen:
        assert products in right[query]
    fresh = Opened(replica.store, replica.first, AppSettings(store=replica.store.uri))
    for query in QUERIES:
        assert [hit.product_id for hit in fresh.retriever.retrieve([query], k=5)[0]] == right[query][0]
    one, two = (retriever.live_state() for retriever in (fresh.retriever, replica.own.serving.now.retriever))
    fresh.end()
    assert one.keys() == two.keys() and all(one[name].equals(two[name]) for name in one)
