"""Which pairs teach an encoder or an adapter, and which queries are kept back to judge it.

Queries of the validation split judge. Where it has none that can, whole queries of the train split do, and are not learned from.
Which ones depends on seed and text alone, whatever part a pair lies in, so that queries which judge the encoder do not teach the
adapter either.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.config import AdapterRecipe, TuningRecipe
from catid2_ray.hashing import hash_of_text, uniform

_DRAW_JUDGES, _DRAW_LEARNS = 7, 8  # numbers of the draws by which queries are chosen
COLUMNS = ["query", "product_id", "split", "relevance"]  # of a part's pairs


@dataclass(frozen=True, kw_only=True)
class KeptBack:
    """`held_out`: queries of the train split judge, else those of validation; `judging`, `learning`: shares of the queries."""

    min_relevance: float
    relevant_from: float
    seed: int
    held_out: bool
    judging: float
    learning: float

    @classmethod
    def of(cls, pairs: Manifest, recipe: AdapterRecipe | TuningRecipe, *, min_relevance: float, relevant_from: float,
           seed: int) -> "KeptBack":  # fmt: skip
        """`min_relevance`: of pairs that teach; `relevant_from`: of those that judge."""
        train, judges = pairs.metrics["splits"]["train"], pairs.metrics["splits"]["validation"]
        held_out = (judges["relevance_max"] or 0.0) < relevant_from
        share = recipe.queries / max(1, (train if held_out else judges)["queries"])
        return cls(
            min_relevance=min_relevance, relevant_from=relevant_from, seed=seed, held_out=held_out,
            judging=min(share, recipe.held_out if held_out else 1.0),
            learning=min(1.0, recipe.pairs / max(1, train["pairs"])),
        )  # fmt: skip

    @property
    def judged_by(self) -> str:
        return "train, held out" if self.held_out else "validation"

    def learned(self, pairs: pa.Table) -> pa.Table:
        """The rows of a part's pairs that teach."""
        rows = training_pairs(pairs, self.min_relevance)
        kept_N = self._draw(rows, _DRAW_LEARNS) < self.learning
        if self.held_out:
            kept_N &= self._draw(rows, _DRAW_JUDGES) >= self.judging
        return rows.filter(pa.array(kept_N))

    def judged(self, pairs: pa.Table) -> pa.Table:
        """The rows of a part's pairs that judge."""
        split = "train" if self.held_out else "validation"
        rows = pairs.filter((pc.field("split") == split) & (pc.field("relevance") >= self.relevant_from))
        return rows.filter(pa.array(self._draw(rows, _DRAW_JUDGES) < self.judging))

    def _draw(self, pairs: pa.Table, number: int) -> np.ndarray:
        """float N in [0, 1), the same for all pairs of a query's text."""
        return uniform(hash_of_text(pairs["query"]), self.seed, number)
