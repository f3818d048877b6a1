"""New, changed, withdrawn and returned products in a trie that serves, without a rebuild.

The base stays memory-mapped and untouched, a search walks it and the inserted products side by side (`trie_tensors.py`)
and finds what it would in a trie rebuilt from the live products. The next release's trie has them in it. What a search reads
is a view (`live_view.py`).

N rows of the base, D inserted products, L levels, M rows of one change.
"""

import copy
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError, InputError
from catid2_ray.retrieval.filters import Filter, FilterIndex, LiveFilter
from catid2_ray.retrieval.inserted import Inserted
from catid2_ray.retrieval.live_filters import LiveFilterIndex
from catid2_ray.retrieval.live_nodes import NodesOfView
from catid2_ray.retrieval.live_state import followed, state_of, view_with
from catid2_ray.retrieval.live_view import LiveView, codes_of
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Newcomer, ProductNames, Products, check_value
from catid2_ray.retrieval.trie import Trie

_SPARE = 1000  # rows that no name means, beside as many as count, before they are left out


class _Change(NamedTuple):
    """A change that fits the view it was checked against: newcomers with their IDs and the rows that they replace, the filter
    columns after it, and the rows that get another value."""

    newcomers: list[Newcomer]
    codes_ML: np.ndarray
    replaced: np.ndarray
    filters: LiveFilterIndex | None
    valued: np.ndarray
    values: list[float | None]


