"""Everything here is marked `faults`. `s3`: a server of S3 for the session; `undisturbed`: the digests of the small recipe's parts
as a run without faults made them, in this process and without Ray; `make_nodes`: a cluster of several Ray nodes."""

import copy
import time
from pathlib import Path

import pytest
import ray

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from tests.conftest import TINY
from tests.faults.nodes import Nodes
from tests.in_process import without_ray
from tests.s3_server import new_bucket, s3_server


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def small_recipe() -> dict:
    """The tiny recipe with fewer products and epochs: a chain of 13 stages in some seconds."""
    small = copy.deepcopy(TINY)
    small["catalog"] = {"synthetic": {"products": 90, "queries": 60, "seed": 3}, "rows_per_part": 40}
    small["quantizer"] |= {"epochs": 2, "kmeans_sample": 90, "batch": 45}
    small["generator"] |= {"epochs": 1}
    return small


@pytest.fixture
def small(small_recipe) -> dict:
    return copy.deepcopy(small_recipe)


def digests(store: Store) -> dict[str, str]:
    return {part: manifest.digest for part, manifest in releases.current(store).manifests(store).items()}


@pytest.fixture(scope="session")
def s3():
    with s3_server() as environment:
        yield environment, new_bucket(environment)


@pytest.fixture(scope="session")
def undisturbed(small_recipe, tmp_path_factory) -> tuple[dict[str, str], float]:
    """Digests by part, and the seconds that the run took."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    started = time.monotonic()
    with without_ray():
        reindex(Recipe.build(copy.deepcopy(small_recipe) | {"store": str(store)}))
    return digests(Store(store)), time.monotonic() - started


@pytest.fixture
def make_nodes(tmp_path_factory):
    """`make_nodes({pool: (nodes, CPUs)})` → Nodes, which RAY_ADDRESS points at; the test's end ends them. A Ray that the tests of
    this process share is stopped; the next test that shares it starts it anew."""
    made = []
    if ray.is_initialized():
        ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        # As this process was when it imported Ray; tokens: jobs/test_submit.py.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_maximum_startup_concurrency", "2")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else workers stand back behind all other work of the machine

        def make(pools: dict[str, tuple[int, int]]) -> Nodes:
            made.append(Nodes(tmp_path_factory.mktemp("nodes"), pools))
            patch.setenv("RAY_ADDRESS", made[-1].cluster.address)
            return made[-1]

        yield make
        for one in made:
            one.cluster.shutdown()
