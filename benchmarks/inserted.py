"""Of products inserted while serving, how many are among the first ten for their exact title.

    python benchmarks/inserted.py --store STORE [--release NAME] [--count 200] [--seeds 1,2,3] [--json FILE]
        [--out benchmarks/results/inserted.md]

STORE has a release of a generated catalogue, such as quickstart's, with an encoder of its own. For each seed the products are the
first of another generated shop whose titles the release lacks, once each. They get IDs and vectors as PUT /v1/products gives them,
all in one request, and are asked for one by one by their titles, k 1,000, with the release's own serving settings. Beside it the
control: the same search where the generator's word on IDs that it has never met counts as it is (`LiveTensors.fair`).
"""

import contextlib
import json
import time

import numpy as np
from harness import RESULTS, finish, parser_of, rounded, table, where, wholes

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.on_ray.machine.live_log import _newcomers
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.serve.newcomers import Newcomers
from catid2_ray.retrieval.trie_tensors import LiveTensors

FIRST, GOAL, MOST = 10, 0.95, 1000


def asked(retriever, count: int, seed: int) -> list[dict]:
    """`count` products of another shop, as a caller describes them."""
    known = {retriever.products.title(row) for row in range(retriever.trie.rows)}
    table = generate(products=20 * count, queries=1, seed=1000 + seed).products.to_pylist()
    fresh = {row["title"]: row for row in reversed(table) if row["title"] not in known}
    return [
        {
            "product_id": f"inserted {seed} {number}",
            **{name: row[name] for name in ("title", "description", "category_path")},
        }
        for number, row in enumerate(list(fresh.values())[-count:])
    ]


@contextlib.contextmanager
def its_own_word():
    """The generator's word on nodes that it has never met counts."""
    fair, LiveTensors.fair = LiveTensors.fair, lambda self, level, place, children, step_BMC: step_BMC
    yield
    LiveTensors.fair = fair


def ranks(retriever, products: list[dict]) -> list[int]:
    """The place of each product for its title, from 1 on; MOST + 1 where it is not found."""
    found = []
    for one in products:
        hits = [hit.product_id for hit in retriever.retrieve([one["title"]], k=MOST)[0]]
        found.append(hits.index(one["product_id"]) + 1 if one["product_id"] in hits else MOST + 1)
    return found


def measured(options) -> dict:
    store = Store(options.store)
    release = releases.load(store, options.release) if options.release else releases.current(store)
    folder, parts = releases.release_folder(store, release, releases.default_cache()), release.manifests(store)
    figures, runs = where("inserted") | {"release": release.name, "count": options.count}, []
    for seed in options.seeds:
        retriever, newcomers = open_retriever(folder), Newcomers(store, parts)
        products, start = asked(retriever, options.count, seed), time.process_time()
        vectors = retriever.products.base_vectors is not None
        made = newcomers.prepare(products, retriever.live.view, vectors=vectors)
        retriever.put(*_newcomers(retriever, made))
        spent = time.process_time() - start
        run = {"seed": seed, "inserted": len(products), "insert_s": spent, "ranks": ranks(retriever, products)}
        with its_own_word():
            run["control"] = ranks(retriever, products)
        runs.append(run)
        print({name: sum(rank <= FIRST for rank in run[name]) for name in ("ranks", "control")}, flush=True)
    settings = json.loads((folder / "retriever.json").read_text())
    figures |= {
        "products": retriever.trie.rows,
        "search": settings.get("search"),
        "lookahead": settings.get("lookahead"),
    }
    return rounded(figures | {"runs": runs})


def report(figures: dict) -> str:
    rows = []
    for run in figures["runs"]:
        for how, name in (("as served", "ranks"), ("control: the generator's own word", "control")):
            ranks = np.array(run[name])
            rows.append(
                [
                    f"{how}, seed {run['seed']}",
                    *(int((ranks <= k).sum()) for k in (1, FIRST, 100, MOST)),
                    int(np.median(ranks)),
                ]
            )
    head = (
        "products inserted",
        "first",
        f"in the first {FIRST}",
        "in the first 100",
        f"in the first {MOST:,}",
        "median place",
    )
    weights = ", ".join(f"{name} {value}" for name, value in (figures["lookahead"] or {}).items())
    return (
        "# Inserted products, asked for by their exact titles\n\nWritten by `benchmarks/inserted.py`: release "
        f"{figures['release']} of {figures['products']:,} products, search {figures['search']} ({weights}), {figures['count']} "
        f"inserted at once, each asked for alone. Machine: {figures['machine']}.\n\n" + table(head, rows)
    )


if __name__ == "__main__":
    parser = parser_of(__doc__, page=RESULTS / "inserted.md")
    parser.add_argument("--store", help="store with a release")
    parser.add_argument("--release", help="none = the current one")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seeds", type=wholes, default=[1, 2, 3])
    options = parser.parse_args()
    if options.store:
        finish(measured(options), report, options)
    else:
        print(json.dumps({"skipped": "no store: give --store"}))
