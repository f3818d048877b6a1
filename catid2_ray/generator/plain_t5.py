"""The inference half of a T5 as plain torch modules, which read what `save_pretrained` wrote; and its tokenizer.

Importing transformers' T5 takes 1.7 seconds of processor time and its tokenizers half a second, more than a search does: what only
searches reads its generator here. Modules bear transformers' names, so that the weights fit as they are. The encoder runs; of
the decoder only the weights are here, which `retrieval.t5_decoder` reads.

B batch, T tokens, D width, H heads, E width of a head, P positions.
"""

import json
import math
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
_ACTIVATIONS = {
    "relu": (False, nn.ReLU), "gelu": (False, nn.GELU),
    "gated-gelu": (True, lambda: nn.GELU("tanh")), "gated-silu": (True, nn.SiLU),
}  # fmt: skip


class _Linear(nn.Linear):
    """Its numbers come from a file. (A meta device would spare them too, and import torch's compiler, which takes a second.)"""

    def __init__(self, inner: int, outer: int):
        super().__init__(inner, outer, bias=False)

    def reset_parameters(self) -> None:
        pass


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class T5Norm(nn.Module):
    """x / √(mean x² + ε) · w, the mean in float32 (Zhang & Sennrich 2019, 1910.07467); to the bit transformers' T5LayerNorm."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        square = hidden.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(square + self.variance_epsilon)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight * (hidden.to(self.weight.dtype) if half else hidden)


class Encoded(NamedTuple):
    last_hidden_state: Tensor


class _Attention(nn.Module):
    def __init__(self, config: SimpleNamespace, *, biased: bool, both_ways: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (_Linear(config.d_model, inner) for _ in range(3))
        self.o, self.config, self.both_ways = _Linear(inner, config.d_model), config, both_ways
        if biased:
            self.relative_attention_bias = _Embedding(config.relative_attention_num_buckets, config.num_heads)

    def compute_bias(self, queries: int, keys: int) -> Tensor:
        """1×H×queries×keys: what is added to the scores for the distance of two positions (T5, 1910.10683, section 2.1)."""
        device = self.relative_attention_bias.weight.device
        distance_PP = torch.arange(keys, device=device)[None] - torch.arange(queries, device=device)[:, None]
        buckets = self.config.relative_attention_num_buckets
        first_PP = torch.zeros_like(distance_PP)
        if self.both_ways:
            buckets //= 2
            first_PP, distance_PP = (distance_PP > 0).long() * buckets, distance_PP.abs()
        else:
            distance_PP = (-distance_PP).clamp(min=0)
        exact = buckets // 2  # buckets of one distance each; the others grow with its logarithm
        share_PP = torch.log(distance_PP.float() / exact) / math.log(
            self.config.relative_attention_max_distance / exact
        )
        far_PP = (exact + (share_PP * (buckets - exact)).clamp(min=0).long()).clamp(max=buckets - 1)
        place_PP = first_PP + torch.where(distance_PP < exact, distance_PP, far_PP)
        return self.relative_attention_bias(place_PP).permute(2, 0, 1)[None]

    def forward(self, hidden_BTD: Tensor, bias_BHTT: Tensor) -> Tensor:
        heads = (self.config.num_heads, self.config.d_kv)
        query, key, value = (part(hidden_BTD).unflatten(-1, heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        # T5 does not divide by √E: its initialisation takes that up.
        mixed_BHTE = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_BHTT, scale=1.0)
        return self.o(mixed_BHTE.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.gated, act = _ACTIVATIONS[config.feed_forward_proj]
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, _Linear(config.d_model, config.d_ff))
        self.wo, self.act = _Linear(config.d_ff, config.d_model), act()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.wo(self.act(self.wi_0(hidden)) * self.wi_1(hidden) if self.gated else self.act(self.wi(hidden)))


class _Layer(nn.Module):
    """A part of a block, under the name that it bears in the weights, and the norm before it."""

    def __init__(self, config: SimpleNamespace, name: str, part: nn.Module):
        super().__init__()
        setattr(self, name, part)
        self.layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)


class _Block(nn.Module):
    def __init__(self, config: SimpleNamespace, *, first: bool, decodes: bool):
        super().__init__()
        attends = _Attention(config, biased=first, both_ways=not decodes)
        layers = [_Layer(config, "SelfAttention", attends)]
        if decodes:
            reads = _Attention(config, biased=False, both_ways=True)
            layers.append(_Layer(config, "EncDecAttention", reads))
        self.layer = nn.ModuleList([*layers, _Layer(config, "DenseReluDense", _FeedForward(config))])


class _Stack(nn.Module):
    def __init__(self, config: SimpleNamespace, blocks: int, *, decodes: bool):
        super().__init__()
        self.embed_tokens = _Embedding(config.vocab_size, config.d_model)
        self.block = nn.ModuleList(_Block(config, first=not number, decodes=decodes) for number in range(blocks))
        self.final_layer_norm = T5Norm(config.d_model, config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """The encoder: B×T×D. Padding has no influence on what is real."""
        hidden_BTD, length = self.embed_tokens(input_ids), input_ids.shape[1]
        bias_BHTT = self.block[0].layer[0].SelfAttention.compute_bias(length, length)
        hides_B11T = ~attention_mask.bool()[:, None, None, :]
        bias_BHTT = bias_BHTT.masked_fill(hides_B11T, torch.finfo(bias_BHTT.dtype).min)
        for block in self.block:
            attends, feeds = block.layer
            hidden_BTD = hidden_BTD + attends.SelfAttention(attends.layer_norm(hidden_BTD), bias_BHTT)
            hidden_BTD = hidden_BTD + feeds.DenseReluDense(feeds.layer_norm(hidden_BTD))
        return Encoded(self.final_layer_norm(hidden_BTD))


class PlainT5(nn.Module):
    """`config`: the values of config.json as attributes."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config, self.shared = config, _Embedding(config.vocab_size, config.d_model)
        config.is_gated_act = _ACTIVATIONS[config.feed_forward_proj][0]
        self.encoder = _Stack(config, config.num_layers, decodes=False)
        self.decoder = _Stack(config, config.num_decoder_layers or config.num_layers, decodes=True)
        self.lm_head = _Linear(config.d_model, config.vocab_size)


