"""The arithmetic of a first recipe: it meets what was tuned by hand, and is a recipe at every size."""

import pytest
import yaml

from catid2_ray.config import Recipe
from catid2_ray.config.suggest import (
    Facts,
    as_yaml,
    codes_per_level,
    generator_batch,
    generator_epochs,
    quantizer_batch,
    relevant_from,
    rows_per_part,
    suggest,
    vocabulary,
)

PAIRS = {"grades": {1.0: 9, 3.0: 21}, "splits": {"train": 20, "test": 10}, "teaching": {1.0: 6, 3.0: 14}, "queries": 5}


@pytest.mark.parametrize(
    "products, codes, batch, part, words",
    [(6_000, 64, 500, 1_500, 2_000), (54_667, 256, 1_024, 4_096, 8_000), (300, 8, 32, 75, 500)],
)
def test_numbers_follow_the_size(products, codes, batch, part, words):
    assert codes_per_level(products) == codes
    assert (quantizer_batch(products), rows_per_part(products), vocabulary(products)) == (batch, part, words)


def test_a_generator_takes_enough_steps():
    assert (generator_batch(19_032), generator_epochs(19_032)) == (256, 10)
    assert [
        examples // generator_batch(examples) * generator_epochs(examples) >= 740 for examples in (100, 3_000, 10**6)
    ] == [True] * 3


@pytest.mark.parametrize(
    "grades, least",
    [
        ({0: 5, 1: 5}, 1), ({1: 3}, 1), ({1: 1, 2: 1, 3: 1}, 2), ({0: 1, 0.01: 1, 0.1: 1, 1: 1}, 1),
        (dict.fromkeys(range(5), 1), 2), (dict.fromkeys(range(40), 1), 1),
    ],
)  # fmt: skip
def test_answers_are_in_the_upper_half_of_the_scale(grades, least):
    assert relevant_from(grades) == least


@pytest.mark.parametrize("products", [2, 5, 40, 300, 3_000, 19_999, 20_001, 300_000, 10**8])
@pytest.mark.parametrize("with_pairs", [True, False])
def test_it_is_a_recipe_at_every_size(products, with_pairs):
    facts = Facts(
        name="a: b #1", root="s3://shop/catalogue [x]", products=products, depth=5, separator=" > ", cores=2,
        texts=("title", "category_path"), filters={"price": "float", "in stock": "bool"}, html={"description": 0.4},
        language="Texts look German.", left_out={"url": "nearly every value differs"}, leaked=3, exact=False,
        **(PAIRS if with_pairs else {}),
    )  # fmt: skip
    text = as_yaml(suggest(facts), "Made of " + "many words " * 30)
    recipe = Recipe.from_yaml(text, where="it")
    assert (
        recipe.name == "a: b #1" and recipe.store == "a_b_1_store" and recipe.catalog.root == "s3://shop/catalogue [x]"
    )
    assert max(recipe.quantizer.codes_per_level) <= products <= recipe.quantizer.space.capacity
    assert recipe.catalog.max_category_depth == 3 and recipe.serving.filters == ("price", "in stock", "category_path")
    assert recipe.embedding.text == ("title", "category_path") and "40% of description" in text
    assert max(map(len, text.splitlines())) <= 112
    assert recipe.evaluation.methods == (("beam", "served", "bm25") if with_pairs else ())
    if with_pairs:
        assert recipe.generator.min_relevance == 3
        assert recipe.generator.mix["title"] == pytest.approx(products / 14, rel=0.05)


def test_a_few_titles_beside_many_pairs_are_still_seen():
    many = PAIRS | {"teaching": {3.0: 10**6}}
    mix = next(line for line in suggest(Facts(name="x", root="/shop", products=3_000, **many)) if line.key == "mix")
    assert mix.value["title"] == pytest.approx(0.003, rel=0.05)


def test_given_vectors_are_taken_and_a_split_that_is_missing_is_said():
    facts = Facts(name="x", root="/shop", products=900, given=384, cores=1, **PAIRS | {"splits": {"train": 30}})
    text = as_yaml(suggest(facts), "x")
    values = yaml.safe_load(text)
    assert values["embedding"] == {"source": "given"} and "workers" not in values["quantizer"]
    assert values["evaluation"]["split"] == "train" and "keep some queries back as split test" in text.replace(
        "\n  # ", " "
    )
