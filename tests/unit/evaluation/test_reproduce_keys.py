"""What cells are kept under, and what is refused before anything is made: by `Measures` and `Bench` over parts that say little."""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from catid2_ray.config import Recipe
from catid2_ray.errors import InputError
from catid2_ray.evaluation.reproduce.conditions import METHODS, plan
from catid2_ray.on_ray.reproduce.bench import Bench
from catid2_ray.on_ray.reproduce.measure import Measures

OF = {condition.name: condition for condition in METHODS}


def recipe_of(**sections) -> Recipe:
    return Recipe.build({"name": "shop", "catalog": {"root": "data"}, **sections})


def measures(recipe: Recipe, *, width: int | None = None, queries=("q1",)) -> Measures:
    manifest = SimpleNamespace(digest="d", metrics={"width": width})
    bench = SimpleNamespace(judged={"test": SimpleNamespace(query_ids=list(queries), queries=list(queries))})
    return Measures(SimpleNamespace(recipe=recipe), {"catalog": manifest, "pairs": manifest}, bench)


def test_another_encoder_answers_queries_itself():
    """`serving.query_encoder` made the recipe's own vectors; those of MPNet mean nothing to it."""
    own = recipe_of(embedding={"encoder": "a/b"}, serving={"query_encoder": "a/b"})
    of = measures(own)
    for name, encoder in (("mpnet", None), ("sentence_t5", None), ("zero_shot", "a/b"), ("dense", "a/b")):
        assert of.recipe_of(OF[name], 0).serving.query_encoder == encoder


@pytest.mark.parametrize("name", ["zero_shot", "mpnet", "tiger_with_category"])
def test_given_vectors_are_not_taken_for_another_encoder_s(name):
    cells = {cell.row.condition.name: cell.row.condition for cell in plan(["2", "4"], list(OF), "shop")}
    of = measures(recipe_of(serving={"query_encoder": "a/b"}), width=8)
    with pytest.raises(
        InputError, match="the catalogue brings its own vectors, so no other encoder or text is embedded"
    ):
        of.settings(cells[name], 0)


def test_a_sample_of_queries_is_part_of_the_key():
    """Another seed of the recipe draws others, whatever the seed of the method."""
    few = recipe_of(evaluation={"max_queries": 1})
    one, other = (measures(few, queries=queries).settings(OF["bm25"], 0)[0] for queries in (["q1"], ["q2"]))
    assert one != other and "queries" not in measures(recipe_of()).settings(OF["bm25"], 0)[0]


def bench_of(grades: list[float], **evaluation) -> Bench:
    pairs = pa.table({"relevance": pa.array(grades, pa.float64())})
    return Bench(recipe_of(evaluation=evaluation), pa.table({}), pairs, {"validation": None}, [], 0, {})


def test_nothing_is_chosen_on_the_queries_that_are_measured():
    with pytest.raises(InputError, match="evaluation.split is validation, and nothing is chosen on the queries"):
        bench_of([1.0], split="validation").asked("validation")


@pytest.mark.parametrize("grades, zero", [([1.0, 2.0, 3.0], 1.0), ([3.0, 3.0], 2.0), ([0.0, 3.0], 0.0)])
def test_where_all_grades_are_relevant_the_lowest_has_a_gain(grades, zero):
    """A log of clicks has one grade; its qrels would else say that nothing is relevant."""
    assert bench_of(grades, min_relevance=2.67).zero_grade == zero
