"""Pairwise logistic loss and its gradient, one pair after the other in plain Python."""

import math


def loss(judged, weights, *, l2):
    """`judged`: per query [(features, relevant)]."""
    total = 0.5 * l2 * math.fsum(weight * weight for weight in weights)
    for pairs in map(_pairs, judged):
        total += math.fsum(math.log1p(math.exp(-_dot(weights, ahead))) for ahead in pairs) / len(pairs) / len(judged)
    return total


def gradient(judged, weights, *, l2):
    total = [l2 * weight for weight in weights]
    for pairs in map(_pairs, judged):
        for ahead in pairs:
            wrong = 1 / (1 + math.exp(_dot(weights, ahead)))
            for feature, difference in enumerate(ahead):
                total[feature] -= wrong * difference / len(pairs) / len(judged)
    return total


def _pairs(candidates):
    """What a relevant candidate has more than another one, for all such pairs."""
    return [
        [one - two for one, two in zip(better, worse)]
        for better, relevant in candidates
        if relevant
        for worse, also in candidates
        if not also
    ]


def _dot(one, two):
    return math.fsum(x * y for x, y in zip(one, two))
