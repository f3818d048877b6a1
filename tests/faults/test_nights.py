"""Night after night on three Ray nodes: reindex, publish, three appends, a warm reindex that realigns, gc. Drivers and nodes are
killed at random; Ray Serve, on a fourth node, follows the store and answers throughout.

Ten nights in `make test-faults`; CATID2_NIGHTS sets another number. Models are tiny: starting the workers of some 90 jobs is what
takes the time.
"""

import os
import random
import threading
import time
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
import ray
from ray import serve

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import prove
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.on_ray.serve.app import AppSettings, RetrieverReplica
from tests.command import write_recipe
from tests.end_to_end.test_replicas_under_load import free_port
from tests.faults.nodes import Job, Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(4800)]
NIGHTS = int(os.environ.get("CATID2_NIGHTS", "10"))
PRODUCTS, ADDED = 1500, 20
# So many events come in the log of each job at least; a kill comes at one of them, and one of gc with its first removal.
EVENTS = {"reindex": 24, "append": 12}


class Asker(threading.Thread):
    """Asks the service without a pause. `seen`: release → answers; `failed`: what went wrong; `longest_s`: of all answers."""

    def __init__(self, base: str, queries: list[str]):
        super().__init__(daemon=True)
        self.base, self.queries, self.seen, self.failed, self.longest_s = base, queries, {}, [], 0.0
        self.ended = threading.Event()

    def run(self):
        number = 0
        with httpx.Client(base_url=self.base, timeout=60) as client:
            while not self.ended.wait(0.2):
                asked, number = time.monotonic(), number + 1
                try:
                    body = {"query": self.queries[number % len(self.queries)], "k": 5}
                    answer = client.post("/v1/retrieve", json=body).raise_for_status().json()
                    assert len(answer["products"]) == 5
                    self.seen[answer["release"]] = self.seen.get(answer["release"], 0) + 1
                except Exception as error:
                    self.failed.append(repr(error))
                self.longest_s = max(self.longest_s, time.monotonic() - asked)


@pytest.fixture
def nodes(make_nodes, monkeypatch) -> Nodes:
    # As in a Ray that a job starts: an epoch's checkpoint waits for the controller's next look, and idle workers are kept.
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    monkeypatch.setenv("RAY_idle_worker_killing_time_threshold_ms", "120000")
    return make_nodes({"cpu-data": (2, 1), "gpu-train": (1, 1), "gpu-serve": (1, 1)})


