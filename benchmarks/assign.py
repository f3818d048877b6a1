"""From a table of embeddings to committed unique IDs: time, memory and growth of the whole of stage 2, and of what is before it.

    python benchmarks/assign.py [--products 1e5,1e6] [--rate 0.1] [--width 64] [--workers 2] [--folder DIR] [--json FILE]

What is timed, for each number of products N:
    reading      `stages.catalog` and `stages.embed`: parquet → rows checked and laid out in parts → embeddings
    assigning    `stages.assign`: embeddings → codes → collisions resolved → IDs, ledger, products in ID order, trie, quality
                 report, manifest; its passes apart
Memory is the summed PSS of all processes of the job (the object store is part of it), and VmHWM of single workers and, while it
assigns, of the job's own process.

The catalogue: a share `--rate` of the products are near-copies of others, so that they get the same codes: most in twos and
threes, some in families of up to 500, which overflow their prefix. The quantizer has an encoder of random weights and codebooks
fitted by k-means on a sample: what it costs does not depend on what it learned. Encoding is also timed alone, in one process
of one thread, beside the rate of one large matrix product in the same process. The last line printed is one JSON object.

N products, D embedding width.
"""

import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harness import RESULTS, finish, machine, parser_of, table, wholes, write_page

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.machine.arrays import fixed_lists
from catid2_ray.on_ray.pipeline import chain
from catid2_ray.on_ray.stages.assign import stage
from catid2_ray.quantizer.model import ResidualQuantizer

HIDDEN, LATENT, CODES = (256, 128), 32, (256, 256, 256, 256)
FILE_ROWS = 500_000
LARGEST_FAMILY, IN_FAMILIES = 500, 0.1  # a tenth of the copies are in large families


def sources(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """int64 N: the product whose vector each product copies, its own number for most."""
    source = np.arange(count)
    copies = int(rate * count)
    if not copies:
        return source
    chosen = rng.permutation(count)
    large = np.minimum(np.arange(int(copies * IN_FAMILIES)) // (LARGEST_FAMILY - 1), count - 1)
    source[chosen[: len(large)]] = chosen[count - 1 - large]
    rest = chosen[len(large) : copies]
    source[rest] = chosen[copies + rng.integers(0, max(1, (count - copies) // 2), len(rest))]
    return source


def write_catalogue(folder: Path, count: int, *, width: int, rate: float, seed: int) -> None:
    """products/part-*.parquet: product_id, title, embedding; vectors are functions of their number, so files are independent."""
    (folder / "products").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    source, mix = sources(count, rate, rng), rng.normal(size=(16, width)).astype(np.float32)
    for start in range(0, count, FILE_ROWS):
        number = np.arange(start, min(start + FILE_ROWS, count))
        from_N = source[number]
        # 16 hidden factors and some noise, from a counter-based generator: the same source gives the same vector.
        unit = hashed_normals(from_N, width + 16)
        vectors = unit[:, :16] @ mix + 0.7 * unit[:, 16:]
        vectors += (from_N != number)[:, None] * np.float32(1e-4) * hashed_normals(number + count, width)
        names = pa.array([f"B{value:09d}" for value in number.tolist()])
        table = pa.table(
            {"product_id": names, "title": names, "embedding": fixed_lists(vectors.astype(np.float32), pa.float32())}
        )
        pq.write_table(table, folder / "products" / f"part-{start // FILE_ROWS:05d}.parquet", compression="none")


def hashed_normals(number_N: np.ndarray, width: int) -> np.ndarray:
    """float32 N×width, about standard normal, each row a function of its number alone: sums of hashed uniforms."""
    key = number_N.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(width, dtype=np.uint64)
    key = (key + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(31)
    key *= np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(29)
    total = sum(((key >> np.uint64(16 * part)) & np.uint64(0xFFFF)).astype(np.float32) for part in range(4))
    return (total / np.float32(65536) - 2) * np.float32(math.sqrt(3))


def quantizer_of(job: Job, parts: dict[str, Manifest], width: int) -> Manifest:
    """A committed quantizer of random weights and fitted codebooks."""
    torch.manual_seed(0)
    model = ResidualQuantizer(width=width, hidden=HIDDEN, latent=LATENT, codes_per_level=CODES)
    entry = parts["embeddings"].parts()[0]
    table = job.store.read_table(parts["embeddings"].file(entry["name"]), columns=["embedding"]).slice(0, 20_000)
    sample = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    model.initialise_codebooks(torch.from_numpy(sample.copy()), seed=0)
    attempt = Attempt(job.store, "quantizer", settings={"benchmark": width}, parents={}, recipe={})
    with tempfile.TemporaryDirectory() as local:
        model.save(local)
        (Path(local) / "history.json").write_text("[]")
        return attempt.commit(job.store.upload(Path(local), attempt.folder), metrics={})


def encoding_alone(width: int, rows: int = 100_000) -> dict:
    """Products/s of the encoder and the codebooks, and its share of this process's matrix-product rate; one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ResidualQuantizer(width=width, hidden=HIDDEN, latent=LATENT, codes_per_level=CODES).eval()
    vectors, square = torch.randn(rows, width), torch.randn(1024, 1024)
    widths = (width, *HIDDEN, LATENT)
    work = 2 * sum(a * b for a, b in zip(widths, widths[1:])) + 2 * LATENT * sum(CODES)
    seconds, product = [], []
    for _ in range(5):
        started = time.perf_counter()
        model.encode_padded(vectors, rows=1024)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(20):
            square @ square
        product.append((time.perf_counter() - started) / 20)
    taken, rate = sorted(seconds)[2], 2 * 1024**3 / sorted(product)[2]
    return {
        "products_per_s": round(rows / taken), "gflops": round(rows * work / taken / 1e9, 1),
        "matrix_product_gflops": round(rate / 1e9, 1), "share_of_rate": round(rows * work / taken / rate, 3),
    }  # fmt: skip


def run(folder: Path, count: int, options) -> dict:
    write_catalogue(folder, count, width=options.width, rate=options.rate, seed=0)
    recipe = Recipe.build(
        {
            "store": str(folder / "store"), "catalog": {"root": str(folder), "rows_per_part": options.part_rows},
            "cluster": {"object_store_mb": options.object_store_mb},
            "embedding": {"workers": options.workers},
            "quantizer": {"kind": "tiger", "codes_per_level": CODES},
            "ids": {"workers": options.workers, "bucket_rows": options.bucket_rows, "method": options.method},
        }
    )  # fmt: skip
    with cluster.PeakMemory() as peak:
        job = Job(recipe=recipe, store=Store(recipe.store), peak=peak)
        started = time.monotonic()
        parts = chain(job, "embeddings")
        reading = time.monotonic() - started
        parts["quantizer"] = quantizer_of(job, parts, options.width)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        started = time.monotonic()
        ids = stage.run(job, parts)
        assigning, own = time.monotonic() - started, own_peak_bytes()
    metrics = ids.metrics
    return {
        "products": count,
        "reading_s": round(reading, 1),
        "reading_peak_gib": _gib(max(parts[part].metrics["peak_memory_bytes"] for part in ("catalog", "embeddings"))),
        "assigning_s": round(assigning, 1),
        "assigning_peak_gib": _gib(metrics["peak_memory_bytes"]),
        "own_peak_gib": _gib(own),
        "passes_s": metrics["seconds_of_passes"],
        "products_per_s": round(count / assigning),
        "worker_peak_gib": {name: _gib(value) for name, value in metrics["worker_peak_bytes"].items()},
        "collision_rate": round(metrics["collision_rate_before"], 4),
        "duplicates_after": metrics["duplicates_after"],
        "resolution": metrics["resolution"],
        "trie_rows": metrics["documents"],
    }


def own_peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _gib(value: int) -> float:
    return round(value / 2**30, 2)


def exponent(runs: list[dict], name: str) -> float | None:
    """Slope of log time against log N."""
    if len(runs) < 2:
        return None
    x, y = np.log([run["products"] for run in runs]), np.log([run[name] for run in runs])
    return round(float(np.polyfit(x, y, 1)[0]), 3)


PASSES = ("encoding", "resolving", "writing", "ordering", "describing")


def report(figures: list[dict]) -> str:
    """Markdown of several runs of this file."""
    first, alone = figures[0], figures[0]["encoding_alone"]
    names = ["products", "collisions", "duplicates after", "reading", "assigning", "products/s", *PASSES]
    names += ["memory, reading", "memory, assigning", "worker", "own process"]
    rows = [
        [run["products"], f"{run['collision_rate']:.1%}", run["duplicates_after"], f"{run['reading_s']:.0f} s",
         f"{run['assigning_s']:.0f} s", run["products_per_s"], *(f"{run['passes_s'].get(name, 0):.0f} s" for name in PASSES),
         f"{run['reading_peak_gib']:.1f} GiB", f"{run['assigning_peak_gib']:.1f} GiB",
         f"{max(run['worker_peak_gib'].values()):.2f} GiB", f"{run['own_peak_gib']:.2f} GiB"]
        for each in figures for run in each["runs"]
    ]  # fmt: skip
    return (
        "# From a table of embeddings to unique IDs\n\n"
        f"Written by `benchmarks/assign.py`. Machine: {first['machine']}. "
        f"Width {first['width']}, encoder {first['encoder']}, codes {list(first['codes_per_level'])}, {first['workers']} workers, "
        f"parts of {first['part_rows']:,} and buckets of {first['bucket_rows']:,} products (`ids.bucket_rows`), "
        f"method {first['method']}. *Reading* is the table checked and laid out in parts, *assigning* is from embeddings to "
        "the committed artefact: IDs, ledger, trie, products in ID order, quality report. "
        "Memory is the summed PSS of all processes of the job, *worker* the most that one worker held (interpreter, "
        "torch and mapped files included), *own process* the most that the job's own process held while it assigned.\n\n"
        + table(names, rows)
        + f"\nExponent of the time of assigning against the number of products: {first['exponent_assigning']}; of reading: "
        f"{first['exponent_reading']}. Encoding alone, one process, one thread: {alone['products_per_s']:,} products/s, "
        f"{alone['gflops']} GFLOP/s, {alone['share_of_rate']:.0%} of the rate of a 1024³ matrix product in the same process."
    )


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "assign.md")
    parser.add_argument("--products", type=wholes, default=[20_000], help="numbers of products, as 1e5,1e6,1e7")
    parser.add_argument("--rate", type=float, default=0.1, help="share of the products that are near-copies")
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part-rows", type=int, default=131_072, help="catalog.rows_per_part")
    parser.add_argument("--bucket-rows", type=int, default=1_000_000, help="ids.bucket_rows")
    parser.add_argument("--object-store-mb", type=int, default=400, help="of the Ray that is started")
    parser.add_argument("--method", default="exact")
    parser.add_argument("--folder", help="where the catalogue and the store lie meanwhile; default: a temporary folder")
    parser.add_argument("--render", nargs="*", type=Path, help="write the page from the figures of earlier runs")
    options = parser.parse_args()
    if options.render:
        figures = [json.loads(path.read_text()) for path in options.render]
        write_page(options.out, report(figures))
        print(json.dumps(figures))
        return
    runs = []
    for count in options.products:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            try:
                runs.append(run(Path(folder), count, options))
            finally:
                cluster.disconnect()
                shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(runs[-1]), flush=True)
    figures = {
        "machine": machine(), "rate": options.rate, "width": options.width, "workers": options.workers,
        "part_rows": options.part_rows, "bucket_rows": options.bucket_rows, "method": options.method,
        "encoder": [options.width, *HIDDEN, LATENT], "codes_per_level": CODES, "load_average": os.getloadavg()[0],
        "encoding_alone": encoding_alone(options.width), "runs": runs,
        "exponent_assigning": exponent(runs, "assigning_s"), "exponent_reading": exponent(runs, "reading_s"),
    }  # fmt: skip
    finish(figures, None, options)


if __name__ == "__main__":
    main()
