"""What `catid2 plan` says beside what a job took: stage by stage, at two sizes.

    python benchmarks/plan.py [--products 5e4,2e5] [--json FILE]

A whole `reindex` of a generated shop, with as many training pairs a product as the plan assumes, and vectors of the plan's width in
the table. It runs in this process, one thread, one stage after the other and without Ray (as tests do), and its processor time
is taken: what the plan says are seconds of busy CPUs, and neither other work on the machine nor the start of workers is among them.
The generator is the small T5, which learns the pairs alone, once.

The last line printed is one JSON object.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from harness import RESULTS, finish, machine, parser_of, table, wholes

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.look.plan import RATES, plan
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import fixed_lists

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.in_process import without_ray  # noqa: E402

WIDTH, EPOCHS = 384, 3
PAIRS_A_QUERY = 7.6  # training pairs that a query of the generated shop brings
# Stages of a job that one row of the plan stands for; the plan does not count the others.
ROWS = {"catalog": ("catalog", "embeddings"), "quantizer": ("quantizer",), "ids": ("ids",), "generator": ("generator",)}


def write_shop(folder: Path, products: int) -> None:
    made = generate(products=products, queries=round(RATES["pairs"].value * products / PAIRS_A_QUERY), seed=0)
    rng, shop = np.random.default_rng(0), Store(folder)
    mix = rng.normal(size=(32, WIDTH)).astype(np.float32)
    vectors = rng.normal(size=(products, 32)).astype(np.float32) @ mix
    vectors += 0.7 * rng.normal(size=vectors.shape).astype(np.float32)
    shop.write_table("products.parquet", made.products.append_column("embedding", fixed_lists(vectors, pa.float32())))
    shop.write_table("pairs.parquet", made.pairs)


def recipe_of(folder: Path) -> Recipe:
    return Recipe.build(
        {
            "store": str(folder / "store"),
            "catalog": {"root": str(folder / "shop"), "workers": 1, "rows_per_part": 50_000},
            "embedding": {"source": "given", "width": WIDTH, "workers": 1},
            "quantizer": {"epochs": EPOCHS},
            "ids": {"workers": 1},
            "generator": {"epochs": 1, "mix": {"query": 1.0}, "validate_queries": 0, "min_relevance": 1},
            "evaluation": {"methods": [], "canary_empty": 1},
        }
    )  # fmt: skip


def run(products: int) -> dict:
    folder, began, seconds = Path(tempfile.mkdtemp(prefix="plan-")), {}, {}

    def note(name: str, values: dict) -> None:
        if name == "start":
            began[values["stage"]] = time.process_time()
        elif name == "commit":
            seconds[values["stage"]] = time.process_time() - began[values["stage"]]

    try:
        write_shop(folder / "shop", products)
        recipe = recipe_of(folder)
        planned = plan(recipe, products=products, width=WIDTH)
        progress.write_by(note)
        with without_ray():
            done = reindex(recipe)
        progress.write_by(None)
        stored = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
        return {
            "products": products, "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
            "planned": {row["stage"]: row["seconds"] for row in planned["stages"]},
            "pairs": done.parts["pairs"].metrics["pairs"], "examples": done.parts["examples"].metrics,
            "stored_gb": round(stored / 1e9, 3), "planned_stored_gb": planned["storage_gb"],
        }  # fmt: skip
    finally:
        shutil.rmtree(folder)


def page(figures: dict) -> str:
    rows = []
    for one in figures["runs"]:
        for row, stages in ROWS.items():
            measured = sum(one["seconds"][stage] for stage in stages)
            rows.append([f"{one['products']:,}", row, measured, one["planned"][row], measured / one["planned"][row]])
        others = {stage: took for stage, took in one["seconds"].items() if not any(stage in of for of in ROWS.values())}
        rows += [[f"{one['products']:,}", f"{stage} (not counted)", took, None, None] for stage, took in others.items()]
        rows.append([f"{one['products']:,}", "stored, GB", one["stored_gb"], one["planned_stored_gb"],
                     one["stored_gb"] / one["planned_stored_gb"]])  # fmt: skip
    text = __doc__.split("\n\n")[2].replace("\n", " ")
    return (
        "# What `catid2 plan` says beside what was measured\n\n"
        f"Written by `benchmarks/plan.py`. Machine: {figures['machine']}. {text} "
        f"Width {WIDTH}, {EPOCHS} epochs of the quantizer. Seconds of one CPU.\n\n"
        + table(["products", "stage", "measured", "planned", "measured ÷ planned"], rows)
    )


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "plan.md")
    parser.add_argument("--products", type=wholes, default=[50_000, 200_000])
    options = parser.parse_args()
    finish({"machine": machine(), "runs": [run(products) for products in options.products]}, page, options)


if __name__ == "__main__":
    main()
