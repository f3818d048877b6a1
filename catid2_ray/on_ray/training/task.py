"""What the training loop is given: a Task, which says what is trained, and a Run, which says on what and with which settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.config import TrainingRecipe
from catid2_ray.errors import TrainingError
from catid2_ray.on_ray.training.shards import PartReader
from catid2_ray.schedule import Phase, Plan


class Task(Protocol):
    """What the loop trains. Picklable; built anew in every worker.

    A task may also define

    shards = "whole"                every rank holds all rows, `order` says the rows of the global batch, of which each rank
                                    takes its slice, and `prepare` sees the global batch: the training is then the same, up to
                                    rounding, on any number of workers. `loss` must be a mean over rows whose divisor is their
                                    number alone. Without it each rank draws from its own range of the rows.
    trim(columns) -> columns        what a rank is fed after its slice was cut, such as without columns that are all padding
    phases(rows) -> list[Phase]     run one after another; without it one phase of the settings' epochs and learning rate.
                                    `rows`: all rows of the artefact. `order` sees epochs numbered through all phases
    validate(module, epoch, beat=…) -> dict on rank 0, figures for the history; `score`: higher is better, the best epoch's
                                    weights are exported, and the settings' `patience` counts from it. It calls `beat()` again
                                    and again, since the other ranks wait for a bounded time
    """

    columns: list[str]
    reader: PartReader

    def build(self) -> torch.nn.Module: ...

    def parameter_groups(self, module: torch.nn.Module, *, weight_decay: float) -> list[dict]: ...

    def start(self, module: torch.nn.Module) -> None:
        """Before the first epoch of a run that is not resumed; on rank 0, the others get its weights."""

    def rows_per_epoch(self, rows: int) -> int: ...

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray: ...

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        """The batch as it is fed, row for row: augmentation goes here, a pure function of its arguments."""

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]: ...

    def end_epoch(self, module: torch.nn.Module, *, epoch: int, means: dict, history: list[dict]) -> tuple[dict, bool]:
        """(figures for the history, whether weights were changed in place); on rank 0, the others get both.

        A figure `stop` ends the training with a CollapseError of that text. `means`: the epoch's mean loss and terms, which
        go into the history too unless taken out; `history`: the records of the epochs before.
        """

    def export(self, module: torch.nn.Module, folder: Path, history: list[dict]) -> None: ...


class Batches(NamedTuple):
    """How a global batch is made: micro × accumulation × workers rows, and the plan of steps that follows from it."""

    micro: int
    accumulation: int
    workers: int
    plan: Plan

    @property
    def rank_rows(self) -> int:
        return self.micro * self.accumulation

    @property
    def arithmetic(self) -> str:
        return (
            f"micro_batch {self.micro} x accumulation {self.accumulation} x workers {self.workers} "
            f"= batch {self.plan.batch}"
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run as the workers see it. `name`: the folder of its checkpoints below runs/ in the store; `train` gives it."""

    task: Task
    settings: TrainingRecipe
    seed: int
    threads: int
    device: str
    store: Store
    rows: Manifest
    name: str = ""

    @property
    def folder(self) -> str:
        return f"runs/{self.name}"

    @property
    def whole(self) -> bool:
        return getattr(self.task, "shards", "own") == "whole"

    def phases(self) -> tuple[Phase, ...]:
        if hasattr(self.task, "phases"):
            return tuple(self.task.phases(self.rows.rows))
        settings = self.settings
        return (Phase(settings.epochs, self.task.rows_per_epoch(self.rows.rows), settings.learning_rate),)

    def batches(self, world: int) -> Batches:
        """Equal on all ranks. For few rows a batch shrinks: to the largest phase's epoch where every rank holds all rows (a
        small phase then meets a row several times a step), else to the smallest shard, since a row met twice in one batch
        would be its own positive.
        """
        settings, phases = self.settings, self.phases()
        if not phases or min(min(phase.epochs, phase.rows_per_epoch) for phase in phases) < 1:
            raise TrainingError(f"every phase needs at least one epoch and one row, found {[*map(tuple, phases)]}")
        if self.whole:
            most = max(phase.rows_per_epoch for phase in phases) // world
        else:
            most = self.task.rows_per_epoch(self.rows.rows // world)
        rank_rows = max(1, min(settings.batch // world, most))
        micro = min(settings.micro_batch or rank_rows, rank_rows)
        accumulation = rank_rows // micro
        return Batches(micro, accumulation, world, Plan(phases, micro * accumulation * world))
