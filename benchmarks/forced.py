"""Beams with one way to go: the decoder rows that a search over the trie's children saves, and what that is worth in time.

    python benchmarks/forced.py [--store STORE --catalog DATA/home_depot --work FOLDER] [--ids 1e5] [--beam 100] [--turns 5]
        [--out benchmarks/results/forced.md]

A T5 of base shape with random weights, one query of 16 tokens, one thread, float32; seconds are processor time, so that other work
on the machine counts little; contenders take turns. On the same trie stand
    level      `constrained_beam_search` over the codes of a level: every beam costs a decoder row at every level
    trie       the same with `normalize="trie"`: beams with one way to the end cost none
    generate   transformers' `generate` under a dictionary trie, length_penalty 0
`--store`: also the IDs of a store, and there the rows that 593 validation queries cost with a trained proxy generator of loss
"trie" (`benchmarks/targets.py`, whose `--work` it reads). The last line printed is one JSON object.
"""

import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from beam import CODES, WORDS, generate, nested, random_ids, random_model
from harness import RESULTS, finish, parser_of, rounded, table, where, wholes

from catid2_ray.evaluation.proxy import train
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie


class Counting:
    """A decoder that counts the rows of each level that it runs."""

    def __init__(self, decoder):
        self.decoder, self.rows_L = decoder, [0] * len(decoder.codes_per_level)

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def decode_step(self, level, memory, cache, parent_BM, code_BM):
        self.rows_L[level] += code_BM.numel()
        return self.decoder.decode_step(level, memory, cache, parent_BM, code_BM)


def rows_of(decoder, trie: Trie, ids_BT, mask_BT, beams: int, **search) -> list[float]:
    """Decoder rows a query of each level."""
    counting = Counting(decoder)
    constrained_beam_search(counting, trie, ids_BT, mask_BT, beam_width=beams, top_k=beams, **search)
    return [rows / len(ids_BT) for rows in counting.rows_L]


def nodes(trie: Trie) -> list[float]:
    """Per depth 1 … L − 1 the share of nodes with one child."""
    return [
        float((np.diff(trie.child_start[depth][np.arange(trie.nodes(depth) + 1)]) == 1).mean())
        for depth in range(1, trie.levels)
    ]


def measure(name: str, ids: np.ndarray, model, decoder, query_BT, options) -> dict:
    trie, root, ones_BT = Trie.build(ids, codes_per_level=CODES), nested(ids), torch.ones_like(query_BT)
    search = {"beam_width": options.beam, "top_k": options.beam}
    runs = {
        mode: lambda mode=mode: constrained_beam_search(decoder, trie, query_BT, ones_BT, normalize=mode, **search)
        for mode in ("level", "trie")
    }
    runs["generate"] = lambda: generate(model, query_BT, ones_BT, options.beam, root)
    seconds = {run: [] for run in runs}
    for turn in range(options.turns + 1):
        for run, call in runs.items():
            start = time.process_time()
            call()
            if turn:
                seconds[run].append(time.process_time() - start)
    return {
        "ids": name, "count": trie.rows, "one_child": nodes(trie),
        "rows": {mode: rows_of(decoder, trie, query_BT, ones_BT, options.beam, normalize=mode) for mode in ("level", "trie")},
        "seconds": {run: statistics.median(taken) for run, taken in seconds.items()},
        "fastest": {run: min(taken) for run, taken in seconds.items()},
    }  # fmt: skip


def trained_rows(data, beams: int) -> dict:
    """Rows a validation query with a proxy generator of loss trie, seed 0."""
    trie = Trie.build(data.codes_NL, codes_per_level=data.codes_per_level)
    torch.set_float32_matmul_precision("medium")  # as in benchmarks/targets.py
    model = train(data.vector_ND, data.codes_NL, data.codes_per_level, data.learn, seed=0, trie=trie)
    torch.set_float32_matmul_precision("highest")
    query_QD, rows = torch.from_numpy(np.ascontiguousarray(data.asked["validation"].query_QD, np.float32)), {}
    for mode in ("level", "trie"):
        found = [
            rows_of(model, trie, *[torch.ones(1, 1, dtype=torch.long)] * 2, beams, normalize=mode, memory=one_D[None])
            for one_D in query_QD
        ]
        rows[mode] = np.mean(found, 0).tolist()
    return {"queries": len(query_QD), "rows": rows}


def rendered(report: dict) -> str:
    def saved(rows: dict) -> list:
        return [" ".join(f"{one:.0f}" for one in rows["trie"]), sum(rows["level"]), sum(rows["trie"]),
                f"{1 - sum(rows['trie']) / sum(rows['level']):.0%}"]  # fmt: skip

    first = [
        [case["ids"], case["count"], " ".join(f"{share:.2f}" for share in case["one_child"]), *saved(case["rows"]),
         *(case["seconds"][run] for run in ("level", "trie", "generate")),
         *(case["seconds"]["generate"] / case["seconds"][run] for run in ("level", "trie"))]
        for case in report["cases"]
    ]  # fmt: skip
    names = ["IDs", "products", "nodes with one child, depth 1 2 3", "rows by level", "rows, level", "rows, trie", "saved",
             "level, s", "trie, s", "`generate`, s", "`generate` / level", "`generate` / trie"]  # fmt: skip
    text = (
        f"# Beams with one way to go\n\nWritten by `benchmarks/forced.py`: T5-base with random weights, beam {report['beam']}, one "
        f"query of 16 tokens, one thread, seconds of processor time, medians of {report['turns']} turns. Machine: "
        f"{report['machine']}, torch {report['torch']}.\n\n" + table(names, first)
    )
    if one := report.get("trained"):
        text += (
            f"\nWith a proxy generator trained on Home Depot by loss trie, {one['queries']} validation queries: "
            + (
                f"{sum(one['rows']['trie']):.0f} rows a query (by level {saved(one['rows'])[0]}) in place of "
                f"{sum(one['rows']['level']):.0f}, {saved(one['rows'])[-1]} saved.\n"
            )
        )
    return text


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "forced.md")
    parser.add_argument("--store")
    parser.add_argument("--catalog", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--encoder")
    parser.add_argument("--ids", type=wholes, default=[10**5])
    parser.add_argument("--beam", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = random_model("base", "cpu", torch.float32)
    decoder = T5Decoder(model, codes_per_level=CODES)
    query_BT = torch.randint(2, WORDS, (1, 16))
    report = {**where("forced"), "beam": options.beam, "turns": options.turns, "cases": []}
    given = [(f"{count:,} random", random_ids(count)) for count in options.ids]
    data = None
    if options.store:
        from targets import load

        data = load(options)
        given.append(("Home Depot, cat_id2", data.codes_NL))
    for name, ids in given:
        report["cases"].append(rounded(measure(name, ids, model, decoder, query_BT, options)))
        print(json.dumps(report["cases"][-1]), flush=True)
    if data is not None:
        report["trained"] = rounded(trained_rows(data, options.beam))
    finish(report, rendered, options)


if __name__ == "__main__":
    main()
