"""Errors on their way through Ray: from the worker that meets them to the person, with their class, their text, and what was asked
of a second attempt.

Five kinds of bad input, one for each way: a task, many tasks, an actor's constructor, a training that fails and one that is tried
again. All others: test_bad_input.py, without Ray.
"""

import pyarrow as pa
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import EncoderError, InputError, TrainingError
from catid2_ray.on_ray.commands import reindex, run_verb
from catid2_ray.on_ray.stages import train_quantizer
from tests.in_process import without_ray
from tests.jobs.test_failures import failing_once

MADE = generate(products=60, queries=40, seed=1)
pytestmark = pytest.mark.usefixtures("shared_ray")


@pytest.fixture
def recipe_of(tiny, tmp_path):
    """Writes the products and builds the recipe: recipe_of(products=…, **recipe sections)."""

    def build(products=MADE.products, **sections) -> Recipe:
        source = Store(tmp_path / "source")
        source.write_table("products.parquet", products)
        source.write_table("pairs.parquet", MADE.pairs)
        tiny["store"], tiny["catalog"] = str(tmp_path / "store"), {"root": source.uri, "rows_per_part": 50}
        return Recipe.build(tiny | {name: tiny[name] | section for name, section in sections.items()})

    yield build
    assert not Store(tmp_path / "store").exists("current"), "a failed job published something"


def test_a_column_of_another_type_is_named_though_it_is_found_in_a_worker(recipe_of):
    numbers = pa.array([float(row) for row in range(60)])
    with pytest.raises(InputError, match="product_id"):
        reindex(recipe_of(products=MADE.products.set_column(0, "product_id", numbers)))


def test_bad_rows_of_several_workers_are_counted_and_named(recipe_of):
    titles = pa.array(["" if row < 15 else "ok" for row in range(60)])
    products = MADE.products.set_column(MADE.products.column_names.index("title"), "title", titles)
    with pytest.raises(InputError, match="15 of 60 rows of products are bad") as error:
        reindex(recipe_of(products=products))
    assert str(error.value).count("empty title") == 10


def test_an_encoder_that_a_worker_cannot_open(recipe_of):
    with pytest.raises(EncoderError, match="no-such-folder"):
        reindex(recipe_of(embedding={"encoder": "./no-such-folder"}))


@pytest.mark.faults
def test_a_failed_disk_is_tried_again_and_a_loss_of_nan_ends_the_job_at_once(recipe_of, tmp_path, monkeypatch, capfd):
    recipe = recipe_of(quantizer={"max_failures": 2, "warmup_share": 0, "epochs": 2, "learning_rate": 1e30})
    with without_ray():
        run_verb(recipe, "embed_catalog")
    monkeypatch.setattr(train_quantizer, "QuantizerTask", failing_once(tmp_path / "builds"))
    with pytest.raises(TrainingError, match="the loss is (nan|inf) in epoch .* lower this stage's learning_rate"):
        run_verb(recipe, "train_quantizer")
    assert (tmp_path / "builds").read_text().count("built") == 2, (
        "one attempt for each failure, though one more was left"
    )
    log = capfd.readouterr().err
    assert log.count("event=retry") == 1 and "failure=1 of=2" in log and "no space left" in log
