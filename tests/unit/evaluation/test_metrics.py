"""Recall at k against the count by hand, and the inputs that have no answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.evaluation.metrics import recall_at, recalls
from tests.oracles import metrics as oracle

products = st.sampled_from("abcdefgh")
query = st.tuples(st.lists(products, unique=True), st.sets(products))


@settings(max_examples=100, deadline=None)
@given(st.lists(query, min_size=1, max_size=6).filter(lambda qs: any(wanted for _, wanted in qs)))
def test_recall_equals_the_count_by_hand(queries):
    ranked, relevant = zip(*queries)
    found = recall_at(ranked, relevant, (1, 3, 10))
    assert found == pytest.approx({k: oracle.recall_at(ranked, relevant, k) for k in (1, 3, 10)})


def test_it_is_recall_and_not_the_hit_rate():
    assert recall_at([["a", "x", "b"]], [{"a", "b", "c", "d"}], (1, 3)) == {1: 0.25, 3: 0.5}


def test_arrays_serve_as_lists_and_a_query_without_relevant_products_is_not_counted():
    ranked = np.array([["a", "b"], ["c", "d"]])
    assert recall_at(ranked, [{"b"}, set()], (2,)) == {2: 1.0}
    assert np.isnan(recalls(ranked, [{"b"}, set()], (2,))[1, 0])


def test_wrong_inputs_are_named():
    with pytest.raises(InputError, match="query 1: product 'c' is ranked twice"):
        recall_at([["a"], ["c", "d", "c"]], [{"a"}, {"c"}], (1,))
    with pytest.raises(InputError, match="1 ranked lists for 2 queries"):
        recall_at([["a"]], [{"a"}, {"b"}], (1,))
    with pytest.raises(InputError, match="at least 1"):
        recall_at([["a"]], [{"a"}], (0, 5))
    with pytest.raises(InputError, match="none of the 1 queries has a relevant product"):
        recall_at([["a"]], [set()], (1,))
