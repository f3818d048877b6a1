"""What a filter costs a request: compiling an expression, and asking at each step which of the beams' children live.

    python benchmarks/filters.py [--rows 1e7] [--beams 100] [--model base] [--repeats 30] [--json FILE]
        [--out benchmarks/results/filters.md]

The goal is at most 10 % of a step of the search. Measured for it, one query, one thread, in turns, medians:
    children    what a level offers to `--beams` random nodes of it, as the search asks it, with the filter and without:
                the difference is the whole cost of the filter in a step (boundaries, their rows, counts, comparison)
    step        a step of the search without a filter (decoder, head and choice of beams; T5 of `--model`, random weights)
    search      the whole search with and without the filter; their difference is small beside noise, both are given.
                Compiled filters are kept, so compiling is no part of it
    batch       8 queries with 8 different filters, with one for all, and with none
`--model none` leaves the last three out. Beside the look-up stands what one writes first: a cumulative sum (int64,
N + 1) of the booleans made for each request, and two look-ups per child; both must agree before timing.
The last line printed is one JSON object.

Shape letters: N rows, M beams, C children of the widest node of a level.
"""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from harness import finish, in_turns, medians, parser_of, rounded, table, where, whole

from catid2_ray.docid import DocidSpace
from catid2_ray.retrieval.filters import Filter, FilterIndex, allowed_before
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import tensors

CODES = (256,) * 4
GOAL = 0.10
MODELS = {
    "tiny": {"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "d_kv": 32},
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64},
}
EXPRESSIONS = {
    "all": {"all": []},
    "one brand of 5000": {"column": "brand", "in": ["brand 7"]},
    "100 brands": {"column": "brand", "in": [f"brand {number}" for number in range(100)]},
    "price range": {"column": "price", "from": 10, "to": 50},
    "in stock": {"column": "in_stock", "is": True},
    "subtree": {"column": "category_path", "under": ["top 3", "middle 39"]},
    "100 products": {"products": [f"p{number * 977}" for number in range(100)]},
    "subtree, in stock, not one brand": {
        "all": [
            {"column": "category_path", "under": ["top 3"]},
            {"column": "in_stock", "is": True},
            {"not": {"column": "brand", "in": ["brand 7"]}},
        ]
    },
}
LOOKED_UP = ("all", "in stock", "subtree", "one brand of 5000")


def columns(rows: int, seed: int = 0) -> pa.Table:
    """5000 brands, 561 categories in three levels (12, 87, 561), log-normal prices, four products of five in stock."""
    rng = np.random.default_rng(seed)
    paths = pa.array(
        [[f"top {leaf % 12}", f"middle {leaf % 12 + 12 * (leaf % 7)}", f"leaf {leaf}"] for leaf in range(561)]
    )
    brands = pa.array([f"brand {number}" for number in range(5000)])
    chosen = [np.minimum(rng.zipf(1.3, rows) - 1, size - 1) for size in (len(paths), len(brands))]
    return pa.table(
        {
            "product_id": pc.binary_join_element_wise("p", pa.array(np.arange(rows)).cast(pa.string()), ""),
            "brand": brands.take(pa.array(chosen[1])),
            "price": pa.array(rng.lognormal(3, 1, rows)),
            "in_stock": pa.array(rng.random(rows) < 0.8),
            "category_path": paths.take(pa.array(chosen[0])),
        }
    )


def spread_trie(rows: int) -> Trie:
    space = DocidSpace(CODES)
    gap = np.random.default_rng(0).integers(1, max(2, int(1.96 * space.capacity / rows)), rows)
    return Trie.from_sorted(np.cumsum(gap), codes_per_level=CODES)


