"""The check of judged (query, product) pairs at the door: good rows in the house schema, bad ones set aside.

A log of users may add who asked: `user`, attributes such as ["age 20-29"], and `recent`, the product_ids looked at before,
the latest last; and what they did with the product, `behaviour`. What only shows once all pairs of a query are together, as
a query in two splits, is the business of `queries.py`.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray import tables
from catid2_ray.catalog.columns import (
    NOT_UTF8,
    list_column,
    lists_of,
    number_column,
    plain_table,
    refuse_repeated,
    require_columns,
    silent,
    string_column,
)
from catid2_ray.tables import PAIRS, nullable

SPLITS = ("train", "validation", "test")
BEHAVIOURS = ("exposed", "clicked", "paid")  # what a searcher did with a product, the strongest last
USER_COLUMNS = {"user": "an attribute of user is empty", "recent": "a product_id in recent is empty"}
LOWER_GRADE = "another pair of this query and product has a higher relevance"
UNKNOWN_PRODUCT = "product_id is not in the catalogue"
HARMLESS = {
    LOWER_GRADE,
    UNKNOWN_PRODUCT,
}  # reasons that every log knows, and that catalog.max_bad_fraction does not count
_JOINT, _BETWEEN = "\x1f", "\x1e"  # separate list entries and columns in keys; no text of a shop holds them


class CheckedPairs(NamedTuple):
    """`good`: by product_id, query_id, split. `bad`: query_id, query, product_id, reason. `duplicates`: dropped."""

    good: pa.Table
    bad: pa.Table
    duplicates: int


def plain_pairs(table: pa.Table) -> pa.Table:
    """`table` with the types that `check_pairs` works on, one by one: ids and texts as strings, the relevance as float64, lists
    of strings; see `columns.plain_table` for texts that are not UTF-8. Raises InputError for what cannot be read."""
    table = plain_table(table)
    read = {
        **{name: string_column for name in ("query_id", "query", "product_id", "split", "behaviour")},
        **{name: partial(list_column, item=pa.string()) for name in USER_COLUMNS},
        "relevance": number_column,
    }
    return pa.table({name: read[name](table, name) if name in read else table[name] for name in table.column_names})


def check_pairs(table: pa.Table, *, known: pa.Array | None = None) -> CheckedPairs:
    """Split a table of pairs into good and bad rows; exact duplicates among the good ones are dropped and counted.

    `table`: query_id, query, product_id (strings), relevance (number, any scale), split (train, validation or test).
    Optional: user, recent (lists of strings; null = empty), behaviour (paid, clicked, exposed or null; of rows that are equal
    otherwise the strongest stays). `known`: the catalogue's product_ids, where pairs that name others are to be set aside. Of
    rows that differ in their relevance alone the highest stays and the others are set aside. Queries and attributes are
    stripped. Raises InputError when a column is missing or of a type that cannot be read.
    """
    require_columns(table, PAIRS.names, what="pairs table")
    refuse_repeated(table.column_names, what="pairs table")
    used = {*PAIRS.names, *USER_COLUMNS, "behaviour", NOT_UTF8}
    table = plain_pairs(table.select([name for name in table.column_names if name in used]))
    columns = {name: table[name].combine_chunks() for name in PAIRS.names}
    columns["query"] = pc.utf8_trim_whitespace(columns["query"])
    faults = {}
    if NOT_UTF8 in table.column_names:
        broken = table[NOT_UTF8].combine_chunks()
        faults |= {
            f"{name} is {NOT_UTF8}": pc.equal(pc.fill_null(broken, ""), name)
            for name in PAIRS.names + ["user", "recent"]
        }
    faults |= {
        "missing query_id": _blank(columns["query_id"]),
        "empty query": pa.array(silent(columns["query"])),
        "missing product_id": _blank(columns["product_id"]),
        "relevance is not a finite number": pc.invert(pc.is_finite(columns["relevance"])),
        f"split is none of {', '.join(SPLITS)}": pc.invert(pc.is_in(columns["split"], pa.array(SPLITS))),
    }
    for name, text in USER_COLUMNS.items():
        if name in table.column_names:
            columns[name], faults[text] = _texts(table, name, stripped=name == "user")
    if "behaviour" in table.column_names:
        columns["behaviour"] = table["behaviour"].combine_chunks()
        named = pc.is_in(columns["behaviour"], pa.array([*BEHAVIOURS, None], pa.string()))
        faults[f"behaviour is none of {', '.join(BEHAVIOURS)}"] = pc.invert(named)
    if known is not None:
        faults[UNKNOWN_PRODUCT] = pc.invert(pc.is_in(columns["product_id"], known))
    reason = pa.nulls(table.num_rows, pa.string())
    for text, fault in faults.items():
        reason = pc.if_else(pc.and_(pc.is_null(reason), pc.fill_null(fault, True)), text, reason)

    schema = tables.pairs(columns)
    checked = pa.table({name: columns[name] for name in schema.names}, schema=nullable(schema))
    sound = pc.is_null(reason)
    stays_G, lower_G = _stronger(checked.filter(sound))
    reason_N = reason.to_numpy(zero_copy_only=False)
    sound_G = np.flatnonzero(sound.to_numpy(zero_copy_only=False))
    reason_N[sound_G[lower_G]] = LOWER_GRADE
    reason = pa.array(reason_N, pa.string())

    bad = checked.select(["query_id", "query", "product_id"]).append_column("reason", reason)
    bad = bad.filter(reason.is_valid()).sort_by(
        [(n, "ascending") for n in ("query_id", "product_id", "reason", "query")]
    )
    good = _in_order(checked.take(pa.array(sound_G[stays_G])).cast(schema))
    return CheckedPairs(good, bad, len(sound_G) - int(lower_G.sum()) - int(stays_G.sum()))


def _keys(good: pa.Table) -> dict[str, pa.Array]:
    return {
        f"{name} key": pc.binary_join(good[name], _JOINT).combine_chunks()
        for name in USER_COLUMNS
        if name in good.column_names
    }


def _stronger(good: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Of G good rows, bool: those that stay, one of each that differ in relevance and behaviour alone; and those that go because
    their relevance is lower. The highest relevance stays, of equal ones the strongest behaviour."""
    names = ("query_id", "query", "product_id", "split")
    key = pc.binary_join_element_wise(*(good[name] for name in names), *_keys(good).values(), _BETWEEN)
    key_G = key.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    relevance_G, rank_G = good["relevance"].to_numpy(), np.full(good.num_rows, -1)
    if "behaviour" in good.column_names:
        rank = pc.fill_null(pc.index_in(good["behaviour"], pa.array(BEHAVIOURS)), -1)
        rank_G = rank.to_numpy()
    order_G = np.lexsort((-rank_G, -relevance_G, key_G))
    first_G = np.concatenate(([True], np.diff(key_G[order_G]) > 0))[: good.num_rows]
    stays_G = np.zeros(good.num_rows, bool)
    stays_G[order_G[first_G]] = True
    highest_K = relevance_G[order_G[first_G]]
    return stays_G, relevance_G < highest_K[key_G]


def _in_order(good: pa.Table) -> pa.Table:
    """By product_id, query_id, split and the rest, so that the order of the rows that were read does not matter."""
    keyed = pa.table({**{name: good[name] for name in PAIRS.names}, **_keys(good)})
    order = ("product_id", "query_id", "split", "relevance", "query", *keyed.column_names[len(PAIRS.names) :])
    return good.take(pc.sort_indices(keyed, [(name, "ascending") for name in order])).combine_chunks()


def _texts(table: pa.Table, name: str, *, stripped: bool) -> tuple[pa.Array, pa.Array]:
    """The column as lists of strings, null made empty, and bool: rows with an empty or missing entry."""
    lists = table[name].combine_chunks()
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
