"""The tables of the report, each from what was measured: recall, the paper's beside ours, costs, groups of queries, cells."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from catid2_ray.evaluation.ids_report import examples_table
from catid2_ray.evaluation.metrics import Interval, bootstrap_means
from catid2_ray.evaluation.page import Link
from catid2_ray.evaluation.reproduce.conditions import PAPER_LOCALES
from catid2_ray.evaluation.reproduce.measures import BEAMS, GROUP_RULES, KS, NDCG_AT, QUERY_GROUPS, mean_of
from catid2_ray.evaluation.reproduce.scores import Advice, Outcome, Scored
from catid2_ray.evaluation.reproduce.significance import Compared, letter_of
from catid2_ray.evaluation.reproduce.texts import duration
from catid2_ray.evaluation.reproduce.verdicts import Verdict, verdict
from catid2_ray.evaluation.tables import DASH, Cell, Column, Table, columns_of, per_cent


class Facts(NamedTuple):
    """What a reader must know to compare: `data` and its `locale` in the paper (None: not the paper's data); `command`: that
    remade it all, without --cell; `about`: name → text, shown on top; `table_1`: counts by the paper's columns; `table_8`: products
    as `ids_report.examples_table` takes them, TIGER's IDs as the other ones; `distance`: how far vectors with and without category
    text are apart, or None; `images`: caption → picture of figures 3, 4 and 6; `hour`: what an hour of the machine costs, or None;
    `diagnosis`: of the release that is current (`evaluation.diagnosis.diagnosis_figures`), or None; `others`: report.json of other
    data sets, whose methods stand beside these."""

    data: str
    locale: str | None
    command: str
    about: Mapping[str, str]
    table_1: Mapping[str, int]
    table_8: Sequence[Mapping[str, str]]
    distance: Mapping[str, float] | None
    images: Mapping[str, Figure]
    published: Mapping
    hour: float | None = None
    diagnosis: Mapping | None = None
    others: Sequence[Mapping] = ()


def _bounds(interval: Interval) -> str:
    return f"[{per_cent(interval.low)}, {per_cent(interval.high)}]"


def recall_table(
    outcomes: Sequence[Outcome], scored: Sequence[Scored], at: Mapping[int, Compared],
    letters: Mapping[int, Mapping[str, str]],
) -> Table:  # fmt: skip
    """Per cent, of the rows that have figures; the best are marked; letters name the rows that a row is shown to beat."""
    best = {k: max((one.recall(k).mean() for one in scored), default=0) for k in KS}
    of = {id(one.outcome): one for one in scored}
    places = {one.name: letter_of(place) for place, one in enumerate(scored)}
    rows = []
    for outcome in outcomes:
        one = of.get(id(outcome))
        # In the other tables every row is the proxy's, as the note above them says.
        title = outcome.label if outcome.cell.table == "T2" else outcome.cell.row.condition.title
        if one is None:
            continue
        cells = []
        for k in KS:
            mean = one.recall(k).mean()
            text = per_cent(mean)
            remark = ""
            if k in at:
                interval = at[k].intervals[one.name]
                remark = f"{_bounds(interval)} {letters[k][one.name]}".strip()
            cells.append(Cell([text], best=[mean == best[k]], remark=remark))
        missing = f" ({len(outcome.whys)} more not run)" if outcome.whys else ""
        rows.append(
            [f"{places[one.name]}  {title}", *cells, per_cent(one.half_range(50)), f"{len(outcome.runs)}{missing}"]
        )
    columns = [Column("method", number=False), *(Column(f"@{k}") for k in KS), Column("± seeds @50"), Column("seeds")]
    caption = (
        "Recall in per cent; in brackets the 95 % interval over queries (paired bootstrap), then the letters of the "
        "rows that this one is shown to find more than (Holm over all pairs of the table at one cut-off, p < 0.05). "
        "± seeds: half the range of the seeds. "
        f"{len(scored[0].recall(10)) if scored else 0:,} queries."
    )  # fmt: skip
    return Table("Our figures", columns, rows, caption)


def across_table(scored: Sequence[Scored], facts: Facts) -> Table:
    """Table 2 over data sets, such as the paper's three locales: recall at 10 and 50 of each method, by its name."""
    of_others = [(str(other["data"]), other["tables"]["T2"]["rows"]) for other in facts.others]
    titles = {one.name: one.label for one in scored}
    for _, rows in of_others:
        titles = {name: row["title"] for name, row in rows.items() if "recall" in row} | titles
    found = [{one.name: {str(k): one.recall(k).mean() for k in KS} for one in scored},
             *({name: row.get("recall", {}) for name, row in rows.items()} for _, rows in of_others)]  # fmt: skip
    names = [facts.data, *(data for data, _ in of_others)]
    rows = [
        [title, *(per_cent(of.get(name, {}).get(k)) for of in found for k in ("10", "50"))]
        for name, title in titles.items()
    ]
    headings = [f"{data} @{k}" for data in names for k in (10, 50)]
    caption = "Recall in per cent, without intervals: each data set's own report has them. A dash: not measured there."
    return Table("Across data sets", columns_of("method", *headings), rows, caption)


def missing_table(outcomes: Sequence[Outcome]) -> Table:
    rows = [
        [outcome.cell.row.condition.title, str(verdict(None, None, why=_why(outcome)))]
        for outcome in outcomes
        if not outcome.runs
    ]
    return Table("Without a figure", [Column("method", number=False), Column("why", number=False)], rows)


def _why(outcome: Outcome) -> str:
    return "; ".join(dict.fromkeys(outcome.whys))


class Beside(NamedTuple):
    """A figure of the paper and ours, in per cent; `ours` None of what was not measured."""

    outcome: Outcome
    k: int
    printed: float
    ours: Interval | None
    verdict: Verdict

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours.mean - self.printed


def besides(table: str, outcomes: Sequence[Outcome], scored: Sequence[Scored], facts: Facts) -> list[Beside]:
    """Of each row and cut-off that the paper prints for this locale; none where the data is not the paper's."""
    of = {id(one.outcome): one for one in scored}
    published = facts.published.get(table.removeprefix("T"), {}).get(facts.locale, {})
    found = []
    for outcome in outcomes:
        printed = published.get(outcome.cell.row.paper or "")
        if printed is None:
            continue
        one = of.get(id(outcome))
        intervals = bootstrap_means(one.values["recall"]) if one else [None] * len(KS)
        for k, figure, interval in zip(KS, printed, intervals):
            if figure is not None:
                ours = Interval(*(100 * share for share in interval)) if interval else None
                found.append(Beside(outcome, k, figure, ours, verdict(ours, figure, why=_why(outcome))))
    return found


def beside_table(table: str, found: Sequence[Beside]) -> Table:
    """paper | ours | Δ | verdict, of this locale."""
    rows = []
    for one in found:
        ours = DASH if one.ours is None else f"{one.ours.mean:.2f} [{one.ours.low:.2f}, {one.ours.high:.2f}]"
        apart = DASH if one.difference is None else f"{one.difference:+.2f}"
        rows.append([one.outcome.label, f"@{one.k}", f"{one.printed:.2f}", ours, apart, str(one.verdict)])
    columns = [*columns_of("method", "cut-off", "paper", "ours", "Δ"), Column("verdict", number=False)]
    caption = (
        "Recall in per cent. [OK]: the paper's figure lies within our interval, or ours is within 5 % of it; [OKish]: within 15 %; "
        "[FAIL]: further away."
    )
    if any(one.outcome.cell.row.condition.family == "ids" for one in found):
        caption += (
            " Rows marked (proxy) are found by a small generator of ours, not by the paper's T5, so their verdicts say nothing of "
            "a T5 on these IDs."
        )
    if table in ("T4", "T5", "T6"):
        caption += " These IDs are trained by our preset, not as the paper prints."
    return Table("Beside the paper's", columns, rows, caption)


def cost_table(scored: Sequence[Scored], comparison: Compared, said: Advice | None, hour: float | None) -> Table:
    """Which method to take, with what each costs. `hour`: the price of an hour of the machine, or None."""
    order = sorted(scored, key=lambda one: -comparison.intervals[one.name].mean)
    rows = []
    for one in order:
        interval = comparison.intervals[one.name]
        mark = (
            "take" if said and one.name == said.take else "ties with the best" if said and one.name in said.ties else ""
        )
        rows.append(
            [one.label, Cell([per_cent(interval.mean)], remark=_bounds(interval)),
             *_shown_cost(one), *([] if hour is None else _money(one, hour)), mark]
        )  # fmt: skip
    columns = [Column("method", number=False), Column("recall@50"), Column("training"), Column("indexing"),
               Column("ms a query"), Column("MiB read"),
               *([] if hour is None else [Column("to make it"), Column("10⁶ queries")]), Column("", number=False)]  # fmt: skip
    caption = (
        "Times are of this machine, in one process; other work on it makes them upper bounds. Training of a proxy row: IDs and "
        "the small generator. A query's time includes its encoding. MiB read: the index, or the weights, that a query reads: of "
        "words their index, of vectors those of all products (without the graph or lists of faiss), of the proxy its weights "
        "and its trie (of GDR the vectors, too), of generators and releases their files and the trie. The weights of the "
        "query encoder count only in rows of generators and releases, where they lie in the generator's files. "
        + ("Money: set reproduce.machine_hour to what an hour of this machine costs." if hour is None else
           f"Money: these times at {hour:g} an hour of this machine, with one process on it.")
    )  # fmt: skip
    return Table("Which method to take, and what each costs", columns, rows, caption)


def _shown_cost(one: Scored) -> list[str]:
    """Training, indexing, milliseconds a query, MiB read; dashes of another search, of which only the answers are known."""
    if one.cost("ms_per_query") is None:
        return [DASH] * 4
    return [_seconds(one.cost("train_seconds")), _seconds(one.cost("index_seconds")), f"{one.cost('ms_per_query'):.1f}",
            f"{one.cost('bytes') / 2**20:,.0f}"]  # fmt: skip


def _money(one: Scored, hour: float) -> list[str]:
    if one.cost("ms_per_query") is None:
        return [DASH] * 2
    return [f"{hour * one.making / 3600:,.2f}", f"{hour * (one.cost('ms_per_query') or 0) / 3.6:,.2f}"]


def _seconds(value: float | None) -> str:
    return DASH if value is None else duration(value)


def groups_table(scored: Sequence[Scored], found: Sequence[Mapping[str, tuple[int, float | None]]]) -> Table:
    """`found`: of each method what `scores.by_group` says at 50."""
    names = (*QUERY_GROUPS, "seen", "unseen")
    counts = {name: of[name][0] for of in found for name in names}
    rows = [[one.label, *(per_cent(of[name][1]) for name in names)] for one, of in zip(scored, found)]
    headings = [f"{name.replace('_', ' ')} ({counts.get(name, 0):,})" for name in names]
    rules = "; ".join(f"{name.replace('_', ' ')}: {rule}" for name, rule in GROUP_RULES.items())
    caption = (
        f"Recall@50 in per cent; in brackets the queries. {rules}: the paper's groups of Table 9 in its order, by "
        f"rules of ours, for it keeps "
        "its own to itself. The A/B test of Table 9 is not run: it needs people who shop. Seen: products that a "
        "training pair names; the paper's "
        "test has no others."
    )
    return Table(
        "By kind of query, and for products seen and unseen in training", columns_of("method", *headings), rows, caption
    )


def measures_table(scored: Sequence[Scored]) -> Table:
    rows = []
    for one in scored:
        hit, ids = mean_of(one.values["hit"]), mean_of(one.values["ids"]) if "ids" in one.values else None
        at_10 = KS.index(10)
        mrr, ndcg = (mean_of(one.values[name])[0] for name in ("mrr", "ndcg"))
        rows.append([one.label, per_cent(hit[at_10]), per_cent(mrr), per_cent(ndcg),
                     per_cent(mean_of(one.values["recall"])[at_10]), per_cent(ids[at_10] if ids else None)])  # fmt: skip
    headings = ("hit rate@10", "MRR@100", f"nDCG@{NDCG_AT}", "recall@10 of products", "recall@10 of IDs")
    caption = (
        "Per cent. nDCG: linear gains, a judgement's grade above the table's lowest. Recall of IDs counts an ID that "
        "products share once: "
        "where it is above that of products, the difference is what scoring IDs would have flattered."
    )
    return Table("Other measures, and IDs beside products", columns_of("method", *headings), rows, caption)


def beams_table(scored: Sequence[Scored]) -> Table:
    """Equal beams, and equal products, of the rows whose lists of IDs are known."""
    rows = []
    for one in scored:
        if "beam_hit" not in one.values:
            continue
        names = ("beam_hit", "beam_products", "hit", "recall", "expected")
        of_beam, held, hit, recall, expected = (mean_of(one.values[name]) for name in names)
        of_beams = [f"{per_cent(share)} ({count:,.0f})" for share, count in zip(of_beam, held)]
        at_equal = [
            per_cent(figures[KS.index(k)]) for figures, k in ((hit, 10), (hit, 100), (recall, 10), (expected, 10))
        ]
        rows.append([one.title, *of_beams, *at_equal])
    beams = [f"hit rate, {beam} ID{'s' if beam > 1 else ''} (products)" for beam in BEAMS]
    headings = ("hit rate@10 products", "hit rate@100 products", "recall@10", "expected recall@10")
    caption = (
        "Per cent. At an equal beam (the paper's figure) a larger cluster finds more because it holds more: in brackets "
        "the products of the beam, on average. At equal products that is no advantage. Expected: products of one ID in "
        "random order; recall has them in the order of their ids. Queries alone, the paper's semantic case: the proxy "
        "reads no user; benchmarks/results/users.md has its personalised case."
    )
    return Table("At equal beams, and at equal products", columns_of("method", *beams, *headings), rows, caption)


def categories_table(scored: Sequence[Scored], found: Sequence[Mapping[str, tuple[int, float]]]) -> Table:
    """`found`: of each method what `scores.by_category` says at 50."""
    names = list(found[0]) if found else []
    headings = [f"{name} ({found[0][name][0]})" for name in names]
    rows = [[one.label, *(per_cent(of[name][1]) for name in names)] for one, of in zip(scored, found)]
    return Table("By category", columns_of("method", *headings), rows, "Recall@50 of the products of one category at "
        "depth 1; in brackets the queries that ask for one.")  # fmt: skip


_COUNTS = {
    "documents": "products", "train_queries": "train queries", "train_pairs": "train pairs", "test_queries": "test queries",
    "test_pairs": "test pairs",
}  # fmt: skip


def counts(facts: Facts) -> dict[str, dict[str, int]]:
    """Table 1: what is counted → number, of this data and of the paper's; of its own locale alone where the data is the paper's."""
    locales = PAPER_LOCALES if facts.locale is None else (facts.locale,)
    printed = {f"ESCI-{locale}, the paper's": dict(zip(_COUNTS, facts.published["1"][locale])) for locale in locales}
    return {facts.data: {name: facts.table_1[name] for name in _COUNTS}, **printed}


def table_1(facts: Facts) -> Table:
    rows = [[data, *(f"{of[name]:,}" for name in _COUNTS)] for data, of in counts(facts).items()]
    return Table("Counts", columns_of("data", *_COUNTS.values()), rows, "Ours: pairs from the relevance on "
        "that teaches (train) or counts (test).")  # fmt: skip


class Training(NamedTuple):
    """Table 7, of one method. `hours`: the paper's; seconds: the mean over the seeds; None: not known."""

    outcome: Outcome
    hours: float | None
    train_seconds: float | None
    ids_seconds: float | None
    generator_seconds: float | None


def trainings(outcomes: Sequence[Outcome], facts: Facts) -> list[Training]:
    """Of the methods that were measured, or whose hours the paper prints."""
    printed = {**facts.published["7"], "cat_id2_256": facts.published["7"]["cat_id2"]}
    found = []
    for outcome in outcomes:
        name = outcome.cell.row.paper
        costs = [run.cost for run in outcome.runs if run.cost]
        if not costs and name not in printed:
            continue
        hours = printed.get(name)
        means = [
            sum(cost[key] for cost in costs) / len(costs) if costs and key in costs[0] else None
            for key in ("train_seconds", "ids_seconds", "generator_seconds")
        ]
        found.append(Training(outcome, hours if isinstance(hours, float) else None, *means))
    return found


def table_7(found: Sequence[Training]) -> Table:
    rows = []
    for outcome, hours, *seconds in found:
        why = "" if seconds[0] is not None else str(verdict(None, None, why=_why(outcome)))
        title = f"{outcome.cell.row.condition.title} {why}".strip()
        rows.append([title, DASH if hours is None else f"{hours:.1f} h", *map(_seconds, seconds)])
    columns = columns_of("method", "paper: one A100 of 80 GB", "ours: all training", "of it IDs", "of it the generator")
    return Table("Training time", columns, rows, "Not to be compared across columns: other data, machine and "
        "generator (GenRet: eight A100).")  # fmt: skip


def table_8(examples: Sequence[Mapping[str, str]]) -> Table:
    table = examples_table(examples)
    columns = [*table.columns[:2], Column("CAT-ID² (ours)", number=False), Column("TIGER", number=False)]
    return table._replace(title="IDs", columns=columns[: len(table.columns)])


def cells_table(outcomes: Sequence[Outcome], facts: Facts, link: str) -> Table:
    """Every cell with its manifests, and how to remake it."""
    rows = []
    for outcome in outcomes:
        state = str(verdict(None, None, why=_why(outcome))) if outcome.whys else ""
        linked = [
            Link(f"seed {run.seed}: {run.manifest.split('/')[2]}", link + run.manifest if link else "")
            for run in outcome.runs
        ]
        cell = linked[0] if len(linked) == 1 else linked if linked else ""
        rows.append([outcome.cell.name, cell, state])
    columns = [Column(name, number=False) for name in ("cell", "manifests", "without a figure")]
    caption = (
        "A manifest lies in the store as artifacts/cell/KEY/manifest.json, beside its ranked lists. The command that remakes a "
        f"cell, with its name as CELL: {facts.command} --cell CELL"
    )
    return Table("Every cell", columns, rows, caption)
