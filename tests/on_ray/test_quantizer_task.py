"""What the quantizer's training does around its steps: health every epoch, a stop on collapse, labels changed on purpose."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import QuantizerRecipe
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.stages.train_quantizer import (
    QuantizerTask,
    _LabelledParts,
    _Labels,
    _SureVectors,
    fit_coder,
    forced_column,
)


def task(**settings) -> QuantizerTask:
    recipe = QuantizerRecipe(codes_per_level=(8, 8, 8, 8), hidden=(16,), latent=4, batch=32, epochs=5, **settings)
    rng = np.random.default_rng(0)
    return QuantizerTask(
        recipe, width=6, categories=(2, 4), sample_ND=rng.normal(size=(200, 6)).astype(np.float32),
        category_NH=np.stack((np.arange(200) % 2, np.arange(200) % 4), 1).astype(np.int32), seed=0,
    )  # fmt: skip


def test_an_epoch_ends_with_figures_for_every_level_and_term():
    one = task()
    module = one.build()
    one.start(module)
    means = {"loss": 1.0, "anchors_1": 30.0, "anchors_2": 12.5}
    figures, changed = one.end_epoch(module, epoch=0, means=means, history=[])
    assert figures["verdict"] in ("healthy", "narrowing") and figures["codes_used"] == [8, 8, 8, 8]
    assert figures["anchors"] == [30.0, 12.5] and means == {"loss": 1.0}
    assert set(figures["gradient_norm"]) == {"residual_quantization", "reconstruction", "dispersion", "hierarchical"}
    assert all(norm >= 0 for norm in figures["gradient_norm"].values()) and figures["latent_norm"] == pytest.approx(1.0)
    assert {"quantization_error", "top_share", "normalised_entropy", "dead"} <= set(figures["levels"][0])
    assert not changed and all(parameter.grad is None for parameter in module.parameters())


def collapsed(one: QuantizerTask):
    module = one.build()
    with torch.no_grad():
        for codebook_KZ in module.codebooks:
            codebook_KZ += 1e3 * torch.arange(8)[:, None]  # all rows are nearest to code 0
    return module


def test_a_collapse_that_persists_asks_to_stop_with_the_numbers():
    one = task(collapse_patience=2, revive_every_epochs=0, refit=False)
    module, history = collapsed(one), []
    figures, _ = one.end_epoch(module, epoch=0, means={}, history=history)
    assert figures["verdict"] == "collapsed"
    history.append(figures)
    stop = one.end_epoch(module, epoch=1, means={}, history=history)[0]["stop"]
    for words in ("stayed so for 2 epochs", "Codes used per level [1, 1, 1, 1]", "gradient norms"):
        assert words in stop
    patient = task(collapse_patience=0, revive_every_epochs=0, refit=False)
    assert "stop" not in patient.end_epoch(module, epoch=1, means={}, history=history)[0]


@pytest.mark.parametrize("codes", [8, 16])
def test_a_catalogue_of_300_products_is_not_stopped(codes):
    """Residual k-means itself gives single outliers codes of their own: all are used, the deeper ones by few products."""
    titles = generate(products=300, queries=10, seed=1).products["title"].to_pylist()
    sample_ND = TruncatedSVD(64, random_state=0).fit_transform(TfidfVectorizer(sublinear_tf=True).fit_transform(titles))
    sample_ND = (sample_ND / np.linalg.norm(sample_ND, axis=1, keepdims=True)).astype(np.float32)
    one = QuantizerTask(
        QuantizerRecipe(codes_per_level=(codes,) * 4), width=64, categories=(2,), sample_ND=sample_ND,
        category_NH=np.zeros((300, 1), np.int32), seed=0,
    )  # fmt: skip
    module, history = one.build(), []
    one.start(module)
    for epoch in range(one.recipe.collapse_patience):
        history.append(one.end_epoch(module, epoch=epoch, means={}, history=history)[0])
    assert history[-1]["codes_used"] == [codes] * 4
    assert min(level["normalised_entropy"] for level in history[-1]["levels"]) < 0.5
    assert [record["verdict"] for record in history] == ["healthy"] * 3 and "stop" not in history[-1]


def test_shared_ids_are_no_collapse():
    one = task(ids="cluster", revive_every_epochs=0, refit=False)
    module = one.build()
    one.start(module)
    one.sample_ND[:] = one.sample_ND[:32].repeat(7, 0)[:200]
    assert one.end_epoch(module, epoch=0, means={}, history=[])[0]["verdict"] != "collapsed"


class Part:
    """A store with one part."""

    def __init__(self, category_NH):
        rows = len(category_NH)
        self.table = pa.table(
            {
                "part": pa.array(np.full(rows, 3, np.int32)), "index": pa.array(np.arange(rows, dtype=np.int32)),
                "embedding": fixed_lists(np.ones((rows, 2), np.float32), pa.float32()),
                "category": fixed_lists(category_NH, pa.int32()),
            }
        )  # fmt: skip

    def read(self, name, columns):
        return self.table.select(columns)


def labels_seen(category_NH, **settings):
    labels = _Labels.of(QuantizerRecipe(**settings), 1, np.ones((20, 2), np.float32))
    reader = _LabelledParts(("embedding", "category"), labels, vectors=Part(category_NH))
    return matrix(reader(None, "part-00003.parquet")["category"])


def test_labels_of_vectors_do_not_read_the_catalogues_and_agree_between_parts():
    rng = np.random.default_rng(0)
    sample_ND = rng.normal(size=(300, 4)).astype(np.float32)
    labels = _Labels.of(QuantizerRecipe(category_from="clusters", category_depth=2), 1, sample_ND)
    whole = labels(np.full((300, 3), 7), sample_ND, part=-1)
    assert whole.shape == (300, 2) and len(np.unique(whole[:, 0])) == 16 and 16 < len(np.unique(whole[:, 1])) <= 128
    assert np.array_equal(whole[100:150], labels(np.full((50, 3), -1), sample_ND[100:150], part=3))
    assert (whole[:, 1] // 8 == whole[:, 0]).all()


def test_training_sees_labels_as_the_recipe_says():
    category_NH = np.stack((np.arange(400) // 100, np.arange(400) // 10), 1).astype(np.int32)
    assert np.array_equal(labels_seen(category_NH), category_NH)
    assert np.array_equal(labels_seen(category_NH, category_depth=1), category_NH[:, :1])
    shuffled = labels_seen(category_NH, kind="cat_id2_shuffled")
    assert (shuffled[:, 0] == category_NH[:, 0]).mean() < 0.4
    assert np.array_equal(np.unique(shuffled, axis=0), np.unique(category_NH, axis=0)), "whole paths are exchanged"
    assert np.array_equal(shuffled, labels_seen(category_NH, kind="cat_id2_shuffled")), "a part read twice is the same"
    masked = labels_seen(category_NH, category_masked=0.5)
    assert 0.2 < (masked[:, 1] == -1).mean() < 0.8 and np.array_equal(masked[:, 0], category_NH[:, 0])


def test_training_sees_the_categories_of_which_the_catalogue_is_sure():
    category_NH = np.stack((np.arange(5) // 2, np.arange(5)), 1).astype(np.int32)
    tables = {
        "embeddings/p": Part(category_NH).table,
        "catalog/p": pa.table(
            {"sure": pa.array([0.9, 0.5, 0.4, None, float("nan")]), "votes": pa.array([3, 2, 9, 9, 9])}
        ),
    }
    store = SimpleNamespace(read_table=lambda name, columns: tables[name].select(columns))
    embeddings, catalog = (SimpleNamespace(file=f"{name}/{{}}".format) for name in ("embeddings", "catalog"))

    def seen(**least):
        table = _SureVectors(store, embeddings, None, catalog, least).read("p", ["index", "embedding", "category"])
        assert table.schema == tables["embeddings/p"].select(["index", "embedding", "category"]).schema
        kept_N = (matrix(table["category"]) == category_NH).all(1)
        assert (matrix(table["category"])[~kept_N] == -1).all()
        return kept_N.tolist()

    assert seen(sure=0.5) == [True, True, False, False, False]
    assert seen(sure=0.5, votes=3) == [True, False, False, False, False], "each column has its say"
    assert _SureVectors(store, embeddings, None, catalog, {"sure": 1}).read("p", ["index"]).column_names == ["index"]


def test_the_forced_category_is_the_deepest_that_fits():
    recipe = QuantizerRecipe(kind="cq_sid", codes_per_level=(16, 8, 8))
    assert forced_column(recipe, (3, 14, 90)) == 1
    assert forced_column(QuantizerRecipe(), (3,)) is None


def test_fitted_kinds_give_coders():
    from catid2_ray.catalog.taxonomy import Taxonomy

    taxonomy = Taxonomy.build([("a", "b"), ("a", "c"), ("d", "e")], depth=2)
    rng = np.random.default_rng(0)
    sample_ND = rng.normal(size=(300, 4)).astype(np.float32)
    category_NH = np.array([taxonomy.path_ids(p) for p in [("a", "b"), ("a", "c"), ("d", "e")]], np.int32)[
        rng.integers(0, 3, 300)
    ]

    def fitted(**settings):
        return fit_coder(QuantizerRecipe(**settings), sample_ND, category_NH, taxonomy, rows=3000, seed=0)

    assert fitted(kind="dsi_naive").codes_per_level == ()
    assert fitted(kind="rq_kmeans", codes_per_level=(4, 8)).codes_per_level == (4, 8)
    hi_gen = fitted(kind="hi_gen", branch=3, leaf=200)
    assert hi_gen.codes_per_level[:2] == (3, 3), "two roots, two children at most, and a reserved code each"
    assert max(fitted(kind="dsi_semantic", branch=4, leaf=200).codes_per_level) == 5, "4 children and a reserved code"