@pytest.fixture
def serving(nodes):
    """`serving(store)` → the service's URL: one replica, on the node that serves."""
    port = free_port()

    def start(store: Store) -> str:
        ray.init(address=nodes.cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        own = {"num_cpus": 1, "label_selector": {"pool": "gpu-serve"}}
        options = {"num_replicas": 1, "autoscaling_config": None, "ray_actor_options": own}
        settings = AppSettings(store=store.uri, follow_s=1.0)
        serve.run(RetrieverReplica.options(**options).bind(settings), name="catid2")
        return f"http://127.0.0.1:{port}"

    yield start
    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()


class Night:
    """The jobs of the nights, and what they came to. `kills`: what was killed → how often; `seconds`: verb → of each job that ended
    well; `lost_s`: of jobs that were killed."""

    def __init__(self, nodes: Nodes, store: Store, folder: Path, draw: random.Random):
        self.nodes, self.store, self.folder, self.draw = nodes, store, folder, draw
        self.kills = {"driver": 0, "node": 0}
        self.seconds: dict[str, list[float]] = {}
        self.lost_s = 0.0

    def artifacts(self) -> int:
        return len(self.store.fs.glob(self.store.path("artifacts/*/*")))

    def job(self, verb: str, *words: str) -> None:
        """Until it ends well. Every other one is disturbed: its driver is killed and it is run again, or a node that works."""
        victim = self.draw.choice([None, None, "driver", "driver" if verb == "gc" else "node"])  # gc uses no nodes
        moment, artifacts = self.draw.randint(1, EVENTS.get(verb, 1)), self.artifacts()
        began = time.monotonic()
        job = Job(self.folder, "catid2_ray.cli", verb, *words)

        def has_come() -> bool:
            return self.artifacts() < artifacts if verb == "gc" else job.shown().count("event=") >= moment

        if verb == "publish" or not (victim and job.reaches(has_come)):
            victim = None
        if victim:
            self.kills[victim] += 1
            if victim == "driver":
                job.kill()
                self.lost_s += time.monotonic() - job.started
                job = Job(self.folder, "catid2_ray.cli", verb, *words)
            else:
                self.nodes.kill(self.draw.choice(["cpu-data", "cpu-data", "gpu-train"]))
        assert job.end() == 0, f"{victim} killed:\n{job.shown()[-6000:]}"
        self.seconds.setdefault(verb, []).append(time.monotonic() - job.started)
        print(f"{verb}: {time.monotonic() - began:.0f} s, killed: {victim or 'nothing'} (event {moment})", flush=True)


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


def test_ten_nights(nodes, serving, small, tmp_path, fault):
    made = generate(products=PRODUCTS + NIGHTS * 3 * ADDED, queries=300, seed=21)
    shop, store, rows, missing = Store(tmp_path / "shop"), Store(tmp_path / "store"), PRODUCTS, 0
    kept = set(made.products["product_id"].to_pylist()[:rows])
    pairs = made.pairs.filter(pa.compute.is_in(made.pairs["product_id"], pa.array(sorted(kept))))
    shop.write_table("products.parquet", made.products.slice(0, rows))
    shop.write_table("pairs.parquet", pairs)
    small |= {
        "store": store.uri,
        "catalog": {"root": shop.uri, "rows_per_part": 800, "workers": 2},
        "cluster": {"data_pool": "cpu-data", "training_pool": "gpu-train"},
    }
    small["quantizer"] |= {
        "codes_per_level": [16, 16, 16, 16], "batch": 100, "kmeans_sample": 500, "epochs": 1, "max_failures": 3,
    }  # fmt: skip
    small["generator"] |= {"max_failures": 3}
    recipe = str(write_recipe(tmp_path, small))
    night = Night(nodes, store, tmp_path / "driver", random.Random(21))

    def check(before: dict[str, tuple] | None) -> dict[str, tuple]:
        nonlocal missing
        for manifest in releases.current(store).manifests(store).values():
            prove(store, manifest)
        ids = ids_of(store)
        expected = set(shop.read_table("products.parquet")["product_id"].to_pylist())
        missing += len(expected - ids.keys())
        assert ids.keys() == expected and len(set(ids.values())) == len(ids)
        if before is not None:
            assert {name: ids[name] for name in before} == before, "an append renames nothing"
        return ids

    night.job("reindex", "--recipe", recipe)
    base = serving(store)
    asker = Asker(base, made.products["title"].to_pylist()[:20])
    asker.start()
    began, nights = time.monotonic(), []
    for number in range(NIGHTS):
        started = time.monotonic()
        settings = ["--recipe", recipe, "--set", f"seed={number + 1}", "--set", "ids.max_churn=1.0"]
        night.job("reindex", *settings)
        night.job("publish", *settings)
        ids = check(None)
        for _ in range(3):
            rows += ADDED
            shop.write_table("products.parquet", made.products.slice(0, rows))
            night.job("append", "--recipe", recipe)
            ids = check(ids)
        night.job("reindex", *settings, "--set", "quantizer.warm_start=true")
        check(None)
        night.job("gc", "--store", store.uri, "--keep", "2")
        check(None)
        deadline, served = time.monotonic() + 120, {}
        while served.get("release") != releases.current(store).name:
            assert time.monotonic() < deadline, served
            time.sleep(0.2)
            served = httpx.get(f"{base}/v1/release", timeout=60).json()
        nights.append(time.monotonic() - started)
        print(f"night {number + 1}: {nights[-1]:.0f} s, {sum(asker.seen.values())} answers", flush=True)
    asker.ended.set()
    asker.join(60)
    answers, seconds = sum(asker.seen.values()), time.monotonic() - began
    print(
        {verb: [round(one) for one in each] for verb, each in night.seconds.items()}, f"longest {asker.longest_s:.2f} s"
    )
    assert asker.failed == [] and answers > seconds / 2, (asker.failed[:5], answers, seconds)
    assert not Path(store.path("runs")).exists() or not any(Path(store.path("runs")).iterdir())
    jobs = sum(map(len, night.seconds.values()))
    fault(
        f"{NIGHTS} nights of {PRODUCTS} products on three Ray nodes", times=sum(night.kills.values()),
        outcome=f"{night.kills['driver']} drivers and {night.kills['node']} nodes killed; {jobs} jobs ended well, {answers} "
        f"answers over HTTP from {len(asker.seen)} releases without a failure, {sum(nights) / len(nights):.0f} s a night",
        lost_s=night.lost_s, rows=missing,
    )  # fmt: skip
