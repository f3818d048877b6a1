"""A release that earlier code published, laid out for a test: `tests/data/README.md` says what is in it."""

import tarfile
from pathlib import Path

import yaml

from catid2_ray.config import Recipe

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
