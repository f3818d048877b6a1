"""Commands, requests, recipes and Python that the manual shows work, on a shop of 240 products; its links lead somewhere."""

import html
import importlib.util
import json
import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from catid2_ray.config import KINDS, Recipe, Section
from catid2_ray.on_ray.serve import app as serve_app
from catid2_ray.on_ray.serve.api import Product, RetrieveResponse
from tests.command import run_here
from tests.documents.blocks import DOCUMENTS, LANGUAGES, REASONS, ROOT, Block, blocks_of
from tests.documents.running import Reader
from tests.documents.shop import reduced, write_tables
from tests.in_process import without_ray


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a reader who has tables in shop/, has run quickstart (made small), and has its store."""
    folder = tmp_path_factory.mktemp("reader")
    write_tables(folder)
    (folder / "jobs" / "recipes").mkdir(parents=True)
    for path in (ROOT / "jobs" / "recipes").glob("*.yaml"):
        recipe = reduced(yaml.safe_load(path.read_text()))
        (folder / "jobs" / "recipes" / path.name).write_text(yaml.safe_dump(recipe))
    with without_ray(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run_here("reindex", "--recipe", "jobs/recipes/quickstart.yaml")
        assert done.returncode == 0, done.stderr[-2000:]
        yield folder


@pytest.fixture(scope="module")
def shop(quickstart):
    """The recipe that most pages go on from, and the release that it makes in a store of its own."""
    page = ROOT / "docs" / "your-data.md"
    written = next(block for block in blocks_of(page) if block.text.startswith("catid2 init"))
    with pytest.MonkeyPatch.context() as patch:
        Reader(quickstart, patch).follow(written)
        done = run_here("reindex", "--recipe", "shop.yaml")
        assert done.returncode == 0, done.stderr[-2000:]
    return quickstart


@pytest.fixture(scope="module")
def client():
    with TestClient(serve_app.api) as client:
        yield client


def _pages(documents: list[Path]):
    return pytest.mark.parametrize("path", documents, ids=lambda path: path.relative_to(ROOT).as_posix())


@_pages([path for path in DOCUMENTS if any(block.language != "text" for block in blocks_of(path))])
@pytest.mark.filterwarnings(
    "ignore:.*found in sys.modules:RuntimeWarning"
)  # a module that a page runs, and that is imported here
def test_what_a_page_shows_works(path, shop, client, tmp_path, monkeypatch):
    with Reader(shutil.copytree(shop, tmp_path / "reader"), monkeypatch, client) as reader:
        for block in blocks_of(path):
            try:
                reader.follow(block)
            except BaseException as error:
                error.add_note(f"at {block.place}")
                raise


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("catid2 serv", "has no command"),
        ("catid2 serve --prot 80", "No such option: --prot"),
        ("catid2 reindex --recipe jobs/recipes/quickstart.yaml --set seed=-1", "seed: "),
        ("python -m jobs.reindx --recipe shop.yaml", "there is no jobs.reindx"),
        ("python -m jobs.publish --recpe shop.yaml", "No such option: --recpe"),
        ("make quickstrt", "the Makefile has"),
        ("ray job sbmit -- true", "job has no command"),
        ("ray job submit -- catid2 serv", "has no command"),
        ("serve deploy serve_confg.yaml", "there is no serve_confg.yaml"),
        ("kubeclt get pods", "nothing is known of kubeclt"),
    ],
)
def test_a_command_that_is_not_run_may_not_be_wrong(command, message, tmp_path, monkeypatch):
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    shown = Block(ROOT / "docs" / "page.md", 1, "sh", "names only: a cluster", command)
    with Reader(tmp_path, monkeypatch) as reader, pytest.raises(Exception, match=re.escape(message)):
        reader.follow(shown)


def test_every_block_says_what_it_is():
    blocks = [block for path in DOCUMENTS for block in blocks_of(path)]
    assert [block.place for block in blocks if block.language not in LANGUAGES] == []
    marks = {block.mark.partition(": ")[0] for block in blocks}
    assert marks <= {"", "names only", "part of another file"}
    assert {block.reason for block in blocks} - {None} <= set(REASONS)


def _picture(svg: str) -> list[str]:
    """The lines that a picture of a terminal shows, its title first, with one space between any two words."""
    lines = {}
    for place, text in re.findall(r'<text[^>]* y="([^"]*)"[^>]*>(.*?)</text>', svg):
        lines.setdefault(place, []).append(html.unescape(text))
    return [line for parts in lines.values() if (line := " ".join(" ".join(parts).split()))]


def test_picture_and_json_of_the_readme_are_one_answer_and_what_a_search_shows(quickstart):
    shown = _picture(picture().FILE.read_text(encoding="utf-8"))
    readme = ROOT / "README.md"
    answer = next(json.loads(block.text) for block in blocks_of(readme) if block.language == "json")
    best, commands = answer["products"][0], [line for block in blocks_of(readme) for line in block.commands]
    assert shown[1].removeprefix("$ ") in commands
    assert shown[2] == f"“{picture().QUERY}” ({answer['release']})"
    row, rest = shown[5:7]
    assert row.startswith(f"{best['product_id']} {best['docid']} {best['logp']:.2f} {best['score']:.2f} ")
    assert f"{row} {rest}".endswith(best["title"])
    for said, model in ((answer, RetrieveResponse), (best, Product)):
        assert said.keys() == {name for name, field in model.model_fields.items() if field.is_required()}
    today = _picture(picture().draw(str(quickstart / "catid2_store")))
    assert [today[1], today[3]] == [shown[1], shown[3]]


def _anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = (
        re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    )
    return {re.sub(r"[-\s]+", "-", title) for title in headings}


@_pages(DOCUMENTS)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            there = path if not file else (path.parent / file).resolve()
            assert there.exists(), f"{path.name} links to {target}, which is not there"
            assert not anchor or anchor in _anchors(there), (
                f"{path.name} links to {target}, where no heading is called so"
            )


@cache
def _loaded(name: str):
    """A file of docs/, which is no module of a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hooks():
    return _loaded("hooks")


