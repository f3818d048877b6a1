"""Expansion and re-scoring, one product after the other in plain Python; dots are sums of products in double precision."""

import math


def dot(query, vector):
    return math.fsum(float(q) * float(v) for q, v in zip(query, vector))


def dense_ranking(query, vectors):
    """Rows by dot product, highest first, equal ones by row."""
    return sorted(range(len(vectors)), key=lambda row: (-dot(query, vectors[row]), row))


def expanded(ranges, *, rank, quota=None, most=None, allowed=None):
    """[(row, beam)] of one query. `ranges`: (start, end) of each beam; `rank(row)`: a tuple, lowest first."""
    kept = []
    for beam, (start, end) in enumerate(ranges):
        rows = [row for row in range(start, end) if allowed is None or allowed[row]]
        rows.sort(key=lambda row: (*rank(row), row))
        kept += [(row, beam) for row in rows[:quota]]
    kept.sort(key=lambda pair: (*rank(pair[0]), pair[0]))
    return kept[:most]


def path_scores(logps, path):
    if path == "logp":
        return list(logps)
    if path == "root":
        return [math.sqrt(math.exp(logp)) for logp in logps]
    total = math.fsum(math.exp(logp - max(logps)) for logp in logps)
    return [math.exp(logp - max(logps)) / total for logp in logps]


def rescored(pairs, dense_of, logps, *, top_k, a, path, dense, lexical_of=None, lexical_weight=1.0):
    """[(final score, row)] of one query, best first. `dense_of`, `lexical_of`: dicts by row."""
    shape = {"tanh": math.tanh, "sigmoid": lambda x: 1 / (1 + math.exp(-x)), "dot": lambda x: x}[dense]
    scores = path_scores(logps, path)
    finals = []
    for row, beam in pairs:
        final = shape(dense_of[row]) + a * scores[beam]
        if lexical_of:
            final += lexical_weight * lexical_of[row]
        finals.append((final, row))
    return sorted(finals, key=lambda pair: (-pair[0], pair[1]))[:top_k]
