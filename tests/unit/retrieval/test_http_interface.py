"""The HTTP interface without Ray's proxy: every bad request has an answer of one shape, and spoils nobody else's."""

import asyncio
import datetime
import re
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve")

import numpy as np
from fastapi.testclient import TestClient
from ray import serve

from catid2_ray.artifacts import release as releases
from catid2_ray.errors import ArtifactError, InputError, StorageError
from catid2_ray.generator.users import Reading
from catid2_ray.on_ray.serve import answers as answering
from catid2_ray.on_ray.serve import app
from catid2_ray.on_ray.serve.answers import TIMEOUT_HEADER, Found, deadline_of
from catid2_ray.on_ray.serve.api import RetrieveRequest
from catid2_ray.on_ray.serve.app import THREADS, AppSettings, RetrieverReplica, api, build, check_port
from catid2_ray.on_ray.serve.keys import VARIABLE, Keys, right_of
from catid2_ray.on_ray.serve.proto import retriever_pb2 as messages
from catid2_ray.on_ray.serve.puts import Done
from catid2_ray.on_ray.serve.refusals import MOST_BYTES, sound
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.live_filters import LiveFilterIndex
from catid2_ray.retrieval.rescoring import Expansion
from catid2_ray.retrieval.retriever import Retriever
from catid2_ray.retrieval.vectors import VectorStore


@pytest.fixture(scope="module")
def replica(folder):
    """A replica as Serve would make it, around a release of six products."""
    kind = RetrieverReplica.func_or_class
    made = object.__new__(kind)
    made.settings, made.keys = AppSettings(store="s", follow=False), Keys()
    updates = SimpleNamespace(applied=0, lag_s=0.0, failing=None)
    now = SimpleNamespace(name="r1", created="2026-01-31T12:00:00Z", retriever=Retriever.open(folder), updates=updates)
    now.given_back, now.parts = 0.98, {"ids": SimpleNamespace(metrics={"base": None, "churn": None})}
    made.serving = SimpleNamespace(now=now, refused=None, swaps=0, end=lambda: None, trial=None, trial_refused=None)
    made.serving.chosen = lambda session: made.serving.now
    made.pools, made.answered = {name: ThreadPoolExecutor(threads) for name, threads in THREADS.items()}, 0.0
    made.under_way = dict.fromkeys(THREADS, 0)
    made.batches = app.Batches(made._search, made.pools["search"], **app.BATCHES)
    return made


@pytest.fixture
def client(replica, monkeypatch):
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=replica))
    # What the first request builds cannot be pickled, and other tests of this process deploy the same interface.
    monkeypatch.setattr(api, "middleware_stack", None)
    return TestClient(api, raise_server_exceptions=False)


