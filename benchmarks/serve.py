"""What serving over HTTP costs beside the bare retriever in a process of its own, at the same batch.

    python benchmarks/serve.py --store STORE [--release NAME] [--seconds 10] [--turns 3] [--replicas 1,2] [--cpus 8] [--swap OTHER]
        [--only-other] [--json FILE] [--out benchmarks/results/serve.md] [--render JSON [--beside JSON]]

Everything runs on this machine: a private Ray with one proxy, the retriever's deployment with a fixed number of replicas, and the
asker, a process of its own. Closed loop: so many connections, each asks again as soon as it is answered. Open loop: questions come
at seeded random times (Poisson) whether or not earlier ones were answered, and latency counts from the time that a question was
due, so that a service which falls behind cannot hide it. The bare retriever and HTTP take turns, since machines are noisy.
A proxy is Ray's own, or with RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 in the environment HAProxy, which
listens on all interfaces: measure it in a network namespace (`unshare -n`, `ip link set lo up`) and show it with `--beside JSON`.
Queries are the first words of seeded products of the release; every answer's products are compared with the bare retriever's.
`--swap OTHER` names another release of the store that was current once: the pointer is moved to it and back under load, then it is
put on trial beside the current one, so give a copy of your store. `--only-other` measures nothing but these.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import socket
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
from harness import RESULTS, finish, in_fresh_process, memory_of, parser_of, rounded, where, wholes
from serve_page import (
    BATCH,
    BURST,
    CLOSED,
    MAPPED,
    PERCENTILES,
    QUANTILES,
    QUERIES,
    SHARES,
    SWAP_CONNECTIONS,
    TRIAL_CONNECTIONS,
    TRIALS,
    K,
    report,
)


def bare(options) -> dict:
    """Queries a second of the retriever alone in batches of BATCH, and what else a replica is compared with."""
    import torch

    from catid2_ray.artifacts import release as releases
    from catid2_ray.artifacts.store import Store
    from catid2_ray.on_ray.machine.query_encoder import open_retriever

    torch.set_num_threads(1)
    store = Store(options.store)
    release = releases.load(store, options.release) if options.release else releases.current(store)
    start = time.perf_counter()
    retriever = open_retriever(releases.release_folder(store, release, releases.default_cache()))
    if options.queries.exists():
        queries = list(json.loads(options.queries.read_text()))
    else:
        rows = np.random.default_rng(0).integers(0, retriever.trie.rows, QUERIES)
        titles = [retriever.products.title(int(row)) for row in rows]
        queries = list(dict.fromkeys(" ".join(title.split()[:3]) for title in titles))
        answers = retriever.retrieve(queries, k=K)
        asked = {query: [hit.product_id for hit in hits] for query, hits in zip(queries, answers)}
        options.queries.write_text(json.dumps(asked))
    retriever.retrieve(queries[:BATCH], k=K)
    ready, taken, cpu = time.perf_counter() - start, [], time.process_time()
    while sum(taken) < options.seconds:
        at = len(taken) * BATCH % (len(queries) - BATCH)
        begun = time.perf_counter()
        retriever.retrieve(queries[at : at + BATCH], k=K)
        taken.append(time.perf_counter() - begun)
    asked = len(taken) * BATCH
    cpu = time.process_time() - cpu
    one = [_seconds_of_one(retriever, query) for query in queries[:40]]
    return {
        "release": release.name, "products": retriever.trie.rows, "ready_s": ready, "queries_a_second": asked / sum(taken),
        "cpu_ms": 1e3 * cpu / asked, "batch_ms": 1e3 * float(np.median(taken)), "one_ms": 1e3 * float(np.median(one)),
        "rss": memory_of("VmRSS"),
    }  # fmt: skip


def _seconds_of_one(retriever, query: str) -> float:
    start = time.perf_counter()
    retriever.retrieve([query], k=K)
    return time.perf_counter() - start


@contextlib.asynccontextmanager
async def over_http(url: str):
    """A call: what is asked → (status, products of each answer)."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:

        async def call(asked: dict, connection: int) -> tuple[int | str, list[list[str]]]:
            try:
                async with session.post(url, json=asked) as answer:
                    body, status = await answer.read(), answer.status
            except aiohttp.ClientError as error:
                return type(error).__name__, []
            if status != 200:
                return status, []
            said = json.loads(body)
            return status, [[hit["product_id"] for hit in one["products"]] for one in said.get("answers") or [said]]

        yield call


