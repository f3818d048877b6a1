"""What a training step depends on besides its rows: seeds and learning rate as pure functions of position.

Both trainings and their single-process `fit` use these, so that a resumed run sees what an undisturbed one sees.
"""

import hashlib
import math
from typing import NamedTuple


def seed_from(*parts: int) -> int:
    """A 63-bit seed from any number of integers; neighbours such as (0, 1) and (1, 0) are unrelated."""
    return int.from_bytes(hashlib.sha256(repr(tuple(int(part) for part in parts)).encode()).digest()[:8], "big") >> 1


def learning_rate_at(step: int, total_steps: int, *, peak: float, warmup_share: float) -> float:
    """Linear warm-up over the first `warmup_share` (0…1) of the steps to `peak`, then a cosine to 0 after the last step."""
    warmup = math.ceil(warmup_share * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


class Phase(NamedTuple):
    """A stretch of the training with a warm-up and a decay of its own. `rows_per_epoch`: of all workers together."""

    epochs: int
    rows_per_epoch: int
    learning_rate: float
