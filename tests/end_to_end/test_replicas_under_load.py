"""Replicas of Ray Serve under constant load: one is killed, they become more and fewer, the store is away. Nothing fails but what
was in flight on a killed replica, and every answer is the release's."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
from types import SimpleNamespace

import grpc
import httpx
import psutil
import pytest
import ray
from ray import serve

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.serve import rpc
from catid2_ray.on_ray.serve.app import AppSettings, RetrieverReplica
from catid2_ray.on_ray.serve.opened import Opened
from catid2_ray.on_ray.serve.proto import retriever_pb2
from tests.load import Load
from tests.s3_server import new_bucket, s3_server
from tests.stored import unpack

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
AUTOSCALING = {
    "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 2,
    "metrics_interval_s": 0.5, "look_back_period_s": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A store with a release, and what that answers: {query: products}."""
    uri = unpack(tmp_path_factory.mktemp("shop")).store
    name = releases.current(Store(uri)).name
    opened = Opened(Store(uri), name, AppSettings(store=uri))
    queries = [opened.retriever.products.title(row) for row in range(0, 150, 25)]
    found = opened.retriever.retrieve(queries, k=5)
    opened.end()
    return SimpleNamespace(
        store=uri, release=name, answers={q: [h.product_id for h in hits] for q, hits in zip(queries, found)}
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def served(store: str, *, environment: dict | None = None, grpc_port: int | None = None, **options):
    """The base URL of a service with these options of its deployment."""
    port = free_port()
    spoken = {"port": grpc_port, "grpc_servicer_functions": ["catid2_ray.on_ray.serve.rpc.add_to_server"]}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, grpc_options=spoken if grpc_port else None)
        deploy(AppSettings(store=store, updates=True, poll_s=0.2), environment, **options)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def deploy(settings: AppSettings, environment: dict | None = None, **options) -> None:
    own = {"num_cpus": 1, "runtime_env": {"env_vars": environment or {}}}
    serve.run(RetrieverReplica.options(**options, ray_actor_options=own).bind(settings), name="catid2")


def running() -> int:
    deployment = serve.status().applications["catid2"].deployments["Retriever"]
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")


def processes() -> dict[int, psutil.Process]:
    """Those of replicas, which are descendants of this process."""
    found = {}
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(one.cmdline()).startswith("ray::ServeReplica:catid2:Retriever"):  # an ended one has none
                found[one.pid] = one
    return found


