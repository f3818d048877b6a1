"""EG-GRPO: a generator learns from the rewards of whole groups of IDs, with ground-truth IDs injected into the groups.

Rollouts and rewards come as callables, so nothing here searches or knows a product. Where CQ-SID (arXiv 2605.14434) is
silent: what the model does with an ID is summed over the ID's levels, never averaged (all IDs are of one length), so that
KL and entropy are those of a whole ID in nats, and token and sequence ratios start with the same gradient. The KL is
exact per level, over the level's K codes on the prefix that a member visited; k3, an estimate from the one code that was
taken, needs i.i.d. samples of the policy, which the members of a beam are not.

B groups (one a query), G rollouts, E expert candidates, N members, L levels, K codes of a level, T query tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError
from catid2_ray.generator.logits import decoder_logits, docid_logits, memory_of
from catid2_ray.generator.step import parameter_groups, update
from catid2_ray.schedule import learning_rate_at, seed_from

_FLAT = 1e-6  # rewards nearer to each other than this are equal


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The switches of the loss. Raises RecipeError for an unknown word.

    `term`: "policy", the clipped ratio times the advantage, or "pairs": each member is preferred to every member of its group of
    a lower advantage (DPO, arXiv 2305.18290, equation 7; DDRO, 2504.05181), with `beta`; `ratio`, `clip` and `expert_term` then
    decide nothing.
    `injected`: k, experts per group; `form`: "widened" (G + k members) or "fixed" (experts take the places of the last k
    rollouts). `ratio`: the PPO ratio per "token" (each level clipped by itself) or of the whole ID, "sequence". `kl`:
    "exact" or "k3". `expert_term`: experts in the "policy" term as any member, or −log π weighted by `expert_weight` in
    its stead ("sft"); they count in the group's mean and deviation in both. `expert_cap`: the largest advantage of an
    expert that is less likely than every rollout of its group; None = no cap. `eps` is added to the deviation.
    """

    term: str = "policy"
    beta: float = 0.1
    injected: int = 2
    form: str = "widened"
    ratio: str = "token"
    clip: float = 0.2
    kl: str = "exact"
    kl_weight: float = 1.0
    expert_term: str = "policy"
    expert_weight: float = 1.0
    expert_cap: float | None = 1.0
    eps: float = 1e-4

    def __post_init__(self):
        known = {"form": ("widened", "fixed"), "ratio": ("token", "sequence"), "kl": ("exact", "k3"),
                 "expert_term": ("policy", "sft"), "term": ("policy", "pairs")}  # fmt: skip
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise RecipeError(f"{name} must be {' or '.join(words)}, found {getattr(self, name)!r}")


class Groups(NamedTuple):
    """Members of B groups, all distinct. `codes_BNL` int64 (0 where a place is empty); `real_BN`, `expert_BN` bool."""

    codes_BNL: Tensor
    real_BN: Tensor
    expert_BN: Tensor


class Experience(NamedTuple):
    """What one rollout gives to its updates; no gradients. `logp_old_BNL`: the taken codes under the policy of then;
    `reference`: per level the reference's log-probabilities, B×N×K_l."""

    groups: Groups
    advantage_BN: Tensor
    logp_old_BNL: Tensor
    reference: list[Tensor]


