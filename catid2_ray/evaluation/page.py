"""Reports as one HTML file: a verdict, tables, pictures inside it as PNG, text; there is no script and nothing to fetch.

Every text from outside is escaped by the template.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from jinja2 import DictLoader, Environment, StrictUndefined
from matplotlib.figure import Figure

from catid2_ray.evaluation.tables import Table

PICTURE_DPI = 144  # 1.5 × the page's width, sharp on a phone and in print


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PICTURE_DPI)
    return buffer.getvalue()


class Picture(NamedTuple):
    """`caption`: its heading, or none; `says`: for those who cannot see it."""

    caption: str
    figure: Figure
    says: str = ""

    @property
    def address(self) -> str:
        """The `data:` address of a PNG."""
        return "data:image/png;base64," + base64.b64encode(png(self.figure)).decode()


class Marked(NamedTuple):
    """A cell of a table: an ID whose beginning is marked. `other`: in the second colour."""

    beginning: str
    rest: str
    other: bool = False


class Link(NamedTuple):
    """A cell of a table, or one of several: a text and where it leads; "" = nowhere."""

    text: str
    address: str = ""


class Prose(NamedTuple):
    """Paragraphs under a heading, and below them what words mean."""

    heading: str
    paragraphs: Sequence[str]
    terms: Mapping[str, str]


class Headline(NamedTuple):
    """What the page found, in one sentence; a sign stands before it, so that colour is not all that tells states apart."""

    state: Literal["good", "look", "bad"]
    sentence: str

    @property
    def sign(self) -> str:
        return {"good": "✓", "look": "!", "bad": "✗"}[self.state]


def page(
    title: str,
    parts: Sequence[Table | Picture | Prose],
    *,
    about: Mapping[str, str] | None = None,
    headline: Headline | None = None,
) -> str:
    """The headline, then the parts below each other. `about`: what was run, name → text."""
    return _TEMPLATES.get_template("page").render(title=title, about=about or {}, parts=parts, headline=headline)


_PAGE = """{% macro link_to(cell) %}{% if cell.address %}<a href="{{ cell.address }}">{{ cell.text }}</a>{% else %}{{ cell.text }}
{% endif %}{% endmacro %}
{% macro cell_of(cell) %}{% if cell is string %}{{ cell }}{% elif cell.address is defined %}{{ link_to(cell) }}
{% elif cell.places is not defined and cell.beginning is not defined %}{% for one in cell %}{{ link_to(one) }}<br>{% endfor %}
{% elif cell.beginning is defined %}
<code><mark{% if cell.other %} class="other"{% endif %}>{{ cell.beginning }}</mark>{{ cell.rest }}</code>{% else %}
{% for text, reach, best in cell.places %}<span>{% if best %}<b>{{ text }}</b>{% else %}{{ text }}{% endif %}
{% if reach %}<br><small>± {{ reach }}</small>{% endif %}</span>{% else %}–{% endfor %}
{% if cell.remark %} <small class="warn">{{ cell.remark }}</small>{% endif %}{% endif %}{% endmacro %}
{% macro table_of(table) %}<div class="scroll"><table>
{% if table.columns | selectattr("heading") | list %}<thead><tr>
{% for column in table.columns %}<th{% if column.number %} class="n"{% endif %} title="{{ column.reading }}">
{{ column.heading }}</th>{% endfor %}</tr></thead>{% endif %}<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}{% set column = table.columns[loop.index0] %}
{% if loop.first %}<th>{{ cell_of(cell) }}</th>
{% else %}<td class="{{ "n" if column.number else "" if column.heading else "quiet" }}">{{ cell_of(cell) }}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if table.caption %}<p class="quiet">{{ table.caption }}</p>{% endif %}{% endmacro %}
{% macro terms_of(terms) %}{% if terms %}<dl>{% for name, text in terms.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>{% endif %}{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.2 } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem }
p, dl { max-width: 44rem } dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem } dd { margin: 0 }
dt, .quiet, figcaption { color: #595959 } .quiet { overflow-wrap: anywhere } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #ddd }
thead th { border-bottom: 2px solid #888; white-space: nowrap } .n { text-align: right; white-space: nowrap }
.scroll th:first-child { position: sticky; left: 0; background: #fff }
.n span { display: inline-block; margin-left: .5em } small { color: #595959 } img { max-width: 100%; height: auto }
figure { margin: 1rem 0; break-inside: avoid } code { font-size: .8125rem; white-space: nowrap }
mark { background: #cfe3f3; color: inherit } mark.other { background: #fbe3b5 } .warn { color: #8a3200 }
.verdict { font-size: 1.125rem; padding: .5rem .8rem; border-left: .4rem solid; background: #f6f6f6; max-width: 44rem }
.verdict.good { border-color: #009e73 } .verdict.look { border-color: #e69f00 } .verdict.bad { border-color: #d55e00 }
@media screen and (max-width: 40rem) { figure { overflow-x: auto } img { max-width: none; width: 44rem } dl { display: block }
dd { margin-bottom: .4rem } }
@media print { body { max-width: none; font-size: 11px } .scroll { overflow: visible } tr { break-inside: avoid }
h2 { break-after: avoid } .verdict, mark { print-color-adjust: exact } }
</style></head><body><h1>{{ title }}</h1>
{% if headline %}<p class="verdict {{ headline.state }}"><b>{{ headline.sign }}</b> {{ headline.sentence }}</p>{% endif %}

{{ terms_of(about) }}
{% for part in parts %}
{% if part.rows is defined %}{% if part.title %}<h2>{{ part.title }}</h2>{% endif %}{{ table_of(part) }}
{% elif part.figure is defined %}{% if part.caption %}<h2>{{ part.caption }}</h2>{% endif %}
<figure><img alt="{{ part.says or part.caption }}" src="{{ part.address }}"></figure>
{% else %}<h2>{{ part.heading }}</h2>
{% for text in part.paragraphs %}<p>{{ text }}</p>{% endfor %}{{ terms_of(part.terms) }}
{% endif %}
{% endfor %}</body></html>
"""
_TEMPLATES = Environment(
    loader=DictLoader({"page": _PAGE}), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