def test_the_site_has_every_file_that_a_page_leads_to():
    copied = hooks().copied()
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs")
        for target in re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            led = (place.parent / hooks()._led(target.partition("#")[0], place.as_posix())).as_posix()
            led = os.path.normpath(led)
            folder = target.endswith("/")  # GitHub lists it; the site does not
            assert folder or led in copied or (ROOT / "docs" / led).exists(), f"{place} leads to {target}"


def picture():
    return _loaded("picture")


def test_the_readme_s_table_is_what_the_committed_report_renders_to():
    results = _loaded("results")
    readme, report = (path.read_text(encoding="utf-8") for path in (results.README, results.REPORT))
    assert results.with_table(readme, json.loads(report)) == readme, "run python docs/results.py"


def test_a_row_of_the_readme_s_table_has_a_figure_and_whole_systems_stand_before_the_proxy():
    def row(recall: float, seeds: int) -> dict:
        cuts = dict.fromkeys(("10", "50", "100"), recall)
        return {"recall": cuts, "interval": {"50": [recall, recall - 0.1, 1.0]}, "seeds": list(range(seeds))}

    rows = {
        "bm25": row(0.25, 1),
        "tiger": row(0.9, 3),
        "dense": row(0.5, 1),
        "dpr": {"not_run": ["x"]},
        "ivf": row(0.6, 1),
    }
    lines = _loaded("results").table({"tables": {"T2": {"rows": rows}}}).splitlines()[2:]
    assert lines == [
        "| dense, the recipe's encoder, no adapter | .500 | .500 (.400 to 1.000) | .500 | 1 |",
        "| BM25, k1 1.2, b 0.75 | .250 | .250 (.150 to 1.000) | .250 | 1 |",
        "| TIGER (proxy) | .900 | .900 (.800 to 1.000) | .900 | 3 |",
    ]


def test_the_menu_names_every_page():
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted([*pages, *hooks().PAGES])


def test_the_references_name_every_setting_command_and_endpoint():
    recipe = hooks().recipe()
    for path, model in _sections(Recipe):
        part = recipe[recipe.index(f"## `{path}`" if path else "## The recipe itself") :].split("\n## ")[0]
        own = [
            name
            for name, field in model.model_fields.items()
            if field.json_schema_extra["unit"] not in ("section", "stages")
        ]
        assert [name for name in own if f"\n| `{name}` |" not in part] == [], path
    assert "| `k` | integer | `10` |" in hooks().http() and "## `POST /v1/retrieve`" in hooks().http()
    assert (
        "## `catid2 gc`" in hooks().commands()
        and "| `--keep` |" in hooks().commands()
        and "| `QUERY` |" in hooks().commands()
    )


def test_the_table_of_kinds_names_every_kind():
    text = (ROOT / "docs" / "ids.md").read_text()
    table = text[text.index("## The kinds") : text.index("## From codes to IDs")]
    assert [kind for kind in KINDS if f"`{kind}`" not in table] == []


def _sections(model, path=""):
    """(path, model) of a recipe and of all sections below it."""
    yield path, model
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _sections(kind, f"{path}.{name}" if path else name)
