"""Stores to test on: every test that asks for `store` runs on a local folder and on S3.

The S3 server is started once per session; each test gets a prefix of its own, and its environment variables are undone.
"""

import uuid

import pytest

from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.artifacts.release import PARTS
from catid2_ray.artifacts.store import Store
from tests.s3_server import new_bucket, s3_server

PARENTS_OF = {
    "catalog": (),
    "pairs": ("catalog",),
    "tuned_encoder": (),
    "embeddings": ("catalog", "tuned_encoder"),
    "adapter": (),
    "quantizer": ("embeddings", "adapter"),
    "ids": ("catalog", "embeddings", "adapter", "quantizer"),
    "node_vectors": ("embeddings", "ids"),
    "examples": ("catalog", "pairs", "ids"),
    "generator": ("ids", "examples"),
    "serving": ("catalog", "embeddings", "adapter", "ids"),
    "mixture": ("catalog", "pairs", "ids", "examples", "generator", "serving"),
    "evaluation": ("catalog", "pairs", "ids", "generator", "serving"),
}


@pytest.fixture(scope="session")
def s3_session():
    with s3_server() as environment:
        yield environment, new_bucket(environment)


@pytest.fixture
def s3_environment(s3_session, monkeypatch):
    for name, value in s3_session[0].items():
        monkeypatch.setenv(name, value)
    return s3_session[0]


@pytest.fixture
def s3_store(s3_session, s3_environment):
    return Store(f"{s3_session[1]}/{uuid.uuid4().hex[:8]}")


@pytest.fixture
def local_store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(params=["local", "s3"])
def store(request):
    return request.getfixturevalue(f"{request.param}_store")


def commit(store, kind, files, *, parents=None, settings=None, **commit_options):
    """One artefact with the given files (name → bytes)."""
    attempt = Attempt(store, kind, settings=settings or {}, parents=parents or {}, recipe={})
    entries = [store.write_file(attempt.name(name), data) for name, data in files.items()]
    return attempt.commit(entries, **{"metrics": {}, **commit_options})


def commit_chain(store, word):
    """Every part of a release, each naming the parts it was made from; `word` tells one chain from another."""
    made = {}
    for kind in PARTS:
        files = {f"{kind}.txt": f"{word} {kind}".encode()}
        if kind == "ids":
            files |= {"trie/arrays.npy": word.encode(), "products.arrow": word.encode()}
        made[kind] = commit(
            store,
            kind,
            files,
            parents={role: made[role].digest for role in PARENTS_OF[kind]},
            settings={"query_tokens": 24, "beam_width": 50, "word": word},
            metrics={"codes_per_level": [4, 4, 4], "adopted": True},
        )
    return made


@pytest.fixture
def make():
    return commit


@pytest.fixture
def chain():
    return commit_chain
