"""The page at /docs: what the interface takes and gives, made from its OpenAPI description and loading nothing from elsewhere."""

from collections.abc import Iterator, Mapping
from html import escape

_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color-scheme:light dark}"
    "td,th{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0}"
    "h2{margin-top:2rem;font:600 1.05rem ui-monospace,monospace}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse;margin:.4rem 0}tr{border-top:1px solid #8885}"
)


def page(described: Mapping) -> str:
    """HTML of an OpenAPI description: each call with its fields, its answers and their statuses."""
    calls = [(verb.upper(), path, call) for path, verbs in described["paths"].items() for verb, call in verbs.items()]
    body = "".join(part for call in calls for part in _call(described, *call))
    title = escape(described["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1><p>Bodies are JSON. The same for programs: "
        f'<a href="openapi.json">openapi.json</a>. <a href=".">A page to try it</a>.</p>{body}</html>'
    )


def _call(described: Mapping, verb: str, path: str, call: Mapping) -> Iterator[str]:
    yield f"<h2>{verb} {escape(path)}</h2><p>{escape(call.get('description', call.get('summary', '')))}</p>"
    if "requestBody" in call:
        yield "<p>It takes:</p>" + _fields(described, call["requestBody"])
    yield "<p>It answers:</p>" + _fields(described, call["responses"]["200"])
    others = [(status, answer["description"]) for status, answer in call["responses"].items() if status != "200"]
    refusals = "".join(
        f"<tr><td><code>{status}</code></td><td>{escape(meaning)}</td></tr>" for status, meaning in others
    )
    yield f"<p>Or it refuses, with <code>error</code> saying why:</p><table>{refusals}</table>" if others else ""


def _fields(described: Mapping, content: Mapping) -> str:
    schema = content.get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" not in schema:
        return ""
    of = _named(described, schema)
    required, rows = of.get("required", []), []
    for name, field in of.get("properties", {}).items():
        about = field.get("description", "")
        if below := _below(described, field):
            about += (" " if about else "") + "Each with " + ", ".join(below.get("properties", {})) + "."
        needed = "" if name in required else " (may be left out)"
        rows.append(f"<tr><td><code>{escape(name)}</code></td><td>{escape(about)}{needed}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _below(described: Mapping, field: Mapping) -> Mapping | None:
    """The object that a list's entries are, where they are objects."""
    items = field.get("items", {})
    return _named(described, items) if "$ref" in items else None


def _named(described: Mapping, schema: Mapping) -> Mapping:
    return described["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
