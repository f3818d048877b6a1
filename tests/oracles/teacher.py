"""A teacher's products and its draws, one query and one product at a time."""

import math


def nearest(score_QN, most: int) -> list[list[tuple[float, int]]]:
    """(score, row) of each query's best products, best first, equal scores by row."""
    return [
        [(float(score), row) for score, row in sorted((-float(s), row) for row, s in enumerate(line))[:most]]
        for line in score_QN
    ]


def shares(scores: list[float], temperature: float) -> list[float]:
    """softmax(score / temperature), written out."""
    total = sum(math.exp(score / temperature) for score in scores)
    return [math.exp(score / temperature) / total for score in scores]


def draws(share_M: list[float], count: int, offset: float) -> list[int]:
    """A walk along the cumulative shares with `count` equal steps, the first point at offset / count."""
    places = []
    for number in range(count):
        point, place, before = (number + offset) / count, 0, 0.0
        while place + 1 < len(share_M) and before + share_M[place] <= point:
            before += share_M[place]
            place += 1
        places.append(place)
    return places
