"""The full path, once: tables in S3 → reindex → release in S3 → the same products over HTTP, the command line and a rerun."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time

import httpx
import pyarrow.parquet as pq
import pytest
from transformers import T5ForConditionalGeneration

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.machine import cluster
from tests.command import ROOT, job_here, kill_tree, run, run_here
from tests.in_process import without_ray

pytestmark = pytest.mark.cluster


def test_figures_have_the_promised_keys_and_ids_are_unique(released):
    figures = released["figures"]
    assert {"release", "documents", "collision_rate_before", "duplicates_after", "codes_used", "recall", "recall_seen",
            "recall_unseen", "seconds", "peak_memory_bytes"} <= set(figures)  # fmt: skip
    assert figures["documents"] == 240 and figures["duplicates_after"] == 0 and len(figures["codes_used"]) == 4
    assert set(figures["recall"]) == {"beam", "bm25", "dense", "served"} and {"5", "10", "20", "50", "100"} == set(
        figures["recall"]["beam"]
    )
    diagnosis = figures["diagnosis"]
    assert diagnosis["split"] == "validation" and 0 < diagnosis["queries"] <= 100 and "exact" in diagnosis["recall"]
    assert figures["seconds"]["embed"] > 0 and figures["peak_memory_bytes"] > 100e6


def test_closing_table_and_samples_are_printed(released):
    shown = released["result"].stdout
    for text in ("collision rate before resolution", "duplicate IDs after", "Codes in use", "all: beam", "all: bm25",
                 "by exact scores", "peak memory", "Try next", released["figures"]["release"], "<a_"):  # fmt: skip
        assert text in shown


def test_a_bad_row_is_set_aside_with_its_reason(released):
    store = Store(released["store"])
    catalog = releases.current(store).manifests(store)["catalog"]
    assert catalog.metrics["products_set_aside"] == 1 and catalog.metrics["products"] == 240
    rejected = [store.read_table(catalog.file(entry["name"])) for entry in catalog.named("rejected/part-")]
    assert [reason for table in rejected for reason in table["reason"].to_pylist()] == ["empty title"]


def test_every_manifest_holds_the_resolved_recipe_and_parents(released):
    store = Store(released["store"])
    for part, manifest in releases.current(store).manifests(store).items():
        assert manifest.recipe["quantizer"]["commitment"] == 0.25 and manifest.code_version
        assert part == "catalog" or manifest.parents


def test_no_secret_is_stored_or_printed(released):
    secret = released["env"]["AWS_SECRET_ACCESS_KEY"]
    assert secret not in released["result"].stdout + released["result"].stderr
    store = Store(released["store"])
    for kind in store.names("artifacts"):
        for key in store.names(f"artifacts/{kind}"):
            assert secret.encode() not in store.read(f"artifacts/{kind}/{key}/manifest.json")


def test_the_generator_is_a_plain_t5_checkpoint(released, tmp_path):
    store = Store(released["store"])
    generator = releases.current(store).manifests(store)["generator"]
    model = T5ForConditionalGeneration.from_pretrained(releases.fetch(store, generator, tmp_path))
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0]


@pytest.fixture
def no_start_of_ray(monkeypatch):
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("Ray was started"))


def test_a_rerun_with_nothing_changed_says_so_and_starts_no_ray(released, no_start_of_ray):
    again = job_here("reindex", "--recipe", released["recipe"])
    assert again.returncode == 0, again.stderr[-2000:]
    assert "Nothing changed" in again.stdout and released["figures"]["release"] in again.stdout
    assert "event=start" not in again.stderr


def test_one_process_without_ray_makes_the_same_release(released, tmp_path):
    """What most tests of jobs run is what Ray runs: every part has the same digest, in another store."""
    with without_ray():
        here = reindex(Recipe.load(released["recipe"], [f"store={tmp_path / 'store'}"]))
    store = Store(released["store"])
    on_ray = releases.current(store).manifests(store)
    assert {name: part.digest for name, part in here.parts.items() if name in on_ray} == {
        name: part.digest for name, part in on_ray.items()
    }


def test_search_answers_and_refuses(released):
    found = run_here("search", "stainless steel hinge", "--store", released["store"], "--k", 3)
    assert found.returncode == 0 and found.stdout.count("<a_") == 3, found.stderr
    empty = run_here("search", "  ", "--store", released["store"])
    assert empty.returncode == 3 and "at least one letter or digit" in empty.stderr
    nothing = run_here("search", "x", "--store", f"{released['store']}-other")
    assert nothing.returncode == 5 and "nothing was published" in nothing.stderr


def test_evaluate_scores_another_table_of_pairs(released):
    pairs = released["folder"] / "pairs.parquet"
    pq.write_table(released["pairs"], pairs)
    target = released["folder"] / "validation.json"
    with without_ray():
        result = run_here("evaluate", "--store", released["store"], "--pairs", pairs, "--split", "validation",
                          "--min-relevance", 2, "--methods", "beam,served", "--json", target)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    figures = json.loads(target.read_text())
    assert figures["release"] == released["figures"]["release"]
    assert set(figures["recall"]) == {"beam", "served"} and "recall_seen" in figures and "recall_unseen" in figures


def test_evaluate_refuses_a_split_that_is_not_there_before_it_starts_ray(released, no_start_of_ray):
    pairs = released["folder"] / "pairs.parquet"
    pq.write_table(released["pairs"], pairs)
    wrong = run_here("evaluate", "--store", released["store"], "--pairs", pairs, "--split", "nightly")
    assert wrong.returncode == 3 and "no pair of split 'nightly'" in wrong.stderr


@pytest.fixture(scope="module")
def server(released):
    """`catid2 serve` on a free port, until ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(released["folder"] / "serve.log", "w+")  # noqa: SIM115 (closed below)
    process = subprocess.Popen(
        [sys.executable, "-m", "catid2_ray.cli", "serve", "--store", released["store"], "--port", str(port)],
        cwd=ROOT, env={**os.environ, **released["env"]}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.seek(0) or log.read()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        kill_tree(process.pid)
        log.close()


def test_http_answers_equal_the_command_line(released, server):
    answer = httpx.post(f"{server}/v1/retrieve", json={"query": "stainless steel hinge", "k": 3}, timeout=30)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["release"] == released["figures"]["release"] and len(body["products"]) == 3
    assert body["fewer"] is None
    assert set(body["products"][0]) == {
        "product_id", "docid", "score", "logp", "dense", "lexical", "title", "category_path",
    }  # fmt: skip
    scores = [product["score"] for product in body["products"]]
    assert scores == sorted(scores, reverse=True)
    shown = run_here("search", "stainless steel hinge", "--store", released["store"], "--k", 3)
    for product in body["products"]:
        assert product["product_id"] in shown.stdout and product["docid"] in shown.stdout
    assert httpx.get(f"{server}/healthz").json() == {"status": "ok", "release": body["release"], "changes": 0}
    # The replica names its release in the store, so that gc keeps it.
    assert (
        run_here("releases", "--store", released["store"], "--json", released["folder"] / "uses.json").returncode == 0
    )
    assert [row["in_use"] for row in json.loads((released["folder"] / "uses.json").read_text())] == [1]


def test_http_answers_do_not_depend_on_batch_mates(released, server):
    price_of = dict(zip(*(released["products"][name].to_pylist() for name in ("product_id", "price"))))
    alone = httpx.post(f"{server}/v1/retrieve", json={"query": "oak shelf", "k": 5}, timeout=30).json()
    with httpx.Client(timeout=60) as client:

        def ask(body):
            return client.post(f"{server}/v1/retrieve", json=body).json()

        cheap = {"column": "price", "to": 9}
        bodies = [{"query": "oak shelf", "k": 5}, {"query": "garden hose for a balcony", "k": 40, "filter": cheap}] * 8
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, bodies))
    for body, answer in zip(bodies, answers):
        if body["k"] == 5:
            assert [p["docid"] for p in answer["products"]] == [p["docid"] for p in alone["products"]]
        else:
            assert len(answer["products"]) >= 10
            assert all(price_of[p["product_id"]] <= 9 for p in answer["products"])


