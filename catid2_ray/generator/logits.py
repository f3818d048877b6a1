"""Scores of every next code of given IDs in one pass (teacher forcing), for each kind of generator.

Only the rows of a level's K codes are read, so a pass costs ΣK rows of the output table instead of all its rows.

B batch, T tokens, L levels, D width, K codes, V vocabulary, R rank, l codes of the prefix.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError
from catid2_ray.generator.plain_t5 import T5Norm
from catid2_ray.generator.states import TokenStates
from catid2_ray.generator.vocabulary import PAD, pad_of

HEADS = ("plain", "pawa")


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


def memory_of(model, inputs: Tensor | TokenStates) -> TokenStates:
    """What a T5's decoder attends to, B×T×D, and which of it is real."""
    if isinstance(inputs, TokenStates):
        return TokenStates(model.encoder.encoded(*inputs).last_hidden_state, inputs.mask_BT)
    mask_BT = inputs != pad_of(model)
    return TokenStates(model.encoder(input_ids=inputs, attention_mask=mask_BT).last_hidden_state, mask_BT)


def decoder_logits(model, memory: TokenStates, codes_BL: Tensor, *, space: DocidSpace) -> list[Tensor]:
    """`docid_logits` of a T5-like model from what its encoder said: L decoder positions, the start token and then the ID
    tokens but for the last. Padding has no influence."""
    config, first_L = model.config, first_rows(len(model.lm_head.weight), space)
    start = getattr(config, "decoder_start_token_id", None) or PAD
    previous_BL = F.pad(codes_BL[:, :-1] + torch.tensor(first_L[:-1], device=codes_BL.device), (1, 0), value=start)
    hidden_BLD = model.decoder(
        input_ids=previous_BL,
        encoder_hidden_states=memory.states_BTE,
        encoder_attention_mask=memory.mask_BT,
        use_cache=False,
    ).last_hidden_state
    # Some T5 scale the hidden state, some (v1.1) do not; the config records which, whether or not the head is tied.
    if getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        hidden_BLD = hidden_BLD * config.d_model**-0.5
    head, table_VD = getattr(model, "pawa", None), model.shared.weight
    hidden_LBD = list(hidden_BLD.unbind(1))
    if head is not None:
        hidden_LBD = [
            head(level, hidden_BD, codes_BL[:, :level], table_VD, first_L) for level, hidden_BD in enumerate(hidden_LBD)
        ]
    return level_scores(hidden_LBD, model.lm_head.weight, None, first_L, space)


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


def with_head(model: nn.Module, kind: str, *, rank: int = 64, seed: int = 0) -> nn.Module:
    """Give a T5 or an EncoderDecoder its head, in place, and return it; the config says so from then on.

    Raises RecipeError for an unknown head, or "pawa" on a model that is neither.
    """
    if kind not in HEADS:
        raise RecipeError(f"head must be one of {', '.join(HEADS)}, found {kind!r}")
    if kind == "plain":
        return model
    if not (hasattr(model, "decoder") and hasattr(model.config, "d_model")):
        raise RecipeError("head 'pawa' needs a T5 or a text encoder with our decoder; a causal model has head 'plain'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        levels = len(model.config.docid_codes_per_level)
        model.pawa = PawaHead(width=model.config.d_model, levels=levels, rank=rank).to(model.lm_head.weight.device)
    model.config.docid_head, model.config.docid_head_rank = kind, rank
    return model
