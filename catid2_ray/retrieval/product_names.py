"""Which row a product id names: rows sorted by their id, 4 bytes a product, saved with a release and memory-mapped.

A look-up is a binary search that reads about 25 ids at 10 million, some 50 µs; many at once are one scan instead.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError
from catid2_ray.retrieval.trie_arrays import pointer_type, read_array

_FILE = "product_names"
# From this many names on, one scan of all product ids is cheaper than a binary search for each.
_MANY = 1000


class ProductNames:
    """`product_ids`: strings, one per trie row (Arrow, or a sequence). `order_N`: rows by ascending product id, missing
    ones last; made here where it is not given, in about 1.5 µs per product. Of rows with the same id the last counts."""

    def __init__(self, product_ids, *, order_N: np.ndarray | None = None):
        arrow = isinstance(product_ids, (pa.Array, pa.ChunkedArray))
        self.product_ids = product_ids if arrow else pa.array(list(product_ids), pa.string())
        if order_N is None:
            order_N = pc.sort_indices(self.product_ids).to_numpy().astype(pointer_type(len(self.product_ids)))
        if len(order_N) != len(self.product_ids):
            raise InputError(
                f"{len(order_N)} sorted names for {len(self.product_ids)} product ids; take both from one release"
            )
        self.order_N, self.named = order_N, len(self.product_ids) - self.product_ids.null_count

    def __len__(self) -> int:
        return len(self.product_ids)

    def name(self, row: int) -> str | None:
        return self.product_ids[row].as_py()

    def save(self, folder) -> None:
        """Write product_names.npy; the product ids themselves lie elsewhere in the release."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        np.save(Path(folder) / f"{_FILE}.npy", self.order_N, allow_pickle=False)

    @classmethod
    def open(cls, folder, product_ids) -> "ProductNames":
        """Memory-map what `save` wrote. Raises ArtifactError for a file that is missing or of another length."""
        rows = len(product_ids)
        order_N = read_array(Path(folder), _FILE, rows, pointer_type(rows), (0, rows - 1)) if rows else np.empty(0, int)
        return cls(product_ids, order_N=order_N)

    def rows(self, names: list[str]) -> np.ndarray:
        """int64, the row that each name means, −1 where there is none."""
        if len(names) < _MANY:
            return np.array([self._row(name) for name in names], np.int64)
        hits = pc.index_in(self.product_ids, pa.array(names, self.product_ids.type))
        at = np.flatnonzero(pc.is_valid(hits).to_numpy(zero_copy_only=False))
        rows_of = {self.name(row): row for row in at.tolist()}
        return np.array([rows_of.get(name, -1) for name in names], np.int64)

    def _row(self, name: str) -> int:
        low, high = 0, self.named
        while low < high:
            middle = (low + high) // 2
            # Python compares text by code point, Arrow by UTF-8 bytes: the same order.
            low, high = (low, middle) if self.name(int(self.order_N[middle])) > name else (middle + 1, high)
        row = int(self.order_N[low - 1]) if low else -1
        return row if low and self.name(row) == name else -1
