"""The ESCI recipes through `catid2 reproduce` on the sample, to the last column: the paper's figures, ours, Δ and a verdict."""

import json

import pytest

from catid2_ray.evaluation.reproduce.conditions import ALSO, TABLES, USUAL, plan
from catid2_ray.evaluation.reproduce.texts import TITLES
from catid2_ray.on_ray.reproduce.report import published
from catid2_ray.on_ray.stages.prepare_esci import prepare_esci
from tests.command import ROOT, run_here
from tests.esci_sample import write_sample
from tests.on_ray.test_esci_recipes import SMALL

METHODS = [
    "bm25", "bm25_blanks", "bm25_tuned", "dense", "mpnet", "dsi_semantic", "tiger", "paper_tiger", "cat_id2_256", "served",
]  # fmt: skip
PAPER = {"us": (5.68, 2.09, 4.93, "386,392"), "es": (5.19, 7.93, 9.45, "131,935"), "jp": (3.23, 5.52, 7.64, "152,845")}
# Tables 3 to 6 have 256 codes a level, as the paper's, which takes as many products.
LEAST = ["quantizer.epochs=1", "reproduce.printed_epochs=1", "quantizer.kmeans_sample=300", "quantizer.batch=256"]
VERDICTS = ("[OK]", "[OKish]", "[FAIL]")


def reproduced(folder, locale: str, tables: str, *overrides: str, **sizes: int) -> tuple[str, dict]:
    """report.md and report.json of these tables for a locale of the sample. `sizes`: of `write_sample`."""
    sample = write_sample(folder / "source", **{"products": 72, **sizes})
    done = prepare_esci(
        str(sample.folder), str(sample.categories), str(folder / "data"), locale=locale, validation=0.25
    )
    changes = [f"catalog.root={done.root}", f"store={folder / 'store'}", *SMALL, "generator.model=small", *overrides]
    settings = [word for one in changes for word in ("--set", one)]
    recipe = ROOT / "jobs" / "recipes" / f"esci_{locale}.yaml"
    run = run_here(
        "reproduce", "--recipe", recipe, *settings, "--tables", tables, "--seeds", "1", "--out", folder / "out"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return (folder / "out" / "report.md").read_text(), json.loads((folder / "out" / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("locale", PAPER)
def test_a_recipe_stands_beside_the_paper(locale, no_ray, tmp_path):
    page, report = reproduced(tmp_path, locale, "1,2,7", f"reproduce.methods=[{','.join(METHODS)}]")
    bm25, semantic, tiger, documents = PAPER[locale]
    rows = {tuple(line.split(" | ")[:3]): line for line in page.splitlines() if "| @10 |" in line}
    assert rows["| BM25, k1 1.2, b 0.75", "@10", f"{bm25:.2f}"].rstrip(" |").endswith(VERDICTS)
    assert rows["| DSI semantic (proxy)", "@10", f"{semantic:.2f}"].rstrip(" |").endswith(VERDICTS)
    mpnet = published()["2"][locale]["mpnet"][1]
    for title, figure in (("TIGER, as printed, K 256 (proxy)", tiger), ("Multilingual MPNet as it is", mpnet)):
        assert "[not run: " in rows[f"| {title}", "@10", f"{figure:.2f}"]
    assert documents in page and f"T2/tiger/{locale}" in page
    found = {name: row["recall"]["50"] for name, row in report["tables"]["T2"]["rows"].items() if "recall" in row}
    assert set(found) >= {"bm25", "bm25_blanks", "dense", "dsi_semantic", "tiger"}
    assert found["bm25"] > 0.5
    if locale == "jp":
        assert found["bm25_blanks"] < found["bm25"], (
            "between blanks a run of Japanese is one word, and only its like is found"
        )


@pytest.mark.slow
@pytest.mark.timeout(1500)  # 85 seconds of one core that it has for itself
def test_every_table_of_one_locale(no_ray, tmp_path):
    """All cells with the least budgets that the recipe can be given: a figure or a reason each, no fault, the paper's beside."""
    page, report = reproduced(tmp_path, "us", ",".join([*TABLES, *ALSO]), *LEAST, products=360, queries=140)
    cells = plan([*TABLES, *ALSO], USUAL, "us", text=("title", "category_path", "description"))
    tables = {name: table for name, table in report["tables"].items() if "rows" in table}
    rows = {row["cell"]: row for table in tables.values() for row in table["rows"].values()}
    assert report["tables"].keys() >= {"1", "7", "8"} and list(rows) == [cell.name for cell in cells]
    without = {name: row["not_run"] for name, row in rows.items() if "recall" not in row}
    assert report["not_run"] == without and all(len(whys) == 1 and whys[0] for whys in without.values())
    assert "it failed with" not in page and "it failed with" not in json.dumps(report)
    # The sample's 300 products fill 256 codes, not 512; neither an encoder nor a release nor a column of confidence is there.
    assert {name.split("/")[0] for name in without} == {"T2", "F5", "CT"}
    assert all("_k512/" in name for name in without if name.startswith("F5"))
    blocks = {block.splitlines()[0]: block for block in page.split("\n## ")}
    assert blocks.keys() >= {*TITLES.values()} and "386,392" in blocks[TITLES["1"]]
    for number in ("2", "3", "4", "5", "6"):
        printed = published()[number]["us"]
        papers = [cell.row.paper for cell in cells if cell.table == f"T{number}"]
        assert printed.keys() <= {*papers}, "each row of the paper's has one of ours"
        beside = blocks[TITLES[f"T{number}"]].split("### Beside the paper's\n\n")[1].split("\n\n")[0].splitlines()[2:]
        assert len(beside) == sum(figure is not None for paper in papers for figure in printed.get(paper, ()))
        assert len(beside) == sum(len(row.get("paper", ())) for row in tables[f"T{number}"]["rows"].values())
        judged = [line for line in beside if "[not run: " not in line]
        assert judged and all(line.rstrip(" |").endswith(VERDICTS) for line in judged)
        assert number == "2" or judged == beside
    assert {path.name for path in (tmp_path / "out").glob("*.png")} >= {"overview.png", "figure_5.png", "ids_1.png"}
