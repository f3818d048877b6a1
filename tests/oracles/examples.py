"""Slow, obvious makers of training examples: spans one by one, a mix counted by hand, groupings tried one and all."""

from itertools import combinations

import numpy as np


def spans_of(tokens: list[int], draws: list[float], *, size: int, shortest: int) -> list[list[int]]:
    """The beginning of a text, then one window in each of len(draws) equal stretches of its other places."""
    if len(tokens) < shortest:
        return []
    spans, room = [tokens[:size]], len(tokens) - size
    if room > 0:
        stretches = min(room, len(draws))
        for number in range(stretches):
            stretch = list(range(1, room + 1))[number * room // stretches : (number + 1) * room // stretches]
            start = stretch[int(draws[number] * len(stretch))]
            spans.append(tokens[start : start + size])
    return spans


def least_padding(length_B: list[int], *, least: int, most: int) -> dict[int, int]:
    """Number of groups → fewest tokens, padding included, over all ways to cut the sorted lengths between unequal ones."""
    ordered = sorted(max(1, length) for length in length_B)
    places = [i for i in range(1, len(ordered)) if ordered[i] != ordered[i - 1]]
    best = {1: len(ordered) * ordered[-1]}
    for groups in range(2, most + 1):
        for cuts in combinations(places, groups - 1):
            edges = [0, *cuts, len(ordered)]
            pieces = [ordered[a:b] for a, b in zip(edges, edges[1:])]
            if min(map(len, pieces)) >= least:
                tokens = sum(len(piece) * piece[-1] for piece in pieces)
                best[groups] = min(tokens, best.get(groups, tokens))
    return best


def epochs_of(kind_rows: list[int], count: int, epochs: int, start: int = 0) -> list[list[int]]:
    """Rows of each epoch when `count` are taken from an endless walk round and round the same order."""
    return [
        [kind_rows[(epoch * count + i) % len(kind_rows)] for i in range(count)]
        for epoch in range(start, start + epochs)
    ]


def user_tokens(
    query: list[int], words: list[int], recent: list[list[int]], *, base: int, codes_per_level, attribute_tokens: int, most: int
) -> list[int]:  # fmt: skip
    """Attributes, ID tokens of the latest products, query: written out token by token."""
    line = words[:attribute_tokens]
    for codes in recent[max(0, len(recent) - most) :]:
        for level, code in enumerate(codes):
            line.append(base + int(np.sum(codes_per_level[:level])) + code)
    return line + query
