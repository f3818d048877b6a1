"""Shared InfoNCE machinery: cosine rows, global means over ranks, and pairwise blocks that hold only rows of one group.

Unusual: nothing builds a B×B mask over the whole batch unless the whole batch is one group. Rows are sorted by group
and groups of similar size are padded into one G×A×K block, so the cost is about the sum of squared group sizes.
Nobody needs to know its rank: a row's pairing with itself is computed apart and subtracted instead of being masked out.

Shape letters: B local rows (anchors), M rows of all ranks (keys), Z features, G groups in a block, A anchors and K keys
per padded group.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Gather = Callable[[Tensor], Tensor]

# Stands for −∞ in a logit: its exp() is exactly 0 in float32 and float64, but unlike −∞ it leaves no NaN in gradients.
EXCLUDED = -1e9


class Block(NamedTuple):
    """Anchors and keys of some groups, padded to a common size; padded slots point at row 0 and are not valid."""

    anchor_GA: Tensor  # int64, rows of the anchors
    key_GK: Tensor  # int64, rows of the keys
    anchor_valid_GA: Tensor  # bool
    key_valid_GK: Tensor  # bool


def unit_rows(rows_BZ: Tensor) -> Tensor:
    """`rows_BZ` on the unit sphere, B×Z; a row of norm 0 stays 0 and gets gradient 0 (its direction is undefined)."""
    norm_B1 = torch.linalg.vector_norm(rows_BZ, dim=1, keepdim=True)
    zero_B1 = norm_B1 < 1e-30
    return (rows_BZ / norm_B1.masked_fill(zero_B1, 1.0)).masked_fill(zero_B1, 0.0)


def gathered(rows_B: Tensor, gather: Gather | None) -> Tensor:
    """The rows of all ranks, or the local rows when there is no `gather`."""
    return rows_B if gather is None else gather(rows_B.contiguous())


def global_mean(total: Tensor, count: Tensor | int, gather: Gather | None) -> Tensor:
    """Σ total / Σ count over all ranks, a scalar; exactly 0 (with gradient 0) when nothing was counted anywhere."""
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    sums_R2 = gathered(torch.stack((total, count))[None], gather)
    return sums_R2[:, 0].sum() / sums_R2[:, 1].sum().clamp_min(1.0)


def bounded(function: Callable[..., Tensor], *arguments, chunk: int | None) -> Tensor:
    """`function(*arguments)`, its intermediates recomputed in the backward pass when memory is bounded by `chunk`."""
    if chunk is None or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)


class _LogSumExpOfProduct(torch.autograd.Function):
    """logsumexp over keys of query · key, …×A, without the excluded pairs.

    Keeps the exponentials instead of the logits, so that the backward pass is two matrix products and no pass over
    pairs: 0.6 of the time of `logsumexp` behind a product at 4096 × 4096 on one core.
    """

    @staticmethod
    def forward(ctx, query_AZ: Tensor, key_KZ: Tensor, excluded_AK: Tensor | None) -> Tensor:
        weight_AK = query_AZ @ key_KZ.mT
        if excluded_AK is not None:
            weight_AK.masked_fill_(excluded_AK, EXCLUDED)
        most_A1 = weight_AK.amax(-1, keepdim=True)
        total_A1 = weight_AK.sub_(most_A1).exp_().sum(-1, keepdim=True)
        ctx.save_for_backward(query_AZ, key_KZ, weight_AK, total_A1)
        return (most_A1 + total_A1.log()).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_A: Tensor):
        query_AZ, key_KZ, weight_AK, total_A1 = ctx.saved_tensors
        share_A1 = gradient_A[..., None] / total_A1
        query_gradient = (weight_AK @ key_KZ) * share_A1 if ctx.needs_input_grad[0] else None
        key_gradient = weight_AK.mT @ (query_AZ * share_A1) if ctx.needs_input_grad[1] else None
        return query_gradient, key_gradient, None


def in_batch_nce(query_BZ: Tensor, own_key_BZ: Tensor, key_MZ: Tensor, *, chunk: int | None) -> Tensor:
    """Per row −log( exp(q·k_own) / Σ_m exp(q·k_m) ), length B (METHODS 0.5); `key_MZ` includes the own key."""

    def denominator(block_bZ: Tensor, key_MZ: Tensor) -> Tensor:
        return _LogSumExpOfProduct.apply(block_bZ, key_MZ, None)

    pieces = [
        bounded(denominator, block_bZ, key_MZ, chunk=chunk) for block_bZ in query_BZ.split(chunk or len(query_BZ) or 1)
    ]
    return torch.cat(pieces) - (query_BZ * own_key_BZ).sum(1)


def group_blocks(anchor_group_B: Tensor, key_group_M: Tensor, *, chunk: int | None = None) -> Iterator[Block]:
    """Blocks that pair every anchor with all keys of its group, each anchor in exactly one block.

    int64 group per row, −1 = takes no part; an anchor's group must occur among the keys. Groups whose sizes round up to
    the same power of two share a block. `chunk` bounds the anchors of a block.
    """
    key_order, key_start, key_count, group_G = _sorted_groups(key_group_M)
    anchor_order, anchor_start, anchor_count, anchor_group = _sorted_groups(anchor_group_B)
    if not len(anchor_group):
        return
    of_key = torch.searchsorted(group_G, anchor_group)
    key_start, key_count = key_start[of_key], key_count[of_key]
    bucket_G = torch.ceil(torch.log2(key_count.double())).long()
    for bucket in torch.unique(bucket_G).tolist():
        member_G = torch.nonzero(bucket_G == bucket).flatten()
        widest = int(anchor_count[member_G].max())
        for some_G in member_G.split(max(1, (chunk or 1 << 62) // widest)):
            key_GK, key_valid_GK = _padded(key_order, key_start[some_G], key_count[some_G])
            anchor_GA, anchor_valid_GA = _padded(anchor_order, anchor_start[some_G], anchor_count[some_G])
            width = chunk or anchor_GA.shape[1]
            for index_GA, valid_GA in zip(anchor_GA.split(width, 1), anchor_valid_GA.split(width, 1), strict=True):
                yield Block(index_GA, key_GK, valid_GA, key_valid_GK)


def negative_logsumexp(
    query_BZ: Tensor,
    key_MZ: Tensor,
    anchor_label_B: Tensor,
    key_label_M: Tensor,
    blocks: Iterator[Block],
    *,
    chunk: int | None,
) -> Tensor:
    """Length B: log Σ_n exp(q·k_n) over the keys of the anchor's block with another label; `EXCLUDED` without block."""

    def one_block(query_BZ: Tensor, key_MZ: Tensor, block: Block) -> Tensor:
        excluded_GAK = anchor_label_B[block.anchor_GA][:, :, None] == key_label_M[block.key_GK][:, None, :]
        if len(block.key_GK) > 1:
            excluded_GAK |= ~block.key_valid_GK[:, None, :]
        query_GAZ, key_GKZ = rows_at(query_BZ, block.anchor_GA), rows_at(key_MZ, block.key_GK)
        return _LogSumExpOfProduct.apply(query_GAZ, key_GKZ, excluded_GAK)[block.anchor_valid_GA]

    return _scattered(one_block, query_BZ, key_MZ, blocks, EXCLUDED, chunk)


