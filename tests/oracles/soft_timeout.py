"""What a search gives that ends early: the beams of a level, and the products below them, ranked one by one."""

from tests.oracles.expansion import path_scores


def products_below(beams, ids, *, dense_of, k, most, a=None, shape=None, logp_of=None):
    """Rows of the `k` best products. `beams`: prefixes, best first; `ids`: of each row, None for one that is not allowed, which
    counts none the less among the `most` products below the beams. Ranked by `dense_of(row)` alone or, with `a`, by
    shape(dense) + a · (the beam's share of P among all beams), where `logp_of(prefix)` is log P."""
    kept, below = [], 0
    for number, prefix in enumerate(beams):
        inside = [row for row, (docid, _) in enumerate(ids) if docid[: len(prefix)] == prefix]
        below += len(inside)
        if number and below > most:
            break
        kept.append((prefix, [row for row in inside if ids[row][1]]))
    paths = path_scores([logp_of(prefix) for prefix, _ in kept], "softmax") if a else [0.0] * len(kept)
    scored = []
    for path, (_, rows) in zip(paths, kept):
        scored += [((shape or float)(dense_of(row)) + (a or 0) * path, row) for row in rows]
    return [row for _, row in sorted(scored, key=lambda pair: (-pair[0], pair[1]))[:k]]
