"""The release that a run builds on: its ledger goes on, its IDs are kept or aligned to, and churn is counted against it."""

from dataclasses import dataclass

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import FormatError, ReleaseError
from catid2_ray.on_ray import progress


@dataclass(frozen=True)
class Base:
    release: Release
    parts: dict[str, Manifest]

    @property
    def number(self) -> int:
        """Releases are numbered by their IDs: each artefact of IDs is one more than the one it was built on."""
        return self.parts["ids"].metrics["number"]

    @property
    def appended(self) -> bool:
        return "append" in self.parts["ids"].settings


def open_base(store: Store, name: str | None) -> Base | None:
    """A release as a base; None without a name, and, with a line in the log, where an older version of this software wrote it.

    Raises ReleaseError where the release is recorded but its parts are gone or do not match.
    """
    if name is None:
        return None
    try:
        release = releases.load(store, name)
        return Base(release, release.manifests(store))
    except FormatError as error:
        progress.event("new_ledger", base=name, reason=f"'{error}'")
        return None
    except ReleaseError as error:
        raise ReleaseError(
            f"{error}. What is made now would continue that release's ledger: restore it, or, to start anew without knowing "
            f"which IDs were given before, delete {store.uri_of('current')}"
        ) from None
