"""Several distinct, valid IDs per query for alignment: the best of the constrained beam, or a draw without replacement.

The draw is stochastic beam search (Kool et al., arXiv 1903.06059): Gumbel noise on log-probabilities, carried top-down
through the trie so that the best G perturbed IDs are a sample of G IDs without replacement, at the price of a beam of G.
What is sampled is the constrained distribution, renormalised at every step over the children that exist; the
log-probabilities that come back are the model's own, as in the beam.

B batch, T query tokens, G rollouts, M beams, C children of the widest node, L levels, K codes of a level.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.decoders import checked_queries, decoder_for
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import tensors


class Rollouts(NamedTuple):
    """On the model's device. `codes_BGL` int64, distinct in a query; `logp_BG` float32, log P(ID | query); `count_B`
    int64. Beyond `count_B`: codes −1, logp −inf. Beam: best first; sample: in the order of the perturbed scores."""

    codes_BGL: Tensor
    logp_BG: Tensor
    count_B: Tensor


def beam_rollouts(model, trie: Trie, input_ids, attention_mask, *, group: int, beam_width: int) -> Rollouts:
    """The `group` best IDs that a beam of `beam_width` finds: MiniOneRec's rollouts, the same ones until the model moves."""
    decoder = decoder_for(model, codes_per_level=trie.codes_per_level)
    result = constrained_beam_search(
        decoder, trie, input_ids, attention_mask, beam_width=max(group, beam_width), top_k=group
    )
    # Inference tensors may not be saved for a backward pass; clones may.
    return Rollouts(*(part.to(decoder.device).clone() for part in (result.docid_BKL, result.logp_BK, result.count_B)))


@torch.no_grad()
def sample_rollouts(
    model, trie: Trie, input_ids, attention_mask, *, group: int, seed: int, temperature: float = 1.0
) -> Rollouts:
    """`group` IDs drawn without replacement, or all where the trie has fewer. A pure function of its arguments.

    `model`: any kind of generator, or a `Decoder`. `temperature` divides the logits before they are renormalised over the
    children; above 1 explores more. Raises InputError for a group below 1, a temperature of 0, or what the beam search
    refuses.
    """
    if group < 1 or not temperature > 0:
        raise InputError(
            f"a rollout needs group ≥ 1 and a temperature above 0, found {group} and {temperature}; 0 is the beam"
        )
    decoder = decoder_for(model, codes_per_level=trie.codes_per_level)
    device = decoder.device
    noise = torch.Generator(device=device).manual_seed(seed)
    ids_BT, mask_BT = checked_queries(input_ids, attention_mask, decoder)
    memory, cache, arrays = decoder.encode(ids_BT, mask_BT), None, tensors(trie, device)
    code_BM = parent_BM = torch.zeros(len(ids_BT), 1, dtype=torch.long, device=device)
    place, prefix_BML, logp_BM = arrays.root(len(ids_BT)), code_BM[..., None][..., :0], code_BM.float()
    # φ: log of the constrained probability; the perturbed score of a node is that of the best ID below it.
    phi_BM, score_BM = code_BM.float(), code_BM.float()
    for level in range(trie.levels):
        hidden_BMD, cache = decoder.decode_step(level, memory, cache, parent_BM, code_BM)
        logits_BMK = decoder.level_logits(level, hidden_BMD, prefix_BML).float()
        if not logits_BMK.isfinite().all():
            raise InputError("the model gives NaN or infinite logits; export it again, or run it in float32")
        children = arrays.children(level, place, score_BM > -torch.inf, prefix_BML, None)
        code_BMC, live_BMC = children.code_BMC, children.live_BMC
        chance_BMC = (logits_BMK.gather(-1, code_BMC) / temperature).masked_fill(~live_BMC, -torch.inf)
        phi_BMC = phi_BM[..., None] + chance_BMC - _finite(chance_BMC.logsumexp(-1, keepdim=True))
        score_BMC = _perturbed(phi_BMC, score_BM, live_BMC, noise)
        own_BMC = logp_BM[..., None] + logits_BMK.log_softmax(-1).gather(-1, code_BMC)
        best = score_BMC.flatten(1).topk(min(group, score_BMC[0].numel()), dim=1)
        score_BM, parent_BM = best.values, best.indices // children.widest
        code_BM, phi_BM, logp_BM = (
            values.flatten(1).gather(1, best.indices) for values in (code_BMC, phi_BMC, own_BMC)
        )
        place = arrays.kept(level, children, best.indices, code_BM)
        kept_BML = prefix_BML.gather(1, parent_BM[..., None].expand(-1, -1, level))
        prefix_BML = torch.cat((kept_BML, code_BM[..., None]), 2)
    return _padded(prefix_BML, logp_BM, score_BM > -torch.inf, group)


def _finite(total: Tensor) -> Tensor:
    """Dead beams have no child and a total of −inf, which must not become NaN."""
    return total.masked_fill(total == -torch.inf, 0)


def _perturbed(phi_BMC: Tensor, score_BM: Tensor, live_BMC: Tensor, noise: torch.Generator) -> Tensor:
    """Gumbel(φ) of each child, conditioned on their maximum being the parent's score; −inf where there is no child.

    −log(e^−g − e^−Z + e^−x) for child x, largest Z, parent g, by the paper's appendix B.3, which neither overflows nor
    cancels.
    """
    uniform = torch.rand(phi_BMC.shape, generator=noise, device=phi_BMC.device).clamp_(1e-20, 1 - 1e-7)
    free_BMC = (phi_BMC - (-uniform.log()).log()).masked_fill(~live_BMC, -torch.inf)
    top_BM1 = _finite(free_BMC.amax(-1, keepdim=True))
    parent_BM1 = _finite(score_BM)[..., None]
    gap_BMC = parent_BM1 - free_BMC + torch.log1p(-(free_BMC - top_BM1).exp())
    bounded_BMC = parent_BM1 - gap_BMC.clamp(min=0) - torch.log1p((-gap_BMC.abs()).exp())
    # The largest child has log(0) in its gap and is the parent's score itself.
    bounded_BMC = torch.where(free_BMC == top_BM1, parent_BM1.expand_as(free_BMC), bounded_BMC)
    return bounded_BMC.masked_fill(~live_BMC, -torch.inf)


def _padded(codes_BML: Tensor, logp_BM: Tensor, real_BM: Tensor, group: int) -> Rollouts:
    missing = (0, group - real_BM.shape[1])
    codes_BML = codes_BML.masked_fill(~real_BM[..., None], -1)
    logp_BM = logp_BM.masked_fill(~real_BM, -torch.inf)
    return Rollouts(
        torch.nn.functional.pad(codes_BML, (0, 0, *missing), value=-1),
        torch.nn.functional.pad(logp_BM, missing, value=-torch.inf),
        real_BM.sum(1),
    )
