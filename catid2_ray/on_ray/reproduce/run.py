"""The plan's execution: every condition and seed once, each an artefact of its own; a cell that fails lets the others go on.

A cell is a folder with ranked.parquet and a manifest: a condition's settings and the digests of what it was made from are its key,
so that a run goes on where it was left, tables share what they have in common, and nothing measured is measured twice. Seeds
come one after the other: a run that is stopped has one figure of many cells rather than three of few.
"""

import dataclasses
import hashlib
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyarrow as pa

from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError, CatidError, Interrupted
from catid2_ray.evaluation.reproduce.conditions import Cell, Condition
from catid2_ray.evaluation.reproduce.ranking import Ranking
from catid2_ray.evaluation.reproduce.scores import Outcome, Run
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.pipeline import chain
from catid2_ray.on_ray.reproduce.bench import Bench
from catid2_ray.on_ray.reproduce.costs import machine
from catid2_ray.on_ray.reproduce.measure import Measures
from catid2_ray.redaction import redacted

KIND = "cell"
NOT_YET = "not measured yet"
_RANKED = "ranked.parquet"
_FAILURES = "reports/reproduce/failures"  # in the store: why a run failed, for reports that measure nothing


class Reproduction(NamedTuple):
    """`job`: closed, for its store and its recipe with sizes; `parts`: catalogue, pairs, embeddings, adapter. `outcomes`: of each
    cell, in the plan's order. `made`, `found`: how many runs."""

    job: Job
    parts: dict[str, Manifest]
    bench: Bench
    measures: Measures
    outcomes: list[Outcome]
    made: int
    found: int


def reproduce(
    recipe: Recipe, cells: Sequence[Cell], *, seeds: int, found_only: bool = False, share: tuple[int, int] = (1, 1),
    then: Callable[[Reproduction], object] = lambda reproduction: None,
) -> tuple[Reproduction, object]:  # fmt: skip
    """Measure every cell, or with `found_only` read what was measured; and what `then` gives, called while the job is open.
    `share`: (i, n): measure the i-th of every n runs and read the others, so that n jobs on one store divide the work.

    Raises what the catalogue's own stages raise, and InputError where no test query can be judged; what a cell meets becomes the
    reason why it has no figure.
    """
    only = {"only": ()} if found_only else {}
    with Job.open(recipe, lease=False, new_ledger=True, **only) as job:
        parts = chain(job, "adapter")
        job.previous = None
        bench = Bench.open(job, parts)
        measures = Measures(job, parts, bench)
        # Of the runs of other jobs nothing is made, the quantizers and IDs that they need neither.
        reading = Measures(dataclasses.replace(job, only=frozenset()), parts, bench)
        reading.ids = measures.ids
        # The same condition in two tables is one; a name may stand for two conditions in two tables.
        runs: dict[tuple[Condition, int], Run | str] = {}
        conditions = list({_key(cell.row.condition): cell.row.condition for cell in cells}.values())
        work = [(condition, recipe.seed + number) for number in range(seeds) for condition in conditions
                if condition.seeded or not number]  # fmt: skip
        started, made = time.monotonic(), 0
        for number, (condition, seed) in enumerate(work):
            before = time.monotonic()
            others = number % share[1] != share[0] - 1
            result, was_made = _guarded(
                reading if others else measures, condition, seed, found_only=found_only or others
            )
            runs[_key(condition), seed] = result
            made += was_made
            left = (time.monotonic() - started) / (number + 1) * (len(work) - number - 1)
            note = {"why": repr(result)} if isinstance(result, str) else {"manifest": result.manifest}
            progress.event(
                "cell", condition=condition.name, seed=seed, done=f"{number + 1}/{len(work)}",
                seconds=round(time.monotonic() - before, 1), seconds_left=round(left), **note,
            )  # fmt: skip
        outcomes = []
        for cell in cells:
            of_seed = [
                runs[key]
                for number in range(seeds)
                if (key := (_key(cell.row.condition), recipe.seed + number)) in runs
            ]
            figures = [run for run in of_seed if not isinstance(run, str)]
            outcomes.append(Outcome(cell, figures, [why for why in of_seed if isinstance(why, str)]))
        found = sum(not isinstance(run, str) for run in runs.values()) - made
        pictures_of = reading if share[1] > 1 else measures  # so that no job makes what another is making
        reproduction = Reproduction(job, parts, bench, pictures_of, outcomes, made, found)
        return reproduction, then(reproduction)


