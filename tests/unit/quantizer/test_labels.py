"""Exchanged, masked and made labels: the rows and categories that were asked for, the same wherever it is worked out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.quantizer.sampler import clusters_in_clusters, exchange_paths, mask_categories


def paths(rows: int = 400, seed: int = 0) -> np.ndarray:
    """Unequal depths: 5 × 4 × 10 categories, a tenth of the rows end after the second."""
    rng = np.random.default_rng(seed)
    leaf_N = rng.integers(0, 200, rows)
    category_NH = np.stack((leaf_N // 40, 5 + leaf_N // 10, 25 + leaf_N), 1).astype(np.int32)
    category_NH[rng.random(rows) < 0.1, 2] = -1
    return category_NH


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 60), share=st.floats(0, 1), seed=st.integers(0, 2**63))
def test_exchange_permutes_at_most_the_asked_rows(rows, share, seed):
    row_N1 = np.arange(rows, dtype=np.int32)[:, None]
    found_N1 = exchange_paths(row_N1, share=share, seed=seed)
    assert sorted(found_N1[:, 0]) == list(range(rows)) and found_N1.dtype == np.int32
    assert (found_N1 != row_N1).sum() <= round(share * rows)
    np.testing.assert_array_equal(found_N1, exchange_paths(row_N1, share=share, seed=seed))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_exchange_changes_nearly_the_share_of_rows(share):
    row_N1 = np.arange(10_000)[:, None]
    changed = (exchange_paths(row_N1, share=share, seed=3) != row_N1).sum()
    # A permutation leaves one row in place on average.
    assert round(share * 10_000) - 8 <= changed <= round(share * 10_000)


def test_exchange_moves_whole_paths_and_leaves_its_input_alone():
    category_NH = paths()
    before = category_NH.copy()
    found_NH = exchange_paths(category_NH, share=1, seed=1)
    np.testing.assert_array_equal(category_NH, before)
    assert sorted(map(tuple, found_NH)) == sorted(map(tuple, category_NH)) and (found_NH != category_NH).any()
    assert (exchange_paths(category_NH, share=1, seed=2) != found_NH).any()
    np.testing.assert_array_equal(exchange_paths(category_NH, share=0, seed=1), category_NH)


def test_shuffled_labels_tell_nothing_of_the_true_ones():
    top_N1 = np.repeat(np.arange(4), 5000)[:, None]
    kept = (exchange_paths(top_N1, share=1, seed=0) == top_N1).mean()
    assert kept == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_masking_takes_whole_categories_from_there_down(depth):
    category_NH = paths()
    found_NH = mask_categories(category_NH, depth=depth, share=0.5, seed=4)
    np.testing.assert_array_equal(found_NH[:, :depth], category_NH[:, :depth])
    masked_N = (found_NH[:, depth] == -1) & (category_NH[:, depth] >= 0)
    assert (found_NH[masked_N, depth:] == -1).all()
    np.testing.assert_array_equal(found_NH[~masked_N], category_NH[~masked_N])
    masked = set(category_NH[masked_N, depth].tolist())
    assert masked.isdisjoint(category_NH[~masked_N, depth].tolist()) and masked


def test_masking_is_the_same_for_every_part_and_meets_the_share():
    category_NH = paths()
    whole_NH = mask_categories(category_NH, depth=2, share=0.5, seed=4)
    parts = [
        mask_categories(part, depth=2, share=0.5, seed=4) for part in np.array_split(category_NH.astype(np.int64), 7)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole_NH)
    ids_N1 = np.arange(20_000)[:, None]
    for share in (0.0, 0.2, 0.5, 1.0):
        masked = (mask_categories(ids_N1, depth=0, share=share, seed=9) == -1).mean()
        assert masked == pytest.approx(share, abs=0.02 if 0 < share < 1 else 0)
    other_N1 = mask_categories(ids_N1, depth=0, share=0.5, seed=10)
    assert ((other_N1 == -1) == (mask_categories(ids_N1, depth=0, share=0.5, seed=9) == -1)).mean() < 0.55


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="share must be from 0 to 1, found 1.5"):
        exchange_paths(paths(), share=1.5, seed=0)
    with pytest.raises(InputError, match="share must be from 0 to 1, found -0.1"):
        mask_categories(paths(), depth=0, share=-0.1, seed=0)
    with pytest.raises(InputError, match="depth 3 is not a column of the categories, which have 3"):
        mask_categories(paths(), depth=3, share=0.5, seed=0)


def test_clusters_lie_in_clusters_and_are_the_nearest():
    """Against a loop over rows: at each depth the nearest centre of what the depths above leave."""
    rng = np.random.default_rng(1)
    vector_ND = rng.normal(size=(40, 3)).astype(np.float32)
    books = [torch.from_numpy(rng.normal(size=(codes, 3)).astype(np.float32)) for codes in (4, 3)]
    found_NH = clusters_in_clusters(vector_ND, books)
    for rest_D, found_H in zip(vector_ND, found_NH.tolist()):
        label = 0
        for book_KD, found in zip(books, found_H):
            code = int(np.argmin(((rest_D - book_KD.numpy()) ** 2).sum(1)))
            rest_D, label = rest_D - book_KD.numpy()[code], label * len(book_KD) + code
            assert found == label
    assert np.array_equal(found_NH[:7], clusters_in_clusters(vector_ND[:7], books))
