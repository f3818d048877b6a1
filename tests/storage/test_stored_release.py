"""What earlier code published is found, served and named as it was: the same keys, the same digests, the same answers."""

import json
from types import SimpleNamespace

import pytest

from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import FormatError, ReleaseError
from catid2_ray.on_ray.commands import diagnose_release, reindex
from catid2_ray.on_ray.job import open_previous
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.stages import evaluate, train_quantizer
from tests.stored import unpack


@pytest.fixture
def stored(tmp_path):
    return unpack(tmp_path)


def test_keys_and_digests_are_those_that_the_manifests_name(stored):
    store = Store(stored.store)
    for manifest in releases.current(store).manifests(store).values():
        part = manifest.kind
        assert manifest.key == artifact.key_of(part, manifest.settings, manifest.parents)
        files = [[entry["name"], entry["sha256"]] for entry in manifest.files]
        assert manifest.digest == artifact.digest_of([part, files])


def test_the_recipe_of_then_names_the_quantizer_as_then(stored):
    store = Store(stored.store)
    manifest = releases.current(store).manifests(store)["quantizer"]
    recipe = Recipe.stored(manifest.recipe)
    assert recipe.quantizer.encoder == "mlp" and recipe.quantizer.category_on == "residual"
    assert manifest.settings == {**train_quantizer.deciding(recipe.quantizer), "seed": recipe.seed}


def test_it_is_served(stored, tmp_path):
    store = Store(stored.store)
    release = releases.current(store)
    retriever = open_retriever(releases.release_folder(store, release, tmp_path / "cache"))
    samples = release.manifests(store)["evaluation"].metrics["sample_queries"]
    for hits in retriever.retrieve(samples, k=3, filters=[{"column": "price", "to": 60}] * len(samples)):
        assert len(hits) == 3 and all(hit.docid_text.startswith("<a_") and hit.dense is not None for hit in hits)
    figures = json.loads(store.read(release.manifests(store)["evaluation"].file("figures.json")))
    assert set(figures["recall"]) == {"beam", "bm25", "served"}


def test_other_levels_would_begin_another_ledger_and_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("refused only after Ray was started"))
    other = unpack(tmp_path, quantizer={"codes_per_level": [16, 8, 8, 8]})
    with pytest.raises(
        ReleaseError, match=r"IDs of \[8, 8, 8, 8\] codes per level, the recipe asks for \[16, 8, 8, 8\].*--new-ledger"
    ):
        reindex(other)
    kind = unpack(tmp_path / "kind", quantizer={"kind": "cq_sid", "codes_per_level": [64, 8, 8]})
    with pytest.raises(
        ReleaseError, match="quantizer.kind 'cq_sid' makes IDs of kind 'cluster', which are not followed"
    ):
        reindex(kind)


def test_a_release_that_cannot_be_read_never_begins_a_ledger_silently(stored):
    store = Store(stored.store)
    name = releases.current(store).name
    manifest = releases.current(store).manifests(store)["generator"]
    fields = json.loads(store.read(manifest.name))
    store.write(manifest.name, json.dumps(fields | {"format": 99}).encode())
    with pytest.raises(FormatError, match="written by a newer version.*reindex --new-ledger"):
        open_previous(store, name)
    assert open_previous(store, name, new_ledger=True) is None


@pytest.mark.parametrize("later", [1, 2])
def test_it_is_served_by_versions_to_come(stored, tmp_path, monkeypatch, later):
    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, stage._replace(version=stage.version + later))
    test_it_is_served(stored, tmp_path)


def test_its_evaluation_keeps_its_key_and_it_can_be_diagnosed(stored):
    store = Store(stored.store)
    parts = releases.current(store).manifests(store)
    asked = []
    job = SimpleNamespace(
        recipe=Recipe.stored(parts["evaluation"].recipe), produce=lambda kind, settings, *_: asked.append(settings)
    )
    evaluate.run(job, parts)
    assert asked == [parts["evaluation"].settings]

    def chosen(rows: int):
        evaluation = stored.evaluation.model_copy(update={"diagnose_rows": rows})
        recipe = stored.model_copy(update={"evaluation": evaluation})
        return evaluate.to_diagnose(SimpleNamespace(recipe=recipe, store=store), parts)

    assert chosen(0) is None and chosen(98).startswith("a query costs 99 decoder rows")
    assert [len(chosen(rows).queries) for rows in (300, 594, 5_000_000)] == [3, 6, 6]
    figures = diagnose_release(stored.store, release=None, queries=2, split="validation")["diagnosis"]
    assert figures["queries"] == 2 and set(figures["mixture"]) == {"beam 16", "exact"}
    assert all(len(shares) == 4 and shares == sorted(shares, reverse=True) for shares in figures["kept"].values())
    with pytest.raises(ReleaseError, match="no release 'r-1'"):
        diagnose_release(stored.store, release="r-1", queries=2, split="validation")
