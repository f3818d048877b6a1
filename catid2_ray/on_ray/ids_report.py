"""The ID quality report of a recipe whose IDs are assigned: figures from the manifests, pictures from a bounded sample.

Unusual: the parts of catalogue, embeddings and IDs hold the same products in the same order, so the same seeded sample of
each is the same products, and nothing has to be joined.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import fetch
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError
from catid2_ray.evaluation import figures
from catid2_ray.evaluation.pages import ids_page
from catid2_ray.on_ray import catalog
from catid2_ray.on_ray.arrays import matrix
from catid2_ray.on_ray.base import open_base
from catid2_ray.on_ray.catalog import read_sample
from catid2_ray.on_ray.compare import parts_of_kind, variant
from catid2_ray.on_ray.embed import tree_of
from catid2_ray.on_ray.pipeline import Job, chain
from catid2_ray.quantizer.coder import load_coder
from catid2_ray.quantizer.model import ResidualQuantizer

_ROWS = 20_000  # products that the pictures show
_EXAMPLE_CATEGORIES, _EXAMPLES_EACH = 5, 4


def ids_report(recipe: Recipe, *, beside: str | None = None) -> str:
    """One HTML page. `beside`: another kind, whose IDs stand beside these in the table of titles (the paper's Table 8).

    Raises ArtifactError that names the job to run where IDs are not assigned yet.
    """
    with Job.open(recipe, only=()) as job:
        parts = _appended(job) or chain(job, "ids")
        quality = parts["ids"].metrics["quality"]
        numbers = {**quality["raw"], **{name: value for name, value in quality.items() if name not in ("raw", "final")}}
        # On the published IDs, as the rest of the page; the raw codes are what collides and what is in use.
        numbers |= {name: value for name, value in quality["final"].items() if name.startswith(("purity", "ami"))}
        sample, other = _sample(job, parts), None
        if beside:
            of_kind = dataclasses.replace(job, recipe=variant(recipe, beside, recipe.seed), base=None)
            other = _docids(of_kind, parts_of_kind(of_kind, parts))
        return ids_page(
            numbers,
            _images(job, parts, sample),
            _examples(sample, other),
            title=f"IDs of {recipe.name}: {recipe.quantizer.kind}",
        )


def _appended(job: Job) -> dict[str, Manifest] | None:
    """The parts of the current release where it is this catalogue appended to an earlier one: no recipe makes those anew."""
    base = open_base(job.store, releases.pointer(job.store)[1])
    if base and base.appended and base.parts["catalog"].digest == catalog.run(job, {}).digest:
        return base.parts
    return None


def _sample(job: Job, parts: dict[str, Manifest]) -> dict:
    def of(role: str, columns: list[str]) -> pa.Table:
        return read_sample(job.store, parts[role], columns, rows=_ROWS, seed=job.recipe.seed)

    products, ids = of("catalog", ["product_id", "title", "category_path"]), of("ids", ["product_id", "codes", "docid"])
    vectors = of("embeddings", ["product_id", "embedding", "category"])
    if not products["product_id"].equals(ids["product_id"]) or not ids["product_id"].equals(vectors["product_id"]):
        raise ArtifactError("parts of catalog, embeddings and ids do not hold the same products; rerun jobs.assign_ids")
    return {
        "title": products["title"].to_pylist(),
        "path": products["category_path"].to_pylist(),
        "docid": ids["docid"].to_pylist(),
        "codes_NL": matrix(ids["codes"]),
        "embedding_ND": matrix(vectors["embedding"]),
        "category_NH": matrix(vectors["category"]),
    }


def _docids(job: Job, parts: dict[str, Manifest]) -> list[str]:
    table = read_sample(job.store, parts["ids"], ["docid"], rows=_ROWS, seed=job.recipe.seed)
    return table["docid"].to_pylist()


def _images(job: Job, parts: dict[str, Manifest], sample: dict) -> dict:
    taxonomy = Taxonomy.from_json(job.store.read(tree_of(parts["embeddings"], parts["catalog"])).decode())
    names = [[path[-1] for path in level] for level in taxonomy.levels]
    codes_NL, category_NH = sample["codes_NL"], sample["category_NH"]
    images = {
        "Codes by level, and the categories in them (the paper's Figure 3)": figures.layer_distribution(
            codes_NL, category_NH, names, tuple(parts["ids"].metrics["codes_per_level"])
        ),
        "Words that mark the fullest first codes (Figure 6)": figures.prefix_terms(sample["title"], codes_NL),
    }
    with tempfile.TemporaryDirectory() as cache:
        coder = load_coder(fetch(job.store, parts["quantizer"], Path(cache)))
        history = json.loads(job.store.read(parts["quantizer"].file("history.json")))
    panels = [("embedding", sample["embedding_ND"])]
    if isinstance(coder, ResidualQuantizer) and coder.hidden is not None:
        with torch.no_grad():
            panels.append(("latent z", coder.latents(torch.from_numpy(sample["embedding_ND"].copy())).numpy()))
    depth_1 = category_NH[:, 0] if category_NH.shape[1] else np.full(len(codes_NL), -1)
    images["Products by category, before and after the encoder (Figure 4)"] = figures.latent_map(
        panels, depth_1, names[0] if names else [], seed=job.recipe.seed
    )
    if len(history) > 1:
        images["Training, epoch by epoch"] = figures.training_curves(history)
    return images


def _examples(sample: dict, other: list[str] | None) -> list[dict]:
    """A few products of the categories that have most (Table 8)."""
    joined = np.array([" > ".join(path or ["no category"]) for path in sample["path"]])
    names, count_C = np.unique(joined, return_counts=True)
    chosen = names[np.argsort(-count_C, kind="stable")[:_EXAMPLE_CATEGORIES]]
    rows = [row for name in chosen for row in np.flatnonzero(joined == name)[:_EXAMPLES_EACH]]
    return [
        {"title": sample["title"][row], "category": str(joined[row]), "docid": sample["docid"][row]}
        | ({"other_docid": other[row]} if other else {})
        for row in rows
    ]
