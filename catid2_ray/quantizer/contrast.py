"""Contrastive machinery of the losses: cosine rows, means over ranks, and two fused sums of InfoNCE terms.

Unusual: both sums work out their gradients in the forward pass, block by block on one buffer, and keep only those rows
× features results; the backward pass scales them. That needs neither B×B storage nor a second product per pair. No B×B
mask is made either: rows are sorted by parent and category, so an anchor's positives are a slice of its group's keys.
Nobody needs to know its rank: a row's pairing with itself is computed apart and subtracted instead of being masked out.

Shape letters: B local rows, A anchors, M rows of all ranks (keys), N keys that take part, C categories, Z features;
in a block G groups, A anchors and K keys per padded group, P positives per anchor, itself included.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Gather = Callable[[Tensor], Tensor]

# Pairs in a block when no `chunk` is given: 4 MiB of float32 stay in a core's cache; an accelerator wants long kernels.
BLOCK_PAIRS, ACCELERATOR_PAIRS = 2**20, 2**26

# Groups with at least so many keys get blocks of their own; smaller ones of similar size are padded into one.
WIDE_GROUP = 256

# Logits up to ±40 need no shift: Σ exp stays far inside float32's range, and two passes over all pairs are saved.
SAFE_LOGIT = 40.0


class _UnitRows(torch.autograd.Function):
    """Normalisation with a backward pass in one new array; autograd's own makes five of them."""

    @staticmethod
    def forward(ctx, rows_BZ: Tensor) -> Tensor:
        norm_B1 = torch.linalg.vector_norm(rows_BZ, dim=1, keepdim=True)
        inverse_B1 = norm_B1.masked_fill_(norm_B1 < 1e-30, torch.inf).reciprocal_()
        unit_BZ = rows_BZ * inverse_B1
        ctx.save_for_backward(unit_BZ, inverse_B1)
        return unit_BZ

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_BZ: Tensor) -> Tensor:
        unit_BZ, inverse_B1 = ctx.saved_tensors
        along_B1 = torch.linalg.vecdot(gradient_BZ, unit_BZ)[:, None]
        return torch.addcmul(gradient_BZ, unit_BZ, along_B1, value=-1).mul_(inverse_B1)


def unit_rows(rows_BZ: Tensor) -> Tensor:
    """`rows_BZ` on the unit sphere, B×Z; a row of norm 0 stays 0 and gets gradient 0 (its direction is undefined)."""
    return _UnitRows.apply(rows_BZ)


def gathered(rows_B: Tensor, gather: Gather | None) -> Tensor:
    """The rows of all ranks, or the local rows when there is no `gather`."""
    return rows_B if gather is None else gather(rows_B.contiguous())


class GlobalMean(NamedTuple):
    mean: Tensor  # scalar
    count: Tensor  # int64 scalar


def global_mean(total: Tensor, count: int, gather: Gather | None) -> GlobalMean:
    """Σ total / Σ count over all ranks, and Σ count; exactly 0 (with gradient 0) when nothing was counted anywhere."""
    sums_R2 = gathered(torch.stack((total, torch.full_like(total, count)))[None], gather)
    counted = sums_R2[:, 1].sum()
    return GlobalMean(sums_R2[:, 0].sum() / counted.clamp_min(1.0), counted.detach().round().long())


class _Fused(torch.autograd.Function):
    """A scalar whose gradients w.r.t. query, key and own key were found together with it."""

    @staticmethod
    def forward(ctx, query_AZ, key_MZ, own_AZ, terms: Callable, temperature: float, wanted: tuple[bool, ...]):
        total, *gradients = terms(query_AZ.detach(), key_MZ.detach(), own_AZ.detach(), wanted)
        ctx.save_for_backward(*gradients)
        ctx.temperature = temperature
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        factor = scale / ctx.temperature
        return *(None if gradient is None else gradient * factor for gradient in ctx.saved_tensors), None, None, None


def _fused(terms: Callable, query_AZ: Tensor, key_MZ: Tensor, own_AZ: Tensor, temperature: float) -> Tensor:
    """`terms(query, key, own, wanted)` → scalar and its gradients times τ (None where not wanted), as one scalar."""
    wanted = tuple(torch.is_grad_enabled() and rows.requires_grad for rows in (query_AZ, key_MZ, own_AZ))
    return _Fused.apply(query_AZ, key_MZ, own_AZ, terms, temperature, wanted)


