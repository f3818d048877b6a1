"""The pages and tables of `compare-ids` and of the ID quality report: HTML, a terminal's table, Markdown.

A page is one file: pictures are inside it as PNG, there is no script and nothing to fetch. Every text from outside is
escaped by the template. Several seeds of a kind become a mean and ± half their range.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence

from jinja2 import DictLoader, Environment, StrictUndefined
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from catid2_ray.evaluation.figures import comparison
from catid2_ray.evaluation.report import Cell, summarise, used_columns

PICTURE_DPI = 144  # 1.5 × the page's width, sharp on a phone and in print
_TOKEN = re.compile(r"<[^<>]*>")
HOW_TO_READ = (
    "Collisions are counted in two ways. The collision rate is (N − distinct IDs) / N: how many products would need "
    "another ID. The shared rate is the share of products that do not have an ID for themselves: two products in one ID "
    "are one collision, but two sharing. Equal embeddings set a floor under both, for every method that sees nothing else.",
    "Purity rises by itself when prefixes are many and small: a prefix of one product is always pure. So compare it "
    "only between kinds with as many prefixes, and beside the purity of permuted categories in a kind's own report.",
    "AMI, the adjusted mutual information, takes that away: about 0 is what permuted categories give (the null), 1 is "
    "the same partition. It falls, too, when a prefix splits a category into many codes, so 1 is not the goal.",
    "Each figure is the mean over the seeds; ± is half the range between them, not a standard error. Differences "
    "smaller than that are no differences. The best mean of a column is bold; best is no judgement of the whole.",
)


def compare_table(rows: Sequence[Mapping]) -> Table:
    """The means for a terminal of 100 columns: lists in one line, under it the largest ± of their places.

    The cell of AMI holds its null, the largest in size; perplexity is left to the page.
    """
    summaries = summarise(rows)
    columns = [column for column in used_columns(summaries) if column.key not in ("perplexity", "ami_null")]
    caption = "mean over seeds, ± half their range (of a list: the widest), null: AMI with permuted categories"
    table = Table(box=SIMPLE_HEAD, caption=caption, padding=0)
    table.add_column("kind", overflow="fold", min_width=18)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for summary in summaries:
        line = [Text("\n".join([summary["kind"], *(f"({verdict})" for verdict in summary["verdicts"])]))]
        for column in columns:
            cell = summary["cells"][column.key]
            null = summary["cells"]["ami_null"].mean if column.key == "ami" else ()
            line.append(Text(_compact(cell, null), style="bold" if cell.best and all(cell.best) else ""))
        table.add_row(*line)
    return table


def _compact(cell: Cell, null: Sequence[str] = ()) -> str:
    """`.51 .48 .44`, and on a second line the widest ± that is not 0 and the widest null; no leading zeros."""

    def size(text):
        return abs(float(text.strip("%–").replace(",", "") or 0))

    widest = max(cell.half_range, key=size, default="")
    under = [f"±{widest}"] if widest and size(widest) else []
    under += [f"null {max(null, key=size)}"] if null else []
    text = " ".join(cell.mean) + ("\n" + " ".join(under) if under else "")
    return re.sub(r"(?<![\d,.])0\.(?=\d+(?!\d*%))", ".", text) or "–"


def compare_markdown(rows: Sequence[Mapping]) -> str:
    """The means as a Markdown table, a list's places on lines of their own, the best in bold; ends in a newline."""
    summaries = summarise(rows)
    columns = used_columns(summaries)
    lines = [["kind", "seeds", *(column.heading for column in columns)], ["---"] + ["---:"] * (len(columns) + 1)]
    for summary in summaries:
        kind = " ".join([summary["kind"], *(f"({verdict})" for verdict in summary["verdicts"])])
        cells = [_markdown_cell(summary["cells"][column.key]) for column in columns]
        lines.append([html.escape(kind).replace("|", "\\|"), str(summary["seeds"]), *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"- {column.heading}: {column.reading}" for column in columns)
    return f"{table}\n\nMean over seeds ± half their range; the best of a column is bold.\n\n{notes}\n"


def _markdown_cell(cell: Cell) -> str:
    parts = (
        (f"**{mean}**" if best else mean) + (f" ±{reach}" if reach else "")
        for mean, reach, best in zip(cell.mean, cell.half_range, cell.best)
    )
    return "<br>".join(parts) or "–"


def compare_page(rows: Sequence[Mapping], *, title: str, about: Mapping[str, str]) -> str:
    """The HTML page of compare-ids: table, picture, how to read, every run. `about`: what was run, name → text."""
    summaries = summarise(rows)
    columns = used_columns(summaries)
    details = [[_plain_cell(row.get(column.key), column.form) for column in columns] for row in rows]
    return _TEMPLATES.get_template("compare").render(
        title=title, about=about, columns=columns, summaries=summaries, how_to_read=HOW_TO_READ,
        picture=picture(comparison(rows)) if rows else "", runs=list(zip(rows, details)),
    )  # fmt: skip


def _plain_cell(value, form) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_plain_cell(part, form) for part in value) or "–"
    return "–" if value is None else format(value, form)


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


