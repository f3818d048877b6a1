"""The closing figures of a run, for a terminal (100 columns) and for Markdown; pure formatting of the job's JSON.

A part whose figures are absent is left out, so the shorter JSON of an evaluation alone prints too. A missing number is
a dash: an empty group of queries has no recall, and 0 would claim one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from catid2_ray.docid import LEVEL_LETTERS

TABLE_WIDTH = 72  # columns; one width, so that the tables stand in one column
RECALLS = {"recall": "all", "recall_seen": "seen", "recall_unseen": "unseen"}


class Section(NamedTuple):
    """One table as text: the first column is a label, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]


def sections(figures: Mapping) -> list[Section]:
    """The report's tables, in order: the catalogue, the codes, recall, time and memory.

    `figures`: the job's JSON; keys release, documents, collision_rate_before (0 to 1),
    duplicates_after, codes_used, codes_per_level, recall, recall_seen, recall_unseen, seconds (stage → s),
    peak_memory_bytes; all optional.
    """
    parts = [_catalogue(figures), _codes(figures), _recall(figures), _cost(figures)]
    return [part for part in parts if part.rows]


def closing_table(figures: Mapping) -> Group:
    """The sections as rich tables, to be printed by a console of 80 columns or more."""
    tables = []
    for section in sections(figures):
        table = Table(
            title=section.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, min_width=TABLE_WIDTH
        )
        for number, name in enumerate(section.header):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables)


def markdown(figures: Mapping) -> str:
    """The sections as Markdown tables under third-level headings, ending in a newline."""
    blocks = []
    for title, header, rows in sections(figures):
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
    return Section("Recall at product level" + (f" (queries: {asked})" if asked else ""), header, rows)


def _cost(figures: Mapping) -> Section:
    seconds = figures.get("seconds") or {}
    rows = [[stage.replace("_", " "), f"{value:,.1f} s"] for stage, value in seconds.items()]
    if seconds:
        rows.append(["all stages", f"{sum(seconds.values()):,.1f} s"])
    if figures.get("peak_memory_bytes") is not None:
        rows.append(["peak memory", f"{figures['peak_memory_bytes'] / 2**30:,.2f} GiB"])
    return Section("Time and memory", ["stage", "figure"], rows)
