"""Progress of long work: a bar where a person looks on, an event line now and then where a log is read.

Work inside a Ray worker reports to one named actor that the driver polls, since workers have no terminal. Ray is imported
where it is used: commands that only write an event do without its second.
"""

import contextlib
import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from catid2_ray.redaction import redacted

_ACTOR = "catid2-progress"
# A log gets a line after a tenth of the work, but none within 10 s of the last one; of slow work at least one in 5 min.
_LOG_AT_MOST_EVERY_S, _LOG_AT_LEAST_EVERY_S, _LOG_SHARE = 10.0, 300.0, 0.1
_RATE_AFTER_S = 5.0
_CLOCK_WIDTH = len("100%  1:02:05 so far")
_POSITION: contextvars.ContextVar[str] = contextvars.ContextVar("position", default="")


_elsewhere: Callable[[str, dict], object] | None = None


def write_by(write: Callable[[str, dict], object] | None) -> None:
    """From now on `write` gets name and values of every event of this process, in place of standard error; None: as before."""
    global _elsewhere
    _elsewhere = write


def is_written_elsewhere() -> bool:
    return _elsewhere is not None


def event(name: str, **values) -> None:
    """One log line: event=… key=value …"""
    if _elsewhere is not None:
        _elsewhere(name, values)
        return
    line = " ".join([f"event={name}", *(f"{key}={value}" for key, value in values.items())])
    print(redacted(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def at_position(position: str) -> Iterator[None]:
    """Bars of this block belong to stage `position` of a job, such as "5/12"; "" where stages are not counted."""
    before = _POSITION.set(position)
    try:
        yield
    finally:
        _POSITION.reset(before)


class Bar:
    """One piece of work with a known total. `advance` and `show` may be called from any thread.

    Drawn on two lines, which fit any width from 60 columns on: where the job is, bar, share and time left; then count, rate
    and the note, cut where the line ends. Rate and time left count from the first report of work done: what a resumed
    training has behind it, and the time that workers take to start, are no part of them.
    """

    def __init__(self, label: str, total: int, unit: str, is_terminal: bool):
        self.label, self.total, self.unit, self.is_terminal = label, total, unit, is_terminal
        self.position = _POSITION.get()
        self.done, self.note = 0, ""
        self._began = self._shown = self._logged_s = time.monotonic()
        self._first: tuple[float, int] | None = None  # when, and how much was done then
        self._logged = 0

    def advance(self, amount: int, note: str = "") -> None:
        self.show(self.done + amount, note)

    def show(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done != self.done:
            self._shown = now
        if done > 0 and self._first is None:
            self._first = now, done
        self.done, self.note = done, note
        if not self.is_terminal and self._is_news(now):
            self._log(now)

    def rate(self) -> float | None:
        """Units a second; None until work was reported twice, and not within a few seconds: workers that began together end
        their first parts together."""
        if self._first is None or self.done <= self._first[1]:
            return None
        passed = self._shown - self._first[0]
        return (self.done - self._first[1]) / passed if passed >= _RATE_AFTER_S else None

    def seconds_left(self) -> float | None:
        """As of now; None as long as there is no rate."""
        rate = self.rate()
        if rate is None:
            return None
        return max(0.0, (self.total - self.done) / rate - (time.monotonic() - self._shown))

    def _is_news(self, now: float) -> bool:
        moved, passed = self.done - self._logged, now - self._logged_s
        if moved <= 0 or passed < _LOG_AT_MOST_EVERY_S:
            return False
        return moved >= self.total * _LOG_SHARE or passed >= _LOG_AT_LEAST_EVERY_S

    def _log(self, now: float) -> None:
        self._logged_s, self._logged = now, self.done
        values = {"stage": self.label.replace(" ", "_")}
        if self.position:
            values["position"] = self.position
        values |= {"done": self.done, "total": self.total, "unit": self.unit}
        if (rate := self.rate()) is not None:
            values |= {"per_second": f"{rate:.3g}", "seconds_left": round(self.seconds_left())}
        event("progress", **values, note=self.note or "-")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stage, sep, stages = self.position.partition("/")
        where = f"stage {stage} of {stages}  {self.label}" if sep else self.label
        left = self.seconds_left()
        clock = f"{_clock(time.monotonic() - self._began)} so far" if left is None else f"{_clock(left)} left"
        share = self.done / self.total if self.total else 1.0
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        room = options.max_width - cell_len(where) - _CLOCK_WIDTH - 2
        first.add_column(width=max(10, min(room, options.max_width // 4)))
        first.add_column(no_wrap=True, justify="right", width=_CLOCK_WIDTH)
        first.add_row(
            Text(where),
            ProgressBar(total=max(self.total, 1), completed=self.done if self.total else 1),
            f"{share:4.0%}  {clock}",
        )
        yield first
        count = f"{self.done:,} of {self.total:,} {self.unit}"
        second = "  ".join(text for text in (count, _rate_text(self.rate()), self.note.replace("\n", " ")) if text)
        yield Text(second, style="dim", no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _rate_text(rate: float | None) -> str:
    if rate is None:
        return ""
    if rate < 1:
        return f"{rate * 60:.1f} a minute"
    return f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.1f} a second"


@contextlib.contextmanager
def bar(label: str, total: int, unit: str) -> Iterator[Bar]:
    """`with bar("embedding", rows, "products") as progress: progress.advance(n)`."""
    console = Console(stderr=True)
    shown = Bar(label, total, unit, console.is_interactive)
    if not shown.is_terminal:
        yield shown
        return
    with Live(shown, console=console, transient=True, refresh_per_second=4):
        yield shown


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
    import ray

    actor = ray.remote(num_cpus=0)(_Board)
    board = actor.options(name=f"{_ACTOR}-{ray.get_runtime_context().get_job_id()}").remote()
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
    import ray

    if not ray.is_initialized():
        return lambda done, note="", epochs=0: None
    try:
        board = ray.get_actor(f"{_ACTOR}-{ray.get_runtime_context().get_job_id()}")
    except ValueError:
        return lambda done, note="", epochs=0: None
    return lambda done, note="", epochs=0: board.put.remote(done, note, epochs)
