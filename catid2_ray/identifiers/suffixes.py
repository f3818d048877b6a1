"""One token more: what tells apart, or groups, the products that share their codes.

`ordinal_suffix` makes IDs unique by construction (TIGER's extra token, DSI's place in the leaf, naive digits); the suffix carries
no meaning, only its order does, which may follow a priority (Hi-Gen's efficient items first). `split_clusters` lets products
share an ID, but never more than T_max of them. Unusual: CQ-SID caps the groups at 100, so that its T_max breaks above 5,000
products; here the bound always holds, with the fewest groups, of sizes that differ by one at most. What a product gets
depends on those of its own codes alone, so partitions of whole clusters can be treated apart from each other.

N products, S tokens of the suffix, Z latent width; R rows of one block of clusters, B parts of it.
"""

import operator
from typing import NamedTuple

import numpy as np

from catid2_ray.errors import InputError
from catid2_ray.hashing import splitmix
from catid2_ray.identifiers.ledger import refuse_infinite, refuse_repeats

METHODS = ("kmeans", "value", "random")
BLOCK_NUMBERS = 2**22  # float64 numbers of one block of residuals, 32 MiB; a single larger cluster is a block
POWER_STEPS = 8  # towards the first principal direction of a part, where its 2-means starts
LLOYD_STEPS = 12  # at most; a part that has settled stays as it is


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
    prefix_N, ids_N, order_N = _in_id_order(prefix_N, product_ids)
    count = len(ids_N)
    priority_N = np.zeros(count) if priority_N is None else np.asarray(priority_N, dtype=np.float64)
    if priority_N.shape != (count,):
        raise InputError(f"{count} product_ids need as many priorities, found {priority_N.shape}")
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


class Groups(NamedTuple):
    """`group_N` int64, 0 in clusters that were not split; `groups`, the largest number of groups of any cluster (the
    codes that one more token needs); `report`, counts by name."""

    group_N: np.ndarray
    groups: int
    report: dict


