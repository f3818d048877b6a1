"""A changed title and new products cost the encoder no more than their own texts, in a real reindex and a real append."""

import pyarrow as pa
import pyarrow.parquet as pq

from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import append_items, reindex
from tests.conftest import TINY
from tests.text_models import save_bert

MADE = generate(products=260, queries=100, seed=3)


def test_one_changed_title_encodes_one_text_and_an_append_its_new_products(tmp_path, no_ray):
    shop = tmp_path / "shop"
    shop.mkdir()
    pq.write_table(MADE.pairs, shop / "pairs.parquet")
    encoder = {"encoder": save_bert(tmp_path / "bert"), "tokens": 16, "width": None}
    quantizer = {"kind": "rq_kmeans", "codes_per_level": [8, 8, 8, 8], "kmeans_sample": 200}
    recipe = Recipe.build(
        TINY | {
            "store": str(tmp_path / "store"), "catalog": {"root": str(shop), "rows_per_part": 100}, "quantizer": quantizer,
            "embedding": TINY["embedding"] | encoder, "generator": TINY["generator"] | {"epochs": 1},
        }
    )  # fmt: skip
    titles = [f"steel hinge {number}" for number in MADE.products["product_id"].to_pylist()]

    def counts_of(job, products: int) -> tuple[int, int]:
        column = MADE.products.column_names.index("title")
        table = MADE.products.set_column(column, "title", pa.array(titles)).slice(0, products)
        pq.write_table(table, shop / "products.parquet")
        metrics = job(recipe).parts["embeddings"].metrics
        return metrics["encoded"], metrics["reused"]

    assert counts_of(reindex, 195) == (195, 0)
    titles[17] = "oak door 10 ft"
    assert counts_of(reindex, 195) == (1, 194)
    assert counts_of(append_items, 202) == (7, 195), "a catalogue of three parts on top of one of two"
