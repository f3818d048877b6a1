"""An artefact is a folder of files and a manifest; the manifest is written last, and writing it is the commit.

The folder's name is a key over kind, settings and the digests of the parents: a stage whose inputs and settings are
unchanged finds its result instead of running. Each attempt writes below its own prefix, so a killed attempt leaves
nothing that a later one could mistake for a result, and of two writers the first to create the manifest wins.
"""

import concurrent.futures
import hashlib
import json
import time
import uuid
from dataclasses import asdict, dataclass, field

import catid2_ray
from catid2_ray.artifacts.store import Store, stays_inside
from catid2_ray.errors import ArtifactError, CommitConflict, FormatError

# Of the manifest itself. What a stage writes has a version of its own (artifacts/stages.py). Raise it only together with a reader
# for what came before: published releases are read by every later version.
FORMAT = 6
_HASHED_AT_ONCE = 4  # files; hashing leaves the other threads their time
_CHECK = "manifest_sha256"  # among the metrics, where versions of before look for nothing: a digest of all else


def digest_of(value) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artefact is and where it came from.

    `digest` covers the content alone (names and SHA-256 of the files): equal digests mean equal results. `parents` maps a
    role to the digest of the artefact used. `files` are dicts with name (relative to `folder`), bytes, sha256 and, for
    tables, rows. `extends` maps roles to digests of earlier artefacts of which this one keeps every ID: what was made from
    those serves this one as well. `settings` is the recipe section that took part in the key, `recipe` the whole resolved recipe.
    """

    kind: str
    key: str
    digest: str
    folder: str
    files: list[dict]
    parents: dict[str, str]
    settings: dict
    recipe: dict
    rows: int | None = None
    schema: str | None = None
    metrics: dict = field(default_factory=dict)
    extends: dict[str, list[str]] = field(default_factory=dict)
    code_version: str = catid2_ray.__version__
    created: str = ""
    format: int = FORMAT

    @property
    def name(self) -> str:
        """The store name of the manifest itself."""
        return _manifest_name(self.kind, self.key)

    @property
    def asked(self) -> dict:
        """The settings without the version of the stage that made it."""
        return {name: value for name, value in self.settings.items() if name != "version"}

    def file(self, name: str) -> str:
        """The store name of one of the files, such as `part-00000.parquet`; ArtifactError where it leads out of the folder."""
        for what, value in (("file name", name), ("folder", self.folder)):
            if not stays_inside(value):
                raise ArtifactError(
                    f"{self.name}: the {what} {value!r} leads out of the store's folders; expected a relative name without '..', "
                    "'\\' or empty parts. Delete that folder and rerun the job"
                )
        return f"{self.folder}/{name}"

    def named(self, prefix: str) -> list[dict]:
        """The files below a prefix, in order of their names."""
        return [entry for entry in self.files if entry["name"].startswith(prefix)]

    def parts(self) -> list[dict]:
        return self.named("part-")


def key_of(kind: str, settings: dict, parents: dict[str, str]) -> str:
    """The artefact's folder name: sixteen hex digits over all that decides the result."""
    return digest_of({"format": FORMAT, "kind": kind, "settings": settings, "parents": parents})[:16]


def _manifest_name(kind: str, key: str) -> str:
    return f"artifacts/{kind}/{key}/manifest.json"


def find(store: Store, kind: str, key: str) -> Manifest | None:
    """The committed artefact, or None. A manifest that cannot be read is an ArtifactError, never a silent rerun; so is one
    that names files outside its folder, or that was written for another kind or key.
    """
    name = _manifest_name(kind, key)
    if not store.exists(name):
        return None
    try:
        fields = json.loads(store.read(name))
        _refuse_format(store.uri_of(name), fields["format"])
        manifest = Manifest(**fields)
        names = [entry["name"] for entry in manifest.files]
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{store.uri_of(name)} is not a manifest ({error}); delete that folder and rerun") from None
    if (manifest.kind, manifest.key) != (kind, key):
        raise ArtifactError(
            f"{store.uri_of(name)} says that it is the manifest of {manifest.kind}/{manifest.key}, expected {kind}/{key}; "
            "delete that folder and rerun"
        )
    try:
        for file in ("manifest.json", *names):
            manifest.file(file)
    except ArtifactError as error:
        raise ArtifactError(store.uri_of(str(error))) from None
    _refuse_damaged(store, name, fields, manifest)
    return manifest


def _refuse_format(uri: str, found: int) -> None:
    """Before the fields are looked at, of which another format may have others."""
    if found != FORMAT:
        newer = "it was written by a newer version of catid2-ray; run that one"
        raise FormatError(
            f"{uri} has format {found}, this version reads {FORMAT}: "
            + (newer if found > FORMAT else "it is older than 0.1; make it anew")
        )


def _refuse_damaged(store: Store, name: str, fields: dict, manifest: Manifest) -> None:
    """Raise ArtifactError where a manifest is not as it was written."""
    check = manifest.metrics.get(_CHECK)
    if check is None:  # of before 0.2: its key and its digest cover most of it
        damaged_name = any(len(name) == len(_CHECK) and _differ(name) == 1 for name in manifest.metrics)
        intact = manifest.digest == _digest(manifest.kind, manifest.files) and not damaged_name
    else:
        metrics = {key: value for key, value in manifest.metrics.items() if key != _CHECK}
        intact = check == digest_of({**fields, "metrics": metrics})
    if not intact:
        raise ArtifactError(
            f"{store.uri_of(name)} is not as it was written (SHA-256 differs): a damaged disk or object, or an edit by hand. "
            "Delete its folder and rerun the job"
        )


