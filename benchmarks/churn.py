"""What time does to IDs: a catalogue grows by appends and by full re-IDs; writes benchmarks/results/churn.md.

    python benchmarks/churn.py --root DATA/bigbasket [--encoder FOLDER] [--render JSON]

The catalogue is put in a seeded order and cut so that five steps of 5 % end at all of it. Day 0: a quantizer is trained on the
first part and IDs are assigned. Then either five appends, one a step; or one full re-ID on all of it, with and without a
warm start and with and without realignment, each against day 0. Products are embedded once, before, so that all share their
vectors. No generator is trained: the subject is the IDs. The last line printed is one JSON object.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import RECIPES, RESULTS, finish, machine, parser_of, table

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.text import HuggingFaceEncoder, LsaEncoder, join_text
from catid2_ray.config import Recipe
from catid2_ray.evaluation.tables import shown
from catid2_ray.on_ray.job import Job, PreviousRelease
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.arrays import fixed_lists
from catid2_ray.on_ray.stages import catalog, embed, realign, train_quantizer
from catid2_ray.on_ray.stages.assign import stage

RECIPE = RECIPES / "compare_ids.yaml"
STEPS, GROWTH = 5, 0.05
GENTLE = {"quantizer.warm_start": True, "ids.realign": True, "quantizer.epochs": 5}
RE_IDS = {
    "cold": {"quantizer.warm_start": False, "ids.realign": False},
    "cold, realigned": {"quantizer.warm_start": False, "ids.realign": True},
    "warm": {"quantizer.warm_start": True, "ids.realign": False},
    "warm, realigned": {"quantizer.warm_start": True, "ids.realign": True},
    "warm, realigned, 5 epochs at a tenth of the rate": GENTLE | {"quantizer.learning_rate": 2e-4},
    "warm, realigned, 5 epochs at a hundredth": GENTLE | {"quantizer.learning_rate": 2e-5},
}


def embedded(root: str, encoder: str) -> pa.Table:
    """The whole catalogue in a seeded order, with vectors of title and description."""
    table = pq.read_table(Path(root) / "products.parquet")
    wanted = [name for name in ("product_id", "title", "description", "category_path") if name in table.column_names]
    table = table.select(wanted).take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
    texts = join_text(table, ("title", "description"))
    if encoder == "lsa":
        vectors = LsaEncoder.fit(texts, width=128, vocabulary=50_000, seed=0).encode(texts)
    else:
        vectors = HuggingFaceEncoder(encoder, batch=64, tokens=64).encode(texts)
    return table.append_column("embedding", fixed_lists(np.asarray(vectors, np.float32), pa.float32()))


class World:
    """One store; `run` makes the parts of one day, on a base or not."""

    def __init__(self, folder: Path, table: pa.Table, overrides: list[str]):
        self.folder, self.table, self.overrides = folder, table, overrides

    def run(
        self, rows: int, base: PreviousRelease | None, *, keeps: bool = False, settings: dict | None = None
    ) -> PreviousRelease:
        root = self.folder / f"data-{rows}"
        if not root.exists():
            root.mkdir()
            pq.write_table(self.table.slice(0, rows), root / "products.parquet")
        extra = [f"{name}={json.dumps(value)}" for name, value in (settings or {}).items()]
        recipe = Recipe.load(RECIPE, [f"catalog.root={root}", f"store={self.folder}/store", *self.overrides, *extra])
        with cluster.PeakMemory() as peak:
            job = Job(recipe=recipe, store=Store(recipe.store), peak=peak, previous=base)
            parts: dict[str, Manifest] = {"catalog": catalog.run(job, {})}
            parts["embeddings"] = embed.run(job, parts, frozen=base.parts if keeps else None)
            if keeps:
                parts["quantizer"] = base.parts["quantizer"]
            else:
                parts["quantizer"] = train_quantizer.run(job, parts)
                parts["quantizer"] = realign.run(job, parts)
            parts["ids"] = stage.run(job, parts, keeps=keeps)
        return PreviousRelease(Release(name=f"r-{parts['ids'].digest[:12]}", parts={}), parts)


def row_of(name: str, day: PreviousRelease) -> dict:
    metrics = day.parts["ids"].metrics
    quality, churn = metrics["quality"], metrics["churn"]
    return {
        "name": name, "products": metrics["documents"], "encoded": metrics["encoded"], "ledger": metrics["ledger"],
        "churn": churn and churn["after"]["prefix_churn"],
        "churn_before": churn and churn.get("before", {}).get("prefix_churn"),
        "reused": churn and churn["after"]["address_reuse"], "collision_rate": metrics["collision_rate_before"],
        "purity": quality["final"]["purity"], "ami": quality["final"]["ami"], "moved_share": quality["displacement"]["moved_share"],
        "mean_cost": quality["displacement"]["mean_cost"], "seconds": metrics["seconds"],
        "seconds_quantizer": day.parts["quantizer"].metrics.get("seconds_training", day.parts["quantizer"].metrics["seconds"]),
    }  # fmt: skip


def measure(folder: Path, table: pa.Table, overrides: list[str]) -> list[dict]:
    total = table.num_rows
    sizes = [round(total / (1 + GROWTH) ** (STEPS - step)) for step in range(STEPS + 1)]
    world = World(folder, table, overrides)
    first = world.run(sizes[0], None)
    rows, day = [row_of("day 0", first)], first
    for step, size in enumerate(sizes[1:]):
        day = world.run(size, day, keeps=True)
        rows.append(row_of(f"append {step + 1}", day))
    for name, settings in RE_IDS.items():
        rows.append(row_of(f"re-ID {name}", world.run(total, first, settings=settings)))
    rows.append(row_of("re-ID from nothing", world.run(total, None)))
    return rows


def report(rows: list[dict], recipe: Recipe, encoder: str, name: str) -> str:
    names = [
        "run",
        "products",
        "encoded",
        "first 1 … L tokens changed",
        "… without realignment",
        "IDs that name another product",
    ]
    names += ["collisions before", "purity of 1, 2, 3 tokens", "AMI of 1, 2, 3 tokens", "moved", "mean cost of a move"]
    lines = [
        [row["name"], row["products"], row["encoded"], shown(row["churn"], ".1%"), shown(row["churn_before"], ".1%"),
         shown(row["reused"], ".1%"), shown(row["collision_rate"], ".2%"), shown(row["purity"], ".3f"), shown(row["ami"], ".3f"),
         shown(row["moved_share"], ".2%"), shown(row["mean_cost"], ".4f")]
        for row in rows
    ]  # fmt: skip
    quantizer = recipe.quantizer
    return (
        f"# IDs through time on {name}\n\n"
        f"Written by `benchmarks/churn.py` with `jobs/recipes/compare_ids.yaml`: kind {quantizer.kind}, codes_per_level "
        f"{list(quantizer.codes_per_level)}, epochs {quantizer.epochs}, batch {quantizer.batch}, encoder {quantizer.encoder}; "
        "one seed. "
        f"Embedding: {encoder} of title and description, without categories. Machine: {machine()}.\n\n"
        "Changes of an append are counted against the day before, those of a re-ID against day 0, on products of both. "
        "*Collisions before* are among the products that were encoded (in an append: the new ones, against all). Purity and AMI "
        "are those of all published IDs. *Moved* are products whose code de-duplication changed in that run, *cost* the squared "
        "distance that this added.\n\n" + table(names, lines)
    )


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "churn.md", stored="the figures of an earlier run")
    parser.add_argument("--root", help="folder with products.parquet")
    parser.add_argument("--encoder", default="lsa", help="sentence encoder: id or folder; default the built-in lsa")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    options = parser.parse_args()
    if not options.root:
        print(json.dumps({"skipped": "no catalogue: give --root FOLDER"}))
        return
    recipe = Recipe.load(RECIPE, [f"catalog.root={options.root}", *options.overrides])
    if options.render:
        rows = json.loads(options.render.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            products = embedded(options.root, options.encoder)
            cluster.connect(recipe.cluster, workers=recipe.quantizer.workers)
            try:
                rows = measure(Path(folder), products, options.overrides)
            finally:
                cluster.disconnect()
    encoder, name = Path(options.encoder).name, Path(options.root).name
    finish(rows, lambda rows: report(rows, recipe, encoder, name), options)


if __name__ == "__main__":
    main()
