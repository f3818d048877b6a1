"""What fault tests found, as a table: a plugin of pytest that `tests/conftest.py` loads.

A test asks for `fault` and calls it once for each fault that it put in; `--faults-page FILE` writes the table of the whole run,
and the terminal shows it. A test that fails has a row that says so. Rows travel to xdist's first process as properties of tests.
"""

import os
import platform
import time
from pathlib import Path

import pytest

_STARTED = time.time()
_HEAD = "| fault | times injected | outcome | seconds of work lost | rows lost |\n|---|---|---|---|---|\n"


@pytest.fixture
def fault(request):
    """`fault("a worker killed", times=1, outcome="same digests", lost_s=2.0, rows=0)`: `lost_s` is work that was done twice, or
    waiting that a run without the fault has not; `rows` what is missing of what the test expected."""

    def put(name: str, *, times: int, outcome: str, lost_s: float, rows: int = 0) -> None:
        request.node.user_properties.append(("fault", [name, times, outcome, round(lost_s, 1), rows]))
        assert rows == 0, f"{name}: {rows} rows lost"

    return put


def pytest_runtest_setup(item):
    if item.get_closest_marker("faults"):
        item.user_properties.append(("of_faults", True))


def pytest_addoption(parser):
    parser.addoption("--faults-page", help="write what tests marked `faults` found to this file")


def _rows(reporter) -> list[list]:
    """Of each test that put in faults, its rows; of one marked `faults` that failed, a row that says so."""
    rows = []
    for report in reporter.stats.get("passed", ()):
        rows += [[*value, report.nodeid] for name, value in report.user_properties if name == "fault"]
    for report in [*reporter.stats.get("failed", ()), *reporter.stats.get("error", ())]:
        if any(name == "of_faults" for name, _ in getattr(report, "user_properties", ())):
            rows.append([f"`{report.nodeid}`", "", "**FAILED**", "", "", report.nodeid])
    return sorted(rows, key=lambda row: row[-1])


def _table(rows: list[list]) -> str:
    return _HEAD + "".join("| " + " | ".join(map(str, row[:-1])) + " |\n" for row in rows)


def pytest_terminal_summary(terminalreporter, config):
    if not (rows := _rows(terminalreporter)):
        return
    terminalreporter.section("faults")
    terminalreporter.write(_table(rows))
    if page := config.getoption("--faults-page"):
        day, cores = time.strftime("%Y-%m-%d", time.gmtime()), os.cpu_count()
        minutes = (time.time() - _STARTED) / 60
        from benchmarks.harness import write_page

        write_page(
            Path(page),
            "# Faults, and what they cost\n\n"
            f"Written by `make test-faults` (tests marked `{config.option.markexpr}`) on {day}: {cores} cores "
            f"({platform.machine()}), {minutes:.0f} minutes.\n"
            "Each row is one test with a fixed seed. *Seconds of work lost*: what was done twice, or waited for.\n"
            "*Rows lost*: products, changes or answers that a run without the fault has and this one has not.\n\n"
            + _table(rows),
        )