@contextlib.asynccontextmanager
async def over_grpc(target: str, connections: int):
    """The same; its channels lie in a pool, one a connection."""
    import grpc

    from catid2_ray.on_ray.serve import rpc
    from catid2_ray.on_ray.serve.proto import retriever_pb2

    alone = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(target, options=alone) for _ in range(connections)]
    stubs = [rpc.stub(channel) for channel in channels]

    async def call(asked: dict, connection: int) -> tuple[int | str, list[list[str]]]:
        try:
            said = await stubs[connection](
                retriever_pb2.RetrieveRequest(**asked), metadata=[("application", "catid2")], timeout=120
            )
        except grpc.RpcError as error:
            return error.code().name, []
        return 200, [[hit.product_id for hit in one.products] for one in said.answers or [said]]

    yield call
    for channel in channels:
        await channel.close()


async def ask(options) -> dict:
    """The asker: `--connections` of a closed loop, `--rate` of an open one, or `--burst` questions at once."""
    wanted = json.loads(options.queries.read_text())
    queries, done = list(wanted), []
    grpc_here = options.url.startswith("grpc://")
    way = over_grpc(options.url.removeprefix("grpc://"), options.connections) if grpc_here else over_http(options.url)
    async with way as call:

        async def one(number: int, due: float, connection: int = 0) -> None:
            mine = [queries[(number + one) % len(queries)] for one in range(options.each)]
            asked = {"query": mine[0]} if options.each == 1 else {"queries": mine}
            status, products = await call({**asked, "k": K}, connection)
            right = status != 200 or products == [wanted[query] for query in mine]
            done.append((time.perf_counter() - due, status, right))

        async def closed(connection: int, until: float) -> None:
            number = 13 * connection
            while time.perf_counter() < until:
                await one(number, time.perf_counter(), connection)
                number += 7

        start = time.perf_counter()
        if options.burst:
            await asyncio.gather(*(one(number, start) for number in range(options.burst)))
        elif options.connections:
            await asyncio.gather(*(closed(one, start + options.seconds) for one in range(options.connections)))
        else:
            waits = np.random.default_rng(1).exponential(1 / options.rate, int(options.rate * options.seconds) + 1)
            async with asyncio.TaskGroup() as group:
                for number, due in enumerate(np.cumsum(waits) + start):
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    group.create_task(one(number, due))
        spent = time.perf_counter() - start
    good = [seconds for seconds, status, _ in done if status == 200]
    statuses = {str(status): sum(other == status for _, other, _ in done) for status in {one for _, one, _ in done}}
    figures = {name: 1e3 * float(np.percentile(good or [np.nan], p)) for name, p in zip(QUANTILES, PERCENTILES)}
    return figures | {
        "queries_a_second": options.each * len(good) / spent, "seconds": spent, "statuses": statuses,
        "wrong": sum(not right for _, _, right in done),
    }  # fmt: skip