def until(true, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def is_the_release(load: Load, shop) -> None:
    for release, query, products in load.seen:
        assert (release, products) == (shop.release, shop.answers[query])


class Busy(RetrieverReplica.func_or_class):
    """Whose search of a batch takes a second, all of it work."""

    def _search(self, requests, early):
        until = time.monotonic() + 1
        while time.monotonic() < until:
            answers = super()._search(requests, early)
        return answers


@pytest.mark.timeout(240)
def test_health_kills_no_replica_that_is_busy(shop, shared_ray):
    """Searches keep a replica busy for longer than the health of a dead one is waited for: whoever came last waits six seconds for
    an answer, and Serve replaces a replica whose health is not known for three times two."""
    health = {"health_check_period_s": 0.5, "health_check_timeout_s": 2, "num_replicas": 1, "autoscaling_config": None}
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no replica can import this file
    with served(shop.store, func_or_class=Busy, **health) as base:
        before = processes()
        load, until_s, waiting = Load(base, shop.answers, askers=96), time.monotonic() + 20, []
        load.more(96)
        while time.monotonic() < until_s:
            load.more(16)
            said = httpx.get(f"{base}/metrics", timeout=60).text
            waiting.append(float(re.search(r"^catid2_waiting (.*)", said, re.MULTILINE)[1]))
        assert processes().keys() == before.keys() and running() == 1
        load.end()
    assert len(before) == 1 and load.failed == []
    assert len(waiting) > 5 and sorted(waiting)[len(waiting) // 2] > 32, "as its own health checks saw it"
    is_the_release(load, shop)


@pytest.mark.faults
def test_a_replica_is_killed(shop, shared_ray, fault):
    with served(shop.store, num_replicas=2, autoscaling_config=None) as base:
        until(lambda: running() == 2)
        load, before = Load(base, shop.answers, askers=6), processes()
        load.more()
        victim = next(iter(before.values()))
        victim.kill()
        killed = time.monotonic()
        until(lambda: running() == 2 and len(processes().keys() - before.keys()) == 1)
        load.more()
        load.end()
    assert [one for one in load.failed if one.began > killed] == []
    assert len(load.failed) <= 6
    is_the_release(load, shop)
    outcome = f"{len(load.failed)} of {len(load.seen) + len(load.failed)} queries failed, those in flight"
    fault("a replica of two killed under load", times=1, outcome=outcome, lost_s=0)


def test_another_configuration_starts_before_the_old_one_stops(shop, shared_ray):
    options = {"num_replicas": 1, "autoscaling_config": None}
    with served(shop.store, **options) as base:
        load, before = Load(base, shop.answers, askers=4), processes()
        load.more()
        deploy(AppSettings(store=shop.store, updates=True, poll_s=0.3), **options)
        until(lambda: not processes().keys() & before.keys())
        load.more()
        load.end()
    assert len(before) == 1 and load.failed == []
    is_the_release(load, shop)


def test_replicas_go_from_one_to_two_and_back(shop, shared_ray):
    with served(shop.store, autoscaling_config=AUTOSCALING) as base:
        load = Load(base, shop.answers, askers=12)
        until(lambda: running() == 2)
        load.more(100)
        load.fewer(1)
        until(lambda: running() == 1)
        load.more(20)
        load.end()
    assert load.failed == []
    is_the_release(load, shop)


@pytest.mark.faults
def test_the_store_answers_nothing_for_a_while(shop, shared_ray, fault):
    """The server of the store stands still, so that every request to it hangs: searches go on, changes wait or are refused, and
    later ones are taken."""
    others = set(psutil.Process().children())  # among them the server of tests that ran before
    with s3_server() as environment:
        started = set(psutil.Process().children()) - others
        (server,) = [one for one in started if "s3_server.py" in " ".join(one.cmdline())]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            uri = f"{new_bucket(environment)}/store"
            local, remote = shop.store, Store(uri)
            for folder, _, names in os.walk(local):
                for name in names:
                    path = os.path.join(folder, name)
                    with open(path, "rb") as file:
                        remote.write(os.path.relpath(path, local), file.read())
            with served(uri, environment=environment, num_replicas=1, autoscaling_config=None) as base:
                load = Load(base, shop.answers, askers=4)
                load.more()
                server.send_signal(signal.SIGSTOP)
                try:
                    stopped = time.monotonic()
                    with pytest.raises(httpx.TimeoutException):
                        httpx.post(f"{base}/v1/withdraw", json={"product_ids": ["nobody"]}, timeout=2)
                    while time.monotonic() < stopped + 30:
                        load.more(5)
                finally:
                    server.send_signal(signal.SIGCONT)
                query, (gone, *_) = next(iter(shop.answers.items()))

                def withdrawn() -> bool:
                    answer = httpx.post(f"{base}/v1/withdraw", json={"product_ids": [gone]}, timeout=60)
                    return answer.status_code == 200

                until(withdrawn)
                load.more()
                load.end()
    assert load.failed == []
    last = [products for _, asked, products in load.seen if asked == query][-1]
    assert gone not in last
    for release, asked, products in load.seen:
        assert release == shop.release and (products == shop.answers[asked] or gone in shop.answers[asked])
    outcome = f"{len(load.seen)} queries answered, none failed; changes are taken again afterwards"
    fault("the store of a service silent for 30 s under load", times=1, outcome=outcome, lost_s=0)


def test_grpc_refuses_without_a_traceback_in_the_log(shop, shared_ray):
    port = free_port()
    with (
        served(shop.store, grpc_port=port, num_replicas=1, autoscaling_config=None),
        grpc.insecure_channel(f"127.0.0.1:{port}") as to,
    ):
        ask = rpc.stub(to)
        of_us = [("application", "catid2")]
        query, products = next(iter(shop.answers.items()))
        answer = ask(retriever_pb2.RetrieveRequest(query=query, k=5), metadata=of_us, timeout=60)
        assert [one.product_id for one in answer.products] == products and answer.release == shop.release
        with pytest.raises(grpc.RpcError) as refused:
            ask(retriever_pb2.RetrieveRequest(query="?"), metadata=of_us, timeout=60)
        assert refused.value.code().name == "INVALID_ARGUMENT"
        assert "at least one letter or digit" in refused.value.details()
        logs = os.path.join(ray._private.worker._global_node.get_session_dir_path(), "logs", "serve")
        said = ""
        for name in os.listdir(logs):
            if name.startswith("replica_catid2_Retriever"):
                with open(os.path.join(logs, name)) as file:
                    said += file.read()
        assert "Retrieve" in said and "Traceback" not in said
