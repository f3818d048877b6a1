"""DPR on a tiny BERT: it learns what it is taught, its loss knows false negatives, no negative was judged relevant."""

import numpy as np
import pytest
import torch

from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.errors import InputError
from catid2_ray.evaluation.baselines.dpr import SCALE, Taught, fine_tune, loss_of, pairs_with_negatives
from tests.text_models import save_bert

PAIRS = [("steel", "brass pipe"), ("oak", "copper table"), ("door", "steel hinge"), ("table", "oak 10 ft")]
TEXTS = [text for _, text in PAIRS]


@pytest.fixture
def encoder(tmp_path):
    return HuggingFaceEncoder(save_bert(tmp_path), batch=4, tokens=16)


def found(encoder) -> list[int]:
    score_QN = encoder.encode([query for query, _ in PAIRS]) @ encoder.encode(TEXTS).T
    return [int(row) for row in score_QN.argmax(1)]


def test_it_learns_what_it_is_taught_and_repeats_itself(encoder, tmp_path):
    taught = [Taught(query, text, "copper pipe") for query, text in PAIRS]
    before = found(encoder)
    history = fine_tune(encoder, taught, epochs=15, batch=4, learning_rate=3e-3, seed=0)
    assert history[-1] < 0.7 < history[0] and found(encoder) == [0, 1, 2, 3] != before
    again = HuggingFaceEncoder(save_bert(tmp_path), batch=4, tokens=16)
    assert fine_tune(again, taught, epochs=15, batch=4, learning_rate=3e-3, seed=0) == history


def test_the_loss_is_a_softmax_over_products_and_negatives_without_false_ones(encoder):
    batch = [
        Taught("steel", "brass pipe", "oak door"),
        Taught("steel", "copper table", None),
        Taught("oak", "steel hinge", "brass pipe"),
    ]
    keys = ["brass pipe", "copper table", "steel hinge", "oak door", "brass pipe"]
    with torch.no_grad():
        query_BD = encoder.with_gradient([pair.query for pair in batch])
        score_BM = SCALE * query_BD @ encoder.with_gradient(keys).T
    # The other product of "steel" is a false negative, and so is its own text where it stands as the negative of another.
    left_out = {0: {1, 4}, 1: {0, 4}, 2: set()}
    expected = 0.0
    for row, masked in left_out.items():
        kept = [float(score_BM[row, place]) for place in range(5) if place not in masked]
        expected += np.log(np.exp(kept).sum()) - float(score_BM[row, row])
    assert float(loss_of(encoder, batch).detach()) == pytest.approx(expected / 3, rel=1e-5)


def test_a_negative_is_what_bm25_finds_and_nobody_judged_relevant():
    pairs = [("a", 0), ("a", 1), ("b", 2)]
    lists = {"a": [0, 1, 3], "b": [2]}
    taught = pairs_with_negatives(pairs, ["t0", "t1", "t2", "t3"], lists.get, seed=0)
    assert taught == [Taught("a", "t0", "t3"), Taught("a", "t1", "t3"), Taught("b", "t2", None)]
    assert len(pairs_with_negatives(pairs, ["t0", "t1", "t2", "t3"], lists.get, seed=0, most=2)) == 2


def test_nothing_to_learn_from_is_said(encoder):
    with pytest.raises(InputError, match="DPR learns from pairs"):
        fine_tune(encoder, [], epochs=1, batch=2, learning_rate=1e-3, seed=0)
