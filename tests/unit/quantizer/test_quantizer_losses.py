"""The losses against slow oracles, their gradients, and their invariances.

Unusual: category paths are drawn ragged (−1 tails) and with single-member leaves, so every early exit is met; the sizes
that decide between padded and single blocks are lowered, so that a dozen rows walk every path.
"""

import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.quantizer import contrast, losses
from catid2_ray.quantizer.contrast import category_blocks, category_layout, unit_rows
from tests.oracles import quantizer as oracle


def hierarchical_class_constraint(*args, **settings_):
    return losses.hierarchical_class_terms(*args, **settings_).loss


def ragged_paths(rows: int, depth: int, seed: int, branch: int = 3) -> torch.Tensor:
    """Category ids B×H, unique per full path, each row cut at a random depth."""
    rng = np.random.default_rng(seed)
    choice = rng.integers(0, branch, (rows, depth))
    ids = np.cumsum(choice * branch ** np.arange(depth)[::-1], axis=1) * depth + np.arange(depth)
    ids[np.arange(depth) >= rng.integers(0, depth + 1, rows)[:, None]] = -1
    return torch.from_numpy(ids)


def blocks_of(wide: int):
    """Groups of `wide` keys and more get blocks of their own, of at most 3 rows."""
    return mock.patch.multiple(contrast, WIDE_GROUP=wide, BLOCK_PAIRS=3 * wide)


def random_rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    depth=st.integers(0, 2),
    negatives=st.sampled_from(["siblings", "all"]),
    chunk=st.sampled_from([None, 1, 5]),
    branch=st.sampled_from([1, 2, 5]),
    temperature=st.sampled_from([0.2, 0.01]),
    wide=st.sampled_from([3, 8, 512]),
    over=st.sampled_from(["anchors", "batch"]),
)
def test_hierarchical_equals_oracle(rows, seed, depth, negatives, chunk, branch, temperature, wide, over):
    residual_BZ, category_BH = random_rows(rows, 4, seed=seed), ragged_paths(rows, 3, seed, branch)
    settings_ = {"depth": depth, "temperature": temperature, "negatives": negatives, "over": over}
    with blocks_of(wide):
        fast = losses.hierarchical_class_terms(residual_BZ, category_BH, chunk=chunk, **settings_)
        only_loss = hierarchical_class_constraint(residual_BZ, category_BH, chunk=chunk, **settings_)
    slow = oracle.hierarchical_class(residual_BZ.numpy(), category_BH.tolist(), **settings_)
    assert float(fast.loss) == float(only_loss) == pytest.approx(slow, rel=1e-9, abs=1e-10)
    assert fast.anchors.dtype == torch.int64 and fast.anchors.shape == ()
    assert int(fast.anchors) == oracle.hierarchical_anchors(category_BH.tolist(), depth=depth, negatives=negatives)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    decay=st.sampled_from([0.0, 0.5, 1.0]),
    chunk=st.sampled_from([None, 1, 5]),
    branch=st.sampled_from([1, 2, 5]),
    temperature=st.sampled_from([0.2, 0.01]),
)
def test_soft_contrast_equals_oracle(rows, seed, decay, chunk, branch, temperature):
    latent_BZ, category_BH = random_rows(rows, 4, seed=seed), ragged_paths(rows, 3, seed, branch)
    fast = losses.ancestor_contrast(latent_BZ, category_BH, decay=decay, temperature=temperature, chunk=chunk)
    slow, anchors = oracle.ancestor(latent_BZ.numpy(), category_BH.tolist(), decay=decay, temperature=temperature)
    assert float(fast.loss) == pytest.approx(slow, rel=1e-9, abs=1e-10) and int(fast.anchors) == anchors


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_soft_contrast_has_the_gradient_of_its_value(decay):
    latent_BZ, category_BH = random_rows(9, 3, seed=4).requires_grad_(), ragged_paths(9, 3, 2)
    assert torch.autograd.gradcheck(
        lambda rows: losses.ancestor_contrast(rows, category_BH, decay=decay, temperature=0.3).loss, latent_BZ
    )


@pytest.mark.parametrize("category", [[[-1], [-1]], [[0], [1]], []])
def test_soft_contrast_without_anchor_is_zero_with_zero_gradient(category):
    category_BH = torch.tensor(category, dtype=torch.int64).reshape(len(category), 1)
    latent_BZ = random_rows(len(category), 3, seed=0).requires_grad_()
    loss = losses.ancestor_contrast(latent_BZ, category_BH, decay=0.5, temperature=0.1).loss
    loss.backward()
    assert float(loss.detach()) == 0.0 and not latent_BZ.grad.any()


