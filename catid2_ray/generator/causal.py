"""A causal language model that reads a query and goes on with ID tokens (CQ-SID, 2605.14434, uses Qwen2.5-0.5B).

The prompt is the query's tokens; the ID tokens are the last ΣK vocabulary rows, tied or not. Prompts are moved to the
right end of their row whatever side they were padded on, positions count real tokens only, and padding is masked.

B batch, T tokens, L levels, D width, K codes, S keys, Q queries of the attention.
"""

import torch
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.logits import first_rows, level_scores
from catid2_ray.generator.states import TokenStates
from catid2_ray.generator.vocabulary import pad_of

# Settings under which a score is more than a state times a row.
_BENDING = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class CausalGenerator(nn.Module):
    """`model`: an AutoModelForCausalLM with position ids whose last ΣK rows are the ID tokens and whose config names the
    padding token. Raises RecipeError when it bends its scores, lacks a padding token, or cannot hold the IDs."""

    def __init__(self, model: nn.Module, space: DocidSpace):
        super().__init__()
        self.model, self.space, self.config = model, space, model.config
        bent = [name for name in _BENDING if getattr(self.config, name, None) not in (None, 1, 1.0)]
        if bent:
            raise RecipeError(
                f"a {self.config.model_type!r} model sets {', '.join(bent)}, which the search does not apply; choose a model "
                "without"
            )
        if getattr(self.config, "pad_token_id", None) is None:
            raise RecipeError("the causal model's config names no pad_token_id; set it to the tokenizer's")
        self.first_L = first_rows(len(self.lm_head.weight), space)

    @property
    def shared(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def scores(self, level: int, hidden_D: Tensor) -> Tensor:
        """…×K_level from states …×D."""
        first, k = self.first_L[level], self.space.codes_per_level[level]
        return level_scores([hidden_D], self.lm_head.weight, self.bias_V, [first], DocidSpace((k,)))[0]

    @property
    def bias_V(self) -> Tensor | None:
        return getattr(self.lm_head, "bias", None)

    def docid_logits(self, inputs: Tensor, codes_BL: Tensor) -> list[Tensor]:
        """Per level B×K_l; `inputs` token ids B×T padded on either side. (See `logits.docid_logits`.)"""
        if isinstance(inputs, TokenStates):
            raise InputError("a causal model reads token ids; cached states are an encoder's")
        prompt_BT, real_BT = right_aligned(inputs, inputs != pad_of(self))
        offset_L = torch.tensor(self.first_L[:-1], device=codes_BL.device)
        ids_BS = torch.cat((prompt_BT, codes_BL[:, :-1] + offset_L), 1)
        real_BS = torch.cat((real_BT, torch.ones_like(codes_BL[:, :-1], dtype=torch.bool)), 1)
        hidden_BSD = self.model.base_model(
            input_ids=ids_BS,
            attention_mask=additive(causal(real_BS), self.shared.weight.dtype),
            position_ids=positions(real_BS),
            use_cache=False,
        ).last_hidden_state
        hidden_LBD = hidden_BSD[:, -self.space.levels :].unbind(1)
        return [self.scores(level, hidden_BD) for level, hidden_BD in enumerate(hidden_LBD)]


def right_aligned(input_ids_BT: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens in the same order, with all padding on the left: ids and which are real."""
    order_BT = real_BT.to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids_BT.gather(1, order_BT), real_BT.gather(1, order_BT)


def positions(real_BS: Tensor) -> Tensor:
    """int64 B×S: how many real tokens stand before each."""
    return (real_BS.long().cumsum(1) - 1).clamp(min=0)


def causal(real_BS: Tensor) -> Tensor:
    """bool B×1×Q×S: real tokens up to one's own; padding sees itself, so that no row is empty."""
    size = real_BS.shape[1]
    lower_QS = torch.ones(size, size, dtype=torch.bool, device=real_BS.device).tril()
    itself_QS = torch.eye(size, dtype=torch.bool, device=real_BS.device)
    return ((lower_QS & real_BS[:, None, :]) | itself_QS)[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, the type's lowest number elsewhere: the form that every attention takes."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
