"""One training step (eq. 8) and a small trainer that runs it in one process, for notebooks and tests.

Unusual: the learning rate and the rows that a step sees are pure functions of (seed, epoch, step), so a run that is
resumed, or spread over workers, sees what an undisturbed one sees.

Shape letters: B, N rows, D embedding, H category depth, K codes, L levels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.quantizer.contrast import Gather, gathered
from catid2_ray.quantizer.health import level_health, revive_dead_codes
from catid2_ray.quantizer.losses import (
    ancestor_contrast,
    cluster_scale_from_log,
    dispersion,
    hierarchical_class_terms,
    query_item_contrast,
    reconstruction_loss,
    residual_quantization_loss,
)
from catid2_ray.quantizer.model import Quantized, ResidualQuantizer
from catid2_ray.schedule import learning_rate_at, seed_from

# Rows that start the codebooks and show which codes are dead: 80 per code at K = 256, 0.1 s to encode on one core.
SAMPLE_ROWS = 20_480


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights and temperatures of eq. 8; the defaults are the paper's (section 4.1.4) where it states one.

    dispersion          α of eq. 8
    hierarchical        β of eq. 8
    hierarchical_over   what eq. 4 is averaged over: "anchors", the rows that have a positive and a negative, or the "batch"
    cluster_scale       γ of eq. 8
    commitment          weight of ‖r − sg[e]‖² in eq. 2; not stated in the paper
    temperature         τ of eqs. 4 and 7; not stated in the paper
    scale_temperature   divides the distances in p of eq. 5; the paper prints none, which is 1.0
    scale_distance      ‖r − e‖ in p of eq. 5: "squared", as in eq. 2, or "plain"
    negatives           "siblings" (section 3.3.1, hard negatives) or "all" (the random-negatives ablation)
    category_depth      H, depths that eq. 4 acts on; 3 at L = 4 (section 4.1.1), fewer than the levels
    reconstruction      weight of ‖d̂ − d‖² (eq. 1); 0 in eq. 8, 1 with the three weights above at 0 is TIGER
    level_power         eq. 4 of level l is weighted by (mean ‖r_l‖ / mean ‖r_1‖) to this power; 0 = as printed. A cosine's
                        gradient grows as 1/‖r‖, so that otherwise the deeper levels outweigh the first and undo it
    category_on         what the category contrast sees: the "residual" of each level as printed, the quantised "prefix" of each
                        level, e_1 + … + e_l straight through to z (HiD-VAE, arXiv 2508.04618, without its per-level MLPs and
                        its tag classifier), or one soft contrast on the "latent" or on a "projection" of it
                        (`losses.ancestor_contrast`; SimCLR's head, arXiv 2002.05709)
    category_temperature  τ of the category contrast; None = temperature
    category_decay      of the soft contrast: weight of a shared ancestor for each level that it lies above the leaf; 0 = the
                        leaf alone
    query_item          weight of the query–item term of CQ-SID (arXiv 2605.14434), which uses `temperature` too
    """

    dispersion: float = 0.1
    hierarchical: float = 1e-4
    hierarchical_over: str = "anchors"
    cluster_scale: float = 1.0
    commitment: float = 0.25
    temperature: float = 0.1
    scale_temperature: float = 1.0
    scale_distance: str = "squared"
    negatives: str = "siblings"
    category_depth: int = 3
    reconstruction: float = 0.0
    level_power: float = 0.0
    category_on: str = "residual"
    category_temperature: float | None = None
    category_decay: float = 0.0
    query_item: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What some batches bring beside embeddings and categories.

    uniform          rows at the head of the batch that were drawn uniformly; the rest only eq. 4 sees. None = all
    query_BD         embedding of a query that asks for the row's product (any numbers where there is none)
    has_query_B      bool, whether there is one
    """

    uniform: int | None = None
    query_BD: Tensor | None = None
    has_query_B: Tensor | None = None


class StepLoss(NamedTuple):
    """`total` carries gradient, and so do the `weighted` terms that it is the sum of; `terms` are the unweighted parts,
    detached. A part of weight 0 is absent. `anchors`: int64 per depth, rows of the global batch that counted in eq. 4."""

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    anchors: list[Tensor]


def training_loss(
    model: ResidualQuantizer,
    embedding_BD: Tensor,
    category_BH: Tensor,
    *,
    weights: LossWeights,
    extras: Extras | None = None,
    gather: Gather | None = None,
    chunk: int | None = None,
) -> StepLoss:
    """Eq. 8 over the global batch: L_rq + α·Dis + β·Σ_l HCC + γ·Σ_l CSC; see `losses` for `gather` and `chunk`.

    `category_BH`: int64, −1 = none; HCC acts on the first min(category_depth, H, L) levels, a soft
    contrast on min(category_depth, H) depths. Call `model` wrapped
    (DeepSpeed) or plain: anything whose call gives `Quantized` and that leads to `codebooks`. A model with moving
    averages is updated in place while it trains.
    """
    extras, shared = extras or Extras(), {"gather": gather, "chunk": chunk}
    quantized = model(embedding_BD, category_BH)
    head, plain = slice(extras.uniform), getattr(model, "module", model)
    residual_LBZ, codeword_LBZ = quantized.residual_LBZ[:, head], quantized.codeword_LBZ[:, head]
    reconstruction_BD, target_BD = quantized.reconstruction_BD[head], embedding_BD[head]
    terms = {
        "residual_quantization": residual_quantization_loss(
            residual_LBZ, codeword_LBZ, commitment=weights.commitment, **shared
        )
    }
    anchors: list[Tensor] = []
    if weights.reconstruction:
        terms["reconstruction"] = reconstruction_loss(reconstruction_BD, target_BD, **shared)
    if weights.dispersion:
        terms["dispersion"] = dispersion(reconstruction_BD, target_BD, temperature=weights.temperature, **shared)
    if weights.hierarchical and min(weights.category_depth, category_BH.shape[1]):
        terms["hierarchical"], anchors = _category_contrast(plain, quantized, category_BH, weights, shared)
    if weights.cluster_scale:
        terms["cluster_scale"] = _cluster_scale(plain, residual_LBZ, weights, shared)
    if weights.query_item and extras.query_BD is not None:
        # ẑ with straight-through gradient, against the query's own latent.
        latent_BZ = quantized.latent_BZ[head]
        item_BZ = latent_BZ + (codeword_LBZ.sum(0) - latent_BZ).detach()
        terms["query_item"] = query_item_contrast(
            item_BZ,
            plain.latents(extras.query_BD[head]),
            extras.has_query_B[head],
            temperature=weights.temperature,
            **shared,
        )
    weighted = {name: getattr(weights, name, 1.0) * term for name, term in terms.items()}
    if plain.ema is not None and plain.training:
        plain.follow(residual_LBZ, quantized.codes_BL[head], gather)
    return StepLoss(sum(weighted.values()), {name: term.detach() for name, term in terms.items()}, weighted, anchors)


def _category_contrast(
    model: ResidualQuantizer, quantized: Quantized, category_BH: Tensor, weights: LossWeights, shared: dict
) -> tuple[Tensor, list[Tensor]]:
    """The term that `weights.category_on` chooses, over all rows of the batch, and how many anchors it counted by depth."""
    latent_BZ, on = quantized.latent_BZ, weights.category_on
    category_BH = category_BH[:, : weights.category_depth]
    temperature = weights.temperature if weights.category_temperature is None else weights.category_temperature
    if on in ("latent", "projection"):
        rows_BZ = latent_BZ if on == "latent" else model.projection(latent_BZ)
        soft = ancestor_contrast(rows_BZ, category_BH, decay=weights.category_decay, temperature=temperature, **shared)
        return soft.loss, [soft.anchors]
    rows_LBZ = quantized.residual_LBZ
    if on == "prefix":
        rows_LBZ = latent_BZ + (quantized.codeword_LBZ.cumsum(0) - latent_BZ).detach()
    levels = [
        hierarchical_class_terms(
            rows_BZ,
            category_BH,
            depth=depth,
            temperature=temperature,
            negatives=weights.negatives,
            over=weights.hierarchical_over,
            **shared,
        )
        for depth, rows_BZ in enumerate(rows_LBZ[: category_BH.shape[1]])
    ]
    factor_L = [1.0] * len(levels)
    if weights.level_power:
        factor_L = _level_factors(quantized.residual_LBZ, weights.level_power, shared["gather"])
    return sum(factor * level.loss for factor, level in zip(factor_L, levels)), [level.anchors for level in levels]


def _level_factors(residual_LBZ: Tensor, power: float, gather: Gather | None) -> Tensor:
    """L factors of eq. 4, without gradient: mean norm of the residuals over that of the latents, to a power."""
    norm_L = gathered(residual_LBZ.detach().norm(dim=2).sum(1)[None], gather).sum(0)
    return (norm_L / norm_L[0].clamp_min(1e-12)) ** power


def _cluster_scale(model: ResidualQuantizer, residual_LBZ: Tensor, weights: LossWeights, shared: dict) -> Tensor:
    """Σ_l of eq. 5 with log p_l = log softmax(−‖r_l − e_l‖² / scale_temperature), where ‖r‖² cancels, or of ‖r_l − e_l‖."""
    total = 0.0
    for residual_BZ, codebook_KZ in zip(residual_LBZ, model.codebooks, strict=True):
        closeness_BK = torch.addmm(-codebook_KZ.square().sum(1), residual_BZ, codebook_KZ.T, alpha=2)
        if weights.scale_distance == "plain":
            squared_BK = residual_BZ.square().sum(1, keepdim=True) - closeness_BK
            closeness_BK = -squared_BK.clamp_min(1e-12).sqrt()  # a distance of 0 has no gradient
        log_BK = (closeness_BK / weights.scale_temperature).log_softmax(1)
        total = total + cluster_scale_from_log(log_BK, **shared)
    return total


def parameter_groups(model: ResidualQuantizer, *, weight_decay: float) -> list[dict]:
    """Optimiser groups: codebooks and biases are not decayed, for decay pulls rarely used codewords towards 0."""
    decayed = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("weight")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def epoch_order(rows: int, *, seed: int, epoch: int) -> Tensor:
    """int64 permutation of 0 … rows − 1, a pure function of its arguments."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed_from(seed, epoch)))


