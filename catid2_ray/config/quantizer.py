"""Recipe sections: how products get codes, and how that is trained or fitted; how codes become IDs."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from catid2_ray.config.kinds import KINDS, as_kind, preset
from catid2_ray.config.section import Section, TrainingRecipe, setting
from catid2_ray.docid import DocidSpace


class QuantizerRecipe(TrainingRecipe):
    """How vectors become codes; `kind` selects a preset, which settings given here override."""

    kind: Literal[KINDS] = setting(
        "cat_id2", "how IDs are learned; fills the fields that define the kind where the recipe does not set them",
        unit="choice", paper="3, 4.1.3, tables 3 and 5",
    )  # fmt: skip
    coder: Literal["rq_vae", "kmeans", "tree"] = setting(
        "rq_vae", "trained encoder with residual codebooks, residual k-means on the embedding, or k-means tree; set by kind",
        unit="choice", paper="3",
    )  # fmt: skip
    ids: Literal["unique", "suffix", "digits", "cluster"] = setting(
        "unique", "unique = collisions resolved; suffix = one ordinal token more; digits = the ordinal as decimal digits; "
        "cluster = products share IDs", unit="choice", paper="3.4: unique",
    )  # fmt: skip
    codes_per_level: tuple[Annotated[int, Field(ge=2, le=65535)], ...] = setting(
        (256, 256, 256, 256), "K of each level; their number is L; auto = four alike, with 64 to 128 products for each first code, "
        "8 to 256", unit="codes", paper="4.1: L = 4, K in {256, 512}", min_length=1, max_length=15, sized=True,
    )  # fmt: skip
    hidden: tuple[Annotated[int, Field(ge=2)], ...] = setting(
        (512, 256, 128), "widths of the encoder; the decoder mirrors it", unit="numbers", min_length=1
    )
    encoder: Literal["residual", "mlp"] = setting(
        "residual", "residual: z = d + f(d) at length 1 and d̂ = ẑ + g(ẑ), which begin as the identity; mlp: random layers",
        unit="choice", paper="3.2: a DNN",
    )  # fmt: skip
    latent: int | None = setting(
        None, "Z: width of the latent and of the codewords; none = the embedding's for encoder residual, 32 for mlp",
        unit="numbers", ge=2,
    )  # fmt: skip
    latent_radius: float | None = setting(
        None, "radius of the sphere that z of encoder mlp is held on; none = free, as printed (residual: always 1)",
        unit="norm", gt=0,
    )  # fmt: skip
    reconstruction: float = setting(0.0, "weight of eq. 1", unit="weight", paper="eq. 8 has none; TIGER's is 1", ge=0)
    dispersion: float = setting(0.1, "α, weight of eq. 7", unit="weight", paper="4.1", ge=0)
    hierarchical: float = setting(1e-4, "β, weight of eq. 4", unit="weight", paper="4.1", ge=0)
    category_on: Literal["residual", "latent", "prefix", "projection"] = setting(
        "residual", "what the category term sees: each level's residual, one soft contrast on z, each level's quantised prefix, "
        "or one soft contrast on a head over z that is thrown away after training", unit="choice", paper="eq. 4: residual",
    )  # fmt: skip
    category_temperature: float | None = setting(
        None, "τ of the category term; none = temperature", unit="cosine", gt=0
    )
    category_decay: float = setting(
        0.0, "category_on latent and projection: weight of a shared ancestor for each level above the leaf; 0 = the leaf alone",
        unit="share a level", ge=0, le=1,
    )  # fmt: skip
    level_power: float = setting(
        0.0, "eq. 4 of a level is weighted by its mean residual norm relative to the first level's, to this power",
        unit="exponent", paper="none as printed", ge=0,
    )  # fmt: skip
    hierarchical_over: Literal["anchors", "batch"] = setting(
        "anchors", "eq. 4 is averaged over the rows that have a positive and a negative, or over the whole batch as printed",
        unit="choice", paper="eq. 4: 1/|B|", later=True,
    )  # fmt: skip
    cluster_scale: float = setting(1.0, "γ, weight of eq. 5", unit="weight", paper="4.1", ge=0)
    commitment: float = setting(0.25, "η, weight of the commitment term in eq. 2", unit="weight", ge=0)
    temperature: float = setting(0.1, "τ of the contrastive terms", unit="cosine", gt=0)
    scale_temperature: float = setting(
        1.0, "divides the squared distances of eq. 5 before the softmax", unit="squared norm", paper="1 as printed",
        gt=0,
    )  # fmt: skip
    scale_distance: Literal["squared", "plain"] = setting(
        "squared", "‖r − e‖ in the softmax of eq. 5: squared, as in eq. 2, or plain", unit="choice", later=True,
    )  # fmt: skip
    negatives: Literal["siblings", "all"] = setting(
        "siblings", "negatives of eq. 4 from depth 2 on", unit="choice", paper="3.1, table 5"
    )
    category_depth: int | None = setting(
        None, "depths that eq. 4 acts on; none = catalog.max_category_depth", unit="levels", paper="table 5", ge=1
    )
    category_from: Literal["catalog", "clusters"] = setting(
        "catalog", "whose categories training sees: the catalogue's, or of a shop without any clusters of products' vectors in "
        "clusters in clusters (16 · 8 · 8)", unit="choice", later=True,
    )  # fmt: skip
    category_confidence: dict[str, Annotated[float, Field(ge=0)]] = setting(
        {}, "{COLUMN: LEAST}: training sees no category of a product with less in that column of catalog.filter_columns, or with "
        "nothing there; for inferred categories", unit="column: least", later=True,
    )  # fmt: skip
    category_masked: float = setting(
        0.0, "share of the deepest categories that training does not see", unit="share", paper="table 5, 2&3 level",
        ge=0, le=1,
    )  # fmt: skip
    category_noise: float = setting(
        0.0, "share of products whose category paths are exchanged before training; 1 = the shuffled control",
        unit="share", ge=0, le=1,
    )  # fmt: skip
    allow_deep_categories: bool = setting(
        False, "train although every level is tied to a category (H ≥ L)", unit="yes/no", paper="3.1 forbids it"
    )
    sampler: Literal["uniform", "category_balanced"] = setting(
        "uniform", "category_balanced draws part of each batch as small subtrees, which only eq. 4 sees", unit="choice"
    )
    uniform_share: float = setting(
        0.5, "share of a category_balanced batch that is drawn uniformly", unit="share", gt=0, lt=1
    )
    epochs: int = setting(
        6, "passes over the catalogue; encoder mlp, which begins at random, needs many more", unit="epochs",
        paper="4.1: 300", ge=1,
    )  # fmt: skip
    batch: int = setting(
        1024,
        "global batch; auto = a twelfth of the products, 32 to 1,024",
        unit="products",
        paper="4.1: 4096",
        ge=2,
        sized=True,
    )
    learning_rate: float = setting(5e-4, "AdamW's peak, then cosine to zero", unit="1/step", gt=0)
    input: Literal["shard", "stream"] = setting(
        "shard", "shard = stream once to a memory-mapped file on the node; stream = anew in every pass, where disks are small",
        unit="choice",
    )  # fmt: skip
    kmeans_sample: int = setting(
        20_000, "rows that k-means, trees and the watch over the codes see", unit="rows", ge=16
    )
    refit: bool = setting(
        True, "k-means again after the last epoch, as codewords lag behind the encoder", unit="yes/no"
    )
    warm_start: bool = setting(
        False, "start from the quantizer of the current release, where there is one of the same shape, so that fewer IDs change",
        unit="yes/no",
    )  # fmt: skip
    revive_every_epochs: int = setting(1, "epochs between revivals of dead codes; 0 = never", unit="epochs", ge=0)
    collapse_patience: int = setting(
        3, "epochs in a row with a collapsed level after which the job stops; 0 = never", unit="epochs",
        operational=True, ge=0,
    )  # fmt: skip
    balanced: bool = setting(False, "k-means with clusters of near-equal size (coder kmeans)", unit="yes/no")
    branch: int = setting(10, "children of a tree's node (coder tree); 0 = no tree", unit="nodes", ge=0, le=4096)
    leaf: int = setting(100, "products above which a node is split", unit="products", ge=1)
    tree_categories: bool = setting(False, "the tree's first levels are the category path (Hi-Gen)", unit="yes/no")
    force_category: bool = setting(
        False, "the first code is the index of the product's category, the nearest one where it has none (CQ-SID)",
        unit="yes/no",
    )  # fmt: skip
    ema: float | None = setting(
        None, "decay of codebooks that follow their rows by moving averages; none = learned by gradient",
        unit="share a step", gt=0, lt=1,
    )  # fmt: skip
    query_item: float = setting(
        0.0, "weight of the query–item term, which sees one training query a product (CQ-SID)", unit="weight", ge=0
    )

    @model_validator(mode="wrap")
    @classmethod
    def _fill_from_kind(cls, values, build):
        """The preset's fields count as left out, as defaults do (`Recipe.continued`)."""
        if isinstance(values, dict) and (kind := values.get("kind", "cat_id2")) in KINDS:
            section = build(preset(kind) | values)
            section.model_fields_set.intersection_update(values)
            return section
        return build(values)

    @model_validator(mode="after")
    def _ids_fit(self):
        _ = self.space
        if self.branch == 1:
            raise ValueError("branch 1 splits nothing: choose 2 or more, or 0 for no tree")
        if self.coder == "tree" and self.ids in ("unique", "cluster"):
            raise ValueError(
                f"ids {self.ids!r} does not fit coder 'tree', whose leaves hold many products: choose suffix or digits"
            )
        if self.coder == "tree" and self.warm_start:
            raise ValueError("warm_start does not fit coder 'tree', which is grown anew: set it to false")
        if self.precision != "fp32":
            raise ValueError(
                f"precision {self.precision} is not offered for the quantizer: codewords change between steps, and each time "
                "all weights would be rounded; it is small enough for fp32"
            )
        if self.micro_batch not in (None, self.batch // self.workers):
            raise ValueError(
                f"micro_batch {self.micro_batch} is not offered for the quantizer: eqs. 4, 5 and 7 compare the rows of a batch "
                f"with each other, so that parts of it give another loss; leave it out, or lower batch {self.batch}"
            )
        changed = (
            self.category_noise or self.category_masked or self.category_from != "catalog" or self.category_confidence
        )
        if changed and (self.force_category or self.tree_categories):
            raise ValueError(
                f"category_noise {self.category_noise}, category_masked {self.category_masked}, category_from "
                f"{self.category_from!r} and category_confidence {self.category_confidence} change what training sees, but kind "
                f"{self.kind!r} reads the true category whenever it encodes: leave them out"
            )
        if self.sampler == "category_balanced" and self.input == "stream":
            raise ValueError("sampler 'category_balanced' draws rows by index and needs input 'shard', found 'stream'")
        return self

    @model_validator(mode="after")
    def _encoder_fits(self):
        if self.encoder == "residual" and self.coder == "rq_vae" and self.latent_radius is not None:
            raise ValueError(
                f"latent_radius {self.latent_radius} does not fit encoder 'residual', which holds z at length 1: leave it out, or "
                "set encoder to mlp"
            )
        if self.level_power and self.category_on != "residual":
            raise ValueError(
                f"level_power {self.level_power} weighs the levels' residuals, but category_on is {self.category_on!r}: set it to 0"
            )
        if self.category_decay and self.category_on not in ("latent", "projection"):
            raise ValueError(
                f"category_decay {self.category_decay} is of one contrast over all depths, but category_on "
                f"{self.category_on!r} works level by level: set it to 0, or category_on to latent or projection"
            )
        return self

    def latent_of(self, width: int) -> int:
        """Z for embeddings of that width."""
        return self.latent or (width if self.encoder == "residual" else 32)

    @property
    def by_level(self) -> bool:
        """Whether the category term ties each level to the categories of its depth."""
        return self.coder == "rq_vae" and self.hierarchical > 0 and self.category_on in ("residual", "prefix")

    @property
    def space(self) -> DocidSpace:
        return DocidSpace(self.codes_per_level)

    @property
    def explicit(self) -> set[str]:
        """The fields in which this section departs from its kind's preset and the defaults."""
        plain = QuantizerRecipe(kind=self.kind)
        return {name for name in type(self).model_fields if getattr(self, name) != getattr(plain, name)}

    def as_kind(self, kind: str) -> dict:
        """The settings of the same budgets with another way of making IDs, to be checked with the rest of a recipe.

        A stated size stays stated, also where it is the default: left out, it would be `auto` and name another artefact."""
        stated = self.model_fields_set.intersection(self.sized())
        return as_kind(self.model_dump(mode="json"), self.explicit | stated, kind)


class IdsRecipe(Section):
    """How codes become IDs, and how long an ID is kept for a product."""

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
    turn_rows: int | None = setting(
        None, "where prefixes overflow so far that more products than these must be placed together, they are placed in turns of "
        "about so many; none = all at once, refused beyond bucket_rows", unit="products", operational=True, ge=1000,
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
