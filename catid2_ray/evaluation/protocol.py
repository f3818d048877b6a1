"""How a method is judged: which queries, which products count as relevant, and the three groups all, seen and unseen.

*Seen* products are those that a training pair names; a generator learns their IDs with queries, the others' without.
A query enters a group when it has a relevant product in it, and recall there counts only that group's products.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.errors import InputError
from catid2_ray.evaluation.metrics import recall_at, recalls

GROUPS = {"recall": "relevant", "recall_seen": "seen", "recall_unseen": "unseen"}


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """Q queries in the order of their ids; for each the relevant products, and those of them seen and unseen.

    `dropped_pairs`: relevant pairs left out because their product is not in the catalogue.
    """

    query_ids: list[str]
    queries: list[str]
    relevant: list[set[str]]
    seen: list[set[str]]
    unseen: list[set[str]]
    dropped_pairs: int

    @classmethod
    def from_pairs(
        cls,
        table: pa.Table,
        *,
        split: str,
        min_relevance: float,
        seen: Collection[str] | pa.Array,
        known: Collection[str] | pa.Array | None,
    ) -> "Judgements":
        """Read the queries of one split from a table of pairs (house schema).

        A pair counts as relevant from `min_relevance` on. `seen`: product ids that training pairs name. `known`: the
        catalogue's product ids; relevant pairs that name another product are dropped and counted, since no method
        could return it, and a query with no relevant product left is not asked. None keeps them all.
        Raises InputError when no query is left, or one query_id has two texts.
        """
        chosen = table.filter(
            pc.and_(pc.equal(table["split"], split), pc.greater_equal(table["relevance"], min_relevance))
        )
        before = chosen.num_rows
        if known is not None:
            chosen = chosen.filter(pc.is_in(chosen["product_id"], _strings(known)))
        if not chosen.num_rows:
            splits = ", ".join(sorted(str(name) for name in table["split"].unique().to_pylist())) or "none"
            raise InputError(
                f"no pair of split {split!r} with relevance ≥ {min_relevance} names a product of the catalogue "
                f"({before} before the catalogue was asked; splits found: {splits}); check the split and min_relevance"
            )
        is_seen = pc.is_in(chosen["product_id"], _strings(seen)).to_pylist()
        text: dict[str, str] = {}
        groups: dict[str, tuple[set[str], set[str]]] = {}
        rows = (chosen[name].to_pylist() for name in ("query_id", "query", "product_id"))
        for query_id, query, product_id, trained in zip(*rows, is_seen):
            if text.setdefault(query_id, query) != query:
                raise InputError(
                    f"query_id {query_id!r} has two texts, {text[query_id]!r} and {query!r}; give each its own"
                )
            groups.setdefault(query_id, (set(), set()))[0 if trained else 1].add(product_id)
        order = sorted(text)
        return cls(
            query_ids=order,
            queries=[text[query_id] for query_id in order],
            relevant=[groups[query_id][0] | groups[query_id][1] for query_id in order],
            seen=[groups[query_id][0] for query_id in order],
            unseen=[groups[query_id][1] for query_id in order],
            dropped_pairs=before - chosen.num_rows,
        )


def evaluate(
    judgements: Judgements,
    ranked_by_method: Mapping[str, Sequence[Sequence[str]]],
    ks: Sequence[int] = (5, 10, 20, 50, 100),
) -> dict:
    """Figures of every method, ready for JSON.

    `ranked_by_method`: method → Q lists of product ids, best first, in the order of `judgements.queries`. Returns
    `{"recall": {method: {"10": x, …}}, "recall_seen": …, "recall_unseen": …, "queries": {"all": Q, "seen": …,
    "unseen": …}, "dropped_pairs": n}`. A group without queries has None in place of each figure.
    """
    figures: dict = {}
    counts = {}
    for key, group in GROUPS.items():
        wanted = getattr(judgements, group)
        counts["all" if group == "relevant" else group] = asked = sum(map(bool, wanted))
        figures[key] = {}
        for method, ranked in ranked_by_method.items():
            values = recall_at(ranked, wanted, ks) if asked else dict.fromkeys(ks)
            figures[key][method] = {str(k): value for k, value in values.items()}
    return figures | {"queries": counts, "dropped_pairs": judgements.dropped_pairs}


def per_query_recalls(
    judgements: Judgements,
    ranked_by_method: Mapping[str, Sequence[Sequence[str]]],
    ks: Sequence[int] = (5, 10, 20, 50, 100),
) -> dict[str, dict[str, np.ndarray]]:
    """Group ("all", "seen", "unseen") → method → float64 Q×len(ks), what `evaluate` averages: for the paired bootstrap.

    Rows follow `judgements.queries`; NaN where a query has no relevant product in the group, for every method alike.
    """
    return {
        "all" if group == "relevant" else group: {
            method: recalls(ranked, getattr(judgements, group), ks) for method, ranked in ranked_by_method.items()
        }
        for group in GROUPS.values()
    }


def _strings(ids: Collection[str] | pa.Array) -> pa.Array:
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if isinstance(ids, pa.Array):
        return ids.cast(pa.string())
    return pa.array(sorted(str(product_id) for product_id in ids), pa.string())
