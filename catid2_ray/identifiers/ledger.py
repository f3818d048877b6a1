"""The ledger: what became of every product's ID, release after release.

Unusual: a product that leaves stays as a tombstone for good, with the ID it had and the release in which that ID is free
again. The latter is settled when it leaves, for an ID given to another product must not be claimed by a tombstone because
the quarantine was raised since. Every row follows from the same product's rows alone, so that tables cut by a hash of
product_id can be advanced apart; only the check for IDs held twice then sees one cut at a time.

N products of a release, M rows of a ledger or of a list of IDs, L levels.
"""

import operator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError

STATUSES = ("kept", "new", "moved", "retired")
KEPT, NEW, MOVED, RETIRED = range(4)


class Held(NamedTuple):
    """`held_N` bool: the product has an ID already; `codes_NL` int32 and `cost_N` float32: its ID, else −1 and 0."""

    held_N: np.ndarray
    codes_NL: np.ndarray
    cost_N: np.ndarray


class _Rows(NamedTuple):
    """A ledger's columns as arrays, sorted by product_id."""

    ids: pa.Array
    codes_ML: np.ndarray
    status_M: np.ndarray
    since_M: np.ndarray
    until_M: np.ndarray
    cost_M: np.ndarray

    @property
    def live_M(self):
        return self.status_M != RETIRED


def schema(levels: int) -> pa.Schema:
    """`since`: number of the release since which the product has this ID; of a tombstone, since which it is gone.
    `until`: of a tombstone, number of the first release in which its ID is free again: the ID is reserved in releases with
    a number < until; 0 of a live product. `cost`: squared distance that de-duplication added, in the latent's unit. No
    column holds nulls."""
    return pa.schema(
        [
            ("product_id", pa.string()),
            ("codes", pa.list_(pa.int32(), levels)),
            ("status", pa.dictionary(pa.int8(), pa.string())),
            ("since", pa.int32()),
            ("until", pa.int32()),
            ("cost", pa.float32()),
        ]
    )


def first(product_ids, codes_NL, cost_N, *, number: int, shared: bool = False) -> pa.Table:
    """The ledger of a first release: every product is new since `number`. Arguments and errors as for `advance`."""
    ids, codes_NL, cost_N = _release(product_ids, codes_NL, cost_N, shared)
    number_N = np.full(len(ids), _natural("number", number), np.int32)
    return _table(ids, codes_NL, np.full(len(ids), NEW, np.int8), number_N, np.zeros(len(ids), np.int32), cost_N)


def advance(previous, product_ids, codes_NL, cost_N, *, number: int, quarantine: int, shared: bool = False) -> pa.Table:
    """The ledger of release `number`, whose products are all in `product_ids`.

    `previous`: the ledger of the release before. `product_ids`: N different strings in any order; `codes_NL`: integers
    of at least 0; `cost_N`: floats. `quarantine`: releases, `number` the first of them, in which nobody else gets the ID of
    a product that leaves in this one; for nothing else. `shared`: products may share IDs (clusters). A product is

    - kept, `since` unchanged, with the codes it had; moved, since `number`, with other codes;
    - new, since `number`, when `previous` does not have it, or has a tombstone with other codes;
    - kept, since `number`, when it returns to the ID of its own tombstone, before or after that ID was free again;
    - retired, since `number` and until `number` + `quarantine` (2^31 − 1 at most), when it was live and is not among
      `product_ids`; old tombstones stay as they are.

    Raises InputError for repeated product_ids, tables of different lengths, another number of levels than in
    `previous`, a number that is not larger than every `since` in it, a negative quarantine, an ID that two live
    products hold (unless `shared`), costs that are not finite, and a previous ledger that is damaged.
    """
    old = _opened(previous)
    ids, codes_NL, cost_N = _release(product_ids, codes_NL, cost_N, shared)
    levels = old.codes_ML.shape[1]
    if codes_NL.shape[1] != levels:
        raise InputError(
            f"the release has IDs of {codes_NL.shape[1]} levels, the previous ledger of {levels}: they come from "
            f"different quantizers; start a new ledger"
        )
    _follows(old, number)
    row_N = pc.index_in(ids, value_set=old.ids).fill_null(-1).to_numpy(zero_copy_only=False)
    known_N, known_P = row_N >= 0, row_N[row_N >= 0]
    same_N = np.zeros(len(ids), bool)
    same_N[known_N] = (codes_NL[known_N] == old.codes_ML[known_P]).all(axis=1)
    live_N = np.zeros(len(ids), bool)
    live_N[known_N] = old.live_M[known_P]
    status_N = np.where(same_N, KEPT, np.where(live_N, MOVED, NEW)).astype(np.int8)
    since_N = np.full(len(ids), number, np.int32)
    stays_N = same_N & live_N
    since_N[stays_N] = old.since_M[row_N[stays_N]]

    gone_M = np.ones(len(old.ids), bool)
    gone_M[known_P] = False
    free = min(operator.index(number) + _natural("quarantine", quarantine), 2**31 - 1)
    since_M = np.where(old.live_M, np.int32(number), old.since_M)[gone_M]
    until_M = np.where(old.live_M, np.int32(free), old.until_M)[gone_M]
    return _table(
        pa.concat_arrays([ids, old.ids.filter(pa.array(gone_M))]),
        np.concatenate([codes_NL, old.codes_ML[gone_M]]),
        np.concatenate([status_N, np.full(len(since_M), RETIRED, np.int8)]),
        np.concatenate([since_N, since_M]),
        np.concatenate([np.zeros(len(ids), np.int32), until_M]),
        np.concatenate([cost_N, old.cost_M[gone_M]]),
    )


