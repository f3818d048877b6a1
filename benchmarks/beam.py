"""How fast the constrained beam search is: beside `generate` with a dictionary trie and beside its bare matrix products.

    python benchmarks/beam.py [--model base] [--beam 10,50,100] [--batch 1,8,32] [--ids 1e5,1e6] [--threads 2]
        [--json FILE] [--out benchmarks/results/beam.md]

Unusual: the contenders take turns, one search each, and medians are compared, because machines are noisy; the fastest
turn stands beside each median. A case is one number of IDs, one beam and one batch; in it stand
    float32         `constrained_beam_search`, encoder included
    int8            the same with `T5Decoder(…, weights="int8")` (CPU only)
    hugging_face    `generate` with `prefix_allowed_tokens_fn` walking nested dictionaries, length_penalty 0
    unconstrained   `generate` without it
    products        the decoder's matrix products alone: every layer, step and level's head, cross-attention keys and
                    values once per query; no encoder, no attention, no search
    one_by_one      `constrained_beam_search` with the batch's first query alone (float32), for queries per second
    one_by_one_int8 the same with int8
Before timing, float32 (over the vocabulary) and `generate` must name the same IDs. The model has random weights of T5's
shapes, 32,128 words + 4 × 256 codes; IDs are random; a query has --tokens tokens. More threads than free cores make
every contender many times slower: choose --threads for the machine. --out writes all cases with the goals beside the
figures; a goal is asked of the case that the issue names, and of no other. int8_overlap: the mean share of float32's best
`beam` IDs that int8 finds (random weights; that of a trained generator is in benchmarks/results/retrieval.md). The last
line printed is one JSON object.

Shape letters: B batch, T query tokens, M beams, D width, R rows.
"""

import json
import statistics

import numpy as np
import torch
from harness import finish, in_turns, medians, parser_of, rounded, table, where, wholes
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie

CODES, WORDS = (256,) * 4, 32128
SHAPES = {
    "tiny": {"d_model": 256, "d_ff": 1024, "num_layers": 4, "num_heads": 4, "d_kv": 64},
    "small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "d_kv": 64},
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64},
}
# Of the issue: (what, figure, where it is asked: model, beam, batch; the bound, and whether it is a least or a most).
GOALS = [
    ("time of `generate` over ours", "speed_over_hugging_face", ("base", 100, 1), 3.5, "at least"),
    ("our time over the products alone", "time_over_products", ("base", 100, 1), 1.4, "at most"),
    ("time of `generate` over ours, int8", "int8_speed_over_hugging_face", ("base", 100, 1), 5.0, "at least"),
    ("queries/s of 32 at once over one by one, beam 100", "throughput_over_one_by_one", ("base", 100, 32), 1.3, "at least"),
    ("queries/s of 32 at once over one by one, beam 10", "throughput_over_one_by_one", ("base", 10, 32), 2.0, "at least"),
]  # fmt: skip
GPU_GOALS = [
    ("time of `generate` over ours", "speed_over_hugging_face", ("base", 100, 1), 30.0, "at least"),
    ("median search, ms", "ms", ("base", 50, 1), 10.0, "at most"),
]


def random_model(name: str, device: str, dtype: torch.dtype) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=WORDS + sum(CODES), decoder_start_token_id=0, pad_token_id=0, **SHAPES[name])
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        # T5's own start gives nearly one-hot predictions; this spreads the scores over the candidates.
        model.shared.weight *= 0.05
    return model.to(device, dtype)


def random_ids(count: int) -> np.ndarray:
    packed = np.random.default_rng(0).choice(256**4, int(count * 1.01), replace=True)
    packed = np.random.default_rng(1).permutation(np.unique(packed))[:count]
    return packed[:, None] // 256 ** np.arange(3, -1, -1) % 256


def nested(ids: np.ndarray) -> dict:
    """The trie that people write first: dictionaries of dictionaries, by token id."""
    root = {}
    for row in (ids + WORDS + 256 * np.arange(4)).tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root


def generate(model, ids_BT, mask_BT, beams: int, root: dict | None):
    def children(_, tokens):
        node = root
        for token in tokens.tolist()[1:]:
            node = node[token]
        return list(node)

    return model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        num_beams=beams,
        num_return_sequences=beams,
        min_new_tokens=4,
        max_new_tokens=4,
        length_penalty=0.0,
        do_sample=False,
        prefix_allowed_tokens_fn=None if root is None else children,
    )


