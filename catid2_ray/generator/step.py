"""The generator's loss and a plain one-process training loop.

The softmax runs over the level's K codes only and touches only those rows of the output projection, so a step costs
ΣK rows instead of the whole vocabulary and the level-normalised search sees the very probabilities that were trained. With loss
"trie" it runs over the codes that some ID has after the prefix, and the search must do so too.

B batch, T tokens, L levels, D width, K codes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError, TrainingError
from catid2_ray.generator.batches import Examples, length_groups
from catid2_ray.generator.logits import docid_logits, taught_logits
from catid2_ray.generator.states import TokenStates
from catid2_ray.generator.vocabulary import pad_of
from catid2_ray.schedule import learning_rate_at, seed_from


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


def divergence(first_BK: Tensor, second_BK: Tensor) -> Tensor:
    """float32 B: ½ KL(p ‖ q) + ½ KL(q ‖ p) of two passes (R-Drop, 2106.14448; NCI, 2206.02743, section 3.4)."""
    p_BK, q_BK = first_BK.float().log_softmax(-1), second_BK.float().log_softmax(-1)
    return 0.5 * ((p_BK.exp() - q_BK.exp()) * (p_BK - q_BK)).sum(1)


_MOST_GROUPS = 8


def least_rows(model: nn.Module) -> int:
    """Rows that are worth a pass of their own. On a CPU's small T5 (width 192) a pass costs as much as 200 tokens and groups of
    32 rows were fastest; under larger models padding is what costs. On a GPU a small pass is latency (not measured)."""
    table = model.lm_head.weight
    if table.device.type != "cpu":
        return 64
    return 32 if table.shape[1] <= 256 else 8


_NEVER = -1e9  # a logit whose probability is 0, and whose difference from another such is a number


class Targets(NamedTuple):
    """What the scores are measured against besides the right codes. `label_smoothing`: share of the mass over the level's
    codes; `near`: per level K×K from `near_codes` or None (evenly); `consistency`: weight of the second pass under
    another dropout, in train mode only (0.15 in NCI). `continuations`: of codes B×L, which are IDs, per level bool B×K, the codes
    that are compared; None: all. Where one is compared its log p is 0, whatever the model says, and teaches nothing (MSL,
    2504.04178, over all of a level's valid tokens)."""

    label_smoothing: float = 0.0
    near: Sequence[Tensor | None] | None = None
    consistency: float = 0.0
    continuations: Callable[[Tensor], Sequence[Tensor]] | None = None


def level_losses(
    model: nn.Module,
    inputs: Tensor | TokenStates,
    codes_BL: Tensor,
    *,
    space: DocidSpace,
    weight_B: Tensor | None = None,
    most_groups: int | None = None,
    **targets,
) -> Tensor:
    """float L: −log p(code_l | query, code_<l), mean over the batch, one figure per level.

    `model`: any kind of generator (`logits.docid_logits`). `inputs`: token ids B×T padded at their end as the model's
    config says (0 in T5), or an EncoderDecoder's cached states. `targets`: the fields of Targets.
    Averages over workers of equal batches equal one process with all rows. (CAT-ID², section 3.4, NLL of ID tokens.)
    `weight_B`: what each row counts (1 where None); the divisor stays the number of rows, so that this holds with weights
    too. Rows are run in groups of like length (`batches.length_groups`), at most `most_groups`, so that short queries are
    not padded to the longest title; the figures stay the same.
    """
    against = Targets(**targets)
    if not model.training:
        against = against._replace(consistency=0.0)
    cached = isinstance(inputs, TokenStates)
    length_B = (inputs.mask_BT if cached else inputs != pad_of(model)).sum(1).cpu().numpy()
    least = 1 if most_groups else least_rows(model)
    sums = []
    for row_G in length_groups(length_B, least=least, most=most_groups or _MOST_GROUPS):
        used = max(1, int(length_B[row_G].max()))
        index_G = slice(None) if len(row_G) == len(length_B) else torch.from_numpy(row_G).to(codes_BL.device)
        part = TokenStates(*(x[index_G, :used] for x in inputs)) if cached else inputs[index_G, :used]
        weight_G = None if weight_B is None else weight_B[index_G]
        sums.append(_summed_losses(model, part, codes_BL[index_G], space, weight_G, against))
    return torch.stack(sums).sum(0) / len(codes_BL)


def _summed_losses(model, inputs, codes_BL: Tensor, space: DocidSpace, weight_B, targets: Targets) -> Tensor:
    """float L, summed over the rows, each times its weight."""
    if model.training and not targets.consistency:
        passes = taught_logits(model, inputs, codes_BL, space=space)
    else:
        passes = [docid_logits(model, inputs, codes_BL, space=space) for _ in range(2 if targets.consistency else 1)]
    if targets.continuations is not None:
        valid = targets.continuations(codes_BL)
        passes = [
            [logits_BK.float().masked_fill(~valid_BK, _NEVER) for logits_BK, valid_BK in zip(logits, valid)]
            for logits in passes
        ]
    losses = []
    for level in range(space.levels):
        near_KK = None if targets.near is None else targets.near[level]
        both = [
            cross_entropy(logits[level], codes_BL[:, level], smoothing=targets.label_smoothing, near_KK=near_KK)
            for logits in passes
        ]
        loss_B = sum(both) / len(both)
        if targets.consistency:
            loss_B = loss_B + targets.consistency * divergence(*(logits[level] for logits in passes))
        losses.append(loss_B.sum() if weight_B is None else loss_B @ weight_B.to(loss_B.dtype))
    return torch.stack(losses)


def docid_loss(
    model: nn.Module,
    inputs: Tensor | TokenStates,
    codes_BL: Tensor,
    *,
    space: DocidSpace,
    level_weights: Sequence[float] | None = None,
    **settings,
) -> Tensor:
    """Scalar: `level_losses` (which takes `settings`) summed over levels, each times its weight (L numbers, taken relative to
    their mean)."""
    loss_L = level_losses(model, inputs, codes_BL, space=space, **settings)
    if level_weights is None:
        return loss_L.sum()
    weight_L = torch.as_tensor(level_weights, dtype=loss_L.dtype, device=loss_L.device)
    if weight_L.shape != loss_L.shape or not weight_L.sum() > 0:
        raise RecipeError(f"level_weights {list(level_weights)} must be {len(loss_L)} numbers with a positive sum")
    return (weight_L * loss_L).sum() / weight_L.mean()


class DocidLoss(nn.Module):
    """`docid_loss` as a module around the model, for engines that want to own `forward` (DDP, DeepSpeed).

    `forward(inputs, codes_BL, weight_B)` returns the scalar loss; `model` is the generator to save. `settings`: of `docid_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        space: DocidSpace,
        near: Sequence[Tensor | None] | None = None,
        **settings,
    ):
        super().__init__()
        self.model, self.settings = model, {"space": space, **settings}
        self.levels = space.levels if near is not None else 0
        for level in range(self.levels):
            self.register_buffer(f"near_{level}", near[level], persistent=False)

    def forward(self, inputs: Tensor | TokenStates, codes_BL: Tensor, weight_B: Tensor | None = None) -> Tensor:
        near = [getattr(self, f"near_{level}") for level in range(self.levels)] or None
        return docid_loss(self.model, inputs, codes_BL, weight_B=weight_B, near=near, **self.settings)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: matrices decay; norms and embeddings, where rare rows would only shrink, do not."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    decays = [
        weight.ndim > 1 and not any(part in name for part in ("shared", "lm_head", "embed", "bias"))
        for name, weight in named
    ]
    return [
        {"params": [w for (_, w), decay in zip(named, decays) if decay], "weight_decay": weight_decay},
        {"params": [w for (_, w), decay in zip(named, decays) if not decay], "weight_decay": 0.0},
    ]


def update(model: nn.Module, optimizer, loss: Tensor, *, rate: float, clip: float, what: str, step: int) -> float:
    """One update of the weights, gradients clipped by norm; the loss as a number. Raises TrainingError, before anything is
    changed, when it is not finite."""
    if not math.isfinite(figure := loss.item()):
        raise TrainingError(f"the {what}'s loss is {figure} at step {step}; lower the learning rate or clip")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return figure


class FitResult(NamedTuple):
    """`losses`: one figure per step run; `step`: steps done in all; `optimizer`: its state, for `resume`."""

    losses: list[float]
    step: int
    optimizer: dict


def fit(
    model: nn.Module,
    examples: Examples,
    *,
    space: DocidSpace,
    steps: int,
    batch: int,
    learning_rate: float,
    total_steps: int | None = None,
    warmup_share: float = 0.05,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    seed: int = 0,
    resume: FitResult | None = None,
    on_step: Callable[[int, float], None] | None = None,
    **settings,
) -> FitResult:
    """Train `model` in place on its own device until step `steps`, from step 0 or from where `resume` stopped.

    AdamW, clipped by norm. Stopping and resuming gives the weights of an undisturbed run, bit for bit on CPU.
    `total_steps` is the schedule's length (default `steps`); `settings`: of DocidLoss. Raises TrainingError when the
    loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=weight_decay), lr=learning_rate, fused=True)
    if resume is not None:
        # Loading shares tensors with the state it is given; a copy leaves `resume` usable again.
        optimizer.load_state_dict(copy.deepcopy(resume.optimizer))
    loss_of = DocidLoss(model, space=space, **settings).to(device)
    losses = []
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(resume.step if resume else 0, steps):
            rows = examples.batch(seed=seed, step=step, batch=batch)
            rate = learning_rate_at(step, total_steps or steps, peak=learning_rate, warmup_share=warmup_share)
            torch.manual_seed(seed_from(seed, step))
            loss = loss_of(
                rows.inputs(device),
                torch.from_numpy(rows.codes_BL).to(device),
                None if rows.weight_B is None else torch.from_numpy(rows.weight_B).to(device),
            )
            losses.append(update(model, optimizer, loss, rate=rate, clip=clip, what="generator", step=step))
            if on_step is not None:
                on_step(step, losses[-1])
    model.eval()
    return FitResult(losses, max(steps, resume.step if resume else 0), optimizer.state_dict())
