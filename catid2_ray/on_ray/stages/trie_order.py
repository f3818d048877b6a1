"""From parts to the order of the trie: rows lie in parts by a hash of the product, replicas read them by ID.

Workers spread the rows of a part over ranges of IDs through files, and one process then reads range after range, so that it
holds one range. What is read does not depend on where the ranges begin.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.groups import read_group, write_groups


@dataclass(frozen=True)
class TrieOrder:
    """`splitters`: ascending packed IDs at which a range ends and the next begins."""

    splitters: np.ndarray

    @property
    def ranges(self) -> int:
        return len(self.splitters) + 1

    def spread(self, store: Store, name: str, table: pa.Table) -> None:
        """Write the rows of a part under `name`, by range of their column `packed` (int64)."""
        group_N = np.searchsorted(self.splitters, matrix(table["packed"]), side="right")
        write_groups(store, name, table.combine_chunks(), group_N, self.ranges)

    def gather(self, store: Store, names: Iterable[str], number: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one range in ID order, of an ID that products share in the order of `names`, with all columns or with
        `packed` and these."""
        wanted = columns and ["packed", *columns]
        table = pa.concat_tables([read_group(store, name, number, wanted) for name in names])
        return table.take(pa.array(np.argsort(matrix(table["packed"]), kind="stable")))
