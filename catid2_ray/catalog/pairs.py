"""The check of judged (query, product) pairs at the door: good rows in the house schema, bad ones set aside.

A log of users may add who asked: `user`, attributes such as ["age 20-29"], and `recent`, the product_ids looked at before,
the latest last; and what they did with the product, `behaviour`. A query_id that appears in two splits cannot be seen inside
one block of the table, so it is not this check's business.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray import tables
from catid2_ray.catalog.products import list_column, lists_of, require_columns, string_column
from catid2_ray.errors import InputError
from catid2_ray.tables import PAIRS, nullable

SPLITS = ("train", "validation", "test")
BEHAVIOURS = ("exposed", "clicked", "paid")  # what a searcher did with a product, the strongest last
USER_COLUMNS = {"user": "an attribute of user is empty", "recent": "a product_id in recent is empty"}
_JOINT = "\x1f"  # separates list entries in keys; no text of a shop holds it


class CheckedPairs(NamedTuple):
    """`good`: by product_id, query_id, split. `bad`: query_id, query, product_id, reason. `duplicates`: dropped."""

    good: pa.Table
    bad: pa.Table
    duplicates: int


def check_pairs(table: pa.Table) -> CheckedPairs:
    """Split a table of pairs into good and bad rows; exact duplicates among the good ones are dropped and counted.

    `table`: query_id, query, product_id (strings), relevance (number, any scale), split (train, validation or test).
    Optional: user, recent (lists of strings; null = empty), behaviour (paid, clicked, exposed or null; of rows that are equal
    otherwise the strongest stays). Queries and attributes are stripped. Raises InputError when a column is missing or of a type
    that cannot be read.
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
    for name, text in USER_COLUMNS.items():
        if name in table.column_names:
            columns[name], faults[text] = _texts(table, name, stripped=name == "user")
    if "behaviour" in table.column_names:
        columns["behaviour"] = string_column(table, "behaviour")
        named = pc.is_in(columns["behaviour"], pa.array([*BEHAVIOURS, None], pa.string()))
        faults[f"behaviour is none of {', '.join(BEHAVIOURS)}"] = pc.invert(named)
    reason = pa.nulls(table.num_rows, pa.string())
    for text, fault in faults.items():
        reason = pc.if_else(pc.and_(pc.is_null(reason), pc.fill_null(fault, True)), text, reason)

    schema = tables.pairs(columns)
    checked = pa.table({name: columns[name] for name in schema.names}, schema=nullable(schema))
    sound = pc.is_null(reason)
    bad = checked.select(["query_id", "query", "product_id"]).append_column("reason", reason)
    bad = bad.filter(pc.invert(sound)).sort_by(
        [(n, "ascending") for n in ("query_id", "product_id", "reason", "query")]
    )
    good = checked.filter(sound).cast(schema)
    keys = {name: pc.binary_join(good[name], _JOINT) for name in USER_COLUMNS if name in good.column_names}
    keyed = pa.table(
        {**{name: good[name] for name in PAIRS.names}, **{f"{name} key": key for name, key in keys.items()}}
    )
    order_N = np.arange(good.num_rows)
    if "behaviour" in columns:  # the strongest of equal rows comes first
        rank = pc.fill_null(pc.index_in(good["behaviour"], pa.array(BEHAVIOURS)), -1)
        order_N = np.argsort(-rank.to_numpy(), kind="stable")
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(good.num_rows)
    first = keyed.append_column("place", pa.array(place_N)).group_by(keyed.column_names).aggregate([("place", "min")])
    order = ("product_id", "query_id", "split", "relevance", "query", *keyed.column_names[len(PAIRS.names) :])
    first = first.sort_by([(name, "ascending") for name in order])
    chosen_N = order_N[first["place_min"].to_numpy()]
    return CheckedPairs(good.take(pa.array(chosen_N)).combine_chunks(), bad, int(good.num_rows - first.num_rows))


def _texts(table: pa.Table, name: str, *, stripped: bool) -> tuple[pa.Array, pa.Array]:
    """The column as lists of strings, null made empty, and bool: rows with an empty or missing entry."""
    lists = list_column(table, name, pa.string())
    length_N = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    entries = pc.list_flatten(lists)
    entries = pc.utf8_trim_whitespace(entries) if stripped else entries
    empty_C = pc.fill_null(_blank(entries), True).to_numpy(zero_copy_only=False)
    row_C = np.repeat(np.arange(len(length_N)), length_N)
    return lists_of(length_N, entries), pa.array(np.bincount(row_C[empty_C], minlength=len(length_N)) > 0)


def _blank(column: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_trim_whitespace(column), "")


def training_pairs(pairs: pa.Table, min_relevance: float, weights: Mapping[float, float] | None = None) -> pa.Table:
    """The rows of good pairs that teach: split train, relevance of at least `min_relevance`, a weight above 0."""
    chosen = pairs.filter((pc.field("split") == "train") & (pc.field("relevance") >= min_relevance))
    return chosen if weights is None else chosen.filter(pa.array(pair_weights(chosen["relevance"], weights) > 0))


def pair_weights(relevance, weights: Mapping[float, float] | None) -> np.ndarray:
    """float32 N: the weight of the highest grade in `weights` that a pair reaches, 0 below all; 1 where None.

    Grades may be strings, as in JSON.
    """
    relevance_N = np.asarray(relevance, np.float64)
    if weights is None:
        return np.ones(len(relevance_N), np.float32)
    grades = sorted((float(grade), float(weight)) for grade, weight in weights.items())
    place_N = np.searchsorted([grade for grade, _ in grades], relevance_N, side="right")
    return np.array([0.0, *(weight for _, weight in grades)], np.float32)[place_N]
