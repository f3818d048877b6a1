"""The terminal's tables of a look: a recipe before its job, what is known of a product, why a query finds it or not."""

from collections.abc import Mapping

from catid2_ray.evaluation.tables import DASH, Column, Table, columns_of, shown
from catid2_ray.evaluation.why import Step, Why

_TEXT = 300  # characters of a text that are shown


def why_tables(found: Why) -> list[Table]:
    """What was asked and the verdict, the path level by level, and the final scores beside the first and the last answer's."""
    about = [
        ["product", found.product_id],
        ["title", found.title or DASH],
        ["ID", found.docid],
        ["verdict", found.verdict],
    ]
    tables = [Table(f"“{found.query}”  ({found.release})", _pairs(), about)]
    if found.steps:
        tables.append(_path(found))
        tables.append(_scores(found))
    return tables


def dry_run_tables(figures: Mapping) -> list[Table]:
    """What a `reindex` would do, stage by stage."""
    rows = [[row["stage"], row["does"], row["key"] or row["why"]] for row in figures["stages"]]
    columns = [Column(name, number=False, whole=name != "key, or why") for name in ("stage", "does", "key, or why")]
    base = f"builds on release {figures['release']}" if figures["release"] else "begins anew: nothing was published yet"
    return [Table(f"A dry run; {base}", columns, rows)]


def plan_tables(figures: Mapping) -> list[Table]:
    """What a recipe takes, stage by stage and in all; the rates that nobody measured are named."""
    priced = figures["cost"] is not None
    headings = ["machines", "hours", "machine-hours", "GiB a worker", *(["cost"] if priced else [])]
    rows = [
        [row["stage"], row["pool"], f"{row['machines']:,}", f"{row['hours']:.2f}", f"{row['machine_hours']:.2f}",
         f"{row['memory_gib']:.1f}", *([f"{row['cost']:,.2f}"] if priced else [])]
        for row in figures["stages"]
    ]  # fmt: skip
    assumed = [name for name, rate in figures["rates"].items() if rate["source"] == "assumed"]
    note = (
        f"Assumed, not measured: {', '.join(assumed)}. Not counted: adapter, mixture, evaluation, the start of "
        "machines. --json has every rate and its source."
    )
    columns = [
        Column("stage", number=False, whole=True),
        Column("pool", number=False, whole=True),
        *map(Column, headings),
    ]
    whole = [
        ["machine-hours", f"{sum(row['machine_hours'] for row in figures['stages']):,.2f}"],
        ["memory of the job's own process, GiB", f"{figures['driver_gib']:,.1f}"],
        ["stored, GB", f"{figures['storage_gb']:,.1f}"],
        ["moved, GB", f"{figures['transfer_gb']:,.1f}"],
        *([f"cost: {name}", f"{value:,.2f}"] for name, value in (figures["cost"] or {}).items()),
    ]
    totals = Table("In all", [Column("", number=False, whole=True), Column("")], whole)
    return [Table(f"{figures['products']:,} products", columns, rows, note), totals]


def _pairs() -> list[Column]:
    return [Column("", number=False, whole=True), Column("", number=False)]


def _path(found: Why) -> Table:
    headings = ["code", "score", "here", "rank", "of", "kept", "best", "last kept"]
    placed = any(step.of_all is not None for step in found.steps)
    rows = [_level(step, placed) for step in found.steps]
    return Table(
        "Its path, level by level",
        columns_of("level", *headings, *(["of all IDs"] if placed else [])),
        rows,
        f"score: {found.score_is}; here: what this level adds. rank: among the prefixes that go on from those kept; "
        "best, last kept: their scores." + (" of all IDs: its rank, had nothing been pruned." if placed else ""),
    )


def _level(step: Step, placed: bool) -> list[str]:
    mark = "" if step.kept else "  out"
    row = [f"{step.level}{mark}", step.token, shown(step.score, ".3f"), shown(step.step, ".3f"), shown(step.rank, ",d")]
    row += [
        f"{step.candidates:,}",
        f"{min(step.width, step.candidates):,}",
        shown(step.best, ".3f"),
        shown(step.last, ".3f"),
    ]
    return row + ([shown(step.of_all, ",d")] if placed else [])


def _scores(found: Why) -> Table:
    names = list(found.standings[0].terms)
    rows = [
        [
            one.who,
            shown(one.rank, ",d"),
            *(f"{one.terms[name]:.3f}" for name in names),
            f"{one.score:.3f}",
            _cut(one.title or "", 60),
        ]
        for one in found.standings
    ]
    columns = [*columns_of("", "rank", *names, "final" if names else "score"), Column("title", number=False)]
    caption = "Each part as it enters the final score." if names else ""
    if found.fell_out:
        caption = f"The product's scores are those that it would have had, had its path been kept. {caption}".strip()
    return Table("Its score beside those of the answers", columns, rows, caption)


