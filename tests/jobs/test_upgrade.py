"""A release that earlier code published lives on under later code: it is served, appended to, rolled back to, and re-IDed on top
of, also after every stage has changed what it writes twice more."""

import pyarrow.parquet as pq
import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts import stages
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.commands import append_items, reindex
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from tests.stored import unpack


def ids_of(store: Store, release) -> dict[str, str]:
    ids = release.manifests(store)["ids"]
    tables = [store.read_table(ids.file(entry["name"]), columns=["product_id", "docid"]) for entry in ids.parts()]
    return {row["product_id"]: row["docid"] for table in tables for row in table.to_pylist()}


@pytest.fixture
def later_versions(monkeypatch):
    for name, stage in list(stages.STAGES.items()):
        monkeypatch.setitem(stages.STAGES, name, stage._replace(version=stage.version + 2))


def test_a_stored_release_is_appended_to_served_and_re_ided(no_ray, tmp_path, later_versions):
    stored = unpack(tmp_path)
    store = Store(stored.store)
    first = releases.current(store)
    before = ids_of(store, first)
    (tmp_path / "later_products.parquet").replace(tmp_path / "shop" / "products.parquet")
    # A recipe that says nothing: encoder, quantizer, generator, serving and evaluation are those of the release.
    plain = {"store": stored.store, "catalog": {"root": stored.catalog.root}, "cluster": {"logical_cpus": 4}}
    with pytest.raises(RecipeError, match=r"quantizer\.epochs is 7, the release has 6"):
        append_items(Recipe.build(plain | {"quantizer": {"epochs": 7}}))
    appended = append_items(Recipe.build(plain))
    after = ids_of(store, appended.release)
    stay = before.keys() & after.keys()
    assert len(stay) == 140 and all(after[name] == before[name] for name in stay) and len(set(after.values())) == 160
    assert appended.parts["generator"].key == first.parts["generator"]["key"] and appended.figures["number"] == 2
    for release in (first, appended.release):
        retriever = open_retriever(releases.release_folder(store, release, tmp_path / "cache"))
        assert len(retriever.retrieve(["oak shelf"], k=5, filters=[{"column": "price", "to": 60}])[0]) == 5

    again = reindex(stored)
    assert again.figures["number"] == 3 and again.figures["base"] == appended.release.name
    assert again.figures["ledger"]["retired"] == 10 and again.figures["churn"]["after"]["common"] == 160
    assert pq.read_table(tmp_path / "shop" / "products.parquet").num_rows == again.figures["documents"] == 160
