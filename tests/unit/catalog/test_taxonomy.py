"""The category tree: ids by full path, −1 below a path's end, one digest for one tree."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.errors import InputError

PATHS = [("B", "x"), ("A", "x", "deep", "deeper"), ("A",), (), ("A", "x"), ("B", "x")]


def column(paths):
    return pa.array([None if path is None else list(path) for path in paths], pa.list_(pa.string()))


def test_ids_are_counted_per_depth_in_the_order_of_full_paths():
    taxonomy = Taxonomy.build(PATHS, depth=3)
    assert taxonomy.sizes == (2, 2, 1)
    assert taxonomy.levels[1] == (("A", "x"), ("B", "x"))
    ids = taxonomy.category_ids(column([*PATHS, None]))
    assert ids.dtype == np.int32
    assert ids.tolist() == [[1, 1, -1], [0, 0, 0], [0, -1, -1], [-1] * 3, [0, 0, -1], [1, 1, -1], [-1] * 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("ABC"), max_size=4).map(tuple), max_size=12))
def test_ids_equal_a_plain_search_and_do_not_depend_on_order(paths):
    taxonomy = Taxonomy.build(paths, depth=2)
    assert Taxonomy.build(reversed(paths), depth=2).digest == taxonomy.digest
    expected = []
    for path in paths:
        row = []
        for d in (1, 2):
            known = sorted({p[:d] for p in paths if len(p) >= d})
            row.append(known.index(path[:d]) if len(path) >= d else -1)
        expected.append(row)
    chunks = pa.chunked_array([column(paths[:5]), column(paths[5:])])
    assert taxonomy.category_ids(chunks).tolist() == expected


def test_json_round_trip_keeps_ids_and_digest():
    taxonomy = Taxonomy.build(PATHS + [("Küche", "Töpfe")], depth=3)
    again = Taxonomy.from_json(taxonomy.to_json())
    assert again == taxonomy
    assert again.digest == taxonomy.digest
    assert len(taxonomy.digest) == 64
    assert Taxonomy.build(PATHS, depth=3).digest != taxonomy.digest


def test_a_stranger_is_refused():
    taxonomy = Taxonomy.build(PATHS, depth=3)
    with pytest.raises(InputError, match=r"category path 'A > y' is not in this run's taxonomy"):
        taxonomy.category_ids(column([("A", "y")]))
    with pytest.raises(InputError, match="null category name"):
        taxonomy.category_ids(column([("A", None)]))
    with pytest.raises(InputError, match="empty or unreadable name"):
        Taxonomy.build([("A", " ")], depth=2)
    with pytest.raises(InputError, match="not a taxonomy"):
        Taxonomy.from_json("[1]")


def test_no_categories_at_all():
    taxonomy = Taxonomy.build([], depth=3)
    assert taxonomy.sizes == (0, 0, 0)
    assert taxonomy.category_ids(column([(), ()])).tolist() == [[-1] * 3] * 2
    assert taxonomy.category_ids(column([])).shape == (0, 3)


def test_a_tree_that_is_kept_cuts_paths_that_came_later():
    tree = Taxonomy.build([("home", "tools", "saws"), ("garden",)], depth=3)
    column = pa.array([["home", "tools", "drills"], ["home", "tools", "saws"], ["toys"], ["garden", "pots"], None])
    assert tree.category_ids(column, grown=True).tolist() == [
        [1, 0, -1], [1, 0, 0], [-1, -1, -1], [0, -1, -1], [-1, -1, -1],
    ]  # fmt: skip
    with pytest.raises(InputError, match="home > tools > drills"):
        tree.category_ids(column)
