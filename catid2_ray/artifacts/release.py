"""A release names every part by digest and refuses mixtures; `current` says which release is served.

`current` is a numbered series of small objects, each created only if absent; the highest number is current. Two writers
cannot both win a number, and the history is a rollback list.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from catid2_ray.artifacts.manifest import Manifest, digest_of, find, prove, refuse_other, verify
from catid2_ray.artifacts.stages import CARRIED, OPTIONAL, PARTS
from catid2_ray.artifacts.store import Store, sha256_of, stays_inside
from catid2_ray.errors import ArtifactError, CommitConflict, ReleaseError, StorageError

_NEWER = ("serving", *OPTIONAL)  # releases of before have no such part; without `serving` the beam alone serves them


@dataclass(frozen=True, kw_only=True)
class Release:
    """`parts` maps each name of PARTS to {key, digest}; `name` is derived from the digests, so equal parts are one release."""

    name: str
    parts: dict[str, dict]
    created: str = ""

    def manifests(self, store: Store) -> dict[str, Manifest]:
        """The manifest of every part; ReleaseError where one is gone, was rebuilt since, or was made from another part."""
        manifests = {}
        for part in PARTS:
            if (
                part == "pairs" and part not in self.parts
            ):  # of before 0.2: they lie in the catalogue, under the same names
                manifests[part] = manifests["catalog"]
                continue
            if part not in self.parts and part in _NEWER:
                continue
            if part not in self.parts:
                raise ReleaseError(f"release {self.name} in {store.uri} has no part {part!r}; publish it again")
            manifest = find(store, part, self.parts[part]["key"])
            if manifest is None:
                raise ReleaseError(
                    f"release {self.name} in {store.uri}: its part {part} ({self.parts[part]['key']}) is gone; "
                    "rerun the job and publish again"
                )
            if manifest.digest != self.parts[part]["digest"]:
                raise ReleaseError(
                    f"release {self.name} in {store.uri}: part {part} has digest {manifest.digest[:12]}, the release "
                    f"names {self.parts[part]['digest'][:12]}; it was rebuilt since. Publish again"
                )
            manifests[part] = manifest
        check_parts(manifests)
        return manifests


def check_parts(manifests: dict[str, Manifest]) -> None:
    """Raise ReleaseError unless every part was made from exactly the other parts given.

    Where the IDs keep those of earlier releases (append), what was trained on the earlier ones serves these as well.
    """
    kept = manifests["ids"].extends if "ids" in manifests else {}
    for part, manifest in manifests.items():
        for role, digest in manifest.parents.items():
            fits = role not in manifests or manifests[role].digest == digest
            if not fits and not (part in CARRIED and digest in kept.get(role, ())):
                raise ReleaseError(
                    f"parts do not match: {part} was made from {role} {digest[:12]}, but the release holds {role} "
                    f"{manifests[role].digest[:12]}. Rerun the job so that {part} is made anew"
                )


def made(store: Store, manifests: dict[str, Manifest]) -> Release:
    """The release of these parts, as of now, once each was looked at. Raises ReleaseError for a mixture or a missing part."""
    needed = [part for part in PARTS if part not in OPTIONAL]
    missing = [part for part in needed if part not in manifests]
    if missing:
        raise ReleaseError(f"a release needs {', '.join(needed)}; missing: {', '.join(missing)}")
    check_parts(manifests)
    for manifest in manifests.values():
        verify(store, manifest)
    # Pairs that lie in the catalogue of an older release are no part of their own.
    own = [part for part in PARTS if part in manifests and manifests[part].kind == part]
    parts = {part: {"key": manifests[part].key, "digest": manifests[part].digest} for part in own}
    return Release(name=_name_of(parts), parts=parts, created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def keep(store: Store, release: Release) -> Release:
    """Store its record; returns the one that is stored, which may be older."""
    try:
        store.create(f"releases/{release.name}.json", json.dumps(asdict(release), indent=1).encode())
    except CommitConflict:
        return load(store, release.name)
    return release


def publish(
    store: Store, manifests: dict[str, Manifest], *, after: int | None = None, seen: Mapping[str, int] | None = None
) -> tuple[Release, bool]:
    """Make these parts the current release. Returns it and whether `current` moved (False: it was current already).

    `after`: the number in `pointer` when the work began; `seen`: release → how many live changes it had then, before the catalogue
    was read (`live_changes`). The move of the pointer keeps these numbers: changes beyond them are younger than the catalogue, and
    whoever serves the release carries them over. Raises ReleaseError for a mixture, CommitConflict when another job
    published since.
    """
    release = made(store, manifests)
    number, current = pointer(store)
    if current == release.name:
        return load(store, current), False
    release = keep(store, release)
    try:
        if after is not None and number != after:
            raise CommitConflict
        move = {"release": release.name, "by": uuid.uuid4().hex}
        if seen is not None and current is not None:
            older = {name: count for name, count in seen.items() if name != current}
            move["after"] = {"release": current, "seen": seen.get(current, 0), "older": older}
        store.create(f"current/{number + 1:010d}.json", json.dumps(move).encode())
    except CommitConflict:
        if after is not None and number < after:
            raise ReleaseError(
                f"the record of what is current in {store.uri} was deleted while this job ran; release {release.name} is "
                "stored but not current. Rerun to publish it as the first of a new history"
            ) from None
        raise CommitConflict(
            f"another job published to {store.uri} while this one ran; release {release.name} is stored but not current, and "
            "nothing was lost. Look at what is current, and rerun to build on top of it"
        ) from None
    return release, True


def _name_of(parts: dict[str, dict]) -> str:
    return f"r-{digest_of(parts)[:12]}"


def pointer(store: Store) -> tuple[int, str | None]:
    """How often something was published, and the name of the release that is current."""
    names = [name for name in store.names("current") if name.endswith(".json") and name[:-5].isdigit()]
    if not names:
        return 0, None
    return int(names[-1][:-5]), _record(store, f"current/{names[-1]}", lambda fields: _plain(fields["release"]))


def last_change(store: Store, release: str, after: int = 0) -> int:
    """The number of the last change in a release's series of live changes, `after` where there is none beyond it; one listing."""
    number = after
    for name in store.names(f"live/{release}", after=f"{after:010d}.json"):
        if name != f"{number + 1:010d}.json":
            break
        number += 1
    return number