def form_groups(
    rollout_BGL: Tensor, count_B: Tensor, expert_BEL: Tensor, experts_B: Tensor, *, injected: int, form: str,
    space: DocidSpace,
) -> Groups:  # fmt: skip
    """Put up to `injected` of each query's expert candidates, in their order, into its group of rollouts.

    Beyond `count_B` rollouts and `experts_B` candidates rows are ignored. An expert that the rollouts found is in the group
    already, and the next candidate has its turn; where candidates run out a widened group has empty places, and a fixed one
    keeps more of its rollouts. `injected` 0 gives the rollouts as they are. (CQ-SID, section on EG-GRPO: size not stated.)
    Raises RecipeError for a fixed group that would have no rollout.
    """
    group = rollout_BGL.shape[1]
    if form == "fixed" and injected >= group:
        raise RecipeError(
            f"a group of {group} in fixed form cannot hold {injected} experts: at least one rollout must stay; "
            "inject fewer, or widen the group"
        )
    kept = group if form == "widened" else group - injected
    device = rollout_BGL.device
    rolled_BG = torch.arange(group, device=device) < count_B[:, None]
    offered_BE = torch.arange(expert_BEL.shape[1], device=device) < experts_B[:, None]
    codes_BCL = torch.cat((rollout_BGL[:, :kept], expert_BEL, rollout_BGL[:, kept:]), 1)
    real_BC = torch.cat((rolled_BG[:, :kept], offered_BE, rolled_BG[:, kept:]), 1)
    expert_C = torch.zeros(codes_BCL.shape[1], dtype=torch.bool, device=device)
    expert_C[kept : kept + expert_BEL.shape[1]] = True
    packed_BC = pack(codes_BCL, space)
    same_BCC = (packed_BC[:, :, None] == packed_BC[:, None]) & real_BC[:, None]
    new_BC = real_BC & expert_C & ~same_BCC.tril(-1).any(-1)
    enters_BC = new_BC & (new_BC.cumsum(1) <= injected)
    # Rollouts after the experts fill what is left; only an expert that did enter makes one of them a duplicate.
    double_BC = (same_BCC & (enters_BC | ~expert_C)[:, None]).tril(-1).any(-1)
    real_BC = torch.where(expert_C, enters_BC, real_BC & ~double_BC)
    size = group + injected if form == "widened" else group
    place_BN = (~real_BC).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
    real_BN = real_BC.gather(1, place_BN)
    codes_BNL = codes_BCL.gather(1, place_BN[..., None].expand(-1, -1, space.levels))
    return Groups(codes_BNL.masked_fill(~real_BN[..., None], 0), real_BN, expert_C[place_BN] & real_BN)


def pack(codes_BNL: Tensor, space: DocidSpace) -> Tensor:
    """int64 B×N, `DocidSpace.pack` on a device and unchecked."""
    return (codes_BNL * torch.from_numpy(space.radix_L).to(codes_BNL.device)).sum(-1)


class Advantages(NamedTuple):
    """`advantage_BN` float32, 0 for empty places and in flat groups; `flat_B` bool, groups whose rewards are all equal."""

    advantage_BN: Tensor
    flat_B: Tensor


def group_advantages(reward_BN: Tensor, real_BN: Tensor, *, eps: float = 1e-4) -> Advantages:
    """A_i = (R_i − mean) / (std + eps) over a group's real members; the deviation of the group itself, not of a population.

    (CQ-SID, EG-GRPO's advantage; GRPO, arXiv 2402.03300, equation 4.) A flat group teaches nothing and is counted.
    """
    count_B1 = real_BN.sum(1, keepdim=True).clamp(min=1)
    reward_BN = reward_BN.float().masked_fill(~real_BN, 0)
    mean_B1 = reward_BN.sum(1, keepdim=True) / count_B1
    off_BN = (reward_BN - mean_B1).masked_fill(~real_BN, 0)
    flat_B = off_BN.abs().amax(1) < _FLAT
    std_B1 = (off_BN.square().sum(1, keepdim=True) / count_B1).sqrt()
    return Advantages((off_BN / (std_B1 + eps)).masked_fill(flat_B[:, None], 0), flat_B)


def cap_experts(advantage_BN: Tensor, logp_BN: Tensor, groups: Groups, *, cap: float | None) -> Tensor:
    """The advantages with those of unlikely experts at most `cap`; unlikely = under every rollout of the group.

    An expert's log-probability has the steepest gradient where the model least expects it, and a lone success among
    failures the largest advantage; the PPO clip bounds neither, since its ratio starts at 1.
    """
    if cap is None:
        return advantage_BN
    rollout_BN = groups.real_BN & ~groups.expert_BN
    least_B1 = logp_BN.masked_fill(~rollout_BN, torch.inf).amin(1, keepdim=True)
    unlikely_BN = groups.expert_BN & (logp_BN < least_B1)
    return torch.where(unlikely_BN, advantage_BN.clamp(max=cap), advantage_BN)


def group_logps(model, input_ids_BT: Tensor, codes_BNL: Tensor, *, space: DocidSpace) -> list[Tensor]:
    """Per level float32 B×N×K_l, log p of every code after the member's own codes before it, over the level's codes.

    `model`: any kind of generator (`logits.docid_logits`). The query is encoded once for all members of its group, but by
    models with a `docid_logits` of their own.
    """
    batch, members, levels = codes_BNL.shape
    codes_RL = codes_BNL.flatten(0, 1)
    if hasattr(model, "docid_logits"):
        logits = docid_logits(model, input_ids_BT.repeat_interleave(members, 0), codes_RL, space=space)
    else:
        memory = memory_of(model, input_ids_BT).repeated(members)
        logits = decoder_logits(model, memory, codes_RL, space=space)
    return [level_RK.float().log_softmax(-1).unflatten(0, (batch, members)) for level_RK in logits]


