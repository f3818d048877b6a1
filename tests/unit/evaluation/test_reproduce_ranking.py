"""Ranked lists of equal length, ties by product, and what is chosen on validation: against loops that see one product at a time."""

from types import SimpleNamespace

import numpy as np
import pytest

from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.reproduce.ranking import (
    WEIGHT_GRID,
    Asked,
    best_of,
    blanks,
    clusters_scored,
    dense_scores,
    fused_scores,
    lexical_scores,
    ranked_by,
    recall_by_rank,
    top,
    tune_bm25,
    tune_clusters,
    tune_weight,
)

TITLES = ["steel hinge", "brass hinge hinge", "oak door", "折りたたみ傘 黒", "steel pipe steel"]
IDS = [f"p{i}" for i in range(len(TITLES))]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_come_first_and_ties_by_their_row(seed):
    rng = np.random.default_rng(seed)
    score_QN = rng.integers(0, 6, (5, 40)).astype(np.float32)
    expected = [sorted(range(40), key=lambda row: (-score_N[row], row))[:7] for score_N in score_QN]
    assert top(score_QN, 7).tolist() == expected
    above = [[row for row in sorted(range(40), key=lambda row: (-s[row], row)) if s[row] > 4][:7] for s in score_QN]
    assert [[row for row in rows if row >= 0] for rows in top(score_QN, 7, above=4.0).tolist()] == above


@pytest.mark.parametrize("seed", range(4))
def test_recall_by_counting_is_that_of_the_ranked_list(seed):
    rng = np.random.default_rng(seed)
    score_QN = rng.integers(0, 5, (6, 30)).astype(np.float32)
    relevant = [rng.choice(30, 4, replace=False) for _ in range(6)]
    expected = [len(set(rows[:8]) & set(wanted)) / 4 for rows, wanted in zip(top(score_QN, 8).tolist(), relevant)]
    assert recall_by_rank(score_QN, relevant, 8) == pytest.approx(expected)


def test_blocks_of_queries_change_nothing():
    rng = np.random.default_rng(1)
    query_QD, product_ND = rng.standard_normal((70, 8)), rng.standard_normal((200, 8))
    scores = dense_scores(query_QD, product_ND)
    rows_QC, milliseconds = ranked_by(scores, 70)
    assert (rows_QC == top(scores(0, 70))).all() and milliseconds > 0


def test_bm25_is_tuned_by_what_validation_finds_and_keeps_the_default_on_a_tie():
    asked = Asked(["steel", "hinge"], [np.array([0]), np.array([0])])
    index, chosen = tune_bm25(lambda k1, b: Bm25(IDS, TITLES, k1=k1, b=b), asked)
    assert (chosen["k1"], chosen["b"]) == (1.2, 0.75) and chosen["validation_recall"] == 1.0, (
        "all find everything at 50"
    )
    assert index.product_ids == IDS
    third = Asked(["steel"], [np.array([0, 100, 200])])  # a share that four digits do not hold
    _, chosen = tune_bm25(lambda k1, b: SimpleNamespace(scores=lambda text: np.array([1.0] + [0.0] * 300)), third)
    assert (chosen["k1"], chosen["b"], chosen["validation_recall"]) == (1.2, 0.75, 0.3333)


def test_the_weight_of_a_fusion_is_the_one_that_finds_most():
    """60 products: the vectors put the relevant one behind, and words bring it to the front from a weight on."""
    dense_QN = np.linspace(1, 0, 60, dtype=np.float32)[None]
    lexical_QN = np.zeros((1, 60), np.float32)
    lexical_QN[0, 59] = 10.0
    asked = Asked(["x"], [np.array([59])])
    chosen = tune_weight(lambda a, b: lexical_QN[a:b], lambda a, b: dense_QN[a:b], asked)
    found = [recall_by_rank(dense_QN + weight * lexical_QN, asked.relevant)[0] for weight in WEIGHT_GRID]
    assert chosen == {"weight": WEIGHT_GRID[int(np.argmax(found))], "validation_recall": 1.0} and chosen["weight"] > 0
    fused = fused_scores(lambda a, b: lexical_QN[a:b], lambda a, b: dense_QN[a:b], chosen["weight"])(0, 1)
    assert fused == pytest.approx(dense_QN + np.float32(chosen["weight"]) * lexical_QN)


def test_words_between_blanks_find_no_japanese_and_pairs_of_letters_do():
    ours, theirs = Bm25(IDS, TITLES), Bm25(IDS, TITLES, words=blanks)
    assert ours.retrieve(["折りたたみ傘"], k=5) == theirs.retrieve(["折りたたみ傘"], k=5) == [["p3"]]
    assert ours.retrieve(["折りたたみ"], k=5) == [["p3"]] and theirs.retrieve(["折りたたみ"], k=5) == [[]]
    assert (lexical_scores(theirs, ["steel"])(0, 1)[0] > 0).tolist() == [True, False, False, False, True]


def test_clusters_are_ranked_as_by_a_loop_and_chosen_by_what_they_find():
    rng = np.random.default_rng(5)
    order_N, product_ND, query_QD = rng.permutation(60), rng.standard_normal((60, 4)), rng.standard_normal((5, 4))
    edges = np.arange(0, 61, 6)
    ranges_QC2 = [np.stack([edges[:-1], edges[1:]], 1)[rng.permutation(10)[:8]] for _ in query_QD]
    logp_QC = -np.sort(rng.random((5, 8)).astype(np.float32))
    scored = list(clusters_scored(zip(ranges_QC2, logp_QC), query_QD, product_ND, order_N))
    for query, one in enumerate(scored):
        slow = {
            int(row): product_ND[row] @ query_QD[query] + 0.5 * logp_QC[query][place]
            for place, (first, last) in enumerate(ranges_QC2[query][:3])
            for row in order_N[first:last]
        }
        expected = sorted(slow, key=lambda row: (-slow[row], row))
        assert best_of(one, 3, 0.5, k=25).tolist() == expected + [-1] * 7
    # Only the fifth cluster holds what is wanted, so that four are too few; the weight makes no difference.
    relevant = [order_N[slice(*ranges_C2[4])] for ranges_C2 in ranges_QC2]
    assert tune_clusters(iter(scored), relevant) == {"clusters": 8, "weight": 0.0, "validation_recall": 1.0}
