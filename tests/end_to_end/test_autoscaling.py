"""Under load the application grows from one replica to two, and every answer stays an answer."""

import concurrent.futures
import socket
import threading
import time

import httpx
from ray import serve

from catid2_ray.on_ray.serve_app import AppSettings, RetrieverReplica

FAST = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1, "metrics_interval_s": 0.5,
        "look_back_period_s": 2}  # fmt: skip


def replicas() -> int:
    deployment = serve.status().applications["catid2"].deployments["Retriever"]
    return sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")


def test_replicas_go_from_one_to_two(released, shared_ray):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = AppSettings(store=released["store"])
        # Ray may have been running before the server of S3 that this release lies in.
        surroundings = {"num_cpus": 1, "runtime_env": {"env_vars": released["env"]}}
        deployment = RetrieverReplica.options(autoscaling_config=FAST, ray_actor_options=surroundings)
        serve.run(deployment.bind(settings), name="catid2")
        assert replicas() == 1
        stop, url = threading.Event(), f"http://127.0.0.1:{port}/v1/retrieve"

        def ask() -> set[int]:
            codes = set()
            while not stop.is_set():
                codes.add(httpx.post(url, json={"query": "oak shelf", "k": 5}, timeout=60).status_code)
            return codes

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            askers = [pool.submit(ask) for _ in range(12)]
            deadline = time.monotonic() + 120
            while replicas() < 2 and time.monotonic() < deadline:
                time.sleep(1)
            grown = replicas()
            stop.set()
            codes = set().union(*(asker.result(timeout=90) for asker in askers))
        assert grown == 2
        assert codes == {200}
    finally:
        serve.shutdown()
