"""The log of a replica: one event a line, as JSON or key=value, with the id of the request that it belongs to."""

import json

import pytest

pytest.importorskip("ray.serve")

import structlog
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.serve import logs


@pytest.fixture
def as_json(capfd):  # whose standard error is taken
    logs.write_json()
    yield
    progress.write_by(None)
    structlog.reset_defaults()


@pytest.fixture
def client():
    api = FastAPI()
    api.add_middleware(logs.Logged)

    @api.get("/v1/release")
    async def reads():
        return 1

    @api.post("/v1/retrieve")
    async def asks(status: int):
        logs.event("inside", status=status)
        raise HTTPException(status)

    @api.put("/v1/products")
    async def writes():
        return 1 / 0

    return TestClient(api, raise_server_exceptions=False)


def lines(capfd) -> list[dict]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_lines_of_json_name_their_request(as_json, client, capfd):
    client.get("/v1/release")
    assert lines(capfd) == [], "Ray has its own log of every access"
    client.post("/v1/retrieve?status=503", headers={"x-request-id": 'order 7\n"x'})
    inside, refused = lines(capfd)
    assert (inside["event"], inside["request_id"], inside["level"]) == ("inside", "order7x", "info")
    assert refused["request_id"] == "order7x" and refused["timestamp"].endswith("Z") and refused["ms"] >= 0
    assert (refused["event"], refused["call"], refused["status"]) == ("request", "POST_/v1/retrieve", 503)
    client.put("/v1/products", headers={"x-request-id": "r-1"})
    (failed,) = lines(capfd)
    assert (failed["status"], failed["level"], failed["request_id"]) == (500, "error", "r-1")
    progress.event("serves", release="r-2", reason=repr('it\'s "new"'), before="'half")
    (one,) = lines(capfd)
    assert one["event"] == "serves" and one["reason"] == 'it\'s "new"' and one["before"] == "'half"
    assert "request_id" not in one, "it belongs to none"


def test_a_request_without_a_route_has_its_path(as_json, client, capfd):
    client.get('/nowhere" status=200/' + "x" * 100)
    (one,) = lines(capfd)
    assert one["status"] == 404 and one["call"].startswith("GET_/nowherestatus200/xxx") and len(one["call"]) < 70


def test_secrets_stay_out(as_json, capfd, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    progress.event("x", reason="the key wJalrXUtnFEMI/K7MDENG is wrong")
    assert "wJalr" not in capfd.readouterr().err


def test_lines_of_text_name_their_request_too(client, capfd):
    client.put("/v1/products")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("event=request request_id=") and "call=PUT_/v1/products status=500 ms=" in line
