"""Where the preset `cat_id2` comes from, and the papers' open questions: many small trainings in one process.

    python benchmarks/quantizer_sweep.py --root DATA/bigbasket --encoder FOLDER [--plan settings|questions|size] [--cache FOLDER]

Every run is `quantizer.step.fit` on the catalogue's embeddings with the budget of jobs/recipes/compare_ids.yaml, scored on
products alone: no query is looked at. Prints a Markdown table and, as its last line, one JSON object.
"""

import argparse
import hashlib
import json
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.catalog.text import HuggingFaceEncoder, LsaEncoder, join_text
from catid2_ray.config.kinds import preset
from catid2_ray.identifiers.collisions import assign_unique
from catid2_ray.identifiers.quality import id_quality
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.sampler import exchange_paths
from catid2_ray.quantizer.step import LossWeights, fit

BUDGET = {"hidden": (256, 128), "latent": 10, "codes": (256,) * 4, "batch": 1024, "epochs": 20, "learning_rate": 2e-3}
PRINTED = {"dispersion": 0.1, "hierarchical": 1e-4, "cluster_scale": 1.0}
TIGER, OURS = preset("tiger"), preset("cat_id2")
FREE = {"hierarchical": OURS["hierarchical"]}  # our β without the sphere and the levels' factor

# name: weights and settings; label changes are named by functions of LABELS below
SETTINGS = {
    "tiger": TIGER,
    "tiger, Z 32": {**TIGER, "latent": 32},
    "printed, no revival, no refit": {"refit": False, "revive": False},
    "printed, no revival, no refit, Z 32": {"refit": False, "revive": False, "latent": 32},
    "printed": {},
    "z free, β 0.01": {"hierarchical": 0.01},
    "z free, β 0.1": {"hierarchical": 0.1},
    "z free, β 0.3": FREE,
    "z free, β 0.3, first depth only": {**FREE, "category_depth": 1},
    "z free, β 0.3, power 2": {**FREE, "level_power": 2.0},
    "radius 1, β 0.3": {**FREE, "latent_radius": 1.0},
    "radius 1, β 0.3, power 1": {**OURS, "level_power": 1.0},
    "radius 1, β 0.3, power 2 (cat_id2)": OURS,
    "radius 1, β 0.3, power 3": {**OURS, "level_power": 3.0},
    "radius 2": {**OURS, "latent_radius": 2.0},
    "β 0.1": {**OURS, "hierarchical": 0.1},
    "β 1": {**OURS, "hierarchical": 1.0},
    "γ 0": {**OURS, "cluster_scale": 0.0},
    "temperature of p 0.05": {**OURS, "scale_temperature": 0.05},
    "α 0.3": {**OURS, "dispersion": 0.3},
    "reconstruction instead of dispersion": {**OURS, "dispersion": 0.0, "reconstruction": 1.0},
    "τ 0.2": {**OURS, "temperature": 0.2},
    "Z 16": {**OURS, "latent": 16},
    "Z 32": {**OURS, "latent": 32},
    "no refit": {**OURS, "refit": False},
    "no refit, no revival": {**OURS, "refit": False, "revive": False},
    "seed 1": {**OURS, "seed": 1},
}
# Table 3's terms on top of a reconstruction loss, without the devices that keep codes alive
BARE = {**OURS, "dispersion": 0.0, "reconstruction": 1.0, "refit": False, "revive": False}
QUESTIONS = {
    "tiger": TIGER,
    "cat_id2": OURS,
    "HCC alone, no revival, no refit": {**BARE, "cluster_scale": 0.0},
    "HCC and CSC, no revival, no refit": BARE,
    "HCC and CSC at temperature 0.05, no revival, no refit": {**BARE, "scale_temperature": 0.05},
    "CSC alone, no revival, no refit": {**BARE, "hierarchical": 0.0},
    "neither, no revival, no refit": {**BARE, "hierarchical": 0.0, "cluster_scale": 0.0},
    "all three, no revival, no refit": {**OURS, "refit": False, "revive": False},
    "all three at temperature 0.05, no revival, no refit": {
        **OURS, "scale_temperature": 0.05, "refit": False, "revive": False,
    },
    "labels exchanged: 5 %": {**OURS, "labels": "noise", "share": 0.05},
    "labels exchanged: 20 %": {**OURS, "labels": "noise", "share": 0.2},
    "labels exchanged: 50 %": {**OURS, "labels": "noise", "share": 0.5},
    "labels exchanged: all": {**OURS, "labels": "noise", "share": 1.0},
    "tiger, scored on half of the products": {**TIGER, "labels": "hidden", "share": 0.5},
    "labels of that half hidden in training": {**OURS, "labels": "hidden", "share": 0.5},
    "labels are free tags (title words)": {**OURS, "labels": "tags"},
    "tiger, L = 3": {**TIGER, "codes": (256,) * 3},
    "H = 2, L = 3": {**OURS, "codes": (256,) * 3, "category_depth": 2},
    "H = L = 3": {**OURS, "codes": (256,) * 3},
    "tiger, category in the text": {**TIGER, "text": "with category"},
    "cat_id2, category in the text": {**OURS, "text": "with category"},
}  # fmt: skip
SIZES = (2_500, 5_000, 10_000, 20_000, 40_000)


