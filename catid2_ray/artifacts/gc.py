"""What may go from a store, and its removal: what no kept release names, what killed jobs left, what this node fetched of it.

A release is kept where it is current, among the last N that were current, or served somewhere. Of an artefact that is kept, what
it was made of in one more step is kept too, where a rerun looks for it (the generator before its alignment, say).

Safe to be killed at any moment: moves of the pointer to a removed release go first, then its record, then manifests, then
files. So nothing that is left names something that is gone, and the next gc finds what this one left.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from catid2_ray.artifacts import copies, history, holder, lease, trials, uses
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.history import Entry
from catid2_ray.artifacts.lease import Say, unsaid
from catid2_ray.artifacts.manifest import Manifest, find
from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.stages import PARTS
from catid2_ray.artifacts.store import Listed, Store
from catid2_ray.errors import ArtifactError, InputError, LeaseError, ReleaseError

# Parents that a rerun does not look for by themselves: parts, which the release names, and what an earlier release gave.
_NOT_FOLLOWED = frozenset({*PARTS, "previous", "warm", "encoder", "tree", "matched", "lessons"})
RUNS_OLDER_THAN_DAYS = 7.0
_CHECK_S = 1.0


class Removal(NamedTuple):
    """One thing to remove. `kind`: as it is counted; `count` 0 for a piece of something that is counted elsewhere."""

    kind: str
    name: str
    bytes: int
    count: int = 1
    folder: bool = False


@dataclass(frozen=True, kw_only=True)
class Freed:
    """`rows`: (kind, count, bytes) in order of removal; `kept` and `removed`: names of releases; `unread`: URIs of manifests
    that this version cannot read, whose artefacts were left alone."""

    rows: list[tuple[str, int, int]]
    kept: list[str]
    removed: list[str]
    unread: list[str]

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.rows)


def collect(
    store: Store, *, keep: int, dry_run: bool = False, runs_older_than_days: float = RUNS_OLDER_THAN_DAYS,
    cache: Path | None = None, say: Say = unsaid,
) -> Freed:  # fmt: skip
    """Remove what may go, or with `dry_run` only say what would. Takes the store's lease in both cases.

    `keep`: how many releases of the pointer's history are kept. `cache`: this node's folder of fetched artefacts. Raises
    LeaseError where a job is at work, with or without a lease; ReleaseError where nothing was published yet; InputError for a
    `keep` below 1.
    """
    if keep < 1:
        raise InputError(f"gc keeps at least the release that is current, found --keep {keep}; expected 1 or more")
    with lease.holding(store, removes=True, say=say) as held:
        jobs, stale = uses.alive(store, "uses/jobs")
        if jobs:
            raise LeaseError(
                f"a job reads from {store.uri}: {'; '.join(map(holder.sentence, jobs.values()))}. Run gc when it has ended"
            )
        plan = _Plan(store, keep, runs_older_than_days, cache)
        removals = [*plan.removals(), *(Removal("stale uses", f"uses/jobs/{name}", 0) for name in stale)]
        local = plan.cached()
        if not dry_run:
            checked = None
            for removal in removals:
                # A process that stood still for long may have lost its lease to a job that reuses what is on the list.
                if checked is None or time.monotonic() - checked > _CHECK_S:
                    held.check()
                    checked = time.monotonic()
                (store.delete_folder if removal.folder else store.delete)(removal.name)
            for removal in local:
                copies.remove(Path(removal.name))
    sums: dict[str, list[int]] = {}
    for removal in [*removals, *local]:
        row = sums.setdefault(removal.kind, [0, 0])
        row[0], row[1] = row[0] + removal.count, row[1] + removal.bytes
    return Freed(
        rows=[(kind, *row) for kind, row in sums.items()], kept=plan.kept, removed=plan.removed, unread=plan.unread
    )


class _Plan:
    """What is kept, and what goes."""

    def __init__(self, store: Store, keep: int, days: float, cache: Path | None):
        self.store, self.days, self.cache = store, days, cache
        self.moves = history.entries(store)
        if not self.moves:
            raise ReleaseError(
                f"nothing was published to {store.uri} yet: gc keeps what releases name, and would remove all that was made. "
                "Publish first, or delete the store"
            )
        self.records = {
            name.removesuffix(".json"): releases.load(store, name.removesuffix(".json"))
            for name in store.names("releases")
            if name.endswith(".json")
        }
        self.served, self.stale = uses.alive(store, "uses/releases")
        self.kept = self._kept(keep)
        self.removed = [name for name in self.records if name not in self.kept]
        self.listed, self.now = holder.listing_now(store, "artifacts")
        self.artefacts = _by_artefact(self.listed)
        self.manifests, self.unread = self._manifests()
        self.needed = self._needed([self.records[name] for name in self.kept])

    def _kept(self, keep: int) -> list[str]:
        """The current release first, then the others, last published first."""
        current = self.moves[-1].release
        if current not in self.records:
            raise ReleaseError(
                f"the record of release {current}, which is current in {self.store.uri}, is gone: nothing can be told from it. "
                "Restore it, or go back with `catid2 rollback RELEASE`"
            )
        last = [move.release for move in reversed(self.moves) if move.release in self.records]
        in_use = [name.partition("/")[0] for name in self.served]
        trial = trials.running(self.store)
        stay = [*in_use, *([trial.release] if trial else [])]
        names = [*list(dict.fromkeys(last))[:keep], *(name for name in stay if name in self.records)]
        return list(dict.fromkeys(names))

    def _manifests(self) -> tuple[dict[tuple[str, str], Manifest], list[str]]:
        manifests, unread = {}, []
        for (kind, key), files in self.artefacts.items():
            if "manifest.json" not in files:
                continue
            try:
                manifests[kind, key] = find(self.store, kind, key)
            except ArtifactError:  # of a newer version, or damaged: what it is for is not known
                unread.append(self.store.uri_of(f"artifacts/{kind}/{key}/manifest.json"))
        return manifests, unread

    def _needed(self, kept: Sequence[Release]) -> set[tuple[str, str]]:
        """Kind and key of what the kept releases name, and of what that was made of where no part says it."""
        needed = {(part, fields["key"]) for release in kept for part, fields in release.parts.items()}
        parts = [self.manifests[place] for place in needed if place in self.manifests]
        digests = {digest for part in parts for role, digest in part.parents.items() if role not in _NOT_FOLLOWED}
        return needed | {place for place, manifest in self.manifests.items() if manifest.digest in digests}

    def removals(self) -> list[Removal]:
        """In the order in which they are safe."""
        needed = history.left_since(self.moves, self.kept) | self._to_carry()
        size = {
            f"{folder}/{name}": entry.bytes
            for folder in ("current", "releases")
            for name, entry in self.store.listing(folder).items()
        }
        moves = [
            Removal("moves of the pointer", move.name, size[move.name]) for move in self.moves if self._leaves(move)
        ]
        names = [f"releases/{name}.json" for name in self.removed]
        records = [Removal("releases", name, size[name]) for name in names]
        live = [
            Removal("changes while serving", f"live/{name}", _bytes(self.store.listing(f"live/{name}")), folder=True)
            for name in self.store.names("live")
            if name not in self.kept and name not in needed
        ]
        unused = [Removal("stale uses", f"uses/releases/{name}", 0) for name in self.stale]
        return [*moves, *records, *live, *self._artefacts(), *self._runs(), *unused]

    def _to_carry(self) -> set[str]:
        """Releases with live changes that a kept one has still to carry over, as far as anybody knows."""
        return {
            release
            for name in self.kept
            for release, seen in history.sources(self.moves, name).items()
            if releases.last_change(self.store, release, seen) > seen
        }

    def _leaves(self, move: Entry) -> bool:
        """The last move is never removed: the next one is numbered after it."""
        return move.release not in self.kept and move != self.moves[-1]

    def _artefacts(self) -> Iterator[Removal]:
        unread = {tuple(uri.split("/")[-3:-1]) for uri in self.unread}
        folders = []
        for (kind, key), files in self.artefacts.items():
            base, manifest = f"artifacts/{kind}/{key}", self.manifests.get((kind, key))
            if (kind, key) in unread:
                continue
            if manifest and (kind, key) not in self.needed:
                yield Removal(kind, f"{base}/manifest.json", files["manifest.json"].bytes, count=0)
                size = _bytes(files) - files["manifest.json"].bytes
                folders.append(Removal(kind, base, size, folder=True))
                continue
            attempts = {name.partition("/")[0] for name in files if "/" in name}
            if not manifest:
                folders.append(
                    Removal("attempts of killed jobs", base, _bytes(files), count=len(attempts), folder=True)
                )
                continue
            for attempt in sorted(attempts):
                if f"{base}/{attempt}" == manifest.folder:
                    continue
                of_attempt = {name: entry for name, entry in files.items() if name.startswith(f"{attempt}/")}
                folders.append(Removal("attempts of killed jobs", f"{base}/{attempt}", _bytes(of_attempt), folder=True))
        yield from folders

    def _runs(self) -> Iterator[Removal]:
        """Checkpoints of trainings whose result is committed, or that nobody went on with for days."""
        runs: dict[str, dict[str, Listed]] = {}
        for name, entry in self.store.listing("runs").items():
            run, below, file = name.partition("/")
            if below:
                runs.setdefault(run, {})[file] = entry
        for run, files in sorted(runs.items()):
            kind, _, key = run.rpartition("-")
            silent_s = self.now - max(entry.modified for entry in files.values())
            if (kind, key) in self.manifests or silent_s > self.days * 86_400:
                yield Removal("runs of trainings", f"runs/{run}", _bytes(files), folder=True)

    def cached(self) -> list[Removal]:
        """Of this node's cache: copies of what goes, and serving folders whose links lead nowhere then."""
        if self.cache is None or not self.cache.is_dir():
            return []
        gone = [manifest for place, manifest in self.manifests.items() if place not in self.needed]
        kept = [self.manifests[place] for place in self.needed & self.manifests.keys()]
        held = copies.removable(self.cache, gone, kept)
        # Serving folders link to copies, and those of a local store to the store itself.
        serving = copies.dangling(self.cache, [*held, *(Path(self.store.path(manifest.folder)) for manifest in gone)])
        return [
            *(Removal("fetched copies on this node", str(path), copies.size(path)) for path in held),
            *(Removal("serving folders on this node", str(path), copies.size(path)) for path in serving),
        ]


def _by_artefact(listed: dict[str, Listed]) -> dict[tuple[str, str], dict[str, Listed]]:
    """(kind, key) → its files by their names below the artefact's folder."""
    artefacts: dict[tuple[str, str], dict[str, Listed]] = {}
    for name, entry in sorted(listed.items()):
        kind, _, rest = name.partition("/")
        key, below, file = rest.partition("/")
        if below:
            artefacts.setdefault((kind, key), {})[file] = entry
    return artefacts


def _bytes(files: dict[str, Listed]) -> int:
    return sum(entry.bytes for entry in files.values())