def boundaries(trie: Trie, level: int, beams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row boundaries M×(C + 1) of the children of random nodes, and which of the C are children."""
    rng, count = np.random.default_rng(level), trie.nodes(level)
    node_M = rng.choice(count, min(beams, count), replace=False)
    first_M, end_M = trie.child_start[level][node_M], trie.child_start[level][node_M + 1]
    child_MC1 = np.minimum(first_M[:, None] + np.arange(trie.widest[level] + 1), end_M[:, None])
    row_MC1 = trie.row_start[level + 1][child_MC1].astype(np.int64)
    return torch.from_numpy(row_MC1), torch.from_numpy(child_MC1[:, :-1] < end_M[:, None])


def looked_up(made: Filter, trie: Trie, beams: int, repeats: int) -> list[dict]:
    """Microseconds per level of both ways, and whether they agree."""
    tensors = made.tensors()
    cumulative = torch.nn.functional.pad(torch.from_numpy(made.allowed_N).cumsum(0), (1, 0))
    levels = []
    for level in range(trie.levels):
        row_MC1, child_MC = boundaries(trie, level, beams)
        start_MC, end_MC = row_MC1[:, :-1].contiguous(), row_MC1[:, 1:].contiguous()

        def ours(row_MC1=row_MC1):
            before_MC1 = allowed_before(tensors, row_MC1)
            return before_MC1[:, 1:] > before_MC1[:, :-1]

        def first_try(start_MC=start_MC, end_MC=end_MC):
            return cumulative[end_MC] > cumulative[start_MC]

        if not torch.equal(ours() & child_MC, first_try() & child_MC):
            raise SystemExit(f"level {level}: the two ways disagree about which children live")
        taken = in_turns({"ours": ours, "cumulative_sum": first_try}, turns=repeats)
        levels.append(medians(taken, unit=1e6) | {"children": list(child_MC.shape)})
    return levels


def step_costs(trie: Trie, made: Filter, beams: int, repeats: int) -> list[dict]:
    """Microseconds per level of finding the children of random nodes, with the filter and without."""
    arrays, kept, levels = tensors(trie, torch.device("cpu")), made.tensors(), []
    for level in range(trie.levels):
        rng, count = np.random.default_rng(level), trie.nodes(level)
        node_BM = torch.from_numpy(rng.choice(count, min(beams, count), replace=False))[None]
        alive_BM = torch.ones_like(node_BM, dtype=torch.bool)
        runs = {
            name: lambda filter_=filter_, node=node_BM, alive=alive_BM, level=level: arrays.children(
                level, (node,), alive, None, filter_
            )
            for name, filter_ in (("without", None), ("with", kept))
        }
        levels.append(medians(in_turns(runs, turns=5 * repeats), unit=1e6))
        levels[-1]["filter"] = levels[-1]["with"] - levels[-1]["without"]
    return levels


class Timed:
    """A decoder that notes when each step begins."""

    def __init__(self, decoder):
        self.decoder, self.begun = decoder, []

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def decode_step(self, *arguments):
        self.begun.append(time.perf_counter())
        return self.decoder.decode_step(*arguments)


def searched(model: str, trie: Trie, filters: list[Filter], beams: int, repeats: int) -> dict:
    """Whole searches, and the steps of one without a filter; milliseconds and microseconds."""
    from transformers import T5Config, T5ForConditionalGeneration

    from catid2_ray.retrieval.beam import constrained_beam_search
    from catid2_ray.retrieval.t5_decoder import T5Decoder

    torch.manual_seed(0)
    config = T5Config(vocab_size=32128 + sum(CODES), decoder_start_token_id=0, pad_token_id=0, **MODELS[model])
    network = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        # T5's own start gives nearly one-hot predictions; this spreads the beams over the trie.
        network.shared.weight *= 0.05
    decoder = Timed(T5Decoder(network, codes_per_level=CODES))
    query, steps = torch.randint(2, 32000, (len(filters), 16)), []

    def run(rows: int, allowed):
        part = query[:rows]
        decoder.begun.clear()
        constrained_beam_search(
            decoder, trie, part, torch.ones_like(part), beam_width=beams, top_k=beams, allowed=allowed
        )
        if rows == 1 and allowed is None:
            steps.append(np.diff([*decoder.begun, time.perf_counter()]))

    run(1, None)
    single = {"without": lambda: run(1, None), "with": lambda: run(1, filters[0])}
    batch = {"without": None, "one filter": filters[0], f"{len(filters)} filters": filters}
    batch = {name: lambda allowed=allowed: run(len(filters), allowed) for name, allowed in batch.items()}
    return {
        "search_ms": medians(in_turns(single, turns=repeats), unit=1e3),
        "batch_ms": medians(in_turns(batch, turns=max(3, repeats // 2)), unit=1e3),
        "step_us": [value * 1e6 for value in np.median(steps[1:], axis=0).tolist()],
    }


def rendered(report: dict) -> str:
    text = (
        f"# Filters\n\nWritten by `benchmarks/filters.py`: {report['rows']:,} products, {report['beams']} beams, one thread, "
        f"medians. Machine: {report['machine']}.\n\n"
    )
    names = ["filter", "allows", "compiling, ms", "look-up in all levels, µs", "… by a cumulative sum, µs"]
    rows = []
    for name, figures in report["compile"].items():
        levels = report["lookup_us_per_level"].get(name, [])
        sums = [sum(level[way] for level in levels) if levels else None for way in ("ours", "cumulative_sum")]
        rows.append([name, f"{figures['share_allowed']:.2%}", figures["ms"], *sums])
    text += table(names, rows)
    text += f"\nA cumulative sum takes {report['cumulative_sum_ms_per_request']} ms per request before it is asked.\n\n"
    rows = []
    for level, (cost, step) in enumerate(zip(report["children_us_per_level"], report.get("step_us", [None] * 9)), 1):
        rows.append([level, cost["without"], cost["with"], cost["filter"], step, step and cost["filter"] / step])
    text += table(["level", "children, µs", "… with the filter", "the filter", "step, µs", "share of the step"], rows)
    if "step_us" in report:
        met = "met" if report["goal_met"] else "not met"
        text += f"\nGoal: at most {GOAL:.0%} of a step; found {report['share_of_step']:.1%} at worst: {met}.\n\n"
        searches = {**report["search_ms"]}, {**report["batch_ms"]}
        text += f"Search of T5-{report['model']}, ms: {json.dumps(searches[0])}. Batch of 8, ms: {json.dumps(searches[1])}.\n"
    return text


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=whole, default=10**7, help="N")
    parser.add_argument("--beams", type=int, default=100)
    parser.add_argument("--model", default="base", choices=[*MODELS, "none"], help="whose search is timed beside")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table, trie = columns(options.rows), spread_trie(options.rows)
    start = time.perf_counter()
    index = FilterIndex(table, kept=0)
    report = {
        **where("filters"), "pyarrow": pa.__version__, "rows": options.rows, "beams": options.beams,
        "index_us_per_row": (time.perf_counter() - start) / options.rows * 1e6,
    }  # fmt: skip
    compiled = {name: index.compile(expression) for name, expression in EXPRESSIONS.items()}
    few = max(3, options.repeats // 6)
    functions = {name: lambda one=one: index.compile(one) for name, one in EXPRESSIONS.items()}
    milliseconds = medians(in_turns(functions, turns=few), unit=1e3)
    report["compile"] = {
        name: {"ms": milliseconds[name], "share_allowed": made.total / options.rows} for name, made in compiled.items()
    }
    made = compiled["in stock"]
    report["filter_bytes_per_row"] = (made.words_W.nbytes + made.before_W.nbytes) / options.rows
    allowed = torch.from_numpy(made.allowed_N)
    summed = {"sum": lambda: torch.nn.functional.pad(allowed.cumsum(0), (1, 0))}
    report["cumulative_sum_ms_per_request"] = medians(in_turns(summed, turns=few), unit=1e3)["sum"]
    report["lookup_us_per_level"] = {
        name: looked_up(compiled[name], trie, options.beams, options.repeats) for name in LOOKED_UP
    }
    costs = step_costs(trie, made, options.beams, options.repeats)
    report["children_us_per_level"] = costs
    if options.model != "none":
        report |= {"model": options.model} | searched(options.model, trie, list(compiled.values()), options.beams, few)
        shares = [cost["filter"] / step for cost, step in zip(costs, report["step_us"])]
        report |= {"share_of_step": max(shares), "goal_share": GOAL, "goal_met": max(shares) <= GOAL}
    report = rounded(report)
    for name, figures in report["compile"].items():
        print(f"{name}: {figures['ms']} ms, allows {figures['share_allowed']:.2%}")
    finish(report, rendered, options)


if __name__ == "__main__":
    main()
