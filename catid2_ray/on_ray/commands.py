"""What the command line and the jobs call: one verb, the whole chain with its publication, or the scoring of a release."""

import math
from dataclasses import dataclass
from pathlib import Path

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import Release, parts_folder, retriever_settings
from catid2_ray.artifacts.stages import STAGES, of_job
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.catalog.pairs import check_pairs
from catid2_ray.config import ClusterRecipe, Recipe
from catid2_ray.errors import ArtifactError, EncoderError, InputError, QualityGateError, RecipeError, ReleaseError
from catid2_ray.evaluation.diagnosis import diagnose, diagnosis_figures, rows_per_query
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import canary, cluster, progress
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.pipeline import APPENDED, append, chain
from catid2_ray.on_ray.stages import door, evaluate
from catid2_ray.retrieval.retriever import Retriever


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`figures` is the JSON of the job; `made` the stages that ran."""

    release: Release
    figures: dict
    parts: dict[str, Manifest]
    made: list[str]
    trial: Shares | None = None


def run_verb(recipe: Recipe, verb: str, *, wait: bool = False) -> tuple[Store, Manifest]:
    """One verb's stages alone; the stages before must be committed (ArtifactError names the job to run first)."""
    if verb == "align_generator" and not recipe.alignment.enabled:
        raise RecipeError(
            "alignment.enabled is off, and what is published would not be aligned: set alignment.enabled=true in the recipe"
        )
    stages = of_job(verb)
    with Job.open(recipe, only=stages, wait=wait) as job:
        return job.store, chain(job, stages[-1])[STAGES[stages[-1]].role]


def publish(recipe: Recipe, *, wait: bool = False) -> tuple[Store, Release]:
    """Publish the committed parts of this recipe; QualityGateError when the evaluation is under the recipe's demand."""
    with Job.open(recipe, only=(), wait=wait) as job:
        parts = chain(job)
        figures = parts["evaluation"].metrics
        _gate(job, figures)
        _ask_canaries(job, parts, figures)
        return job.store, job.publish(parts)


def reindex(recipe: Recipe, *, wait: bool = False, trial: Shares | None = None, **choices: bool) -> Outcome:
    """The whole chain: continue at the first stage without a committed manifest, evaluate, publish.

    `wait` for another job on the store to end; `trial`: put the release on trial in place of publishing it; `choices`: new_ledger,
    refit_encoder, refresh_adapter, refresh_encoder, as in Job.
    """
    with Job.open(recipe, wait=wait, resize=choices.get("new_ledger", False), **choices) as job:
        _check_trial(job, trial)
        parts = chain(job)
        figures = figures_of(parts, job.store)
        _gate(job, figures)
        return _published(job, parts, figures, trial)


def append_items(recipe: Recipe, *, wait: bool = False, trial: Shares | None = None) -> Outcome:
    """Today's catalogue under the current release's quantizer and generator: see `pipeline.append`; evaluate, publish."""
    with Job.open(recipe, only=APPENDED, wait=wait) as job:
        parts = append(job)
        figures = figures_of(parts, job.store)
        if parts["evaluation"].parents["ids"] == parts["ids"].digest:  # else it is that of the release before
            _gate(job, figures)
        return _published(job, parts, figures, trial)


def _check_trial(job: Job, trial: Shares | None) -> None:
    """Before any work: a trial needs a release beside which it is tried."""
    if trial is not None and releases.pointer(job.store)[1] is None:
        raise ReleaseError(
            f"nothing was published to {job.store.uri} yet, so there is nothing to try a release beside: leave --trial out"
        )


def _published(job: Job, parts: dict[str, Manifest], figures: dict, trial: Shares | None = None) -> Outcome:
    figures = figures | {"canary": _ask_canaries(job, parts, figures)}
    release = job.publish(parts) if trial is None else job.put_on_trial(parts, trial)
    figures = {"release": release.name, "changes_to_carry": job.younger, **figures}
    return Outcome(release=release, figures=figures, parts=parts, made=job.made, trial=trial)


def figures_of(parts: dict[str, Manifest], store: Store) -> dict:
    """The job's JSON; `not_evaluated` says why, where nothing was. Seconds and peak memory are those of the runs that made the
    stages, not of a rerun that found them."""
    ids, scores = parts["ids"].metrics, parts["evaluation"].metrics
    return {
        "documents": ids["documents"],
        "collision_rate_before": ids["collision_rate_before"],
        "duplicates_after": ids["duplicates_after"],
        "codes_used": ids["codes_used"],
        "codes_per_level": ids["codes_per_level"],
        **{name: ids[name] for name in ("number", "base", "ledger", "churn")},
        **{name: scores[name] for name in ("recall", "recall_seen", "recall_unseen", "queries")},
        **{name: parts[name].metrics for name in ("tuned_encoder", "adapter") if name in parts},
        **{name: scores[name] for name in ("not_evaluated", "diagnosis") if name in scores},
        **({"node_vector_bytes": parts["node_vectors"].metrics["bytes"]} if "node_vectors" in parts else {}),
        **({"mixture": parts["mixture"].metrics} if "mixture" in parts else {}),
        "set_aside": door.set_aside(store, parts),
        "seconds": {
            stage.timed: _seconds(parts[stage.role]) for stage in STAGES.values() if stage.timed and stage.role in parts
        },
        "peak_memory_bytes": max(manifest.metrics["peak_memory_bytes"] for manifest in parts.values()),
    }


