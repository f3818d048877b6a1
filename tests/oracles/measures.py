"""Hit rate, MRR, nDCG and Holm's correction by the letter of their definitions, one query and one rank at a time."""

import math


def hit(ranked, relevant, k):
    return 1.0 if any(product in relevant for product in ranked[:k]) else 0.0


def mrr(ranked, relevant, last):
    for rank in range(1, min(last, len(ranked)) + 1):
        if ranked[rank - 1] in relevant:
            return 1 / rank
    return 0.0


def ndcg(ranked, gains, k):
    def dcg(values):
        total = 0.0
        for place in range(min(k, len(values))):
            total += values[place] / math.log2(place + 2)
        return total

    found = [gains.get(product, 0.0) for product in ranked]
    return dcg(found) / dcg(sorted(gains.values(), reverse=True))


def id_recall(ids, relevant, docid_of, k):
    """Each distinct ID counts once."""
    wanted = {docid_of[product] for product in relevant}
    return len(wanted & set(ids[:k])) / len(wanted)


def beam(ids, relevant, docid_of, width):
    """Whether one of the products of the first IDs is relevant, and how many products these are."""
    held = [product for product, docid in docid_of.items() if docid in ids[:width]]
    return float(any(product in relevant for product in held)), len(held)


def expected_recall(ids, relevant, docid_of, k, rng, draws=400):
    """Mean over orders that shuffle the products of each ID."""
    found = 0
    for _ in range(draws):
        ranked = []
        for docid in ids:
            products = [product for product, own in docid_of.items() if own == docid]
            ranked += rng.permutation(products).tolist()
        found += len(set(ranked[:k]) & relevant)
    return found / draws / len(relevant)


def holm_rejects(p_values, level):
    """Step down: the smallest p against level/m, the next against level/(m − 1), … until one fails."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for rank, place in enumerate(order):
        if p_values[place] > level / (len(p_values) - rank):
            break
        rejected[place] = True
    return rejected
