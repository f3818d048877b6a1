"""The chain of stages, bound to the code that runs each, and an append to the release that is current.

catalog → pairs (→ tuned encoder, where the recipe asks for one) → embeddings (→ adapter, where there are pairs) (→ queries, for
kinds that learn from them) → quantizer → ids → node vectors → examples → generator (→ prompts → generator aligned, where the recipe
asks for it) → serving (→ mixture, where weights are fitted) → evaluation → release
"""

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.config import Recipe, sizes
from catid2_ray.errors import CapacityError, ChurnGateError, InputError, RecipeError, ReleaseError
from catid2_ray.on_ray.job import Job, PreviousRelease, open_previous
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.stages import (
    adapter,
    align,
    catalog,
    door,
    embed,
    evaluate,
    examples,
    lay_out,
    mixture,
    node_vectors,
    realign,
    train_generator,
    train_quantizer,
    tuned_encoder,
)
from catid2_ray.on_ray.stages.assign import stage as assign


def chain(job: Job, last: str = "evaluation") -> dict[str, Manifest]:
    """Run or find every stage up to `last`; returns their manifests by name. Sets `previous`, `pointer` and `seen` of the job."""
    begin(job)
    job.plan = planned(job.recipe, last)
    parts = {"catalog": catalog.run(job, {})}
    if last != "catalog":
        parts["pairs"] = catalog.run_pairs(job, parts)
        job.recipe = size(job, parts, job.previous).recipe
        check_codes(job.recipe, parts["catalog"])
        door.announce(job.recipe, job.store, parts)
        door.refuse_unfit(job.recipe, parts["pairs"])
        tuned_encoder.refuse_impossible(job.recipe, parts)
        adapter.refuse_impossible(job.recipe, parts)
    if last not in ("catalog", "pairs"):
        for name, run in RUN.items():
            if name == "queries" and not job.recipe.quantizer.query_item:
                continue
            if name == "examples":
                gate_churn(job.recipe, parts["ids"])
            if made := run(job, parts):  # tuned encoder, adapter, node vectors and mixture are not always made
                parts[STAGES[name].role] = made
            if name == last:
                break
    return parts


def planned(recipe: Recipe, last: str) -> tuple[str, ...]:
    """The stages that a recipe asks for, up to `last`. A stage that the catalogue then turns out not to need, such as an adapter
    where there are no pairs, is among them: the count skips its number."""
    without = set()
    if not recipe.quantizer.query_item:
        without.add("queries")
    if recipe.embedding.encoder_mode == "frozen":
        without |= {"lessons", "tuned_encoder"}
    if recipe.embedding.adapter == "none":
        without |= {"matched", "adapter"}
    if not recipe.alignment.enabled:
        without |= {"prompts", "aligned"}
    if not (recipe.serving.fits_weights or recipe.serving.tried):
        without.add("mixture")
    names = list(STAGES)
    return tuple(name for name in names[: names.index(last) + 1] if name not in without or name == last)


def size(job: Job, parts: dict[str, Manifest], previous: PreviousRelease | None) -> sizes.Sized:
    """A number for each setting that follows the catalogue's size and that the recipe of the job leaves out; `parts`: catalogue and
    pairs. Those of a `previous` release come first, unless the job begins anew."""
    recipe, teaching, before = job.recipe, 0, None
    if any(section == "generator" for section, _ in sizes.left_out(recipe)):
        teaching = catalog.teaching_pairs(job.store, parts["pairs"], recipe.generator)
    if previous and not job.resize:
        stored = {name: Recipe.stored(previous.parts[name].recipe) for name in ("quantizer", "generator")}
        sections = {name: getattr(stored[name], name).model_dump(mode="json") for name in stored}
        before = sizes.Before(previous.release.name, previous.parts["catalog"].rows, sections)
    found = sizes.sized(recipe, products=parts["catalog"].rows, teaching=teaching, before=before)
    if found.chosen:
        job.say("sized", **{path: str(number).replace(" ", "") for path, number in found.chosen.items()})
    for path, number in found.kept.items():
        codes = path == "quantizer.codes_per_level"
        way_out = "begin anew with `catid2 reindex --new-ledger`" if codes else f"state {path} in the recipe"
        job.say(
            "kept_size", setting=path, value=str(found.chosen[path]).replace(" ", ""), fits=str(number).replace(" ", ""),
            reason=f"'release {before.name} has it; to change it, {way_out}'",
        )  # fmt: skip
    return found


def begin(job: Job) -> None:
    """Set `previous`, `pointer` and `seen` of the job; raises where the recipe does not go on from the release that is current."""
    job.previous = open_previous(job.store, job.look(), new_ledger=job.new_ledger)
    _refuse_new_ledger(job)


