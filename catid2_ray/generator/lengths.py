"""Rows of a batch in groups of like length, so that short queries are not padded to the longest title.

Of all ways to cut the sorted lengths the one with least padding is found, by dynamic programming over the distinct lengths
(at most as many as tokens fit an input), so the cost does not grow with the batch.

B rows, N distinct lengths, G groups.
"""

from collections.abc import Sequence

import numpy as np

MOST_PADDING = 0.1  # share of the tokens of a batch that may be padding


def padding_share(length_B: np.ndarray, groups: Sequence[np.ndarray]) -> float:
    """Share 0 … 1 of padding among all tokens, where each group is padded to its longest row."""
    length_B = np.maximum(np.asarray(length_B), 1)
    padded = sum(len(row_G) * int(length_B[row_G].max()) for row_G in groups)
    return 1.0 - int(length_B.sum()) / padded


def length_groups(
    length_B: np.ndarray, *, least: int = 32, most: int = 8, padding: float = MOST_PADDING
) -> list[np.ndarray]:
    """Rows in as few groups as keep padding at or under the share `padding`, lengths ascending from group to group.

    `length_B`: tokens of each row. Groups have at least `least` rows (but for one group of all), as a pass over few rows
    costs as much as over many, and there are at most `most`. Where the goal cannot be reached so, the grouping with
    least padding is given. Rows of one length are never parted, so groups can be of unequal size. Rows keep their order
    inside a group.
    """
    length_B = np.maximum(np.asarray(length_B), 1)
    length_N, number_B, rows_N = np.unique(length_B, return_inverse=True, return_counts=True)
    before_N = np.concatenate(([0], np.cumsum(rows_N)))
    # cost_NN[i, j]: tokens of a group of the distinct lengths i … j, all padded to the last.
    size_NN = before_N[None, 1:] - before_N[:-1, None]
    cost_NN = np.where(size_NN >= least, size_NN * length_N[None, :], np.inf)
    cost_NN[0, -1] = len(length_B) * length_N[-1]
    real = int(length_B.sum())
    best_N, cuts, found = cost_NN[0], [np.zeros(len(length_N), np.int64)], (cost_NN[0, -1], 1)
    for groups in range(2, min(most, len(length_N)) + 1):
        if 1.0 - real / found[0] <= padding:
            break
        # The last group begins at distinct length i, after the best cut of all shorter ones.
        through_NN = np.concatenate(([np.inf], best_N[:-1]))[:, None] + cost_NN
        cuts.append(through_NN.argmin(0))
        best_N = through_NN.min(0)
        if best_N[-1] < found[0]:
            found = (best_N[-1], groups)
    group_N, end = np.zeros(len(length_N), np.int64), len(length_N)
    for group in range(found[1] - 1, 0, -1):
        first = int(cuts[group][end - 1])
        group_N[first:end], end = group, first
    return [np.flatnonzero(group_N[number_B] == group) for group in range(found[1])]