def live_changes(store: Store) -> dict[str, int]:
    """Release → how many live changes it has, of those that have any."""
    return {name: last_change(store, name) for name in store.names("live")}


def _record(store: Store, name: str, build):
    try:
        return build(json.loads(store.read(name)))
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{store.uri_of(name)} is not a release record ({error!r}); delete it and publish again"
        ) from None


def load(store: Store, name: str) -> Release:
    """A published release by name; ReleaseError where there is none, ArtifactError where its record is damaged."""
    try:
        _plain(name)
    except ValueError as error:
        raise ReleaseError(f"no such release in {store.uri}: {error}; expected one such as r-0123456789ab") from None
    if not store.exists(f"releases/{name}.json"):
        known = ", ".join(entry.removesuffix(".json") for entry in store.names("releases"))
        raise ReleaseError(f"no release {name!r} in {store.uri}; it has {known or 'none'}")
    return _record(store, f"releases/{name}.json", lambda fields: _release(fields, name))


def _release(fields: dict, name: str) -> Release:
    release = Release(**fields)
    if release.name != name:
        raise ValueError(f"it is the record of {release.name!r}")
    for part, place in release.parts.items():
        _plain(part), _plain(place["key"])
    if name != _name_of(release.parts):
        raise ValueError("its parts are not those that it is named after")
    return release


def _plain(name: str) -> str:
    """The name, which is one part of a path; ValueError where it is anything else."""
    if not stays_inside(name) or "/" in name:
        raise ValueError(f"{name!r} is not a plain name")
    return name


def current(store: Store) -> Release:
    """The release that `current` names; ReleaseError where nothing was published yet."""
    name = pointer(store)[1]
    if name is None:
        raise ReleaseError(
            f"nothing was published to {store.uri} yet; run `catid2 reindex --recipe … --set store={store.uri}`"
        )
    return load(store, name)


_PROVEN: set[tuple] = set()  # of this process: (folder, digest, below) of what it read through once


def fetch(store: Store, manifest: Manifest, cache: Path, *, below: tuple[str, ...] = ("",)) -> Path:
    """A local folder with the artefact's files. Local stores are read in place, and verified by SHA-256 once in a process; from
    S3 it is copied once per node.

    `below`: only files whose names begin so; serving, for one, does not need the parts.

    A copy is verified by SHA-256 and renamed into place whole, so concurrent readers never see half of it. Of several that
    want the same copy one downloads and the others wait.
    """
    if not store.is_s3:
        verify(store, manifest)
        if (seen := (manifest.folder, manifest.digest, below)) not in _PROVEN:
            prove(store, manifest, below)
            _PROVEN.add(seen)
        return Path(store.path(manifest.folder))
    target = cache / _cache_name(manifest, below)
    if target.exists():
        return target
    with alone(cache, target.name):
        if not target.exists():
            _copy(store, manifest, target, below)
    return target


