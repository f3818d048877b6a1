"""What the benchmarks share: options, the machine that they name, timing, fresh processes, tables and pages.

A page of results/ has two parts. What stands above the line KEPT is written by its benchmark; the text below it is written
by people and stays when the page is rendered again. The benchmarks import this file as scripts do.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from catid2_ray.evaluation.tables import DASH, Table, columns_of, markdown

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parent.parent / "jobs" / "recipes"
KEPT = "<!-- Above: written by its benchmark. Below: written by people, and kept when the page is rendered again. -->\n"
FLAGS = ("avx512f", "avx512_vnni", "amx_int8", "amx_bf16")


def parser_of(doc: str, *, page: Path | str | None = "", stored: str | None = None) -> argparse.ArgumentParser:
    """A parser with `--json`; with `--out`, whose default is `page` ("" = no page unless asked), unless that is None; with
    `--render` where `stored` says what it reads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    if page is not None:
        parser.add_argument("--out", type=Path, default=page or None, help="the page to write, as Markdown")
    if stored:
        parser.add_argument(
            "--render", type=Path, metavar="JSON", help=f"measure nothing: write the page from {stored}"
        )
    return parser


def whole(text: str) -> int:
    return int(float(text))


def wholes(text: str) -> list[int]:
    """`1e5,1e6` as numbers."""
    return [whole(part) for part in text.split(",")]


def finish(figures, text_of: Callable[..., str] | None, options) -> None:
    """Write the figures to `options.json` and their page to `options.out`, where they are given; print them as the last line."""
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if text_of and options.out:
        write_page(options.out, text_of(figures))
    print(json.dumps(figures))


def write_page(path: Path, text: str) -> None:
    """Put `text` above the line KEPT of the page; SystemExit where a file without that line would lose what it says."""
    before, line, kept = path.read_text().partition(KEPT) if path.exists() else ("", KEPT, "")
    if not line:
        raise SystemExit(
            f"{path} has no line {KEPT.strip()!r}: put it below what may be replaced, or choose another --out"
        )
    path.write_text(f"{text.rstrip()}\n\n{KEPT}{kept}")


def table(names: Sequence[str], rows: Sequence[Sequence], *, title: str = "") -> str:
    """A Markdown table whose first column is a label; floats to four significant digits, None as a dash."""
    return markdown([Table(title, columns_of(*names), [[_shown(value) for value in row] for row in rows])])


def _shown(value) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def spread(values: Sequence[float | None], form: str) -> str:
    """The mean of what is no None, and ± half the range where there are several."""
    values = [value for value in values if value is not None]
    reach = f" ± {format((max(values) - min(values)) / 2, form)}" if len(values) > 1 else ""
    return f"{format(float(np.mean(values)), form)}{reach}" if values else DASH


def rounded(value):
    """Floats anywhere in a JSON value to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine(device: str = "cpu") -> str:
    """Cores, model and matrix instructions, memory, accelerator, Python."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = (re.findall(r"model name\s*:\s*(.+)", text) or [platform.processor() or platform.machine()])[0]
    flags = ", ".join(flag for flag in FLAGS if f" {flag}" in text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = "no accelerator" if device == "cpu" else torch.cuda.get_device_name()
    return (
        f"{os.cpu_count()} cores of {model}{f' ({flags})' if flags else ''}, {memory:.0f} GiB, {accelerator}, "
        f"Python {platform.python_version()}"
    )


def where(benchmark: str, *, device: str = "cpu", threads: int = 1) -> dict:
    """What every report begins with: which benchmark, on what, with which libraries."""
    return {
        "benchmark": benchmark, "machine": machine(device), "threads": threads, "python": platform.python_version(),
        "numpy": np.__version__, "torch": torch.__version__,
    }  # fmt: skip


def in_turns(runs: Mapping, *, turns: int, seconds: float = 0.0, device: str = "cpu") -> dict:
    """Name → the seconds of each call, in turns because machines are noisy: at least `turns`, on until `seconds` have passed."""
    taken, start = {name: [] for name in runs}, time.perf_counter()
    turn = 0
    while turn < turns or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            taken[name].append(seconds_of(run, device))
        turn += 1
    return taken


def medians(taken: Mapping, *, unit: float = 1.0) -> dict:
    """The median of each run of `in_turns`, × `unit` (1e6: microseconds)."""
    return {name: statistics.median(seconds) * unit for name, seconds in taken.items()}


def seconds_of(run: Callable, device: str = "cpu") -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_of(field: str) -> int:
    """Bytes of this process, VmRSS (resident) or VmHWM (its peak); 0 where /proc does not tell."""
    status = Path("/proc/self/status")
    line = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(line[1]) * 1024 if line else 0


def in_fresh_process(script: str, *arguments: str):
    """Run a benchmark with `arguments` in a process of its own; the JSON of the last line that it prints."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
