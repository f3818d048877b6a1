"""The report: the paper's tables and figures in its layout, as one HTML page, Markdown and JSON.

The first screen says which method to take for this catalogue and what each costs. Where the data set is the paper's, a second table
puts its figures beside ours with a verdict each. Every sentence of a difference is computed, and says no more than its interval.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from catid2_ray.evaluation.page import Headline, Picture, Prose, page
from catid2_ray.evaluation.report import diagnosis_tables
from catid2_ray.evaluation.reproduce import pictures
from catid2_ray.evaluation.reproduce.conditions import SWEEPS
from catid2_ray.evaluation.reproduce.measures import BEAMS, KS, mean_of
from catid2_ray.evaluation.reproduce.scores import (
    Finding,
    Judged,
    Outcome,
    Scored,
    advice,
    by_category,
    by_group,
    compared,
    findings,
    score,
)
from catid2_ray.evaluation.reproduce.significance import Compared
from catid2_ray.evaluation.reproduce.tables import (
    Beside,
    Facts,
    Training,
    across_table,
    beams_table,
    beside_table,
    besides,
    categories_table,
    cells_table,
    cost_table,
    counts,
    groups_table,
    measures_table,
    missing_table,
    recall_table,
    table_1,
    table_7,
    table_8,
    trainings,
)
from catid2_ray.evaluation.reproduce.texts import PROXY_NOTE, QUESTIONS, SEARCH_ERROR, TITLES
from catid2_ray.evaluation.tables import markdown

__all__ = ["Facts", "Written", "write"]

SHOWN_AT = (10, 50)  # cut-offs with intervals, letters and sentences


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
        parts += [cost_table(scores["T2"], at["T2"][50], said, facts.hour), Picture("What each method finds",
            figures["overview.png"], "Recall at 50 of every method with its interval, drawn from the table above")]  # fmt: skip
    if said:
        headline = Headline("good" if said.take == said.best else "look", said.sentence)
        summary["advice"] = said._asdict()
    if "1" in tables:
        parts += [_question("1"), table_1(facts)]
        summary["tables"]["1"] = counts(facts)
    for table in ("T2", "T3", "T4", "T5", "T6", "F5", "CQ", "CT"):
        if table not in by_table:
            continue
        made = _part(table, by_table[table], scores[table], at.get(table, {}), judged, facts)
        parts += made.parts
        figures |= made.figures
        summary["tables"][table] = made.summary
    if "7" in tables and "T2" in by_table:
        parts += [_question("7"), table_7(times := trainings(by_table["T2"], facts))]
        summary["tables"]["7"] = {one.outcome.cell.row.condition.name: _training_json(one) for one in times}
    if "8" in tables and facts.table_8:
        parts += [_question("8"), table_8(facts.table_8)]
        summary["tables"]["8"] = [dict(example) for example in facts.table_8]
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
) -> _Made:  # fmt: skip
    """A table that measures: the question, our figures, the paper's beside them, what follows."""
    by_proxy = any(one.family == "ids" for one in scored)
    parts: list = [Prose(TITLES[table], [QUESTIONS[table], *([PROXY_NOTE] if by_proxy else [])], {})]
    letters = {k: comparison.letters() for k, comparison in at.items()}
    parts.append(recall_table(outcomes, scored, at, letters))
    figures: dict[str, Figure] = {}
    if table == "T2" and facts.others:
        parts.append(across_table(scored, facts))
    if any(not outcome.runs for outcome in outcomes):
        parts.append(missing_table(outcomes))
    of_paper = besides(table, outcomes, scored, facts) if facts.locale else []
    if of_paper:
        parts.append(beside_table(table, of_paper))
    split: dict[str, list] = {}
    if table == "T2" and scored:
        split = {"groups": [by_group(one, judged, 50) for one in scored],
                 "categories": [by_category(one.outcome.runs, judged, 50) for one in scored]}  # fmt: skip
        parts += [
            groups_table(scored, split["groups"]),
            measures_table(scored),
            categories_table(scored, split["categories"]),
        ]
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
    found = findings(table, scored, at)
    if found:
        parts.append(Prose("What the data says to the paper's claims", [str(one) for one in found], {}))
    return _Made(parts, figures, _table_json(outcomes, scored, at, of_paper, split, found))


def _table_json(
    outcomes: Sequence[Outcome], scored: Sequence[Scored], at: Mapping[int, Compared], of_paper: Sequence[Beside],
    split: Mapping[str, Sequence[Mapping]], found: Sequence[Finding | str],
) -> dict:  # fmt: skip
    """`split`: "groups" and "categories" → of each method in `scored`, name → how many queries and recall@50."""
    of = {id(one.outcome): one for one in scored}
    rows = {outcome.cell.row.condition.name: _row_json(outcome, of.get(id(outcome)), at) for outcome in outcomes}
    for kind, of_methods in split.items():
        for one, of_method in zip(scored, of_methods):
            rows[one.name][kind] = {name: recall for name, (_, recall) in of_method.items()}
    for one in of_paper:
        rows[one.outcome.cell.row.condition.name].setdefault("paper", {})[str(one.k)] = _beside_json(one)
    made = {"rows": rows, "sentences": [str(one) for one in found],
            "claims": [one.as_json() for one in found if isinstance(one, Finding)]}  # fmt: skip
    return made | {f"{kind}_queries": {name: queries for name, (queries, _) in of_methods[0].items()}
                   for kind, of_methods in split.items()}  # fmt: skip


def _beside_json(one: Beside) -> dict:
    """Shares of 1, as all recall here; the paper prints two digits of per cent."""
    made = {"printed": round(one.printed / 100, 6), "verdict": one.verdict.state}
    return made if one.difference is None else made | {"difference": round(one.difference / 100, 6)}


def _training_json(one: Training) -> dict:
    """What is not known is left out."""
    known = {"paper_hours": one.hours, "train_seconds": one.train_seconds, "ids_seconds": one.ids_seconds,
             "generator_seconds": one.generator_seconds}  # fmt: skip
    return {name: value for name, value in known.items() if value is not None}


def _row_json(outcome: Outcome, scored: Scored | None, at: Mapping[int, Compared]) -> dict:
    base: dict = {
        "cell": outcome.cell.name,
        "title": outcome.label,
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