def _differ(name: str) -> int:
    """In how many letters a name differs from that of the check."""
    return sum(one != other for one, other in zip(name, _CHECK))


def _digest(kind: str, files: list[dict]) -> str:
    return digest_of([kind, [[entry["name"], entry["sha256"]] for entry in files]])


def of_digest(store: Store, kind: str, digest: str) -> list[Manifest]:
    """The committed artefacts of a kind with this content; reads every manifest of the kind."""
    keys = {name.split("/")[0] for name in store.names(f"artifacts/{kind}")}
    found = (find(store, kind, key) for key in sorted(keys))
    return [manifest for manifest in found if manifest and manifest.digest == digest]


class Attempt:
    """One try at producing an artefact: write below `folder`, then `commit`.

    `find` first; an attempt exists only for what is not there. Nothing below `folder` counts until `commit` returns.
    `measure` may be set to a function whose figures join the metrics at the commit, `guard` to one that raises where nothing
    may be committed any more.
    """

    def __init__(self, store: Store, kind: str, *, settings: dict, parents: dict[str, str], recipe: dict):
        self.store, self.kind, self.settings, self.parents, self.recipe = store, kind, settings, parents, recipe
        self.key = key_of(kind, settings, parents)
        self.folder = f"artifacts/{kind}/{self.key}/attempt-{uuid.uuid4().hex[:12]}"
        self.measure, self.guard = dict, None
        self._started = time.monotonic()

    def name(self, file: str) -> str:
        return f"{self.folder}/{file}"

    def commit(
        self, files: list[dict], *, rows: int | None = None, schema: str | None = None, metrics: dict,
        extends: dict[str, list[str]] | None = None,
    ) -> Manifest:  # fmt: skip
        """Write the manifest. Where another attempt at the same key committed first, its manifest is returned instead."""
        entries = sorted(
            ({**entry, "name": entry["name"].removeprefix(f"{self.folder}/")} for entry in files),
            key=lambda e: e["name"],
        )
        manifest = Manifest(
            kind=self.kind,
            key=self.key,
            digest=_digest(self.kind, entries),
            folder=self.folder,
            files=entries,
            parents=self.parents,
            settings=self.settings,
            recipe=self.recipe,
            rows=rows,
            schema=schema,
            extends=extends or {},
            metrics={**metrics, "seconds": round(time.monotonic() - self._started, 2), **self.measure()},
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        manifest.metrics.pop(_CHECK, None)  # of another artefact, whose metrics this one goes on from
        fields = json.loads(json.dumps(asdict(manifest)))
        manifest.metrics[_CHECK] = fields["metrics"][_CHECK] = digest_of(fields)
        if self.guard:
            self.guard()
        try:
            self.store.create(_manifest_name(self.kind, self.key), json.dumps(fields, indent=1).encode())
        except CommitConflict:
            return find(self.store, self.kind, self.key)
        return manifest


def verify(store: Store, manifest: Manifest) -> None:
    """Every file is there with its size, or ArtifactError naming the first that is not."""
    sizes = store.sizes(manifest.folder)
    for entry in manifest.files:
        name, size = manifest.file(entry["name"]), sizes.get(entry["name"])
        if size is None:
            raise ArtifactError(
                f"{store.uri_of(name)} is missing though its manifest is committed: the artefact was damaged after the "
                "fact. Delete its folder and rerun the job"
            )
        if size != entry["bytes"]:
            raise ArtifactError(
                f"{store.uri_of(name)} has {size} bytes, its manifest says {entry['bytes']}. Delete its folder and rerun"
            )


def prove(store: Store, manifest: Manifest, below: tuple[str, ...] = ("",)) -> None:
    """Every file whose name begins so is, by its SHA-256, what was committed; ArtifactError naming the first that is not. Reads
    all of them.
    """
    verify(store, manifest)
    entries = [entry for entry in manifest.files if entry["name"].startswith(below)]
    with concurrent.futures.ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        digests = pool.map(lambda entry: store.sha256(manifest.file(entry["name"])), entries)
        for entry, digest in zip(entries, digests):
            refuse_other(store, manifest, entry, digest)


def refuse_other(store: Store, manifest: Manifest, entry: dict, digest: str) -> None:
    """Raise ArtifactError unless a file's digest is what its manifest says."""
    if digest != entry["sha256"]:
        raise ArtifactError(
            f"{store.uri_of(manifest.file(entry['name']))} is not what its manifest says (SHA-256 differs): a damaged disk or "
            "object, or an edit by hand. Delete its folder and rerun the job"
        )


def read_proven(store: Store, manifest: Manifest, name: str) -> bytes:
    """A small file of an artefact, which is what was committed; else as `prove`."""
    (entry,) = [entry for entry in manifest.files if entry["name"] == name]
    data = store.read(manifest.file(name))
    refuse_other(store, manifest, entry, hashlib.sha256(data).hexdigest())
    return data


def tree_of(embeddings: Manifest, catalog: Manifest) -> str:
    """Where the category tree lies whose ids the embeddings' rows carry: beside them after an append."""
    return (embeddings if embeddings.named("taxonomy.json") else catalog).file("taxonomy.json")
