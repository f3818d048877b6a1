"""What a person sees of long work at several widths, and what a log gets of it."""

import io
import os
from types import SimpleNamespace

import pytest
from rich.console import Console

from catid2_ray.artifacts.stages import STAGES
from catid2_ray.config import Recipe
from catid2_ray.on_ray.machine import cluster, progress
from catid2_ray.on_ray.pipeline import planned

NOTE = "epoch 3 loss 1.500 lr 1.0e-03 200/s score 0.2500"


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    one = Clock()
    monkeypatch.setattr(progress, "time", one)
    return one


def drawn(bar: progress.Bar, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(bar)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_bar_shows_stage_share_time_left_count_and_note_at_every_width(width, clock):
    with progress.at_position("7/12"):
        bar = progress.Bar("training the generator", 5000, "steps", True)
    clock.now = 60.0  # workers start
    bar.show(1000)  # from a checkpoint
    clock.now = 70.0
    bar.show(2000, NOTE)
    first, second = drawn(bar, width)
    assert len(first) <= width and len(second) <= width
    assert first.startswith("stage 7 of 12  train") and " 40%" in first and first.rstrip().endswith("0:30 left")
    assert first.count("━") >= 4
    assert second.startswith("2,000 of 5,000 steps  100 a second  epoch 3 loss")
    assert width < 80 or "training the generator" in first
    assert width < 100 or NOTE in second


def test_before_there_is_a_rate_the_bar_says_how_long_it_has_been(clock):
    bar = progress.Bar("embedding products", 300, "products", True)
    clock.now = 3725.0
    bar.show(0)
    first, second = drawn(bar, 80)
    assert first.startswith("embedding products") and first.rstrip().endswith("1:02:05 so far")
    assert second.strip() == "0 of 300 products"


def test_time_left_runs_down_between_reports_and_slow_work_is_counted_by_the_minute(clock):
    bar = progress.Bar("answering", 10, "queries", True)
    for clock.now, done in ((20.0, 1), (40.0, 2)):
        bar.show(done)
    clock.now = 45.0
    assert bar.seconds_left() == 155.0
    assert "3.0 a minute" in drawn(bar, 80)[1]


def test_workers_that_end_their_first_parts_together_give_no_rate(clock):
    bar = progress.Bar("embedding products", 54_667, "products", True)
    for clock.now, done in ((40.0, 4096), (40.01, 8192)):
        bar.show(done)
    assert bar.rate() is None and bar.seconds_left() is None
    clock.now = 80.0
    bar.show(12_288)
    assert bar.rate() == pytest.approx(204.8)


def test_nothing_to_do_is_a_full_bar(clock):
    assert "100%" in drawn(progress.Bar("making examples", 0, "pairs", True), 80)[0]


def test_a_log_gets_a_line_after_a_tenth_of_the_work_and_never_twice_the_same(clock, capsys):
    bar = progress.Bar("training the generator", 1000, "steps", False)
    for clock.now, done in ((11.0, 0), (400.0, 0), (401.0, 50), (402.0, 150), (405.0, 260), (411.0, 340), (450.0, 400),
                            (900.0, 401), (1500.0, 401)):  # fmt: skip
        bar.show(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("done=")[1].split()[0] for line in lines] == ["50", "340", "401"]
    assert lines[1] == (
        "event=progress stage=training_the_generator done=340 total=1000 unit=steps per_second=29 seconds_left=23 note=-"
    )


def test_where_no_person_looks_on_there_is_no_bar_and_no_colour(monkeypatch, capsys):
    for settings in ({"force_terminal": False}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}):
        monkeypatch.setattr(progress, "Console", lambda stderr, kept=settings: Console(stderr=stderr, **kept))
        with progress.bar("embedding products", 3, "products") as bar:
            bar.advance(3)
        assert not bar.is_terminal
    assert capsys.readouterr() == ("", "")


def test_one_notice_of_ray_is_dropped_and_what_else_is_said_is_not(capfd):
    with pytest.raises(ValueError, match="no Ray"), cluster.without_notice():
        os.write(
            2, b"logging.cc: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\nanother line\n"
        )
        os.write(2, b"the last\n")
        raise ValueError("no Ray")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "another line\nthe last\nafter\n"


def test_the_stages_of_a_recipe_are_counted():
    recipe = Recipe.model_validate(RECIPE)
    stages = planned(recipe, "evaluation")
    assert stages[0] == "catalog" and stages[-1] == "evaluation"
    assert not {"prompts", "aligned"} & set(stages)
    without = recipe.model_copy(update={
        "embedding": recipe.embedding.model_copy(update={"adapter": "none"}),
        "quantizer": SimpleNamespace(query_item=0.0),
    })  # fmt: skip
    assert planned(without, "ids") == ("catalog", "pairs", "embeddings", "quantizer", "ids")
    assert set(planned(recipe, "evaluation")) <= set(STAGES)


RECIPE = {"name": "shelves", "store": "store", "catalog": {"root": "tables"}}
