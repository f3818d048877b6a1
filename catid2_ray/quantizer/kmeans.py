"""Residual k-means: the starting codebooks, fitted level by level on what the levels before left over (METHODS 0.3).

Unusual: full k-means++ seeding, which costs K passes over the sample (0.3 s for 20,000 × 32 and K = 256 on one core),
because a start from random rows leaves a tenth of the codes dead. Deterministic on CPU for a seed. The balanced form
keeps one price per code instead of an assignment, so a row outside the sample is coded without knowing any other row.
Given codebooks to start from (`start`), nothing is drawn and a code stays near where it was.

Shape letters: N rows, Z latent, K codes; G groups of S rows × D.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from catid2_ray.errors import CapacityError, InputError


def residual_kmeans(
    latent_NZ: Tensor,
    *,
    codes_per_level: tuple[int, ...],
    seed: int,
    iterations: int = 20,
    start: list[Tensor] | None = None,
) -> list[Tensor]:
    """One K_l×Z codebook per level.

    `start`: a K_l×Z codebook per level, from which Lloyd's iterations start on the residuals of the new levels before;
    None = k-means++ seeds, drawn by `seed`. From a start, code k stays near where it was, but for a code without rows,
    which restarts on a far row. Raises CapacityError when there are fewer rows than codes of some level, InputError
    for a start of other shapes.
    """
    _check_rows(len(latent_NZ), codes_per_level)
    generator = torch.Generator().manual_seed(seed)
    residual_NZ, codebooks = latent_NZ.detach(), []
    for codes, start_KZ in zip(codes_per_level, _checked_start(start, codes_per_level, latent_NZ), strict=True):
        if start_KZ is None:
            start_KZ = _plus_plus(residual_NZ, codes, generator)
        codebook_KZ = _lloyd(residual_NZ, start_KZ, iterations)
        codebooks.append(codebook_KZ)
        residual_NZ = residual_NZ - codebook_KZ[nearest(residual_NZ, codebook_KZ)]
    return codebooks


class BalancedLevel(NamedTuple):
    """One level of balanced residual k-means: a row's code is `nearest(residual_NZ, codebook_KZ, price_K)`."""

    codebook_KZ: Tensor
    price_K: Tensor  # in the unit of squared distances, mean 0


def balanced_residual_kmeans(
    latent_NZ: Tensor,
    *,
    codes_per_level: tuple[int, ...],
    seed: int,
    iterations: int = 20,
    start: list[Tensor] | None = None,
) -> list[BalancedLevel]:
    """Residual k-means with near-equal clusters: argmin_k ‖r − e_k‖² − price_k puts about N/K of the rows on each code.

    The prices are the dual variables of the balanced assignment (METHODS 0.3, MiniOneRec's bounded cluster sizes; 0.4
    for the entropic form). Sizes come within 5 % of N/K, or as near as the rows allow: equal rows share a code, for
    a code depends on the row alone, so a cluster is at least as large as its most frequent row. Needs about 5 matrices
    N×K at once: hand in a sample of some 100 rows per code. `start` and errors as for `residual_kmeans`; the balanced
    iterations start from it directly, with prices of 0. Prices balance to a tolerance, so even on the sample that the
    start was fitted to some rows between two clusters change sides.
    """
    _check_rows(len(latent_NZ), codes_per_level)
    generator = torch.Generator().manual_seed(seed)
    residual_NZ, levels = latent_NZ.detach(), []
    for codes, start_KZ in zip(codes_per_level, _checked_start(start, codes_per_level, latent_NZ), strict=True):
        if start_KZ is None:
            start_KZ = _lloyd(residual_NZ, _plus_plus(residual_NZ, codes, generator), iterations)
        codebook_KZ, price_K = _balanced_lloyd(residual_NZ, start_KZ, iterations)
        levels.append(BalancedLevel(codebook_KZ, price_K))
        residual_NZ = residual_NZ - codebook_KZ[nearest(residual_NZ, codebook_KZ, price_K)]
    return levels


