"""Run `catid2` and `python -m jobs.…` as a user does: another process, its own Ray, its output as text."""

import contextlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 540  # two jobs may share two cores; pytest ends a test after 600


def write_recipe(folder: Path, recipe: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(*arguments, env: dict | None = None, timeout: float = TIMEOUT_S) -> subprocess.CompletedProcess:
    """`run("catid2_ray.cli", "search", …)` or `run("jobs.reindex", …)`: a module and its arguments."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def run_here(*arguments) -> subprocess.CompletedProcess:
    """`run_here("search", …)`: a command of `catid2` in this process, which has imported already what it needs."""
    from catid2_ray import cli

    return _captured(lambda: cli.guarded(lambda: cli.app(list(map(str, arguments)), standalone_mode=False)), arguments)


def job_here(name: str, *arguments) -> subprocess.CompletedProcess:
    """`job_here("append_items", "--recipe", …)`: `python -m jobs.append_items` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        return _captured(lambda: runpy.run_module(f"jobs.{name}", run_name="__main__"), arguments)


def _captured(call, arguments) -> subprocess.CompletedProcess:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            call()
        except SystemExit as error:
            code = error.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_until(line: str, *arguments, env: dict | None = None, timeout: float = TIMEOUT_S) -> list[str]:
    """Start a job, SIGKILL it and every process it started at the first output that matches `line`, an expression; returns the
    output.

    Raises AssertionError when the job ends, or the time passes, without that line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    seen, deadline = [], time.monotonic() + timeout
    try:
        for text in process.stdout:
            seen.append(text)
            if re.search(line, text):
                return seen
            if time.monotonic() > deadline:
                break
        raise AssertionError(f"{line!r} never appeared in:\n{''.join(seen[-40:])}")
    finally:
        kill_tree(process.pid)
        process.wait(timeout=30)


def run_and_signal(line: str, number: int, *arguments, timeout: float = TIMEOUT_S) -> tuple[str, int, float]:
    """Start a job and send its process group a signal, as a terminal does, at the first output that contains `line`.

    Returns (its output, exit code, seconds from the signal to the end). AssertionError where that line never comes.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    seen, deadline = [], time.monotonic() + timeout
    try:
        for text in process.stdout:
            seen.append(text)
            if line in text:
                break
            assert time.monotonic() < deadline, f"{line!r} did not come in:\n{''.join(seen[-40:])}"
        else:
            raise AssertionError(f"{line!r} never appeared in:\n{''.join(seen[-40:])}")
        sent = time.monotonic()
        os.killpg(process.pid, number)
        code = process.wait(timeout=60)
        return "".join(seen) + process.stdout.read(), code, time.monotonic() - sent
    finally:
        kill_tree(process.pid)
        process.wait(timeout=30)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that descend from it, Ray's daemons included."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
