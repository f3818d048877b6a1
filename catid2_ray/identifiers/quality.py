"""How good IDs are: collisions, use of the codes, agreement with the category tree; plain numbers, ready for JSON.

Purity stands beside the same figure for shuffled categories, because many small prefixes are pure for free.

N products, L levels, H category depth, K codes of a level.
"""

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError

SHUFFLE_SEED = 0


def id_quality(codes_NL, category_NH, codes_per_level) -> dict:
    """Diagnostics of the IDs `codes_NL` (integers N×L, 0 … K_l − 1), which catch collapse; none is an objective.

    `category_NH`: integers N×H, the category of each product at depths 1 … H, −1 where its path is shorter; H may be
    0. Returns a dict:

    - `products`, `ids`; `collision_rate`, (N − distinct IDs) / N (LC-Rec); `shared_rate`, the share of products whose
      ID another product has (sidlens, VARG), 1 to 2 times the former for pairs; `largest_bucket`, `p99_bucket`,
      `mean_bucket`, products per used ID; `gini_ids` over used IDs (FORGE), 0 = even;
    - lists over levels: `codes_used`, `codes_used_share`, `perplexity` exp(H), `normalised_entropy` H / ln K (1 where
      K = 1), `conditional_entropy` H(c_l | c_<l) in nats, `gini` over all K codes, `top_share` of the commonest code;
    - lists over depths 1 … min(H, L): `purity`, products of their prefix's commonest category / products that have a
      category at that depth, `purity_shuffled`, the same with those categories permuted, `purity_products`, how many
      products that is (both purities are 0 when there are none).

    Raises InputError for an empty table, codes out of range, or categories of another number of rows.
    """
    space = DocidSpace(tuple(codes_per_level))
    codes_NL, category_NH = space.check(np.asarray(codes_NL)), np.asarray(category_NH)
    if not len(codes_NL):
        raise InputError("no IDs to describe, found an empty table; pass the IDs of the catalogue")
    if category_NH.ndim != 2 or len(category_NH) != len(codes_NL) or category_NH.dtype.kind not in "iu":
        raise InputError(
            f"categories must be an integer array {len(codes_NL)}×H, found {category_NH.dtype} of shape "
            f"{category_NH.shape}"
        )
    packed_N = space.pack(codes_NL)
    bucket = np.unique(packed_N, return_counts=True)[1]
    levels = [_level(codes_NL[:, level], k) for level, k in enumerate(space.codes_per_level)]
    joint = [_entropy(np.unique(space.prefix_of(packed_N, d), return_counts=True)[1]) for d in range(space.levels + 1)]
    depths = [
        _purity(space.prefix_of(packed_N, depth + 1), category_NH[:, depth])
        for depth in range(min(category_NH.shape[1], space.levels))
    ]
    return {
        "products": len(packed_N),
        "ids": len(bucket),
        "collision_rate": (len(packed_N) - len(bucket)) / len(packed_N),
        "shared_rate": int(bucket[bucket > 1].sum()) / len(packed_N),
        "largest_bucket": int(bucket.max()),
        "p99_bucket": float(np.percentile(bucket, 99)),
        "mean_bucket": float(bucket.mean()),
        "gini_ids": _gini(bucket),
        **{name: [level[name] for level in levels] for name in levels[0]},
        "conditional_entropy": [max(b - a, 0.0) for a, b in zip(joint, joint[1:])],
        "purity": [pure for pure, _, _ in depths],
        "purity_shuffled": [shuffled for _, shuffled, _ in depths],
        "purity_products": [products for _, _, products in depths],
    }


def _level(code_N, k) -> dict:
    count_K = np.bincount(code_N, minlength=k)
    entropy = _entropy(count_K)
    return {
        "codes_used": int((count_K > 0).sum()),
        "codes_used_share": float((count_K > 0).mean()),
        "perplexity": float(np.exp(entropy)),
        "normalised_entropy": entropy / float(np.log(k)) if k > 1 else 1.0,
        "gini": _gini(count_K),
        "top_share": float(count_K.max() / len(code_N)),
    }


def _entropy(count) -> float:
    """Entropy in nats of a table of counts."""
    share = count[count > 0] / count.sum()
    return float(max(-(share * np.log(share)).sum(), 0.0))


def _gini(count) -> float:
    """Gini coefficient of counts: 0 when all are equal, near 1 when one holds everything (FORGE, 2509.20904)."""
    rising, n = np.sort(count), len(count)
    return float((n + 1) / n - 2 * (np.arange(n, 0, -1) * rising).sum() / (n * rising.sum()))


def _purity(prefix_N, category_N) -> tuple[float, float, int]:
    """Purity of prefixes, the same with shuffled categories, and the number of products that have a category."""
    known = category_N >= 0
    prefix, category = prefix_N[known], category_N[known]
    if not len(prefix):
        return 0.0, 0.0, 0
    shuffled = np.random.default_rng(SHUFFLE_SEED).permutation(category)
    return _purity_of(prefix, category), _purity_of(prefix, shuffled), len(prefix)


def _purity_of(prefix, category) -> float:
    """Sum over prefixes of the count of its commonest category, over all products."""
    _, prefix = np.unique(prefix, return_inverse=True)
    pair, count = np.unique(prefix * (int(category.max()) + 1) + category, return_counts=True)
    _, first = np.unique(pair // (int(category.max()) + 1), return_index=True)
    return float(np.maximum.reduceat(count, first).sum() / len(prefix))