def taken(logps: list[Tensor], codes_BNL: Tensor) -> Tensor:
    """float32 B×N×L, the log-probabilities of the members' own codes."""
    return torch.stack(
        [logp_BNK.gather(-1, codes_BNL[..., level, None])[..., 0] for level, logp_BNK in enumerate(logps)], -1
    )


@torch.no_grad()
def collect(
    model,
    reference,
    input_ids_BT: Tensor,
    *,
    rollout: Callable[[Tensor], tuple[Tensor, Tensor]],
    experts: tuple[Tensor, Tensor],
    reward: Callable[[Groups], Tensor],
    objective: Objective,
    space: DocidSpace,
) -> tuple[Experience, dict[str, Tensor]]:
    """One rollout of B queries, and its figures: means over members, experts left out of `reward`.

    `rollout(input_ids)` gives codes B×G×L and how many of each query's count; `experts` candidates B×E×L and how many
    count; `reward(groups)` floats B×N. Both models must be in eval mode: dropout would move the ratio away from 1.
    """
    codes_BGL, count_B = rollout(input_ids_BT)
    groups = form_groups(
        codes_BGL, count_B, *experts, injected=objective.injected, form=objective.form, space=space
    )  # fmt: skip
    reward_BN = reward(groups).float()
    advantage_BN, flat_B = group_advantages(reward_BN, groups.real_BN, eps=objective.eps)
    logp_old_BNL = taken(group_logps(model, input_ids_BT, groups.codes_BNL, space=space), groups.codes_BNL)
    advantage_BN = cap_experts(advantage_BN, logp_old_BNL.sum(-1), groups, cap=objective.expert_cap)
    known = group_logps(reference, input_ids_BT, groups.codes_BNL, space=space)
    rolled_BN = (groups.real_BN & ~groups.expert_BN).float()
    figures = {
        "reward": (reward_BN * rolled_BN).sum() / rolled_BN.sum().clamp(min=1),
        "without_variance": flat_B.float().mean(),
        "experts": groups.expert_BN.float().sum(1).mean(),
    }
    return Experience(groups, advantage_BN, logp_old_BNL, known), figures


def alignment_loss(logps: list[Tensor], experience: Experience, objective: Objective) -> tuple[Tensor, dict]:
    """(scalar, detached figures kl, entropy, clipped): mean over groups of the mean over their members.

    −min(ρ A, clip(ρ, 1 ± clip) A) + kl_weight · KL(π ‖ reference), ρ = π / π_old, summed over levels (see above); for
    experts −expert_weight · log π in place of the first term where `expert_term` is "sft". With `term` "pairs" the first term of
    a group is the mean of −log σ(β (log π/π_ref of the preferred − log π/π_ref of the other)) over its pairs. Equal shares of
    groups on two workers average to the loss of one. (PPO, arXiv 1707.06347, equation 7; GRPO, equation 3.)
    """
    groups, advantage_BN = experience.groups, experience.advantage_BN
    logp_BNL = taken(logps, groups.codes_BNL)
    change_BNL = logp_BNL - experience.logp_old_BNL
    ratio_BNX = (change_BNL if objective.ratio == "token" else change_BNL.sum(-1, keepdim=True)).exp()
    near_BNX = ratio_BNX.clamp(1 - objective.clip, 1 + objective.clip)
    gain_BNX = torch.minimum(ratio_BNX * advantage_BN[..., None], near_BNX * advantage_BN[..., None])
    term_BN = -gain_BNX.sum(-1)
    if objective.expert_term == "sft":
        term_BN = torch.where(groups.expert_BN, -objective.expert_weight * logp_BNL.sum(-1), term_BN)
    if objective.term == "pairs":
        term_BN = _pairs(logp_BNL.sum(-1), experience, objective.beta)
    if objective.kl == "exact":
        kl_BN = sum((p.exp() * (p - q)).sum(-1) for p, q in zip(logps, experience.reference))
    else:
        away_BNL = taken(experience.reference, groups.codes_BNL) - logp_BNL
        kl_BN = (away_BNL.exp() - away_BNL - 1).sum(-1)
    share_BN = groups.real_BN / groups.real_BN.sum(1, keepdim=True).clamp(min=1) / len(groups.real_BN)
    with torch.no_grad():
        entropy_BN = -sum((p.exp() * p).sum(-1) for p in logps)
        clipped_BN = (gain_BNX < ratio_BNX * advantage_BN[..., None]).float().mean(-1)
        figures = {name: (value * share_BN).sum() for name, value in
                   (("kl", kl_BN), ("entropy", entropy_BN), ("clipped", clipped_BN))}  # fmt: skip
    return ((term_BN + objective.kl_weight * kl_BN) * share_BN).sum(), figures


