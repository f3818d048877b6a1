"""DPR's loss one pair and one product at a time."""

import math

from catid2_ray.catalog.tuning import Taught


def loss_by_hand(batch: list[Taught], vector_of: dict) -> float:
    """The mean over pairs of −log of the pair's share among all products and negatives of the batch; those that the batch pairs
    with the same query do not count, the pair's own product aside. `vector_of`: text → vector of length 1."""
    relevant = {(pair.query, pair.product) for pair in batch}
    offered = [pair.product for pair in batch] + [pair.negative for pair in batch if pair.negative is not None]
    losses = []
    for place, pair in enumerate(batch):
        own, total = 0.0, 0.0
        for number, text in enumerate(offered):
            share = math.exp(20 * float(vector_of[pair.query] @ vector_of[text]))
            if number == place:
                own = share
            if number == place or (pair.query, text) not in relevant:
                total += share
        losses.append(-math.log(own / total))
    return sum(losses) / len(losses)
