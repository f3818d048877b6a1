"""What a generator finds that reads the user before the query, on a generated log with users. Writes benchmarks/results/users.md.

    python benchmarks/users.py [--kinds cq_sid,cat_id2] [--seeds 2] [--users 1500] [--store FOLDER] [--json FILE] [--render JSON]

CQ-SID's personalised case (2605.14434) without its users: the quickstart shop, and users who each prefer one colour. A user types
a query that products of several colours suit, and mostly clicks one in their own. Their attributes name a band of users who share
three colours, their recent clicks show which is theirs. One generator learns titles, queries, and queries with users, in the
paper's stages. Asked are clicks of the test split: with the query alone, with the user, with half of what is known of the user,
and, as a control, with another user. Hits are counted at an equal beam and at equal products. In this process, without Ray.
"""

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from harness import RESULTS, finish, parser_of, rounded, spread, table, where, whole

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.shop_words import COLOUR_NAMES
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.generator.users import User
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.retrieval.retriever import Retriever

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.in_process import without_ray  # noqa: E402

PRODUCTS, QUERIES, SHOP_SEED = 6000, 2500, 7  # of the quickstart
BANDS, PALETTE = 12, 3  # bands of users, and the colours that each band likes
EVENTS = 12  # queries of a user
LOYAL = 0.9  # how often a user takes their own colour where the query's products have it
ATTRIBUTE_TOKENS, RECENT, QUERY_TOKENS = 6, 3, 32
CUTS = (1, 5, 10, 20)
ASKED = {
    "query alone": (False, False),
    "attributes": (True, False),
    "recent products": (False, True),
    "user": (True, True),
    "another user": (True, True),
}


class Click(NamedTuple):
    query_id: str
    query: str
    split: str
    product: str
    attributes: tuple[str, ...]
    recent: tuple[str, ...]


def colour_of(title: str) -> str:
    """The shop's titles end with "in COLOUR", and a pack."""
    said = title.rpartition(" in ")[2].split(" (")[0].lower()
    return said if said in COLOUR_NAMES else ""


def log_of(shop, *, users: int, seed: int) -> list[Click]:
    """Clicks of all users. A user's clicks of the train split come first, so that those of the others know their history."""
    rng = np.random.default_rng(seed)
    colour = dict(zip(shop.products["product_id"].to_pylist(), map(colour_of, shop.products["title"].to_pylist())))
    suits, queries = defaultdict(list), {}
    for row in shop.pairs.to_pylist():
        if row["relevance"] >= 3:
            suits[row["query_id"]].append(row["product_id"])
            queries[row["query_id"]] = (row["query"], row["split"])
    # Queries whose products have several colours, so that there is a choice.
    open_to = {name: products for name, products in suits.items() if len({colour[one] for one in products}) > 1}
    by_colour = defaultdict(lambda: defaultdict(list))
    for name, products in open_to.items():
        for one in products:
            by_colour[colour[one]][name].append(one)
    palettes = [rng.choice(COLOUR_NAMES, PALETTE, replace=False) for _ in range(BANDS)]
    clicks = []
    for _ in range(users):
        band = int(rng.integers(BANDS))
        own = str(rng.choice(palettes[band]))
        names = list(by_colour[own])
        chosen = [names[at] for at in rng.permutation(len(names))[:EVENTS]]
        chosen.sort(key=lambda name: queries[name][1] != "train")
        recent: list[str] = []
        for name in chosen:
            query, split = queries[name]
            among = by_colour[own][name] if rng.random() < LOYAL else open_to[name]
            product = among[int(rng.integers(len(among)))]
            clicks.append(Click(name, query, split, product, (f"band {chr(97 + band)}",), tuple(recent[-RECENT:])))
            if split == "train":
                recent.append(product)
    return clicks


def write(folder: Path, shop, clicks: list[Click]) -> None:
    """The shop with the clicks as its pairs. Columns of users stand beside those that every table of pairs has."""
    texts = pa.list_(pa.string())
    pairs = pa.table(
        {
            "query_id": [click.query_id for click in clicks],
            "query": [click.query for click in clicks],
            "product_id": [click.product for click in clicks],
            "relevance": pa.array(np.ones(len(clicks))),
            "split": [click.split for click in clicks],
            "user": pa.array([click.attributes for click in clicks], texts),
            "recent": pa.array([click.recent for click in clicks], texts),
        }
    )
    Store(folder).write_table("products.parquet", shop.products)
    Store(folder).write_table("pairs.parquet", pairs)


def recipe_of(folder: Path, kind: str, seed: int) -> Recipe:
    """The quickstart's, small; the paper's three stages."""
    return Recipe.build(
        {
            "store": str(folder / f"store_{kind}_{seed}"), "seed": seed,
            "catalog": {"root": str(folder / "shop"), "workers": 1},
            "embedding": {"encoder": "lsa", "width": 96, "workers": 1},
            "quantizer": {"kind": kind, "codes_per_level": [64] * 3, "hidden": [256, 128], "batch": 500, "epochs": 12},
            "ids": {"workers": 1},
            "generator": {
                "min_relevance": 1, "vocabulary": 2000, "width": 128, "feed_forward": 384, "dropout": 0, "word_keep": 0.4,
                "query_tokens": QUERY_TOKENS, "user_tokens": ATTRIBUTE_TOKENS, "user_recent": RECENT, "batch": 256,
                "validate_queries": 0,
                "stages": [
                    {"name": "titles", "mix": {"title": 1}, "epochs": 4, "learning_rate": 2e-3},
                    {"name": "queries", "mix": {"query": 1}, "epochs": 4, "learning_rate": 2e-3},
                    {"name": "users", "mix": {"user": 1, "query": 0.5}, "epochs": 6, "learning_rate": 1e-3},
                ],
            },
            "evaluation": {"methods": [], "canary_empty": 1},
        }
    )  # fmt: skip


