"""Several ways of making IDs side by side: each kind and seed is trained and assigned (or found) on one catalogue.

Budgets are shared: a kind changes only the fields that define it (`config.kinds`). Labels that training sees may be masked,
exchanged or cut; scores are always against the catalogue's own.
"""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest, tree_of
from catid2_ray.artifacts.release import fetch
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.config import KINDS, Recipe
from catid2_ray.errors import ArtifactError, RecipeError
from catid2_ray.evaluation import figures
from catid2_ray.evaluation.ids_report import ids_page, judged
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.on_ray.job import Job, open_previous
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.pipeline import chain, check_codes, size
from catid2_ray.on_ray.stages import catalog, embed, score_ids, train_quantizer
from catid2_ray.on_ray.stages.assign import stage as assign
from catid2_ray.on_ray.stages.catalog import read_sample, read_vectors
from catid2_ray.quantizer.coder import load_coder
from catid2_ray.quantizer.model import ResidualQuantizer


class Comparison(NamedTuple):
    """`rows`: one dict a run, ready for JSON; `recipe`: the one that was given, with its sizes; `catalog`: the products that all
    runs describe."""

    rows: list[dict]
    recipe: Recipe
    catalog: Manifest


def variant(recipe: Recipe, kind: str, seed: int) -> Recipe:
    """The recipe with another kind of IDs and seed, checked anew; a collapse is measured rather than stopped. It trains no
    generator, so the head is plain, which fits IDs of every kind."""
    values = recipe.model_dump(mode="json")
    quantizer = recipe.quantizer.as_kind(kind) | {"collapse_patience": 0}
    return Recipe.build(
        values | {"quantizer": quantizer, "generator": values["generator"] | {"head": "plain"}, "seed": seed}
    )


def compare_ids(recipe: Recipe, kinds: list[str], seeds: int, *, score: str | None = None) -> Comparison:
    """Train and assign every kind with the seeds recipe.seed, recipe.seed + 1, …; what is committed is found, not made.

    `score`: "recall" trains a small generator on each run's IDs and reports what validation queries find by it, and of each
    kind but the first how much more than by the first, with a paired 95 % interval. RecipeError for an unknown kind or score
    or a seed count under 1; what the catalogue cannot be given is said before any run.
    Every run's artefacts are those that a job of its recipe would make in a store without a release, except that all share
    the embeddings of `recipe.seed` and the numbers that follow the catalogue's size: a comparison builds on no release.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if score not in (None, "recall"):
        raise RecipeError(f"--score {score!r} is unknown: give recall, or leave it out")
    if unknown or not kinds or seeds < 1:
        raise RecipeError(
            f"--kinds {','.join(kinds)!r}, --seeds {seeds}: "
            + (f"unknown {', '.join(unknown)}; " if unknown else "at least one kind and one seed are needed; ")
            + f"kinds are {', '.join(KINDS)}"
        )
    for kind in kinds:
        variant(recipe, kind, recipe.seed)  # what contradicts itself is said before any work
    rows, recalls = [], {}
    # What is compared is not published and continues no ledger.
    with Job.open(recipe, lease=False, new_ledger=True) as job:
        parts = chain(job, "adapter")
        job.previous, recipe = None, job.recipe
        variants = [variant(recipe, kind, recipe.seed + number) for kind in kinds for number in range(seeds)]
        for each in variants:
            check_codes(each, parts["catalog"])
        if score:
            score_ids.refuse_without_queries(recipe, parts)
            given = score_ids.material(job, parts)
        for number, each in enumerate(variants):
            progress.event("compare", kind=each.quantizer.kind, seed=each.seed, run=f"{number + 1}/{len(variants)}")
            of_run = dataclasses.replace(job, recipe=each)
            of_kind = parts_of_kind(of_run, parts)
            rows.append(_row(each, of_kind))
            if score:
                recall_QK = score_ids.recall_of_kind(of_run, of_kind["ids"], given, seed=recipe.seed)
                recalls.setdefault(each.quantizer.kind, []).append(recall_QK)
                rows[-1] |= {"recall": recall_QK.mean(0).tolist(), "recall_queries": len(recall_QK)}
    if score:
        _compare_recalls(rows, recalls)
    return Comparison(rows, recipe, parts["catalog"])


def _compare_recalls(rows: list[dict], recalls: dict[str, list[np.ndarray]]) -> None:
    """Adds to the first run of each kind but the first one `recall_gain`: at each cut the difference, the mean over the seeds of
    each, and its interval over queries. Seeds are whole trainings: that they differ, too, shows in their own range alone."""
    first, *others = recalls
    base_QK = np.mean(recalls[first], 0)
    for kind in others:
        [row, *_] = [row for row in rows if row["kind"] == kind]
        intervals = bootstrap_means(np.mean(recalls[kind], 0) - base_QK)
        row["recall_gain"] = {str(k): list(interval) for k, interval in zip(score_ids.KS, intervals)}
        row["recall_gain_50"] = row["recall_gain"]["50"]


def parts_of_kind(job: Job, parts: dict[str, Manifest]) -> dict[str, Manifest]:
    """`parts` (catalogue, pairs, embeddings, adapter) with the quantizer and the IDs of the job's kind, built on no release."""
    parts = {
        name: parts[name] for name in ("catalog", "pairs", "tuned_encoder", "embeddings", "adapter") if name in parts
    }
    if job.recipe.quantizer.query_item:
        parts["queries"] = embed.run_queries(job, parts)
    parts["quantizer"] = train_quantizer.run(job, parts)
    return parts | {"ids": assign.run(job, parts)}


