"""What alignment did to a generator: reward, KL, entropy, flat groups, concentration of the rollouts, recall; as text and
pictures.

Rollouts of many queries on few IDs are the "mode concentration" that CQ-SID says plain GRPO ends in. It is measured three
ways: the share of all rollouts that fall on the commonest 1 % of the catalogue's IDs, distinct IDs per rollout, and the
probability of a query's best ID.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from catid2_ray.errors import InputError
from catid2_ray.evaluation.figures import COLOURS
from catid2_ray.evaluation.pages import plain_page
from catid2_ray.generator.eg_grpo import Groups, group_advantages, group_logps, pack
from catid2_ray.generator.vocabulary import pad_of
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.environment import Environment
from catid2_ray.schedule import seed_from

KS = (1, 10, 50)


@dataclass(frozen=True)
class Figures:
    """One figure of an alignment: its key, heading and format, and what it says."""

    key: str
    heading: str
    form: str
    reading: str


ROWS = (
    Figures("reward", "reward", ".4f", "mean over the rollouts of the measured queries"),
    Figures("recall@1", "recall@1", ".4f", "share of a query's relevant products, by constrained beam search"),
    Figures("recall@10", "recall@10", ".4f", "the same among the first ten"),
    Figures("recall@50", "recall@50", ".4f", "the same among the first fifty"),
    Figures("kl", "KL, nats", ".4f", "exact, to the generator before, over the levels on the rollouts' own prefixes"),
    Figures("entropy", "entropy, nats", ".3f", "of the levels' distributions on the rollouts' own prefixes, summed"),
    Figures("without_variance", "flat groups", ".1%", "groups whose rewards are all equal and teach nothing"),
    Figures("top_1_percent", "on 1 % of IDs", ".1%", "share of rollouts on the commonest 1 % of the catalogue's IDs"),
    Figures("distinct", "distinct IDs", ".1%", "distinct IDs per rollout, over all measured queries"),
    Figures("top_1_mass", "P(best ID)", ".4f", "probability of a query's best ID, mean"),
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
    found_BK: Tensor, rows_BK: Tensor, judged_BJ: Tensor, relevant_BJ: Tensor, ks: Sequence[int]
) -> Tensor:
    """float32 B×len(ks), recall at product level; NaN for queries without a relevant product.

    `found_BK` packed IDs, best first, −1 = none; `rows_BK` how many products each has: an ID of g products takes g ranks,
    and where the cut falls inside, each of them is inside with the chance of a random order.
    """
    before_BK = rows_BK.cumsum(1) - rows_BK
    inside_BKX = (torch.tensor(ks) - before_BK[..., None]).clamp(min=0) / rows_BK.clamp(min=1)[..., None]
    inside_BKX = inside_BKX.clamp(max=1) * (found_BK >= 0)[..., None]
    same_BKJ = (found_BK[..., None] == judged_BJ[:, None]) & (judged_BJ >= 0)[:, None]
    hits_BK = (same_BKJ * relevant_BJ[:, None]).sum(-1).float()
    total_B1 = relevant_BJ.sum(1, keepdim=True).float()
    return (hits_BK[..., None] * inside_BKX).sum(1) / torch.where(total_B1 > 0, total_B1, torch.nan)


@torch.no_grad()
def measure(
    model, reference, environment: Environment, prompts: Callable[[np.ndarray], Mapping[str, Tensor]], *, count: int,
    seed: int = 0, batch: int = 64, beam_width: int = 50,
) -> dict[str, float]:  # fmt: skip
    """The figures of ROWS over `count` prompts (`prompts(rows)` gives their tensors), both models in eval mode.

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
        found = constrained_beam_search(
            model, trie, ids_BT, ids_BT != pad_of(model), beam_width=beam_width, top_k=max(KS)
        )
        found_BK = pack(found.docid_BKL, space).masked_fill(found.docid_BKL[..., 0] < 0, -1)
        rows_BK = found.row_range_BK2.diff(dim=-1)[..., 0]
        recall.append(recalls_of_ids(found_BK, rows_BK, asked["judged"].cpu(), asked["relevant"].cpu(), KS))
        figures = {
            "reward": (reward_BN * share_BN).sum(),
            "kl": sum((p.exp() * (p - q)).sum(-1) for p, q in zip(own, known)).mul(share_BN).sum(),
            "entropy": -sum((p.exp() * p).sum(-1) for p in own).mul(share_BN).sum(),
            "without_variance": group_advantages(reward_BN, real_BN).flat_B.float().sum(),
            "top_1_mass": found.logp_BK[:, 0].exp().sum(),
        }
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + float(value) / count
    mean_X = torch.cat(recall).nanmean(0).tolist()
    ids = trie.nodes(trie.levels)
    return {"queries": count, **sums, **concentration(np.concatenate(packed), ids=ids),
            **{f"recall@{k}": value for k, value in zip(KS, mean_X)}}  # fmt: skip