def category_residual_kmeans(
    latent_NZ: Tensor,
    category_N: Tensor,
    *,
    codes_per_level: tuple[int, ...],
    seed: int,
    start: list[Tensor] | None = None,
) -> list[Tensor]:
    """Residual k-means whose first code is the row's category id, the nearest codeword where it is −1 (CQ-SID).

    The first codewords are the mean latents of their categories; those of no category in the sample are rows of it, or
    those of `start`. The levels below, `start` and errors are as for `residual_kmeans`.
    """
    latent_NZ, (codes, *rest) = latent_NZ.detach(), codes_per_level
    first_start_KZ, *_ = _checked_start(start, codes_per_level, latent_NZ)
    if first_start_KZ is None:
        drawn_K = torch.randint(len(latent_NZ), (codes,), generator=torch.Generator().manual_seed(seed))
        first_start_KZ = latent_NZ[drawn_K.to(latent_NZ.device)]
    known_N = category_N >= 0
    count_K = torch.bincount(category_N[known_N], minlength=codes)
    sum_KZ = latent_NZ.new_zeros(codes, latent_NZ.shape[1]).index_add_(0, category_N[known_N], latent_NZ[known_N])
    first_KZ = torch.where(count_K[:, None] > 0, sum_KZ / count_K.clamp_min(1)[:, None], first_start_KZ)
    if not rest:
        return [first_KZ]
    rest_NZ = latent_NZ - first_KZ[torch.where(known_N, category_N, nearest(latent_NZ, first_KZ))]
    rest_start = None if start is None else start[1:]
    return [first_KZ, *residual_kmeans(rest_NZ, codes_per_level=tuple(rest), seed=seed, start=rest_start)]


def nearest(residual_NZ: Tensor, codebook_KZ: Tensor, price_K: Tensor | None = None) -> Tensor:
    """int64 N, the nearest codeword of each row; ties go to the lowest code. ‖r‖² is left out: it moves no minimum.

    With `price_K` (`BalancedLevel`) a code is as much nearer as its price says: argmin_k ‖r − e_k‖² − price_k.
    """
    offset_K = codebook_KZ.square().sum(1)
    if price_K is not None:
        offset_K = offset_K - price_K
    return torch.addmm(offset_K, residual_NZ, codebook_KZ.T, alpha=-2).min(1).indices


def squared_error(residual_NZ: Tensor, codebook_KZ: Tensor, codes_N: Tensor) -> Tensor:
    """N, the squared distance of each row to its codeword."""
    return (residual_NZ - codebook_KZ[codes_N]).square().sum(1)


