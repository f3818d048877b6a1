"""Columns of the product table as filters read them: which operators each type takes, and the rows that match.

Text becomes numbers in the order of the text, so a subtree of categories is one interval of numbers. Values that change
later lie over a column (`Overlaid`), which itself stays as it is.
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError

# Ends every name of a path, so that a path begins with another exactly if its text does.
_END = "\x1f"


class Column(Protocol):
    """`kind`: for messages. `operators`: the sets of keys that a condition may have, sorted. `wrong(key, value)`: None,
    or (place inside the value, what is wrong). `match(condition)`: bool N, never for a missing value."""

    kind: str
    operators: tuple[tuple[str, ...], ...]

    def wrong(self, key: str, value) -> tuple[str, str] | None: ...

    def match(self, condition: dict) -> np.ndarray: ...


def column_of(name: str, values: pa.ChunkedArray, *, products: bool = False) -> Column:
    """The column for an Arrow column's type; `products` marks the product ids. Raises InputError for other types."""
    dtype = values.type
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
        values = values.cast(dtype)
    if _is_text(dtype):
        return _Products(values) if products else _Text(values)
    if products:
        raise InputError(f'column "{name}" holds the product ids and must be strings, found {values.type}')
    if pa.types.is_boolean(dtype):
        return _Flags(values)
    if pa.types.is_decimal(dtype):
        return _Decimals(name, values)
    if pa.types.is_date(dtype):
        return _Dates(values)
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        return _Numbers(values)
    lists = pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)
    inner = dtype.value_type if lists else None
    if lists and _is_text(inner.value_type if pa.types.is_dictionary(inner) else inner):
        return PathColumn(name, values)
    raise InputError(
        f'column "{name}" is {values.type}; filters take strings, whole numbers, floats, decimals, dates, booleans, '
        "lists of strings, and dictionaries of these; leave the column out or cast it"
    )


def _is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)


def _not_all(value, good, what: str) -> tuple[str, str] | None:
    if not isinstance(value, list):
        return "", f"expects a list of {what}, found {value!r}"
    return next(((f"[{i}]", f"expects {what}, found {one!r}") for i, one in enumerate(value) if not good(one)), None)


def _is_string(value) -> bool:
    """Text that UTF-8 can hold: JSON may carry half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbered(values: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Distinct texts in order, and each row's place among them (int8, int16 or int32; −1 where missing)."""
    encoded = pa.chunked_array(values.cast(pa.large_string()).dictionary_encode()).unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = pa.concat_arrays(encoded.chunks) if encoded.num_chunks else pa.array([], encoded.type)
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    dtype = next(one for one in (np.int8, np.int16, np.int32) if len(order) <= np.iinfo(one).max)
    place = np.full(len(order) + 1, -1, dtype)
    place[order] = np.arange(len(order))
    index_N = encoded.indices.fill_null(len(order)).to_numpy(zero_copy_only=False)
    return encoded.dictionary.take(pa.array(order)).to_pylist(), place[index_N]


class _Text:
    kind, operators = "strings", (("in",),)

    def __init__(self, values: pa.ChunkedArray):
        self.names, self.place_N = _numbered(values)

    def wrong(self, key, value):
        return _not_all(value, _is_string, "strings")

    def match(self, condition):
        places = []
        for name in set(condition["in"]):
            place = bisect_left(self.names, name)
            if place < len(self.names) and self.names[place] == name:
                places.append(place)
        if len(places) == 1:
            return self.place_N == places[0]
        # One entry more, for the rows without a value: index −1.
        chosen = np.zeros(len(self.names) + 1, bool)
        chosen[places] = True
        return chosen[self.place_N]


