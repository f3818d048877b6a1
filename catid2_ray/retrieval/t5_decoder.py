"""One T5 decoder step for many beams, laid out for beam search; reads the weights of a plain T5 and copies none.

Beams are query positions of the cross-attention, so its keys and values exist once per query however wide the beam;
the self-attention cache holds at most L positions, all layers in one tensor, re-ordered by one index per step.

B batch, M beams, T query tokens, P positions so far, H heads, E width of a head, D width, K codes, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from catid2_ray.errors import InputError


class Decoder(Protocol):
    """What the search needs from a model. `memory` and `cache` are opaque to it."""

    device: torch.device

    def encode(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> object:
        """Whatever the steps need to know about the queries."""

    def decode_step(self, level: int, memory, cache, parent_BM: Tensor, code_BM: Tensor) -> tuple[Tensor, object]:
        """hidden_BMD and the new cache. At level 0 M is 1, `cache` None; later `code_BM` is the code just chosen and
        `parent_BM` the beam of the step before that it extends."""

    def level_logits(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        """B×M×K_level scores of the next code."""

    def log_partition(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        """B×M, the log of the sum over the whole vocabulary, on the scale of `level_logits`."""


class T5Memory(NamedTuple):
    """Per decoder layer the cross-attention's keys and values B×H×T×E; which tokens are real, B×1×1×T."""

    keys: list[Tensor]
    values: list[Tensor]
    real_B11T: Tensor


class T5Decoder:
    """`Decoder` over a `T5ForConditionalGeneration` whose last ΣK vocabulary rows are the ID tokens, level by level.

    Any size, tied or untied head, float32 or half precision. Raises InputError when the model cannot hold the IDs.
    """

    def __init__(self, model, *, codes_per_level: Sequence[int]):
        codes_per_level = tuple(int(k) for k in codes_per_level)
        rows = model.lm_head.weight.shape[0]
        carried = getattr(model.config, "docid_codes_per_level", None)
        if rows <= sum(codes_per_level) or (carried is not None and tuple(carried) != codes_per_level):
            raise InputError(
                f"the model does not fit the trie: it has {rows} vocabulary rows"
                + (f" and ID levels {list(carried)}" if carried is not None else "")
                + f", the trie's IDs {list(codes_per_level)} need {sum(codes_per_level)} of them beside the words; "
                "take model and trie from one release"
            )
        self.model, self.config, self.codes_per_level = model, model.config, codes_per_level
        self.layers = [block.layer for block in model.decoder.block]
        self.first = [rows - sum(codes_per_level[level:]) for level in range(len(codes_per_level))]
        self.scale = self.config.d_model**-0.5 if _scales_output(self.config) else 1.0
        attention = self.layers[0][0].SelfAttention
        with torch.no_grad():
            self.bias_1HPP = attention.compute_bias(len(codes_per_level), len(codes_per_level))

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.config.num_heads, self.config.d_kv))

    def _norm(self, module, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, (hidden.shape[-1],), None, self.config.layer_norm_epsilon)
        return normed.to(module.weight.dtype) * module.weight

    def encode(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> T5Memory:
        was_training = self.model.training
        self.model.eval()
        try:
            states_BTD = self.model.encoder(input_ids=input_ids_BT, attention_mask=attention_mask_BT).last_hidden_state
        finally:
            self.model.train(was_training)
        cross = [layer[1].EncDecAttention for layer in self.layers]
        return T5Memory(
            [self._heads(attention.k(states_BTD)).transpose(1, 2) for attention in cross],
            [self._heads(attention.v(states_BTD)).transpose(1, 2) for attention in cross],
            attention_mask_BT.bool()[:, None, None, :],
        )

    def decode_step(self, level, memory: T5Memory, cache: Tensor | None, parent_BM: Tensor, code_BM: Tensor):
        batch, beams = code_BM.shape
        if level:
            token_BM = code_BM + self.first[level - 1]
        else:
            token_BM = torch.full_like(code_BM, getattr(self.config, "decoder_start_token_id", None) or 0)
        hidden_BMD = self.model.shared(token_BM)
        attention = self.layers[0][0].SelfAttention
        shape = (batch * beams, level + 1, len(self.layers), 2, attention.n_heads, attention.key_value_proj_dim)
        grown = torch.empty(shape, dtype=attention.k.weight.dtype, device=code_BM.device)
        if level:
            row_BM = parent_BM + torch.arange(batch, device=parent_BM.device)[:, None] * (len(cache) // batch)
            grown[:, :level] = cache[row_BM.flatten()]
        bias_PH1 = self.bias_1HPP[0, :, level, : level + 1].T[..., None]
        for number, layer in enumerate(self.layers):
            hidden_BMD = hidden_BMD + self._self_attention(layer[0], hidden_BMD, grown[:, :, number], bias_PH1)
            hidden_BMD = hidden_BMD + self._cross_attention(layer[1], hidden_BMD, memory, number)
            hidden_BMD = hidden_BMD + self._feed_forward(layer[2], hidden_BMD)
        hidden_BMD = self._norm(self.model.decoder.final_layer_norm, hidden_BMD)
        return hidden_BMD * self.scale, grown

    def _self_attention(self, layer, hidden_BMD: Tensor, past_RP2HE: Tensor, bias_PH1: Tensor) -> Tensor:
        """Adds this position's key and value to the cache, then attends; at most L positions, so no matrix product."""
        attention, normed_BMD = layer.SelfAttention, self._norm(layer.layer_norm, hidden_BMD)
        past_RP2HE[:, -1, 0] = self._heads(attention.k(normed_BMD)).flatten(0, 1)
        past_RP2HE[:, -1, 1] = self._heads(attention.v(normed_BMD)).flatten(0, 1)
        query_R1HE = self._heads(attention.q(normed_BMD)).flatten(0, 1)[:, None]
        score_RPH1 = (query_R1HE * past_RP2HE[:, :, 0]).sum(-1, keepdim=True) + bias_PH1
        mixed_RHE = (score_RPH1.float().softmax(1).to(query_R1HE.dtype) * past_RP2HE[:, :, 1]).sum(1)
        return attention.o(mixed_RHE.flatten(1)).view_as(hidden_BMD)

    def _cross_attention(self, layer, hidden_BMD: Tensor, memory: T5Memory, number: int) -> Tensor:
        attention = layer.EncDecAttention
        query_BHME = self._heads(attention.q(self._norm(layer.layer_norm, hidden_BMD))).transpose(1, 2)
        # T5 does not divide by √E: its initialisation takes that up.
        mixed_BHME = F.scaled_dot_product_attention(
            query_BHME, memory.keys[number], memory.values[number], attn_mask=memory.real_B11T, scale=1.0
        )
        return attention.o(mixed_BHME.transpose(1, 2).flatten(2))

    def _feed_forward(self, layer, hidden_BMD: Tensor) -> Tensor:
        dense, normed_BMD = layer.DenseReluDense, self._norm(layer.layer_norm, hidden_BMD)
        if self.config.is_gated_act:
            inner = dense.act(dense.wi_0(normed_BMD)) * dense.wi_1(normed_BMD)
        else:
            inner = dense.act(dense.wi(normed_BMD))
        return dense.wo(inner.to(dense.wo.weight.dtype))

    def level_logits(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        first = self.first[level]
        return F.linear(hidden_BMD, self.model.lm_head.weight[first : first + self.codes_per_level[level]])

    def log_partition(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        return self.model.lm_head(hidden_BMD).float().logsumexp(-1)


def _scales_output(config) -> bool:
    """The first T5 scales its last state by D^-1/2, v1.1 does not; newer configs name it, older ones imply it."""
    return getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
