"""Slow, obvious versions of the adapter's loss and of the recall that it is judged by: plain loops in float64."""

import math

import numpy as np

from tests.oracles.quantizer import cosine


def loss(product_DD, query_DD, query_BD, product_BD, query_B, product_B) -> float:
    rows, total = range(len(query_BD)), 0.0
    for i in rows:
        similar = [20 * cosine(query_DD @ query_BD[i], product_DD @ product_BD[j]) for j in rows]
        others = [j for j in rows if query_B[j] != query_B[i] and product_B[j] != product_B[i]]
        total -= similar[i] - math.log(math.exp(similar[i]) + sum(math.exp(similar[j]) for j in others))
    identity = np.eye(len(product_DD))
    pull = ((query_DD - identity) ** 2).sum() + ((product_DD - identity) ** 2).sum()
    return total / len(query_BD) + 1e-2 * float(pull)


def recall(query_QD, product_ND, relevant: list[set[int]], *, cut: int) -> float:
    """`relevant`: per query the places of its products; no two products are equally near."""
    shares = []
    for query_D, wanted in zip(query_QD, relevant, strict=True):
        nearest = sorted(range(len(product_ND)), key=lambda n: -cosine(query_D, product_ND[n]))[:cut]
        shares.append(len(wanted & set(nearest)) / len(wanted))
    return sum(shares) / len(shares)
