"""From ranked lists to figures: each outcome's measures over queries, means of seeds, groups, and the claims that they bear out.

All figures of recall are shares here and per cent in reports, as in the paper.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from catid2_ray.evaluation.metrics import recalls
from catid2_ray.evaluation.protocol import Judgements
from catid2_ray.evaluation.reproduce.conditions import Cell
from catid2_ray.evaluation.reproduce.measures import KS, QUERY_GROUPS, id_recalls, mean_of, measured, of_beams
from catid2_ray.evaluation.reproduce.significance import Compared, Difference, compare
from catid2_ray.evaluation.reproduce.texts import duration


class Run(NamedTuple):
    """One seed of a condition. `ranked`: Q lists of product ids; `ids`: Q lists of IDs, of methods that search IDs. `manifest`: its
    name in the store; `cost`, `tuned`, `machine`: of `ranking.Ranking`. `parents`: digests by role."""

    seed: int
    manifest: str
    ranked: list[list[str]]
    ids: list[list[str]] | None
    cost: dict
    tuned: dict
    machine: str
    parents: dict[str, str]


class Outcome(NamedTuple):
    """`runs`: those that have figures; `whys`: of seeds without one, the reason."""

    cell: Cell
    runs: list[Run]
    whys: list[str]

    @property
    def label(self) -> str:
        """Its title, marked where the proxy stands in for a generator."""
        condition = self.cell.row.condition
        return f"{condition.title} (proxy)" if condition.family == "ids" else condition.title


class Judged(NamedTuple):
    """What lists are judged by: the queries, the gains of what was judged, the group of each query, the category of each product at
    depth 1 ("" = none)."""

    judgements: Judgements
    gains: list[dict[str, float]]
    groups: list[str]
    category_of: Mapping[str, str]


class Scored(NamedTuple):
    """`values`: measure → Q or Q×K, the mean over the seeds; `by_seed`: S×K means of recall."""

    outcome: Outcome
    values: dict[str, np.ndarray]
    by_seed: np.ndarray

    @property
    def name(self) -> str:
        return self.outcome.cell.row.condition.name

    @property
    def title(self) -> str:
        return self.outcome.cell.row.condition.title

    @property
    def label(self) -> str:
        return self.outcome.label

    @property
    def family(self) -> str:
        return self.outcome.cell.row.condition.family

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with alone: nobody would run IDs of shuffled categories."""
        return self.name.startswith("cat_id2_shuffled")

    @property
    def is_system(self) -> bool:
        """Whether it is a search that one could take; the proxy is none."""
        return self.family != "ids" and not self.is_control

    @property
    def is_kind(self) -> bool:
        """Whether it is a way of making IDs, ranked by the proxy's beam. GDR takes clusters from the proxy; vectors rank."""
        return (
            self.family == "ids"
            and not self.is_control
            and not self.outcome.cell.row.condition.settings.get("clusters")
        )

    def recall(self, k: int) -> np.ndarray:
        """Q."""
        return self.values["recall"][:, KS.index(k)]

    def half_range(self, k: int) -> float | None:
        """Half the distance of the best and the worst seed; None of one."""
        if len(self.by_seed) < 2:
            return None
        return float(np.ptp(self.by_seed[:, KS.index(k)]) / 2)

    def cost(self, name: str) -> float | None:
        """The mean over the seeds."""
        values = [run.cost[name] for run in self.outcome.runs if name in run.cost]
        return float(np.mean(values)) if values else None

    @property
    def making(self) -> float:
        """Seconds of training and indexing."""
        return (self.cost("train_seconds") or 0) + (self.cost("index_seconds") or 0)


def score(
    outcome: Outcome, judged: Judged, *, docid_of: Mapping[str, Mapping[str, str]] | None = None
) -> Scored | None:
    """None without a run. `docid_of`: by the digest of IDs, product → ID, where recall of IDs is wanted."""
    if not outcome.runs:
        return None
    relevant = judged.judgements
    of_seed = []
    for run in outcome.runs:
        values = measured(run.ranked, relevant.relevant, judged.gains)
        values |= {group: recalls(run.ranked, getattr(relevant, group), KS) for group in ("seen", "unseen")}
        if run.ids is not None and docid_of and run.parents.get("ids") in docid_of:
            listed = run.ids, relevant.relevant, docid_of[run.parents["ids"]]
            values |= {"ids": id_recalls(*listed), **of_beams(*listed)}
        of_seed.append(values)
    shared = [name for name in of_seed[0] if all(name in values for values in of_seed)]
    by_seed = np.array([np.nanmean(values["recall"], 0) for values in of_seed])
    return Scored(outcome, {name: np.mean([values[name] for values in of_seed], 0) for name in shared}, by_seed)


