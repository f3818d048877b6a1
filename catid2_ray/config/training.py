"""What the recipe's two trainings share: workers, DeepSpeed, schedule, checkpoints."""

from typing import Literal

from pydantic import model_validator

from catid2_ray.config.base import Section, setting


class TrainingRecipe(Section):
    """What both trainings share. The global batch is split over the workers, so their number is part of the result."""

    workers: int = setting(1, "training workers", unit="processes", ge=1)
    zero_stage: Literal[0, 1, 2] = setting(1, "DeepSpeed ZeRO stage", unit="stage")
    precision: Literal["fp32", "bf16"] = setting("fp32", "fp16 is not offered: T5 overflows in it", unit="choice")
    weight_decay: float = setting(1e-4, "AdamW's decay", unit="1/step", ge=0)
    warmup_share: float = setting(0.05, "share of the steps with rising learning rate", unit="share", ge=0, le=0.5)
    clip: float = setting(1.0, "largest gradient norm", unit="norm", gt=0)
    checkpoint_every_epochs: int = setting(5, "epochs between checkpoints", unit="epochs", operational=True, ge=1)
    max_failures: int = setting(3, "worker deaths survived", unit="times", operational=True, ge=0)

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.batch % self.workers:
            raise ValueError(f"batch {self.batch} does not divide by workers {self.workers}: choose a multiple")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 needs zero_stage 1 or 2, which keep float32 master weights; found zero_stage 0"
            )
        return self