def products(model, batch: int, tokens: int, beams: int):
    """A callable that runs the decoder's matrix products and nothing else."""
    weights, queried = [], []
    for block in model.decoder.block:
        own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        dense = block.layer[2].DenseReluDense
        weights += [part.weight for part in (own.q, own.k, own.v, own.o, cross.q, cross.o, dense.wi, dense.wo)]
        queried += [cross.k.weight, cross.v.weight]
    weights.append(model.lm_head.weight[-256:])
    like, rows = {"dtype": model.dtype, "device": model.device}, [batch, *[batch * beams] * 3]
    widths = {model.config.d_model, model.config.d_ff, model.config.num_heads * model.config.d_kv}
    inputs = {(r, width): torch.randn(r, width, **like) for r in {*rows, batch * tokens} for width in widths}

    @torch.inference_mode()
    def run():
        for weight in queried:
            functional.linear(inputs[batch * tokens, weight.shape[1]], weight)
        for r in rows:
            for weight in weights:
                functional.linear(inputs[r, weight.shape[1]], weight)

    return run


def check(model, decoder: T5Decoder, trie: Trie, root: dict, ids_BT, mask_BT) -> None:
    """Refuse to time searches that do not agree (a rare swap of nearly equal scores at the beam's edge is let pass)."""
    found = constrained_beam_search(decoder, trie, ids_BT, mask_BT, beam_width=50, top_k=50, normalize="vocabulary")
    theirs = generate(model, ids_BT, mask_BT, 50, root)[:, 1:].cpu() - torch.tensor([WORDS + 256 * i for i in range(4)])
    shared = {*map(tuple, theirs.tolist())} & {*map(tuple, found.docid_BKL[0].tolist())}
    if len(shared) < 49:
        raise SystemExit(f"the search and generate share only {len(shared)} of 50 IDs; they must find the same")


def overlap(decoders: dict, trie: Trie, ids_BT, mask_BT, beams: int) -> float:
    """Mean share of float32's best `beams` IDs that int8 finds too."""
    found = [
        constrained_beam_search(decoder, trie, ids_BT, mask_BT, beam_width=beams, top_k=beams).docid_BKL.tolist()
        for decoder in (decoders["float32"], decoders["int8"])
    ]
    return statistics.mean(len({*map(tuple, a)} & {*map(tuple, b)}) / len(a) for a, b in zip(*found))


def measure(model, decoders: dict, trie: Trie, root: dict, query, beams: int, options) -> dict:
    """One case: medians and fastest turns in seconds, and their ratios."""
    ids_BT, mask_BT = query
    batch, tokens = ids_BT.shape

    def ours(weights: str, rows: int):
        chosen = ids_BT[:rows], mask_BT[:rows]
        return lambda: constrained_beam_search(decoders[weights], trie, *chosen, beam_width=beams, top_k=beams)

    runs = {weights: ours(weights, batch) for weights in decoders}
    runs["products"] = products(model, batch, tokens, beams)
    if batch > 1:
        runs |= {"one_by_one" if w == "float32" else f"one_by_one_{w}": ours(w, 1) for w in decoders}
    if batch <= options.hugging_face_batch:
        runs["hugging_face"] = lambda: generate(model, ids_BT, mask_BT, beams, root)
        runs["unconstrained"] = lambda: generate(model, ids_BT, mask_BT, beams, None)
    in_turns(runs, turns=1, device=options.device)
    taken = in_turns(runs, turns=options.turns, device=options.device)
    middle = medians(taken)
    ratios = {"time_over_products": middle["float32"] / middle["products"]}
    for weights, prefix in (("float32", ""), ("int8", "int8_")):
        if weights in runs and "hugging_face" in runs:
            ratios[f"{prefix}speed_over_hugging_face"] = middle["hugging_face"] / middle[weights]
            ratios[f"{prefix}speed_over_unconstrained"] = middle["unconstrained"] / middle[weights]
        if weights in runs and batch > 1:
            single = middle["one_by_one" + ("" if weights == "float32" else "_int8")]
            ratios[f"{prefix}throughput_over_one_by_one"] = batch * single / middle[weights]
    if "int8" in runs:
        ratios["int8_overlap"] = overlap(decoders, trie, ids_BT, mask_BT, beams)
    return {
        "ids": trie.rows, "beam": beams, "batch": batch, "turns": options.turns, "seconds": middle,
        "fastest": {name: min(times) for name, times in taken.items()},
        "queries_per_s": {name: batch / middle[name] for name in decoders}, "ratios": ratios,
    }  # fmt: skip


