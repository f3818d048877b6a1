"""Alignment in one process, without Ray: rollout, a few updates on it, and again; for notebooks, tests and benchmarks."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import TrainingError
from catid2_ray.generator.alignment import AlignmentLoss, Experience, Objective
from catid2_ray.generator.step import parameter_groups
from catid2_ray.schedule import learning_rate_at, seed_from


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
    """Train `model` in place for `steps` updates, `updates` on each rollout of `batch` prompts; figures of every step.

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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, peak=learning_rate, warmup_share=warmup_share)
        loss, figures = module(asked["input_ids"], given)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the alignment's loss is {loss.item()} at step {step}; lower the learning rate or clip"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        history.append({"loss": loss.item(), **{name: float(value) for name, value in {**rolled, **figures}.items()}})
    return history