def found(
    retriever: Retriever, clicks: list[Click], attributes: bool, recent: bool, beams: int
) -> list[list[list[str]]]:
    """Of each click the products of each ID found, best first."""
    answers = []
    for start in range(0, len(clicks), 32):
        some = clicks[start : start + 32]
        users = [User(one.attributes if attributes else (), one.recent if recent else ()) for one in some]
        result = retriever.searched(
            [one.query for one in some], widths=[beams] * retriever.levels, top_k=beams, users=users
        )
        for ranges_K2 in result.row_range_BK2.tolist():
            answers.append([retriever.products.product_ids[a:b].to_pylist() for a, b in ranges_K2 if b > a])
    return answers


def hits(answers: list[list[list[str]]], clicks: list[Click]) -> dict[str, np.ndarray]:
    """Whether the clicked product is among the first k products, and among those of the first k IDs; products of an ID in the
    order of product ids."""
    products = [[one for group in groups for one in sorted(group)] for groups in answers]
    figures = {
        f"products@{k}": np.array([click.product in row[:k] for click, row in zip(clicks, products)], float)
        for k in CUTS
    }
    return figures | {
        f"beam@{k}": np.array(
            [any(click.product in group for group in groups[:k]) for click, groups in zip(clicks, answers)], float
        )
        for k in CUTS
    }


def measure(folder: Path, kind: str, seed: int, clicks: list[Click]) -> dict[str, dict[str, np.ndarray]]:
    recipe = recipe_of(folder, kind, seed)
    with without_ray():
        parts = reindex(recipe).parts
    settings = releases.retriever_settings(parts, release="users", beam_width=max(CUTS))
    laid_out = releases.parts_folder(Store(recipe.store), parts, folder / "cache", settings)
    retriever = open_retriever(laid_out)
    asked = [click for click in clicks if click.split == "test"]
    others = np.random.default_rng(seed).permutation(len(asked))
    figures = {}
    for name, (attributes, recent) in ASKED.items():
        mine = asked
        if name == "another user":
            mine = [
                click._replace(attributes=asked[other].attributes, recent=asked[other].recent)
                for click, other in zip(asked, others)
            ]
        figures[name] = hits(found(retriever, mine, attributes, recent, max(CUTS)), asked)
    return figures


def run(options) -> dict:
    shop = generate(products=PRODUCTS, queries=QUERIES, seed=SHOP_SEED)
    clicks = log_of(shop, users=options.users, seed=0)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.store or temporary)
        write(folder / "shop", shop, clicks)
        for kind in options.kinds.split(","):
            runs = [measure(folder, kind, seed, clicks) for seed in range(options.seeds)]
            base = {name: np.mean([one["query alone"][name] for one in runs], 0) for name in runs[0]["query alone"]}
            for asked in ASKED:
                mean = {name: np.mean([one[asked][name] for one in runs], 0) for name in base}
                more = {
                    name: [float(x) for x in bootstrap_means((mean[name] - base[name])[:, None])[0]] for name in base
                }
                each = {name: [float(one[asked][name].mean()) for one in runs] for name in base}
                rows.append({"kind": kind, "asked": asked, "hits": each, "more": more})
                print(
                    kind,
                    asked,
                    {name: rounded(np.mean(values).item()) for name, values in each.items()},
                    file=sys.stderr,
                )
    return rounded(
        {
            **where("users", threads=torch.get_num_threads()), "users": options.users, "seeds": options.seeds,
            "clicks": {split: sum(click.split == split for click in clicks) for split in ("train", "validation", "test")},
            "rows": rows,
        }
    )  # fmt: skip


def rendered(report: dict) -> str:
    clicks = report["clicks"]
    names = ["IDs, asked with", *(f"{what}@{k}" for what in ("products", "beam") for k in CUTS), "more, products@10"]
    rows = [
        [
            f"{row['kind']}, {row['asked']}",
            *(spread(row["hits"][f"{what}@{k}"], ".3f") for what in ("products", "beam") for k in CUTS),
            "–" if row["asked"] == "query alone" else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["more"]["products@10"]),
        ]
        for row in report["rows"]
    ]
    return (
        f"# Users before queries\n\nWritten by `benchmarks/users.py`: the quickstart shop, {report['users']:,} made-up users, "
        f"{clicks['train']:,} clicks to learn from, {clicks['test']:,} asked for, by queries that no training has; "
        f"{report['seeds']} seeds, mean ± half their range. *products@k*: the clicked product is among the first k products (equal "
        "candidates); *beam@k*: it has one of the first k IDs, which may be shared (equal beam). *More*: than the query alone, "
        f"paired over clicks, 95 %. Machine: {report['machine']}, torch {report['torch']}.\n\n" + table(names, rows)
    )


if __name__ == "__main__":
    parser = parser_of(__doc__, page=RESULTS / "users.md", stored="what --json wrote")
    parser.add_argument("--kinds", default="cq_sid,cat_id2")
    parser.add_argument("--seeds", type=whole, default=2)
    parser.add_argument("--users", type=whole, default=1500)
    parser.add_argument("--store", help="keep shop and releases here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.render:
        finish(json.loads(options.render.read_text()), rendered, options)
    else:
        finish(run(options), rendered, options)
