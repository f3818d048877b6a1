"""What sections of the recipe are made of: fields with unit, range and source; and what all trainings have in common."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

NOT_STATED = "not stated in the paper"
_LIMITS = {"type", "minimum", "items", "minItems", "maxItems"}  # what a JSON schema says of a number or a list


def setting(
    default: Any = ...,
    description: str = "",
    *,
    unit: str,
    paper: str = NOT_STATED,
    operational=False,
    sized=False,
    later=False,
    **limits,
) -> Any:
    """A recipe field: what it is, unit, source (unless operational or a section), range (pydantic's ge, le, min_length …).

    `sized`: where the recipe leaves it out, or says `auto`, a job takes the number that fits the catalogue (`config.sizes`); the
    default only stands in for it until then. `later`: the setting came after artefacts were published, and its default is what was
    done before; while a recipe leaves it there, keys are those of before, so that an upgrade remakes nothing."""
    extra = {"unit": unit} | ({"operational": True} if operational else {} if unit == "section" else {"paper": paper})
    extra |= {"sized": True} if sized else {}
    extra |= {"later": True} if later else {}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def sized(cls) -> list[str]:
        """The settings that follow the catalogue's size where they are left out."""
        return [name for name, field in cls.model_fields.items() if (field.json_schema_extra or {}).get("sized")]

    @model_validator(mode="before")
    @classmethod
    def _auto_is_left_out(cls, values):
        if not isinstance(values, dict):
            return values
        auto = {name for name in cls.sized() if values.get(name) == "auto"}
        return {name: value for name, value in values.items() if name not in auto}

    @model_serializer(mode="wrap")
    def _left_out_is_auto(self, dump):
        """A recipe that is written and read again leaves out what it left out."""
        auto = dict.fromkeys(set(self.sized()) - self.model_fields_set, "auto")
        values = dump(self)
        return {name: auto.get(name, value) for name, value in values.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema, handler) -> dict:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name in cls.sized():
            limits = {key: properties[name].pop(key) for key in _LIMITS & properties[name].keys()}
            properties[name] |= {"anyOf": [limits, {"enum": ["auto"], "type": "string"}], "default": "auto"}
        return schema

    def decided(self, *, later: bool = True) -> dict:
        """The settings that decide the result, as JSON values: all but the operational ones. `later`: also those that came later
        and change nothing."""
        dumped = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra, value = field.json_schema_extra or {}, getattr(self, name)
            if extra.get("operational") or (not later and extra.get("later") and value == field.get_default()):
                del dumped[name]
            elif isinstance(value, Section):
                dumped[name] = value.decided() if later else value.identity()
        return dumped

    def identity(self) -> dict:
        """What a key covers of this section: `decided` without the later settings that change nothing."""
        return self.decided(later=False)


_FP16 = (
    "precision fp16 is not offered: T5's activations overflow its range of 65,504 and the loss turns to NaN. Use bf16, which has "
    "float32's range, or fp32"
)
_ZERO_3 = (
    "zero_stage 3 is not offered: it splits the weights themselves, which every epoch's validation, checkpoint and export need "
    "whole. The models of this platform fit a worker: use zero_stage 2 with activation_checkpointing or a smaller micro_batch"
)


class TrainingRecipe(Section):
    """What both trainings share. The global batch is split over the workers: micro_batch × accumulation × workers = batch."""

    workers: int = setting(1, "training workers", unit="processes", ge=1)
    micro_batch: int | None = setting(
        None, "rows that a worker runs at a time, gradients being added up over the rest of its share of the batch; none = all "
        "of its share", unit="rows", ge=1,
    )  # fmt: skip
    zero_stage: Literal[0, 1, 2] = setting(1, "DeepSpeed ZeRO stage; 3 is not offered", unit="stage")
    precision: Literal["fp32", "bf16"] = setting("fp32", "fp16 is not offered: T5 overflows in it", unit="choice")
    weight_decay: float = setting(1e-4, "AdamW's decay", unit="1/step", ge=0)
    warmup_share: float = setting(
        0.05, "share of the steps with rising learning rate, in each phase", unit="share", ge=0, le=0.5
    )
    decay: Literal["cosine", "inverse_sqrt", "constant"] = setting(
        "cosine", "learning rate after the warm-up: cosine to zero; peak · √(warm-up steps / step); or constant",
        unit="choice",
    )  # fmt: skip
    clip: float = setting(1.0, "largest gradient norm", unit="norm", gt=0)
    checkpoint_every_epochs: int = setting(5, "epochs between checkpoints", unit="epochs", operational=True, ge=1)
    checkpoint_every_steps: int | None = setting(
        None, "steps between checkpoints, inside epochs too: what a worker's death costs at most; none = by epochs alone",
        unit="steps", operational=True, ge=1,
    )  # fmt: skip
    max_failures: int = setting(3, "worker deaths survived", unit="times", operational=True, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _refuse_with_reason(cls, values):
        if isinstance(values, dict) and values.get("precision") in ("fp16", "float16", "half"):
            raise ValueError(_FP16)
        if isinstance(values, dict) and values.get("zero_stage") == 3:
            raise ValueError(_ZERO_3)
        return values

    @model_validator(mode="after")
    def _batch_divides(self):
        if "batch" in self.model_fields_set or "batch" not in self.sized():  # else it is chosen to fit them
            self._whole_shares()
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 needs zero_stage 1 or 2, which keep float32 master weights; found zero_stage 0"
            )
        return self

    def _whole_shares(self) -> None:
        if self.batch % self.workers:
            raise ValueError(f"batch {self.batch} does not divide by workers {self.workers}: choose a multiple")
        if self.micro_batch and self.batch % (self.micro_batch * self.workers):
            share = self.batch // self.workers
            fits = [size for size in range(1, share + 1) if share % size == 0]
            near = sorted(fits, key=lambda size: (abs(size - self.micro_batch), size))[:2]
            raise ValueError(
                f"micro_batch {self.micro_batch} x accumulation x workers {self.workers} = batch {self.batch} has no whole "
                f"accumulation ({self.batch / self.micro_batch / self.workers:.4g}): a worker's share of the batch is {share} "
                f"rows, choose a micro_batch that divides it, such as {' or '.join(map(str, sorted(near)))}"
            )
