"""The reports on IDs: ways of making them side by side (`compare-ids`), and the quality of one way's IDs."""

import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from catid2_ray.evaluation.figures import comparison
from catid2_ray.evaluation.page import Headline, Marked, Picture, Prose, page
from catid2_ray.evaluation.tables import Cell, Column, Quantity, Table, shown, widest
from catid2_ray.quantizer.health import LevelHealth, Verdict, verdict

COMPARED = (
    Quantity(
        "recall",
        "recall@10, 50, 100",
        ".3f",
        "share of the relevant products that a small generator finds for validation queries through these IDs",
        1,
    ),
    Quantity(
        "recall_gain_50",
        "@50 − first",
        "+.3f",
        "difference to the first kind, seeds averaged, and the ends of its 95 % interval over the same queries",
    ),
    Quantity(
        "collision_rate", "collisions", ".2%", "(N − distinct IDs) / N, of N products, as the method gave them", -1
    ),
    Quantity("shared_rate", "shared", ".2%", "share of the products whose ID another product has, too", -1),
    Quantity("largest_shared", "largest", ",.0f", "products in the fullest ID", -1),
    Quantity("codes_used", "codes used", ",.0f", "codes that any product uses, by level", 1),
    Quantity("perplexity", "perplexity", ",.0f", "exp(entropy) of the codes, by level: as many codes used evenly", 1),
    Quantity("purity", "purity", ".3f", "share of products in their prefix's commonest category, by depth", 1),
    Quantity(
        "ami", "AMI", ".3f", "agreement of the first h tokens with the category at depth h, corrected for chance", 1
    ),
    Quantity("ami_null", "AMI, null", ".3f", "the same against permuted categories; about 0"),
    Quantity(
        "neighbours",
        "neighbours",
        ".2f",
        "share of a product's ten nearest embeddings with its first 1, 2, 3 tokens",
        1,
    ),
    Quantity("seconds", "s", ",.0f", "seconds to train and to assign", -1),
)
_NOT_BRIEF = {"perplexity", "ami_null"}
_NOT_BESIDE_RECALL = {"shared_rate", "largest_shared", "codes_used", "purity", "seconds"}
_SCATTERED, _KEPT = "neighbours apart", 0.95  # remark on a kind that keeps less than this share of tiger's agreement
_TOKEN = re.compile(r"<[^<>]*>")
HOW_TO_READ = (
    "Collisions are counted in two ways. The collision rate is (N − distinct IDs) / N: how many products would need "
    "another ID. The shared rate is the share of products that do not have an ID for themselves: two products in one ID "
    "are one collision, but two sharing. Equal embeddings set a floor under both, for every method that sees nothing else.",
    "Purity rises by itself when prefixes are many and small: a prefix of one product is always pure. So compare it "
    "only between kinds with as many prefixes, and beside the purity of permuted categories in a kind's own report.",
    "AMI, the adjusted mutual information, takes that away: about 0 is what permuted categories give (the null), 1 is "
    "the same partition. It falls, too, when a prefix splits a category into many codes, so 1 is not the goal.",
    "Neighbours are the share of a product's ten nearest embeddings that have its first token, its first two, its first "
    "three. A kind of which they have less than 95 % of what they have by `tiger`, at one or two tokens, is marked "
    "`neighbours apart`: what is alike lies scattered, whatever its categories say.",
    "Each figure is the mean over the seeds; ± is half the range between them, not a standard error. Differences "
    "smaller than that are no differences. The best mean of a column is bold; best is no judgement of the whole.",
)


def compare_table(rows: Sequence[Mapping], *, brief: bool = False) -> Table:
    """A row a kind, in the order of `rows` (one dict a run): the mean of its seeds, ± half their range, verdicts not healthy.

    A figure that no run has is left out, None is left out of the mean. `brief`, for a terminal of 100 columns: no readings,
    seeds or perplexity, and the largest null of AMI (in size) under AMI.
    """
    runs = _runs_by_kind(rows)
    cells = {quantity.key: _cells(quantity, list(runs.values())) for quantity in COMPARED}
    quantities = [quantity for quantity in COMPARED if any(cell.texts for cell in cells[quantity.key])]
    if brief:
        scored = any(quantity.key == "recall" for quantity in quantities)
        left_out = _NOT_BRIEF | (_NOT_BESIDE_RECALL if scored else set())
        quantities = [quantity for quantity in quantities if quantity.key not in left_out]
        nulls = [widest(cell.texts) for cell in cells["ami_null"]]
        cells["ami"] = [cell._replace(remark=f"null {null}" if null else "") for cell, null in zip(cells["ami"], nulls)]
    lines = []
    for number, (kind, of_kind) in enumerate(runs.items()):
        verdicts = sorted({run.get("verdict") or "healthy" for run in of_kind} - {"healthy"})
        verdicts += [_SCATTERED] if _scattered(of_kind, runs.get("tiger", [])) else []
        label = Cell([kind], remark=" ".join(f"({verdict})" for verdict in verdicts))
        seeds = [] if brief else [str(len(of_kind))]
        lines.append([label, *seeds, *(cells[quantity.key][number] for quantity in quantities)])
    columns = [Column("kind", number=False), *([] if brief else [Column("seeds")])]
    columns += [Column(quantity.heading, reading="" if brief else quantity.reading) for quantity in quantities]
    caption = "Mean over seeds ± half their range; the best of a column is bold."
    if brief:
        caption = "mean over seeds, ± half their range (of a list: the widest), null: AMI with permuted categories"
    return Table("", columns, lines, caption)


