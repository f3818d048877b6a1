"""What alignment learns in: rollouts through the trie, what they are worth, and the experts of a query.

A batch of prompts is a dict of tensors: `input_ids` B×T, `judged` int64 B×J packed IDs (−1 = none), `reward` and `relevant`
B×J, and where a table of a ranker's scores is given `scored` int64 B×S and `score` B×S; `number` B names the prompts for a
ranker that is called.

B queries, G rollouts, N members, J judged IDs, T query tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.eg_grpo import Experience, Groups, Objective, collect, pack
from catid2_ray.generator.rewards import expert_candidates, graded, looked_up, ranker_bonus, unpack
from catid2_ray.generator.vocabulary import pad_of
from catid2_ray.retrieval.arrays import entries
from catid2_ray.retrieval.rollout import Rollouts, beam_rollouts, sample_rollouts
from catid2_ray.retrieval.trie import Trie
from catid2_ray.schedule import seed_from


@dataclass(frozen=True, kw_only=True)
class Rules:
    """`group`: G, IDs per rollout; `source`: "sample" (without replacement, at `temperature`) or "beam" (the best of
    `beam_width`). `valid`, `invalid`: rewards of IDs without a judgement. `least_expert`: judged IDs of at least this
    reward are ground truth. `bonus`: bound of the ranker's bonus. Raises RecipeError for an unknown source."""

    group: int = 8
    source: str = "sample"
    beam_width: int = 32
    temperature: float = 1.0
    valid: float = 0.1
    invalid: float = 0.0
    least_expert: float = 0.5
    bonus: float = 0.2

    def __post_init__(self):
        if self.source not in ("sample", "beam") or self.group < 2:
            raise RecipeError(
                f"rollouts are a 'sample' or a 'beam' of at least 2 IDs, found {self.source!r} of {self.group}"
            )


@dataclass(frozen=True)
class CalledRanker:
    """A downstream ranker as a function: `ranker(query, product_ids)` gives one score per product, larger = better.

    `queries(number_B)` gives the texts of prompts; `product_ids` one per trie row, in trie order.
    """

    ranker: Callable[[str, list[str]], Sequence[float]]
    queries: Callable[[np.ndarray], list[str]]
    product_ids: Sequence[str]

    def scores(self, number_B: Tensor, leaf_BN: Tensor, trie: Trie) -> Tensor:
        """float32 B×N, an ID's best product; NaN where the ID does not exist. One call a query."""
        score_BN = np.full(tuple(leaf_BN.shape), np.nan, np.float32)
        for row, (query, leaf_N) in enumerate(zip(self.queries(number_B.cpu().numpy()), leaf_BN.cpu().numpy())):
            place = np.flatnonzero(leaf_N >= 0)
            if not len(place):
                continue
            first, end = (trie.row_start[-1][leaf_N[place] + i].astype(np.int64) for i in (0, 1))
            rows, _ = entries(first, end - first)
            products = [str(self.product_ids[int(at)]) for at in rows]
            score = np.asarray(self.ranker(query, products), np.float32)
            if score.shape != (len(products),) or not np.isfinite(score).all():
                raise InputError(
                    f"the ranker gave {score.shape} scores for {len(products)} products of the query {query!r}: expected "
                    "one finite number per product"
                )
            score_BN[row, place] = np.maximum.reduceat(score, np.cumsum(end - first) - (end - first))
        return torch.from_numpy(score_BN).to(leaf_BN.device)


class Environment:
    """Rollouts and rewards over one trie. `ranker` adds its bonus to the graded reward."""

    def __init__(self, trie: Trie, rules: Rules, *, ranker: CalledRanker | None = None):
        self.trie, self.rules, self.ranker = trie, rules, ranker

    @cached_property
    def space(self) -> DocidSpace:
        return DocidSpace(tuple(self.trie.codes_per_level))

    def rollouts(self, model, input_ids_BT: Tensor, *, seed: int) -> Rollouts:
        mask_BT, rules = input_ids_BT != pad_of(model), self.rules
        if rules.source == "beam":
            return beam_rollouts(
                model, self.trie, input_ids_BT, mask_BT, group=rules.group, beam_width=rules.beam_width
            )
        return sample_rollouts(
            model, self.trie, input_ids_BT, mask_BT, group=rules.group, seed=seed, temperature=rules.temperature
        )

    def reward(self, batch: Mapping[str, Tensor], groups: Groups) -> Tensor:
        """float32 B×N: graded, plus the ranker's bonus for members that exist."""
        rules, packed_BN = self.rules, pack(groups.codes_BNL, self.space)
        codes_NL = groups.codes_BNL.cpu().numpy().reshape(-1, self.trie.levels)
        leaf_N = torch.from_numpy(self.trie.nodes_of(codes_NL)[:, -1].astype(np.int64))
        leaf_BN = leaf_N.view(packed_BN.shape).to(packed_BN.device)
        valid_BN = leaf_BN >= 0
        reward_BN = graded(
            packed_BN, batch["judged"], batch["reward"], valid_BN, valid=rules.valid, invalid=rules.invalid
        )
        if self.ranker is not None:
            score_BN = self.ranker.scores(batch["number"], leaf_BN, self.trie)
        elif "scored" in batch:
            score_BN = looked_up(packed_BN, batch["scored"], batch["score"], missing=torch.nan)
        else:
            return reward_BN
        score_BN = score_BN.masked_fill(~(groups.real_BN & valid_BN), torch.nan)
        return reward_BN + ranker_bonus(score_BN, bound=rules.bonus)

    def experience(
        self, model, reference, batch: Mapping[str, Tensor], *, objective: Objective, seed: int
    ) -> tuple[Experience, dict[str, Tensor]]:
        """One rollout of a batch; a pure function of its arguments."""
        packed_BE, experts_B = expert_candidates(
            batch["judged"], batch["reward"], least=self.rules.least_expert,
            most=self.rules.group + objective.injected, seed=seed_from(seed, 1),
        )  # fmt: skip

        def rollout(input_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
            rollouts = self.rollouts(model, input_ids_BT, seed=seed_from(seed, 2))
            return rollouts.codes_BGL.clamp(min=0), rollouts.count_B

        return collect(
            model, reference, batch["input_ids"], rollout=rollout,
            experts=(unpack(packed_BE, self.trie.codes_per_level, self.space.radix_L), experts_B),
            reward=lambda groups: self.reward(batch, groups), objective=objective, space=self.space,
        )  # fmt: skip
