"""Two ranks with B/2 rows each give the losses and gradients of one process with B rows, in float64.

Unusual: once with ranks as threads of one process, whose shared autograd graph makes the averaged gradient visible;
once with two real processes over gloo and unequal shards, one of which holds no category at all.
"""

import functools
import threading

import pytest
import torch
import torch.distributed as dist

from catid2_ray.quantizer import losses
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.step import LossWeights, training_loss
from tests.ranks import run_ranks

WEIGHTS = LossWeights(dispersion=0.7, hierarchical=0.3, cluster_scale=0.5, reconstruction=0.2)
SPLIT = 7


def hierarchical_class_constraint(*args, **settings_):
    return losses.hierarchical_class_terms(*args, **settings_).loss


def problem() -> tuple[ResidualQuantizer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = ResidualQuantizer(width=6, hidden=(5,), latent=4, codes_per_level=(8, 8, 8)).double()
    embedding_BD = torch.randn(18, 6, dtype=torch.float64)
    category_BH = torch.stack((torch.arange(18) % 2, torch.arange(18) % 6), 1)
    category_BH[:SPLIT] = -1
    return model, embedding_BD, category_BH


class GatherRows(torch.autograd.Function):
    """Rows of all ranks with gradients, for shards of unequal length."""

    @staticmethod
    def forward(ctx, rows):
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor(len(rows)))
        ctx.counts = [int(count) for count in counts]
        padded = rows.new_zeros((max(ctx.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, embedding_BD, category_BH = problem()
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    loss = training_loss(model, embedding_BD[mine], category_BH[mine], weights=WEIGHTS, gather=GatherRows.apply)
    loss.total.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    torch.save((loss.total.detach(), loss.terms, [p.grad for p in model.parameters()]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_gloo_processes_equal_one(tmp_path):
    run_ranks(run_rank, (2, (str(tmp_path),)))
    model, embedding_BD, category_BH = problem()
    whole = training_loss(model, embedding_BD, category_BH, weights=WEIGHTS)
    whole.total.backward()
    assert whole.terms["hierarchical"] > 0
    for rank in range(2):
        total, terms, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(total, whole.total.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(terms, whole.terms, rtol=0, atol=1e-10)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-10)


def hierarchical(depth, residual_BZ, category_BH, gather):
    return hierarchical_class_constraint(residual_BZ, category_BH, depth=depth, temperature=0.3, gather=gather)


CASES = {
    "hierarchical 0": functools.partial(hierarchical, 0),
    "hierarchical 1": functools.partial(hierarchical, 1),
    "soft contrast": lambda rows, category, gather: (
        losses.ancestor_contrast(
            rows, category.masked_fill(category == 3, -1), decay=0.5, temperature=0.3, gather=gather
        ).loss
    ),
    "dispersion": lambda rows, category, gather: losses.dispersion(
        rows, rows.detach().flip(1), temperature=0.3, gather=gather
    ),
    "both sides of dispersion": lambda rows, category, gather: losses.dispersion(
        rows, rows.flip(1), temperature=0.3, gather=gather
    ),
    "query item": lambda rows, category, gather: losses.query_item_contrast(
        rows, rows.flip(1) ** 3, category[:, 1] > 0, temperature=0.3, gather=gather
    ),
    "usage from log": lambda rows, category, gather: losses.cluster_scale_from_log(rows.log_softmax(1), gather=gather),
    "quantization": lambda rows, category, gather: losses.residual_quantization_loss(
        rows[None], rows.detach()[None] * 0.5, commitment=0.25, gather=gather
    ),
}


def run_threads(term, shards):
    """Each rank's loss, ranks being threads whose gather is a plain concatenation of what all of them bring."""
    barrier, brought, found = threading.Barrier(len(shards), timeout=20), [None] * len(shards), [None] * len(shards)

    def rank_loop(rank):
        def gather(tensor):
            brought[rank] = tensor
            barrier.wait()
            everything = torch.cat(brought)
            barrier.wait()
            return everything

        found[rank] = term(*shards[rank], gather)

    threads = [threading.Thread(target=rank_loop, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("split", [0, 1, 7])
def test_simulated_ranks_see_the_global_loss_and_gradient(name, split):
    rows_BZ = torch.randn(14, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    category_BH = torch.stack((torch.arange(14) % 2, torch.arange(14) % 4), 1)
    whole = CASES[name](rows_BZ, category_BH, None)
    (expected,) = torch.autograd.grad(whole, rows_BZ)
    shards = [(rows_BZ[:split], category_BH[:split]), (rows_BZ[split:], category_BH[split:])]
    first, second = run_threads(CASES[name], shards)
    torch.testing.assert_close((first, second), (whole, whole), rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad((first + second) / 2, rows_BZ)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("split", [0, 1, 7])
def test_simulated_ranks_count_the_global_anchors(split):
    rows_BZ = torch.randn(14, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    category_BH = torch.stack((torch.arange(14) % 2, torch.arange(14) % 4), 1)
    category_BH[:3] = -1

    def anchors(rows, category, gather):
        return losses.hierarchical_class_terms(rows, category, depth=1, temperature=0.3, gather=gather).anchors

    found = run_threads(anchors, [(rows_BZ[:split], category_BH[:split]), (rows_BZ[split:], category_BH[split:])])
    assert [int(count) for count in found] == [int(anchors(rows_BZ, category_BH, None))] * 2 == [11, 11]
