"""CAT-ID²'s rules for ESCI (section 4.1) on one part of the products, with all that is said about them.

Every rule but the split of queries looks at one product and its judgements alone, so parts made by a hash of product_id can
be treated one after another, and counts of parts add up. Queries are told apart by hash as well, so a part needs no other.
"""

import hashlib
from collections import Counter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.catalog.products import check_products
from catid2_ray.catalog.sources.category_lines import best_paths
from catid2_ray.catalog.sources.esci import GAINS, TAUGHT
from catid2_ray.errors import InputError
from catid2_ray.tables import PAIRS, nullable

DEPTH = 3  # section 4.1: shallower products are dropped, deeper paths are cut
CORPORA = ("judged", "all")
JUDGED_PAIRS = pa.schema([*nullable(PAIRS), ("esci_label", pa.string())])
QUERIES = pa.schema([("query_id", pa.string()), ("split", pa.string()), ("taught", pa.bool_())])


class Rules(NamedTuple):
    """`corpus`: judged = products that a judgement of this version names, as Table 1's size suggests; all = of the locale.

    `validation`: share of the training queries that become the validation split, chosen by a hash of (seed, query_id): the paper
    has none. `keep_unseen`: keep judgements of test and validation queries whose product no training pair names.
    """

    corpus: str
    validation: float
    seed: int
    keep_unseen: bool


class Part(NamedTuple):
    """`products`: house schema. `pairs`: JUDGED_PAIRS, by product_id and query_id. `queries`: QUERIES, distinct. `counts`: to be
    added."""

    products: pa.Table
    pairs: pa.Table
    queries: pa.Table
    counts: Counter


def prepare_part(texts: pa.Table, lines: pa.Table, judged: pa.Table, rules: Rules) -> Part:
    """Join and rule one part. `texts`: esci.TEXTS; `lines`: category_lines.LINES; `judged`: esci.JUDGEMENTS.

    Order: corpus, categories, depth and duplicates; judgements of dropped products; duplicates of judgements; validation
    split; at last, test and validation judgements whose product is in no training pair (E or S, validation queries taken
    out). A pure function of the set of rows.
    """
    counts = Counter(products_read=texts.num_rows, judgements_read=judged.num_rows)
    if rules.corpus == "judged":
        texts = texts.filter(pc.is_in(texts["product_id"], judged["product_id"].unique()))
    counts["products_in_corpus"] = texts.num_rows
    products = _with_categories(texts, lines, counts)
    pairs = judged.filter(pc.is_in(judged["product_id"], products["product_id"].unique()))
    counts["judgements_of_dropped_products"] = judged.num_rows - pairs.num_rows
    pairs = _distinct(pairs, counts)
    pairs = _carve_validation(pairs, rules)
    if not rules.keep_unseen:
        pairs = _drop_unseen(pairs, counts)
    relevance = pa.array(list(GAINS.values())).take(pc.index_in(pairs["esci_label"], pa.array(list(GAINS))))
    pairs = pairs.append_column("relevance", relevance).select(JUDGED_PAIRS.names).cast(JUDGED_PAIRS)
    labels = zip(pairs["split"].to_pylist(), pairs["esci_label"].to_pylist())
    counts.update(f"{split}_{label}" for split, label in labels)
    taught = pa.table(
        [pairs["query_id"], pairs["split"], pc.is_in(pairs["esci_label"], pa.array(TAUGHT))], schema=QUERIES
    )
    queries = taught.group_by(QUERIES.names).aggregate([]).select(QUERIES.names)
    return Part(products, pairs, queries, counts)


def _with_categories(texts: pa.Table, lines: pa.Table, counts: Counter) -> pa.Table:
    best = best_paths(lines)
    path = best["category_path"].take(pc.index_in(texts["product_id"], best["product_id"].combine_chunks()))
    counts["products_with_category"] = int(pc.sum(pc.greater(pc.list_value_length(path), 0)).as_py() or 0)
    checked = check_products(
        texts.append_column("category_path", path), width=None, min_category_depth=DEPTH, max_category_depth=DEPTH
    )
    counts["documents"] = checked.good.num_rows
    counts["paths_cut"] = checked.cut_paths
    for reason in checked.bad["reason"].to_pylist():
        counts[f"dropped: {reason}"] += 1
    return checked.good


