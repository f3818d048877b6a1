"""What the pairs of a query show once they are together; known answers, and the same however the groups are cut."""

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.catalog.queries import added, find_faults, keyed_queries
from catid2_ray.tables import PAIRS

ROWS = [
    ("q1", "oak shelf", "train"),
    ("q2", "Oak  Shelf", "test"),  # the same text as q1's
    ("q3", "cre\u0300me", "train"),
    ("q3", "cre\u0300me", "test"),  # in two splits by its id
    ("q4", "hinge", "train"),
    ("q4", "door hinge", "train"),  # two texts
    ("q5", "sofa", "validation"),
    ("q6", "sofa", "test"),
    ("q7", "lamp", "train"),
    ("q7", "lamp", "train"),
]


def table(rows):
    return pa.table([pa.array(c) for c in zip(*((i, q, "p", 1.0, s) for i, q, s in rows))], names=PAIRS.names)


def findings(rows, groups):
    """Every row a part of its own; groups by a hash of the key."""
    keyed = pa.concat_tables([keyed_queries(table([row])) for row in rows])
    group_N = np.array([sum(key.encode()) % groups for key in keyed["key"].to_pylist()])
    return added(find_faults(keyed.filter(pa.array(group_N == group))) for group in range(groups))


@pytest.mark.parametrize("groups", [1, 3, 7])
def test_two_texts_and_queries_in_two_splits_are_counted_and_named(groups):
    found = findings(ROWS, groups)
    assert found.queries == {"train": 4, "test": 3, "validation": 1}
    assert found.two_texts == 1 and found.first_two_texts == ["'q4': 'door hinge' and 'hinge'"]
    assert found.shared == {"train and test": 2, "validation and test": 1}
    assert found.first_leaked == ["'q1': 'Oak  Shelf'", "'q3': 'cre\u0300me'"]


def test_a_split_without_faults():
    found = findings([("q1", "oak", "train"), ("q2", "elm", "test"), ("q3", "oak tree", "test")], 2)
    assert (found.two_texts, found.first_two_texts, found.shared, found.first_leaked) == (0, [], {}, [])
    empty = find_faults(keyed_queries(PAIRS.empty_table()))
    assert empty.queries == {} and empty.two_texts == 0 and empty.shared == {}


def test_at_most_ten_are_named():
    rows = [(f"q{n:02d}", f"text {n}", split) for n in range(30) for split in ("train", "test")]
    assert findings(rows, 4).shared == {"train and test": 30}
    assert [text[:5] for text in findings(rows, 4).first_leaked] == [f"'q{n:02d}'" for n in range(10)]
