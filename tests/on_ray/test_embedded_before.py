"""Vectors of the release before spare the encoder its texts, and change no bit of the artefact. Stages run in this process, without
Ray; the encoder is a fake that says what it was asked."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.config import Recipe
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import cluster
from catid2_ray.on_ray.stages import catalog, embed, embedded_before
from tests.text_models import save_bert

PRODUCTS = generate(products=450, queries=20, seed=3).products
FIRST = PRODUCTS.slice(0, 400)


class CountingEncoder:
    """A text's vector is a function of the text alone, as the real encoders' is; `asked` and `opened` are for the tests."""

    asked: list[str] = []
    opened = 0

    def __init__(self, *_, **__):
        CountingEncoder.opened += 1

    def encode(self, texts):
        CountingEncoder.asked += texts
        seeds = (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts)
        return np.stack([np.random.default_rng(seed).normal(size=6).astype(np.float32) for seed in seeds])


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch):
    def serially(handler_class, arguments, specs, **_):
        handler = handler_class(**arguments)
        return [handler(json.loads(json.dumps({**spec, "position": place}))) for place, spec in enumerate(specs)]

    for module in (catalog, embed, embedded_before):
        monkeypatch.setattr(module, "map_parts", serially)
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: None)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(embed, "open_encoder", CountingEncoder)
    monkeypatch.setattr(embed, "HuggingFaceEncoder", CountingEncoder)
    CountingEncoder.asked, CountingEncoder.opened = [], 0
    return CountingEncoder


def embedded(folder, products, *, before=None, frozen=False, refit=False, rows_per_part=100, **embedding):
    """The parts of a job on these products, on top of the parts `before` in the same store."""
    (folder / "shop").mkdir(parents=True, exist_ok=True)
    pq.write_table(products, folder / "shop" / "products.parquet")
    recipe = Recipe.build(
        {
            "name": "tiny", "store": str(folder / "store"), "embedding": {"encoder": "shop/encoder", **embedding},
            "catalog": {"root": str(folder / "shop"), "rows_per_part": rows_per_part},
        }
    )  # fmt: skip
    previous = before and SimpleNamespace(parts=before, release=SimpleNamespace(name="r-1"))
    peak = SimpleNamespace(lap=lambda: 0)
    job = Job(recipe=recipe, store=Store(recipe.store), previous=previous, peak=peak, refit_encoder=refit)
    parts = {"catalog": catalog.run(job, {})}
    parts["embeddings"] = embed.run(job, parts, frozen=before if frozen else None)
    assert not job.store.exists(f"{parts['embeddings'].folder}/exchange")
    return parts


def afresh(monkeypatch, folder, products, **choices):
    """As `embedded`, in a copy of the store, and every text is encoded."""
    twin = folder.with_name("twin")
    shutil.copytree(folder, twin)
    with monkeypatch.context() as patch:
        patch.setattr(embed, "open_before", lambda *_: None)
        return embedded(twin, products, **choices)


def counts(parts) -> tuple[int, int]:
    return parts["embeddings"].metrics["encoded"], parts["embeddings"].metrics["reused"]


def retitled(products: pa.Table, titles: dict[int, str]) -> pa.Table:
    changed = [titles.get(row, title) for row, title in enumerate(products["title"].to_pylist())]
    return products.set_column(products.column_names.index("title"), "title", pa.array(changed))


def repriced(products: pa.Table) -> pa.Table:
    value = pa.array(np.arange(products.num_rows, dtype=np.float32))
    return products.drop_columns(["value"] if "value" in products.column_names else []).append_column("value", value)


FOUR = dict.fromkeys((3, 90, 91, 300), "walnut bench")
CASES = {
    "the same texts under other prices": (repriced(FIRST), {}, 0),
    "one changed title": (retitled(FIRST, {7: "a brass gong"}), {}, 1),
    "one new product": (PRODUCTS.slice(0, 401), {"rows_per_part": 101}, 1),
    "1 % new products and one more part": (PRODUCTS.slice(0, 404), {}, 4),
    "fewer parts": (FIRST, {"rows_per_part": 300}, 0),
    "removed products": (PRODUCTS.slice(2, 398), {}, 0),
    "removed products and one part less": (PRODUCTS.slice(110, 290), {}, 0),
    "another catalogue": (PRODUCTS.slice(400, 50), {}, 50),
}


@pytest.mark.parametrize("case", CASES)
def test_only_new_texts_are_encoded_and_no_bit_differs(case, tmp_path, counted, monkeypatch):
    products, choices, new = CASES[case]
    first = embedded(tmp_path / "shop", FIRST)
    assert counts(first) == (400, 0)
    fresh = afresh(monkeypatch, tmp_path / "shop", products, before=first, **choices)
    assert counts(fresh) == (products.num_rows, 0)
    counted.asked, counted.opened = [], 0
    monkeypatch.setattr(embedded_before, "_SPREAD_ROWS", 150)  # several files, some of one part
    today = embedded(tmp_path / "shop", products, before=first, **choices)
    assert today["embeddings"].digest == fresh["embeddings"].digest
    assert today["embeddings"].key == fresh["embeddings"].key
    assert counts(today) == (new, products.num_rows - new)
    assert len(counted.asked) == new and counted.opened == (new > 0), "an encoder without work is not even loaded"


def test_texts_are_what_counts_not_products_and_equal_ones_are_encoded_once(tmp_path, counted, monkeypatch):
    text = ["title"]
    first = embedded(tmp_path / "shop", retitled(FIRST, FOUR), text=text, rows_per_part=1000)
    titles = set(retitled(FIRST, FOUR)["title"].to_pylist())
    assert counts(first) == (len(titles), 0) and len(titles) < 400
    others = dict.fromkeys((11, 12), "walnut bench") | dict.fromkeys((13, 14, 15), "oak chest")
    products = retitled(retitled(FIRST, FOUR), others)
    fresh = afresh(monkeypatch, tmp_path / "shop", products, before=first, text=text, rows_per_part=1000)
    counted.asked = []
    today = embedded(tmp_path / "shop", products, before=first, text=text, rows_per_part=1000)
    assert counted.asked == ["oak chest"] and counts(today) == (1, 397)
    assert today["embeddings"].digest == fresh["embeddings"].digest


def test_parts_whose_products_are_the_same_are_not_even_compared(tmp_path, counted, monkeypatch):
    first, seen = embedded(tmp_path / "shop", FIRST), []
    key = embedded_before.text_key
    monkeypatch.setattr(embedded_before, "text_key", lambda text: seen.append(text) or key(text))
    today = embedded(tmp_path / "shop", retitled(FIRST, {7: "a brass gong"}), before=first)
    changed = [
        entry["rows"]
        for entry in today["catalog"].parts()
        if entry["part"] not in embedded_before.unchanged_parts(first["catalog"], today["catalog"])
    ]
    assert len(changed) == 1 and len(seen) == 2 * changed[0] and counts(today) == (1, 399)


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        ({"text": ["title"]}, "of other columns"),
        ({"encoder": "shop/other"}, "of another encoder"),
        ({"tokens": 32}, "of other settings"),
        ({"refit": True}, "asked for anew"),
    ],
)
def test_vectors_that_may_be_others_are_not_reused(choices, why, tmp_path, counted):
    first = embedded(tmp_path / "shop", FIRST)
    today = embedded(tmp_path / "shop", PRODUCTS.slice(0, 401), before=first, **choices)
    assert today["embeddings"].metrics["reused"] == 0, why


def test_a_damaged_release_is_no_cache_and_the_log_says_so(tmp_path, counted, capsys):
    first = embedded(tmp_path / "shop", FIRST)
    entry = first["embeddings"].parts()[0]
    Store(tmp_path / "shop" / "store").write(first["embeddings"].file(entry["name"]), b"half")
    today = embedded(tmp_path / "shop", PRODUCTS.slice(0, 401), before=first)
    assert counts(today) == (401, 0) and "event=vectors_not_reused release=r-1" in capsys.readouterr().err


def test_an_append_encodes_its_new_products(tmp_path, counted, monkeypatch):
    first = embedded(tmp_path / "shop", FIRST)
    fresh = afresh(monkeypatch, tmp_path / "shop", PRODUCTS, before=first, frozen=True)
    today = embedded(tmp_path / "shop", PRODUCTS, before=first, frozen=True)
    assert today["embeddings"].digest == fresh["embeddings"].digest and counts(today) == (50, 400)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_fitted_encoder_that_is_kept_leaves_its_vectors_valid(frozen, tmp_path, monkeypatch):
    lsa = {"encoder": "lsa", "width": 16}
    first = embedded(tmp_path / "shop", FIRST, **lsa)
    fresh = afresh(monkeypatch, tmp_path / "shop", PRODUCTS, before=first, frozen=frozen, **lsa)
    today = embedded(tmp_path / "shop", PRODUCTS, before=first, frozen=frozen, **lsa)
    assert today["embeddings"].digest == fresh["embeddings"].digest and counts(today)[1] == 400
    refitted = embedded(tmp_path / "shop", PRODUCTS.slice(0, 449), before=first, refit=True, **lsa)
    assert counts(refitted)[1] == 0


def test_a_real_encoder_gives_the_same_bits(tmp_path, monkeypatch):
    """Its passes have fixed shapes: a text's vector does not depend on what is encoded with it."""
    bert = {"encoder": save_bert(tmp_path / "bert"), "tokens": 16, "batch": 8}
    assert embed.HuggingFaceEncoder is HuggingFaceEncoder
    words = ["steel hinge", "oak door 10 ft", "brass hinges", "copper pipe", "oak table", "steel"]
    made = retitled(FIRST, {row: f"{words[row % 6]} {row % 7} {words[row % 5]} {row}" for row in range(400)})
    first = embedded(tmp_path / "shop", made.slice(0, 380), **bert)
    fresh = afresh(monkeypatch, tmp_path / "shop", made, before=first, **bert)
    today = embedded(tmp_path / "shop", made, before=first, **bert)
    assert today["embeddings"].digest == fresh["embeddings"].digest and counts(today) == (20, 380)
