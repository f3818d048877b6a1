"""What a training sees: which rows an epoch's batches hold, and category labels changed for controls, or made where there are none.

Unusual: nothing keeps state. An order is a pure function of its arguments, made anew for each epoch, so a resumed run sees the
same batches (METHODS 11.4); whose label changes is a function of the rows handed in and the seed, or of the category id and
the seed alone, so parts of a table can be treated one by one, on any worker. Rows sorted by path make every category a
contiguous range, so drawing is array arithmetic on ranges; only the steps are looped over (1e6 rows, 250 steps of 4096:
0.3 s on one core).

Shape letters: N rows, D vector, K clusters, H category depth, C leaves, G nodes drawn, F draws per node.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.hashing import GOLDEN, mixed, share_of
from catid2_ray.quantizer.kmeans import nearest
from catid2_ray.schedule import seed_from

# A leaf of one row has no positive; from two on it can be drawn.
LEAST_LEAF_ROWS = 2

# Drawing stops after so many rounds even if rows are missing: a small tree repeats itself, the rest is drawn uniformly.
_ROUNDS = 4


def category_balanced_order(
    category_NH: np.ndarray,
    *,
    batch: int,
    steps: int,
    uniform: int,
    seed: int,
    fan_out: int = 4,
    rows_per_leaf: int = 4,
) -> np.ndarray:
    """int64 steps·batch row indices of int `category_NH` (−1 = none); step s owns the slice [s·batch, (s+1)·batch).

    The first `uniform` rows of a step are consecutive slices of seeded permutations: the usage and dispersion terms
    should see these only. The others come as subtrees: a root, under each node `fan_out` children, … and
    `rows_per_leaf` distinct rows of each leaf, fewer where there are fewer, all drawn uniformly among the nodes
    that lead to a leaf of two rows or more. So positives and negatives under the same parent exist at every depth.
    The leaf of a row is its deepest category; paths of unequal depth stand side by side under their common parent.
    No row is twice in a batch, where it would be its own positive: duplicates, and what a small tree cannot fill,
    are replaced by rows drawn uniformly; a catalogue without such leaves is drawn uniformly altogether. Raises
    InputError when a batch is larger than the table or `uniform` larger than a batch.
    """
    rows = len(category_NH)
    _check_batch(rows, batch, uniform)
    rng = np.random.default_rng(seed)
    tree = _Tree.build(np.asarray(category_NH))
    per_root = tree.rows_per_root(fan_out, rows_per_leaf) if tree else 0.0
    order, taken_N = np.empty((steps, batch), np.int64), np.zeros(rows, bool)
    for step, head in enumerate(_permutation_slices(rows, uniform, steps, rng)):
        order[step, :uniform], taken_N[head], filled = head, True, uniform
        for _ in range(_ROUNDS if tree else 0):
            if filled == batch:
                break
            drawn = tree.draw(int(np.ceil((batch - filled) / per_root)), fan_out, rows_per_leaf, rng)
            drawn = _first_of_each(drawn[~taken_N[drawn]])[: batch - filled]
            order[step, filled : filled + len(drawn)], taken_N[drawn] = drawn, True
            filled += len(drawn)
        if filled < batch:
            free = np.flatnonzero(~taken_N)
            order[step, filled:] = rng.choice(free, batch - filled, replace=False)
        taken_N[order[step]] = False
    return order.ravel()


def _check_batch(rows: int, batch: int, uniform: int) -> None:
    if not 1 <= batch <= rows:
        raise InputError(
            f"a batch of {batch} cannot be drawn from {rows} rows without one twice: lower the batch to at most {rows}"
        )
    if not 0 <= uniform <= batch:
        raise InputError(f"uniform must be from 0 to the batch of {batch}, found {uniform}")


def _permutation_slices(rows: int, size: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` slices of `size` ≤ rows distinct indices that use up one permutation after another."""
    left = np.empty(0, np.int64)
    for _ in range(steps):
        if len(left) < size:
            # Rows of a slice that straddles two permutations wait until the end of the second.
            fresh = rng.permutation(rows)
            waits = np.isin(fresh, left)
            left = np.concatenate((left, fresh[~waits], fresh[waits]))
        yield left[:size]
        left = left[size:]


def _first_of_each(index: np.ndarray) -> np.ndarray:
    """The distinct values in the order of their first occurrence."""
    _, first = np.unique(index, return_index=True)
    return index[np.sort(first)]