@pytest.mark.parametrize(
    "body, message",
    [
        ({"query": ""}, "at least one letter or digit"),
        ({"query": "x" * 10_000}, "may have 2000 characters, found 10000"),
        ({"query": "x", "k": 0}, "k must be a whole number from 1 to 1000"),
        ({"query": "x", "limit": 3}, "Extra inputs are not permitted"),
        ({"query": "x", "filter": {"column": "colour", "in": ["red"]}}, "filter at $.column: unknown column"),
        ({"query": "x", "filter": {"column": "price", "to": "low"}}, "expects a number, found 'low'"),
    ],
)
def test_http_refuses_what_cannot_be_answered(server, body, message):
    answer = httpx.post(f"{server}/v1/retrieve", json=body, timeout=30)
    assert answer.status_code == 422 and message in answer.text


def test_products_come_and_go_while_it_serves(released, server):
    def post(path, body):
        answer = httpx.post(f"{server}/v1/{path}", json=body, timeout=60)
        return answer.status_code, answer.json()

    title = "purple marzipan accordion"
    status, made = post("products", {"products": [{"product_id": "n1", "title": title, "columns": {"price": 3.5}}]})
    assert status == 200 and made["change"] == 1 and made["products"][0]["docid"].startswith("<a_"), made
    asked = {"query": title, "k": 5, "filter": {"column": "price", "from": 3.2, "to": 3.8}}
    status, found = post("retrieve", asked)
    assert [(p["product_id"], p["docid"], p["title"]) for p in found["products"]] == [
        ("n1", made["products"][0]["docid"], title)
    ]
    refused = [
        ("products", {"products": [{"product_id": "n1", "title": title}]}, "product 'n1' is live already"),
        ("products", {"products": [{"product_id": "n2", "title": "x", "docid": "<a_9>"}]}, "is not an ID of 4 levels"),
        (
            "products",
            {"products": [{"product_id": "n2", "title": "x", "columns": {"colour": "red"}}]},
            "unknown columns",
        ),
        ("withdraw", {"product_ids": ["nobody"]}, "no product 'nobody'"),
    ]
    for path, body, message in refused:
        status, answer = post(path, body)
        assert status == 422 and message in answer["error"], answer
    # Another process, as a replica that starts now would be, sees the same.
    shown = run("catid2_ray.cli", "search", title, "--store", released["store"], "--k", 3, "--filter",
                json.dumps(asked["filter"]), env=released["env"])  # fmt: skip
    assert "n1" in shown.stdout and "dense" in shown.stdout and "BM25" in shown.stdout, shown.stderr
    assert post("withdraw", {"product_ids": ["n1"]})[0] == 200 and post("retrieve", asked)[1]["products"] == []
    assert post("restore", {"product_ids": ["n1"]})[0] == 200 and len(post("retrieve", asked)[1]["products"]) == 1
