"""The figures of a run or a comparison as text, for a terminal (100 columns), Markdown and pages; a mean over seeds at most.

A part whose figures are absent is left out, so the shorter JSON of an evaluation alone prints too. A missing number is
a dash: an empty group of queries has no recall, and 0 would claim one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from catid2_ray.docid import LEVEL_LETTERS

TABLE_WIDTH = 72  # columns; one width, so that the tables stand in one column
RECALLS = {"recall": "all", "recall_seen": "seen", "recall_unseen": "unseen"}


class Section(NamedTuple):
    """One table as text: the first column is a label, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]


def sections(figures: Mapping) -> list[Section]:
    """The report's tables, in order: the catalogue, what changed since the release before, the codes, recall, time and memory.

    `figures`: the job's JSON; keys release, documents, number, base, ledger, churn, collision_rate_before (0 to 1),
    duplicates_after, codes_used, codes_per_level, recall, recall_seen, recall_unseen, not_evaluated (why), set_aside (table →
    rows, of, reasons, first, at), seconds (stage → s), peak_memory_bytes; all optional.
    """
    parts = [
        _catalogue(figures),
        _churn(figures),
        _codes(figures),
        _recall(figures),
        _set_aside(figures),
        _cost(figures),
    ]
    return [part for part in parts if part.rows]


def closing_table(figures: Mapping) -> Group:
    """The sections as rich tables, to be printed by a console of 80 columns or more."""
    return rich_tables(sections(figures))


def rich_tables(parts: Sequence[Section]) -> Group:
    tables = []
    for section in parts:
        table = Table(title=Text(section.title, "bold"), title_justify="left", box=SIMPLE_HEAD, min_width=TABLE_WIDTH)
        for number, name in enumerate(section.header):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))  # a cell is data, never markup
        tables.append(table)
    return Group(*tables)


def markdown(figures: Mapping) -> str:
    """The sections as Markdown tables under third-level headings, ending in a newline."""
    return markdown_tables(sections(figures))


