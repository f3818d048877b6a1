"""What the manual and the pages of benchmarks promise, held against the code that they speak of."""

import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest

from catid2_ray.artifacts.stages import STAGES
from catid2_ray.config.serving import EvaluationRecipe

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("harness", ROOT / "benchmarks" / "harness.py")
harness = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(harness)


def test_the_manual_names_the_jobs_in_the_order_of_the_stages():
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    sentence = re.search(r"Each stage also runs alone, in this order:(.*?`)\.\s", text, re.DOTALL)[1]
    jobs = list(dict.fromkeys(stage.job for stage in STAGES.values()))
    assert re.findall(r"`jobs\.(\w+)`", sentence) == [*jobs, "publish"]
    assert all((ROOT / "jobs" / f"{job}.py").exists() for job in jobs)


def test_the_manual_explains_every_method_of_the_evaluation():
    page = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
    methods = get_args(get_args(EvaluationRecipe.model_fields["methods"].annotation)[0])
    assert methods and [name for name in methods if f"\n- `{name}`: " not in page] == []


def test_rendering_a_page_keeps_what_people_wrote(tmp_path):
    page = tmp_path / "beam.md"
    harness.write_page(page, "# First\n\n| a |\n")
    assert page.read_text() == f"# First\n\n| a |\n\n{harness.KEPT}"
    page.write_text(page.read_text() + "\n## What it says\n\nMuch.\n")
    harness.write_page(page, "# Second\n")
    assert page.read_text() == f"# Second\n\n{harness.KEPT}\n## What it says\n\nMuch.\n"


def test_a_page_without_the_line_is_not_overwritten(tmp_path):
    page = tmp_path / "mine.md"
    page.write_text("my figures\n")
    with pytest.raises(SystemExit, match="choose another --out"):
        harness.write_page(page, "# Second\n")
    assert page.read_text() == "my figures\n"


def test_every_page_that_a_benchmark_writes_has_the_line_once():
    pages = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    written = [page for page in pages if re.search(r"^Written by `(benchmarks/|make )", page.read_text(), re.MULTILINE)]
    assert len(written) == len(pages) - 1, "quantizer.md alone is written by people"
    assert [page.name for page in written if page.read_text().count(harness.KEPT) != 1] == []


def test_the_runs_take_turns():
    calls = []
    taken = harness.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, turns=3)
    assert calls == list("ababab") and {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3}


def test_a_benchmarks_table_shows_numbers_as_people_read_them():
    text = harness.table(["way", "n", "s"], [["ours | fast", 12000, 1.23456], ["theirs", True, None]])
    assert text == "| way | n | s |\n| --- | ---: | ---: |\n| ours \\| fast | 12,000 | 1.235 |\n| theirs | yes | – |\n"
    assert harness.spread([0.1, None, 0.3], ".2f") == "0.20 ± 0.10" and harness.spread([None], ".2f") == "–"
