"""Balanced residual k-means against an exact assignment, prices on rows outside the sample, many k-means at once.

Unusual: prices make an assignment the cheapest of all that have the same cluster sizes, so the exact one is given the
sizes that were found, and the two costs must be equal.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from catid2_ray.errors import CapacityError
from catid2_ray.quantizer.kmeans import balanced_residual_kmeans, many_kmeans, nearest, residual_kmeans


def uneven_rows(rows, width, seed):
    """Three clumps of very different sizes: what plain k-means cuts unevenly."""
    rng = np.random.default_rng(seed)
    clump = rng.choice(3, rows, p=[0.8, 0.15, 0.05])
    return torch.from_numpy((rng.normal(size=(3, width)) * 3)[clump] + rng.normal(size=(rows, width))).float()


def sizes(codes_N, codes):
    return torch.bincount(codes_N, minlength=codes)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), codes=st.integers(2, 6), width=st.integers(2, 8))
def test_prices_split_the_sample_evenly_at_the_least_cost(seed, codes, width):
    rows = 30 * codes
    residual_NZ = uneven_rows(rows, width, seed)
    [level] = balanced_residual_kmeans(residual_NZ, codes_per_level=(codes,), seed=seed)
    codes_N = nearest(residual_NZ, level.codebook_KZ, level.price_K)
    size_K = sizes(codes_N, codes)
    assert (size_K - 30).abs().max() <= 1
    cost_NK = torch.cdist(residual_NZ.double(), level.codebook_KZ.double()).square().numpy()
    exact = cost_NK[:, np.repeat(np.arange(codes), size_K)]
    least = exact[linear_sum_assignment(exact)].sum()
    assert cost_NK[np.arange(rows), codes_N.numpy()].sum() == pytest.approx(least, rel=1e-5)


def test_every_level_is_within_five_percent():
    residual_NZ = uneven_rows(4000, 16, 5)
    [plain_KZ] = residual_kmeans(residual_NZ, codes_per_level=(16,), seed=0)
    assert sizes(nearest(residual_NZ, plain_KZ), 16).min() < 0.5 * 250
    for level in balanced_residual_kmeans(residual_NZ, codes_per_level=(16, 10, 16), seed=0):
        codes, even = len(level.codebook_KZ), 4000 / len(level.codebook_KZ)
        codes_N = nearest(residual_NZ, level.codebook_KZ, level.price_K)
        assert (sizes(codes_N, codes) - even).abs().max() <= 0.05 * even
        assert level.price_K.mean().abs() < 1e-4
        residual_NZ = residual_NZ - level.codebook_KZ[codes_N]


def test_prices_hold_on_rows_outside_the_sample_and_for_each_row_alone():
    residual_NZ = uneven_rows(6000, 8, 1)
    [level] = balanced_residual_kmeans(residual_NZ[:3000], codes_per_level=(8,), seed=0)
    codes_N = nearest(residual_NZ[3000:], level.codebook_KZ, level.price_K)
    assert (sizes(codes_N, 8) - 375).abs().max() < 0.25 * 375
    alone = [int(nearest(row_Z[None], level.codebook_KZ, level.price_K)) for row_Z in residual_NZ[3000:3040]]
    assert alone == codes_N[:40].tolist()


def test_equal_rows_share_a_code_and_the_rest_is_spread():
    residual_NZ = uneven_rows(400, 4, 2)
    residual_NZ[:150] = residual_NZ[0]
    [level] = balanced_residual_kmeans(residual_NZ, codes_per_level=(8,), seed=0)
    codes_N = nearest(residual_NZ, level.codebook_KZ, level.price_K)
    assert len(codes_N[:150].unique()) == 1
    assert sizes(codes_N, 8).min() > 0


@pytest.mark.parametrize("rows", [torch.ones(20, 3), torch.eye(3).repeat(7, 1)])
def test_fewer_different_rows_than_codes_stay_finite(rows):
    for level in balanced_residual_kmeans(rows, codes_per_level=(6, 1, 4), seed=0):
        assert level.codebook_KZ.isfinite().all() and level.price_K.isfinite().all()


def test_deterministic_and_short_samples_are_refused():
    residual_NZ = uneven_rows(300, 4, 3)
    first, second = (balanced_residual_kmeans(residual_NZ, codes_per_level=(5, 4), seed=9) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.codebook_KZ, other.codebook_KZ) and torch.equal(one.price_K, other.price_K)
    with pytest.raises(CapacityError, match="4 rows cannot start a level of 5 codes"):
        balanced_residual_kmeans(residual_NZ[:4], codes_per_level=(5,), seed=0)


def test_no_price_is_the_nearest_codeword_bit_for_bit():
    residual_NZ, codebook_KZ = torch.randn(500, 12), torch.randn(40, 12)
    assert torch.equal(nearest(residual_NZ, codebook_KZ), nearest(residual_NZ, codebook_KZ, torch.zeros(40)))
    expected = (residual_NZ.double()[:, None] - codebook_KZ.double()).square().sum(2).argmin(1)
    assert torch.equal(nearest(residual_NZ, codebook_KZ), expected)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), counts=st.lists(st.integers(1, 12), min_size=1, max_size=5), codes=st.integers(2, 5))
def test_many_kmeans_are_fixed_points_each_for_itself(seed, counts, codes):
    rng = np.random.default_rng(seed)
    point_GSD = torch.from_numpy(rng.integers(-2, 3, (len(counts), max(counts), 2)).astype(np.float32))
    valid_GS = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    found = many_kmeans(point_GSD, valid_GS, codes=codes, iterations=20, generator=torch.Generator().manual_seed(seed))
    for group, count in enumerate(counts):
        points_SD, code_S = point_GSD[group, :count], found.code_GS[group, :count]
        different = len(torch.unique(points_SD, dim=0))
        live_K = found.live_GK[group]
        assert set(code_S.tolist()) == set(live_K.nonzero().flatten().tolist())
        assert int(live_K.sum()) == different if different <= codes else int(live_K.sum()) <= codes
        for code in live_K.nonzero().flatten().tolist():
            torch.testing.assert_close(found.centroid_GKD[group, code], points_SD[code_S == code].mean(0))
