"""Scores of every next code of given IDs in one pass (teacher forcing), for each kind of generator.

Only the rows of a level's K codes are read, so a pass costs ΣK rows of the output table instead of all its rows.

B batch, T tokens, L levels, D width, E width of the text encoder, K codes, V vocabulary, R rank, l codes of the prefix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError
from catid2_ray.generator.plain_t5 import T5Norm
from catid2_ray.generator.states import TokenStates
from catid2_ray.generator.vocabulary import PAD, pad_of

HEADS = ("plain", "pawa", "dense", "experts")
READ_VECTORS = ("dense", "experts")  # heads that read the vector of the query, and codewords


def first_rows(rows: int, space: DocidSpace) -> list[int]:
    """The vocabulary row of each level's code 0: the ID tokens are the last of `rows`.

    Raises RecipeError when there are fewer rows than ID tokens.
    """
    first_L = [rows - sum(space.codes_per_level[level:]) for level in range(space.levels)]
    if first_L[0] < 0:
        raise RecipeError(
            f"IDs of {space.codes_per_level} do not fit a model of {rows} vocabulary rows; build the model and the codes "
            "with the same quantizer"
        )
    return first_L


def docid_logits(model, inputs: Tensor | TokenStates, codes_BL: Tensor, *, space: DocidSpace) -> list[Tensor]:
    """Per level B×K_l, the scores of each code after the ID's own codes before it.

    `model`: a T5, an EncoderDecoder, or any with a `docid_logits(inputs, codes)` of its own. `inputs`: token ids B×T
    padded as the model's config says (0 in T5), or an EncoderDecoder's cached states. Raises RecipeError when IDs and
    model do not fit.
    """
    if codes_BL.shape[-1] != space.levels:
        raise RecipeError(
            f"codes of shape {tuple(codes_BL.shape)} are no IDs of {space.levels} levels {space.codes_per_level}; build the "
            "model and the codes with the same quantizer"
        )
    if hasattr(model, "docid_logits"):
        return model.docid_logits(inputs, codes_BL)
    return decoder_logits(model, memory_of(model, inputs), codes_BL, space=space)


def taught_logits(model, inputs: Tensor | TokenStates, codes_BL: Tensor, *, space: DocidSpace) -> list[list[Tensor]]:
    """Each list of `docid_logits` that is taught by itself: one, or with head "experts" the decoder's and the perceptron's."""
    if getattr(model, "experts", None) is None:
        return [docid_logits(model, inputs, codes_BL, space=space)]
    return _of_experts(model, memory_of(model, inputs), codes_BL, space)


class Memory(NamedTuple):
    """What a T5's decoder attends to, which of it is real, and the queries' dense vectors where the encoder gives them."""

    states_BTD: Tensor
    mask_BT: Tensor
    dense_BE: Tensor | None

    def repeated(self, times: int) -> "Memory":
        """Each row `times` times."""
        return Memory(*(None if part is None else part.repeat_interleave(times, 0) for part in self))


def memory_of(model, inputs: Tensor | TokenStates) -> Memory:
    if isinstance(inputs, TokenStates):
        mask_BT, encoded = inputs.mask_BT, model.encoder.encoded(*inputs)
    else:
        mask_BT = inputs != pad_of(model)
        encoded = model.encoder(input_ids=inputs, attention_mask=mask_BT)
    return Memory(encoded.last_hidden_state, mask_BT, getattr(encoded, "dense_BE", None))


def decoder_logits(model, memory: Memory, codes_BL: Tensor, *, space: DocidSpace) -> list[Tensor]:
    """`docid_logits` of a T5-like model from what its encoder said: L decoder positions, the start token and then the ID
    tokens but for the last. Padding has no influence."""
    if (experts := getattr(model, "experts", None)) is not None:
        return [experts.joined(*scores) for scores in zip(*_of_experts(model, memory, codes_BL, space))]
    hidden_BLD, first_L = _hidden(model, memory, codes_BL, space)
    head, near, table_VD = getattr(model, "pawa", None), getattr(model, "dense", None), model.shared.weight
    if near is not None:
        scores = level_scores(near.mix(hidden_BLD).unbind(1), model.lm_head.weight, None, first_L, space)
        query_BE = near.query(memory.dense_BE)
        return [score_BK + near.scores(level, query_BE) for level, score_BK in enumerate(scores)]
    hidden_LBD = list(hidden_BLD.unbind(1))
    if head is not None:
        hidden_LBD = [
            head(level, hidden_BD, codes_BL[:, :level], table_VD, first_L) for level, hidden_BD in enumerate(hidden_LBD)
        ]
    return level_scores(hidden_LBD, model.lm_head.weight, None, first_L, space)


def _of_experts(model, memory: Memory, codes_BL: Tensor, space: DocidSpace) -> list[list[Tensor]]:
    """Per level B×K_l by the decoder, and by the perceptron over the query's vector."""
    hidden_BLD, first_L = _hidden(model, memory, codes_BL, space)
    query_BE = model.experts.query(memory.dense_BE)
    return [
        level_scores(hidden_BLD.unbind(1), model.lm_head.weight, None, first_L, space),
        [model.experts.scores(level, query_BE, codes_BL[:, :level]) for level in range(space.levels)],
    ]


