"""What the score of each hit is made of: its prefix's score at every level of the search, and the terms of its final score.

The release's own search is run again once per level, with room for the hits' paths and nothing else. That costs about (L + 1) / 2
searches of a beam of the hits' number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catid2_ray.generator.users import User
from catid2_ray.retrieval.filters import LiveFilter
from catid2_ray.retrieval.rescoring import Hit
from catid2_ray.retrieval.retriever import Retriever


@dataclass(frozen=True)
class Level:
    """A code of the ID, and of the prefix that ends with it `logp`, natural log of P(prefix | query), None where the search does
    not ask the generator, and `score`, by which the search chose it: `logp`, or S where it looks ahead."""

    token: str
    logp: float | None
    score: float


@dataclass(frozen=True)
class Explanation:
    """`levels`: those searched, fewer of a product that has gone since. `terms`: what each part adds to the hit's
    score; they sum up to it. Without re-scoring the path is all there is."""

    levels: tuple[Level, ...]
    terms: dict[str, float]


def explained(
    retriever: Retriever, query: str, hits: Sequence[Hit], *, expression=None, user: User | None = None
) -> list[Explanation]:
    """For each of the `hits` that `retriever` gave `user` for `query` and filter `expression`. Raises QueryError as `retrieve`."""
    if not hits:
        return []
    paths = _paths(retriever, query, hits, expression, user)
    expansion, explanations = retriever.expansion, []
    for hit, path in zip(hits, paths):
        tokens = [f"{part}>" for part in hit.docid_text.split(">")[:-1]]
        levels = tuple(Level(token, logp, score) for token, (logp, score) in zip(tokens, path))
        explanations.append(Explanation(levels, {"path": hit.score} if expansion is None else expansion.terms(hit)))
    return explanations


def _paths(retriever: Retriever, query: str, hits: Sequence[Hit], expression, user: User | None) -> list[list[tuple]]:
    """Per hit its (log P or None, score) at each level."""
    docids, paths = [retriever.space.parse(hit.docid_text) for hit in hits], [[] for _ in hits]
    view = retriever.live.view
    found = [retriever.row_of(hit.product_id, view) for hit in hits]
    rows = [row for row in found if row is not None]  # the others have gone since
    filter_ = None if expression is None else view.compile(expression)
    theirs = np.zeros(view.rows, bool)
    theirs[rows] = True
    for level in range(1, retriever.levels + 1):
        prefixes = len({docid[:level] for docid in docids})
        result = retriever.searched(
            [query], widths=[prefixes] * level, levels=level, top_k=prefixes,
            allowed=LiveFilter.of(theirs, view.base.rows), scored_as=[filter_], view=view,
            users=[user],
        )  # fmt: skip
        scores = (result.logp_BK if result.score_BK is None else result.score_BK)[0].tolist()
        logps = [None] * prefixes if hits[0].logp is None else result.logp_BK[0].tolist()
        at = dict(zip(map(tuple, result.docid_BKL[0].tolist()), zip(logps, scores)))
        for docid, path in zip(docids, paths):
            if docid[:level] in at:
                path.append(at[docid[:level]])
    return paths
