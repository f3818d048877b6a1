"""Several ways of making IDs side by side: each kind and seed is trained and assigned (or found) on one catalogue.

Budgets are shared: a kind changes only the fields that define it (`config.kinds`). Labels that training sees may be masked,
exchanged or cut; scores are always against the catalogue's own.
"""

import dataclasses
from typing import NamedTuple

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.config import KINDS, Recipe
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray import embed, progress, train_quantizer
from catid2_ray.on_ray.assign import stage as assign
from catid2_ray.on_ray.pipeline import Job, chain, check_codes


class Comparison(NamedTuple):
    """`rows`: one dict a run, ready for JSON; `catalog`: the products that all runs describe."""

    rows: list[dict]
    catalog: Manifest


def variant(recipe: Recipe, kind: str, seed: int) -> Recipe:
    """The recipe with another kind of IDs and seed, checked anew; a collapse is measured rather than stopped."""
    quantizer = recipe.quantizer.as_kind(kind) | {"collapse_patience": 0}
    return Recipe.build(recipe.model_dump(mode="json") | {"quantizer": quantizer, "seed": seed})


def compare_ids(recipe: Recipe, kinds: list[str], seeds: int) -> Comparison:
    """Train and assign every kind with the seeds recipe.seed, recipe.seed + 1, …; what is committed is found, not made.

    RecipeError for an unknown kind or a seed count under 1; what the catalogue cannot be given is said before any run.
    Every run's artefacts are those that a job of its recipe would make in a store without a release, except that all share
    the embeddings of `recipe.seed`: a comparison builds on no release.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds or seeds < 1:
        raise RecipeError(
            f"--kinds {','.join(kinds)!r}, --seeds {seeds}: "
            + (f"unknown {', '.join(unknown)}; " if unknown else "at least one kind and one seed are needed; ")
            + f"kinds are {', '.join(KINDS)}"
        )
    variants = [variant(recipe, kind, recipe.seed + number) for kind in kinds for number in range(seeds)]
    rows = []
    with Job.open(recipe) as job:
        parts = chain(job, "embeddings")
        job.base = None
        for each in variants:
            check_codes(each, parts["catalog"])
        for number, each in enumerate(variants):
            progress.event("compare", kind=each.quantizer.kind, seed=each.seed, run=f"{number + 1}/{len(variants)}")
            rows.append(_row(each, parts_of_kind(dataclasses.replace(job, recipe=each), parts)))
    return Comparison(rows, parts["catalog"])


def parts_of_kind(job: Job, parts: dict[str, Manifest]) -> dict[str, Manifest]:
    """`parts` (catalogue and embeddings) with the quantizer and the IDs of the job's kind, built on no release."""
    parts = {name: parts[name] for name in ("catalog", "embeddings")}
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