def positive_sum(
    query_BZ: Tensor, key_MZ: Tensor, negative_B: Tensor, blocks: Iterator[Block], *, chunk: int | None
) -> Tensor:
    """Length B: Σ_p −log( exp(s_p) / (exp(s_p) + exp(negative)) ) over all keys of the block, the anchor included."""

    def one_block(query_BZ: Tensor, key_MZ: Tensor, block: Block) -> Tensor:
        logit_GAK = rows_at(query_BZ, block.anchor_GA) @ rows_at(key_MZ, block.key_GK).mT
        term_GAK = functional.softplus(negative_B[block.anchor_GA][:, :, None] - logit_GAK)
        if len(block.key_GK) > 1:
            term_GAK = term_GAK.masked_fill(~block.key_valid_GK[:, None, :], 0.0)
        return term_GAK.sum(2)[block.anchor_valid_GA]

    return _scattered(one_block, query_BZ, key_MZ, blocks, 0.0, chunk)


def rows_at(rows_BZ: Tensor, index_GA: Tensor) -> Tensor:
    """`rows_BZ[index_GA]`, G×A×Z, by `embedding`, whose backward pass is a sorted sum and not a slow scattered one."""
    return functional.embedding(index_GA, rows_BZ)


def _scattered(one_block, query_BZ: Tensor, key_MZ: Tensor, blocks: Iterator[Block], empty: float, chunk) -> Tensor:
    """Length B: `one_block` of every block, put back at its anchors' rows; `empty` for anchors outside all blocks."""
    pieces, rows = [], []
    for block in blocks:
        pieces.append(bounded(one_block, query_BZ, key_MZ, block, chunk=chunk))
        rows.append(block.anchor_GA[block.anchor_valid_GA])
    filled_B = query_BZ.new_full((len(query_BZ),), empty)
    return filled_B.index_put((torch.cat(rows),), torch.cat(pieces)) if pieces else filled_B


def _sorted_groups(group_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by group (−1 left out), and per group: start in that order, count, id."""
    order = torch.argsort(group_B, stable=True)
    order = order[int((group_B < 0).sum()) :]
    group_G, count_G = torch.unique_consecutive(group_B[order], return_counts=True)
    return order, count_G.cumsum(0) - count_G, count_G, group_G


def _padded(order: Tensor, start_G: Tensor, count_G: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each group as G×max(count), and which slots hold one."""
    slot_S = torch.arange(int(count_G.max()), device=order.device)
    valid_GS = slot_S < count_G[:, None]
    return torch.where(valid_GS, order[(start_G[:, None] + slot_S).clamp_max(len(order) - 1)], 0), valid_GS
