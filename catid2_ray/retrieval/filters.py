"""Sets of products for one request: from a JSON expression over columns to bits over trie rows, with counts of any range.

A prefix of an ID is a range of rows, so it may live exactly if the count of allowed rows in its range is not 0: two
look-ups into bits and counts of N/8 + N/16 bytes, whatever the filter. Combinations are bit operations.

An expression is one of (arrays may be empty: "all" of nothing allows every product, "any" of nothing allows none)
    {"all": [expression, …]}    {"any": [expression, …]}    {"not": expression}
    {"column": "brand", "in": ["x", "y"]}            strings or whole numbers
    {"column": "price", "from": 1, "to": 5}          numbers, both ends inclusive, either may be left out
    {"column": "in_stock", "is": true}               booleans
    {"column": "added", "from": "2024-01-31"}        dates, as text YYYY-MM-DD; "from", "to" or both
    {"column": "category_path", "under": ["Home"]}   lists of strings: paths that begin so
    {"column": "markets", "has": ["de", "at"]}       lists of strings: sets that hold at least one of these
    {"products": ["id1", "id2"]}                     by product id; ids that are not in the table are passed over
A missing value meets no condition, so "not" of the condition allows its product.

Of a live trie a filter has two parts: bits for the base's rows, and bits for the products inserted since.

N rows, W = N // 64 + 1 words of 64 rows, D inserted products.
"""

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from catid2_ray.errors import InputError, QueryError
from catid2_ray.retrieval.filter_columns import Column, Later, Overlaid, column_of

MAX_DEPTH = 20
MAX_CONDITIONS = 100
MAX_NODES = 500  # expressions, conditions included; each costs a pass over N / 64 words
MAX_VALUES = 10_000


class FilterTensors(NamedTuple):
    """A filter on a device: `words_W` int64 (bit i of word w is row 64 w + i), `before_W` int32 (allowed rows before
    word w). `first_B`: where filters differ between queries, they lie end to end, and a query's begins at this word."""

    words_W: Tensor
    before_W: Tensor
    first_B: Tensor | None = None


def allowed_before(filter_: FilterTensors, row: Tensor) -> Tensor:
    """int64, the number of allowed rows below each `row` (integers 0 … N, any shape; B×… where queries differ).

    Range [a, b) holds an allowed row exactly if allowed_before(b) > allowed_before(a). Ranges that lie end to end, as
    those of one node's children do, need it once per boundary.
    """
    word = row >> 6
    if filter_.first_B is not None:
        word = word + filter_.first_B.view(-1, *[1] * (row.ndim - 1))
    word = word.flatten()
    # Bit 63 is always masked away, so the count below never meets a sign. index_select is twice as fast as [].
    bits = filter_.words_W.index_select(0, word) & (torch.bitwise_left_shift(1, (row & 63).long().flatten()) - 1)
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (filter_.before_W.index_select(0, word) + ((bits * 0x0101010101010101) >> 56)).view(row.shape)


def stacked(filters: Sequence["Filter"], device) -> FilterTensors:
    """One filter per query of a batch; those that are the same object lie there once. Copies N/8 + N/16 bytes for each
    of the others, in each search."""
    distinct = list({id(one): one for one in filters}.values())
    if len(distinct) == 1:
        return distinct[0].tensors(device)
    number = {id(one): place for place, one in enumerate(distinct)}
    words, before, _ = zip(*(one.tensors(device) for one in distinct))
    first_B = torch.tensor([number[id(one)] * len(words[0]) for one in filters], device=device)
    return FilterTensors(torch.cat(words), torch.cat(before), first_B)


