"""What a recipe takes at a given number of products: machine-hours, memory, storage, transfer and cost, stage by stage.

Arithmetic over rates; nothing is read but the recipe. Each rate quotes the line of a benchmark's page that it comes from, and a
test holds the two together; what nobody measured says "assumed". Rates of one core are taken to add up: an estimate of the order of
size, not a promise. Not counted: adapter, mixture and evaluation, which learn from and ask bounded samples whatever the size, and
the start of machines.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from catid2_ray.config import Recipe
from catid2_ray.config.sizes import examples_an_epoch, sized
from catid2_ray.errors import CapacityError, InputError

ASSUMED = "assumed"


class Rate(NamedTuple):
    """`value` follows from `quote`, words of the page `source` (under benchmarks/results/); both empty where it is assumed."""

    value: float
    unit: str
    source: str = ASSUMED
    quote: str = ""


RATES = {
    # 10^7 products by two workers: 103 s of reading, 106 s of assigning, with the start of a job among them.
    "read": Rate(1e7 / 103 / 2, "products/s a CPU", "assign.md", "| 10,000,000 | 11.4% | 0 | 103 s | 106 s |"),
    "assign": Rate(1e7 / 106 / 2, "products/s a CPU", "assign.md", "| 10,000,000 | 11.4% | 0 | 103 s | 106 s |"),
    # That was at width 64. What a product took at width 384: (5.4 − 1.05) and (8.4 − 3.85) s for 80,000 more.
    "read_number": Rate(
        ((5.4 - 1.05) / 0.08 - 20.6) / 320, "µs a number of a vector beyond 64", "plan.md", "| catalog | 1.05 | 5.4 |"
    ),
    "assign_number": Rate(
        ((8.4 - 3.85) / 0.08 - 21.4) / 320, "µs a number of a vector beyond 64", "plan.md", "| ids | 3.85 | 8.4 |"
    ),
    "assign_start": Rate(3.85 - 1.14, "s, whatever the size", "plan.md", "| ids | 3.85 | 8.4 |"),
    "assign_memory": Rate(0.93, "GiB a worker", "assign.md", "| 3.6 GiB | 3.0 GiB | 0.93 GiB |"),
    "read_memory": Rate(3.6 / 2, "GiB a worker", "assign.md", "| 3.6 GiB | 3.0 GiB | 0.93 GiB |"),
    # 54,667 products of Home Depot by two workers, all-MiniLM-L6-v2, on a busy machine.
    "embed": Rate(54_667 / 378.0 / 2, "products/s a CPU", "home_depot.md", "| embed | 378.0 s |"),
    # 20,000 pairs for one epoch, the same encoder; more pairs than tuning.pairs are never used.
    "tune": Rate(20_000 / (18 * 60), "pairs/s a CPU", "encoder.md", "18 minutes of one core"),
    "node_vectors": Rate(54_667 / 3.9, "products/s, in one process", "home_depot.md", "| node vectors | 3.9 s |"),
    "serving": Rate(54_667 / 4.2, "products/s, in one process", "home_depot.md", "| serving | 4.2 s |"),
    "embed_gpu": Rate(5_000, "products/s a GPU"),
    "embed_memory": Rate(2.0, "GiB a worker"),
    # Three epochs of 80,000 rows more took 69.6 − 34.1 s in a job; its step alone does 10,071 rows/s (quantizer_step.json).
    "quantizer": Rate(240_000 / (69.6 - 34.1), "rows/s a CPU", "plan.md", "| quantizer | 34.1 | 69.6 |"),
    "quantizer_start": Rate(34.1 - 8.875, "s, k-means of 20,000 rows", "plan.md", "| quantizer | 34.1 | 69.6 |"),
    "quantizer_memory": Rate(0.54, "GiB a worker", "quantizer_step.json", '"ours": 551.8'),
    "generator_small": Rate(397.9, "examples/s a CPU", "generator_step.md", "| 0.643 | 397.9 |"),
    "generator_encoder_decoder": Rate(140.5, "examples/s a CPU", "generator_step.md", "| 1.823 | 140.5 |"),
    "generator_t5": Rate(5.1, "examples/s a CPU", "generator_step.md", "| 6.293 | 5.1 |"),
    "generator_causal": Rate(5.1, "examples/s a CPU"),  # as a T5 of 205 million weights
    # The rates above are of titles and queries. Queries alone are shorter: 8,000 more took 14.65 − 4.0 s.
    "generator_query": Rate(
        8000 / (14.65 - 4.0) / 397.9, "× the rate of titles and queries", "plan.md", "| generator | 4 | 14.65 |"
    ),
    "generator_start": Rate(4.0 - 2.66, "s, whatever the size", "plan.md", "| generator | 4 | 14.65 |"),
    "generator_memory": Rate(5.1, "GiB a worker", "generator_step.md", "| 40% | 5.10 GiB |"),
    "gpu": Rate(30.0, "× a CPU, in training"),
    "trie": Rate(0.2348, "µs an ID, in one process", "trie.md", "| 10,000,000 | 0.2348 |"),
    # Of the job's own process: what it took at 10^7, files that it does not map any more included, and 4 bytes for each product
    # that de-duplication moves, 14 % of them.
    "own_memory": Rate(1.22, "GiB, of the job's own process", "assign.md", "1.01, 1.09, 1.22 and 1.79 GiB"),
    "own_moved": Rate(
        0.56, "bytes a product, of the job's own process", "assign.md", "| 30,000,000 | 13.8% | 0 | 224 s |"
    ),
    "trie_bytes": Rate(7.445 + 1.855, "bytes a product", "trie.md", "| 7.445 | 1.855 |"),
    "download": Rate(45.58, "MB/s a CPU", "store.md", "| 2.479 | 45.58 |"),
    "text": Rate(500, "bytes a product, in parquet"),
    "pairs": Rate(0.1, "training pairs a product"),
    "transfers": Rate(3, "times that stages read what others wrote"),
}
_GIB, _HOUR = 2**30, 3600
_RATED_WIDTH = 64  # of the vectors in assign.md
_CPUS = 16  # of a machine of the pool cpu-data (cluster.yaml)
PRICES = ("cpu-data", "gpu-train", "storage", "transfer")


class Row(NamedTuple):
    """`seconds` by the clock, `machines` of `pool` at work meanwhile, `gib` of the largest worker."""

    stage: str
    pool: str
    machines: int
    seconds: float
    gib: float

    @property
    def hours(self) -> float:
        return self.machines * self.seconds / _HOUR


def plan(recipe: Recipe, *, products: int, width: int = 384, prices: Mapping[str, float] | None = None) -> dict:
    """Ready for JSON: `products`, `stages` (stage, pool, machines, hours by the clock, machine_hours, memory_gib a worker, cost),
    `driver_gib`, `storage_gb`, `transfer_gb`, `cost` (its parts and the sum; None without prices), `rates` (value, unit, source).

    `width`: D of the vectors, where the recipe does not say it. `prices`: of PRICES, an hour of a machine of each pool, a GB a
    month, a GB moved. Raises CapacityError where the recipe has fewer IDs than products.
    """
    teaching = round(RATES["pairs"].value * products)
    recipe = sized(recipe, products=products, teaching=teaching).recipe
    quantizer = recipe.quantizer
    if quantizer.coder != "tree" and quantizer.ids == "unique" and products > quantizer.space.capacity:
        raise CapacityError(
            f"{products:,} products do not fit into {quantizer.space.capacity:,} IDs of {list(quantizer.codes_per_level)}: raise "
            "quantizer.codes_per_level"
        )
    width = recipe.embedding.width or width
    rows = [_reading(recipe, products, width), *_tuning(recipe, teaching), *_embedding(recipe, products)]
    rows += [
        *_training(recipe, products, teaching),
        _assigning(recipe, products, width),
        *_laying_out(recipe, products),
    ]
    stored = products * (RATES["text"].value + 4 * width + 2 * width + RATES["trie_bytes"].value) / 1e9
    figures = {
        "products": products,
        "stages": [_shown(row, prices) for row in rows],
        "driver_gib": round(RATES["own_memory"].value + products * RATES["own_moved"].value / _GIB, 2),
        "storage_gb": round(stored, 3),
        "transfer_gb": round(stored * RATES["transfers"].value, 3),
        "rates": {
            name: {"value": rate.value, "unit": rate.unit, "source": rate.source} for name, rate in RATES.items()
        },
    }
    return figures | {"cost": _cost(figures, prices)}


def _each_s(work: str, width: int) -> float:
    """CPU seconds that `read` or `assign` takes for a product with a vector of this width."""
    return 1 / RATES[work].value + 1e-6 * RATES[f"{work}_number"].value * (width - _RATED_WIDTH)


def _reading(recipe: Recipe, products: int, width: int) -> Row:
    workers = recipe.catalog.workers
    download_s = RATES["text"].value / (1e6 * RATES["download"].value)
    seconds = products * (_each_s("read", width) + download_s) / workers
    return Row("catalog", "cpu-data", _machines(workers), seconds, RATES["read_memory"].value)


def _tuning(recipe: Recipe, teaching: int) -> list[Row]:
    if recipe.embedding.encoder_mode == "frozen":
        return []
    seconds = min(teaching, recipe.tuning.pairs) * recipe.tuning.epochs / RATES["tune"].value
    return [Row("tuned_encoder", "cpu-data", 1, seconds, RATES["embed_memory"].value)]


def _embedding(recipe: Recipe, products: int) -> list[Row]:
    embedding = recipe.embedding
    if embedding.source == "given" or embedding.encoder == "lsa":  # lsa is fast beside an encoder; nobody measured it
        return []
    gpus = embedding.gpus_per_worker
    rate = RATES["embed_gpu" if gpus else "embed"].value * (gpus or 1)
    machines = math.ceil(embedding.workers * gpus) if gpus else _machines(embedding.workers)
    seconds = products / (rate * embedding.workers)
    return [Row("embeddings", "gpu-train" if gpus else "cpu-data", machines, seconds, RATES["embed_memory"].value)]


def _training(recipe: Recipe, products: int, teaching: int) -> list[Row]:
    quantizer, generator, rows = recipe.quantizer, recipe.generator, []
    if quantizer.coder == "rq_vae":
        work = products * quantizer.epochs / RATES["quantizer"].value
        rows.append(_trained(recipe, "quantizer", work, quantizer.workers, RATES["quantizer_memory"].value))
    rate, work = RATES[f"generator_{generator.kind}"].value, 0.0
    for stage in generator.plan:
        examples = stage.epochs * examples_an_epoch(stage.mix, teaching=teaching, products=products)
        short = teaching and {kind for kind, ratio in stage.mix.items() if ratio} == {"query"}
        work += examples / rate / (RATES["generator_query"].value if short else 1)
    rows.append(_trained(recipe, "generator", work, generator.workers, RATES["generator_memory"].value))
    return rows


def _trained(recipe: Recipe, stage: str, cpu_seconds: float, workers: int, gib: float) -> Row:
    """A worker on a machine of its own where it has a GPU."""
    gpus = recipe.cluster.gpus_per_worker
    seconds = RATES[f"{stage}_start"].value + cpu_seconds / workers / (RATES["gpu"].value if gpus else 1)
    return Row(stage, "gpu-train" if gpus else "cpu-data", workers if gpus else _machines(workers), seconds, gib)


def _assigning(recipe: Recipe, products: int, width: int) -> Row:
    workers = recipe.ids.workers
    seconds = RATES["assign_start"].value + products * (_each_s("assign", width) / workers + 1e-6 * RATES["trie"].value)
    return Row("ids", "cpu-data", _machines(workers), seconds, RATES["assign_memory"].value)


def _laying_out(recipe: Recipe, products: int) -> list[Row]:
    """What a search looks ahead by, and the vectors and words that a replica reads: this process writes them range by range."""
    serving, asks = recipe.serving, recipe.embedding.source != "given" or recipe.serving.query_encoder is not None
    names = [
        *(["node_vectors"] if asks and serving.node_depth else []),
        *(["serving"] if serving.expansion is not None or (asks and serving.looks_ahead) else []),
    ]
    return [Row(name, "cpu-data", 1, products / RATES[name].value, RATES["own_memory"].value) for name in names]


def _machines(workers: int) -> int:
    return math.ceil(workers / _CPUS)


def _shown(row: Row, prices: Mapping[str, float] | None) -> dict:
    cost = None if prices is None else round(row.hours * prices[row.pool], 2)
    return {
        "stage": row.stage, "pool": row.pool, "machines": row.machines, "seconds": round(row.seconds, 1),
        "hours": round(row.seconds / _HOUR, 3),
        "machine_hours": round(row.hours, 3), "memory_gib": row.gib, "cost": cost,
    }  # fmt: skip


def _cost(figures: dict, prices: Mapping[str, float] | None) -> dict | None:
    if prices is None:
        return None
    parts = {
        "machines": round(sum(row["cost"] for row in figures["stages"]), 2),
        "storage, a month": round(figures["storage_gb"] * prices["storage"], 2),
        "transfer": round(figures["transfer_gb"] * prices["transfer"], 2),
    }
    return parts | {"sum": round(sum(parts.values()), 2)}


def read_prices(path: str) -> dict[str, float]:
    """YAML with a number for each of PRICES. Raises InputError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"the file of prices {path} cannot be read ({type(error).__name__}: {error})") from None
    given = values if isinstance(values, dict) else {}
    wrong = [name for name in PRICES if not isinstance(given.get(name), int | float) or given[name] < 0]
    if wrong or set(given) - set(PRICES):
        raise InputError(
            f"{path}: expected a number for each of {', '.join(PRICES)} (an hour of a machine of each pool, a GB a month, a GB "
            f"moved), found {given}"
        )
    return {name: float(given[name]) for name in PRICES}
