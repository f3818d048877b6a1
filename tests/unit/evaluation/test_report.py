"""The closing report: it fits a terminal, says every figure, and leaves out what is absent."""

import copy
import io

from rich.console import Console

from catid2_ray.evaluation.report import closing_table, markdown

KS = ("5", "10", "20", "50", "100")
FIGURES = {
    "release": "r-00000003-0f3a9c1b2d",
    "documents": 54667,
    "collision_rate_before": 0.0712,
    "duplicates_after": 0,
    "codes_used": [256, 251],
    "codes_per_level": [256, 256],
    "recall": {m: {k: 0.125 for k in KS} for m in ("beam", "bm25")},
    "recall_seen": {m: {k: 0.25 for k in KS} for m in ("beam", "bm25")},
    "recall_unseen": {m: {k: None for k in KS} for m in ("beam", "bm25")},
    "queries": {"all": 1226, "seen": 607, "unseen": 0},
    "seconds": {"embed": 31.24, "train_quantizer": 1203.5},
    "peak_memory_bytes": 3 * 2**30,
}


def printed(figures, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(closing_table(figures))
    return console.export_text()


def test_the_terminal_table_fits_and_says_every_figure():
    before = copy.deepcopy(FIGURES)
    for width in (80, 100):
        text = printed(FIGURES, width)
        assert max(map(len, text.splitlines())) <= width
        for figure in (
            "r-00000003-0f3a9c1b2d",
            "54,667",
            "7.12%",
            "98.0%",
            "0.125",
            "0.250",
            "–",
            "1,234.7 s",
            "3.00 GiB",
        ):
            assert figure in text
        assert "@100" in text and "unseen: bm25" in text and "all 1,226" in text
    assert before == FIGURES


def test_markdown_has_a_table_per_part():
    text = markdown(FIGURES)
    assert text.count("### ") == 4
    assert "| products: method | @5 | @10 | @20 | @50 | @100 |\n| --- | ---: | ---: | ---: | ---: | ---: |" in text
    assert "| seen: beam | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 |" in text
    assert "| b | 251 | 256 | 98.0% |" in text


def test_absent_parts_are_left_out():
    text = markdown({"recall": {"beam": {"10": 0.5}}})
    assert text.count("### ") == 1 and "| all: beam | 0.500 |" in text
    assert markdown({}) == "" and printed({}).strip() == ""