def product_tables(card: Mapping) -> list[Table]:
    """`on_ray.look.product.inspect` as tables."""
    product = dict(card["product"] or {})
    rows = [["product", card["product_id"]], ["ID", card["docid"] or DASH]]
    if card["product"] is None:
        rows.append(["", f"release {card['release']} was published without it"])
    rows += [[name, _cut(_said(value), _TEXT)] for name, value in product.items() if name != "product_id"]
    tables = [Table(f"In release {card['release']}", _pairs(), rows)]
    tables += [
        _neighbours("Next to it in the order of IDs", card["near_id"]),
        _neighbours("Nearest to it by the vectors of the products", card["near_vector"]),
        _history(card["history"]),
        Table(
            "Changed since the release was published",
            columns_of("change", "what", "ID"),
            [[f"{change['number']:,}", change["kind"], change["docid"] or ""] for change in card["changes"]],
        ),
    ]
    return [table for table in tables if table.rows]


def check_tables(figures: Mapping) -> list[Table]:
    """`on_ray.look.check.check` as tables."""
    rows = []
    for name in ("products", "pairs"):
        table = figures[name]
        kept = f"{table['of'] - table['rows_aside']:,} of {table['of']:,} rows are good"
        rows.append([name, kept if table["of"] else "none"])
        rows += [["", f"set aside, {reason}: {count:,}"] for reason, count in sorted(table["reasons"].items())]
        rows += [["", f"  such as {_cut(first, 120)}"] for first in table["first"][:3]]
    categories = ", ".join(f"{count:,}" for count in figures["products"]["categories"])
    rows.append(["categories", f"{categories or 'none'} (by depth)"])
    for split, found in figures["splits"].items():
        rows.append(
            [
                split,
                f"{found['queries']:,} queries, {found['pairs']:,} pairs, relevance up to {shown(found['relevance_max'])}",
            ]
        )
    rows.append(["teach", f"{figures['pairs']['teaching']:,} training pairs reach generator.min_relevance"])
    tables = [
        Table(f"What {figures['recipe']} reads", _pairs(), rows),
        Table("What it would train", _pairs(), _training(figures)),
    ]
    if figures["notes"]:
        tables.append(Table("Note", _pairs(), [["•", note] for note in figures["notes"]]))
    return tables


def _training(figures: Mapping) -> list[list[str]]:
    ids = figures["ids"]
    rows = [["IDs", ids["kind"]]]
    if "codes_per_level" in ids:
        codes = " × ".join(f"{count:,}" for count in ids["codes_per_level"])
        rows.append(["", f"{codes} codes, {ids['products_per_first_code']:,.0f} products per first code"])
    for stage in (*(["tuned_encoder"] if figures["tuned_encoder"] else []), "adapter", "quantizer"):
        said, none = figures[stage], "none" if stage == "adapter" else "fitted, not trained"
        steps = said and f"{said['steps']:,} steps: {said['epochs']:,} epochs in batches of {said['batch']:,}"
        rows.append([stage.replace("_", " "), steps or none])
    for stage in figures["generator"]:
        rows.append(
            ["generator", f"{stage['steps']:,} steps: {stage['epochs']:,} epochs of {stage['examples']:,} examples in batches of "
             f"{stage['batch']:,}"]
        )  # fmt: skip
    return rows


def _neighbours(title: str, near: list[Mapping]) -> Table:
    cosine = [Column("cosine")] if any("cosine" in one for one in near) else []
    columns = [Column("product", number=False), Column("ID", number=False, whole=True), Column("shared"), *cosine]
    rows = [
        [one["product_id"], one["docid"], str(one["shared"]), *([f"{one['cosine']:.3f}"] if cosine else []),
         _cut(one["title"] or "", 60)]
        for one in near
    ]  # fmt: skip
    return Table(f"{title} (shared: first codes)", [*columns, Column("title", number=False)], rows)


def _history(history: list[Mapping]) -> Table:
    rows = []
    for past in history:
        name = past["release"] + ("  *" if past["current"] else "")
        if "problem" in past:
            rows.append([name, "cannot be read", "", "", past["problem"][:60]])
            continue
        free = f"its ID is free from release number {past['until']:,} on" if past["until"] else ""
        rows.append([name, past["status"], past["docid"], f"{past['since']:,} of {past['number']:,}", free])
    columns = [Column("release", number=False, whole=True), Column("status", number=False)]
    columns += [Column("ID", number=False, whole=True), Column("since"), Column("", number=False)]
    caption = "since: number of the release that gave it this ID, of the release's own number." if rows else ""
    return Table("What became of its ID (* current)", columns, rows, caption)


def _said(value) -> str:
    if value is None:
        return DASH
    return " > ".join(value) if isinstance(value, list) else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
