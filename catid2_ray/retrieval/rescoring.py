"""From the beams of a batch to its products: in the order of the beams, or expanded and re-scored."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import BeamResult
from catid2_ray.retrieval.expansion import DENSE, expand, rescore
from catid2_ray.retrieval.live_view import LiveView, result_rows
from catid2_ray.retrieval.products import Products

# Products that are scored where a search ends early, some 20 ms: below the beams of the first levels lies much of a catalogue.
MOST_BELOW = 100_000


@dataclass(frozen=True)
class Hit:
    """One product. `score` is what ranks it: `logp`, natural log of P(ID, or the cluster's prefix | query), where the release
    looks ahead S of the ID, and where it re-scores, the sum of dense, path and lexical terms. `logp` is None where the search
    did not ask the generator. `dense`: q · d, `lexical`: BM25; None where not used.
    `title` is None where the retriever has no titles. `row`: of the trie that was searched."""

    product_id: str
    docid_text: str
    score: float
    title: str | None = None
    logp: float | None = None
    dense: float | None = None
    lexical: float | None = None
    row: int = field(default=-1, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Settings of `expand` and `rescore`, and whether the vectors have length 1; see the recipe's serving.expansion."""

    a: float = 1.0
    path: str = "softmax"
    dense: str = "tanh"
    unit_vectors: bool = True
    lexical_weight: float = 0.0
    order: str = "dense"
    quota: int | None = None
    most: int | None = 2000

    def check(self, products: Products) -> None:
        """Raise InputError where the products lack what is asked for."""
        lacks = [
            name
            for name, needed, part in (
                ("vectors", self.dense != "none", products.base_vectors),
                ("values", self.order == "value", products.values_N),
                ("a lexical index", self.lexical_weight > 0, products.base_lexical),
            )
            if needed and part is None
        ]
        if lacks:
            raise InputError(
                f"re-scoring needs {' and '.join(lacks)}, which the release lacks; make its serving part again"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The terms of the final score and their weights, in the order of its formula; a term that weighs 0 is none."""
        weights = {"dense": 1.0 if self.dense != "none" else 0.0, "path": self.a, "BM25": self.lexical_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def features(self, hit: Hit) -> list[float]:
        """What each weight of `weights` is multiplied by."""
        terms = self.terms(hit)
        return [terms[name] / weight for name, weight in self.weights.items()]

    def terms(self, hit: Hit) -> dict[str, float]:
        """What each part adds to a hit's score; they sum up to it. A part that is not used is left out."""
        terms = {}
        if self.dense != "none":
            terms["dense"] = float(DENSE[self.dense](hit.dense))
        if self.lexical_weight:
            terms["BM25"] = self.lexical_weight * hit.lexical
        return {"path": hit.score - sum(terms.values()), **terms}


def first_beams(result: BeamResult, *, most: int = MOST_BELOW) -> BeamResult:
    """Of each query the best beams that together hold at most `most` products, and always the best one."""
    size_BK = sum(range_BK2[..., 1] - range_BK2[..., 0] for range_BK2 in _ranges(result)).cumsum(1)
    return result._replace(count_B=(size_BK <= most).sum(1).clamp(min=1).minimum(result.count_B))


def _ranges(result: BeamResult) -> list[Tensor]:
    return [one for one in (result.row_range_BK2, result.inserted_range_BK2) if one is not None]


def beam_hits(
    result: BeamResult, view: LiveView, products: Products, *, k: int, allowed: list | None, asked: bool = True
) -> list[list[Hit]]:
    """At most `k` products per query in the order of their IDs' score; products of one ID in row order. `asked`: whether the
    search asked the generator."""
    space, answers = DocidSpace(view.codes_per_level), []
    logps, docids = result.logp_BK.tolist(), result.docid_BKL.tolist()
    scores = logps if result.score_BK is None else result.score_BK.tolist()
    for b, (row_M, result_M) in enumerate(result_rows(result, view, allowed=allowed, most=k)):
        answers.append(
            [
                _hit(
                    products, row, space.text(docids[b][at]), score=scores[b][at], logp=logps[b][at] if asked else None
                )
                for row, at in zip(row_M.tolist(), result_M.tolist())
            ]
        )
    return answers


def expanded_hits(
    result: BeamResult, view: LiveView, products: Products, settings: Expansion, *, queries: Sequence[str], query_BD,
    k: int, allowed: list | None, asked: bool = True,
) -> list[list[Hit]]:  # fmt: skip
    """At most `k` products per query by their final score (METHODS 6.6), from all products of the beams. `asked`: whether
    the search asked the generator; where not, the path score is the same for all."""
    dense = settings.dense != "none"
    candidates = expand(
        result, view, vectors=products.vectors if dense else None, query_BD=query_BD if dense else None,
        value_N=products.values, order=settings.order, quota=settings.quota, most=settings.most, allowed=allowed,
    )  # fmt: skip
    lexical_BC = None
    if settings.lexical_weight:
        lexical_BC = products.lexical_scores(queries, candidates.row_BC.numpy())
    scored = rescore(
        candidates, result, view, top_k=k, a=settings.a, path=settings.path, dense=settings.dense if dense else "dot",
        lexical_BC=lexical_BC, lexical_weight=settings.lexical_weight,
    )  # fmt: skip
    space, answers = DocidSpace(view.codes_per_level), []
    columns = [tensor.tolist() for tensor in scored[:-1]]
    for b, count in enumerate(scored.count_B.tolist()):
        answers.append(
            [
                _hit(
                    products, row, space.text(docid), score=final, logp=logp if asked else None,
                    dense=similar if dense else None,
                    lexical=shared if settings.lexical_weight else None,
                )
                for row, docid, logp, similar, shared, final in zip(*(column[b][:count] for column in columns))
            ]
        )  # fmt: skip
    return answers


def _hit(products: Products, row: int, docid_text: str, **scores) -> Hit:
    return Hit(products.name(row), docid_text, title=products.title(row), row=row, **scores)
