"""Rankings and judgements as files that other evaluators read: TREC's run and qrels.

Ids with blanks would break the columns, so blanks in them are written as %20 and % as %25.
"""

from collections.abc import Mapping, Sequence

PER_GRADE = 100  # qrels hold whole numbers: a relevance of 2.33 is 233, and linear gains keep their ratios


def run_lines(query_ids: Sequence[str], ranked: Sequence[Sequence[str]], tag: str) -> str:
    """`query Q0 product rank score tag` a line. The score falls by one a rank, so that no reader reorders ties."""
    lines = []
    for query_id, products in zip(query_ids, ranked):
        for rank, product in enumerate(products, 1):
            score = len(products) + 1 - rank
            lines.append(f"{_plain(query_id)} Q0 {_plain(product)} {rank} {score} {_plain(tag)}\n")
    return "".join(lines)


def qrels_lines(query_ids: Sequence[str], gains: Sequence[Mapping[str, float]]) -> str:
    """`query 0 product gain` a line, by product id; the gain in hundredths."""
    return "".join(
        f"{_plain(query_id)} 0 {_plain(product)} {round(PER_GRADE * gain)}\n"
        for query_id, of_query in zip(query_ids, gains)
        for product, gain in sorted(of_query.items())
    )


def _plain(text: str) -> str:
    return "".join(f"%{ord(c):02X}" if c == "%" or c.isspace() else c for c in text)
