"""Night after night: reindex, three appends, a warm reindex that realigns, gc, each killed at random and run again, while a replica
follows the store and answers. Ten nights in `make test-faults`; CATID2_NIGHTS sets another number.
"""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import prove
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.on_ray.serve.follow import Serving
from catid2_ray.on_ray.serve.settings import AppSettings
from tests.command import ROOT, kill_tree, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4800)]
NIGHTS = int(os.environ.get("CATID2_NIGHTS", "10"))
PRODUCTS, ADDED = 1500, 20
# So many lines of the log come in each job at least; a kill comes at one of them.
LINES = {"reindex": 24, "append": 12, "gc": 1}


class Asker(threading.Thread):
    """Asks what the replica serves without a pause. `seen`: release → answers; `failed`: what went wrong."""

    def __init__(self, serving: Serving, queries: list[str]):
        super().__init__(daemon=True)
        self.serving, self.queries, self.seen, self.failed = serving, queries, {}, []
        self.ended = threading.Event()

    def run(self):
        number = 0
        while not self.ended.wait(0.2):
            now = self.serving.now
            try:
                (hits,) = now.retriever.retrieve([self.queries[number % len(self.queries)]], k=5)
                assert len(hits) == 5
                self.seen[now.name] = self.seen.get(now.name, 0) + 1
            except Exception as error:
                self.failed.append(repr(error))
            number += 1


def run_once(words: list[str], environment: dict, kill_at: int | None) -> tuple[int | None, str]:
    """The exit code (None: killed at that line of its log) and the output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.one_job", *words], cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    lines, events = [], 0
    with contextlib.closing(process.stdout):
        for line in process.stdout:
            lines.append(line)
            events += "event=" in line
            if kill_at is not None and events >= kill_at:
                kill_tree(process.pid)
                process.wait()
                return None, "".join(lines)
    return process.wait(), "".join(lines)


def ids_of(store: Store) -> dict[str, tuple]:
    """Product → the codes of its ID in the current release."""
    ids = releases.current(store).manifests(store)["ids"]
    columns = ["product_id", "codes"]
    tables = [store.read_table(ids.file(entry["name"]), columns=columns) for entry in ids.parts()]
    return {
        name: tuple(codes)
        for table in tables
        for name, codes in zip(*(table[column].to_pylist() for column in columns))
    }


def test_ten_nights(small, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("CATID2_CACHE", str(tmp_path / "cache"))
    made = generate(products=PRODUCTS + NIGHTS * 3 * ADDED, queries=300, seed=21)
    shop, store, draw = Store(tmp_path / "shop"), Store(tmp_path / "store"), random.Random(21)
    rows = PRODUCTS
    kept = set(made.products["product_id"].to_pylist()[:rows])
    pairs = made.pairs.filter(pa.compute.is_in(made.pairs["product_id"], pa.array(sorted(kept))))
    shop.write_table("products.parquet", made.products.slice(0, rows))
    shop.write_table("pairs.parquet", pairs)
    small |= {"store": store.uri, "catalog": {"root": shop.uri, "rows_per_part": 500}}
    small["quantizer"] |= {"codes_per_level": [16, 16, 16, 16], "batch": 100, "kmeans_sample": 500}
    recipe = write_recipe(tmp_path, small)
    tally = {"jobs": 0, "kills": 0, "lost_s": 0.0, "rows": 0}

    def job(verb: str, *more: str) -> str:
        """Until it ends well; two in three are killed once or twice on the way."""
        kills = draw.choice([0, 1, 2]) if verb != "gc" else draw.choice([0, 1])
        words = ["gc", "--store", store.uri, *more] if verb == "gc" else [verb, "--recipe", str(recipe), *more]
        while True:
            started = time.monotonic()
            code, shown = run_once(words, {}, draw.randint(1, LINES[verb]) if kills else None)
            if code == 0:
                tally["jobs"] += 1
                return shown
            assert code is None, shown[-4000:]
            tally["kills"], tally["lost_s"], kills = (
                tally["kills"] + 1,
                tally["lost_s"] + time.monotonic() - started,
                kills - 1,
            )

    def check(before: dict[str, tuple] | None) -> dict[str, tuple]:
        for manifest in releases.current(store).manifests(store).values():
            prove(store, manifest)
        ids = ids_of(store)
        expected = set(shop.read_table("products.parquet")["product_id"].to_pylist())
        tally["rows"] += len(expected - ids.keys())
        assert ids.keys() == expected and len(set(ids.values())) == len(ids)
        if before is not None:
            assert {name: ids[name] for name in before} == before, "an append renames nothing"
        return ids

    job("reindex")
    serving = Serving(store, AppSettings(store=store.uri, follow_s=1.0))
    asker = Asker(serving, made.products["title"].to_pylist()[:20])
    asker.start()
    seconds = []
    for night in range(NIGHTS):
        started = time.monotonic()
        job("reindex", "--set", f"seed={night}", "--set", "ids.max_churn=1.0")
        ids = check(None)
        for _ in range(3):
            rows += ADDED
            shop.write_table("products.parquet", made.products.slice(0, rows))
            job("append")
            ids = check(ids)
        job("reindex", "--set", f"seed={night}", "--set", "quantizer.warm_start=true", "--set", "ids.max_churn=1.0")
        check(None)
        job("gc", "--keep", "2")
        check(None)
        deadline = time.monotonic() + 120
        while serving.now.name != releases.current(store).name:
            assert time.monotonic() < deadline, (serving.refused, serving.failures)
            time.sleep(0.2)
        seconds.append(time.monotonic() - started)
    asker.ended.set()
    asker.join(60)
    served, answers = len(asker.seen), sum(asker.seen.values())
    serving.end()
    assert asker.failed == [] and answers > 10 * NIGHTS
    assert not Path(store.path("runs")).exists() or not any(Path(store.path("runs")).iterdir())
    fault(
        f"{NIGHTS} nights of {PRODUCTS} products: jobs killed at random", times=tally["kills"],
        outcome=f"{tally['jobs']} jobs ended well, {answers} answers from {served} releases without a failure, "
        f"{sum(seconds) / len(seconds):.0f} s a night",
        lost_s=tally["lost_s"], rows=tally["rows"],
    )  # fmt: skip
