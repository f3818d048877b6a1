"""Copies of artefacts in this machine's cache (CATID2_CACHE): which may go, and their removal.

Replicas fetch what they serve from a remote store. Without this a node that stays would hold a copy of every release that it ever
served.
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts import trials, uses
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError


def forget(store: Store, cache: Path, *, serves: Collection[str]) -> int:
    """Remove this machine's copies of the store's releases that nobody serves, on no machine, and that are neither current nor on
    trial; returns their bytes. `serves`: the releases that the caller has open: where the store's records of uses lack one of them,
    they do not say who serves what, and nothing goes. Nothing of a local store is copied, so nothing of it goes."""
    if not store.is_s3 or not cache.is_dir():
        return 0
    served = uses.of_releases(store)
    if not served.keys() >= set(serves):
        return 0
    stay = {*served, releases.pointer(store)[1]}
    if (trial := trials.running(store)) is not None:
        stay.add(trial.release)
    stored = [name.removesuffix(".json") for name in store.names("releases") if name.endswith(".json")]
    parts: dict[str, list[Manifest]] = {}
    for name in stored:
        try:
            parts[name] = list(releases.load(store, name).manifests(store).values())
        except ArtifactError:
            if name in stay:
                return 0  # what it needs is not known
    gone = [manifest for name, of in parts.items() if name not in stay for manifest in of]
    kept = [manifest for name, of in parts.items() if name in stay for manifest in of]
    copies = removable(cache, gone, kept)
    freed = sum(map(size, copies))
    for copy in copies:
        with releases.alone(cache, copy.name):
            remove(copy)
    for folder in dangling(cache, copies):
        remove(folder)
    return freed


def removable(cache: Path, gone: Iterable[Manifest], kept: Iterable[Manifest]) -> list[Path]:
    """The copies of artefacts that go, but for those that artefacts which stay have too."""
    stays = {name for manifest in kept for name in releases.cache_names(manifest)}
    names = {name for manifest in gone for name in releases.cache_names(manifest)} - stays
    return [path for name in sorted(names) if (path := cache / name).is_dir()]


def dangling(cache: Path, gone: Collection[Path]) -> list[Path]:
    """Serving folders of a cache with a link that leads nowhere, or will once these folders are gone."""
    return [
        folder
        for folder in sorted(cache.glob("serving-*"))
        if any(_leads_nowhere(link, gone) for link in folder.iterdir() if link.is_symlink())
    ]


def _leads_nowhere(link: Path, gone: Collection[Path]) -> bool:
    target = Path(os.readlink(link))
    return not target.exists() or any(target.is_relative_to(folder) for folder in gone)


def size(path: Path) -> int:
    """Bytes of the files below a folder, links left out."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def remove(path: Path) -> None:
    """Under a name that nobody opens first, so that no reader sees half of it. What another process removed meanwhile is fine."""
    doomed = path.with_name(f".{path.name}.gone")
    shutil.rmtree(doomed, ignore_errors=True)  # of one that was killed
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
