"""The IDs of the products that users looked at before: they lie in other parts than the pair, so parts ask each other.

Each part of pairs writes which products it asks for, grouped by the part where they lie; each part of IDs reads what it is
asked and writes the answers, grouped by who asked. No process ever holds the whole catalogue.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.stages.catalog import part_of


class Recent(NamedTuple):
    """Known products that a part's pairs name as recent: `row_R` ascending, the pair; `codes_RL` their IDs, the latest last."""

    row_R: np.ndarray
    codes_RL: np.ndarray


def exchange(store: Store, folder: str, specs: list[dict], *, catalog: str, ids: str, teaches, most: int, parts: int,
             workers: int) -> int:  # fmt: skip
    """Write the answers for all parts below `folder`; `answers` reads those of one. Returns how many products that were asked
    for are not in the catalogue.

    `specs` as of `part_specs`. `teaches(pairs)`: the rows of a part's pairs that are meant, in their order. `most`: how many
    of the latest products of a row are asked for.
    """
    asking = [spec for spec in specs if spec["pairs"]]
    arguments = {"store": store, "folder": folder, "catalog": catalog, "teaches": teaches, "most": most, "parts": parts}
    map_parts(_Ask, arguments, asking, workers=workers, label="looking up recent products", unit="products")
    arguments = {
        "store": store,
        "folder": folder,
        "ids": ids,
        "asking": [spec["part"] for spec in asking],
        "parts": parts,
    }
    told = map_parts(_Answer, arguments, specs, workers=workers, label="answering with IDs", unit="products")
    return sum(result["unknown"] for result in told)


def answers(store: Store, folder: str, part: int, answering: list[int]) -> Recent:
    """What the parts `answering` (their numbers) found for the pairs of `part`."""
    answered = pa.concat_tables(
        [read_group(store, f"{folder}/answered-{other:05d}.arrow", part) for other in answering]
    )
    answered = answered.sort_by([("row", "ascending"), ("place", "ascending")])
    return Recent(answered["row"].to_numpy(), matrix(answered["codes"]).astype(np.int64))


class _Ask:
    """Actor: pairs of a part in, the products that they name as recent out, by part."""

    def __init__(self, *, store: Store, folder: str, catalog: str, teaches, most: int, parts: int):
        self.store, self.folder, self.catalog = store, folder, catalog
        self.teaches, self.most, self.parts = teaches, most, parts

    def __call__(self, spec: dict) -> dict:
        pairs = self.teaches(self.store.read_table(f"{self.catalog}/{spec['pairs']}"))
        recent = (
            pairs["recent"].combine_chunks() if "recent" in pairs.column_names else pa.array([], pa.list_(pa.string()))
        )
        length_N = pc.fill_null(pc.list_value_length(recent), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        row_R = np.repeat(np.arange(len(length_N)), length_N)
        place_R = np.arange(len(row_R)) - np.repeat(np.cumsum(length_N) - length_N, length_N)
        late_R = place_R >= np.repeat(length_N - self.most, length_N)
        table = pa.table({"row": row_R, "place": place_R, "product_id": pc.list_flatten(recent)}).filter(
            pa.array(late_R)
        )
        group_N = part_of(table["product_id"], self.parts)
        write_groups(self.store, f"{self.folder}/asked-{spec['part']:05d}.arrow", table, group_N, self.parts)
        return {"position": spec["position"]}


class _Answer:
    """Actor: IDs of a part in, what the others asked of it out."""

    def __init__(self, *, store: Store, folder: str, ids: str, asking: list[int], parts: int):
        self.store, self.folder, self.ids, self.asking, self.parts = store, folder, ids, asking, parts

    def __call__(self, spec: dict) -> dict:
        ids = self.store.read_table(f"{self.ids}/{spec['file']}", columns=["product_id", "codes"])
        asked = [read_group(self.store, f"{self.folder}/asked-{part:05d}.arrow", spec["part"]) for part in self.asking]
        asker_R = np.repeat(np.array(self.asking, np.int64), [table.num_rows for table in asked])
        asked = pa.concat_tables(asked)
        place = pc.index_in(asked["product_id"].combine_chunks(), ids["product_id"].combine_chunks())
        known = place.is_valid()
        codes_RL = matrix(ids["codes"])[place.drop_null().to_numpy()]
        found = asked.select(["row", "place"]).filter(known).append_column("codes", fixed_lists(codes_RL, pa.int32()))
        asker_R = asker_R[known.to_numpy(zero_copy_only=False)]
        write_groups(self.store, f"{self.folder}/answered-{spec['part']:05d}.arrow", found, asker_R, self.parts)
        return {"position": spec["position"], "unknown": place.null_count}
