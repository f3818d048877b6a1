"""What the manual takes from the code while it is built, so that it cannot be stale: the references, and pages of the repository.

A page that holds `<!-- generated: recipe -->` (or commands, http) gets there what catid2_ray says of itself. The pages of the
repository's root and of benchmarks/results are copied into the site, and links to them led there; in the repository the same links
lead to the files.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")


def on_files(files, config):
    """mkdocs calls it with the pages that it found; adds those of the repository."""
    from mkdocs.structure.files import File, InclusionLevel

    for name, path in copied().items():
        level = InclusionLevel.INCLUDED if name in PAGES else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=level))
    return files


def copied() -> dict[str, Path]:
    """What the site has beside the pages of docs/, by its name there."""
    results = ROOT / "benchmarks" / "results"
    figures = sorted(path for path in results.rglob("*") if path.suffix in (".md", ".png", ".json"))
    return (
        {name: ROOT / name for name in PAGES}
        | {f"results/{path.relative_to(results).as_posix()}": path for path in figures}
        | {path.relative_to(ROOT).as_posix(): path for path in sorted(_linked())}
    )


def _linked() -> set[Path]:
    """The files of the repository, no pages, that a page of the manual leads to: recipes, dashboards."""
    found = set()
    for page in (ROOT / "docs").rglob("*.md"):
        for target in _LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target.partition("#")[0]).resolve()
            outside = path.is_relative_to(ROOT) and not any(
                path.is_relative_to(ROOT / below) for below in ("docs", "benchmarks/results")
            )
            if outside and path.is_file() and path.suffix != ".md":
                found.add(path)
    return found


def on_page_markdown(markdown: str, page, config, files) -> str:
    """mkdocs calls it with the text of each page."""
    place = page.file.src_uri
    if not place.startswith("results/"):
        markdown = _LINK.sub(lambda link: f"]({_led(link[1], place)})", markdown)
    return _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def _led(target: str, place: str) -> str:
    """Where a link of a page leads in the site: what lies outside docs/ in the repository is copied into it."""
    depth = place.count("/")
    outside = "../" * (depth + 1)
    if place not in PAGES and not target.startswith(outside):
        return target
    target = target.removeprefix(outside).removeprefix("docs/")
    return "../" * depth + target.replace("benchmarks/results/", "results/")


def recipe() -> str:
    """Every setting of a recipe, one table a section, in the order of the schema."""
    from catid2_ray.config import Recipe

    schema = Recipe.model_json_schema()
    return "\n".join(_sections(schema, schema, ""))


def _sections(schema: Mapping, section: Mapping, path: str) -> Iterator[str]:
    """The table of a section's own settings, then its sections."""
    own, below = {}, {}
    for name, field in section["properties"].items():
        (below if _section_of(schema, field) else own)[name] = field
    title = f"`{path}`" if path else "The recipe itself"
    yield f"## {title}\n\n{_plain(section.get('description', ''))}\n"
    yield "| setting | default | values | what it is | source |\n|---|---|---|---|---|"
    for name, field in own.items():
        yield _row(schema, f"{path}.{name}" if path else name, field, required=name in section.get("required", ()))
    yield ""
    for name, field in below.items():
        yield from _sections(schema, _section_of(schema, field), f"{path}.{name}" if path else name)


def _section_of(schema: Mapping, field: Mapping) -> Mapping | None:
    """The model that a field holds, if it holds one; a list of models (`generator.stages`) is a section of its own, too."""
    for one in (field, field.get("items", {}), *field.get("anyOf", ())):
        if "$ref" in one and "properties" in (model := schema["$defs"][one["$ref"].rsplit("/", 1)[1]]):
            return model
    return None


def _row(schema: Mapping, path: str, field: Mapping, *, required: bool) -> str:
    default = "required" if required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`"
    source = "operational" if field.get("operational") else field.get("paper", "")
    values = ", ".join(text for text in (_values(schema, field), field["unit"]) if text)
    return f"| `{path.rsplit('.', 1)[-1]}` | {default} | {values} | {_plain(field.get('description', ''))} | {_plain(source)} |"


def _values(schema: Mapping, field: Mapping) -> str:
    """What a field may hold, as a person reads it: choices, or bounds, or those of its items."""
    if "$ref" in field:
        return _values(schema, schema["$defs"][field["$ref"].rsplit("/", 1)[1]])
    if "anyOf" in field:
        return " or ".join(filter(None, (_values(schema, one) for one in field["anyOf"])))
    if "enum" in field:
        return " · ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in field["enum"])
    if field.get("type") == "null":
        return "none"
    if field.get("type") == "array" and "items" in field:
        inner = _values(schema, field["items"])
        return f"list of {inner}" if inner else "list"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), Mapping):
        inner = _values(schema, field["additionalProperties"])
        return f"mapping to {inner}" if inner else "mapping"
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    return ", ".join(f"{sign} {field[key]:,}" for key, sign in bounds if key in field)


def _plain(text: str) -> str:
    """Text for a cell of a table: no bar ends it, and <a_1> is no HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def commands() -> str:
    """Every command of `catid2` with its arguments and options, as `--help` has them."""
    import typer

    from catid2_ray.cli import app

    lines = []
    for name, command in typer.main.get_command(app).commands.items():
        lines += [f"## `catid2 {name}`\n", f"{_plain(command.help)}\n"]
        lines.append("| argument or option | what it is | default |\n|---|---|---|")
        for option in command.params:
            flags = ", ".join(f"`{flag if flag.startswith('-') else flag.upper()}`" for flag in option.opts)
            shown = "" if option.default in (None, False) or callable(option.default) else f"`{option.default}`"
            default = "required" if option.required else shown
            lines.append(f"| {flags} | {_plain(option.help or '')} | {default} |")
        lines.append("")
    return "\n".join(lines)


def http() -> str:
    """Every endpoint with what it takes and gives, from the application's own OpenAPI."""
    from catid2_ray.on_ray.serve import reference
    from catid2_ray.on_ray.serve.app import api

    found, lines = reference.schemas(api.openapi()), []

    def linked(words: str) -> str:
        return " ".join(f"[{word}](#{word.lower()})" if word in found else word for word in words.split())

    for call in reference.calls(api.openapi()):
        lines.append(f"## `{call.verb} {call.path}`\n\n{call.about}\n")
        lines += [
            f"{what} {linked(name)}.\n"
            for what, name in (("It takes", call.takes), ("It answers with", call.gives))
            if name
        ]
    for name, fields in found.items():
        lines.append(f"## {name}\n\n| field | type | default | what it is |\n|---|---|---|---|")
        for field in fields:
            default = "required" if field.required else f"`{json.dumps(field.default)}`"
            lines.append(f"| `{field.name}` | {linked(field.type)} | {default} | {_plain(field.about)} |")
        lines.append("")
    return "\n".join(lines)


GENERATED = {"recipe": recipe, "commands": commands, "http": http}