def markdown_tables(parts: Sequence[Section]) -> str:
    blocks = []
    for title, header, rows in parts:
        lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)]), *(_row(row) for row in rows)]
        blocks.append(f"### {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(blocks)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _catalogue(figures: Mapping) -> Section:
    lines = (
        ("release", "release", ""),
        ("documents", "documents", ",d"),
        ("collision rate before resolution", "collision_rate_before", ".2%"),
        ("duplicate IDs after", "duplicates_after", ",d"),
    )
    rows = [[label, _number(figures[key], form)] for label, key, form in lines if key in figures]
    return Section("Catalogue and IDs", ["", "figure"], rows)


def _churn(figures: Mapping) -> Section:
    """Against the release that was built on: products by status, and how many lost their first 1, 2, … L tokens."""
    churn, base = figures.get("churn"), figures.get("base")
    if not base:
        return Section("", [], [])
    counts = ", ".join(f"{name} {figures['ledger'][name]:,}" for name in ("kept", "new", "moved", "retired"))
    title = f"Since release {base} (products: {counts})"
    if not churn:
        return Section(title, ["", "figure"], [["IDs of this kind or with other levels are not followed", ""]])
    after, before = churn["after"], churn.get("before")
    rows = [["first tokens changed", *(_number(share, ".1%") for share in after["prefix_churn"])]]
    if before:
        rows.append(["… without realignment", *(_number(share, ".1%") for share in before["prefix_churn"])])
    rows.append(["IDs that name another product", _number(after["addresses_reused"], ",d"), *[""] * (len(rows[0]) - 2)])
    return Section(title, ["of products in both", *(str(m + 1) for m in range(len(after["prefix_churn"])))], rows)


def _codes(figures: Mapping) -> Section:
    rows = []
    for level, used in enumerate(figures.get("codes_used", ())):
        offered = (figures.get("codes_per_level") or [None] * (level + 1))[level]
        share = used / offered if offered else None
        rows.append([LEVEL_LETTERS[level], _number(used, ",d"), _number(offered, ",d"), _number(share, ".1%")])
    return Section("Codes in use", ["level", "used", "of", "share"], rows)


def _recall(figures: Mapping) -> Section:
    groups = {key: name for key, name in RECALLS.items() if figures.get(key)}
    ks = sorted({int(k) for key in groups for values in figures[key].values() for k in values})
    rows = [
        [f"{name}: {method}", *(_number(values.get(str(k)), ".3f") for k in ks)]
        for key, name in groups.items()
        for method, values in figures[key].items()
    ]
    header = ["products: method", *(f"@{k}" for k in ks)]
    counts = figures.get("queries") or {}
    asked = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    if figures.get("not_evaluated"):
        return Section("Nothing was evaluated", ["", "figure"], [[figures["not_evaluated"], "–"]])
    return Section("Recall at product level" + (f" (queries: {asked})" if asked else ""), header, rows)


def _set_aside(figures: Mapping) -> Section:
    """What the door kept out: by table and reason how many rows, the first of them, and where all of them lie."""
    tables, rows = figures.get("set_aside") or {}, []
    for table, found in tables.items():
        rows.append([f"{table}: {found['rows']:,} of {found['of']:,}", ""])
        rows += [[f"  {reason}", f"{count:,}"] for reason, count in sorted(found["reasons"].items())]
        rows += [[f"  such as {first}", ""] for first in found["first"][:3]]
    where = "".join(sorted({found["at"] for found in tables.values()}))
    return Section(f"Set aside (the rows lie in {where})", ["", "rows"], rows)


def _cost(figures: Mapping) -> Section:
    seconds = figures.get("seconds") or {}
    rows = [[stage.replace("_", " "), f"{value:,.1f} s"] for stage, value in seconds.items()]
    if seconds:
        rows.append(["all stages", f"{sum(seconds.values()):,.1f} s"])
    if figures.get("peak_memory_bytes") is not None:
        rows.append(["peak memory", f"{figures['peak_memory_bytes'] / 2**30:,.2f} GiB"])
    return Section("Time and memory", ["stage", "figure"], rows)


class Column(NamedTuple):
    """One figure of `compare-ids`: its key, heading, format, the better direction (0 = none) and what it counts."""

    key: str
    heading: str
    form: str
    better: int
    reading: str


COLUMNS = (
    Column("collision_rate", "collisions", ".2%", -1, "(N − distinct IDs) / N, of N products, as the method gave them"),
    Column("shared_rate", "shared", ".2%", -1, "share of the products whose ID another product has, too"),
    Column("largest_shared", "largest", ",.0f", -1, "products in the fullest ID"),
    Column("codes_used", "codes used", ",.0f", 1, "codes that any product uses, by level"),
    Column("perplexity", "perplexity", ",.0f", 1, "exp(entropy) of the codes, by level: as many codes used evenly"),
    Column("purity", "purity", ".3f", 1, "share of products in their prefix's commonest category, by depth"),
    Column(
        "ami", "AMI", ".3f", 1, "agreement of the first h tokens with the category at depth h, corrected for chance"
    ),
    Column("ami_null", "AMI, null", ".3f", 0, "the same against permuted categories; about 0"),
    Column("seconds", "s", ",.0f", -1, "seconds to train and to assign"),
)


class Cell(NamedTuple):
    """The numbers of one kind in one column: per place of a list (one place for a scalar) mean, ± and is-best texts."""

    mean: list[str]
    half_range: list[str]
    best: list[bool]


def summarise(rows: Sequence[Mapping]) -> list[dict]:
    """One dict a kind, in the order of `rows`: `kind`, `seeds`, `verdicts` (those not healthy), `cells` key → Cell.

    A figure that no run of a kind has is an empty Cell; None is left out of the mean.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    runs = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    found = [
        {
            "kind": kind,
            "seeds": len(runs[kind]),
            "verdicts": sorted({row.get("verdict") or "healthy" for row in runs[kind]} - {"healthy"}),
            "cells": {},
        }
        for kind in kinds
    ]
    for column in COLUMNS:
        values = [_places(runs[kind], column.key) for kind in kinds]
        for summary, places in zip(found, values):
            mean = [None if not numbers else float(np.mean(numbers)) for numbers in places]
            summary["cells"][column.key] = Cell(
                ["–" if value is None else format(value, column.form) for value in mean],
                [format(np.ptp(numbers) / 2, column.form) if len(numbers) > 1 else "" for numbers in places],
                [_is_best(column, values, place, value) for place, value in enumerate(mean)],
            )
    return found


def _places(runs, key) -> list[list[float]]:
    """Per place of a list, or once for a scalar, the numbers of the runs that have one."""
    lists = [
        value if isinstance(value, (list, tuple)) else [value] for row in runs if (value := row.get(key)) is not None
    ]
    width = max(map(len, lists), default=0)
    return [
        [found[place] for found in lists if len(found) > place and found[place] is not None] for place in range(width)
    ]


def _is_best(column, values, place, value) -> bool:
    """Compared as printed, so that equal texts are best together; a kind alone is not best."""
    means = [float(np.mean(places[place])) for places in values if len(places) > place and places[place]]
    if value is None or not column.better or len(means) < 2:
        return False
    best = max(means) if column.better > 0 else min(means)
    return format(value, column.form) == format(best, column.form)


def used_columns(summaries: Sequence[Mapping]) -> list[Column]:
    """The columns in which any kind has a number."""
    return [column for column in COLUMNS if any(summary["cells"][column.key].mean for summary in summaries)]