def _lines(before: Mapping, after: Mapping) -> list[tuple[str, list[str], str]]:
    """(heading, [before, after, change], reading) of every figure that both have."""
    return [
        (row.heading, [format(before[row.key], row.form), format(after[row.key], row.form),
                       format(after[row.key] - before[row.key], "+" + row.form)], row.reading)
        for row in ROWS if row.key in before and row.key in after
    ]  # fmt: skip


def alignment_table(before: Mapping, after: Mapping) -> Table:
    """Before and after, for a terminal of 112 columns."""
    table = Table(box=SIMPLE_HEAD, title=f"Alignment, measured on {after['queries']:,} queries", title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right"), ("", "left")):
        table.add_column(name, justify=justify, no_wrap=justify == "right")
    for heading, cells, reading in _lines(before, after):
        table.add_row(heading, *cells, reading)
    return table


def alignment_page(history: Sequence[Mapping], *, title: str, about: Mapping) -> str:
    """One HTML page: the table of before, after and change, the pictures, and the settings `about`."""
    last = history[-1]
    groups = [
        (f"Before, after and change, measured on {last['after']['queries']:,} queries", _lines(last["before"], last["after"])),
        ("Settings", [(name, [str(value)], "") for name, value in about.items()]),
    ]  # fmt: skip
    return plain_page(title, groups, {"Training, and what it changed": alignment_picture(history, title=title)})


_CURVES = (("reward", "reward of the rollouts"), ("kl", "KL to the start, nats"), ("entropy", "entropy, nats"),
           ("without_variance", "share of flat groups"))  # fmt: skip


def alignment_picture(history: Sequence[Mapping], *, title: str) -> Figure:
    """Training block by block: reward, KL, entropy, flat groups; below, concentration and recall before and after."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 4, width_ratios=(1.4, 1.4, 1, 1))
    for place, (key, label) in enumerate(_CURVES):
        panel = axes[0, place]
        panel.plot([record["epoch"] + 1 for record in history], [record[key] for record in history],
                   color=COLOURS[0], marker="o", markersize=3)  # fmt: skip
        panel.set_title(label, fontsize=9, loc="left")
        panel.set_xlabel("block of steps", fontsize=8)
    before, after = history[-1]["before"], history[-1]["after"]
    keys = ("top_1_percent", "distinct", "top_1_mass")
    groups = (
        (keys, "concentration"),
        (tuple(f"recall@{k}" for k in KS), "recall"),
        (("reward",), "reward"),
        (("entropy",), "entropy"),
    )
    headings = {row.key: row.heading for row in ROWS}
    for panel, (names, label) in zip(axes[1], groups):
        at = np.arange(len(names))
        for shift, (figures, colour, word) in enumerate(((before, COLOURS[5], "before"), (after, COLOURS[0], "after"))):
            bars = panel.bar(at + 0.4 * shift, [figures[name] for name in names], 0.38, color=colour, label=word)
            panel.bar_label(bars, fmt="%.3g", fontsize=7, padding=1 + 7 * shift)  # bars of no height lie side by side
        panel.set_xticks(at + 0.2, [headings[name] for name in names], fontsize=8)
        panel.set_title(label, fontsize=9, loc="left")
        panel.margins(y=0.16)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.legend(
        *axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure
