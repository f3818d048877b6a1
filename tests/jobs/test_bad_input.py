"""Every mistake a user can make with a recipe, a table or a store: a clear message, an exit code, and nothing committed.

Jobs in this process; what Ray does with such errors on their way: test_through_ray.py.
"""

import pyarrow as pa
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import (
    ArtifactError,
    CapacityError,
    CollapseError,
    EncoderError,
    InputError,
    RecipeError,
    StorageError,
    TrainingError,
)
from catid2_ray.on_ray.commands import publish, reindex, run_verb

MADE = generate(products=60, queries=40, seed=1)
pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def job(tiny, tmp_path):
    """Writes the tables and builds the recipe: job(products=…, pairs=…, **recipe sections)."""

    def build(products=MADE.products, pairs=MADE.pairs, **sections) -> Recipe:
        source = Store(tmp_path / "source")
        if products is not None:
            source.write_table("products.parquet", products)
        if pairs is not None:
            source.write_table("pairs.parquet", pairs)
        recipe = {
            **tiny,
            "store": str(tmp_path / "store"),
            "catalog": {"root": str(tmp_path / "source"), "rows_per_part": 50},
        }
        for name, section in sections.items():
            recipe[name] = {**recipe[name], **section} if isinstance(section, dict) else section
        return Recipe.build(recipe)

    yield build
    store = Store(tmp_path / "store")
    assert not store.exists("current"), "a failed job published something"


def test_missing_column(job):
    with pytest.raises(InputError, match="missing column title; found .*product_id.*docs/your-data.md"):
        reindex(job(products=MADE.products.rename_columns(["product_id", "name", *MADE.products.column_names[2:]])))
    with pytest.raises(InputError, match="missing column split"):
        reindex(job(pairs=MADE.pairs.drop_columns(["split"])))


def test_a_column_of_another_type_is_named_though_it_is_found_in_a_worker(job):
    numbers = pa.array([float(row) for row in range(60)])
    with pytest.raises(InputError, match="product_id"):
        reindex(job(products=MADE.products.set_column(0, "product_id", numbers)))


