"""The check of judged (query, product) pairs at the door: good rows in the house schema, bad ones set aside.

A query_id that appears in two splits cannot be seen inside one block of the table, so it is not this check's business.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.catalog.products import require_columns, string_column
from catid2_ray.errors import InputError

SPLITS = ("train", "validation", "test")
BEHAVIOURS = ("exposed", "clicked", "paid")  # what a searcher did with a product, the strongest last
PAIRS = pa.schema(
    [("query_id", pa.string()), ("query", pa.string()), ("product_id", pa.string())]
    + [("relevance", pa.float64()), ("split", pa.string())]
)


class CheckedPairs(NamedTuple):
    """`good`: by product_id, query_id, split. `bad`: query_id, query, product_id, reason. `duplicates`: dropped."""

    good: pa.Table
    bad: pa.Table
    duplicates: int


def check_pairs(table: pa.Table) -> CheckedPairs:
    """Split a table of pairs into good and bad rows; exact duplicates among the good ones are dropped and counted.

    `table`: query_id, query, product_id (strings), relevance (number, any scale), split (train, validation or test); where it
    has a column `behaviour` (paid, clicked, exposed or null), that stays, the strongest of rows that are equal otherwise.
    Queries are stripped. Raises InputError when a column is missing or of a type that cannot be read.
    """
    require_columns(table, PAIRS.names, what="pairs table")
    columns = {name: string_column(table, name) for name in PAIRS.names if name != "relevance"}
    columns["query"] = pc.utf8_trim_whitespace(columns["query"])
    relevance = table["relevance"].combine_chunks()
    if not (pa.types.is_integer(relevance.type) or pa.types.is_floating(relevance.type) or not len(relevance)):
        raise InputError(f"column relevance: expected numbers, found {relevance.type}; cast it to double")
    columns["relevance"] = relevance.cast(pa.float64())

    faults = {
        "missing query_id": _blank(columns["query_id"]),
        "empty query": _blank(columns["query"]),
        "missing product_id": _blank(columns["product_id"]),
        "relevance is not a finite number": pc.invert(pc.is_finite(columns["relevance"])),
        f"split is none of {', '.join(SPLITS)}": pc.invert(pc.is_in(columns["split"], pa.array(SPLITS))),
    }
    logged = "behaviour" in table.column_names
    if logged:
        columns["behaviour"] = string_column(table, "behaviour")
        named = pc.is_in(columns["behaviour"], pa.array([*BEHAVIOURS, None], pa.string()))
        faults[f"behaviour is none of {', '.join(BEHAVIOURS)}"] = pc.invert(named)
    reason = pa.nulls(table.num_rows, pa.string())
    for text, fault in faults.items():
        reason = pc.if_else(pc.and_(pc.is_null(reason), pc.fill_null(fault, True)), text, reason)

    checked = pa.table({name: columns[name] for name in PAIRS.names}, schema=PAIRS)
    if logged:
        # As a number, of which the largest is the strongest; −1 = none.
        rank = pc.fill_null(pc.index_in(columns["behaviour"], pa.array(BEHAVIOURS)), -1)
        checked = checked.append_column("rank", rank)
    sound = pc.is_null(reason)
    bad = checked.select(["query_id", "query", "product_id"]).append_column("reason", reason)
    bad = bad.filter(pc.invert(sound)).sort_by(
        [(n, "ascending") for n in ("query_id", "product_id", "reason", "query")]
    )
    good = checked.filter(sound)
    distinct = good.group_by(PAIRS.names).aggregate([("rank", "max")] if logged else [])
    if logged:
        rank = pc.if_else(pc.less(distinct["rank_max"], 0), None, distinct["rank_max"])
        distinct = distinct.append_column("behaviour", pc.take(pa.array(BEHAVIOURS), rank))
    distinct = distinct.select([*PAIRS.names, *(["behaviour"] if logged else [])])
    distinct = distinct.cast(PAIRS.append(pa.field("behaviour", pa.string())) if logged else PAIRS)
    order = ("product_id", "query_id", "split", "relevance", "query")
    return CheckedPairs(
        distinct.sort_by([(name, "ascending") for name in order]),
        bad,
        int(np.subtract(good.num_rows, distinct.num_rows)),
    )


def _blank(column: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_trim_whitespace(column), "")


def training_pairs(pairs: pa.Table, min_relevance: float) -> pa.Table:
    """The rows of good pairs that teach: split train, relevance of at least `min_relevance`."""
    return pairs.filter((pc.field("split") == "train") & (pc.field("relevance") >= min_relevance))
