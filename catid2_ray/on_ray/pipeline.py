"""The chain of stages and its cache: what is committed is found, what is not is made, and only then is Ray started.

catalog → embeddings (→ queries, for kinds that learn from them) → quantizer → ids → examples → generator (→ prompts →
generator aligned, where the recipe asks for it) → serving → evaluation → release
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError, CapacityError, InputError, QualityGateError, RecipeError
from catid2_ray.on_ray import cluster, progress
from catid2_ray.on_ray.base import Base, open_base

VERB_OF = {
    "catalog": "embed_catalog",
    "embeddings": "embed_catalog",
    "queries": "train_quantizer",
    "quantizer": "train_quantizer",
    "ids": "assign_ids",
    "examples": "train_generator",
    "generator": "train_generator",
    "prompts": "align_generator",
    "aligned": "align_generator",
    "serving": "evaluate",
    "evaluation": "evaluate",
}


@dataclass
class Job:
    """One run of a recipe against its store.

    `produce` is how every stage makes its artefact. `only` limits what may be made: a stage outside it must be committed
    already, else an ArtifactError names the job to run first. A stage has the name of the kind that it makes, but for
    "aligned", which makes a generator of a generator. `made` tells which stages ran. `base`: the release that is built
    on; `pointer`: how often something had been published when the work began.
    """

    recipe: Recipe
    store: Store
    only: frozenset[str] = frozenset(VERB_OF)
    made: list[str] = field(default_factory=list)
    peak: cluster.PeakMemory | None = None
    base: Base | None = None
    pointer: int | None = None
    quiet: bool = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, recipe: Recipe, *, only=tuple(VERB_OF)) -> Iterator["Job"]:
        """Checks the store first, so that an unreachable bucket fails before any work; shuts Ray down at the end."""
        _refuse_relative(recipe)
        store = Store(recipe.store)
        store.check()
        try:
            with cluster.PeakMemory() as peak:
                yield cls(recipe=recipe, store=store, only=frozenset(only), peak=peak)
        finally:
            cluster.disconnect()

    def produce(
        self, kind: str, settings: dict, parents: dict[str, Manifest], work: Callable[[Attempt], Manifest], *,
        stage: str | None = None,
    ) -> Manifest:  # fmt: skip
        """The committed artefact of these inputs and settings, made by `work` where it does not exist yet."""
        stage = stage or kind
        digests = {role: parent.digest for role, parent in parents.items()}
        found = artifact.find(self.store, kind, artifact.key_of(kind, settings, digests))
        if found:
            artifact.verify(self.store, found)
            if not self.quiet:
                progress.event("reuse", stage=stage, key=found.key)
            return found
        if stage not in self.only:
            raise ArtifactError(
                f"{self.store.uri} holds no {stage} for this recipe: run `python -m jobs.{VERB_OF[stage]} --recipe …` first, "
                "or `jobs.reindex` for the whole chain"
            )
        attempt = Attempt(
            self.store, kind, settings=settings, parents=digests, recipe=self.recipe.model_dump(mode="json")
        )
        attempt.measure = lambda: {"peak_memory_bytes": self.peak.lap()}
        self.peak.lap()
        progress.event("start", stage=stage, key=attempt.key)
        recipe = self.recipe
        cluster.connect(recipe.cluster, workers=recipe.most_workers)
        try:
            made = work(attempt)
        except BaseException:
            self.store.delete_folder(attempt.name("exchange"))
            raise
        self.made.append(stage)
        progress.event("commit", stage=stage, key=made.key, digest=made.digest[:12], seconds=made.metrics["seconds"])
        return made


ROLE_OF = {"aligned": "generator"}  # under which name a stage's artefact goes on, where it is not its own


def chain(job: Job, last: str = "evaluation") -> dict[str, Manifest]:
    """Run or find every stage up to `last`; returns their manifests by name. Sets `base` and `pointer` of the job."""
    from catid2_ray.on_ray import catalog

    parts = {"catalog": catalog.run(job, {})}
    if last != "catalog":
        check_codes(job.recipe, parts["catalog"])
        if last in _NEED_PAIRS:
            _refuse_without_pairs(job.recipe, parts["catalog"])
        job.pointer, current = releases.pointer(job.store)
        job.base = _base(job, parts["catalog"], open_base(job.store, current))
        _after_catalog(job, parts, last)
    return parts


def _after_catalog(job: Job, parts: dict[str, Manifest], last: str) -> None:
    from catid2_ray.on_ray import align, embed, evaluate, examples, realign, serving, train_generator, train_quantizer
    from catid2_ray.on_ray.assign import stage as assign

    def quantizer(job: Job, parts: dict[str, Manifest]) -> Manifest:
        return realign.run(job, {**parts, "quantizer": train_quantizer.run(job, parts)})

    stages = {
        "embeddings": embed.run,
        **({"queries": embed.run_queries} if job.recipe.quantizer.query_item else {}),
        "quantizer": quantizer,
        "ids": assign.run,
        "examples": examples.run,
        "generator": train_generator.run,
        "aligned": align.run,
        "serving": serving.run,
        "evaluation": evaluate.run,
    }
    for name, run in stages.items():
        if name == "examples":
            _gate_churn(job.recipe, parts["ids"])
        parts[ROLE_OF.get(name, name)] = run(job, parts)
        if name == last:
            return


def _base(job: Job, catalog: Manifest, current: Base | None) -> Base | None:
    """What a full re-ID of this catalogue builds on: the current release, but for a rerun what that was built on.

    A rerun must find what the run before it made, though that has been published meanwhile. It is one when this recipe's
    chain on the older base leads to the very IDs of the current release.
    """
    if current is None or current.appended or current.parts["catalog"].digest != catalog.digest:
        return current
    try:
        before = open_base(job.store, current.parts["ids"].metrics["base"])
        parts = {"catalog": catalog}
        _after_catalog(replace(job, only=frozenset(), base=before, quiet=True), parts, "ids")
    except ArtifactError:  # that chain leads nowhere, or the older release is gone
        return current
    return before if parts["ids"].digest == current.parts["ids"].digest else current


def _refuse_relative(recipe: Recipe) -> None:
    """In a submitted job the working directory is a copy that Ray deletes, and that other nodes do not see."""
    read = {"store": recipe.store, "catalog.root": recipe.catalog.root}
    for name, uri in (read | {"alignment.ranker_scores": recipe.alignment.ranker_scores}).items():
        if os.environ.get("RAY_ADDRESS") and uri and "://" not in uri and not os.path.isabs(uri):
            raise RecipeError(
                f"{name} {uri!r} is a relative path, but this job runs on a cluster, in a copy of the working directory "
                f"that is deleted afterwards: set {name} to s3://… or to an absolute path that all nodes share"
            )


def _gate_churn(recipe: Recipe, ids: Manifest) -> None:
    """Stops before a generator is trained on IDs that will not be published."""
    limit, churn = recipe.ids.max_churn, ids.metrics["churn"]
    if limit is None or not ids.metrics["base"]:
        return
    if churn is None:
        raise QualityGateError(
            f"ids.max_churn {limit} is set, but changes since release {ids.metrics['base']} cannot be counted: only unique IDs of "
            "the same levels are followed from release to release. Nothing was published. Set ids.max_churn=null to publish"
        )
    after = churn["after"]
    if after["prefix_churn"][-1] > limit:
        tokens = ", ".join(f"{share:.1%}" for share in after["prefix_churn"])
        raise QualityGateError(
            f"{after['prefix_churn'][-1]:.1%} of the {after['common']:,} products that release {ids.metrics['base']} has too get "
            f"another ID, above ids.max_churn {limit} (the first 1, 2, … tokens change for {tokens}), and "
            f"{after['addresses_reused']:,} IDs name another product. Nothing was published. Use `catid2 append`, which "
            "moves no ID, set quantizer.warm_start, or raise ids.max_churn"
        )


_NEED_PAIRS = ("examples", "generator", "aligned", "serving", "evaluation")


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


def _refuse_without_pairs(recipe: Recipe, catalog: Manifest) -> None:
    if not catalog.metrics["pairs_table"]:
        Store(recipe.catalog.root).parquet_files("pairs")  # says what it looked for and where
    if catalog.metrics["train_relevance_max"] < recipe.generator.min_relevance:
        raise InputError(
            f"no pair of the train split has relevance ≥ {recipe.generator.min_relevance}: the highest is "
            f"{catalog.metrics['train_relevance_max']}. Lower generator.min_relevance or check the pairs' split and relevance"
        )
