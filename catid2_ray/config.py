"""The recipe: everything that decides what a job computes, as frozen pydantic models.

Every field carries a description, a unit, its range and the section of the CAT-ID² paper it comes from; where the paper
is silent the field says "not stated in the paper". Fields marked operational change where and how fast the work is done,
never its result, and so stay out of the keys of artefacts.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError

NOT_STATED = "not stated in the paper"


def setting(
    default: Any = ..., description: str = "", *, unit: str, paper: str = NOT_STATED, operational=False, **limits
) -> Any:
    """A recipe field: what it is, unit, source (unless operational or a section), range (pydantic's ge, le, min_length …)."""
    extra = {"unit": unit} | ({"operational": True} if operational else {} if unit == "section" else {"paper": paper})
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def identity(self) -> dict:
        """The settings that decide the result, as JSON values: all but the operational ones."""
        fields = type(self).model_fields
        dumped = self.model_dump(mode="json")
        for name, field in fields.items():
            if (field.json_schema_extra or {}).get("operational"):
                del dumped[name]
            elif isinstance(value := getattr(self, name), Section):
                dumped[name] = value.identity()
        return dumped


class ClusterRecipe(Section):
    """Where the job runs. Ignored, but for the memory of one task, when the job joins a running cluster."""

    logical_cpus: int = setting(
        4, "CPUs that a Ray started by this job offers; more than the cores, so that data tasks fit beside training",
        unit="CPUs", operational=True, ge=2,
    )  # fmt: skip
    object_store_mb: int = setting(400, "object store of a Ray started by this job", unit="MB", operational=True, ge=80)
    threads_per_worker: int = setting(
        1, "OpenMP threads of a worker; above one only on cores that nobody shares", unit="threads", operational=True,
        ge=1,
    )  # fmt: skip
    gpus_per_worker: float = setting(0, "of a training worker; 0 = CPU with gloo", unit="GPUs", operational=True, ge=0)
    worker_start_timeout_s: int = setting(300, "longest wait for the workers", unit="seconds", operational=True, ge=10)


class SyntheticRecipe(Section):
    """A generated catalogue, for people without data."""

    products: int = setting(6000, "products to generate", unit="products", ge=50)
    queries: int = setting(2500, "queries to generate", unit="queries", ge=20)
    seed: int = setting(7, "seed of the generator", unit="integer", ge=0)


class CatalogRecipe(Section):
    root: str | None = setting(
        None, "folder or s3:// prefix with products and pairs, each a .parquet file or folder", unit="URI",
        operational=True, min_length=1,
    )  # fmt: skip
    synthetic: SyntheticRecipe | None = setting(None, "generate a catalogue instead of reading one", unit="section")
    rows_per_part: int = setting(
        16384, "products per part; a part is the unit of work of every later stage", unit="rows", ge=16, le=1_000_000
    )
    min_category_depth: int = setting(
        0, "products whose path is shorter are set aside; 0 keeps products without a path", unit="levels",
        paper="4.1 keeps products of depth 3 and more", ge=0,
    )  # fmt: skip
    max_category_depth: int = setting(3, "H: deeper paths are cut", unit="levels", paper="4.1; 3.1 demands H < L", ge=1)
    max_bad_fraction: float = setting(0.01, "bad rows above which the job fails", unit="share of rows", ge=0, le=1)

    @model_validator(mode="after")
    def _one_source(self):
        if (self.root is None) == (self.synthetic is None):
            raise ValueError(
                "set exactly one of catalog.root (a folder or s3:// prefix with products and pairs) and catalog.synthetic"
            )
        if self.min_category_depth > self.max_category_depth:
            raise ValueError(
                f"catalog.min_category_depth {self.min_category_depth} exceeds catalog.max_category_depth "
                f"{self.max_category_depth}: every product would be set aside"
            )
        return self


class EmbeddingRecipe(Section):
    source: Literal["auto", "given", "encoder"] = setting(
        "auto", "given = the table's embedding column; encoder = compute; auto = given where the column exists",
        unit="choice",
    )  # fmt: skip
    encoder: str = setting(
        "lsa", "lsa (built in: TF-IDF + SVD, no download) or a Hugging Face model id or folder", unit="name",
        paper="3.2 names BERT- and T5-type encoders, no checkpoint",
    )  # fmt: skip
    text: tuple[Literal["title", "category_path", "description"], ...] = setting(
        ("title", "category_path", "description"), "columns joined to the embedded text, in this order", unit="columns",
        paper="3.2; Table 4 leaves category_path out", min_length=1,
    )  # fmt: skip
    width: int | None = setting(
        None, "D: width of given embeddings (checked at the door) or of lsa; none = as the first row or the encoder has it",
        unit="numbers", ge=2, le=8192,
    )  # fmt: skip
    lsa_vocabulary: int = setting(50_000, "terms that lsa keeps at most", unit="terms", ge=10)
    sample_rows: int = setting(50_000, "rows that lsa is fitted on at most", unit="rows", ge=100)
    tokens: int = setting(64, "longest text that the encoder reads", unit="tokens", ge=4, le=4096)
    batch: int = setting(64, "texts per forward pass", unit="texts", operational=True, ge=1)
    workers: int = setting(2, "actors that embed", unit="actors", operational=True, ge=1)
    gpus_per_worker: float = setting(0, "of an embedding actor; 0 = CPU", unit="GPUs", operational=True, ge=0)


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


class QuantizerRecipe(TrainingRecipe):
    kind: Literal["cat_id2"] = setting("cat_id2", "how IDs are learned", unit="choice", paper="3")
    codes_per_level: tuple[Annotated[int, Field(ge=2, le=65535)], ...] = setting(
        (256, 256, 256, 256), "K of each level; their number is L", unit="codes",
        paper="4.1: L = 4, K in {256, 512}", min_length=1, max_length=16,
    )  # fmt: skip
    hidden: tuple[Annotated[int, Field(ge=2)], ...] = setting(
        (512, 256, 128), "widths of the encoder; the decoder mirrors it", unit="numbers", min_length=1
    )
    latent: int = setting(32, "Z: width of the latent and of the codewords", unit="numbers", ge=2)
    latent_radius: float | None = setting(
        None, "radius of the sphere that z is held on; none = free, as printed", unit="norm", gt=0
    )
    dispersion: float = setting(0.1, "α, weight of eq. 7", unit="weight", paper="4.1", ge=0)
    hierarchical: float = setting(1e-4, "β, weight of eq. 4", unit="weight", paper="4.1", ge=0)
    cluster_scale: float = setting(1.0, "γ, weight of eq. 5", unit="weight", paper="4.1", ge=0)
    commitment: float = setting(0.25, "η, weight of the commitment term in eq. 2", unit="weight", ge=0)
    temperature: float = setting(0.1, "τ of the contrastive terms", unit="cosine", gt=0)
    scale_temperature: float = setting(
        1.0, "divides the squared distances of eq. 5 before the softmax", unit="squared norm", paper="1 as printed",
        gt=0,
    )  # fmt: skip
    negatives: Literal["siblings", "all"] = setting(
        "siblings", "negatives of eq. 4 from depth 2 on", unit="choice", paper="3.1"
    )
    epochs: int = setting(300, "passes over the catalogue", unit="epochs", paper="4.1", ge=1)
    batch: int = setting(4096, "global batch", unit="products", paper="4.1", ge=2)
    learning_rate: float = setting(1e-3, "AdamW's peak, then cosine to zero", unit="1/step", gt=0)
    input: Literal["shard", "stream"] = setting(
        "shard", "shard = stream once to a memory-mapped file on the node; stream = every epoch anew, where disks are small",
        unit="choice",
    )  # fmt: skip
    kmeans_sample: int = setting(
        20_000, "rows that k-means initialisation and the watch over dead codes see", unit="rows", ge=16
    )
    refit: bool = setting(
        True, "k-means again after the last epoch, as codewords lag behind the encoder", unit="yes/no"
    )
    revive_every_epochs: int = setting(1, "epochs between revivals of dead codes; 0 = never", unit="epochs", ge=0)

    @model_validator(mode="after")
    def _ids_fit(self):
        _ = self.space
        return self

    @property
    def space(self) -> DocidSpace:
        return DocidSpace(self.codes_per_level)


class IdsRecipe(Section):
    method: Literal["sinkhorn", "exact", "greedy"] = setting(
        "sinkhorn", "how products of a colliding prefix get distinct last codes", unit="choice", paper="3.4: Sinkhorn"
    )
    encode_rows: int = setting(1024, "rows of one padded forward pass", unit="rows", ge=1)
    workers: int = setting(2, "actors that encode", unit="actors", operational=True, ge=1)


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
    methods: tuple[Literal["beam", "bm25"], ...] = setting(
        ("beam", "bm25"), "what is scored", unit="names", min_length=1
    )
    max_queries: int | None = setting(None, "score a seeded sample of this many queries", unit="queries", ge=1)
    min_beam_to_bm25: float = setting(
        0.5, "FAILED when the beam's recall@50 is under this share of BM25's", unit="ratio", operational=True, ge=0
    )
    workers: int = setting(2, "actors that search", unit="actors", operational=True, ge=1)
    bm25_max_products: int = setting(
        5_000_000, "BM25 is left out above this: its index is in memory", unit="products", ge=1, le=5_000_000
    )


class Recipe(Section):
    """One job: a catalogue, a store, and the settings of every stage."""

    name: str = setting("reindex", "shown in reports", unit="name", operational=True, min_length=1)
    store: str = setting(
        "catid2_store", "folder or s3:// prefix that holds artefacts and releases", unit="URI", operational=True,
        min_length=1,
    )  # fmt: skip
    seed: int = setting(0, "seed of every random choice", unit="integer", ge=0)
    cluster: ClusterRecipe = setting(ClusterRecipe(), "where it runs", unit="section", operational=True)
    catalog: CatalogRecipe = setting(description="stage 0", unit="section")
    embedding: EmbeddingRecipe = setting(EmbeddingRecipe(), "stage 0", unit="section")
    quantizer: QuantizerRecipe = setting(QuantizerRecipe(), "stage 1", unit="section")
    ids: IdsRecipe = setting(IdsRecipe(), "stage 2", unit="section")
    generator: GeneratorRecipe = setting(GeneratorRecipe(), "stage 3", unit="section")
    evaluation: EvaluationRecipe = setting(EvaluationRecipe(), "what is measured before publication", unit="section")
    sample_queries: tuple[str, ...] = setting(
        (), "queries answered at the end of the job", unit="texts", operational=True
    )

    @model_validator(mode="after")
    def _depth_below_levels(self):
        levels, depth = len(self.quantizer.codes_per_level), self.catalog.max_category_depth
        if depth >= levels:
            raise ValueError(
                f"catalog.max_category_depth {depth} must be smaller than the number of levels, {levels} "
                "(quantizer.codes_per_level): with H ≥ L every level is tied to a category and the ID degenerates to the "
                "category tree (CAT-ID², section 3.1). Lower the one or add a level to the other"
            )
        weights = self.generator.level_weights
        if weights is not None and len(weights) != levels:
            raise ValueError(
                f"generator.level_weights has {len(weights)} entries, quantizer.codes_per_level {levels}: give one per level"
            )
        return self

    @classmethod
    def build(cls, values: dict) -> "Recipe":
        """Validate; a contradiction or an unknown key raises RecipeError that names every field at fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                where = ".".join(str(part) for part in problem["loc"]) or "recipe"
                found = "" if problem["type"] in ("missing", "value_error") else f", found {problem['input']!r}"
                hint = (
                    " (unknown key; `catid2 recipe --schema` lists all)" if problem["type"] == "extra_forbidden" else ""
                )
                lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}{found}{hint}")
            raise RecipeError("the recipe is not valid:\n  " + "\n  ".join(lines)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> "Recipe":
        """Read a YAML recipe and apply `--set a.b=c` overrides, whose right-hand sides are YAML too.

        Raises RecipeError for a missing file, bad YAML, a malformed override, or an invalid recipe.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{path} must be a mapping of recipe fields, found {type(values).__name__}")
        for override in overrides:
            _apply(values, override)
        return cls.build(values)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(values: dict, override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r} is not of the form a.b=value, such as quantizer.epochs=50")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from None
    node = values
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[keys[-1]] = value


def schema() -> str:
    """The JSON schema of a recipe, with unit, range and paper section of every field."""
    return json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False)
