"""Figures of a running training: for the terminal bar's note, TensorBoard event files, and Ray metrics.

Rank 0 only. Speeds never enter the history, whose bytes must be the same for every run of one recipe; nor do event files,
which carry times, enter the artefact's digest: they lie beside its files in tensorboard/.
"""

import contextlib
import time
from pathlib import Path

import ray
import torch

from catid2_ray.on_ray.machine import progress

FOLDER = "tensorboard"
_MATMUL_SIDE, _MATMULS = 1024, 4
# Dense peak in FLOP/s by a part of the device's name: (bf16, fp32 without TF32), from NVIDIA's data sheets.
_GPU_PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
}


def peak_flops(device: str, precision: str) -> tuple[float, str]:
    """(FLOP/s of one worker at best, where the figure is from): a table for known GPUs, else the best of a few products."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        for part, (bf16, fp32) in _GPU_PEAKS.items():
            if part in name:
                return (bf16 if precision == "bf16" else fp32), f"data_sheet_of_{part.replace(' ', '_')}"
    side = _MATMUL_SIDE * (8 if device.startswith("cuda") else 1)
    # Where CPUs compute bf16 in float32, float32 is what they can do.
    kind = torch.bfloat16 if precision == "bf16" and device.startswith("cuda") else torch.float32
    left, best = torch.ones(side, side, dtype=kind, device=device), float("inf")
    for _ in range(_MATMULS):
        _wait_for(device)
        started = time.perf_counter()
        left @ left
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best, f"matmul_{side}_{str(kind).removeprefix('torch.')}"


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Meter:
    """Counts steps between two shows, and tells all three places.

    `flops`: per row, forward and backward; None leaves the MFU out. `steps_done`: where the training goes on from, so that
    TensorBoard forgets what an earlier attempt wrote past that. `folder`: of the event files, on this worker's disk.
    """

    def __init__(self, folder: Path, *, stage: str, steps_done: int, flops: float | None, peak: float, workers: int):
        from tensorboardX import SummaryWriter

        self.folder, self._flops, self._peak = folder, flops, peak * workers
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
            if self._flops:
                figures["mfu"] = rows * self._flops / passed / self._peak
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
        if "mfu" in figures:
            parts.append(f"mfu {figures['mfu']:.1%}")
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
    "mfu": "Model FLOPs per second over the workers' peak, 0 to 1",
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
