"""One run of a recipe: what is committed is found, what is not is made, and only then is Ray started."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError, FormatError, RecipeError, ReleaseError
from catid2_ray.on_ray.machine import cluster, progress, signals


@dataclass(frozen=True)
class PreviousRelease:
    """The release that a run builds on: its ledger goes on, its IDs are kept or aligned to, and churn is counted against it."""

    release: Release
    parts: dict[str, Manifest]

    @property
    def number(self) -> int:
        """Releases are numbered by their IDs: each artefact of IDs is one more than the one it was built on."""
        return self.parts["ids"].metrics["number"]

    @property
    def appended(self) -> bool:
        return "append" in self.parts["ids"].settings


def open_previous(store: Store, name: str | None) -> PreviousRelease | None:
    """A release to build on; None without a name, and, with a line in the log, where an older version of this software wrote it.

    Raises ReleaseError where the release is recorded but its parts are gone or do not match.
    """
    if name is None:
        return None
    try:
        release = releases.load(store, name)
        return PreviousRelease(release, release.manifests(store))
    except FormatError as error:
        progress.event("new_ledger", base=name, reason=f"'{error}'")
        return None
    except ReleaseError as error:
        raise ReleaseError(
            f"{error}. What is made now would continue that release's ledger: restore it, or, to start anew without knowing "
            f"which IDs were given before, delete {store.uri_of('current')}"
        ) from None


@dataclass
class Job:
    """One run of a recipe against its store.

    `produce` is how every stage makes its artefact. `only` limits what may be made: a stage outside it must be committed
    already, else an ArtifactError names the job to run first. A stage has the name of the kind that it makes, but for
    "aligned", which makes a generator of a generator. `made` tells which stages ran, `committed` the keys of those that
    are there, made or found. `previous`: the release that is
    built on; `pointer`: how often something had been published when the work began.
    """

    recipe: Recipe
    store: Store
    only: frozenset[str] = frozenset(STAGES)
    made: list[str] = field(default_factory=list)
    committed: dict[str, str] = field(default_factory=dict)
    peak: cluster.PeakMemory | None = None
    previous: PreviousRelease | None = None
    pointer: int | None = None
    quiet: bool = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, recipe: Recipe, *, only=tuple(STAGES)) -> Iterator["Job"]:
        """Checks the store first, so that an unreachable bucket fails before any work; shuts Ray down at the end.

        SIGINT and SIGTERM end it within seconds by Interrupted, which says what is committed.
        """
        _refuse_relative(recipe)
        store = Store(recipe.store)
        store.check()
        job = cls(recipe=recipe, store=store, only=frozenset(only))
        with signals.stoppable(job.account):
            try:
                with cluster.PeakMemory() as job.peak:
                    yield job
            finally:
                cluster.disconnect()

    def account(self) -> str:
        """For a person who stopped the job: what is kept, and how to go on."""
        stages = ", ".join(f"{stage} {key}" for stage, key in self.committed.items())
        return (
            f"Committed in {self.store.uri}: {stages or 'nothing yet'}. The same command goes on from there, and a training from "
            "its last checkpoint"
        )

    def produce(
        self, kind: str, settings: dict, parents: dict[str, Manifest], work: Callable[[Attempt], Manifest], *,
        stage: str | None = None,
    ) -> Manifest:  # fmt: skip
        """The committed artefact of these inputs and settings, made by `work` where it does not exist yet."""
        stage = stage or kind
        digests = {role: parent.digest for role, parent in parents.items()}
        committed = artifact.find(self.store, kind, artifact.key_of(kind, settings, digests))
        if committed:
            artifact.verify(self.store, committed)
            if not self.quiet:
                self.committed[stage] = committed.key
                progress.event("reuse", stage=stage, key=committed.key)
            return committed
        if stage not in self.only:
            raise ArtifactError(
                f"{self.store.uri} holds no {stage} for this recipe: run `python -m jobs.{STAGES[stage].job} --recipe …` first, "
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
            manifest = work(attempt)
        except BaseException:
            self.store.delete_folder(attempt.name("exchange"))
            raise
        self.made.append(stage)
        self.committed[stage] = manifest.key
        progress.event(
            "commit", stage=stage, key=manifest.key, digest=manifest.digest[:12], seconds=manifest.metrics["seconds"]
        )
        return manifest


def _refuse_relative(recipe: Recipe) -> None:
    """In a submitted job the working directory is a copy that Ray deletes, and that other nodes do not see."""
    read = {"store": recipe.store, "catalog.root": recipe.catalog.root}
    for name, uri in (read | {"alignment.ranker_scores": recipe.alignment.ranker_scores}).items():
        if os.environ.get("RAY_ADDRESS") and uri and "://" not in uri and not os.path.isabs(uri):
            raise RecipeError(
                f"{name} {uri!r} is a relative path, but this job runs on a cluster, in a copy of the working directory "
                f"that is deleted afterwards: set {name} to s3://… or to an absolute path that all nodes share"
            )