def _plus_plus(points_NZ: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds, K×Z: each next seed is drawn in proportion to its squared distance to the seeds so far."""
    norm_N = points_NZ.square().sum(1)
    chosen = [int(torch.randint(len(points_NZ), (), generator=generator))]
    distance_N = torch.full_like(norm_N, torch.inf)
    for draw in torch.rand(codes - 1, dtype=torch.float64, generator=generator).tolist():
        seed_Z = points_NZ[chosen[-1]]
        distance_N = torch.minimum(distance_N, norm_N + seed_Z.square().sum() - 2 * (points_NZ @ seed_Z)).clamp_min(0.0)
        mass_N = distance_N.double().cumsum(0)
        chosen.append(min(int(torch.searchsorted(mass_N, draw * mass_N[-1], right=True)), len(points_NZ) - 1))
    return points_NZ[torch.tensor(chosen, device=points_NZ.device)].clone()


def _check_rows(rows: int, codes_per_level: tuple[int, ...]) -> None:
    most = max(codes_per_level)
    if rows < most:
        raise CapacityError(
            f"{rows} rows cannot start a level of {most} codes (codes per level {tuple(codes_per_level)}): "
            f"lower quantizer.codes_per_level to at most {rows}, or give more products"
        )


def _checked_start(start, codes_per_level, latent_NZ):
    """A starting codebook per level in the latents' type and on their device, or None per level without a start."""
    if start is None:
        return [None] * len(codes_per_level)
    expected = [(codes, latent_NZ.shape[1]) for codes in codes_per_level]
    shapes = [tuple(codebook_KZ.shape) for codebook_KZ in start]
    if shapes != expected:
        raise InputError(
            f"k-means cannot start from codebooks of shapes {shapes}, expected {expected}: give one K_l×Z codebook per "
            f"level, or none"
        )
    return [codebook_KZ.detach().to(latent_NZ) for codebook_KZ in start]


def _lloyd(points_NZ: Tensor, codebook_KZ: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations from `codebook_KZ`."""
    for _ in range(iterations):
        codebook_KZ = _centres(points_NZ, codebook_KZ, nearest(points_NZ, codebook_KZ))
    return codebook_KZ


def _centres(points_NZ: Tensor, codebook_KZ: Tensor, codes_N: Tensor) -> Tensor:
    """Mean of each cluster; one that runs empty restarts on one of the rows farthest from their codeword."""
    count_K = torch.bincount(codes_N, minlength=len(codebook_KZ))
    sum_KZ = torch.zeros_like(codebook_KZ).index_add_(0, codes_N, points_NZ)
    codebook_KZ = sum_KZ / count_K.clamp_min(1)[:, None]
    empty_E = torch.nonzero(count_K == 0).flatten()
    if len(empty_E):
        far_E = squared_error(points_NZ, codebook_KZ, codes_N).argsort(descending=True, stable=True)[: len(empty_E)]
        codebook_KZ[empty_E] = points_NZ[far_E]
    return codebook_KZ


class _SoftAssignment(NamedTuple):
    """Shares of the rows on the codes at one width of the softmin, and the value of the balanced assignment's dual."""

    share_NK: Tensor
    value: float


def _soft_assignment(distance_NK: Tensor, price_K: Tensor, width: float) -> _SoftAssignment:
    share_NK = (price_K - distance_NK).div_(width)
    most_N1 = share_NK.amax(1, keepdim=True)
    total_N1 = share_NK.sub_(most_N1).exp_().sum(1, keepdim=True)
    share_NK /= total_N1
    softmin = -width * float((most_N1 + total_N1.log()).double().mean())
    return _SoftAssignment(share_NK, float(price_K.double().mean()) + softmin)


def _newton_step(distance_NK: Tensor, price_K: Tensor, width: float, now: _SoftAssignment):
    """(prices, soft assignment) after one damped Newton step up the dual mean_k g_k + mean_i softmin_k(d_ik − g_k).

    Its gradient is 1/K − q_k and its Hessian −(diag(q) − QᵀQ/N)/width, with Q the shares and q their means.
    """
    rows, codes = distance_NK.shape
    mean_K = now.share_NK.mean(0).double()
    hessian_KK = -(now.share_NK.mT @ now.share_NK).double() / rows
    # Prices are free up to a constant, which the added 1/K² pins; the small diagonal bounds the step of an empty code.
    hessian_KK.diagonal().add_(mean_K + 1e-3 / codes)
    step_K = torch.linalg.solve(hessian_KK + codes**-2, width * (1 / codes - mean_K)).to(price_K.dtype)
    step_K *= min(1.0, 10 * width / max(float(step_K.abs().max()), 1e-30))
    for _ in range(5):
        after = _soft_assignment(distance_NK, price_K + step_K, width)
        if after.value >= now.value:
            return price_K + step_K, after
        step_K /= 2
    return price_K, now


def _squared_distances(points_NZ: Tensor, codebook_KZ: Tensor) -> Tensor:
    """N×K, in float32 good to 1e-6 of ‖r‖² + ‖e‖²."""
    norm_N1 = points_NZ.square().sum(1, keepdim=True)
    return torch.addmm(codebook_KZ.square().sum(1), points_NZ, codebook_KZ.T, alpha=-2).add_(norm_N1).clamp_min_(0.0)


def _balanced_lloyd(points_NZ: Tensor, codebook_KZ: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Codebook and prices: Lloyd's iterations on the balanced assignment, then prices that fit the last centres.

    Ends early when an iteration saves less than 0.1 % of the error. Each iteration balances anew: centres that follow
    sizes which are only half balanced run into one cluster that takes nearly all rows.
    """
    price_K, last = points_NZ.new_zeros(len(codebook_KZ)), torch.inf
    for _ in range(iterations):
        distance_NK = _squared_distances(points_NZ, codebook_KZ)
        price_K = _balancing_prices(distance_NK, price_K, tolerance=0.3)
        codes_N = (distance_NK - price_K).min(1).indices
        error = float(distance_NK.gather(1, codes_N[:, None]).mean())
        if error > 0.999 * last:
            break
        last = error
        codebook_KZ = _centres(points_NZ, codebook_KZ, codes_N)
    price_K = _balancing_prices(_squared_distances(points_NZ, codebook_KZ), price_K, tolerance=0.03)
    return codebook_KZ, price_K - price_K.mean()


def _balancing_prices(distance_NK: Tensor, price_K: Tensor, *, tolerance: float) -> Tensor:
    """Prices whose clusters are within `tolerance` of N/K (or one row of it), else the best that were met.

    Newton steps from `price_K` while the softmin is narrowed to an argmin: Sinkhorn's scaling (METHODS 0.4) needs ever
    more rounds the narrower it gets, Newton two or three at every width.
    """
    rows, codes = distance_NK.shape
    width, even = float(distance_NK.amin(1).mean()) / 4, rows / codes
    best_K, least = price_K, torch.inf
    # At width 0 every row is a codeword, and there is nothing to even out.
    for narrowed in range(14 if width > 0.0 else 0):
        soft = _soft_assignment(distance_NK, price_K, width)
        # A step is bounded by the width, and the price of a clump far from all others must rise by its distance first.
        for _ in range(6 if narrowed else 100):
            if float((soft.share_NK.sum(0) - even).abs().max()) < 0.02 * even:
                break
            price_K, soft = _newton_step(distance_NK, price_K, width, soft)
        size_K = torch.bincount((distance_NK - price_K).min(1).indices, minlength=codes)
        off = float((size_K - even).abs().max())
        if off < least:
            best_K, least = price_K, off
        if least <= max(1.0, tolerance * even):
            break
        width /= 2
    return best_K


class ManyClusters(NamedTuple):
    """k-means of G groups of rows, each for itself."""

    centroid_GKD: Tensor
    live_GK: Tensor  # bool, the clusters that hold rows
    code_GS: Tensor  # int64, the cluster of each row; any number where there is no row


def many_kmeans(
    point_GSD: Tensor, valid_GS: Tensor, *, codes: int, iterations: int, generator: torch.Generator
) -> ManyClusters:
    """k-means++ and Lloyd's iterations in many padded groups of S rows at once; `valid_GS` says which slots hold a row.

    A group with fewer different rows than `codes` gets as many clusters as it has; one that runs empty is dropped.
    """
    centroid_GKD, live_GK = _many_plus_plus(point_GSD, valid_GS, codes, generator)
    code_K, code_GS = torch.arange(codes), None
    for iteration in range(iterations + 1):
        norm_GK = centroid_GKD.square().sum(2).masked_fill_(~live_GK, torch.inf)
        before_GS, code_GS = code_GS, torch.baddbmm(norm_GK[:, None], point_GSD, centroid_GKD.mT, alpha=-2).argmin(2)
        member_GSK = (code_GS[:, :, None] == code_K) & valid_GS[:, :, None]
        size_GK = member_GSK.sum(1)
        if iteration == iterations or (before_GS is not None and torch.equal(before_GS, code_GS)):
            break
        mean_GKD = (member_GSK.to(point_GSD.dtype).mT @ point_GSD) / size_GK.clamp_min(1)[:, :, None]
        centroid_GKD = torch.where(size_GK[:, :, None] > 0, mean_GKD, centroid_GKD)
    return ManyClusters(centroid_GKD, size_GK > 0, code_GS)


def _many_plus_plus(point_GSD: Tensor, valid_GS: Tensor, codes: int, generator: torch.Generator):
    """k-means++ seeds of each group, G×K×D, and which are there: none is drawn twice, equal rows count as one."""
    groups = len(point_GSD)
    draw_GK = torch.rand((groups, codes), dtype=torch.float64, generator=generator)
    distance_GS = torch.full(valid_GS.shape, torch.inf, dtype=point_GSD.dtype)
    centroid_GKD = point_GSD.new_zeros((groups, codes, point_GSD.shape[2]))
    live_GK = torch.zeros((groups, codes), dtype=torch.bool)
    for code in range(codes):
        mass_GS = (valid_GS.double() if code == 0 else distance_GS.double()).cumsum(1)
        total_G1 = mass_GS[:, -1:].contiguous()
        # The last slot with any mass bounds the draw, for a product may round up to the total.
        last_G1 = torch.searchsorted(mass_GS, total_G1)
        drawn_G1 = torch.searchsorted(mass_GS, draw_GK[:, code : code + 1] * total_G1, right=True)
        slot_G1 = torch.minimum(drawn_G1, last_G1)
        seed_GD = point_GSD[torch.arange(groups), slot_G1[:, 0]]
        live_GK[:, code] = total_G1[:, 0] > 0
        centroid_GKD[:, code] = seed_GD
        apart_GS = (point_GSD - seed_GD[:, None]).square_().sum(2).masked_fill_(~valid_GS, 0.0)
        distance_GS = torch.minimum(distance_GS, apart_GS)
    return centroid_GKD, live_GK
