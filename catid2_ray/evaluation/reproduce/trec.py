"""Rankings and judgements as files that other evaluators read, TREC's run and qrels; and runs that other searches wrote.

Ids with blanks would break the columns, so blanks in them are written as %20 and % as %25, and read so.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote, unquote

import numpy as np

from catid2_ray.errors import InputError

PER_GRADE = 100  # qrels hold whole numbers: a relevance of 2.33 is 233, and linear gains keep their ratios


def run_lines(query_ids: Sequence[str], ranked: Sequence[Sequence[str]], tag: str) -> str:
    """`query Q0 product rank score tag` a line. The score falls by one a rank, so that no reader reorders ties."""
    lines = []
    for query_id, products in zip(query_ids, ranked):
        for rank, product in enumerate(products, 1):
            score = len(products) + 1 - rank
            lines.append(f"{_plain(query_id)} Q0 {_plain(product)} {rank} {score} {_plain(tag)}\n")
    return "".join(lines)


class GivenRun(NamedTuple):
    """`rows_QC`: int64, best first, −1 beyond the last. Counts: queries that the file has nothing for, queries of the file that
    are not asked, and products in it that the catalogue lacks, which are left out."""

    rows_QC: np.ndarray
    unanswered: int
    not_asked: int
    unknown_products: int


def read_run(text: str, *, query_ids: Sequence[str], row_of: Mapping[str, int], returned: int, name: str) -> GivenRun:
    """The first `returned` products of each query: by score, equal ones in the order of their rows, whatever the ranks say. An id
    is looked up as it stands, and else with %20 and the like resolved.

    Raises InputError, which names the file `name` and the line, for a line that is none of a run and a product that a query has
    twice; and for a file that answers none of the queries, or whose scores rank nothing."""
    found: dict[str, dict[int, float]] = {query_id: {} for query_id in query_ids}
    others, unknown = set(), []
    for number, line in enumerate(text.split("\n"), 1):
        if not (columns := [column for column in re.split(r"[ \t\r]+", line) if column]):
            continue
        try:
            query_id, _, product, _, score = columns[:5]
            score = float(score if len(columns) <= 6 else "a blank in an id")
        except ValueError:
            raise InputError(
                f"{name}, line {number}: expected `query Q0 product rank score tag`, found {line[:80]!r}"
            ) from None
        if not np.isfinite(score):
            raise InputError(f"{name}, line {number}: the score {columns[4]} is no finite number")
        query_id = query_id if query_id in found else unquote(query_id)
        if query_id not in found:
            others.add(query_id)
        elif (row := row_of.get(product, row_of.get(unquote(product)))) is None:
            unknown.append(product)
        elif row in found[query_id]:
            raise InputError(f"{name}, line {number}: query {query_id!r} has product {product!r} twice")
        else:
            found[query_id][row] = score
    if not any(found.values()) and unknown:
        raise InputError(
            f"{name} names no product of the catalogue; its products are {', '.join(map(repr, sorted({*unknown})[:3]))}: use the "
            "product_id of the catalogue"
        )
    if not any(found.values()):
        raise InputError(
            f"{name} answers none of the {len(found)} queries that are asked, such as {query_ids[0]!r}; its queries are "
            f"{', '.join(map(repr, sorted(others)[:3])) or 'none'}: use the query_id of the pairs"
        )
    several = [set(rows.values()) for rows in found.values() if len(rows) > 1]
    if several and all(len(scores) == 1 for scores in several):
        raise InputError(f"{name}: all products of a query have one score; write scores that fall with the rank")
    rows_QC = np.full((len(query_ids), returned), -1, np.int64)
    for place, query_id in enumerate(query_ids):
        rows = sorted(found[query_id], key=lambda row: (-found[query_id][row], row))[:returned]
        rows_QC[place, : len(rows)] = rows
    return GivenRun(rows_QC, sum(not rows for rows in found.values()), len(others), len(unknown))


def qrels_lines(query_ids: Sequence[str], gains: Sequence[Mapping[str, float]]) -> str:
    """`query 0 product gain` a line, by product id; the gain in hundredths."""
    return "".join(
        f"{_plain(query_id)} 0 {_plain(product)} {round(PER_GRADE * gain)}\n"
        for query_id, of_query in zip(query_ids, gains)
        for product, gain in sorted(of_query.items())
    )


def _plain(text: str) -> str:
    return "".join(quote(c) if c == "%" or c.isspace() else c for c in text)
