"""Recipe sections: how a release answers queries, and what is measured before it is published.

`serving` reaches the retriever unchanged, and the evaluation scores what it says. Nothing that is trained depends on it: a
change makes the serving part and the evaluation anew, and a release of them.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from catid2_ray.config.section import Section, setting

_Beams = Annotated[int, Field(ge=1, le=4096)]
# Columns that every catalogue has and a filter may name beside those of catalog.filter_columns.
BUILT_IN_FILTERS = {"category_path": "list<string>", "value": "float"}


class ExpansionRecipe(Section):
    """final = dense(q · d) + a · path + lexical_weight · BM25, over the products of the beams."""

    a: float = setting(
        1.0,
        "weight of the path score beside the dense score",
        unit="weight",
        paper="a from 0 to 3 in GDR (2401.10487)",
        ge=0,
    )
    path: Literal["softmax", "logp", "root"] = setting(
        "softmax",
        "path score: softmax of log P over the query's beams, log P itself, or √P (root)",
        unit="choice",
        paper="GDR (2401.10487)",
    )
    weights: Literal["fitted", "stated"] = setting(
        "fitted",
        "fitted = a and lexical_weight, where they are above 0, are fitted to the validation queries; they stay as stated where "
        "fitting finds less, and where there are fewer than 50 queries. stated = as the recipe says",
        unit="choice", paper="RankNet (Burges et al. 2005)",
    )  # fmt: skip
    dense: Literal["tanh", "sigmoid", "dot", "none"] = setting(
        "tanh", "what is made of the product of query and product vector; none = no vectors", unit="choice",
        paper="tanh or sigmoid in GDR (2401.10487)",
    )  # fmt: skip
    unit_vectors: bool = setting(
        True, "scale vectors of queries and products to length 1, so that their product is a cosine", unit="yes/no"
    )
    lexical_weight: float = setting(0.0, "weight of BM25 over title and description; 0 = no index", unit="weight", ge=0)
    order: Literal["dense", "value"] = setting(
        "dense", "what decides which products of a beam become candidates: the dense score, or the column value",
        unit="choice",
    )  # fmt: skip
    quota: int | None = setting(None, "candidates per beam at most", unit="products", ge=1)
    most: int | None = setting(2000, "candidates per query at most", unit="products", ge=1)

    @model_validator(mode="after")
    def _ordered_by_something(self):
        if self.dense == "none" and self.order == "dense":
            raise ValueError("order is 'dense', but dense is 'none': set order=value, or a dense score")
        return self

    @property
    def needs_vectors(self) -> bool:
        return self.dense != "none"


class LookaheadRecipe(Section):
    """S = logp_weight · log P + vector_weight · (cosine of the query and the node's vector) + lexical_weight · (highest BM25 of
    the products below), one quantity for all nodes of a depth."""

    logp_weight: float = setting(
        0.003, "weight of the generator's log P; 0 = the generator is not asked at all", unit="weight", ge=0
    )
    vector_weight: float = setting(1.0, "weight of the cosine of query and node", unit="weight", ge=0)
    lexical_weight: float = setting(
        0.05, "weight of the highest BM25 (title and description) of the products below a node; 0 = no index", unit="weight",
        paper="the look-ahead of PAG (2404.14600) takes the best document below a prefix", ge=0,
    )  # fmt: skip

    try_logp_weight: tuple[Annotated[float, Field(gt=0)], ...] = setting(
        (0.01, 0.03, 0.1), "weights of log P beside logp_weight, of which recall on validation chooses one; each costs a search of "
        "these queries (2,000 at most); [] tries none, and where logp_weight is 0 none is tried either", unit="weights",
    )  # fmt: skip

    @property
    def weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("logp_weight", "vector_weight", "lexical_weight")}

    @model_validator(mode="after")
    def _something_chooses(self):
        if not (self.logp_weight or self.vector_weight):
            raise ValueError(
                "logp_weight and vector_weight are both 0, so nothing chooses among nodes without a word: set one"
            )
        return self


class ServingRecipe(Section):
    """How queries are answered."""

    search: Literal["beam", "lookahead"] = setting(
        "lookahead",
        "what chooses beams: log P alone, or with the vectors of the nodes; without node vectors it is the beam",
        unit="choice",
    )
    lookahead: LookaheadRecipe = setting(LookaheadRecipe(), "what a search that looks ahead weighs", unit="section")
    node_depth: int = setting(
        2, "depths of the trie whose nodes have a vector, the mean of the products below; 0 = none", unit="levels", ge=0
    )

    beam_width: _Beams | tuple[_Beams, ...] | None = setting(
        None, "beams per query: one number, one per level, or none = evaluation.beam_width", unit="beams",
        paper="20/50/500 over three levels in VARG",
    )  # fmt: skip
    normalize: Literal["level", "vocabulary", "trie"] = setting(
        "level", "log P over the codes of the level or over the whole vocabulary, for generator.loss level; or over the codes that "
        "IDs of the release have after the prefix, for generator.loss trie", unit="choice",
    )  # fmt: skip
    weights: Literal["float32", "int8"] = setting(
        "float32",
        "int8 copies the generator's matrices in 8 bits, for CPUs with VNNI or AMX (slower on others): scores differ a little",
        unit="choice",
    )
    stop_level: int | None = setting(
        None, "levels to search before the products of the prefixes are taken and re-scored; none = whole IDs",
        unit="levels", paper="cluster IDs of GDR (2401.10487)", ge=1,
    )  # fmt: skip
    expansion: ExpansionRecipe | None = setting(
        None, "re-score the products of the beams; none = the order of the beams", unit="section"
    )
    query_encoder: str | None = setting(
        None, "what gives queries their vectors, by id or folder; none = the encoder of the products (embedding.encoder)",
        unit="name", min_length=1,
    )  # fmt: skip
    filters: tuple[str, ...] = setting(
        (), "columns that requests may filter by: of catalog.filter_columns, category_path, value", unit="columns"
    )

    @model_validator(mode="after")
    def _clusters_are_expanded(self):
        if self.stop_level is not None and self.expansion is None:
            raise ValueError(
                f"stop_level {self.stop_level} finds prefixes, not products: set serving.expansion (such as "
                "serving.expansion={}), which ranks the products below them"
            )
        return self

    @property
    def fits_weights(self) -> bool:
        """Whether there are weights of terms to fit to each other."""
        mixed = self.expansion
        terms = () if mixed is None else (mixed.needs_vectors, mixed.a > 0, mixed.lexical_weight > 0)
        return sum(terms) > 1 and mixed.weights == "fitted"

    @property
    def tried(self) -> tuple[float, ...]:
        """Weights of log P among which validation chooses, beside the stated one; who states 0 wants no generator asked."""
        return self.lookahead.try_logp_weight if self.looks_ahead and self.lookahead.logp_weight else ()

    @property
    def looks_ahead(self) -> bool:
        return self.search == "lookahead" and self.node_depth > 0

    @property
    def needs_vectors(self) -> bool:
        return self.expansion is not None and self.expansion.needs_vectors


class EvaluationRecipe(Section):
    """What is measured before a release is published, and what it must reach."""

    split: Literal["train", "validation", "test"] = setting("test", "pairs that are scored", unit="choice", paper="4.1")
    min_relevance: float = setting(2.67, "from here on a product counts as relevant", unit="grade", paper="4.1", ge=0)
    beam_width: int = setting(100, "beams per query", unit="beams", ge=1, le=4096)
    methods: tuple[Literal["beam", "lookahead", "bm25", "dense", "served"], ...] = setting(
        ("beam", "served", "bm25"), "what is scored: the beam alone, with node vectors (lookahead), BM25, the vectors "
        "alone (dense), or what serving says (served); [] = nothing", unit="names",
    )  # fmt: skip
    max_queries: int | None = setting(None, "score a seeded sample of this many queries", unit="queries", ge=1)
    min_beam_to_bm25: float = setting(
        0.5, "FAILED when recall@50 of what is served (of the beam where that is not scored) is under this share of BM25's",
        unit="ratio", operational=True, ge=0,
    )  # fmt: skip
    min_to_release: float = setting(
        0.9, "where BM25 is not scored: FAILED when recall@50 is under this share of the current release's", unit="ratio",
        operational=True, ge=0,
    )  # fmt: skip
    canary_recall: float = setting(
        0.95, "FAILED when, before it is published, a release gives back less than this share of the products that its evaluation "
        "found for up to 50 queries", unit="ratio", operational=True, ge=0, le=1,
    )  # fmt: skip
    canary_empty: float = setting(
        0.02, "FAILED when a larger share of these queries finds nothing", unit="ratio", operational=True, ge=0, le=1
    )
    canary_slower: float = setting(
        3.0, "FAILED when the median of these queries takes more than this many times as long as by the current release, and 20 ms "
        "longer; 0 = no matter", unit="ratio", operational=True, ge=0,
    )  # fmt: skip
    diagnose_rows: int = setting(
        5_000_000,
        "decoder rows spent on exact scores of all IDs for up to 100 validation queries, which say where relevant products are "
        "lost (a query costs a row for every prefix that an ID has); 0 = none",
        unit="decoder rows", ge=0,
    )  # fmt: skip
    workers: int = setting(2, "actors that search", unit="actors", operational=True, ge=1)
    bm25_max_products: int = setting(
        5_000_000, "BM25 is left out above this: its index is in memory", unit="products", ge=1, le=5_000_000
    )