def by_group(scored: Scored, judged: Judged, k: int) -> dict[str, tuple[int, float | None]]:
    """Group → how many queries, and recall@k over them: query groups by the paper's priority, then seen and unseen products."""
    groups = np.array(judged.groups)
    found = {}
    for name in QUERY_GROUPS:
        rows = groups == name
        found[name] = int(rows.sum()), mean_of(scored.recall(k), rows)[0] if rows.any() else None
    for name in ("seen", "unseen"):
        column_Q = scored.values[name][:, KS.index(k)]
        found[name] = int(np.isfinite(column_Q).sum()), mean_of(column_Q)[0]
    return found


def by_category(runs: Sequence[Run], judged: Judged, k: int, *, most: int = 8) -> dict[str, tuple[int, float]]:
    """The commonest categories of relevant products → queries and recall@k, counting that category's products alone."""
    wanted: dict[str, dict[int, set[str]]] = {}
    for query, products in enumerate(judged.judgements.relevant):
        for product in products:
            if category := judged.category_of.get(product):
                wanted.setdefault(category, {}).setdefault(query, set()).add(product)
    common = sorted(wanted, key=lambda name: (-len(wanted[name]), name))[:most]
    found = {}
    for name in common:
        of_query = [wanted[name].get(query, set()) for query in range(len(judged.judgements.relevant))]
        values = [np.nanmean(recalls(run.ranked, of_query, [k])) for run in runs]
        found[name] = len(wanted[name]), float(np.mean(values))
    return found


class Claim(NamedTuple):
    """What the paper says of two rows: `one` finds more than `other`; `says`: in words, and where."""

    one: str
    other: str
    says: str


