"""Recipe sections after the quantizer: unique IDs, the generator, and what is measured."""

from typing import Literal

from pydantic import model_validator

from catid2_ray.config.base import Section, setting
from catid2_ray.config.examples import ExamplesRecipe
from catid2_ray.config.model import ModelRecipe
from catid2_ray.config.training import TrainingRecipe


class IdsRecipe(Section):
    method: Literal["sinkhorn", "exact", "greedy"] = setting(
        "exact",
        "how products of a colliding prefix get distinct last codes: the optimum by Sinkhorn (proved) or by linear "
        "assignment, which was faster at equal quality; or greedily",
        unit="choice",
        paper="3.4: Sinkhorn",
    )
    cluster_max: int | None = setting(
        50, "products that may share an ID where quantizer.ids is 'cluster'; larger clusters split into groups, one token more",
        unit="products", paper="T_max = 50 of CQ-SID (2605.14434)", ge=1,
    )  # fmt: skip
    cluster_split: Literal["kmeans", "value", "random"] = setting(
        "kmeans", "who shares a group: products of near residuals, of near business value, or a seeded draw",
        unit="choice", paper="random in CQ-SID (2605.14434)",
    )  # fmt: skip
    encode_rows: int = setting(1024, "rows of one padded forward pass", unit="rows", ge=1)
    bucket_rows: int = setting(
        1_000_000, "products that one worker holds at a time while collisions are resolved, which bounds its memory",
        unit="products", operational=True, ge=1000,
    )  # fmt: skip
    id_quarantine: int = setting(
        2, "releases for which the ID of a product that leaves is given to nobody else; fixed when it leaves",
        unit="releases", ge=0,
    )  # fmt: skip
    realign: bool = setting(
        True, "name the codes of a new quantizer after those of the current release, so that tokens keep their meaning",
        unit="yes/no",
    )  # fmt: skip
    max_churn: float | None = setting(
        None, "share of the products of both releases whose ID changes, above which a full re-ID is not published",
        unit="share", operational=True, ge=0, le=1,
    )  # fmt: skip
    workers: int = setting(
        2, "actors that encode, resolve and write IDs, and make examples", unit="actors", operational=True, ge=1
    )  # fmt: skip


class GeneratorRecipe(ExamplesRecipe, ModelRecipe, TrainingRecipe):
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
    epochs: int = setting(30, "passes over the query→ID examples, where `stages` is empty", unit="epochs", ge=1)
    batch: int = setting(256, "global batch", unit="examples", ge=1)
    learning_rate: float = setting(1e-3, "AdamW's peak, after which it follows `decay`", unit="1/step", gt=0)
    validate_queries: int = setting(
        0, "queries of the validation split, without users, whose recall@50 in the real search is measured while training; "
        "0 = none",
        unit="queries", ge=0,
    )  # fmt: skip

    @model_validator(mode="after")
    def _patience_has_something_to_count(self):
        if self.patience is not None and not self.validate_queries:
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


class EvaluationRecipe(Section):
    split: Literal["train", "validation", "test"] = setting("test", "pairs that are scored", unit="choice", paper="4.1")
    min_relevance: float = setting(2.67, "from here on a product counts as relevant", unit="grade", paper="4.1", ge=0)
    beam_width: int = setting(100, "beams per query", unit="beams", ge=1, le=4096)
    methods: tuple[Literal["beam", "bm25", "dense", "served"], ...] = setting(
        ("beam", "bm25"), "what is scored: the beam alone, BM25, the vectors alone, or what serving says; [] = nothing",
        unit="names",
    )  # fmt: skip
    max_queries: int | None = setting(None, "score a seeded sample of this many queries", unit="queries", ge=1)
    min_beam_to_bm25: float = setting(
        0.5, "FAILED when the beam's recall@50 is under this share of BM25's", unit="ratio", operational=True, ge=0
    )
    workers: int = setting(2, "actors that search", unit="actors", operational=True, ge=1)
    bm25_max_products: int = setting(
        5_000_000, "BM25 is left out above this: its index is in memory", unit="products", ge=1, le=5_000_000
    )
