"""CQ-SID's whole way from a recipe: behaviour logs in, IDs that products may share, a generator of them aligned by two workers,
and a release of it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catid2_ray import cli
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError, RecipeError
from catid2_ray.on_ray.commands import reindex, run_verb
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from tests.command import write_recipe
from tests.conftest import TINY

ALIGNMENT = {
    "enabled": True, "steps": 4, "report_every": 2, "updates": 2, "batch": 16, "group": 4, "injected": 2, "workers": 2,
    "validation_queries": 8, "judged_max": 16, "max_failures": 0, "learning_rate": 1e-3,
}  # fmt: skip


def ranked(query: str, product_ids: list[str]) -> list[float]:
    """A ranker that likes late product ids."""
    return [float(product_id.strip("pP") or 0) if product_id[-1].isdigit() else 0.0 for product_id in product_ids]


def test_a_recipe_with_behaviour_is_aligned_and_published(no_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("CATID2_RANKERS", "tests.jobs.test_align:ranked,shop.rank:scores")
    made = generate(products=200, queries=80, seed=3)
    behaviour = np.array(["paid", "clicked", "exposed", None], object)[np.arange(made.pairs.num_rows) % 4]
    (tmp_path / "shop").mkdir()
    pq.write_table(made.products, tmp_path / "shop" / "products.parquet")
    pq.write_table(made.pairs.append_column("behaviour", pa.array(behaviour)), tmp_path / "shop" / "pairs.parquet")
    values = {name: dict(part) if isinstance(part, dict) else part for name, part in TINY.items()}
    values |= {"store": str(tmp_path / "store"), "catalog": {"root": str(tmp_path / "shop"), "rows_per_part": 100}}
    values["quantizer"] |= {"kind": "cq_sid", "codes_per_level": [64, 8, 8], "leaf": 20, "epochs": 2}
    values["evaluation"]["beam_width"] = 8
    values["generator"] |= {"epochs": 1, "mix": {"query": 1.0, "title": 0.1}}
    values["alignment"] = ALIGNMENT | {"ranker": "tests.jobs.test_align:ranked"}
    outcome = reindex(Recipe.build(values))
    assert {"generator", "prompts", "aligned"} <= set(outcome.made)
    assert outcome.parts["ids"].metrics["duplicates_after"] > 0, "cq_sid lets products share an ID"
    cli.report_ids(str(write_recipe(tmp_path, values)), html_file=str(tmp_path / "ids.html"))
    assert "data:image/png;base64," in (tmp_path / "ids.html").read_text()
    store = Store(values["store"])
    generator = releases.current(store).manifests(store)["generator"]
    assert set(generator.parents) == {"trained", "ids", "examples", "prompts"}
    assert generator.settings["model"] == "small", "serving asks what kind it is"
    figures = generator.metrics
    assert figures["measured_on"] == "validation" and figures["before"]["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["after"]["kl"] > 0 and 0 < figures["training"]["experts"] <= 2
    assert 0.1 <= figures["before"]["reward"] <= 1.2
    history = json.loads(store.read(generator.file("history.json")))
    assert [record["epoch"] for record in history] == [0, 1] and "before" in history[0]
    hits = open_retriever(releases.release_folder(store, releases.current(store), tmp_path / "cache")).retrieve(
        [made.pairs["query"][0].as_py()], k=5
    )[0]
    assert len(hits) == 5
    # All is found again; with other settings the trained generator stays, and only the alignment would be new.
    assert run_verb(Recipe.build(values), "align_generator")[1].digest == generator.digest
    with pytest.raises(RecipeError, match="set alignment.enabled=true"):
        run_verb(Recipe.build(values | {"alignment": {}}), "align_generator")
    with pytest.raises(RecipeError, match="'shop.rank:scores' cannot be imported .*on the path of every worker"):
        run_verb(Recipe.build(values | {"alignment": ALIGNMENT | {"ranker": "shop.rank:scores"}}), "align_generator")
    longer = values | {"generator": values["generator"] | {"epochs": 2}}
    with pytest.raises(ArtifactError, match="holds no generator for this recipe: run `python -m jobs.train_generator"):
        run_verb(Recipe.build(longer), "align_generator")
