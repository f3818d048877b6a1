"""Slow, obvious versions of the tree's codes: one row at a time, nested lists, float64.

Unusual: category tokens are found from the known paths alone, without looking at the coder.
"""

import numpy as np


def children_of(prefix: tuple, known_paths) -> list[int]:
    """Ids of the categories right below a path, in id order."""
    found = set()
    for path in known_paths:
        path = [int(identity) for identity in path]
        if -1 in path:
            path = path[: path.index(-1)]
        if len(path) > len(prefix) and tuple(path[: len(prefix)]) == prefix:
            found.add(path[len(prefix)])
    return sorted(found)


def prefixes_at(depth: int, known_paths) -> set[tuple]:
    """Every known path cut to `depth` ids that has at least so many; the root at depth 0."""
    return {tuple(int(i) for i in path[:depth]) for path in known_paths if min(path[:depth], default=0) >= 0} | (
        {()} if depth == 0 else set()
    )


def category_codes(depth: int, known_paths) -> list[int]:
    """K of each category level: the most children of any parent, and one reserved code."""
    most = [[len(children_of(prefix, known_paths)) for prefix in prefixes_at(d, known_paths)] for d in range(depth)]
    return [max(counts, default=0) + 1 for counts in most]


def category_tokens(path, known_paths, depth: int) -> list[int]:
    """Rank among the parent's children; the reserved code from the first category on that is missing or unknown."""
    codes = category_codes(depth, known_paths)
    tokens, prefix = [], ()
    for level in range(depth):
        children = children_of(prefix, known_paths)
        if int(path[level]) not in children:
            return tokens + [k - 1 for k in codes[level:]]
        tokens.append(children.index(int(path[level])))
        prefix = (*prefix, int(path[level]))
    return tokens


def branch_tokens(levels, embedding_D, node: int) -> list[int]:
    """Walk the branch levels from `node`: nearest child, lowest code on ties, reserved codes below the end."""
    tokens, ended = [], False
    for level in levels:
        counts = [int(count) for count in level.count_G]
        if ended or counts[node] == 0:
            tokens.append(level.codes - 1)
            ended = True
            continue
        first, best = sum(counts[:node]), None
        for code in range(counts[node]):
            apart_D = np.asarray(embedding_D, dtype=float) - np.asarray(level.centroid_CD[first + code], dtype=float)
            distance = float(apart_D @ apart_D)
            if best is None or distance < best[0]:
                best = (distance, code)
        tokens.append(best[1])
        node = first + best[1]
    return tokens