def fit(
    embedding_ND: Tensor,
    category_NH: Tensor,
    *,
    model: ResidualQuantizer,
    weights: LossWeights,
    epochs: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    revive: bool = True,
    refit: bool = True,
    query_ND: Tensor | None = None,
    has_query_N: Tensor | None = None,
) -> list[dict]:
    """Train `model` in place in one process; one record per epoch: mean `loss`, mean terms, `codes_used`, `perplexity`
    (per level, on a seeded sample of at most SAMPLE_ROWS), `revived`.

    k-means start, AdamW, 5 % warm-up, cosine; rows that fill no whole batch wait for the next epoch's order. Dead codes
    are revived after every epoch but those of the last quarter, where they would no longer settle. `refit` fits the
    codebooks once more by k-means to the final latents: gradient steps leave them behind an encoder that still moves
    (54,667 products, Z 12, β 0.1, 6 epochs: 38 % collisions before, 5.5 % after; not stated in the paper). `query_ND`,
    `has_query_N`: for the weight `query_item`, a query of each product and whether it has one. Raises
    InputError when the tables differ in rows, CapacityError when there are fewer rows than codes.
    """
    rows = len(embedding_ND)
    if len(category_NH) != rows:
        raise InputError(
            f"{rows} embeddings but {len(category_NH)} category rows: they must describe the same products"
        )
    sample = epoch_order(rows, seed=seed, epoch=-1 % 2**32)[:SAMPLE_ROWS]
    sample_SD, labels_SH = embedding_ND[sample], category_NH[sample]
    model.initialise(sample_SD, labels_SH, seed=seed)
    model.train()
    optimiser = torch.optim.AdamW(parameter_groups(model, weight_decay=weight_decay), lr=learning_rate)
    batch = min(batch, rows)
    steps = rows // batch
    history = []
    for epoch in range(epochs):
        sums: dict[str, float] = {}
        for step, index_B in enumerate(epoch_order(rows, seed=seed, epoch=epoch)[: steps * batch].split(batch)):
            rate = learning_rate_at(epoch * steps + step, epochs * steps, peak=learning_rate, warmup_share=0.05)
            for group in optimiser.param_groups:
                group["lr"] = rate
            extras = None if query_ND is None else Extras(query_BD=query_ND[index_B], has_query_B=has_query_N[index_B])
            loss = training_loss(model, embedding_ND[index_B], category_NH[index_B], weights=weights, extras=extras)
            optimiser.zero_grad(set_to_none=True)
            loss.total.backward()
            optimiser.step()
            for name, term in {"loss": loss.total.detach(), **loss.terms}.items():
                sums[name] = sums.get(name, 0.0) + float(term) / steps
        moved = 0
        if revive and epoch < 0.75 * epochs:
            moved = revive_dead_codes(model, sample_SD, labels_SH, seed=seed, epoch=epoch)
        if refit and epoch == epochs - 1:
            model.initialise_codebooks(sample_SD, labels_SH, seed=seed)
        health = level_health(model.encode(sample_SD, labels_SH).codes_BL, model.codes_per_level)
        used, perplexity = [level.codes_used for level in health], [level.perplexity for level in health]
        history.append({"epoch": epoch, **sums, "codes_used": used, "perplexity": perplexity, "revived": moved})
    return history
