"""The release that a run builds on: its ledger goes on, its IDs are kept or aligned to, and churn is counted against it.

Unusual: a rerun must find what the run before it made, though that has been published in the meantime. So when the current
release came from the same catalogue and settings, what is built on is what *it* was built on.
"""

from dataclasses import dataclass

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import Release
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import FormatError, RecipeError, ReleaseError
from catid2_ray.on_ray import progress


@dataclass(frozen=True)
class Base:
    release: Release
    parts: dict[str, Manifest]

    @property
    def number(self) -> int:
        """Releases are numbered by their IDs: each artefact of IDs is one more than the one it was built on."""
        return self.parts["ids"].metrics["number"]


def base_of(store: Store, recipe: Recipe, catalog: Manifest) -> Base | None:
    """What a full re-ID of `catalog` builds on, None for a first release.

    Raises ReleaseError where the release is recorded but its parts are gone or do not match.
    """
    name = releases.pointer(store)[1]
    current = open_base(store, name) if name else None
    if current is None or not _made_by(current.parts, recipe, catalog):
        return current
    before = current.parts["ids"].metrics["base"]
    return open_base(store, before) if before else None


def open_base(store: Store, name: str) -> Base | None:
    """A release as a base; None, with a line in the log, where an older version of this software wrote it."""
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


def _made_by(parts: dict[str, Manifest], recipe: Recipe, catalog: Manifest) -> bool:
    """Whether a full re-ID of this catalogue with this recipe made these parts."""
    ids = parts["ids"]
    if parts["catalog"].digest != catalog.digest or "append" in ids.settings:
        return False
    try:
        made_by = Recipe.build(ids.recipe)
    except RecipeError:
        return False
    return made_by.seed == recipe.seed and all(
        getattr(made_by, section).identity() == getattr(recipe, section).identity()
        for section in ("embedding", "quantizer", "ids")
    )
