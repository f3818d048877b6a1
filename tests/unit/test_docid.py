"""ID geometry against its definition: packing by Python integers, text by hand, and every refusal.

Spaces are drawn at random, up to 16 levels and up to the last ID that fits an int64.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from catid2_ray.docid import LEVEL_LETTERS, DocidSpace
from catid2_ray.errors import InputError, RecipeError


def packed_slowly(codes, codes_per_level) -> int:
    packed = 0
    for code, k in zip(codes, codes_per_level, strict=True):
        packed = packed * k + code
    return packed


@st.composite
def spaces_with_codes(draw):
    codes_per_level = draw(st.lists(st.integers(1, 600), min_size=1, max_size=16))
    assume(np.prod([float(k) for k in codes_per_level]) < 2.0**62)
    row = st.tuples(*(st.integers(0, k - 1) for k in codes_per_level))
    return DocidSpace(tuple(codes_per_level)), draw(st.lists(row, min_size=1, max_size=8))


@settings(max_examples=60, deadline=None)
@given(spaces_with_codes())
def test_packing_is_mixed_radix_and_reversible(drawn):
    space, rows = drawn
    codes_NL = np.array(rows)
    packed_N = space.pack(codes_NL)
    assert packed_N.dtype == np.int64
    assert packed_N.tolist() == [packed_slowly(row, space.codes_per_level) for row in rows]
    assert (space.unpack(packed_N) == codes_NL).all()
    assert np.argsort(packed_N, kind="stable").tolist() == sorted(range(len(rows)), key=lambda i: rows[i])


@settings(max_examples=60, deadline=None)
@given(spaces_with_codes())
def test_a_prefix_is_the_packing_of_the_first_codes(drawn):
    space, rows = drawn
    packed_N = space.pack(np.array(rows))
    assert space.prefix_of(packed_N, 0).tolist() == [0] * len(rows)
    for length in range(1, space.levels + 1):
        shorter = space.codes_per_level[:length]
        assert space.prefix_of(packed_N, length).tolist() == [packed_slowly(row[:length], shorter) for row in rows]


@settings(max_examples=40, deadline=None)
@given(spaces_with_codes())
def test_text_and_parse_are_inverse(drawn):
    space, rows = drawn
    for row in rows:
        assert space.parse(space.text(row)) == row
        assert space.text(np.array(row)) == "".join(f"<{LEVEL_LETTERS[i]}_{code}>" for i, code in enumerate(row))


def test_the_papers_example():
    space = DocidSpace((256, 256, 256, 256))
    assert space.text([65, 225, 205, 19]) == "<a_65><b_225><c_205><d_19>"
    assert space.levels == 4 and space.capacity == 256**4
    assert space.radix_L.tolist() == [256**3, 256**2, 256, 1]


def test_tokens_are_one_per_level_and_code():
    assert DocidSpace((2, 3)).tokens() == ["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"]
    tokens = DocidSpace((256,) * 4).tokens()
    assert len(set(tokens)) == 1024 and tokens[256] == "<b_0>" and tokens[-1] == "<d_255>"


@pytest.mark.parametrize(
    "text",
    [
        "", "<a_1><b_1>", "<a_1><b_1><c_1><d_1>", "<b_1><a_1><c_1>", "<a_1><a_1><c_1>", "<a_1> <b_1><c_1>", "<a_1><b_1><c_1>x",
        "<a_01><b_1><c_1>", "<a_-1><b_1><c_1>", "<a_1><b_1><c_x>", "<a_١><b_1><c_1>", "hinge", "<a_1>" * 17,
    ],
)  # fmt: skip
def test_text_that_is_no_id_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="is not an ID of 3 levels such as '<a_0><b_0><c_0>'"):
        DocidSpace((4, 4, 4)).parse(text)


@pytest.mark.parametrize("code", ["4", "99999999999999999999999"])
def test_a_code_past_the_level_is_refused(code):
    with pytest.raises(InputError):
        DocidSpace((4, 4)).parse(f"<a_0><b_{code}>")


@pytest.mark.parametrize(
    "codes, message",
    [
        ([[0, 0], [0, 3]], "row 1: code 3 at level 1 is outside 0…2"),
        ([[-1, 0]], "row 0: code -1 at level 0 is outside 0…1"),
        ([[0, 0, 0]], r"codes must be an integer array N×2, found int64 of shape \(1, 3\)"),
        ([0, 0], r"of shape \(2,\)"),
        ([[0.0, 1.0]], "found float64"),
        ([[True, False]], "found bool"),
        (np.array([[2**64 - 1, 0]], dtype=np.uint64), "row 0: .* at level 0 is outside 0…1"),
    ],
)
def test_codes_outside_the_space_are_named(codes, message):
    with pytest.raises(InputError, match=message):
        DocidSpace((2, 3)).pack(np.asarray(codes))


def test_no_rows_are_fine():
    space = DocidSpace((2, 3))
    assert space.pack(np.zeros((0, 2), np.int32)).shape == (0,)
    assert space.unpack(np.zeros(0, np.int64)).shape == (0, 2)


def test_narrow_integers_do_not_overflow():
    space = DocidSpace((256,) * 4)
    assert space.pack(np.full((1, 4), 255, np.uint8)).tolist() == [256**4 - 1]


@pytest.mark.parametrize("levels", [(), (2,) * 17])
def test_levels_are_1_to_16(levels):
    with pytest.raises(RecipeError, match=f"an ID has 1 to 16 levels, not {len(levels)}"):
        DocidSpace(levels)


def test_every_level_has_codes():
    with pytest.raises(RecipeError, match=r"every level needs at least one code, found \(4, 0\)"):
        DocidSpace((4, 0))


def test_ids_fit_an_int64():
    largest = DocidSpace((7, 7, 73, 127, 337, 92737, 649657))
    assert largest.capacity == 2**63 - 1
    last = np.array([[k - 1 for k in largest.codes_per_level]])
    assert largest.pack(last).tolist() == [2**63 - 2] and (largest.unpack(largest.pack(last)) == last).all()
    with pytest.raises(RecipeError, match=f"spans {2**63} IDs, more than an int64 can hold"):
        DocidSpace((2**31, 2**32))


def test_equal_spaces_are_equal():
    assert DocidSpace([2, np.int64(3)]) == DocidSpace((2, 3)) and hash(DocidSpace((2, 3))) == hash(DocidSpace([2, 3]))
