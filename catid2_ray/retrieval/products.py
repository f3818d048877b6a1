"""What is known of each trie row beside its ID: name, title, value, vector, words; of a release, and inserted since.

Which row an id names is found by rows sorted by id: a binary search that reads about 25 ids at 10 million, some 50 µs;
many at once are one scan instead.

Immutable: a change gives a new object, so a search that began before sees no half of it. Row numbers are those of
`LiveView`: N of the release, then D inserted ones in the order of insertion.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError, ReleaseError
from catid2_ray.retrieval.arrays import Growing, pointer_type, read_array
from catid2_ray.retrieval.filter_columns import Later, laid_over, merged
from catid2_ray.retrieval.lexical import GrownWords, LexicalIndex
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore, halves

_NAMES = "product_names"
# From this many names on, one scan of all product ids is cheaper than a binary search for each.
_MANY = 1000
_LARGEST = float(np.finfo(np.float32).max)


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
class Values:
    """The business value of each row, float32, −inf where a product has none: N of the release, D inserted, and what has
    changed since."""

    base_N: np.ndarray
    grown: Growing
    later: tuple[Later, ...] = ()

    def __len__(self) -> int:
        return len(self.base_N) + len(self.grown)

    def with_rows(self, values: Sequence[float | None]) -> "Values":
        return replace(self, grown=self.grown.with_rows(_valued(values)))

    def with_later(self, row_M: np.ndarray, values: Sequence[float | None]) -> "Values":
        return replace(self, later=laid_over(self.later, Later.of(row_M, pa.array(_valued(values)))))

    def changed(self) -> Later:
        """What has changed; there is something."""
        later = merged(self.later)
        values = later.values.to_numpy()
        return Later(later.row_X, pa.array(values, mask=np.isneginf(values)))

    def of(self, row_M: np.ndarray) -> np.ndarray:
        """float32, the value of each row."""
        new_M = row_M >= len(self.base_N)
        value_M = np.empty(len(row_M), np.float32)
        value_M[~new_M] = self.base_N[row_M[~new_M]]
        value_M[new_M] = self.grown.rows[row_M[new_M] - len(self.base_N)]
        for later in self.later:
            at_M = np.minimum(np.searchsorted(later.row_X, row_M), len(later.row_X) - 1)
            mine_M = later.row_X[at_M] == row_M
            value_M[mine_M] = later.values.to_numpy()[at_M[mine_M]]
        return value_M


def _valued(values: Sequence[float | None]) -> np.ndarray:
    return np.array([-np.inf if value is None else value for value in values], np.float32)


@dataclass(frozen=True, eq=False)
class Products:
    """`product_ids`, `titles`: Arrow, one per row of the release (titles may be absent); `values_N` float32; `base_vectors`;
    `base_lexical`: each None where the release has none. `newcomers`: D products inserted since, without their vectors; the
    last three are what the release has and theirs."""

    product_ids: pa.Array | pa.ChunkedArray
    titles: pa.Array | pa.ChunkedArray | None = None
    values_N: np.ndarray | None = None
    base_vectors: VectorStore | None = None
    base_lexical: LexicalIndex | None = None
    newcomers: tuple[Newcomer, ...] = field(default=(), repr=False)
    values: Values | None = field(default=None, repr=False)
    grown_vectors: GrownVectors | None = field(default=None, repr=False)
    grown_words: GrownWords | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.values is None and self.values_N is not None:
            object.__setattr__(self, "values", Values(self.values_N, Growing.of(np.empty(0, np.float32))))

    def check(self, rows: int) -> None:
        """Raise ReleaseError where a column has not `rows` entries."""
        columns = {"product ids": self.product_ids, "titles": self.titles, "values": self.values_N}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        parts = {"vectors": self.base_vectors, "rows of the lexical index": self.base_lexical}
        lengths |= {name: part.rows for name, part in parts.items() if part is not None}
        for name, length in lengths.items():
            if length != rows:
                raise ReleaseError(f"{length} {name} for {rows} trie rows; take both from one release")

    def check_newcomers(self, more: Sequence[Newcomer], *, complete: bool = True) -> None:
        """Raise InputError for newcomers that cannot be added: text that is no UTF-8, a value that is not finite, a vector
        that does not fit; also one without a vector where the release has vectors and they must be `complete`."""
        for one in more:
            if not all(isinstance(text, str) and _is_utf8(text) for text in (one.product_id, one.title)):
                raise InputError(f"product {one.product_id!r}: product id and title must be text that UTF-8 can hold")
            check_value(one.product_id, one.value)
            if self.base_vectors is not None and (one.vector_D is not None or complete):
                self._half(one)

    def _half(self, one: Newcomer) -> np.ndarray:
        width, vector_D = self.base_vectors.width, np.asarray(one.vector_D)
        if vector_D.shape != (width,) or vector_D.dtype.kind not in "fiu" or not np.isfinite(vector_D).all():
            raise InputError(f"the vector of product {one.product_id!r} must be {width} finite numbers")
        return halves(vector_D.astype(np.float32)[None], self.base_vectors)[0]

    def with_newcomers(self, more: Sequence[Newcomer], *, stored: np.ndarray | None = None) -> "Products":
        """These and `more`, as `check_newcomers` wants them. `stored`: their vectors as these products keep them (float16)."""
        if not more:
            return self
        changed = {"newcomers": (*self.newcomers, *map(_without_vector, more))}
        if self.values is not None:
            changed["values"] = self.values.with_rows([one.value for one in more])
        if self.base_vectors is not None:
            grown = self.grown_vectors or GrownVectors.of(self.base_vectors, ())
            stored = np.stack([self._half(one) for one in more]) if stored is None else stored
            changed["grown_vectors"] = grown.with_halves(stored)
        if self.base_lexical is not None:
            changed["grown_words"] = (self.grown_words or GrownWords(self.base_lexical)).with_texts(
                [one.title for one in more]
            )
        return replace(self, **changed)

    def with_values(self, row_M: np.ndarray, values: Sequence[float | None]) -> "Products":
        """Other values of some rows."""
        return replace(self, values=self.values.with_later(row_M, values)) if len(row_M) else self

    @property
    def of_release(self) -> "Products":
        """Without what has come or changed since."""
        return Products(self.product_ids, self.titles, self.values_N, self.base_vectors, self.base_lexical)

    def name(self, row: int) -> str:
        # Row by row: `take` on a chunked column costs time in proportion to the catalogue, an index does not.
        size = len(self.product_ids)
        return self.product_ids[row].as_py() if row < size else self.newcomers[row - size].product_id

    def title(self, row: int) -> str | None:
        size = len(self.product_ids)
        if row >= size:
            return self.newcomers[row - size].title
        return None if self.titles is None else self.titles[row].as_py()

    @property
    def vectors(self) -> VectorStore | GrownVectors | None:
        return self.grown_vectors or self.base_vectors

    @property
    def _words(self) -> LexicalIndex | GrownWords:
        return self.grown_words or self.base_lexical

    def lexical_scores(self, queries: Sequence[str], row_BC) -> np.ndarray:
        """float32 B×C, BM25 of each candidate, as `LexicalIndex.scores`."""
        return self._words.scores(queries, row_BC)

    def all_lexical_scores(self, queries: Sequence[str]) -> np.ndarray:
        """float32 B×(N + D), BM25 of every product, as `LexicalIndex.everywhere`."""
        return self._words.everywhere(queries)


def _without_vector(one: Newcomer) -> Newcomer:
    return one if one.vector_D is None else Newcomer(one.product_id, one.title, None, one.value)


def check_value(product_id: str, value) -> None:
    """Raise InputError unless `value` is None or a number that float32 can hold."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if value is not None and not (number and abs(value) <= _LARGEST):
        raise InputError(f"the value of product {product_id!r} must be a finite number, found {value!r}")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


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
