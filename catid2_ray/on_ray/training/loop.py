"""The one training loop, run by every worker: resume, steps, validation, checkpoints, export. Knows Ray by its Seat alone.

Rows, learning rate and dropout of a step are pure functions of (seed, epoch, step, rank), so a run that was killed and
resumed, in the middle of an epoch too, ends in the same weights as an undisturbed one. All ranks take the same number of
steps, whatever their shards hold. Where a task holds whole rows on every rank, the rows of a global batch do not depend on
the number of workers either.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from catid2_ray.errors import TrainingError
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.training import checkpoints
from catid2_ray.on_ray.training.checkpoints import State
from catid2_ray.on_ray.training.engine import Gather, mean_over_ranks, share_objects, share_weights, start_engine
from catid2_ray.on_ray.training.meter import FOLDER as TENSORBOARD
from catid2_ray.on_ray.training.meter import Meter
from catid2_ray.on_ray.training.shards import RankRange, open_rows
from catid2_ray.on_ray.training.task import Run
from catid2_ray.schedule import seed_from

_BEAT_S = 1.0
_SHOWN_EVERY = 50  # steps at most between two shows; ten an epoch at least


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where a worker sits. `rows`: Ray Data's iterator over its rows; `hand_in(figures, folder, name)`: gives the files of
    this rank's part of a checkpoint away, and returns once they are stored."""

    rank: int
    world: int
    rows: Any
    hand_in: Callable[[dict, Path, str], None]


def run_training(run: Run, seat: Seat) -> None:
    """From the newest whole checkpoint, or anew, to the end; the last checkpoint holds what the stage publishes, in export/."""
    torch.set_num_threads(run.threads)
    torch.manual_seed(seed_from(run.seed, 0))
    module = run.task.build().to(run.device)
    found = [checkpoints.newest_whole(run.store, run.folder) if seat.rank == 0 else None]
    (found,) = share_objects(found, seat.world, run.device)
    if found is None:
        if seat.rank == 0:
            run.task.start(module)
        share_weights(module, seat.world)
    elif found[1].finished:
        return
    with scratch.folder("training") as local:
        training = Training(run, seat, module, local)
        if found is not None:
            training.resume(*found)
        training.run_all()


