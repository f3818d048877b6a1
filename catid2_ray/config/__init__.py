"""The recipe: everything that decides what a job computes, as frozen pydantic models, one file for each group of sections.

Every field carries a description, a unit, its range and the section of the CAT-ID² paper it comes from; where the paper
is silent the field says "not stated in the paper". Fields marked operational change where and how fast the work is done,
never its result, and so stay out of the keys of artefacts.
"""

from catid2_ray.config.alignment import AlignmentRecipe
from catid2_ray.config.data import AdapterRecipe, CatalogRecipe, ClusterRecipe, EmbeddingRecipe, TuningRecipe
from catid2_ray.config.generator import EXAMPLE_KINDS, ExamplesRecipe, GeneratorRecipe, StageRecipe
from catid2_ray.config.kinds import KINDS
from catid2_ray.config.quantizer import IdsRecipe, QuantizerRecipe
from catid2_ray.config.recipe import Recipe, schema
from catid2_ray.config.reproduce import ReproduceRecipe
from catid2_ray.config.section import NOT_STATED, Section, TrainingRecipe
from catid2_ray.config.serving import EvaluationRecipe, ExpansionRecipe, ServingRecipe

__all__ = [
    "EXAMPLE_KINDS",
    "KINDS",
    "NOT_STATED",
    "AdapterRecipe",
    "AlignmentRecipe",
    "CatalogRecipe",
    "ClusterRecipe",
    "EmbeddingRecipe",
    "EvaluationRecipe",
    "ExamplesRecipe",
    "ExpansionRecipe",
    "GeneratorRecipe",
    "IdsRecipe",
    "QuantizerRecipe",
    "Recipe",
    "ReproduceRecipe",
    "Section",
    "ServingRecipe",
    "StageRecipe",
    "TrainingRecipe",
    "TuningRecipe",
    "schema",
]