def _distinct(pairs: pa.Table, counts: Counter) -> pa.Table:
    """One judgement per query, product and split: the best label; of equal ones the first query text."""
    pairs = pairs.append_column("place", pc.index_in(pairs["esci_label"], pa.array(list(GAINS))))
    key = ("product_id", "query_id", "split")
    pairs = pairs.sort_by([(name, "ascending") for name in (*key, "place", "query")]).drop_columns("place")
    same = np.ones(max(pairs.num_rows - 1, 0), bool)
    for name in key:
        column = pairs[name].to_numpy()
        same &= column[1:] == column[:-1]
    first = np.concatenate((np.ones(min(pairs.num_rows, 1), bool), ~same))
    counts["judgements_duplicate"] = int(np.count_nonzero(~first))
    return pairs.filter(pa.array(first))


def is_validation(query_ids: pa.Array, *, share: float, seed: int) -> np.ndarray:
    """bool N: whether a training query goes to validation; SHA-256 of "seed:query_id" below `share` of its range."""
    limit = int(share * 2**64)
    digests = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in query_ids.to_pylist()]
    return np.array([int.from_bytes(digest[:8], "big") < limit for digest in digests], bool)


def _carve_validation(pairs: pa.Table, rules: Rules) -> pa.Table:
    coded = pairs["query_id"].combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    chosen = is_validation(coded.dictionary, share=rules.validation, seed=rules.seed)[
        coded.indices.to_numpy(zero_copy_only=False)
    ]
    moved = pc.and_(pa.array(chosen), pc.equal(pairs["split"], "train"))
    return pairs.set_column(
        pairs.schema.get_field_index("split"), "split", pc.if_else(moved, "validation", pairs["split"])
    )


def _drop_unseen(pairs: pa.Table, counts: Counter) -> pa.Table:
    """Section 4.1: all products in the test set also appear in the training set, that is, in what is trained on."""
    taught = pc.is_in(pairs["esci_label"], pa.array(TAUGHT))
    in_train = _products_where(pairs, pc.and_(taught, pc.equal(pairs["split"], "train")))
    in_validation = _products_where(pairs, pc.and_(taught, pc.equal(pairs["split"], "validation")))
    seen = pc.is_in(pairs["product_id"], in_train)
    for split in ("validation", "test"):
        gone = pc.and_(pc.equal(pairs["split"], split), pc.invert(seen))
        counts[f"{split}_unseen"] = _count(gone)
        if split == "test":
            counts["test_seen_in_validation_only"] = _count(pc.and_(gone, pc.is_in(pairs["product_id"], in_validation)))
    return pairs.filter(pc.or_(seen, pc.equal(pairs["split"], "train")))


def _products_where(pairs: pa.Table, chosen: pa.ChunkedArray) -> pa.Array:
    return pc.unique(pairs.filter(chosen)["product_id"].combine_chunks())


def _count(chosen: pa.ChunkedArray) -> int:
    return int(pc.sum(chosen).as_py() or 0)


def query_counts(queries: pa.Table) -> Counter:
    """Distinct queries by split, "{split}_queries" with a pair that teaches (E or S), "{split}_queries_all" with any.

    `queries`: QUERIES of all parts. Raises InputError where a query is both in the test split and in another.
    """
    counts = Counter()
    for split in ("train", "validation", "test"):
        of_split = queries.filter(pc.field("split") == split)
        counts[f"{split}_queries_all"] = pc.count_distinct(of_split["query_id"]).as_py()
        counts[f"{split}_queries"] = pc.count_distinct(of_split.filter(pc.field("taught"))["query_id"]).as_py()
    tested = pc.unique(queries.filter(pc.field("split") == "test")["query_id"])
    both = queries.filter((pc.field("split") != "test") & pc.is_in(pc.field("query_id"), tested))["query_id"].unique()
    if len(both):
        raise InputError(
            f"{len(both)} queries are in the train and in the test split, first query_id {sorted(both.to_pylist())[:5]}; "
            "splits must be by query: check the column split of the examples"
        )
    return counts
