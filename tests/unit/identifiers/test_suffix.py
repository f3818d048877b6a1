"""Ordinal suffixes against a dictionary of sorted lists, in any order of rows; unique IDs; the exact errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.identifiers.suffixes import ordinal_suffix
from tests.oracles import suffix as oracle

PRIORITIES = st.sampled_from([0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan")])


@st.composite
def catalogues(draw):
    ids = draw(st.lists(st.text("abé0_", min_size=1, max_size=4), unique=True, max_size=30))
    prefixes = draw(st.lists(st.integers(-2, 3), min_size=len(ids), max_size=len(ids)))
    priorities = draw(st.none() | st.lists(PRIORITIES, min_size=len(ids), max_size=len(ids)))
    return ids, np.array(prefixes, dtype=np.int64), priorities, draw(st.none() | st.integers(2, 11))


@settings(max_examples=200, deadline=None)
@given(case=catalogues(), seed=st.integers(0, 2**32 - 1))
def test_equals_oracle_in_any_order_and_is_unique(case, seed):
    ids, prefix_N, priorities, base = case
    tokens, codes = oracle.ordinal_suffix(prefix_N, ids, priorities, base)
    order = np.random.default_rng(seed).permutation(len(ids))
    shuffled = None if priorities is None else np.array(priorities)[order]
    found = ordinal_suffix(prefix_N[order], [ids[row] for row in order], priority_N=shuffled, base=base)
    assert found.codes_NS.dtype == np.int64
    assert found.codes_per_level == tuple(codes)
    assert found.codes_NS.tolist() == [tokens[ids[row]] for row in order]
    whole = {(int(prefix), *row) for prefix, row in zip(prefix_N[order], found.codes_NS.tolist(), strict=True)}
    assert len(whole) == len(ids)
    DocidSpace(found.codes_per_level).check(found.codes_NS)


def test_naive_ids_are_decimal_digits_in_product_order():
    ids = [f"p{number:03d}" for number in range(101)]
    found = ordinal_suffix(np.zeros(101, dtype=np.int64), ids[::-1], base=10)
    assert found.codes_per_level == (10, 10, 10)
    assert found.codes_NS[0].tolist() == [1, 0, 0]
    assert found.codes_NS[58].tolist() == [0, 4, 2]


def test_different_prefixes_need_one_code():
    found = ordinal_suffix(np.arange(3), ["a", "b", "c"])
    assert found.codes_per_level == (1,)
    assert found.codes_NS.tolist() == [[0], [0], [0]]


def test_efficient_products_come_first_and_unknown_ones_last():
    found = ordinal_suffix(np.zeros(4, dtype=np.int64), ["a", "b", "c", "d"], priority_N=[np.nan, 0.2, 0.9, 0.2])
    assert found.codes_NS[:, 0].tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(
    "prefixes, ids, kwargs, message",
    [
        ([0, 1, 0], ["a", "b", "a"], {}, r"product_id 'a' occurs more than once in the table \(1 repeats"),
        ([0, 1], ["a"], {}, r"product_ids of shape \(1,\) need as many prefixes, found shape \(2,\)"),
        ([0], ["a"], {"priority_N": [1.0, 2.0]}, r"1 product_ids need as many priorities, found \(2,\)"),
        ([0.5], ["a"], {}, "prefixes must be integers, found float64"),
        ([0], ["a"], {"base": 1}, "base must be 2 or more digits, or None for one token, found 1"),
    ],
)
def test_errors(prefixes, ids, kwargs, message):
    with pytest.raises(InputError, match=message):
        ordinal_suffix(np.array(prefixes), ids, **kwargs)