def test_hierarchical_float32_is_close_to_the_oracle():
    residual_BZ, category_BH = random_rows(60, 8, seed=1), ragged_paths(60, 3, seed=1)
    for depth in range(3):
        fast = hierarchical_class_constraint(residual_BZ.float(), category_BH, depth=depth, temperature=0.1)
        slow = oracle.hierarchical_class(residual_BZ.numpy(), category_BH.tolist(), depth=depth, temperature=0.1)
        assert fast.dtype == torch.float32
        assert float(fast) == pytest.approx(slow, rel=2e-5)


@pytest.mark.parametrize("category", [[[-1], [-1]], [[0], [0]], [[0], [1]], []])
def test_hierarchical_without_anchor_is_zero_with_zero_gradient(category):
    category_BH = torch.tensor(category, dtype=torch.int64).reshape(len(category), 1)
    residual_BZ = random_rows(len(category), 3, seed=0).requires_grad_()
    loss = hierarchical_class_constraint(residual_BZ, category_BH, depth=0, temperature=0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not residual_BZ.grad.any()


def test_hierarchical_ignores_zero_residuals_gracefully():
    residual_BZ = random_rows(6, 3, seed=3)
    residual_BZ[:2] = 0.0
    residual_BZ.requires_grad_()
    loss = hierarchical_class_constraint(residual_BZ, torch.arange(6)[:, None] % 2, depth=0, temperature=0.1)
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
            hierarchical_class_constraint(rows, paths, depth=depth, temperature=0.1)
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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    branch=st.integers(1, 4),
    seed=st.integers(0, 99),
    chunk=st.sampled_from([None, 1, 7]),
    wide=st.sampled_from([3, 10, 512]),
)
def test_blocks_pair_each_anchor_with_its_whole_group_once(rows, branch, seed, chunk, wide):
    path_M2 = ragged_paths(rows, 2, seed, branch)
    parent_M, child_M = torch.where(path_M2[:, 1] >= 0, path_M2[:, 0], -1), path_M2[:, 1]
    local_B = torch.nonzero(torch.from_numpy(np.random.default_rng(seed).random(rows) < 0.7)).flatten()
    with blocks_of(wide):
        layout = category_layout(parent_M[local_B], child_M[local_B], parent_M, child_M)
        blocks = list(category_blocks(layout, chunk=chunk))
    pairs, positives = [], []
    for block in blocks:
        if isinstance(block.anchor, slice):
            anchor_GA, key_GK = torch.arange(rows)[block.anchor][None], torch.arange(rows)[block.key][None]
            real_GAK = torch.ones(1, anchor_GA.shape[1], key_GK.shape[1], dtype=torch.bool)
        else:
            anchor_GA, key_GK = block.anchor, block.key
            real_GAK = block.anchor_valid_GA[:, :, None] & block.key_valid_GK[:, None, :]
        assert chunk is None or anchor_GA.numel() <= chunk
        first_GA, size_GA = layout.first_A[anchor_GA], layout.size_A[anchor_GA]
        slot_K = torch.arange(key_GK.shape[1])
        own_GAK = (slot_K >= first_GA[..., None]) & (slot_K < (first_GA + size_GA)[..., None])
        assert int((own_GAK & real_GAK).sum(2).max()) == block.positives
        row_GA, row_GK = local_B[layout.anchor_A[anchor_GA]], layout.key_N[key_GK]
        row, other = torch.broadcast_tensors(row_GA[:, :, None], row_GK[:, None, :])
        pairs += list(zip(row[real_GAK].tolist(), other[real_GAK].tolist(), strict=True))
        positives += list(zip(row[real_GAK & own_GAK].tolist(), other[real_GAK & own_GAK].tolist(), strict=True))
    parent, child = parent_M.tolist(), child_M.tolist()
    counted = [
        a for a in local_B.tolist()
        if child[a] >= 0 and child.count(child[a]) > 1 and parent.count(parent[a]) > child.count(child[a])
    ]  # fmt: skip
    assert sorted(pairs) == [(a, k) for a in counted for k in range(rows) if parent[a] == parent[k]]
    assert sorted(positives) == [(a, k) for a in counted for k in range(rows) if child[a] == child[k]]


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
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_dispersion_equals_oracle(chunk, temperature):
    reconstruction_BD, embedding_BD = random_rows(13, 6, seed=4), random_rows(13, 6, seed=5)
    fast = losses.dispersion(reconstruction_BD, embedding_BD, temperature=temperature, chunk=chunk)
    slow = oracle.dispersion(reconstruction_BD.numpy(), embedding_BD.numpy(), temperature=temperature)
    assert float(fast) == pytest.approx(slow, rel=1e-9, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 12), seed=st.integers(0, 999), share=st.floats(0, 1), chunk=st.sampled_from([None, 1, 5]))
