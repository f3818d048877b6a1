"""What a `reindex` would find and what it would make, without making anything: no Ray, no lease, nothing is written.

The chain is walked as a job walks it. A stage whose inputs are all found says by its key whether it is there. One that reads what
is made first is made too: what it reads will be new.
"""

from collections.abc import Callable
from dataclasses import dataclass

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe, sizes
from catid2_ray.on_ray import pipeline
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import preflight
from catid2_ray.on_ray.stages import adapter, catalog, door, tuned_encoder


class _Unmade(Exception):
    """Holds the name of the stage that would be made."""


@dataclass
class _Look(Job):
    """A job that finds and makes nothing."""

    def produce(self, kind, settings, parents, work, *, stage=None, history=None, anew=False) -> Manifest:
        stage = stage or kind
        committed = self.find(kind, STAGES[stage].settings(settings), parents, history or {}, anew=anew)
        if committed is None:
            raise _Unmade(stage)
        self.committed[stage] = committed.key
        return committed


def dry_run(recipe: Recipe, **choices: bool) -> dict:
    """`release` (its name; what would be built on), and `stages`: stage, does (found, made, open), key, why.

    `choices`: as of `reindex`. Raises what `reindex` would raise before the first stage that it makes. "open": the recipe leaves
    numbers to the catalogue's size, and its tables were not read yet.
    """
    preflight.refuse(recipe, aligns=True, runs=False)
    store = Store(recipe.store)
    store.check()
    job = _Look(recipe=recipe, store=store, resize=choices.get("new_ledger", False), say=_silently, **choices)
    pipeline.begin(job)
    walk = _Walk(job)
    walk.stage("catalog", lambda job, parts: catalog.run(job, {}))
    walk.stage("pairs", catalog.run_pairs)
    if not walk.unmade:
        walk.size()
    for name, run in pipeline.RUN.items():
        if name == "examples" and "ids" in walk.parts:
            pipeline.gate_churn(job.recipe, walk.parts["ids"])
        walk.stage(name, run)
    release = job.previous.release.name if job.previous else None
    return {"release": release, "stages": [walk.rows[name] for name in walk.planned if name in walk.rows]}


def _silently(name: str, **values) -> None:
    """In place of the log."""


class _Walk:
    """Stage after stage: `parts` that were found by role, `unmade` roles that are made first, `rows` to show."""

    def __init__(self, job: _Look):
        self.job, self.parts, self.unmade, self.rows = job, {}, set(), {}
        self.planned = pipeline.planned(job.recipe, "evaluation")
        self.open = bool(sizes.left_out(job.recipe))

    def size(self) -> None:
        self.job.recipe = pipeline.size(self.job, self.parts, self.job.previous).recipe
        pipeline.check_codes(self.job.recipe, self.parts["catalog"])
        door.refuse_unfit(self.job.recipe, self.parts["pairs"])
        tuned_encoder.refuse_impossible(self.job.recipe, self.parts)
        adapter.refuse_impossible(self.job.recipe, self.parts)
        self.open = False

    def stage(self, name: str, run: Callable[[Job, dict], Manifest | None]) -> None:
        if name not in self.planned:
            return
        new = sorted(self.unmade & _reads(name))
        if new:
            for each in (*_INNER.get(name, ()), name):
                self._made(each, f"reads {', '.join(new)}, which will be new")
        elif self.open and name not in ("catalog", "pairs", "tuned_encoder", "embeddings"):
            self._row(
                name, "open", None, "its numbers follow the catalogue's size, which is known once the tables were read"
            )
            self.unmade.add(STAGES[name].role)
        else:
            self._run(name, run)

    def _run(self, name: str, run: Callable[[Job, dict], Manifest | None]) -> None:
        try:
            manifest = run(self.job, self.parts)
        except _Unmade as unmade:
            first = str(unmade)
            self._made(first, "not in the store for these inputs and settings")
            if first != name:
                self._made(name, f"reads {first}, which will be new")
            return
        for each in (*_INNER.get(name, ()), name):
            if each in self.job.committed:
                self._row(each, "found", self.job.committed[each], "")
        if manifest is not None:
            self.parts[STAGES[name].role] = manifest

    def _made(self, name: str, why: str) -> None:
        self._row(name, "made", None, why)
        self.unmade.add(STAGES[name].role)

    def _row(self, name: str, does: str, key: str | None, why: str) -> None:
        self.rows[name] = {"stage": name, "does": does, "key": key, "why": why}


_INNER = {
    "tuned_encoder": ("lessons",),
    "adapter": ("matched",),
    "aligned": ("prompts",),
}  # stages that another one runs


def _reads(name: str) -> set[str]:
    """The roles that a stage may read, those of the stages that it runs included."""
    stages = [STAGES[each] for each in (name, *_INNER.get(name, ()))]
    roles = {role for stage in stages for role in (*stage.parents, *stage.where_made, *stage.sometimes)}
    return roles - {"lessons", "matched", "prompts"} | ({"generator"} if "trained" in roles else set())