@contextlib.contextmanager
def alone(cache: Path, copy: str) -> Iterator[None]:
    """One process or thread of the node at a time makes or removes a copy. The kernel holds the lock, and drops it when its holder
    dies, however."""
    lock = cache / f".{copy}.lock"
    while (file := _locked(lock)) is None:
        pass
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path) -> IO | None:
    """The locked file; None where its holder of before deleted it meanwhile, so that the next one locks another."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise StorageError(
            f"cannot lock {lock}: {error}; set CATID2_CACHE to a folder on a disk of this machine"
        ) from None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
            return file
    file.close()
    return None


def _copy(store: Store, manifest: Manifest, target: Path, below: tuple[str, ...]) -> None:
    """Download, verify, rename into place; only under the target's lock."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a holder that was killed
    try:
        for entry in (entry for entry in manifest.files if entry["name"].startswith(below)):
            store.download(manifest.file(entry["name"]), partial / entry["name"])
            refuse_other(store, manifest, entry, sha256_of(partial / entry["name"]))
        partial.mkdir(exist_ok=True)  # where no file of the manifest begins so
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _cache_name(manifest: Manifest, below: tuple[str, ...]) -> str:
    return f"{manifest.kind}-{digest_of([manifest.digest, below])[:16]}"


# What `fetch` is asked for, as `below`.
_FETCHED = (("",), ("trie/", "products.arrow"), ("trie/",), ("tokenizer/",), ("encoder/",))


def cache_names(manifest: Manifest) -> list[str]:
    """The folders of a node's cache that may hold copies of an artefact."""
    return [_cache_name(manifest, below) for below in _FETCHED]