def test_query_item_contrast_equals_oracle(rows, seed, share, chunk):
    item_BZ, query_BZ = random_rows(rows, 4, seed=seed), random_rows(rows, 4, seed=seed + 1)
    has_query_B = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < share
    query_BZ[~has_query_B] = torch.nan
    fast = losses.query_item_contrast(item_BZ, query_BZ, has_query_B, temperature=0.2, chunk=chunk)
    slow = oracle.query_item(item_BZ.numpy(), query_BZ.numpy(), has_query_B.tolist(), temperature=0.2)
    assert float(fast) == pytest.approx(slow, rel=1e-9, abs=1e-10)


def test_query_item_contrast_without_a_query_is_zero_with_zero_gradient():
    item_BZ, query_BZ = random_rows(5, 3, seed=0).requires_grad_(), random_rows(5, 3, seed=1).requires_grad_()
    loss = losses.query_item_contrast(item_BZ, query_BZ, torch.zeros(5, dtype=torch.bool), temperature=0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not item_BZ.grad.any() and not query_BZ.grad.any()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_in_batch_terms_are_invariant(seed, scale):
    one_BZ, other_BZ = random_rows(12, 4, seed=seed), random_rows(12, 4, seed=seed + 1)
    has_query_B = torch.arange(12) % 3 > 0
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    plain = losses.dispersion(one_BZ, other_BZ, temperature=0.1)
    pair = losses.query_item_contrast(one_BZ, other_BZ, has_query_B, temperature=0.1)
    for one, other, has in [
        (one_BZ[order], other_BZ[order], has_query_B[order]),
        (one_BZ * scale, other_BZ / scale, has_query_B),
    ]:
        torch.testing.assert_close(losses.dispersion(one, other, temperature=0.1), plain, rtol=0, atol=1e-10)
        again = losses.query_item_contrast(one, other, has, temperature=0.1)
        torch.testing.assert_close(again, pair, rtol=0, atol=1e-10)


def contrastive_terms():
    """Every contrastive term as a function of two tables of 512 rows, for the comparison of precisions."""
    category_BH, has_query_B = ragged_paths(512, 3, seed=1, branch=5), torch.arange(512) % 3 > 0
    terms = {
        f"hierarchical {depth} {negatives}": lambda a, b, depth=depth, negatives=negatives: (
            hierarchical_class_constraint(a, category_BH, depth=depth, temperature=0.1, negatives=negatives)
        )
        for depth, negatives in [(0, "siblings"), (1, "siblings"), (2, "siblings"), (2, "all")]
    }
    terms["dispersion"] = lambda a, b: losses.dispersion(a, b, temperature=0.1)
    terms["query item"] = lambda a, b: losses.query_item_contrast(a, b, has_query_B, temperature=0.1)
    terms["cold"] = lambda a, b: hierarchical_class_constraint(a, category_BH, depth=0, temperature=0.02)
    terms["cold dispersion"] = lambda a, b: losses.dispersion(a, b, temperature=0.005)
    return terms


@pytest.mark.parametrize("name", contrastive_terms())
def test_float32_is_close_to_float64_at_512_rows(name):
    term = contrastive_terms()[name]
    found = []
    for dtype in (torch.float32, torch.float64):
        tables = [random_rows(512, 16, seed=seed).to(dtype).requires_grad_() for seed in (1, 2)]
        loss = term(*tables)
        assert loss.dtype == dtype
        found.append((loss.detach(), torch.autograd.grad(loss, tables[0])[0]))
    (loss, gradient), (exact_loss, exact_gradient) = found
    assert float(loss) == pytest.approx(float(exact_loss), rel=1e-5)
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 1e-5


def test_nothing_is_differentiated_when_nobody_asks():
    rows_BZ, category_BH = random_rows(20, 4, seed=1), ragged_paths(20, 2, seed=1)
    with torch.no_grad():
        loss = hierarchical_class_constraint(
            rows_BZ.requires_grad_(), category_BH, depth=0, temperature=0.1
        ) + losses.dispersion(rows_BZ, rows_BZ, temperature=0.1)
    assert not loss.requires_grad


MEMORY = """
import torch
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.step import LossWeights, training_loss
torch.set_num_threads(1)
model = ResidualQuantizer(width=768, hidden=(512, 256, 128), latent=32, codes_per_level=(256,) * 4)
leaf_B = torch.randint(0, 561, (4096,))
category_BH = torch.stack((leaf_B // 47, 12 + leaf_B // 7, 99 + leaf_B), 1)
training_loss(model, torch.randn(4096, 768), category_BH, weights=LossWeights()).total.backward()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def test_a_step_of_4096_rows_stays_under_3_gib():
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 2**20 < 3


def test_cluster_scale_equals_oracle():
    logit_BK = random_rows(9, 5, seed=6) * 3
    fast = losses.cluster_scale_from_log(logit_BK.log_softmax(1))
    assert float(fast) == pytest.approx(oracle.cluster_scale(logit_BK.softmax(1).numpy()), abs=1e-12)


def test_cluster_scale_is_zero_when_even_and_finite_when_collapsed():
    assert float(losses.cluster_scale_from_log(torch.full((4, 8), 1 / 8).log())) == pytest.approx(0.0, abs=1e-6)
    collapsed_BK = torch.nn.functional.one_hot(torch.zeros(4, dtype=torch.int64), 8).float()
    expected = math.log(8) - math.log(8) + 7 / 8 * -math.log(1e-30)
    assert float(losses.cluster_scale_from_log(collapsed_BK.clamp_min(1e-30).log())) == pytest.approx(
        expected, rel=1e-6
    )
    logit_BK = torch.tensor([[0.0, -500.0]]).repeat(4, 1).requires_grad_()
    losses.cluster_scale_from_log(logit_BK.log_softmax(1)).backward()
    assert logit_BK.grad[:, 1].abs().min() > 0


@pytest.mark.parametrize("wide", [3, 512])
@pytest.mark.parametrize("depth, chunk, negatives", [(0, None, "all"), (1, None, "siblings"), (1, 2, "all")])
def test_hierarchical_gradients(wide, depth, chunk, negatives):
    category_BH = ragged_paths(11, 2, seed=8, branch=2)
    residual_BZ = random_rows(11, 3, seed=9).requires_grad_()
    arguments = {"depth": depth, "chunk": chunk, "negatives": negatives}
    for temperature in (0.5, 0.02):
        with blocks_of(wide):
            assert torch.autograd.gradcheck(
                lambda r, t=temperature: hierarchical_class_constraint(r, category_BH, temperature=t, **arguments),
                residual_BZ,
            )


def test_gradients():
    one_BZ, other_BZ = random_rows(9, 3, seed=9).requires_grad_(), random_rows(9, 3, seed=10).requires_grad_()
    has_query_B = torch.arange(9) % 3 > 0
    for chunk, temperature in [(None, 0.5), (4, 0.02)]:
        shared = {"chunk": chunk, "temperature": temperature}
        for tables in [(one_BZ, other_BZ), (one_BZ, other_BZ.detach()), (one_BZ.detach(), other_BZ)]:
            assert torch.autograd.gradcheck(lambda a, b, s=shared: losses.dispersion(a, b, **s), tables)
            assert torch.autograd.gradcheck(
                lambda a, b, s=shared: losses.query_item_contrast(a, b, has_query_B, **s), tables
            )
    assert torch.autograd.gradcheck(lambda r: losses.cluster_scale_from_log(r.log_softmax(1)), one_BZ)
    codeword_LBZ = other_BZ.detach()[None]
    assert torch.autograd.gradcheck(lambda r: losses.reconstruction_loss(r, codeword_LBZ[0]), one_BZ)


def test_unit_rows_keeps_direction_and_zero():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-20, 4e-20]])
    torch.testing.assert_close(unit_rows(rows), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]))


def test_bad_arguments_are_named():
    residual_BZ, category_BH = torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(InputError, match=r"depth 1 is not a column of the categories, which have 1"):
        hierarchical_class_constraint(residual_BZ, category_BH, depth=1, temperature=0.1)
    with pytest.raises(InputError, match=r'negatives must be "siblings" or "all", found \'hard\''):
        hierarchical_class_constraint(residual_BZ, category_BH, depth=0, temperature=0.1, negatives="hard")
    with pytest.raises(InputError, match=r"found \(2, 3, 4\) and \(2, 3, 5\)"):
        losses.residual_quantization_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), commitment=0.25)
    with pytest.raises(InputError, match=r"found \(2, 3\), \(2, 3\) and torch.int64 \(2,\)"):
        losses.query_item_contrast(residual_BZ, residual_BZ, category_BH[:, 0], temperature=0.1)
