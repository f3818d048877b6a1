"""Recipe sections: where the job runs, which catalogue it reads, and how products become vectors."""

from typing import Literal

from pydantic import model_validator

from catid2_ray.config.section import Section, TrainingRecipe, setting


class ClusterRecipe(Section):
    """Where the job runs. A job that joins a running cluster heeds workers' threads, GPUs and pools alone, and only such a job
    heeds pools."""

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
    data_pool: str | None = setting(
        None, "where data work may run: nodes with the label pool of this name, as cluster.yaml gives it; none = any node",
        unit="name", operational=True, min_length=1,
    )  # fmt: skip
    training_pool: str | None = setting(
        None, "where training workers, and other work on GPUs, may run: nodes with the label pool of this name; none = any node",
        unit="name", operational=True, min_length=1,
    )  # fmt: skip
    worker_start_timeout_s: int = setting(
        300, "wait for nodes that take a training's workers, before Ray asks for them anew", unit="seconds",
        operational=True, ge=10,
    )  # fmt: skip


class SyntheticRecipe(Section):
    """A generated catalogue, for people without data."""

    products: int = setting(6000, "products to generate", unit="products", ge=50)
    queries: int = setting(2500, "queries to generate", unit="queries", ge=20)
    seed: int = setting(7, "seed of the generator", unit="integer", ge=0)


_OF_PAIRS = ()  # settings of the catalogue that only its pairs depend on
_TAKEN = {"product_id", "title", "description", "category_path", "value", "embedding"}


