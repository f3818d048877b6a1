"""One flipped bit in an artefact of whatever kind is found when it is next read, and the message names the file.

The kinds are those of STAGES: a new one without a reader that looks fails here.
"""

import copy
import json
import random
import time
from pathlib import Path

import pytest

from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.serve.opened import Opened
from catid2_ray.on_ray.serve.settings import AppSettings
from catid2_ray.scripts import words_of
from tests.in_process import without_ray
from tests.text_models import save_bert

ALIGNMENT = {
    "enabled": True, "steps": 2, "report_every": 2, "updates": 1, "batch": 8, "group": 2, "injected": 1, "workers": 1,
    "validation_queries": 4, "judged_max": 8, "max_failures": 0, "ranker": "tests.jobs.test_align:ranked",
}  # fmt: skip


TUNING = {"epochs": 8, "batch": 32, "learning_rate": 3e-3, "products": 100, "judged_products": 100}


@pytest.fixture(scope="module")
def made(small_recipe, tmp_path_factory):
    """A store with a release that has an artefact of every stage; the recipe and the store."""
    values = copy.deepcopy(small_recipe) | {
        "store": str(tmp_path_factory.mktemp("flipped") / "store"),
        "alignment": ALIGNMENT,
    }
    shop = generate(**values["catalog"]["synthetic"])
    words = {
        word
        for column in (shop.products["title"], shop.pairs["query"])
        for text in column.to_pylist()
        for word in words_of(text)
    }
    values["embedding"] |= {
        "adapter": "linear", "encoder": save_bert(tmp_path_factory.mktemp("bert"), sorted(words)), "encoder_mode": "tuned",
        "text": ["title"], "tokens": 16,
    }  # fmt: skip
    values["tuning"] = TUNING
    values["quantizer"]["query_item"] = 0.1
    with pytest.MonkeyPatch.context() as patch, without_ray():
        patch.setenv("CATID2_RANKERS", "tests.jobs.test_align:ranked")
        recipe = Recipe.build(values)
        outcome = reindex(recipe)
        assert outcome.parts["tuned_encoder"].metrics["adopted"], "else it has no weights to read"
        assert set(outcome.made) == set(STAGES), "the recipe makes every stage, so that none is forgotten here"
        yield recipe, Store(recipe.store)


def of_stage(store: Store, stage: str) -> Manifest:
    """The artefact that a stage made: an aligned generator is one that was made of another."""
    kind = "generator" if stage == "aligned" else stage
    found = [artifact.find(store, kind, key) for key in store.names(f"artifacts/{kind}")]
    (manifest,) = [one for one in found if kind != "generator" or ("trained" in one.parents) == (stage == "aligned")]
    return manifest


def flip(path: Path, seed: str) -> bytes:
    """Flips one bit; returns the bytes of before."""
    before = path.read_bytes()
    bit = random.Random(seed).randrange(8 * len(before))
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(changed)
    return before


def read_again(recipe: Recipe, store: Store, manifest: Manifest) -> None:
    """Whatever reads it next: a stage made of it, whose result is gone, or else a replica."""
    everything = [
        artifact.find(store, kind, key) for kind in store.names("artifacts") for key in store.names(f"artifacts/{kind}")
    ]
    readers = [one for one in everything if manifest.digest in one.parents.values()]
    if not readers:
        releases._PROVEN.clear()  # as in a process that starts
        Opened(store, releases.current(store).name, AppSettings(store=store.uri)).end()
        return
    # Without a current release the job is as it was the first time.
    names = [*(one.name for one in readers), *(f"current/{name}" for name in store.names("current"))]
    kept = {name: store.read(name) for name in names}
    for name in kept:
        store.delete(name)
    try:
        reindex(recipe)
    finally:
        for name, data in kept.items():
            store.write(name, data)


@pytest.mark.parametrize("stage", STAGES)
def test_a_flipped_bit_in_a_file_is_named_when_it_is_read(made, fault, stage):
    recipe, store = made
    manifest = of_stage(store, stage)
    # Of an evaluation a replica reads the answers; its figures are for people.
    entries = [entry for entry in manifest.files if entry["bytes"] and entry["name"] != "figures.json"]
    entry = random.Random(stage).choice(entries)
    path, started = Path(store.path(manifest.file(entry["name"]))), time.monotonic()
    before = flip(path, stage)
    try:
        with pytest.raises(ArtifactError) as caught:
            read_again(recipe, store, manifest)
    finally:
        path.write_bytes(before)
    assert str(path) in str(caught.value) and "SHA-256 differs" in str(caught.value)
    fault(f"a bit flipped in {stage}", times=1, outcome="refused by the file's name", lost_s=time.monotonic() - started)


def test_flipped_bits_in_manifests_and_records_are_named(made, fault):
    _, store = made
    times, started = 0, time.monotonic()
    for stage in STAGES:
        manifest = of_stage(store, stage)
        for seed in range(20):
            before = flip(Path(store.path(manifest.name)), f"{stage} {seed}")
            with pytest.raises(ArtifactError, match=f"{manifest.kind}/{manifest.key}/manifest.json"):
                artifact.find(store, manifest.kind, manifest.key)
            store.write(manifest.name, before)
            times += 1
    name = releases.current(store).name
    text = json.loads(store.read(f"releases/{name}.json"))
    for part, fields in text["parts"].items():
        changed = json.loads(json.dumps(text))
        changed["parts"][part]["digest"] = fields["digest"][:-1] + ("0" if fields["digest"][-1] != "0" else "1")
        store.write(f"releases/{name}.json", json.dumps(changed).encode())
        with pytest.raises(ArtifactError, match=f"{name}.*not those that it is named after"):
            releases.load(store, name)
        times += 1
    store.write(f"releases/{name}.json", json.dumps(text).encode())
    fault(
        "a bit flipped in a manifest or a record",
        times=times,
        outcome="refused by name",
        lost_s=time.monotonic() - started,
    )
