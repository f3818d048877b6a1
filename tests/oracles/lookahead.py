"""Slow, obvious node vectors and look-ahead: dictionaries by prefix, products one at a time, float64."""

import numpy as np


def _mean(vectors):
    return (np.sum(np.asarray(vectors, np.float64), 0) / len(vectors)).astype(np.float16)


def means_of(ids, vectors, depth):
    """{prefix: float16 vector} for prefixes of 1 … `depth` codes."""
    below = {}
    for docid, vector in zip(ids, vectors):
        for length in range(1, depth + 1):
            below.setdefault(tuple(docid[:length]), []).append(vector)
    return {prefix: _mean(mine) for prefix, mine in below.items()}


def tails_of(ids, vectors, depth):
    """{(level, code): float16 vector} for the levels below `depth`: the mean of what is left."""
    means, tails = means_of(ids, vectors, depth), {}
    left = [vector.astype(np.float64) - means[tuple(docid[:depth])] for docid, vector in zip(ids, vectors)]
    for level in range(depth, len(ids[0])):
        for code in sorted({docid[level] for docid in ids}):
            tails[level, code] = _mean([one for docid, one in zip(ids, left) if docid[level] == code])
        left = [one - tails[level, docid[level]] for docid, one in zip(ids, left)]
    return tails


def score_of(prefix, query, means, tails, depth, *, weights, logp_of=None, words_of=None):
    """S of one prefix. `weights`: (logp, vectors, words); `logp_of(prefix)`; `words_of`: {docid: highest BM25}."""
    q = np.asarray(query, np.float64) / np.linalg.norm(query)
    near = q @ means[prefix[:depth]].astype(np.float64)
    for level in range(depth, len(prefix)):
        if (level, prefix[level]) in tails:
            near += q @ tails[level, prefix[level]].astype(np.float64)
    score = weights[1] * near
    if logp_of:
        score += weights[0] * logp_of(prefix)
    if words_of:
        score += weights[2] * max(best for docid, best in words_of.items() if docid[: len(prefix)] == prefix)
    return score


def slow_lookahead(ids, score, widths):
    """(S, prefix) of the last beam, best first: of all children of the beams kept, the best by `score(prefix)`."""
    ids, kept = {tuple(map(int, docid)) for docid in ids}, {()}
    for length, width in enumerate(widths, 1):
        grown = {docid[:length] for docid in ids if docid[: length - 1] in kept}
        ranked = sorted((-score(prefix), prefix) for prefix in grown)[:width]
        kept = {prefix for _, prefix in ranked}
    return [(-negative, prefix) for negative, prefix in ranked]
