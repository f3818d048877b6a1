"""What `catid2 plan` says beside what a job took: stage by stage, at two sizes.

    python benchmarks/plan.py [--products 2e4,1e5] [--workers 2] [--folder DIR] [--json FILE]

A whole `reindex` in this process with a Ray of its own, on a generated shop with as many training pairs a product as the plan
assumes. Vectors are those of `lsa`, which is fast; the generator is the small T5, which learns the pairs alone, once. Seconds are
those that each stage's manifest says. What the plan does not count stands beside it without an estimate.

The last line printed is one JSON object.
"""

import shutil
import tempfile
from pathlib import Path

import psutil
from harness import RESULTS, finish, machine, parser_of, table, wholes, write_page  # noqa: F401

from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.look.plan import RATES, plan

PAIRS_A_QUERY = 7.6  # training pairs that a query of the generated shop brings


def recipe_of(folder: Path, workers: int) -> Recipe:
    return Recipe.build(
        {
            "store": str(folder / "store"), "catalog": {"root": str(folder / "shop"), "workers": workers, "rows_per_part": 25_000},
            "embedding": {"encoder": "lsa", "width": 64, "workers": workers},
            "quantizer": {"epochs": 3, "workers": workers},
            "ids": {"workers": workers},
            "generator": {"workers": workers, "epochs": 1, "mix": {"query": 1.0}, "validate_queries": 0, "min_relevance": 2},
            "evaluation": {
                "max_queries": 200, "methods": ["beam", "served"], "workers": workers, "min_to_release": 0, "min_relevance": 2,
                "canary_slower": 0, "canary_recall": 0, "canary_empty": 1,
            },
        }
    )  # fmt: skip


def run(folder: Path, products: int, workers: int) -> dict:
    made = generate(products=products, queries=round(RATES["pairs"].value * products / PAIRS_A_QUERY), seed=0)
    shop = Store(folder / "shop")
    shop.write_table("products.parquet", made.products)
    shop.write_table("pairs.parquet", made.pairs)
    recipe = recipe_of(folder, workers)
    planned = plan(recipe, products=products, width=64)
    done = reindex(recipe)
    seconds = {
        stage.name: done.parts[stage.role].metrics["seconds"]
        for stage in STAGES.values()
        if stage.role in done.parts and stage.name != "aligned"
    }
    stored = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
    return {
        "products": products, "seconds": seconds, "planned": {row["stage"]: row["seconds"] for row in planned["stages"]},
        "pairs": done.parts["pairs"].metrics, "peak_gib": done.figures["peak_memory_bytes"] / 2**30,
        "stored_gb": stored / 1e9, "planned_stored_gb": planned["storage_gb"], "load": psutil.getloadavg()[1],
    }  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "plan.md")
    parser.add_argument("--products", type=wholes, default=[20_000, 100_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    figures = {"machine": machine(), "runs": []}
    for products in options.products:
        folder = Path(tempfile.mkdtemp(prefix="plan-", dir=options.folder))
        try:
            figures["runs"].append(run(folder, products, options.workers))
        finally:
            shutil.rmtree(folder)
    finish(figures, page, options)


def page(figures: dict) -> str:
    rows = []
    for one in figures["runs"]:
        for stage, seconds in one["seconds"].items():
            planned = one["planned"].get(stage)
            ratio = None if planned is None else f"{seconds / planned:.2f}"
            rows.append([f"{one['products']:,} {stage}", seconds, planned, ratio])
    return table(["stage", "measured, s", "planned, s", "measured ÷ planned"], rows)


if __name__ == "__main__":
    main()
