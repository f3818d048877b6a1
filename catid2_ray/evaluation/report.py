"""The tables of a run's figures, and of Table 1 of the paper (2511.01461) beside what our preparation of ESCI counts.

A part whose figures are absent is left out, so the shorter JSON of an evaluation alone has its tables too.
"""

from collections.abc import Mapping, Sequence

from catid2_ray.docid import LEVEL_LETTERS
from catid2_ray.evaluation.tables import DASH, Column, Table, columns_of, shown

RECALLS = {"recall": "all", "recall_seen": "seen", "recall_unseen": "unseen"}


def closing_tables(figures: Mapping) -> list[Table]:
    """The report's tables, in order: the catalogue, what changed since the release before, tuned encoder, adapter, the codes,
    recall, the weights of what is served, time and memory.

    `figures`: the job's JSON; keys release, documents, number, base, ledger, churn, collision_rate_before (0 to 1),
    duplicates_after, node_vector_bytes, tuned_encoder and adapter (metrics of their manifests), codes_used, codes_per_level,
    recall, recall_seen, recall_unseen, not_evaluated (why), set_aside (table → rows, of, reasons, first, at), diagnosis
    (`diagnosis.diagnosis_figures`, or queries 0 and a reason), mixture (metrics of its manifest), seconds (stage → s),
    peak_memory_bytes; all optional.
    """
    tables = [
        _catalogue(figures), _churn(figures), _learned(figures, "tuned_encoder"), _learned(figures, "adapter"), _codes(figures),
        _recall(figures), _mixture(figures), *diagnosis_tables(figures.get("diagnosis")), _set_aside(figures), _cost(figures),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def size_text(size: int | None) -> str:
    """Bytes as a person reads them, in powers of 1000: 999 B, 1.2 kB, 34 MB."""
    if size is None:
        return DASH
    value, units = float(size), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if value < 9.95 and units[0] != "B" else f"{value:.0f} {units[0]}"


def age_text(seconds: float | None) -> str:
    """The largest whole unit: 40 s, 12 min, 5 h, 31 d."""
    if seconds is None:
        return DASH
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def releases_table(rows: Sequence[Mapping]) -> Table:
    """`artifacts.history.overview` as a table of 80 columns."""
    columns = [Column("release", number=False, whole=True)]
    columns += map(Column, ("age", "documents", "served", "beam", "churn", "size", "in use"))
    lines = [
        (
            row["release"] + ("  *" if row["current"] else ""), age_text(row["age_s"]), shown(row["documents"], ",d"),
            *(shown(share, ".3f") for share in (row["recall"].get("served"), row["recall"].get("beam"), row["churn"])),
            size_text(row["bytes"]), str(row["in_use"]),
        )
        for row in rows
    ]  # fmt: skip
    return Table("Releases, newest first (* current); served, beam: their recall@50", columns, lines)


def freed_table(rows: Sequence[tuple[str, int, int]], *, dry_run: bool) -> Table:
    """`artifacts.gc.Freed.rows` as a table."""
    title = "What gc would remove" if dry_run else "What gc removed"
    lines = [(kind, f"{count:,}", size_text(size)) for kind, count, size in rows]
    return Table(title, columns_of("what", "how many", "size"), lines)


def _catalogue(figures: Mapping) -> Table:
    lines = (
        ("release", "release", ""),
        ("documents", "documents", ",d"),
        ("collision rate before resolution", "collision_rate_before", ".2%"),
        ("duplicate IDs after", "duplicates_after", ",d"),
        ("bytes of node vectors", "node_vector_bytes", ",d"),
    )
    rows = [[label, shown(figures[key], form)] for label, key, form in lines if key in figures]
    return Table("Catalogue and IDs", columns_of("", "figure"), rows)


def _churn(figures: Mapping) -> Table:
    """Against the release that was built on: products by status, and how many lost their first 1, 2, … L tokens."""
    churn, base = figures.get("churn"), figures.get("base")
    if not base:
        return Table("", [], [])
    counts = ", ".join(f"{name} {figures['ledger'][name]:,}" for name in ("kept", "new", "moved", "retired"))
    title = f"Since release {base} (products: {counts})"
    if not churn:
        return Table(title, columns_of("", "figure"), [["IDs of this kind or with other levels are not followed", ""]])
    after, before = churn["after"], churn.get("before")
    rows = [["first tokens changed", *(shown(share, ".1%") for share in after["prefix_churn"])]]
    if before:
        rows.append(["… without realignment", *(shown(share, ".1%") for share in before["prefix_churn"])])
    rows.append(["IDs that name another product", shown(after["addresses_reused"], ",d"), *[""] * (len(rows[0]) - 2)])
    return Table(
        title, columns_of("of products in both", *(str(m + 1) for m in range(len(after["prefix_churn"])))), rows
    )


def _learned(figures: Mapping, name: str) -> Table:
    """Dense recall before and after, on the queries that judged the adapter or the tuned encoder."""
    metrics, what = figures.get(name) or {}, name.replace("_", " ")
    if reason := metrics.get("reason"):
        return Table(
            f"The {what} was not adopted: {reason}", columns_of("", "figure"), [["vectors stay as they are", ""]]
        )
    recall = metrics.get("recall") or {}
    ks = sorted(map(int, recall.get("before", ())))
    verdict = f"epoch {metrics.get('epoch')}" if metrics.get("adopted") else "not adopted, it would find no more"
    among = f", among {metrics['among']:,} products" if "among" in metrics else ""
    title = (
        f"{what.capitalize()} ({verdict}): recall of dense search on {metrics.get('queries')} queries kept back{among}"
    )
    rows = [[f"{when} it", *(shown(values.get(str(k)), ".3f") for k in ks)] for when, values in recall.items()]
    return Table(title, columns_of("", *(f"@{k}" for k in ks)), rows)


def _codes(figures: Mapping) -> Table:
    rows = []
    for level, used in enumerate(figures.get("codes_used", ())):
        offered = (figures.get("codes_per_level") or [None] * (level + 1))[level]
        share = used / offered if offered else None
        rows.append([LEVEL_LETTERS[level], shown(used, ",d"), shown(offered, ",d"), shown(share, ".1%")])
    return Table("Codes in use", columns_of("level", "used", "of", "share"), rows)


def _recall(figures: Mapping) -> Table:
    groups = {key: name for key, name in RECALLS.items() if figures.get(key)}
    ks = sorted({int(k) for key in groups for values in figures[key].values() for k in values})
    rows = [
        [f"{name}: {method}", *(shown(values.get(str(k)), ".3f") for k in ks)]
        for key, name in groups.items()
        for method, values in figures[key].items()
    ]
    counts = figures.get("queries") or {}
    asked = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    if figures.get("not_evaluated"):
        return Table("Nothing was evaluated", columns_of("", "figure"), [[figures["not_evaluated"], DASH]])
    title = "Recall at product level" + (f" (queries: {asked})" if asked else "")
    return Table(title, columns_of("products: method", *(f"@{k}" for k in ks)), rows)


def _mixture(figures: Mapping) -> Table:
    """Recall on the validation queries with the weights as stated and as chosen, and the gain with its 95 % interval."""
    metrics = figures.get("mixture") or {}
    if metrics and "recall" not in metrics:
        return Table("Weights are as the recipe states them", columns_of("", "figure"), [[metrics["reason"], DASH]])
    recall, gain = metrics.get("recall") or {}, metrics.get("gain") or {}
    rows = [[name, *(shown(value, ".3f") for value in by_k.values())] for name, by_k in recall.items()]
    for at, name in enumerate(("gain", "… at least", "… at most")):
        rows += [[name, *(shown(interval[at], "+.3f") for interval in gain.values())]] if gain else []
    logp = "".join(f"; log P weighs {value:g} in the search" for value in metrics.get("lookahead", {}).values())
    verdict = "chosen" if metrics.get("adopted") else f"as stated: {metrics.get('reason')}"
    caption = f"Products are ranked by {metrics['score']}{logp}." if metrics.get("score") else logp.removeprefix("; ")
    title = f"Weights of what is served ({verdict}), on {metrics.get('queries'):,} validation queries" if rows else ""
    return Table(title, columns_of("weights", *(f"@{k}" for k in gain)), rows, caption)


def diagnosis_tables(diagnosis: Mapping | None) -> list[Table]:
    """Recall of exact scores beside the beams', alone and re-scored; and how deep relevant products stay in each beam."""
    if diagnosis is None:
        return []
    if not diagnosis["queries"]:
        return [Table("Nothing was diagnosed", columns_of("", "figure"), [[diagnosis["reason"], DASH]])]
    served, rows = diagnosis["served"], []
    parts = {"recall": "", "mixture": "re-scored: "}
    for part, label in parts.items():
        for search, recall in diagnosis[part].items():
            name = "all products" if (part, search) == ("mixture", "exact") else search
            marked = f"{label}{name}" + (" *" if search == served else "")
            rows.append([marked, *(shown(value, ".3f") for value in recall.values())])
    ks = list(next(iter(diagnosis["recall"].values())))
    errors = [
        f"{label}{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        for part, label in parts.items()
        if part in diagnosis["search_error"]
        for mean, low, high in [diagnosis["search_error"][part]["50"]]
    ]
    about = f"{diagnosis['queries']:,} {diagnosis['split']} queries, {diagnosis['decoder_rows']:,} decoder rows"
    recall = Table(
        f"Recall by exact scores and by beams ({about})", columns_of("search (* served)", *(f"@{k}" for k in ks)), rows,
        f"Lost by the search, exact less served @50: {'; '.join(errors)}. What exact misses too, the model ranks low.",
    )  # fmt: skip
    levels = len(diagnosis["kept"][served])
    kept = [
        [search + (" *" if search == served else ""), *(shown(share, ".3f") for share in shares)]
        for search, shares in diagnosis["kept"].items()
    ]
    headings = [LEVEL_LETTERS[level] for level in range(levels)]
    return [recall, Table("Relevant products still in the beam after each level", columns_of("", *headings), kept)]


def _set_aside(figures: Mapping) -> Table:
    """What the door kept out: by table and reason how many rows, the first of them, and where all of them lie."""
    tables, rows = figures.get("set_aside") or {}, []
    for table, found in tables.items():
        rows.append([f"{table}: {found['rows']:,} of {found['of']:,}", ""])
        rows += [[f"  {reason}", f"{count:,}"] for reason, count in sorted(found["reasons"].items())]
        rows += [[f"  such as {first}", ""] for first in found["first"][:3]]
    where = ", ".join(sorted({found["at"] for found in tables.values()}))
    return Table(f"Set aside (the rows lie in {where})", columns_of("", "rows"), rows)


def _cost(figures: Mapping) -> Table:
    seconds = figures.get("seconds") or {}
    rows = [[stage.replace("_", " "), f"{value:,.1f} s"] for stage, value in seconds.items()]
    if seconds:
        rows.append(["all stages", f"{sum(seconds.values()):,.1f} s"])
    if figures.get("peak_memory_bytes") is not None:
        rows.append(["peak memory", f"{figures['peak_memory_bytes'] / 2**30:,.2f} GiB"])
    return Table("Time and memory", columns_of("stage", "figure"), rows)


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


def table_one(counts: Mapping[str, int], *, locale: str) -> list[Table]:
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
        Table(title, columns_of("", "ours", "paper", "ratio"), rows),
        Table("Within these", columns_of("", "figure"), within),
        Table("What was read and dropped", columns_of("", "figure"), _flow(counts)),
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