def _row(recipe: Recipe, parts: dict[str, Manifest]) -> dict:
    queries = parts["queries"].metrics["seconds"] if "queries" in parts else 0.0
    return row_of(recipe, parts["quantizer"], parts["ids"], seconds_before=queries)


def row_of(recipe: Recipe, quantizer: Manifest, ids: Manifest, *, seconds_before: float = 0.0) -> dict:
    """One run's figures. Collisions and use of codes are those of the codes before de-duplication, purity and AMI those of
    the published IDs; `seconds` is making the quantizer, its queries included, and assigning."""
    quality, figures = ids.metrics["quality"], quantizer.metrics
    raw, final = quality["raw"], quality["final"]
    return {
        "kind": recipe.quantizer.kind,
        "seed": recipe.seed,
        "ids": ids.metrics["ids"],
        "collision_rate": raw["collision_rate"],
        "shared_rate": raw["shared_rate"],
        "largest_shared": raw["largest_bucket"],
        "floor": quality["floor"],
        "codes_per_level": ids.metrics["codes_per_level"][: len(raw["codes_used"])],
        "codes_used": raw["codes_used"],
        "perplexity": raw["perplexity"],
        "purity": final["purity"],
        "purity_null": final["purity_shuffled"],
        "ami": final["ami"],
        "ami_null": final["ami_shuffled"],
        "neighbours": quality["neighbour_agreement"]["share"],
        "duplicates_after": ids.metrics["duplicates_after"],
        "verdict": figures.get("verdict"),
        "codes_used_in_training": figures.get("codes_used"),
        "with_query": figures.get("with_query"),
        "seconds": round(seconds_before + figures["seconds"] + ids.metrics["seconds"], 2),
        "seconds_resolving": ids.metrics["seconds_of_passes"]["resolving"],
    }


_ROWS = 20_000  # products that the pictures show
_EXAMPLE_CATEGORIES, _EXAMPLES_EACH = 5, 4


