"""What is known of each trie row beside its ID: name, title, value, vector, words; of a release, and inserted since.

Immutable: a change gives a new object, so a search that began before sees no half of it. Row numbers are those of
`LiveView`: N of the release, then D inserted ones in the order of insertion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from catid2_ray.errors import ReleaseError
from catid2_ray.retrieval.lexical import LexicalIndex
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore


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
