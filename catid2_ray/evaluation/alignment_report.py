"""What alignment did to a generator: reward, KL, entropy, flat groups, concentration of the rollouts, recall; as text and
pictures.

Rollouts of many queries on few IDs are the "mode concentration" that CQ-SID says plain GRPO ends in. It is measured three
ways: the share of all rollouts that fall on the commonest 1 % of the catalogue's IDs, distinct IDs per rollout, and the
probability of a query's best ID.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.evaluation.figures import training_curves
from catid2_ray.evaluation.page import Headline, Picture, page
from catid2_ray.evaluation.tables import Column, Quantity, Table, columns_of, shown
from catid2_ray.generator.eg_grpo import Groups, group_advantages, group_logps, pack
from catid2_ray.generator.vocabulary import pad_of
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.environment import Environment
from catid2_ray.schedule import seed_from

KS = (1, 10, 50)


MEASURED = (
    Quantity("reward", "reward", ".4f", "mean over the rollouts of the measured queries"),
    Quantity("recall@1", "recall@1", ".4f", "share of a query's relevant products, by constrained beam search"),
    Quantity("recall@10", "recall@10", ".4f", "the same among the first ten"),
    Quantity("recall@50", "recall@50", ".4f", "the same among the first fifty"),
    Quantity("kl", "KL, nats", ".4f", "exact, to the generator before, over the levels on the rollouts' own prefixes"),
    Quantity("entropy", "entropy, nats", ".3f", "of the levels' distributions on the rollouts' own prefixes, summed"),
    Quantity("without_variance", "flat groups", ".1%", "groups whose rewards are all equal and teach nothing"),
    Quantity("top_1_percent", "on 1 % of IDs", ".1%", "share of rollouts on the commonest 1 % of the catalogue's IDs"),
    Quantity("distinct", "distinct IDs", ".1%", "distinct IDs per rollout, over all measured queries"),
    Quantity("top_1_mass", "P(best ID)", ".4f", "probability of a query's best ID, mean"),
)


def concentration(packed_R: np.ndarray, *, ids: int) -> dict[str, float]:
    """`top_1_percent` and `distinct` of R rollouts, over a catalogue of `ids` IDs (1 % is one ID at least)."""
    if not len(packed_R):
        raise InputError("no rollout to count; measure at least one query")
    count_U = np.sort(np.unique(packed_R, return_counts=True)[1])[::-1]
    return {
        "top_1_percent": float(count_U[: max(1, ids // 100)].sum() / len(packed_R)),
        "distinct": len(count_U) / len(packed_R),
    }


def recalls_of_ids(
    docid_BK: Tensor, rows_BK: Tensor, judged_BJ: Tensor, relevant_BJ: Tensor, ks: Sequence[int]
) -> Tensor:
    """float32 B×len(ks), recall at product level; NaN for queries without a relevant product.

    `docid_BK` packed IDs, best first, −1 = none; `rows_BK` how many products each has: an ID of g products takes g ranks,
    and where the cut falls inside, each of them is inside with the chance of a random order.
    """
    before_BK = rows_BK.cumsum(1) - rows_BK
    inside_BKX = (torch.tensor(ks) - before_BK[..., None]).clamp(min=0) / rows_BK.clamp(min=1)[..., None]
    inside_BKX = inside_BKX.clamp(max=1) * (docid_BK >= 0)[..., None]
    same_BKJ = (docid_BK[..., None] == judged_BJ[:, None]) & (judged_BJ >= 0)[:, None]
    hits_BK = (same_BKJ * relevant_BJ[:, None]).sum(-1).float()
    total_B1 = relevant_BJ.sum(1, keepdim=True).float()
    return (hits_BK[..., None] * inside_BKX).sum(1) / torch.where(total_B1 > 0, total_B1, torch.nan)


@torch.no_grad()
def measure(
    model, reference, environment: Environment, prompts: Callable[[np.ndarray], Mapping[str, Tensor]], *, count: int,
    seed: int = 0, batch: int = 64, beam_width: int = 50,
) -> dict[str, float]:  # fmt: skip
    """The figures of MEASURED over `count` prompts (`prompts(rows)` gives their tensors), both models in eval mode.

    Rollouts are drawn as in training, without experts. Recall is that of the beam search, counted where a query has a
    relevant product. Independent of `batch`, but for the noise of the draws.
    """
    trie, space, sums, packed, recall = environment.trie, environment.space, {}, [], []
    for start in range(0, count, batch):
        asked = prompts(np.arange(start, min(start + batch, count)))
        ids_BT = asked["input_ids"]
        rolled = environment.rollouts(model, ids_BT, seed=seed_from(seed, start))
        real_BN = torch.arange(rolled.codes_BGL.shape[1], device=ids_BT.device) < rolled.count_B[:, None]
        groups = Groups(rolled.codes_BGL.clamp(min=0), real_BN, torch.zeros_like(real_BN))
        reward_BN = environment.reward(asked, groups)
        packed.append(pack(groups.codes_BNL, space)[real_BN].cpu().numpy())
        own, known = (group_logps(each, ids_BT, groups.codes_BNL, space=space) for each in (model, reference))
        share_BN = real_BN / real_BN.sum(1, keepdim=True)
        beams = constrained_beam_search(
            model, trie, ids_BT, ids_BT != pad_of(model), beam_width=beam_width, top_k=max(KS)
        )
        docid_BK = pack(beams.docid_BKL, space).masked_fill(beams.docid_BKL[..., 0] < 0, -1)
        rows_BK = beams.row_range_BK2.diff(dim=-1)[..., 0]
        recall.append(recalls_of_ids(docid_BK, rows_BK, asked["judged"].cpu(), asked["relevant"].cpu(), KS))
        figures = {
            "reward": (reward_BN * share_BN).sum(),
            "kl": sum((p.exp() * (p - q)).sum(-1) for p, q in zip(own, known)).mul(share_BN).sum(),
            "entropy": -sum((p.exp() * p).sum(-1) for p in own).mul(share_BN).sum(),
            "without_variance": group_advantages(reward_BN, real_BN).flat_B.float().sum(),
            "top_1_mass": beams.logp_BK[:, 0].exp().sum(),
        }
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value) / count
    mean_X = torch.cat(recall).nanmean(0).tolist()
    ids = trie.nodes(trie.levels)
    return {"queries": count, **sums, **concentration(np.concatenate(packed), ids=ids),
            **{f"recall@{k}": value for k, value in zip(KS, mean_X)}}  # fmt: skip


def alignment_table(before: Mapping, after: Mapping) -> Table:
    """Every figure that both have, before and after; fits a terminal of 112 columns."""
    rows = [
        [quantity.heading, shown(before[quantity.key], quantity.form), shown(after[quantity.key], quantity.form),
         shown(after[quantity.key] - before[quantity.key], "+" + quantity.form), quantity.reading]
        for quantity in MEASURED if quantity.key in before and quantity.key in after
    ]  # fmt: skip
    columns = [*columns_of("", "before", "after", "change"), Column("", number=False)]
    return Table(f"Alignment, measured on {after['queries']:,} queries", columns, rows)


_CURVES = {
    "reward": "reward of the rollouts", "kl": "KL to the start, nats", "entropy": "entropy, nats",
    "without_variance": "share of flat groups",
}  # fmt: skip


def alignment_page(history: Sequence[Mapping], *, title: str, about: Mapping) -> str:
    """One HTML page: the table of before, after and change, the curves of the training, and the settings `about`."""
    table = alignment_table(history[-1]["before"], history[-1]["after"])
    settings = Table("Settings", columns_of("", ""), [[name, str(value)] for name, value in about.items()])
    curves = [{heading: record[key] for key, heading in _CURVES.items()} for record in history]
    picture = Picture("Training, block by block", training_curves(curves, unit="block of steps"))
    return page(title, [table, settings, picture], headline=_headline(history[-1]["before"], history[-1]["after"]))


def _headline(before: Mapping, after: Mapping) -> Headline:
    """Whether recall rose, and where the rollouts went; no interval is known."""
    old, new = before["recall@10"], after["recall@10"]
    did = "raised" if new > old else "lowered" if new < old else "did not move"
    sentence = (
        f"Alignment {did} recall@10 ({old:.3f} before, {new:.3f} after, {after['queries']:,} queries); "
        f"{after['top_1_percent']:.1%} of the rollouts fall on 1 % of the IDs, {before['top_1_percent']:.1%} before."
    )
    return Headline("good" if new > old else "look", sentence)
