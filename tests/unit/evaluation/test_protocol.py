"""The protocol: which pairs count, and what seen and unseen mean for a query that has both."""

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.errors import InputError
from catid2_ray.evaluation.protocol import GROUPS, Judgements, evaluate, per_query_recalls
from catid2_ray.tables import PAIRS

ROWS = [
    ("q2", "lock", "b", 3.0, "test"),
    ("q1", "hinge", "a", 3.0, "test"),
    ("q1", "hinge", "b", 2.0, "test"),
    ("q1", "hinge", "c", 1.0, "test"),
    ("q3", "knob", "gone", 3.0, "test"),
    ("q1", "hinge", "gone", 3.0, "test"),
    ("q4", "train me", "a", 3.0, "train"),
]


def table(rows=ROWS):
    return pa.table([pa.array(column) for column in zip(*rows)], schema=PAIRS)


def judged(**change):
    return Judgements.from_pairs(
        table(), **({"split": "test", "min_relevance": 2.0, "seen": {"a"}, "known": ["a", "b", "c"]} | change)
    )


def test_queries_relevant_sets_and_groups():
    judgements = judged()
    assert judgements.query_ids == ["q1", "q2"]
    assert judgements.queries == ["hinge", "lock"]
    assert judgements.relevant == [{"a", "b"}, {"b"}]
    assert judgements.seen == [{"a"}, set()]
    assert judgements.unseen == [{"b"}, {"b"}]
    assert judgements.dropped_pairs == 2
    assert judged(seen=pa.array(["a"]), known=pa.chunked_array([["a"], ["b", "c"]])) == judgements


def test_without_a_catalogue_all_pairs_stay():
    judgements = judged(known=None)
    assert judgements.query_ids == ["q1", "q2", "q3"]
    assert judgements.relevant[0] == {"a", "b", "gone"}
    assert judgements.dropped_pairs == 0


def test_a_group_counts_only_its_own_products():
    figures = evaluate(judged(), {"beam": [["a"], ["x", "b"]], "bm25": [[], []]}, ks=(1, 2))
    assert figures == {
        "recall": {"beam": {"1": 0.25, "2": 0.75}, "bm25": {"1": 0.0, "2": 0.0}},
        "recall_seen": {"beam": {"1": 1.0, "2": 1.0}, "bm25": {"1": 0.0, "2": 0.0}},
        "recall_unseen": {"beam": {"1": 0.0, "2": 0.5}, "bm25": {"1": 0.0, "2": 0.0}},
        "queries": {"all": 2, "seen": 1, "unseen": 2},
        "dropped_pairs": 2,
    }


def test_per_query_recalls_are_what_the_figures_average():
    ranked = {"beam": [["a"], ["x", "b"]], "bm25": [["b", "a"], []]}
    found, figures = per_query_recalls(judged(), ranked, (1, 2)), evaluate(judged(), ranked, (1, 2))
    assert list(found) == ["all", "seen", "unseen"]
    np.testing.assert_array_equal(found["seen"]["beam"], [[1, 1], [np.nan, np.nan]])
    for group, key in zip(found, GROUPS):
        for method, recall_QK in found[group].items():
            assert np.nanmean(recall_QK, 0).tolist() == list(figures[key][method].values())


def test_an_empty_group_has_no_figure():
    figures = evaluate(judged(seen=set()), {"beam": [["a"], ["b"]]}, ks=(5,))
    assert figures["recall_seen"] == {"beam": {"5": None}}
    assert figures["queries"]["seen"] == 0


def test_nothing_to_ask_and_two_texts_for_one_query_are_errors():
    with pytest.raises(InputError, match=r"no pair of split 'dev' .* splits found: test, train"):
        judged(split="dev")
    with pytest.raises(InputError, match="query_id 'q1' has two texts"):
        Judgements.from_pairs(
            table([*ROWS, ("q1", "other", "b", 3.0, "test")]), split="test", min_relevance=2.0, seen=(), known=None
        )
