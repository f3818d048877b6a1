"""The ESCI recipes from the published files to a release, on the sample; widths, epochs and models cut down, the rest as it is.

The generators are random: an mT5 as it is published, and small T5s made here.
"""

import pyarrow.parquet as pq
import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.stages.prepare_esci import prepare_esci
from tests.command import ROOT
from tests.esci_sample import write_sample
from tests.text_models import save_mt5

SMALL = [
    "cluster.gpus_per_worker=0", "catalog.rows_per_part=50", "catalog.workers=1", "embedding.encoder=lsa", "embedding.width=16",
    "embedding.gpus_per_worker=0", "quantizer.codes_per_level=[8,8,8,8]", "quantizer.hidden=[32]", "quantizer.latent=8",
    "quantizer.batch=32", "quantizer.epochs=4", "quantizer.kmeans_sample=64", "quantizer.collapse_patience=0",
    "ids.workers=1", "generator.precision=fp32", "generator.batch=32",
    "generator.epochs=2", "evaluation.workers=1", "evaluation.beam_width=16", "evaluation.min_beam_to_bm25=0",
]  # fmt: skip
SMALL_T5 = [
    "generator.model=small", "generator.width=32", "generator.layers=1", "generator.heads=2", "generator.feed_forward=64",
    "generator.vocabulary=300",
]  # fmt: skip
QUERY = {"us": "black water bottle", "es": "sartén antiadherente negro", "jp": "折りたたみ傘 黒"}


@pytest.mark.parametrize("locale", ["jp", "us", "es"])
def test_a_recipe_runs_from_the_published_files_to_a_release(locale, no_ray, tmp_path):
    sample = write_sample(tmp_path / "source", products=72)
    done = prepare_esci(
        str(sample.folder), str(sample.categories), str(tmp_path / "data"), locale=locale, validation=0.25
    )
    overrides = [f"catalog.root={done.root}", f"store={tmp_path / 'store'}", *SMALL]
    if locale == "jp":
        titles = pq.read_table(tmp_path / "data" / "products.parquet", columns=["title"])["title"].to_pylist()
        save_mt5(tmp_path / "mt5", titles, words=300)
    overrides += [f"generator.model={tmp_path / 'mt5'}"] if locale == "jp" else SMALL_T5
    outcome = reindex(Recipe.load(ROOT / "jobs" / "recipes" / f"esci_{locale}.yaml", overrides))
    metrics = outcome.parts["catalog"].metrics | outcome.parts["pairs"].metrics
    counts = done.counts
    assert metrics["products"] == counts["documents"] and metrics["products_set_aside"] == 0
    labels = [counts.get(f"{split}_{x}", 0) for split in ("train", "validation", "test") for x in "ESCI"]
    assert metrics["pairs"] == sum(labels) and metrics["pairs_set_aside"] == metrics["pairs_duplicate"] == 0
    examples = outcome.parts["examples"].metrics
    assert (
        examples["query_examples"] == counts["train_E"] + counts["train_S"] and examples["pairs_without_product"] == 0
    )
    assert outcome.parts["generator"].metrics["best_score"] > 0, "the recipes choose the epoch by validation"
    # Every relevant test product was trained on, and words are found in a script without spaces too.
    assert outcome.figures["queries"]["unseen"] == 0 and outcome.figures["queries"]["all"] == counts["test_queries"]
    assert outcome.figures["recall"]["bm25"]["20"] > 0.5
    store = Store(tmp_path / "store")
    retriever = open_retriever(releases.release_folder(store, outcome.release, tmp_path / "cache"))
    assert len(retriever.retrieve([QUERY[locale]], k=5)[0]) == 5
