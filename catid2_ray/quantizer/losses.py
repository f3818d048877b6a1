"""The losses of CAT-ID² (arXiv 2511.01461, section 3.3): eqs. 1, 2, 4, 5 and 7; SupCon and CQ-SID's term.

Each is a scalar over the *global* batch.

Unusual: every function takes `gather`, a callable that concatenates the rows of all ranks along dimension 0 with
gradients (its backward sums over ranks). Each rank passes its own rows and gets the same global scalar. That backward
leaves R times the share of a rank's own rows in its parameters, so *averaging* parameter gradients over the R ranks, as
DeepSpeed and DDP do, gives exactly the gradient of one process that holds all rows. All ranks must call the same losses
in the same order; `gather` also meets integer tensors and tensors without gradient, and ranks may bring unequal rows.
`chunk` bounds the anchors that are compared at a time; without it blocks fit the cache. Either way the contrastive
terms hold no B×B array: a block's gradients are found with its loss, so nothing is stored or computed again.

Shape letters: B local rows, L levels, Z latent, K codes, D embedding, H category depth, M rows of all ranks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from catid2_ray.errors import InputError
from catid2_ray.quantizer.contrast import (
    Gather,
    category_layout,
    category_nce,
    gathered,
    global_mean,
    in_batch_nce,
    unit_rows,
)


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
    pull_codeword = functional.mse_loss(codeword_LBZ, residual_LBZ.detach(), reduction="sum")
    pull_residual = functional.mse_loss(residual_LBZ, codeword_LBZ.detach(), reduction="sum")
    return global_mean(pull_codeword + commitment * pull_residual, residual_LBZ.shape[1], gather).mean


def reconstruction_loss(
    reconstruction_BD: Tensor, embedding_BD: Tensor, *, gather: Gather | None = None, chunk: int | None = None
) -> Tensor:
    """Eq. 1: ‖d̂ − d‖², summed over dimensions, mean over the batch; TIGER's, in CAT-ID² `dispersion` replaces it."""
    total = functional.mse_loss(reconstruction_BD, embedding_BD, reduction="sum")
    return global_mean(total, len(embedding_BD), gather).mean


class HierarchicalTerms(NamedTuple):
    """Eq. 4 at one level, and how many anchors of the global batch it was averaged over: few mean little signal."""

    loss: Tensor  # scalar
    anchors: Tensor  # int64 scalar


def hierarchical_class_terms(
    residual_BZ: Tensor,
    category_BH: Tensor,
    *,
    depth: int,
    temperature: float,
    negatives: str = "siblings",
    over: str = "anchors",
    gather: Gather | None = None,
    chunk: int | None = None,
) -> HierarchicalTerms:
    """Eq. 4 at one level: rows of one category are drawn together, away from the other categories; cosine similarity.

    `depth` counts from 0 and is both the quantizer level and the column of `category_BH` (int64, ids unique per full
    path, −1 = no category there: neither anchor, positive nor negative). Positives: other rows of the same category.
    Negatives: at depth 0 rows of another category; deeper, rows of another category under the same parent
    (`negatives="siblings"`) or under any parent (`"all"`, the paper's random-sampling ablation). The term of a positive
    p is −log( exp(s_ap/τ) / (exp(s_ap/τ) + Σ_n exp(s_an/τ)) ): eq. 4 as printed has no positive in the denominator,
    which would be unbounded below. Averaged over the anchor's positives, then (`over`) over the "anchors" of the global
    batch, its rows that have at least one positive and one negative, or over the whole "batch", the 1/|B| that is printed;
    no anchor → exactly 0, with gradient 0. Raises InputError for a `depth` that is no column and for other `negatives`.
    """
    if not 0 <= depth < category_BH.shape[1]:
        raise InputError(f"depth {depth} is not a column of the categories, which have {category_BH.shape[1]} (from 0)")
    if negatives not in ("siblings", "all"):
        raise InputError(f'negatives must be "siblings" or "all", found {negatives!r}')
    parent_B, child_B = _parent_and_child(category_BH, depth, negatives)
    unit_BZ = unit_rows(residual_BZ)
    unit_MZ, parent_M, child_M = (gathered(rows, gather) for rows in (unit_BZ, parent_B, child_B))
    layout = category_layout(parent_B, child_B, parent_M, child_M)
    total = category_nce(unit_BZ, unit_MZ, layout, temperature=temperature, chunk=chunk)
    mean = global_mean(total, len(layout.anchor_A), gather)
    share = mean.count.to(total) / len(unit_MZ) if over == "batch" else 1.0
    return HierarchicalTerms(mean.mean * share, mean.count)


