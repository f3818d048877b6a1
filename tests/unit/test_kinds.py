"""`quantizer.kind`: one word is a whole method, explicit settings win, and a comparison changes nothing but the kind."""

from pathlib import Path

import pytest

from catid2_ray.config import KINDS, Recipe, sizes
from catid2_ray.config.kinds import DEFINING, lineage, preset
from catid2_ray.config.quantizer import QuantizerRecipe
from catid2_ray.on_ray.reports import variant
from catid2_ray.on_ray.stages.train_quantizer import deciding


def quantizer(**values) -> QuantizerRecipe:
    return Recipe.build({"catalog": {"synthetic": {}}, "quantizer": values}).quantizer


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_word(kind):
    built = quantizer(kind=kind)
    assert all(getattr(built, name) == value for name, value in preset(kind).items())
    assert built.explicit == set()
    assert Recipe.build({"catalog": {"synthetic": {}}, "quantizer": built.model_dump()}).quantizer == built


def test_the_papers_kinds_are_as_printed():
    paper = quantizer(kind="cat_id2_paper")
    assert (paper.dispersion, paper.hierarchical, paper.cluster_scale, paper.reconstruction) == (0.1, 1e-4, 1.0, 0.0)
    assert (paper.encoder, paper.latent_of(384), paper.category_on) == ("mlp", 32, "residual")
    assert paper.latent_radius is None and paper.level_power == 0 and not paper.refit and not paper.revive_every_epochs
    tiger = quantizer(kind="tiger")
    assert (tiger.dispersion, tiger.hierarchical, tiger.cluster_scale, tiger.reconstruction) == (0, 0, 0, 1)


def test_an_explicit_setting_beats_the_preset():
    assert quantizer(kind="tiger", reconstruction=0.5).reconstruction == 0.5
    assert quantizer(kind="tiger", reconstruction=0.5).explicit == {"reconstruction"}


def test_another_kind_keeps_the_budget_and_takes_its_own_definition():
    recipe = quantizer(kind="cat_id2", epochs=7, latent=9, hierarchical=0.7)
    tiger = quantizer(**recipe.as_kind("tiger"))
    assert (tiger.epochs, tiger.latent) == (7, 9) and tiger.explicit == {"epochs", "latent"}
    shuffled = quantizer(**recipe.as_kind("cat_id2_shuffled"))
    assert shuffled.category_noise == 1.0
    assert shuffled.hierarchical == 0.7, "the control follows the kind that it controls"
    assert quantizer(**recipe.as_kind("dis")).hierarchical == 0, "an ablation drops what it is about"
    assert quantizer(**recipe.as_kind("cat_id2")) == recipe


def test_lineage_ends_and_stays_inside():
    for kind in KINDS:
        assert lineage(kind)[0] == kind and set(lineage(kind)) <= set(KINDS)
    assert set(QuantizerRecipe.model_fields) >= DEFINING


def test_labels_and_devices_that_the_recipe_sets_hold_for_every_kind_that_does_not_set_them():
    recipe = quantizer(kind="cat_id2", category_noise=0.2, commitment=0.5, refit=False, negatives="all", ids="suffix")
    for kind in ("tiger", "cat_id2_paper", "hcc"):
        other = quantizer(**recipe.as_kind(kind))
        assert (other.category_noise, other.commitment, other.refit, other.ids) == (0.2, 0.5, False, "suffix")
    assert quantizer(**recipe.as_kind("cat_id2_shuffled")).category_noise == 1.0
    with pytest.raises(ValueError, match="reads the true category whenever it encodes"):
        quantizer(**recipe.as_kind("hi_gen"))
    with pytest.raises(ValueError, match="reads the true category whenever it encodes: leave them out"):
        quantizer(kind="cq_sid", category_from="clusters")
    with pytest.raises(ValueError, match="reads the true category whenever it encodes: leave them out"):
        quantizer(kind="cq_sid", category_confidence={"sure": 5})


@pytest.mark.parametrize(
    "values, words",
    [
        ({"kind": "rqvae"}, "kind"),
        ({"kind": "dsi_semantic", "ids": "unique"}, "does not fit coder 'tree'"),
        ({"kind": "nci", "branch": 1}, "branch 1 splits nothing"),
        ({"kind": "cq_sid", "precision": "bf16"}, "precision bf16 is not offered for the quantizer"),
        ({"latent_radius": 1}, "latent_radius 1.0 does not fit encoder 'residual'.*set encoder to mlp"),
        ({"level_power": 2}, "level_power 2.0 weighs the levels' residuals, but category_on is 'latent'"),
        ({"kind": "on_prefix", "category_decay": 0.5}, "category_decay 0.5 is of one contrast.*category_on 'prefix'"),
        ({"sampler": "category_balanced", "input": "stream"}, "needs input 'shard'"),
    ],
)
def test_contradictions_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        quantizer(**values)


def test_deep_categories_are_refused_unless_forced_or_unused():
    deep = {"catalog": {"synthetic": {}}, "quantizer": {"kind": "on_prefix", "codes_per_level": [8, 8, 8]}}
    with pytest.raises(ValueError, match="allow_deep_categories"):
        Recipe.build(deep)
    Recipe.build({**deep, "quantizer": {**deep["quantizer"], "allow_deep_categories": True}})
    Recipe.build({**deep, "quantizer": {**deep["quantizer"], "kind": "cat_id2"}})  # its one contrast ties no level
    Recipe.build({**deep, "quantizer": {**deep["quantizer"], "kind": "tiger"}})
    Recipe.build({**deep, "quantizer": {**deep["quantizer"], "category_depth": 2}})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_compared_with_that_of_a_recipe_whose_generator_reads_codewords(kind):
    """`compare-ids` and `reproduce` train no generator, so its head forbids no kind of IDs."""
    recipe = Recipe.load(Path(__file__).parents[2] / "jobs" / "recipes" / "home_depot.yaml", ["catalog.root=/shop"])
    assert recipe.generator.head == "experts"
    assert variant(recipe, kind, 1).quantizer.kind == kind


@pytest.mark.parametrize("products", [3_000, 54_667])
@pytest.mark.parametrize("stated", [{}, {"codes_per_level": [256] * 4, "batch": 1024}])
def test_a_kind_that_is_compared_has_the_sizes_of_the_job_and_of_its_own_kind_the_key(products, stated):
    """54,667 products get the defaults, K 256 and batches of 1,024: they must not be taken for numbers that nobody chose."""
    recipe = Recipe.build({"catalog": {"synthetic": {}}, "quantizer": stated})
    job = sizes.sized(recipe, products=products, teaching=products).recipe
    same = variant(job, "cat_id2", job.seed)
    assert deciding(same.quantizer) == deciding(job.quantizer) and same.ids.identity() == job.ids.identity()
    for kind in KINDS:
        other = variant(job, kind, job.seed).quantizer
        assert other.model_dump(mode="json")["codes_per_level"] == list(job.quantizer.codes_per_level)
        assert other.model_dump(mode="json")["batch"] == job.quantizer.batch
