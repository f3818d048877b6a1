"""What a training step depends on besides its rows: seeds, phases and learning rate as pure functions of position.

Both trainings and their single-process `fit` use these, so that a resumed run sees what an undisturbed one sees.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Decay = Literal["cosine", "inverse_sqrt", "constant"]


def seed_from(*parts: int) -> int:
    """A 63-bit seed from any number of integers; neighbours such as (0, 1) and (1, 0) are unrelated."""
    return int.from_bytes(hashlib.sha256(repr(tuple(int(part) for part in parts)).encode()).digest()[:8], "big") >> 1


def learning_rate_at(
    step: int, total_steps: int, *, peak: float, warmup_share: float, decay: Decay = "cosine"
) -> float:
    """Linear warm-up over the first `warmup_share` (0…1) of the steps to `peak`, then by `decay` until the last step.

    cosine        down to 0 after the last step
    inverse_sqrt  peak · √(w / (step + 1)) with w the steps of the warm-up, at least 1 (T5's pre-training; Raffel et al. 2020,
                  section 3.1.2): it does not depend on where the training ends, so that more epochs can follow
    constant      stays at peak
    """
    warmup = math.ceil(warmup_share * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if decay == "constant":
        return peak
    if decay == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / (step + 1))
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


class Phase(NamedTuple):
    """A stretch of the training with a warm-up and a decay of its own. `rows_per_epoch`: of all workers together."""

    epochs: int
    rows_per_epoch: int
    learning_rate: float


class Place(NamedTuple):
    """Where an epoch lies: its phase's number, the steps of the whole training before it, and the steps that it takes."""

    phase: int
    first_step: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """Phases one after another in steps of `batch` rows, all workers together. Epochs and steps count through all phases."""

    phases: tuple[Phase, ...]
    batch: int

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    @property
    def steps(self) -> int:
        return sum(phase.epochs * self._per_epoch(phase) for phase in self.phases)

    def _per_epoch(self, phase: Phase) -> int:
        return max(1, -(-phase.rows_per_epoch // self.batch))

    def place(self, epoch: int) -> Place:
        """IndexError for an epoch past the last."""
        first = 0
        for number, phase in enumerate(self.phases):
            steps = self._per_epoch(phase)
            if epoch < phase.epochs:
                return Place(number, first + epoch * steps, steps)
            epoch, first = epoch - phase.epochs, first + phase.epochs * steps
        raise IndexError(f"the plan has {self.epochs} epochs, {epoch} more were asked for")

    def steps_before(self, epoch: int) -> int:
        """Steps of the whole training before an epoch; of all where the epoch is the one after the last."""
        return self.steps if epoch >= self.epochs else self.place(epoch).first_step

    def learning_rate(self, epoch: int, step: int, *, warmup_share: float, decay: Decay) -> float:
        """At a step of an epoch, both from 0: each phase warms up and decays over its own steps."""
        here = self.place(epoch)
        phase = self.phases[here.phase]
        before = sum(earlier.epochs for earlier in self.phases[: here.phase])
        return learning_rate_at(
            (epoch - before) * here.steps + step, phase.epochs * here.steps, peak=phase.learning_rate,
            warmup_share=warmup_share, decay=decay,
        )  # fmt: skip