def ids_report(recipe: Recipe, *, beside: str | None = None) -> str:
    """One HTML page. `beside`: another kind, whose IDs stand beside these in the table of titles (the paper's Table 8).

    Raises ArtifactError that names the job to run where IDs are not assigned yet.
    """
    with Job.open(recipe, only=(), lease=False, new_ledger=True) as job:
        parts = _appended(job) or chain(job, "ids")
        quality = parts["ids"].metrics["quality"]
        numbers = {**quality["raw"], **{name: value for name, value in quality.items() if name not in ("raw", "final")}}
        # On the published IDs, as the rest of the page; the raw codes are what collides and what is in use.
        numbers |= {name: value for name, value in quality["final"].items() if name.startswith(("purity", "ami"))}
        sample, other = sample_of(job, parts), None
        if beside:
            of_kind = dataclasses.replace(job, recipe=variant(job.recipe, beside, recipe.seed), previous=None)
            other = docids_of(of_kind, parts_of_kind(of_kind, parts))
        settings = recipe.quantizer
        judgement = None
        if settings.coder != "tree":
            judgement = judged(quality["raw"], forced=settings.force_category, shared=settings.ids != "unique")
        return ids_page(
            numbers,
            images_of(job, parts, sample),
            examples_of(sample, other),
            title=f"IDs of {recipe.name}: {settings.kind}",
            judgement=judgement,
        )


def _appended(job: Job) -> dict[str, Manifest] | None:
    """The parts of the current release where it is this catalogue appended to an earlier one: no recipe makes those anew."""
    current = open_previous(job.store, releases.pointer(job.store)[1])
    if current and current.appended and current.parts["catalog"].digest == catalog.run(job, {}).digest:
        job.recipe = size(job, current.parts, current).recipe
        return current.parts
    return None


def sample_of(job: Job, parts: dict[str, Manifest]) -> dict:
    """What pictures and tables of IDs show: at most _ROWS products with their titles, paths, IDs, vectors and categories."""

    def of(role: str, columns: list[str]) -> pa.Table:
        return read_sample(job.store, parts[role], columns, rows=_ROWS, seed=job.recipe.seed)

    products, ids = of("catalog", ["product_id", "title", "category_path"]), of("ids", ["product_id", "codes", "docid"])
    columns = ["product_id", "embedding", "category"]
    vectors = read_vectors(ProductVectors.of(job.store, parts), columns, rows=_ROWS, seed=job.recipe.seed)
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


def docids_of(job: Job, parts: dict[str, Manifest]) -> list[str]:
    """The IDs of the products of `sample_of`."""
    table = read_sample(job.store, parts["ids"], ["docid"], rows=_ROWS, seed=job.recipe.seed)
    return table["docid"].to_pylist()


def images_of(job: Job, parts: dict[str, Manifest], sample: dict) -> dict:
    """Caption → Figure: the paper's Figures 3, 6 and 4, and the training where it has epochs."""
    taxonomy = Taxonomy.from_json(job.store.read(tree_of(parts["embeddings"], parts["catalog"])).decode())
    names = [[path[-1] for path in level] for level in taxonomy.levels]
    codes_NL, category_NH = sample["codes_NL"], sample["category_NH"]
    images = {
        "Codes by level, and the categories in them (the paper's Figure 3)": figures.layer_distribution(
            codes_NL, category_NH, names, tuple(parts["ids"].metrics["codes_per_level"])
        ),
        "Words that mark the fullest first codes (Figure 6)": figures.prefix_terms(sample["title"], codes_NL),
    }
    with scratch.folder("quantizer") as cache:
        coder = load_coder(fetch(job.store, parts["quantizer"], cache))
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


def examples_of(sample: dict, other: list[str] | None) -> list[dict]:
    """A few products of the categories that have most (Table 8); of any where no product has a category."""
    joined = np.array([" > ".join(path or ["no category"]) for path in sample["path"]])
    known_N = np.array([bool(path) for path in sample["path"]])
    names, count_C = np.unique(joined[known_N] if known_N.any() else joined, return_counts=True)
    chosen = names[np.argsort(-count_C, kind="stable")[:_EXAMPLE_CATEGORIES]]
    rows = [row for name in chosen for row in np.flatnonzero(joined == name)[:_EXAMPLES_EACH]]
    return [
        {"title": sample["title"][row], "category": str(joined[row]), "docid": sample["docid"][row]}
        | ({"other_docid": other[row]} if other else {})
        for row in rows
    ]
