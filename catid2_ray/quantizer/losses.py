"""The losses of CAT-ID² (arXiv 2511.01461, section 3.3): eqs. 2, 4, 5 and 7, each a scalar over the *global* batch.

Unusual: every function takes `gather`, a callable that concatenates the rows of all ranks along dimension 0 with
gradients (its backward sums over ranks). Each rank passes its own rows and gets the same global scalar. That backward
leaves R times the share of a rank's own rows in its parameters, so *averaging* parameter gradients over the R ranks, as
DeepSpeed and DDP do, gives exactly the gradient of one process that holds all rows. All ranks must call the same losses
in the same order; `gather` also meets integer tensors and tensors without gradient, and ranks may bring unequal rows.
`chunk` bounds the anchors that are compared at a time; their intermediates are then recomputed in the backward pass.

Shape letters: B local rows, L levels, Z latent, K codes, D embedding, H category depth, M rows of all ranks.
"""

import math

import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.quantizer.contrast import (
    Gather,
    gathered,
    global_mean,
    group_blocks,
    in_batch_nce,
    negative_logsumexp,
    positive_sum,
    unit_rows,
)

# The least mean usage that eq. 5 sees; below it the logarithm of a probability given as such cannot be taken.
LEAST_USAGE = 1e-30


def residual_quantization_loss(
    residual_LBZ: Tensor,
    codeword_LBZ: Tensor,
    *,
    commitment: float,
    gather: Gather | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Eq. 2: Σ_l ‖sg[r_l] − e_l‖² + commitment · ‖r_l − sg[e_l]‖².

    Summed over levels and dimensions, mean over the global batch. `chunk` is taken for symmetry only. Raises InputError
    when the shapes differ.
    """
    if residual_LBZ.shape != codeword_LBZ.shape or residual_LBZ.ndim != 3:
        raise InputError(
            f"residuals and codewords must both be levels × rows × latent, "
            f"found {tuple(residual_LBZ.shape)} and {tuple(codeword_LBZ.shape)}"
        )
    pull_codeword = (residual_LBZ.detach() - codeword_LBZ).square().sum()
    pull_residual = (residual_LBZ - codeword_LBZ.detach()).square().sum()
    return global_mean(pull_codeword + commitment * pull_residual, residual_LBZ.shape[1], gather)


def reconstruction_loss(
    reconstruction_BD: Tensor, embedding_BD: Tensor, *, gather: Gather | None = None, chunk: int | None = None
) -> Tensor:
    """Eq. 1: ‖d̂ − d‖², summed over dimensions, mean over the batch; TIGER's, in CAT-ID² `dispersion` replaces it."""
    return global_mean((reconstruction_BD - embedding_BD).square().sum(), len(embedding_BD), gather)


def hierarchical_class_constraint(
    residual_BZ: Tensor,
    category_BH: Tensor,
    *,
    depth: int,
    temperature: float,
    negatives: str = "siblings",
    gather: Gather | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Eq. 4 at one level: rows of one category are drawn together, away from the other categories; cosine similarity.

    `depth` counts from 0 and is both the quantizer level and the column of `category_BH` (int64, ids unique per full
    path, −1 = no category there: neither anchor, positive nor negative). Positives: other rows of the same category.
    Negatives: at depth 0 rows of another category; deeper, rows of another category under the same parent
    (`negatives="siblings"`) or under any parent (`"all"`, the paper's random-sampling ablation). The term of a positive
    p is −log( exp(s_ap/τ) / (exp(s_ap/τ) + Σ_n exp(s_an/τ)) ): eq. 4 as printed has no positive in the denominator,
    which would be unbounded below. Averaged over the anchor's positives, then over the anchors of the global batch that
    have at least one positive and one negative; none → exactly 0, with gradient 0.
    """
    if not 0 <= depth < category_BH.shape[1]:
        raise InputError(f"depth {depth} is not a column of the categories, which have {category_BH.shape[1]} (from 0)")
    if negatives not in ("siblings", "all"):
        raise InputError(f'negatives must be "siblings" or "all", found {negatives!r}')
    parent_B, child_B = _parent_and_child(category_BH, depth, negatives)
    unit_BZ = unit_rows(residual_BZ)
    unit_MZ, parent_M, child_M = unit_BZ, parent_B, child_B
    if gather is not None:
        unit_MZ, parent_M, child_M = (gather(rows.contiguous()) for rows in (unit_BZ, parent_B, child_B))

    siblings_B, same_B = _group_sizes(parent_B, parent_M), _group_sizes(child_B, child_M)
    counted_B = (child_B >= 0) & (same_B > 1) & (siblings_B > same_B)
    query_BZ = unit_BZ / temperature
    blocks = group_blocks(torch.where(counted_B, parent_B, -1), parent_M, chunk=chunk)
    negative_B = negative_logsumexp(query_BZ, unit_MZ, child_B, child_M, blocks, chunk=chunk)
    blocks = group_blocks(torch.where(counted_B, child_B, -1), child_M, chunk=chunk)
    with_self_B = positive_sum(query_BZ, unit_MZ, negative_B, blocks, chunk=chunk)
    self_B = torch.nn.functional.softplus(negative_B - (query_BZ * unit_BZ).sum(1))
    term_B = torch.where(counted_B, (with_self_B - self_B) / (same_B - 1).clamp_min(1), 0.0)
    # The empty slice ties the gathered rows to the loss on ranks without an anchor too, or their backward would never
    # join the collective that the other ranks wait for.
    return global_mean(term_B.sum() + unit_MZ[:0].sum(), counted_B.sum(), gather)


def cluster_scale_constraint(
    probability_BK: Tensor, *, gather: Gather | None = None, chunk: int | None = None
) -> Tensor:
    """Eq. 5: KL(p̄ ‖ u) + KL(u ‖ p̄) with p̄ the mean of p = softmax(−‖r − e‖²) over the global batch, u uniform.

    Natural logarithm; a usage under 1e-30 counts as 1e-30. `chunk` is taken for symmetry only.
    """
    usage_RK = gathered(probability_BK.sum(0, keepdim=True), gather)
    rows = gathered(usage_RK.new_full((1,), len(probability_BK)), gather).sum()
    return _two_way_divergence((usage_RK.sum(0) / rows).clamp_min(LEAST_USAGE).log())


def cluster_scale_from_log(
    log_probability_BK: Tensor, *, gather: Gather | None = None, chunk: int | None = None
) -> Tensor:
    """`cluster_scale_constraint` from log p: a code that underflows in p still has a finite loss and a gradient."""
    log_usage_RK = gathered(log_probability_BK.logsumexp(0, keepdim=True), gather)
    rows = gathered(log_usage_RK.new_full((1,), len(log_probability_BK)), gather).sum()
    return _two_way_divergence(log_usage_RK.logsumexp(0) - rows.log())


def dispersion(
    reconstruction_BD: Tensor,
    embedding_BD: Tensor,
    *,
    temperature: float,
    gather: Gather | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Eq. 7: −mean_i log( exp(⟨d̂_i, d_i⟩/τ) / Σ_j exp(⟨d̂_i, d_j⟩/τ) ), cosine, j over the global batch with j = i."""
    query_BD, key_BD = unit_rows(reconstruction_BD) / temperature, unit_rows(embedding_BD)
    key_MD = gathered(key_BD, gather)
    term_B = in_batch_nce(query_BD, key_BD, key_MD, chunk=chunk)
    return global_mean(term_B.sum() + key_MD[:0].sum(), len(term_B), gather)


def _parent_and_child(category_BH: Tensor, depth: int, negatives: str) -> tuple[Tensor, Tensor]:
    """int64 B each: the group inside which rows are compared, and the category; −1 for rows that take no part."""
    child_B = category_BH[:, depth].contiguous()
    if depth == 0 or negatives == "all":
        return torch.where(child_B >= 0, 0, -1), child_B
    parent_B = category_BH[:, depth - 1]
    takes_part_B = (child_B >= 0) & (parent_B >= 0)
    return torch.where(takes_part_B, parent_B, -1), torch.where(takes_part_B, child_B, -1)


def _group_sizes(group_B: Tensor, group_M: Tensor) -> Tensor:
    """int64 B: how many of the rows `group_M` are in the group of each local row."""
    if not len(group_M):
        return torch.zeros_like(group_B)
    groups, count = torch.unique(group_M, return_counts=True)
    return count[torch.searchsorted(groups, group_B)]


def _two_way_divergence(log_usage_K: Tensor) -> Tensor:
    """KL(p̄ ‖ u) + KL(u ‖ p̄) of a distribution given by its logarithm, in nats."""
    log_k = math.log(len(log_usage_K))
    return (log_usage_K.exp() * (log_usage_K + log_k)).sum() - log_k - log_usage_K.mean()
