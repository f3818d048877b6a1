"""What the generator is: its kind, its sizes, its head, and what its scores are measured against."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from catid2_ray.config.base import Section, setting

# Kinds that are named by a word; any other name is a T5's id or folder.
WORDS = ("small", "encoder_decoder", "causal")


class ModelRecipe(Section):
    """The part of the generator's section that decides its network and its loss."""

    model: str = setting(
        "small", "small (a T5 of the widths below, its tokenizer trained on the catalogue); encoder_decoder (the text encoder "
        "`encoder` under our own decoder); causal (the language model `causal`); or a T5 by id or folder", unit="name",
        paper="4.1: T5-base",
    )  # fmt: skip
    encoder: str | None = setting(
        None, "text encoder of an encoder_decoder, by id or folder; its tokenizer reads the texts", unit="name"
    )
    encoder_mode: Literal["frozen", "tuned"] = setting(
        "frozen",
        "frozen: its token states are computed once and cached on local disk; tuned: it learns too",
        unit="choice",
    )
    causal: str | None = setting(
        None, "causal language model, by id or folder", unit="name", paper="Qwen2.5-0.5B in CQ-SID (2605.14434)"
    )
    vocabulary: int = setting(8000, "subwords of the small tokenizer", unit="tokens", ge=100, le=100_000)
    width: int = setting(192, "d_model of the small T5, or of an encoder_decoder's decoder", unit="numbers", ge=16)
    layers: int = setting(2, "encoder layers, and as many decoder layers", unit="layers", ge=1)
    decoder_layers: int | None = setting(
        None,
        "decoder layers of small and encoder_decoder; none = layers",
        unit="layers",
        paper="6 in NCI (2206.02743)",
        ge=1,
    )
    heads: int = setting(4, "attention heads", unit="heads", ge=1)
    feed_forward: int = setting(512, "d_ff", unit="numbers", ge=16)
    dropout: float = setting(0.1, "dropout of small and of an encoder_decoder's decoder", unit="share", ge=0, lt=1)
    head: Literal["plain", "pawa"] = setting(
        "plain", "plain: one row a code; pawa: rows that depend on the prefix", unit="choice", paper="NCI (2206.02743)"
    )
    head_rank: int = setting(64, "rank of what a prefix changes in the rows, head pawa", unit="numbers", ge=1)
    new_rows: Literal["codewords", "mean"] = setting(
        "codewords", "where the ID tokens' rows begin: the quantizer's codewords, projected, or the mean embedding of a pretrained "
        "model (models made here: random, as all their rows); so do levels without codewords", unit="choice",
    )  # fmt: skip
    level_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = setting(
        None, "weight per level of the loss, relative to their mean; none = 1", unit="weight"
    )
    label_smoothing: float = setting(0.0, "mass spread over the codes of the level", unit="share", ge=0, lt=1)
    smoothing: Literal["uniform", "near"] = setting(
        "uniform", "how that mass is spread: evenly, or over near codewords", unit="choice", paper="VARG (2609.14493)"
    )
    smoothing_temperature: float = setting(
        0.1,
        "distance over which near smoothing falls by e, in mean distances of a level's codewords",
        unit="ratio",
        gt=0,
    )
    consistency: float | None = setting(
        None, "weight of the divergence of two passes under unlike dropout, which double a step's work; none = 0.15 with head "
        "pawa, else 0", unit="weight", paper="0.15 in NCI (2206.02743), base", ge=0,
    )  # fmt: skip

    @property
    def kind(self) -> str:
        """small, encoder_decoder, causal or t5."""
        return self.model if self.model in WORDS else "t5"

    @property
    def pretrained(self) -> str | None:
        """The id or folder that weights and tokenizer come from; None where both are made here."""
        return {"small": None, "encoder_decoder": self.encoder, "causal": self.causal}.get(self.model, self.model)

    @property
    def passes_weight(self) -> float:
        """`consistency` with its default worked out."""
        if self.consistency is not None:
            return self.consistency
        return 0.15 if self.head == "pawa" and self.dropout > 0 else 0.0

    @model_validator(mode="after")
    def _sizes_fit(self):
        if self.kind in ("small", "encoder_decoder") and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}: choose a multiple")
        if self.decoder_layers is not None and self.kind in ("t5", "causal"):
            raise ValueError(
                f"decoder_layers {self.decoder_layers} is set, but model {self.model!r} brings its own: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _kind_has_its_model(self):
        for kind, name in (("encoder_decoder", "encoder"), ("causal", "causal")):
            given = getattr(self, name)
            if self.model == kind and given is None:
                raise ValueError(f"model {kind} needs {name}, an id or folder: set it")
            if self.model != kind and given is not None:
                raise ValueError(
                    f"{name} {given!r} is set, but model is {self.model!r}: set model to {kind}, or leave {name} out"
                )
        if self.encoder_mode == "tuned" and self.model != "encoder_decoder":
            raise ValueError(
                f"encoder_mode tuned belongs to model encoder_decoder, found model {self.model!r}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _head_and_loss_fit(self):
        if self.head == "pawa" and self.kind == "causal":
            raise ValueError("head pawa needs a T5 or an encoder_decoder, found model causal: set head to plain")
        if self.consistency and self.dropout == 0 and self.kind in ("small", "encoder_decoder"):
            raise ValueError(
                f"consistency {self.consistency} compares passes under unlike dropout, but dropout is 0: raise dropout, or set "
                "consistency to 0"
            )
        if self.smoothing == "near" and self.label_smoothing == 0:
            raise ValueError(
                "smoothing near spreads the mass label_smoothing, which is 0: set label_smoothing, or uniform"
            )
        return self
