"""`benchmarks/ids.py`: the page keeps tables of spaces without runs, and a T5 that reads words finds what it learned."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from catid2_ray.retrieval.trie import Trie


@pytest.fixture(scope="module")
def bench():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("ids")
    finally:
        sys.path.remove(folder)
        for name in ("ids", "harness"):
            sys.modules.pop(name, None)


def figures(recall):
    shares = {"neighbours": [0.5, 0.2], "ami": [0.1, 0.1, 0.1], "collisions": 0.1, "seconds": [1.0, 2.0]}
    return {**shares, "recall": {"pooled": recall}}


def test_a_page_has_new_tables_and_those_of_spaces_that_were_not_run(bench):
    first = {"bigbasket:tiger:0": figures([[0.1, 0.2, 0.3]] * 4), "mwpd_gpc:tiger:0": figures([[0.4, 0.5, 0.6]] * 4)}
    before = bench.page(first, test=False) + f"\n\n{bench.KEPT}\n### Not a table\n\nread by people\n"
    again = bench.page({"mwpd_gpc:tiger:0": figures([[0.7, 0.8, 0.9]] * 4)}, test=False, before=before)
    assert "0.100 0.200 0.300" in again and "0.700 0.800 0.900" in again
    assert "0.400 0.500 0.600" not in again and "Not a table" not in again
    assert again.count("### ") == 2
    assert bench.page({}, test=False, before=again).rstrip() == again.rstrip()


def test_every_difference_to_a_control_is_on_the_page(bench):
    runs = {f"mwpd_gpc_3:{kind}:0": figures([[0.1, share, 0.3]] * 4) for kind, share in (
        ("tiger", 0.2), ("on_residual", 0.25), ("on_residual shuffled", 0.22),
    )}  # fmt: skip
    text = bench.page(runs, test=False)
    assert "`on_residual` − its shuffled control: +0.000 [+0.000, +0.000] at 10, +0.030 [+0.030, +0.030] at 50." in text
    assert "`cat_id2` −" not in text


def test_a_t5_that_reads_words_finds_products_by_their_sentences(bench, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 150)
    monkeypatch.setattr(bench, "T5", {**bench.T5, "width": 32, "feed_forward": 64})
    monkeypatch.setattr(bench, "T5_BATCH", 32)
    titles = [f"{colour} {thing}" for colour in ("red", "blue", "green", "black") for thing in ("chair", "lamp", "rug")]
    sentences = [f"a fine thing named {title.replace(' ', ' and ')}" for title in titles]
    codes_NL = np.stack(np.meshgrid(range(4), range(3), indexing="ij"), -1).reshape(-1, 2)[::-1].copy()
    asked = bench.Questions(np.zeros((12, 2), np.float32), np.arange(12), np.arange(12))
    texts = {"learn": sentences, "pooled": sentences}
    shop = bench.Shop(titles, titles, np.zeros((12, 2), np.float32), np.zeros((12, 1)), asked, {"pooled": asked}, texts)
    found = bench.found_by_words(shop, codes_NL, Trie.build(codes_NL, codes_per_level=(4, 3)), seed=0)
    assert (bench.recall_of(found["pooled"], asked, (1,)) == 1).mean() > 0.9
    assert np.array_equal(np.sort(found["pooled"][0])[-12:], np.arange(12)) and found["pooled"].min() == -1
