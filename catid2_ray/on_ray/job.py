"""One run of a recipe: what is committed is found, what is not is made, and only then is Ray started."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from catid2_ray.artifacts import history, trials, uses
from catid2_ray.artifacts import lease as leases
from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError, CommitConflict, FormatError, ReleaseError, StorageError
from catid2_ray.on_ray.machine import cluster, preflight, progress, scarce, signals


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


def open_previous(store: Store, name: str | None, *, new_ledger: bool = False) -> PreviousRelease | None:
    """A release to build on; None without a name, and, with a line in the log, where it cannot be read and `new_ledger` allows to
    do without it.

    Raises ArtifactError where the release is recorded but cannot be read: its parts are gone, do not match, or were written by a
    version of this software whose formats this one does not read.
    """
    if name is None:
        return None
    try:
        release = releases.load(store, name)
        return PreviousRelease(release, release.manifests(store))
    except (FormatError, ReleaseError) as error:
        if new_ledger:
            progress.event("new_ledger", base=name, reason=f"'{error}'")
            return None
        raise type(error)(
            f"{error}. What is made now continues the ledger of release {name}, which says which IDs were given and which are in "
            "quarantine: restore the release, or begin a ledger anew with `catid2 reindex --new-ledger`, which may give every "
            "product another ID"
        ) from None


HISTORY = frozenset({"previous", "warm", "encoder"})  # roles of parents that come from the release that is built on


@dataclass
class Job:
    """One run of a recipe against its store.

    `produce` is how every stage makes its artefact. `only` limits what may be made: a stage outside it must be committed
    already, else an ArtifactError names the job to run first. `plan`: the stages that the recipe asks for, in their order, by
    which bars and log lines count them; empty where they are not counted. A stage has the name of the kind that it makes, but for
    "aligned", which makes a generator of a generator. `made` tells which stages ran, `committed` the keys of those that
    are there, made or found, `proven` the folders whose bytes it knows. `previous`: the release that is built on; `pointer`:
    how often something had been published when the work began, and `seen` how many live changes each release had when the tables
    of the catalogue were read. `younger`: how many came since, known once it has published. `new_ledger`: a ledger may be begun
    anew where that of the previous release cannot be continued.
    `resize`: numbers that follow the catalogue's size are chosen anew, whatever the release has.
    `refit_encoder`: a fitted text encoder is fitted anew; `refresh_adapter`: so is the adapter, `refresh_encoder`: a tuned
    encoder is tuned anew. `lease`: that of the store;
    None for a job that only reads or compares. `say`: where the lines of the log go.
    """

    recipe: Recipe
    store: Store
    only: frozenset[str] = frozenset(STAGES)
    plan: tuple[str, ...] = ()
    made: list[str] = field(default_factory=list)
    proven: set[str] = field(default_factory=set)
    committed: dict[str, str] = field(default_factory=dict)
    peak: cluster.PeakMemory | None = None
    previous: PreviousRelease | None = None
    pointer: int | None = None
    seen: dict[str, int] | None = None
    younger: int = 0
    new_ledger: bool = False
    resize: bool = False
    refit_encoder: bool = False
    refresh_adapter: bool = False
    refresh_encoder: bool = False
    lease: leases.Lease | None = None
    say: Callable[..., None] = progress.event

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, recipe: Recipe, *, only=tuple(STAGES), lease: bool = True, wait: bool = False, **choices
    ) -> Iterator["Job"]:
        """Checks the store first, so that an unreachable bucket fails before any work; shuts Ray down at the end.

        `lease`: be the only job on the store, LeaseError where another is at work, unless `wait`; without it the job only
        registers, so that gc leaves it alone. SIGINT and SIGTERM end it within seconds by Interrupted, which says what is
        committed.
        """
        preflight.refuse(recipe, aligns="aligned" in only)
        store = Store(recipe.store)
        store.check()
        if lease:
            preflight.check_store(store)
        job = cls(recipe=recipe, store=store, only=frozenset(only), **choices)
        with contextlib.ExitStack() as ends:
            ends.enter_context(signals.stoppable(job.account))
            if lease:
                job.lease = ends.enter_context(leases.holding(store, wait=wait, say=progress.event))
            else:
                ends.enter_context(uses.job(store, say=progress.event))
            ends.callback(cluster.disconnect)
            job.peak = ends.enter_context(cluster.PeakMemory())
            yield job

    def account(self) -> str:
        """For a person who stopped the job: what is kept, and how to go on."""
        stages = ", ".join(f"{stage} {key}" for stage, key in self.committed.items())
        return (
            f"Committed in {self.store.uri}: {stages or 'nothing yet'}. The same command goes on from there, and a training from "
            "its last checkpoint"
        )

    def check_lease(self) -> None:
        """Raise LeaseError where another job took the lease of this one, which hung; before each commit."""
        if self.lease:
            self.lease.check()

    def is_alone(self) -> bool:
        """Whether no other job works on the store, with or without a lease."""
        jobs, _ = uses.alive(self.store, "uses/jobs")
        return not jobs if self.lease else len(jobs) < 2 and leases.look(self.store).is_free

    def publish(self, parts: dict[str, Manifest]) -> Release:
        """Make these parts the current release, if nothing else was published since the work began; counts and says how many live
        changes are younger than its catalogue."""
        self.check_lease()
        release, moved = releases.publish(self.store, parts, after=self.pointer, seen=self.seen)
        self.younger = history.younger(self.store, history.entries(self.store), release.name) if moved else 0
        if self.younger:
            self.say("changes_to_carry", release=release.name, changes=self.younger)
        return release

    def put_on_trial(self, parts: dict[str, Manifest], shares: Shares) -> Release:
        """Store these parts as a release, and put it on trial beside the one that is current; see `artifacts.trials`."""
        self.check_lease()
        if releases.pointer(self.store)[0] != self.pointer:
            raise CommitConflict(
                f"another release became current in {self.store.uri} while this job ran: nothing was put on trial, nor lost. "
                "Look at what is current, and rerun to build on top of it"
            )
        release = releases.keep(self.store, releases.made(self.store, parts))
        trials.begin(self.store, release.name, shares, seen=self.seen)
        self.younger = history.younger(self.store, trials.moves(self.store, release.name), release.name)
        self.say("on_trial", release=release.name, percent=shares.percent, shadow=shares.shadow)
        return release

    def look(self) -> str | None:
        """The name of the release that is current, None where there is none. Keeps `pointer` and `seen`: to be called before the
        catalogue is read; one that is found says itself what it has seen."""
        self.pointer, current = releases.pointer(self.store)
        self.seen = releases.live_changes(self.store)
        return current

    def produce(
        self, kind: str, settings: dict, parents: dict[str, Manifest], work: Callable[[Attempt], Manifest], *,
        stage: str | None = None, history: dict[str, Manifest] | None = None, anew: bool = False,
    ) -> Manifest:  # fmt: skip
        """The committed artefact of these inputs and settings, made by `work` where it does not exist yet.

        `history`: parents that come from the release that is built on, by role: what is made now starts from them. What that
        release itself holds, made of the same other parents with the same settings, is taken as it is, whatever it had
        started from (unless `anew`): nothing that matters has changed since, so nothing is to be made or renamed.
        """
        stage, history = stage or kind, history or {}
        settings = STAGES[stage].settings(settings)
        digests = _digests(parents | history)
        if committed := self.find(kind, settings, parents, history, anew=anew):
            artifact.verify(self.store, committed)
            self.committed[stage] = committed.key
            self.say("reuse", stage=stage, key=committed.key)
            return committed
        if stage not in self.only:
            raise ArtifactError(
                f"{self.store.uri} holds no {stage} for this recipe: run `python -m jobs.{STAGES[stage].job} --recipe …` first, "
                "or `jobs.reindex` for the whole chain"
            )
        for parent in (parents | history).values():
            self.prove(parent)
        self.check_lease()
        attempt = Attempt(
            self.store, kind, settings=settings, parents=digests, recipe=self.recipe.model_dump(mode="json")
        )
        attempt.measure, attempt.guard = lambda: {"peak_memory_bytes": self.peak.lap()}, self.check_lease
        self.peak.lap()
        position = f"{self.plan.index(stage) + 1}/{len(self.plan)}" if stage in self.plan else ""
        self.say("start", stage=stage, key=attempt.key, **({"position": position} if position else {}))
        recipe = self.recipe
        cluster.connect(recipe.cluster, workers=recipe.most_workers)
        try:
            with progress.at_position(position):
                manifest = work(attempt)
        except BaseException as error:
            # A store that is away must not take the place of the cause.
            with contextlib.suppress(StorageError), self.store.impatient():
                self.store.delete_folder(attempt.name("exchange"))
            if scarce_error := scarce.named(error, stage):
                raise scarce_error from error
            raise
        self.made.append(stage)
        self.proven.add(manifest.folder)
        self.committed[stage] = manifest.key
        self.say(
            "commit", stage=stage, key=manifest.key, digest=manifest.digest[:12], seconds=manifest.metrics["seconds"]
        )
        return manifest

    def prove(self, manifest: Manifest) -> None:
        """Read an artefact through, if this job neither made it nor did so before; ArtifactError for a file that is not what was
        committed. What a stage is made of is read anyway."""
        if manifest.folder not in self.proven:
            artifact.prove(self.store, manifest)
            self.proven.add(manifest.folder)

    def find(
        self, kind: str, settings: dict, parents: dict[str, Manifest], history: dict[str, Manifest], *, anew: bool
    ) -> Manifest | None:
        """What `produce` takes as it is; None where there is none. `settings`: with the stage's version."""
        committed = artifact.find(self.store, kind, artifact.key_of(kind, settings, _digests(parents | history)))
        if committed is None and not anew:
            committed = self._unchanged(kind, settings, _digests(parents))
        return committed

    def _unchanged(self, kind: str, settings: dict, digests: dict[str, str]) -> Manifest | None:
        """The artefact of the release that is built on, or one that it was made of in one more step, if it is of these settings
        and parents but for those of HISTORY."""
        if self.previous is None:
            return None
        candidates = [part for part in self.previous.parts.values() if part.kind == kind]
        for digest in [part.parents["trained"] for part in candidates if "trained" in part.parents]:
            candidates += artifact.of_digest(self.store, kind, digest)
        for manifest in candidates:
            others = {role: digest for role, digest in manifest.parents.items() if role not in HISTORY}
            if manifest.settings == settings and others == digests:
                return manifest
        return None


def _digests(parents: dict[str, Manifest]) -> dict[str, str]:
    return {role: parent.digest for role, parent in parents.items()}
