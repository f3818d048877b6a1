"""One state of a live trie, and what it holds of rows, filters and results: base + inserted products + bits of rows.

Rows have two numberings. A product's row in a view: 0 … N − 1 in the base, N + i for the i-th that was inserted; filters, names
and `result_rows` speak of these. Results speak of ranges: `row_range_BK2` in the base, and `inserted_range_BK2`, N + j for the
j-th inserted product in the ID order of the view that was searched.

N rows of the base, D inserted products, L levels, B queries, K results, M rows of one query.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.arrays import entries
from catid2_ray.retrieval.filters import Filter, LiveFilter
from catid2_ray.retrieval.inserted import Inserted
from catid2_ray.retrieval.live_filters import LiveFilterIndex
from catid2_ray.retrieval.live_nodes import NodesOfView
from catid2_ray.retrieval.products import Products
from catid2_ray.retrieval.trie import Trie


@dataclass(frozen=True, eq=False)
class LiveView:
    """One state of a live trie and of all that is known of its products; immutable, so that a search sees no change half-way.

    `inserted`: None while there is none. `live_base` and `live_inserted`: the rows that count; the latter in the order
    of insertion. `filters`, `products`, `nodes`: of the same rows, None where the live trie was made without.
    """

    base: Trie
    inserted: Inserted | None
    live_base: Filter
    live_inserted: Filter
    filters: LiveFilterIndex | None = None
    products: Products | None = None
    nodes: NodesOfView | None = None
    _restricted: WeakKeyDictionary = field(init=False, default_factory=WeakKeyDictionary, repr=False)

    @property
    def codes_per_level(self) -> tuple[int, ...]:
        return self.base.codes_per_level

    @property
    def levels(self) -> int:
        return self.base.levels

    @property
    def rows(self) -> int:
        """N + D, live or not."""
        return self.base.rows + len(self.live_inserted)

    @cached_property
    def live_sorted(self) -> Filter:
        """`live_inserted` in ID order."""
        return self._sorted(self.live_inserted)

    @cached_property
    def whole(self) -> bool:
        """Whether every row of the base is live."""
        return self.live_base.total == self.base.rows

    def _sorted(self, inserted: Filter) -> Filter:
        order_D = np.empty(0, np.int64) if self.inserted is None else self.inserted.order_D
        return Filter.of(inserted.allowed_N[order_D])

    def restricted(self, allowed: LiveFilter | None) -> tuple[Filter, Filter]:
        """Live rows that a request allows: of the base, and inserted ones in ID order. Kept with the filter."""
        if allowed is None:
            return self.live_base, self.live_sorted
        if allowed not in self._restricted:
            inserted = Filter.of(allowed.inserted.allowed_N[: len(self.live_inserted)])
            self._restricted[allowed] = self.live_base & allowed.base, self._sorted(self.live_inserted & inserted)
        return self._restricted[allowed]

    def compile(self, expression) -> LiveFilter:
        """The filter of an expression for this view. Raises QueryError as `FilterIndex.compile`."""
        if self.filters is None:
            raise InputError("this live trie has no filter columns; give index=FilterIndex(…) when it is made")
        return self.filters.compile(expression)

    def with_live(self, rows: np.ndarray, live: bool) -> "LiveView":
        """With these rows live, or none of them."""
        size = self.base.rows
        return replace(
            self,
            live_base=self.live_base.changed(rows[rows < size], live),
            live_inserted=self.live_inserted.changed(rows[rows >= size] - size, live),
        )

    def is_live(self, rows) -> np.ndarray:
        """bool, for each row. Raises IndexError for rows that do not exist."""
        return LiveFilter(self.live_base, self.live_inserted).allows(rows)

    def row_of(self, numbers) -> np.ndarray:
        """The row of each number of a result's range: itself below N, else N + i of the product that stands there."""
        numbers = np.asarray(numbers, np.int64)
        if self.inserted is None:
            return numbers
        order_D, size = self.inserted.order_D, self.base.rows
        return np.where(numbers < size, numbers, size + order_D[np.maximum(numbers - size, 0)])


def codes_of(trie: Trie | LiveView, rows) -> np.ndarray:
    """int64 M×L, the whole ID of each row (of a live view: inserted ones too)."""
    rows, base = np.asarray(rows, np.int64), trie.base if isinstance(trie, LiveView) else trie
    codes_ML, old_M = np.empty((len(rows), base.levels), np.int64), rows < base.rows
    codes_ML[old_M] = base.prefixes(base.levels, base.row_start[-1].holding(rows[old_M]))
    if not old_M.all():
        place_D = np.argsort(trie.inserted.order_D)
        packed_M = trie.inserted.packed_D[place_D[rows[~old_M] - base.rows]]
        codes_ML[~old_M] = DocidSpace(base.codes_per_level).unpack(packed_M)
    return codes_ML


