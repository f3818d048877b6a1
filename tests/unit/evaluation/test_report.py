"""The closing report fits a terminal, says every figure, leaves out what is absent; Table 1: sums over labels and splits."""

import copy
import io

from rich.console import Console

from catid2_ray.evaluation.report import PAPER, closing_tables, table_one
from catid2_ray.evaluation.tables import markdown, terminal

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
    console.print(terminal(closing_tables(figures)))
    return console.export_text()


def test_the_adapter_has_its_recall_before_and_after_or_its_reason():
    recall = {"before": {"10": 0.3456, "50": 0.6}, "after": {"10": 0.392, "50": 0.662}}
    metrics = {"adopted": True, "epoch": 5, "queries": 593, "recall": recall}
    (table,) = closing_tables({"adapter": metrics})
    assert table.title == "Adapter (epoch 5): recall of dense search on 593 queries kept back"
    assert table.rows == [["before it", "0.346", "0.600"], ["after it", "0.392", "0.662"]]
    (table,) = closing_tables({"adapter": metrics | {"adopted": False}})
    assert "not adopted, it would find no more" in table.title
    (table,) = closing_tables({"adapter": {"adopted": False, "reason": "no pair teaches", "recall": {}}})
    assert table.title == "The adapter was not adopted: no pair teaches"
    (table,) = closing_tables({"tuned_encoder": metrics | {"among": 2100}})
    assert table.title.startswith("Tuned encoder (epoch") and table.title.endswith("kept back, among 2,100 products")
    (table,) = closing_tables({"tuned_encoder": {"adopted": False, "reason": "only 3 pairs teach", "recall": {}}})
    assert table.title == "The tuned encoder was not adopted: only 3 pairs teach"


def test_chosen_weights_are_readable_with_what_they_gain_or_the_reason_against_them():
    recall = {"stated": {"10": 0.4481, "50": 0.7128}, "chosen": {"10": 0.4529, "50": 0.7144}}
    gain = {"10": [0.0048, -0.0012, 0.0115], "50": [0.0017, -0.0063, 0.0097]}
    metrics = {"adopted": True, "queries": 1593, "recall": recall, "gain": gain, "score": "1 · dense + 0.06 · BM25"}
    (table,) = closing_tables({"mixture": metrics | {"lookahead": {"logp_weight": 0.03}, "expansion": {}}})
    assert table.title == "Weights of what is served (chosen), on 1,593 validation queries"
    assert table.rows[1:3] == [["chosen", "0.453", "0.714"], ["gain", "+0.005", "+0.002"]]
    assert table.rows[3:] == [["… at least", "-0.001", "-0.006"], ["… at most", "+0.011", "+0.010"]]
    assert table.caption == "Products are ranked by 1 · dense + 0.06 · BM25; log P weighs 0.03 in the search."
    (table,) = closing_tables({"mixture": metrics | {"adopted": False, "reason": "nothing finds more"}})
    assert "(as stated: nothing finds more)" in table.title
    (table,) = closing_tables({"mixture": {"adopted": False, "reason": "3 validation queries are too few"}})
    assert table.rows == [["3 validation queries are too few", "–"]]


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
    text = markdown(closing_tables(FIGURES))
    assert text.count("### ") == 4
    assert "| products: method | @5 | @10 | @20 | @50 | @100 |\n| --- | ---: | ---: | ---: | ---: | ---: |" in text
    assert "| seen: beam | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 |" in text
    assert "| b | 251 | 256 | 98.0% |" in text


def test_absent_parts_are_left_out():
    text = markdown(closing_tables({"recall": {"beam": {"10": 0.5}}}))
    assert text.count("### ") == 1 and "| all: beam | 0.500 |" in text
    assert markdown(closing_tables({})) == "" and printed({}).strip() == ""


COUNTS = {
    "documents": 193_196, "train_queries": 90, "validation_queries": 10, "test_queries": 29, "train_E": 600, "train_S": 250,
    "train_C": 30, "train_I": 20, "validation_E": 80, "validation_I": 4, "test_E": 50, "test_S": 7, "test_C": 1,
    "products_read": 400_000, "judgements_read": 1500, "dropped: category path of depth 2": 40,
}  # fmt: skip


def test_our_counts_stand_beside_the_papers():
    text = markdown(table_one(COUNTS, locale="us"))
    for line in (
        "| documents | 193,196 | 386,392 | 0.50 |",
        "| training queries (E, S) | 100 | 20,001 | 0.00 |",
        "| training pairs (E, S) | 930 | 341,460 | 0.00 |",
        "| training pairs (all labels) | 984 | 341,460 | 0.00 |",
        "| test queries (E, S) | 29 | 5,800 | 0.01 |",
        "| test pairs (E, S) | 57 | 29,351 | 0.00 |",
        "| test pairs (all labels) | 58 | 29,351 | 0.00 |",
        "| of the training pairs (E, S), in validation | 80 |",
        "| products of the locale | 400,000 |",
        "| dropped: category path of depth 2 | 40 |",
    ):
        assert line in text.splitlines(), text


def test_every_locale_has_the_papers_row():
    assert PAPER["es"] == (131_935, 5_350, 121_297, 1_612, 12_176) and PAPER["jp"][0] == 152_845
    assert all("beside Table 1" in table_one(COUNTS, locale=locale)[0].title for locale in PAPER)


def test_what_was_set_aside_and_that_nothing_was_evaluated_are_said():
    found = {
        "rows": 3,
        "of": 1200,
        "reasons": {"empty title": 2, "title is not UTF-8": 1},
        "first": ["'a': empty title"],
        "at": "s3://b/x",
    }
    page = markdown(closing_tables({"recall": {}, "not_evaluated": "no pairs", "set_aside": {"products": found}}))
    assert "### Set aside (the rows lie in s3://b/x)" in page and "| products: 3 of 1,200 |" in page
    assert "| title is not UTF-8 | 1 |" in page.replace("|   ", "| ") and "such as 'a': empty title" in page
    assert "### Nothing was evaluated" in page and "no pairs" in page
    assert closing_tables({"set_aside": {}}) == []
