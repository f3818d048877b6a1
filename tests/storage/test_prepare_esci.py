"""`catid2 prepare-esci` from folders and buckets: what it writes, that a rerun finds it, and every mistake by name. No Ray runs."""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.sources import category_lines, esci
from catid2_ray.cli import app, guarded
from catid2_ray.errors import InputError, StorageError
from catid2_ray.on_ray.stages import prepare_esci as module
from catid2_ray.on_ray.stages.prepare_esci import prepare_esci
from tests.esci_sample import write_sample
from tests.oracles import esci as oracle


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("esci") / "source")


@pytest.fixture
def sample(written, tmp_path):
    """A copy of the sample for a test to damage."""
    shutil.copytree(written.folder, tmp_path / "source")
    return written._replace(folder=tmp_path / "source", categories=tmp_path / "source" / "esci.json.gz")


def rewrite(sample, name, table):
    pq.write_table(table, sample.folder / name)


def zstd(path):
    target = path.with_suffix("").with_suffix(".jsonl.zst")
    target.write_bytes(pa.compress(gzip.decompress(path.read_bytes()), codec="zstd", asbytes=True))
    return target


@pytest.mark.parametrize("where, locale", [("local", "us"), ("local", "es"), ("s3", "jp")])
def test_it_writes_the_house_schema_by_the_papers_rules(sample, request, where, locale, monkeypatch):
    store = request.getfixturevalue(f"{where}_store")
    monkeypatch.setattr(module, "_BATCH_ROWS", 37)
    monkeypatch.setattr(category_lines, "BLOCK_BYTES", 900)
    source = Store(f"{store.uri}/source")
    source.upload(sample.folder, "esci")
    source.put(zstd(sample.categories), "categories/esci.jsonl.zst")
    arguments = (source.uri_of("esci"), source.uri_of("categories/esci.jsonl.zst"), f"{store.uri}/{locale}")
    done = prepare_esci(*arguments, locale=locale, validation=0.2)
    assert done.made and done.root == f"{store.uri}/{locale}"
    target = Store(done.root)
    rows = (sample.products.to_pylist(), sample.examples.to_pylist(), sample.lines)
    kept, pairs = oracle.prepare(*rows, locale=locale, version="small", validation=0.2)
    products = target.read_table("products.parquet")
    found = {row["product_id"]: (row["title"], row["category_path"]) for row in products.to_pylist()}
    assert found == kept and products.num_rows == len(kept)
    table = target.read_table("pairs.parquet")
    found = {(row["query_id"], row["product_id"], row["split"]): row["esci_label"] for row in table.to_pylist()}
    assert found == pairs and table.num_rows == len(pairs) and set(table["split"].to_pylist()) == {
        "train", "validation", "test"
    }  # fmt: skip
    record = json.loads(target.read("esci.json"))
    assert record["counts"]["documents"] == len(kept) and record["settings"]["locale"] == locale
    assert record["counts"]["lines_unreadable"] == 1 and record["counts"]["lines_of_other_locales"] > 150
    text = target.read("table1.md").decode()
    assert f"# ESCI-{locale}, small version" in text and "| documents |" in text
    assert {"us": "386,392", "es": "131,935", "jp": "152,845"}[locale] in text

    if where == "s3":
        return
    # A rerun finds it; a killed run, whose last write is missing, is made good with the same bytes.
    assert not prepare_esci(*arguments, locale=locale, validation=0.2).made
    before = target.fingerprint("products.parquet"), record["digest"]
    target.fs.rm(target.path("products.parquet"))
    assert prepare_esci(*arguments, locale=locale, validation=0.2).made
    after = json.loads(target.read("esci.json"))
    assert (target.fingerprint("products.parquet"), after["digest"]) == before
    with pytest.raises(
        InputError, match="holds another preparation of ESCI: validation 0.2 instead of 0.3. Choose another"
    ):
        prepare_esci(*arguments, locale=locale, validation=0.3)


