"""One description of a table, and one renderer for each medium: here a terminal and Markdown, in `page.py` HTML.

A missing number is a dash: an empty group of queries has no recall, and 0 would claim one. Every text from outside is escaped.
"""

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as TerminalTable
from rich.text import Text

DASH = "–"
TERMINAL_WIDTH = 72  # columns at least; one width, so that tables below each other stand in one column


def per_cent(share: float | None) -> str:
    """A share as a text of per cent, with one digit."""
    return DASH if share is None else f"{100 * share:.1f}"


class Quantity(NamedTuple):
    """A figure that tables show: its key in the JSON, heading, format, what it says, the better direction (0 = none)."""

    key: str
    heading: str
    form: str
    reading: str = ""
    better: int = 0


class Column(NamedTuple):
    """`number`: set to the right, in one line; `whole`: in one line as well. `reading`: what the column counts."""

    heading: str
    number: bool = True
    reading: str = ""
    whole: bool = False


class Cell(NamedTuple):
    """Several texts in one cell, such as a figure per level. For each its ± ("" = none), and whether it is the column's best."""

    texts: Sequence[str]
    half_range: Sequence[str] = ()
    best: Sequence[bool] = ()
    remark: str = ""

    @property
    def places(self) -> list[tuple[str, str, bool]]:
        """(text, ±, is-best) of every place."""
        count = len(self.texts)
        return list(zip(self.texts, self.half_range or [""] * count, self.best or [False] * count))


class Table(NamedTuple):
    """The first column is a label. A row has a text or a Cell for every column; `caption` stands below."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""


def columns_of(label: str, *headings: str) -> list[Column]:
    """A column of labels and columns of numbers."""
    return [Column(label, number=False), *map(Column, headings)]


def shown(value, form: str = "") -> str:
    """A number, or the numbers of a list beside each other, as text."""
    if isinstance(value, (list, tuple)):
        return " ".join(shown(part, form) for part in value) or DASH
    return DASH if value is None else format(value, form)


def terminal(tables: Sequence[Table]) -> Group:
    """The tables for a console of 80 columns or more (as many as the numbers need)."""
    drawn = []
    for table in tables:
        box = TerminalTable(
            title=Text(table.title) if table.title else None, title_justify="left", title_style="bold", box=SIMPLE_HEAD,
            min_width=TERMINAL_WIDTH, padding=0, caption=table.caption or None,
        )  # fmt: skip
        for column in table.columns:
            justify, no_wrap = "right" if column.number else "left", column.number or column.whole
            box.add_column(Text(column.heading), justify=justify, no_wrap=no_wrap, overflow="fold")
        for row in table.rows:
            box.add_row(*(_terminal_cell(cell, column.number) for cell, column in zip(row, table.columns)))
        drawn.append(box)
    return Group(*drawn)


def _terminal_cell(cell: str | Cell, number: bool) -> Text:
    """Of a Cell: `.51 .48 .44`, and on a second line the widest ± that is not 0, and the remark; no leading zeros."""
    if isinstance(cell, str):
        return Text(cell)
    reach = widest(cell.half_range)
    under = " ".join(filter(None, (f"±{reach}" if reach and size_of(reach) else "", cell.remark)))
    text = " ".join(cell.texts) + (f"\n{under}" if under else "")
    if number:
        text = re.sub(r"(?<![\d,.])0\.(?=\d+(?!\d*%))", ".", text) or DASH
    return Text(text, style="bold" if cell.best and all(cell.best) else "")


def size_of(text: str) -> float:
    """How large the number is that a text shows, whatever its sign; 0 for a dash."""
    return abs(float(text.strip("%" + DASH).replace(",", "") or 0))


def widest(texts: Sequence[str]) -> str:
    """The text of the number that is largest in size; "" of none."""
    return max(texts, key=size_of, default="")


def markdown(tables: Sequence[Table]) -> str:
    """Markdown tables, each under its title as a third-level heading, with its caption and the readings of its columns below."""
    blocks = []
    for table in tables:
        lines = [[_escaped(column.heading) for column in table.columns]]
        lines.append(["---:" if column.number else "---" for column in table.columns])
        lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
        readings = [f"- {column.heading}: {column.reading}\n" for column in table.columns if column.reading]
        blocks.append(
            (f"### {table.title}\n\n" if table.title else "")
            + "".join("| " + " | ".join(line) + " |\n" for line in lines)
            + (f"\n{table.caption}\n" if table.caption else "")
            + "".join(["\n", *readings] if readings else [])
        )
    return "\n".join(blocks)


def _markdown_cell(cell) -> str:
    """Of a text or a Cell; of the page's cells, links and IDs with a marked beginning, their text."""
    if isinstance(cell, str):
        return _escaped(cell)
    if isinstance(cell, list):
        return "<br>".join(map(_markdown_cell, cell))
    if hasattr(cell, "address"):
        return f"[{_escaped(cell.text)}]({cell.address})" if cell.address else _escaped(cell.text)
    if hasattr(cell, "beginning"):
        return f"**{_escaped(cell.beginning)}**{_escaped(cell.rest)}" if cell.beginning else _escaped(cell.rest)
    parts = [
        (f"**{_escaped(text)}**" if best else _escaped(text)) + (f" ±{reach}" if reach else "")
        for text, reach, best in cell.places
    ]
    return " ".join(filter(None, ("<br>".join(parts) or DASH, _escaped(cell.remark))))


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")
