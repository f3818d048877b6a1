"""A release that earlier code published, laid out for a test: `tests/data/README.md` says what is in it."""

import json
import shutil
import tarfile
from pathlib import Path

import yaml

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.stages import ANSWERS
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.machine.query_encoder import open_retriever

DATA = Path(__file__).parent / "data"


def unpack(folder: Path, name: str = "release_format_6", **sections) -> Recipe:
    """shop/, store/ and later_products.parquet in `folder`; returns the recipe that made the release, with `sections` changed."""
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    values["store"], values["catalog"]["root"] = str(folder / "store"), str(folder / "shop")
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return Recipe.build(values)


def two_releases(folder: Path, *, answers: bool = False) -> tuple[Store, str, str]:
    """The stored release, and a second, current one of the same products, ranked more by their words; with `answers` its evaluation
    keeps those of three queries, as those of today do."""
    store = Store(unpack(folder).store)
    first = releases.current(store)
    parts = first.manifests(store)
    for part in ("serving", "evaluation"):
        one = parts[part]
        parents = one.parents | ({"serving": parts["serving"].digest} if "serving" in one.parents else {})
        settings = one.settings | {"k": 7}
        if part == "serving":
            settings["expansion"] = one.settings["expansion"] | {"lexical_weight": 0.5}
        attempt = Attempt(store, part, settings=settings, parents=parents, recipe=one.recipe)
        shutil.copytree(store.path(one.folder), store.path(attempt.folder))
        entries = [{**file, "name": attempt.name(file["name"])} for file in one.files]
        entries.append(store.write_file(attempt.name("note.txt"), part.encode()))
        if answers and part == "evaluation":
            kept = json.dumps(_answers(store, parts)).encode()
            entries.append(store.write_file(attempt.name(ANSWERS), kept))
        parts[part] = attempt.commit(entries, rows=one.rows, metrics=one.metrics)
    return store, first.name, releases.publish(store, parts, seen={first.name: 0})[0].name


def _answers(store: Store, parts: dict[str, Manifest]) -> dict[str, list[str]]:
    settings = releases.retriever_settings(parts, release="candidate")
    retriever = open_retriever(releases.parts_folder(store, parts, releases.default_cache(), settings))
    queries = ["steel hinge", "oak shelf", "door"]
    return {query: [hit.product_id for hit in hits] for query, hits in zip(queries, retriever.retrieve(queries, k=10))}
