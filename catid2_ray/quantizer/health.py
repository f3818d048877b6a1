"""Is the codebook in use? Figures per level from codes, and the rule that revives dead codes (METHODS 8.2, 8.4).

Unusual: reviving draws nothing from global state, so ranks that pass the same sample, seed and epoch end with equal
codebooks without a broadcast.

Shape letters: N rows, D embedding, Z latent, L levels, K codes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from catid2_ray.quantizer.kmeans import nearest, squared_error
from catid2_ray.schedule import seed_from


@dataclass(frozen=True, kw_only=True)
class LevelHealth:
    """One level. `perplexity` = exp(H) of code use, in codes; `normalised_entropy` = H / ln K, 0…1; `top_share` = share
    of rows on the most used 1 % of the codes (at least one), 0…1; `dead` = codes that no row uses."""

    codes_used: int
    perplexity: float
    normalised_entropy: float
    top_share: float
    dead: int


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
            )
        )
    return report


@torch.no_grad()
def revive_dead_codes(model, sample_ND: Tensor, *, seed: int, epoch: int) -> int:
    """Move codes that no row of the sample uses onto residuals that are badly quantised; returns how many moved.

    Level by level, each seeing what the revived levels before it leave over. The targets are drawn by (seed, epoch)
    from the 4× as many worst quantised residuals of that level: taking the very worst would stack the new codes on one
    group of outliers. The sample should have many rows per code, or rare codes count as dead.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, epoch))
    residual_NZ, revived = model.latents(sample_ND), 0
    for codebook_KZ in model.codebooks:
        codes_N = nearest(residual_NZ, codebook_KZ)
        dead_E = torch.nonzero(torch.bincount(codes_N, minlength=len(codebook_KZ)) == 0).flatten()[: len(sample_ND)]
        if len(dead_E):
            worst = squared_error(residual_NZ, codebook_KZ, codes_N).argsort(descending=True, stable=True)
            pool = worst[: 4 * len(dead_E)]
            drawn = torch.randperm(len(pool), generator=generator)[: len(dead_E)].to(pool.device)
            codebook_KZ[dead_E] = residual_NZ[pool[drawn]]
            codes_N = nearest(residual_NZ, codebook_KZ)
            revived += len(dead_E)
        residual_NZ = residual_NZ - codebook_KZ[codes_N]
    return revived
