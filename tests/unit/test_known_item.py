"""`benchmarks/known_item.py`: its queries hold no word of their title, each text is in one split, and the door takes the tables."""

import importlib
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from catid2_ray.catalog.pairs import check_pairs
from catid2_ray.catalog.products import check_products
from catid2_ray.catalog.queries import find_faults, keyed_queries
from catid2_ray.config import Recipe
from catid2_ray.scripts import words_of

ROOT = Path(__file__).parents[2]
COLOURS, THINGS = ("red", "blue", "green", "black", "white"), ("chair", "lamp", "rug", "table", "shelf", "bowl")
SHARED = "Visit our shop for many more fine things of this sort"


@pytest.fixture(scope="module")
def bench():
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("known_item")
    finally:
        sys.path.remove(folder)
        sys.modules.pop("known_item", None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """30 products with a sentence of their own, 20 that share one, then one of a title that stood before, and two without one."""
    titles = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    texts = [
        f"Too short. The {title} number{i} stands well in rooms where people like to rest"
        for i, title in enumerate(titles)
    ]
    titles += [f"mug {number}" for number in range(20)] + ["Red Chair", "vase", "jug"]
    texts += [SHARED] * 20 + ["Another long sentence about some chair that has a title twice", None, "Few words alone"]
    table = pa.table({
        "product_id": [f"p{row:02}" for row in range(len(titles))], "title": titles, "description": texts,
        "category_path": [["Homewares", "Furnishings", f"Kind{row % 3}"] for row in range(len(titles))],
    })  # fmt: skip
    folder = tmp_path_factory.mktemp("data")
    pq.write_table(table, folder / "products.parquet")
    return folder


@pytest.fixture(scope="module")
def made(bench, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("known") / "item"
    counts = bench.make(data, out)
    return counts, pq.read_table(out / "products.parquet"), pq.read_table(out / "pairs.parquet")


def test_what_is_indexed_holds_no_query(made):
    counts, products, pairs = made
    assert (counts["products"], counts["of these to find"]) == (53, 50)
    assert not {"p50", "p51", "p52"} & set(products["product_id"].to_pylist())
    assert products["description"].null_count == 50 and products["description"].type == pa.string()
    title_of = dict(zip(products["product_id"].to_pylist(), products["title"].to_pylist()))
    right = pairs.filter(pc.equal(pairs["relevance"], 3.0)).to_pylist()
    assert sorted(row["product_id"] for row in right) == sorted(title_of)
    for row in right:
        words = words_of(row["query"])
        assert len(words) >= 8 and not set(words) & set(words_of(title_of[row["product_id"]]))
        assert not set(words) & {"homewares", "furnishings", "kind0", "kind1", "kind2"}


def test_a_text_is_one_query_of_one_split(made):
    counts, _, pairs = made
    shared = [row for row in pairs.to_pylist() if row["query"].startswith("visit")]
    assert len({row["query_id"] for row in shared}) == 1 and {row["split"] for row in shared} == {"train"}
    found = find_faults(keyed_queries(pairs))
    assert not found.two_texts and not found.shared and found.queries == counts["queries"]
    assert counts["queries"] == {split: len(set(of)) for split, of in (
        (split, pairs.filter(pc.equal(pairs["split"], split))["query_id"].to_pylist()) for split in counts["queries"]
    )}  # fmt: skip
    assert counts["to find by split"]["train"] > counts["to find by split"]["test"] > 0
    assert sum(counts["to find by split"].values()) == 50 and sum(counts["queries"].values()) == 31


def test_the_door_takes_both_tables_and_the_recipe_counts_their_grades(made):
    _, products, pairs = made
    good = check_products(products, width=None, min_category_depth=0, max_category_depth=3)
    checked = check_pairs(pairs, known=products["product_id"].combine_chunks())
    assert not good.bad.num_rows and not checked.bad.num_rows and not checked.duplicates
    recipe = Recipe.load(ROOT / "jobs" / "recipes" / "known_item.yaml", ["catalog.root=elsewhere"])
    assert recipe.embedding.text == ("title",)
    for least in (recipe.generator.min_relevance, recipe.evaluation.min_relevance):
        assert sorted(grade >= least for grade in pairs["relevance"].to_pylist()) == [False] + [True] * 50


def test_the_script_says_what_it_wrote_the_same_each_time(bench, data, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["known_item.py", str(data), str(tmp_path)])
    bench.main()
    assert json.loads(capsys.readouterr().out) == made[0]
    assert pq.read_table(tmp_path / "pairs.parquet") == made[2]


def test_folders_that_cannot_be_are_refused(bench, data, tmp_path):
    with pytest.raises(SystemExit, match="no products.parquet in"):
        bench.make(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="would be overwritten"):
        bench.make(data, data)
    table = pq.read_table(data / "products.parquet")
    pq.write_table(table.drop_columns("description"), tmp_path / "products.parquet")
    with pytest.raises(SystemExit, match="no column description"):
        bench.make(tmp_path, tmp_path / "out")
    pq.write_table(table.slice(51), tmp_path / "products.parquet")
    with pytest.raises(SystemExit, match="a sentence of 8 words"):
        bench.make(tmp_path, tmp_path / "out")
