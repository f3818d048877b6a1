"""What a replica counts for Prometheus, through Ray, which puts `ray_` before each name and `_total` behind that of a counter.

docs/operations.md says what to alert on; deploy/grafana.json shows it. GET /metrics shows the same of one replica, without `ray_`.
"""

import calendar
import functools
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import prometheus_client
from ray.serve.metrics import Counter, Gauge, Histogram

_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class Metric(NamedTuple):
    kind: type
    about: str
    tags: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METRICS = {
    "catid2_requests": Metric(Counter, "requests, by call and by status of the answer", ("call", "status")),
    "catid2_request_ms": Metric(Histogram, "milliseconds from request to answer inside a replica", ("call",), _MS),
    "catid2_wait_ms": Metric(Histogram, "milliseconds that the oldest query of a batch waited", (), _MS),
    "catid2_search_ms": Metric(Histogram, "milliseconds that the search of a batch took", (), _MS),
    "catid2_batch_size": Metric(Histogram, "queries of a batch", (), _SIZES),
    "catid2_waiting": Metric(Gauge, "queries that wait in the replica for a search"),
    "catid2_beam_survivors_pct": Metric(
        Histogram,
        "of the beams of a query's last level, per cent that hold an ID",
        (),
        (1, 2, 5, 10, 25, 50, 75, 90, 99, 100),
    ),
    "catid2_dropped": Metric(Counter, "queries dropped before their search: the caller had gone, or it was too late"),
    "catid2_empty_answers": Metric(Counter, "queries for which no product was found"),
    "catid2_fewer_answers": Metric(
        Counter, "queries with fewer products than asked for, by reason (search or catalogue)", ("reason",)
    ),
    "catid2_answers": Metric(Counter, "queries answered, by release", ("release",)),
    "catid2_answer_ms": Metric(Histogram, "milliseconds from query to answer, by release", ("release",), _MS),
    "catid2_shadow_ms": Metric(
        Histogram, "milliseconds from query to answer of a release on trial that was asked beside", ("release",), _MS
    ),
    "catid2_shadow_overlap": Metric(
        Histogram, "share of the products of an answer that the release on trial finds, too", ("release",), _SHARES
    ),
    "catid2_shadow_failures": Metric(Counter, "queries that the release on trial could not answer", ("release",)),
    "catid2_degraded_answers": Metric(Counter, "queries that got less than the release's best answer", ("reason",)),
    "catid2_release_age_s": Metric(Gauge, "seconds since the release that is served was published", ("release",)),
    "catid2_changes": Metric(Gauge, "changes to products that the replica has applied", ("release",)),
    "catid2_lag_s": Metric(Gauge, "seconds since the replica last knew of no change that it lacks", ("release",)),
    "catid2_canary_recall": Metric(
        Gauge,
        "of the products that the evaluation found, the share that the replica gave back when it opened the release",
        ("release",),
    ),
    "catid2_swaps": Metric(Gauge, "changes of release since the replica began"),
}


_shown: defaultdict[str, set[str]] = defaultdict(set)  # gauge → releases that it was put for last


@functools.cache
def _meter(name: str):
    """Made at the first use, inside a replica, whose name Ray then puts to it."""
    kind, about, tags, bounds = METRICS[name]
    return kind(name, about, **({"boundaries": bounds} if bounds else {}), tag_keys=tags)


@functools.cache
def _registry() -> prometheus_client.CollectorRegistry:
    """Of this process, which is a replica: what GET /metrics shows."""
    return prometheus_client.CollectorRegistry()


@functools.cache
def _own(name: str):
    kind, about, tags, bounds = METRICS[name]
    own = {Counter: prometheus_client.Counter, Gauge: prometheus_client.Gauge, Histogram: prometheus_client.Histogram}
    return own[kind](name, about, tags, registry=_registry(), **({"buckets": bounds} if bounds else {}))


def _labelled(name: str, tags: dict[str, str]):
    return _own(name).labels(**tags) if tags else _own(name)


def count(name: str, value: float = 1, **tags: str) -> None:
    if value:
        _meter(name).inc(value, tags)
        _labelled(name, tags).inc(value)


def observe(name: str, value: float, **tags: str) -> None:
    _meter(name).observe(value, tags)
    _labelled(name, tags).observe(value)


def put(name: str, value: float, **tags: str) -> None:
    _meter(name).set(value, tags)
    _labelled(name, tags).set(value)


def put_by_release(name: str, values: Mapping[str, float]) -> None:
    """A gauge of every release that is open now. What one had that is gone is shown no more; Ray, which forgets no label, shows
    NaN, which meets no condition of an alert."""
    for gone in _shown[name] - values.keys():
        _meter(name).set(math.nan, {"release": gone})
        _own(name).remove(gone)
    for release, value in values.items():
        put(name, value, release=release)
    _shown[name] = set(values)


def text() -> str:
    """All that this replica has counted, in Prometheus's text format."""
    return prometheus_client.generate_latest(_registry()).decode()


def seconds_since(created: str) -> float:
    """`created`: when a release was published, as it says so itself."""
    return time.time() - calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ"))


class Counted:
    """ASGI middleware: counts each request, and times it."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), "500"  # what an exception that passes here becomes

        async def sent(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            # The route, such as /v1/docids/{prefix}: paths that do not exist would be metrics without end.
            call = getattr(scope.get("route"), "path", "none")
            count("catid2_requests", call=call, status=status)
            observe("catid2_request_ms", 1e3 * (time.perf_counter() - start), call=call)
