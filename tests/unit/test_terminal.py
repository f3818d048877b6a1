"""What the terminal shows of data: titles, ids and queries as they are, whatever brackets, colons and bytes they hold."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from catid2_ray import cli
from catid2_ray.errors import InputError, Interrupted
from catid2_ray.evaluation.report import closing_tables
from catid2_ray.evaluation.tables import terminal
from catid2_ray.on_ray.machine import progress

TITLE, ID, QUERY = "[oak] shelf [/x] :key: [bold]wide", "[red]p-1[/]", "shelf [/b] [oak]"


def test_an_answer_shows_title_id_and_query_as_they_are(monkeypatch, capsys):
    hit = SimpleNamespace(
        product_id=ID, docid_text="A1", title=TITLE, logp=-1.0, score=-1.0, dense=None, lexical=None
    )  # fmt: skip
    retriever = SimpleNamespace(retrieve=lambda *_, **__: [[hit]], release="r")
    monkeypatch.setattr(cli.look, "current_retriever", lambda store: retriever)
    cli._answer(cli._console(150), None, QUERY, k=1)
    shown = capsys.readouterr().out
    assert TITLE in shown and ID in shown and f"“{QUERY}”" in shown


@pytest.mark.parametrize(
    "why, words", [("search", "beams of this release hold no more"), ("catalogue", "there are no more that the filter")]
)
def test_an_answer_says_that_fewer_products_were_found_than_asked_for(why, words, monkeypatch, capsys):
    hit = SimpleNamespace(product_id="p", docid_text="A1", title="oak", logp=-1.0, score=-1.0, dense=None, lexical=None)
    retriever = SimpleNamespace(retrieve=lambda *_, **__: [[hit]], release="r", why_fewer=lambda *_, **__: why)
    monkeypatch.setattr(cli.look, "current_retriever", lambda store: retriever)
    for k in (1, 3):
        cli._answer(cli._console(100), None, QUERY, k=k, expression={"column": "price", "to": 3})
        assert ("1 of the 3 products asked for: " in (shown := capsys.readouterr().out) and words in shown) == (k == 3)


def test_a_closing_table_shows_names_as_they_are(capsys):
    figures = {"release": "[oak]", "documents": 3, "seconds": {"[/x]": 1.0}}
    cli._console(150).print(terminal(closing_tables(figures)))
    shown = capsys.readouterr().out
    assert "[oak]" in shown and "[/x]" in shown


def test_a_bar_shows_its_label_and_note_as_they_are(monkeypatch, capsys):
    terminal_ = {"force_terminal": True, "force_interactive": True, "width": 150}
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=sys.stdout, **terminal_))
    with progress.bar("making [oak]", 3, "rows") as bar:
        bar.advance(1, "of [/x]")
    shown = capsys.readouterr().out
    assert "making [oak]" in shown and "of [/x]" in shown


def test_bytes_that_are_not_utf_8_are_one_message():
    done = subprocess.run(
        [sys.executable, "-m", "catid2_ray.cli", "search", b"oak \xff shelf"], cwd=Path(__file__).parents[2],
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 3 and b"Traceback" not in done.stderr
    assert b"InputError: argument 2 is not UTF-8: b'oak \\xff shelf'" in done.stderr


@pytest.mark.parametrize(
    "error, code", [(InputError("half \ud83d"), 3), (KeyboardInterrupt(), 130), (Interrupted("x", signal=15), 143)]
)
def test_every_end_has_its_exit_code(error, code, capsys, monkeypatch):
    def end():
        raise error

    monkeypatch.setattr(cli.os, "_exit", sys.exit)  # a job that was stopped does not wait for libraries to go
    with pytest.raises(SystemExit) as exit:
        cli.guarded(end)
    assert exit.value.code == code and capsys.readouterr().err.strip()
