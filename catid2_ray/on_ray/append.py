"""Append: today's catalogue under yesterday's quantizer and generator. New products get free IDs, no published ID moves.

The catalogue and its embeddings are read anew, by the text encoder and the category tree of the release; products that
left become tombstones in the ledger. The release that results has new IDs, a new trie and the old generator.
"""

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.config import Recipe
from catid2_ray.errors import RecipeError, ReleaseError
from catid2_ray.on_ray import catalog, embed, evaluate, progress, serving
from catid2_ray.on_ray.assign import stage as assign
from catid2_ray.on_ray.base import Base, open_base
from catid2_ray.on_ray.pipeline import Job, check_codes

_MADE = ("catalog", "embeddings", "ids", "serving", "evaluation")


def append(recipe: Recipe) -> tuple[dict[str, Manifest], Job]:
    """The parts of the next release, not published yet. Where the catalogue is the current release's, those of the latter,
    but for how it is served: a changed serving section alone makes a new release.

    Raises ReleaseError where there is no release to append to or its parts do not belong together, its IDs having been made
    with another quantizer, say; RecipeError where the recipe or the catalogue asks for another encoder, quantizer or kind of
    IDs than the release has.
    """
    with Job.open(recipe, only=_MADE) as job:
        job.pointer, name = releases.pointer(job.store)
        if name is None:
            raise ReleaseError(
                f"nothing was published to {job.store.uri} yet, so there is nothing to append to: run `catid2 reindex` first"
            )
        job.base = open_base(job.store, name)
        if job.base is None:
            raise ReleaseError(f"release {name} in {job.store.uri} was made by another version: run `catid2 reindex`")
        _refuse_others(recipe, job.base)
        parts = dict(job.base.parts)
        parts["catalog"] = catalog.run(job, {})
        if parts["catalog"].digest == job.base.parts["catalog"].digest:
            parts = dict(job.base.parts)
        else:
            check_codes(recipe, parts["catalog"])
            parts["embeddings"] = embed.run(job, parts, frozen=job.base.parts)
            parts["ids"] = assign.run(job, parts, keeps=True)
        parts["serving"] = serving.run(job, parts)
        if parts == job.base.parts:
            return parts, job
        if parts["catalog"].metrics["pairs_table"]:
            parts["evaluation"] = evaluate.run(job, parts)
        else:
            progress.event(
                "not_evaluated", reason="the catalogue has no pairs; the release keeps the figures of the one before"
            )
        return parts, job


def _refuse_others(recipe: Recipe, base: Base) -> None:
    ids = base.parts["ids"]
    if ids.metrics["ids"] != "unique":
        raise RecipeError(
            f"release {base.release.name} has IDs of kind {ids.metrics['ids']!r}, and only unique IDs can be appended to: others "
            "may be shared or renumbered by new products. Run `catid2 reindex`"
        )
    made_by = Recipe.build(ids.recipe)
    differ = [
        f"{section}.{name} is {value!r}, the release has {had!r}"
        for section in ("embedding", "quantizer")
        for name, value in getattr(recipe, section).identity().items()
        if name != "warm_start" and value != (had := getattr(made_by, section).identity()[name])
    ]
    if differ:
        raise RecipeError(
            f"append keeps encoder and quantizer of release {base.release.name}, but the recipe asks for others: "
            + "; ".join(differ)
            + ". Set them back, or run `catid2 reindex` for a full re-ID"
        )
