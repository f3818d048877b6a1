"""The page at /, in a headless Chromium of two widths: what a person sees, clicks and is told when something is wrong."""

import asyncio
import datetime
import html
import json
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pytest

pytest.importorskip("ray.serve")

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from catid2_ray.on_ray.serve.app import api
from catid2_ray.on_ray.serve.keys import Keys
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.live_filters import LiveFilterIndex
from tests.unit.retrieval.conftest import folder, parts  # noqa: F401
from tests.unit.retrieval.test_http_interface import CHURN, client, replica  # noqa: F401

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
WIDTHS = {"desk": 1000, "phone": 360}
# The page in a frame of a width: what a person does there, one step after the other, and what is to be seen after each.
STEPS = """
  await note();  // ?q=oak+door&k=2
  page.querySelectorAll("ol .token")[0].click(); await note();
  await ask("??", ""); await ask("oak", '{"column": "price", "to": 3}'); await ask("oak", "{no JSON"); await ask("oak door", "");
  await ask("<img src=x onerror=document.title=1> oak", "");
"""
KEY = "k" * 20
# The same of a service with keys and filter columns; `set` fills a control, which writes the filter.
LOCKED = """
  await note();
  const use = async key => { at("key").value = key; at("locked").requestSubmit(); await note(); };
  const set = async (label, value) => {
    const one = page.querySelector('[aria-label="' + label + '"]');
    one.value = value; one.dispatchEvent(new Event("input", { bubbles: true })); await submit();
  };
  await use("x".repeat(20)); await use("KEY"); page.querySelector("details").open = true;
  await set("price, from", "2"); await set("price, to", "4"); await set("in stock", "yes"); await set("added, from", "2026-01-04");
  await set("in stock", "any"); await set("category path, Home > Furniture", "Home > Doors");
  await set("brand, one, or another", "a, b");
  page.querySelectorAll("ol .token")[0].click(); await note();
  page.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" })); await note();
  await set("brand, one, or another", "nobody");
""".replace("KEY", KEY)
FRAME = """<!doctype html><iframe id="frame" width="%d" height="740" src="/?q=oak+door&k=2"></iframe><pre id="said"></pre><script>
const frame = document.getElementById("frame"), said = document.getElementById("said");
const wait = ms => new Promise(done => setTimeout(done, ms));
frame.onload = async () => {
  const page = frame.contentDocument, at = id => page.getElementById(id), root = page.documentElement;
  const note = async () => {
    await wait(300);
    while (/Searching …|Looking …/.test(page.body.innerText)) await wait(50);
    said.append("STEP " + page.querySelector("main").innerText + " SEEN " + JSON.stringify({ wide: root.scrollWidth,
      inside: root.clientWidth, focus: page.activeElement.id, title: page.title, images: page.images.length, loading,
      filter: at("filter").value, below: !at("below").hidden, locked: !at("locked").hidden }));
  };
  let loading = "";
  const submit = async () => { at("form").requestSubmit(); loading = at("answer").innerText; await note(); };
  const ask = async (query, filter) => { at("query").value = query; at("filter").value = filter; await submit(); };
  %s
  said.append("DONE");
};
</script>"""