class PathColumn:
    """Lists of strings, each distinct one once: as paths ("under") and as sets ("has")."""

    kind, operators = "lists of strings", (("under",), ("has",))

    def __init__(self, name: str, values: pa.ChunkedArray):
        values = values.cast(pa.large_list(pa.large_string()))
        holds_end = pc.match_substring(pc.list_flatten(values), _END)
        if pc.any(holds_end).as_py():
            raise InputError(f'column "{name}" has a path with the control character U+001F in it; remove it')
        end, nothing = pa.scalar(_END, pa.large_string()), pa.scalar("", pa.large_string())
        ended = pc.binary_join_element_wise(pc.binary_join(values, end), nothing, end)
        self.paths, self.place_N = _numbered(pc.if_else(pc.equal(pc.list_value_length(values), 0), nothing, ended))

    @cached_property
    def _names(self) -> tuple[pa.Array, np.ndarray]:
        """Every name of every distinct list, and which list it is of."""
        lists = pc.split_pattern(pa.array(self.paths, pa.large_string()), _END)
        return pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()

    def wrong(self, key, value):
        wrong = _not_all(value, _is_string, "names from the root" if key == "under" else "names")
        return wrong or (None if value or key == "has" else ("", "expects at least one name, found []"))

    def counted(self, rows: np.ndarray) -> dict[tuple[str, ...], int]:
        """How many of `rows` have each list; missing lists and empty ones are left out."""
        place, number = np.unique(self.place_N[rows], return_counts=True)
        named = [(self.paths[at], rows_of) for at, rows_of in zip(place.tolist(), number.tolist()) if at >= 0]
        return {tuple(path.split(_END)[:-1]): rows_of for path, rows_of in named if path}

    def match(self, condition):
        return self._holding(condition["has"]) if "has" in condition else self._under(condition["under"])

    def _holding(self, names: list[str]) -> np.ndarray:
        # A list's text ends in a mark, so that splitting it gives one name too many, the empty one.
        flat, list_of = self._names
        last = np.append(list_of[1:] != list_of[:-1], True) if len(list_of) else np.empty(0, bool)
        named = pc.is_in(flat, pa.array(names, flat.type)).to_numpy(zero_copy_only=False) & ~last
        chosen = np.zeros(len(self.paths) + 1, bool)
        chosen[list_of[named]] = True
        return chosen[self.place_N]

    def _under(self, names: list[str]) -> np.ndarray:
        prefix = "".join(name + _END for name in names)
        if prefix.count(_END) > len(names):
            return np.zeros(len(self.place_N), bool)
        first = bisect_left(self.paths, prefix)
        end = bisect_right(self.paths, prefix, key=lambda path: path[: len(prefix)])
        return (self.place_N >= first) & (self.place_N < end)


class _Ordered:
    """Columns that are asked by "from" and "to": numbers `values_N` in the order of the column, `valid_N` where some are
    missing. `_bound`: a JSON value as such a number, rounded inwards where it lies between two."""

    operators = (("from",), ("to",), ("from", "to"))
    values_N: np.ndarray
    valid_N: np.ndarray | None

    def wrong(self, key, value):
        if _is_whole(value) or (isinstance(value, float) and math.isfinite(value)):
            return None
        return "", f"expects a number, found {value!r}"

    def match(self, condition):
        matched_N = np.ones(len(self.values_N), bool) if self.valid_N is None else self.valid_N.copy()
        if "from" in condition:
            matched_N &= self.values_N >= self._bound(condition["from"], math.ceil)
        if "to" in condition:
            matched_N &= self.values_N <= self._bound(condition["to"], math.floor)
        return matched_N