def mapped(pid: int) -> dict[str, list[int]]:
    """Of the files of MAPPED that a process has mapped: bytes resident, and its share of them (PSS)."""
    found, kind = {name: [0, 0] for name in MAPPED}, None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name:  # addresses, and the file
            kind = next((kind for kind, part in MAPPED.items() if part in line), None)
        elif kind and name in ("Rss", "Pss"):
            found[kind][name == "Pss"] += 1024 * int(value.split()[0])
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Service:
    """The deployment behind its proxy, on a free port. `cpu` and `memory`: of its processes, by their command."""

    NAMES = {"replica": ("ray::ServeReplica",), "proxy": ("ray::ProxyActor", "ray::HAProxy", "haproxy")}

    def __init__(self, options):
        from ray import serve

        from catid2_ray.artifacts.store import Store
        from catid2_ray.config import ClusterRecipe
        from catid2_ray.on_ray.machine import cluster

        Store(options.store).check()
        port, of_grpc = _free_port(), _free_port()
        cluster.connect(ClusterRecipe(logical_cpus=options.cpus))
        self.options, self.base = options, f"http://127.0.0.1:{port}"
        self.urls = {"HTTP": f"{self.base}/v1/retrieve", "gRPC": f"grpc://127.0.0.1:{of_grpc}"}
        names = ["catid2_ray.on_ray.serve.rpc.add_to_server"]
        serve.start(
            http_options={"host": "127.0.0.1", "port": port},
            grpc_options={"port": of_grpc, "grpc_servicer_functions": names},
        )

    def run(self, replicas: int, *, follow: bool = False) -> float:
        """Seconds until so many replicas are ready."""
        from ray import serve

        from catid2_ray.on_ray.serve import app

        start = time.perf_counter()
        named = None if follow else self.options.release
        settings = app.AppSettings(store=self.options.store, release=named, follow=follow, follow_s=0.2)
        deployment = app.RetrieverReplica.options(autoscaling_config=None, num_replicas=replicas)
        serve.run(deployment.bind(settings), name="catid2")
        return time.perf_counter() - start

    def stop(self) -> None:
        from ray import serve

        from catid2_ray.on_ray.machine import cluster

        serve.shutdown()
        cluster.disconnect()

    def processes(self) -> dict[str, list[psutil.Process]]:
        found = {name: [] for name in self.NAMES}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                command = "".join(process.cmdline()[:1])
                for name, titles in self.NAMES.items():
                    found[name] += [process] * (
                        command.startswith(titles) or command.endswith("/haproxy") and name == "proxy"
                    )
        return found

    def cpu(self) -> dict[str, float]:
        """Seconds of processor so far."""
        return {
            name: sum(sum(one.cpu_times()[:2]) for one in processes) for name, processes in self.processes().items()
        }

    def memory(self) -> list[dict[str, int]]:
        """Bytes of each replica: resident, its share of what it shares (PSS), and of MAPPED files both."""
        return [
            {"rss": one.memory_info().rss, "pss": one.memory_full_info().pss, "mapped": mapped(one.pid)}
            for one in self.processes()["replica"]
        ]

    def swapped(self, other: str) -> list[dict]:
        """Under load, seconds from the move of the pointer until the replica serves: another release, which it must open, and the
        one before, which it kept; and what came of the requests meanwhile."""
        from catid2_ray.artifacts import history
        from catid2_ray.artifacts import release as releases
        from catid2_ray.artifacts.store import Store

        self.run(1, follow=True)
        store, swaps = Store(self.options.store), []
        for kind, name in (("opened", other), ("kept", releases.current(store).name)) * self.options.turns:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                load = pool.submit(self.asked, connections=SWAP_CONNECTIONS, seconds=self.options.seconds)
                time.sleep(1)
                start = time.perf_counter()
                history.rollback(store, name)
                self._until(lambda said, expected=name: said["release"] == expected)
                swaps.append(
                    {"kind": kind, "seconds": time.perf_counter() - start, "statuses": load.result()["statuses"]}
                )
            if kind == "kept":
                self.run(1, follow=True)  # so that the other one has to be opened anew
        return swaps

    def tried(self, other: str) -> dict:
        """`shares`: of each of TRIALS, in turns, what the load gets; `promoted_s`: seconds from the promotion until what was tried
        is served; `statuses`: of the requests meanwhile."""
        from catid2_ray.artifacts import trials
        from catid2_ray.artifacts.store import Store

        self.run(1, follow=True)
        store, shares = Store(self.options.store), []
        how = {"connections": TRIAL_CONNECTIONS, "seconds": self.options.seconds}
        for _ in range(self.options.turns):
            for percent, shadow in TRIALS:
                if percent or shadow:
                    trials.begin(store, other, trials.Shares(percent, shadow))
                    on_trial = {"release": other, "percent": percent, "shadow": shadow}
                else:
                    on_trial = trials.end(store) and None
                self._until(lambda said, expected=on_trial: said["trial"] == expected)
                shares.append({"percent": percent, "shadow": shadow} | self.asked(**how))
                print("trial", shares[-1], flush=True)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            load = pool.submit(self.asked, **how)
            time.sleep(1)
            start = time.perf_counter()
            trials.promote(store)
            self._until(lambda said: said["release"] == other)
            return {"shares": shares, "promoted_s": time.perf_counter() - start, "statuses": load.result()["statuses"]}

    def _until(self, true) -> None:
        """Until what the service says of its release is so."""
        deadline = time.perf_counter() + 60
        while not true(json.load(urllib.request.urlopen(f"{self.base}/v1/release"))):  # noqa: S310 (our own)
            if time.perf_counter() > deadline:
                raise SystemExit("the service did not follow the store within a minute")
            time.sleep(0.02)

    def asked(self, *, protocol: str = "HTTP", **how) -> dict:
        """One run of the asker, with the milliseconds of processor that replica and proxy spent per answer."""
        before = self.cpu()
        arguments = [f"--{name}={value}" for name, value in how.items()]
        figures = in_fresh_process(__file__, "--part", "ask", "--url", self.urls[protocol], "--queries",
                                   str(self.options.queries), *arguments)  # fmt: skip
        how["protocol"] = protocol
        answered = max(1, figures["statuses"].get("200", 0)) * how.get("each", 1)
        spent = {f"{name}_cpu_ms": 1e3 * (after - before[name]) / answered for name, after in self.cpu().items()}
        return {**how, **figures, **spent}


