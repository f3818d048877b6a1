"""What a level's scores are measured against: the right code, its neighbours, and a second pass under other dropout.

Each is a mean over rows to be: sums over the rows of a batch are returned, so that batches and workers can be joined.

B batch, L levels, K codes, Z width of a codeword.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from catid2_ray.errors import RecipeError


def cross_entropy(logits_BK: Tensor, code_B: Tensor, *, smoothing: float, near_KK: Tensor | None = None) -> Tensor:
    """float32 B: −Σ_c q(c) log p(c), with q = (1 − smoothing) on the right code and `smoothing` over the level's codes.

    The smoothed mass is equal for all codes, or row `code_B` of `near_KK`.
    """
    if near_KK is None or not smoothing:
        return F.cross_entropy(logits_BK.float(), code_B, label_smoothing=smoothing, reduction="none")
    logp_BK = logits_BK.float().log_softmax(-1)
    right_B = logp_BK.gather(1, code_B[:, None])[:, 0]
    return -(1 - smoothing) * right_B - smoothing * (near_KK[code_B] * logp_BK).sum(1)


def near_codes(codebooks: Sequence[np.ndarray | None], *, temperature: float) -> list[Tensor | None]:
    """Per level float32 K×K, each row a distribution over the level's codes: q(c | c*) ∝ exp(−‖e_c − e_c*‖ / t).

    (As VARG, 2609.14493, smooths its rank tokens; a stand-in for Hi-Gen's position-aware loss, 2404.15675, in which near
    tokens are punished less and whose formula is not published.) t is `temperature` times the level's mean distance
    between two codes, so that it means the same at every level and scale. A level without codewords gives None: its
    mass is spread evenly. K² numbers a level.
    Raises RecipeError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise RecipeError(f"the temperature of near codes must be positive, found {temperature}")
    near = []
    for codebook_KZ in codebooks:
        if codebook_KZ is None:
            near.append(None)
            continue
        codeword_KZ = torch.as_tensor(np.asarray(codebook_KZ, np.float32))
        distance_KK = torch.cdist(codeword_KZ, codeword_KZ, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = max(1, len(codeword_KZ) * (len(codeword_KZ) - 1))
        scale = (distance_KK.sum() / pairs).clamp(min=1e-12) * temperature
        near.append((-distance_KK / scale).softmax(1))
    return near


def consistency(first_BK: Tensor, second_BK: Tensor) -> Tensor:
    """float32 B: ½ KL(p ‖ q) + ½ KL(q ‖ p) of two passes (R-Drop, 2106.14448; NCI, 2206.02743, section 3.4)."""
    p_BK, q_BK = first_BK.float().log_softmax(-1), second_BK.float().log_softmax(-1)
    return 0.5 * ((p_BK.exp() - q_BK.exp()) * (p_BK - q_BK)).sum(1)
