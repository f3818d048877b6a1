"""init, check, inspect and why as a user calls them: on a stored release and on catalogues of all kinds, without Ray."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError, RecipeError, ReleaseError, StorageError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.look.check import check
from catid2_ray.on_ray.look.first_recipe import first_recipe, look
from catid2_ray.on_ray.look.product import inspect
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.live_log import LiveLog
from catid2_ray.on_ray.stages import catalog
from tests.command import ROOT, run_here, write_recipe
from tests.stored import unpack


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("a look started Ray"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A release that nothing here changes."""
    return unpack(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def shop(tmp_path):
    """200 products and 60 queries as CSV, with columns of a shop's own."""
    made, folder = generate(products=200, queries=60, seed=3), tmp_path / "my shop"
    folder.mkdir()
    with open(folder / "products.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["product_id", "title", "description", "category_path", "price", "brand", "url"])
        for number, row in enumerate(made.products.to_pylist()):
            path, brand = " > ".join(row["category_path"]), ["Oak [x]", "Ash"][number % 2]
            rows.writerow(
                [row["product_id"], row["title"], f"<p>{row['title']}</p>", path, number / 4, brand, f"u/{number}"]
            )
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, made.pairs.column_names)
        rows.writeheader()
        rows.writerows(made.pairs.to_pylist())
    return folder


def in_80_columns(text: str) -> str:
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_a_first_recipe_of_text_files_is_checked(shop, tmp_path):
    path = tmp_path / "recipe.yaml"
    made = run_here("init", shop, "--out", path)
    assert made.returncode == 0, made.stderr
    assert "200 products and" in " ".join(made.stdout.split()) and f"catid2 check --recipe {path}" in made.stdout
    recipe = Recipe.load(path)
    assert recipe.catalog.filter_columns == {"price": "float", "brand": "string"}
    assert recipe.catalog.category_separator == " > " and recipe.embedding.text == ("title", "category_path")
    text = path.read_text().replace("\n  # ", " ")
    assert "url: nearly every value differs" in text and "100% of description" in text and "Texts look English" in text
    checked = run_here("check", "--recipe", path, "--set", f"store={tmp_path / 'store'}")
    assert checked.returncode == 0, checked.stderr
    assert "200 of 200 rows are good" in in_80_columns(checked.stdout)
    assert not (tmp_path / "store").exists()
    again = run_here("init", shop, "--out", path)
    assert again.returncode == 3 and "is there already" in again.stderr
    assert yaml.safe_load(run_here("init", shop).stdout) == yaml.safe_load(path.read_text())


def test_the_quickstart_is_what_is_written_for_its_catalogue(tmp_path):
    quickstart = yaml.safe_load((ROOT / "jobs/recipes/quickstart.yaml").read_text())
    made = generate(**quickstart["catalog"]["synthetic"])
    for name in ("products", "pairs"):
        pq.write_table(getattr(made, name), tmp_path / f"{name}.parquet", row_group_size=2000)
    written = yaml.safe_load(first_recipe(str(tmp_path)).recipe)
    for section in ("embedding", "quantizer", "generator", "evaluation"):
        for name in quickstart[section].keys() & written[section].keys():
            assert written[section][name] == pytest.approx(quickstart[section][name], abs=0.01), (section, name)
    assert written["catalog"]["rows_per_part"] == quickstart["catalog"]["rows_per_part"]
    sections = {name: of for name, of in quickstart.items() if isinstance(of, dict)}
    more = {(section, name) for section, of in sections.items() for name in of.keys() - written.get(section, {})}
    assert more == {
        ("catalog", "synthetic"), ("adapter", "batch"), ("adapter", "learning_rate"), ("quantizer", "epochs"),
        ("quantizer", "hidden"), ("serving", "lookahead"), ("evaluation", "beam_width"),
        ("generator", "validate_queries"),
    }, "docs/your-data.md says what quickstart sets beyond init"  # fmt: skip


def test_other_formats_and_what_is_missing(tmp_path):
    made = generate(products=60, queries=30, seed=3)
    with pytest.raises(StorageError, match="no table 'products'"):
        look(str(tmp_path))
    rows = [{**row, "stock": number % 5} for number, row in enumerate(made.products.to_pylist())]
    (tmp_path / "products").mkdir()
    for market, part in (("de", rows[:30]), ("fr", rows[30:])):
        folder = tmp_path / "products" / f"market={market}"
        folder.mkdir()
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    facts = look(str(tmp_path))
    assert (facts.products, facts.exact, facts.separator) == (60, True, None)
    assert facts.filters == {"stock": "int", "market": "string"} and not facts.grades
    recipe = Recipe.from_yaml(first_recipe(str(tmp_path)).recipe, where="it")
    with cluster.without_ray():
        job = Job(recipe=recipe, store=Store(tmp_path / "store"), peak=cluster.PeakMemory())
        manifest = catalog.run(job, {})
    tables = [job.store.read_table(manifest.file(entry["name"])) for entry in manifest.parts()]
    assert sorted(pa.concat_tables(tables)["market"].to_pylist()) == ["de"] * 30 + ["fr"] * 30
    (tmp_path / "pairs.csv").write_text("search_term,sku\noak,1\n")
    missing = "missing column query_id, query, product_id, relevance, split; found search_term, sku"
    with pytest.raises(InputError, match=f"{missing}. Rename search_term to query, sku to product_id?"):
        look(str(tmp_path))
    (tmp_path / "pairs.csv").unlink()
    table = made.products.append_column("embedding", pa.array([[0.5, 1.0]] * 60))
    other = tmp_path / "vectors"
    other.mkdir()
    pq.write_table(table.append_column("clicks", pa.array(np.arange(60) % 7)), other / "products.parquet")
    facts = look(str(other))
    assert facts.given == 2 and facts.filters == {"clicks": "int"}


def _with_vectors(shop, tmp_path):
    """The same catalogue as parquet, with an embedding a product."""
    table = pa_csv.read_csv(shop / "products.csv").select(["product_id", "title"])
    folder = tmp_path / "with vectors"
    folder.mkdir()
    vectors = pa.array([[1.0, float(row)] for row in range(table.num_rows)])
    pq.write_table(table.append_column("embedding", vectors), folder / "products.parquet")
    pq.write_table(pa_csv.read_csv(shop / "pairs.csv"), folder / "pairs.parquet")
    return folder


def test_a_check_refuses_what_reindex_refuses(stored, shop, tmp_path, tiny):
    figures = check(stored)
    assert figures["release"] and figures["products"]["of"] == 150 and figures["generator"][0]["steps"] > 0
    assert figures["quantizer"]["steps"] == stored.quantizer.epochs * -(-150 // stored.quantizer.batch)
    levels = Recipe.build(stored.model_dump(mode="json") | {"quantizer": {"codes_per_level": [16, 8, 8, 8]}})
    with pytest.raises(ReleaseError, match="a ledger holds IDs of one form.*--new-ledger"):
        check(levels)

    def of(**sections):
        values = {
            **tiny,
            "store": str(tmp_path / "store"),
            "catalog": {"root": str(shop), "category_separator": " > "},
            "serving": {},
        }
        return Recipe.build({**values, **{name: {**values[name], **section} for name, section in sections.items()}})

    with pytest.raises(InputError, match="none of the .* queries of the test split has a relevant product"):
        check(of(evaluation={"min_relevance": 9}))
    with pytest.raises(InputError, match="column brand: expected a list as JSON"):
        check(of(catalog={"filter_columns": {"brand": "list<string>"}}))
    with pytest.raises(RecipeError, match="no encoder is known for queries: set serving.query_encoder"):
        check(
            of(
                catalog={"root": str(_with_vectors(shop, tmp_path))},
                embedding={"width": None},
                serving={"expansion": {}},
            )
        )
    with open(shop / "products.csv", "a") as file:
        file.write("p0000000,twice,,,1,Ash,u\n")
    figures = check(of(quantizer={"batch": 800, "epochs": 7}))
    assert figures["products"]["rows_aside"] == 1 and "duplicate product_id" in figures["products"]["reasons"]
    assert "quantizer: an epoch is one step" in figures["notes"][0]
    refused = run_here(
        "check", "--recipe", write_recipe(tmp_path, of(catalog={"max_bad_fraction": 0}).model_dump(mode="json"))
    )
    assert refused.returncode == 3 and "1 of 201 rows of products are bad" in refused.stderr


def test_a_product_is_shown_with_its_neighbours_and_history(stored, tmp_path):
    store = Store(stored.store)
    parts = releases.current(store).manifests(store)
    tables = {
        role: pa.concat_tables([store.read_table(parts[role].file(entry["name"])) for entry in parts[role].parts()])
        for role in ("catalog", "embeddings", "ids")
    }
    names, docids = tables["ids"]["product_id"].to_pylist(), tables["ids"]["docid"].to_pylist()
    vector_ND = matrix(tables["embeddings"]["embedding"])
    vector_ND = vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)
    for row in (0, 70):
        card = inspect(store, names[row], neighbours=4, cache=tmp_path)
        assert card["docid"] == docids[row] and card["product"]["title"] == tables["catalog"]["title"][row].as_py()
        cosine_N = vector_ND @ vector_ND[row]
        cosine_N[row] = -1
        assert [one["cosine"] for one in card["near_vector"]] == pytest.approx(
            np.sort(cosine_N)[::-1][:4].tolist(), abs=1e-5
        )
        codes = [docid.split(">")[:-1] for docid in docids]
        shared_N = np.array([next((n for n in range(4) if one[n] != codes[row][n]), 4) for one in codes])
        shared_N[row] = -1
        assert [one["shared"] for one in card["near_id"]] == np.sort(shared_N)[::-1][:4].tolist()
        assert all(
            shared_N[names.index(one["product_id"])] == one["shared"] for one in card["near_id"] + card["near_vector"]
        )
        assert [past["status"] for past in card["history"]] == ["new"] and card["history"][0]["docid"] == docids[row]
    assert inspect(store, names[0], neighbours=0)["near_id"] == []
    with pytest.raises(InputError, match="no product 'nobody' in release r-"):
        inspect(store, "nobody")


def test_live_changes_and_commands_in_the_terminal(tmp_path):
    recipe = unpack(tmp_path)
    store = Store(recipe.store)
    log = LiveLog(store, releases.current(store).name)
    new = {"product_id": "new [/x]", "title": "[oak] shelf", "docid": "<a_7><b_7><c_7><d_7>"}
    log.write(1, {"kind": "insert", "products": [new]})
    log.write(2, {"kind": "withdraw", "products": ["p0000001"]})
    shown = run_here("inspect", "new [/x]", "--store", recipe.store)
    assert (
        shown.returncode == 0 and "was published without it" in in_80_columns(shown.stdout) and "<a_7>" in shown.stdout
    )
    card = json.loads(run_here("inspect", "p0000001", "--store", recipe.store, "--json", "-", "--neighbours", 2).stdout)
    assert card["changes"] == [{"number": 2, "kind": "withdraw", "docid": None}] and len(card["near_vector"]) == 2
    assert "p0000001" in in_80_columns(run_here("inspect", "p0000001", "--store", recipe.store).stdout)
    lost = run_here("why", "minimalist toys drape", "p0000001", "--store", recipe.store)
    assert "it was withdrawn from the release" in " ".join(in_80_columns(lost.stdout).split())
    said = json.loads(
        run_here("why", "brass door knob", "p0000082", "--store", recipe.store, "--k", 3, "--json", "-").stdout
    )
    assert len(said["steps"]) == 4 and said["standings"][0]["product_id"] == "p0000082"
    shown = run_here("why", "brass door knob", "p0000082", "--store", recipe.store, "--exact")
    assert said["verdict"][:20] in in_80_columns(shown.stdout) and "of all IDs" in shown.stdout
    unknown = run_here("why", "oak", "nobody", "--store", recipe.store)
    assert unknown.returncode == 3 and "no product 'nobody'" in unknown.stderr


def test_a_catalogue_behind_a_prefix(s3_store):
    made = generate(products=60, queries=30, seed=3)
    for name in ("products", "pairs"):
        s3_store.write_table(f"shop/{name}.parquet", getattr(made, name))
    looked = first_recipe(f"{s3_store.uri}/shop")
    recipe = Recipe.from_yaml(looked.recipe, where="it")
    assert recipe.catalog.root == f"{s3_store.uri}/shop" and recipe.name == "shop"
    figures = check(recipe.model_copy(update={"store": f"{s3_store.uri}/store"}))
    assert figures["products"]["of"] == 60 and figures["splits"]["train"]["queries"] > 0
    assert s3_store.names("store") == []