def split_clusters(
    prefix_N, residual_NZ, product_ids, *, t_max: int, method: str = "kmeans", value_N=None, seed: int = 0
) -> Groups:
    """Split every cluster of c > t_max products into ⌈c / t_max⌉ groups of at most t_max products.

    `prefix_N`: integers, equal where products share an ID, such as packed codes. `residual_NZ`: what the last level
    left over (or its input), in the latent's unit; only "kmeans" reads it, else it may be None. `product_ids`: N
    different strings. `t_max`: products of one ID, at least 1. `method`:

    - "kmeans": similar residuals together, by bisection; each cut is a balanced 2-means (Lloyd's steps with the two
      sizes fixed, from the first principal direction), ties by product_id, so equal residuals can be split too;
    - "value": by `value_N`, floats in any unit, largest first, NaN last, ties by product_id; group 0 sells best;
    - "random": by a hash of (`seed`, product_id), the paper's split.

    Pure function of the set of rows. Raises InputError for t_max < 1, an unknown method, tables of different lengths,
    prefixes that are no integers, repeated product_ids, residuals that are not finite, and "value" without values.

    Source: CQ-SID (arXiv 2605.14434), METHODS 2.5, without its limit of 100 groups.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    t_max = operator.index(t_max)
    if t_max < 1:
        raise InputError(f"t_max must be at least 1 product for each ID, found {t_max}")
    prefix_N, ids_N, order_N = _in_id_order(prefix_N, product_ids)
    order_N = order_N[np.argsort(prefix_N[order_N], kind="stable")]
    _, size_C = np.unique(prefix_N, return_counts=True)
    groups_C = -(-size_C // t_max)
    row_R = order_N[np.repeat(groups_C > 1, size_C)]
    size_B, groups_B = size_C[groups_C > 1], groups_C[groups_C > 1]
    group_N = np.zeros(len(ids_N), np.int64)
    if method == "kmeans":
        residual_NZ = _finite_residuals(residual_NZ, ids_N)
        group_N[row_R] = _by_residual(residual_NZ, row_R, size_B, groups_B)
    else:
        keys = _value_keys(value_N, ids_N, row_R) if method == "value" else (_hashes(ids_N[row_R], seed),)
        cluster_R = np.repeat(np.arange(len(size_B)), size_B)
        group_N[row_R[np.lexsort((*keys, cluster_R))]] = _even_parts(size_B, groups_B)
    report = {
        "clusters": len(size_C),
        "split": len(size_B),
        "products_in_split": len(row_R),
        "largest_before": int(size_C.max(initial=0)),
        "largest_after": int((-(-size_C // groups_C)).max(initial=0)),
        "t_max": t_max,
        "method": method,
    }
    return Groups(group_N, int(groups_C.max(initial=1)), report)


def _in_id_order(prefix_N, product_ids):
    """Prefixes and product_ids as arrays, and the order of the product_ids; InputError where they are not what they must be."""
    prefix_N, ids_N = np.asarray(prefix_N), np.asarray(product_ids, dtype=str)
    if prefix_N.shape != ids_N.shape or ids_N.ndim != 1:
        raise InputError(f"product_ids of shape {ids_N.shape} need as many prefixes, found shape {prefix_N.shape}")
    if len(prefix_N) and prefix_N.dtype.kind not in "iu":
        raise InputError(f"prefixes must be integers, found {prefix_N.dtype}: pack the codes first")
    order_N = np.argsort(ids_N, kind="stable")
    refuse_repeats(ids_N[order_N], "the table")
    return prefix_N, ids_N, order_N


def _finite_residuals(residual_NZ, ids_N):
    residual_NZ = np.asarray(np.empty(0) if residual_NZ is None else residual_NZ)
    if residual_NZ.ndim != 2 or len(residual_NZ) != len(ids_N) or residual_NZ.dtype.kind not in "fiu":
        raise InputError(
            f'method "kmeans" needs residuals, numbers of shape {len(ids_N)}×Z, found {residual_NZ.dtype} of shape '
            f'{residual_NZ.shape}; hand them over, or split by "value" or "random"'
        )
    refuse_infinite(residual_NZ, ids_N)
    return residual_NZ


def _value_keys(value_N, ids_N, row_R):
    """Sort keys, the last one first: NaN after numbers, then descending values."""
    value_N = np.asarray(np.empty(0) if value_N is None else value_N, dtype=np.float64)
    if value_N.shape != ids_N.shape:
        raise InputError(
            f'method "value" needs one number for each of {len(ids_N)} products, found shape {value_N.shape}: '
            f'name the business value column, or choose "kmeans"'
        )
    missing_R = np.isnan(value_N[row_R])
    return np.where(missing_R, 0.0, -value_N[row_R]), missing_R


def _hashes(ids_R, seed):
    """uint64 R: the characters and the seed, mixed one column of characters at a time."""
    hash_R = splitmix(np.full(len(ids_R), operator.index(seed) % 2**64, np.uint64))
    letters_RW = np.ascontiguousarray(ids_R).view(np.uint32).reshape(len(ids_R), ids_R.itemsize // 4)
    for letter_R in letters_RW.T:
        # Padding is skipped: the width follows the longest product_id of the call, the hash must not.
        hash_R = np.where(letter_R == 0, hash_R, splitmix(hash_R ^ letter_R.astype(np.uint64)))
    return hash_R


def _places(size_B):
    """int64 R: 0, 1, 2, … inside each part."""
    return np.arange(size_B.sum()) - np.repeat(np.cumsum(size_B) - size_B, size_B)


def _even_parts(size_B, groups_B):
    """int64 R: the group of each place of each sorted cluster; sizes are ⌊c/g⌋ or ⌈c/g⌉."""
    return _places(size_B) * np.repeat(groups_B, size_B) // np.repeat(size_B, size_B)


def _by_residual(residual_NZ, row_R, size_B, groups_B):
    """Groups of similar residuals; blocks bound the memory and change no group."""
    group_R = np.empty(len(row_R), np.int64)
    end_B = np.cumsum(size_B)
    block_B = (end_B - size_B) * residual_NZ.shape[1] // BLOCK_NUMBERS
    for block in np.unique(block_B):
        part = np.flatnonzero(block_B == block)
        rows = slice(end_B[part[0]] - size_B[part[0]], end_B[part[-1]])
        point_RZ = residual_NZ[row_R[rows]].astype(np.float64)
        group_R[rows] = _bisect(point_RZ, size_B[part], groups_B[part])
    return group_R


def _bisect(point_RZ, size_B, groups_B):
    """Groups int64 R of parts that lie one after the other, each halved until it is to be one group.

    A part of n ≤ g·t_max rows gives ⌊n·h/g⌋ rows to its first h = ⌊g/2⌋ groups, so n ≤ g·t_max holds in both halves.
    """
    group_R, row_R = np.zeros(len(point_RZ), np.int64), np.arange(len(point_RZ))
    while len(row_R):
        half_B = groups_B // 2
        left_B = size_B * half_B // groups_B
        right_R = _two_means(point_RZ[row_R], size_B, left_B)
        part_R = np.repeat(np.arange(len(size_B)), size_B)
        group_R[row_R[right_R]] += half_B[part_R[right_R]]
        row_R = row_R[np.argsort(2 * part_R + right_R, kind="stable")]
        groups_B = np.stack([half_B, groups_B - half_B], axis=1).ravel()
        size_B = np.stack([left_B, size_B - left_B], axis=1).ravel()
        row_R = row_R[np.repeat(groups_B > 1, size_B)]
        size_B, groups_B = size_B[groups_B > 1], groups_B[groups_B > 1]
    return group_R


def _two_means(point_RZ, size_B, left_B):
    """bool R: which rows of each part go right, when exactly `left_B` of them go left.

    With both sizes fixed, the best assignment to two centroids is a cut across the line that joins them.
    """
    start_B, part_R = np.cumsum(size_B) - size_B, np.repeat(np.arange(len(size_B)), size_B)
    point_RZ = point_RZ - (np.add.reduceat(point_RZ, start_B) / size_B[:, None])[part_R]
    total_BZ = np.add.reduceat(point_RZ, start_B)
    square_R = (point_RZ * point_RZ).sum(axis=1)
    far_R = np.flatnonzero(square_R == np.maximum.reduceat(square_R, start_B)[part_R])
    line_BZ = point_RZ[far_R[np.searchsorted(far_R, start_B)]]
    for _ in range(POWER_STEPS):
        line_BZ = _unit(np.add.reduceat(point_RZ * _along(point_RZ, line_BZ[part_R])[:, None], start_B))
    # A direction has no sign of its own; between mirror images the first product_id goes left.
    line_BZ = np.where(_along(point_RZ[start_B], line_BZ) > 0, -1.0, 1.0)[:, None] * line_BZ
    right_R = _right_side(point_RZ, line_BZ, part_R, size_B, left_B)
    for _ in range(LLOYD_STEPS):
        sum_BZ = np.add.reduceat(point_RZ * right_R[:, None], start_B)
        line_BZ = sum_BZ / (size_B - left_B)[:, None] - (total_BZ - sum_BZ) / left_B[:, None]
        before_R, right_R = right_R, _right_side(point_RZ, line_BZ, part_R, size_B, left_B)
        if np.array_equal(before_R, right_R):
            break
    return right_R


def _along(point_RZ, line_RZ):
    return (point_RZ * line_RZ).sum(axis=1)


def _unit(line_BZ):
    length_B1 = np.sqrt((line_BZ * line_BZ).sum(axis=1, keepdims=True))
    return line_BZ / np.where(length_B1 > 0, length_B1, 1.0)


def _right_side(point_RZ, line_BZ, part_R, size_B, left_B):
    order_R = np.lexsort((_along(point_RZ, line_BZ[part_R]), part_R))  # stable, so product_id decides between equals
    right_R = np.empty(len(order_R), bool)
    right_R[order_R] = _places(size_B) >= np.repeat(left_B, size_B)
    return right_R
