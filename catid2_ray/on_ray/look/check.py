"""What a `reindex` of a recipe would refuse, and what it would train, without training and without Ray.

Both tables go through the same code at the door as in a job, in this process and into a folder that is deleted afterwards;
the store is only read. 100,000 products take some seconds.
"""

from catid2_ray.artifacts.store import Store
from catid2_ray.config import AdapterRecipe, Recipe, TuningRecipe
from catid2_ray.config.sizes import examples_an_epoch
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import cluster, preflight, scratch
from catid2_ray.on_ray.pipeline import begin, check_codes, size
from catid2_ray.on_ray.stages import adapter, catalog, door, lay_out, tuned_encoder
from catid2_ray.schedule import Phase, Plan


def check(recipe: Recipe) -> dict:
    """Ready for JSON: `products` and `pairs` (rows that were read, how many of them were set aside and why), `splits`,
    `tuned_encoder`, `adapter`, `quantizer`, `generator`, `ids`, `release` (that it builds on), `sized` (numbers that
    the recipe leaves to the catalogue's size, by setting) and `notes`, sentences on what a person should know.

    Raises what `reindex` would raise before it trains, and what its serving stage would raise after.
    """
    preflight.refuse(recipe, aligns=True, runs=False)
    store = Store(recipe.store)
    store.check()
    begins = Job(recipe=recipe, store=store)
    begin(begins)
    with scratch.folder("check") as folder, cluster.without_ray():
        job = Job(recipe=recipe, store=Store(folder), peak=cluster.PeakMemory(), say=_silently)
        parts = {"catalog": catalog.run(job, {})}
        parts["pairs"] = catalog.run_pairs(job, parts)
        recipe, chosen, kept = size(job, parts, begins.previous)
        check_codes(recipe, parts["catalog"])
        door.refuse_unfit(recipe, parts["pairs"])
        tuned_encoder.refuse_impossible(recipe, parts)
        adapter.refuse_impossible(recipe, parts)
        learns = adapter.reason_against(recipe, parts) is None
        lay_out.settings_of(recipe, parts)
        teaching = catalog.teaching_pairs(job.store, parts["pairs"], recipe.generator)
    products, pairs = parts["catalog"].metrics, parts["pairs"].metrics
    figures = {
        "recipe": recipe.name,
        "release": begins.previous.release.name if begins.previous else None,
        "products": {"categories": products["categories"], **_aside(products["set_aside"]["products"])},
        "pairs": {"teaching": teaching, **_aside(pairs["set_aside"]["pairs"])},
        "splits": pairs["splits"] if pairs["pairs_table"] else {},
        "ids": _ids(recipe, parts["catalog"].rows),
        "tuned_encoder": _learning(recipe.tuning, teaching) if recipe.embedding.encoder_mode == "tuned" else None,
        "adapter": _learning(recipe.adapter, teaching) if learns else None,
        "quantizer": _quantizer(recipe, parts["catalog"].rows),
        "generator": _generator(recipe, parts["catalog"].rows, teaching),
    }
    return figures | {"sized": chosen, "notes": [*_sizes(chosen, kept), *_notes(recipe, figures, pairs)]}


def _aside(found: dict) -> dict:
    return {"of": found["of"], "rows_aside": found["rows"], "reasons": found["reasons"], "first": found["first"]}


def _silently(name: str, **values) -> None:
    """In place of the log: what a job's stages say of their keys means nothing here."""


def _ids(recipe: Recipe, products: int) -> dict:
    quantizer = recipe.quantizer
    if quantizer.coder == "tree":
        return {"kind": quantizer.kind}
    codes = list(quantizer.codes_per_level)
    return {
        "kind": quantizer.kind, "codes_per_level": codes, "capacity": quantizer.space.capacity,
        "products_per_first_code": products / codes[0],
    }  # fmt: skip


def _learning(settings: AdapterRecipe | TuningRecipe, teaching: int) -> dict:
    plan = Plan((Phase(settings.epochs, min(teaching, settings.pairs), settings.learning_rate),), settings.batch)
    return {"batch": settings.batch, "epochs": settings.epochs, "steps": plan.steps}


def _quantizer(recipe: Recipe, products: int) -> dict | None:
    """None where it is fitted rather than trained."""
    quantizer = recipe.quantizer
    if quantizer.coder != "rq_vae":
        return None
    plan = Plan((Phase(quantizer.epochs, products, quantizer.learning_rate),), quantizer.batch)
    return {"batch": quantizer.batch, "epochs": quantizer.epochs, "steps": plan.steps}


def _generator(recipe: Recipe, products: int, teaching: int) -> list[dict]:
    """A dict a stage."""
    generator, stages = recipe.generator, []
    for stage in generator.plan:
        rows = examples_an_epoch(stage.mix, teaching=teaching, products=products)
        stages.append(
            {"stage": stage.name, "examples": rows, "batch": generator.batch, "epochs": stage.epochs,
             "steps": stage.epochs * max(1, rows // generator.batch)}
        )  # fmt: skip
    return stages


def _sizes(chosen: dict, kept: dict) -> list[str]:
    """Which numbers the recipe leaves to the catalogue's size."""
    notes = [
        f"{path} is {chosen[path]}, as the current release has it; the size would give {kept[path]}." for path in kept
    ]
    if rest := ", ".join(f"{path} {number}" for path, number in chosen.items() if path not in kept):
        notes.append(f"Chosen by the catalogue's size, as the recipe leaves them out: {rest}.")
    return notes


def _notes(recipe: Recipe, figures: dict, pairs: dict) -> list[str]:
    notes, quantizer = [], figures["quantizer"]
    if not pairs["pairs_table"]:
        notes.append("There are no pairs: the generator learns from titles, nothing is evaluated and no gate holds.")
    if quantizer and quantizer["steps"] <= quantizer["epochs"]:
        notes.append("quantizer: an epoch is one step; lower quantizer.batch, or raise quantizer.epochs.")
    for stage in figures["generator"]:
        if stage["steps"] <= stage["epochs"]:
            notes.append(
                f"generator, stage {stage['stage']}: an epoch is one step; lower generator.batch, or raise generator.epochs."
            )
    for splits, count in pairs.get("queries_in_two_splits", {}).items():
        notes.append(f"{count:,} queries are in {splits}: what is measured on them was learned.")
    if figures["release"]:
        notes.append(f"It builds on release {figures['release']}; `catid2 append` would keep all IDs.")
    return notes
