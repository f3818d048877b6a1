"""Figures of a running training: for the terminal bar's note, TensorBoard event files, and Ray metrics.

Rank 0 only. Speeds never enter the history, whose bytes must be the same for every run of one recipe; nor do event files,
which carry times, enter the artefact's digest: they lie beside its files in tensorboard/.
"""

import contextlib
import time
from pathlib import Path

import ray

from catid2_ray.on_ray.machine import progress

FOLDER = "tensorboard"


class Meter:
    """Counts steps between two shows, and tells all three places.

    `steps_done`: where the training goes on from, so that
    TensorBoard forgets what an earlier attempt wrote past that. `folder`: of the event files, on this worker's disk.
    """

    def __init__(self, folder: Path, *, stage: str, steps_done: int):
        from tensorboardX import SummaryWriter

        self.folder = folder
        self._board = SummaryWriter(str(folder), purge_step=steps_done + 1, flush_secs=30)
        self._gauges = _gauges(stage)
        self._report = progress.reporter()
        self._rows, self._since, self._score, self._last_note = 0, time.perf_counter(), None, ""

    def count(self, rows: int) -> None:
        self._rows += rows

    def skip_time(self) -> None:
        """Call after a validation or a checkpoint, whose seconds are not the steps'."""
        self._rows, self._since = 0, time.perf_counter()

    def show(self, step: int, epoch: int, loss: float, rate: float) -> dict[str, float]:
        """`step`: steps done in all; `epoch`: from 0; `loss`: mean of the epoch so far. Returns what was shown."""
        passed, rows = time.perf_counter() - self._since, self._rows
        self.skip_time()
        figures = {"loss": loss, "learning_rate": rate}
        if rows and passed > 0:
            figures["examples_per_second"] = rows / passed
        self._tell(step, figures)
        self._last_note = self._note(epoch, figures)
        self._report(step, self._last_note)
        return figures

    def score(self, step: int, figures: dict) -> None:
        """The figures of a validation; those that are numbers go to TensorBoard, `score` to the bar and the gauges too."""
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        self._score = numbers.get("score", self._score)
        self._tell(step, {f"validation/{name}": value for name, value in numbers.items() if name != "score"})
        if "score" in numbers:
            self._tell(step, {"score": numbers["score"]})

    def flush(self) -> None:
        """All that was told is in the event files."""
        self._board.flush()

    def checkpointed(self, step: int, epochs: int) -> None:
        """Call when the checkpoint is stored: after that, the log says so."""
        self._report(step, self._last_note, epochs)

    def close(self) -> None:
        self._board.close()

    def _note(self, epoch: int, figures: dict[str, float]) -> str:
        parts = [f"epoch {epoch + 1} loss {figures['loss']:.3f} lr {figures['learning_rate']:.1e}"]
        if "examples_per_second" in figures:
            parts.append(f"{figures['examples_per_second']:,.0f}/s")
        if self._score is not None:
            parts.append(f"score {self._score:.4f}")
        return " ".join(parts)

    def _tell(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name if "/" in name else f"training/{name}", value, step)
            if name in self._gauges:
                self._gauges[name].set(value)


_GAUGES = {
    "loss": "Mean loss of the epoch so far",
    "learning_rate": "Learning rate of the last step",
    "examples_per_second": "Rows trained per second, all workers together",
    "score": "Score of the last validation, higher is better",
}


def _gauges(stage: str) -> dict:
    """catid2_training_… by figure, tagged with the stage; none outside a Ray worker, and metrics never fail a training."""
    if not ray.is_initialized():
        return {}
    with contextlib.suppress(ValueError):
        from ray.util.metrics import Gauge

        gauges = {
            name: Gauge(f"catid2_training_{name}", description=text, tag_keys=("stage",))
            for name, text in _GAUGES.items()
        }
        for gauge in gauges.values():
            gauge.set_default_tags({"stage": stage})
        return gauges
    return {}
