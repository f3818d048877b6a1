"""Splitting clusters the slow way: one cluster at a time, one row at a time, the same cuts spelled out."""

import math

import numpy as np


def by_value(value, product_id):
    """Sort key: numbers before NaN, larger numbers first, then product_id."""
    return (1, 0.0, product_id) if math.isnan(value) else (0, -value, product_id)


def ranked(prefixes, keys, t_max):
    """{row: group}: each cluster sorted by `keys`, cut into the fewest equal pieces."""
    groups = {}
    for prefix in set(prefixes):
        rows = sorted((row for row, p in enumerate(prefixes) if p == prefix), key=lambda row: keys[row])
        parts = math.ceil(len(rows) / t_max)
        for place, row in enumerate(rows):
            groups[row] = place * parts // len(rows)
    return groups


def by_residual(prefixes, residuals, product_ids, t_max, power_steps, lloyd_steps):
    """{row: group}: bisection of each cluster by balanced 2-means."""
    groups = {}
    for prefix in set(prefixes):
        rows = sorted((row for row, p in enumerate(prefixes) if p == prefix), key=lambda row: product_ids[row])
        bisect(rows, math.ceil(len(rows) / t_max), 0, residuals, groups, power_steps, lloyd_steps)
    return groups


def bisect(rows, parts, first, residuals, groups, power_steps, lloyd_steps):
    if parts == 1:
        groups.update(dict.fromkeys(rows, first))
        return
    half = parts // 2
    cut = len(rows) * half // parts
    mean = sum(residuals[row] for row in rows) / len(rows)
    point = {row: residuals[row] - mean for row in rows}
    line = point[max(rows, key=lambda row: float((point[row] ** 2).sum()))]
    for _ in range(power_steps):
        line = sum(float(point[row] @ line) * point[row] for row in rows)
        length = float(np.sqrt(line @ line))
        line = line / length if length else line
    if float(point[rows[0]] @ line) > 0:
        line = -line
    sides = None
    for _ in range(lloyd_steps + 1):
        order = sorted(rows, key=lambda row: float((point[row] * line).sum()))
        if sides == (set(order[:cut]), set(order[cut:])):
            break
        sides = (set(order[:cut]), set(order[cut:]))
        line = sum(point[row] for row in order[cut:]) / len(order[cut:]) - sum(point[row] for row in order[:cut]) / cut
    left, right = ([row for row in rows if row in side] for side in sides)
    bisect(left, half, first, residuals, groups, power_steps, lloyd_steps)
    bisect(right, parts - half, first + half, residuals, groups, power_steps, lloyd_steps)
