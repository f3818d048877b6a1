"""What the interface takes and gives, read from its OpenAPI description: for the page at /docs, which loads nothing from elsewhere,
and for the manual."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color-scheme:light dark}"
    "td,th{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0}"
    "h2{margin-top:2rem;font:600 1.05rem ui-monospace,monospace}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse;margin:.4rem 0}tr{border-top:1px solid #8885}"
)


class Call(NamedTuple):
    """`takes`, `gives`: names of schemas, None for no body. `refusals`: (status, when)."""

    verb: str
    path: str
    about: str
    takes: str | None
    gives: str | None
    refusals: list[tuple[str, str]]


class Field(NamedTuple):
    """`type`: as text, in which a schema's name stands for it. `default`: None where the field must be given."""

    name: str
    type: str
    default: Any
    required: bool
    about: str


def calls(described: Mapping) -> Iterator[Call]:
    for path, verbs in described["paths"].items():
        for verb, call in verbs.items():
            refusals = [(status, one["description"]) for status, one in call["responses"].items() if status != "200"]
            takes, gives = _schema(call.get("requestBody", {})), _schema(call["responses"]["200"])
            yield Call(verb.upper(), path, call.get("description", ""), takes, gives, refusals)


def schemas(described: Mapping) -> dict[str, list[Field]]:
    """The fields of every body, by the name of its schema; FastAPI's own are left out."""
    return {
        name: [
            Field(field, _type(of), of.get("default"), field in schema.get("required", ()), of.get("description", ""))
            for field, of in schema["properties"].items()
        ]
        for name, schema in described["components"]["schemas"].items()
        if name not in ("HTTPValidationError", "ValidationError")
    }


def page(described: Mapping) -> str:
    """HTML: every call, then the fields of every body."""
    title, found = escape(described["info"]["title"]), schemas(described)
    parts = [f"<h1>{title}</h1><p>Bodies are JSON. The same for programs: <a href='openapi.json'>openapi.json</a>."]
    parts.append(" <a href='.'>A page to try it</a>.</p>")
    for call in calls(described):
        parts.append(f"<h2>{call.verb} {escape(call.path)}</h2><p>{escape(call.about)}</p>")
        takes = f"It takes {_link(call.takes, found)} and answers" if call.takes else "It answers"
        parts.append(f"<p>{takes} with {_link(call.gives, found)}.</p>")
        parts.append(_table((f"<code>{status}</code>", escape(when)) for status, when in call.refusals))
    for name, fields in found.items():
        parts.append(f"<h2 id='{name}'>{name}</h2>")
        rows = []
        for field in fields:
            default = (
                "" if field.required or field.default is None else f" ({escape(repr(field.default))} where left out)"
            )
            kind = " ".join(_link(word, found) for word in field.type.split())
            rows.append((f"<code>{escape(field.name)}</code>", kind, escape(field.about) + default))
        parts.append(_table(rows))
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{title}</title>"
    return f"<!doctype html><html lang='en'>{head}<style>{_STYLE}</style>{''.join(parts)}</html>"


def _table(rows) -> str:
    return f"<table>{''.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)}</table>"


def _link(word: str | None, found: Mapping) -> str:
    return f"<a href='#{word}'>{word}</a>" if word in found else escape(word or "a JSON object")


def _schema(content: Mapping) -> str | None:
    """The name of a body's schema; `a JSON object` for one without a name, None for no body."""
    schema = content.get("content", {}).get("application/json", {}).get("schema")
    return None if schema is None else _name(schema) if "$ref" in schema else "a JSON object"


def _name(schema: Mapping) -> str:
    return schema["$ref"].rsplit("/", 1)[1]


def _type(of: Mapping) -> str:
    if "$ref" in of:
        return _name(of)
    if "anyOf" in of:
        return " or ".join(_type(one) for one in of["anyOf"])
    if of.get("type") == "array":
        return f"list of {_type(of.get('items', {}))}"
    return of.get("type", "any")