class CatalogRecipe(Section):
    """Which products and pairs the job reads, and what it refuses."""

    root: str | None = setting(
        None, "folder or s3:// prefix with products and, for queries to learn from and to measure, pairs: each a .parquet, .csv, "
        ".tsv or .jsonl file, or a folder of such", unit="URI",
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
    filter_columns: dict[str, Literal["string", "int", "float", "bool", "list<string>"]] = setting(
        {}, "columns of products that serving may filter by, such as {brand: string, price: float}", unit="column: type"
    )
    category_separator: str | None = setting(
        None, "what stands between two names where category_path is one text, such as ' > '; none = it is a list", unit="text",
        min_length=1, later=True,
    )  # fmt: skip
    allow_leak: bool = setting(
        False, "go on though a query stands in train and in test, so that its answers were learned; for tables whose split is "
        "meant so",
        unit="yes/no", operational=True,
    )  # fmt: skip
    workers: int = setting(2, "actors that read and check", unit="actors", operational=True, ge=1)
    max_bad_fraction: float = setting(
        0.01, "bad rows above which the job fails; pairs of unknown products and of a lower grade are set aside but not counted",
        unit="share of rows", ge=0, le=1,
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_source(self):
        if (self.root is None) == (self.synthetic is None):
            raise ValueError(
                "set exactly one of catalog.root (a folder or s3:// prefix with products and pairs) and catalog.synthetic"
            )
        if taken := sorted(set(self.filter_columns) & _TAKEN):
            raise ValueError(
                f"catalog.filter_columns names {', '.join(taken)}, which {'is a column' if len(taken) == 1 else 'are columns'} "
                "of every catalogue: rename yours (category_path and value may be filtered by as they are)"
            )
        if self.min_category_depth > self.max_category_depth:
            raise ValueError(
                f"catalog.min_category_depth {self.min_category_depth} exceeds catalog.max_category_depth "
                f"{self.max_category_depth}: every product would be set aside"
            )
        return self

    def identity(self) -> dict:
        """What decides the table of products; `pairs_identity` what decides that of pairs."""
        return {name: value for name, value in super().identity().items() if name not in _OF_PAIRS}

    def pairs_identity(self) -> dict:
        values = super().identity()
        return {name: values[name] for name in ("synthetic", "max_bad_fraction", *_OF_PAIRS)}


class EmbeddingRecipe(Section):
    """How a product becomes a vector."""

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
    adapter: Literal["auto", "linear", "none"] = setting(
        "auto", "linear = a matrix for products' vectors and one for queries', learned from training pairs (section adapter); "
        "none = vectors as they are; auto = linear where there are training pairs and an encoder for queries",
        unit="choice",
    )  # fmt: skip
    encoder_mode: Literal["frozen", "tuned"] = setting(
        "frozen", "tuned = the encoder is fine-tuned on training pairs (section tuning), products and queries then go through it, "
        "and it is kept from release to release; frozen = as it was published",
        unit="choice", paper="Karpukhin et al. 2020 (2004.04906)", later=True,
    )  # fmt: skip
    tokens: int = setting(64, "longest text that the encoder reads", unit="tokens", ge=4, le=4096)
    batch: int = setting(64, "texts per forward pass; another number may change the last bits", unit="texts", ge=1)
    workers: int = setting(2, "actors that embed", unit="actors", operational=True, ge=1)
    gpus_per_worker: float = setting(0, "of an embedding actor; 0 = CPU", unit="GPUs", operational=True, ge=0)

    def vectors_identity(self) -> dict:
        """What decides the vectors as the encoder makes them; the adapter comes after, and a tuned encoder has a digest."""
        return {name: value for name, value in self.identity().items() if name not in ("adapter", "encoder_mode")}

    @model_validator(mode="after")
    def _can_be_tuned(self):
        if self.encoder_mode == "tuned" and (self.encoder == "lsa" or self.source == "given"):
            which = (
                "source given brings vectors and no encoder" if self.source == "given" else "encoder lsa has no weights"
            )
            raise ValueError(
                f"encoder_mode tuned trains a Hugging Face text encoder, but {which}: name one in embedding.encoder with source "
                "encoder, or set encoder_mode to frozen"
            )
        return self


class _JudgedRecipe(Section):
    """What trainings share whose epochs are judged by queries kept back."""

    queries: int = setting(2000, "about how many queries kept back judge at most", unit="queries", ge=10)
    held_out: float = setting(
        0.05, "share of the training queries that judge where no validation split can", unit="share", gt=0, lt=1
    )


class TuningRecipe(_JudgedRecipe):
    """How embedding.encoder_mode=tuned is learned, in one process; see `catalog.tuning`. The best epoch is taken, or none."""

    epochs: int = setting(1, "passes over the training pairs at most", unit="epochs", ge=1)
    batch: int = setting(32, "pairs of a batch, the negatives of each other", unit="pairs", ge=2)
    learning_rate: float = setting(5e-5, "AdamW's peak", unit="1/step", gt=0)
    pairs: int = setting(
        20_000, "about how many training pairs are used at most: of more, those of a seeded sample of queries", unit="pairs",
        ge=100,
    )  # fmt: skip
    products: int = setting(
        100_000,
        "products among which BM25 looks for negatives at most, beside those of the pairs",
        unit="products",
        ge=100,
    )
    judged_products: int = setting(
        2000,
        "of these, products that epochs are judged on, beside those that the queries ask for",
        unit="products",
        ge=100,
    )


class AdapterRecipe(_JudgedRecipe, TrainingRecipe):
    """How embedding.adapter=linear is learned; see `quantizer.adapter`. The best epoch is taken, or none."""

    epochs: int = setting(6, "passes over the training pairs at most", unit="epochs", ge=1)
    batch: int = setting(512, "pairs of a global batch, the negatives of each other", unit="pairs", ge=2)
    learning_rate: float = setting(3e-4, "AdamW's peak", unit="1/step", gt=0)
    weight_decay: float = setting(
        0.0, "AdamW's decay; the loss pulls towards the identity instead", unit="1/step", ge=0
    )
    pairs: int = setting(
        200_000, "about how many training pairs are used at most: of more, those of a seeded sample of queries", unit="pairs",
        ge=100,
    )  # fmt: skip
    products: int = setting(
        100_000,
        "products that epochs are judged on at most, beside those that the queries ask for",
        unit="products",
        ge=100,
    )

    @model_validator(mode="after")
    def _whole_batches(self):
        if self.micro_batch not in (None, self.batch // self.workers):
            raise ValueError(
                f"micro_batch {self.micro_batch} is not offered for the adapter: the pairs of a batch are each other's negatives, "
                "and pieces of it would be fewer. Lower adapter.batch to save memory"
            )
        return self