def _runs_by_kind(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    return {kind: [row for row in rows if row["kind"] == kind] for kind in dict.fromkeys(row["kind"] for row in rows)}


def _scattered(of_kind: Sequence[Mapping], of_tiger: Sequence[Mapping]) -> bool:
    """Whether neighbours share the first, or the first two, codes less often than 95 % of what they do by `tiger`."""
    pairs = zip(_places(of_kind, "neighbours")[:2], _places(of_tiger, "neighbours")[:2])
    return any(mine and base and np.mean(mine) < _KEPT * np.mean(base) for mine, base in pairs)


def _cells(quantity: Quantity, runs_of_kinds: Sequence[Sequence[Mapping]]) -> list[Cell]:
    """The Cell of each kind. Means are compared as printed, so that equal texts are best together; a kind alone is not best."""
    places_of_kinds = [_places(runs, quantity.key) for runs in runs_of_kinds]
    means_of_kinds = [
        [float(np.mean(numbers)) if numbers else None for numbers in places] for places in places_of_kinds
    ]
    best = []
    for place in range(max(map(len, means_of_kinds), default=0)):
        means = [means[place] for means in means_of_kinds if len(means) > place and means[place] is not None]
        pick = max if quantity.better > 0 else min
        best.append(format(pick(means), quantity.form) if quantity.better and len(means) > 1 else "")
    return [
        Cell(
            [shown(mean, quantity.form) for mean in means],
            [format(np.ptp(numbers) / 2, quantity.form) if len(numbers) > 1 else "" for numbers in places],
            [shown(mean, quantity.form) == text for mean, text in zip(means, best)],
        )
        for means, places in zip(means_of_kinds, places_of_kinds)
    ]


def _places(runs: Sequence[Mapping], key: str) -> list[list[float]]:
    """Per place of a list, or once for a scalar, the numbers of the runs that have one."""
    values = [run[key] for run in runs if run.get(key) is not None]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return [
        [numbers[place] for numbers in lists if len(numbers) > place and numbers[place] is not None]
        for place in range(max(map(len, lists), default=0))
    ]


def compare_page(rows: Sequence[Mapping], *, title: str, about: Mapping[str, str]) -> str:
    """The HTML page of compare-ids: table, picture, how to read, every run. `about`: what was run, name → text."""
    table = compare_table(rows)._replace(caption="")
    readings = {column.heading: column.reading for column in table.columns if column.reading}
    quantities = [quantity for quantity in COMPARED if quantity.heading in readings]
    runs = [
        [row["kind"], str(row.get("seed", "–")), row.get("verdict") or "–",
         *(shown(row.get(quantity.key), quantity.form) for quantity in quantities)]
        for row in rows
    ]  # fmt: skip
    columns = [Column("kind", number=False), Column("seed"), Column("verdict", number=False)]
    columns += [Column(heading) for heading in readings]
    picture = [Picture("", comparison(rows), "AMI, collision rate and codes used, by kind")] if rows else []
    parts = [table, *picture, Prose("How to read this", HOW_TO_READ, readings), Table("Every run", columns, runs)]
    return page(title, parts, about=about, headline=_compared(rows))


def _compared(rows: Sequence[Mapping]) -> Headline | None:
    """Which kind finds most, where recall was scored, and whose codes are not healthy."""
    if not rows:
        return None
    runs = _runs_by_kind(rows)
    states = {
        kind: {run.get("verdict") or "healthy" for run in of_kind} - {"healthy"} for kind, of_kind in runs.items()
    }
    ill = [f"{kind} is {' and '.join(sorted(found))}" for kind, found in states.items() if found]
    health = ", ".join(ill) or "no kind's codes narrowed or collapsed"
    state = "bad" if any("collapsed" in found for found in states.values()) else "look" if ill else "good"
    gains = {kind: gain for kind, of_kind in runs.items() for run in of_kind if (gain := run.get("recall_gain_50"))}
    first = next(iter(runs))
    if not gains:
        return Headline(state, f"Of the kinds, {health}." if ill else "No kind's codes narrowed or collapsed.")
    better = [kind for kind, (_, low, _) in gains.items() if low > 0]
    if better:
        best = max(better, key=lambda kind: gains[kind][0])
        mean, low, high = gains[best]
        found = f"{best} finds most at 50, {mean:+.3f} beside {first} (95 %: {low:+.3f} to {high:+.3f})"
    else:
        found = f"No kind was shown to find more at 50 than {first}"
    return Headline(state, f"{found}; {health}.")


# Groups of the ID quality report: (heading, rows of (path of keys, format, one line of explanation)).
GROUPS = (
    (
        "Collisions",
        (
            ("products", ",d", "products described"),
            ("ids", ",d", "distinct IDs"),
            ("collision_rate", ".2%", "(N − distinct IDs) / N"),
            ("floor.collision_rate", ".2%", "the floor under it: products whose embedding is equal bit for bit"),
            ("shared_rate", ".2%", "products whose ID another product has"),
            ("floor.shared_rate", ".2%", "the floor under it"),
            ("largest_bucket", ",d", "products in the fullest ID"),
            ("p99_bucket", ",.1f", "99th percentile of products per used ID"),
            ("mean_bucket", ",.3f", "mean products per used ID"),
            ("gini_ids", ".3f", "Gini coefficient of products over used IDs; 0 = even"),
        ),
    ),
    (
        "Use of the codes, by level",
        (
            ("codes_used", ",d", "codes that any product uses"),
            ("codes_used_share", ".1%", "the same, as a share of the level's codes"),
            ("perplexity", ",.1f", "exp(entropy): as many codes, used evenly"),
            ("normalised_entropy", ".3f", "entropy / ln K; 1 = even use"),
            ("conditional_entropy", ".3f", "entropy of a code when those before it are known, in nats"),
            ("gini", ".3f", "Gini coefficient over all codes of the level; 0 = even"),
            ("top_share", ".2%", "share of products on the commonest code"),
            ("hourglass.level", "s", "a middle level used more narrowly than both neighbours; – = none"),
            ("hourglass.dent", ".3f", "how far a level's normalised entropy is below its lower neighbour's"),
        ),
    ),
    (
        "Agreement with the categories, by depth",
        (
            ("purity", ".3f", "products in the commonest category of their prefix"),
            ("purity_shuffled", ".3f", "its null: the same with permuted categories"),
            ("ami", ".3f", "adjusted mutual information of prefix and category; 0 = chance, 1 = equal"),
            ("ami_shuffled", ".3f", "its null"),
            ("purity_products", ",d", "products with a category at that depth"),
            ("prefix_agreement.within", ".3f", "mean common prefix, in tokens, of two products of one category"),
            ("prefix_agreement.across", ".3f", "the same of two products of different categories"),
        ),
    ),
    (
        "Agreement with the embeddings",
        (
            ("neighbour_agreement.share", ".1%", "nearest neighbours that share the first 1, 2, 3 tokens"),
            ("neighbour_agreement.share_random", ".1%", "its null: random products instead"),
            ("neighbour_agreement.neighbours", ",d", "neighbours of a product that were asked"),
            ("neighbour_agreement.queries", ",d", "products that were asked"),
            (
                "reconstruction.squared_error",
                ".4f",
                "squared distance of the decoded embedding from the true one, mean",
            ),
            (
                "reconstruction.relative_error",
                ".3f",
                "the same over the embeddings' spread; 1 = no better than their mean",
            ),
            ("reconstruction.cosine", ".3f", "cosine of the decoded and the true embedding, mean"),
        ),
    ),
    (
        "Displacement by de-duplication",
        (
            ("displacement.moved_share", ".2%", "products that got another ID"),
            ("displacement.mean_cost", ".4f", "added squared distance of those moved, mean"),
            ("displacement.median_cost", ".4f", "the same, median"),
            ("displacement.p95_cost", ".4f", "the same, 95th percentile"),
        ),
    ),
)


def judged(figures: Mapping, *, forced: bool = False, shared: bool = False) -> Verdict:
    """The verdict on the codes that `id_quality` describes. `forced`: the first is the category; `shared`: by design
    several products have one ID, so collisions do not count."""
    columns = (
        figures[key] for key in ("codes_used", "codes_used_share", "perplexity", "normalised_entropy", "top_share")
    )
    levels = [
        LevelHealth(
            # `top_share` is of one code here; no verdict reads it.
            codes_used=used, perplexity=perplexity, normalised_entropy=entropy, top_share=top,
            dead=round(used / share) - used, rows=figures["products"], forced=forced and level == 0,
        )
        for level, (used, share, perplexity, entropy, top) in enumerate(zip(*columns))
    ]  # fmt: skip
    return verdict(levels, None if shared else figures["collision_rate"])


_STATES = {"healthy": "good", "narrowing": "look", "collapsed": "bad"}


def _headline(judgement: Verdict, figures: Mapping) -> Headline:
    sentence = f"IDs are {judgement.state}: {judgement.reason}"
    if "collide" not in judgement.reason:
        sentence += (
            f"; {figures['collision_rate']:.1%} of the {figures['products']:,} products collide before any ID is moved"
        )
    return Headline(_STATES[judgement.state], sentence + ".")


def ids_page(
    figures: Mapping, images: Mapping[str, Figure], examples: Sequence[Mapping], *, title: str,
    judgement: Verdict | None = None,
) -> str:  # fmt: skip
    """The ID quality report (the paper's Figures 3, 4, 6 and Table 8) as one HTML page.

    `judgement`: what `judged` says of them, which stands on top; None for IDs that no rule judges, such as a tree's.
    `figures`: `id_quality`, and optionally under `floor`, `hourglass`, `prefix_agreement`, `neighbour_agreement`,
    `reconstruction`, `displacement` what the functions of `identifiers.quality` return; what the report has no line
    for stands at its end. `images`: caption → Figure. `examples`: dicts `title`, `category`, `docid` and optionally
    `other_docid`, shown by category; what all IDs of a category begin with is marked.
    """
    flat = {
        f"{key}.{inner}" if inner else key: number
        for key, value in figures.items()
        for inner, number in (value.items() if isinstance(value, Mapping) else [("", value)])
    }
    known = {path for _, lines in GROUPS for path, _, _ in lines}
    further = [(path, None, "") for path in flat if path not in known]
    columns = [Column("", number=False), Column(""), Column("", number=False)]
    tables = []
    for heading, lines in (*GROUPS, ("Further figures", further)):
        rows = [
            [path.replace("_", " ").replace(".", ": "), _levels(flat[path], form), text]
            for path, form, text in lines if path in flat
        ]  # fmt: skip
        tables += [Table(heading, columns, rows)] if rows else []
    pictures = [Picture(caption, figure) for caption, figure in images.items()]
    headline = None if judgement is None else _headline(judgement, figures)
    return page(title, [*tables, *pictures, *([examples_table(examples)] if examples else [])], headline=headline)


def _levels(value, form: str | None) -> Cell:
    """The numbers of each level or depth; without a format the value as JSON."""
    if form is None:
        return Cell([json.dumps(value, ensure_ascii=False)])
    return Cell([shown(part, form) for part in (value if isinstance(value, (list, tuple)) else [value])])


def examples_table(examples: Sequence[Mapping]) -> Table:
    """Titles and their IDs, categories as they first come."""
    keys = ["docid", "other_docid"] if any(example.get("other_docid") for example in examples) else ["docid"]
    rows = []
    for category in dict.fromkeys(example["category"] for example in examples):
        group = [example for example in examples if example["category"] == category]
        ids = [_marked([example.get(key) or "" for example in group], other=key != "docid") for key in keys]
        rows += [[example["title"], category, *of_product] for example, *of_product in zip(group, *ids)]
    columns = [Column(heading, number=False) for heading in ("title", "category", "ID", "other ID")[: 2 + len(keys)]]
    caption = "Marked: the tokens that all IDs shown of the category begin with."
    return Table("Titles and their IDs", columns, rows, caption)


def _marked(docids: Sequence[str], *, other: bool) -> list[Marked]:
    """Each ID cut behind the tokens that all of them begin with; one ID alone shares nothing."""
    tokens, shared = [_TOKEN.findall(docid) for docid in docids], 0
    if len(docids) > 1:
        while all(len(row) > shared and row[shared] == tokens[0][shared] for row in tokens):
            shared += 1
    return [
        Marked("".join(row[:shared]), "".join(row[shared:]) if row else docid, other=other)
        for row, docid in zip(tokens, docids)
    ]
