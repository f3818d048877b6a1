"""ID quality against hand-worked tables and counts product by product.

The figures of shuffled categories and random products are checked for what they are: a floor, the same on every run.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.identifiers import quality
from catid2_ray.identifiers.quality import (
    CodeFigures,
    code_figures,
    displacement_of,
    hourglass,
    id_quality,
    neighbour_agreement,
    prefix_agreement,
    prefix_words,
    reconstruction_error,
)
from tests.oracles import quality as oracle

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


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(0, 23), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5).map(sorted),
)
def test_ranges_of_ids_give_the_figures_of_all_of_them(ids, cuts):
    space, packed_N, figures = DocidSpace((2, 3, 4)), np.sort(ids), CodeFigures(DocidSpace((2, 3, 4)))
    for part in np.split(packed_N, cuts):
        figures.add(part)
    found, bucket = figures.figures(), np.unique(packed_N, return_counts=True)[1]
    assert found == figures.figures() == code_figures(np.random.default_rng(0).permutation(packed_N), space)
    assert found["p99_bucket"] == pytest.approx(np.percentile(bucket, 99))
    assert found["gini_ids"] == pytest.approx(oracle.gini(bucket.tolist()))
    for depth, share in enumerate(found["conditional_entropy"]):
        joint = [oracle.entropy((packed_N // radix).tolist()) for radix in (24, 12, 4, 1)[depth : depth + 2]]
        assert share == pytest.approx(joint[1] - joint[0], abs=1e-12)


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
    for depth in (0, 1):
        best, known = oracle.purity(codes.tolist(), category.tolist(), depth)
        assert figures["purity"][depth] == pytest.approx(best)
        assert figures["purity_products"][depth] == known
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


def table(rows, *, seed=0, categories=(3, 9)):
    """Codes N×3 that follow the category at the first level, and categories N×2 of unequal depth."""
    rng = np.random.default_rng(seed)
    category = np.column_stack([rng.integers(0, k, rows) for k in categories])
    codes = np.column_stack([category[:, 0], rng.integers(0, 3, rows), rng.integers(0, 3, rows)])
    category[rng.random(rows) < 0.2, 1] = -1
    return codes, category


def test_ami_is_that_of_the_definition_and_its_shuffled_self_is_near_0():
    codes, category = table(90)
    figures = id_quality(codes, category, (3, 3, 3))
    for depth in (0, 1):
        known = category[:, depth] >= 0
        prefixes = [tuple(row[: depth + 1]) for row in codes[known].tolist()]
        expected = oracle.adjusted_mutual_information(prefixes, category[known, depth].tolist())
        assert figures["ami"][depth] == pytest.approx(expected, abs=1e-9)
        assert abs(figures["ami_shuffled"][depth]) < 0.15
    assert figures["ami"][0] == pytest.approx(1.0)
    nothing = id_quality(codes, np.full((90, 1), -1), (3, 3, 3))
    assert nothing["ami"] == nothing["ami_shuffled"] == [0.0]


def test_ami_of_a_large_table_is_that_of_a_sample_drawn_by_seed(monkeypatch):
    codes, category = table(4000)
    whole = id_quality(codes, category, (3, 3, 3))
    monkeypatch.setattr(quality, "AMI_ROWS", 1500)
    sampled = id_quality(codes, category, (3, 3, 3))
    assert sampled == id_quality(codes, category, (3, 3, 3))
    assert sampled["ami"] != whole["ami"] and sampled["ami"] == pytest.approx(whole["ami"], abs=0.02)
    assert sampled["purity"] == whole["purity"]


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 40), seed=st.integers(0, 1000))
def test_drawn_pairs_come_near_the_mean_over_all_pairs(rows, seed):
    codes, category = table(rows, seed=seed)
    figures = prefix_agreement(codes, category, pairs=20_000, seed=seed)
    for depth in (0, 1):
        expected = oracle.prefix_agreement(codes.tolist(), category.tolist(), depth)
        for found, wanted in zip((figures["within"][depth], figures["across"][depth]), expected):
            # 5 standard errors of a figure in 0…3 whose deviation is at most 1.5
            assert (
                found == wanted if wanted is None else found == pytest.approx(wanted, abs=5 * 1.5 / math.sqrt(20_000))
            )
    json.dumps(figures)


def test_pairs_are_of_two_products_and_of_the_right_categories():
    codes = np.arange(12).reshape(6, 2)
    category = np.array([[0], [0], [1], [1], [1], [-1]])
    assert prefix_agreement(codes, category) == {"pairs": 200_000, "within": [0.0], "across": [0.0]}
    same = np.array([[0, 0], [0, 0], [1, 1], [1, 1], [1, 1], [1, 1]])
    assert prefix_agreement(same, category, pairs=500) == {"pairs": 500, "within": [2.0], "across": [0.0]}
    assert prefix_agreement(same, np.zeros((6, 1), int))["across"] == [None]
    assert prefix_agreement(same, np.empty((6, 0), int))["within"] == []
    with pytest.raises(InputError, match="must have the same rows"):
        prefix_agreement(same, category[:5])


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 30), neighbours=st.integers(1, 12), levels=st.integers(1, 4), seed=st.integers(0, 1000))
def test_neighbours_are_the_nearest_by_cosine(rows, neighbours, levels, seed):
    rng = np.random.default_rng(seed)
    embedding, codes = rng.normal(size=(rows, 4)), rng.integers(0, 2, (rows, levels))
    figures = neighbour_agreement(codes, embedding, neighbours=neighbours, sample=100, seed=seed)
    assert figures["queries"] == rows and figures["neighbours"] == min(neighbours, rows - 1)
    assert figures["share"] == pytest.approx(oracle.neighbour_agreement(codes.tolist(), embedding.tolist(), neighbours))
    assert len(figures["share_random"]) == min(3, levels)


def test_equal_embeddings_are_neighbours_and_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    embedding = np.repeat(rng.normal(size=(40, 6)), 3, axis=0).astype(np.float32)
    codes = np.repeat(rng.integers(0, 50, (40, 2)), 3, axis=0)
    figures = neighbour_agreement(codes, embedding, neighbours=2, sample=60)
    assert figures["share"] == [1.0, 1.0] and figures["share_random"][0] < 0.2 and figures["queries"] == 60
    monkeypatch.setattr(quality, "_BLOCK_NUMBERS", 1)
    assert neighbour_agreement(codes, embedding, neighbours=2, sample=60) == figures
    alone = neighbour_agreement(codes[:1], embedding[:1])
    assert alone["share"] == alone["share_random"] == [None, None]
    with pytest.raises(InputError, match="codes and embeddings must have the same rows, found 120 and 119"):
        neighbour_agreement(codes, embedding[1:])


def test_displacement_describes_those_moved():
    figures = displacement_of(np.array([1.0, 2.0, 6.0]), 4)
    assert figures == {"moved_share": 0.75, "mean_cost": 3.0, "median_cost": 2.0, "p95_cost": pytest.approx(5.6)}
    assert displacement_of(np.empty(0), 1) == {
        "moved_share": 0.0,
        "mean_cost": None,
        "median_cost": None,
        "p95_cost": None,
    }


def test_reconstruction_error_is_a_mean_over_rows():
    rng = np.random.default_rng(1)
    true, decoded = rng.normal(size=(2, 30, 5))
    figures = reconstruction_error(true, decoded)
    assert list(figures.values()) == pytest.approx(oracle.reconstruction(true.tolist(), decoded.tolist()))
    assert reconstruction_error(true, np.broadcast_to(true.mean(axis=0), true.shape))[
        "relative_error"
    ] == pytest.approx(1)
    assert reconstruction_error(np.zeros((2, 3)), np.zeros((2, 3)))["cosine"] is None
    with pytest.raises(InputError, match="one shape"):
        reconstruction_error(true, decoded[:, 1:])


@pytest.mark.parametrize(
    ("entropy", "level", "narrow"),
    [
        ([0.9, 0.7, 0.95, 0.9], "b", [False, True, False, False]),
        ([0.9, 0.85, 0.9, 0.6, 0.99], "d", [False, True, False, True, False]),
        ([0.9, 0.89, 0.95], None, [False] * 3),
        ([0.5, 0.7, 0.9], None, [False] * 3),
        ([0.9], None, [False]),
        ([], None, []),
    ],
)
def test_hourglass_names_the_level_that_is_narrower_than_its_neighbours(entropy, level, narrow):
    figures = hourglass(entropy)
    assert (figures["level"], figures["hourglass"], figures["narrow"]) == (level, level is not None, narrow)
    json.dumps(figures)


def test_hourglass_of_a_table_of_codes():
    rng = np.random.default_rng(0)
    codes = np.column_stack([rng.integers(0, 16, 2000), rng.integers(0, 4, 2000), rng.integers(0, 16, 2000)])
    entropy = id_quality(codes, np.empty((2000, 0), int), (16, 16, 16))["normalised_entropy"]
    assert hourglass(entropy)["level"] == "b" and not hourglass(entropy, tolerance=0.9)["hourglass"]


def test_words_that_mark_a_prefix_are_those_of_the_highest_log_odds():
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 3, (80, 2))
    words = [{f"w{word}" for word in rng.integers(0, 9, 3)} | {f"own{first}"} for first in codes[:, 0]]
    found = prefix_words(words, codes, prefixes=2, terms=4)
    assert [panel["products"] for panel in found] == sorted(np.bincount(codes[:, 0]).tolist(), reverse=True)[:2]
    for panel in found:
        score = oracle.word_scores(words, codes.tolist(), panel["code"])
        assert panel["words"] == sorted(score, key=lambda word: (-score[word], word))[: len(panel["words"])]
        assert panel["words"][0] == f"own{panel['code']}" and all(score[word] > 0 for word in panel["words"])
        assert (panel["share"][0], panel["elsewhere"][0]) == (1.0, 0.0)
        inside = [panel["words"][1] in title for title, row in zip(words, codes) if row[0] == panel["code"]]
        assert panel["share"][1] == pytest.approx(sum(inside) / len(inside))
    json.dumps(found)
    assert prefix_words([set()], [[0]]) == [{"code": 0, "products": 1, "words": [], "share": [], "elsewhere": []}]