def is_plain_t5(folder: Path) -> bool:
    """Whether `read_plain_t5` reads the generator in that folder: a T5 in one file with a tokenizer of the Rust library."""
    if not all(
        (folder / name).exists() for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
    ):
        return False
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("model_type") in ("t5", "mt5") and config.get("feed_forward_proj", "relu") in _ACTIVATIONS


def read_plain_t5(folder: Path) -> PlainT5:
    """In float32 and evaluation mode, on CPU. Raises RuntimeError where weights are missing or of another shape."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    defaults = {"num_decoder_layers": None, "feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6, "tie_word_embeddings": True,
                "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}  # fmt: skip
    weights = {name: weight.float() for name, weight in load_file(folder / WEIGHTS).items()}
    # A table that the file leaves out is the shared one.
    words = weights.setdefault("shared.weight", weights.get("encoder.embed_tokens.weight"))
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        weights.setdefault(f"{name}.weight", words)
    model = PlainT5(SimpleNamespace(**defaults | values))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


class PlainTokenizer:
    """The tokenizer of a folder, without transformers. `pad_token_id`: its padding token."""

    def __init__(self, folder: Path):
        self._tokenizer, self._length = Tokenizer.from_file(str(folder / "tokenizer.json")), None
        self._tokenizer.encode_special_tokens = True  # ID tokens or </s> written out in a text are plain characters
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
        self._pad = named if isinstance(named, str) else named["content"]
        self.pad_token_id = self._tokenizer.token_to_id(self._pad)

    def padded(self, texts: list[str], length: int) -> list[list[int]]:
        """`length` token ids a text, cut or filled up at its end."""
        if length != self._length:
            self._tokenizer.enable_truncation(length)
            self._tokenizer.enable_padding(length=length, pad_id=self.pad_token_id, pad_token=self._pad)
            self._length = length
        return [encoded.ids for encoded in self._tokenizer.encode_batch(texts)]

    def ids(self, text: str, *, marks: bool = True) -> list[int]:
        """All token ids of a text, with its `</s>` unless without `marks`."""
        return self._free.encode(text, add_special_tokens=marks).ids

    @cached_property
    def _free(self) -> Tokenizer:
        """One that neither cuts nor pads: `padded` may run meanwhile."""
        free = Tokenizer.from_str(self._tokenizer.to_str())
        free.no_truncation()
        free.no_padding()
        free.encode_special_tokens = True
        return free

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)
