"""PAWA: output rows that depend on the prefix, so that one code's score may mean different things in different branches.

NCI (Wang et al. 2022, 2206.02743, section 3.3) multiplies a state with W_ada(prefix) = Adaptor(query, prefix) W, the
adaptor a decoder of 4 layers. Here W_ada(prefix) = W (I + U diag(g(prefix)) V) of rank R: the gates g come from a
two-layer network over the sum of the prefix's own ID rows (rows differ between levels, so the sum says the prefix) and
the level; what the query adds is in the state already. It costs 2·R·D and a small network per beam, and no cache.
At first U is 0 and the head is the plain one.

B batch, D width, R rank, L levels, l codes of the prefix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from catid2_ray.errors import RecipeError

KINDS = ("plain", "pawa")


class PawaHead(nn.Module):
    """h + U(g(prefix) ⊙ V h): the adapted weights, moved to the state's side of the product."""

    def __init__(self, *, width: int, levels: int, rank: int):
        super().__init__()
        self.level_embed = nn.Embedding(levels, width)
        self.norm = T5LayerNorm(width)
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
    if kind not in KINDS:
        raise RecipeError(f"head must be one of {', '.join(KINDS)}, found {kind!r}")
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
