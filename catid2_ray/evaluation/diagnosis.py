"""Where relevant products are lost: by the model, by the search that prunes, or before both are mixed with other scores.

Exact scores of every node say how the model ranks all IDs; the beam of any width is replayed from them. What exact ranking
misses is the model's error, what it finds and the beam does not is the search's. `serving.expansion` over *all* products
bounds what a better search could bring to what is served (nearly: a "softmax" path score is shared among all IDs there).

Q queries, L levels searched, K cut-offs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from catid2_ray.errors import InputError
from catid2_ray.evaluation.metrics import bootstrap_means, recalls
from catid2_ray.retrieval.exact import Replay, decoder_rows, replayed
from catid2_ray.retrieval.live_view import result_rows
from catid2_ray.retrieval.retriever import Retriever
from catid2_ray.retrieval.trie import Trie

KS = (10, 50, 100)
WIDTHS = (10, 100, 1000)
EXACT = "exact"
_QUERIES, _SCORES = 16, 2**24  # of a batch, at most


@dataclass(frozen=True)
class Diagnosis:
    """Per query. `recall`: search → float64 Q×K, products in the order of their IDs' scores; `mixture`: the same, re-scored,
    of "exact" and the served search alone (empty where the release does not re-score); `kept`: search → float64 Q×L, share
    of the relevant products whose first 1 … L codes are in the beam. Searches: "beam 10", …, the served one among them, and
    "exact"."""

    served: str
    recall: dict[str, np.ndarray]
    mixture: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]

    @classmethod
    def joined(cls, parts: Sequence["Diagnosis"]) -> "Diagnosis":
        """The queries of all parts, one after the other."""
        columns = ({}, {}, {})
        for into, name in zip(columns, ("recall", "mixture", "kept")):
            for search in getattr(parts[0], name):
                into[search] = np.concatenate([getattr(part, name)[search] for part in parts])
        return cls(parts[0].served, *columns)

    def as_json(self) -> dict:
        shares = {
            name: {search: value.tolist() for search, value in getattr(self, name).items()}
            for name in ("recall", "mixture", "kept")
        }
        return {"served": self.served, **shares}

    @classmethod
    def from_json(cls, values: dict) -> "Diagnosis":
        shares = (
            {search: np.array(value) for search, value in values[name].items()}
            for name in ("recall", "mixture", "kept")
        )
        return cls(values["served"], *shares)


def rows_per_query(retriever: Retriever) -> int:
    """Decoder rows of one unpruned pass."""
    return decoder_rows(retriever.trie, retriever.levels)


def diagnose(
    retriever: Retriever, queries: Sequence[str], relevant: Sequence[Collection[str]], *, widths: Sequence[int] = WIDTHS
) -> Diagnosis:
    """Exact scores of all IDs for each query, and what beams of `widths` and of the served width would find.

    `relevant`: product ids per query, of which at least one is in the release. Of a release that changed since, what was
    published is searched. Cost: `rows_per_query` decoder rows a query. Raises InputError where a query has no relevant
    product in the release.
    """
    served, searches = _searches(retriever, widths)
    parts = []
    nodes = sum(retriever.trie.nodes(level + 1) for level in range(retriever.levels))
    size = max(1, min(_QUERIES, _SCORES // nodes))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        parts.append(_batch(retriever, list(queries[part]), list(relevant[part]), served, searches))
    return Diagnosis.joined(parts)


def _searches(retriever: Retriever, widths: Sequence[int]) -> tuple[str, dict[str, list[int]]]:
    """The served search's name; and of all searches name → width per level, narrow ones first, "exact" last."""
    own = retriever.widths[: retriever.levels]
    served = _name(own)
    searches = {_name([width]): [width] * retriever.levels for width in widths} | {served: own}
    searches = dict(sorted(searches.items(), key=lambda search: search[1][-1]))
    return served, searches | {EXACT: [retriever.trie.nodes(level + 1) for level in range(retriever.levels)]}


def _name(widths: Sequence[int]) -> str:
    return "beam " + "/".join(map(str, widths[:1] if len(set(widths)) == 1 else widths))


def _batch(
    retriever: Retriever, queries: list[str], relevant: list, served: str, searches: Mapping[str, list[int]]
) -> Diagnosis:
    exact, trie = retriever.exact(queries), retriever.trie
    rows = [_rows(retriever, query, wanted) for query, wanted in zip(queries, relevant)]
    names = [{retriever.live.names.name(row) for row in row_R.tolist()} for row_R in rows]
    recall, mixture, kept = {}, {}, {}
    for name, widths in searches.items():
        mixes = retriever.expansion is not None and name in (served, EXACT)
        replay = replayed(trie, exact.score_L, widths, top_k=widths[-1] if mixes else max(KS), logp_BN=exact.logp_L[-1])
        found = [one.row_M.tolist() for one in result_rows(replay.result, trie, most=max(KS))]
        recall[name] = recalls(found, [set(row_R.tolist()) for row_R in rows], KS)
        kept[name] = _kept(replay, trie, rows)
        if mixes:
            expansion = retriever.expansion if name == served else replace(retriever.expansion, quota=None, most=None)
            hits = retriever.rescored(replay.result, queries, k=max(KS), expansion=expansion)
            mixture[name] = recalls([[hit.product_id for hit in one] for one in hits], names, KS)
    return Diagnosis(served, recall, mixture, kept)


def _rows(retriever: Retriever, query: str, wanted: Collection[str]) -> np.ndarray:
    """The trie rows of the relevant products that the release has."""
    row_R = retriever.live.names.rows(sorted(wanted))
    if not (row_R >= 0).any():
        raise InputError(f"the release has no relevant product of the query {query!r}; leave it out")
    return row_R[row_R >= 0]


def _kept(replay: Replay, trie: Trie, rows: Sequence[np.ndarray]) -> np.ndarray:
    return np.array(
        [
            [np.isin(trie.row_start[depth].holding(row_R), node_M).mean() for depth, node_M in enumerate(levels, 1)]
            for levels, row_R in zip(replay.kept, rows)
        ]
    )


def diagnosis_figures(diagnosis: Diagnosis, *, split: str, rows_per_query: int) -> dict:
    """Means over the queries, ready for JSON; `search_error`: exact less served recall with its paired 95 % interval, alone
    and of the mixture."""
    shares = {"recall": diagnosis.recall, "mixture": diagnosis.mixture}
    means = {
        part: {search: dict(zip(map(str, KS), value_QK.mean(0).tolist())) for search, value_QK in searches.items()}
        for part, searches in shares.items()
    }
    error = {
        part: {
            str(k): list(interval)
            for k, interval in zip(KS, bootstrap_means(searches[EXACT] - searches[diagnosis.served]))
        }
        for part, searches in shares.items()
        if searches
    }
    queries = len(diagnosis.recall[EXACT])
    kept = {search: value_QL.mean(0).tolist() for search, value_QL in diagnosis.kept.items() if search != EXACT}
    return {
        "split": split, "queries": queries, "decoder_rows": queries * rows_per_query, "served": diagnosis.served, **means,
        "kept": kept, "search_error": error,
    }  # fmt: skip
