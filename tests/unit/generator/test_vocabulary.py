"""What the trained vocabulary keeps of a product title, and where the ID tokens stand in it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, InputError, RecipeError
from catid2_ray.generator.vocabulary import load_tokenizer, starts_word, tokenize, train_tokenizer, with_docid_tokens
from catid2_ray.scripts import normalised

TITLES = [
    "Stainless Steel Hinge 3/4 in. x 10 ft.",
    "stainless steel bracket, 1,200 lb",
    "½ in. Copper Pipe 10ft",
    "Bisagra de acero inoxidable, puerta de baño",
] * 4
SPACE = DocidSpace((3, 2))


@pytest.fixture
def tokenizer():
    return train_tokenizer(TITLES, size=200)


def words(tokenizer, text):
    ids = np.array(tokenizer(text)["input_ids"])
    assert ids[-1] == 1
    return tokenizer.convert_tokens_to_ids("</s>") == 1 and tokenizer.decode(ids[:-1]).split()


_PLAIN = train_tokenizer(["oak shelf"], size=64)


def test_the_special_tokens_have_their_places_and_training_repeats(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 200
    assert train_tokenizer(iter(TITLES), size=200).get_vocab() == tokenizer.get_vocab()


def test_numbers_and_units_mean_the_same_however_they_are_written(tokenizer):
    assert tokenizer("10ft")["input_ids"] == tokenizer("10 ft.")["input_ids"] == tokenizer("10-FT")["input_ids"]
    assert tokenizer("½ in")["input_ids"] == tokenizer("1/2 IN")["input_ids"]
    assert tokenizer("1,200")["input_ids"] == tokenizer("1200")["input_ids"]
    assert words(tokenizer, "3/4 in. x 10ft, baño") == ["3/4", "in", "x", "10", "ft", "baño"]


def test_japanese_is_split_where_its_script_changes():
    tokenizer = train_tokenizer(["折りたたみ傘 メンズTシャツ 綿100% ラーメン らーめん 日々の靴"] * 4, size=200)
    text = "折りたたみ傘 Ｔシャツ 綿100% ラーメン らーめん 日々の靴"
    ids = np.array(tokenizer(text)["input_ids"])
    assert tokenizer.unk_token_id not in ids
    expected = ["折", "りたたみ", "傘", "t", "シャツ", "綿", "100", "%", "ラーメン", "らーめん", "日々", "の", "靴"]
    assert tokenizer.decode(ids[:-1]).split() == expected and starts_word(tokenizer)[ids].sum() == len(expected)


def test_a_very_long_word_is_cut_before_the_training():
    texts = [*TITLES, "x" * 100_000, "a" * 50_000 + " " + "ab" * 50_000]
    assert max(map(len, train_tokenizer(texts, size=2000).get_vocab())) <= 257


_ALPHABET = "abIıİ\u0307\u0301\u0308ß½1 ,™\u00ad\u200b\u200d\ufeff\u3164éÅＡｶﾞ한\u1112\u1161\u11abกำ़क\u2044ﬁ²\x00\n"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.one_of(st.sampled_from(_ALPHABET), st.characters(exclude_categories=["Cs"])), max_size=12))
def test_the_tokenizer_reads_texts_as_everybody_else_does(text):
    """Thousands of a number lose their commas on top of that."""
    read = _PLAIN.backend_tokenizer.normalizer.normalize_str(text)
    assert read.replace(",", "") == normalised(text).replace(",", "")


def test_id_tokens_are_the_last_entries_level_after_level(tokenizer):
    base = len(tokenizer)
    assert with_docid_tokens(tokenizer, SPACE) is tokenizer
    assert tokenizer.convert_tokens_to_ids(SPACE.tokens()) == list(range(base, base + 5))
    assert len(with_docid_tokens(tokenizer, SPACE)) == base + 5
    with pytest.raises(InputError, match="already holds 5 of the 7 ID tokens"):
        with_docid_tokens(tokenizer, DocidSpace((3, 4)))
    tokenizer.add_tokens(["later"])
    with pytest.raises(InputError, match="expected all of them as its last entries"):
        with_docid_tokens(tokenizer, SPACE)


def test_an_id_written_in_a_query_stays_plain_text(tokenizer):
    base = len(tokenizer)
    with_docid_tokens(tokenizer, SPACE)
    ids_NT = tokenize(tokenizer, ["<a_1> steel </s> hinge", ""], length=12)
    assert ids_NT.max() < base and (ids_NT == 1).sum(1).tolist() == [1, 1]
    assert ids_NT[1].tolist() == [1] + [0] * 11


def test_tokenize_cuts_and_pads(tokenizer):
    ids_NT = tokenize(tokenizer, ["stainless steel hinge stainless steel hinge", "x"], length=4)
    assert ids_NT.shape == (2, 4) and ids_NT.dtype == np.int32
    assert ids_NT[0, -1] == 1 and ids_NT[1, 1:].tolist() == [1, 0, 0]
    with pytest.raises(InputError, match="at least 2 tokens"):
        tokenize(tokenizer, ["x"], length=1)


def test_word_starts_are_known(tokenizer):
    starts_V = starts_word(tokenizer)
    assert starts_V.shape == (len(tokenizer),) and starts_V.dtype == bool
    ids = tokenizer("stainless xylophone 10ft")["input_ids"][:-1]
    assert starts_V[ids].sum() == 4 < len(ids)


def test_a_vocabulary_survives_saving(tokenizer, tmp_path):
    with_docid_tokens(tokenizer, SPACE).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    texts = ["Steel ½ in. <a_1>", "10ft"]
    assert np.array_equal(tokenize(again, texts, length=16), tokenize(tokenizer, texts, length=16))


def test_bad_input_is_refused_in_words(tmp_path):
    with pytest.raises(RecipeError, match="at least 64"):
        train_tokenizer(TITLES, size=10)
    with pytest.raises(InputError, match="no text to train"):
        train_tokenizer(["", "--"], size=100)
    with pytest.raises(EncoderError, match="no tokenizer could be loaded from .*absent"):
        load_tokenizer(tmp_path / "absent")
