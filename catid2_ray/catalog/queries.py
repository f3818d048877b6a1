"""What shows only when all pairs of a query are together: a query_id with two texts, and a query in two splits.

Pairs lie by product, so each part gives its queries under two keys, their id and their normalised text, and those of one key
meet in one group, whose findings are added up. Q distinct (query_id, query, split).
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catid2_ray.scripts import normalised

NAMED = 10  # queries that a finding names
KEYED = pa.schema([(name, pa.string()) for name in ("by", "key", "query_id", "query", "split")])


def keyed_queries(pairs: pa.Table) -> pa.Table:
    """2·Q rows of KEYED: the queries of checked pairs by their "id" and by their "text"."""
    distinct = pairs.select(["query_id", "query", "split"]).group_by(["query_id", "query", "split"]).aggregate([])
    by_id = pa.table(
        {"by": ["id"] * distinct.num_rows, "key": distinct["query_id"], **_columns(distinct)}, schema=KEYED
    )
    texts = [" ".join(normalised(text).split()) for text in distinct["query"].to_pylist()]
    by_text = pa.table({"by": ["text"] * distinct.num_rows, "key": texts, **_columns(distinct)}, schema=KEYED)
    return pa.concat_tables([by_id, by_text])


def _columns(table: pa.Table) -> dict:
    return {name: table[name] for name in table.column_names}


class Findings(NamedTuple):
    """`queries`: query_ids of each split. `two_texts`: query_ids with more than one text; `shared`: queries, by their texts, of
    two splits, by "train and test" and so on. `first_…` name up to NAMED of them."""

    queries: dict[str, int]
    two_texts: int
    first_two_texts: list[str]
    shared: dict[str, int]
    first_leaked: list[str]


def find_faults(keyed: pa.Table) -> Findings:
    """The findings of one group of KEYED rows, which holds all rows of each of its keys."""
    rows = keyed.to_pandas()
    by_id, by_text = rows[rows["by"] == "id"], rows[rows["by"] == "text"]
    # Only the few keys that stand twice are gathered one by one.
    texts = by_id.drop_duplicates(["key", "query"])
    texts = texts[texts["key"].duplicated(keep=False)].groupby("key")["query"].agg(sorted)
    splits = by_text.sort_values("query_id").drop_duplicates(["key", "split"])
    splits = splits[splits["key"].duplicated(keep=False)].groupby("key")
    splits = splits.agg(split=("split", set), query_id=("query_id", "min"), query=("query", "min"))
    shared = Counter(pair for found in splits["split"] for pair in _pairs_of(found))
    leaked_N = np.array([{"train", "test"} <= found for found in splits["split"]], bool)
    leaked = splits[leaked_N].sort_values("query_id")
    return Findings(
        queries={split: int(ids.nunique()) for split, ids in by_id.groupby("split")["key"]},
        two_texts=len(texts),
        first_two_texts=[
            f"{name!r}: {' and '.join(map(repr, found[:2]))}" for name, found in texts.head(NAMED).items()
        ],
        shared=dict(shared),
        first_leaked=[f"{row.query_id!r}: {row.query!r}" for row in leaked.head(NAMED).itertuples()],
    )


def _pairs_of(splits: set[str]) -> Iterable[str]:
    order = [split for split in ("train", "validation", "test") if split in splits]
    return [f"{first} and {second}" for place, first in enumerate(order) for second in order[place + 1 :]]


def added(findings: Iterable[Findings]) -> Findings:
    """The findings of all groups together."""
    found = list(findings)
    return Findings(
        queries=dict(sum((Counter(each.queries) for each in found), Counter())),
        two_texts=sum(each.two_texts for each in found),
        first_two_texts=sorted(text for each in found for text in each.first_two_texts)[:NAMED],
        shared=dict(sum((Counter(each.shared) for each in found), Counter())),
        first_leaked=sorted(text for each in found for text in each.first_leaked)[:NAMED],
    )
