"""Write the README's table of results from what `catid2 reproduce` measured: benchmarks/results/paper_tables/report.json.

`python docs/results.py`, after each new report. Whole systems come first, the best at 50 on top; then kinds of IDs, which the proxy
finds. What has no figure in the report has no row.
"""

import json
import re
from pathlib import Path

from catid2_ray.evaluation.reproduce.conditions import METHODS

ROOT = Path(__file__).parents[1]
README, REPORT = ROOT / "README.md", ROOT / "benchmarks" / "results" / "paper_tables" / "report.json"
BEGIN, END = "<!-- results: written by docs/results.py -->\n", "<!-- end of results -->\n"
_OTHER = (
    "bm25_blanks",
    "hnsw",
    "ivf",
    "dsi_naive",
    "paper_tiger",
    "cat_id2_512",
)  # variants that a front page can do without


def table(report: dict) -> str:
    """Markdown of the rows of Table 2 that have figures."""
    rows = report["tables"]["T2"]["rows"]
    shown = [one for one in METHODS if one.name not in _OTHER and "recall" in rows.get(one.name, {})]
    shown.sort(key=lambda one: (one.family == "ids", -rows[one.name]["recall"]["50"]))
    lines = ["| method | @10 | @50 (95 %) | @100 | seeds |", "|---|---|---|---|---:|"]
    for one in shown:
        row = rows[one.name]
        ten, fifty, hundred = (_share(row["recall"][k]) for k in ("10", "50", "100"))
        _, low, high = row["interval"]["50"]
        title = f"{one.title} (proxy)" if one.family == "ids" else one.title
        lines.append(
            f"| {title} | {ten} | {fifty} ({_share(low)} to {_share(high)}) | {hundred} | {len(row['seeds'])} |"
        )
    return "\n".join(lines) + "\n"


def with_table(readme: str, report: dict) -> str:
    """The README with this report's table in the place of the one that it has."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(report)}\n{END}{rest.split(END)[1]}"


def _share(value: float) -> str:
    return re.sub(r"^0", "", f"{value:.3f}")


if __name__ == "__main__":
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), report), encoding="utf-8")
