"""What `serve.py` asks for, and the page of what it measured."""

import numpy as np
from harness import table

K, BATCH, QUERIES = 10, 16, 512
# Connections, queries a request, protocol. A connection of gRPC is one call at a time on a channel of its own.
CLOSED = (
    (1, 1, "HTTP"), (16, 1, "HTTP"), (16, 1, "gRPC"), (32, 1, "HTTP"), (64, 1, "HTTP"), (4, 16, "HTTP"), (4, 16, "gRPC"),
)  # fmt: skip
SWAP_CONNECTIONS = 4
# Of a release on trial: per cent of the sessions that it answers, per cent of the others that ask it beside.
TRIALS, TRIAL_CONNECTIONS = ((0, 0), (0, 20), (50, 0)), 16
MAPPED = {
    "weights": ".safetensors",
    "trie": "/trie/",
    "vectors": "vectors/",
}  # files of a release, by a part of their paths
SHARES = (0.3, 0.7, 0.95)  # of HTTP's own saturation
BURST = 300
PERCENTILES = (50, 95, 99)
QUANTILES = tuple(f"p{p}_ms" for p in PERCENTILES)


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
    text = _load_tables(figures) if "burst" in figures else []  # else `--only-other`
    if "swaps" in figures:
        rows = []
        for kind in ("opened", "kept"):
            mine = [one for one in figures["swaps"] if one["kind"] == kind]
            statuses = {status for one in mine for status in one["statuses"]}
            counts = {status: sum(one["statuses"].get(status, 0) for one in mine) for status in statuses}
            rows.append([kind, float(np.median([one["seconds"] for one in mine])), _said(counts)])
        head = ("the release was", "seconds until it is served", f"{SWAP_CONNECTIONS} connections meanwhile")
        text.append(table(head, rows, title="Changes of release"))
    if "trials" in figures:
        text += _trial_tables(figures["trials"])
    return text


def _load_tables(figures: dict) -> list[str]:
    bare, closed, burst = figures["bare"], figures["closed"], figures["burst"]
    alone = {name: float(np.median([one[name] for one in bare])) for name in ("queries_a_second", "cpu_ms")}
    rows = [["bare, batches of 16", alone["queries_a_second"], 1.0, alone["cpu_ms"], None, None, None, None, None]]
    for connections, each, protocol in CLOSED:
        # Runs of before there was gRPC name no protocol.
        asked = [(one["connections"], one["each"], one.get("protocol", "HTTP")) for one in closed]
        runs = [one for one, how in zip(closed, asked) if how == (connections, each, protocol)]
        if not runs:
            continue
        middle = {
            name: float(np.median([one[name] for one in runs])) for name in runs[0] if isinstance(runs[0][name], float)
        }
        rows.append(
            [
                f"{protocol}, {connections} connections" + (f", {each} queries a request" if each > 1 else ""),
                middle["queries_a_second"], middle["queries_a_second"] / alone["queries_a_second"],
                middle["replica_cpu_ms"], middle["proxy_cpu_ms"],
                (middle["replica_cpu_ms"] + middle["proxy_cpu_ms"]) / alone["cpu_ms"],
                *(middle[name] for name in QUANTILES),
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
        [f"{one['share']:.0%}", one["rate"], one["queries_a_second"], *(one[name] for name in QUANTILES),
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
    text.append(table(head, rows, title="Replicas"))
    rows = [
        [f"{kind}, {one['replicas']} replicas", *(sum(size[at] for size in sizes) / len(sizes) / 1e6 for at in (0, 1))]
        for kind in MAPPED
        for one in figures["replicas"]
        if (sizes := [memory["mapped"][kind] for memory in one["memory"] if "mapped" in memory])
    ]
    if rows:
        text.append(table(("files that replicas map", "MB resident, each", "MB as its share"), rows))
    return text


def _trial_tables(trials: dict) -> list[str]:
    rows, alone = [], None
    for percent, shadow in TRIALS:
        mine = [one for one in trials["shares"] if (one["percent"], one["shadow"]) == (percent, shadow)]
        names = ("queries_a_second", "replica_cpu_ms", *QUANTILES)
        middle = {name: float(np.median([one[name] for one in mine])) for name in names}
        alone = alone or middle
        counts = {status: sum(one["statuses"].get(status, 0) for one in mine) for status in mine[0]["statuses"]}
        rows.append([
            f"answers {percent} %, is asked beside {shadow} % of the others" if percent or shadow else "none",
            middle["queries_a_second"], middle["queries_a_second"] / alone["queries_a_second"], middle["replica_cpu_ms"],
            *(middle[name] for name in QUANTILES), _said(counts),
        ])  # fmt: skip
    head = ("release on trial", "queries/s", "of none", "replica: ms of processor a query",
            *(f"p{p} ms" for p in PERCENTILES), "statuses")  # fmt: skip
    return [
        table(head, rows, title=f"A release on trial, {TRIAL_CONNECTIONS} connections"),
        f"Promoted under load it is served after {trials['promoted_s']:.2f} s; meanwhile {_said(trials['statuses'])}.\n",
    ]


def _said(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))


def _mb(size: int) -> int:
    return round(size / 1e6)
