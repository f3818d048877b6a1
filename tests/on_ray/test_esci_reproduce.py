"""The ESCI recipes through `catid2 reproduce` on the sample, to the last column: the paper's figures, ours, Δ and a verdict."""

import json

import pytest

from catid2_ray.on_ray.stages.prepare_esci import prepare_esci
from tests.command import ROOT, run_here
from tests.esci_sample import write_sample
from tests.on_ray.test_esci_recipes import SMALL

METHODS = "reproduce.methods=[bm25,bm25_blanks,bm25_tuned,dense,mpnet,dsi_semantic,tiger,cat_id2_256,served]"
PAPER = {"us": (5.68, 4.93, "386,392"), "es": (5.19, 9.45, "131,935"), "jp": (3.23, 7.64, "152,845")}


@pytest.mark.slow
@pytest.mark.parametrize("locale", PAPER)
def test_a_recipe_stands_beside_the_paper(locale, no_ray, tmp_path):
    sample = write_sample(tmp_path / "source", products=72)
    done = prepare_esci(
        str(sample.folder), str(sample.categories), str(tmp_path / "data"), locale=locale, validation=0.25
    )
    overrides = [f"catalog.root={done.root}", f"store={tmp_path / 'store'}", METHODS, *SMALL, "generator.model=small"]
    settings = [word for one in overrides for word in ("--set", one)]
    recipe = ROOT / "jobs" / "recipes" / f"esci_{locale}.yaml"
    run = run_here(
        "reproduce", "--recipe", recipe, *settings, "--tables", "1,2,7", "--seeds", "1", "--out", tmp_path / "out"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    page, report = (
        (tmp_path / "out" / "report.md").read_text(),
        json.loads((tmp_path / "out" / "report.json").read_text()),
    )
    bm25, tiger, documents = PAPER[locale]
    rows = {tuple(line.split(" | ")[:3]): line for line in page.splitlines() if "| @10 |" in line}
    assert rows["| BM25, k1 1.2, b 0.75", "@10", f"{bm25:.2f}"].rstrip(" |").endswith(("[OK]", "[OKish]", "[FAIL]"))
    assert rows["| TIGER", "@10", f"{tiger:.2f}"].rstrip(" |").endswith(("[OK]", "[OKish]", "[FAIL]"))
    assert "[not run: " in rows["| Multilingual MPNet as it is", "@10", f"{report_of('mpnet', locale):.2f}"]
    assert documents in page and f"T2/tiger/{locale}" in page
    found = {name: row["recall"]["50"] for name, row in report["tables"]["T2"]["rows"].items() if "recall" in row}
    assert set(found) >= {"bm25", "bm25_blanks", "dense", "dsi_semantic", "tiger"}
    assert found["bm25"] > 0.5
    if locale == "jp":
        assert found["bm25_blanks"] < found["bm25"], (
            "between blanks a run of Japanese is one word, and only its like is found"
        )


def report_of(method: str, locale: str) -> float:
    published = json.loads((ROOT / "catid2_ray" / "evaluation" / "reproduce" / "published.json").read_text())
    return published["2"][locale][method][1]
