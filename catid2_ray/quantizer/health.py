"""Is the codebook in use? Figures per level, a verdict, and the rule that revives dead codes (METHODS 8.2, 8.4).

Unusual: reviving draws nothing from global state, so ranks that pass the same sample, seed and epoch end with equal
codebooks without a broadcast. The verdict allows for small samples: 500 rows cannot show 8192 codes, however healthy.

Shape letters: N rows, D embedding, Z latent, L levels, K codes, H category depth.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from catid2_ray.quantizer.kmeans import squared_error
from catid2_ray.schedule import seed_from

# A level carries ln(perplexity) of the ln(K) nats that it could. Less than half of them is a collapse: 16 of 256 codes,
# 90 of 8192 (a run with 10 of 256 was met in practice, METHODS 8.12); sound levels have 0.98 (228 of 256).
COLLAPSED_ENTROPY = 0.5
# 36 of 256 codes, 3.9 of 8. Residual k-means itself, before any training, shows 0.69 to 1 on sound catalogues (Home Depot,
# 256 codes: 0.96, 0.82, 0.81, 0.71), so less than that is the training's doing.
NARROW_ENTROPY = 0.65
# One code in five never used: revival does not keep up.
NARROW_USED = 0.8
# Rows that need an ID of their own and find none, of those that even codes would tell apart. Residual k-means loses 10 to
# 34 % of them on Home Depot, up to 79 % where products are near-equal; 90 % says that products hardly differ in their
# codes although every single level may look used.
NARROW_LOST, COLLAPSED_LOST = 0.8, 0.9
# Fewer rows say nothing about use: of 32 rows even 8 healthy codes leave one out every tenth time.
LEAST_ROWS = 32
# With fewer rows per code, or fewer in all, a level that uses its codes is not judged by how evenly: in many dimensions
# k-means gives single outliers codes of their own. It shows 1.8 of 8 codes for 300 rows, 2.8 for 600 and 4 of 256 for
# 3,000, which is no collapse. That products differ in their codes is then judged by collisions alone.
ROWS_PER_CODE, ROWS_OF_A_LEVEL = 64, 2048


@dataclass(frozen=True, kw_only=True)
class LevelHealth:
    """One level. `perplexity` = exp(H) of code use, in codes; `normalised_entropy` = H / ln K, 0…1; `top_share` = share
    of rows on the most used 1 % of the codes (at least one), 0…1; `dead` = codes that no row uses; `rows` counted;
    `forced` = the codes are the rows' categories, not the training's choice; `quantization_error` = mean ‖r − e‖² over
    the rows, in the squared unit of z, None where only codes are known."""

    codes_used: int
    perplexity: float
    normalised_entropy: float
    top_share: float
    dead: int
    rows: int
    forced: bool = False
    quantization_error: float | None = None


class CodebookHealth(NamedTuple):
    """All levels, and the mean norm of z, in whose unit the codewords are: towards 0, eq. 5 stops acting."""

    levels: list[LevelHealth]
    latent_norm: float


class Verdict(NamedTuple):
    """`level` counts from 0 and is the one that decided; None where no single level did. `reason`: one sentence."""

    state: Literal["healthy", "narrowing", "collapsed"]
    level: int | None
    reason: str


def level_health(codes_NL: Tensor | np.ndarray, codes_per_level: tuple[int, ...]) -> list[LevelHealth]:
    """Figures of every level from int64 codes N×L (tensor or array); all zero for an empty table."""
    codes_NL = torch.as_tensor(codes_NL)
    report = []
    for level, codes in enumerate(codes_per_level):
        count_K = torch.bincount(codes_NL[:, level].cpu(), minlength=codes).double()
        share_K = count_K / count_K.sum().clamp_min(1.0)
        entropy = float(torch.special.entr(share_K).sum())
        used = int((count_K > 0).sum())
        report.append(
            LevelHealth(
                codes_used=used,
                perplexity=math.exp(entropy) if used else 0.0,
                normalised_entropy=entropy / math.log(codes) if codes > 1 else float(used),
                top_share=float(share_K.topk(math.ceil(codes / 100)).values.sum()),
                dead=codes - used,
                rows=len(codes_NL),
            )
        )
    return report


@torch.no_grad()
def codebook_health(model, sample_ND: Tensor, category_NH: Tensor | None = None) -> CodebookHealth:
    """Figures of a `ResidualQuantizer` on a sample, quantisation errors and the mean norm of z included.

    `category_NH` matters where the first code is forced by the category. Raises InputError for another width.
    """
    latent_NZ = residual_NZ = model.latents(sample_ND)
    codes, errors = [], []
    for level, codebook_KZ in enumerate(model.codebooks):
        codes.append(model.codes_of(level, residual_NZ, category_NH))
        errors.append(float(squared_error(residual_NZ, codebook_KZ, codes[-1]).double().mean()))
        residual_NZ = residual_NZ - codebook_KZ[codes[-1]]
    levels = [
        replace(figures, quantization_error=error, forced=level == 0 and model.category_column is not None)
        for level, (figures, error) in enumerate(
            zip(level_health(torch.stack(codes, 1), model.codes_per_level), errors, strict=True)
        )
    ]
    return CodebookHealth(levels, float(torch.linalg.vector_norm(latent_NZ, dim=1).double().mean()))


def gradient_norms(losses: dict[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, float]:
    """Norm of each scalar's gradient over all `parameters`; 0 for one that does not reach them (METHODS 11.5).

    Hand in the weighted terms, then the norms say which term moves the weights. Leaves `.grad` alone and keeps the
    graph, so that a backward pass can follow.
    """
    parameters, norms = list(parameters), {}
    for name, loss in losses.items():
        gradients = (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
        )
        norms[name] = math.sqrt(sum(float(part.double().square().sum()) for part in gradients if part is not None))
    return norms


def expected_distinct(possible: int, rows: int) -> float:
    """Distinct values among `rows` draws from `possible` equally likely ones: K(1 − (1 − 1/K)^n)."""
    if possible == 1:
        return float(min(rows, 1))
    return min(-possible * math.expm1(rows * math.log1p(-1 / possible)), float(rows))


def verdict(levels: Sequence[LevelHealth], collision_rate: float | None = None) -> Verdict:
    """The worst state of any level, and of the collisions where given ((N − U)/N on the rows that `levels` counted).

    Use is compared with what as many rows would show if all codes were used evenly, and collisions with what so many
    rows cannot avoid. A forced level does not count, nor do fewer than LEAST_ROWS rows. A level that uses its codes is
    healthy where the rows are too few to say more (ROWS_PER_CODE, ROWS_OF_A_LEVEL).
    """
    rows = levels[0].rows if levels else 0
    if rows < LEAST_ROWS:
        return Verdict("healthy", None, f"{rows} rows are too few for a verdict, it takes {LEAST_ROWS}")
    verdicts = [
        _level_verdict(level, figures, len(levels)) for level, figures in enumerate(levels) if not figures.forced
    ]
    if collision_rate is not None:
        verdicts.append(_collision_verdict(levels, collision_rate))
    for state in ("collapsed", "narrowing"):
        bad = [one for one in verdicts if one.state == state]
        if bad:
            return bad[0]
    used = ", ".join(f"{figures.codes_used} of {figures.codes_used + figures.dead}" for figures in levels)
    return Verdict("healthy", None, f"codes used per level by {rows} rows: {used}")


def persistent(states: list[str], patience: int) -> bool:
    """Whether each of the last `patience` ≥ 1 epochs ended collapsed; `states` holds one per epoch, the latest last."""
    return 1 <= patience <= len(states) and all(state == "collapsed" for state in states[-patience:])


def _level_verdict(level: int, figures: LevelHealth, levels: int) -> Verdict:
    codes = figures.codes_used + figures.dead
    expected = expected_distinct(codes, figures.rows)
    text = (
        f"level {level + 1} of {levels} uses {figures.codes_used} of {codes} codes with perplexity "
        f"{figures.perplexity:.4g}, where even use by {figures.rows} rows would show about {expected:.4g}"
    )
    in_use = figures.codes_used >= NARROW_USED * expected
    if in_use and figures.rows < max(ROWS_PER_CODE * codes, ROWS_OF_A_LEVEL):
        return Verdict("healthy", level, text)
    for state, share in (("collapsed", COLLAPSED_ENTROPY), ("narrowing", NARROW_ENTROPY)):
        if figures.perplexity < expected**share:
            return Verdict(state, level, f"{text}: below {expected**share:.4g}, {share:.0%} of the entropy")
    if not in_use:
        return Verdict("narrowing", level, f"{text}: fewer than {NARROW_USED:.0%} of these are used")
    return Verdict("healthy", level, text)


def _collision_verdict(levels: Sequence[LevelHealth], collision_rate: float) -> Verdict:
    rows = levels[0].rows
    capacity = math.prod(figures.codes_used + (0 if figures.forced else figures.dead) for figures in levels)
    distinct, expected = (1 - collision_rate) * rows, expected_distinct(capacity, rows)
    lost = 1 - distinct / expected
    text = f"{rows} rows share {distinct:.0f} IDs ({collision_rate:.1%} collide), even codes would give {expected:.0f}"
    for state, share in (("collapsed", COLLAPSED_LOST), ("narrowing", NARROW_LOST)):
        if lost > share:
            return Verdict(state, None, f"{text}: more than {share:.0%} of the IDs are lost")
    return Verdict("healthy", None, text)


@torch.no_grad()
def revive_dead_codes(model, sample_ND: Tensor, category_NH: Tensor | None = None, *, seed: int, epoch: int) -> int:
    """Move codes that no row of the sample uses onto residuals that are badly quantised; returns how many moved.

    Level by level, each seeing what the revived levels before it leave over. The targets are drawn by (seed, epoch)
    from the 4× as many worst quantised residuals of that level: taking the very worst would stack the new codes on one
    group of outliers. The sample should have many rows per code, or rare codes count as dead. Moving averages restart
    from the sample. A first level whose codes are categories is left alone: there a dead code is a category that the
    sample lacks, and another category's rows must not take it.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, epoch))
    residual_NZ, revived = model.latents(sample_ND), 0
    for level, codebook_KZ in enumerate(model.codebooks):
        codes_N = model.codes_of(level, residual_NZ, category_NH)
        dead_E = torch.nonzero(torch.bincount(codes_N, minlength=len(codebook_KZ)) == 0).flatten()[: len(sample_ND)]
        if len(dead_E) and (level or model.category_column is None):
            worst = squared_error(residual_NZ, codebook_KZ, codes_N).argsort(descending=True, stable=True)
            pool = worst[: 4 * len(dead_E)]
            drawn = torch.randperm(len(pool), generator=generator)[: len(dead_E)].to(pool.device)
            codebook_KZ[dead_E] = residual_NZ[pool[drawn]]
            codes_N = model.codes_of(level, residual_NZ, category_NH)
            revived += len(dead_E)
        residual_NZ = residual_NZ - codebook_KZ[codes_N]
    if revived:
        model.restart_averages(sample_ND, category_NH)
    return revived
