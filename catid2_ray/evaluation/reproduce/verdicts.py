"""A verdict for each cell, in the manner of Pyserini's reproductions, against what the paper prints.

[OK]: the paper's figure lies within our interval, or ours is within 5 % of it. [OKish]: within 15 %. [FAIL]: further away. Only
where the data set is the paper's; a cell of other data has none, and one that was not measured says why.
"""

from typing import Literal, NamedTuple

from catid2_ray.evaluation.metrics import Interval

OK_WITHIN, OKISH_WITHIN = 0.05, 0.15


class Verdict(NamedTuple):
    """`why`: of a cell without a figure."""

    state: Literal["OK", "OKish", "FAIL", "not run", "measured"]
    why: str = ""

    def __str__(self) -> str:
        if self.state == "measured":
            return ""
        return f"[{self.state}: {self.why}]" if self.why else f"[{self.state}]"


def verdict(ours: Interval | None, paper: float | None, *, why: str = "") -> Verdict:
    """Of a figure and its interval, both as the paper's in per cent; `why` there is none, where there is none."""
    if ours is None:
        return Verdict("not run", why or "no reason was kept")
    if paper is None:
        return Verdict("measured")
    apart = abs(ours.mean - paper) / paper
    if ours.low <= paper <= ours.high or apart <= OK_WITHIN:
        return Verdict("OK")
    return Verdict("OKish" if apart <= OKISH_WITHIN else "FAIL")
