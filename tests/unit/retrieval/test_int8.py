"""Integer products equal plain arithmetic on rounded numbers, however wide the batch."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catid2_ray.errors import InputError
from catid2_ray.retrieval.int8 import Int8Linear, int8_copy, weight_steps


def plain(x, weight):
    """Round both sides to 8 bits (weights to what the CPU sums exactly), row by row, and multiply in double precision."""

    def rounded(rows, steps=127):
        scale = [max(max(abs(v) for v in row) / steps, 1e-30) for row in rows.tolist()]
        return torch.tensor([[round(v / s) * s for v in row] for row, s in zip(rows.tolist(), scale)]).double()

    return rounded(x) @ rounded(weight, weight_steps()).T


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 12), inputs=st.integers(1, 40), outputs=st.integers(1, 40), seed=st.integers(0, 1000))
def test_it_equals_plain_arithmetic(rows, inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    expected = plain(x, weight)
    # A number half-way between two codes may round differently in float32 and float64: one unit of one product.
    unit = float(x.abs().max() * weight.abs().max()) / weight_steps()
    torch.testing.assert_close(Int8Linear(weight)(x).double(), expected, atol=1.1 * unit, rtol=0)
    rarely = ((Int8Linear(weight)(x).double() - expected).abs() > 1e-4 * unit * inputs).float().mean()
    assert rarely < 0.2


def test_the_largest_sums_do_not_overflow():
    """All inputs and weights at their largest, of both signs: every product is as far from 0 as it can be."""
    sign = torch.tensor([1.0, -1.0]).repeat(64)
    for x, weight in ((torch.ones(9, 128), torch.ones(8, 128)), (-sign.repeat(9, 1), sign.repeat(8, 1))):
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(Int8Linear(weight)(x).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(600, 24), (2, 300, 24), (1, 24), (0, 24), (24,)])
def test_shapes_are_kept_and_rows_do_not_feel_each_other(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    layer = Int8Linear(torch.randn(10, 24, generator=torch.Generator().manual_seed(1)))
    y = layer(x)
    assert y.shape == (*shape[:-1], 10)
    for row, answer in list(zip(x.reshape(-1, 24), y.reshape(-1, 10)))[::97]:
        assert torch.equal(layer(row[None])[0], answer)


def test_types_are_kept_zero_rows_are_zero_and_nan_is_not_hidden():
    layer = Int8Linear(torch.randn(10, 24))
    assert layer(torch.randn(3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    x = torch.zeros(3, 24)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    y = layer(x)
    assert (y[0] == 0).all() and not y[1].isfinite().any() and not y[2].isfinite().any()


def test_a_copy_shares_what_is_not_a_matrix_and_leaves_the_original_alone():
    module = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4, bias=False), nn.Linear(4, 4))
    before = module[1].weight.clone()
    twin = int8_copy(module)
    assert isinstance(twin[1], Int8Linear) and isinstance(module[1], nn.Linear)
    assert twin[0].weight is module[0].weight and twin[2].weight is module[2].weight
    assert torch.equal(module[1].weight, before)


def test_bad_weights_and_a_torch_without_onednn_are_refused(monkeypatch):
    weight = torch.ones(4, 4)
    weight[1, 2] = torch.inf
    with pytest.raises(InputError, match="NaN or infinity and cannot be made int8"):
        Int8Linear(weight)
    with pytest.raises(InputError, match="int8 weights are for CPUs, found a model on meta"):
        Int8Linear(torch.ones(4, 4, device="meta"))
    monkeypatch.setattr("catid2_ray.retrieval.int8._has_onednn", lambda: False)
    with pytest.raises(InputError, match="need a torch built with oneDNN"):
        Int8Linear(torch.ones(4, 4))


def test_products_do_not_run_in_reference_code():
    """Which is thousands of times slower; oneDNN says what it ran. The first matmul finds out how many bits are summed exactly."""
    program = (
        "import torch; torch.set_num_threads(1); from catid2_ray.retrieval.int8 import Int8Linear; "
        "Int8Linear(torch.randn(256, 256))(torch.randn(16, 256))"
    )
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_exec"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    products = [line for line in done.stdout.splitlines() if ",matmul," in line or ",inner_product," in line]
    assert len(products) == 2 and not any(",ref" in line for line in products), products
