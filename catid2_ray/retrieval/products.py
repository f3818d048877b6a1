"""What is known of each trie row beside its ID: name, title, value, vector, words; of a release, and inserted since.

Which row an id names is found by rows sorted by id: a binary search that reads about 25 ids at 10 million, some 50 µs;
many at once are one scan instead.

Immutable: a change gives a new object, so a search that began before sees no half of it. Row numbers are those of
`LiveView`: N of the release, then D inserted ones in the order of insertion.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError, ReleaseError
from catid2_ray.retrieval.arrays import pointer_type, read_array
from catid2_ray.retrieval.lexical import LexicalIndex
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore

_NAMES = "product_names"
# From this many names on, one scan of all product ids is cheaper than a binary search for each.
_MANY = 1000


def arrow_strings(values) -> pa.ChunkedArray | pa.Array | None:
    """A sequence of strings as an Arrow column; Arrow columns and None as they are."""
    if values is None or isinstance(values, (pa.ChunkedArray, pa.Array)):
        return values
    return pa.array(list(values), pa.string())


@dataclass(frozen=True)
class Newcomer:
    """A product inserted into a serving release. `vector_D` only where the release has vectors."""

    product_id: str
    title: str
    vector_D: np.ndarray | None = None
    value: float | None = None


@dataclass(frozen=True, eq=False)
class Products:
    """`product_ids`, `titles`: Arrow, one per row of the release (titles may be absent); `values_N` float32; `vectors`;
    `lexical`: each None where the release has none. `newcomers`: D products inserted since."""

    product_ids: pa.Array | pa.ChunkedArray
    titles: pa.Array | pa.ChunkedArray | None = None
    values_N: np.ndarray | None = None
    base_vectors: VectorStore | None = None
    base_lexical: LexicalIndex | None = None
    newcomers: tuple[Newcomer, ...] = field(default=(), repr=False)

    def check(self, rows: int) -> None:
        """Raise ReleaseError where a column has not `rows` entries."""
        columns = {"product ids": self.product_ids, "titles": self.titles, "values": self.values_N}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        parts = {"vectors": self.base_vectors, "rows of the lexical index": self.base_lexical}
        lengths |= {name: part.rows for name, part in parts.items() if part is not None}
        for name, length in lengths.items():
            if length != rows:
                raise ReleaseError(f"{length} {name} for {rows} trie rows; take both from one release")

    def with_newcomers(self, more: Sequence[Newcomer]) -> "Products":
        return replace(self, newcomers=(*self.newcomers, *more))

    def name(self, row: int) -> str:
        # Row by row: `take` on a chunked column costs time in proportion to the catalogue, an index does not.
        size = len(self.product_ids)
        return self.product_ids[row].as_py() if row < size else self.newcomers[row - size].product_id

    def title(self, row: int) -> str | None:
        size = len(self.product_ids)
        if row >= size:
            return self.newcomers[row - size].title
        return None if self.titles is None else self.titles[row].as_py()

    @cached_property
    def values(self) -> np.ndarray | None:
        """float32 N + D, −inf where a product has no value."""
        if self.values_N is None or not self.newcomers:
            return self.values_N
        values = [-np.inf if one.value is None else one.value for one in self.newcomers]
        return np.append(self.values_N, np.array(values, np.float32))

    @cached_property
    def vectors(self) -> VectorStore | GrownVectors | None:
        if self.base_vectors is None or not self.newcomers:
            return self.base_vectors
        return GrownVectors.of(self.base_vectors, np.stack([one.vector_D for one in self.newcomers]))

    @cached_property
    def _more_words(self) -> LexicalIndex:
        return self.base_lexical.more([one.title for one in self.newcomers])

    def lexical_scores(self, queries: Sequence[str], row_BC) -> np.ndarray:
        """float32 B×C, BM25 of each candidate, as `LexicalIndex.scores`."""
        row_BC = np.asarray(row_BC)
        new_BC = row_BC >= self.base_lexical.rows
        score_BC = self.base_lexical.scores(queries, np.where(new_BC, -1, row_BC))
        if new_BC.any():
            score_BC += self._more_words.scores(queries, np.where(new_BC, row_BC - self.base_lexical.rows, -1))
        return score_BC

    def all_lexical_scores(self, queries: Sequence[str]) -> np.ndarray:
        """float32 B×(N + D), BM25 of every product, as `LexicalIndex.everywhere`."""
        score_BN = self.base_lexical.everywhere(queries)
        return np.hstack((score_BN, self._more_words.everywhere(queries))) if self.newcomers else score_BN


class ProductNames:
    """Which row a product id names: rows sorted by their id, 4 bytes a product, saved with a release and memory-mapped.

    `product_ids`: strings, one per trie row (Arrow, or a sequence). `order_N`: rows by ascending product id, missing
    ones last; made here where it is not given, in about 1.5 µs per product. Of rows with the same id the last counts."""

    def __init__(self, product_ids, *, order_N: np.ndarray | None = None):
        self.product_ids = arrow_strings(product_ids)
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
        np.save(Path(folder) / f"{_NAMES}.npy", self.order_N, allow_pickle=False)

    @classmethod
    def open(cls, folder, product_ids) -> "ProductNames":
        """Memory-map what `save` wrote. Raises ArtifactError for a file that is missing or of another length."""
        rows = len(product_ids)
        order_N = (
            read_array(Path(folder), _NAMES, rows, pointer_type(rows), (0, rows - 1)) if rows else np.empty(0, int)
        )
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
        # Python compares text by code point, Arrow by UTF-8 bytes: the same order.
        low = bisect_right(range(self.named), name, key=lambda place: self.name(int(self.order_N[place])))
        row = int(self.order_N[low - 1]) if low else -1
        return row if low and self.name(row) == name else -1