def ancestor_contrast(
    latent_BZ: Tensor,
    category_BH: Tensor,
    *,
    decay: float,
    temperature: float,
    gather: Gather | None = None,
    chunk: int | None = None,
) -> HierarchicalTerms:
    """One soft contrast over latents: −mean_a Σ_p w_ap/Σ_p w_ap · log( exp(s_ap/τ) / Σ_j exp(s_aj/τ) ), cosine.

    w_ap = decay^(depth of a's leaf − depth of the deepest category that a and p share), 0 where they share none: with
    `decay` 0 the positives are the rows of the anchor's own leaf, with 0.5 an ancestor counts half as much as what lies one
    level below it. p runs over the other rows; j over all rows that have a category, the anchor itself included, where it
    adds a constant. Averaged over the rows of the global batch that have a positive; none → exactly 0, with gradient 0.
    `category_BH`: int64, −1 = none from there on; ids unique per full path in their column.

    Not eq. 4 of CAT-ID², which acts level by level on residuals and excludes one positive from the sum of another;
    SupCon (arXiv 2004.11362, eq. 2) with soft targets. No B×B targets are made: Σ_p w_ap u_p is a sum of categories' sums.
    """
    unit_BZ = unit_rows(latent_BZ)
    unit_MZ, category_MH = gathered(unit_BZ, gather), gathered(category_BH, gather)
    depth_B = (category_BH >= 0).sum(1)
    target_BZ, mass_B = torch.zeros_like(unit_BZ), unit_BZ.new_zeros(len(unit_BZ))
    base = unit_BZ.new_tensor(decay)
    for column in range(category_BH.shape[1]):
        id_C, place_M = torch.unique(category_MH[:, column], return_inverse=True)
        sum_CZ = unit_MZ.new_zeros(len(id_C), unit_MZ.shape[1]).index_add(0, place_M, unit_MZ)
        count_C = torch.bincount(place_M, minlength=len(id_C)).to(unit_BZ)
        place_B = torch.searchsorted(id_C, category_BH[:, column].contiguous())
        above_B = depth_B - column  # levels from the leaf up to this column's parent
        gain_B = base ** (above_B - 1).clamp_min(0) - (base ** above_B.clamp_min(0) if column else 0.0)
        gain_B = torch.where(category_BH[:, column] >= 0, gain_B, 0.0)
        target_BZ = target_BZ + gain_B[:, None] * (sum_CZ[place_B] - unit_BZ)
        mass_B = mass_B + gain_B * (count_C[place_B] - 1)
    counted_B = mass_B > 0
    own_AZ = target_BZ[counted_B] / mass_B[counted_B, None]
    key_NZ = unit_MZ[category_MH[:, 0] >= 0]
    total = in_batch_nce(unit_BZ[counted_B], own_AZ, key_NZ, temperature=temperature, chunk=chunk)
    return HierarchicalTerms(*global_mean(total, int(counted_B.sum()), gather))