def occupied(ledger, *, number: int, shared: bool = False) -> np.ndarray:
    """int32 M×L, sorted, no duplicates: the IDs that release `number` must not give to a product without one.

    These are the IDs of live products and of tombstones with number < until. For an append, where products that stay keep
    their IDs.

    A product that is live in `ledger` and leaves in release `number` still occupies its ID in that release, whatever
    the quarantine: it goes to nobody else before release number + 1. So quarantine 0 and 1 are the same here; in
    `withheld` they are not. Raises InputError for a number that does not follow, an ID that two live products hold (unless
    `shared`), and a damaged ledger.
    """
    rows = _live_once(_opened(ledger), shared)
    return _different(rows.codes_ML[_reserved(rows, number)])


def withheld(ledger, product_ids, *, number: int, quarantine: int) -> np.ndarray:
    """int32 M×L, sorted, no duplicates: the IDs that release `number` must not give to anyone when it gives every
    product of `product_ids` an ID anew (a full re-ID).

    These are the IDs of products that are not in `product_ids`: of tombstones with number < until, whatever the quarantine
    is now, and, unless it is 0, of products live in `ledger`, which leave in release `number`. A product that
    stays or returns withholds nothing: its old ID may go to any product at once, unless the tombstone of another
    withholds it.

    Holds by product, so the IDs of a whole catalogue are those of its parts by a hash of product_id together. Raises
    InputError for repeated product_ids, a negative quarantine, and as `occupied` does: IDs that products share (clusters)
    are not for it.
    """
    rows, ids = _live_once(_opened(ledger)), id_column(product_ids)
    refuse_repeats(ids.take(pc.sort_indices(ids)), "the release")
    gone_M = ~pc.is_in(rows.ids, value_set=ids).to_numpy(zero_copy_only=False)
    if not _natural("quarantine", quarantine):
        gone_M &= ~rows.live_M
    return _different(rows.codes_ML[gone_M & _reserved(rows, number)])


def held(ledger, product_ids, *, number: int) -> Held:
    """Which of `product_ids` have an ID that is theirs in release `number`: live ones, and those that return while
    their tombstone still reserves it (number < until). All others need an ID outside `occupied`.

    Raises InputError for repeated product_ids and as `occupied` does, but for shared IDs.
    """
    rows, ids = _opened(ledger), id_column(product_ids)
    refuse_repeats(ids.take(pc.sort_indices(ids)), "the release")
    row_N = pc.index_in(ids, value_set=rows.ids).fill_null(-1).to_numpy(zero_copy_only=False)
    held_N = row_N >= 0
    held_N[held_N] = _reserved(rows, number)[row_N[held_N]]
    codes_NL = np.full((len(ids), rows.codes_ML.shape[1]), -1, np.int32)
    cost_N = np.zeros(len(ids), np.float32)
    codes_NL[held_N], cost_N[held_N] = rows.codes_ML[row_N[held_N]], rows.cost_M[row_N[held_N]]
    return Held(held_N, codes_NL, cost_N)


