"""The losses against slow oracles, their gradients, and their invariances.

Unusual: category paths are drawn ragged (−1 tails) and with single-member leaves, so every early exit is met.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.quantizer import losses
from catid2_ray.quantizer.contrast import group_blocks, unit_rows
from tests.oracles import quantizer as oracle


def ragged_paths(rows: int, depth: int, seed: int, branch: int = 3) -> torch.Tensor:
    """Category ids B×H, unique per full path, each row cut at a random depth."""
    rng = np.random.default_rng(seed)
    choice = rng.integers(0, branch, (rows, depth))
    ids = np.cumsum(choice * branch ** np.arange(depth)[::-1], axis=1) * depth + np.arange(depth)
    ids[np.arange(depth) >= rng.integers(0, depth + 1, rows)[:, None]] = -1
    return torch.from_numpy(ids)


def random_rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 2),
    negatives=st.sampled_from(["siblings", "all"]),
    chunk=st.sampled_from([None, 1, 5]),
    branch=st.sampled_from([1, 2, 5]),
)
def test_hierarchical_equals_oracle(rows, seed, depth, negatives, chunk, branch):
    residual_BZ, category_BH = random_rows(rows, 4, seed=seed), ragged_paths(rows, 3, seed, branch)
    settings_ = {"depth": depth, "temperature": 0.2, "negatives": negatives}
    fast = losses.hierarchical_class_constraint(residual_BZ, category_BH, chunk=chunk, **settings_)
    slow = oracle.hierarchical_class(residual_BZ.numpy(), category_BH.tolist(), **settings_)
    assert float(fast) == pytest.approx(slow, abs=1e-10)


def test_hierarchical_float32_is_close_to_the_oracle():
    residual_BZ, category_BH = random_rows(60, 8, seed=1), ragged_paths(60, 3, seed=1)
    for depth in range(3):
        fast = losses.hierarchical_class_constraint(residual_BZ.float(), category_BH, depth=depth, temperature=0.1)
        slow = oracle.hierarchical_class(residual_BZ.numpy(), category_BH.tolist(), depth=depth, temperature=0.1)
        assert fast.dtype == torch.float32
        assert float(fast) == pytest.approx(slow, rel=2e-5)


@pytest.mark.parametrize("category", [[[-1], [-1]], [[0], [0]], [[0], [1]], []])
def test_hierarchical_without_anchor_is_zero_with_zero_gradient(category):
    category_BH = torch.tensor(category, dtype=torch.int64).reshape(len(category), 1)
    residual_BZ = random_rows(len(category), 3, seed=0).requires_grad_()
    loss = losses.hierarchical_class_constraint(residual_BZ, category_BH, depth=0, temperature=0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not residual_BZ.grad.any()


def test_hierarchical_ignores_zero_residuals_gracefully():
    residual_BZ = random_rows(6, 3, seed=3)
    residual_BZ[:2] = 0.0
    residual_BZ.requires_grad_()
    loss = losses.hierarchical_class_constraint(residual_BZ, torch.arange(6)[:, None] % 2, depth=0, temperature=0.1)
    loss.backward()
    assert torch.isfinite(residual_BZ.grad).all() and not residual_BZ.grad[:2].any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_hierarchical_is_invariant(seed, scale):
    residual_BZ, category_BH = random_rows(20, 4, seed=seed), ragged_paths(20, 3, seed)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    renamed_BH = torch.where(category_BH >= 0, 5_000 - category_BH, -1)
    for depth in range(3):
        plain, shuffled, scaled, renamed = (
            losses.hierarchical_class_constraint(rows, paths, depth=depth, temperature=0.1)
            for rows, paths in [
                (residual_BZ, category_BH),
                (residual_BZ[order], category_BH[order]),
                (residual_BZ * scale, category_BH),
                (residual_BZ, renamed_BH),
            ]
        )
        assert float(plain) == pytest.approx(float(shuffled), abs=1e-10)
        assert float(plain) == pytest.approx(float(scaled), abs=1e-10)
        assert float(plain) == pytest.approx(float(renamed), abs=1e-10)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 40), groups=st.integers(1, 12), seed=st.integers(0, 99), chunk=st.sampled_from([None, 1, 7]))
def test_blocks_pair_each_anchor_with_its_whole_group_once(rows, groups, seed, chunk):
    rng = np.random.default_rng(seed)
    key_group_M = torch.from_numpy(rng.integers(-1, groups, rows))
    anchor_group_B = torch.where(torch.from_numpy(rng.random(rows) < 0.7), key_group_M, -1)
    pairs = []
    for block in group_blocks(anchor_group_B, key_group_M, chunk=chunk):
        assert chunk is None or block.anchor_GA.numel() <= max(chunk, 1)
        both_GAK = block.anchor_valid_GA[:, :, None] & block.key_valid_GK[:, None, :]
        anchor, key = torch.broadcast_tensors(block.anchor_GA[:, :, None], block.key_GK[:, None, :])
        pairs += list(zip(anchor[both_GAK].tolist(), key[both_GAK].tolist(), strict=True))
    of_anchor, of_key = anchor_group_B.tolist(), key_group_M.tolist()
    expected = [(a, k) for a in range(rows) for k in range(rows) if of_anchor[a] >= 0 and of_anchor[a] == of_key[k]]
    assert sorted(pairs) == expected


def test_residual_quantization_equals_oracle():
    residual_LBZ, codeword_LBZ = random_rows(3, 7, 5, seed=1), random_rows(3, 7, 5, seed=2)
    fast = losses.residual_quantization_loss(residual_LBZ, codeword_LBZ, commitment=0.25)
    slow = oracle.residual_quantization(residual_LBZ.numpy(), codeword_LBZ.numpy(), commitment=0.25)
    assert float(fast) == pytest.approx(slow, abs=1e-12)


def test_residual_quantization_splits_its_gradient():
    residual_LBZ, codeword_LBZ = (
        random_rows(2, 3, 4, seed=1).requires_grad_(),
        random_rows(2, 3, 4, seed=2).requires_grad_(),
    )
    losses.residual_quantization_loss(residual_LBZ, codeword_LBZ, commitment=0.25).backward()
    difference = (residual_LBZ - codeword_LBZ).detach() * 2 / 3
    torch.testing.assert_close(residual_LBZ.grad, 0.25 * difference)
    torch.testing.assert_close(codeword_LBZ.grad, -difference)


@pytest.mark.parametrize("chunk", [None, 4])
def test_dispersion_equals_oracle(chunk):
    reconstruction_BD, embedding_BD = random_rows(13, 6, seed=4), random_rows(13, 6, seed=5)
    fast = losses.dispersion(reconstruction_BD, embedding_BD, temperature=0.1, chunk=chunk)
    assert float(fast) == pytest.approx(
        oracle.dispersion(reconstruction_BD.numpy(), embedding_BD.numpy(), temperature=0.1), abs=1e-10
    )


def test_cluster_scale_equals_oracle_and_its_log_form():
    logit_BK = random_rows(9, 5, seed=6) * 3
    fast = losses.cluster_scale_constraint(logit_BK.softmax(1))
    assert float(fast) == pytest.approx(oracle.cluster_scale(logit_BK.softmax(1).numpy()), abs=1e-12)
    assert float(losses.cluster_scale_from_log(logit_BK.log_softmax(1))) == pytest.approx(float(fast), abs=1e-12)


def test_cluster_scale_is_zero_when_even_and_finite_when_collapsed():
    assert float(losses.cluster_scale_constraint(torch.full((4, 8), 1 / 8))) == pytest.approx(0.0, abs=1e-6)
    collapsed_BK = torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.int64), 8).float()
    expected = math.log(8) - math.log(8) + 7 / 8 * -math.log(1e-30)
    assert float(losses.cluster_scale_constraint(collapsed_BK)) == pytest.approx(expected, rel=1e-6)
    logit_BK = torch.tensor([[0.0, -500.0]]).repeat(4, 1).requires_grad_()
    losses.cluster_scale_from_log(logit_BK.log_softmax(1)).backward()
    assert logit_BK.grad[:, 1].abs().min() > 0


def test_gradients():
    category_BH = ragged_paths(9, 2, seed=8, branch=2)
    residual_BZ = random_rows(9, 3, seed=9).requires_grad_()
    for depth, chunk in [(0, None), (1, None), (1, 2)]:
        assert torch.autograd.gradcheck(
            lambda r, depth=depth, chunk=chunk: losses.hierarchical_class_constraint(
                r, category_BH, depth=depth, temperature=0.5, chunk=chunk
            ),
            residual_BZ,
        )
    embedding_BD = random_rows(9, 3, seed=10)
    assert torch.autograd.gradcheck(lambda r: losses.dispersion(r, embedding_BD, temperature=0.5), residual_BZ)
    assert torch.autograd.gradcheck(lambda r: losses.cluster_scale_constraint(r.softmax(1)), residual_BZ)
    assert torch.autograd.gradcheck(lambda r: losses.cluster_scale_from_log(r.log_softmax(1)), residual_BZ)


def test_unit_rows_keeps_direction_and_zero():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-20, 4e-20]])
    torch.testing.assert_close(unit_rows(rows), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]))


def test_bad_arguments_are_named():
    residual_BZ, category_BH = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"depth 1 is not a column of the categories, which have 1"):
        losses.hierarchical_class_constraint(residual_BZ, category_BH, depth=1, temperature=0.1)
    with pytest.raises(InputError, match=r'negatives must be "siblings" or "all", found \'hard\''):
        losses.hierarchical_class_constraint(residual_BZ, category_BH, depth=0, temperature=0.1, negatives="hard")
    with pytest.raises(InputError, match=r"found \(2, 3, 4\) and \(2, 3, 5\)"):
        losses.residual_quantization_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), commitment=0.25)
