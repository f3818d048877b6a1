"""The recipe: all sections together, read from YAML with overrides, and checked across sections."""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError, model_validator

from catid2_ray.config.alignment import AlignmentRecipe
from catid2_ray.config.data import AdapterRecipe, CatalogRecipe, ClusterRecipe, EmbeddingRecipe, TuningRecipe
from catid2_ray.config.generator import GeneratorRecipe
from catid2_ray.config.older import as_meant
from catid2_ray.config.quantizer import IdsRecipe, QuantizerRecipe
from catid2_ray.config.reproduce import ReproduceRecipe
from catid2_ray.config.section import Section, setting
from catid2_ray.config.serving import BUILT_IN_FILTERS, EvaluationRecipe, ServingRecipe
from catid2_ray.errors import RecipeError

_OF_THE_MACHINE = ("actors", "processes", "GPUs")  # units of settings that say where a job runs


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
    tuning: TuningRecipe = setting(TuningRecipe(), "before the vectors, off by default", unit="section")
    adapter: AdapterRecipe = setting(AdapterRecipe(), "between stages 0 and 1", unit="section")
    quantizer: QuantizerRecipe = setting(QuantizerRecipe(), "stage 1", unit="section")
    ids: IdsRecipe = setting(IdsRecipe(), "stage 2", unit="section")
    generator: GeneratorRecipe = setting(GeneratorRecipe(), "stage 3", unit="section")
    alignment: AlignmentRecipe = setting(AlignmentRecipe(), "after stage 3, off by default", unit="section")
    serving: ServingRecipe = setting(ServingRecipe(), "how a release answers queries", unit="section")
    evaluation: EvaluationRecipe = setting(EvaluationRecipe(), "what is measured before publication", unit="section")
    reproduce: ReproduceRecipe = setting(
        ReproduceRecipe(), "the paper's tables by `catid2 reproduce`", unit="section", operational=True
    )
    sample_queries: tuple[str, ...] = setting(
        (), "queries answered at the end of the job", unit="texts", operational=True
    )

    @model_validator(mode="after")
    def _depth_below_levels(self):
        quantizer, levels = self.quantizer, len(self.quantizer.codes_per_level)
        depth, deepest = quantizer.category_depth, self.catalog.max_category_depth
        if depth is not None and depth > deepest:
            raise ValueError(
                f"quantizer.category_depth {depth} exceeds catalog.max_category_depth {deepest}: no product has such a category"
            )
        if quantizer.by_level and (depth or deepest) >= levels and not quantizer.allow_deep_categories:
            raise ValueError(
                f"catalog.max_category_depth {depth or deepest} must be smaller than the number of levels, {levels} "
                "(quantizer.codes_per_level): with H ≥ L every level is tied to a category and the ID degenerates to the "
                "category tree (CAT-ID², section 3.1). Lower the one, add a level to the other, or, to measure it all the "
                "same, set quantizer.allow_deep_categories"
            )
        if quantizer.query_item and self.embedding.source == "given":
            raise ValueError(
                "quantizer.query_item needs an encoder for the queries, but embedding.source is 'given': set quantizer.query_item=0"
            )
        weights = self.generator.level_weights
        fixed = quantizer.coder != "tree" and quantizer.ids in ("unique", "cluster")
        if weights is not None and fixed and len(weights) != levels:
            raise ValueError(
                f"generator.level_weights has {len(weights)} entries, quantizer.codes_per_level {levels}: give one per level"
            )
        return self

    @property
    def _workers(self) -> dict[str, int]:
        """Of each training that may run."""
        names = ("adapter", "quantizer", "generator", *(["alignment"] if self.alignment.enabled else []))
        return {name: getattr(self, name).workers for name in names}

    @property
    def most_workers(self) -> int:
        """Of the training that has most."""
        return max(self._workers.values())

    @model_validator(mode="after")
    def _one_encoder_for_a_head_that_reads_vectors(self):
        generator, embedding = self.generator, self.embedding
        if generator.head not in ("dense", "experts"):
            return self
        if generator.encoder != embedding.encoder:
            raise ValueError(
                f"generator.head {generator.head} compares codewords of embedding.encoder {embedding.encoder!r} with queries' "
                f"vectors of generator.encoder {generator.encoder!r}: name one encoder in both, or set generator.head to plain"
            )
        self._codewords_are_vectors()
        return self

    @model_validator(mode="after")
    def _queries_go_through_the_tuned_encoder(self):
        if self.embedding.encoder_mode == "tuned" and self.serving.query_encoder is not None:
            raise ValueError(
                f"embedding.encoder_mode tuned gives queries the encoder of the products, but serving.query_encoder is "
                f"{self.serving.query_encoder!r}: leave it out, or set embedding.encoder_mode to frozen"
            )
        return self

    def _codewords_are_vectors(self) -> None:
        """Raise where codewords do not lie in the encoder's space, or the search asks for scores that the head lacks."""
        quantizer, way_out = self.quantizer, "or set generator.head to plain"
        trained = quantizer.coder == "rq_vae"
        if quantizer.coder == "tree" or (trained and (quantizer.encoder != "residual" or quantizer.latent is not None)):
            raise ValueError(
                f"generator.head {self.generator.head} needs codewords in the space of embedding.encoder, found "
                f"quantizer.coder {quantizer.coder!r}, encoder {quantizer.encoder!r} and latent {quantizer.latent}: set "
                f"quantizer.encoder to residual and leave latent out, or take kind rq_kmeans, {way_out}"
            )
        if self.serving.normalize == "vocabulary":
            raise ValueError(
                f"generator.head {self.generator.head} scores the codes of a level, but serving.normalize is "
                f"{self.serving.normalize!r}: leave it out, {way_out}"
            )

    @model_validator(mode="after")
    def _search_compares_what_was_taught(self):
        loss, normalize = self.generator.loss, self.serving.normalize
        if (loss == "trie") != (normalize == "trie"):
            raise ValueError(
                f"generator.loss {loss} does not go with serving.normalize {normalize}: a generator's numbers mean what they were "
                "taught to mean. Set both to trie, or generator.loss to level and serving.normalize to level or vocabulary"
            )
        if loss == "trie" and self.alignment.enabled:
            raise ValueError(
                "alignment compares all codes of a level, which generator.loss trie does not teach: set generator.loss and "
                "serving.normalize to level, or alignment.enabled to false"
            )
        return self

    @model_validator(mode="after")
    def _gpus_are_whole(self):
        gpus = self.cluster.gpus_per_worker
        shared = [f"{name}.workers {count}" for name, count in self._workers.items() if count > 1]
        if gpus % 1 and shared:
            raise ValueError(
                f"cluster.gpus_per_worker {gpus:g} does not go with {', '.join(shared)}: training workers on GPUs meet by nccl, "
                "which refuses two processes on one GPU. Set cluster.gpus_per_worker=1, one worker, or 0 for CPU"
            )
        return self

    @model_validator(mode="after")
    def _confidence_is_there(self):
        kinds = self.catalog.filter_columns
        named = {"quantizer.category_confidence": self.quantizer.category_confidence,
                 "reproduce.confidence": self.reproduce.confidence}  # fmt: skip
        for where, least in named.items():
            if unknown := [name for name in least if kinds.get(name) not in ("int", "float")]:
                raise ValueError(
                    f"{where} names {', '.join(unknown)}, which catalog.filter_columns does not name as int or float: add "
                    f"{{{unknown[0]}: float}} there"
                )
        return self

    @model_validator(mode="after")
    def _serving_fits(self):
        serving, quantizer = self.serving, self.quantizer
        known = {**BUILT_IN_FILTERS, **self.catalog.filter_columns}
        if unknown := [name for name in serving.filters if name not in known]:
            raise ValueError(
                f"serving.filters names {', '.join(unknown)}, which no product has: add it to catalog.filter_columns, or "
                f"choose among {', '.join(known)}"
            )
        levels = len(quantizer.codes_per_level)
        fixed = quantizer.coder != "tree" and quantizer.ids in ("unique", "cluster")
        widths = serving.beam_width
        if fixed and quantizer.ids == "unique" and isinstance(widths, tuple) and len(widths) != levels:
            raise ValueError(
                f"serving.beam_width has {len(widths)} entries, quantizer.codes_per_level {levels}: give one per level, or "
                "one number"
            )
        if fixed and serving.stop_level is not None and serving.stop_level > levels:
            raise ValueError(
                f"serving.stop_level {serving.stop_level} is beyond the {levels} levels of quantizer.codes_per_level: lower "
                "it, or leave it out to search whole IDs"
            )
        return self

    @property
    def beam_width(self) -> int | tuple[int, ...]:
        """What is served and, as "served", evaluated."""
        return self.evaluation.beam_width if self.serving.beam_width is None else self.serving.beam_width

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
    def stored(cls, values: dict) -> "Recipe":
        """A recipe that was stored with an artefact, by this version or an earlier one: what it lacks means what it meant then."""
        return cls.build(as_meant(values))

    def continued(self, sections: Mapping[str, dict]) -> "Recipe":
        """This recipe with what it leaves out taken from the recipes stored with a release. `sections`: by section, the stored
        recipe that it is taken from. Settings of the machine (workers, say) and the source of the catalogue stay today's."""
        values = self.model_dump(mode="json", exclude_unset=True)
        for name, stored in sections.items():
            section = getattr(Recipe.stored(stored), name)
            before = section.model_dump(mode="json")
            today = dict(values.get(name) or {})
            for field, about in type(section).model_fields.items():
                if about.json_schema_extra["unit"] in _OF_THE_MACHINE or field in ("root", "synthetic"):
                    del before[field]
                if "batch" in type(section).model_fields and field in ("workers", "micro_batch"):
                    # Nothing is trained, so how a batch would be spread today decides nothing, and must fit nothing.
                    before.pop(field, None)
                    today.pop(field, None)
            values[name] = before | today
        return Recipe.build(values)

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> "Recipe":
        """Read a YAML recipe and apply `--set a.b=c` overrides, whose right-hand sides are YAML too.

        Raises RecipeError for a missing file, bad YAML, a malformed override, or an invalid recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not YAML: {error}") from None
        return cls.from_yaml(text, overrides, where=str(path))

    @classmethod
    def from_yaml(cls, text: str, overrides: tuple[str, ...] | list[str] = (), *, where: str) -> "Recipe":
        """As `load`, of text; `where`: what messages call it."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{where} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{where} must be a mapping of recipe fields, found {type(values).__name__}")
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
