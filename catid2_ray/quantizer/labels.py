"""Category labels changed on purpose, for controls and ablations: exchanged between rows, or cut short.

Unusual: neither function keeps state. Who changes is a function of the rows handed in and the seed, or of the category
id and the seed alone, so parts of a table can be treated one by one, on any worker.

Shape letters: N rows, H category depth.
"""

import numpy as np

from catid2_ray.errors import InputError
from catid2_ray.schedule import seed_from


def exchange_paths(category_NH: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """A copy of int N×H in which round(share·N) rows, chosen by the seed, exchange whole paths by a random permutation.

    `share` (0…1): 1 is the control `cat_id2_shuffled`, 0.05, 0.2 and 0.5 are label noise. How often each path occurs is
    kept. A few of the chosen rows keep their label by chance: the permutation may leave a row in place or hand it an
    equal path, so the share of labels that change is `share` times the chance that two rows' paths differ. Raises
    InputError for a share outside 0…1.
    """
    _check_share(share)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(category_NH))[: round(share * len(category_NH))]
    changed_NH = np.array(category_NH)
    changed_NH[chosen] = changed_NH[rng.permutation(chosen)]
    return changed_NH


def mask_categories(category_NH: np.ndarray, *, depth: int, share: float, seed: int) -> np.ndarray:
    """A copy of int N×H in which `share` of the *categories* at `depth` (0-based column) lose it and all below (−1).

    The paper's "2&3" ablation (table 5): all products of a category keep their third level, or none does. Whether a
    category is masked is a function of (id, seed), so that every part and worker agrees without knowing the other ids;
    `share` (0…1) is therefore met only on average, within about ±√(share·(1 − share)/categories). Raises InputError for
    a depth that is no column and a share outside 0…1.
    """
    _check_share(share)
    if not 0 <= depth < category_NH.shape[1]:
        raise InputError(f"depth {depth} is not a column of the categories, which have {category_NH.shape[1]} (from 0)")
    masked_NH = np.array(category_NH)
    masked_N = (masked_NH[:, depth] >= 0) & (_draw(masked_NH[:, depth], seed) < share)
    masked_NH[masked_N, depth:] = -1
    return masked_NH


def _draw(id_N: np.ndarray, seed: int) -> np.ndarray:
    """float64 N in [0, 1), a hash of (id, seed): the finaliser of splitmix64, whose output bits are all well mixed."""
    hash_N = id_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed_from(seed))
    hash_N = (hash_N ^ (hash_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hash_N = (hash_N ^ (hash_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hash_N ^= hash_N >> np.uint64(31)
    return (hash_N >> np.uint64(11)) * 2.0**-53


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"share must be from 0 to 1, found {share}")
