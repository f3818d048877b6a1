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

_READ = 2000  # records of live changes: some seconds from a remote store


class Left(NamedTuple):
    """The release that a move of the pointer left, and how many live changes of it the catalogue of the new one could have seen;
    `older`: the same of releases before, None where that is not known."""

    release: str
    seen: int
    older: dict[str, int] | None


class Entry(NamedTuple):
    """One move of the pointer; `number` counts them from 1 on. `after`: None where an older version moved it."""

    number: int
    release: str
    rolled_back: bool
    after: Left | None = None

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
    for name, data in zip(names, store.read_many([f"current/{name}" for name in names])):
        try:
            fields = json.loads(data)
            left = fields.get("after")
            left = None if left is None else Left(left["release"], int(left["seen"]), left.get("older"))
            moves.append(Entry(int(name[:-5]), fields["release"], fields.get("rolled_back", False), left))
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


def sources(moves: Sequence[Entry], name: str) -> dict[str, int]:
    """Releases whose live changes may be younger than the catalogue of release `name`, in the order in which they were current; of
    each, the number of its last change that is not.

    For a release that was published: the one that was current when its job began, and those before, which may still be served.
    For one that was gone back to: also those that were current since it was published, with all their changes. Of moves that an
    older version made nothing is known, and nothing is taken.
    """
    mine = [place for place, move in enumerate(moves) if move.release == name]
    if not mine:
        return {}
    published = max((place for place in mine if not moves[place].rolled_back), default=mine[-1])
    before, seen = {move.release for move in moves[:published]}, {}
    if (left := moves[published].after) is not None:
        if left.older is not None:
            seen = dict.fromkeys(before, 0) | left.older
        seen[left.release] = left.seen
    for move in moves[published + 1 : mine[-1] + 1]:
        if move.after and move.after.release not in before:
            seen.setdefault(move.after.release, 0)
    order = dict.fromkeys(release for move in moves for release in (move.after and move.after.release, move.release))
    known = [release for release in order if release in seen]
    return {release: seen[release] for release in [*sorted(seen.keys() - order.keys()), *known] if release != name}


def left_since(moves: Sequence[Entry], names: Sequence[str]) -> set[str]:
    """Releases that were left by the moves that made these current or came after: their live changes may still be carried."""
    first = min((place for place, move in enumerate(moves) if move.release in names), default=len(moves))
    return {move.after.release for move in moves[first:] if move.after}


def younger(store: Store, moves: Sequence[Entry], name: str) -> int:
    """How many live changes of products of other releases are younger than the catalogue of this one, and will be carried over to
    it: a record counts once for each product that it changes. At most _READ records of a release are read; the others, and
    damaged ones, count once."""
    count = 0
    for release, seen in sources(moves, name).items():
        last = releases.last_change(store, release, seen)
        read = range(seen + 1, min(last, seen + _READ) + 1)
        count += last - seen - len(read)
        count += sum(map(_changed_products, store.read_many([f"live/{release}/{n:010d}.json" for n in read])))
    return count


def _changed_products(record: bytes) -> int:
    try:
        fields = json.loads(record)
        changes = fields["changes"] if fields["kind"] == "carried" else [fields]
        return sum(len(one["products"]) + len(one.get("changed", ())) for one in changes)
    except (ValueError, TypeError, KeyError, AttributeError):
        return 1


def rollback(store: Store, name: str | None = None) -> Rollback:
    """Make the release before the current one current again, or the one of this name. To be called where no gc is at work.

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
    record = {"release": name, "by": uuid.uuid4().hex, "rolled_back": True, "after": {"release": current, "seen": 0}}
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
