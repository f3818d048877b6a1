"""Who may import whom, file sizes and names: the layout of the project, kept by reading every source file.

The last test runs the stage rooms where Ray, DeepSpeed, pydantic and the S3 client cannot be imported at all, because a
source file cannot show what a library pulls in.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {"catalog", "quantizer", "identifiers", "generator", "retrieval"}
BASE = {"errors", "redaction", "docid", "hashing", "schedule", "scripts", "tables"}
BELOW_JOBS = BASE | STAGES | {"config", "artifacts", "evaluation", "on_ray"}
MAY_IMPORT = {
    "redaction": set(),
    "errors": {"redaction"},
    "schedule": set(),
    "scripts": set(),
    "hashing": set(),
    "tables": set(),
    "docid": {"errors"},
    "config": {"errors", "docid"},
    "artifacts": {"errors", "docid", "config", "tables"},
    **{stage: BASE for stage in STAGES},
    "retrieval": BASE | {"generator"},
    "evaluation": BASE | STAGES,
    "on_ray": BELOW_JOBS - {"on_ray"},
    "cli": BELOW_JOBS,
    "jobs": BELOW_JOBS | {"cli"},
}
# A library, and the places (rooms or files) that alone may import it.
ONLY_IN = {
    "ray": {"on_ray"},
    "deepspeed": {"on_ray"},
    "pydantic": {"config", "on_ray"},
    "yaml": {"config", "catid2_ray/on_ray/look/plan.py"},
    "fastapi": {"on_ray"},
    "structlog": {"catid2_ray/on_ray/serve/logs.py"},
    "typer": {"cli", "jobs"},
    "s3fs": {"catid2_ray/artifacts/patient_s3.py"},
    "fsspec": {"catid2_ray/artifacts/store.py", "catid2_ray/artifacts/patient_s3.py"},
    "boto3": set(),
    "botocore": set(),
    "ot": {"identifiers", "quantizer"},
    "bm25s": {"evaluation"},
    "matplotlib": {"evaluation"},
    "jinja2": {"evaluation"},
    "pytest": set(),
    "tests": set(),
}
# Inside the machine room: what each of its rooms may import of the others.
MACHINE = {
    "machine": set(),
    "job": {"machine"},
    "training": {"machine"},
    "stages": {"machine", "job", "training"},
    "pipeline": {"machine", "job", "stages"},
    "reports": {"machine", "job", "stages", "pipeline"},
    "commands": {"machine", "job", "stages", "pipeline"},
    "reproduce": {"machine", "job", "stages", "pipeline", "reports"},
    "look": {"machine", "job", "stages", "pipeline"},
    "serve": {"machine"},
    "serve_app": {"serve"},
}
SOURCES = sorted(str(path.relative_to(ROOT)) for room in ("catid2_ray", "jobs") for path in (ROOT / room).rglob("*.py"))


def room_of(path: str) -> str:
    top, *rest = Path(path).with_suffix("").parts
    return top if top == "jobs" or rest == ["__init__"] else rest[0]


def imported(source: str):
    """(line, dotted name) of every import, also inside functions and by `import_module("…")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(path: str, source: str) -> list[str]:
    room, found = room_of(path), []
    allowed = MAY_IMPORT.get(room, set()) | {room}
    for line, name in imported(source):
        top, *rest = name.split(".")
        if top == "":
            found.append(f"{path}:{line} imports {name} relatively; write the whole name")
        elif top == "catid2_ray":
            if rest and rest[0] not in allowed and rest[0] != "__version__":
                found.append(f"{path}:{line} {room} imports {rest[0]}; allowed: {', '.join(sorted(allowed))}")
            elif rest[:1] == ["on_ray"] and len(rest) > 1 and path.startswith("catid2_ray/on_ray/"):
                inner = Path(path).with_suffix("").parts[2]
                if rest[1] not in MACHINE[inner] | {inner}:
                    found.append(f"{path}:{line} on_ray.{inner} imports on_ray.{rest[1]}")
        elif top == "jobs":
            if room != "jobs":
                found.append(f"{path}:{line} {room} imports jobs")
        elif top in ONLY_IN and not {room, path} & ONLY_IN[top]:
            found.append(
                f"{path}:{line} imports {top}, which belongs in {', '.join(sorted(ONLY_IN[top])) or 'no source'}"
            )
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_imports_stay_inside_the_rules(path):
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path, source",
    [
        ("catid2_ray/quantizer/step.py", "import ray"),
        ("catid2_ray/quantizer/step.py", "def f():\n    import deepspeed.ops"),
        ("catid2_ray/generator/step.py", "from catid2_ray.quantizer.model import ResidualQuantizer"),
        ("catid2_ray/generator/step.py", "from catid2_ray.retrieval.trie import Trie"),
        ("catid2_ray/generator/step.py", "from catid2_ray import retrieval"),
        ("catid2_ray/catalog/products.py", "from catid2_ray.config import CatalogRecipe"),
        ("catid2_ray/catalog/products.py", "from catid2_ray.artifacts.store import Store"),
        ("catid2_ray/catalog/products.py", "from pydantic import BaseModel"),
        ("catid2_ray/catalog/text.py", "importlib.import_module('ray.data')"),
        ("catid2_ray/catalog/text.py", "from . import products"),
        ("catid2_ray/artifacts/release.py", "import s3fs"),
        ("catid2_ray/artifacts/release.py", "from catid2_ray.catalog.products import check_products"),
        ("catid2_ray/on_ray/stages/catalog.py", "import s3fs"),
        ("catid2_ray/on_ray/commands.py", "from catid2_ray.cli import app"),
        ("catid2_ray/on_ray/stages/assign/stage.py", "from ot.batch import solve_batch"),
        ("catid2_ray/on_ray/machine/live_log.py", "from catid2_ray.on_ray.job import Job"),
        ("catid2_ray/on_ray/training/loop.py", "from catid2_ray.on_ray.stages import embed"),
        ("catid2_ray/on_ray/stages/embed.py", "from catid2_ray.on_ray.pipeline import chain"),
        ("catid2_ray/on_ray/serve/app.py", "from catid2_ray.on_ray.stages.embed import model_identity"),
        ("catid2_ray/evaluation/report.py", "from catid2_ray.on_ray import progress"),
        ("catid2_ray/cli.py", "import ray"),
        ("catid2_ray/cli.py", "from jobs.reindex import run"),
        ("catid2_ray/errors.py", "from catid2_ray.docid import DocidSpace"),
        ("jobs/reindex.py", "import ray"),
        ("catid2_ray/newcomer/file.py", "from catid2_ray.errors import CatidError"),
    ],
)
def test_the_rules_catch(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("catid2_ray/retrieval/retriever.py", "from catid2_ray.generator.examples import tokenize"),
        ("catid2_ray/artifacts/patient_s3.py", "import s3fs"),
        ("catid2_ray/artifacts/manifest.py", "import catid2_ray"),
        ("catid2_ray/identifiers/collisions.py", "from ot.batch import solve_batch"),
        ("catid2_ray/on_ray/machine/parts.py", "import ray\nfrom catid2_ray.config import Recipe"),
        ("jobs/verb.py", "from catid2_ray.cli import guarded\nfrom jobs.verb import main"),
    ],
)
def test_the_rules_allow(path, source):
    assert violations(path, source) == []


def test_every_room_has_a_rule():
    rooms = {room_of(path) for path in SOURCES} - {"catid2_ray"}
    assert rooms == set(MAY_IMPORT), "a new room needs a line in MAY_IMPORT"


@pytest.mark.parametrize("path", SOURCES)
def test_files_are_short_documented_and_named_for_what_they_do(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(source)), "the first line says what the file is for"
    assert not {"utils", "util", "helpers", "helper", "common", "misc"} & set(Path(path).with_suffix("").parts)


@pytest.mark.parametrize("path", SOURCES)
def test_functions_are_short(path):
    """At most 60 lines beside the docstring."""
    long = {}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            if node.end_lineno - node.lineno + 1 - documented > 60:
                long[node.name] = node.end_lineno - node.lineno + 1
    assert long == {}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules of which each reaches every other by imports: those that remain when modules that import nothing, or
    that nothing imports, are taken away again and again."""
    graph = {name: set(targets) for name, targets in graph.items()}
    while leaves := {name for name in graph if not graph[name] & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    while roots := graph.keys() - set().union(*graph.values()):
        graph = {name: targets for name, targets in graph.items() if name not in roots}
    return [sorted(graph)] if graph else []


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module → the modules of `sources` (dotted name → text) that it imports, wherever the import stands."""
    graph = {}
    for module, source in sources.items():
        targets = set()
        for _, name in imported(source):
            name = name if name in sources else name.rpartition(".")[0]
            targets |= {name} & (sources.keys() - {module})
        graph[module] = targets
    return graph


def test_no_import_circles():
    names = {path: ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES}
    graph = import_graph({name: (ROOT / path).read_text(encoding="utf-8") for path, name in names.items()})
    assert circles(graph) == []


def test_circles_are_caught():
    sources = {"a": "from b import x", "b": "def f():\n    import c", "c": "from a import y", "d": "import a", "e": ""}
    assert circles(import_graph(sources)) == [["a", "b", "c"]]
    assert circles(import_graph(sources | {"c": ""})) == []


STAGES_ALONE = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "deepspeed", "pydantic", "s3fs"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for room in sys.argv[1:]:
    package = importlib.import_module(f"catid2_ray.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
"""


def test_the_stages_import_where_ray_and_pydantic_are_not_installed():
    rooms = [*sorted(STAGES), "evaluation"]
    done = subprocess.run([sys.executable, "-c", STAGES_ALONE, *rooms], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