def _pairs(logp_BN: Tensor, experience: Experience, beta: float) -> Tensor:
    """B×N, the same for all members of a group: the mean over its pairs, 0 where it has none."""
    real_BN, advantage_BN = experience.groups.real_BN, experience.advantage_BN
    gained_BN = logp_BN - taken(experience.reference, experience.groups.codes_BNL).sum(-1)
    preferred_BNN = advantage_BN[:, :, None] > advantage_BN[:, None] + _FLAT
    preferred_BNN = preferred_BNN & real_BN[:, :, None] & real_BN[:, None]
    loss_BNN = -F.logsigmoid(beta * (gained_BN[:, :, None] - gained_BN[:, None]))
    mean_B = (loss_BNN * preferred_BNN).sum((1, 2)) / preferred_BNN.sum((1, 2)).clamp(min=1)
    return mean_B[:, None].expand_as(logp_BN)


class AlignmentLoss(nn.Module):
    """`alignment_loss` around the model, for engines that own `forward`. Stays in eval mode, so that dropout is off and
    the ratio of a first update is 1."""

    def __init__(self, model, *, space: DocidSpace, objective: Objective):
        super().__init__()
        self.model, self.space, self.objective = model, space, objective
        self.train(False)

    def train(self, mode: bool = True) -> "AlignmentLoss":
        return super().train(False)

    def forward(self, input_ids_BT: Tensor, experience: Experience) -> tuple[Tensor, dict]:
        logps = group_logps(self.model, input_ids_BT, experience.groups.codes_BNL, space=self.space)
        return alignment_loss(logps, experience, self.objective)


def prompt_order(prompts: int, *, rollout: int, batch: int, seed: int) -> np.ndarray:
    """int64 `batch`, the prompts of one rollout: a walk through permutations, one a pass, each a function of the seed."""
    position = rollout * batch + np.arange(batch)
    passes, place = np.divmod(position, prompts)
    order = np.empty(batch, np.int64)
    for number in np.unique(passes):
        mine = passes == number
        order[mine] = np.random.default_rng((seed, 4, int(number))).permutation(prompts)[place[mine]]
    return order


def align(
    model: nn.Module,
    *,
    prompts: Callable[[np.ndarray], Mapping[str, Tensor]],
    count: int,
    experience: Callable[[Mapping[str, Tensor], int], tuple[Experience, dict]],
    objective: Objective,
    space: DocidSpace,
    steps: int,
    batch: int,
    learning_rate: float,
    updates: int = 1,
    warmup_share: float = 0.05,
    weight_decay: float = 1e-4,
    clip: float = 1.0,
    seed: int = 0,
    stop: Callable[[int], bool] = lambda step: False,
) -> list[dict[str, float]]:
    """Alignment in one process, without Ray: train `model` in place for `steps` updates, `updates` on each rollout of `batch`
    prompts; figures of every step.

    `prompts(rows)` gives the tensors of those of `count` prompts, `experience(batch, seed)` what `Environment.experience`
    gives. `stop(step)` may end it early. Raises TrainingError when the loss is not finite.
    """
    module = AlignmentLoss(model, space=space, objective=objective)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=weight_decay), lr=learning_rate, fused=True)
    history, given = [], None
    for step in range(steps):
        if stop(step):
            break
        if step % updates == 0:
            rows = prompt_order(count, rollout=step // updates, batch=batch, seed=seed)
            asked = prompts(rows)
            given, rolled = experience(asked, seed_from(seed, step))
        rate = learning_rate_at(step, steps, peak=learning_rate, warmup_share=warmup_share)
        loss, figures = module(asked["input_ids"], given)
        figure = update(model, optimizer, loss, rate=rate, clip=clip, what="alignment", step=step)
        history.append({"loss": figure, **{name: float(value) for name, value in {**rolled, **figures}.items()}})
    return history