CLAIMS: dict[str, tuple[Claim, ...]] = {
    "T2": (
        Claim("tiger", "dsi_semantic", "TIGER over DSI semantic (4.2)"),
        Claim("cat_id2_256", "paper_tiger", "CAT-ID² as printed over TIGER as printed (4.2)"),
        Claim("cat_id2_512", "cat_id2_256", "K 512 over K 256, as printed (table 2)"),
        Claim("cat_id2", "tiger", "CAT-ID² (ours) over TIGER (4.2)"),
        Claim("cat_id2_k512", "cat_id2", "K 512 over K 256, ours"),
        Claim("cat_id2", "cat_id2_shuffled", "CAT-ID² (ours) over its shuffled control (ours: do categories cause the gain?)"),
        Claim("dpr", "bm25", "DPR over BM25 (table 2, us)"),
        Claim("bm25+adapted", "bm25", "BM25 + adapted dense over BM25 (ours)"),
        Claim("served", "bm25+adapted", "what is served over BM25 + adapted dense (ours)"),
        Claim("cat_id2+generator", "tiger+generator", "CAT-ID² (ours) over TIGER, generators trained in full (4.2)"),
        Claim("cat_id2_k512+generator", "cat_id2+generator", "K 512 over K 256, ours, generators trained in full"),
        Claim("nci+pawa", "nci+generator", "NCI's prefix-aware head over a plain one, generators trained in full (ours)"),
    ),
    "T3": (
        Claim("paper_tiger", "paper_hcc", "as printed: TIGER over HCCL alone (4.3, 1)"),
        Claim("paper_tiger", "paper_csc", "as printed: TIGER over CSCL alone (4.3, 1)"),
        Claim("cat_id2_paper", "paper_tiger", "as printed: all three over TIGER (4.3, 3)"),
        Claim("tiger", "hcc", "our preset: TIGER over HCCL alone (4.3, 1)"),
        Claim("tiger", "csc", "our preset: TIGER over CSCL alone (4.3, 1)"),
        Claim("hcc_csc_dis", "tiger", "our preset: all three over TIGER (4.3, 3)"),
    ),
    "T4": tuple(
        Claim(f"{kind}_with_category", f"{kind}_without_category", f"{title}: with category text over without (4.3)")
        for kind, title in (("dsi_semantic", "DSI semantic"), ("tiger", "TIGER"), ("cat_id2", "CAT-ID²"))
    ),
    "T5": (
        Claim("cat_id2", "depth_2", "3 levels over 2 (4.5)"),
        Claim("depth_2", "depth_1", "2 levels over 1 (4.5)"),
        Claim("depth_1", "tiger", "1 level over TIGER (table 5)"),
        Claim("on_residual", "random_negatives", "hard negatives over random ones (4.5)"),
    ),
    "T6": tuple(
        Claim(f"cat_id2_{levels}", f"tiger_{levels}", f"CAT-ID² over TIGER with {levels} levels (4.5)") for levels in (3, 4, 5)
    )
    + tuple(Claim("cat_id2_4", f"cat_id2_{levels}", f"CAT-ID²: 4 levels over {levels} (4.5)") for levels in (3, 5)),
    "CQ": tuple(
        Claim("cq_sid", other, f"CQ-SID over {title}, at equal products")
        for other, title in (("cq_rq_vae", "RQ-VAE"), ("cq_no_category", "itself without category"),
                             ("cq_no_query_item", "itself without query–item term"), ("tiger", "an ID each"))
    ),
    "CT": (
        Claim("cat_id2", "dis", "labels over none (ours: do categories help?)"),
        Claim("cat_id2", "cat_id2_shuffled", "labels over their control (ours)"),
        Claim("cat_id2", "noise_50", "labels over labels of which half are exchanged (ours)"),
        Claim("cat_id2", "rq_kmeans", "CAT-ID² (ours) over k-means without any training (ours)"),
        Claim("cat_id2", "noise_20", "labels over labels of which a fifth are exchanged (ours)"),
        Claim("confident", "cat_id2", "confident labels alone over all labels (ours)"),
        Claim("confident", "dis", "confident labels over none (ours)"),
        Claim("clusters", "dis", "labels made of clusters over none (ours)"),
        Claim("on_residual", "tiger", "labels over none, IDs deeper than categories (H < L), as 3.1 asks for"),
        Claim("as_deep", "tiger_as_deep", "labels over none, as many levels as categories (H = L)"),
    ),
    "F5": tuple(
        Claim(best, other, f"{letter}: a middle value over {end} (4.5)")
        for letter, best, ends in (
            ("α", "dispersion_0.1", (("dispersion_0", "0"), ("dispersion_1", "1"))),
            ("β", "hierarchical_0.03", (("hierarchical_0", "0"), ("hierarchical_0.3", "0.3"))),
            ("γ", "cluster_scale_0.1", (("cluster_scale_0", "0"), ("cluster_scale_1", "1"))),
            ("K of CAT-ID²", "cat_id2_k256", (("cat_id2_k64", "64"), ("cat_id2_k512", "512"))),
        )
        for other, end in ends
    )
    + tuple(
        Claim(f"cat_id2_k{codes}", f"tiger_k{codes}", f"CAT-ID² over TIGER at K = {codes} (4.5)")
        for codes in (64, 128, 256, 512)
    ),
}  # fmt: skip


def compared(scored: Sequence[Scored], k: int) -> Compared:
    """All methods of a table at one cut-off, over the queries that all have."""
    return compare({one.name: one.recall(k) for one in scored})


def borne_out(difference: Difference) -> str:
    """What the data says to a claim that `one` finds more."""
    if not difference.shown:
        return "no difference is shown"
    return "borne out" if difference.mean > 0 else "contradicted"


class Finding(NamedTuple):
    """What was measured of a claim at one cut-off. `p`: after correction; `relative`: the difference as a share of the figure of
    `other`, None where that is 0."""

    claim: Claim
    k: int
    difference: Difference
    relative: float | None

    def as_json(self) -> dict:
        """Shares of 1, and what the data says."""
        claim, less = self.claim, self.difference
        return {"one": claim.one, "other": claim.other, "k": self.k, "mean": less.mean, "low": less.low, "high": less.high,
                "p": less.corrected, "says": claim.says, "finding": borne_out(less)}  # fmt: skip

    def __str__(self) -> str:
        less, relative = self.difference, "" if self.relative is None else f" ({self.relative:+.1%})"
        return (
            f"{self.claim.says}, recall@{self.k}: {100 * less.mean:+.2f} points{relative} [{100 * less.low:+.2f}, "
            f"{100 * less.high:+.2f}], p = {less.corrected:.3f} after correction: {borne_out(less)}."
        )