def _seconds(manifest: Manifest) -> float:
    return manifest.metrics["seconds"] + manifest.metrics.get("seconds_training", 0.0)


def _gate(job: Job, figures: dict) -> None:
    """Stop before a publication whose recall is below what the recipe demands; say aloud where nothing can be demanded."""
    before = job.previous.parts["evaluation"].metrics["recall"] if job.previous else None
    if ungated := gate(job.recipe, figures, before):
        progress.event("not_gated", reason=f"'{ungated}'")


def gate(recipe: Recipe, figures: dict, before: dict | None) -> str | None:
    """Raise GateFailed where recall@50 of what is served (else of the beam) is under the demanded share of BM25's or, where BM25
    was not scored, of `before`: the recall of the current release, by method. Returns why nothing was demanded, None where
    something was."""
    if "not_evaluated" in figures:
        return figures["not_evaluated"]
    recall = figures["recall"]
    judged = "served" if "served" in recall else "beam"
    if judged not in recall:
        return "neither served nor beam is among evaluation.methods"
    if "bm25" in recall:
        name, whose, other = "min_beam_to_bm25", "BM25's", recall["bm25"]
    elif before and judged in before:
        name, whose, other = "min_to_release", "the current release's", before[judged]
    else:
        return "BM25 was not scored, and no release of before says what to expect"
    share, reached = getattr(recipe.evaluation, name), recall[judged]["50"]
    if reached < share * other["50"]:
        raise GateFailed(
            f"recall@50 of {'what is served' if judged == 'served' else 'the beam'} is {reached:.3f}, under {share} × {whose} "
            f"{other['50']:.3f} (evaluation.{name}). Nothing was published. Train the generator twice as long "
            f"({_twice(recipe)}); if that does not help, look for collapsed codes with `catid2 report-ids`. To publish it all the "
            f"same, set evaluation.{name}={math.floor(100 * reached / other['50']) / 100:g}",
            figures,
        )
    return None


def _ask_canaries(job: Job, parts: dict[str, Manifest], figures: dict) -> dict | None:
    """Ask what will be published what its evaluation asked, beside the current release; returns what that gave, None where there
    is nothing to ask or to publish. Raises GateFailed."""
    current = releases.pointer(job.store)[1]
    before = None
    try:
        before = None if current is None else releases.load(job.store, current)
    except ArtifactError as error:  # its record is gone, and `--new-ledger` goes on without it
        progress.event("no_canary", of=current, reason=repr(str(error)))
    answers = canary.kept_answers(job.store, parts)
    digests = {name: part.digest for name, part in parts.items()}
    if before and all(digests.get(name) == part["digest"] for name, part in before.parts.items()):
        return None
    if not answers:
        progress.event("no_canary", reason="'the evaluation kept no answers of what is served'")
        return None
    try:
        candidate = _opened(job.store, parts, retriever_settings(parts, release="candidate"))
    except EncoderError as error:  # it is on the nodes that evaluated, and on those that will serve
        progress.event("no_canary", reason=repr(str(error)))
        return None
    retrievers, asked = [candidate], canary.given_back(candidate, answers)
    try:
        if before and job.recipe.evaluation.canary_slower:
            manifests = before.manifests(job.store)
            retrievers.append(_opened(job.store, manifests, retriever_settings(manifests, release=before.name)))
    except (ArtifactError, EncoderError) as error:
        progress.event("no_canary", of=before.name, reason=repr(str(error)))
    seconds = canary.seconds_in_turns(retrievers, list(answers)[:_TIMED])
    known = bool(canary.stored_answers(job.store, parts))
    found = {
        "queries": len(answers), "given_back": asked.share if known else None, "empty": asked.empty / len(answers),
        "ms": 1e3 * seconds[0], "ms_before": 1e3 * seconds[1] if len(seconds) > 1 else None,
    }  # fmt: skip
    progress.event("canary", **{name: f"{value:.3g}" for name, value in found.items() if value is not None})
    canary_gate(job.recipe, found, figures)
    return found


def _opened(store: Store, parts: dict[str, Manifest], settings: dict) -> Retriever:
    return open_retriever(parts_folder(store, parts, releases.default_cache(), settings))


_TIMED = 20  # queries that are timed
_LONGER_MS = 20.0  # what a query must take longer before a ratio says anything


def canary_gate(recipe: Recipe, found: dict, figures: dict) -> None:
    """Raise GateFailed, with `figures`, where the canary queries gave less than the recipe demands. `found`: queries; given_back,
    a share, None where an append took the evaluation over; empty, a share; ms and ms_before, None where nothing is current."""
    demands, before_ms = recipe.evaluation, found["ms_before"]
    said, way_out = None, None
    if found["given_back"] is not None and found["given_back"] < demands.canary_recall:
        said = (
            f"gives back {found['given_back']:.0%} of the products that its evaluation found, less than "
            f"{demands.canary_recall:.0%} (evaluation.canary_recall): its parts, this machine or this version answer otherwise"
        )
        way_out = f"canary_recall={math.floor(100 * found['given_back']) / 100:g}"
    elif found["empty"] > demands.canary_empty:
        said = f"finds nothing for {found['empty']:.0%}, more than {demands.canary_empty:.0%} (evaluation.canary_empty)"
        way_out = f"canary_empty={math.ceil(100 * found['empty']) / 100:g}"
    elif (
        demands.canary_slower
        and before_ms
        and found["ms"] > max(demands.canary_slower * before_ms, before_ms + _LONGER_MS)
    ):
        said = (
            f"takes {found['ms']:.0f} ms a query where the current release takes {before_ms:.0f}, more than "
            f"{demands.canary_slower:g} × as long (evaluation.canary_slower): look at serving.beam_width, or use a quiet machine"
        )
        way_out = f"canary_slower={math.ceil(10 * found['ms'] / before_ms) / 10:g}"
    if said:
        raise GateFailed(
            f"asked {found['queries']} queries before its publication, the release {said}. Nothing was published. To publish it "
            f"all the same, set evaluation.{way_out}",
            figures,
        )


def _twice(recipe: Recipe) -> str:
    """The setting that trains the generator twice as long."""
    stages = recipe.generator.stages
    if stages:
        return "generator.stages: " + ", ".join(f"{stage.name} epochs={2 * stage.epochs}" for stage in stages)
    return f"generator.epochs={2 * recipe.generator.epochs}"


class GateFailed(QualityGateError):
    """Carries the figures, so that the closing table can be shown."""

    def __init__(self, message: str, figures: dict):
        super().__init__(message)
        self.figures = figures


def evaluate_release(
    store_uri: str, pairs_file: str, *, split: str, min_relevance: float, methods: tuple[str, ...], workers: int = 2
) -> dict:
    """Score the current release of a store on another table of pairs; the same recall keys as the job's figures."""
    store = Store(store_uri)
    store.check()
    release = releases.current(store)
    parts = release.manifests(store)
    path = Path(pairs_file)
    source = Store(pairs_file.rsplit("/", 1)[0] if pairs_file.startswith("s3://") else str(path.parent))
    name = pairs_file.rsplit("/", 1)[-1] if pairs_file.startswith("s3://") else path.name
    checked = check_pairs(source.read_table(name))
    if checked.bad.num_rows:
        progress.event("set_aside", pairs=checked.bad.num_rows, first=repr(checked.bad["reason"][0].as_py()))
    judgements = evaluate.judge(store, parts, checked.good, split=split, min_relevance=min_relevance)
    made_by = Recipe.stored(parts["evaluation"].recipe)
    cluster.connect(ClusterRecipe())
    try:
        figures = evaluate.score(
            store,
            parts,
            judgements,
            beam_width=parts["evaluation"].settings["beam_width"],
            methods=methods,
            workers=workers,
            seed=0,
            query_encoder=made_by.serving.query_encoder,
            ahead=evaluate.ahead_of(made_by, parts) if "lookahead" in methods else None,
        )
    finally:
        cluster.disconnect()
    for name in ("sample_queries", "answers"):
        figures.pop(name, None)
    return {"release": release.name, **figures}


def diagnose_release(store_uri: str, *, release: str | None, queries: int, split: str) -> dict:
    """Where relevant products of a release's own pairs are lost, as it was published, in this process; at most `queries`."""
    store = Store(store_uri)
    store.check()
    chosen = releases.current(store) if release is None else releases.load(store, release)
    parts = chosen.manifests(store)
    if not parts["pairs"].metrics["pairs_table"]:
        raise InputError(f"release {chosen.name} has no pairs, so nothing says which products are relevant")
    judged = evaluate.judge(
        store, parts, evaluate.pairs_of_split(store, parts["pairs"], split), split=split,
        min_relevance=parts["evaluation"].settings["min_relevance"],
    )  # fmt: skip
    judged = evaluate.sampled(judged, queries, seed=parts["evaluation"].settings["seed"])
    retriever = open_retriever(releases.release_folder(store, chosen, releases.default_cache()))
    cost = rows_per_query(retriever)
    progress.event("diagnose", queries=len(judged.queries), decoder_rows=cost * len(judged.queries))
    diagnosis = diagnose(retriever, judged.queries, judged.relevant)
    return {"release": chosen.name, "diagnosis": diagnosis_figures(diagnosis, split=split, rows_per_query=cost)}