def test_a_file_that_is_no_parquet(job, tmp_path):
    recipe = job()
    (tmp_path / "source" / "products.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="products.parquet is not a whole parquet file"):
        reindex(recipe)


def test_files_of_one_table_that_disagree(job, tmp_path):
    recipe = job(products=None)
    source = Store(tmp_path / "source")
    source.write_table("products/a.parquet", MADE.products)
    source.write_table("products/b.parquet", MADE.products.drop_columns(["description"]))
    with pytest.raises(InputError, match="b.parquet has the columns .*all files of a table must agree"):
        reindex(recipe)


def test_a_relative_path_in_a_submitted_job(job, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(RecipeError, match="store 'catid2_store' is a relative path, but this job runs on a cluster"):
        reindex(job(store="catid2_store"))


def test_a_sample_too_small_to_start_the_codes(job):
    with pytest.raises(CapacityError, match="quantizer.kmeans_sample 16 cannot start 32 codes"):
        reindex(job(quantizer={"kmeans_sample": 16, "codes_per_level": [32, 8, 8, 8]}))


def test_no_table_at_all(job):
    with pytest.raises(StorageError, match="no table 'products' in .*source"):
        reindex(job(products=None))


def test_empty_catalogue(job):
    with pytest.raises(InputError, match="is empty: products has no rows"):
        reindex(job(products=MADE.products.slice(0, 0)))


def test_too_many_bad_rows_names_the_first_ten(job):
    titles = pa.array(["" if row < 15 else "ok" for row in range(60)])
    products = MADE.products.set_column(MADE.products.column_names.index("title"), "title", titles)
    with pytest.raises(
        InputError, match=r"15 of 60 rows of products are bad, more than catalog.max_bad_fraction 0.01"
    ) as error:
        reindex(job(products=products))
    assert str(error.value).count("empty title") == 10


def test_given_embeddings_of_another_width(job):
    rows = MADE.products.num_rows
    vectors = pa.array([[1.0, 2.0]] * (rows - 1) + [[1.0]], pa.list_(pa.float32()))
    with pytest.raises(InputError, match="embedding of width 1 instead of 2"):
        reindex(job(products=MADE.products.append_column("embedding", vectors), embedding={"width": None}))


def test_embeddings_announced_but_absent(job):
    with pytest.raises(InputError, match="has no column 'embedding'"):
        reindex(job(embedding={"source": "given"}))


def test_unknown_encoder(job):
    with pytest.raises(EncoderError, match="no-such-folder"):
        reindex(job(embedding={"encoder": "./no-such-folder"}))


def test_fewer_products_than_codes(job):
    with pytest.raises(CapacityError, match=r"60 products cannot fill 64 codes .* lower quantizer.codes_per_level"):
        reindex(job(quantizer={"codes_per_level": [64, 8, 8, 8]}))


def test_more_products_than_ids(job):
    with pytest.raises(CapacityError, match="60 products do not fit into 32 IDs"):
        reindex(job(quantizer={"codes_per_level": [4, 2, 2, 2], "epochs": 1}))


def test_a_training_that_diverges_says_where(job):
    with pytest.raises(TrainingError, match="the loss is (nan|inf) in epoch .* lower this stage's learning_rate"):
        reindex(job(quantizer={"learning_rate": 1e30, "epochs": 3, "warmup_share": 0}))


def test_codes_that_collapse_stop_the_job_with_the_numbers(job, capfd):
    alike = pa.array([[1.0, 2.0, 3.0, 4.0]] * MADE.products.num_rows, pa.list_(pa.float32()))
    settings = {"latent": 4, "collapse_patience": 2, "max_failures": 3, "checkpoint_every_epochs": 50}
    with pytest.raises(CollapseError, match=r"stayed so for 2 epochs.*the last being 2 of 6.*per level \[1, 1, 1, 1\]"):
        reindex(job(products=MADE.products.append_column("embedding", alike), quantizer=settings,
                    embedding={"width": None}))  # fmt: skip
    assert capfd.readouterr().err.count("event=epoch epoch=2 ") == 1, "a collapse is not tried again"


def test_no_training_pair(job):
    with pytest.raises(InputError, match="no pair of the train split has relevance ≥ 2.9999"):
        reindex(job(generator={"min_relevance": 2.9999}, pairs=MADE.pairs.set_column(
            MADE.pairs.column_names.index("relevance"), "relevance", pa.array([2.0] * MADE.pairs.num_rows)),
            quantizer={"epochs": 1}))  # fmt: skip


def test_a_stage_alone_names_the_job_to_run_first(job):
    with pytest.raises(ArtifactError, match=r"holds no catalog for this recipe: run `python -m jobs.embed_catalog"):
        run_verb(job(), "train_quantizer")
    with pytest.raises(ArtifactError, match="holds no catalog"):
        publish(job())


@pytest.mark.faults
def test_a_half_written_artefact_of_a_killed_job_is_not_a_result(job, tmp_path, fault):
    recipe = job()
    store, catalog = run_verb(recipe, "embed_catalog")
    manifest = f"artifacts/embeddings/{catalog.key}/manifest.json"
    files = [store.read(catalog.file(entry["name"])) for entry in catalog.parts()]
    store.fs.rm(store.path(manifest))
    store.write(catalog.file(catalog.parts()[0]["name"]), files[0][:100])
    _, again = run_verb(recipe, "embed_catalog")
    assert again.folder != catalog.folder and again.digest == catalog.digest
    fault(
        "an artefact half written",
        times=1,
        outcome="no result; made anew with the same digest",
        lost_s=again.metrics["seconds"],
    )


@pytest.mark.faults
def test_a_damaged_artefact_is_refused_by_name(job, fault):
    recipe = job()
    store, embeddings = run_verb(recipe, "embed_catalog")
    name = embeddings.file(embeddings.parts()[0]["name"])
    store.write(name, store.read(name)[:50])
    with pytest.raises(ArtifactError, match="has 50 bytes, its manifest says"):
        run_verb(recipe, "train_quantizer")
    fault("an artefact cut off", times=1, outcome="refused by name", lost_s=0)


@pytest.mark.faults
def test_unreachable_bucket_is_named_within_a_minute(job, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(StorageError, match="cannot list s3://no-such-bucket/x.*AWS_ENDPOINT_URL"):
        reindex(job(store="s3://no-such-bucket/x"))


def test_shuffled_rows_and_other_files_make_the_same_catalogue(job, tmp_path):
    _, first = run_verb(job(), "embed_catalog")
    order = list(reversed(range(60)))
    _, second = run_verb(job(products=MADE.products.take(order)), "embed_catalog")
    assert first.digest == second.digest


def test_given_embeddings_are_taken_as_they_are(job):
    vectors = pa.array([[float(row), 1.0] for row in range(60)], pa.list_(pa.float32(), 2))
    recipe = job(products=MADE.products.append_column("embedding", vectors), embedding={"width": None})
    store, embeddings = run_verb(recipe, "embed_catalog")
    tables = [store.read_table(embeddings.file(entry["name"])) for entry in embeddings.parts()]
    found = {
        name: vector
        for table in tables
        for name, vector in zip(table["product_id"].to_pylist(), table["embedding"].to_pylist())
    }
    assert found == {name: vector for name, vector in zip(MADE.products["product_id"].to_pylist(), vectors.to_pylist())}
