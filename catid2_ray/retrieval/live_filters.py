"""Filters over a live trie: bits for the base's rows, as ever, and bits for the products inserted since.

Unusual: inserted rows lie in blocks that merge when the last outgrows half of the one before, so a row is indexed
O(log D) times in all, and one insert costs a millisecond wherever it falls (but for the merges: 50 ms at 50,000 rows).

N base rows, D inserted products.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa

from catid2_ray.errors import InputError
from catid2_ray.retrieval.filters import Filter, FilterIndex


@dataclass(frozen=True, eq=False)
class LiveFilter:
    """`base`: over the N rows of the base trie; `inserted`: over inserted products in the order of insertion. Made
    before an insert or after, it serves a view with at most as many inserted products as it has."""

    base: Filter
    inserted: Filter

    @classmethod
    def of(cls, allowed, rows: int) -> "LiveFilter":
        """From booleans, N base rows and then the inserted products. Raises InputError for anything else."""
        allowed = np.asarray(allowed)
        if allowed.dtype != bool or allowed.ndim != 1 or len(allowed) < rows:
            raise InputError(
                f"a live filter is one boolean per row of the base ({rows}) and per inserted product, found "
                f"{allowed.dtype} of {allowed.shape}"
            )
        return cls(Filter.of(allowed[:rows]), Filter.of(allowed[rows:]))


class LiveFilterIndex:
    """A `FilterIndex` that takes rows: `insert` their columns in the order in which the trie takes the products
    (`LiveTrie` does it). Safe to use from many threads."""

    def __init__(self, index: FilterIndex):
        self.index = index
        self._blocks: list[pa.Table] = []
        self._indexed: list[FilterIndex] = []
        self._made: WeakKeyDictionary[Filter, LiveFilter] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def inserted(self) -> int:
        return sum(block.num_rows for block in self._blocks)

    def rows_of(self, columns: Mapping | pa.Table | None, count: int) -> pa.Table:
        """The columns of `count` new products as the index has them: Arrow, or lists; a column that is not given is
        missing in each. Raises InputError for unknown columns, other types and other lengths."""
        given = {} if columns is None else columns
        names = given.column_names if isinstance(given, pa.Table) else list(given)
        unknown = sorted(set(names) - set(self.index.types))
        if unknown:
            raise InputError(f"unknown columns {unknown} of inserted products; there are {sorted(self.index.types)}")
        made = {}
        for name, dtype in self.index.types.items():
            try:
                values = given[name] if name in names else pa.nulls(count, dtype)
                arrow = isinstance(values, (pa.Array, pa.ChunkedArray))
                made[name] = values.cast(dtype) if arrow else pa.array(list(values), dtype)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise InputError(f'column "{name}" of inserted products is not {dtype} ({error})') from error
            if len(made[name]) != count:
                raise InputError(f'column "{name}" has {len(made[name])} values for {count} inserted products')
        # A table keeps no number of rows without columns.
        return pa.table(made) if made else pa.table({"": pa.nulls(count)})

    def insert(self, rows: pa.Table) -> None:
        """Append what `rows_of` made."""
        if not rows.num_rows:
            return
        with self._lock:
            blocks = [*self._blocks, rows]
            merged = len(blocks) - 1
            while merged and blocks[merged - 1].num_rows < 2 * sum(block.num_rows for block in blocks[merged:]):
                merged -= 1
            last = pa.concat_tables(blocks[merged:]).combine_chunks()
            indexed = FilterIndex(last, product_column=self.index.product_column, kept=0)
            self._blocks, self._indexed = [*blocks[:merged], last], [*self._indexed[:merged], indexed]

    def compile(self, expression) -> LiveFilter:
        """As `FilterIndex.compile`, over base and inserted rows; kept as long as the index keeps the base's filter."""
        base = self.index.compile(expression)
        with self._lock:
            blocks, inserted, made = self._indexed, self.inserted, self._made.get(base)
        if made is not None and len(made.inserted) == inserted:
            return made
        bits = [block.compile(expression).allowed_N for block in blocks]
        made = LiveFilter(base, Filter.of(np.concatenate([np.empty(0, bool), *bits])))
        with self._lock:
            self._made[base] = made
        return made