def _key(condition: Condition) -> str:
    """Of what a condition is, whatever it is called."""
    return repr((condition.family, dict(condition.settings), dict(condition.recipe), condition.kind, condition.printed,
                 condition.missing))  # fmt: skip


def _note(measures: Measures, condition: Condition, seed: int) -> str:
    """Where the reason lies why a run failed: of this recipe, data and release, for with others it may not."""
    job = measures.job
    try:
        release = releases.current(job.store).name
    except ArtifactError:  # there is none, or its record is damaged
        release = ""
    data = [measures.parts[name].digest for name in ("catalog", "pairs")]
    of = repr((_key(condition), seed, data, release, job.recipe.model_dump_json(exclude={"reproduce"})))
    return f"{_FAILURES}/{hashlib.sha256(of.encode()).hexdigest()[:16]}.txt"


def _guarded(measures: Measures, condition: Condition, seed: int, *, found_only: bool) -> tuple[Run | str, bool]:
    """The run, or why there is none; and whether it was made just now."""
    store, note = measures.job.store, _note(measures, condition, seed)
    try:
        run, made = _run(measures, condition, seed, found_only=found_only)
        if run != NOT_YET:
            return run, made
        why = NOT_YET
    except Interrupted:
        raise
    except CatidError as error:
        why = NOT_YET if found_only and isinstance(error, ArtifactError) else _line(error)
    except Exception as error:  # a method's fault is its own cell's: the others go on, and the log has all of it
        traceback.print_exc()
        why = f"it failed with {type(error).__name__}: {_line(error)}"
    if not found_only:
        store.write(note, redacted(why).encode())
    elif why == NOT_YET and store.exists(note):
        why = store.read(note).decode()
    return why, False


def _line(error: Exception) -> str:
    """Its first line, and the second where the first only announces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _run(measures: Measures, condition: Condition, seed: int, *, found_only: bool) -> tuple[Run | str, bool]:
    job = measures.job
    settings, parents = measures.settings(condition, seed)
    digests = {role: parent.digest for role, parent in parents.items()}
    if committed := artifact.find(job.store, KIND, artifact.key_of(KIND, settings, digests)):
        artifact.verify(job.store, committed)
        return _read(measures, condition, committed, parents, seed), False
    if found_only:
        return NOT_YET, False
    attempt = Attempt(job.store, KIND, settings=settings, parents=digests, recipe=job.recipe.model_dump(mode="json"))
    ranking = measures.rank(condition, seed, parents)
    made = _commit(job, attempt, measures.bench, condition, ranking)
    return _read(measures, condition, made, parents, seed), True


def _commit(job: Job, attempt: Attempt, bench: Bench, condition: Condition, ranking: Ranking) -> Manifest:
    ids = bench.product_ids
    products = [[ids[row] for row in rows if row >= 0] for rows in ranking.rows_QC.tolist()]
    table = pa.table(
        {
            "query_id": pa.array(bench.judged["test"].query_ids, pa.string()),
            "products": pa.array(products, pa.list_(pa.string())),
            "ids": pa.array(ranking.ids or [None] * len(products), pa.list_(pa.string())),
        }
    )
    metrics = {"condition": condition.name, "cost": ranking.cost, "tuned": ranking.tuned, "machine": machine()}
    return attempt.commit([job.store.write_table(attempt.name(_RANKED), table)], rows=table.num_rows, metrics=metrics)


def _read(measures: Measures, condition: Condition, manifest: Manifest, parents: dict[str, Manifest], seed: int) -> Run:
    table, metrics = measures.job.store.read_table(manifest.file(_RANKED)), manifest.metrics
    ids = table["ids"].to_pylist()
    return Run(
        seed=seed, manifest=manifest.name, ranked=table["products"].to_pylist(),
        ids=None if None in ids else ids,
        cost=measures.with_shared(condition, metrics["cost"], parents), tuned=metrics["tuned"],
        machine=metrics["machine"], parents=manifest.parents,
    )  # fmt: skip
