"""Settings that a recipe leaves to the catalogue's size: what they come to, who wins over them, and what a release keeps."""

import pytest
import yaml

from catid2_ray.config import KINDS, QuantizerRecipe, Recipe
from catid2_ray.config.kinds import preset
from catid2_ray.config.sizes import Before, examples_an_epoch, left_out, sized
from catid2_ray.errors import RecipeError


def recipe(**sections) -> Recipe:
    return Recipe.build({"name": "x", "catalog": {"root": "/shop"}, **sections})


def numbers(of: Recipe) -> tuple:
    return (*of.quantizer.codes_per_level, of.quantizer.batch, of.generator.batch, of.generator.epochs)


@pytest.mark.parametrize(
    "products, teaching, expected",
    [
        (300, 450, (8, 8, 8, 8, 32, 64, 53)),  # 14 steps an epoch
        (3_000, 5_000, (32, 32, 32, 32, 250, 256, 19)),
        (300_000, 400_000, (256, 256, 256, 256, 1024, 256, 10)),
        (300_000, 0, (256, 256, 256, 256, 1024, 256, 10)),  # titles alone
        (300, 0, (8, 8, 8, 8, 32, 64, 185)),
        (3, 2, (3, 3, 3, 3, 2, 64, 740)),
    ],
)
def test_three_lines_come_to_numbers_that_fit(products, teaching, expected):
    found = sized(recipe(), products=products, teaching=teaching)
    assert numbers(found.recipe) == expected and not found.kept
    assert set(found.chosen) == {
        "quantizer.codes_per_level", "quantizer.batch", "generator.batch", "generator.epochs",
    }  # fmt: skip
    assert left_out(found.recipe) == [] and sized(found.recipe, products=7, teaching=7).recipe == found.recipe


def test_a_small_catalogue_takes_at_least_740_steps_and_a_large_one_ten_epochs():
    for teaching in (100, 1_000, 10_000, 10**6):
        generator = sized(recipe(), products=300, teaching=teaching).recipe.generator
        examples = examples_an_epoch(generator.mix, teaching=teaching, products=300)
        assert generator.epochs >= 10 and examples // generator.batch * generator.epochs >= 740


def test_what_the_recipe_states_wins_and_auto_is_left_out():
    stated = recipe(quantizer={"codes_per_level": [4, 5], "batch": "auto"}, generator={"epochs": 3, "batch": "auto"})
    found = sized(stated, products=3_000, teaching=5_000)
    assert numbers(found.recipe) == (4, 5, 250, 256, 3) and set(found.chosen) == {"quantizer.batch", "generator.batch"}
    with pytest.raises(RecipeError, match="generator.dropout.*found 'auto'"):
        recipe(generator={"dropout": "auto"})


def test_a_recipe_that_is_written_and_read_again_leaves_out_what_it_left_out():
    stated = recipe(generator={"epochs": 3})
    written = yaml.safe_load(stated.to_yaml())
    assert (written["quantizer"]["batch"], written["generator"]["batch"], written["generator"]["epochs"]) == (
        "auto",
        "auto",
        3,
    )
    assert left_out(Recipe.build(written)) == left_out(stated)
    chosen = sized(stated, products=300, teaching=450).recipe
    assert (
        Recipe.build(yaml.safe_load(chosen.to_yaml())) == chosen and "auto" not in chosen.quantizer.identity().values()
    )


def test_stages_have_epochs_of_their_own():
    stages = [{"name": "first", "mix": {"title": 1}, "epochs": 2}, {"name": "second", "epochs": 3}]
    assert ("generator", "epochs") not in left_out(recipe(generator={"stages": stages}))


def test_a_batch_splits_over_the_workers():
    found = sized(
        recipe(quantizer={"workers": 3}, generator={"workers": 2, "micro_batch": 48}), products=300, teaching=450
    )
    assert (found.recipe.quantizer.batch, found.recipe.generator.batch) == (30, 96)


def before(products: int, **generator) -> Before:
    made = sized(recipe(), products=products, teaching=2 * products).recipe
    sections = {name: getattr(made, name).model_dump(mode="json") for name in ("quantizer", "generator")}
    sections["generator"] |= generator
    return Before("r-1", products, sections)


def test_a_release_keeps_its_numbers_while_the_catalogue_grows_to_twice_its_size():
    """1,023 products give 8 codes, 1,033 give 16: growth by 1 % must not rename every product."""
    for products in (1_033, 2_000, 520):
        found = sized(recipe(), products=products, teaching=2 * products, before=before(1_023))
        assert numbers(found.recipe) == numbers(sized(recipe(), products=1_023, teaching=2_046).recipe)
    assert numbers(sized(recipe(), products=1_033, teaching=2_066).recipe)[0] == 16, "without the release"


def test_beyond_that_batches_and_epochs_follow_and_codes_stay_with_the_ledger():
    found = sized(recipe(), products=30_000, teaching=60_000, before=before(1_023))
    assert numbers(found.recipe) == (8, 8, 8, 8, 1024, 256, 10)
    assert found.kept == {"quantizer.codes_per_level": [256] * 4}, "which is said"


def test_growth_in_small_steps_is_followed():
    products, of = 1_000, before(1_000)
    for _ in range(8):
        products = int(1.9 * products)
        found = sized(recipe(), products=products, teaching=2 * products, before=of).recipe
        sections = {name: getattr(found, name).model_dump(mode="json") for name in ("quantizer", "generator")}
        of = Before("r-next", products, sections)
    assert found.quantizer.batch >= 256 and found.generator.batch >= 64 and found.quantizer.codes_per_level == (8,) * 4


def test_a_release_trained_in_stages_has_no_epochs_to_keep():
    found = sized(recipe(), products=1_000, teaching=2_000, before=before(1_000, epochs="auto"))
    assert found.recipe.generator.epochs == sized(recipe(), products=1_000, teaching=2_000).recipe.generator.epochs


def test_numbers_that_a_release_of_an_earlier_version_has_are_kept_and_said():
    found = sized(recipe(), products=60_000, teaching=60_000, before=before(60_000, epochs=30))
    assert found.recipe.generator.epochs == 30 and found.kept == {"generator.epochs": 10}


@pytest.mark.parametrize("kind", KINDS)
def test_no_preset_says_a_size(kind):
    """It would lose to the catalogue's size, as what a preset fills counts as left out."""
    assert not preset(kind).keys() & set(QuantizerRecipe.sized())