def _renamed_quantizer(job: Job, parts: dict[str, Manifest]) -> Manifest:
    return realign.run(job, {**parts, "quantizer": train_quantizer.run(job, parts)})


# Of the stages in `artifacts.stages` that follow the tables, what runs each; `prompts` is run by `aligned`, which alone reads it.
RUN = {
    "tuned_encoder": tuned_encoder.run,
    "embeddings": embed.run,
    "adapter": adapter.run,
    "queries": embed.run_queries,
    "quantizer": _renamed_quantizer,
    "ids": assign.run,
    "node_vectors": node_vectors.run,
    "examples": examples.run,
    "generator": train_generator.run,
    "aligned": align.run,
    "serving": lay_out.run,
    "mixture": mixture.run,
    "evaluation": evaluate.run,
}


def _refuse_new_ledger(job: Job) -> None:
    """The ledger of unique IDs is followed from release to release; where this recipe cannot, that must be said aloud."""
    if job.previous is None or job.new_ledger:
        return
    before, quantizer = job.previous.parts["ids"].metrics, job.recipe.quantizer
    if before["ids"] != "unique":
        return
    release = job.previous.release.name
    way_out = (
        "Set the recipe back, publish to another store, or begin a ledger anew with `catid2 reindex --new-ledger`: every product "
        "may then get another ID, and an ID in quarantine may name another product at once"
    )
    if quantizer.ids != "unique":
        raise ReleaseError(
            f"release {release} has unique IDs, whose ledger is continued from release to release, but quantizer.kind "
            f"{quantizer.kind!r} makes IDs of kind {quantizer.ids!r}, which are not followed. {way_out}"
        )
    stated = "codes_per_level" in quantizer.model_fields_set  # else they are the release's (`size`)
    if stated and list(quantizer.codes_per_level) != before["codes_per_level"]:
        raise ReleaseError(
            f"release {release} has IDs of {before['codes_per_level']} codes per level, the recipe asks for "
            f"{list(quantizer.codes_per_level)} (quantizer.codes_per_level), and a ledger holds IDs of one form. {way_out}"
        )


# The stages that an append may run.
APPENDED = ("catalog", "pairs", "embeddings", "ids", "node_vectors", "serving", "mixture", "evaluation")
# A section of the recipe, and the part of a release that was made by it.
_SECTIONS = {
    "catalog": "catalog", "embedding": "embeddings", "quantizer": "quantizer", "ids": "ids", "generator": "generator",
    "alignment": "generator", "serving": "serving", "evaluation": "evaluation",
}  # fmt: skip


def append(job: Job) -> dict[str, Manifest]:
    """The parts of the next release, not published yet. Where the catalogue is the current release's, those of the latter,
    but for how it is served: a changed serving section alone makes a new release. Pairs matter to an append as far as they
    evaluate it: new ones alone change nothing.

    Raises ReleaseError where there is no release to append to or its parts do not belong together, its IDs having been made
    with another quantizer, say; RecipeError where the recipe or the catalogue asks for another encoder, quantizer or kind of
    IDs than the release has. What the recipe leaves out is as in the recipe of the release; the job goes on with both.
    """
    name = job.look()
    if name is None:
        raise ReleaseError(
            f"nothing was published to {job.store.uri} yet, so there is nothing to append to: run `catid2 reindex` first"
        )
    job.previous = open_previous(job.store, name)
    job.plan = APPENDED
    _refuse_other_vectors(job.recipe, job.previous)
    recipe = job.recipe = job.recipe.continued(
        {section: job.previous.parts[part].recipe for section, part in _SECTIONS.items()}
    )
    _refuse_another_recipe(recipe, job.previous)
    parts = dict(job.previous.parts)
    parts["catalog"] = catalog.run(job, {})
    if parts["catalog"].digest == job.previous.parts["catalog"].digest:
        parts = dict(job.previous.parts)
    else:
        check_codes(recipe, parts["catalog"])
        parts["pairs"] = catalog.run_pairs(job, parts)
        door.announce(recipe, job.store, parts)
        door.refuse_unfit(recipe, parts["pairs"], trains=False)
        parts["embeddings"] = embed.run(job, parts, frozen=job.previous.parts)
        parts["ids"] = assign.run(job, parts, keeps=True)
    for name in ("node_vectors", "serving", "mixture"):
        parts.pop(name, None)
        if (made := RUN[name](job, parts)) is not None:
            parts[name] = made
    if parts == job.previous.parts:
        return parts
    if parts["pairs"].metrics["pairs_table"]:
        parts["evaluation"] = evaluate.run(job, parts)
    else:
        progress.event(
            "not_evaluated", reason="the catalogue has no pairs; the release keeps the figures of the one before"
        )
    return parts


