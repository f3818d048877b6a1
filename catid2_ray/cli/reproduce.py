"""`catid2 reproduce` (alias `paper-tables`): the paper's tables and figures on a recipe's catalogue, with honest rivals."""

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from catid2_ray.artifacts.store import Store
from catid2_ray.cli.options import RecipeOption, SetOption, console
from catid2_ray.config import Recipe
from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.redaction import redacted

_BELOW = "reports/reproduce/"


def reproduce(
    recipe: RecipeOption,
    tables: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,…",
            help="tables 1 to 8, F5 (figure 5), CQ (CQ-SID), CT (category labels); figures 3, 4, 6 come with table 8; default: all",
        ),
    ] = None,
    cell: Annotated[str | None, typer.Option(metavar="T2/tiger/us", help="this cell alone")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="runs of each method that has a seed; default: reproduce.seeds", min=1)
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="folder or s3:// prefix for the report; default: reports/reproduce in the store"
        ),
    ] = None,
    list_cells: Annotated[bool, typer.Option("--list", help="make nothing: name every cell and what it is")] = False,
    show_commands: Annotated[
        bool, typer.Option("--show-commands", help="make nothing: the command of every cell")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="make nothing: say which runs are there and which would be made")
    ] = False,
    found_only: Annotated[
        bool, typer.Option("--found-only", help="measure nothing: write the report of what was measured")
    ] = False,
    share: Annotated[
        str, typer.Option(metavar="I/N", help="measure the I-th of every N runs: N jobs on one store divide the work")
    ] = "1/1",
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="report.json of another data set, such as another locale: Table 2 of both; repeatable"
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Measure the methods of the CAT-ID² paper and their rivals on this catalogue; write its tables and figures as one report.

    Every cell is kept in the store: the same command goes on where it was stopped."""
    loaded = Recipe.load(recipe, overrides or [])
    asked, cells = _asked(loaded, tables, cell)
    settings = "".join(f" --set {shlex.quote(override)}" for override in overrides or [])
    command = redacted(f"catid2 reproduce --recipe {shlex.quote(recipe)}{settings}")
    command += f" --seeds {seeds}" if seeds else ""
    if list_cells or show_commands:
        for one in cells:
            what = one.row.condition
            missing = f"  [not run: {what.missing}]" if what.missing else ""
            print(f"{command} --cell {one.name}" if show_commands else f"{one.name}  {what.title}{missing}")
        return
    below = (
        f"{_BELOW}cells/{cell.replace('/', '-')}/" if cell else _BELOW
    )  # a cell alone leaves the whole report as it is
    _measure(loaded, cells, asked, seeds or loaded.reproduce.seeds, out, command, found_only=found_only, dry_run=dry_run,
             share=_share(share), below=below, beside=beside or [])  # fmt: skip


def _asked(loaded: Recipe, tables: str | None, cell: str | None) -> tuple[list[str], list]:
    """The tables, and their cells or the one of them."""
    from catid2_ray.evaluation.reproduce.conditions import ALSO, NAMES, TABLES, USUAL, chosen, plan
    from catid2_ray.on_ray.reproduce.report import data_of

    named = [name.strip().upper().removeprefix("T") for name in (tables or "").split(",") if name.strip()]
    of_cell = [table for table in _table_of(cell) if table in (*TABLES, *ALSO)]
    asked = named or of_cell or [*TABLES, *ALSO]
    # Whoever names a cell asks for it, whatever it takes.
    methods = NAMES if cell else loaded.reproduce.methods or USUAL
    data, locale = data_of(loaded)
    cells = plan(
        asked, methods, data, locale=locale, text=loaded.embedding.text, runs=tuple(loaded.reproduce.runs),
        confidence=loaded.reproduce.confidence, encoders=loaded.reproduce.encoders,
    )  # fmt: skip
    return asked, chosen(cells, cell)


def _table_of(cell: str | None) -> list[str]:
    """The table of a cell, such as 2 of T2/tiger/us: the others' pictures and texts may take hours to make."""
    return [cell.split("/")[0].upper().removeprefix("T")] if cell and "/" in cell else []


def _measure(
    loaded: Recipe,
    cells: list,
    tables: list[str],
    seeds: int,
    out: str | None,
    command: str,
    *,
    found_only: bool,
    dry_run: bool,
    share: tuple[int, int],
    below: str,
    beside: list[str],
) -> None:
    from catid2_ray.evaluation.tables import Column, Table, terminal
    from catid2_ray.on_ray.reproduce.report import keep, other_report, report
    from catid2_ray.on_ray.reproduce.run import reproduce as run

    folder = Store(out or loaded.store)
    others = [other_report(path) for path in beside]
    below, link = ("", "") if out else (below, "../" * below.count("/"))

    def then(reproduction):
        if dry_run:
            return None
        written = report(reproduction, tables=tables, command=command, link=link, others=others)
        return written, keep(written, reproduction, folder, below)

    try:
        if dry_run and not _begun(loaded):
            raise ArtifactError("the store is empty")
        reproduction, made = run(loaded, cells, seeds=seeds, found_only=found_only or dry_run, share=share, then=then)
    except ArtifactError as error:
        if not dry_run:
            raise
        print(f"Every cell would be made, and before them catalogue, pairs and embeddings: {error}")
        return
    rows = [
        [one.cell.name, str(len(one.runs)), "; ".join(dict.fromkeys(one.whys)) or ""] for one in reproduction.outcomes
    ]
    columns = [Column("cell", number=False, whole=True), Column("runs there"), Column("of the others", number=False)]
    console(112).print(terminal([Table("", columns, rows)]))
    print(f"Measured now: {reproduction.made}. Found: {reproduction.found}.")
    if made:
        written, where = made
        if "advice" in written.json:
            print(written.json["advice"]["sentence"])
        print(f"Tables, figures, and report.md, report.json, trec/ beside them: {where}")


def _share(text: str) -> tuple[int, int]:
    parts = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, of = map(int, parts.groups()) if parts else (0, 0)
    if not 1 <= part <= of:
        raise InputError(f"--share {text!r}: give I/N with 1 ≤ I ≤ N, such as 2/4")
    return part, of


def _begun(loaded: Recipe) -> bool:
    """Whether the store holds a catalogue at all."""
    if "://" not in loaded.store and not Path(loaded.store).exists():
        return False
    store = Store(loaded.store)
    store.check()
    return bool(store.names("artifacts"))


COMMANDS = {"reproduce": reproduce, "paper-tables": reproduce}
