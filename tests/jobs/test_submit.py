"""`ray job submit` of jobs.reindex against a Ray cluster that is already running, as a platform team does it.

The IDs' first tokens are categories and their last are counted (hi_gen); a causal language model generates them.
"""

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from catid2_ray import cli
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.generator.vocabulary import train_tokenizer
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from tests.command import ROOT, job_here, kill_tree, write_recipe
from tests.text_models import save_qwen

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.cluster


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def head(tmp_path_factory):
    """`ray start --head --block` on ports of its own; yields the environment of a client and the dashboard's address."""
    port, dashboard, agent, client = free_ports(4)
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    # A token of the test's own: a fresh machine has none yet, and `ray start` then refuses.
    environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    environment.pop("RAY_ADDRESS", None)
    log = open(tmp_path_factory.mktemp("ray") / "head.log", "w+")  # noqa: SIM115 (closed below)
    process = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=4",
         "--object-store-memory=200000000", "--disable-usage-stats"],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (log.seek(0) or "Ray runtime started" in log.read()):
            assert process.poll() is None and time.monotonic() < deadline, log.seek(0) or log.read()
            time.sleep(0.5)
        yield environment, f"http://127.0.0.1:{dashboard}"
    finally:
        kill_tree(process.pid)
        log.close()


def submit(head, *entry: str) -> subprocess.CompletedProcess:
    environment, address = head
    return subprocess.run(
        [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *entry],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def test_reindex_is_submitted_and_a_stage_that_cannot_run(head, tiny, tmp_path):
    tiny["quantizer"] |= {"kind": "hi_gen", "codes_per_level": [64, 8, 8], "leaf": 20}
    tiny["evaluation"]["beam_width"] = 8
    tokenizer = train_tokenizer(generate(products=240, queries=120, seed=3).products["title"].to_pylist(), size=300)
    qwen = save_qwen(tmp_path / "qwen", tied=True, words=len(tokenizer))
    tokenizer.save_pretrained(qwen)
    tiny["generator"] |= {"model": "causal", "causal": qwen}
    recipe = write_recipe(tmp_path, {**tiny, "store": str(tmp_path / "store")})
    result = submit(head, "python", "-m", "jobs.reindex", "--recipe", str(recipe))
    shown = result.stdout + result.stderr
    assert result.returncode == 0 and "succeeded" in shown, shown[-4000:]
    store = Store(tmp_path / "store")
    release = releases.current(store)
    assert release.name in shown
    ids = release.manifests(store)["ids"].metrics
    assert ids["codes_per_level"] != tiny["quantizer"]["codes_per_level"] and ids["duplicates_after"] == 0
    retriever = open_retriever(releases.release_folder(store, release, tmp_path / "cache"))
    assert len(retriever.retrieve(["stainless steel hinge"], k=5)[0]) == 5
    cli.report_ids(str(recipe), html_file=str(tmp_path / "ids.html"))
    assert "data:image/png;base64," in (tmp_path / "ids.html").read_text()
    again = job_here("assign_ids", "--recipe", recipe)
    assert again.returncode == 0 and "artifacts/ids/" in again.stdout, (again.stdout + again.stderr)[-3000:]
    environment, address = head
    for other in ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, {"RAY_AUTH_MODE": "disabled"}):
        refused = submit((environment | other, address), "python", "-c", "print('it ran')")
        shown = refused.stdout + refused.stderr
        assert refused.returncode != 0 and re.search("(?i)unauthorized|authentication token|401|403", shown), shown[
            -2000:
        ]
        assert "it ran" not in refused.stdout
    wrong = submit(head, "python", "-m", "jobs.train_quantizer", "--recipe", str(recipe), "--set", "seed=1",
                   "--set", "catalog.rows_per_part=60")  # fmt: skip
    assert wrong.returncode != 0 and "jobs.embed_catalog" in wrong.stdout + wrong.stderr
