"""One release, made from tables in S3, that all tests of this folder look at."""

import json
import os

import pyarrow as pa
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from tests.command import run, write_recipe
from tests.conftest import TINY
from tests.s3_server import new_bucket, s3_server


@pytest.fixture(scope="session")
def s3():
    with s3_server() as environment:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        yield environment, new_bucket(environment)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="session")
def released(s3, tmp_path_factory):
    """A catalogue in S3 (with one bad row), and what `catid2 reindex` made of it."""
    environment, bucket = s3
    folder = tmp_path_factory.mktemp("job")
    source, made = Store(f"{bucket}/source"), generate(products=240, queries=120, seed=3)
    bad = made.products.slice(0, 1).set_column(1, "title", [[" "]])
    rows = range(made.products.num_rows)
    priced = made.products.append_column("price", pa.array([float(row % 50) for row in rows]))
    priced = priced.append_column("market", pa.array([["us", "de"] if row % 4 else ["de"] for row in rows]))
    bad = bad.append_column("price", pa.array([1.0])).append_column("market", pa.array([["us"]]))
    source.write_table("products/a.parquet", priced.slice(100))
    source.write_table("products/b.parquet", priced.slice(0, 100))
    source.write_table("products/c.parquet", bad)
    source.write_table("pairs.parquet", made.pairs)
    recipe = {**TINY, "store": f"{bucket}/store"}
    recipe["catalog"] = {
        "root": f"{bucket}/source", "rows_per_part": 100, "filter_columns": {"price": "float", "market": "list<string>"},
    }  # fmt: skip
    recipe["serving"] = {
        "filters": ["price", "market", "category_path"],
        "expansion": {"a": 0.5, "lexical_weight": 0.02},
    }
    recipe["evaluation"] = {**TINY["evaluation"], "methods": ["beam", "bm25", "dense", "served"]}
    path = write_recipe(folder, recipe)
    result = run("catid2_ray.cli", "reindex", "--recipe", path, "--json", folder / "figures.json", env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return {
        "recipe": path,
        "store": recipe["store"],
        "result": result,
        "figures": json.loads((folder / "figures.json").read_text()),
        "env": environment,
        "folder": folder,
        "pairs": made.pairs,
        "products": priced,
    }