def findings(table: str, scored: Sequence[Scored], at: Mapping[int, Compared]) -> list[Finding | str]:
    """For each claim of the table whose rows were measured, a finding per cut-off in `at`; of the others one sentence, and which
    rows lack."""
    names = {one.name for one in scored}
    found: list[Finding | str] = []
    lacking = []
    for claim in CLAIMS.get(table, ()):
        if missing := [name for name in (claim.one, claim.other) if name not in names]:
            lacking.append(f"{claim.says} [{', '.join(missing)}]")
            continue
        for k, comparison in at.items():
            less, base = comparison.less(claim.one, claim.other), comparison.intervals[claim.other].mean
            found.append(Finding(claim, k, less, less.mean / base if base else None))
    return [*found, f"Not known, as the rows in brackets have no figure: {'; '.join(lacking)}."] if lacking else found


class Advice(NamedTuple):
    """`take`: the method to take; `best`: the one that finds most; `ties`: those not shown to find less than the best. `ids`: of
    ways of making IDs the one to take, and those that tie, by the proxy; "" where none was measured."""

    take: str
    best: str
    ties: list[str]
    ids: str
    id_ties: list[str]
    sentence: str


def advice(scored: Sequence[Scored], comparison: Compared, k: int) -> Advice | None:
    """The cheapest method (training, then milliseconds a query, then recall) among those not shown to find less than the best. What
    another search costs is not known and counts as nothing: whoever gave its answers has it.

    Kinds of IDs are ranked by the proxy, which is no system to take, so they are judged among themselves; controls are neither.
    None where no whole system was measured."""
    systems, kinds = [one for one in scored if one.is_system], [one for one in scored if one.is_kind]
    if not systems:
        return None
    take, best, ties = _chosen(systems, comparison)
    low, high = (100 * x for x in comparison.intervals[take.name][1:])
    sentence = (
        f"Take {take.title}: recall@{k} {100 * comparison.intervals[take.name].mean:.1f} % [{low:.1f}, {high:.1f}]"
        f"{_cost_in_words(take)}. "
        + ("It finds most" if take is best else f"{best.title} finds most "
            f"({100 * comparison.intervals[best.name].mean:.1f} %), but no difference is shown")
        + f", of {len(systems)} whole system{'s' if len(systems) > 1 else ''} measured"
        + (", and you have it already." if take.family == "run" else "." if take is best else _made_sooner(take, best))
    )  # fmt: skip
    ids, id_ties = "", []
    if len(kinds) > 1:
        cheap, most, tied = _chosen(kinds, comparison)
        ids, id_ties = cheap.name, [one.name for one in tied if one is not cheap]
        sentence += (
            f" Among ways of making IDs, by a small generator that stands in for a real one, {most.title} finds most "
            f"({100 * comparison.intervals[most.name].mean:.1f} %)"
            + (
                f"; {len(tied) - 1} more are not shown to find less, {cheap.title} costs least of them."
                if len(tied) > 1
                else "."
            )
        )
    return Advice(take.name, best.name, [one.name for one in ties], ids, id_ties, sentence)


def _chosen(among: Sequence[Scored], comparison: Compared) -> tuple[Scored, Scored, list[Scored]]:
    """The one to take, the one that finds most, and those not shown to find less than that one."""
    best = max(among, key=lambda one: comparison.intervals[one.name].mean)
    ties = [one for one in among if one is best or not comparison.less(best.name, one.name).shown]
    cheapest = min(
        ties, key=lambda one: (one.making, one.cost("ms_per_query") or 0, -comparison.intervals[one.name].mean)
    )
    return cheapest, best, ties


def _made_sooner(take: Scored, best: Scored) -> str:
    """Why one that finds less is to be taken, and what speaks against it."""
    own, other = (one.cost("ms_per_query") or 0 for one in (take, best))
    slower = f", though a query of the other takes {other:.1f} ms" if own > other > 0 else ""
    return f", and this one takes less time to make{slower}."


def _cost_in_words(one: Scored) -> str:
    """Nothing of another search, whose cost nobody knows here."""
    milliseconds = one.cost("ms_per_query")
    if one.family == "run" or milliseconds is None:
        return ""
    return f", {duration(one.making)} to make, {milliseconds:.1f} ms a query"
