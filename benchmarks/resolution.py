"""How fast IDs become unique, and at what added distance: `assign_unique` beside the ways of public systems.

    python benchmarks/resolution.py [--products 1e5,1e6] [--rates 0.01,0.1,0.5] [--families 500] [--json FILE]

One process, no Ray. A case is a number of products and a share of collisions, (N − distinct IDs) / N. In it stand
    exact, sinkhorn, greedy   `assign_unique` by its three methods, checks and sorting of the product_ids included
    regroup_loop              re-encode each group of equal IDs with Sinkhorn, up to 20 rounds (LC-Rec, LETTER)
    nearest_free              one product after the other takes the nearest free code of its prefix
The last two are in collision_rivals.py, have no overflow rule, and stop after --peer-seconds (`finished` is then false).

The catalogue: a product is a centre plus 0.045 of noise (centres have standard deviation (1 + d)^−½ in dimension d).
Centres have 1 … `families` products, by a power law whose exponent is set so that the wanted share of IDs collides: from
the family size that would do it if a family always shared one ID, corrected twice on 100,000 products. The latents are
encoded by residual k-means. `added` is the summed squared distance that resolution adds, also relative to exact; it says
little where duplicates are left. The last line printed is one JSON object.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from collision_rivals import nearest_free_code, regroup_loop
from surroundings import machine, rounded
from threadpoolctl import threadpool_limits

from catid2_ray.docid import DocidSpace
from catid2_ray.identifiers.collisions import SOLVERS, assign_unique, colliding_prefixes

LATENT, CODES_PER_LEVEL = 32, (256,) * 4
SPREAD_Z = ((1 + np.arange(LATENT)) ** -0.5).astype(np.float32)
NOISE = 0.045
ALPHABET = np.array(list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def gaussian(rng, rows: int) -> np.ndarray:
    return rng.standard_normal((rows, LATENT), dtype=np.float32) * SPREAD_Z


def nearest_codes(point_NZ, book_KZ) -> np.ndarray:
    return ((book_KZ**2).sum(axis=1) - 2 * point_NZ @ book_KZ.T).argmin(axis=1)


def codebooks(rng) -> list[np.ndarray]:
    """Residual k-means: five rounds a level on 8,192 centres."""
    point_NZ, books = gaussian(rng, 8192), []
    for codes in CODES_PER_LEVEL:
        book_KZ = point_NZ[rng.choice(len(point_NZ), codes, replace=False)]
        for _ in range(5):
            near_N = nearest_codes(point_NZ, book_KZ)
            total_KZ = np.zeros_like(book_KZ)
            np.add.at(total_KZ, near_N, point_NZ)
            count_K = np.bincount(near_N, minlength=codes)[:, None]
            book_KZ = np.where(count_K > 0, total_KZ / np.maximum(count_K, 1), book_KZ).astype(np.float32)
        point_NZ = point_NZ - book_KZ[nearest_codes(point_NZ, book_KZ)]
        books.append(book_KZ)
    return books


def encode(latent_NZ, books, rows: int = 65_536) -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 N×L and the input of the last level, float32 N×Z."""
    codes_NL, residual_NZ = np.empty((len(latent_NZ), len(books)), np.int64), latent_NZ.copy()
    for start in range(0, len(latent_NZ), rows):
        block = slice(start, start + rows)
        for level, book_KZ in enumerate(books):
            codes_NL[block, level] = nearest_codes(residual_NZ[block], book_KZ)
            if level < len(books) - 1:
                residual_NZ[block] -= book_KZ[codes_NL[block, level]]
    return codes_NL, residual_NZ


def family_sizes(rng, products: int, mean: float, largest: int) -> np.ndarray:
    """Sizes from 1 to `largest` with probability size^−a, a such that the mean is `mean`; they sum to `products`."""
    size = np.arange(1, largest + 1.0)
    low, high = 0.0, 40.0
    for _ in range(60):
        exponent = (low + high) / 2
        weight = size**-exponent
        too_large = (weight * size).sum() / weight.sum() > mean
        low, high = (exponent, high) if too_large else (low, exponent)
    sizes = rng.choice(largest, products, p=weight / weight.sum()) + 1
    count = int(np.searchsorted(np.cumsum(sizes), products)) + 1
    sizes = sizes[:count]
    sizes[-1] -= sizes.sum() - products
    return sizes


def catalogue(products: int, mean: float, largest: int, seed: int):
    """Codes, residuals, codebooks and product_ids ("B0" and eight characters) of shuffled families."""
    rng = np.random.default_rng(seed)
    books = codebooks(rng)
    sizes = family_sizes(rng, products, mean, largest)
    latent_NZ = np.repeat(gaussian(rng, len(sizes)), sizes, axis=0) + NOISE * gaussian(rng, products)
    codes_NL, residual_NZ = encode(latent_NZ[rng.permutation(products)], books)
    number_N, letters_N8 = rng.permutation(products) * 1_327_217 % 36**8, np.empty((products, 8), "U1")
    for place in range(7, -1, -1):
        letters_N8[:, place] = ALPHABET[number_N % 36]
        number_N = number_N // 36
    product_ids = pa.array(np.char.add("B0", np.ascontiguousarray(letters_N8).view("U8")[:, 0]), pa.string())
    return codes_NL, residual_NZ, books, product_ids


def duplicates(codes_NL) -> int:
    """Products beyond the first of their ID."""
    packed_N = np.sort(DocidSpace(CODES_PER_LEVEL).pack(codes_NL))
    return int((packed_N[1:] == packed_N[:-1]).sum())


def mean_family(rate: float, largest: int, products: int, seed: int) -> float:
    """The mean family size at which about `rate` of the products collide."""
    sample, shared = min(products, 100_000), rate
    for _ in range(2):
        codes_NL, *_ = catalogue(sample, 1 / (1 - shared), largest, seed)
        shared = min(shared * rate * sample / max(duplicates(codes_NL), 1), (1 + shared) / 2)
    return 1 / (1 - shared)


def added_by_last_code(codes_NL, new_NL, residual_NZ, book_KZ) -> float:
    moved = np.flatnonzero((new_NL != codes_NL).any(axis=1))
    after, before = (
        ((residual_NZ[moved] - book_KZ[which[moved, -1]]).astype(np.float64) ** 2).sum() for which in (new_NL, codes_NL)
    )
    return float(after - before)


def measure(products: int, rate: float, largest: int, peer_seconds: float, turns: int, seed: int) -> dict:
    """One case: the contenders take turns, medians of seconds are kept."""
    mean = mean_family(rate, largest, products, seed)
    codes_NL, residual_NZ, books, product_ids = catalogue(products, mean, largest, seed)
    space = DocidSpace(CODES_PER_LEVEL)
    packed_N = space.pack(codes_NL)
    home_N = space.prefix_of(packed_N, space.levels - 1)
    _, size = np.unique(home_N[np.isin(home_N, colliding_prefixes(packed_N, space))], return_counts=True)
    runs = {
        method: lambda method=method: assign_unique(codes_NL, residual_NZ, books, product_ids, method=method)
        for method in ("exact", "sinkhorn", "greedy")
    }
    assert set(runs) == set(SOLVERS)
    runs["regroup_loop"] = lambda: regroup_loop(codes_NL, residual_NZ, books[-1], seconds=peer_seconds)
    runs["nearest_free"] = lambda: nearest_free_code(codes_NL, residual_NZ, books[-1], seconds=peer_seconds)
    taken, found = {name: [] for name in runs}, {}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = run()
            taken[name].append(time.perf_counter() - start)
    contenders = {}
    for name, result in found.items():
        ours = name in SOLVERS
        contenders[name] = {
            "seconds": statistics.median(taken[name]),
            "finished": True if ours else result.finished,
            "duplicates_left": duplicates(result.codes_NL),
            "added": result.report["added_cost"]
            if ours
            else added_by_last_code(codes_NL, result.codes_NL, residual_NZ, books[-1]),
        }
        if not ours:
            contenders[name]["rounds"] = result.rounds
    for contender in contenders.values():
        contender["added_over_exact"] = contender["added"] / contenders["exact"]["added"]
        contender["seconds_over_exact"] = contender["seconds"] / contenders["exact"]["seconds"]
    return {
        "products": products, "rate_wanted": rate, "rate": duplicates(codes_NL) / products, "mean_family": mean,
        "colliding_prefixes": len(size), "products_in_them": int(size.sum()), "largest_prefix": int(size.max(initial=0)),
        "overflowed": found["exact"].report["overflowed"],
        "sinkhorn_solved_exactly_instead": found["sinkhorn"].report["solved_exactly_instead"],
        "contenders": contenders,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", default="1e5,1e6", help="N, comma-separated")
    parser.add_argument("--rates", default="0.01,0.1,0.5", help="shares of collisions, comma-separated")
    parser.add_argument("--families", type=int, default=500, help="most products of one centre")
    parser.add_argument("--peer-seconds", type=float, default=120.0, help="cap on each peer in each case")
    parser.add_argument("--turns", type=int, default=1, help="how often each contender runs")
    parser.add_argument("--threads", type=int, default=1, help="of matrix products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    pa.set_cpu_count(options.threads)
    cases = []
    with threadpool_limits(options.threads):
        for products in (int(float(part)) for part in options.products.split(",")):
            for rate in (float(part) for part in options.rates.split(",")):
                case = measure(products, rate, options.families, options.peer_seconds, options.turns, options.seed)
                cases.append(rounded(case))
                brief = {name: contender["seconds"] for name, contender in cases[-1]["contenders"].items()}
                print(f"N={products} collisions={case['rate']:.3f}: seconds {json.dumps(brief)}", flush=True)
    report = {
        "benchmark": "resolution", "machine": machine(), "threads": options.threads, "seed": options.seed,
        "python": platform.python_version(), "numpy": np.__version__, "families": options.families,
        "peer_seconds": options.peer_seconds, "turns": options.turns, "cases": cases,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