class Catalogue:
    """Titles, true categories and embeddings (cached by content) of one products.parquet."""

    def __init__(self, root: str, encoder: str, cache: Path):
        self.table = pq.read_table(Path(root) / "products.parquet").sort_by("product_id")
        paths = [tuple(path) for path in self.table["category_path"].to_pylist()]
        self.category_NH = Taxonomy.build(paths, depth=3).category_ids(self.table["category_path"])
        self.encoder, self.cache = encoder, cache

    def embeddings(self, text: str) -> np.ndarray:
        columns = ["title", "category_path", "description"] if text == "with category" else ["title", "description"]
        texts = join_text(self.table, columns)
        name = hashlib.sha256(json.dumps([self.encoder, texts]).encode()).hexdigest()[:16]
        path = self.cache / f"{name}.npy"
        if not path.exists():
            lsa = self.encoder == "lsa"
            model = LsaEncoder.fit(texts, width=128, vocabulary=50_000, seed=0) if lsa else None
            model = model or HuggingFaceEncoder(self.encoder, batch=64, tokens=64)
            self.cache.mkdir(parents=True, exist_ok=True)
            np.save(path, model.encode(texts))
        return np.load(path)


def free_tags(titles: list[str]) -> np.ndarray:
    """N×1: each title's rarest word among those of 20 to 500 titles, as a shop's free tag; −1 without one."""
    words_N = [re.findall(r"[a-z]{3,}", title.lower()) for title in titles]
    count = Counter(word for words in words_N for word in set(words))
    known = {word: number for number, word in enumerate(sorted(w for w, n in count.items() if 20 <= n <= 500))}
    return np.array([[min((count[w], known[w]) for w in words if w in known)[1] if set(words) & known.keys() else -1]
                     for words in words_N])  # fmt: skip