def serving_folder(
    store: Store, ids: Manifest, generator: Manifest, cache: Path, settings: dict, *, serving: Manifest | None = None,
    embeddings: Manifest | None = None, adapter: Manifest | None = None, node_vectors: Manifest | None = None,
    tuned_encoder: Manifest | None = None,
) -> Path:  # fmt: skip
    """A local folder that `retrieval.Retriever.open` reads: generator/, trie/, products.arrow and retriever.json; of
    `serving` what it holds (product_names.npy, vectors/, value.npy, columns.arrow, lexical/), node_vectors/ where the search
    looks ahead, of `embeddings` the fitted encoder/, if any, tuned_encoder/ where it is tuned, and adapter/ where the vectors are
    adapted.

    The parts are links to what `fetch` gives, so opening a second replica on a node copies nothing. `settings` goes to
    retriever.json (`retriever_settings`).
    """
    if generator.parents.get("ids") not in (ids.digest, *ids.extends.get("ids", ())):
        raise ReleaseError(
            f"parts do not match: the generator was trained on ids {generator.parents.get('ids', 'unknown')[:12]}, not on "
            f"{ids.digest[:12]}. Rerun the job so that the generator is trained anew"
        )
    for part, what in ((serving, "vectors and columns were laid out"), (node_vectors, "node vectors were made")):
        if part is not None and part.parents.get("ids") != ids.digest:
            raise ReleaseError(
                f"parts do not match: {what} for ids {part.parents.get('ids', 'unknown')[:12]}, not for {ids.digest[:12]}. Rerun "
                f"the job so that the {part.kind} part is made anew"
            )
    cache = cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    generator_folder = fetch(store, generator, cache)
    links = {"generator": generator_folder}
    ids_folder = fetch(store, ids, cache, below=("trie/", "products.arrow"))
    links |= {name: ids_folder / name for name in ("trie", "products.arrow")}
    if serving is not None and len(serving.files) > 1:
        folder = fetch(store, serving, cache)
        links |= {name: folder / name for name in _SERVED if (folder / name).exists()}
    if node_vectors is not None and settings.get("search") == "lookahead":
        links["node_vectors"] = fetch(store, node_vectors, cache)
    if links.keys() & {"vectors", "node_vectors"}:
        if embeddings is not None and embeddings.named("encoder/"):
            links["encoder"] = fetch(store, embeddings, cache, below=("encoder/",)) / "encoder"
        if adapted(tuned_encoder):
            links[TUNED] = fetch(store, tuned_encoder, cache) / TUNED
        if adapted(adapter):
            links["adapter"] = fetch(store, adapter, cache)
    # The link targets belong to the name: a store that was deleted and built anew has equal digests in other folders.
    targets = {name: str(target) for name, target in links.items()}
    folder = cache / f"serving-{digest_of([ids.digest, generator.digest, targets, settings])[:16]}"
    if folder.exists():
        return folder
    partial = cache / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    for name, target in links.items():
        (partial / name).symlink_to(target, target_is_directory=target.is_dir())
    (partial / "retriever.json").write_text(json.dumps(settings))
    try:
        os.rename(partial, folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():
            raise
    return folder


_SERVED = ("product_names.npy", "vectors", "value.npy", "columns.arrow", "lexical")


TUNED = "tuned_encoder"  # the part, and the folder of its weights in the part and in a serving folder


def adapted(adapter: Manifest | None) -> bool:
    """Whether vectors go through this adapter: one that would have lowered recall is the identity, and nothing is done."""
    return adapter is not None and adapter.metrics["adopted"]


def tuned(parts: Mapping[str, Manifest]) -> Manifest | None:
    """The tuned text encoder among artefacts by their roles; None where there is none, or none that found more than the encoder
    as it was."""
    encoder = parts.get(TUNED)
    return encoder if adapted(encoder) else None


def tuned_role(parts: Mapping[str, Manifest]) -> tuple[str, ...]:
    """Its role for `Stage.reads`; nothing where the encoder is as it was, so that what is made with it keeps its key."""
    return () if tuned(parts) is None else (TUNED,)


def default_cache() -> Path:
    """Where a node keeps fetched artefacts: $CATID2_CACHE, else ~/.cache/catid2."""
    return Path(os.environ.get("CATID2_CACHE", "~/.cache/catid2")).expanduser()


def release_folder(store: Store, release: Release, cache: Path) -> Path:
    """The serving folder of a release, all parts checked against each other."""
    manifests = release.manifests(store)
    return parts_folder(store, manifests, cache, retriever_settings(manifests, release=release.name))


def parts_folder(store: Store, manifests: dict[str, Manifest], cache: Path, settings: dict) -> Path:
    """The serving folder of these parts, published or not."""
    return serving_folder(
        store, manifests["ids"], manifests["generator"], cache, settings, serving=manifests.get("serving"),
        embeddings=manifests.get("embeddings"), adapter=manifests.get("adapter"), node_vectors=manifests.get("node_vectors"),
        tuned_encoder=manifests.get(TUNED),
    )  # fmt: skip


def retriever_settings(
    manifests: dict[str, Manifest], *, release: str, beam_width: int | None = None, ahead: dict | None = None
) -> dict:
    """What retriever.json holds: the serving part's settings, so that what was evaluated as "served" is what is served.

    Weights are those of the mixture part where it has any. With `beam_width`, and for a release without a serving part, the beam
    alone, of whole IDs and in float32; it looks ahead where `ahead` gives lookahead (its weights) and encoder.
    """
    settings = {
        "query_tokens": manifests["examples"].settings["query_tokens"],
        "codes_per_level": manifests["ids"].metrics["codes_per_level"],
        "release": release,
    }
    examples = manifests["examples"].settings
    if "user" in examples.get("kinds", ()):
        settings["user"] = {"tokens": examples["user_tokens"], "recent": examples["user_recent"]}
    # A generator of another loss means another thing by its numbers; releases of before have none that is not of "level".
    if (taught := manifests["generator"].settings.get("loss", "level")) != "level":
        settings |= {"loss": taught, "normalize": taught}
    if beam_width is None and "serving" in manifests:
        served = manifests["serving"].asked
        if (mixture := manifests.get("mixture")) is not None:
            weights = {name: mixture.metrics.get(name) for name in ("lookahead", "expansion")}
            served |= {name: served[name] | chosen for name, chosen in weights.items() if chosen}
        return settings | served | ({"shared_encoder": True} if _same_encoder(served, manifests["generator"]) else {})
    settings["beam_width"] = beam_width or manifests["evaluation"].settings["beam_width"]
    if ahead is None:
        return settings
    shared = {"shared_encoder": True} if _same_encoder(ahead, manifests["generator"]) else {}
    return settings | {"search": "lookahead", **ahead} | shared


def _same_encoder(served: dict, generator: Manifest) -> bool:
    """Whether the generator reads a query with the very encoder that made the products' vectors, so that one pass does."""
    settings, encoder = generator.settings, served.get("encoder") or {}
    frozen = settings.get("model") == "encoder_decoder" and settings.get("encoder_mode") == "frozen"
    same = settings.get("encoder") == encoder.get("name") and settings.get(TUNED) == encoder.get("tuned")
    return frozen and encoder.get("name") is not None and same
