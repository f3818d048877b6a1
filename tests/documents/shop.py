"""The shop that the manual's examples are about: CSV tables with prices and stock, and recipes in the sizes of tests."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import yaml

from catid2_ray.catalog.synthetic import generate
from tests.conftest import TINY

ALIGNMENT = {"steps": 2, "report_every": 1, "batch": 8, "group": 4, "validation_queries": 8, "max_failures": 0}


def _short(product_id: str) -> str:
    """p0000017 → p17, as the manual writes it."""
    return f"p{int(product_id[1:])}"


def write_tables(folder: Path) -> None:
    """`folder`/shop/: products.csv and pairs.csv, as a shop would export them."""
    made, shop = generate(products=240, queries=120, seed=3), folder / "shop"
    rows, products = range(made.products.num_rows), made.products
    ids, pairs = pa.array([_short(name) for name in products["product_id"].to_pylist()]), made.pairs
    products = products.set_column(products.column_names.index("product_id"), "product_id", ids)
    named = pa.array([_short(name) for name in pairs["product_id"].to_pylist()])
    pairs = pairs.set_column(pairs.column_names.index("product_id"), "product_id", named)
    paths = pa.array([" > ".join(path or []) for path in products["category_path"].to_pylist()])
    products = products.set_column(products.column_names.index("category_path"), "category_path", paths)
    products = products.append_column("brand", pa.array([["Oakline", "Ferro", "Nordic"][row % 3] for row in rows]))
    products = products.append_column("price", pa.array([10.5 + row % 90 for row in rows]))
    products = products.append_column("in_stock", pa.array([row % 5 > 0 for row in rows]))
    shop.mkdir()
    pa.csv.write_csv(products, shop / "products.csv")
    pa.csv.write_csv(pairs, shop / "pairs.csv")


def reduced(recipe: dict) -> dict:
    """A recipe of the manual with the sizes of the tests' tiny one: what takes minutes then takes seconds."""
    small = json.loads(json.dumps(recipe))
    for section in ("embedding", "quantizer", "ids", "generator", "evaluation"):
        small[section] = (small.get(section) or {}) | TINY[section]
        if section in ("quantizer", "generator"):
            small[section] |= {"workers": 1}
    small["embedding"].pop("encoder_mode", None)  # lsa has no weights to tune
    small["generator"].pop("head", None)  # what reads codewords needs them in the space of a text encoder
    small["catalog"] = (small.get("catalog") or {}) | {"rows_per_part": TINY["catalog"]["rows_per_part"]}
    if "synthetic" in small["catalog"]:
        small["quantizer"] |= {
            "codes_per_level": [16, 8, 8, 8]
        }  # unlike the shop's: in one store the two would be refused
        small["catalog"] |= {"synthetic": TINY["catalog"]["synthetic"]}
    small["alignment"] = (small.get("alignment") or {}) | ALIGNMENT
    return small


def write_recipe(path: Path, recipe: dict) -> None:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
