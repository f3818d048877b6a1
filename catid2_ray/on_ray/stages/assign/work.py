"""What the workers of stage 2 share, and its first two passes: spread yesterday's ledger over the parts, encode a part.

All that workers exchange lies in files of `machine.groups` in the folder exchange/ of the attempt: codes and occupied IDs by
bucket of prefixes, moves and the ledger before by part, products in order and yesterday's addresses by range of IDs.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.config import IdsRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.hashing import bucket_of
from catid2_ray.identifiers import ledger
from catid2_ray.on_ray.machine import scratch
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.quantizer.coder import Coder, encode, load_coder

LEDGER_COLUMNS = ("product_id", "codes", "status", "since", "until", "cost")


@dataclass(frozen=True)
class Yesterday:
    """What a run on top of an earlier release knows of it.

    `files`: of its ledger. `keeps`: products that have an ID keep it (append). `unnamed_LK`: how the codes of this quantizer
    were named before it was realigned, to count the churn without; None = as now.
    """

    files: int
    quarantine: int
    keeps: bool
    unnamed_LK: list | None = None


@dataclass(frozen=True)
class Work:
    """What every worker of one run is told. `space`: of the coder's codes, None where it has none; `specs`: the parts, in
    order; `number`: of the release that is being made."""

    store: Store
    folder: str
    catalog: str
    vectors: ProductVectors
    quantizer: Manifest
    space: DocidSpace | None
    specs: list[dict]
    recipe: IdsRecipe
    mode: str
    by_value: bool
    seed: int
    buckets: int
    number: int
    yesterday: Yesterday | None

    def name(self, kind: str, number: int) -> str:
        """The store name of a file that workers exchange."""
        return f"{self.folder}/exchange/{kind}-{number:05d}.arrow"

    def before(self, position: int) -> pa.Table:
        """Yesterday's ledger of the products whose part is the one at `position`, by product_id."""
        pieces = [
            read_group(self.store, self.name("ledger-before", file), position) for file in range(self.yesterday.files)
        ]
        return pa.concat_tables(pieces).sort_by("product_id").combine_chunks()

    def home_of(self, packed_N: np.ndarray) -> np.ndarray:
        """The prefix of L − 1 codes, which decides the bucket."""
        return self.space.prefix_of(packed_N, self.space.levels - 1) if self.space else packed_N


def open_coder(store: Store, quantizer: Manifest) -> Coder:
    with scratch.folder("quantizer") as cache:
        return load_coder(fetch(store, quantizer, cache))


def row_hashes(embedding_ND: np.ndarray) -> pa.Array:
    """int64 N, equal for rows that are equal bit for bit, and for others only by chance, about 2^-63 a pair."""
    words_ND = np.ascontiguousarray(embedding_ND, np.float32).view(np.uint32).astype(np.uint64)
    odd_D = np.random.default_rng(0).integers(0, 2**63, words_ND.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    # Mixed before the sum: numbers that differ in their sign alone differ in one high bit, which a product leaves there.
    words_ND = (words_ND + odd_D) * np.uint64(0x9E3779B97F4A7C15)
    words_ND ^= words_ND >> np.uint64(29)
    return pa.array((words_ND * odd_D).sum(1).view(np.int64))


class SpreadLedger:
    """Some files of the ledger before in, their rows by part of today's catalogue out."""

    def __init__(self, *, work: Work, part_of):
        self.work, self.part_of = work, part_of

    def __call__(self, spec: dict) -> dict:
        table = pa.concat_tables([self._read(name) for name in spec["files"]])
        # A part without products has no place of its own; who would be in it is gone, wherever that is noted.
        numbers = np.array([part["part"] for part in self.work.specs])
        part_N = self.part_of(table["product_id"])
        place_N = np.minimum(np.searchsorted(numbers, part_N), len(numbers) - 1)
        place_N[numbers[place_N] != part_N] = 0
        name = self.work.name("ledger-before", spec["position"])
        write_groups(self.work.store, name, table, place_N, len(numbers))
        return {"position": spec["position"]}

    def _read(self, name: str) -> pa.Table:
        table = self.work.store.read_table(name, columns=list(LEDGER_COLUMNS))
        # A file for groups holds one dictionary a column, and these files have one each.
        return table.set_column(table.column_names.index("status"), "status", table["status"].cast(pa.string()))


class EncodePart:
    """Embeddings in, codes and last residuals by bucket out; the same bits for a row whatever rows are encoded with it."""

    def __init__(self, *, work: Work):
        self.work, self.coder = work, open_coder(work.store, work.quantizer)

    def __call__(self, spec: dict) -> dict:
        work, position = self.work, spec["position"]
        columns = ["product_id", "embedding", "category"]
        table = work.vectors.read(spec["file"], columns)
        if work.by_value:
            value = work.store.read_table(f"{work.catalog}/{spec['file']}", columns=["value"])["value"]
            table = table.append_column("value", value)
        table = table.append_column("row", pa.array(np.arange(table.num_rows, dtype=np.int32)))
        if work.yesterday:
            table = self._without_held(table, position)
        embedding_ND = matrix(table["embedding"])
        category_NH = torch.from_numpy(matrix(table["category"]).astype(np.int64))
        encoded = encode(
            self.coder, torch.from_numpy(embedding_ND.copy()), category_NH, rows=work.recipe.encode_rows
        )  # fmt: skip
        packed_N = work.space.pack(encoded.codes_BL.numpy()) if work.space else np.zeros(table.num_rows, np.int64)
        out = table.drop_columns(["embedding", "category"]).append_column("packed", pa.array(packed_N))
        out = out.append_column("twin", row_hashes(embedding_ND))
        if encoded.residual_BZ.shape[1]:
            out = out.append_column("residual", fixed_lists(encoded.residual_BZ.numpy(), pa.float32()))
        bucket_N = bucket_of(work.home_of(packed_N), work.buckets)
        write_groups(work.store, work.name("codes", position), out.combine_chunks(), bucket_N, work.buckets)
        return {"position": position, "encoded": len(packed_N)}

    def _without_held(self, table: pa.Table, position: int) -> pa.Table:
        """The products that need an ID; what yesterday leaves occupied goes to the buckets."""
        work, when = self.work, self.work.yesterday
        before, ids = work.before(position), table["product_id"]
        if when.keeps:
            held_N = ledger.held(before, ids, number=work.number).held_N
            table, taken_ML = table.filter(pa.array(~held_N)), ledger.occupied(before, number=work.number)
        else:
            taken_ML = ledger.withheld(before, ids, number=work.number, quarantine=when.quarantine)
        taken_M = work.space.pack(taken_ML) if len(taken_ML) else np.empty(0, np.int64)
        bucket_M = bucket_of(work.home_of(taken_M), work.buckets)
        write_groups(
            work.store, work.name("occupied", position), pa.table({"packed": taken_M}), bucket_M, work.buckets
        )  # fmt: skip
        return table
