"""Ray Serve on two nodes, each in a folder and with a cache of its own: equal answers from both; one node is removed while queries
come, and the other goes on.

The store is on S3, so that each node fetches the release for itself.
"""

import re
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.serve.app import AppSettings, RetrieverReplica
from tests.end_to_end.test_replicas_under_load import free_port, is_the_release, shop  # noqa: F401 (shop: a fixture)
from tests.faults.conftest import make_nodes  # noqa: F401 (a fixture)
from tests.load import Load
from tests.s3_server import new_bucket

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.faults]
REPLICA = "ray::ServeReplica:catid2:Retriever"
ASKERS = 4


@pytest.fixture
def nodes(make_nodes, s3):  # noqa: F811
    """A head and two nodes that serve, with the environment of the store."""
    nodes = make_nodes({"gpu-serve": (2, 1)})
    ray.init(address=nodes.cluster.address, log_to_driver=False)
    yield nodes
    serve.shutdown()
    ray.shutdown()


def answered(base: str) -> set[int]:
    """How many queries each replica has answered, by asking often enough that each tells."""
    told = [httpx.get(f"{base}/metrics", timeout=60).text for _ in range(30)]
    found = [re.search(r'catid2_requests_total{call="/v1/retrieve",status="200"} (\d+)', text) for text in told]
    return {int(one[1]) if one else 0 for one in found}


def test_two_nodes_answer_alike_and_one_goes_on_when_the_other_is_removed(nodes, shop, s3, fault):  # noqa: F811
    bucket, port = Store(new_bucket(s3[0])), free_port()
    bucket.upload(Path(shop.store), "store")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    own = {"num_cpus": 1, "label_selector": {"pool": "gpu-serve"}}
    options = {"num_replicas": 2, "autoscaling_config": None, "max_replicas_per_node": 1, "ray_actor_options": own}
    serve.run(RetrieverReplica.options(**options).bind(AppSettings(store=bucket.uri_of("store"))), name="catid2")
    first, second = nodes.pools["gpu-serve"]
    assert [len(nodes.processes(node, REPLICA)) for node in (first, second)] == [1, 1], "a replica on each node"
    caches = [nodes.folder / f"node{number}" / "cache" for number in (1, 2)]
    assert all(any(cache.rglob("products.arrow")) for cache in caches), "each node has fetched the release"

    base = f"http://127.0.0.1:{port}"
    load = Load(base, shop.answers, askers=ASKERS)
    load.more(100)
    load.end()
    is_the_release(load, shop)
    by_replica = answered(base)
    assert load.failed == [] and 0 not in by_replica and len(load.seen) == sum(by_replica) * (3 - len(by_replica)), (
        "both have answered, and alike"
    )
    load = Load(base, shop.answers, askers=ASKERS)
    load.more(20)
    nodes.remove(first)
    load.more(100)
    in_flight = len(load.failed)
    load.more(100)
    load.end()
    is_the_release(load, shop)
    assert len(load.failed) == in_flight <= ASKERS, load.failed
    fault(
        "a node that serves removed, under load", times=1,
        outcome=f"{in_flight} of {len(load.seen) + in_flight} queries failed, those in flight; the other node answers alike",
        lost_s=max((one.ended - one.began for one in load.failed), default=0.0),
    )  # fmt: skip
