"""The report: the paper's tables and figures in its layout, as one HTML page, Markdown and JSON.

The first screen says which method to take for this catalogue and what each costs. Where the data set is the paper's, a second table
puts its figures beside ours with a verdict each. Every sentence of a difference is computed, and says no more than its interval.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from catid2_ray.evaluation.ids_report import examples_table
from catid2_ray.evaluation.metrics import Interval, bootstrap_means
from catid2_ray.evaluation.page import Headline, Link, Picture, Prose, page
from catid2_ray.evaluation.report import diagnosis_tables
from catid2_ray.evaluation.reproduce import pictures
from catid2_ray.evaluation.reproduce.conditions import SWEEPS
from catid2_ray.evaluation.reproduce.measures import BEAMS, GROUP_RULES, KS, NDCG_AT, QUERY_GROUPS, mean_of
from catid2_ray.evaluation.reproduce.scores import (
    Advice,
    Judged,
    Outcome,
    Scored,
    advice,
    by_category,
    by_group,
    compared,
    score,
    sentences,
)
from catid2_ray.evaluation.reproduce.significance import Compared, letter_of
from catid2_ray.evaluation.reproduce.texts import PROXY_NOTE, QUESTIONS, SEARCH_ERROR, TITLES
from catid2_ray.evaluation.reproduce.verdicts import verdict
from catid2_ray.evaluation.tables import DASH, Cell, Column, Table, columns_of, markdown, per_cent

SHOWN_AT = (10, 50)  # cut-offs with intervals, letters and sentences
PAPER_LOCALES = ("us", "es", "jp")


class Facts(NamedTuple):
    """What a reader must know to compare: `data` and its `locale` in the paper (None: not the paper's data); `command`: that
    remade it all, without --cell; `about`: name → text, shown on top; `table_1`: counts by the paper's columns; `table_8`: products
    as `ids_report.examples_table` takes them, TIGER's IDs as the other ones; `distance`: how far vectors with and without category
    text are apart, or None; `images`: caption → picture of figures 3, 4 and 6; `hour`: what an hour of the machine costs, or None;
    `diagnosis`: of the release that is current (`evaluation.diagnosis.diagnosis_figures`), or None."""

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


class Written(NamedTuple):
    """`pictures`: file name → figure, which `markdown` names."""

    html: str
    markdown: str
    json: dict
    pictures: dict[str, Figure]


def write(
    outcomes: Sequence[Outcome], judged: Judged, facts: Facts, *, docid_of: Mapping[str, Mapping[str, str]],
    tables: Sequence[str], link: str = "",
) -> Written:  # fmt: skip
    """`tables`: "1" … "8", "F5", "CQ", "CT". `link`: what comes before a manifest's name in the page; "" = no links."""
    by_table: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_table.setdefault(outcome.cell.table, []).append(outcome)
    parts: list = []
    figures: dict[str, Figure] = {}
    summary: dict = {"data": facts.data, "command": facts.command, "about": dict(facts.about), "tables": {}}
    headline = None
    scores: dict[str, list[Scored]] = {
        table: [one for outcome in of_table if (one := score(outcome, judged, docid_of=docid_of))]
        for table, of_table in by_table.items()
    }
    at = {table: {k: compared(found, k) for k in SHOWN_AT} for table, found in scores.items() if found}
    said = None
    if scores.get("T2"):
        said = advice(scores["T2"], at["T2"][50], 50)
        figures["overview.png"] = pictures.overview(scores["T2"], at["T2"][50], 50)
        parts += [Picture("What each method finds", figures["overview.png"], "Recall at 50 of every method with its "
            "interval, drawn from the table below"), cost_table(scores["T2"], at["T2"][50], said, facts.hour)]  # fmt: skip
    if said:
        headline = Headline("good" if said.take == said.best else "look", said.sentence)
        summary["advice"] = said._asdict()
    if "1" in tables:
        parts += [_question("1"), table_1(facts)]
    for table in ("T2", "T3", "T4", "T5", "T6", "F5", "CQ", "CT"):
        if table not in by_table:
            continue
        made = _part(table, by_table[table], scores[table], at.get(table, {}), judged, facts, link)
        parts += made.parts
        figures |= made.figures
        summary["tables"][table] = made.summary
    if "7" in tables and "T2" in by_table:
        parts += [_question("7"), table_7(by_table["T2"], facts)]
    if "8" in tables and facts.table_8:
        parts += [_question("8"), table_8(facts.table_8)]
    for number, (caption, figure) in enumerate(facts.images.items()):
        figures[f"ids_{number + 1}.png"] = figure
        parts.append(Picture(caption, figure, caption))
    parts += [cells_table(outcomes, facts, link), _about(facts)]
    summary["not_run"] = {o.cell.name: o.whys for o in outcomes if o.whys}
    text = _markdown(facts, headline, parts, figures)
    return Written(
        page(f"Reproduction on {facts.data}", parts, about=facts.about, headline=headline), text, summary, figures
    )


def _question(table: str) -> Prose:
    return Prose(TITLES[table], [QUESTIONS[table]], {})


class _Made(NamedTuple):
    parts: list
    figures: dict[str, Figure]
    summary: dict


def _part(
    table: str, outcomes: Sequence[Outcome], scored: Sequence[Scored], at: Mapping[int, Compared], judged: Judged, facts: Facts,
    link: str,
) -> _Made:  # fmt: skip
    """A table that measures: the question, our figures, the paper's beside them, what follows."""
    by_proxy = any(one.family == "ids" for one in scored)
    parts: list = [Prose(TITLES[table], [QUESTIONS[table], *([PROXY_NOTE] if by_proxy else [])], {})]
    letters = {k: comparison.letters() for k, comparison in at.items()}
    parts.append(recall_table(outcomes, scored, at, letters))
    figures: dict[str, Figure] = {}
    if any(not outcome.runs for outcome in outcomes):
        parts.append(missing_table(outcomes))
    if facts.locale:
        parts.append(beside_table(table, outcomes, scored, facts))
    if table == "T2" and scored:
        parts += [groups_table(scored, judged), measures_table(scored), categories_table(scored, judged)]
        if facts.diagnosis:
            parts += [Prose("Search error beside model error", [SEARCH_ERROR], {}), *diagnosis_tables(facts.diagnosis)]
    if table == "CQ" and scored:
        parts.append(beams_table(scored))
    # One run may stand at several places of a sweep; alone it says nothing of the setting.
    if table == "F5" and len({one.outcome.runs[0].manifest for one in scored}) > 1:
        figures["figure_5.png"] = pictures.sweeps(scored, at, SWEEPS)
        parts.append(Picture("Figure 5", figures["figure_5.png"], "Recall at 10 and 50 over each weight and over K; "
            "the numbers stand in the table"))  # fmt: skip
    if table == "T4" and facts.distance:
        texts = [f"{name}: {value:.3f}" for name, value in facts.distance.items()]
        parts.append(Prose("How far vectors with and without category text differ", ["; ".join(texts) + "."], {}))
    claims = sentences(table, scored, at)
    if claims:
        parts.append(Prose("What the data says to the paper's claims", claims, {}))
    summary = {
        "rows": {o.cell.row.condition.name: _row_json(o, next((s for s in scored if s.outcome is o), None), at) for o in outcomes},
        "sentences": claims,
    }  # fmt: skip
    return _Made(parts, figures, summary)


def _row_json(outcome: Outcome, scored: Scored | None, at: Mapping[int, Compared]) -> dict:
    base: dict = {
        "cell": outcome.cell.name,
        "title": outcome.cell.row.condition.title,
        "seeds": [run.seed for run in outcome.runs],
    }
    if outcome.whys:
        base["not_run"] = outcome.whys
    if scored is None:
        return base
    base |= {
        "recall": dict(zip(map(str, KS), mean_of(scored.values["recall"]))),
        "hit": dict(zip(map(str, KS), mean_of(scored.values["hit"]))),
        "mrr": mean_of(scored.values["mrr"])[0], "ndcg@10": mean_of(scored.values["ndcg"])[0],
        "interval": {str(k): list(at[k].intervals[scored.name]) for k in at},
        "by_seed": scored.by_seed.tolist(), "manifests": [run.manifest for run in outcome.runs],
        "cost": outcome.runs[0].cost, "tuned": [run.tuned for run in outcome.runs if run.tuned],
    }  # fmt: skip
    for group in ("seen", "unseen", "ids"):
        if group in scored.values:
            base[f"recall_{group}"] = dict(zip(map(str, KS), mean_of(scored.values[group])))
    if "beam_hit" in scored.values:
        for name in ("beam_hit", "beam_products"):
            base[name] = dict(zip(map(str, BEAMS), mean_of(scored.values[name])))
        base["recall_expected"] = dict(zip(map(str, KS), mean_of(scored.values["expected"])))
    return base


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
        title = outcome.cell.row.condition.title
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
            "rows that this one "
        f"is shown to find more than (Holm over all pairs of the table, p < 0.05). ± seeds: half the range of the seeds. "
        f"{len(scored[0].recall(10)) if scored else 0:,} queries."
    )  # fmt: skip
    return Table("Our figures", columns, rows, caption)


