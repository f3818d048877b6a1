"""Recipe section: the generator, its examples, its network and loss, and its training.

A mix counts a kind's examples per query example of the catalogue and epoch: `title: 1.6` beside 10,000 query examples is
16,000 titles an epoch. A kind with fewer rows repeats them, one with more walks through them, epoch after epoch.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from catid2_ray.config.section import Section, TrainingRecipe, setting

ExampleKind = Literal["query", "title", "span", "user", "synthetic", "teacher"]
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
    teacher_draws: int = setting(
        4, "products that the teacher names for each training pair of a query; an epoch takes some of them", unit="products",
        paper="RIPOR (2311.09134) learns from a dense retriever, too", ge=1, le=100, later=True,
    )  # fmt: skip
    teacher_queries: int = setting(
        200_000,
        "training queries that are compared with all products, a seeded sample where there are more",
        unit="queries",
        ge=1,
        later=True,
    )
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
    head: Literal["plain", "pawa", "dense", "experts"] = setting(
        "plain", "plain: one row a code; pawa: rows that depend on the prefix; for model encoder_decoder also dense: begins as "
        "dense retrieval over codewords, and experts: a perceptron over the query's vector beside the decoder, each taught "
        "by itself",
        unit="choice", paper="pawa: NCI (2206.02743)",
    )  # fmt: skip
    head_width: int = setting(256, "hidden width of the perceptron of head experts", unit="numbers", ge=8, later=True)
    head_share: float = setting(
        0.5,
        "share of the perceptron in the scores of head experts; the rest is the decoder's",
        unit="share",
        gt=0,
        lt=1,
        later=True,
    )
    head_rank: int = setting(64, "rank of what a prefix changes in the rows, head pawa", unit="numbers", ge=1)
    new_rows: Literal["codewords", "mean"] = setting(
        "codewords", "where the ID tokens' rows begin: the quantizer's codewords, projected, or the mean embedding of a pretrained "
        "model (models made here: random, as all their rows); so do levels without codewords", unit="choice",
    )  # fmt: skip
    loss: Literal["level", "trie"] = setting(
        "level", "level: cross-entropy over all codes of a level; trie: over those that some ID has after the prefix, with "
        "serving.normalize trie alone", unit="choice", paper="MSL (2504.04178)", later=True,
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
        if self.head in ("dense", "experts") and self.kind != "encoder_decoder":
            raise ValueError(
                f"head {self.head} compares codewords with the text encoder's vectors of queries, found model {self.model!r}: "
                "set model to encoder_decoder, or head to plain"
            )
        if self.head == "experts" and self.passes_weight:
            raise ValueError(
                "head experts teaches decoder and perceptron by themselves, and consistency compares two passes of one model: set "
                "consistency to 0, or head to plain"
            )
        if self.consistency and self.dropout == 0 and self.kind in ("small", "encoder_decoder"):
            raise ValueError(
                f"consistency {self.consistency} compares passes under unlike dropout, but dropout is 0: raise dropout, or set "
                "consistency to 0"
            )
        if self.loss == "trie" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing {self.label_smoothing} spreads mass over codes that loss trie does not compare: set it to 0, or "
                "loss to level"
            )
        if self.smoothing == "near" and self.label_smoothing == 0:
            raise ValueError(
                "smoothing near spreads the mass label_smoothing, which is 0: set label_smoothing, or uniform"
            )
        return self


class GeneratorRecipe(ExamplesRecipe, ModelRecipe, TrainingRecipe):
    """The model that turns a query into IDs: its examples, its network, its training."""

    # How the work is spread, not what is trained: a rerun with other numbers finds the run's checkpoints and goes on.
    workers: int = setting(
        1, "training workers; the batches, and without dropout the losses, are the same on any number",
        unit="processes", operational=True, ge=1,
    )  # fmt: skip
    micro_batch: int | None = setting(
        None, "examples that a worker runs at a time; none = its share of the batch", unit="examples", operational=True,
        ge=1,
    )  # fmt: skip
    activation_checkpointing: bool = setting(
        False, "compute activations again in the backward pass, which saves memory for about a third more time",
        unit="yes/no", operational=True,
    )  # fmt: skip
    validate_every_epochs: int = setting(
        1, "epochs between validations, where validation queries are searched; the last epoch is always validated",
        unit="epochs", ge=1,
    )  # fmt: skip
    patience: int | None = setting(
        None, "validations without a better score after which the training stops; none = all epochs. The best epoch is "
        "exported either way", unit="validations", ge=1,
    )  # fmt: skip
    epochs: int = setting(
        30, "passes over the query→ID examples, where `stages` is empty; auto = 10 and more, for at least 740 steps", unit="epochs",
        ge=1, sized=True,
    )  # fmt: skip
    batch: int = setting(
        256,
        "global batch; auto = 64 below 5,000 examples an epoch, 128 below 10,000, else 256",
        unit="examples",
        ge=1,
        sized=True,
    )
    learning_rate: float = setting(1e-3, "AdamW's peak, after which it follows `decay`", unit="1/step", gt=0)
    validate_queries: int | None = setting(
        None, "queries of the validation split, without users, whose recall@50 in the real search is measured while training and "
        "chooses the epoch; 0 = none; null = 300 where the split has 50 or more that can judge",
        unit="queries", ge=0,
    )  # fmt: skip

    @model_validator(mode="after")
    def _patience_has_something_to_count(self):
        if self.patience is not None and self.validate_queries == 0:
            raise ValueError(
                f"patience {self.patience} counts validations, but validate_queries is 0: set validate_queries, or leave "
                "patience out"
            )
        return self

    @model_validator(mode="after")
    def _the_encoder_can_read(self):
        if self.model == "encoder_decoder" and "user" in self.kinds and self.user_recent:
            raise ValueError(
                f"user_recent {self.user_recent} puts ID tokens before a query, which the text encoder of model encoder_decoder "
                "does not know: set user_recent to 0, or another model"
            )
        return self
