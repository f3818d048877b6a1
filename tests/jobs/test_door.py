"""The catalogue's door in a job: every layout and type that is read, every table of pairs that is refused before a training."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowTensorArray

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError
from catid2_ray.evaluation.report import closing_tables
from catid2_ray.evaluation.tables import markdown
from catid2_ray.on_ray.commands import reindex, run_verb
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.pipeline import chain
from catid2_ray.on_ray.stages import door

MADE = generate(products=60, queries=40, seed=1)
PRODUCTS, PAIRS = MADE.products, MADE.pairs
VECTORS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
pytestmark = pytest.mark.usefixtures("no_ray")


def replaced(table, **columns):
    for name, column in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    return folder


def put(shop, products=PRODUCTS, pairs=PAIRS):
    """A table goes into its usual file, None into none; a dict of file names and tables below the root."""
    for name, given in (("products", products), ("pairs", pairs)):
        for file, table in (given if isinstance(given, dict) else {f"{name}.parquet": given}).items():
            (shop / file).parent.mkdir(parents=True, exist_ok=True)
            if table is not None:
                pq.write_table(table, shop / file)
    return shop


def recipe_of(tiny, shop, **sections):
    values = {**tiny, "store": str(shop.parent / "store"), "catalog": {"root": str(shop), "rows_per_part": 50}}
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return Recipe.build(values)


def catalogue(tiny, shop, **sections):
    """What is known of both tables, and the products, sorted by id; nothing after them is made, but everything that the recipe
    asks is checked."""
    with Job.open(recipe_of(tiny, shop, **sections)) as job:
        parts = chain(job, "pairs")
        manifest = parts["catalog"]
        tables = [job.store.read_table(manifest.file(entry["name"])) for entry in manifest.parts()]
    known = SimpleNamespace(
        rows=manifest.rows, digest=manifest.digest, metrics=manifest.metrics | parts["pairs"].metrics
    )
    return known, pa.concat_tables(tables).sort_by("product_id")


def fails(tiny, shop, message, **sections):
    with pytest.raises(InputError, match=message) as error:
        reindex(recipe_of(tiny, shop, **sections))
    store = Store(shop.parent / "store")
    assert not store.exists("artifacts/embeddings") and not store.exists("current")
    return str(error.value)


def test_folders_of_the_tables_name_and_what_lies_beside_the_data(tiny, shop):
    halves = {
        "products.parquet/part-0.snappy.parquet": PRODUCTS.slice(0, 30),
        "products.parquet/part-1.parquet": PRODUCTS.slice(30),
    }
    put(shop, halves, {"pairs/a.parquet": PAIRS})
    for name in (
        "_SUCCESS",
        "_temporary/0/part-9.parquet",
        "_delta_log/1.checkpoint.parquet",
        "._part-0.parquet",
        ".part-0.parquet.crc",
    ):
        (shop / "products.parquet" / name).parent.mkdir(parents=True, exist_ok=True)
        (shop / "products.parquet" / name).write_bytes(b"PAR1")
    manifest, table = catalogue(tiny, shop)
    assert manifest.rows == 60 and table["title"].equals(PRODUCTS.sort_by("product_id")["title"])
    assert manifest.metrics["pairs"] == PAIRS.num_rows


def test_partitions_are_columns(tiny, shop):
    put(
        shop,
        {"products/market=de/a.parquet": PRODUCTS.slice(0, 30), "products/market=fr/a.parquet": PRODUCTS.slice(30)},
        {},
    )
    pa.dataset.write_dataset(
        PAIRS, shop / "pairs", format="parquet", partitioning=["split"], partitioning_flavor="hive"
    )
    manifest, table = catalogue(tiny, shop, catalog={"root": str(shop), "filter_columns": {"market": "string"}})
    assert sorted(table["market"].to_pylist()) == ["de"] * 30 + ["fr"] * 30
    assert manifest.metrics["pairs"] == PAIRS.num_rows and manifest.metrics["splits"]["test"]["pairs"] > 0


def test_ids_of_two_types_in_two_files_are_one_text(tiny, shop):
    numbers = pa.array(range(60))
    files = {
        "products/a.parquet": replaced(PRODUCTS, product_id=numbers).slice(0, 30),
        "products/b.parquet": replaced(PRODUCTS, product_id=numbers.cast(pa.string())).slice(30),
    }
    names = {name: str(row) for row, name in enumerate(PRODUCTS["product_id"].to_pylist())}
    put(
        shop,
        files,
        replaced(PAIRS, product_id=pa.array([int(names[name]) for name in PAIRS["product_id"].to_pylist()])),
    )
    manifest, table = catalogue(tiny, shop)
    assert set(table["product_id"].to_pylist()) == {str(row) for row in range(60)}
    assert manifest.metrics["pairs"] == PAIRS.num_rows and manifest.metrics["pairs_set_aside"] == 0


@pytest.mark.parametrize(
    "column",
    [
        ArrowTensorArray.from_numpy(VECTORS),
        pa.FixedShapeTensorArray.from_numpy_ndarray(VECTORS),
        pa.array([[]] + VECTORS[1:].tolist(), pa.list_(pa.float32())),
        pa.array([[1.0, 2.0]] + VECTORS[1:].tolist(), pa.list_(pa.float64())),
    ],
)
def test_embeddings_of_tensors_and_behind_an_odd_first_row(tiny, shop, column):
    put(shop, PRODUCTS.append_column("embedding", column))
    odd = 60 - (np.array([len(row) for row in column.to_pylist()]) == 4).sum()
    settings = {"root": str(shop), "max_bad_fraction": 0.02}
    manifest, table = catalogue(tiny, shop, embedding={"width": None}, catalog=settings)
    assert manifest.metrics["width"] == 4 and manifest.rows == 60 - odd
    assert table["embedding"][-1].as_py() in VECTORS.tolist()


@pytest.mark.parametrize(
    "column, message",
    [
        (pa.nulls(60), "the column 'embedding' holds no vector"),
        (pa.array([b"\0" * 16] * 60), "expected a list of float per row, found binary; convert it: numpy.frombuffer"),
        (pa.array([{"list": [1.0]}] * 60), "expected a list of float per row, found struct"),
    ],
)
def test_embeddings_that_cannot_be_read_are_named(tiny, shop, column, message):
    fails(tiny, put(shop, PRODUCTS.append_column("embedding", column)), message, embedding={"width": None})


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "jsonl.gz"])
def test_text_files_make_the_catalogue_of_parquet(tiny, shop, ending, tmp_path):
    (tmp_path / "twin").mkdir()
    twin, expected = catalogue(tiny, put(tmp_path / "twin"))
    paths = [" > ".join(path) for path in PRODUCTS["category_path"].to_pylist()]
    for name, table in (("products", replaced(PRODUCTS, category_path=pa.array(paths))), ("pairs", PAIRS)):
        with (gzip.open if ending.endswith("gz") else open)(shop / f"{name}.{ending}", "wb") as out:
            if "jsonl" in ending:
                out.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode())
            else:
                options = pa.csv.WriteOptions(delimiter="\t" if ending == "tsv" else ",")
                pa.csv.write_csv(table, out, options)
    manifest, table = catalogue(
        tiny, shop, catalog={"root": str(shop), "rows_per_part": 50, "category_separator": " > "}
    )
    assert table.equals(expected) and manifest.digest == twin.digest


def test_columns_of_one_name_and_two_tables_of_one_name(tiny, shop):
    doubled = pa.Table.from_arrays([*PRODUCTS.columns, PRODUCTS["title"]], names=[*PRODUCTS.column_names, "title"])
    fails(tiny, put(shop, doubled), "products.parquet: 1 column name occur more than once, title")
    (shop / "products.csv").write_text("product_id,title\n1,x\n")
    fails(tiny, shop, "holds products.csv and products.parquet, and which of them")


def test_a_query_id_with_two_texts(tiny, shop):
    texts = pa.array([f"{text} {row % 2}" for row, text in enumerate(PAIRS["query"].to_pylist())])
    message = fails(
        tiny, put(shop, pairs=replaced(PAIRS, query=texts)), r"query_ids have more than one text.*first 10:\n"
    )
    assert message.count("\n") == 10


def both_splits(pairs, of_test=lambda name: name):
    """All pairs in train, and again in test under query_ids that may differ."""
    train = replaced(pairs, split=pa.array(["train"] * pairs.num_rows))
    ids = pa.array([of_test(name) for name in pairs["query_id"].to_pylist()])
    return pa.concat_tables(
        [train, replaced(train, query_id=ids, split=pa.array(["test"] * pairs.num_rows))], promote_options="permissive"
    )


@pytest.mark.parametrize("of_test", [str, "t{}".format])
def test_a_query_in_train_and_test_by_its_id_or_its_text(tiny, shop, of_test):
    pairs = both_splits(PAIRS, of_test)
    if of_test is not str:
        shouted = [
            text.upper() if split == "test" else text
            for text, split in zip(*(pairs[n].to_pylist() for n in ("query", "split")))
        ]
        pairs = replaced(pairs, query=pa.array(shouted))
    fails(
        tiny,
        put(shop, pairs=pairs),
        "40 of 40 queries of the test split are in the train split too.*catalog.allow_leak=true",
    )
    manifest, _ = catalogue(tiny, shop, catalog={"root": str(shop), "rows_per_part": 50, "allow_leak": True})
    assert manifest.metrics["queries_in_two_splits"] == {"train and test": 40}


def foreign(split):
    """The pairs, those of a split naming products that the catalogue lacks."""
    rows = zip(PAIRS["product_id"].to_pylist(), PAIRS["split"].to_pylist())
    return replaced(PAIRS, product_id=pa.array([f"z{name}" if part == split else name for name, part in rows]))


def test_pairs_that_name_no_product(tiny, shop):
    fails(
        tiny, put(shop, pairs=foreign("train")),
        "no pair of the train split names a product of the catalogue: .*product_id is not in the catalogue: .*'z",
    )  # fmt: skip
    fails(tiny, put(shop, pairs=foreign("test")), r"no pair of the test split names a product.*evaluation.methods=\[\]")
    only = replaced(PAIRS, split=pa.array(["train"] * PAIRS.num_rows))
    fails(tiny, put(shop, pairs=only), "no pair of the test split names a product")
    catalogue(tiny, shop, evaluation={"methods": []})


def test_a_demand_above_every_grade_of_the_test_split(tiny, shop):
    highest = max(PAIRS["relevance"].to_pylist())
    message = "of the test split has a relevant product: the highest relevance .* evaluation.min_relevance is 99.0"
    fails(tiny, put(shop), message, evaluation={"min_relevance": 99})
    assert f"is {highest}" in fails(tiny, shop, message, evaluation={"min_relevance": 99})
    catalogue(tiny, shop, evaluation={"min_relevance": 99, "methods": []})


def test_what_is_set_aside_is_said_with_counts_reasons_and_where(tiny, shop, capfd):
    lower = replaced(PAIRS.slice(0, 3), relevance=pa.array([0.0] * 3))
    unknown = replaced(PAIRS.slice(0, 2), product_id=pa.array(["x[/b]1", "x2"]))
    titles = ["\u200b", *PRODUCTS["title"].to_pylist()[1:]]
    put(
        shop,
        replaced(PRODUCTS, title=pa.array(titles)),
        pa.concat_tables([PAIRS, lower, unknown], promote_options="permissive"),
    )
    recipe = recipe_of(tiny, shop, catalog={"root": str(shop), "max_bad_fraction": 0.02}, quantizer={"batch": 80})
    with Job.open(recipe) as job:
        parts = chain(job, "pairs")
        found, folder = door.set_aside(job.store, parts), parts["pairs"].folder
        rejected = job.store.read_table(f"{folder}/rejected/pairs-part-00000.parquet")
    assert found["products"]["reasons"] == {"empty title": 1} and found["products"]["of"] == 60
    reasons = found["pairs"]["reasons"]
    assert reasons["another pair of this query and product has a higher relevance"] == 3
    assert reasons["product_id is not in the catalogue"] >= 2 and "'x[/b]1'" in "".join(found["pairs"]["first"])
    assert found["pairs"]["at"].endswith(f"{folder}/rejected") and rejected.num_rows > 0
    log = capfd.readouterr().err
    assert (
        "event=set_aside table=products rows=1 of=60 reasons='empty title (1)'" in log and found["pairs"]["at"] in log
    )
    assert "event=epochs_of_one_step stage=quantizer products=59 batch=80" in log
    page = markdown(closing_tables({"set_aside": found}))
    assert "### Set aside (the rows lie in " in page and "| products: 1 of 60 |" in page and "empty title | 1 |" in page


def test_a_catalogue_without_pairs_trains_on_titles_and_says_that_nothing_was_evaluated(tiny, shop, capfd):
    shop = put(shop, pairs=None)
    settings = {"epochs": 1, "mix": {"query": 1}, "validate_queries": 5}
    recipe = recipe_of(tiny, shop, generator=settings, quantizer={"epochs": 1, "codes_per_level": [4, 4, 4, 4]})
    outcome = reindex(recipe)
    assert outcome.parts["examples"].metrics["title_examples"] == 60
    assert outcome.figures["recall"] == {} and outcome.figures["queries"] == {"all": 0, "seen": 0, "unseen": 0}
    assert outcome.figures["not_evaluated"] == "the catalogue has no table of pairs"
    assert len(outcome.parts["evaluation"].metrics["sample_queries"]) == 3
    log = capfd.readouterr().err
    assert "event=no_pairs" in log and "event=not_gated reason='the catalogue has no table of pairs'" in log
    assert "Nothing was evaluated" in markdown(closing_tables(outcome.figures))
    _, ids = run_verb(recipe, "assign_ids")
    assert ids.metrics["duplicates_after"] == 0
    with pytest.raises(InputError, match="alignment.enabled needs queries"):
        reindex(Recipe.build({**recipe.model_dump(), "alignment": {"enabled": True}}))
