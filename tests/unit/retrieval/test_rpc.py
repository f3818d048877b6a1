"""The gRPC interface: what the messages hold is what the HTTP interface holds, and it refuses alike."""

import json

import grpc
import pytest

pytest.importorskip("ray.serve")

from catid2_ray.errors import QueryError, StorageError
from catid2_ray.on_ray.serve import api, rpc
from catid2_ray.on_ray.serve.proto import retriever_pb2 as messages
from catid2_ray.on_ray.serve.refusals import Unserved


@pytest.mark.parametrize("name", ["RetrieveResponse", "Answer", "Product", "Cluster", "Explain", "Level", "Degraded"])
def test_messages_have_the_fields_of_the_interface(name):
    fields = {field.name for field in getattr(messages, name).DESCRIPTOR.fields}
    assert fields == set(getattr(api, name).model_fields)


def test_a_request_has_the_fields_of_the_interface():
    fields = {field.name for field in messages.RetrieveRequest.DESCRIPTOR.fields}
    assert (fields - {"filter_json"}) | {"filter"} == set(api.RetrieveRequest.model_fields)


def test_a_request_is_read_as_json_would_be():
    asked = {"query": "oak", "k": 3, "filter": {"column": "sizes", "in": [1, 2**60]}, "explain": True, "timeout_s": 0.5}
    message = messages.RetrieveRequest(
        query="oak", k=3, filter_json=json.dumps(asked["filter"]), explain=True, timeout_s=0.5
    )
    assert rpc.request_of(message) == api.RetrieveRequest(**asked)
    assert rpc.request_of(messages.RetrieveRequest(query="oak")) == api.RetrieveRequest(query="oak")
    several = messages.RetrieveRequest(queries=["oak", "elm"])
    assert [one.query for one in rpc.request_of(several).each()] == ["oak", "elm"]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "give either `query` or `queries`"),
        ({"query": "x", "filter_json": "{"}, "filter_json is no JSON"),
        ({"query": "x", "filter_json": "[" * 100_000}, "filter_json is no JSON"),
        ({"query": "x", "filter_json": '{"column": "price", "to": NaN}'}, "filter.to: nan is no finite number"),
        ({"query": "x", "filter_json": "[1]"}, "filter: Input should be a valid dictionary"),
        ({"query": "x", "mode": "all"}, "mode: Input should be"),
        ({"query": "x", "timeout_s": float("nan")}, "timeout_s"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(fields, words):
    with pytest.raises(QueryError, match=words):
        rpc.request_of(messages.RetrieveRequest(**fields))


def test_an_answer_keeps_what_it_has_and_lacks_what_it_has_not():
    product = api.Product(
        product_id="p1", docid="<a_1>", score=0.5, logp=None, dense=0.25, lexical=None, title="oak", category_path=["A", "B"],
        explain=api.Explain(levels=[api.Level(token="<a_1>", logp=None, score=-1.0)], terms={"path": 0.5}),
    )  # fmt: skip
    message = rpc.message_of(api.RetrieveResponse(release="r-1", products=[product], fewer="search"))
    (one,) = message.products
    assert (one.product_id, one.score, one.dense, list(one.category_path)) == ("p1", 0.5, 0.25, ["A", "B"])
    assert not one.HasField("logp") and not one.HasField("lexical") and one.explain.terms["path"] == 0.5
    assert message.fewer == "search" and not rpc.message_of(
        api.RetrieveResponse(release="r", products=[], fewer=None)
    ).HasField("fewer")


def test_errors_have_the_codes_that_callers_know():
    codes = [
        rpc.code_of(error)
        for error in (QueryError(""), Unserved(401, ""), Unserved(504, ""), StorageError(""), KeyError())
    ]
    assert [code.name for code in codes] == [
        "INVALID_ARGUMENT",
        "UNAUTHENTICATED",
        "DEADLINE_EXCEEDED",
        "UNAVAILABLE",
        "INTERNAL",
    ]
    assert rpc.headers_of([("authorization", "Bearer x"), ("trace-bin", b"\0")]) == {"authorization": "Bearer x"}


def test_a_call_goes_through_a_server():
    class Servicer:
        def Retrieve(self, message, context):  # noqa: N802 (gRPC's name)
            return messages.RetrieveResponse(release=message.query)

    server = grpc.server(__import__("concurrent.futures").futures.ThreadPoolExecutor(1))
    rpc.add_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert rpc.stub(channel)(messages.RetrieveRequest(query="r-1"), timeout=20).release == "r-1"
    finally:
        server.stop(None)