class LiveTrie:
    """A base trie that takes changes. `view` is its state; every change makes a new one, whole or not at all.

    `product_ids`: of the base's rows, in trie order (sequence, Arrow array, or `ProductNames` of the release); without
    them the base's products are named by row. `index`: the base's `FilterIndex`, for filters over inserted products too.
    `products`: what is known of the base's rows, kept for the inserted ones too. `nodes`: the base's node vectors, which follow
    the products' vectors.
    A product that was withdrawn may be inserted anew with another ID, and its name means the row that was live last.
    `most`: inserted products, live or withdrawn, before the next release must take them over; a row whose name has got
    another row counts no more, and where such rows are most, they are left out and the others numbered anew.

    A change by name costs O(log N) look-ups, and copies of D inserted products or of the base's N / 64 words of bits:
    1 to 2 ms for an insert at 49,000, less for a withdrawal among 10 million rows. The first search of a view with
    inserted products waits for their nodes, 2 to 3 ms at 49,000. Changes come from one thread at a time (a lock), views
    may be read from any. With `check_only` a change raises what it would raise, and changes nothing.
    """

    def __init__(
        self,
        base: Trie,
        *,
        product_ids: Sequence[str] | pa.ChunkedArray | pa.Array | ProductNames | None = None,
        index: FilterIndex | None = None,
        products: Products | None = None,
        nodes: NodeVectors | None = None,
        most: int = 50_000,
    ):
        for name, part in (("product ids", product_ids), ("rows of filter columns", index and range(index.rows))):
            if part is not None and len(part) != base.rows:
                raise InputError(f"{len(part)} {name} for {base.rows} trie rows; take both from one release")
        named = product_ids is None or isinstance(product_ids, ProductNames)
        self.names = product_ids if named else ProductNames(product_ids)
        self.most, self.space = most, DocidSpace(base.codes_per_level)
        self.inserted: list[str] = []
        self._row_of: dict[str, int] = {}
        self._counted = 0  # names whose row was inserted
        self._lock = threading.Lock()
        if nodes is not None:
            nodes.check(base)
        self.view = LiveView(
            base, None, Filter.all_of(base.rows), Filter.of(np.empty(0, bool)),
            filters=None if index is None else LiveFilterIndex(index), products=products,
            nodes=None if nodes is None else NodesOfView(nodes),
        )  # fmt: skip
        self._fresh = self.view

    @property
    def base(self) -> Trie:
        return self.view.base

    @property
    def filters(self) -> LiveFilterIndex | None:
        return self.view.filters

    @property
    def products(self) -> int:
        """How many products can be found now."""
        parts = (self.view.live_base, self.view.live_inserted)
        return int(sum(np.bitwise_count(part.words_W).sum() for part in parts))

    @property
    def column_types(self) -> dict[str, str]:
        """The columns that a filter may name, and what their values are."""
        return {} if self.filters is None else {name: str(kind) for name, kind in self.filters.index.types.items()}

    def compile(self, expression) -> LiveFilter:
        """The filter of an expression over the columns as they are now, for this view and those taken before. Raises
        QueryError as `FilterIndex.compile`."""
        return self.view.compile(expression)

    def insert(self, product_id: str, codes_L, columns: Mapping | None = None) -> int:
        """Add one product, its columns as one value each; returns its row. Raises as `insert_many`."""
        columns = None if columns is None else {name: [value] for name, value in columns.items()}
        return self.insert_many([product_id], [codes_L], columns)[0]

    def insert_many(self, product_ids: Sequence[str], codes_ML, columns: Mapping | pa.Table | None = None) -> list[int]:
        """Add products with their IDs, as `put`, but refuse those that are live; returns their rows."""
        return self.put([Newcomer(one, "") for one in product_ids], codes_ML, columns, only_new=True)

    def put(
        self, newcomers: Sequence[Newcomer], codes_ML, columns: Mapping | pa.Table | None = None, *,
        changed: Mapping[str, Mapping] | None = None, values: Mapping[str, float | None] | None = None,
        only_new: bool = False, check_only: bool = False,
    ) -> list[int]:  # fmt: skip
        """Add products with their IDs (integers M×L) and change others in place, all or nothing; returns the new rows.

        A newcomer takes the place of the live product of its name, and may take its ID; with `only_new` it is refused.
        `columns`: the newcomers', for filters, as `LiveFilterIndex.rows_of` takes them; the product ids are filled in.
        `changed`: product id → {column: value, None for a missing one} of live products; their other columns stay.
        `values`: product id → business value of live products, None for none. Neither makes a row.

        Raises InputError for a code out of range, a product named twice, columns, vectors or values that do not fit, changes
        of products that are not live, or, unless the trie is shared, an ID that another live product has; CapacityError
        beyond `most`.
        """
        with self._lock:
            view, change = self.view, self._checked(newcomers, codes_ML, columns, changed or {}, values or {}, only_new)
            if check_only:
                return []
            rows = [view.rows + i for i in range(len(change.newcomers))]
            self.view = followed(self._with(view, change), change.replaced, np.array(rows, np.int64))
            self.inserted += [one.product_id for one in change.newcomers]
            self._means([one.product_id for one in change.newcomers], rows)
            if len(self.inserted) > 2 * self._counted + _SPARE:
                self._compact()
            return [self.view.rows - len(rows) + i for i in range(len(rows))]

    def copy(self) -> "LiveTrie":
        """The same state, which takes changes of its own."""
        with self._lock:
            other = copy.copy(self)
            other.inserted, other._row_of, other._lock = list(self.inserted), dict(self._row_of), threading.Lock()
            return other

    def state(self) -> dict[str, pa.Table]:
        """The net state of all changes since the release: tables "newcomers" (product_id, codes, live, and as the release has
        them title, value, vector and a struct of filter columns), "withdrawn" (rows of the release) and "changed" (rows of the
        release whose columns or values have changed in place). Rows that no name means are left out."""
        with self._lock:
            return self._state()

    def _state(self) -> dict[str, pa.Table]:
        size = self.base.rows
        counted = {row - size: name for name, row in self._row_of.items() if row >= size}
        return state_of(self.view, counted, self._base_ids)

    def restore_state(self, state: Mapping[str, pa.Table]) -> None:
        """Apply what `state` gave to a live trie of the same release that has taken no change: it then answers as the one
        that gave it. Raises InputError where it has, and for a state of another release."""
        with self._lock:
            if self.view is not self._fresh:
                raise InputError("a state is restored before any change; open the release anew")
            self._adopt(view_with(self._fresh, state, self._base_ids), state["newcomers"])

    def _compact(self) -> None:
        """Leave out rows that no name means; the others get new numbers, in the same order."""
        state = self._state()
        self._adopt(view_with(self._fresh, state, self._base_ids, nodes=self.view.nodes), state["newcomers"])

    def _adopt(self, view: LiveView, newcomers: pa.Table) -> None:
        size, names = self.base.rows, newcomers["product_id"].to_pylist()
        of_base = {name: row for name, row in self._row_of.items() if row < size}
        self.view, self.inserted, self._counted = view, names, len(names)
        self._row_of = of_base | {name: size + at for at, name in enumerate(names)}

    @property
    def _base_ids(self):
        return None if self.names is None else self.names.product_ids

    @staticmethod
    def _with(view: LiveView, change: _Change) -> LiveView:
        now = view.with_live(change.replaced, False)
        inserted, live, products = now.inserted, now.live_inserted, now.products
        if change.newcomers:
            inserted = (inserted or Inserted.none(view.base)).with_products(view.base, change.codes_ML)
            live = Filter.of(np.append(live.allowed_N, np.ones(len(change.newcomers), bool)))
        if products is not None:
            products = products.with_newcomers(change.newcomers).with_values(change.valued, change.values)
        return replace(now, inserted=inserted, live_inserted=live, filters=change.filters, products=products)

    def _checked(self, newcomers, codes_ML, columns, changed: Mapping, values: Mapping, only_new: bool) -> _Change:
        newcomers, view = list(newcomers), self.view
        if not newcomers and not len(codes_ML):
            codes_ML = np.empty((0, self.space.levels), np.int64)
        codes_ML, names = self.space.check(codes_ML), [one.product_id for one in newcomers]
        if len(names) != len(codes_ML):
            raise InputError(f"{len(names)} products to insert, but {len(codes_ML)} IDs; give one ID per product")
        replaced = self._replaced(names, codes_ML, only_new)
        for name in (*changed, *values):
            if name in names:
                raise InputError(f"product {name!r} is put and changed in one request; put it with what it shall have")
        valued = self._live_rows(list(values))
        for name, value in values.items():
            check_value(name, value)
        if values and (view.products is None or view.products.values is None):
            raise InputError(
                f"product {next(iter(values))!r} gets a value, but the release has no values; publish one that has"
            )
        if view.products is not None:
            view.products.check_newcomers(newcomers)
        self._check_moves(newcomers)
        filters = self._filters(names, columns, changed)
        return _Change(newcomers, codes_ML, replaced, filters, valued, list(values.values()))

    def _replaced(self, names: list[str], codes_ML: np.ndarray, only_new: bool) -> np.ndarray:
        """The live rows of the products of these names, which get these IDs."""
        self._refuse_many(names)
        row_M = self._rows_named(names)
        row_M = row_M[row_M >= 0]
        replaced = row_M[self.view.is_live(row_M)]
        self._refuse_twice(names, live=replaced if only_new else [])
        if names:
            self._refuse_taken_ids(names, codes_ML, self.view.with_live(replaced, False))
        return replaced

    def _refuse_many(self, names: list[str]) -> None:
        size = self.base.rows
        more = sum(self._row_of.get(name, -1) < size for name in set(names))
        if names and self._counted + more > self.most:
            raise CapacityError(
                f"{self._counted} products are inserted already, {more} more pass the limit of {self.most}; publish a "
                "release that holds them"
            )

    def _filters(self, product_ids: list[str], columns, changed: Mapping[str, Mapping]) -> LiveFilterIndex | None:
        filters = self.filters
        if filters is None:
            if columns is not None or changed:
                raise InputError("columns of inserted products need index=FilterIndex(…), which this live trie lacks")
            return None
        name = filters.index.product_column
        if name in filters.index.types:
            keys = columns.column_names if isinstance(columns, pa.Table) else columns or ()
            columns = {key: columns[key] for key in keys} | {name: product_ids}
        if changed:
            filters = filters.with_later(filters.later_of(changed, self._live_rows(list(changed))))
        return filters.with_rows(filters.rows_of(columns, len(product_ids))) if product_ids or columns else filters

    def _live_rows(self, names: list[str]) -> np.ndarray:
        row_M = self._rows(names)
        gone = np.flatnonzero(~self.view.is_live(row_M))
        if len(gone):
            raise InputError(f"product {names[gone[0]]!r} is withdrawn; restore it before it changes, or put it")
        return row_M

    def row(self, product_id: str) -> int:
        """The row that a product id means: of the products of that name the one that was live last. Raises InputError."""
        return int(self._rows(product_id)[0])

    def withdraw(self, products: Sequence[str] | Sequence[int], *, check_only: bool = False) -> None:
        """Take products out of every answer, by product id or row; those already out stay out. Raises InputError."""
        with self._lock:
            rows = np.unique(self._rows(products))
            rows = rows[self.view.is_live(rows)]
            self._check_moves(rows)
            if not check_only:
                self.view = followed(self.view.with_live(rows, False), rows, rows[:0])

    def restore(self, products: Sequence[str] | Sequence[int], *, check_only: bool = False) -> None:
        """Bring withdrawn products back with the IDs they had; those already live stay. Raises InputError where a live
        product is of the same name or, unless the trie is shared, has the same ID."""
        with self._lock:
            rows = np.unique(self._rows(products))
            rows = rows[~self.view.is_live(rows)]
            names = [self._name(row) for row in rows.tolist()]
            named = [name for name in names if name is not None]
            row_M = self._rows_named(named)
            self._refuse_twice(named, live=row_M[self.view.is_live(row_M)])
            self._refuse_taken_ids(names, codes_of(self.view, rows), self.view)
            self._check_moves(rows)
            if not check_only:
                self.view = followed(self.view.with_live(rows, True), rows[:0], rows)
                self._means(named, [row for row, name in zip(rows.tolist(), names) if name is not None])

    def _check_moves(self, rows) -> None:
        view = self.view
        if view.nodes is not None and len(rows):
            view.nodes.check(None if view.products is None else view.products.vectors)

    def _means(self, names: list[str], rows: list[int]) -> None:
        """From now on these names mean these rows."""
        size = self.base.rows
        self._counted += sum((row >= size) - (self._row_of.get(name, -1) >= size) for name, row in zip(names, rows))
        self._row_of |= dict(zip(names, rows))

    def _refuse_twice(self, names: list[str], *, live: Sequence[int]) -> None:
        """Raise InputError where one of the rows `live` stands in the way, or a name is given twice."""
        taken = [self._name(row) for row in live] + [name for name, count in Counter(names).items() if count > 1]
        if taken:
            raise InputError(f"product {taken[0]!r} is live already or given twice; withdraw it first")

    def _refuse_taken_ids(self, names: list[str | None], codes_ML: np.ndarray, view: LiveView) -> None:
        """Raise InputError unless products with these IDs may become live together in `view`."""
        if view.base.shared or not len(codes_ML):
            return
        packed_M, node_M = self.space.pack(codes_ML), view.base.nodes_of(codes_ML)[:, -1].astype(np.int64)
        clash = node_M >= 0
        # Without shared IDs a node of the last depth is a row.
        clash[clash] = view.live_base.allows(node_M[clash])
        if view.inserted is not None:
            clash |= view.live_sorted.count(*view.inserted.range_of(packed_M)) > 0
        _, id_M, count_U = np.unique(packed_M, return_inverse=True, return_counts=True)
        clash |= count_U[id_M] > 1
        if clash.any():
            first = int(np.argmax(clash))
            raise InputError(
                f"product {names[first]!r} would share the ID {self.space.text(codes_ML[first])} with a live product; "
                "give it another, withdraw the other, or build the trie with shared=True"
            )

    def _name(self, row: int) -> str | None:
        if row >= self.base.rows:
            return self.inserted[row - self.base.rows]
        return None if self.names is None else self.names.name(row)

    def _rows_named(self, names: list[str]) -> np.ndarray:
        """int64, the row that each name means, −1 where there is none."""
        rows = np.array([self._row_of.get(name, -1) for name in names], np.int64)
        unknown = np.flatnonzero(rows < 0)
        if self.names is not None and len(unknown):
            rows[unknown] = self.names.rows([names[i] for i in unknown.tolist()])
        return rows

    def _rows(self, products) -> np.ndarray:
        products = [products] if isinstance(products, str) else list(products)
        if products and all(isinstance(one, str) for one in products):
            rows = self._rows_named(products)
            if (rows < 0).any():
                missing = products[int(np.argmax(rows < 0))]
                raise InputError(
                    f"no product {missing!r}: neither in the release nor inserted since; check the product id"
                )
            return rows
        rows = np.asarray(products if products else np.empty(0, np.int64))
        last = self.view.rows - 1
        if rows.dtype.kind not in "iu" or (len(rows) and not 0 <= rows.min() <= rows.max() <= last):
            raise InputError(f"products are named by product id or by row 0…{last}, found {products[:3]}")
        return rows.astype(np.int64)