class Training:
    """One worker's part of a run. `state` is the same on all ranks but for the sums, which count on rank 0 alone where each
    rank has its own rows. `best_weights`: of the best epoch, on rank 0."""

    def __init__(self, run: Run, seat: Seat, module: torch.nn.Module, local: Path):
        self.run, self.seat, self.local = run, seat, local
        self.batches = run.batches(seat.world)
        self.plan = self.batches.plan
        self.engine = start_engine(run, module, self.batches)
        self.state = State(world=seat.world, batch=self.plan.batch)
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.meter: Meter | None = None
        self._saved_at, self._told_at = 0, time.monotonic()
        self._row_seed = 0 if run.whole else seat.rank

    @property
    def first(self) -> bool:
        return self.seat.rank == 0

    def resume(self, folder: str, state: State) -> None:
        run, seat = self.run, self.seat
        wanted = (checkpoints.WEIGHTS, "optimiser-", *((checkpoints.BEST, TENSORBOARD) if self.first else ()))
        with checkpoints.opened(run.store, folder, state, wanted) as files:
            checkpoints.load(
                files, self.engine, state, rank=seat.rank, world=seat.world, batch=self.plan.batch, whole_rows=run.whole
            )
            if self.first:
                checkpoints.keep_files(files / TENSORBOARD, self.local / TENSORBOARD)
                if (files / checkpoints.BEST).exists():
                    self.best_weights = load_file(files / checkpoints.BEST)
        progress.event(
            "resume", rank=seat.rank, epochs_done=state.epoch, step=state.step,
            **({"workers": seat.world, "workers_before": state.world} if state.world != seat.world else {}),
        )  # fmt: skip
        self.state = state
        self.state.world = seat.world
        self._saved_at = self._steps_done

    @property
    def _steps_done(self) -> int:
        return self.plan.steps_before(self.state.epoch) + self.state.step

    def run_all(self) -> None:
        run, seat = self.run, self.seat
        span = (
            RankRange(run.rows, rank=0, world=1) if run.whole else RankRange(run.rows, rank=seat.rank, world=seat.world)
        )
        mode, seed = getattr(run.settings, "input", "shard"), seed_from(run.seed, self._row_seed)
        with open_rows(seat.rows, span, run.task.columns, mode=mode, seed=seed) as rows, self.metered():
            while not self.epoch(rows):
                pass

    @contextlib.contextmanager
    def metered(self):
        """The meter is open within, on rank 0."""
        if not self.first:
            yield
            return
        self.meter = Meter(self.local / TENSORBOARD, stage=self.run.name.split("-")[0], steps_done=self._steps_done)
        try:
            yield
        finally:
            self.meter.close()

    def epoch(self, rows) -> bool:
        """The rest of the current epoch, its figures and, where one is due, its checkpoint. Returns whether it was the last."""
        state, settings, task = self.state, self.run.settings, self.run.task
        epoch, place = state.epoch, self.plan.place(state.epoch)
        batch = self.plan.batch if self.run.whole else self.batches.rank_rows
        order = task.order(
            rows, seed=seed_from(self.run.seed, self._row_seed), epoch=epoch, batch=batch, steps=place.steps
        )
        self.engine.train()
        every = max(1, min(_SHOWN_EVERY, place.steps // 10))
        drawn = rows.epoch(order, steps=place.steps, batch=batch, first=state.step, before=place.first_step)
        for step, columns in enumerate(drawn, start=state.step):
            rate = self.plan.learning_rate(epoch, step, warmup_share=settings.warmup_share, decay=settings.decay)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            for name, value in self._step(columns, place.first_step + step).items():
                state.sums[name] = state.sums.get(name, 0.0) + value / place.steps
                if name == "loss" and not np.isfinite(value):
                    raise TrainingError(
                        f"the loss is {value} in epoch {epoch + 1}, step {step + 1}: lower this stage's learning_rate"
                    )
            state.step = step + 1
            if self.meter:
                self.meter.count(self.plan.batch)
                if state.step % every == 0 or state.step == place.steps:
                    self.meter.show(self._steps_done, epoch, state.sums["loss"] * place.steps / state.step, rate)
            if state.step < place.steps and self._checkpoint_due():
                self.hand_in()
        return self._end_epoch()

    def _checkpoint_due(self) -> bool:
        every = self.run.settings.checkpoint_every_steps
        return every is not None and self._steps_done - self._saved_at >= every

    def _step(self, columns: dict[str, np.ndarray], done: int) -> dict[str, float]:
        """One global batch: its pieces forward and backward, then the optimiser. Returns its mean loss and terms."""
        run, seat, size = self.run, self.seat, self.batches.rank_rows
        torch.manual_seed(seed_from(run.seed, done, seat.rank))
        columns = run.task.prepare(columns, seed=seed_from(run.seed, done, self._row_seed))
        if run.whole:
            columns = {name: values[seat.rank * size : (seat.rank + 1) * size] for name, values in columns.items()}
        totals: dict[str, float] = {}
        for start in range(0, size, self.batches.micro):
            piece = columns
            if self.batches.accumulation > 1:
                piece = {name: values[start : start + self.batches.micro] for name, values in columns.items()}
            if hasattr(run.task, "trim"):
                piece = run.task.trim(piece)
            tensors = {
                name: torch.from_numpy(np.ascontiguousarray(values)).to(run.device) for name, values in piece.items()
            }
            loss, terms = run.task.loss(self.engine, tensors, gather=Gather.apply if seat.world > 1 else None)
            self.engine.backward(loss)
            self.engine.step()
            for name, value in {"loss": loss.detach(), **terms}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / self.batches.accumulation
        if run.whole:
            totals = dict(zip(totals, mean_over_ranks(list(totals.values()), seat.world, run.device)))
        return totals

    def _end_epoch(self) -> bool:
        run, state, epoch = self.run, self.state, self.state.epoch
        self.engine.eval()
        shared = [None] * 4
        if self.first:
            figures, changed = run.task.end_epoch(
                self.engine.module, epoch=epoch, means=state.sums, history=state.history
            )
            shared = [{**figures, **self._validate(epoch)}, changed, state.sums, state.best]
            self._go_on(waiting=False)
        else:
            while self._go_on():
                pass
        figures, changed, sums, state.best = share_objects(shared, self.seat.world, run.device)
        if changed:
            share_weights(self.engine.module, self.seat.world)
            checkpoints.weights_changed(self.engine)
        if self.first:
            progress.event("epoch", epoch=epoch + 1, **{name: f"{value:.5g}" for name, value in sums.items()})
        patience = getattr(run.settings, "patience", None)
        stopped = bool(patience and state.best and state.best["since"] >= patience)
        record = {"epoch": epoch, **sums, **figures}
        last = stopped or epoch + 1 == self.plan.epochs or "stop" in record
        if last and state.best:
            record |= {
                "best_epoch": state.best["epoch"], "best_score": state.best["score"],
                "stopped_early": stopped and epoch + 1 < self.plan.epochs,
            }  # fmt: skip
        state.history.append(record)
        state.epoch, state.step, state.sums = epoch + 1, 0, {}
        # A figure that asks to stop is the same on all ranks; raised by a worker, Ray would try it all again.
        state.finished = last and "stop" not in record
        if last or (epoch + 1) % run.settings.checkpoint_every_epochs == 0 or self._checkpoint_due():
            self.hand_in()
        if self.meter:
            self.meter.skip_time()
        return last

    def _go_on(self, *, waiting: bool = True) -> bool:
        """Rank 0 tells the others whether to wait on, which they do for a bounded time; they learn it."""
        self._told_at = time.monotonic()
        return share_objects([waiting], self.seat.world, self.run.device)[0]

    def _beat(self) -> None:
        """Rank 0, in the middle of a validation: bid the others wait on, once a second."""
        if self.seat.world > 1 and time.monotonic() - self._told_at > _BEAT_S:
            self._go_on()

    def _validate(self, epoch: int) -> dict:
        """On rank 0: the figures of a validation that is due, and the best epoch so far, whose weights are put aside."""
        run, state = self.run, self.state
        every, last = getattr(run.settings, "validate_every_epochs", 1), epoch + 1 == self.plan.epochs
        if not hasattr(run.task, "validate") or not (last or (epoch + 1) % every == 0):
            return {}
        figures = run.task.validate(self.engine.module, epoch, beat=self._beat)
        self.meter.score(self._steps_done, figures)
        if "score" not in figures:
            return figures
        score = float(figures["score"])
        progress.event("validation", epoch=epoch + 1, score=f"{score:.5g}")
        if not np.isfinite(score):
            raise TrainingError(
                f"the validation after epoch {epoch + 1} gave the score {score}, expected a finite number"
            )
        if state.best is None or score > state.best["score"]:
            state.best = {"epoch": epoch, "score": score, "since": 0}
            self.best_weights = checkpoints.copies(self.engine.module)
        elif self.plan.place(epoch).phase == len(self.plan.phases) - 1:  # earlier phases run whole, to be built upon
            state.best = {**state.best, "since": state.best["since"] + 1}
        return figures

    def hand_in(self) -> None:
        """Checkpoint of all ranks; the one that ends the training also holds what the stage publishes, in export/."""
        run, seat, state = self.run, self.seat, self.state
        with scratch.folder("checkpoint") as folder:
            checkpoints.save(folder, self.engine, rank=seat.rank)
            if self.first:
                self.meter.flush()
                checkpoints.keep_files(self.local / TENSORBOARD, folder / TENSORBOARD)
                if self.best_weights is not None:
                    save_file(self.best_weights, folder / checkpoints.BEST)
                if state.finished:
                    self._export(folder / "export")
            checkpoints.seal(folder, state, rank=seat.rank, device=run.device)
            figures = {"epochs_done": state.epoch, "step": state.step, **(state.sums or state.history[-1])}
            seat.hand_in(figures, folder, checkpoints.new_name(self._steps_done))
        self._saved_at = self._steps_done
        if self.meter:
            self.meter.checkpointed(self._steps_done, state.epoch)
            self.meter.skip_time()

    def _export(self, folder: Path) -> None:
        folder.mkdir()
        if self.best_weights is not None:
            checkpoints.set_weights(self.engine.module, self.best_weights)
        self.run.task.export(self.engine.module, folder, self.state.history)
