"""What a ranking is worth, query by query: the paper's recall, hit rate, MRR and nDCG; of products and of IDs; groups of queries.

All methods return the same number of products. A product is counted once, in the rank of a list without ties: methods break
ties by product_id, and an ID that products share takes as many ranks as it has products. Recall of *IDs* counts a shared ID as
one rank and one hit, as papers do that score IDs; beside recall of products it shows how much of a figure is sharing.

Q queries, K cut-offs, M beams, C a ranked list's length.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from catid2_ray.errors import InputError
from catid2_ray.evaluation.metrics import recalls
from catid2_ray.scripts import words_of

KS = (5, 10, 20, 50, 100)
NDCG_AT = 10
BEAMS = (1, 10, 100)
# By the paper's priority (4.7). It anonymises the rules themselves, so these are ours, and need no log.
QUERY_GROUPS = ("ambiguous", "precise_1", "precise_2", "long_tail")
GROUP_RULES = {
    "ambiguous": "one word, or none",
    "precise_1": "more words, one with a digit",
    "precise_2": "no digit, and some title holds all its words",
    "long_tail": "the rest: no title holds all its words",
}


def measured(
    ranked: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], gains: Sequence[Mapping[str, float]],
    ks: Sequence[int] = KS,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Measure → float64 Q×K for recall and hit, Q for mrr and ndcg; NaN for queries without a relevant product, or gain.

    `relevant`: sets of products. `gains`: of each judged product its gain, 0 or more; what is not judged has none.
    recall@k = |relevant ∩ first k| / |relevant|; hit@k: whether any is among them; mrr: 1 / the first relevant one's rank within
    the last cut-off, 0 beyond; ndcg at 10 by linear gains over log2(rank + 1), the ideal over all judged products (Järvelin and
    Kekäläinen 2002, as trec_eval has it). Raises InputError as `metrics.recalls` does.
    """
    recall_QK = recalls(ranked, relevant, ks)
    hit_QK = np.where(np.isnan(recall_QK), np.nan, (recall_QK > 0).astype(float))
    mrr_Q, ndcg_Q = np.full(len(ranked), np.nan), np.full(len(ranked), np.nan)
    discount_C = 1 / np.log2(np.arange(NDCG_AT) + 2)
    for row, (products, wanted, gain) in enumerate(zip(ranked, relevant, gains)):
        if wanted:
            first = next((rank for rank, product in enumerate(products[: max(ks)], 1) if product in wanted), None)
            mrr_Q[row] = 1 / first if first else 0.0
        ideal = sorted(gain.values(), reverse=True)[:NDCG_AT]
        if any(ideal):
            of_rank = np.array([gain.get(product, 0.0) for product in products[:NDCG_AT]])
            ndcg_Q[row] = (of_rank * discount_C[: len(of_rank)]).sum() / (ideal * discount_C[: len(ideal)]).sum()
    return {"recall": recall_QK, "hit": hit_QK, "mrr": mrr_Q, "ndcg": ndcg_Q}


def id_recalls(
    ids: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], docid_of: Mapping[str, str],
    ks: Sequence[int] = KS,
) -> np.ndarray:  # fmt: skip
    """float64 Q×K: recall of the IDs of the relevant products among the first k IDs, each counted once. `ids`: Q ranked lists."""
    return recalls(ids, [{docid_of[product] for product in wanted} for wanted in relevant], ks)


def of_beams(
    ids: Sequence[Sequence[str]], relevant: Sequence[Collection[str]], docid_of: Mapping[str, str], *,
    beams: Sequence[int] = BEAMS, ks: Sequence[int] = KS,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`beam_hit` Q×M: whether a relevant product is among the first IDs, whatever else they hold; `beam_products` Q×M: how many
    products they hold; `expected` Q×K: expected recall of products at equal products. NaN for queries without a relevant product.
    `ids`: Q ranked lists; `docid_of`: product → ID.

    At an equal beam (CQ-SID, arXiv 2605.14434) larger clusters find more because they hold more. Products of an ID have no order of
    their own: where the cut falls inside, each is exposed with the chance of a random order, and the expected recall is the mean
    of these chances. For IDs of one product it is the recall."""
    size_of = Counter(docid_of.values())
    hit_QM, products_QM = np.full((2, len(ids), len(beams)), np.nan)
    expected_QK = np.full((len(ids), len(ks)), np.nan)
    for query, (listed, wanted) in enumerate(zip(ids, relevant)):
        if not wanted:
            continue
        end_C = np.cumsum([size_of[docid] for docid in listed])
        place_of = {docid: place for place, docid in enumerate(listed)}
        places = [place_of[docid_of[product]] for product in wanted if docid_of[product] in place_of]
        for column, beam in enumerate(beams):
            hit_QM[query, column] = any(place < beam for place in places)
            products_QM[query, column] = end_C[:beam][-1] if listed else 0
        chance_K = np.zeros(len(ks))
        for place in places:
            size = size_of[listed[place]]
            chance_K += np.clip((np.array(ks) - (end_C[place] - size)) / size, 0, 1)
        expected_QK[query] = chance_K / len(wanted)
    return {"beam_hit": hit_QM, "beam_products": products_QM, "expected": expected_QK}


def query_groups(queries: Sequence[str], titles: Sequence[str]) -> list[str]:
    """Of each query its group of QUERY_GROUPS, the first of GROUP_RULES that holds."""
    holding: dict[str, set[int]] = {}
    for row, title in enumerate(titles):
        for word in set(words_of(title, indexed=True, single=True)):
            holding.setdefault(word, set()).add(row)
    groups = []
    for query in queries:
        words = set(words_of(query, single=True))
        rows = sorted((holding.get(word, set()) for word in words), key=len)
        if len(words) < 2:
            groups.append("ambiguous")
        elif re.search(r"\d", query):
            groups.append("precise_1")
        else:
            groups.append("precise_2" if set.intersection(*rows) else "long_tail")
    return groups


def mean_of(values, rows=slice(None)) -> list[float | None]:
    """The means of the columns over these queries, NaN left out; None where none is left. `values`: Q or Q×K."""
    chosen = np.asarray(values, float)[rows]
    chosen = chosen[:, None] if chosen.ndim == 1 else chosen
    return [float(np.nanmean(column)) if np.isfinite(column).any() else None for column in chosen.T]


def gains_of(relevance: Sequence[float], lowest: float) -> np.ndarray:
    """The gain of each judgement: how far it is above the `lowest` grade of the table, which says irrelevant."""
    gain = np.asarray(relevance, float) - lowest
    if (gain < 0).any():
        raise InputError(f"a judgement of {min(relevance)} is below the lowest grade {lowest}")
    return gain