def _block_rows(keys: int, chunk: int | None, device: torch.device) -> int:
    """Anchors per block against so many keys."""
    pairs = BLOCK_PAIRS if device.type == "cpu" else ACCELERATOR_PAIRS
    return chunk or max(1, pairs // max(keys, 1))


class _Scratch:
    """One buffer for the pairs of every block: fresh memory for each costs more than the product that fills it.

    On CPU, 16 products of 256 × 4096 at Z = 32: 47 ms into new arrays, 9 ms into one.
    """

    def __init__(self, like: Tensor, temperature: float):
        self.buffer, self.alpha = like.new_empty(0), 1.0 / temperature

    def logits(self, query_GAZ: Tensor, key_GKZ: Tensor) -> Tensor:
        """query · key / τ for all pairs, G×A×K, valid until the next call."""
        shape = torch.Size((*query_GAZ.shape[:2], key_GKZ.shape[1]))
        needed = shape.numel()
        if needed > len(self.buffer):
            self.buffer = self.buffer.new_empty(needed)
        return self.buffer[:needed].view(shape).baddbmm_(query_GAZ, key_GKZ.mT, beta=0, alpha=self.alpha)


def in_batch_nce(
    unit_BZ: Tensor, own_key_BZ: Tensor, key_MZ: Tensor, *, temperature: float, chunk: int | None
) -> Tensor:
    """Σ_b −log( exp(u_b·k_own/τ) / Σ_m exp(u_b·k_m/τ) ), a scalar (METHODS 0.5).

    All rows have norm 1 (or 0); `key_MZ` includes the own keys. `chunk` bounds the rows that are compared at a time.
    """

    def terms(query_BZ: Tensor, key_MZ: Tensor, own_BZ: Tensor, wanted: tuple[bool, ...]):
        total = -(query_BZ * own_BZ).sum() / temperature
        query_gradient = torch.empty_like(query_BZ) if wanted[0] else None
        key_gradient = torch.zeros_like(key_MZ) if wanted[1] else None
        rows, scratch = _block_rows(len(key_MZ), chunk, key_MZ.device), _Scratch(key_MZ, temperature)
        for start in range(0, len(query_BZ), rows):
            block_bZ = query_BZ[start : start + rows]
            weight_bM = scratch.logits(block_bZ[None], key_MZ[None])[0]
            shift_b1 = _shift(weight_bM, temperature)
            sum_b1 = weight_bM.exp_().sum(1, keepdim=True)
            total += sum_b1.log().sum() + shift_b1.sum()
            if wanted[0]:
                torch.mm(weight_bM, key_MZ, out=query_gradient[start : start + rows]).div_(sum_b1)
            if wanted[1]:
                key_gradient.addmm_(weight_bM.T, block_bZ / sum_b1)
        if wanted[0]:
            query_gradient -= own_BZ
        return total, query_gradient, key_gradient, -query_BZ if wanted[2] else None

    return _fused(terms, unit_BZ, key_MZ, own_key_BZ, temperature)


def _shift(logit_AK: Tensor, temperature: float) -> Tensor:
    """Subtract each row's maximum in place where exp() could leave float32's range; returns what was subtracted."""
    if temperature * SAFE_LOGIT >= 1.0:
        return logit_AK.new_zeros(())
    most_A1 = logit_AK.amax(-1, keepdim=True)
    logit_AK -= most_A1
    return most_A1


class Layout(NamedTuple):
    """Who is compared with whom: sorted by parent, inside by the category's size, so that every slice is contiguous."""

    anchor_A: Tensor  # int64, local rows that count
    key_N: Tensor  # int64, rows of all ranks
    first_A: Tensor  # int64, where the anchor's own category starts among the keys of its group
    size_A: Tensor  # int64, rows of the anchor's own category, itself included
    sizes: list[int]  # `size_A` on the host
    groups: list[tuple[int, int, int, int]]  # per parent: first anchor, anchors, first key, keys


def category_layout(parent_B: Tensor, child_B: Tensor, parent_M: Tensor, child_M: Tensor) -> Layout:
    """Sort local anchors and the keys of all ranks; −1 = takes no part, a child has one parent.

    An anchor counts when its category has another row and its parent another category. Every anchor is among the keys.
    """
    id_C, child_of_M, size_C = torch.unique(child_M, return_inverse=True, return_counts=True)
    parent_C = torch.empty_like(id_C).scatter_(0, child_of_M, parent_M)
    order_C = size_C.argsort(stable=True)
    order_C = order_C[parent_C[order_C].argsort(stable=True)]
    place_C = torch.empty_like(order_C).scatter_(0, order_C, torch.arange(len(order_C), device=order_C.device))
    size_C = size_C[order_C]
    start_C = size_C.cumsum(0) - size_C
    parent_G, group_C = torch.unique_consecutive(parent_C[order_C], return_inverse=True)
    keys_G = torch.zeros_like(parent_G).index_add_(0, group_C, size_C)
    start_G = keys_G.cumsum(0) - keys_G

    place_B = place_C[torch.searchsorted(id_C, child_B)]
    counted_B = (child_B >= 0) & (size_C[place_B] > 1) & (keys_G[group_C[place_B]] > size_C[place_B])
    anchor_A = torch.nonzero(counted_B).flatten()
    anchor_A = anchor_A[place_B[anchor_A].argsort(stable=True)]
    place_A = place_B[anchor_A]
    group_A, size_A = group_C[place_A], size_C[place_A]
    anchors_G = torch.zeros_like(keys_G).index_add_(0, group_A, torch.ones_like(group_A))
    table = torch.stack((anchors_G.cumsum(0) - anchors_G, anchors_G, start_G, keys_G), 1).tolist()
    return Layout(
        anchor_A,
        place_C[child_of_M].argsort(stable=True),
        start_C[place_A] - start_G[group_A],
        size_A,
        size_A.tolist(),
        [tuple(group) for group in table if group[1]],
    )


class Block(NamedTuple):
    """Anchors and keys of one group (slices) or of several, padded to a common size (G×A, G×K, which are real)."""

    anchor: slice | Tensor
    key: slice | Tensor
    anchor_valid_GA: Tensor | None
    key_valid_GK: Tensor | None
    positives: int  # the most that any anchor has


def category_blocks(layout: Layout, *, chunk: int | None = None) -> Iterator[Block]:
    """Blocks that pair every anchor with all keys of its group, each anchor in exactly one block.

    `chunk` bounds the anchors of a block, padding included.
    """
    device, buckets = layout.anchor_A.device, {}
    for group in layout.groups:
        first, anchors, key, keys = group
        if keys < WIDE_GROUP and anchors <= (chunk or anchors):
            buckets.setdefault((keys - 1).bit_length(), []).append(group)
            continue
        rows = _block_rows(keys, chunk, device)
        for start in range(first, first + anchors, rows):
            end = min(start + rows, first + anchors)
            yield Block(slice(start, end), slice(key, key + keys), None, None, layout.sizes[end - 1])
    for bucket in buckets.values():
        anchors, keys = (max(group[column] for group in bucket) for column in (1, 3))
        together = max(1, _block_rows(keys, chunk, device) // anchors)
        for start in range(0, len(bucket), together):
            some = bucket[start : start + together]
            first_G, anchors_G, key_G, keys_G = torch.tensor(some, device=device).T
            anchor_GA, anchor_valid_GA = _padded(first_G, anchors_G, max(group[1] for group in some))
            key_GK, key_valid_GK = _padded(key_G, keys_G, max(group[3] for group in some))
            positives = max(layout.sizes[group[0] + group[1] - 1] for group in some)
            yield Block(anchor_GA, key_GK, anchor_valid_GA, key_valid_GK, positives)


def _padded(start_G: Tensor, count_G: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """start … start + count − 1 of each group as G×width, 0 where there is none, and where there is one."""
    slot_S = torch.arange(width, device=start_G.device)
    valid_GS = slot_S < count_G[:, None]
    return torch.where(valid_GS, start_G[:, None] + slot_S, 0), valid_GS


def category_nce(unit_BZ: Tensor, key_MZ: Tensor, layout: Layout, *, temperature: float, chunk: int | None) -> Tensor:
    """Σ_a mean_p −log( exp(s_ap/τ) / (exp(s_ap/τ) + Σ_n exp(s_an/τ)) ) over anchors a, a scalar (METHODS 1.3, eq. 4).

    All rows have norm 1 (or 0). `chunk` bounds the anchors that are compared at a time.
    """

    def terms(query_BZ: Tensor, key_MZ: Tensor, own_BZ: Tensor, wanted: tuple[bool, ...]):
        query_AZ, own_AZ, key_NZ = query_BZ[layout.anchor_A], own_BZ[layout.anchor_A], key_MZ[layout.key_N]
        total = query_AZ.new_zeros(())
        gradients = [torch.zeros_like(rows) for rows in (query_AZ, key_NZ, own_AZ)]
        scratch = _Scratch(key_NZ, temperature)
        for block in category_blocks(layout, chunk=chunk):
            rows = (_take(query_AZ, block.anchor), _take(key_NZ, block.key), _take(own_AZ, block.anchor))
            loss, *parts = _category_block(*rows, layout, block, scratch, temperature, any(wanted))
            total += loss
            for gradient, part, index in zip(gradients, parts, (block.anchor, block.key, block.anchor), strict=False):
                _add(gradient, index, part)
        places = ((query_BZ, layout.anchor_A), (key_MZ, layout.key_N), (own_BZ, layout.anchor_A))
        return total, *(
            torch.zeros_like(rows).index_copy_(0, index, gradient) if want else None
            for want, (rows, index), gradient in zip(wanted, places, gradients, strict=True)
        )

    return _fused(terms, unit_BZ, key_MZ, unit_BZ, temperature)


def _category_block(
    query_GAZ: Tensor,
    key_GKZ: Tensor,
    own_GAZ: Tensor,
    layout: Layout,
    block: Block,
    scratch: _Scratch,
    temperature: float,
    graded: bool,
) -> tuple[Tensor, ...]:
    """The block's sum and, when `graded`, its gradients w.r.t. queries, keys and own keys, times τ.

    With x_p = log Σ_n exp(s_n) − s_p a term is softplus(x_p), its slope −σ(x_p) in s_p and σ(x_p)·softmax_n in s_n.
    """
    first_GA1, size_GA1 = _take(layout.first_A, block.anchor)[..., None], _take(layout.size_A, block.anchor)[..., None]
    share_GA1 = 1.0 / (size_GA1 - 1).to(query_GAZ.dtype)
    if block.anchor_valid_GA is not None:
        padding_GA1 = ~block.anchor_valid_GA[..., None]
        first_GA1, size_GA1 = first_GA1.masked_fill(padding_GA1, 0), size_GA1.masked_fill(padding_GA1, 1)
        share_GA1 = share_GA1.masked_fill(padding_GA1, 0.0)
    slot_P = torch.arange(block.positives, device=size_GA1.device)
    place_GAP = first_GA1 + torch.minimum(slot_P, size_GA1 - 1)
    real_GAP = (slot_P < size_GA1).to(query_GAZ.dtype)

    weight_GAK = scratch.logits(query_GAZ, key_GKZ)
    margin_GAP = weight_GAK.gather(2, place_GAP)
    sum_GA1, shift_GA1 = _negatives(weight_GAK, place_GAP, block.key_valid_GK, temperature)
    negative_GA1 = sum_GA1.log() + shift_GA1
    margin_GAP.neg_().add_(negative_GA1)
    own_GA1 = negative_GA1 - (query_GAZ * own_GAZ).sum(2, keepdim=True) / temperature
    term_GA1 = functional.softplus(margin_GAP).mul_(real_GAP).sum(2, keepdim=True)
    loss = (share_GA1 * (term_GA1 - functional.softplus(own_GA1))).sum()
    if not graded:
        return (loss,)
    slope_GAP = margin_GAP.sigmoid_().mul_(share_GA1)
    own_slope_GA1 = own_GA1.sigmoid_().mul_(share_GA1)
    slopes_GA1 = real_GAP.mul_(slope_GAP).sum(2, keepdim=True) - own_slope_GA1
    weight_GAK.mul_(slopes_GA1 / sum_GA1).scatter_(2, place_GAP, slope_GAP.neg_())
    return (
        loss,
        (weight_GAK @ key_GKZ).add_(own_GAZ * own_slope_GA1),
        weight_GAK.mT @ query_GAZ,
        query_GAZ * own_slope_GA1,
    )


def _negatives(logit_GAK: Tensor, positive_GAP: Tensor, key_valid_GK: Tensor | None, temperature: float):
    """exp(logit) in place, 0 at positives and at padding; its sum per anchor, and what was subtracted before."""
    safe = temperature * SAFE_LOGIT >= 1.0  # as in `_shift`
    excluded = logit_GAK.new_full((1, 1, 1), 0.0 if safe else -torch.inf).expand_as(positive_GAP)
    if not safe:
        logit_GAK.scatter_(2, positive_GAP, excluded)
        if key_valid_GK is not None:
            logit_GAK += key_valid_GK.to(logit_GAK.dtype).log()[:, None]
    shift_GA1 = _shift(logit_GAK, temperature)
    logit_GAK.exp_()
    if safe:  # afterwards, because exp() of −∞ takes three times as long on CPU
        logit_GAK.scatter_(2, positive_GAP, excluded)
        if key_valid_GK is not None:
            logit_GAK.mul_(key_valid_GK.to(logit_GAK.dtype)[:, None])
    return logit_GAK.sum(2, keepdim=True), shift_GA1


def _take(rows_A: Tensor, index: slice | Tensor) -> Tensor:
    """The rows of a block, G×A×…, G = 1 for a slice."""
    return rows_A[index][None] if isinstance(index, slice) else rows_A[index]


def _add(total_AZ: Tensor, index: slice | Tensor, part_GAZ: Tensor) -> None:
    """Add a block's rows back, in place; padded slots add 0 to row 0."""
    if isinstance(index, slice):
        total_AZ[index] += part_GAZ[0]
    else:
        total_AZ.index_add_(0, index.flatten(), part_GAZ.flatten(0, 1))