def counts(ledger) -> dict:
    """Products by status, and `live`, all but the retired ones; plain integers."""
    number_S = np.bincount(_opened(ledger).status_M, minlength=len(STATUSES)).tolist()
    return dict(zip(STATUSES, number_S, strict=True)) | {"live": sum(number_S[:RETIRED])}


def _reserved(rows, number):
    """bool M: the ID is a live product's, or of a tombstone that reserves it in release `number`."""
    _follows(rows, number)
    return rows.live_M | (operator.index(number) < rows.until_M)


def _natural(name, value):
    value = operator.index(value)
    if not 0 <= value < 2**31:
        raise InputError(f"{name} must be a whole number from 0 to 2^31 − 1, found {value}")
    return value


def _follows(rows, number):
    latest = int(rows.since_M.max(initial=-1))
    if _natural("number", number) <= latest:
        raise InputError(
            f"release number {number} does not follow: the previous ledger already knows release {latest}; hand over "
            f"a larger number, or the ledger of the release before {number}"
        )


def _release(product_ids, codes_NL, cost_N, shared):
    """The columns of one release in product_id order."""
    ids, codes_NL, cost_N = id_column(product_ids), np.asarray(codes_NL), np.asarray(cost_N, dtype=np.float64)
    if codes_NL.ndim != 2 or not codes_NL.shape[1] or codes_NL.dtype.kind not in "iu":
        raise InputError(f"codes must be an integer array N×L, found {codes_NL.dtype} of shape {codes_NL.shape}")
    if len(codes_NL) != len(ids) or cost_N.shape != (len(ids),):
        raise InputError(
            f"{len(ids)} product_ids need as many codes and costs, found shapes {codes_NL.shape} and {cost_N.shape}"
        )
    order_N = pc.sort_indices(ids).to_numpy()
    ids, codes_NL, cost_N = ids.take(pa.array(order_N)), codes_NL[order_N], cost_N[order_N]
    refuse_repeats(ids, "the release")
    wrong = np.argwhere((codes_NL < 0) | (codes_NL >= 2**31))
    if len(wrong):
        row, level = wrong[0]
        raise InputError(
            f"product_id {ids[row].as_py()!r}: code {codes_NL[row, level]} at level {level} is outside 0…2^31 − 1"
        )
    wrong = np.flatnonzero(~np.isfinite(cost_N))
    if len(wrong):
        raise InputError(
            f"product_id {ids[wrong[0]].as_py()!r}: cost {cost_N[wrong[0]]} is not finite, one of {len(wrong)}; "
            f"an ID that cost nothing has cost 0"
        )
    codes_NL = codes_NL.astype(np.int32)
    if not shared:
        _refuse_shared(ids, codes_NL)
    return ids, codes_NL, cost_N.astype(np.float32)


def _opened(ledger) -> _Rows:
    """The columns of a ledger, or InputError that says in what it is damaged."""
    try:
        columns = {name: _one_chunk(ledger[name]) for name in schema(1).names}
        levels = columns["codes"].type.list_size
        ids, status = columns["product_id"].cast(pa.string()), columns["status"].cast(pa.string())
        codes_ML = columns["codes"].cast(pa.list_(pa.int32(), levels)).flatten().to_numpy(zero_copy_only=False)
        since, until = columns["since"].cast(pa.int32()), columns["until"].cast(pa.int32())
        cost = columns["cost"].cast(pa.float32())
    except (KeyError, AttributeError, TypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"the ledger does not have the columns {', '.join(schema(1).names)}: {error}") from None
    status = pc.index_in(status, value_set=pa.array(STATUSES))
    empty = [name for name, column in columns.items() if column.null_count]
    if empty or codes_ML.dtype != np.int32:  # a null among the codes of an ID turns them into floats
        raise InputError(
            f"the ledger is damaged: nulls in {', '.join(empty or ['codes'])}; restore it from its release"
        )
    if status.null_count:
        raise InputError(
            f"the ledger is damaged: a status is none of {', '.join(STATUSES)}; restore it from its release"
        )
    if len(ids) > 1 and not pc.all(pc.less(ids[:-1], ids[1:])).as_py():
        raise InputError(
            "the ledger is damaged: its product_ids are not in ascending order, each once; restore it from its release"
        )
    rows = _Rows(
        ids,
        codes_ML.reshape(len(ids), levels),
        status.to_numpy().astype(np.int8),
        since.to_numpy(),
        until.to_numpy(),
        cost.to_numpy(),
    )
    wrong = np.flatnonzero(np.where(rows.live_M, rows.until_M != 0, rows.until_M < rows.since_M))
    if len(wrong):
        row = wrong[0]
        raise InputError(
            f"the ledger is damaged: product_id {ids[row].as_py()!r} is {STATUSES[rows.status_M[row]]} since release "
            f"{rows.since_M[row]} and has until {rows.until_M[row]}, one of {len(wrong)}: live products have 0, tombstones "
            f"no less than since; restore it from its release"
        )
    return rows