class _Numbers(_Ordered):
    def __init__(self, values: pa.ChunkedArray):
        self.whole = pa.types.is_integer(values.type)
        self.kind = "whole numbers" if self.whole else "numbers"
        if self.whole:
            self.operators = (*self.operators, ("in",))
        self.valid_N = values.is_valid().to_numpy() if values.null_count else None
        self.values_N = (values.fill_null(0) if values.null_count else values).to_numpy()

    def wrong(self, key, value):
        return _not_all(value, _is_whole, "whole numbers") if key == "in" else super().wrong(key, value)

    def match(self, condition):
        if "in" not in condition:
            return super().match(condition)
        limits = np.iinfo(self.values_N.dtype)
        asked = [value for value in set(condition["in"]) if limits.min <= value <= limits.max]
        matched_N = np.isin(self.values_N, np.array(asked, self.values_N.dtype))
        return matched_N if self.valid_N is None else matched_N & self.valid_N

    def _bound(self, value, rounded):
        """Whole numbers stay exact beyond 2^53; for floats a bound is rounded to the column's type."""
        if self.whole:
            return rounded(value)
        try:
            with np.errstate(over="ignore"):
                return self.values_N.dtype.type(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf


class _Decimals(_Ordered):
    """Exact: kept as whole numbers of the last digit, asked by the digits of the JSON number."""

    kind = "decimals"

    def __init__(self, name: str, values: pa.ChunkedArray):
        if values.type.precision > 18:
            raise InputError(f'column "{name}" is {values.type}; filters take decimals of at most 18 digits; cast it')
        self.scale = values.type.scale
        wide = values.cast(pa.decimal128(values.type.precision, values.type.scale))
        self.valid_N = wide.is_valid().to_numpy()
        # Little-endian pairs of 64 bits; the upper half only repeats the sign.
        self.values_N = np.concatenate([np.empty(0, np.int64), *map(_low_halves, wide.chunks)])

    def _bound(self, value, rounded) -> int:
        # What JSON says, 19.99, not the float next to it.
        exact = Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
        return rounded(exact * Fraction(10) ** self.scale)


def _low_halves(values: pa.Array) -> np.ndarray:
    halves = np.frombuffer(values.buffers()[1] or b"", np.int64)
    return halves[2 * values.offset : 2 * (values.offset + len(values)) : 2]


class _Dates(_Ordered):
    kind = "dates"

    def __init__(self, values: pa.ChunkedArray):
        days = values.cast(pa.date32()).cast(pa.int32())
        self.valid_N = days.is_valid().to_numpy()
        self.values_N = days.fill_null(0).to_numpy()

    def wrong(self, key, value):
        return None if _day(value) is not None else ("", f'expects a date as "2024-01-31", found {value!r}')

    def _bound(self, value, rounded) -> int:
        return _day(value)


def _day(value) -> int | None:
    """Days since 1970, None for what is no date YYYY-MM-DD."""
    try:
        day = date.fromisoformat(value) if isinstance(value, str) and len(value) == 10 else None
    except ValueError:
        return None
    return None if day is None else (day - date(1970, 1, 1)).days


class _Flags:
    kind, operators = "booleans", (("is",),)

    def __init__(self, values: pa.ChunkedArray):
        self.true_N = values.fill_null(False).to_numpy()
        self.false_N = ~values.fill_null(True).to_numpy() if values.null_count else None

    def wrong(self, key, value):
        return None if isinstance(value, bool) else ("", f"expects true or false, found {value!r}")

    def match(self, condition):
        if condition["is"]:
            return self.true_N
        return ~self.true_N if self.false_N is None else self.false_N


class _Products(_Text):
    """Product ids, nearly all distinct: searched anew per filter, as an index would be larger than the ids."""

    kind = "product ids"

    def __init__(self, values: pa.ChunkedArray):
        self.values = values

    def match(self, condition):
        return pc.is_in(self.values, pa.array(condition["in"], self.values.type)).to_numpy()


def arrow_values(values: Sequence, dtype: pa.DataType) -> pa.Array:
    """Values as JSON or Python gives them (None: missing) as an Arrow array of a column's type.

    Stricter than Arrow, which makes 1 of 1.5, a number of true and two names of "ab"; more patient with what JSON lacks:
    dates may be text YYYY-MM-DD, decimals floats. Raises ValueError, TypeError or OverflowError saying which value.
    """
    convert = _converter(dtype)
    array = pa.array([None if value is None else convert(value) for value in values], dtype)
    if pa.types.is_floating(dtype) and pc.all(pc.is_finite(array)).as_py() not in (True, None):
        raise ValueError("numbers must be finite and in the range of the type")
    return array


def _converter(dtype: pa.DataType):
    def refused(value):
        raise ValueError(f"found {value!r}")

    def number(value):
        value = value.item() if isinstance(value, np.generic) else value
        return value if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) else refused(value)

    if _is_text(dtype):
        return lambda value: value if isinstance(value, str) else refused(value)
    if pa.types.is_boolean(dtype):
        return lambda value: bool(value) if isinstance(value, (bool, np.bool_)) else refused(value)
    if pa.types.is_integer(dtype):
        return lambda value: int(value) if number(value) == int(value) else refused(value)
    if pa.types.is_floating(dtype):
        return lambda value: float(number(value))
    if pa.types.is_decimal(dtype):
        return lambda value: Decimal(repr(number(value))) if isinstance(value, float) else Decimal(number(value))
    if pa.types.is_date(dtype):
        return lambda value: value if isinstance(value, date) else date.fromisoformat(value)
    return lambda value: list(value) if isinstance(value, (list, tuple, np.ndarray)) else refused(value)


