"""Recall at k, as the paper counts it: the share of a query's relevant products found in the first k, averaged.

It is not the hit rate: a query with 10 relevant products of which 1 was found counts 0.1. Independent of the number of
workers as long as each query is counted once.
"""

from collections.abc import Collection, Sequence

import numpy as np

from catid2_ray.errors import InputError


def recalls(ranked: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], ks: Sequence[int]) -> np.ndarray:
    """float64 Q×len(ks), |relevant ∩ top k| / |relevant| per query; NaN in the rows of queries without any relevant.

    `ranked`: Q lists of product ids, best first, of any length; `relevant`: Q sets. The metric of CAT-ID²
    (arXiv 2511.01461), independent of the order of the queries.
    Raises InputError for lists of different length, a product that is ranked twice, or a k below 1.
    """
    if len(ranked) != len(relevant):
        raise InputError(
            f"{len(ranked)} ranked lists for {len(relevant)} queries; give one list per query, in their order"
        )
    if not ks or min(ks) < 1:
        raise InputError(f"recall@k needs cut-offs of at least 1, found {list(ks)}")
    found_QK = np.full((len(ranked), len(ks)), np.nan)
    for row, (products, wanted) in enumerate(zip(ranked, relevant)):
        products = list(products)
        if len(set(products)) != len(products):
            twice = next(p for i, p in enumerate(products) if p in products[:i])
            raise InputError(f"query {row}: product {twice!r} is ranked twice; a list names every product at most once")
        if wanted:
            hits = np.cumsum([0, *(product in wanted for product in products[: max(ks)])])
            found_QK[row] = hits[np.minimum(ks, len(hits) - 1)] / len(wanted)
    return found_QK


def recall_at(
    ranked: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], ks: Sequence[int]
) -> dict[int, float]:
    """{k: recall@k}, `recalls` averaged over the queries that have at least one relevant product.

    Raises InputError as `recalls` does, and where no query has a relevant product.
    """
    found_QK = recalls(ranked, relevant, ks)
    counted = np.array([len(wanted) > 0 for wanted in relevant], bool)
    if not counted.any():
        raise InputError(f"none of the {len(relevant)} queries has a relevant product; recall is not defined")
    return {int(k): float(x) for k, x in zip(ks, found_QK[counted].mean(0))}