def _hidden(model, memory: Memory, codes_BL: Tensor, space: DocidSpace) -> tuple[Tensor, list[int]]:
    """The decoder's states B×L×D before each code, and the vocabulary row of each level's code 0."""
    config, first_L = model.config, first_rows(len(model.lm_head.weight), space)
    start = getattr(config, "decoder_start_token_id", None) or PAD
    previous_BL = F.pad(codes_BL[:, :-1] + torch.tensor(first_L[:-1], device=codes_BL.device), (1, 0), value=start)
    hidden_BLD = model.decoder(
        input_ids=previous_BL,
        encoder_hidden_states=memory.states_BTD,
        encoder_attention_mask=memory.mask_BT,
        use_cache=False,
    ).last_hidden_state
    # Some T5 scale the hidden state, some (v1.1) do not; the config records which, whether or not the head is tied.
    if getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        hidden_BLD = hidden_BLD * config.d_model**-0.5
    return hidden_BLD, first_L


def level_scores(
    hidden_LBD: Sequence[Tensor], weight_VD: Tensor, bias_V: Tensor | None, first_L: Sequence[int], space: DocidSpace
) -> list[Tensor]:
    """Per level B×K_l: the state of that level times the rows of its codes."""
    return [
        F.linear(hidden_BD, weight_VD[first : first + k], None if bias_V is None else bias_V[first : first + k])
        for hidden_BD, first, k in zip(hidden_LBD, first_L, space.codes_per_level)
    ]


class PawaHead(nn.Module):
    """PAWA: output rows that depend on the prefix, so that one code's score may mean different things in different branches.

    NCI (Wang et al. 2022, 2206.02743, section 3.3) multiplies a state with W_ada(prefix) = Adaptor(query, prefix) W, the
    adaptor a decoder of 4 layers. Here W_ada(prefix) = W (I + U diag(g(prefix)) V) of rank R, moved to the state's side of the
    product: h + U(g(prefix) ⊙ V h). The gates g come from a two-layer network over the sum of the prefix's own ID rows (rows
    differ between levels, so the sum says the prefix) and the level; what the query adds is in the state already. It costs
    2·R·D and a small network per beam, and no cache. At first U is 0 and the head is the plain one.
    """

    def __init__(self, *, width: int, levels: int, rank: int):
        super().__init__()
        self.level_embed = nn.Embedding(levels, width)
        self.norm = T5Norm(width)
        self.inner, self.gates = nn.Linear(width, width), nn.Linear(width, rank)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(
        self, level: int, hidden_D: Tensor, prefix_l: Tensor, table_VD: Tensor, first_L: Sequence[int]
    ) -> Tensor:
        """…×D from states …×D and the codes before them …×l; `first_L`: the table's row of each level's code 0."""
        state_D = self.level_embed.weight[level].expand(*prefix_l.shape[:-1], -1)
        if prefix_l.shape[-1]:
            offset_l = torch.tensor(first_L[: prefix_l.shape[-1]], device=prefix_l.device)
            state_D = state_D + table_VD[prefix_l + offset_l].sum(-2)
        gates_R = self.gates(self.inner(self.norm(state_D)).relu())
        return hidden_D + self.up(gates_R * self.down(hidden_D))


class _OfVectors(nn.Module):
    """What heads that read the query's vector share: the quantizer's codewords e and the adapter's W, which stay as they are."""

    def __init__(self, *, dense: int, codes_per_level: Sequence[int]):
        super().__init__()
        self.register_buffer("query_EE", torch.eye(dense))
        for level, codes in enumerate(codes_per_level):
            self.register_buffer(f"codeword_{level}", torch.zeros(codes, dense))

    @torch.no_grad()
    def begin(self, codebooks: Sequence[np.ndarray | None], query_EE: np.ndarray | None) -> None:
        """Take over codewords, per level K×E or None, and W (None: the identity). Raises RecipeError where none has width E."""
        width, found = len(self.query_EE), [None if book is None else book.shape[1] for book in codebooks]
        if width not in found:
            raise RecipeError(
                f"heads dense and experts read codewords as wide as the text encoder's vectors ({width}), found widths {found}: "
                "set quantizer.encoder to residual and leave quantizer.latent out, or take head plain"
            )
        for level, book_KE in enumerate(codebooks):
            if book_KE is not None and book_KE.shape[1] == width:
                getattr(self, f"codeword_{level}").copy_(torch.as_tensor(book_KE))
        if query_EE is not None:
            self.query_EE.copy_(torch.as_tensor(query_EE))

    def query(self, dense_BE: Tensor) -> Tensor:
        """B×E, W q, rows of length 1."""
        return F.normalize(dense_BE.to(self.query_EE.dtype) @ self.query_EE.T, dim=-1)