def test_the_command_prints_table_1(sample, tmp_path, capsys):
    words = ["prepare-esci", "--source", sample.folder, "--categories", sample.categories, "--locale", "jp", "--out"]
    words = [*map(str, words), str(tmp_path / "out")]
    for again in ("", "Nothing changed"):
        with pytest.raises(SystemExit) as ended:
            guarded(lambda: app(words))
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and "ESCI-jp beside Table 1 of the paper" in printed and again in printed
        assert "152,845" in printed and "esci_jp.yaml --set catalog.root=" in printed
    with pytest.raises(SystemExit) as ended:
        guarded(lambda: app([*words[:6], "de", *words[7:]]))
    assert ended.value.code == 3 and "locale 'de': expected one of us, es, jp" in capsys.readouterr().err


def run(sample, tmp_path, **changes):
    settings = {"categories": str(sample.categories), "locale": "us"} | changes
    return prepare_esci(str(sample.folder), out=str(tmp_path / "out"), **settings)


def test_missing_files_and_columns(sample, tmp_path):
    with pytest.raises(
        StorageError, match="none.jsonl does not exist; https://github.com/shuttie/esci-s has categories"
    ):
        run(sample, tmp_path, categories=str(tmp_path / "none.jsonl"))
    rewrite(sample, esci.PRODUCTS_FILE, sample.products.drop_columns("product_title"))
    with pytest.raises(InputError, match="products.parquet: missing column product_title; found product_id"):
        run(sample, tmp_path)
    rewrite(sample, esci.EXAMPLES_FILE, sample.examples.drop_columns("large_version"))
    rewrite(sample, esci.PRODUCTS_FILE, sample.products)
    with pytest.raises(InputError, match="examples.parquet: missing column large_version; found"):
        run(sample, tmp_path, version="large")
    (sample.folder / esci.EXAMPLES_FILE).unlink()
    with pytest.raises(
        StorageError, match="examples.parquet does not exist; https://github.com/amazon-science/esci-data"
    ):
        run(sample, tmp_path)
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_exist(sample, tmp_path):
    for name, value, expected in (
        ("locale", "de", "us, es, jp"), ("version", "medium", "small, large"), ("corpus", "some", "judged, all"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name} '{value}': expected one of {expected}"):
            run(sample, tmp_path, **{name: value})
    with pytest.raises(InputError, match="validation 1.0: expected a share"):
        run(sample, tmp_path, validation=1.0)


def test_a_locale_without_rows(sample, tmp_path):
    rewrite(sample, esci.EXAMPLES_FILE, sample.examples.filter(pa.compute.field("product_locale") != "jp"))
    with pytest.raises(InputError, match="has no row of locale 'jp' in the small version"):
        run(sample, tmp_path, locale="jp")


def test_categories_of_something_else(sample, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(
        '{"asin": "X1", "category": ["a", "b", "c"]}\n{"asin": "B0US000001", "locale": "es", "category": []}\n'
    )
    with pytest.raises(
        InputError, match="gives none of the .* products of locale 'us' a category: 2 lines, 1 of other loc"
    ):
        run(sample, tmp_path, categories=str(other))
    other.write_text("product_id,category\nX1,a > b\n")
    with pytest.raises(InputError, match="2 of 2 lines are no JSON object with texts asin"):
        run(sample, tmp_path, categories=str(other))
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(sample.categories.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"cannot read .*damaged.jsonl.gz: OSError"):
        run(sample, tmp_path, categories=str(damaged))
    shallow = tmp_path / "shallow.jsonl"
    lines = [{**line, "category": line["category"][:2]} for line in sample.lines]
    shallow.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        InputError, match="no train pair labelled E or S is left of .* name dropped products .*depth 2, shorter"
    ):
        run(sample, tmp_path, categories=str(shallow))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_data_is_left_alone(sample, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "products.parquet").write_bytes(b"mine")
    with pytest.raises(
        InputError, match="exists without esci.json beside it, so it is no preparation of ESCI: choose another"
    ):
        run(sample, tmp_path)
    assert (tmp_path / "out" / "products.parquet").read_bytes() == b"mine"