def missing_table(outcomes: Sequence[Outcome]) -> Table:
    rows = [
        [outcome.cell.row.condition.title, str(verdict(None, None, why=_why(outcome)))]
        for outcome in outcomes
        if not outcome.runs
    ]
    return Table("Without a figure", [Column("method", number=False), Column("why", number=False)], rows)


def _why(outcome: Outcome) -> str:
    return "; ".join(dict.fromkeys(outcome.whys))


def beside_table(table: str, outcomes: Sequence[Outcome], scored: Sequence[Scored], facts: Facts) -> Table:
    """paper | ours | Δ | verdict, of this locale."""
    of = {id(one.outcome): one for one in scored}
    published = facts.published.get(table.removeprefix("T"), {}).get(facts.locale, {})
    rows = []
    for outcome in outcomes:
        printed = published.get(outcome.cell.row.paper or "")
        if printed is None:
            continue
        one = of.get(id(outcome))
        intervals = bootstrap_means(one.values["recall"]) if one else [None] * len(KS)
        for k, figure, interval in zip(KS, printed, intervals):
            if figure is None:
                continue
            if interval is None:
                said = verdict(None, figure, why=_why(outcome))
                rows.append([outcome.cell.row.condition.title, f"@{k}", f"{figure:.2f}", DASH, DASH, str(said)])
                continue
            ours = Interval(*(100 * share for share in interval))
            rows.append([outcome.cell.row.condition.title, f"@{k}", f"{figure:.2f}", f"{ours.mean:.2f} "
                f"[{ours.low:.2f}, {ours.high:.2f}]", f"{ours.mean - figure:+.2f}", str(verdict(ours, figure))])  # fmt: skip
    columns = [*columns_of("method", "cut-off", "paper", "ours", "Δ"), Column("verdict", number=False)]
    caption = (
        "Recall in per cent. [OK]: the paper's figure lies within our interval, or ours is within 5 % of it; [OKish]: within 15 %; "
        "[FAIL]: further away."
    )
    return Table("Beside the paper's", columns, rows, caption)


