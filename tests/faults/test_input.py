"""Tables that are cut off, damaged inside, or changed by somebody while a job reads them: the file is named, nothing is made."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.errors import InputError, StorageError
from catid2_ray.on_ray.commands import run_verb
from catid2_ray.on_ray.stages import catalog

MADE = generate(products=120, queries=40, seed=1)
pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def shop(small, tmp_path):
    """A folder with three files of products, and the recipe; nothing may be committed that was made of it."""
    folder = tmp_path / "shop"
    (folder / "products").mkdir(parents=True)
    for part in range(3):
        pq.write_table(
            MADE.products.slice(40 * part, 40),
            folder / "products" / f"{part}.parquet",
            row_group_size=10,
            compression="zstd",
        )
    pq.write_table(MADE.pairs, folder / "pairs.parquet")
    recipe = Recipe.build(
        small | {"store": str(tmp_path / "store"), "catalog": {"root": str(folder), "rows_per_part": 50}}
    )
    yield folder, recipe
    assert not Store(recipe.store).exists("artifacts/catalog") or not any(
        name.endswith("manifest.json") for name in Store(recipe.store).listing("artifacts/catalog")
    )


def test_a_table_that_is_cut_off_wherever(shop, fault):
    folder, recipe = shop
    path = folder / "products" / "1.parquet"
    whole, times = path.read_bytes(), 0
    for share in (0.01, 0.3, 0.7, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match="1.parquet is not a whole parquet file"):
            run_verb(recipe, "embed_catalog")
        times += 1
    fault("a parquet file that is cut off", times=times, outcome="refused by name", lost_s=0)


def test_a_table_that_is_damaged_inside(shop, fault):
    folder, recipe = shop
    path = folder / "products" / "2.parquet"
    group = pq.ParquetFile(path).metadata.row_group(2)
    column = next(group.column(n) for n in range(group.num_columns) if group.column(n).path_in_schema == "title")
    start, size = column.data_page_offset, column.total_compressed_size
    damaged = bytearray(path.read_bytes())
    damaged[start : start + size] = random.Random(3).randbytes(size)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="2.parquet is damaged inside"):
        run_verb(recipe, "embed_catalog")
    fault("a parquet file with a damaged column", times=1, outcome="refused by name", lost_s=0)


def test_a_schema_that_changes_from_file_to_file(shop, fault):
    folder, recipe = shop
    table, path = MADE.products.slice(80, 40), folder / "products" / "2.parquet"
    pq.write_table(table.set_column(table.column_names.index("title"), "title", pa.array([[1]] * 40)), path)
    with pytest.raises(InputError, match="2.parquet.*title"):
        run_verb(recipe, "embed_catalog")
    pq.write_table(table.rename_columns(["name" if name == "title" else name for name in table.column_names]), path)
    with pytest.raises(InputError, match="2.parquet: missing column title"):
        run_verb(recipe, "embed_catalog")
    fault("a schema that changes midway (type, name)", times=2, outcome="refused by name", lost_s=0)


@pytest.mark.parametrize(
    "change, kind, words",
    [
        (lambda path: path.unlink(), StorageError, "1.parquet: it does not exist"),
        (
            lambda path: path.write_bytes((path.parent / "0.parquet").read_bytes()),
            InputError,
            "1.parquet was changed or deleted",
        ),
        (
            lambda path: (path.parent / "3.parquet").write_bytes(path.read_bytes()),
            InputError,
            "3.parquet came while the job",
        ),
    ],
    ids=["vanishes", "is replaced", "comes"],
)
def test_a_file_that_changes_between_listing_and_reading(shop, monkeypatch, fault, request, change, kind, words):
    folder, recipe = shop
    inspect = catalog._inspect

    def inspected(*arguments):
        table = inspect(*arguments)
        change(folder / "products" / "1.parquet")
        return table

    monkeypatch.setattr(catalog, "_inspect", inspected)
    with pytest.raises(kind, match=words):
        run_verb(recipe, "embed_catalog")
    fault(
        f"a file {request.node.callspec.id} between listing and reading", times=1, outcome="refused by name", lost_s=0
    )
