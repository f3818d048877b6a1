"""The tuned encoder's stage, without Ray: who is refused one, what is adopted and kept, and that all after it go through it."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import of_digest
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.config import Recipe
from catid2_ray.errors import EncoderError, RecipeError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.look.check import check
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.query_encoder import query_encoder, stored_encoder, tuned_folder
from catid2_ray.on_ray.serve.newcomers import Newcomers
from catid2_ray.on_ray.stages import adapter, catalog, embed
from catid2_ray.on_ray.stages import tuned_encoder as stage
from catid2_ray.on_ray.stages.evaluate import DenseSearch
from catid2_ray.on_ray.stages.lay_out import encoder_of
from tests.text_models import WORDS, save_bert

SAID = dict(zip(WORDS[:8], (*WORDS[3:8], *WORDS[:3])))  # by what word a customer asks for a word of a title
TITLES = [" ".join(words) for words in itertools.permutations(WORDS[:8], 3)][::2]
PAIRS = [
    {"query_id": f"q{row:03d}", "query": " ".join(SAID[word] for word in title.split()), "product_id": f"p{row:03d}",
     "relevance": 3.0, "split": "train" if row % 4 else "validation"}
    for row, title in enumerate(TITLES)
]  # fmt: skip
TUNING = {"epochs": 8, "batch": 32, "learning_rate": 3e-3, "products": 100, "judged_products": 150}


@pytest.fixture(autouse=True)
def _alone():
    with cluster.without_ray():
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


def recipe_of(folder, encoder, pairs=PAIRS, *, given=False, **sections) -> Recipe:
    """`pairs`: rows, or None for no table; `given`: the products have vectors."""
    shop = folder / "shop"
    shop.mkdir(parents=True, exist_ok=True)
    products = {"product_id": [f"p{row:03d}" for row in range(len(TITLES))], "title": TITLES}
    if given:
        products["embedding"] = [[1.0, float(row)] for row in range(len(TITLES))]
    pq.write_table(pa.table(products), shop / "products.parquet")
    (shop / "pairs.parquet").unlink(missing_ok=True)
    if pairs is not None:
        pq.write_table(pa.Table.from_pylist(pairs), shop / "pairs.parquet")
    values = {
        "store": str(folder / "store"), "catalog": {"root": str(shop), "rows_per_part": 64}, "tuning": TUNING,
        "embedding": {"encoder": encoder, "encoder_mode": "tuned", "text": ["title"], "tokens": 16, "adapter": "none"},
    }  # fmt: skip
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return Recipe.build(values)


def made(recipe, *, previous=None, refresh=False) -> dict:
    """The parts of a job up to the vectors, on top of those of `previous`."""
    before = previous and SimpleNamespace(parts=previous, release=SimpleNamespace(name="r-1"))
    job = Job(
        recipe=recipe, store=Store(recipe.store), peak=cluster.PeakMemory(), previous=before, refresh_encoder=refresh
    )
    parts = {"catalog": catalog.run(job, {})}
    parts["pairs"] = catalog.run_pairs(job, parts)
    if (tuned := stage.run(job, parts)) is not None:
        parts["tuned_encoder"] = tuned
    parts["embeddings"] = embed.run(job, parts)
    return parts


@pytest.fixture(scope="module")
def shop(tmp_path_factory, encoder):
    """A folder with a store, and the parts that were made in it."""
    folder = tmp_path_factory.mktemp("tuned")
    with cluster.without_ray():
        return folder, made(recipe_of(folder, encoder))


def vectors_of(store, parts) -> np.ndarray:
    tables = [store.read_table(parts["embeddings"].file(entry["name"])) for entry in parts["embeddings"].parts()]
    return matrix(pa.concat_tables(tables).sort_by("product_id")["embedding"])


def test_it_finds_more_and_all_vectors_are_of_it(shop, encoder):
    folder, parts = shop
    tuned, store = parts["tuned_encoder"], Store(folder / "store")
    metrics = tuned.metrics
    assert (
        metrics["adopted"] and metrics["judged_by"] == "validation" and metrics["queries"] == metrics["judging"] == 42
    )
    assert metrics["recall"]["after"]["50"] > metrics["recall"]["before"]["50"] + 0.2 and metrics["among"] > 100
    history = json.loads(store.read(tuned.file("history.json")))
    assert [record["epoch"] for record in history] == list(range(9)) and "loss" in history[1]
    assert history[metrics["epoch"]]["score"] == max(record["score"] for record in history)
    names = {entry["name"] for entry in tuned.files}
    assert {"history.json", "tuned_encoder/model.safetensors", "tuned_encoder/config.json"} <= names
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}
    assert not store.exists(f"{tuned.folder}/exchange")

    alone = HuggingFaceEncoder(tuned_folder(store, tuned), batch=64, tokens=16)
    np.testing.assert_array_equal(vectors_of(store, parts), alone.encode(TITLES))
    assert not np.allclose(vectors_of(store, parts), HuggingFaceEncoder(encoder, batch=64, tokens=16).encode(TITLES))
    queries = stored_encoder(
        store, {"name": encoder, "tokens": 16}, embeddings=parts["embeddings"], tuned=releases.tuned(parts)
    )
    np.testing.assert_allclose(queries(TITLES[:3]), alone.encode(TITLES[:3]), atol=1e-5)
    assert parts["embeddings"].parents["tuned_encoder"] == parts["embeddings"].asked["tuned_encoder"] == tuned.digest


def test_the_adapter_and_serving_give_queries_the_same_encoder(shop, encoder, tmp_path):
    folder, parts = shop
    recipe, store = recipe_of(folder, encoder), Store(folder / "store")
    job = Job(recipe=recipe, store=store, peak=cluster.PeakMemory())
    matched = adapter._match(job, parts)
    assert matched.parents["tuned_encoder"] == parts["tuned_encoder"].digest
    table = pa.concat_tables([store.read_table(matched.file(entry["name"])) for entry in matched.named("judged/")])
    alone = HuggingFaceEncoder(tuned_folder(store, parts["tuned_encoder"]), batch=64, tokens=16)
    asked = sorted({pair["query"] for pair in PAIRS if pair["split"] == "validation"})
    found_QD, expected_QD = np.unique(matrix(table["query_vector"]), axis=0), np.unique(alone.encode(asked), axis=0)
    np.testing.assert_array_equal(found_QD, expected_QD)

    named = encoder_of(recipe, parts)
    assert named["tuned"] == parts["tuned_encoder"].digest and "tuned" not in encoder_of(
        recipe, {**parts, "tuned_encoder": SimpleNamespace(metrics={"adopted": False})}
    )
    (tmp_path / "tuned_encoder").symlink_to(tuned_folder(store, parts["tuned_encoder"]))
    served = query_encoder(tmp_path, {**named, "name": "/gone"})
    newcomers = Newcomers(store, {**parts, "ids": SimpleNamespace(recipe=recipe.model_dump(mode="json"))})
    dense = DenseSearch(store=store, parts=parts, query_encoder=None, k=5)
    for encode in (served, newcomers._encode, dense.encode):
        np.testing.assert_allclose(encode(TITLES[:3]), alone.encode(TITLES[:3]), atol=1e-5)


def test_it_repeats_itself(shop, encoder, tmp_path):
    _, parts = shop
    again = made(recipe_of(tmp_path, encoder))
    assert [(entry["name"], entry["sha256"]) for entry in again["tuned_encoder"].files] == [
        (entry["name"], entry["sha256"]) for entry in parts["tuned_encoder"].files
    ]
    assert again["tuned_encoder"].digest == parts["tuned_encoder"].digest


def test_work_that_is_done_twice_is_the_same(shop, encoder):
    """A worker whose store was away in the end is asked once more."""
    folder, parts = shop
    recipe, store = recipe_of(folder, encoder, tuning={"epochs": 1}), Store(folder / "store")
    [lessons] = of_digest(store, "lessons", parts["tuned_encoder"].parents["lessons"])
    work = stage._Tune(
        store=store, folder="twice", lessons=lessons, embedding=recipe.embedding, tuning=recipe.tuning, seed=0, device="cpu"
    )  # fmt: skip
    first, again = (work({"position": 0}) for _ in range(2))
    assert first == again and first["files"][0]["name"] == "twice/history.json"


def test_new_pairs_keep_it_and_the_vectors_until_it_is_to_be_refreshed(shop, encoder):
    folder, parts = shop
    more = [*PAIRS, {**PAIRS[1], "query_id": "new", "query": "oak 10 ft"}]
    recipe = recipe_of(folder, encoder, more)
    today = made(recipe, previous=parts)
    assert today["pairs"].digest != parts["pairs"].digest
    assert {name: today[name].digest for name in ("tuned_encoder", "embeddings")} == {
        name: parts[name].digest for name in ("tuned_encoder", "embeddings")
    }
    again = made(recipe, previous=parts, refresh=True)
    assert again["tuned_encoder"].digest != parts["tuned_encoder"].digest
    assert again["embeddings"].metrics["reused"] == 0 and again["embeddings"].digest != parts["embeddings"].digest


@pytest.mark.parametrize("changed", [{"tuning": {"learning_rate": 2e-3}}, {"embedding": {"tokens": 12}}, "base"])
def test_another_setting_or_base_encoder_makes_another(shop, encoder, tmp_path, monkeypatch, changed):
    folder, parts = shop
    asked = []
    monkeypatch.setattr(stage, "_tune", lambda job, attempt, lessons: asked.append(attempt.settings) or pytest.skip())
    if changed == "base":
        changed, path = {}, tmp_path / "other"
        changed["embedding"] = {"encoder": save_bert(path)}
    with pytest.raises(pytest.skip.Exception):
        made(recipe_of(folder, encoder, **changed), previous=parts)
    assert asked


def test_what_gains_nothing_is_not_adopted_and_changes_no_key(encoder, tmp_path):
    frozen = made(recipe_of(tmp_path, encoder, embedding={"encoder_mode": "frozen"}))
    assert "tuned_encoder" not in frozen
    parts = made(recipe_of(tmp_path, encoder, tuning={"learning_rate": 1e-12, "epochs": 1}))
    tuned = parts["tuned_encoder"]
    assert not tuned.metrics["adopted"] and tuned.metrics["epoch"] == 0
    assert tuned.metrics["recall"]["before"] == tuned.metrics["recall"]["after"]
    assert [entry["name"] for entry in tuned.files] == ["history.json"]
    assert releases.tuned(parts) is None and parts["embeddings"].key == frozen["embeddings"].key


def test_too_few_pairs_leave_it_as_it_was_and_say_so(encoder, tmp_path):
    few = [pair for pair in PAIRS if pair["split"] == "validation"] + PAIRS[1:4]
    metrics = made(recipe_of(tmp_path, encoder, few))["tuned_encoder"].metrics
    assert (
        not metrics["adopted"] and metrics["reason"] == "only 3 pairs teach, of 32 at least" and metrics["recall"] == {}
    )
    parts = made(recipe_of(tmp_path, encoder, evaluation={"min_relevance": 5}))
    assert parts["tuned_encoder"].metrics["reason"] == "no pair judges"


def test_without_a_validation_split_whole_training_queries_judge(encoder, tmp_path):
    alone = [pair for pair in PAIRS if pair["split"] == "train"]
    metrics = made(recipe_of(tmp_path, encoder, alone, tuning={"held_out": 0.3, "epochs": 1}))["tuned_encoder"].metrics
    assert metrics["judged_by"] == "train, held out"
    assert metrics["pairs"] + metrics["judging"] == len(alone) and 20 < metrics["judging"] < 60


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"embedding": {"encoder": "lsa"}}, "encoder_mode tuned trains .* but encoder lsa has no weights: name one"),
        ({"embedding": {"source": "given"}}, "but source given brings vectors and no encoder"),
        (
            {"serving": {"query_encoder": "a/b"}},
            "encoder_mode tuned gives queries .*query_encoder is 'a/b': leave it out",
        ),
    ],
)
def test_a_recipe_that_cannot_tune_is_refused(encoder, tmp_path, sections, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, encoder, **sections)


def test_a_catalogue_that_cannot_tune_is_refused(encoder, tmp_path):
    for pairs, given, why in ((PAIRS, True, "embeddings are given"), (None, False, "no pairs of the train split")):
        with pytest.raises(RecipeError, match=f"embedding.encoder_mode is tuned, but .*{why}.*encoder_mode=frozen"):
            made(recipe_of(tmp_path, encoder, pairs, given=given))
        with pytest.raises(RecipeError, match=why):
            check(recipe_of(tmp_path, encoder, pairs, given=given, evaluation={"methods": []}))
    recipe = recipe_of(tmp_path, encoder, evaluation={"methods": []})
    assert check(recipe)["tuned_encoder"] == {"batch": 32, "epochs": 8, "steps": 8 * -(-126 // 32)}
    assert (
        check(recipe_of(tmp_path, encoder, evaluation={"methods": []}, embedding={"encoder_mode": "frozen"}))[
            "tuned_encoder"
        ]
        is None
    )


def test_half_a_model_is_refused_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "fine_tune", lambda *_, **__: pytest.fail("it trains"))
    monkeypatch.setattr(HuggingFaceEncoder, "refuse_a_part", lambda self: (_ for _ in ()).throw(EncoderError("half")))
    with pytest.raises(EncoderError, match="half"):
        made(recipe_of(tmp_path, save_bert(tmp_path / "bert")))
