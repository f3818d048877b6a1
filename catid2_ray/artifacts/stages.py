"""The chain of stages as one list: what each makes of what, which job runs it, and what becomes of it in a release.

`on_ray/pipeline.py` binds each to the code that runs it. A stage has the name of the kind of artefact that it makes, but for
`aligned`, which makes a generator of a generator.
"""

from collections.abc import Mapping
from typing import NamedTuple

from catid2_ray.artifacts.manifest import Manifest


class Stage(NamedTuple):
    """`job`: the module of jobs/ that runs it. `parents`: the artefacts that it always reads, `where_made` those that it
    reads where there are any, `sometimes` those that some recipes make it read. `part`: its name in a release, None where a
    release does without. `carried`: an append takes it over from the release before. `timed`: its name among the seconds of
    a job's figures. `version`: raise it when what the stage writes changes; its artefacts and those made of them are then
    made anew, and those of before are still read (docs/upgrades.md)."""

    name: str
    job: str
    parents: tuple[str, ...] = ()
    sometimes: tuple[str, ...] = ()
    part: str | None = None
    carried: bool = False
    timed: str | None = None
    version: int = 1
    where_made: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """Under which name later stages read its artefact."""
        return self.part or self.name

    def reads(self, parts: Mapping[str, Manifest], *sometimes: str) -> dict[str, Manifest]:
        """The artefacts that it reads by their roles, of `sometimes` those that this recipe makes it read."""
        assert set(sometimes) <= set(self.sometimes), f"{self.name} may also read {self.sometimes}, not {sometimes}"
        made = (role for role in self.where_made if role in parts)
        return {role: parts[role] for role in (*self.parents, *made, *sometimes)}

    def settings(self, settings: Mapping) -> dict:
        """What names an artefact of this stage, its version included. The first version is not written out: artefacts of format
        6, made before stages had versions, keep their keys."""
        return {**settings, **({"version": self.version} if self.version > 1 else {})}


STAGES = {
    stage.name: stage
    for stage in (
        Stage("catalog", "embed_catalog", part="catalog", timed="catalog", version=2),
        Stage("pairs", "embed_catalog", ("catalog",), part="pairs", timed="pairs"),
        Stage("lessons", "embed_catalog", ("catalog", "pairs")),
        Stage("tuned_encoder", "embed_catalog", ("lessons",), part="tuned_encoder", carried=True, timed="tune encoder"),
        Stage("embeddings", "embed_catalog", ("catalog",), ("tuned_encoder",), part="embeddings", timed="embed", version=2),
        Stage("matched", "train_quantizer", ("catalog", "pairs", "embeddings"), ("tuned_encoder",)),
        Stage("adapter", "train_quantizer", ("matched",), part="adapter", carried=True, timed="adapter"),
        Stage("queries", "train_quantizer", ("catalog", "pairs", "embeddings"), ("tuned_encoder",), where_made=("adapter",)),
        Stage("quantizer", "train_quantizer", ("embeddings",), ("queries", "catalog"), part="quantizer", carried=True,
              timed="quantizer", where_made=("adapter",)),
        Stage("ids", "assign_ids", ("catalog", "embeddings", "quantizer"), part="ids", timed="assign", version=2,
              where_made=("adapter",)),
        Stage("node_vectors", "train_generator", ("embeddings", "ids"), part="node_vectors", timed="node vectors",
              where_made=("adapter",)),
        Stage("examples", "train_generator", ("catalog", "pairs", "ids"), ("embeddings", "adapter", "tuned_encoder"),
              part="examples", carried=True, timed="examples", version=2),
        Stage("generator", "train_generator", ("ids", "examples"), ("quantizer", "pairs", "adapter", "tuned_encoder"),
              part="generator", carried=True, timed="generator"),
        Stage("prompts", "align_generator", ("catalog", "pairs", "ids", "examples")),
        Stage("aligned", "align_generator", ("trained", "ids", "examples", "prompts"), part="generator", carried=True),
        Stage("serving", "evaluate", ("catalog", "embeddings", "ids"), part="serving", timed="serving", version=2,
              where_made=("adapter",)),
        Stage("mixture", "evaluate", ("catalog", "pairs", "ids", "examples", "generator", "serving"), part="mixture", carried=True,
              timed="mixture", where_made=("node_vectors",)),
        Stage("evaluation", "evaluate", ("catalog", "pairs", "ids", "examples", "generator"),
              ("embeddings", "adapter", "node_vectors", "serving", "mixture"), part="evaluation", carried=True, timed="evaluate",
              version=3),
    )
}  # fmt: skip
# What a release may lack: recipes that do without, and releases of before, have none.
OPTIONAL = ("tuned_encoder", "adapter", "node_vectors", "mixture")
PARTS = tuple(dict.fromkeys(stage.part for stage in STAGES.values() if stage.part))
CARRIED = tuple(dict.fromkeys(stage.part for stage in STAGES.values() if stage.carried))


def of_job(job: str) -> list[str]:
    """The names of the stages that a job runs, in their order."""
    return [stage.name for stage in STAGES.values() if stage.job == job]


ANSWERS = "answers.json"  # of an evaluation: query → the products that were found for it, of a few queries