def ids_page(figures: Mapping, images: Mapping[str, Figure], examples: Sequence[Mapping], *, title: str) -> str:
    """The ID quality report (the paper's Figures 3, 4, 6 and Table 8) as one HTML page.

    `figures`: `id_quality`, and optionally under `floor`, `hourglass`, `prefix_agreement`, `neighbour_agreement`,
    `reconstruction`, `displacement` what the functions of `identifiers.quality` return; what the report has no line
    for stands at its end. `images`: caption → Figure. `examples`: dicts `title`, `category`, `docid` and optionally
    `other_docid`, shown by category; what all IDs of a category begin with is marked.
    """
    flat = {
        f"{key}.{inner}" if inner else key: found
        for key, value in figures.items()
        for inner, found in (value.items() if isinstance(value, Mapping) else [("", value)])
    }
    groups = [
        (heading, [(path, _cells(flat[path], form), text) for path, form, text in lines if path in flat])
        for heading, lines in GROUPS
    ]
    known = {path for _, lines in GROUPS for path, _, _ in lines}
    rest = [(path, [json.dumps(value, ensure_ascii=False)], "") for path, value in flat.items() if path not in known]
    groups = [(heading, lines) for heading, lines in [*groups, ("Further figures", rest)] if lines]
    return _TEMPLATES.get_template("ids").render(
        title=title, groups=groups, pictures=[(caption, picture(figure)) for caption, figure in images.items()],
        examples=_side_by_side(examples), other=any(example.get("other_docid") for example in examples),
    )  # fmt: skip


def plain_page(title: str, groups: Sequence[tuple], images: Mapping[str, Figure]) -> str:
    """An HTML page of tables, (heading, rows of (name, cells, one line of explanation)), and pictures by caption."""
    return _TEMPLATES.get_template("ids").render(
        title=title, groups=groups, pictures=[(caption, picture(figure)) for caption, figure in images.items()],
        examples=[], other=False,
    )  # fmt: skip


def _cells(value, form) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return ["–" if part is None else format(part, form) for part in values] or ["–"]


def _side_by_side(examples) -> list[tuple]:
    """(category, rows of (title, (shared, rest) of the ID, the same of the other ID)), categories as they first come."""
    found = []
    for category in dict.fromkeys(example["category"] for example in examples):
        group = [example for example in examples if example["category"] == category]
        split = [_split_prefix([example.get(key) or "" for example in group]) for key in ("docid", "other_docid")]
        found.append((category, list(zip([example["title"] for example in group], *split))))
    return found


def _split_prefix(docids: Sequence[str]) -> list[tuple[str, str]]:
    """Each ID cut behind the tokens that all of them begin with; one ID alone shares nothing."""
    tokens, shared = [_TOKEN.findall(docid) for docid in docids], 0
    if len(docids) > 1:
        while all(len(row) > shared and row[shared] == tokens[0][shared] for row in tokens):
            shared += 1
    return [("".join(row[:shared]), "".join(row[shared:]) if row else docid) for row, docid in zip(tokens, docids)]