class DenseHead(_OfVectors):
    """A head that begins as dense retrieval: the score of code c at level l is s_l ⟨W q, e_lc⟩ + (row of c) · M h.

    q: the query's vector as the text encoder makes it; W: the adapter's, or the identity, W q scaled to length 1; e_lc: the
    quantizer's codewords, zeros for a level without. W and e stay as they are. s_l begins at 20 and M at 0, so before the
    first step a code is worth 20 times the product of its codeword and the query. s, M, the rows and the decoder are learned.
    (Not of the CAT-ID² paper, whose head is the plain one. RIPOR, 2311.09134, begins from dense retrieval too, by training for it.)
    """

    def __init__(self, *, width: int, dense: int, codes_per_level: Sequence[int]):
        super().__init__(dense=dense, codes_per_level=codes_per_level)
        self.scale_L = nn.Parameter(torch.full((len(codes_per_level),), 20.0))
        self.mix = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.mix.weight)

    def scores(self, level: int, query_BE: Tensor) -> Tensor:
        """…×K_l, s_l ⟨W q, e⟩ of what `query` gave."""
        return self.scale_L[level] * (query_BE @ getattr(self, f"codeword_{level}").T)


class ExpertsHead(_OfVectors):
    """A second opinion beside the decoder: a perceptron from the query's vector and the codewords so far to the next code.

    Both are taught by themselves, each by its own cross-entropy, and scores are the geometric mean of what they say: log P =
    (1 − share) · log P_decoder + share · log P_perceptron + a constant, over the codes of a level (a product of experts, Hinton
    2002). The decoder reads words and learns pairs by heart; the perceptron, one hidden layer a level over W q and the sum of the
    prefix's codewords, sees the vector alone and finds what the decoder has not met. (Not of the CAT-ID² paper; its perceptron is
    that of `evaluation.proxy`.)
    """

    def __init__(self, *, dense: int, width: int, codes_per_level: Sequence[int], share: float):
        super().__init__(dense=dense, codes_per_level=codes_per_level)
        self.share = share
        self.of_query = nn.ModuleList(nn.Linear(dense, width) for _ in codes_per_level)
        self.of_prefix = nn.ModuleList(nn.Linear(dense, width, bias=False) for _ in codes_per_level[1:])
        self.to_codes = nn.ModuleList(nn.Linear(width, codes) for codes in codes_per_level)

    def scores(self, level: int, query_E: Tensor, prefix_l: Tensor) -> Tensor:
        """…×K_l of the perceptron alone, from what `query` gave, …×E, and the codes before, …×l, as broadcasts."""
        hidden_H = self.of_query[level](query_E)
        if level:
            books = (getattr(self, f"codeword_{above}") for above in range(level))
            sum_E = sum(F.embedding(code, book_KE) for code, book_KE in zip(prefix_l.unbind(-1), books))
            hidden_H = hidden_H + self.of_prefix[level - 1](sum_E)
        return self.to_codes[level](F.gelu(hidden_H))

    def joined(self, decoder_K: Tensor, perceptron_K: Tensor) -> Tensor:
        """float32 …×K, the scores of both."""
        both = (scores_K.float().log_softmax(-1) for scores_K in (decoder_K, perceptron_K))
        return torch.lerp(*both, self.share)


def with_head(
    model: nn.Module, kind: str, *, rank: int = 64, width: int = 256, share: float = 0.5, seed: int = 0
) -> nn.Module:
    """Give a T5 or an EncoderDecoder its head, in place, and return it; the config says so from then on.

    `rank`: of "pawa"; `width` and `share`: of the perceptron of "experts". Heads "dense" and "experts" have no codewords yet: see
    their `begin`. Raises RecipeError for an unknown head, "pawa" on a model that is neither, and "dense" or "experts" on one that
    is no EncoderDecoder.
    """
    if kind not in HEADS:
        raise RecipeError(f"head must be one of {', '.join(HEADS)}, found {kind!r}")
    if kind == "plain":
        return model
    if kind in READ_VECTORS:
        if not hasattr(model, "encoder") or not hasattr(model.encoder, "text"):
            raise RecipeError(f"head {kind!r} needs a text encoder with our decoder (model encoder_decoder)")
        sizes = {"dense": model.encoder.text.config.hidden_size, "codes_per_level": model.config.docid_codes_per_level}
        model.config.docid_head = kind
        if kind == "dense":
            model.dense = DenseHead(width=model.config.d_model, **sizes).to(model.lm_head.weight)
            return model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.experts = ExpertsHead(width=width, share=share, **sizes).to(model.lm_head.weight)
        model.config.docid_head_width, model.config.docid_head_share = width, share
        return model
    if not (hasattr(model, "decoder") and hasattr(model.config, "d_model")):
        raise RecipeError("head 'pawa' needs a T5 or a text encoder with our decoder; a causal model has head 'plain'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        levels = len(model.config.docid_codes_per_level)
        model.pawa = PawaHead(width=model.config.d_model, levels=levels, rank=rank).to(model.lm_head.weight.device)
    model.config.docid_head, model.config.docid_head_rank = kind, rank
    return model