@pytest.fixture
def base(replica, client, monkeypatch):  # noqa: F811
    monkeypatch.setattr(replica.serving.now, "parts", {"ids": SimpleNamespace(metrics=CHURN)})
    pages, whole = {}, FastAPI()
    whole.get("/frame/{name}", response_class=HTMLResponse)(lambda name: pages[name])
    whole.mount("/", api)
    server = uvicorn.Server(uvicorn.Config(whole, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", pages=pages)
    server.should_exit = True
    thread.join(20)


def steps(base, width: str, do: str = STEPS) -> list[tuple[str, dict]]:
    """What the page says after each step, and what else was seen."""
    base.pages[width] = FRAME % (WIDTHS[width], do)
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000", "--window-size=1200,900",
         "--dump-dom", f"{base.url}/frame/{width}"],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert "DONE" in shown, shown[-2000:]
    said = html.unescape(shown.split('<pre id="said">')[1].split("DONE")[0]).split("STEP ")[1:]
    return [(text, json.loads(more)) for text, more in (part.split(" SEEN ") for part in said)]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_person_searches_looks_below_a_code_and_is_told_what_is_wrong(base, width):
    answer, below, empty, column, no_json, again, hostile = steps(base, width)
    said = answer[0]
    assert "oak door" in said and "2 products in" in said and "release r1" in said and "published" in said
    assert "since r0: 36 with another ID, 7 new, 2 gone" in said
    assert "2 products below this prefix" in below[0] and "table" in below[0] and below[1]["focus"] == "below"
    for (text, _), why in (
        (empty, "a query needs at least one letter or digit"), (column, "price"), (no_json, "The filter is no JSON"),
    ):  # fmt: skip
        assert why in text and "products in" not in text
    assert "2 products in" in again[0] and "letter or digit" not in again[0], "an error goes with the next answer"
    assert "2 products in" in hostile[0] and (hostile[1]["title"], hostile[1]["images"]) == ("catid2-ray", 0)
    assert empty[1]["loading"] == hostile[1]["loading"] == "Searching …"
    for _, more in (answer, below, empty, column, no_json, again, hostile):
        assert more["wide"] <= more["inside"] <= WIDTHS[width], "nothing sticks out at the side"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_person_gives_a_key_and_fills_the_filters_that_the_release_has(base, replica, monkeypatch, width):  # noqa: F811
    monkeypatch.setattr(replica, "keys", Keys("read " + KEY))
    live = replica.serving.now.retriever.live
    paths = pa.array([["Home", "Doors"]] * 6, pa.list_(pa.string()))
    index = FilterIndex(
        {
            "product_id": [f"p{row}" for row in range(6)], "price": [float(row) for row in range(6)],
            "in_stock": [row != 3 for row in range(6)], "brand": list("aabbcc"), "category_path": paths,
            "added": [datetime.date(2026, 1, 1 + row) for row in range(6)],
        }
    )  # fmt: skip
    monkeypatch.setattr(live, "view", replace(live.view, filters=LiveFilterIndex(index)))
    first, wrong, right, *filled, below, left, empty = steps(base, width, LOCKED)
    for text, more in (first, wrong):
        assert more["locked"] and "send a key of this service" in text and "products in" not in text
    assert not right[1]["locked"] and "2 products in" in right[0] and "release r1" in right[0]
    price, stock = {"column": "price", "from": 2}, {"column": "in_stock", "is": True}
    price_to, added = price | {"to": 4}, {"column": "added", "from": "2026-01-04"}
    path, brand = {"column": "category_path", "under": ["Home", "Doors"]}, {"column": "brand", "in": ["a", "b"]}

    def conditions(more: dict) -> list[dict]:
        written = json.loads(more["filter"])
        return sorted(written.get("all", [written]), key=lambda one: one["column"])

    by_column = [
        [price], [price_to], [stock, price_to], [added, stock, price_to], [added, price_to], [added, path, price_to],
        [added, brand, path, price_to],
    ]  # fmt: skip
    assert [conditions(more) for _, more in filled] == by_column
    assert all("ms · release r1" in text for text, _ in filled) and "1 product in" in filled[-1][0]
    assert "Home › Doors" in filled[-1][0] and "no more products exist or pass the filter" in filled[-1][0]
    assert below[1]["below"] and "Categories: Home › Doors" in below[0]
    assert not left[1]["below"] and left[1]["focus"] == "query"
    assert "Nothing was found" in empty[0] and "0 products in" in empty[0]
    for _, more in (first, right, *filled, below, left, empty):
        assert more["wide"] <= more["inside"] <= WIDTHS[width], "nothing sticks out at the side"
