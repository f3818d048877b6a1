"""One T5 decoder step for many beams, laid out for beam search; reads the weights of a plain T5 and copies none.

Beams are query positions of the cross-attention, so its keys and values exist once per query however wide the beam;
the self-attention cache holds at most L positions and never moves: an index says where each beam's past lies.

B batch, M beams, T query tokens, P positions so far, H heads, E width of a head, D width, K codes, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.int8 import int8_copy


class T5Memory(NamedTuple):
    """Per decoder layer the cross-attention's keys and values B×H×T×E; which tokens are real, B×1×1×T; the queries' dense
    vectors, where the encoder gives them in the same pass (`EncoderDecoder`), and as the head reads them."""

    keys: list[Tensor]
    values: list[Tensor]
    real_B11T: Tensor
    dense_BE: Tensor | None = None
    near_BE: Tensor | None = None


class T5Cache(NamedTuple):
    """Per decoder layer and position the keys and values B×M'×H×E as that step's M' beams computed them; per position
    but the last, in which of its rows (0 … B·M'−1) each beam's ancestor lies. Beams that change places move no keys:
    the index alone is re-ordered, and rows are gathered as they are read."""

    keys: list[list[Tensor]]
    values: list[list[Tensor]]
    ancestor_BM: list[Tensor]


class T5Decoder:
    """`Decoder` over a `T5ForConditionalGeneration` or an `EncoderDecoder` whose last ΣK vocabulary rows are the ID tokens,
    level by level, with any head (`generator.logits`).

    Any size, tied or untied head, float32 or half precision. `weights`: "float32" reads the model's own weights,
    whatever their type; "int8" copies the matrices of encoder and decoder in 8 bits now, for CPUs only (`int8.py`).
    Raises InputError when the model cannot hold the IDs, or cannot be made int8.
    """

    def __init__(self, model, *, codes_per_level: Sequence[int], weights: str = "float32"):
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
        if weights not in ("float32", "int8"):
            raise InputError(f"weights must be 'float32' or 'int8', found {weights!r}")
        self.model, self.config, self.codes_per_level, self.weights = model, model.config, codes_per_level, weights
        parts = model.encoder, model.decoder.block
        self.encoder, self.blocks = parts if weights == "float32" else map(int8_copy, parts)
        self.head, self.experts = getattr(model, "pawa", None), getattr(model, "experts", None)
        self.near = getattr(model, "dense", None)
        self.first = [rows - sum(codes_per_level[level:]) for level in range(len(codes_per_level))]
        self.scale = self.config.d_model**-0.5 if _scales_output(self.config) else 1.0
        attention = model.decoder.block[0].layer[0].SelfAttention
        with torch.no_grad():
            self.bias_1HPP = attention.compute_bias(len(codes_per_level), len(codes_per_level))

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def reader(self):
        """The head that reads the query's vector, if any."""
        return self.near if self.experts is None else self.experts

    @property
    def vocabulary(self) -> int:
        # A text encoder of another kind brings a table of its own.
        words = getattr(self.encoder, "vocabulary", None)
        return self.model.shared.weight.shape[0] if words is None else words

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.config.num_heads, self.config.d_kv))

    def _norm(self, module, hidden: Tensor) -> Tensor:
        # One read for the length, one pass for the scaling; F.rms_norm takes four passes on a CPU.
        square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(hidden.shape[-1]).add_(self.config.layer_norm_epsilon).rsqrt_()
        return (hidden * scale).to(module.weight.dtype).mul_(module.weight)

    def encode(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> T5Memory:
        was_training = self.encoder.training
        self.encoder.eval()
        try:
            encoded = self.encoder(input_ids=input_ids_BT, attention_mask=attention_mask_BT)
        finally:
            self.encoder.train(was_training)
        states_BTD = encoded.last_hidden_state
        cross = [block.layer[1].EncDecAttention for block in self.blocks]
        dense_BE = getattr(encoded, "dense_BE", None)
        return T5Memory(
            [self._heads(attention.k(states_BTD)).transpose(1, 2) for attention in cross],
            [self._heads(attention.v(states_BTD)).transpose(1, 2) for attention in cross],
            attention_mask_BT.bool()[:, None, None, :],
            dense_BE,
            None if self.reader is None else self.reader.query(dense_BE),
        )

    def decode_step(self, level, memory: T5Memory, cache: T5Cache | None, parent_BM: Tensor, code_BM: Tensor):
        if level:
            token_BM = code_BM + self.first[level - 1]
            ancestor_BM = _ancestors(cache, parent_BM)
        else:
            token_BM = torch.full_like(code_BM, getattr(self.config, "decoder_start_token_id", None) or 0)
            ancestor_BM = []
        hidden_BMD = self.model.shared(token_BM)
        bias_HP = self.bias_1HPP[0, :, level, : level + 1]
        grown = T5Cache([], [], ancestor_BM)
        for number, block in enumerate(self.blocks):
            past = ([], []) if cache is None else (cache.keys[number], cache.values[number])
            mixed_BMD, keys, values = self._self_attention(block.layer[0], hidden_BMD, past, ancestor_BM, bias_HP)
            grown.keys.append(keys)
            grown.values.append(values)
            hidden_BMD = hidden_BMD + mixed_BMD
            hidden_BMD += self._cross_attention(block.layer[1], hidden_BMD, memory, number)
            hidden_BMD += self._feed_forward(block.layer[2], hidden_BMD)
        hidden_BMD = self._norm(self.model.decoder.final_layer_norm, hidden_BMD) * self.scale
        if self.reader is not None:  # the query goes along with each state: the scores of codes read both
            query_BME = memory.near_BE[:, None].expand(-1, hidden_BMD.shape[1], -1)
            state_BMD = hidden_BMD if self.near is None else self.near.mix(hidden_BMD)
            hidden_BMD = torch.cat((state_BMD, query_BME.to(hidden_BMD.dtype)), -1)
        return hidden_BMD, grown

    def _self_attention(self, layer, hidden_BMD: Tensor, past, ancestor_BM: list[Tensor], bias_HP: Tensor):
        """At most L positions: element by element, position by position, is cheaper than many tiny products."""
        attention, normed_BMD = layer.SelfAttention, self._norm(layer.layer_norm, hidden_BMD)
        keys = [*past[0], self._heads(attention.k(normed_BMD))]
        values = [*past[1], self._heads(attention.v(normed_BMD))]
        if not ancestor_BM:
            return attention.o(values[0].flatten(2)), keys, values
        query_BMHE = self._heads(attention.q(normed_BMD))
        score_BMHP = torch.stack([(query_BMHE * key).sum(-1) for key in _gathered(keys, ancestor_BM)], -1) + bias_HP
        weight_BMHP = score_BMHP.float().softmax(-1).to(query_BMHE.dtype)
        mixed_BMHE = torch.zeros_like(query_BMHE)
        for position, value in enumerate(_gathered(values, ancestor_BM)):
            mixed_BMHE.addcmul_(weight_BMHP[..., position, None], value)
        return attention.o(mixed_BMHE.flatten(2)), keys, values

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
            inner = dense.act(dense.wi_0(normed_BMD)).mul_(dense.wi_1(normed_BMD))
        else:
            inner = dense.wi(normed_BMD)
            inner = inner.relu_() if isinstance(dense.act, torch.nn.ReLU) else dense.act(inner)
        weight = dense.wo.weight
        return dense.wo(inner if weight is None else inner.to(weight.dtype)).to(hidden_BMD.dtype)

    def _adapted(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        if self.head is None:
            return hidden_BMD
        return self.head(level, hidden_BMD, prefix_BML, self.model.shared.weight, self.first)

    def level_logits(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        first, table_VD = self.first[level], self.model.lm_head.weight
        row_KD = table_VD[first : first + self.codes_per_level[level]]
        if self.reader is None:
            return F.linear(self._adapted(level, hidden_BMD, prefix_BML), row_KD)
        state_BMD, query_BME = hidden_BMD.split((table_VD.shape[1], hidden_BMD.shape[-1] - table_VD.shape[1]), -1)
        query_B1E = query_BME[:, :1]  # all beams of a query have its vector
        if self.experts is not None:
            return self.experts.joined(F.linear(state_BMD, row_KD), self.experts.scores(level, query_B1E, prefix_BML))
        return F.linear(state_BMD, row_KD) + self.near.scores(level, query_B1E)

    def log_partition(self, level: int, hidden_BMD: Tensor, prefix_BML: Tensor) -> Tensor:
        if self.reader is not None:
            raise InputError(
                f"head {self.config.docid_head} scores the codes of a level, not the vocabulary: search with normalize='level'"
            )
        return self.model.lm_head(self._adapted(level, hidden_BMD, prefix_BML)).float().logsumexp(-1)


def _ancestors(cache: T5Cache, parent_BM: Tensor) -> list[Tensor]:
    """Per past position the row in which each new beam's ancestor lies."""
    batch, before = cache.keys[0][-1].shape[:2]
    row_BM = parent_BM + torch.arange(batch, device=parent_BM.device)[:, None] * before
    return [ancestor_BM.flatten()[row_BM] for ancestor_BM in cache.ancestor_BM] + [row_BM]


def _gathered(cached: list[Tensor], ancestor_BM: list[Tensor]):
    """Of each position the B×M×H×E keys or values of the beams' ancestors; B×1×H×E where a query has one for all."""
    for rows, ancestor in zip(cached, ancestor_BM):
        gathers = rows.shape[1] > 1
        yield rows.flatten(0, 1).index_select(0, ancestor.flatten()).unflatten(0, ancestor.shape) if gathers else rows
    yield cached[-1]


def _scales_output(config) -> bool:
    """The first T5 scales its last state by D^-1/2, v1.1 does not; newer configs name it, older ones imply it."""
    return getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
