"""`catid2 reproduce` on a shop of 240 products with what real tables hold: double judgements, products that are gone, queries that
nothing answers; cells that fail beside cells that do not; a second run that finds everything."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError
from catid2_ray.evaluation.reproduce.conditions import METHODS as CONDITIONS
from catid2_ray.evaluation.reproduce.conditions import NAMES, plan
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.reproduce.costs import with_shared
from catid2_ray.on_ray.reproduce.measure import Measures
from catid2_ray.on_ray.reproduce.nearest import Pair, approximate
from catid2_ray.on_ray.reproduce.run import reproduce
from tests.command import run_here, write_recipe

METHODS = [
    "bm25",
    "bm25_tuned",
    "dense",
    "zero_shot",
    "adapted",
    "dpr",
    "bm25+dense",
    "tiger",
    "cat_id2_512",
    "cq_sid",
    "served",
    "gdr",
    "tiger+generator",
    "nci+pawa",
    "pag",
]
TRAINED = ("tiger+generator", "nci+pawa")
# 120 queries leave the test split a score of them; those that these tables add are named so.
LONE, GONE = "q-lone", "q-gone"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("reproduce")
    made = generate(products=240, queries=120, seed=3)
    pairs = made.pairs
    first = pairs.filter(pc.field("split") == "test").slice(0, 1).to_pylist()[0]
    more = [
        first | {"relevance": 1.0},  # judged a second time, lower
        {"query_id": LONE, "query": "nothing like it", "product_id": "p0000001", "relevance": 1.0, "split": "test"},
        {"query_id": GONE, "query": "it was sold", "product_id": "sold-out", "relevance": 3.0, "split": "test"},
    ]
    names = ["query_id", "query", "product_id", "relevance", "split"]
    more[1]["product_id"] = made.products["product_id"][0].as_py()
    added = pa.Table.from_pylist([{name: row[name] for name in names} for row in more]).cast(pairs.select(names).schema)
    source = Store(str(folder / "source"))
    sure = pa.array([None, 0.2, 0.8] * 80, pa.float64())  # of inferred categories
    source.write_table("products.parquet", made.products.append_column("sure", sure))
    source.write_table("pairs.parquet", pa.concat_tables([pairs.select(names), added]))
    recipe = {
        **TINY, "catalog": {"root": str(folder / "source"), "rows_per_part": 100, "max_bad_fraction": 0.5,
                            "filter_columns": {"sure": "float"}},
        "store": str(folder / "store"), "quantizer": {**TINY["quantizer"], "epochs": 2},
        "reproduce": {"methods": METHODS, "seeds": 1, "confidence": {"sure": 0.5}},
    }  # fmt: skip
    return {"folder": folder, "first": first, "recipe": recipe, "path": str(write_recipe(folder, recipe))}


@pytest.fixture(scope="module")
def done(shop, no_ray):
    """Tables 1, 2 and 7, and the same command again."""
    command = ["reproduce", "--recipe", shop["path"], "--tables", "1,2,7"]
    first = run_here(*command)
    assert first.returncode == 0, first.stderr[-3000:]
    below = shop["folder"] / "store" / "reports" / "reproduce"
    report = json.loads((below / "report.json").read_text())
    return {**shop, "first_run": first, "below": below, "report": report, "rows": report["tables"]["T2"]["rows"],
            "again": run_here(*command)}  # fmt: skip


def test_every_method_has_a_figure_or_a_reason(done):
    rows = done["rows"]
    assert list(rows) == [name for name in NAMES if name in METHODS]
    measured = {name for name, row in rows.items() if "recall" in row}
    assert measured == {"bm25", "bm25_tuned", "dense", "zero_shot", "bm25+dense", "tiger", "cq_sid", "gdr", *TRAINED}
    why = {name: row["not_run"][0] for name, row in rows.items() if name not in measured}
    assert "embedding.adapter is none" in why["adapted"] and "lsa, which has no weights" in why["dpr"]
    assert "512 codes" in why["cat_id2_512"] and "holds no release" in why["served"]
    page = (done["below"] / "report.html").read_text()
    assert page.count("[not run: ") >= len(why) and "Table 7" in page and "data:image/png;base64," in page


def test_figures_are_those_of_the_lists_that_the_trec_files_hold(done):
    """Recall counted again from the files that are kept for other tools, at the threshold of the recipe."""
    relevant: dict[str, set[str]] = {}
    for line in (done["below"] / "trec" / "qrels.txt").read_text().splitlines():
        query, _, product, gain = line.split()
        if int(gain) >= 100:  # relevance 2, the lowest grade being 1
            relevant.setdefault(query, set()).add(product)
    for name in ("bm25", "tiger"):
        found: dict[str, list[str]] = {}
        for line in (done["below"] / "trec" / f"T2-{name}-tiny-seed0.txt").read_text().splitlines():
            query, _, product, *_ = line.split()
            found.setdefault(query, []).append(product)
        assert all(len(products) <= 100 for products in found.values())
        shares = [len(set(found.get(query, [])[:10]) & wanted) / len(wanted) for query, wanted in relevant.items()]
        assert done["rows"][name]["recall"]["10"] == pytest.approx(np.mean(shares))


def test_what_the_door_sets_aside_is_counted_in_the_report(done):
    about = done["report"]["about"]
    assert "1: another pair of this query and product has a higher relevance" in about["pairs set aside"]
    assert "1: product_id is not in the catalogue" in about["pairs set aside"]
    assert "1 more have no relevant product there and are not asked" in about["queries"], (
        "LONE; GONE left with its product"
    )
    first = done["first"]
    qrels = (done["below"] / "trec" / "qrels.txt").read_text()
    assert f"{first['query_id']} 0 {first['product_id']} {round(100 * (first['relevance'] - 1))}\n" in qrels, (
        "the higher one counts"
    )
    assert LONE not in qrels and GONE not in qrels


def test_ids_that_products_share_find_more_ids_than_products(done):
    row = done["rows"]["cq_sid"]
    assert (
        row["recall_ids"]["10"] >= row["recall"]["10"]
        and done["rows"]["tiger"]["recall_ids"] == done["rows"]["tiger"]["recall"]
    )


def test_generators_trained_in_full_differ_in_their_ids_and_of_pawa_the_head(done):
    store = Store(str(done["folder"] / "store"))
    rows = [done["rows"][name] for name in TRAINED]
    cells = [json.loads(store.read(row["manifests"][0])) for row in rows]
    generators = [artifact for cell in cells for artifact in _of_kind(store, "generator", cell["parents"]["generator"])]
    settings = [one["settings"] for one in generators]
    assert [one.pop("head") for one in settings] == ["plain", "pawa"] and settings[0] == settings[1]
    assert len({cell["parents"]["ids"] for cell in cells}) == 2
    for row in rows:
        assert row["recall_ids"] == row["recall"], "no product shares an ID"
        assert row["cost"]["train_seconds"] >= row["cost"]["generator_seconds"] > 0 and row["cost"]["bytes"] > 0


def _of_kind(store: Store, kind: str, digest: str) -> list[dict]:
    """The manifests of a kind with this digest."""
    names = [f"artifacts/{kind}/{key}/manifest.json" for key in store.names(f"artifacts/{kind}")]
    return [manifest for name in names if (manifest := json.loads(store.read(name)))["digest"] == digest]


def test_a_second_run_measures_nothing_and_says_the_same(done):
    assert "Measured now: 9. Found: 1." in done["first_run"].stdout
    assert "Measured now: 0. Found: 10." in done["again"].stdout and "event=start" not in done["again"].stderr
    assert json.loads((done["below"] / "report.json").read_text()) == done["report"]


def test_two_jobs_divide_the_runs_and_read_each_other_s(shop, done, no_ray, tmp_path):
    recipe = Recipe.build(shop["recipe"] | {"store": str(tmp_path / "divided")})
    cells = [cell for cell in plan(["2"], ["bm25", "bm25_tuned", "dense"], "tiny")]
    first, _ = reproduce(recipe, cells, seeds=1, share=(1, 2))
    assert (first.made, [len(one.runs) for one in first.outcomes]) == (2, [1, 0, 1])
    second, _ = reproduce(recipe, cells, seeds=1, share=(2, 2))
    assert (second.made, second.found) == (1, 2)
    assert [one.runs[0].ranked for one in second.outcomes[::2]] == [one.runs[0].ranked for one in first.outcomes[::2]]
    with_ids = plan(["2"], ["bm25", "tiger"], "tiny")
    words, _ = reproduce(recipe, with_ids, seeds=1, share=(1, 2))
    assert words.job.made == [] and words.outcomes[1].whys == ["not measured yet"], (
        "TIGER's quantizer is the other job's"
    )
    ids, _ = reproduce(recipe, with_ids, seeds=1, share=(2, 2))
    assert ids.job.made == ["quantizer", "ids"] and (ids.made, ids.found) == (1, 1)
    for wrong in ("0/2", "3/2", "x", "1/0"):
        refused = run_here("reproduce", "--recipe", shop["path"], "--share", wrong)
        assert refused.returncode == 3 and "give I/N with 1 ≤ I ≤ N" in refused.stderr


def test_each_cell_leads_to_its_manifest_and_to_the_command_that_remakes_it(done):
    page = (done["below"] / "report.html").read_text()
    links = re.findall(r'href="\.\./\.\./(artifacts/cell/\w+/manifest\.json)"', page)
    assert len(links) == 10 and all((done["folder"] / "store" / link).exists() for link in links)
    assert f"catid2 reproduce --recipe {done['path']} --cell CELL" in page


def test_cq_sid_s_table_finds_the_runs_of_table_2_and_names_products_of_a_beam(done, no_ray, tmp_path):
    run = run_here("reproduce", "--recipe", done["path"], "--tables", "CQ", "--out", tmp_path)
    assert run.returncode == 0 and "Measured now: 3. Found: 2." in run.stdout, run.stderr[-3000:]
    rows = json.loads((tmp_path / "report.json").read_text())["tables"]["CQ"]["rows"]
    for name, row in rows.items():
        assert (row["beam_products"]["1"] == 1) == (name == "tiger") and row["beam_hit"]["1"] <= row["beam_hit"]["100"]
    assert rows["tiger"]["recall_expected"] == pytest.approx(rows["tiger"]["recall"])
    assert rows["cq_sid"]["recall"] == done["rows"]["cq_sid"]["recall"]
    manifests = {row["manifests"][0] for row in rows.values()}
    assert len(manifests) == 5, "each change of the recipe is another quantizer"
    assert "At equal beams, and at equal products" in (tmp_path / "report.html").read_text()


def test_confident_labels_make_a_quantizer_of_their_own(done, shop, no_ray):
    cells = [cell for cell in plan(["CT"], [], "tiny", confidence={"sure": 0.5})
             if cell.row.condition.name in ("cat_id2", "confident")]  # fmt: skip
    recipe = Recipe.build({**shop["recipe"], "reproduce": {"confidence": {"sure": 0.5}}})
    both, _ = reproduce(recipe, cells, seeds=1)
    labels, confident = (one.runs[0] for one in both.outcomes)
    assert labels.parents["quantizer"] != confident.parents["quantizer"]
    [made] = _of_kind(Store(recipe.store), "quantizer", confident.parents["quantizer"])
    assert made["parents"]["catalog"] == confident.parents["catalog"], "the catalogue says how sure it is"


def test_reports_of_several_locales_stand_side_by_side(done, tmp_path):
    other = json.loads((done["below"] / "report.json").read_text())
    del other["tables"]["T2"]["rows"]["bm25"]
    other["tables"]["T2"]["rows"]["solr"] = {"title": "solr, as given", "recall": {"10": 0.5, "50": 0.75}}
    (tmp_path / "es.json").write_text(json.dumps(other | {"data": "es"}))
    command = ["reproduce", "--recipe", done["path"], "--tables", "2", "--found-only", "--out", tmp_path / "out"]
    made = run_here(*command, "--beside", tmp_path / "es.json")
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| tiny @10 | tiny @50 | es @10 | es @50 |" in page
    assert "| solr, as given | – | – | 50.0 | 75.0 |" in page
    assert re.search(r"\| BM25, k1 1.2, b 0.75 \| \d+\.\d \| \d+\.\d \| – \| – \|", page)
    for wrong, why in ((tmp_path / "none.json", "cannot be read"), (done["path"], "is no report.json with a Table 2")):
        refused = run_here(*command, "--beside", wrong)
        assert refused.returncode == 3 and "--beside" in refused.stderr and why in refused.stderr.replace("\n", " ")


def test_it_says_which_method_to_take(done):
    advice = done["report"]["advice"]
    assert (
        advice["take"] in ("bm25", "bm25_tuned", "dense", "zero_shot", "bm25+dense")
        and advice["best"] in advice["ties"]
    )
    assert advice["sentence"] in done["first_run"].stdout and "Take " in advice["sentence"]


def test_another_search_stands_beside_the_methods_by_its_answers(done, no_ray, tmp_path):
    """BM25's own answers, given back as those of a search that nobody here knows."""
    runs = {"shop_search": str(done["below"] / "trec" / "T2-bm25-tiny-seed0.txt"), "gone": "no-such.trec"}
    made = run_here(
        "reproduce", "--recipe", done["path"], "--tables", "2,7", "--out", str(tmp_path),
        "--set", f"reproduce.runs={json.dumps(runs)}", "--set", 'reproduce.methods=["bm25", "dense", "tiger"]',
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["tables"]["T2"]["rows"]
    assert list(rows)[:2] == ["shop_search", "gone"] and rows["shop_search"]["recall"] == rows["bm25"]["recall"]
    assert rows["gone"]["not_run"] == [
        "reproduce.runs: no-such.trec cannot be read (No such file or directory): name a file of the machine that runs the command"
    ]
    assert rows["shop_search"]["tuned"] == [{"unanswered": 0, "not_asked": 0, "unknown_products": 0}]
    page = (tmp_path / "report.md").read_text()
    assert "- answers of shop_search, as given: 0 queries unanswered, 0 answers that are no product" in page
    assert re.search(r"\| shop_search, as given \| [^|]*\| – \| – \| – \| – \|", page)


def test_a_further_seed_of_what_is_served_is_made_as_its_release_would_be(shop, no_ray, tmp_path):
    """Only where the recipe names it: a generator is trained in full."""
    recipe = shop["recipe"] | {"store": str(tmp_path / "store"), "reproduce": {"methods": ["served"]}}
    reindex(Recipe.build(recipe))
    cells = plan(["2"], ["served", "generator", "lookahead"], "tiny")
    result, _ = reproduce(Recipe.build(recipe), cells, seeds=2)
    alone, ahead, served = result.outcomes
    assert [run.seed for run in served.runs] == [0, 1] and not served.whys
    assert [run.seed for run in alone.runs] == [0] == [run.seed for run in ahead.runs]
    assert "name it in reproduce.methods" in alone.whys[0]
    costs = [one.runs[0].cost for one in (alone, ahead, served)]
    assert costs[0]["bytes"] < costs[1]["bytes"] < costs[2]["bytes"], (
        "whoever looks ahead reads nodes, what is served all"
    )
    assert all(cost["ids_seconds"] + cost["generator_seconds"] <= cost["train_seconds"] for cost in costs)
    assert ahead.runs[0].ranked not in (alone.runs[0].ranked, served.runs[0].ranked)
    assert (
        served.runs[0].tuned["release"].startswith("r-") and served.runs[1].tuned["release"] == "none; made with seed 1"
    )
    store = Store(recipe["store"])
    (made,) = _of_kind(store, "generator", served.runs[1].parents["generator"])
    assert made["recipe"]["seed"] == 1 and made["parents"]["ids"] == served.runs[1].parents["ids"]
    assert served.runs[0].parents["ids"] != served.runs[1].parents["ids"]


def test_one_cell_alone_and_what_is_there_is_read_without_measuring(done, tmp_path):
    one = run_here(
        "reproduce",
        "--recipe",
        done["path"],
        "--tables",
        "2",
        "--cell",
        "T2/tiger/tiny",
        "--found-only",
        "--out",
        tmp_path,
    )
    assert one.returncode == 0 and "Found: 1." in one.stdout, one.stderr
    assert list(json.loads((tmp_path / "report.json").read_text())["tables"]["T2"]["rows"]) == ["tiger"]
    before = (done["below"] / "report.json").read_bytes()
    command = ["reproduce", "--recipe", done["path"], "--set", "reproduce.machine_hour=0.5", "--cell", "T2/tiger/tiny"]
    alone = run_here(*command)
    page = done["below"] / "cells" / "T2-tiger-tiny" / "report.html"
    assert alone.returncode == 0 and str(page) in alone.stdout.replace("\n", ""), alone.stderr
    assert (done["below"] / "report.json").read_bytes() == before, "the whole report stays"
    assert "event=start" not in alone.stderr, "no other table's texts or pictures are made"
    [link] = re.findall(r'href="([./]+artifacts/cell/\w+/manifest\.json)"', page.read_text())
    assert (page.parent / link).resolve().exists()
    assert f"catid2 reproduce --recipe {done['path']} --set reproduce.machine_hour=0.5 --cell CELL" in page.read_text()
    none = run_here("reproduce", "--recipe", done["path"], "--cell", "T5/depth_1/tiny", "--dry-run")
    assert none.returncode == 0 and "not measured yet" in none.stdout and "event=start" not in none.stderr


def test_list_commands_and_plan_touch_nothing(shop, tmp_path):
    untouched = ["--recipe", shop["path"], "--set", f"store={tmp_path / 'none'}"]
    names = run_here("reproduce", *untouched, "--list").stdout
    commands = run_here("paper-tables", *untouched, "--show-commands", "--tables", "5").stdout
    dry = run_here("reproduce", *untouched, "--dry-run")
    assert "T2/tiger/tiny  TIGER\n" in names and "T6/cat_id2_5/tiny" in names and "F5/cat_id2_k64/tiny" in names
    assert "[not run: its simultaneous decoding" in names
    assert all(
        line.startswith(f"catid2 reproduce --recipe {shop['path']} --set store=") for line in commands.splitlines()
    )
    several = run_here("reproduce", *untouched, "--show-commands", "--tables", "5", "--seeds", "3").stdout
    assert "--seeds 3 --cell T5/tiger/tiny" in several
    assert commands.splitlines()[0].endswith("--cell T5/tiger/tiny") and "Every cell would be made" in dry.stdout
    usual = [*untouched, "--set", "reproduce.methods=[]"]
    assert "+generator" not in run_here("reproduce", *usual, "--list").stdout, "hours each are not begun unasked"
    few = [*untouched, "--set", "reproduce.methods=[bm25]"]
    for methods in (usual, few):
        assert "T2/nci+pawa/tiny" in run_here("reproduce", *methods, "--list", "--cell", "T2/nci+pawa/tiny").stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "reproduce.methods=[bm25,bm26]"], "reproduce.methods: unknown 'bm26'; known are bm25, "),
        (["--tables", "2,12"], "--tables: unknown 12"),
        (["--cell", "T2/tigger/tiny"], "no such cell; near it: T2/tiger/tiny"),
        (["--cell", "tiger/T2/tiny"], "T2/tiger/tiny; --list shows all"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_any_work(shop, tmp_path, arguments, message):
    refused = run_here("reproduce", "--recipe", shop["path"], "--set", f"store={tmp_path / 'none'}", *arguments)
    assert refused.returncode == 3 and message in refused.stderr.replace("\n", " ") and not (tmp_path / "none").exists()


def test_a_test_split_that_nothing_can_answer_is_refused(done, no_ray, tmp_path):
    """Once because no judgement is high enough, once because all judged products have left the catalogue."""
    unreached = done["recipe"] | {"evaluation": {**done["recipe"]["evaluation"], "min_relevance": 9}}
    with pytest.raises(
        InputError, match="none of the 19 queries of the test split has a relevant product: the highest"
    ):
        reproduce(Recipe.build(unreached), plan(["2"], ["bm25"], "tiny"), seeds=1)
    before, after = Store(str(done["folder"] / "source")), Store(str(tmp_path / "source"))
    pairs = before.read_table("pairs.parquet")
    left = pc.if_else(
        pc.equal(pairs["split"], "test"),
        pc.binary_join_element_wise("sold-", pairs["product_id"], ""),
        pairs["product_id"],
    )
    after.write_table("products.parquet", before.read_table("products.parquet"))
    after.write_table("pairs.parquet", pairs.set_column(pairs.column_names.index("product_id"), "product_id", left))
    catalog = {**done["recipe"]["catalog"], "root": str(tmp_path / "source")}
    gone = done["recipe"] | {"catalog": catalog, "store": str(tmp_path / "store")}
    with pytest.raises(InputError, match="no pair of the test split names a product of the catalogue"):
        reproduce(Recipe.build(gone), plan(["2"], ["bm25"], "tiny"), seeds=1)


def test_a_cell_that_breaks_leaves_the_others_alone(done, no_ray, monkeypatch, capsys):
    """A fault that nobody foresaw: the log has all of it, the report says so, and nothing is kept of it."""
    monkeypatch.setattr(Measures, "_fusion_ranking", lambda *_: 1 / 0)
    recipe = Recipe.build(done["recipe"] | {"evaluation": {**done["recipe"]["evaluation"], "max_queries": 7}})
    result, _ = reproduce(recipe, plan(["2"], ["bm25", "bm25+dense"], "tiny"), seeds=1)
    bm25, fused = result.outcomes
    assert len(bm25.runs) == 1 and len(bm25.runs[0].ranked) == 7 and result.made == 1
    assert fused.whys == ["it failed with ZeroDivisionError: division by zero"] and not fused.runs
    assert "ZeroDivisionError" in capsys.readouterr().err
    read, _ = reproduce(recipe, plan(["2"], ["bm25", "bm25+dense", "bm25_tuned"], "tiny"), seeds=1, found_only=True)
    whys = [one.whys for one in read.outcomes]
    assert whys == [[], ["not measured yet"], ["it failed with ZeroDivisionError: division by zero"]], (
        "a report that measures nothing knows why"
    )
    other = Recipe.build(done["recipe"] | {"evaluation": {**done["recipe"]["evaluation"], "max_queries": 8}})
    read, _ = reproduce(other, plan(["2"], ["bm25+dense"], "tiny"), seeds=1, found_only=True)
    assert read.outcomes[0].whys == ["not measured yet"], "with another recipe it may not fail"


@pytest.mark.parametrize("index", ["hnsw", "ivf"])
def test_faiss_finds_what_is_nearest(index):
    pytest.importorskip("faiss")
    product_ND = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    pair = Pair(lambda texts: product_ND[:20], product_ND, 1.0, 2.0, lambda: 0.5)
    found = approximate(index, product_ND[:20], pair, 0.5)
    assert found.rows_QC.shape == (20, 100) and (found.rows_QC[:, 0] == np.arange(20)).all()
    assert (
        found.cost["train_seconds"] == 1.0 and found.cost["index_seconds"] >= 2.0 and found.cost["ms_per_query"] >= 0.5
    )


def test_a_method_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    pair = Pair(lambda texts: np.eye(4), np.eye(4), 0.0, 0.0, lambda: 0.0)
    with pytest.raises(InputError, match=r"faiss is not installed: pip install 'catid2-ray\[baselines\]'"):
        approximate("hnsw", np.eye(4), pair, 0.0)


@pytest.mark.parametrize(
    "name, trained, indexed",
    [
        ("dense", 130.0, 3.0),
        ("bm25+adapted", 130.0, 3.0),
        ("dpr", 30.0, 3.0),
        ("tiger", 137.0, 203.0),  # with the adapter, and with the embeddings
        ("tiger+generator", 137.0, 203.0),
        ("served", 180.0, 3.0),  # with its examples
    ],
)
def test_what_methods_share_is_counted_for_each(name, trained, indexed):
    (condition,) = [one for one in CONDITIONS if one.name == name]
    of = {"tuned_encoder": 100.0, "adapter": 7.0, "embeddings": 200.0, "quantizer": 5.0, "ids": 6.0, "examples": 50.0,
          "generator": 60.0}  # fmt: skip
    parts = {
        role: SimpleNamespace(metrics={"seconds": seconds}, files=[{"bytes": 2}], named=lambda _: [{"bytes": 1}])
        for role, seconds in of.items()
    }
    cost = with_shared(condition, {"train_seconds": 30.0, "index_seconds": 3.0, "bytes": 9}, parts)
    assert (cost["train_seconds"], cost["index_seconds"]) == (trained, indexed)
    assert cost["bytes"] == (3 if name in ("tiger+generator", "served") else 9)
    if name == "served":
        assert (cost["ids_seconds"], cost["generator_seconds"]) == (11.0, 110.0)
