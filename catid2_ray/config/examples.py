"""What the generator learns from: kinds of examples, how they are mixed, and in which order of stages.

A mix counts a kind's examples per query example of the catalogue and epoch: `title: 1.6` beside 10,000 query examples is
16,000 titles an epoch. A kind with fewer rows repeats them, one with more walks through them, epoch after epoch.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from catid2_ray.config.base import Section, setting

ExampleKind = Literal["query", "title", "span", "user", "synthetic"]
EXAMPLE_KINDS: tuple[str, ...] = get_args(ExampleKind)
Mix = dict[ExampleKind, Annotated[float, Field(ge=0)]]


class StageRecipe(Section):
    """One stretch of training with its own mix and learning rate; stages run one after another on the same weights."""

    name: str = setting("train", "shown in the history", unit="name", min_length=1)
    mix: Mix = setting(
        {"query": 1.0, "title": 1.0}, "examples of a kind per query example", unit="ratio",
        paper="CQ-SID (2605.14434): title, then query, then user",
    )  # fmt: skip
    epochs: int = setting(1, "epochs of this mix", unit="epochs", ge=1)
    learning_rate: float | None = setting(
        None, "its own peak; none = that of the generator", unit="1/step", paper="1e-4, then 4e-5 in CQ-SID (2605.14434)", gt=0,
    )  # fmt: skip

    @model_validator(mode="after")
    def _something(self):
        if not any(self.mix.values()):
            raise ValueError(f"mix {self.mix} leaves stage {self.name!r} without an example: give a kind more than 0")
        return self


class ExamplesRecipe(Section):
    """The part of the generator's section that decides its examples."""

    min_relevance: float = setting(
        2.33, "pairs of the train split with at least this relevance teach", unit="grade", paper="4.1: labels E and S",
        ge=0,
    )  # fmt: skip
    relevance_weights: dict[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = setting(
        None, "weight in the loss from a relevance on, as {3: 1.0, 2: 0.5}; 0 leaves these pairs out; none = 1",
        unit="weight",
    )  # fmt: skip
    mix: Mix = setting(
        {"query": 1.0, "title": 1.0}, "examples of a kind per query example and epoch, where `stages` is empty",
        unit="ratio", paper="DSI (2202.06991) mixes in more indexing than retrieval",
    )  # fmt: skip
    stages: tuple[StageRecipe, ...] = setting(
        (),
        "mixes trained one after another, in place of `mix` and `epochs`",
        unit="stages",
        paper="CQ-SID (2605.14434)",
    )
    word_keep: float = setting(
        0.5, "share of words kept when a title serves as a pseudo-query; 1 keeps titles whole", unit="share", gt=0, le=1,
    )  # fmt: skip
    word_drop_share: float = setting(
        1.0, "share of the title examples that lose words so; the others keep all", unit="share", ge=0, le=1
    )
    query_tokens: int = setting(24, "longest query, title or span", unit="tokens", ge=4, le=512)
    span_tokens: int | None = setting(
        None, "tokens of a description's span; none = as many as fit", unit="tokens", paper="64 in NCI (2206.02743)", ge=2,
    )  # fmt: skip
    span_windows: int = setting(
        4, "spans of a description beside its beginning", unit="spans", paper="10 in NCI (2206.02743)", ge=0, le=100
    )
    user_tokens: int = setting(
        12, "longest attributes of a user, beside the query's own tokens", unit="tokens", paper="CQ-SID (2605.14434)", ge=1,
        le=256,
    )  # fmt: skip
    user_recent: int = setting(
        3, "latest products of a user whose IDs stand before the query", unit="products", paper="CQ-SID (2605.14434)", ge=0,
        le=64,
    )  # fmt: skip
    doc2query: str | None = setting(
        None, "seq2seq model, by id or folder, that makes the synthetic queries of titles", unit="name",
        paper="docT5query in NCI (2206.02743)",
    )  # fmt: skip
    doc2query_per_product: int = setting(3, "synthetic queries of a product", unit="queries", ge=1, le=100)
    doc2query_top_k: int = setting(10, "likeliest tokens that one is drawn from", unit="tokens", ge=1)
    tokenizer_rows: int = setting(200_000, "products whose text the small tokenizer sees at most", unit="rows", ge=100)

    @property
    def plan(self) -> tuple[StageRecipe, ...]:
        """The stages; one of the flat settings where none are given."""
        return self.stages or (StageRecipe(mix=self.mix, epochs=self.epochs, learning_rate=self.learning_rate),)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of which any stage takes examples. Queries are always there: they are what a mix counts in."""
        used = {kind for stage in self.plan for kind, ratio in stage.mix.items() if ratio}
        return tuple(kind for kind in EXAMPLE_KINDS if kind in used | {"query"})

    @model_validator(mode="after")
    def _examples_can_be_made(self):
        if not self.stages and not any(self.mix.values()):
            raise ValueError(f"mix {self.mix} leaves no example to train on: give a kind more than 0")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages are named {names}: give each its own name")
        if "synthetic" in self.kinds and self.doc2query is None:
            raise ValueError(
                "mix asks for synthetic queries, but doc2query names no model: set it, or mix.synthetic to 0"
            )
        if self.span_tokens is not None and self.span_tokens > self.query_tokens - 1:
            raise ValueError(
                f"span_tokens {self.span_tokens} exceeds query_tokens {self.query_tokens} − 1 (the end of the text): lower "
                "the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _weights_cover(self):
        weights = self.relevance_weights
        if weights is None:
            return self
        if not any(weights.values()):
            raise ValueError(f"relevance_weights {weights} leave no pair that teaches: give a grade more than 0")
        if min(weights) > self.min_relevance:
            raise ValueError(
                f"relevance_weights begin at {min(weights)}, above min_relevance {self.min_relevance}: pairs between have no "
                "weight; give them one or raise min_relevance"
            )
        return self
