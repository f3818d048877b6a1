"""The generated shop: the same bytes for a seed, a real tree, and queries that are neither trivial nor circular."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from catid2_ray.catalog.pairs import check_pairs
from catid2_ray.catalog.products import check_products
from catid2_ray.catalog.shop_words import MATERIAL_NAMES, SIZES, USE_NAMES, read_kinds
from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import join_text
from catid2_ray.errors import InputError
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.protocol import Judgements, evaluate

DIGEST = """
import hashlib, pyarrow as pa
from catid2_ray.catalog.synthetic import generate
sink = hashlib.sha256()
for table in generate(products=300, queries=100, seed=5):
    sink.update(repr(table.to_pydict()).encode())
print(sink.hexdigest())
"""


@pytest.fixture(scope="module")
def shop():
    return generate(products=6000, queries=2500, seed=7)


def test_the_same_seed_gives_the_same_shop_in_another_process(tmp_path):
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        for seed in ("1", "2")
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout != ""
    assert not generate(products=300, queries=100, seed=5).products.equals(
        generate(products=300, queries=100, seed=6).products
    )


def test_both_tables_pass_the_checks_at_the_door(shop):
    checked = check_products(shop.products, width=None, min_category_depth=0, max_category_depth=4)
    assert checked.bad.num_rows == 0 and checked.good.num_rows == 6000
    assert checked.good.drop_columns(["value"]).schema == shop.products.schema
    pairs = check_pairs(shop.pairs)
    assert pairs.bad.num_rows == pairs.duplicates == 0
    assert pc.all(pc.is_in(shop.pairs["product_id"], shop.products["product_id"].combine_chunks())).as_py()


def test_the_tree_is_deep_and_uneven_and_some_facts_are_missing(shop):
    depths = set(pc.list_value_length(shop.products["category_path"]).to_pylist())
    assert {0, 1, 2, 3, 4} <= depths
    assert 0.2 < shop.products["description"].null_count / 6000 < 0.5
    assert len(set(shop.products["title"].to_pylist())) > 5900
    without_tail = {title.rsplit(" in ", 1)[0] for title in shop.products["title"].to_pylist()}
    assert len(without_tail) < 5000, "variants in other colours should share the rest of their title"


def test_a_query_lives_in_one_split_and_is_never_a_category(shop):
    by_query = shop.pairs.group_by(["query_id", "query", "split"]).aggregate([])
    assert by_query.num_rows == 2500 == len(set(by_query["query"].to_pylist()))
    shares = {row["values"]: row["counts"] / 2500 for row in pc.value_counts(by_query["split"]).to_pylist()}
    assert shares["train"] == pytest.approx(0.8, abs=0.05) and shares["test"] == pytest.approx(0.12, abs=0.03)
    names = {name.lower() for path in shop.products["category_path"].to_pylist() for name in path}
    assert not names & set(by_query["query"].to_pylist())
    assert set(shop.pairs["relevance"].to_pylist()) == {1.0, 2.0, 3.0}


def test_words_alone_find_about_half_and_a_part_is_unseen(shop):
    pairs = shop.pairs
    train = pairs.filter(pc.and_(pc.equal(pairs["split"], "train"), pc.greater_equal(pairs["relevance"], 2)))
    judged = Judgements.from_pairs(
        pairs, split="test", min_relevance=2, seen=train["product_id"].unique(), known=shop.products["product_id"]
    )
    sizes = sorted(len(products) for products in judged.relevant)
    assert sizes[len(sizes) // 10] >= 3 and sizes[-len(sizes) // 10] <= 15
    assert 0.6 < sum(map(len, judged.seen)) / sum(sizes) < 0.8
    bm25 = Bm25(shop.products["product_id"].to_pylist(), join_text(shop.products, ["title"]))
    figures = evaluate(judged, {"bm25": bm25.retrieve(judged.queries, k=50)}, ks=(50,))
    assert 0.45 < figures["recall"]["bm25"]["50"] < 0.75


def test_the_tables_of_words_fit_together():
    kinds = read_kinds()
    assert {use for kind in kinds for use in kind.uses} == set(range(len(USE_NAMES)))
    assert {material for kind in kinds for material in kind.materials} == set(range(len(MATERIAL_NAMES)))
    assert all(kind.sizes in SIZES.values() and len(kind.nouns) in (1, 2) and kind.query_nouns for kind in kinds)


def test_small_and_impossible_shops():
    tiny = generate(products=40, queries=20, seed=1)
    assert tiny.products.num_rows == 40 and len(pc.unique(tiny.pairs["query_id"])) == 20
    assert isinstance(tiny.pairs, pa.Table)
    with pytest.raises(InputError, match="2 products give only"):
        generate(products=2, queries=500, seed=1)
    with pytest.raises(InputError, match="at least one product and one query"):
        generate(products=0, queries=5, seed=1)
