"""Table 1 beside ours: sums over labels and splits, and the paper's numbers in their places."""

from catid2_ray.evaluation.report import markdown_tables
from catid2_ray.evaluation.table_one import PAPER, table_one

COUNTS = {
    "documents": 193_196, "train_queries": 90, "validation_queries": 10, "test_queries": 29, "train_E": 600, "train_S": 250,
    "train_C": 30, "train_I": 20, "validation_E": 80, "validation_I": 4, "test_E": 50, "test_S": 7, "test_C": 1,
    "products_read": 400_000, "judgements_read": 1500, "dropped: category path of depth 2": 40,
}  # fmt: skip


def test_our_counts_stand_beside_the_papers():
    text = markdown_tables(table_one(COUNTS, locale="us"))
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
