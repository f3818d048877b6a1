"""A user before the query: attributes, the latest IDs as ID tokens, the query, against a slow writer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.plain_t5 import PlainTokenizer
from catid2_ray.generator.users import user_width, with_users
from catid2_ray.generator.vocabulary import tokenize, tokenize_cut, train_tokenizer, with_docid_tokens
from tests.oracles.examples import user_tokens

SPACE = DocidSpace((4, 3))
PLAIN = train_tokenizer(["steel hinge female age 20 29 oak lamp"] * 3, size=200)
TOKENIZER = with_docid_tokens(train_tokenizer(["steel hinge female age 20 29 oak lamp"] * 3, size=200), SPACE)
BASE = len(TOKENIZER) - 7
QUERIES, USERS = ["steel hinge", "lamp", "oak lamp steel hinge oak lamp"], ["", "female", "female age 20 29"]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(QUERIES), st.sampled_from(USERS),
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=5),
        ),
        min_size=1, max_size=4,
    ),
    recent=st.integers(0, 3),
    attribute_tokens=st.integers(1, 5),
)  # fmt: skip
def test_lines_are_the_oracles(rows, recent, attribute_tokens):
    query_BQ = tokenize(TOKENIZER, [query for query, _, _ in rows], length=8)
    row_R = np.repeat(np.arange(len(rows)), [len(codes) for _, _, codes in rows])
    codes_RL = np.array([code for _, _, codes in rows for code in codes], np.int64).reshape(-1, 2)
    made = with_users(
        TOKENIZER, query_BQ, [user for _, user, _ in rows], row_R, codes_RL, space=SPACE, attribute_tokens=attribute_tokens,
        recent=recent,
    )  # fmt: skip
    found_BW = made.input_ids_NT
    assert made.cut_N.tolist() == [
        len(TOKENIZER(user, add_special_tokens=False)["input_ids"]) > attribute_tokens for _, user, _ in rows
    ]
    assert found_BW.shape[1] == user_width(8, attribute_tokens=attribute_tokens, recent=recent, levels=2)
    for found, query, (_, user, codes) in zip(found_BW, query_BQ, rows):
        words = TOKENIZER(user, add_special_tokens=False)["input_ids"]
        line = user_tokens(
            [token for token in query.tolist() if token], words, codes, base=BASE, codes_per_level=(4, 3),
            attribute_tokens=attribute_tokens, most=recent,
        )  # fmt: skip
        assert found[: len(line)].tolist() == line and not found[len(line) :].any()


def test_a_tokenizer_without_id_tokens_cannot_name_products_but_attributes():
    query_BQ = tokenize(PLAIN, ["lamp"], length=6)
    none, no_codes = np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
    with pytest.raises(InputError, match="recent products need a model that reads ID tokens; set user_recent to 0"):
        with_users(PLAIN, query_BQ, ["female"], none, no_codes, space=SPACE, attribute_tokens=4, recent=1)
    line = with_users(
        PLAIN, query_BQ, ["female"], none, no_codes, space=SPACE, attribute_tokens=4, recent=0
    ).input_ids_NT
    assert PLAIN.decode(line[0], skip_special_tokens=True) == "female lamp"


def test_texts_that_are_cut_are_told_from_those_that_just_fit():
    texts = ["steel", "steel hinge oak", "steel hinge oak lamp", "steel hinge oak lamp 20", ""]
    whole = [len(ids) for ids in TOKENIZER(texts)["input_ids"]]
    for length in sorted({*whole, 3}):
        if length < 2:
            continue
        found = tokenize_cut(TOKENIZER, texts, length=length)
        assert np.array_equal(found.input_ids_NT, tokenize(TOKENIZER, texts, length=length))
        assert found.cut_N.tolist() == [size > length for size in whole]


def test_the_plain_tokenizer_of_a_search_makes_the_same_lines(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    plain = PlainTokenizer(tmp_path)
    row_R, codes_RL = np.array([0, 0, 2]), np.array([[1, 2], [3, 0], [0, 1]])
    lines = [
        with_users(
            tokenizer, tokenize(tokenizer, QUERIES, length=8), ["female </s> <a_1>", "", "age 20 29 oak lamp steel"],
            row_R, codes_RL, space=SPACE, attribute_tokens=4, recent=2,
        )
        for tokenizer in (TOKENIZER, plain)
    ]  # fmt: skip
    assert np.array_equal(lines[0].input_ids_NT, lines[1].input_ids_NT)
    assert lines[0].cut_N.tolist() == lines[1].cut_N.tolist()
