"""Tuning a tiny BERT: it learns what it is taught, its loss knows false negatives, no negative was judged relevant."""

import numpy as np
import pytest
import torch
from transformers import T5Config, T5Model

from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.catalog.tuning import Taught, fine_tune, pairs_with_negatives, tuning_loss
from catid2_ray.errors import EncoderError, InputError
from tests.oracles.tuning import loss_by_hand
from tests.text_models import bert_tokenizer, save_bert

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
    assert history[-1]["loss"] < 0.7 < history[0]["loss"] and found(encoder) == [0, 1, 2, 3] != before
    again = HuggingFaceEncoder(save_bert(tmp_path), batch=4, tokens=16)
    assert fine_tune(again, taught, epochs=15, batch=4, learning_rate=3e-3, seed=0) == history
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_the_best_epoch_stays_and_the_start_where_none_is_better(encoder):
    taught, states = [Taught(query, text, None) for query, text in PAIRS], []

    def scored_as(scores: list[float]):
        states.clear()
        left = iter(scores)

        def score() -> float:
            states.append(encoder.encode(TEXTS))
            return next(left)

        return score

    settings = {"epochs": 3, "batch": 2, "learning_rate": 1e-3, "seed": 0}
    history = fine_tune(encoder, taught, **settings, score=scored_as([0.1, 0.2, 0.2, 0.1]))
    assert [record["score"] for record in history] == [0.1, 0.2, 0.2, 0.1]
    assert [record["epoch"] for record in history] == [0, 1, 2, 3] and "loss" not in history[0]
    np.testing.assert_array_equal(encoder.encode(TEXTS), states[1], err_msg="of equal epochs the earlier one")
    assert not np.array_equal(states[1], states[2])
    fine_tune(encoder, taught, **settings, score=scored_as([0.3, 0.3, 0.2, 0.1]))
    np.testing.assert_array_equal(encoder.encode(TEXTS), states[0], err_msg="what gains nothing leaves it untouched")


def test_the_loss_is_a_softmax_over_products_and_negatives_without_false_ones(encoder):
    batch = [
        Taught("steel", "brass pipe", "oak door"),
        Taught("steel", "copper table", None),
        Taught("oak", "steel hinge", "brass pipe"),  # a false negative of the first two
    ]
    with torch.no_grad():
        texts = [*(pair.query for pair in batch), *(pair.product for pair in batch), "oak door"]
        vector_of = dict(zip(texts, encoder.with_gradient(texts).numpy()))
    assert float(tuning_loss(encoder, batch).detach()) == pytest.approx(loss_by_hand(batch, vector_of), rel=1e-5)


def test_texts_that_are_trained_on_keep_their_order(encoder, monkeypatch):
    monkeypatch.setattr("catid2_ray.catalog.text._PIECE", 2)
    texts = ["oak 10 ft door hinge", "steel", "brass pipe", "copper", "oak table 10 ft", "steel"]
    np.testing.assert_allclose(encoder.with_gradient(texts).detach(), encoder.encode(texts), atol=1e-6)


def test_a_saved_encoder_is_the_same_and_no_pickle(encoder, tmp_path):
    fine_tune(
        encoder, [Taught(query, text, None) for query, text in PAIRS], epochs=1, batch=4, learning_rate=1e-3, seed=0
    )
    encoder.save(tmp_path / "tuned")
    names = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert "model.safetensors" in names and {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}
    again = HuggingFaceEncoder(tmp_path / "tuned", batch=4, tokens=16)
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_half_a_model_is_not_saved(tmp_path):
    config = T5Config(vocab_size=15, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(config).save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    encoder = HuggingFaceEncoder(tmp_path, batch=4, tokens=16)
    with pytest.raises(EncoderError, match="half of an encoder-decoder model .*encoder_mode to frozen"):
        encoder.save(tmp_path / "tuned")


def test_a_negative_is_what_bm25_finds_and_nobody_judged_relevant():
    pairs = [("a", 0), ("a", 1), ("b", 2)]
    lists = {"a": [0, 1, 3], "b": [2]}
    taught = pairs_with_negatives(pairs, ["t0", "t1", "t2", "t3"], lists.get, seed=0)
    assert taught == [Taught("a", "t0", "t3"), Taught("a", "t1", "t3"), Taught("b", "t2", None)]
    assert len(pairs_with_negatives(pairs, ["t0", "t1", "t2", "t3"], lists.get, seed=0, most=2)) == 2


def test_nothing_to_learn_from_is_said(encoder):
    with pytest.raises(InputError, match="tuned by pairs of query and product, found none"):
        fine_tune(encoder, [], epochs=1, batch=2, learning_rate=1e-3, seed=0)
