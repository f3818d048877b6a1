"""What a catalogue shows before anything trains: what was set aside is said, and a recipe that cannot fit it is refused.

Everything here is read off the metrics of tables that are committed, so that another recipe is judged in a moment. A
catalogue that earlier code made lacks some of them, and is let through as it was then.
"""

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError
from catid2_ray.on_ray.machine import progress


def set_aside(store: Store, parts: dict[str, Manifest]) -> dict[str, dict]:
    """By table, for figures: rows set aside `of` how many, `reasons` with their counts, the `first`, and where they lie (`at`).
    Tables of which nothing was set aside are left out."""
    return {
        table: {**found, "at": store.uri_of(manifest.file("rejected"))}
        for manifest in (parts["catalog"], parts["pairs"])
        for table, found in manifest.metrics.get("set_aside", {}).items()
        if found["rows"]
    }


def announce(recipe: Recipe, store: Store, parts: dict[str, Manifest]) -> None:
    """Log lines on what a person should know of this catalogue, though nothing stops for it."""
    catalog, pairs = parts["catalog"], parts["pairs"]
    for table, found in set_aside(store, parts).items():
        reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(found["reasons"].items()))
        progress.event(
            "set_aside", table=table, rows=found["rows"], of=found["of"], reasons=repr(reasons),
            first=repr("; ".join(found["first"][:3])), at=found["at"],
        )  # fmt: skip
    if not pairs.metrics["pairs_table"]:
        progress.event("no_pairs", learns_from="titles", evaluated="nothing")
    for splits, count in pairs.metrics.get("queries_in_two_splits", {}).items():
        progress.event("queries_in_two_splits", splits=repr(splits), queries=count)
    quantizer = recipe.quantizer
    if quantizer.coder == "rq_vae" and catalog.rows <= quantizer.batch:
        progress.event(
            "epochs_of_one_step", stage="quantizer", products=catalog.rows, batch=quantizer.batch,
            advice="'lower quantizer.batch, or raise quantizer.epochs'",
        )  # fmt: skip


def refuse_unfit(recipe: Recipe, pairs: Manifest, *, trains: bool = True) -> None:
    """Raise InputError, with counts and the first ids, where the pairs cannot measure what the recipe asks of them, or where the
    job `trains` and they cannot teach it."""
    if not pairs.metrics["pairs_table"]:
        if recipe.alignment.enabled:
            raise InputError(
                "alignment.enabled needs queries to be aligned to, but the catalogue has no table of pairs: bring one, or set "
                "alignment.enabled=false"
            )
        return
    _refuse_queries(recipe, pairs.metrics)
    if trains:
        _refuse_training(recipe, pairs.metrics)
    if recipe.evaluation.methods:
        _refuse_evaluation(recipe, pairs.metrics)


def _refuse_queries(recipe: Recipe, metrics: dict) -> None:
    if two := metrics.get("query_ids_with_two_texts"):
        raise InputError(
            f"{two} query_id{'s have' if two > 1 else ' has'} more than one text: give each text an id of its own. "
            f"The first {len(metrics['first_with_two_texts'])}:\n  " + "\n  ".join(metrics["first_with_two_texts"])
        )
    leaked = metrics.get("queries_in_two_splits", {}).get("train and test", 0)
    if leaked and not recipe.catalog.allow_leak:
        raise InputError(
            f"{leaked} of {metrics['splits']['test']['queries']} queries of the test split are in the train split too, by their "
            "query_id or by their text as it is compared (case, blanks and accents' spelling apart), so that what is measured was "
            "learned: split by query, or, where it is meant so, set catalog.allow_leak=true. "
            f"The first {len(metrics['first_in_train_and_test'])}:\n  "
            + "\n  ".join(metrics["first_in_train_and_test"])
        )


def _refuse_training(recipe: Recipe, metrics: dict) -> None:
    splits, least = metrics.get("splits"), recipe.generator.min_relevance
    if splits and not splits["train"]["pairs"]:
        raise InputError(
            f"no pair of the train split names a product of the catalogue: {_counts(metrics)}. Check that pairs and products use "
            "the same product_id and that the split is right, or take the table of pairs away to train on titles alone"
        )
    if metrics["train_relevance_max"] < least:
        raise InputError(
            f"no pair of the train split has relevance ≥ {least}: the highest is {metrics['train_relevance_max']}. Lower "
            "generator.min_relevance or check the pairs' split and relevance"
        )


def _refuse_evaluation(recipe: Recipe, metrics: dict) -> None:
    split, least = recipe.evaluation.split, recipe.evaluation.min_relevance
    found = metrics.get("splits", {}).get(split)
    if found is None:
        return
    rather = "or set evaluation.methods=[] to publish without an evaluation"
    if not found["pairs"]:
        raise InputError(
            f"no pair of the {split} split names a product of the catalogue, so nothing can be evaluated: {_counts(metrics)}. "
            f"Check the product_ids and the split, {rather}"
        )
    if found["relevance_max"] < least:
        raise InputError(
            f"none of the {found['queries']} queries of the {split} split has a relevant product: the highest relevance of its "
            f"{found['pairs']} pairs is {found['relevance_max']}, and evaluation.min_relevance is {least}. Lower it, {rather}"
        )


def _counts(metrics: dict) -> str:
    """How many pairs there are by split, and what of them was set aside."""
    of_pairs = metrics["set_aside"]["pairs"]
    kept = ", ".join(f"{split} {found['pairs']}" for split, found in metrics["splits"].items())
    reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(of_pairs["reasons"].items())) or "none"
    first = f"; the first of these: {'; '.join(of_pairs['first'][:3])}" if of_pairs["first"] else ""
    return f"of {of_pairs['of']} pairs {kept} were kept, set aside were {reasons}{first}"
