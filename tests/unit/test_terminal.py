"""What the terminal shows of data: titles, ids and queries as they are, whatever brackets, colons and bytes they hold."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from catid2_ray import cli
from catid2_ray.cli.options import json_writer
from catid2_ray.errors import EncoderError, InputError, Interrupted
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


def test_a_release_that_is_current_is_a_success_though_nothing_can_be_asked_here(monkeypatch, capsys, tmp_path):
    """Its encoder may be on the nodes that evaluated it and will serve it, and not where the command waits."""
    figures = {"release": "r-1", "changes_to_carry": 0}
    outcome = SimpleNamespace(figures=figures, made=["ids"], trial=None, release=SimpleNamespace(name="r-1"))
    loaded = SimpleNamespace(store=str(tmp_path), sample_queries=("oak",))
    monkeypatch.setattr(cli.look, "current_retriever", lambda store: raising(EncoderError("no such model")))
    monkeypatch.setattr("catid2_ray.evaluation.report.closing_tables", lambda figures: [])
    cli._run_and_show(lambda recipe: outcome, loaded, str(tmp_path / "figures.json"))
    shown = capsys.readouterr().out
    assert "Release r-1 is current" in shown and "Answers from it cannot be shown here: no such model" in shown
    assert json.loads((tmp_path / "figures.json").read_text()) == figures


def raising(error):
    raise error


@pytest.mark.parametrize("place", ["no/such/folder/figures.json", "folder", ""])
def test_figures_that_could_not_be_written_are_refused_before_the_work(place, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no file can be written there: name one in a folder that exists"):
        cli._run_and_show(lambda recipe: pytest.fail("it worked for hours"), None, place and str(tmp_path / place))


def test_a_submitted_job_writes_no_figures_into_a_copy_that_ray_deletes(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(InputError, match="name an absolute path that outlives it, or s3://"):
        json_writer("figures.json")
    monkeypatch.chdir(tmp_path)
    json_writer("releases.json", submitted=False)([])  # of a command that needs no Ray
    json_writer(str(tmp_path / "figures.json"))([1])
    assert (tmp_path / "figures.json").read_text() == "[\n 1\n]\n"
