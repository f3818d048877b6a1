"""Recall while training, on results made by hand: where an ID that products share lies across the cut. No cluster."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from catid2_ray.config import GeneratorRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.generator.model import small_t5
from catid2_ray.on_ray.stages.train_generator import queries_to_validate
from catid2_ray.on_ray.stages.validation import CUT, found, mean_recall
from catid2_ray.retrieval.beam import BeamResult, constrained_beam_search
from catid2_ray.retrieval.trie import Trie

CODES = (4, 8)


def result(*queries: list[tuple[tuple[int, int], int]]) -> BeamResult:
    """Of each query the IDs found, best first, with how many products have each."""
    widest = max(map(len, queries))
    docid_BKL, range_BK2 = np.full((len(queries), widest, 2), -1), np.zeros((len(queries), widest, 2), np.int64)
    for row, found_of in enumerate(queries):
        for place, (codes, products) in enumerate(found_of):
            docid_BKL[row, place], range_BK2[row, place] = codes, (100 * place, 100 * place + products)
    count_B = np.array([len(found_of) for found_of in queries])
    return BeamResult(*map(torch.from_numpy, (docid_BKL, range_BK2, np.zeros((len(queries), widest)), count_B)))


def test_products_of_one_id_share_the_ranks_that_are_left_before_the_cut():
    answer = result([((0, 1), CUT - 10), ((2, 3), 40), ((1, 1), 1)], [((2, 3), 1), ((3, 7), 1)])
    query_P = np.array([0, 0, 0, 0, 1, 1])
    asked = np.array([(0, 1), (2, 3), (1, 1), (3, 7), (2, 3), (0, 1)])
    found_P = found(answer, CODES, query_P, DocidSpace(CODES).pack(asked))
    assert found_P.tolist() == pytest.approx([1, 10 / 40, 0, 0, 1, 0])
    assert mean_recall(found_P, query_P) == pytest.approx((1.25 / 4 + 1 / 2) / 2)


def test_a_model_in_bf16_is_searched_as_the_recipes_for_gpus_ask():
    codes_NL = np.stack(np.unravel_index(np.arange(0, 32, 2), CODES), 1)
    trie = Trie.build(codes_NL, codes_per_level=CODES)
    model = small_t5(
        vocabulary=20, width=16, layers=1, heads=2, feed_forward=24, dropout=0.0, codes_per_level=CODES
    ).eval()  # fmt: skip
    ids_BT = np.array([[4, 5, 1], [6, 1, 0]])
    found_in = [
        constrained_beam_search(model.to(kind), trie, ids_BT, ids_BT != 0, beam_width=CUT, top_k=CUT)
        for kind in (torch.float32, torch.bfloat16)
    ]
    assert all(answer.count_B.tolist() == [16, 16] for answer in found_in), "every ID of the catalogue"
    np.testing.assert_allclose(found_in[1].logp_BK, found_in[0].logp_BK, atol=0.1)


def test_unique_ids_count_whole():
    answer = result([((code // 8, code % 8), 1) for code in range(32)])
    asked = np.array([(0, 0), (3, 7)])
    assert found(answer, CODES, np.zeros(2, int), DocidSpace(CODES).pack(asked)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("stated", "split", "expected"),
    [
        (None, {"queries": 80, "pairs": 200, "relevance_max": 3.0}, 300),
        (None, {"queries": 49, "pairs": 200, "relevance_max": 3.0}, 0),
        (None, {"queries": 80, "pairs": 200, "relevance_max": 1.0}, 0),
        (None, {"queries": 0, "pairs": 0, "relevance_max": None}, 0),
        (None, None, 0),
        (0, {"queries": 80, "pairs": 200, "relevance_max": 3.0}, 0),
        (7, None, 7),
    ],
)
def test_recall_chooses_the_epoch_where_enough_queries_can_judge(stated, split, expected):
    pairs = SimpleNamespace(metrics={"splits": split and {"validation": split}})
    recipe = GeneratorRecipe(validate_queries=stated)
    assert queries_to_validate(recipe, pairs, relevant_from=2.67) == expected
