"""Filter columns of a live trie: those of the release, of the products inserted since, and values that changed in place.

Inserted rows lie in blocks that merge when the last outgrows half of the one before, so a row is indexed O(log D) times in
all, and one insert costs a millisecond wherever it falls (but for the merges: 50 ms at 50,000 rows). A changed value lies
over its column (`filter_columns.Overlaid`): a change costs no more with 2 million rows than with 2,000.

Immutable: a change gives a new object, so a search that began before sees the columns as they were.

N rows of the release, D inserted ones.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa

from catid2_ray.errors import InputError
from catid2_ray.retrieval.filter_columns import Later, Overlaid, PathColumn, arrow_values, merged, with_later
from catid2_ray.retrieval.filters import Filter, FilterIndex, LiveFilter


class _Block(NamedTuple):
    """Inserted rows as they came, and their index, which also holds what has changed since."""

    table: pa.Table
    index: FilterIndex

    def now(self) -> pa.Table:
        """The rows as they are now."""
        table = {}
        for name in self.table.column_names:
            column = self.index.columns.get(name)
            table[name] = with_later(self.table[name], column.blocks if isinstance(column, Overlaid) else ())
        return pa.table(table)


class LiveFilterIndex:
    """A `FilterIndex` and what has come and changed since; `index` is the release's, with the changes of its rows. Safe to
    use from many threads."""

    def __init__(self, index: FilterIndex, blocks: Sequence[_Block] = ()):
        self.index, self._blocks = index, tuple(blocks)
        self._compiled: WeakKeyDictionary[Filter, LiveFilter] = WeakKeyDictionary()

    @property
    def inserted(self) -> int:
        return sum(block.table.num_rows for block in self._blocks)

    def rows_of(self, columns: Mapping | pa.Table | None, count: int) -> pa.Table:
        """The columns of `count` new products as the index has them: Arrow, or lists of what `arrow_values` takes; a column
        that is not given is missing in each. Raises InputError for unknown columns, other types and other lengths."""
        given = {} if columns is None else columns
        names = given.column_names if isinstance(given, pa.Table) else list(given)
        self._known(names, "inserted products")
        table = {}
        for name, dtype in self.index.types.items():
            try:
                values = given[name] if name in names else pa.nulls(count, dtype)
                arrow = isinstance(values, (pa.Array, pa.ChunkedArray))
                table[name] = values.cast(dtype) if arrow else arrow_values(list(values), dtype)
            except (pa.ArrowException, TypeError, ValueError, OverflowError, ArithmeticError) as error:
                raise InputError(f'column "{name}" of inserted products is not {dtype} ({error})') from error
            if len(table[name]) != count:
                raise InputError(f'column "{name}" has {len(table[name])} values for {count} inserted products')
        # A table keeps no number of rows without columns.
        return pa.table(table) if table else pa.table({"": pa.nulls(count)})

    def later_of(self, changed: Mapping[str, Mapping], row_M: np.ndarray) -> dict[str, Later]:
        """Per column, the values of `changed`: product id → {column: value}, None where it shall be missing. `row_M`: the row
        of each product. Raises InputError for unknown columns, other types, and the column of product ids."""
        given: dict[str, tuple[list[int], list]] = {}
        for row, (product_id, values) in zip(row_M.tolist(), changed.items()):
            self._known(values, f"product {product_id!r}")
            for name, value in values.items():
                if name == self.index.product_column:
                    raise InputError(
                        f'column "{name}" of product {product_id!r} is its name, which cannot change; withdraw the product and '
                        "put one of another name"
                    )
                try:
                    arrow_values([value], self.index.types[name])
                except (pa.ArrowException, TypeError, ValueError, OverflowError, ArithmeticError) as error:
                    raise InputError(
                        f'column "{name}" of product {product_id!r} is not {self.index.types[name]} ({error})'
                    ) from error
                rows, column = given.setdefault(name, ([], []))
                rows.append(row)
                column.append(value)
        return {
            name: Later.of(np.array(rows, np.int64), arrow_values(values, self.index.types[name]))
            for name, (rows, values) in given.items()
        }

    def _known(self, names, of: str) -> None:
        unknown = sorted(set(names) - set(self.index.types))
        if unknown:
            raise InputError(f"unknown columns {unknown} of {of}; there are {sorted(self.index.types)}")

    def with_rows(self, rows: pa.Table) -> "LiveFilterIndex":
        """With what `rows_of` made, after the rows there are. Raises InputError for a path that no column can have."""
        if not rows.num_rows:
            return self
        blocks, kept, size = self._blocks, len(self._blocks), rows.num_rows
        while kept and blocks[kept - 1].table.num_rows < 2 * size:
            kept -= 1
            size += blocks[kept].table.num_rows
        return LiveFilterIndex(self.index, (*blocks[:kept], self._block([one.now() for one in blocks[kept:]] + [rows])))

    def with_later(self, later: Mapping[str, Later]) -> "LiveFilterIndex":
        """With what `later_of` made. Raises InputError for a path that no column can have."""
        if not later:
            return self
        index, blocks, first = self._laid(self.index, later, 0), [], self.index.rows
        for table, indexed in self._blocks:
            blocks.append(_Block(table, self._laid(indexed, later, first)))
            first += table.num_rows
        return LiveFilterIndex(index, blocks)

    @staticmethod
    def _laid(index: FilterIndex, later: Mapping[str, Later], first: int) -> FilterIndex:
        mine = {}
        for name, block in later.items():
            inside = (block.row_X >= first) & (block.row_X < first + index.rows)
            if inside.any():
                mine[name] = Later(block.row_X[inside] - first, block.values.filter(pa.array(inside)))
        return index.with_later(mine) if mine else index

    def _block(self, tables: Sequence[pa.Table]) -> _Block:
        table = pa.concat_tables(tables).combine_chunks()
        return _Block(table, FilterIndex(table, product_column=self.index.product_column, kept=0))

    def compile(self, expression) -> LiveFilter:
        """As `FilterIndex.compile`, over all rows; kept as long as the index keeps the base's filter."""
        base = self.index.compile(expression)
        filter_ = self._compiled.get(base)
        if filter_ is None:
            bits = [block.index.compile(expression).allowed_N for block in self._blocks]
            filter_ = LiveFilter(base, Filter.of(np.concatenate([np.empty(0, bool), *bits])))
            self._compiled[base] = filter_
        return filter_

    def inserted_rows(self) -> pa.Table:
        """The columns of the D inserted products as they are now."""
        return pa.concat_tables([block.now() for block in self._blocks] or [self.rows_of(None, 0)])

    def changed(self) -> dict[str, Later]:
        """Per column, the rows of the release whose value has changed."""
        return {
            name: merged(column.blocks) for name, column in self.index.columns.items() if isinstance(column, Overlaid)
        }

    def values_of(self, row: int) -> dict:
        """The columns of one row (base, then inserted) as they are now, but for that of product ids; None for a missing value."""
        first, values = 0, {}
        for part in (self.index, *(block.index for block in self._blocks)):
            if first <= row < first + part.rows:
                for name in self.index.types.keys() - {self.index.product_column}:
                    value, column = part.table[name][row - first].as_py(), part.columns[name]
                    for later in column.blocks if isinstance(column, Overlaid) else ():
                        value = later.value(row - first, value)
                    values[name] = value
            first += part.rows
        return values

    def most_common(self, column: str, rows: np.ndarray, most: int) -> list[tuple[list[str], int]]:
        """The `most` commonest lists in a column of lists of strings among `rows` (base, then inserted), with their numbers
        of rows, commonest first; none for other columns."""
        counted, first = Counter(), 0
        for part in (self.index, *(block.index for block in self._blocks)):
            inside = rows[(rows >= first) & (rows < first + part.rows)] - first
            kept = part.columns.get(column)
            if isinstance(kept.base if isinstance(kept, Overlaid) else kept, PathColumn):
                counted.update(kept.counted(inside))
            first += part.rows
        return [(list(path), number) for path, number in counted.most_common(most)]
