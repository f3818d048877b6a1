"""ID quality against hand-worked tables and a count product by product.

Purity of shuffled categories is checked for what it is: a floor, the same on every run.
"""

import json
import math
from collections import Counter

import numpy as np
import pytest

from catid2_ray.errors import InputError
from catid2_ray.identifiers.quality import id_quality

NO_CATEGORIES = np.empty((5, 0), int)


def test_collisions_by_both_definitions():
    figures = id_quality([[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]], NO_CATEGORIES, (2, 4))
    assert (figures["products"], figures["ids"]) == (5, 3)
    assert figures["collision_rate"] == 2 / 5 and figures["shared_rate"] == 3 / 5
    assert figures["largest_bucket"] == 3 and figures["mean_bucket"] == pytest.approx(5 / 3)
    assert figures["p99_bucket"] == pytest.approx(2.96)
    assert figures["purity"] == []
    json.dumps(figures)


def test_use_of_codes():
    figures = id_quality([[0, 0], [0, 1], [1, 2], [1, 3]], np.empty((4, 0), int), (2, 8))
    assert figures["codes_used"] == [2, 4] and figures["codes_used_share"] == [1.0, 0.5]
    assert figures["perplexity"] == pytest.approx([2.0, 4.0])
    assert figures["normalised_entropy"] == pytest.approx([1.0, 2 / 3])
    assert figures["conditional_entropy"] == pytest.approx([math.log(2), math.log(2)])
    assert figures["gini"] == pytest.approx([0.0, 0.5])
    assert figures["gini_ids"] == pytest.approx(0.0)
    assert figures["top_share"] == [0.5, 0.25]


def test_one_code_for_all_is_collapse():
    figures = id_quality(np.zeros((6, 2), int), np.empty((6, 0), int), (1, 4))
    assert figures["normalised_entropy"] == [1.0, 0.0] and figures["perplexity"] == [1.0, 1.0]
    assert figures["gini"][1] == pytest.approx(0.75) and figures["collision_rate"] == 5 / 6


def test_purity_is_a_count_over_prefixes_and_beats_its_shuffled_self():
    rng = np.random.default_rng(0)
    category = np.column_stack([rng.integers(0, 4, 400), rng.integers(0, 12, 400), np.full(400, -1)])
    category[::7, 1] = -1
    codes = np.column_stack([category[:, 0], rng.integers(0, 5, 400), rng.integers(0, 5, 400)])
    figures = id_quality(codes, category, (4, 5, 5))
    assert figures["purity"][0] == 1.0 and figures["purity_shuffled"][0] < 0.5
    for depth in (1, 2):
        groups = {}
        for row, label in zip(codes.tolist(), category[:, depth - 1].tolist()):
            if label >= 0:
                groups.setdefault(tuple(row[:depth]), Counter())[label] += 1
        best = sum(max(group.values()) for group in groups.values())
        known = sum(sum(group.values()) for group in groups.values())
        assert figures["purity"][depth - 1] == pytest.approx(best / known)
        assert figures["purity_products"][depth - 1] == known
    assert (figures["purity"][2], figures["purity_shuffled"][2], figures["purity_products"][2]) == (0.0, 0.0, 0)
    assert figures == id_quality(codes, category, (4, 5, 5))


@pytest.mark.parametrize(
    ("codes", "category", "message"),
    [
        (np.empty((0, 2), int), np.empty((0, 1), int), "no IDs to describe"),
        ([[0, 9]], [[0]], "code 9 at level 1"),
        ([[0, 0]], [[0], [1]], "categories must be an integer array 1×H"),
        ([[0, 0]], [[0.5]], "categories must be an integer array 1×H, found float64"),
    ],
)
def test_bad_input_is_refused(codes, category, message):
    with pytest.raises(InputError, match=message):
        id_quality(codes, category, (2, 2))
