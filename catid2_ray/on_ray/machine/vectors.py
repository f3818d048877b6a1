"""The products' vectors as everything after the adapter reads them: V d where the release has an adapter, else d.

Whoever needs products' vectors (quantizer, IDs, nodes, dense scores, reports) reads them here and nowhere else, so that none
of them can forget the adapter. Queries get W q where they are encoded: `query_encoder.py` on replicas, `adapted_queries` here.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.release import adapted, default_cache, fetch
from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.quantizer.adapter import LinearAdapter

Encode = Callable[[list[str]], np.ndarray]


def open_adapter(store: Store, adapter: Manifest | None) -> LinearAdapter | None:
    """None where vectors stay as they are: without an adapter, and with one that was not adopted."""
    return LinearAdapter.load(fetch(store, adapter, default_cache())) if adapted(adapter) else None


def adapted_queries(encode: Encode, adapter: LinearAdapter | None) -> Encode:
    """`encode`, and W after it where there is an adapter."""
    return encode if adapter is None else lambda texts: adapter.queries(encode(texts))


@dataclass(frozen=True)
class ProductVectors:
    """The parts of the embeddings artefact, with the column `embedding` adapted. Picklable; a worker reads the adapter once."""

    store: Store
    embeddings: Manifest
    adapter: Manifest | None

    @classmethod
    def of(cls, store: Store, parts: Mapping[str, Manifest]) -> "ProductVectors":
        """Of the artefacts by their roles, "embeddings" and, where there is one, "adapter"."""
        return cls(store, parts["embeddings"], parts.get("adapter"))

    @functools.cached_property
    def _linear(self) -> LinearAdapter | None:
        return open_adapter(self.store, self.adapter)

    def read(self, name: str, columns: list[str]) -> pa.Table:
        """Columns of one part, such as `part-00000.parquet`. A row's bits do not depend on the rows beside it."""
        table = self.store.read_table(self.embeddings.file(name), columns=columns)
        if "embedding" not in columns or self._linear is None:
            return table
        vector_ND = self._linear.products(matrix(table["embedding"]))
        return table.set_column(columns.index("embedding"), "embedding", fixed_lists(vector_ND, pa.float32()))
