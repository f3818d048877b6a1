"""Rows of a trie, or of a live view, as expansion reads them: their IDs, and the filter of each query.

M rows, L levels.
"""

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.live import LiveView
from catid2_ray.retrieval.live_filters import LiveFilter
from catid2_ray.retrieval.trie import Trie


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


def filters_of(allowed, trie: Trie | LiveView, queries: int) -> list:
    """A filter, or None, for each query."""
    if isinstance(allowed, (list, tuple)) and any(
        one is None or isinstance(one, (Filter, LiveFilter)) for one in allowed
    ):
        if len(allowed) != queries:
            raise InputError(f"{len(allowed)} filters for {queries} queries; give one, or None, for each")
        return [None if one is None else filters_of(one, trie, 1)[0] for one in allowed]
    if allowed is None or (isinstance(trie, LiveView) and isinstance(allowed, LiveFilter)):
        return [allowed] * queries
    if isinstance(trie, LiveView):
        raise InputError(
            f"a live view takes a LiveFilter, found {type(allowed).__name__}; compile it with LiveTrie.compile"
        )
    if not isinstance(allowed, Filter):
        allowed = np.asarray(allowed)
        if allowed.dtype != bool or allowed.shape != (trie.rows,):
            raise InputError(
                f"allowed must be a filter or {trie.rows} booleans, one per trie row, found {allowed.dtype} of "
                f"{allowed.shape}"
            )
        allowed = Filter.of(allowed)
    if len(allowed) != trie.rows:
        raise InputError(
            f"the filter is over {len(allowed)} rows, the trie has {trie.rows}; take both from one release"
        )
    return [allowed] * queries
