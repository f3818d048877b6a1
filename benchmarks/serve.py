"""What serving over HTTP costs beside the bare retriever in a process of its own, at the same batch.

    python benchmarks/serve.py --store STORE [--release NAME] [--seconds 10] [--turns 3] [--replicas 1,2] [--cpus 8] [--json FILE]
        [--out benchmarks/results/serve.md] [--render JSON [--beside JSON]]

Everything runs on this machine: a private Ray with one proxy, the retriever's deployment with a fixed number of replicas, and the
asker, a process of its own. Closed loop: so many connections, each asks again as soon as it is answered. Open loop: questions come
at seeded random times (Poisson) whether or not earlier ones were answered, and latency counts from the time that a question was
due, so that a service which falls behind cannot hide it. The bare retriever and HTTP take turns, since machines are noisy.
A proxy is Ray's own, or with RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 in the environment HAProxy, which
listens on all interfaces: measure it in a network namespace (`unshare -n`, `ip link set lo up`) and show it with `--beside JSON`.
Queries are the first words of seeded products of the release; every answer's products are compared with the bare retriever's.
"""

import asyncio
import contextlib
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from harness import RESULTS, finish, in_fresh_process, memory_of, parser_of, rounded, table, where, wholes

K, BATCH, QUERIES = 10, 16, 512
CLOSED = ((1, 1), (16, 1), (32, 1), (64, 1), (4, 16))  # connections, queries a request
SHARES = (0.3, 0.7, 0.95)  # of HTTP's own saturation
BURST = 300
PERCENTILES = (50, 95, 99)
_QUANTILES = tuple(f"p{p}_ms" for p in PERCENTILES)


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


async def ask(options) -> dict:
    """The asker: `--connections` of a closed loop, `--rate` of an open one, or `--burst` questions at once."""
    import aiohttp

    wanted = json.loads(options.queries.read_text())
    queries, done = list(wanted), []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:

        async def one(number: int, due: float) -> None:
            mine = [queries[(number + one) % len(queries)] for one in range(options.each)]
            asked = {"query": mine[0]} if options.each == 1 else {"queries": mine}
            try:
                async with session.post(options.url, json={**asked, "k": K}) as answer:
                    body, status = await answer.read(), answer.status
            except aiohttp.ClientError as error:
                body, status = b"", type(error).__name__
            seconds, right = time.perf_counter() - due, True
            if status == 200:
                said = json.loads(body)
                answers = said.get("answers") or [said]
                right = [[hit["product_id"] for hit in one["products"]] for one in answers] == [
                    wanted[query] for query in mine
                ]
            done.append((seconds, status, right))

        async def closed(first: int, until: float) -> None:
            number = first
            while time.perf_counter() < until:
                await one(number, time.perf_counter())
                number += 7

        start = time.perf_counter()
        if options.burst:
            await asyncio.gather(*(one(number, start) for number in range(options.burst)))
        elif options.connections:
            await asyncio.gather(*(closed(13 * one, start + options.seconds) for one in range(options.connections)))
        else:
            waits = np.random.default_rng(1).exponential(1 / options.rate, int(options.rate * options.seconds) + 1)
            async with asyncio.TaskGroup() as group:
                for number, due in enumerate(np.cumsum(waits) + start):
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    group.create_task(one(number, due))
        spent = time.perf_counter() - start
    good = [seconds for seconds, status, _ in done if status == 200]
    statuses = {str(status): sum(other == status for _, other, _ in done) for status in {one for _, one, _ in done}}
    figures = {name: 1e3 * float(np.percentile(good or [np.nan], p)) for name, p in zip(_QUANTILES, PERCENTILES)}
    return figures | {
        "queries_a_second": options.each * len(good) / spent, "seconds": spent, "statuses": statuses,
        "wrong": sum(not right for _, _, right in done),
    }  # fmt: skip