def picture(figure: Figure) -> str:
    """A Figure as the `data:` address of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PICTURE_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem }
p, dl { max-width: 44rem } dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem } dd { margin: 0 }
dt, .quiet, figcaption { color: #595959 } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #ddd }
thead th { border-bottom: 2px solid #888; white-space: nowrap } .n { text-align: right; white-space: nowrap }
.scroll th:first-child { position: sticky; left: 0; background: #fff }
.n span { display: inline-block; margin-left: .5em } small { color: #595959 } img { max-width: 100%; height: auto }
figure { margin: 1rem 0; break-inside: avoid } code { font-size: .8125rem; white-space: nowrap }
mark { background: #cfe3f3; color: inherit } mark.other { background: #fbe3b5 } .warn { color: #8a3200 }
@media print { body { max-width: none; font-size: 11px } .scroll { overflow: visible } tr { break-inside: avoid } }
</style></head><body><h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""
_COMPARE_BODY = """{% extends "page" %}{% block body %}
{% if about %}<dl>{% for name, text in about.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>{% endif %}
<div class="scroll"><table><thead><tr><th>kind</th><th class="n">seeds</th>
{% for column in columns %}<th class="n" title="{{ column.reading }}">{{ column.heading }}</th>{% endfor %}</tr></thead><tbody>
{% for row in summaries %}
<tr><th>{{ row.kind }}{% for verdict in row.verdicts %} <small class="warn">{{ verdict }}</small>{% endfor %}</th>
<td class="n">{{ row.seeds }}</td>
{% for column in columns %}{% set cell = row.cells[column.key] %}
<td class="n">{% for mean in cell.mean %}<span>{% if cell.best[loop.index0] %}<b>{{ mean }}</b>{% else %}{{ mean }}{% endif %}
{% if cell.half_range[loop.index0] %}<br><small>± {{ cell.half_range[loop.index0] }}</small>{% endif %}</span>
{% else %}–{% endfor %}</td>
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if picture %}<figure><img alt="AMI, collision rate and codes used, by kind" src="{{ picture }}"></figure>{% endif %}
<h2>How to read this</h2>{% for text in how_to_read %}<p>{{ text }}</p>{% endfor %}
<dl>{% for column in columns %}<dt>{{ column.heading }}</dt><dd>{{ column.reading }}</dd>{% endfor %}</dl>
<h2>Every run</h2><div class="scroll"><table><thead><tr><th>kind</th><th class="n">seed</th><th>verdict</th>
{% for column in columns %}<th class="n">{{ column.heading }}</th>{% endfor %}</tr></thead><tbody>
{% for run, cells in runs %}
<tr><td>{{ run.kind }}</td><td class="n">{{ run.get('seed', '–') }}</td><td>{{ run.get('verdict') or "–" }}</td>
{% for cell in cells %}<td class="n">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endblock %}"""
_IDS_BODY = """{% extends "page" %}{% block body %}
{% for heading, lines in groups %}<h2>{{ heading }}</h2><div class="scroll"><table><tbody>
{% for name, cells, text in lines %}<tr><th>{{ name | replace("_", " ") | replace(".", ": ") }}</th>
<td class="n">{% for cell in cells %}<span>{{ cell }}</span>{% endfor %}</td><td class="quiet">{{ text }}</td></tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% for caption, address in pictures %}<h2>{{ caption }}</h2><figure><img alt="{{ caption }}" src="{{ address }}"></figure>
{% endfor %}
{% if examples %}<h2>Titles and their IDs</h2>
<p class="quiet">Marked: the tokens that all IDs shown of the category begin with.</p>
<div class="scroll"><table><thead><tr><th>title</th><th>ID</th>{% if other %}<th>other ID</th>{% endif %}</tr></thead>
{% for category, rows in examples %}<tbody><tr><th colspan="{{ 3 if other else 2 }}">{{ category }}</th></tr>
{% for name, id, rival in rows %}<tr><td>{{ name }}</td><td><code><mark>{{ id[0] }}</mark>{{ id[1] }}</code></td>
{% if other %}<td><code><mark class="other">{{ rival[0] }}</mark>{{ rival[1] }}</code></td>{% endif %}</tr>
{% endfor %}</tbody>{% endfor %}</table></div>{% endif %}{% endblock %}"""
_TEMPLATES = Environment(
    loader=DictLoader({"page": _PAGE, "compare": _COMPARE_BODY, "ids": _IDS_BODY}),
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
