"""Every way of making IDs from one job, compared on a catalogue without pairs.

Carried through to a release: hi_gen (suffixes, like the dsi kinds) in test_submit.py, cq_sid (shared IDs) in test_align.py, unique
IDs of a trained quantizer (cat_id2, like tiger) in test_kill_and_resume.py, of k-means in test_append.py.
"""

import json

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.reports import compare_ids
from tests.command import job_here, run_here, write_recipe

KEYS = {
    "kind", "seed", "collision_rate", "shared_rate", "largest_shared", "codes_used", "perplexity", "purity", "ami",
    "ami_null", "seconds",
}  # fmt: skip
KINDS = ["tiger", "cq_sid", "rq_kmeans_balanced", "dsi_semantic", "dsi_naive", "hi_gen"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, no_ray):
    """`catid2 compare-ids` on products alone, with a business value each; and the same command again."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("compare")
    products = generate(products=240, queries=20, seed=3).products
    value = pa.array(np.random.default_rng(0).random(240), pa.float64())
    Store(str(folder / "source")).write_table("products.parquet", products.append_column("value", value))
    quantizer = {**TINY["quantizer"], "epochs": 2, "codes_per_level": [64, 8, 8, 8], "leaf": 20}
    recipe = {
        **TINY, "catalog": {"root": str(folder / "source"), "rows_per_part": 100}, "store": str(folder / "store"),
        "quantizer": quantizer, "ids": {**TINY["ids"], "cluster_max": 3},
    }  # fmt: skip
    command = ["compare-ids", "--recipe", write_recipe(folder, recipe), "--kinds", ",".join(KINDS),
               "--json", folder / "runs.json", "--html", folder / "runs.html"]  # fmt: skip
    first = run_here(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    return {"folder": folder, "recipe": recipe, "result": first, "again": job_here("compare_ids", *command[1:]),
            "rows": {row["kind"]: row for row in json.loads((folder / "runs.json").read_text())}}  # fmt: skip


def test_every_kind_has_its_row_with_the_promised_keys(compared):
    assert list(compared["rows"]) == KINDS
    for row in compared["rows"].values():
        assert set(row) >= KEYS and row["seconds"] > 0 and len(row["purity"]) == len(row["ami"]) <= 3
        assert len(row["codes_used"]) == len(row["perplexity"])
        assert row["kind"] in compared["result"].stdout


def test_ids_are_unique_but_where_sharing_is_the_design(compared):
    rows = compared["rows"]
    assert all(rows[kind]["duplicates_after"] == 0 for kind in KINDS if kind != "cq_sid")
    assert 0 < rows["cq_sid"]["duplicates_after"] < round(rows["cq_sid"]["collision_rate"] * 240), (
        "large ones were split"
    )
    assert rows["cq_sid"]["largest_shared"] > 3 and rows["cq_sid"]["codes_per_level"] == [64, 8, 8, 8]
    for kind in ("dsi_semantic", "dsi_naive", "hi_gen"):
        assert rows[kind]["collision_rate"] == 0 and rows[kind]["ids"] in ("suffix", "digits")
    assert rows["dsi_naive"]["codes_per_level"] == [10, 10, 10], "240 products are 000 … 239"


def test_category_tokens_follow_the_tree(compared):
    rows = compared["rows"]
    assert rows["hi_gen"]["purity"] == [1, 1, 1] and rows["hi_gen"]["ami"][0] == pytest.approx(1)
    assert rows["cq_sid"]["purity"][0] > 0.9, "only products without the forced category take the nearest"
    assert abs(rows["dsi_naive"]["ami"][0]) < 0.1


def ids_of(compared, kind) -> tuple[Store, pa.Table]:
    store = Store(str(compared["folder"] / "store"))
    for key in store.names("artifacts/ids"):
        manifest = Manifest(**json.loads(store.read(f"artifacts/ids/{key}/manifest.json")))
        if manifest.recipe["quantizer"]["kind"] == kind:
            return store, pa.concat_tables([store.read_table(manifest.file(part["name"])) for part in manifest.parts()])
    raise AssertionError(f"no IDs of {kind}")


def test_no_cluster_is_larger_than_the_recipe_allows(compared):
    _, ids = ids_of(compared, "cq_sid")
    assert max(np.unique(ids["docid"].to_numpy(), return_counts=True)[1]) == 3


def test_hi_gen_counts_up_from_the_most_valuable(compared):
    store, ids = ids_of(compared, "hi_gen")
    catalog = next(key for key in store.names("artifacts/catalog"))
    catalog = Manifest(**json.loads(store.read(f"artifacts/catalog/{catalog}/manifest.json")))
    value = {}
    for part in catalog.parts():
        table = store.read_table(catalog.file(part["name"]))
        value |= dict(zip(table["product_id"].to_pylist(), table["value"].to_pylist()))
    groups = {}
    for name, codes in zip(ids["product_id"].to_pylist(), matrix(ids["codes"]).tolist()):
        groups.setdefault(tuple(codes[:-1]), []).append((codes[-1], value[name]))
    assert max(map(len, groups.values())) > 1
    for members in groups.values():
        assert [number for number, _ in sorted(members)] == list(range(len(members)))
        assert [v for _, v in sorted(members)] == sorted((v for _, v in members), reverse=True)


def test_a_second_run_finds_everything(compared):
    assert compared["again"].returncode == 0
    assert "event=start" not in compared["again"].stderr and "event=reuse stage=ids" in compared["again"].stderr


def test_the_page_shows_the_runs(compared):
    page = (compared["folder"] / "runs.html").read_text()
    assert all(kind in page for kind in KINDS) and "data:image/png;base64," in page and "240 products" in page


def test_unknown_kinds_are_named_before_any_work(compared):
    with pytest.raises(RecipeError, match="unknown rqvae.*hi_gen"):
        compare_ids(Recipe.load(compared["folder"] / "recipe.yaml"), ["tiger", "rqvae"], 1)
