"""What lives below a prefix of an ID: how many products, which codes come next, which categories, and some products.

For people who look at IDs, not for the search. M rows below the prefix: a call reads the codes of all M.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from catid2_ray.retrieval.lexical import words
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import LiveView, codes_of

_MOST = 10  # next codes, categories and products that are named


class Below(NamedTuple):
    """`products`: M. `next_codes`: (code, products) of the next level, most products first, none below a whole ID. `categories`:
    (path, products), where the release keeps the column category_path. `rows`: of some products, the first in ID order."""

    products: int
    next_codes: list[tuple[int, int]]
    categories: list[tuple[list[str], int]]
    rows: list[int]


def below(live: LiveTrie, view: LiveView, prefix: tuple[int, ...]) -> Below:
    """Live products of `view`, which is one of `live`, whose ID begins with `prefix`. Raises InputError for no prefix of an ID."""
    rows = _rows(view, prefix)
    next_codes: list[tuple[int, int]] = []
    if len(prefix) < view.levels:
        code_n, number_n = np.unique(codes_of(view, rows)[:, len(prefix)], return_counts=True)
        first_n = np.argsort(-number_n, kind="stable")[:_MOST]
        next_codes = list(zip(code_n[first_n].tolist(), number_n[first_n].tolist()))
    categories = [] if view.filters is None else view.filters.most_common("category_path", rows, _MOST)
    return Below(len(rows), next_codes, categories, rows[:_MOST].tolist())


def top_words(view: LiveView, prefix: tuple[int, ...], *, sample: int = 2000) -> list[tuple[str, int]]:
    """The commonest words in titles of live products below the prefix, and how many titles have each, most first, equal ones by
    word. Where more than `sample` products lie there, as many of them, evenly spaced, are read."""
    rows, counted = _rows(view, prefix), Counter()
    rows = rows[np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(np.int64)]
    for row in rows.tolist() if view.products is not None else ():
        counted.update(set(words(view.products.title(row) or "")))
    return sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST]


def category_of(view: LiveView, row: int) -> list[str] | None:
    """The path of a row, root first; None where it has none, and where category_path is no filter column of the release."""
    found = [] if view.filters is None else view.filters.most_common("category_path", np.array([row]), 1)
    return found[0][0] if found else None


def _rows(view: LiveView, prefix: tuple[int, ...]) -> np.ndarray:
    """int64 M: those of the base, then those inserted since, both in ID order."""
    rows = np.arange(*view.base.item_range(prefix))
    if view.inserted is not None:
        space = view.inserted.space
        low = int(np.dot(prefix, space.radix_L[: len(prefix)]))
        width = int(space.radix_L[len(prefix) - 1]) if prefix else space.capacity
        start, end = np.searchsorted(view.inserted.packed_D, [low, low + width])
        rows = np.append(rows, view.base.rows + view.inserted.order_D[start:end])
    return rows[view.is_live(rows)]