def cost_table(scored: Sequence[Scored], comparison: Compared, said: Advice | None, hour: float | None) -> Table:
    """Which method to take, with what each costs. `hour`: the price of an hour of the machine, or None."""
    order = sorted(scored, key=lambda one: -comparison.intervals[one.name].mean)
    rows = []
    for one in order:
        interval = comparison.intervals[one.name]
        is_proxy = one.family == "ids"
        mark = (
            "take" if said and one.name == said.take else "ties with the best" if said and one.name in said.ties else ""
        )
        rows.append(
            [one.title + (" (proxy)" if is_proxy else ""), Cell([per_cent(interval.mean)], remark=_bounds(interval)),
             *_shown_cost(one), *([] if hour is None else _money(one, hour)), mark]
        )  # fmt: skip
    columns = [Column("method", number=False), Column("recall@50"), Column("training"), Column("indexing"),
               Column("ms a query"), Column("MiB read"),
               *([] if hour is None else [Column("to make it"), Column("10⁶ queries")]), Column("", number=False)]  # fmt: skip
    caption = (
        "Times are of this machine, in one process; other work on it makes them upper bounds. Training of a proxy "
        "row: IDs and the small "
        "generator. A query's time includes its encoding. "
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
    making = (one.cost("train_seconds") or 0) + (one.cost("index_seconds") or 0)
    return [f"{hour * making / 3600:,.2f}", f"{hour * (one.cost('ms_per_query') or 0) / 3.6:,.2f}"]


def _seconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def groups_table(scored: Sequence[Scored], judged: Judged) -> Table:
    names = (*QUERY_GROUPS, "seen", "unseen")
    counts: dict[str, int] = {}
    rows = []
    for one in scored:
        found = by_group(one, judged, 50)
        counts |= {name: found[name][0] for name in names}
        rows.append([one.title, *(per_cent(found[name][1]) for name in names)])
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
        rows.append([one.title, per_cent(hit[at_10]), per_cent(mrr), per_cent(ndcg),
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


def categories_table(scored: Sequence[Scored], judged: Judged) -> Table:
    found = [by_category(one.outcome.runs, judged, 50) for one in scored]
    names = list(found[0]) if found else []
    headings = [f"{name} ({found[0][name][0]})" for name in names]
    rows = [[one.title, *(per_cent(of[name][1]) for name in names)] for one, of in zip(scored, found)]
    return Table("By category", columns_of("method", *headings), rows, "Recall@50 of the products of one category at "
        "depth 1; in brackets the queries that ask for one.")  # fmt: skip


def table_1(facts: Facts) -> Table:
    names = {
        "documents": "products", "train_queries": "train queries", "train_pairs": "train pairs",
        "test_queries": "test queries", "test_pairs": "test pairs",
    }  # fmt: skip
    rows = [[facts.data, *(f"{facts.table_1[name]:,}" for name in names)]]
    for locale in PAPER_LOCALES if facts.locale is None else (facts.locale,):
        rows.append([f"ESCI-{locale}, the paper's", *(f"{number:,}" for number in facts.published["1"][locale])])
    return Table("Counts", columns_of("data", *names.values()), rows, "Ours: pairs from the relevance on "
        "that teaches (train) or counts (test).")  # fmt: skip


def table_7(outcomes: Sequence[Outcome], facts: Facts) -> Table:
    printed = {**facts.published["7"], "cat_id2_256": facts.published["7"]["cat_id2"]}
    rows = []
    for outcome in outcomes:
        name = outcome.cell.row.paper
        costs = [run.cost for run in outcome.runs if run.cost]
        if not costs and name not in printed:
            continue
        hours = printed.get(name)
        mean = sum(cost["train_seconds"] for cost in costs) / len(costs) if costs else None
        parts = [
            _seconds(sum(cost[key] for cost in costs) / len(costs)) if costs and key in costs[0] else DASH
            for key in ("ids_seconds", "generator_seconds")
        ]
        why = "" if costs else str(verdict(None, None, why=_why(outcome)))
        printed_hours = f"{hours:.1f} h" if isinstance(hours, float) else DASH
        rows.append([f"{outcome.cell.row.condition.title} {why}".strip(), printed_hours, _seconds(mean), *parts])
    columns = columns_of("method", "paper: one A100 of 80 GB", "ours: all training", "of it IDs", "of it the generator")
    return Table("Training time", columns, rows, "Not to be compared across columns: other data, machine and "
        "generator (GenRet: eight A100).")  # fmt: skip


def table_8(examples: Sequence[Mapping[str, str]]) -> Table:
    table = examples_table(examples)
    columns = [*table.columns[:2], Column("CAT-ID² (ours)", number=False), Column("TIGER", number=False)]
    return table._replace(title="IDs", columns=columns[: len(table.columns)])


def cells_table(outcomes: Sequence[Outcome], facts: Facts, link: str) -> Table:
    """Every cell with its manifests and the command that remakes it."""
    rows = []
    for outcome in outcomes:
        state = str(verdict(None, None, why=_why(outcome))) if outcome.whys else ""
        linked = [
            Link(f"seed {run.seed}: {run.manifest.split('/')[2]}", link + run.manifest if link else "")
            for run in outcome.runs
        ]
        cell = linked[0] if len(linked) == 1 else linked if linked else ""
        rows.append([outcome.cell.name, cell, state, f"{facts.command} --cell {outcome.cell.name}"])
    columns = [
        Column(name, number=False) for name in ("cell", "manifests", "without a figure", "the command that remakes it")
    ]
    return Table("Every cell", columns, rows, "A manifest lies in the store as artifacts/cell/KEY/manifest.json, "
        "beside its ranked lists.")  # fmt: skip


def _about(facts: Facts) -> Prose:
    return Prose(
        "How this was measured",
        [
            "Recall@k is the share of a query's relevant products among the first k, averaged over queries; it is not "
                "a hit rate. Every method "
            "returns up to 100 products. Equal scores stand in the order of product ids; an ID that products share "
                "takes as many ranks as it "
            "has products. What is not judged counts as not relevant, so figures are low, and methods like those that "
                "chose what was judged are "
            "favoured.",
            "Settings chosen by the data (k1, b, the weight of a fusion) were chosen on the validation split. A "
                "method with seeds enters each "
            "comparison by the mean over its seeds, query by query; its interval says nothing of another training, "
                "the seeds' range does.",
        ],
        {"source of the paper's figures": facts.published["source"]},
    )  # fmt: skip


def _markdown(facts: Facts, headline: Headline | None, parts: Sequence, figures: Mapping[str, Figure]) -> str:
    names = {id(figure): name for name, figure in figures.items()}
    blocks = [f"# Reproduction on {facts.data}\n"]
    if headline:
        blocks.append(f"**{headline.sentence}**\n")
    blocks.append("".join(f"- {name}: {text}\n" for name, text in facts.about.items()))
    for part in parts:
        if isinstance(part, Picture):
            blocks.append(f"![{part.says or part.caption}]({names[id(part.figure)]})\n")
        elif isinstance(part, Prose):
            blocks.append(f"## {part.heading}\n")
            dash, between = ("- ", "") if part.heading.startswith("What the data says") else ("", "\n")
            blocks.append(between.join(f"{dash}{text}\n" for text in part.paragraphs))
            if part.terms:
                blocks.append("".join(f"- {name}: {text}\n" for name, text in part.terms.items()))
        else:
            blocks.append(markdown([part]))
    return "\n".join(blocks)
