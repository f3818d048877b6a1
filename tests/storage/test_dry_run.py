"""`reindex --dry-run`: what it says will be made is what a job then makes, and it writes nothing."""

import copy
import json

import pytest

from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.look.dry_run import dry_run
from tests.command import run_here
from tests.conftest import TINY
from tests.in_process import without_ray


def recipe(store, **sections) -> Recipe:
    values = copy.deepcopy(TINY) | {"store": str(store)}
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return Recipe.build(values)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with a release of the tiny recipe."""
    store = tmp_path_factory.mktemp("dry") / "store"
    with without_ray():
        reindex(recipe(store))
    return store


def does(figures: dict, what: str) -> list[str]:
    return [row["stage"] for row in figures["stages"] if row["does"] == what]


def test_before_anything_was_made_all_is_made_and_nothing_is_written(tmp_path):
    figures = dry_run(recipe(tmp_path / "store"))
    assert figures["release"] is None
    assert does(figures, "found") == [] and does(figures, "made")[:3] == ["catalog", "pairs", "embeddings"]
    assert figures["stages"][0]["why"] == "not in the store for these inputs and settings"
    assert figures["stages"][1]["why"] == "reads catalog, which will be new"
    assert not (tmp_path / "store").exists()


def test_the_same_recipe_finds_everything_and_writes_nothing(made):
    before = Store(made).listing("")
    figures = dry_run(recipe(made))
    assert does(figures, "made") == [] and figures["release"].startswith("r-")
    assert {row["stage"] for row in figures["stages"]} >= {
        "catalog",
        "quantizer",
        "ids",
        "generator",
        "serving",
        "evaluation",
    }
    assert all(len(row["key"]) == 16 for row in figures["stages"])
    assert Store(made).listing("") == before


@pytest.mark.parametrize(
    "changes, made_first",
    [
        ({"evaluation": {"beam_width": 8}}, "serving"),
        ({"generator": {"epochs": 2}}, "generator"),
        ({"quantizer": {"epochs": 4}}, "quantizer"),
    ],
)
def test_what_is_said_to_be_made_is_what_a_job_makes(made, changes, made_first):
    asked = recipe(made, **changes)
    said = does(dry_run(asked), "made")
    assert said[0] == made_first
    with without_ray():
        outcome = reindex(asked)
    assert set(outcome.made) <= set(said)
    # A stage whose new inputs turn out equal may be found all the same; none does here, but for parts that a recipe may lack.
    assert set(said) - set(outcome.made) <= {"mixture", "node_vectors"}


def test_numbers_that_follow_a_size_that_was_not_read_are_open(made, monkeypatch):
    asked = recipe(made, generator={"batch": "auto"})
    store = Store(made)
    find = dry_run.__globals__["_Look"].find
    monkeypatch.setattr(
        dry_run.__globals__["_Look"], "find",
        lambda self, kind, *rest, **options: None if kind == "pairs" else find(self, kind, *rest, **options),
    )  # fmt: skip
    figures = dry_run(asked)
    assert does(figures, "found") == ["catalog", "embeddings"] and "pairs" in does(figures, "made")
    assert does(figures, "open")[0] == "quantizer" and store.exists("current")


def test_the_command_shows_the_plan_and_keeps_to_it(made, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe(made).to_yaml())
    done = run_here("reindex", "--recipe", str(tmp_path / "recipe.yaml"), "--dry-run", "--set", "generator.epochs=3",
                    "--json", str(tmp_path / "plan.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "A dry run; builds on release r-" in done.stdout and "which will be new" in done.stdout
    rows = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert {row["stage"] for row in rows} <= set(STAGES) and {row["does"] for row in rows} == {"found", "made"}
