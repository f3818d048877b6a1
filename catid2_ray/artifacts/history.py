"""The releases of a store as an operator sees them: what there is, what was current when, and the way back.

The pointer's history is a path: a release that is published goes one step on, a rollback goes back to a step that was taken
before. So a second rollback goes further back, not forth to what was just left.
"""

import calendar
import json
import time
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts import uses
from catid2_ray.artifacts.manifest import Manifest, verify
from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, CommitConflict, ReleaseError


class Entry(NamedTuple):
    """One move of the pointer; `number` counts them from 1 on."""

    number: int
    release: str
    rolled_back: bool

    @property
    def name(self) -> str:
        return f"current/{self.number:010d}.json"


class Rollback(NamedTuple):
    """`release` is current now, `before` was until then."""

    release: Release
    before: str


def entries(store: Store) -> list[Entry]:
    """Every move of the pointer, oldest first; ArtifactError for a damaged record."""
    names = [name for name in store.names("current") if name.endswith(".json") and name[:-5].isdigit()]
    moves = []
    for name in names:
        try:
            fields = json.loads(store.read(f"current/{name}"))
            moves.append(Entry(int(name[:-5]), fields["release"], fields.get("rolled_back", False)))
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{store.uri_of(f'current/{name}')} is no record of a release ({error!r}); delete it"
            ) from None
    return moves


def path(moves: Sequence[Entry]) -> list[str]:
    """The releases that led to the current one, which is last."""
    steps: list[str] = []
    for move in moves:
        if move.rolled_back and move.release in steps:
            while steps[-1] != move.release:
                steps.pop()
        elif not steps or steps[-1] != move.release:
            steps.append(move.release)
    return steps


def rollback(store: Store, name: str | None = None) -> Rollback:
    """Make the release before the current one current again, or the one of this name. To be called with the store's lease.

    Every part is looked at first: ReleaseError or ArtifactError where one is gone or damaged; ReleaseError where there is
    no release to go back to. What is made next builds on the release that is current then.
    """
    moves = entries(store)
    if not moves:
        raise ReleaseError(f"nothing was published to {store.uri} yet, so there is nothing to go back to")
    current = moves[-1].release
    stored = {entry.removesuffix(".json") for entry in store.names("releases")}
    if name is None:
        earlier = [step for step in path(moves)[:-1] if step != current and step in stored]
        if not earlier:
            others = ", ".join(sorted(stored - {current})) or "none"
            raise ReleaseError(
                f"no release of {store.uri} comes before {current}, which is current; others that it has: {others}"
            )
        name = earlier[-1]
    release = releases.load(store, name)
    for manifest in release.manifests(store).values():
        verify(store, manifest)
    if name == current:
        return Rollback(release, current)
    record = {"release": name, "by": uuid.uuid4().hex, "rolled_back": True}
    try:
        store.create(f"current/{moves[-1].number + 1:010d}.json", json.dumps(record).encode())
    except CommitConflict:
        raise CommitConflict(
            f"another job published to {store.uri} at this moment; look at what is current and repeat"
        ) from None
    return Rollback(release, current)


def overview(store: Store) -> list[dict]:
    """One dict a release, newest first: release, created, age_s, documents, recall (method → recall@50), churn, bytes, current,
    in_use, problem.

    `churn`: share of the products of the release before that have another ID; `bytes`: of all its parts, those that it shares
    with other releases included; `in_use`: replicas that serve it; `problem`: None, or why it cannot be read.
    """
    current, in_use = releases.pointer(store)[1], uses.of_releases(store)
    rows = []
    for name in [entry.removesuffix(".json") for entry in store.names("releases") if entry.endswith(".json")]:
        row = {"release": name, "created": "", "age_s": None, "current": name == current, "in_use": in_use.get(name, 0)}
        row |= {"documents": None, "recall": {}, "churn": None, "bytes": None, "problem": None}
        try:
            release = releases.load(store, name)
            row |= {"created": release.created, "age_s": _age(release.created)} | _figures(release.manifests(store))
        except ArtifactError as error:
            row["problem"] = str(error)
        rows.append(row)
    return sorted(rows, key=lambda row: row["created"], reverse=True)


def _age(created: str) -> float | None:
    """Seconds since then, by this machine's clock."""
    try:
        return max(0.0, time.time() - calendar.timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def _figures(parts: dict[str, Manifest]) -> dict:
    ids, recall = parts["ids"].metrics, parts["evaluation"].metrics.get("recall", {})
    churn = (ids.get("churn") or {}).get("after", {}).get("prefix_churn")
    return {
        "documents": ids.get("documents"),
        "recall": {method: recall[method]["50"] for method in ("served", "beam") if "50" in recall.get(method, {})},
        "churn": churn[-1] if churn else None,
        # Pairs of an older release lie in its catalogue, which is then two parts.
        "bytes": sum({part.name: sum(file["bytes"] for file in part.files) for part in parts.values()}.values()),
    }