def labels_of(catalogue: Catalogue, kind: str | None, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Categories that training sees, and the rows that are scored."""
    seen_NH, scored_N = catalogue.category_NH, np.ones(len(catalogue.category_NH), bool)
    if kind == "noise":
        seen_NH = exchange_paths(seen_NH, share=share, seed=0)
    elif kind == "tags":
        seen_NH = free_tags(catalogue.table["title"].to_pylist())
    elif kind == "hidden":
        scored_N = np.random.default_rng(0).random(len(seen_NH)) < share
        seen_NH = np.where(scored_N[:, None], -1, seen_NH)
    return seen_NH, scored_N


def run(catalogue: Catalogue, rows: np.ndarray | None = None, **changes) -> dict:
    settings = BUDGET | {"seed": 0, "latent_radius": None, "refit": True, "revive": True} | changes
    embedding_ND = torch.from_numpy(catalogue.embeddings(settings.get("text", "")))
    category_NH, scored_N = labels_of(catalogue, settings.get("labels"), settings.get("share", 0.0))
    if rows is not None:
        embedding_ND, category_NH, scored_N = embedding_ND[rows], category_NH[rows], scored_N[rows]
    names = LossWeights.__dataclass_fields__
    weights = LossWeights(**{**PRINTED, **{k: v for k, v in settings.items() if k in names}})
    torch.manual_seed(settings["seed"])
    model = ResidualQuantizer(
        width=embedding_ND.shape[1], hidden=settings["hidden"], latent=settings["latent"],
        codes_per_level=settings["codes"], latent_radius=settings["latent_radius"],
    )  # fmt: skip
    started = time.perf_counter()
    fit(
        embedding_ND, torch.from_numpy(category_NH).long(), model=model, weights=weights, epochs=settings["epochs"],
        batch=settings["batch"], learning_rate=settings["learning_rate"], weight_decay=1e-4, seed=settings["seed"],
        refit=settings["refit"], revive=settings["revive"],
    )  # fmt: skip
    trained = time.perf_counter()
    encoded = model.eval().encode_padded(embedding_ND, rows=1024)
    codes_NL, coded = encoded.codes_BL.numpy(), time.perf_counter()
    figures = id_quality(codes_NL, np.empty((len(codes_NL), 0), int), settings["codes"])
    true_NH = catalogue.category_NH if rows is None else catalogue.category_NH[rows]
    agreement = id_quality(codes_NL[scored_N], true_NH[scored_N], settings["codes"])
    found = {name: figures[name] for name in ("collision_rate", "codes_used", "perplexity")}
    found |= {name: agreement[name] for name in ("purity", "ami", "ami_shuffled")}
    found |= {"products": len(codes_NL), "seconds_training": trained - started, "seconds_encoding": coded - trained}
    if rows is not None:
        books = [book.detach().numpy() for book in model.codebooks]
        for method in ("sinkhorn", "exact"):
            began = time.perf_counter()
            assign_unique(codes_NL, encoded.residual_BZ.numpy(), books, [f"{n:08d}" for n in rows], method=method)
            found[f"seconds_{method}"] = time.perf_counter() - began
    return found


def table(rows: dict[str, dict]) -> str:
    def three(values, form):
        return " ".join(format(value, form) for value in values)

    lines = ["| run | collisions | codes used | perplexity | purity | AMI | s |", "|---|---:|---|---|---|---|---:|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['collision_rate']:.2%} | {three(row['codes_used'], 'd')} | {three(row['perplexity'], '.0f')} "
            f"| {three(row['purity'], '.3f')} | {three(row['ami'], '.3f')} | {row['seconds_training']:.0f} |"
        )
    return "\n".join(lines)


def size_table(rows: dict[str, dict]) -> str:
    lines = ["| products | training s | encoding s | collisions | Sinkhorn s | its share | exact assignment s |",
             "|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in rows.values():
        total = row["seconds_training"] + row["seconds_encoding"] + row["seconds_sinkhorn"]
        lines.append(
            f"| {row['products']:,} | {row['seconds_training']:.1f} | {row['seconds_encoding']:.2f} | {row['collision_rate']:.2%} "
            f"| {row['seconds_sinkhorn']:.2f} | {row['seconds_sinkhorn'] / total:.1%} | {row['seconds_exact']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with products.parquet whose category_path is gold")
    parser.add_argument("--encoder", default="lsa", help="sentence encoder: id or folder; default the built-in lsa")
    parser.add_argument("--plan", choices=("settings", "questions", "size"), default="settings")
    parser.add_argument("--cache", default="catid2_store/sweep", type=Path, help="folder for embeddings")
    options = parser.parse_args()
    if not options.root:
        print(json.dumps({"skipped": "no catalogue: give --root FOLDER"}))
        return
    torch.set_num_threads(1)
    catalogue = Catalogue(options.root, options.encoder, options.cache)
    if options.plan == "size":
        order = np.random.default_rng(0).permutation(len(catalogue.category_NH))
        sizes = [size for size in SIZES if size < len(order)] + [len(order)]
        found = {str(size): run(catalogue, np.sort(order[:size]), **OURS) for size in sizes}
        print(size_table(found))
    else:
        found = {}
        for name, changes in (SETTINGS if options.plan == "settings" else QUESTIONS).items():
            found[name] = run(catalogue, **changes)
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
