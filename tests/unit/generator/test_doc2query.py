"""Synthetic queries by a tiny random T5 that the test saves: seeded, so many a title, and a clear refusal of no model."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from catid2_ray.errors import EncoderError
from catid2_ray.generator.inputs import Doc2Query
from catid2_ray.generator.vocabulary import train_tokenizer

TITLES = ["steel hinge 10 ft", "oak lamp", "brass door knob"]


def save_tiny_doc2query(folder):
    """A T5 with random weights that says any of a few words; its folder, as the recipe names it."""
    tokenizer = train_tokenizer(TITLES * 2, size=100)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_queries_are_drawn_by_the_seed_alone(tmp_path):
    model = Doc2Query(save_tiny_doc2query(tmp_path), output_tokens=5, batch=2)
    torch.manual_seed(1)
    made = model.queries(TITLES, count=3, seed=4)
    torch.manual_seed(2)
    assert len(made) == 9 and made == model.queries(TITLES, count=3, seed=4) != model.queries(TITLES, count=3, seed=5)
    assert len(set(made)) > 4 and all("<" not in text and text == text.strip() for text in made)
    assert model.queries([], count=3, seed=4) == []


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EncoderError, match=r"synthetic queries could be loaded from .*gone.*generator\.doc2query"):
        Doc2Query(str(tmp_path / "gone"))
