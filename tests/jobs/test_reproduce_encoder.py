"""`catid2 reproduce` where embedding.encoder is a real text model, here a tiny random BERT: DPR, which fine-tunes it, beside its
vectors as they are; fewer queries on the same store; Table 4's arms, and how far their vectors are apart."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import HuggingFaceEncoder, join_text
from tests.command import run_here, write_recipe
from tests.text_models import save_bert

METHODS = ["dense", "zero_shot", "dpr", "bm25+dpr"]
FEWER = 7
TOKENS = 32  # no title is longer, so that no two are cut to the same


@pytest.fixture(scope="module")
def done(tmp_path_factory, no_ray):
    """Table 2 and the same command again, Table 2 of fewer queries, and Table 4, all on one store."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("reproduce_encoder")
    made = generate(**TINY["catalog"]["synthetic"])
    texts = [*join_text(made.products, ("title", "category_path")), *made.pairs["query"].to_pylist()]
    encoder = save_bert(folder / "bert", sorted({word for text in texts for word in re.findall(r"\w+", text.lower())}))
    recipe = {
        **TINY, "store": str(folder / "store"), "quantizer": {**TINY["quantizer"], "epochs": 1},
        "embedding": {**TINY["embedding"], "encoder": encoder, "width": None, "text": ["title"], "tokens": TOKENS},
        # The usual learning rate would leave the vectors nearly as they are after two steps.
        "reproduce": {"methods": METHODS, "seeds": 1, "dpr_pairs": 40, "dpr_epochs": 1, "dpr_learning_rate": 0.01},
    }  # fmt: skip
    path = write_recipe(folder, recipe)

    def measured(name: str, *more: str):
        run = run_here("reproduce", "--recipe", path, "--out", folder / name, *more)
        assert run.returncode == 0, run.stderr[-3000:]
        return run, json.loads((folder / name / "report.json").read_text())

    first, report = measured("first", "--tables", "2")
    [tuned] = (folder / "store" / "artifacts" / "dpr").glob("*/manifest.json")
    [vectors] = tuned.parent.glob("*/products.npy")
    again, same_report = measured("again", "--tables", "2")
    measured("fewer", "--tables", "2", "--set", f"evaluation.max_queries={FEWER}")
    _, categories = measured("categories", "--tables", "4")
    return {
        "folder": folder, "encoder": encoder, "titles": made.products.sort_by("product_id")["title"].to_pylist(),
        "first": first, "again": again, "reports": (report, same_report), "rows": report["tables"]["T2"]["rows"],
        "dpr": json.loads(tuned.read_text())["metrics"], "dpr_vectors": np.load(vectors),
        "categories": categories["tables"]["T4"]["rows"],
    }  # fmt: skip


def _lists(folder: Path, method: str) -> dict[str, list[str]]:
    """Query → products, best first, of the file for other tools."""
    found: dict[str, list[str]] = {}
    for line in (folder / "trec" / f"T2-{method}-tiny-seed0.txt").read_text().splitlines():
        query, _, product, *_ = line.split()
        found.setdefault(query, []).append(product)
    return found


def test_a_fine_tuned_encoder_has_figures_and_vectors_of_its_own(done):
    rows = done["rows"]
    assert list(rows) == METHODS and all("not_run" not in row and row["recall"]["100"] > 0 for row in rows.values())
    raw_ND = HuggingFaceEncoder(done["encoder"], batch=64, tokens=TOKENS).encode(done["titles"])
    tuned_ND = done["dpr_vectors"]
    assert tuned_ND.shape == raw_ND.shape and (raw_ND * tuned_ND).sum(1).mean() < 0.999
    assert done["dpr"]["pairs"] == 40 and len(done["dpr"]["loss"]) == 1
    dense, dpr = (_lists(done["folder"] / "first", method) for method in ("dense", "dpr"))
    assert dense.keys() == dpr.keys() and all(dense[query] != dpr[query] for query in dense)
    assert set(rows["bm25+dpr"]["tuned"][0]) >= {"weight", "k1", "b"}


def test_an_encoder_that_nothing_tuned_is_measured_once(done):
    """Without an adapter and not tuned, `dense` is the encoder as it was published."""
    rows = done["rows"]
    assert rows["zero_shot"]["manifests"] == rows["dense"]["manifests"] != rows["dpr"]["manifests"]
    assert "Measured now: 3. Found: 1." in done["first"].stdout


def test_a_second_run_measures_nothing(done):
    assert "Measured now: 0. Found: 4." in done["again"].stdout and "event=start" not in done["again"].stderr
    first, again = done["reports"]
    assert first == again


def test_what_dpr_costs_counts_training_and_indexing(done):
    dense, dpr, fused = (done["rows"][name]["cost"] for name in ("dense", "dpr", "bm25+dpr"))
    assert dpr["train_seconds"] == round(done["dpr"]["seconds_training"], 2) > 0
    assert dpr["index_seconds"] == round(done["dpr"]["seconds_indexing"], 2) > 0
    assert dense["train_seconds"] == 0 < dense["index_seconds"]
    assert fused["train_seconds"] == dpr["train_seconds"] and fused["index_seconds"] >= dpr["index_seconds"]
    assert dpr["ms_per_query"] > 0 and fused["bytes"] > dpr["bytes"] == done["dpr_vectors"].nbytes


@pytest.mark.parametrize("method", METHODS)
def test_fewer_queries_are_answered_as_they_were_among_all(done, method):
    """What was made for other queries must not be read for these, row by row."""
    among_all, fewer = (_lists(done["folder"] / name, method) for name in ("first", "fewer"))
    assert len(fewer) == FEWER < len(among_all) and fewer.keys() <= among_all.keys()
    for query, products in fewer.items():
        # Cosines of another number of queries may differ in the last bit, and two neighbours then change places.
        assert len(products) == 100 and sum(one != other for one, other in zip(products, among_all[query])) <= 4


def test_table_4_measures_both_arms_and_says_how_far_their_vectors_are_apart(done):
    rows = done["categories"]
    for kind in ("dsi_semantic", "tiger", "cat_id2"):
        arms = [rows[f"{kind}_{word}_category"] for word in ("with", "without")]
        assert all("not_run" not in arm and arm["recall"]["100"] > 0 for arm in arms)
        assert arms[0]["manifests"] != arms[1]["manifests"]
    page = (done["folder"] / "categories" / "report.md").read_text()
    said = re.search(r"mean cosine of a product's two vectors[^:\n]*: (\S+); 5 % are below: (\S+)\.\n", page)
    cosine, low = map(float, said.groups())
    assert 0 < low <= cosine < 1
