"""A causal language model behind the beam search: the prompt's keys and values are computed and kept once per query.

All beams of a query lie side by side in one sequence: each sees the prompt, its own ancestors and itself, by a mask.
So a step runs M new tokens per query, nothing is computed again, and no key is repeated or moved when beams change
places. The mask has M·(T + beams of earlier steps) entries per query.

B batch, M beams, T query tokens, S keys so far, D width, K codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.generator.causal import CausalGenerator, additive, causal, positions, right_aligned


class CausalMemory(NamedTuple):
    """Per layer the prompt's keys and values; which prompt tokens are real; the state after the last one."""

    layers: list[tuple[Tensor, Tensor]]
    real_BT: Tensor
    hidden_B1D: Tensor


class CausalCache(NamedTuple):
    """Per layer keys and values of the prompt and of every beam of every step; `beams`: how many each step had;
    `ancestor_BM`: of each step but the last, which of its beams each beam of the last step goes back to."""

    layers: list[tuple[Tensor, Tensor]]
    beams: list[int]
    ancestor_BM: list[Tensor]


class CausalDecoder:
    """`Decoder` over a CausalGenerator. Raises InputError when it has other IDs than `codes_per_level`, or attention that
    slides over a window (its keys would have to be moved out)."""

    def __init__(self, model: CausalGenerator, *, codes_per_level: Sequence[int]):
        if tuple(codes_per_level) != model.space.codes_per_level:
            raise InputError(
                f"the model does not fit the trie: it has ID levels {list(model.space.codes_per_level)}, the trie "
                f"{list(codes_per_level)}; take model and trie from one release"
            )
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise InputError(
                f"the causal model has layers of {sorted(kinds)}, expected full_attention only; choose another"
            )
        self.model, self.codes_per_level = model, model.space.codes_per_level

    @property
    def vocabulary(self) -> int:
        return len(self.model.shared.weight)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _run(self, ids_BM: Tensor, seen_B1MS: Tensor, position_BM: Tensor, layers) -> tuple[Tensor, list]:
        """States B×M×D of new tokens, and all keys and values with theirs."""
        from transformers import DynamicCache  # slow to import, and a T5's search does without

        was_training = self.model.training
        self.model.eval()
        try:
            output = self.model.model.base_model(
                input_ids=ids_BM,
                attention_mask=additive(seen_B1MS, self.model.shared.weight.dtype),
                position_ids=position_BM,
                past_key_values=DynamicCache(layers) if layers else DynamicCache(),
                use_cache=True,
            )
        finally:
            self.model.train(was_training)
        return output.last_hidden_state, [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    def encode(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> CausalMemory:
        ids_BT, real_BT = right_aligned(input_ids_BT, attention_mask_BT.bool())
        hidden_BTD, layers = self._run(ids_BT, causal(real_BT), positions(real_BT), None)
        return CausalMemory(layers, real_BT, hidden_BTD[:, -1:])

    def decode_step(self, level: int, memory: CausalMemory, cache: CausalCache | None, parent_BM, code_BM):
        if level == 0:
            return memory.hidden_B1D, CausalCache(memory.layers, [], [])
        beams = code_BM.shape[1]
        ancestor_BM = []
        if cache.beams:
            ancestor_BM = [past_BM.gather(1, parent_BM) for past_BM in cache.ancestor_BM] + [parent_BM]
        seen = [memory.real_BT[:, None, :].expand(-1, beams, -1)]
        for past, ancestor in zip(cache.beams, ancestor_BM):
            seen.append(ancestor[..., None] == torch.arange(past, device=self.device))
        seen.append(torch.eye(beams, dtype=torch.bool, device=self.device).expand(len(code_BM), -1, -1))
        position_BM = (memory.real_BT.sum(1, keepdim=True) + level - 1).expand(-1, beams)
        ids_BM = code_BM + self.model.first_L[level - 1]
        hidden_BMD, layers = self._run(ids_BM, torch.cat(seen, 2)[:, None], position_BM, cache.layers)
        return hidden_BMD, CausalCache(layers, [*cache.beams, beams], ancestor_BM)

    def level_logits(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        return self.model.scores(level, hidden_BMD)

    def log_partition(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        return self.model.lm_head(hidden_BMD).float().logsumexp(-1)