def filters_for(allowed, trie: Trie | LiveView, queries: int) -> list[Filter | LiveFilter | None]:
    """The filter of each query, None where it may find every row.

    `allowed`: one filter, or None, for all queries, or a list with one of these per query. A filter is, of a trie, a
    `Filter` or bool N; of a live view, a `LiveFilter`, bool over base rows and inserted products, or a `Filter` while
    nothing is inserted. Raises InputError for anything else, and for a filter over other rows than the trie's.
    """
    several = isinstance(allowed, (list, tuple)) and not all(isinstance(one, (bool, np.bool_)) for one in allowed)
    if several and len(allowed) != queries:
        raise InputError(f"allowed has {len(allowed)} filters for {queries} queries; give one for each, or None")
    given = allowed if several else [allowed] * queries
    # One object stays one object: it is put on the device once.
    filters = {id(one): None if one is None else _filter(one, trie) for one in given}
    return [filters[id(one)] for one in given]


def _filter(allowed, trie: Trie | LiveView) -> Filter | LiveFilter:
    if not isinstance(trie, LiveView):
        filter_ = allowed if isinstance(allowed, Filter) else Filter.of(_booleans(allowed, trie.rows))
        if len(filter_) != trie.rows:
            raise InputError(
                f"the filter is over {len(filter_)} rows, the trie has {trie.rows}; take both from one release"
            )
        return filter_
    if isinstance(allowed, LiveFilter):
        filter_ = allowed
    elif isinstance(allowed, Filter):
        filter_ = LiveFilter(allowed, Filter.of(np.empty(0, bool)))
    else:
        filter_ = LiveFilter.of(_booleans(allowed, trie.rows), trie.base.rows)
    if len(filter_.base) != trie.base.rows or len(filter_.inserted) < len(trie.live_inserted):
        raise InputError(
            f"the filter is over {len(filter_.base)} rows and {len(filter_.inserted)} inserted products, the live trie "
            f"has {trie.base.rows} and {len(trie.live_inserted)}; take the view first, then compile the filter"
        )
    return filter_


def _booleans(allowed, rows: int) -> np.ndarray:
    try:
        allowed = torch.as_tensor(allowed)
        kind = f"{allowed.dtype} of {tuple(allowed.shape)}"
    except (TypeError, ValueError, RuntimeError):
        kind = type(allowed).__name__
    if kind != f"torch.bool of {(rows,)}":
        raise InputError(f"allowed must be a filter or {rows} booleans, one per trie row, found {kind}")
    return allowed.cpu().numpy()


class ResultRows(NamedTuple):
    """Of one query, in the order of its results: rows (int64 M) and which of the K results each belongs to. Rows of one
    result: the base's, then the inserted ones in the order of insertion (for a cluster: in ID order)."""

    row_M: np.ndarray
    result_M: np.ndarray


def result_rows(result, trie: Trie | LiveView, *, allowed=None, most: int | None = None) -> list[ResultRows]:
    """The live and allowed products of each query's results, at most `most` (None: all), best result first.

    `result`: a BeamResult of a search over `trie` with the same `allowed` (as `filters_for` takes it).
    """
    live, answers = isinstance(trie, LiveView), []
    filters = filters_for(allowed, trie, len(result.count_B))
    for b, (count, filter_) in enumerate(zip(result.count_B.tolist(), filters)):
        parts = [result.row_range_BK2[b, :count].numpy()]
        if result.inserted_range_BK2 is not None:
            parts.append(result.inserted_range_BK2[b, :count].numpy())
        # Result by result: its range in the base, then its range among the inserted.
        range_R2 = np.stack(parts, 1).reshape(-1, 2)
        number_M, range_M = entries(range_R2[:, 0], range_R2[:, 1] - range_R2[:, 0])
        result_M = range_M // len(parts)
        row_M = trie.row_of(number_M) if live else number_M
        kept_M = trie.is_live(row_M) if live else np.ones(len(row_M), bool)
        if filter_ is not None:
            kept_M &= filter_.allows(row_M)
        answers.append(ResultRows(row_M[kept_M][:most], result_M[kept_M][:most]))
    return answers