def refused(answer, status: int, words: str) -> None:
    assert answer.status_code == status and list(answer.json()) == ["error"], answer.text
    assert words in answer.json()["error"], answer.text


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "body, words",
    [
        (b'{"query": "oak", "k": NaN}', "k: nan is no finite number"),
        (b'{"query": "oak", "k": 1e400}', "k: inf is no finite number"),
        (b'{"query": "oak", "filter": {"column": "price", "to": -Infinity}}', "filter.to: -inf is no finite number"),
        (b'{"query": "half \\ud83d"}', "query: holds half a character"),
        (b'{"query": "oak", "filter": {"column": "b", "in": ["\\ude00"]}}', "filter.in.0: holds half a character"),
        (b'{"query": "oak", "filter": {"\\ude00": 1}}', "filter: a name holds half a character"),
        (b'{"query": "oak", "k": true}', "k: Input should be a valid integer"),
        (b'{"query": "oak", "k": 0}', "k must be a whole number from 1 to 1000"),
        (b'{"query": "oak", "k": 1000000}', "k must be a whole number from 1 to 1000"),
        (b'{"query": "oak", "k": "many"}', "k: Input should be a valid integer"),
        (b'{"query": "\\u0000\\u0007"}', "at least one letter or digit"),
        (b'{"k": 3}', "give either `query` or `queries`"),
        (b"[1, 2]", "body: "),
        (b'{"query": "oak", "filter": {"products": [' + b",".join([b'"x"'] * 30_000) + b"]}}", "too large"),
        (b'{"query": "oak", "filter": ' + b'{"not": ' * 80 + b"{}" + b"}" * 80 + b"}", "too large"),
        (b'{"query": "oak", "filter": {"products": [' + b",".join([b'"x"'] * 11_000) + b"]}}", "10000 values"),
        (b'{"query": "oak", "filter": {"all": [' + b",".join([b'{"any": []}'] * 501) + b"]}}", "500 expressions"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_a_422_of_one_shape(client, body, words):
    refused(client.post("/v1/retrieve", content=body, headers=JSON), 422, words)
    assert client.post("/v1/retrieve", json={"query": "oak door", "k": 1}).json()["products"][0]["title"] == "oak door"


def test_other_refusals_have_the_same_shape(client):
    refused(client.post("/v1/retrieve", content=b'{"query": ', headers=JSON), 400, "the body is no JSON")
    for body in (b'{"query": "\xff"}', b'{"query": "oak", "k": ' + b"9" * 6000 + b"}", b'{"filter": ' + b"[" * 100_000):
        refused(client.post("/v1/retrieve", content=body, headers=JSON), 400, "cannot be read as JSON")
    refused(client.post("/v1/retrieve", content=b"{}"), 422, "content-type: application/json; the request has none")
    for kind in ("text/plain", "text/json"):
        wrong = client.post("/v1/retrieve", content=b"{}", headers={"content-type": kind})
        refused(wrong, 422, f"content-type: application/json; found '{kind}'")
    odd = client.post("/v1/retrieve", content=b"{}", headers={"content-type": "Application/JSON; charset=utf-8"})
    refused(odd, 422, "give either `query` or `queries`")
    quoted = client.get("/" + "x" * 60_000)
    assert quoted.status_code == 404 and len(quoted.json()["error"]) < 2100
    large = b'{"query": "' + b"x" * MOST_BYTES["/v1/retrieve"] + b'"}'
    refused(client.post("/v1/retrieve", content=large, headers=JSON), 413, "1,048,576 bytes")
    refused(client.post("/v1/retrieve", content=iter([large]), headers=JSON), 413, "1,048,576 bytes")
    refused(client.get("/nowhere"), 404, "Not Found: GET /nowhere; /docs lists")
    refused(client.get("/v1/retrieve"), 405, "Method Not Allowed")
    refused(client.post("/v1/withdraw", json={"product_ids": ["p0"]}), 422, "takes no changes")


@pytest.mark.parametrize(
    "text, status",
    [
        ("☃ hinge", 200), ("🙂", 422), ("שלום עולם", 200), ("'; DROP TABLE products; --", 200),
        ("<script>alert(1)</script>", 200), ("a\u0000b", 200),
    ],
)  # fmt: skip
def test_odd_texts_are_answered(client, text, status):
    answer = client.post("/v1/retrieve", json={"query": text, "k": 2})
    assert answer.status_code == status and (status == 200 or "letter or digit" in answer.json()["error"])


def test_a_fault_of_ours_has_the_same_shape_and_a_wrong_method_says_which_are_right(client, replica, monkeypatch):
    monkeypatch.setattr(replica.serving, "now", None)
    refused(client.get("/healthz"), 500, "this should not happen (AttributeError)")
    assert client.get("/v1/retrieve").headers["allow"] == "POST"


def test_half_a_character_in_a_title_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="half a character"):
        sound({"title": "\ud83d"})
    assert sound({"title": "🙂", "vector": [0.5] * 4096}) and sound(None) is None


def test_it_says_what_it_serves_and_shows_a_page(client):
    assert client.get("/v1/release").json() == {
        "release": "r1", "created": "2026-01-31T12:00:00Z", "churn": None, "changes": 0, "products": 6, "users": False, "levels": 2,
        "filters": {"product_id": "string"}, "follows": False, "refused": None, "trial": None, "trial_refused": None,
    }  # fmt: skip
    assert client.head("/healthz").status_code == client.head("/").status_code == 200
    page = client.get("/").text
    docs = client.get("/docs").text
    assert "POST /v1/retrieve" in docs and "a free semantic ID" in docs and "<a href='#Product'>" in docs
    assert "https://" not in docs and "<code>query</code>" in docs
    assert "<form" in page and "http://" not in page and "https://" not in page and "innerHTML" not in page


def test_a_user_that_the_release_does_not_read_is_said_to_be_unread(client, replica, monkeypatch):
    asked = {"query": "oak door", "k": 2}
    anybody, mine = (client.post("/v1/retrieve", json=asked | more).json() for more in ({}, {"user": ["age 20-29"]}))
    assert mine == anybody | {"personal": False}
    monkeypatch.setattr(replica.serving.now.retriever, "reading", Reading(3, 2))
    read = client.post("/v1/retrieve", json=asked | {"recent": ["p5", "p1"]}).json()
    assert read["personal"] and read["products"] != anybody["products"] and client.get("/v1/release").json()["users"]
    monkeypatch.setattr(replica.serving.now.retriever, "reading", Reading(3, 0))
    assert client.post("/v1/retrieve", json=asked | {"recent": ["p5"]}).json()["personal"] is False, "none is read"
    refused(
        client.post("/v1/retrieve", json=asked | {"user": [""]}), 422, "user.0: String should have at least 1 character"
    )
    refused(
        client.post("/v1/retrieve", json=asked | {"recent": ["p1"] * 101}),
        422,
        "recent: List should have at most 100 items",
    )


CHURN = {"base": "r0", "churn": {"after": {"common": 300, "new": 7, "retired": 2, "prefix_churn": [0.01, 0.12]}}}


def test_it_says_what_changed_when_the_release_was_published(client, replica, monkeypatch):
    monkeypatch.setattr(replica.serving.now, "parts", {"ids": SimpleNamespace(metrics=CHURN)})
    assert client.get("/v1/release").json()["churn"] == {"base": "r0", "changed": 36, "new": 7, "left": 2}


def test_it_says_what_lives_below_a_prefix(client):
    answer = client.get("/v1/docids/<a_1>").json()
    assert (answer["count"], answer["next_codes"]) == (
        2,
        [{"token": "<b_0>", "products": 1}, {"token": "<b_1>", "products": 1}],
    )
    assert [(one["docid"], one["title"]) for one in answer["products"]] == [
        ("<a_1><b_0>", "oak table"),
        ("<a_1><b_1>", "oak door"),
    ]
    assert answer["words"] == [
        {"word": "oak", "products": 2}, {"word": "door", "products": 1}, {"word": "table", "products": 1},
    ]  # fmt: skip
    assert client.get("/v1/docids/<a_2><b_3>").json()["next_codes"] == []
    assert client.get("/v1/docids/<a_2><b_0>").json()["count"] == 0
    for wrong in ("a_1", "<b_1>", "<a_9>", "<a_1><b_0><c_0>", "<a_01>", "<a_" + "9" * 5000 + ">", "%ED%A0%80"):
        refused(client.get(f"/v1/docids/{wrong}"), 422, "")


def test_several_queries_are_answered_in_their_order(client):
    body = {"queries": ["oak door", "steel hinge", "garden hose"], "k": 2, "filter": {"products": ["p0", "p3", "p5"]}}
    answer = client.post("/v1/retrieve", json=body).json()
    alone = [
        client.post("/v1/retrieve", json={"query": query, **{name: body[name] for name in ("k", "filter")}}).json()
        for query in body["queries"]
    ]
    assert answer["products"] == [] and len(answer["answers"]) == 3
    for one, other in zip(answer["answers"], alone):
        assert [hit["product_id"] for hit in one["products"]] == [hit["product_id"] for hit in other["products"]]
        assert [hit["score"] for hit in one["products"]] == pytest.approx(
            [hit["score"] for hit in other["products"]], abs=1e-5
        )
    assert [one["products"][0]["product_id"] for one in answer["answers"]] == ["p3", "p0", "p5"]
    for wrong, words in (
        ({"queries": []}, "queries: "), ({"queries": ["oak"] * 65}, "queries: "), ({}, "either `query` or `queries`"),
        ({"query": "oak", "queries": ["oak"]}, "either `query` or `queries`"), ({"queries": ["oak", "?"]}, "letter or digit"),
    ):  # fmt: skip
        refused(client.post("/v1/retrieve", json=wrong), 422, words)


def test_an_answer_explains_itself(client):
    for query in ("oak door", "brass hinge"):
        answer = client.post("/v1/retrieve", json={"query": query, "k": 3, "explain": True}).json()
        for product in answer["products"]:
            levels, terms = product["explain"]["levels"], product["explain"]["terms"]
            assert "".join(level["token"] for level in levels) == product["docid"]
            assert levels[0]["logp"] >= levels[1]["logp"] == pytest.approx(product["logp"], abs=1e-4)
            assert sum(terms.values()) == pytest.approx(product["score"])
    plain = client.post("/v1/retrieve", json={"query": "oak door", "k": 3}).json()
    assert not any("explain" in product for product in plain["products"]) and "clusters" not in plain


def test_clusters_are_the_beginnings_of_ids(client):
    found = client.post("/v1/retrieve", json={"query": "oak door", "k": 3, "mode": "clusters"}).json()
    assert found["products"] == [] and found["fewer"] is None and len(found["clusters"]) == 3
    assert found["clusters"][0]["prefix"] == "<a_1>" and found["clusters"][0]["products"] == 2
    scores = [one["score"] for one in found["clusters"]]
    assert scores == sorted(scores, reverse=True) and scores == [one["logp"] for one in found["clusters"]]
    only = client.post("/v1/retrieve", json={"query": "oak", "mode": "clusters", "filter": {"products": ["p0"]}}).json()
    assert [one["prefix"] for one in only["clusters"]] == ["<a_0>"]
    wrong = client.post("/v1/retrieve", json={"query": "oak", "mode": "clusters", "explain": True})
    refused(wrong, 422, "only products are explained")


def test_everything_is_products_explained_and_the_clusters_above_them(client):
    asked = {"query": "oak door", "k": 3}
    ids = client.post("/v1/retrieve", json=asked | {"explain": True}).json()
    found = client.post("/v1/retrieve", json=asked | {"mode": "everything"}).json()
    assert found["products"] == ids["products"] and len(found["products"]) == 3
    prefixes = list(dict.fromkeys(one["docid"].split("<b")[0] for one in found["products"]))
    assert [one["prefix"] for one in found["clusters"]] == prefixes
    by_search = client.post("/v1/retrieve", json=asked | {"k": 4, "mode": "clusters"}).json()["clusters"]
    for one in found["clusters"]:
        (same,) = [other for other in by_search if other["prefix"] == one["prefix"]]
        assert one["products"] == same["products"] and one["score"] == pytest.approx(same["score"], abs=1e-5)


def test_a_soft_timeout_gives_what_lies_below_the_level_reached(client, replica, monkeypatch):
    calm = {"query": "oak door", "k": 3, "soft_timeout": 60}
    whole = client.post("/v1/retrieve", json={"query": "oak door", "k": 3}).json()
    assert client.post("/v1/retrieve", json=calm).json() == whole and "degraded" not in whole
    late = {"query": "oak door", "k": 3, "soft_timeout": 1e-9}
    assert client.post("/v1/retrieve", json=late).json() == whole, "without vectors there is nothing to rank by"
    counted = []
    monkeypatch.setattr(
        app.metrics, "count", lambda name, value=1, **tags: counted.append((name, tags)) if value else None
    )
    clusters = client.post("/v1/retrieve", json=late | {"mode": "clusters"}).json()
    assert "degraded" not in clusters, "one level is all that it searches"
    retriever, vectors = replica.serving.now.retriever, np.eye(6, dtype=np.float32)
    monkeypatch.setattr(retriever, "encode_query", lambda texts: np.array([[1.0, 0, 0, 0, 0, 0]] * len(texts)))
    monkeypatch.setattr(retriever, "expansion", Expansion(a=0.0))
    view = retriever.live.view
    with tempfile.TemporaryDirectory() as folder:
        stored = VectorStore.write(folder, [vectors], normalize=True)
        monkeypatch.setattr(retriever.live, "view", replace(view, products=replace(view.products, base_vectors=stored)))
        both = client.post(
            "/v1/retrieve", json={"queries": ["oak door", "oak table"], "k": 2, "soft_timeout": 1e-9}
        ).json()
        calm = client.post("/v1/retrieve", json=calm).json()
    for one in both["answers"]:
        assert one["degraded"] == {"reason": "soft_timeout"} and one["coverage"] == 0.5 and len(one["products"]) == 2
        assert one["products"][0]["product_id"] == view.products.name(0), "the nearest by vectors"
    assert "degraded" not in calm
    assert counted.count(("catid2_degraded_answers", {"reason": "soft_timeout"})) == 2
    wrong = client.post("/v1/retrieve", json=late | {"mode": "everything"})
    refused(wrong, 422, "soft_timeout: to explain an answer takes further searches")


def test_a_request_may_ask_for_another_beam(client):
    assert len(client.post("/v1/retrieve", json={"query": "oak", "k": 6}).json()["products"]) == 6
    narrow = client.post("/v1/retrieve", json={"query": "oak", "k": 1, "beam_width": 1}).json()["products"]
    assert len(narrow) == 1
    for width in (0, 1001, "2", True):
        refused(client.post("/v1/retrieve", json={"query": "oak", "beam_width": width}), 422, "beam_width: ")


def test_a_request_that_is_late_costs_no_search(client, replica, monkeypatch):
    """Whether the body or the header says how long the caller waits."""
    waits = threading.Event()
    searched = []
    monkeypatch.setattr(
        replica.batches, "search", lambda requests, early: searched.append(requests) or waits.wait(20) and [Found([])]
    )
    with client, ThreadPoolExecutor(3) as pool:  # one event loop for all of them
        first = pool.submit(client.post, "/v1/retrieve", json={"query": "oak"})
        while not searched:
            time.sleep(0.01)
        late = [
            pool.submit(client.post, "/v1/retrieve", json={"query": "door", "timeout_s": 0.01}),
            pool.submit(client.post, "/v1/retrieve", json={"query": "door"}, headers={TIMEOUT_HEADER: "0.01"}),
        ]
        while replica.batches.waiting < 2:
            time.sleep(0.01)
        time.sleep(0.02)
        waits.set()
        for one in late:
            refused(one.result(), 504, "its time is over")
        assert first.result().status_code == 200 and len(searched) == 1
    for none in ("soon", "-1", "nan"):
        assert deadline_of(RetrieveRequest(query="oak"), {TIMEOUT_HEADER: none}) is None
    refused(client.post("/v1/retrieve", json={"query": "oak", "timeout_s": 0}), 422, "timeout_s: ")


def test_it_says_what_it_knows_of_a_product(client, replica):
    known = {"release": "r1", "product_id": "p3", "docid": "<a_1><b_1>", "title": "oak door", "category_path": None}
    known["columns"] = {}
    assert client.get("/v1/products/p3").json() == known | {"live": True}
    replica.serving.now.retriever.live.withdraw(["p3"])
    try:
        assert client.get("/v1/products/p3").json() == known | {"live": False}
    finally:
        replica.serving.now.retriever.live.restore(["p3"])
    for unknown in ("nobody", "a/b", "%20", "%ED%A0%80"):
        refused(client.get(f"/v1/products/{unknown}"), 404, "")


def test_columns_of_a_product_are_json(client, replica, monkeypatch):
    index = LiveFilterIndex(
        FilterIndex(
            {
                "product_id": [f"p{n}" for n in range(6)], "price": [1.5, float("nan"), None, 2.5, 3.5, 4.5],
                "added": [datetime.date(2026, 1, 31)] * 6, "market": [["de", "at"]] * 6, "cost": [Decimal("1.20")] * 6,
            }
        )
    )  # fmt: skip
    view = replica.serving.now.retriever.live.view
    monkeypatch.setattr(replica.serving.now.retriever.live, "view", replace(view, filters=index))
    said = [client.get(f"/v1/products/{view.products.name(row)}").json()["columns"] for row in range(3)]
    rest = {"added": "2026-01-31", "cost": "1.20", "market": ["de", "at"]}
    assert said == [rest | {"price": price} for price in (1.5, None, None)]


def test_products_are_withdrawn_deleted_and_restored_again_and_again(client, replica, monkeypatch):
    """What is so already is not written again."""
    live, written = replica.serving.now.retriever.live, []

    def change(build):
        record = build()
        if record is None:
            return None
        getattr(live, record["kind"])(record["products"])
        written.append((record["kind"], *record["products"]))
        return record | {"number": len(written)}

    monkeypatch.setattr(replica.settings, "updates", True)
    monkeypatch.setattr(replica.serving.now.updates, "change", change, raising=False)
    for _ in range(2):
        assert client.delete("/v1/products/p3").json()["release"] == "r1"
        assert client.get("/v1/products/p3").json()["live"] is False
    assert client.post("/v1/withdraw", json={"product_ids": ["p3", "p4"]}).json()["change"] == 2
    for _ in range(2):
        assert client.post("/v1/restore", json={"product_ids": ["p3", "p4"]}).status_code == 200
    assert written == [("withdraw", "p3"), ("withdraw", "p3", "p4"), ("restore", "p3", "p4")]
    refused(client.delete("/v1/products/nobody"), 404, "release r1 has no product 'nobody'")
    refused(client.post("/v1/withdraw", json={"product_ids": ["p3", "nobody"]}), 422, "no product 'nobody'")
    assert client.get("/v1/products/p3").json()["live"] is True


def test_a_replica_shows_what_it_has_counted(client):
    def of(status: int) -> float:
        line = f'catid2_requests_total{{call="/v1/retrieve",status="{status}"}} '
        return float((client.get("/metrics").text.partition(line)[2] or "0").split()[0])

    before = of(200), of(422)
    assert client.post("/v1/retrieve", json={"query": "oak door", "k": 2}).status_code == 200
    assert client.post("/v1/retrieve", json={"query": "oak door", "k": 0}).status_code == 422
    assert (of(200), of(422)) == (before[0] + 1, before[1] + 1)
    shown = client.get("/metrics")
    assert shown.headers["content-type"].startswith("text/plain")
    assert 'catid2_answer_ms_bucket{le="10000.0",release="r1"}' in shown.text


def test_a_replica_that_answers_nothing_is_alive_but_not_ready(client, replica, monkeypatch):
    assert client.get("/readyz").json() == {"status": "ready", "release": "r1"}
    assert client.head("/readyz").status_code == 200
    monkeypatch.setattr(replica.serving.now, "retriever", None)
    refused(client.get("/readyz"), 503, "answers no query now (AttributeError")
    assert client.head("/readyz").status_code == 503
    assert client.head("/healthz").status_code == client.get("/healthz").status_code == 200


def test_every_status_is_documented_with_its_body():
    of_any, change = {"200", "408", "503"}, {"400", "401", "403", "409", "413", "422"}
    more = {
        ("post", "/v1/retrieve"): {"400", "401", "413", "422", "504"}, ("get", "/v1/docids/{prefix}"): {"401", "422"},
        ("get", "/v1/products/{product_id}"): {"401", "404", "422"}, ("get", "/v1/release"): {"401"},
        ("get", "/metrics"): {"401"}, ("get", "/healthz"): set(), ("get", "/readyz"): set(),
        ("delete", "/v1/products/{product_id}"): change | {"404"}, ("put", "/v1/products"): change,
        **{("post", path): change for path in ("/v1/products", "/v1/withdraw", "/v1/restore")},
    }  # fmt: skip
    documented = {(verb, path): call for path, verbs in api.openapi()["paths"].items() for verb, call in verbs.items()}
    assert {call: set(one["responses"]) for call, one in documented.items()} == {
        call: of_any | statuses for call, statuses in more.items()
    }
    for one in documented.values():
        assert set(one["responses"]["503"]["content"]) == {"application/json", "text/plain"}
        for status in set(one["responses"]) - {"200", "408"}:
            schema = one["responses"][status]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/Refusal"), status


def test_the_manual_lists_the_statuses_that_the_interface_names():
    """405 and 500 are of no call, so the description has them not."""
    page = (Path(__file__).parents[3] / "docs" / "reference" / "http.md").read_text()
    listed = [status for line in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for status in line.split(", ")]
    named = {
        status for verbs in api.openapi()["paths"].values() for call in verbs.values() for status in call["responses"]
    }
    assert sorted(listed) == sorted(named | {"405", "500"})


def test_a_busy_replica_is_healthy_and_a_stuck_one_is_not(replica, monkeypatch):
    """Load alone must not kill a replica: its canary may wait, so long as others get their answers."""
    held, asked = threading.Event(), []

    def retrieve(*_, **__):
        asked.append(held.wait(60))

    monkeypatch.setattr(replica, "canary_deadline_s", 0.05, raising=False)
    monkeypatch.setattr(replica.serving.now, "retriever", SimpleNamespace(retrieve=retrieve))
    monkeypatch.setattr(replica, "canary", None, raising=False)

    async def look() -> None:
        replica.answered = time.monotonic() + 60  # another search came to its end while the canary waited
        await replica.check_health()
        replica.answered = 0.0
        with pytest.raises(TimeoutError):
            await replica.check_health()
        held.set()
        await replica.canary
        assert replica.answered > 0

    asyncio.run(look())
    assert asked == [True]  # one canary, however often it is asked for
    replica.canary = None


def test_a_replica_that_cannot_apply_changes_is_replaced_and_one_without_its_store_is_not(replica, monkeypatch):
    monkeypatch.setattr(replica.serving.now.updates, "lag_s", 61.0)
    for failing in (None, StorageError("the store is away"), ArtifactError("change 7 is damaged")):
        monkeypatch.setattr(replica.serving.now.updates, "failing", failing)
        asyncio.run(replica.check_health())
    monkeypatch.setattr(replica.serving.now.updates, "failing", KeyError("docid"))
    with pytest.raises(RuntimeError, match="changes have not been applied for 61 s: 'docid'"):
        asyncio.run(replica.check_health())


def test_a_replica_whose_search_never_ends_is_replaced_though_its_canary_is_answered(replica, monkeypatch):
    begun, held = threading.Event(), threading.Event()
    monkeypatch.setattr(replica, "stuck_s", 1.0, raising=False)

    def search(requests, early):
        begun.set()
        held.wait(20)
        return [Found([])] * len(requests)

    async def ask() -> None:
        batches = app.Batches(search, replica.pools["search"], size=4, wait_s=0.0, most_waiting=9)
        monkeypatch.setattr(replica, "batches", batches)
        await replica.check_health()
        waiting = asyncio.create_task(batches.ask("oak"))
        await asyncio.to_thread(begun.wait, 10)
        await replica.check_health()
        await asyncio.sleep(1)
        try:
            with pytest.raises(RuntimeError, match="a search has not ended for 1 s"):
                await replica.check_health()
        finally:
            held.set()
        await waiting
        await replica.check_health()

    asyncio.run(ask())


def test_searches_changes_and_health_do_not_wait_for_each_other(replica):
    held = threading.Event()

    async def ask() -> None:
        waiting = [asyncio.ensure_future(replica._run("changes", held.wait, 20)) for _ in range(40)]
        await asyncio.wait_for(replica.check_health(), 10)
        assert await asyncio.wait_for(replica._run("search", lambda: 7), 10) == 7
        held.set()
        await asyncio.gather(*waiting)

    asyncio.run(ask())


def test_changes_that_wait_are_bounded_and_leave_room_for_searches(client, replica, monkeypatch):
    """As for a store that is away: else they fill the replica, and nobody can search."""
    held, body = threading.Event(), {"product_ids": ["p3"]}
    monkeypatch.setattr(replica.settings, "updates", True)
    monkeypatch.setattr(replica.serving.now.updates, "change", lambda build: held.wait(20) and None, raising=False)
    most = app.MOST_UNDER_WAY["changes"]
    with client, ThreadPoolExecutor(most) as pool:
        waiting = [pool.submit(client.post, "/v1/withdraw", json=body) for _ in range(most)]
        try:
            while replica.under_way["changes"] < most:
                time.sleep(0.01)
            answer = client.post("/v1/restore", json=body)
            refused(answer, 503, "64 calls of this kind are under way already")
            assert answer.headers["retry-after"] == "1"
            assert client.post("/v1/retrieve", json={"query": "oak", "k": 1}).status_code == 200
        finally:
            held.set()
        assert {one.result().status_code for one in waiting} == {200}
    assert replica.under_way["changes"] == 0


def test_an_explanation_whose_time_is_over_is_not_made(client, replica, monkeypatch):
    made, held = [], threading.Event()

    async def found(asked, *, deadline):
        return Found([])

    monkeypatch.setattr(replica, "batches", SimpleNamespace(ask=found))
    monkeypatch.setattr(answering, "explained", lambda *_, **__: made.append(1) or [])
    busy, asked = replica.pools["explain"].submit(held.wait, 20), {"query": "oak", "k": 1, "explain": True}
    with client, ThreadPoolExecutor(1) as pool:
        late = pool.submit(client.post, "/v1/retrieve", json=asked | {"timeout_s": 0.01})
        while not replica.under_way["explain"]:
            time.sleep(0.01)
        time.sleep(0.02)
        held.set()
        refused(late.result(), 504, "the time that this request was given is over")
    assert busy.result() and not made


def test_filters_do_not_wait_for_explanations(client, replica):
    """Which take searches of their own, as many as there are levels."""
    held = threading.Event()
    busy = [replica.pools["explain"].submit(held.wait, 20) for _ in range(3)]
    with client, ThreadPoolExecutor(3) as pool:
        explained = [
            pool.submit(client.post, "/v1/retrieve", json={"query": "oak door", "k": 2, "explain": True})
            for _ in range(2)
        ]
        filtered = {"query": "oak door", "k": 1, "filter": {"products": ["p0"]}}
        try:
            assert client.post("/v1/retrieve", json=filtered).status_code == 200
            assert not any(one.done() for one in explained)
        finally:
            held.set()
        assert [one.result().json()["products"][0]["product_id"] for one in explained] == ["p3"] * 2
    assert all(one.result() for one in busy)


def test_keys_say_who_may_read_and_who_may_change(client, replica, monkeypatch, tmp_path):
    reader, writer = "r" * 20, "w" * 20
    (tmp_path / "keys").write_text(f"# of the shop\nread {reader}\n\nwrite {writer}\n")
    monkeypatch.setattr(replica, "keys", Keys.of(str(tmp_path / "keys")))

    def key(one):
        return {"authorization": f"Bearer {one}"}

    body, change = {"query": "oak", "k": 1}, {"product_ids": ["nobody"]}
    for headers in ({}, key("x" * 20), {"authorization": f"Basic {reader}"}, key("ß")):
        headers = {name: value.encode() for name, value in headers.items()}
        for answer in (
            client.post("/v1/retrieve", json=body, headers=headers),
            client.post("/v1/withdraw", json=change, headers=headers),
            client.get("/v1/release", headers=headers),
            client.get("/v1/docids/<a_1>", headers=headers),
        ):
            refused(answer, 401, "Authorization: Bearer KEY")
            assert answer.headers["www-authenticate"] == "Bearer"
    for one in (reader, writer):
        assert client.post("/v1/retrieve", json=body, headers=key(one)).status_code == 200
    refused(client.post("/v1/withdraw", json=change, headers=key(reader)), 403, "may read, not change")
    called = []
    monkeypatch.setattr(
        replica.serving.now.updates, "change", lambda build: called.append(build()) or {"number": 1}, raising=False
    )
    assert client.post("/v1/withdraw", json=change, headers=key(writer)).status_code == 200 and len(called) == 1
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == client.get("/").status_code == 200


@pytest.mark.parametrize(
    "method, path, key, status",
    [
        ("POST", "/v1/retrieve", "", 401),
        ("PUT", "/v1/products", "r" * 20, 403),
        ("PUT", "/v1/products/p1", "r" * 20, 403),
        ("POST", "/prefix/v1/withdraw", "r" * 20, 403),
        ("POST", "/openapi.json/", "", 401),
    ],
)
def test_a_request_without_the_right_key_is_refused_before_its_body_is_read(
    client, replica, monkeypatch, method, path, key, status
):
    monkeypatch.setattr(replica, "keys", Keys("read " + "r" * 20))
    sent = []

    async def receive():
        pytest.fail("the body was read")

    async def send(message):
        sent.append(message)

    root, headers = "/prefix" if path.startswith("/prefix") else "", [(b"content-length", b"9" * 12)]
    if key:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "root_path": root,
        "headers": headers,
    }
    asyncio.run(api(scope | {"query_string": b"", "scheme": "http", "server": ("test", 80)}, receive, send))
    assert sent[0]["status"] == status