def _refuse_another_recipe(recipe: Recipe, previous: PreviousRelease) -> None:
    ids = previous.parts["ids"]
    if ids.metrics["ids"] != "unique":
        raise RecipeError(
            f"release {previous.release.name} has IDs of kind {ids.metrics['ids']!r}, and only unique IDs can be appended to: "
            "others may be shared or renumbered by new products. Run `catid2 reindex`"
        )
    made_by = Recipe.stored(ids.recipe)
    differ = [
        f"{section}.{name} is {value!r}, the release has {had!r}"
        for section in ("embedding", "quantizer")
        for name, value in getattr(recipe, section).decided().items()
        if name not in ("warm_start", "adapter", "encoder_mode")
        and value != (had := getattr(made_by, section).decided()[name])
    ]
    if differ:
        raise RecipeError(
            f"append keeps encoder and quantizer of release {previous.release.name}, but the recipe asks for others: "
            + "; ".join(differ)
            + ". Set them back, or run `catid2 reindex` for a full re-ID"
        )


def _refuse_other_vectors(recipe: Recipe, previous: PreviousRelease) -> None:
    """`recipe`: as it came. What it leaves out is the release's, whatever the recipe that made the embeddings said."""
    section, release = recipe.embedding, previous.release.name
    has = "linear" if "adapter" in previous.parts else "none"
    if "adapter" in section.model_fields_set and section.adapter not in ("auto", has):
        raise RecipeError(
            f"append keeps the adapter of release {release}, which is {has}, but embedding.adapter is "
            f"{section.adapter}. Leave it out, or run `catid2 reindex` for a full re-ID"
        )
    has = "tuned" if "tuned_encoder" in previous.parts else "frozen"
    if "encoder_mode" in section.model_fields_set and section.encoder_mode != has:
        raise RecipeError(
            f"append keeps the encoder of release {release}, which is {has}, but embedding.encoder_mode is "
            f"{section.encoder_mode}. Leave it out, or run `catid2 reindex` for a full re-ID"
        )


def gate_churn(recipe: Recipe, ids: Manifest) -> None:
    """Stops before a generator is trained on IDs that will not be published."""
    limit, churn = recipe.ids.max_churn, ids.metrics["churn"]
    if limit is None or not ids.metrics["base"]:
        return
    if churn is None:
        raise ChurnGateError(
            f"ids.max_churn {limit} is set, but changes since release {ids.metrics['base']} cannot be counted: only unique IDs of "
            "the same levels are followed from release to release. Nothing was published. Set ids.max_churn=null to publish"
        )
    after = churn["after"]
    if after["prefix_churn"][-1] > limit:
        tokens = ", ".join(f"{share:.1%}" for share in after["prefix_churn"])
        raise ChurnGateError(
            f"{after['prefix_churn'][-1]:.1%} of the {after['common']:,} products that release {ids.metrics['base']} has too get "
            f"another ID, above ids.max_churn {limit} (the first 1, 2, … tokens change for {tokens}), and "
            f"{after['addresses_reused']:,} IDs name another product. Nothing was published. Use `catid2 append`, which "
            "moves no ID, set quantizer.warm_start, or raise ids.max_churn"
        )


def check_codes(recipe: Recipe, catalog: Manifest) -> None:
    """What the catalogue alone shows to be hopeless, before hours of training rather than after."""
    quantizer, products = recipe.quantizer, catalog.rows
    if quantizer.query_item and catalog.metrics["width"]:
        raise InputError(
            "quantizer.query_item embeds queries, but the catalogue's embeddings are given and no encoder is known for them: "
            "set embedding.source=encoder or quantizer.query_item=0"
        )
    if quantizer.force_category and catalog.metrics["categories"][0] > quantizer.codes_per_level[0]:
        raise CapacityError(
            f"quantizer.force_category needs a code for each category, but the first depth alone has "
            f"{catalog.metrics['categories'][0]} and quantizer.codes_per_level starts with {quantizer.codes_per_level[0]}: "
            "raise its first entry"
        )
    if quantizer.coder == "tree":
        return
    most, space = max(quantizer.codes_per_level), quantizer.space
    if quantizer.kmeans_sample < most:
        raise CapacityError(
            f"quantizer.kmeans_sample {quantizer.kmeans_sample} cannot start {most} codes of one level "
            f"(quantizer.codes_per_level {list(quantizer.codes_per_level)}): raise the one or lower the other"
        )
    if products < most:
        raise CapacityError(
            f"{products} products cannot fill {most} codes of one level: lower quantizer.codes_per_level "
            f"{list(quantizer.codes_per_level)} (at most {products}) or bring more products"
        )
    if products > space.capacity and quantizer.ids == "unique":
        raise CapacityError(
            f"{products} products do not fit into {space.capacity} IDs of {list(space.codes_per_level)}: raise "
            "quantizer.codes_per_level"
        )
