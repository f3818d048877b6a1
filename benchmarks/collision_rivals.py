"""Collision handling as public semantic-ID systems do it, written plainly, to stand beside `assign_unique`.

Both move a product only inside its prefix of L − 1 codes and leave what does not fit as it is, which is counted. Groups
and products are walked one by one in Python, as in those systems. Times are capped: past `seconds` the walk stops.

N products, L levels, K codes, Z latent width; G products of one group.
"""

import time
from typing import NamedTuple

import numpy as np


class Walked(NamedTuple):
    """`codes_NL`: the IDs reached; `rounds` over the catalogue; `finished`: false when time ran out first."""

    codes_NL: np.ndarray
    rounds: int
    finished: bool


def regroup_loop(codes_NL, residual_NZ, book_KZ, *, seconds, rounds=20, epsilon=0.003, iterations=50) -> Walked:
    """List the groups of equal IDs, spread each over the last level as its own Sinkhorn batch, and list again.

    Source: LC-Rec (arXiv 2311.09049) and LETTER (2405.07314). A group does not see who else lives in its prefix, so a
    product may land on another's ID; a group of more than K products cannot be spread at all.
    """
    codes_NL, end = codes_NL.copy(), time.perf_counter() + seconds
    for turn in range(rounds):
        groups: dict[tuple, list[int]] = {}
        for row, docid in enumerate(map(tuple, codes_NL.tolist())):
            groups.setdefault(docid, []).append(row)
        groups = {docid: rows for docid, rows in groups.items() if len(rows) > 1}
        if not groups:
            return Walked(codes_NL, turn, True)
        for rows in groups.values():
            if time.perf_counter() > end:
                return Walked(codes_NL, turn, False)
            codes_NL[rows, -1] = balanced_codes(residual_NZ[rows], book_KZ, epsilon, iterations)
    return Walked(codes_NL, rounds, True)


def balanced_codes(residual_GZ, book_KZ, epsilon, iterations):
    """The likeliest code of each product in an entropic plan with equal mass on all codes.

    Distances are scaled to −1 … 1 inside the group, which is what an epsilon of 0.003 is made for. With equal mass on all
    K codes each of G products is spread over K / G of them, so that its likeliest code may be far from it.
    """
    distance_GK = ((residual_GZ[:, None].astype(np.float64) - book_KZ) ** 2).sum(axis=2)
    middle, half = (distance_GK.max() + distance_GK.min()) / 2, (distance_GK.max() - distance_GK.min()) / 2
    plan_GK = np.exp(-(distance_GK - middle) / (max(half, 1e-12) * epsilon))
    plan_GK /= plan_GK.sum()
    for _ in range(iterations):
        plan_GK /= np.maximum(plan_GK.sum(axis=0), 1e-300) * plan_GK.shape[1]
        plan_GK /= np.maximum(plan_GK.sum(axis=1, keepdims=True), 1e-300) * plan_GK.shape[0]
    return plan_GK.argmax(axis=1)


def nearest_free_code(codes_NL, residual_NZ, book_KZ, *, seconds) -> Walked:
    """The first product of an ID keeps it; each later one takes the nearest last code that is free, if there is one.

    Source: the collision tools of FORGE (arXiv 2509.20904) and TorchEasyRec, with room for one product an ID.
    """
    codes_NL, end = codes_NL.copy(), time.perf_counter() + seconds
    docids = list(map(tuple, codes_NL.tolist()))
    taken = set(docids)
    seen: set[tuple] = set()
    for row, docid in enumerate(docids):
        if docid not in seen:
            seen.add(docid)
            continue
        if time.perf_counter() > end:
            return Walked(codes_NL, 1, False)
        for code in ((residual_NZ[row] - book_KZ) ** 2).sum(axis=1).argsort().tolist():
            if (*docid[:-1], code) not in taken:
                taken.add((*docid[:-1], code))
                codes_NL[row, -1] = code
                break
    return Walked(codes_NL, 1, True)
