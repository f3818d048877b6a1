"""Table 1 of the CAT-ID² paper (2511.01461) beside what our preparation of ESCI counts."""

from collections.abc import Mapping

from catid2_ray.evaluation.report import Section

# documents, training queries and pairs, test queries and pairs
PAPER = {
    "us": (386_392, 20_001, 341_460, 5_800, 29_351),
    "es": (131_935, 5_350, 121_297, 1_612, 12_176),
    "jp": (152_845, 6_458, 139_508, 1_832, 14_353),
}
NOTE = (
    "The paper does not say whether it used the small or the large version, where its categories come from, or whether its "
    "pairs count all four labels or E and S alone. It has no validation split: ours counts as training here, and the test "
    "products that only validation queries name are missing from our test pairs."
)


def table_one(counts: Mapping[str, int], *, locale: str) -> list[Section]:
    """Our counts beside the paper's, and what was dropped why. `counts`: those of `prepare_esci`."""
    documents, train_queries, train_pairs, test_queries, test_pairs = PAPER[locale]

    def pairs(split: str, labels: str) -> int:
        return sum(counts.get(f"{split}_{label}", 0) for label in labels)

    def both(key: str) -> int:
        return counts.get(f"train_{key}", 0) + counts.get(f"validation_{key}", 0)

    beside = [
        ("documents", counts["documents"], documents),
        ("training queries (E, S)", both("queries"), train_queries),
        ("training pairs (E, S)", pairs("train", "ES") + pairs("validation", "ES"), train_pairs),
        ("training pairs (all labels)", pairs("train", "ESCI") + pairs("validation", "ESCI"), train_pairs),
        ("test queries (E, S)", counts["test_queries"], test_queries),
        ("test pairs (E, S)", pairs("test", "ES"), test_pairs),
        ("test pairs (all labels)", pairs("test", "ESCI"), test_pairs),
    ]
    rows = [[label, f"{ours:,}", f"{paper:,}", f"{ours / paper:.2f}"] for label, ours, paper in beside]
    title = f"ESCI-{locale} beside Table 1 of the paper"
    within = [
        ["of the training queries, in validation", f"{counts['validation_queries']:,}"],
        ["of the training pairs (E, S), in validation", f"{pairs('validation', 'ES'):,}"],
    ]
    return [
        Section(title, ["", "ours", "paper", "ratio"], rows),
        Section("Within these", ["", "figure"], within),
        Section("What was read and dropped", ["", "figure"], _flow(counts)),
    ]


def _flow(counts: Mapping[str, int]) -> list[list[str]]:
    lines = (
        ("products of the locale", "products_read"),
        ("… in the corpus", "products_in_corpus"),
        ("… with a category", "products_with_category"),
        ("paths cut to three names", "paths_cut"),
        ("judgements of the locale and version", "judgements_read"),
        ("… of dropped products", "judgements_of_dropped_products"),
        ("… given twice", "judgements_duplicate"),
        ("… test, product in no training pair", "test_unseen"),
        ("    of these in validation pairs", "test_seen_in_validation_only"),
        ("… validation, product in no training pair", "validation_unseen"),
        ("category lines", "lines_read"),
        ("… of another locale", "lines_of_other_locales"),
        ("… unreadable", "lines_unreadable"),
    )
    rows = [[label, f"{counts[key]:,}"] for label, key in lines if key in counts]
    return rows + [[key, f"{count:,}"] for key, count in sorted(counts.items()) if key.startswith("dropped: ")]
