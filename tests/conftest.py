"""Shared by all tests: no network, one thread, a cache of their own; and one tiny recipe that every pipeline test starts from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import sys

import pytest

pytest_plugins = ["tests.faults.page"]

TINY = {
    "name": "tiny",
    "catalog": {"synthetic": {"products": 240, "queries": 120, "seed": 3}, "rows_per_part": 100},
    "embedding": {"encoder": "lsa", "width": 16, "workers": 1, "adapter": "none"},
    "quantizer": {
        "codes_per_level": [8, 8, 8, 8], "hidden": [32], "latent": 8, "batch": 80, "epochs": 6, "max_failures": 0,
        "checkpoint_every_epochs": 1, "kmeans_sample": 200,
    },
    "ids": {"workers": 1, "encode_rows": 64},
    "generator": {
        "width": 32, "layers": 1, "heads": 2, "feed_forward": 64, "vocabulary": 300, "batch": 64, "epochs": 4,
        "min_relevance": 2, "max_failures": 0, "checkpoint_every_epochs": 1, "query_tokens": 12,
    },
    "evaluation": {"min_relevance": 2, "beam_width": 16, "min_beam_to_bm25": 0, "canary_slower": 0, "workers": 1},
}  # fmt: skip


@pytest.fixture
def tiny() -> dict:
    """A recipe small enough for a pipeline in well under two minutes; change it freely."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["CATID2_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["CATID2_CACHE"]


@pytest.fixture(scope="module")
def no_ray():
    """Jobs run in this process, without Ray: what most tests of jobs want, since Ray is what costs the time."""
    from tests.in_process import without_ray

    with without_ray():
        yield


@pytest.fixture(scope="session")
def _end_of_ray(_own_cache):
    from catid2_ray.on_ray.machine import cluster

    yield
    cluster.disconnect()


@pytest.fixture(scope="module")
def shared_ray(_end_of_ray):
    """One Ray for all tests that run jobs in this process: starting it and its workers costs more than most of them. Jobs that find
    one running use it; here they also leave it be when they end."""
    from catid2_ray.config import ClusterRecipe
    from catid2_ray.on_ray.machine import cluster

    cluster.connect(ClusterRecipe())  # where none is running: the first time, or after a test that had nodes of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "disconnect", lambda: None)
        yield


# Of files that start Ray two run at a time (Makefile): the longest come first, beside one with many small tests.
_FIRST = ("test_kill_and_resume.py", "test_s3_to_http.py", "test_through_ray.py", "test_submit.py")


def _refuse(**_):
    pytest.fail("this test starts Ray: ask for no_ray, for shared_ray, or mark it `cluster`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Ray is started by tests that are marked for it: a job that starts one by the way costs ten seconds unseen."""
    with pytest.MonkeyPatch.context() as patch:
        if "ray" in sys.modules and not item.get_closest_marker("cluster"):
            patch.setattr(sys.modules["ray"], "init", _refuse)
        return (yield)


def pytest_collection_modifyitems(items):
    for item in items:
        if "shared_ray" in item.fixturenames:
            item.add_marker(pytest.mark.cluster)
    items.sort(key=lambda item: _FIRST.index(item.path.name) if item.path.name in _FIRST else len(_FIRST))
