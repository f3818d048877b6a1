"""Spans of descriptions against a slow maker: the beginning, then a window in each stretch; other products change nothing."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.inputs import SHORTEST, description_spans, span_places
from catid2_ray.generator.vocabulary import train_tokenizer, with_docid_tokens
from catid2_ray.hashing import uniform
from tests.oracles.examples import spans_of

WORDS = [
    "steel",
    "hinge",
    "door",
    "brass",
    "knob",
    "oak",
    "lamp",
    "10",
    "ft",
    "garden",
    "hose",
    "reel",
    "bath",
    "tap",
    "chrome",
]
TOKENIZER = with_docid_tokens(train_tokenizer([" ".join(WORDS)] * 3, size=300), DocidSpace((4, 4)))


@settings(max_examples=200, deadline=None)
@example(lengths=[4], tokens=1, windows=2, seed=2)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    tokens=st.integers(1, 12),
    windows=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_places_are_the_oracles(lengths, tokens, windows, seed):
    key_N = np.arange(len(lengths), dtype=np.uint64) * 7 + 3
    row_S, start_S = span_places(np.array(lengths), key_N, tokens=tokens, windows=windows, seed=seed)
    draws = [
        [float(uniform(key_N[[row]], seed, number)[0]) for number in range(windows)] for row in range(len(lengths))
    ]
    for row, length in enumerate(lengths):
        text = list(range(length))
        expected = spans_of(text, draws[row], size=tokens, shortest=SHORTEST)
        starts = start_S[row_S == row].tolist()
        assert [text[start : start + tokens] for start in starts] == expected
        assert len(set(starts)) == len(starts)
    assert (np.diff(row_S) >= 0).all()


def test_draws_are_uniform_and_change_with_key_seed_and_number():
    draw_N = uniform(np.arange(20_000), 1, 2)
    assert draw_N.min() >= 0 and draw_N.max() < 1
    assert np.abs(np.histogram(draw_N, 10, (0, 1))[0] / 2000 - 1).max() < 0.1
    assert not np.isclose(draw_N, uniform(np.arange(20_000), 2, 1)).any()


def test_spans_carry_the_words_and_marks_of_their_description():
    texts = [" ".join(WORDS), None, "oak", " ".join(WORDS[:5]), ""]
    key_N = np.array([11, 12, 13, 14, 15], np.uint64)
    spans = description_spans(TOKENIZER, texts, key_N, tokens=6, windows=2, length=8, seed=4)
    assert spans.too_short == 3 and spans.input_ids_ST.shape[1] == 8 and spans.input_ids_ST.dtype == np.int32
    assert spans.row_S.tolist() == [0, 0, 0, 3] + [3] * (len(spans.row_S) - 4)
    whole = TOKENIZER(texts[0], add_special_tokens=False)["input_ids"]
    for ids in spans.input_ids_ST[spans.row_S == 0]:
        assert ids[6] == 1 and ids[7] == 0
        assert any(whole[start : start + 6] == ids[:6].tolist() for start in range(len(whole) - 5))
    assert spans.input_ids_ST[0, :6].tolist() == whole[:6]
    alone = description_spans(TOKENIZER, texts[3:4], key_N[3:4], tokens=6, windows=2, length=8, seed=4)
    assert np.array_equal(alone.input_ids_ST, spans.input_ids_ST[spans.row_S == 3])
    other = description_spans(TOKENIZER, texts, key_N, tokens=6, windows=2, length=8, seed=5)
    assert not np.array_equal(other.input_ids_ST, spans.input_ids_ST)


def test_no_text_gives_no_span_and_too_long_spans_are_refused():
    empty = description_spans(TOKENIZER, [None, ""], np.zeros(2, np.uint64), tokens=3, windows=2, length=6, seed=0)
    assert empty.input_ids_ST.shape == (0, 6) and empty.too_short == 2
    assert description_spans(TOKENIZER, [], np.zeros(0), tokens=3, windows=2, length=6, seed=0).too_short == 0
    with pytest.raises(InputError, match="spans of 6 tokens and 1 marks do not fit inputs of 6; lower span_tokens"):
        description_spans(TOKENIZER, ["a"], np.zeros(1), tokens=6, windows=0, length=6, seed=0)
