"""Progress of long work: a bar where a person looks on, an event line now and then where a log is read.

Work inside a Ray worker reports to one named actor that the driver polls, since workers have no terminal.
"""

import contextlib
import sys
import threading
import time

import ray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_ACTOR = "catid2-progress"
_LOG_EVERY_S = 15.0


def event(name: str, **values) -> None:
    """One log line: event=… key=value …"""
    print(
        " ".join([f"event={name}", *(f"{key}={value}" for key, value in values.items())]), file=sys.stderr, flush=True
    )


class Bar:
    """One piece of work with a known total. `advance` and `show` may be called from any thread."""

    def __init__(self, label: str, total: int, unit: str, rich_bar: Progress | None):
        self.label, self.total, self.unit, self._rich = label, total, unit, rich_bar
        self.done = 0
        self._task = rich_bar.add_task(label, total=total, note="") if rich_bar else None
        self._logged = time.monotonic()

    @property
    def is_terminal(self) -> bool:
        return self._rich is not None

    def advance(self, amount: int, note: str = "") -> None:
        self.show(self.done + amount, note)

    def show(self, done: int, note: str = "") -> None:
        self.done = done
        if self._rich:
            self._rich.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._logged >= _LOG_EVERY_S:
            self._logged = time.monotonic()
            event(
                "progress",
                stage=self.label.replace(" ", "_"),
                done=done,
                total=self.total,
                unit=self.unit,
                note=note or "-",
            )


@contextlib.contextmanager
def bar(label: str, total: int, unit: str):
    """`with bar("embedding", rows, "products") as progress: progress.advance(n)`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(label, total, unit, None)
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description:<34}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn(unit), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as rich_bar:
        yield Bar(label, total, unit, rich_bar)


@ray.remote(num_cpus=0)
class _Board:
    def __init__(self):
        self.done, self.note, self.epochs = 0, "", 0

    def put(self, done, note, epochs):
        self.done, self.note, self.epochs = done, note, max(self.epochs, epochs)

    def get(self):
        return self.done, self.note, self.epochs


@contextlib.contextmanager
def remote_bar(label: str, total: int, unit: str):
    """A bar that workers move with `report`; the driver polls it twice a second while the block runs."""
    board = _Board.options(name=f"{_ACTOR}-{ray.get_runtime_context().get_job_id()}").remote()
    stop = threading.Event()
    with bar(label, total, unit) as shown:

        def poll():
            saved = 0
            while not stop.wait(0.5):
                with contextlib.suppress(ray.exceptions.RayError):
                    done, note, epochs = ray.get(board.get.remote(), timeout=10)
                    shown.show(done, note)
                    if epochs > saved and not shown.is_terminal:
                        event("checkpoint", stage=label.replace(" ", "_"), epochs_done=epochs)
                    saved = max(saved, epochs)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield shown
        finally:
            stop.set()
            thread.join(timeout=15)
            ray.kill(board)


def reporter():
    """Called inside a worker: report(done, note, epochs), `epochs` in the last checkpoint; never blocks, never fails."""
    if not ray.is_initialized():
        return lambda done, note="", epochs=0: None
    try:
        board = ray.get_actor(f"{_ACTOR}-{ray.get_runtime_context().get_job_id()}")
    except ValueError:
        return lambda done, note="", epochs=0: None
    return lambda done, note="", epochs=0: board.put.remote(done, note, epochs)