def test_every_call_but_those_that_say_nothing_of_products_needs_a_key():
    needed = {
        (path, verb): right_of(verb.upper(), path) for path, verbs in api.openapi()["paths"].items() for verb in verbs
    }
    reads = {("/v1/retrieve", "post")} | {(path, verb) for path, verb in needed if path in ONLY_READ and verb == "get"}
    assert {call for call, right in needed.items() if right is None} == {("/healthz", "get"), ("/readyz", "get")}
    assert {call for call, right in needed.items() if right == "read"} == reads


ONLY_READ = ("/metrics", "/v1/release", "/v1/docids/{prefix}", "/v1/products/{product_id}")


def test_keys_that_cannot_be_used_are_refused_without_being_named(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not Keys.of(None)
    monkeypatch.setenv(VARIABLE, "write " + "s" * 16)
    assert Keys.of(None).any_writes
    for wrong in ("write short-secret", "delete " + "secret" * 4, "secret" * 4):
        with pytest.raises(InputError, match="line 1 of CATID2_KEYS is no key") as error:
            Keys(wrong)
        assert "secret" not in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        Keys.of(str(tmp_path / "none"))
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(InputError, match="there are none on this node"):
        Keys.of(None, needed=True)
    with pytest.raises(InputError, match="cannot be read"):
        build(AppSettings(store="/s", keys=str(tmp_path / "none")))


def test_a_deployment_that_does_not_follow_names_its_release(monkeypatch):
    """A replica that starts after a publication serves what the others serve."""
    monkeypatch.setattr(releases, "current", lambda store: SimpleNamespace(name="r-first"))
    # Not bound in truth: a replica that another test has asked in this process cannot be pickled.
    monkeypatch.setattr(type(RetrieverReplica), "bind", lambda self, settings: settings)
    assert build(AppSettings(store="/s", follow=False)).release == "r-first"
    assert build(AppSettings(store="/s", release="r-older")).release == "r-older"
    assert build(AppSettings(store="/s")).release is None and AppSettings(store="s").follows
    monkeypatch.setenv(VARIABLE, "write " + "s" * 16)
    assert build(AppSettings(store="/s")).needs_keys


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match="end what listens there, or give --port"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


class Call:
    """What a replica is told of a call over gRPC."""

    def __init__(self, **metadata):
        self.metadata, self.code, self.details = metadata, None, None

    def invocation_metadata(self):
        return list(self.metadata.items())

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details


def test_a_call_over_grpc_is_answered_and_refused_as_over_http(client, replica, monkeypatch):
    asked = {"query": "oak door", "k": 3}
    over_http = client.post("/v1/retrieve", json=asked).json()
    message = asyncio.run(replica.Retrieve(messages.RetrieveRequest(**asked), Call()))
    assert message.release == "r1" and [(one.product_id, one.score) for one in message.products] == [
        (one["product_id"], one["score"]) for one in over_http["products"]
    ]
    monkeypatch.setattr(replica, "keys", Keys("read " + "r" * 20))
    for call, fields, code, words in (
        (Call(), asked, "UNAUTHENTICATED", "Bearer KEY"),
        (Call(authorization="Bearer " + "r" * 20), {"query": "?"}, "INVALID_ARGUMENT", "at least one letter or digit"),
    ):
        message = asyncio.run(replica.Retrieve(messages.RetrieveRequest(**fields), call))
        assert message == messages.RetrieveResponse(), "what is raised is a traceback in Ray's log"
        assert call.code.name == code and words in call.details
    monkeypatch.setattr(replica, "_retrieve", lambda *_: 1 / 0)
    call = Call(authorization="Bearer " + "r" * 20)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(replica.Retrieve(messages.RetrieveRequest(**asked), call))
    assert call.code.name == "INTERNAL"


def test_products_are_put(client, replica, monkeypatch):
    replica_puts = []

    def put(asked, *, key):
        replica_puts.append((asked, key))
        return Done(4, [{"product_id": "p0", "docid": "<a_1><b_0>", "did": "changed"}])

    monkeypatch.setattr(replica.settings, "updates", True)
    monkeypatch.setattr(replica.serving.now, "puts", SimpleNamespace(put=put), raising=False)
    body = {"products": [{"product_id": "p0", "columns": {"price": 5}}]}
    refused(client.put("/v1/products", json=body, headers={"Idempotency-Key": ""}), 422, "idempotency-key")
    answer = client.put("/v1/products", json=body, headers={"Idempotency-Key": "night-7"})
    assert answer.json() == {
        "release": "r1", "change": 4, "products": [{"product_id": "p0", "docid": "<a_1><b_0>", "did": "changed"}],
    }  # fmt: skip
    ((asked, key),) = replica_puts
    assert key == "night-7" and asked[0]["columns"] == {"price": 5} and asked[0]["title"] is None
    refused(client.put("/v1/products", json={"products": []}), 422, "products: List should have at least 1 item")
    refused(client.put("/v1/products", json={"products": [{"product_id": ""}]}), 422, "products.0.product_id")