def measured(options) -> dict:
    import ray  # noqa: F401  (so that the time to ready holds no import)

    arguments = ["--part", "bare", "--store", options.store, "--queries", str(options.queries)]
    arguments += ["--seconds", str(options.seconds), *(["--release", options.release] if options.release else [])]
    figures = {"bare": [in_fresh_process(__file__, *arguments)], "closed": [], "open": [], "replicas": []}
    print("bare", figures["bare"], flush=True)
    service = Service(options)
    try:
        ready = service.run(1)
        service.asked(connections=BATCH, seconds=3)
        if options.only_other:
            return figures | {"swaps": service.swapped(options.swap), "trials": service.tried(options.swap)}
        for turn in range(options.turns):
            for connections, each, protocol in CLOSED:
                how = {"connections": connections, "each": each, "seconds": options.seconds}
                figures["closed"].append(service.asked(protocol=protocol, **how))
                print("closed", turn, figures["closed"][-1], flush=True)
            figures["bare"].append(in_fresh_process(__file__, *arguments))
            print("bare", figures["bare"][-1], flush=True)
        most = saturation(figures["closed"])
        for share in SHARES:
            figures["open"].append(
                {"share": share} | service.asked(rate=share * most, seconds=max(20, options.seconds))
            )
            print("open", figures["open"][-1], flush=True)
        figures["burst"] = service.asked(burst=BURST)
        print("burst", figures["burst"], flush=True)
        figures["replicas"].append({"replicas": 1, "ready_s": ready, "memory": service.memory()})
        for replicas in options.replicas:
            if replicas > 1:
                ready = service.run(replicas)
                answers = service.asked(connections=64, seconds=options.seconds)
                figures["replicas"].append(
                    {"replicas": replicas, "ready_s": ready, "memory": service.memory(), **answers}
                )
                print("replicas", figures["replicas"][-1], flush=True)
        if options.swap:
            figures["swaps"] = service.swapped(options.swap)
            print("swaps", figures["swaps"], flush=True)
            figures["trials"] = service.tried(options.swap)
    finally:
        service.stop()
    return figures


def saturation(closed: list[dict]) -> float:
    """The median over turns of the best throughput of a turn, one query a request."""
    by_turn = np.array([one["queries_a_second"] for one in closed]).reshape(-1, len(CLOSED))
    single = [place for place, (_, each, protocol) in enumerate(CLOSED) if each == 1 and protocol == "HTTP"]
    return float(np.median(by_turn[:, single].max(1)))


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "serve.md", stored="what --json wrote")
    parser.add_argument("--store", help="store with a release")
    parser.add_argument("--release", help="none = the current one")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="what --json wrote of a run with another proxy, for the same page")
    parser.add_argument("--replicas", type=wholes, default=[1, 2], help="numbers of replicas")
    parser.add_argument("--cpus", type=int, default=8, help="CPUs that Ray is told of; one a replica")
    parser.add_argument("--swap", help="another release of the store, to which the pointer is moved and back")
    parser.add_argument("--only-other", action="store_true", help="measure what --swap says, and nothing else")
    parser.add_argument("--part", choices=("bare", "ask"))
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--connections", type=int)
    parser.add_argument("--each", type=int, default=1, help="queries a request")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--burst", type=int)
    options = parser.parse_args()
    if options.part == "bare":
        print(json.dumps(bare(options)))
    elif options.part == "ask":
        print(json.dumps(asyncio.run(ask(options))))
    elif options.render:
        figures = json.loads(options.render.read_text())
        if options.beside:
            figures["beside"] = json.loads(options.beside.read_text())
        finish(figures, report, options)
    elif not options.store:
        print(json.dumps({"skipped": "no store: give --store"}))
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.queries = Path(folder) / "queries.json"
            proxy = "HAProxy" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "Ray's own HTTP proxy"
            figures = where("serve") | {"proxy": proxy, "load": os.getloadavg()[0]} | rounded(measured(options))
        finish(figures, report, options)


if __name__ == "__main__":
    main()