class Filter:
    """The rows that a request allows. Immutable; `&`, `|` and `~` give new filters.

    `rows` N; `words_W` uint64, bit i of word w says whether row 64 w + i is allowed; `before_W` int32, allowed rows
    before each word. Bits beyond N are 0.
    """

    def __init__(self, words_W: np.ndarray, rows: int):
        self.rows, self.words_W = rows, words_W
        count_W = np.bitwise_count(words_W)
        self.before_W = np.cumsum(count_W, dtype=np.int32) - count_W
        self._tensors: dict[torch.device, FilterTensors] = {}

    @classmethod
    def of(cls, allowed_N) -> "Filter":
        """From booleans over trie rows. Raises InputError for anything else."""
        allowed_N = np.asarray(allowed_N)
        if allowed_N.dtype != bool or allowed_N.ndim != 1 or len(allowed_N) >= 2**31:
            raise InputError(
                f"a filter is one boolean per trie row, fewer than 2^31, found {allowed_N.dtype} of {allowed_N.shape}"
            )
        return cls(_packed(allowed_N), len(allowed_N))

    @classmethod
    def all_of(cls, rows: int) -> "Filter":
        """Every one of `rows` rows."""
        return cls(_inverted(np.zeros(rows // 64 + 1, np.uint64), rows), rows)

    def changed(self, rows: np.ndarray, allowed: bool) -> "Filter":
        """This filter but for `rows` (int64, within the filter), all allowed or all not. O(N / 64)."""
        if not len(rows):
            return self
        words_W, bit = self.words_W.copy(), np.uint64(1) << (rows & 63).astype(np.uint64)
        (np.bitwise_or if allowed else np.bitwise_and).at(words_W, rows >> 6, bit if allowed else ~bit)
        return Filter(words_W, self.rows)

    def __and__(self, other: "Filter") -> "Filter":
        return Filter(self.words_W & self._fitting(other), self.rows)

    def __or__(self, other: "Filter") -> "Filter":
        return Filter(self.words_W | self._fitting(other), self.rows)

    def __invert__(self) -> "Filter":
        return Filter(_inverted(self.words_W, self.rows), self.rows)

    def _fitting(self, other: "Filter") -> np.ndarray:
        if other.rows != self.rows:
            raise InputError(
                f"filters over {self.rows} and {other.rows} rows do not combine; take both from one release"
            )
        return other.words_W

    def __len__(self) -> int:
        """The number of rows, allowed or not."""
        return self.rows

    @property
    def total(self) -> int:
        """The number of allowed rows."""
        return int(self.before_W[-1]) + int(np.bitwise_count(self.words_W[-1]))

    @property
    def allowed_N(self) -> np.ndarray:
        """bool N, made anew."""
        return np.unpackbits(self.words_W.view(np.uint8), count=self.rows, bitorder="little").view(bool)

    def allows(self, rows) -> np.ndarray:
        """bool, for each row number whether it is allowed. Raises IndexError for rows that do not exist."""
        rows = self._within(rows, self.rows - 1)
        return (self.words_W[rows >> 6] >> (rows & 63).astype(np.uint64)) & np.uint64(1) != 0

    def count(self, start, end) -> np.ndarray:
        """int64, allowed rows in the ranges start … end − 1 (integers 0 … N, shapes that broadcast)."""
        return self._before(end) - self._before(start)

    def _before(self, rows) -> np.ndarray:
        rows = self._within(rows, self.rows)
        word = rows >> 6
        below = (np.uint64(1) << (rows & 63).astype(np.uint64)) - np.uint64(1)
        return self.before_W[word] + np.bitwise_count(self.words_W[word] & below).astype(np.int64)

    def _within(self, rows, last: int) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() <= last:
            raise IndexError(f"row {rows.min()} or {rows.max()} is outside 0…{last}")
        return rows

    def tensors(self, device="cpu") -> FilterTensors:
        """For `allowed_before` on `device`; on CPU the same memory. Kept with the filter."""
        device = torch.device(device)
        if device not in self._tensors:
            words_W, before_W = torch.from_numpy(self.words_W.view(np.int64)), torch.from_numpy(self.before_W)
            self._tensors[device] = FilterTensors(words_W.to(device), before_W.to(device))
        return self._tensors[device]


def _packed(allowed_N: np.ndarray) -> np.ndarray:
    words_W = np.zeros(len(allowed_N) // 64 + 1, np.uint64)
    bits = np.packbits(allowed_N, bitorder="little")
    words_W.view(np.uint8)[: len(bits)] = bits
    return words_W


def _inverted(words_W: np.ndarray, rows: int) -> np.ndarray:
    words_W = ~words_W
    words_W[-1] &= (np.uint64(1) << np.uint64(rows & 63)) - np.uint64(1)
    return words_W


@dataclass(frozen=True, eq=False)
class LiveFilter:
    """`base`: over the N rows of the base trie; `inserted`: over inserted products in the order of insertion. Made
    before an insert or after, it serves a view with at most as many inserted products as it has."""

    base: Filter
    inserted: Filter

    @classmethod
    def of(cls, allowed, rows: int) -> "LiveFilter":
        """From booleans: N base `rows`, then the inserted products. Raises InputError for anything else."""
        return cls(Filter.of(allowed[:rows]), Filter.of(allowed[rows:]))

    def allows(self, rows) -> np.ndarray:
        """bool, for each row number (N + i: the i-th insertion). Raises IndexError for rows that do not exist."""
        rows = np.asarray(rows, np.int64)
        old, allowed = rows < len(self.base), np.empty(rows.shape, bool)
        allowed[old] = self.base.allows(rows[old])
        allowed[~old] = self.inserted.allows(rows[~old] - len(self.base))
        return allowed


class FilterIndex:
    """The columns of the product table, made ready for filters.

    `columns`: an Arrow table or a mapping of names to Arrow arrays, rows in trie order: strings, whole numbers, floats,
    decimals of at most 18 digits, dates, booleans, lists of strings (paths or sets), or dictionaries of these.
    `product_column` names the column of product ids, if it is there. Text is kept as numbers of 1 to 4 bytes a row,
    other columns as they are. `kept` filters are remembered, the least recently used forgotten first. `types`: what
    inserted rows must have (`live_filters.py`). Safe to use from many threads.

    Raises InputError for columns of other types or of different lengths.
    """

    def __init__(self, columns: pa.Table | Mapping, *, product_column: str = "product_id", kept: int = 64):
        try:
            table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise InputError(f"columns of a filter must be Arrow arrays of one length ({error})") from error
        if table.num_rows >= 2**31:
            raise InputError(f"a filter holds fewer than 2^31 rows, found {table.num_rows}")
        self.rows, self.product_column, self.kept = table.num_rows, product_column, kept
        self.table = table  # as given: of a release it is mapped, so it costs no memory
        self.columns: dict[str, Column] = {
            name: column_of(name, table[name], products=name == product_column) for name in table.column_names
        }
        self.types: dict[str, pa.DataType] = {
            field.name: field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            for field in table.schema
        }
        # Text of the expression → its filter, and the columns that it names.
        self._cache: OrderedDict[str, tuple[Filter, set[str]]] = OrderedDict()
        self._lock = threading.Lock()

    def with_later(self, later: Mapping[str, Later]) -> "FilterIndex":
        """An index in which some rows of some columns have other values; this one stays as it is, and they share the rest, with
        the filters that name none of these columns. Raises InputError for values that a column cannot have."""
        changed = copy.copy(self)
        changed.columns = dict(self.columns)
        for name, block in later.items():
            column = self.columns[name]
            column = column if isinstance(column, Overlaid) else Overlaid(name, column)
            changed.columns[name] = column.with_later(block)
        changed._lock = threading.Lock()
        with self._lock:
            kept = [(key, one) for key, one in self._cache.items() if not one[1] & later.keys()]
        changed._cache = OrderedDict(kept)
        return changed

    def compile(self, expression) -> Filter:
        """The filter of an expression (as at the top of this file; parsed JSON).

        Raises QueryError, with the place in the expression, for what is no expression, for unknown columns and
        operators, for values of the wrong type, and beyond MAX_DEPTH levels, MAX_NODES expressions, MAX_CONDITIONS
        conditions or MAX_VALUES values in all lists together.
        """
        try:
            key = json.dumps(expression, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise QueryError(f"a filter must be JSON of at most {MAX_DEPTH} levels ({error})") from None
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key][0]
        counted = _Counted()
        filter_ = Filter(self._parsed(expression, "$", counted)(), self.rows)
        with self._lock:
            self._cache[key] = filter_, counted.columns
            while len(self._cache) > self.kept:
                self._cache.popitem(last=False)
        return filter_

    def _parsed(self, node, where: str, counted: "_Counted") -> Callable[[], np.ndarray]:
        """What makes the words of `node`; nothing is computed before the whole expression is known to be sound.
        `counted`: what the expression holds so far."""
        if not isinstance(node, dict):
            raise _error(where, f"expected an object with {_FORMS}, found {_shown(node)}")
        if where.count("[") + where.count(".not") > MAX_DEPTH:
            raise _error(where, f"a filter may be {MAX_DEPTH} levels deep; make it flatter")
        counted.nodes += 1
        if counted.nodes > MAX_NODES:
            raise _error(where, f"a filter may hold {MAX_NODES} expressions; leave out those that change nothing")
        kinds = [name for name in ("all", "any", "not", "products", "column") if name in node]
        if len(kinds) != 1:
            raise _error(where, f"expected exactly one of {_FORMS}, found {_shown(sorted(node))}")
        kind = kinds[0]
        if kind != "column" and len(node) > 1:
            raise _error(where, f'"{kind}" stands alone, found beside it {_shown(sorted(set(node) - {kind}))}')
        if kind == "not":
            inner = self._parsed(node["not"], f"{where}.not", counted)
            return lambda: _inverted(inner(), self.rows)
        if kind in ("all", "any"):
            return self._combined(kind, node[kind], f"{where}.{kind}", counted)
        if kind == "products":
            name, values, places = self.product_column, {"in": node[kind]}, {"in": f"{where}.{kind}"}
        else:
            name, values = node[kind], {key: value for key, value in node.items() if key != kind}
            places = {key: f"{where}.{key}" for key in values}
        if not isinstance(name, str) or name not in self.columns:
            raise _error(f"{where}.{kind}", f"unknown column {_shown(name)}; there are {_shown(sorted(self.columns))}")
        return self._condition(name, values, where, places, counted)

    def _condition(self, name: str, values: dict, where: str, places: dict, counted: "_Counted"):
        counted.conditions += 1
        counted.columns.add(name)
        counted.values += sum(len(value) for value in values.values() if isinstance(value, list))
        if counted.conditions > MAX_CONDITIONS:
            raise _error(where, f"a filter may hold {MAX_CONDITIONS} conditions; put values into one list")
        if counted.values > MAX_VALUES:
            raise _error(where, f"a filter may hold {MAX_VALUES} values, found {counted.values} up to here")
        column = self.columns[name]
        if tuple(sorted(values)) not in column.operators:
            usable = " or ".join(" with ".join(f'"{key}"' for key in keys) for keys in column.operators)
            raise _error(where, f'column "{name}" ({column.kind}) takes {usable}, found {_shown(sorted(values))}')
        for key, value in values.items():
            wrong = column.wrong(key, value)
            if wrong:
                raise _error(places[key] + wrong[0], f'column "{name}" ({column.kind}) {wrong[1]}')
        return lambda: _packed(column.match(values))

    def _combined(self, kind: str, nodes, where: str, counted: "_Counted") -> Callable[[], np.ndarray]:
        if not isinstance(nodes, list):
            raise _error(where, f"expected a list of expressions, found {_shown(nodes)}")
        parts = [self._parsed(node, f"{where}[{i}]", counted) for i, node in enumerate(nodes)]
        none_W = np.zeros(self.rows // 64 + 1, np.uint64)

        def combine() -> np.ndarray:
            words_W = _inverted(none_W, self.rows) if kind == "all" else none_W.copy()
            for part in parts:
                (np.bitwise_and if kind == "all" else np.bitwise_or)(words_W, part(), out=words_W)
            return words_W

        return combine


@dataclass
class _Counted:
    """Expressions, conditions, listed values and named columns of an expression, as far as it was read."""

    nodes: int = 0
    conditions: int = 0
    values: int = 0
    columns: set[str] = field(default_factory=set)


_FORMS = '"all", "any", "not", "column" or "products"'


def _shown(value) -> str:
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + "…"


def _error(where: str, what: str) -> QueryError:
    return QueryError(f"filter at {where}: {what}")