def goals_of(model: str, device: str, cases: list[dict]) -> list[dict]:
    """Every goal asked of a case that was run: bound, figure, met."""
    goals = []
    for what, figure, (asked, beam, batch), bound, sense in GOALS if device == "cpu" else GPU_GOALS:
        for case in cases if model == asked else []:
            value = case["seconds"]["float32"] * 1e3 if figure == "ms" else case["ratios"].get(figure)
            if (case["beam"], case["batch"]) == (beam, batch) and value is not None:
                met = value >= bound if sense == "at least" else value <= bound
                goals.append(
                    {"goal": what, "ids": case["ids"], "sense": sense, "bound": bound, "found": value, "met": met}
                )
    return goals


def rendered(report: dict) -> str:
    names = ["IDs", "beam", "batch", "float32, ms", "int8, ms", "`generate`, ms", "unconstrained, ms", "products, ms"]
    names += ["`generate` / ours", "`generate` / int8", "ours / products", "× one by one"]
    names += ["× one by one, int8", "int8 overlap"]
    rows = []
    for case in report["cases"]:
        milliseconds = {name: seconds * 1e3 for name, seconds in case["seconds"].items()}
        timed = [milliseconds.get(name) for name in ("float32", "int8", "hugging_face", "unconstrained", "products")]
        keys = ("speed_over_hugging_face", "int8_speed_over_hugging_face", "time_over_products")
        keys += ("throughput_over_one_by_one", "int8_throughput_over_one_by_one", "int8_overlap")
        rows.append([case["ids"], case["beam"], case["batch"], *timed, *(case["ratios"].get(key) for key in keys)])
    goals = [
        [goal["goal"], goal["ids"], f"{goal['sense']} {goal['bound']}", goal["found"], goal["met"]]
        for goal in report["goals"]
    ]
    turns = " or ".join(map(str, sorted({case["turns"] for case in report["cases"]})))
    return (
        f"# The beam search, T5-{report['model']}\n\nWritten by `benchmarks/beam.py`: medians of {turns} "
        f"turns, {report['threads']} threads, {report['tokens']} query tokens, {report['dtype']} on "
        f"{report['device']}, random weights. The search includes the encoder, *products* are the decoder's matrix "
        f"products alone. Machine: {report['machine']}, torch {report['torch']}.\n\n"
        + table(names, rows)
        + (
            "\n" + table(["goal", "IDs", "asked", "found", "met"], goals)
            if goals
            else "\nNo goal is set for these cases.\n"
        )
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="base")
    parser.add_argument("--beam", type=wholes, default=[10, 50, 100])
    parser.add_argument("--batch", type=wholes, default=[1, 8, 32])
    parser.add_argument("--ids", type=wholes, default=[10**5, 10**6])
    parser.add_argument("--tokens", type=int, default=16, help="T, of every query")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hugging-face-batch", type=int, default=1, help="`generate` runs in batches up to this")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all but int8")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_model(options.model, options.device, getattr(torch, options.dtype))
    kinds = ["float32", "int8"] if options.device == "cpu" else ["float32"]
    decoders = {kind: T5Decoder(model, codes_per_level=CODES, weights=kind) for kind in kinds}
    query = torch.randint(2, WORDS, (max(options.batch), options.tokens)).to(options.device)
    cases = []
    for count in options.ids:
        ids = random_ids(count)
        trie, root = Trie.build(ids, codes_per_level=CODES), nested(ids)
        if options.dtype == "float32":
            check(model, decoders["float32"], trie, root, query[:1], torch.ones_like(query[:1]))
        for beams in options.beam:
            for batch in options.batch:
                part = query[:batch]
                case = measure(model, decoders, trie, root, (part, torch.ones_like(part)), beams, options)
                cases.append(rounded(case))
                print(f"{count} IDs, beam {beams}, batch {batch}: {json.dumps(cases[-1]['seconds'])}", flush=True)
                print(f"    {json.dumps(cases[-1]['ratios'])}", flush=True)
    report = {
        **where("beam", device=options.device, threads=options.threads), "model": options.model, "device": options.device,
        "dtype": options.dtype, "tokens": options.tokens, "cases": cases,
        "goals": goals_of(options.model, options.device, cases),
    }  # fmt: skip
    finish(report, rendered, options)


if __name__ == "__main__":
    main()