class Service:
    """The deployment behind its proxy, on a free port. `cpu` and `memory`: of its processes, by their command."""

    NAMES = {"replica": ("ray::ServeReplica",), "proxy": ("ray::ProxyActor", "ray::HAProxy", "haproxy")}

    def __init__(self, options):
        from ray import serve

        from catid2_ray.artifacts.store import Store
        from catid2_ray.config import ClusterRecipe
        from catid2_ray.on_ray.machine import cluster

        Store(options.store).check()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cluster.connect(ClusterRecipe(logical_cpus=options.cpus))
        self.options, self.url = options, f"http://127.0.0.1:{port}/v1/retrieve"
        serve.start(http_options={"host": "127.0.0.1", "port": port})

    def run(self, replicas: int) -> float:
        """Seconds until so many replicas are ready."""
        from ray import serve

        from catid2_ray.on_ray.serve import app

        start = time.perf_counter()
        settings = app.AppSettings(store=self.options.store, release=self.options.release, follow=False)
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
        """Bytes of each replica: resident, and its share of what it shares (PSS)."""
        return [
            {"rss": one.memory_info().rss, "pss": one.memory_full_info().pss} for one in self.processes()["replica"]
        ]

    def asked(self, **how) -> dict:
        """One run of the asker, with the milliseconds of processor that replica and proxy spent per answer."""
        before = self.cpu()
        arguments = [f"--{name}={value}" for name, value in how.items()]
        figures = in_fresh_process(__file__, "--part", "ask", "--url", self.url, "--queries", str(self.options.queries),
                                   *arguments)  # fmt: skip
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
        for turn in range(options.turns):
            for connections, each in CLOSED:
                figures["closed"].append(service.asked(connections=connections, each=each, seconds=options.seconds))
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
    finally:
        service.stop()
    return figures


def saturation(closed: list[dict]) -> float:
    """The median over turns of the best throughput of a turn, one query a request."""
    by_turn = np.array([one["queries_a_second"] for one in closed]).reshape(-1, len(CLOSED))
    single = [place for place, (_, each) in enumerate(CLOSED) if each == 1]
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


def report(figures: dict) -> str:
    bare = figures["bare"]
    text = [
        "# Serving over HTTP\n",
        f"Written by `benchmarks/serve.py`: release {bare[0]['release']}, {bare[0]['products']:,} products, k {K}, one replica of "
        f"one thread, proxy and asker on one machine: {figures['machine']}. Medians over turns.\n",
    ]
    for run in (figures, *([figures["beside"]] if "beside" in figures else [])):
        text += [f"## {run['proxy']}\n", *_tables(run)]
    return "\n".join(text)


def _tables(figures: dict) -> list[str]:
    bare, closed, burst = figures["bare"], figures["closed"], figures["burst"]
    alone = {name: float(np.median([one[name] for one in bare])) for name in ("queries_a_second", "cpu_ms")}
    rows = [["bare, batches of 16", alone["queries_a_second"], 1.0, alone["cpu_ms"], None, None, None, None, None]]
    for connections, each in CLOSED:
        runs = [one for one in closed if (one["connections"], one["each"]) == (connections, each)]
        middle = {
            name: float(np.median([one[name] for one in runs])) for name in runs[0] if isinstance(runs[0][name], float)
        }
        rows.append(
            [
                f"HTTP, {connections} connections" + (f", {each} queries a request" if each > 1 else ""),
                middle["queries_a_second"], middle["queries_a_second"] / alone["queries_a_second"],
                middle["replica_cpu_ms"], middle["proxy_cpu_ms"],
                (middle["replica_cpu_ms"] + middle["proxy_cpu_ms"]) / alone["cpu_ms"],
                *(middle[name] for name in _QUANTILES),
            ]
        )  # fmt: skip
    quantiles = [f"p{p} ms" for p in PERCENTILES]
    head = ("", "queries/s", "of bare", "replica: ms of processor a query", "proxy", "both, × bare", *quantiles)
    wrong = sum(one["wrong"] for one in (*closed, *figures["open"], burst))
    text = [
        f"Load average {figures['load']:.1f} at the beginning. Answers that differ from the bare retriever's: {wrong}.\n",
        table(head, rows, title="Closed loop"),
    ]
    rows = [
        [f"{one['share']:.0%}", one["rate"], one["queries_a_second"], *(one[name] for name in _QUANTILES),
         one["p99_ms"] / one["p50_ms"], one["replica_cpu_ms"], _said(one["statuses"])]
        for one in figures["open"]
    ]  # fmt: skip
    head = ("of saturation", "asked/s", "answered/s", *quantiles, "p99/p50", "replica: ms of processor", "statuses")
    text.append(table(head, rows, title="Open loop"))
    said = _said(burst["statuses"])
    text.append(f"A burst of {BURST} requests at once: {said}, the last answer after {burst['seconds']:.1f} s.\n")
    rows = [
        [one["replicas"], one["ready_s"], *(_mb(max(memory[name] for memory in one["memory"])) for name in ("rss", "pss")),
         _mb(sum(memory["pss"] for memory in one["memory"]))]
        for one in figures["replicas"]
    ]  # fmt: skip
    head = ("replicas", "seconds until ready", "MB resident, each", "MB with its share of what is shared", "MB of all")
    return [*text, table(head, rows, title="Replicas")]


def _said(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))


def _mb(size: int) -> int:
    return round(size / 1e6)


if __name__ == "__main__":
    main()
