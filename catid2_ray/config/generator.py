"""Recipe sections after the quantizer: unique IDs, the generator, and what is measured."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from catid2_ray.config.base import Section, setting
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


class GeneratorRecipe(TrainingRecipe):
    model: str = setting(
        "small", "small (from the widths below, tokenizer trained on the catalogue) or a T5 by id or folder", unit="name",
        paper="4.1: T5-base",
    )  # fmt: skip
    vocabulary: int = setting(8000, "subwords of the small tokenizer", unit="tokens", ge=100, le=100_000)
    width: int = setting(192, "d_model of the small T5", unit="numbers", ge=16)
    layers: int = setting(2, "encoder layers, and as many decoder layers", unit="layers", ge=1)
    heads: int = setting(4, "attention heads", unit="heads", ge=1)
    feed_forward: int = setting(512, "d_ff", unit="numbers", ge=16)
    dropout: float = setting(0.1, "dropout", unit="share", ge=0, lt=1)
    min_relevance: float = setting(
        2.33, "pairs of the train split with at least this relevance teach", unit="grade", paper="4.1: labels E and S",
        ge=0,
    )  # fmt: skip
    titles_per_query: float = setting(1.0, "title→ID examples per query→ID example; 0 = none", unit="ratio", ge=0)
    word_keep: float = setting(
        0.5, "share of words kept when a title serves as a pseudo-query; 1 keeps titles whole", unit="share", gt=0, le=1,
    )  # fmt: skip
    query_tokens: int = setting(24, "longest input", unit="tokens", ge=4, le=512)
    level_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = setting(
        None, "weight per level of the loss; none = 1", unit="weight"
    )
    label_smoothing: float = setting(0.0, "mass spread over the codes of the level", unit="share", ge=0, lt=1)
    epochs: int = setting(30, "passes over the query→ID examples", unit="epochs", ge=1)
    batch: int = setting(256, "global batch", unit="examples", ge=1)
    learning_rate: float = setting(1e-3, "AdamW's peak, then cosine to zero", unit="1/step", gt=0)
    tokenizer_rows: int = setting(200_000, "products whose text the small tokenizer sees at most", unit="rows", ge=100)

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.model == "small" and self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}: choose a multiple")
        return self


class EvaluationRecipe(Section):
    split: Literal["train", "validation", "test"] = setting("test", "pairs that are scored", unit="choice", paper="4.1")
    min_relevance: float = setting(2.67, "from here on a product counts as relevant", unit="grade", paper="4.1", ge=0)
    beam_width: int = setting(100, "beams per query", unit="beams", ge=1, le=4096)
    methods: tuple[Literal["beam", "bm25", "dense", "served"], ...] = setting(
        ("beam", "bm25"), "what is scored: the beam alone, BM25, the vectors alone, or what serving says", unit="names",
        min_length=1,
    )  # fmt: skip
    max_queries: int | None = setting(None, "score a seeded sample of this many queries", unit="queries", ge=1)
    min_beam_to_bm25: float = setting(
        0.5, "FAILED when the beam's recall@50 is under this share of BM25's", unit="ratio", operational=True, ge=0
    )
    workers: int = setting(2, "actors that search", unit="actors", operational=True, ge=1)
    bm25_max_products: int = setting(
        5_000_000, "BM25 is left out above this: its index is in memory", unit="products", ge=1, le=5_000_000
    )