def _draw_distinct(count_G: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """int64 G×F: min(F, count) distinct numbers from 0 … count − 1 for each node, every subset alike; −1 = none.

    Floyd's algorithm on all nodes at once: the i-th draw is from one more number than the last and takes the new one
    when it meets an old one. Shuffled at the end, for a batch that is full may cut the last subtree short.
    """
    picked_GF = np.full((len(count_G), draws), -1, np.int64)
    for column in range(draws):
        newest_G = count_G - draws + column
        pick_G = rng.integers(0, np.maximum(newest_G, 0) + 1)
        met_G = (picked_GF[:, :column] == pick_G[:, None]).any(1)
        picked_GF[:, column] = np.where(newest_G < 0, -1, np.where(met_G, newest_G, pick_G))
    return rng.permuted(picked_GF, axis=1)


class _Range(NamedTuple):
    """Where the nodes of one depth have their children among the next depth's nodes, or among the sorted rows."""

    first_G: np.ndarray
    count_G: np.ndarray


class _Tree(NamedTuple):
    """Nodes that lead to a leaf with enough rows. A row's path that ends early goes on as a chain of −1."""

    order_N: np.ndarray  # rows sorted by path
    depths: list[_Range]  # per column; the last one's children are places in order_N

    @classmethod
    def build(cls, category_NH: np.ndarray) -> "_Tree | None":
        """None when no leaf has enough rows."""
        if not category_NH.size:
            return None
        order_N = np.lexsort(category_NH.T[::-1])
        sorted_NH = category_NH[order_N]
        first_C = _run_starts(sorted_NH)
        count_C = np.diff(first_C, append=len(sorted_NH))
        enough_C = (count_C >= LEAST_LEAF_ROWS) & (sorted_NH[first_C, 0] >= 0)
        first_C, count_C = first_C[enough_C], count_C[enough_C]
        if not len(first_C):
            return None
        path_CH, depths = sorted_NH[first_C], [_Range(first_C, count_C)]
        for depth in range(category_NH.shape[1] - 1, 0, -1):
            first_G = _run_starts(path_CH[:, :depth])
            depths.append(_Range(first_G, np.diff(first_G, append=len(path_CH))))
            path_CH = path_CH[first_G]
        return cls(order_N, depths[::-1])

    def draw(self, roots: int, fan_out: int, rows_per_leaf: int, rng: np.random.Generator) -> np.ndarray:
        """int64, the rows of so many subtrees, one after the other; subtrees may overlap."""
        node_G = rng.integers(0, len(self.depths[0].first_G), roots)
        for depth, (first_G, count_G) in enumerate(self.depths):
            draws = fan_out if depth < len(self.depths) - 1 else rows_per_leaf
            picked_GF = _draw_distinct(count_G[node_G], draws, rng)
            node_G = (first_G[node_G][:, None] + picked_GF)[picked_GF >= 0]
        return self.order_N[node_G]

    def rows_per_root(self, fan_out: int, rows_per_leaf: int) -> float:
        """Rows that a subtree has on average."""
        rows_G = np.minimum(self.depths[-1].count_G, rows_per_leaf).astype(float)
        for first_G, count_G in self.depths[-2::-1]:
            rows_G = np.add.reduceat(rows_G, first_G) / count_G * np.minimum(count_G, fan_out)
        return float(rows_G.mean())


def _run_starts(sorted_NH: np.ndarray) -> np.ndarray:
    """int64, where a run of equal rows starts."""
    differs_N = np.ones(len(sorted_NH), bool)
    differs_N[1:] = (sorted_NH[1:] != sorted_NH[:-1]).any(1)
    return np.flatnonzero(differs_N)


def clusters_in_clusters(vector_ND: np.ndarray, books: Sequence[Tensor]) -> np.ndarray:
    """int32 N×H: labels for a catalogue without categories. The one at depth d is the prefix of d + 1 codes of residual k-means, so
    a cluster of depth 2 lies inside one of depth 1. `books`: as `kmeans.residual_kmeans` gives them, one a depth."""
    rest_ND, label_N, labels = torch.from_numpy(np.array(vector_ND, np.float32)), 0, []
    for book_KD in books:
        code_N = nearest(rest_ND, book_KD)
        rest_ND -= book_KD[code_N]
        label_N = label_N * len(book_KD) + code_N
        labels.append(label_N.numpy().astype(np.int32))
    return np.stack(labels, 1)


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
    id_N = masked_NH[:, depth].astype(np.uint64)
    draw_N = share_of(mixed(id_N * np.uint64(GOLDEN) + np.uint64(seed_from(seed))))
    masked_N = (masked_NH[:, depth] >= 0) & (draw_N < share)
    masked_NH[masked_N, depth:] = -1
    return masked_NH


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"share must be from 0 to 1, found {share}")
