"""Training on a GPU is training on the CPU: the same losses and gradients, and each goes on where the other stopped.

Skipped where there is no CUDA device.
"""

import copy

import pytest
import torch

from catid2_ray.artifacts.release import pointer
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.generator.step import fit as fit_generator
from catid2_ray.on_ray.commands import reindex
from catid2_ray.quantizer.step import LossWeights, fit, training_loss
from tests.unit.generator.test_model_and_step import SPACE, examples, small
from tests.unit.quantizer.test_quantizer_training import FIT, build, tree

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EVERY_TERM = LossWeights(dispersion=0.3, hierarchical=0.2, cluster_scale=0.7, reconstruction=0.5, temperature=0.5)


@pytest.fixture(autouse=True)
def _exact():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("category_on", ["residual", "prefix", "latent", "projection"])
def test_a_step_of_the_quantizer_is_the_same(category_on):
    embedding_ND, category_NH = tree(60)
    weights = LossWeights(**(EVERY_TERM.__dict__ | {"category_on": category_on, "category_decay": 0.5}))
    found = []
    for device in ("cpu", GPU):
        model = build(projection=True).double().to(device)
        loss = training_loss(model, embedding_ND.double().to(device), category_NH.to(device), weights=weights)
        loss.total.backward()
        gradients = {name: one.grad.cpu() for name, one in model.named_parameters() if one.grad is not None}
        found.append(({name: float(term) for name, term in loss.weighted.items()}, gradients))
    (on_cpu, cpu_gradients), (on_gpu, gpu_gradients) = found
    assert on_gpu == pytest.approx(on_cpu, abs=1e-9)
    torch.testing.assert_close(gpu_gradients, cpu_gradients, atol=1e-9, rtol=1e-7)


def test_the_quantizer_trains_as_on_the_cpu():
    """From k-means to the last epoch. Sums are rounded otherwise, and a code of a row between two may be the other."""
    embedding_ND, category_NH = tree()
    on_cpu, on_gpu = (
        fit(embedding_ND.to(device), category_NH.to(device), model=build().to(device), weights=EVERY_TERM, **FIT)
        for device in ("cpu", GPU)
    )
    assert [epoch["loss"] for epoch in on_gpu] == pytest.approx([epoch["loss"] for epoch in on_cpu], rel=0.05)


def trained(model, *, steps, resume=None, space: DocidSpace = SPACE):
    run = {"space": space, "batch": 6, "learning_rate": 0.01, "warmup_share": 0.1, "total_steps": 20}
    return fit_generator(model, examples(), steps=steps, resume=resume, **run)


def test_the_generator_trains_as_on_the_cpu():
    first = small(dropout=0.0)
    on_cpu, on_gpu = (trained(copy.deepcopy(first).to(device), steps=20) for device in ("cpu", GPU))
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-3)


@pytest.mark.parametrize("begun, ended", [("cpu", GPU), (GPU, "cpu")])
def test_a_training_goes_on_where_another_device_stopped(begun, ended):
    first = small(dropout=0.0)
    whole = trained(copy.deepcopy(first), steps=20)
    part = copy.deepcopy(first).to(begun)
    before = trained(part, steps=8)
    after = trained(part.to(ended), steps=20, resume=before)
    assert before.losses + after.losses == pytest.approx(whole.losses, rel=1e-3)


@pytest.mark.cluster
def test_one_rank_of_nccl_makes_a_release(tiny, tmp_path):
    """A whole job whose training workers ask for a GPU each, through Ray Train and DeepSpeed as on a cluster."""
    source = Store(tmp_path / "source")
    made = generate(products=60, queries=40, seed=1)
    source.write_table("products.parquet", made.products)
    source.write_table("pairs.parquet", made.pairs)
    tiny |= {"store": str(tmp_path / "store"), "catalog": {"root": source.uri}, "cluster": {"gpus_per_worker": 1}}
    release = reindex(Recipe.build(tiny)).figures["release"]
    assert pointer(Store(tmp_path / "store")) == (1, release)