def cluster_scale_from_log(
    log_probability_BK: Tensor, *, gather: Gather | None = None, chunk: int | None = None
) -> Tensor:
    """Eq. 5: KL(p̄ ‖ u) + KL(u ‖ p̄) with p̄ the mean of p = softmax(−‖r − e‖²) over the global batch, u uniform.

    From log p, natural: a code that underflows in p still has a finite loss and a gradient. `chunk` is taken for symmetry only.
    """
    log_usage_RK = gathered(log_probability_BK.logsumexp(0, keepdim=True), gather)
    rows = gathered(log_usage_RK.new_full((1,), len(log_probability_BK)), gather).sum()
    log_usage_K = log_usage_RK.logsumexp(0) - rows.log()
    log_k = math.log(len(log_usage_K))
    return (log_usage_K.exp() * (log_usage_K + log_k)).sum() - log_k - log_usage_K.mean()


def dispersion(
    reconstruction_BD: Tensor,
    embedding_BD: Tensor,
    *,
    temperature: float,
    gather: Gather | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Eq. 7: −mean_i log( exp(⟨d̂_i, d_i⟩/τ) / Σ_j exp(⟨d̂_i, d_j⟩/τ) ), cosine, j over the global batch with j = i."""
    unit_BD, key_BD = unit_rows(reconstruction_BD), unit_rows(embedding_BD)
    total = in_batch_nce(unit_BD, key_BD, gathered(key_BD, gather), temperature=temperature, chunk=chunk)
    return global_mean(total, len(key_BD), gather).mean


def query_item_contrast(
    item_BZ: Tensor,
    query_BZ: Tensor,
    has_query_B: Tensor,
    *,
    temperature: float,
    gather: Gather | None = None,
    chunk: int | None = None,
) -> Tensor:
    """CQ-SID's bidirectional InfoNCE (arXiv 2605.14434, L_bi; METHODS 2.4), cosine, over items that have a query.

    −½ · mean_i [ log softmax_q(⟨i, q⟩/τ) at the own query + log softmax_j(⟨q_i, j⟩/τ) at the own item ], i, q and j
    over the rows of the global batch where `has_query_B` (bool) holds. The other rows are neither anchors nor
    negatives, whatever their `query_BZ` holds. No such row → exactly 0, with gradient 0. Raises InputError when the
    shapes differ or `has_query_B` is not boolean.
    """
    if item_BZ.shape != query_BZ.shape or has_query_B.shape != item_BZ.shape[:1] or has_query_B.dtype != torch.bool:
        raise InputError(
            f"items and queries must both be rows × latent and has_query_B one bool per row, found "
            f"{tuple(item_BZ.shape)}, {tuple(query_BZ.shape)} and {has_query_B.dtype} {tuple(has_query_B.shape)}"
        )
    unit_item_BZ, unit_query_BZ = unit_rows(item_BZ), unit_rows(query_BZ)
    item_AZ, query_AZ = unit_item_BZ[has_query_B], unit_query_BZ[has_query_B]
    # All rows are gathered and then chosen: ranks may differ in how many have a query, a collective may not.
    has_query_M = gathered(has_query_B.to(torch.uint8), gather).bool()
    item_MZ = gathered(unit_item_BZ, gather)[has_query_M]
    query_MZ = gathered(unit_query_BZ, gather)[has_query_M]
    to_query = in_batch_nce(item_AZ, query_AZ, query_MZ, temperature=temperature, chunk=chunk)
    to_item = in_batch_nce(query_AZ, item_AZ, item_MZ, temperature=temperature, chunk=chunk)
    return 0.5 * global_mean(to_query + to_item, len(item_AZ), gather).mean


def _parent_and_child(category_BH: Tensor, depth: int, negatives: str) -> tuple[Tensor, Tensor]:
    """int64 B each: the group inside which rows are compared, and the category; −1 for rows that take no part."""
    child_B = category_BH[:, depth].contiguous()
    if depth == 0 or negatives == "all":
        return torch.where(child_B >= 0, 0, -1), child_B
    parent_B = category_BH[:, depth - 1]
    takes_part_B = (child_B >= 0) & (parent_B >= 0)
    return torch.where(takes_part_B, parent_B, -1), torch.where(takes_part_B, child_B, -1)
