"""Ordinal suffixes: IDs that are unique by construction (TIGER's extra token, DSI's place in the leaf, naive digits).

Unusual: a suffix carries no meaning; only its order does, which may follow a priority (Hi-Gen's efficient items first).

Shape letters: N products, S tokens of the suffix.
"""

from typing import NamedTuple

import numpy as np

from catid2_ray.errors import InputError


class Suffix(NamedTuple):
    """`codes_NS` int64 to append to the prefix codes, `codes_per_level` to append to theirs."""

    codes_NS: np.ndarray
    codes_per_level: tuple[int, ...]


def ordinal_suffix(prefix_N, product_ids, *, priority_N=None, base: int | None = None) -> Suffix:
    """Number the products of each equal prefix 0, 1, 2, … in the order of (−priority, product_id).

    `prefix_N`: integers, such as packed prefix codes. `product_ids`: N different strings. `priority_N`: a float per
    product, larger first, NaN last, in any unit; None = all equal. `base` None: one token with as many codes as the
    largest group has products (1 when all prefixes differ). `base` b: as many digits 0 … b − 1, most significant
    first, as the largest group needs, at least one. The same products get the same suffix in any order of rows; a
    later product can renumber its group, so suffixes belong to one assignment.

    Raises InputError for repeated product_ids, tables of different lengths, prefixes that are no integers and
    base < 2. Source: TIGER (2305.05065) and DSI (2202.06991), METHODS 5.3 and 6.3; priority, Hi-Gen (2404.15675), 6.5.
    """
    if base is not None and base < 2:
        raise InputError(f"base must be 2 or more digits, or None for one token, found {base}")
    prefix_N, product_ids = np.asarray(prefix_N), np.asarray(product_ids, dtype=str)
    count = len(product_ids)
    priority_N = np.zeros(count) if priority_N is None else np.asarray(priority_N, dtype=np.float64)
    if prefix_N.shape != (count,) or priority_N.shape != (count,):
        raise InputError(
            f"{count} product_ids need as many prefixes and priorities, found {prefix_N.shape} and {priority_N.shape}"
        )
    if count and prefix_N.dtype.kind not in "iu":
        raise InputError(f"prefixes must be integers, found {prefix_N.dtype}: pack the prefix codes first")
    order_N = np.argsort(product_ids, kind="stable")
    repeated = np.flatnonzero(product_ids[order_N][1:] == product_ids[order_N][:-1])
    if len(repeated):
        raise InputError(
            f"product_id {str(product_ids[order_N[repeated[0]]])!r} occurs more than once "
            f"({len(repeated)} repeats in all): give each product one row"
        )
    missing_N = np.isnan(priority_N)
    keys = (np.where(missing_N, 0.0, -priority_N)[order_N], missing_N[order_N], prefix_N[order_N])
    order_N = order_N[np.lexsort(keys)]  # stable: product_id decides between equal priorities
    sorted_N = prefix_N[order_N]
    start_N = np.searchsorted(sorted_N, sorted_N)
    ordinal_N = np.empty(count, dtype=np.int64)
    ordinal_N[order_N] = np.arange(count) - start_N
    largest = int(ordinal_N.max(initial=0)) + 1
    if base is None:
        return Suffix(ordinal_N[:, None], (largest,))
    digits = 1
    while base**digits < largest:
        digits += 1
    weight_S = base ** np.arange(digits - 1, -1, -1, dtype=np.int64)
    return Suffix(ordinal_N[:, None] // weight_S % base, (base,) * digits)
