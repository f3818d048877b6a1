"""The dashboard and the manual ask Prometheus for what there is: our metrics, and Ray's of the version that is pinned."""

import functools
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest

pytest.importorskip("ray.serve")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray import serve
from ray.serve.metrics import Counter, Histogram

from catid2_ray.on_ray.serve import metrics
from catid2_ray.on_ray.serve.metrics import METRICS, Counted

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def exported(name: str) -> set[str]:
    """What Prometheus finds of one of our metrics."""
    if METRICS[name].kind is Histogram:
        return {f"ray_{name}_{part}" for part in ("bucket", "sum", "count")}
    return {f"ray_{name}_total" if METRICS[name].kind is Counter else f"ray_{name}"}


def of_ray() -> set[str]:
    source = "".join(path.read_text() for path in Path(serve.__file__).parent.glob("_private/*.py"))
    names = set(re.findall(r'"(serve_\w+)"', source))
    return {f"ray_{name}{end}" for name in names for end in ("", "_total", "_bucket")}


def test_every_query_names_metrics_and_tags_that_exist():
    ours, asked = set().union(*map(exported, METRICS)), set()
    for query in QUERIES:
        names = re.findall(r"ray_\w+", query)
        assert names and set(names) <= ours | of_ray(), query
        asked |= set(names)
        for name, tags in re.findall(r"ray_(catid2_\w+?)(?:_total|_bucket|_sum|_count)?\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)=", tags)) <= {*METRICS[name].tags, "replica"}, query
    assert [name for name in METRICS if not exported(name) & asked] == [], "shown nowhere"


def test_the_manual_names_metrics_that_exist():
    page = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(ray_\w+)`", page))
    assert named and named <= {f"ray_{name}" for name in METRICS}.union(*map(exported, METRICS), of_ray())


def test_requests_are_counted_by_route_and_status(monkeypatch):
    api, seen = FastAPI(), []
    api.add_middleware(Counted)

    @api.get("/v1/docids/{prefix}")
    async def fails(prefix: str) -> int:
        return 1 // int(prefix)

    monkeypatch.setattr(metrics, "count", lambda name, **tags: seen.append((name, tags["call"], tags["status"])))
    client = TestClient(api, raise_server_exceptions=False)
    for path in ("/v1/docids/1", "/v1/docids/0", "/nowhere"):
        client.get(path)
    route = "/v1/docids/{prefix}"
    assert [one[1:] for one in seen] == [(route, "200"), (route, "500"), ("none", "404")]


def test_each_metric_takes_what_it_is_given_also_without_ray():
    for name, metric in METRICS.items():
        tags = dict.fromkeys(metric.tags, "x")
        do = {Counter: metrics.count, Histogram: metrics.observe}.get(metric.kind, metrics.put)
        do(name, 2.0, **tags)


def test_a_release_that_is_not_served_any_more_is_shown_no_more(monkeypatch):
    """Else its age grows for ever, and an alert on the age never ends."""
    of_ray = {}
    meter = SimpleNamespace(set=lambda value, tags: of_ray.update({tags["release"]: value}))
    monkeypatch.setattr(metrics, "_meter", lambda name: meter)
    monkeypatch.setattr(metrics, "_registry", functools.cache(prometheus_client.CollectorRegistry))
    monkeypatch.setattr(metrics, "_own", functools.cache(metrics._own.__wrapped__))
    monkeypatch.setattr(metrics, "_shown", defaultdict(set))
    for values in ({"r-1": 5.0}, {"r-1": 6.0, "r-2": 0.0}, {"r-2": 1.0}):
        metrics.put_by_release("catid2_release_age_s", values)
        shown = re.findall(r'catid2_release_age_s{release="(.*)"} (.*)', metrics.text())
        assert {name: float(value) for name, value in shown} == values
    assert math.isnan(of_ray["r-1"]) and of_ray["r-2"] == 1.0
    metrics.put_by_release("catid2_release_age_s", {"r-1": 7.0})  # a rollback
    assert of_ray["r-1"] == 7.0 and 'release="r-2"' not in metrics.text()