def _table(ids, codes_ML, status_M, since_M, until_M, cost_M):
    levels = codes_ML.shape[1]
    columns = [
        ids,
        pa.FixedSizeListArray.from_arrays(pa.array(codes_ML.ravel()), levels),
        pa.DictionaryArray.from_arrays(pa.array(status_M), pa.array(STATUSES)),
        pa.array(since_M),
        pa.array(until_M),
        pa.array(cost_M),
    ]
    order = pc.sort_indices(ids)
    return pa.table([column.take(order) for column in columns], schema=schema(levels))


def _one_chunk(column):
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def id_column(product_ids) -> pa.Array:
    """product_ids of any kind (list, numpy, Arrow) as one Arrow column; InputError for nulls."""
    column = product_ids if isinstance(product_ids, (pa.Array, pa.ChunkedArray)) else pa.array(product_ids, pa.string())
    column = _one_chunk(column).cast(pa.string())
    if column.null_count:
        raise InputError(f"{column.null_count} of {len(column)} product_ids are null; name every product")
    return column


def refuse_repeats(sorted_ids: pa.Array | np.ndarray, where: str) -> None:
    """InputError for the first product_id of a sorted column that occurs twice."""
    one, other = sorted_ids[:-1], sorted_ids[1:]
    same = one == other if isinstance(one, np.ndarray) else pc.equal(one, other).to_numpy(zero_copy_only=False)
    repeated = np.flatnonzero(same)
    if len(repeated):
        raise InputError(
            f"product_id {str(sorted_ids[int(repeated[0])])!r} occurs more than once in {where} ({len(repeated)} repeats in "
            "all): give each product one row"
        )


def refuse_infinite(residual_NZ: np.ndarray, product_ids: pa.Array | np.ndarray) -> None:
    """InputError for the first product whose residual is not finite."""
    wrong = np.flatnonzero(~np.isfinite(residual_NZ).all(axis=1))
    if len(wrong):
        raise InputError(
            f"the residual of product_id {str(product_ids[int(wrong[0])])!r} (row {wrong[0]}) is not finite, "
            f"one of {len(wrong)}; encode the catalogue again"
        )


def _id_order(codes_ML):
    """The order of the IDs (stable), and bool M where in that order an ID occurs for the first time."""
    order_M = np.lexsort(codes_ML.T[::-1])
    sorted_ML = codes_ML[order_M]
    first_M = np.ones(len(order_M), bool)
    first_M[1:] = (sorted_ML[1:] != sorted_ML[:-1]).any(axis=1)
    return order_M, first_M


def _different(codes_ML):
    """The IDs in ascending order, each once."""
    order_M, first_M = _id_order(codes_ML)
    return codes_ML[order_M[first_M]]


def _live_once(rows, shared=False):
    """`rows`, or InputError for an ID that two live products hold (unless `shared`)."""
    if not shared:
        _refuse_shared(rows.ids.filter(pa.array(rows.live_M)), rows.codes_ML[rows.live_M])
    return rows


def _refuse_shared(ids, codes_ML):
    order_M, first_M = _id_order(codes_ML)
    again = np.flatnonzero(~first_M)
    if len(again):
        one, other = order_M[again[0] - 1], order_M[again[0]]
        raise InputError(
            f"product_ids {ids[one].as_py()!r} and {ids[other].as_py()!r} both hold the ID {codes_ML[one].tolist()} "
            f"({len(again)} such repeats in all): make the IDs unique first, or say that they are shared"
        )
