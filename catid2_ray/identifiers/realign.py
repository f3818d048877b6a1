"""After a full re-ID: rename the new codes so that a token means what it meant, and count what changed all the same.

Unusual: the matching is solved on the observed pairs of old and new codes alone, at most one per product, instead of on
a K×K matrix (512 MiB at 8,192 codes); it is the optimum all the same, since a pair that no product shows adds nothing.

N common products, L levels, K codes, E observed pairs.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.identifiers.ledger import id_column, refuse_repeats


class Realignment(NamedTuple):
    """`rename_LK`: for each level an int64 permutation K_l, new code → its new name. `agreement_before_L` and
    `agreement_after_L`: float64, share of the common products whose code of that level equals the old one."""

    rename_LK: list
    agreement_before_L: np.ndarray
    agreement_after_L: np.ndarray


class Common(NamedTuple):
    """`old_N` and `new_N` int64: the rows of the products that both releases have, in product_id order."""

    old_N: np.ndarray
    new_N: np.ndarray


def common_products(old_ids, new_ids) -> Common:
    """Where the products of both releases lie. Raises InputError for a product_id that a release has twice."""
    old, new = id_column(old_ids), id_column(new_ids)
    for ids, where in ((old, "the old release"), (new, "the new release")):
        refuse_repeats(ids.take(pc.sort_indices(ids)), where)
    row_N = pc.index_in(new, value_set=old)
    shared_N = np.flatnonzero(row_N.is_valid().to_numpy(zero_copy_only=False))
    new_N = shared_N[pc.sort_indices(new.take(pa.array(shared_N))).to_numpy()]
    return Common(row_N.take(pa.array(new_N)).to_numpy().astype(np.int64), new_N)


def realign(old_codes_NL, new_codes_NL, codes_per_level) -> Realignment:
    """The renaming of each level's new codes after which most common products keep their old code of that level.

    `old_codes_NL`, `new_codes_NL`: integers, one row for each common product, in the same order (`common_products`).
    `codes_per_level`: K_1 … K_L of both. Levels are matched on their own, so that one renaming holds in every prefix
    and the codebooks can be renamed with it: `codebook_KZ[np.argsort(rename_K)]`. Among the optima those win in which
    most codes keep their number; codes that no common product uses keep theirs where it is free, and the others take
    the free numbers in ascending order. What is still tied, the solver decides: a function of the counts of pairs
    alone, not of the order of rows.

    Without common products nothing is renamed and both agreements are 1. Raises InputError for codes out of range and
    tables of different lengths.

    Source: vocabulary alignment of a rebuilt tokenizer (VK, arXiv 2604.13273), METHODS 8.10.
    """
    space = DocidSpace(tuple(codes_per_level))
    old_NL, new_NL = _checked(space, old_codes_NL, "old"), _checked(space, new_codes_NL, "new")
    if old_NL.shape != new_NL.shape:
        raise InputError(
            f"{len(old_NL)} rows of old codes beside {len(new_NL)} of new ones: hand over the common products of "
            f"both releases, in the same order"
        )
    rename_LK = [
        _best_renaming(old_N, new_N, codes)
        for old_N, new_N, codes in zip(old_NL.T, new_NL.T, space.codes_per_level, strict=True)
    ]
    after_L = _share_per_level(apply(new_NL, rename_LK) == old_NL)
    return Realignment(rename_LK, _share_per_level(new_NL == old_NL), after_L)


def apply(codes_NL, rename_LK) -> np.ndarray:
    """int64 N×L: every code by its new name. Different IDs stay different.

    Raises InputError for a renaming that is no permutation of 0 … K_l − 1 and for codes out of range.
    """
    rename_LK = _permutations(rename_LK)
    codes_NL = DocidSpace(tuple(len(rename_K) for rename_K in rename_LK)).check(codes_NL)
    return np.stack(
        [rename_K[codes_N] for rename_K, codes_N in zip(rename_LK, codes_NL.T, strict=True)], axis=1, dtype=np.int64
    )


def inverse(rename_LK) -> list:
    """The renaming undone, an int64 permutation K_l for each level: `apply(apply(codes, rename), inverse(rename))` is
    `codes`. Raises InputError for a renaming that is no permutation of 0 … K_l − 1."""
    return [np.argsort(rename_K) for rename_K in _permutations(rename_LK)]


def churn_counts(old_ids, old_codes_NL, new_ids, new_codes_NL, codes_per_level) -> dict:
    """What a release changes for those who learned the previous one, counted by product, so that parts of a catalogue add up.

    A part holds the old and the new row of each of its products (parts by a hash of product_id do). Either side may
    have no rows, with codes 0×L. `old_ids`, `new_ids`: different strings, in any order; codes: integers, one row each.
    Returns plain integers: `common`, `new`, `retired`, products in both releases, in the new one only, in the old one only;
    `changed`: for m = 1 … L the common products whose first m tokens are not the same.

    Raises InputError for repeated product_ids, codes out of range and tables of different lengths.
    """
    space = DocidSpace(tuple(codes_per_level))
    old_NL, new_NL = _checked(space, old_codes_NL, "old"), _checked(space, new_codes_NL, "new")
    common, differs_NL = _compared(old_ids, old_NL, new_ids, new_NL)
    return {
        "common": len(common.old_N),
        "new": len(new_NL) - len(common.new_N),
        "retired": len(old_NL) - len(common.old_N),
        "changed": np.logical_or.accumulate(differs_NL, axis=1).sum(axis=0).tolist(),
    }


def churn_of(counts: list[dict], *, addresses: int, addresses_reused: int) -> dict:
    """Churn of a whole catalogue from the `churn_counts` of its parts; plain numbers, ready for JSON.

    Returns the sums of `common`, `new` and `retired`; `prefix_churn`, for m = 1 … L the share of common products whose first m
    tokens are not the same; `addresses`, `addresses_reused` and their share `address_reuse`. A share of nothing is 0.0.
    `addresses`: different old IDs; `addresses_reused`: those of them that are also the ID of an `arrived` row. Both
    are counted by ID over all parts, since the products of one ID may lie in different parts. Raises InputError for
    no part at all and for parts of different numbers of levels.

    Source: METHODS 8.9 (full and prefix churn, address reuse).
    """
    if len({len(part["changed"]) for part in counts}) != 1:
        raise InputError(
            f"churn needs the counts of at least one part, all of the same number of levels, found "
            f"{[len(part['changed']) for part in counts]} levels: hand over what churn_counts returned for one release"
        )
    total = {name: sum(int(part[name]) for part in counts) for name in ("common", "new", "retired")}
    changed_L = [sum(level) for level in zip(*(part["changed"] for part in counts), strict=True)]
    return total | {
        "prefix_churn": [changed / total["common"] if total["common"] else 0.0 for changed in changed_L],
        "addresses": addresses,
        "addresses_reused": addresses_reused,
        "address_reuse": addresses_reused / addresses if addresses else 0.0,
    }


def arrived(old_ids, old_codes_NL, new_ids, new_codes_NL) -> np.ndarray:
    """bool N, the new rows whose product did not have that ID before: it is new, or its ID has changed.

    Holds by product alone, so also for a part of a catalogue (`churn_counts`). Raises InputError for repeated
    product_ids, codes that are no integers N×L with the L of the other side, and tables of different lengths.
    """
    old_NL, new_NL = np.asarray(old_codes_NL), np.asarray(new_codes_NL)
    for codes_NL, name in ((old_NL, "old"), (new_NL, "new")):
        if codes_NL.ndim != 2 or codes_NL.shape[1:] != old_NL.shape[1:] or codes_NL.dtype.kind not in "iu":
            raise InputError(
                f"{name} codes must be an integer array N×L, with one L on both sides, found {codes_NL.dtype} of shape "
                f"{codes_NL.shape}; a side without products has shape (0, L)"
            )
    common, differs_NL = _compared(old_ids, old_NL, new_ids, new_NL)
    arrived_N = np.ones(len(new_NL), bool)
    arrived_N[common.new_N] = differs_NL.any(axis=1)
    return arrived_N


def _compared(old_ids, old_NL, new_ids, new_NL):
    """The common products, and bool N×L in their order: the code of that level is another one."""
    for ids, codes_NL, name in ((old_ids, old_NL, "old"), (new_ids, new_NL, "new")):
        if len(codes_NL) != len(ids):
            raise InputError(f"{len(ids)} {name} product_ids need as many rows of codes, found {len(codes_NL)}")
    common = common_products(old_ids, new_ids)
    return common, old_NL[common.old_N] != new_NL[common.new_N]


def _permutations(rename_LK):
    """The levels of a renaming as arrays, or InputError."""
    rename_LK = [np.asarray(rename_K) for rename_K in rename_LK]
    for level, rename_K in enumerate(rename_LK):
        if rename_K.ndim != 1 or not np.array_equal(np.sort(rename_K), np.arange(len(rename_K))):
            raise InputError(
                f"the renaming of level {level} is no permutation of 0…{len(rename_K) - 1}: some code would be lost "
                f"or shared; use the one that realign returned"
            )
    return rename_LK


def _best_renaming(old_N, new_N, codes):
    """int64 K, new code → old code: most products in agreement, then most codes that keep their number.

    Whole numbers carry both aims: a pair weighs (K + 1) · products, + 1 where the number stays. A code may stay
    unmatched in a column of its own. Every edge weighs 1 more, since the solver takes no zeros.
    """
    diagonal_K = np.arange(codes)
    pair_E, count_E = np.unique(np.concatenate([new_N * codes + old_N, diagonal_K * (codes + 1)]), return_counts=True)
    row_E, column_E = np.divmod(pair_E, codes)
    same_E = row_E == column_E  # once more than products show it
    weight_E = (count_E - same_E) * (codes + 1) + same_E + 1
    entries = (
        np.concatenate([weight_E, np.ones(codes)]),
        (np.concatenate([row_E, diagonal_K]), np.concatenate([column_E, diagonal_K + codes])),
    )
    graph = csr_array(entries, shape=(codes, 2 * codes))
    matched_K, rename_K = min_weight_full_bipartite_matching(graph, maximize=True)
    rename_K = rename_K[np.argsort(matched_K)].astype(np.int64)
    rename_K[rename_K >= codes] = np.setdiff1d(diagonal_K, rename_K)
    return rename_K


def _share_per_level(equal_NL):
    return equal_NL.mean(axis=0) if len(equal_NL) else np.ones(equal_NL.shape[1])


def _checked(space, codes_NL, name):
    try:
        return space.check(codes_NL)
    except InputError as error:
        raise InputError(f"{name} codes: {error}") from None
