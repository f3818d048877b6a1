"""What earlier code published is found, served and named as it was: the same keys, the same digests, the same answers."""

import json

import pytest

from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.stages import PARTS
from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from tests.stored import unpack


@pytest.fixture
def stored(tmp_path):
    return unpack(tmp_path)


def test_a_rerun_of_its_recipe_finds_every_stage_and_publishes_nothing(stored, monkeypatch):
    """Every key is a function of settings and parents' digests, so a stage that is found has the key that it had."""
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("a stage was made anew"))
    store = Store(stored.store)
    before = releases.current(store)
    outcome = reindex(stored)
    assert outcome.made == [] and outcome.release.name == before.name
    assert {name: part.key for name, part in outcome.parts.items()} == {
        name: before.parts[name]["key"] for name in PARTS
    }


def test_keys_and_digests_are_those_that_the_manifests_name(stored):
    store = Store(stored.store)
    for part, manifest in releases.current(store).manifests(store).items():
        assert manifest.key == artifact.key_of(part, manifest.settings, manifest.parents)
        files = [[entry["name"], entry["sha256"]] for entry in manifest.files]
        assert manifest.digest == artifact.digest_of([part, files])


def test_it_is_served(stored, tmp_path):
    store = Store(stored.store)
    release = releases.current(store)
    retriever = open_retriever(releases.release_folder(store, release, tmp_path / "cache"))
    samples = release.manifests(store)["evaluation"].metrics["sample_queries"]
    for hits in retriever.retrieve(samples, k=3, filters=[{"column": "price", "to": 60}] * len(samples)):
        assert len(hits) == 3 and all(hit.docid_text.startswith("<a_") and hit.dense is not None for hit in hits)
    figures = json.loads(store.read(release.manifests(store)["evaluation"].file("figures.json")))
    assert set(figures["recall"]) == {"beam", "bm25", "served"}