@dataclass(frozen=True, eq=False)
class Later:
    """Values that some rows of a column got later: `row_X` (ascending, each once), `values` (Arrow)."""

    row_X: np.ndarray
    values: pa.Array

    @classmethod
    def of(cls, row_M: np.ndarray, values: pa.Array) -> "Later":
        """Rows in any order; of a row that is given twice the last value counts."""
        row_X, last_X = np.unique(row_M[::-1], return_index=True)
        return cls(row_X, values.take(pa.array(len(row_M) - 1 - last_X)))

    def value(self, row: int, before):
        """What the row got, `before` where it got nothing."""
        at = int(np.searchsorted(self.row_X, row))
        return self.values[at].as_py() if at < len(self.row_X) and self.row_X[at] == row else before

    def below(self, end: int) -> "Later":
        """Of the rows below `end` alone."""
        count = int(np.searchsorted(self.row_X, end))
        return Later(self.row_X[:count], self.values.slice(0, count))


def laid_over(blocks: Sequence[Later], later: Later) -> tuple[Later, ...]:
    """`blocks`, oldest first, and `later` on top. Blocks merge when the last outgrow half of the one before, so a row is
    copied O(log X) times in all."""
    kept = len(blocks)
    while kept and len(blocks[kept - 1].row_X) < 2 * (sum(len(one.row_X) for one in blocks[kept:]) + len(later.row_X)):
        kept -= 1
    return (*blocks[:kept], merged((*blocks[kept:], later)))


def merged(blocks: Sequence[Later]) -> Later:
    """One block of all; at least one is given."""
    if len(blocks) == 1:
        return blocks[0]
    return Later.of(np.concatenate([one.row_X for one in blocks]), pa.concat_arrays([one.values for one in blocks]))


def with_later(values: pa.Array | pa.ChunkedArray, blocks: Sequence[Later]) -> pa.Array:
    """A column's values with those that came later."""
    chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
    if not blocks:
        return pa.concat_arrays(chunks) if chunks else pa.array([], values.type)
    at_N, later = np.arange(len(values)), merged(blocks)
    at_N[later.row_X] = len(values) + np.arange(len(later.row_X))
    return pa.concat_arrays([*chunks, later.values]).take(pa.array(at_N))


class Overlaid:
    """A column some of whose rows have got other values since. Immutable."""

    def __init__(self, name: str, base: Column, blocks: tuple[Later, ...] = (), made: dict | None = None):
        self.name, self.base, self.blocks = name, base, blocks
        self.kind, self.operators, self.wrong = base.kind, base.operators, base.wrong
        # The columns of blocks that were there before are kept.
        made = made or {}
        self._columns = {one: made.get(one) or column_of(name, pa.chunked_array([one.values])) for one in blocks}

    def with_later(self, later: Later) -> "Overlaid":
        """Raises InputError for values that the column cannot have."""
        return Overlaid(self.name, self.base, laid_over(self.blocks, later), self._columns)

    def match(self, condition) -> np.ndarray:
        matched_N = self.base.match(condition)
        # Columns may give what they keep.
        matched_N = np.array(matched_N)
        for later, column in self._columns.items():
            matched_N[later.row_X] = column.match(condition)
        return matched_N

    def counted(self, rows: np.ndarray) -> dict[tuple[str, ...], int]:
        """As `PathColumn.counted`."""
        counted, left = Counter(), rows
        for later, column in reversed(self._columns.items()):
            at = np.minimum(np.searchsorted(later.row_X, left), len(later.row_X) - 1)
            mine = later.row_X[at] == left
            counted.update(column.counted(at[mine]))
            left = left[~mine]
        counted.update(self.base.counted(left))
        return counted
