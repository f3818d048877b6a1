"""Does injecting ground-truth IDs prevent the collapse that plain GRPO is said to have? Writes benchmarks/results/alignment.md.

    python benchmarks/alignment.py [--serving FOLDER --catalog ROOT] [--generator FOLDER] [--steps 200 | --minutes 5]
        [--ks 0,2,4] [--terms policy,pairs] [--seeds 3] [--kl-weights 1,0] [--learning-rate 2.5e-5] [--json FILE] [--render JSON]

One process, no Ray. `--serving` is a folder that a release is served from (generator/, trie/, products.arrow), `--catalog` the
folder with its pairs.parquet, `--generator` another saved generator for the same trie. Without them: the quickstart catalogue
with IDs by residual k-means and a small T5 that is trained first (kept in --work). Every cell (k, KL weight) starts from the
same weights and sees, for a seed, the same prompts in the same order; figures are those of
`evaluation.alignment_report.MEASURED` on queries of --split that no training saw. The last line printed is one JSON object.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from harness import RESULTS, finish, machine, parser_of, rounded, spread, table

from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import LsaEncoder, join_text
from catid2_ray.docid import DocidSpace
from catid2_ray.evaluation.alignment_report import MEASURED, measure
from catid2_ray.generator.batches import Examples
from catid2_ray.generator.eg_grpo import Objective, align
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.rewards import judged_rows, relevance_rewards
from catid2_ray.generator.saved import load_generator, save_generator
from catid2_ray.generator.step import fit
from catid2_ray.generator.vocabulary import starts_word, tokenize, train_tokenizer, with_docid_tokens
from catid2_ray.identifiers.collisions import assign_unique
from catid2_ray.quantizer.kmeans import nearest, residual_kmeans
from catid2_ray.retrieval.environment import Environment, Rules
from catid2_ray.retrieval.trie import Trie

SYNTHETIC_CODES = (32, 32, 32, 32)
_TEACHES = {"synthetic": 2.0}


@dataclass(frozen=True)
class World:
    """`packed_N`, `product_ids`: the IDs of the catalogue, one per product."""

    name: str
    model: torch.nn.Module
    tokenizer: object
    trie: Trie
    product_ids: pa.Array
    packed_N: np.ndarray
    pairs: pa.Table


def served(options) -> World:
    folder = Path(options.serving)
    model, tokenizer = load_generator(Path(options.generator) if options.generator else folder / "generator")
    trie = Trie.open(folder / "trie")
    products = pa.ipc.open_file(pa.memory_map(str(folder / "products.arrow"))).read_all()["product_id"].combine_chunks()
    leaves = np.arange(trie.nodes(trie.levels))
    packed_N = np.repeat(
        DocidSpace(tuple(trie.codes_per_level)).pack(trie.prefixes(trie.levels, leaves)),
        np.diff(np.asarray(trie.row_start[-1])),
    )
    return World(
        Path(options.catalog).name, model, tokenizer, trie, products, packed_N,
        pq.read_table(Path(options.catalog) / "pairs.parquet"),
    )  # fmt: skip


def synthetic(work: Path, *, sft_steps: int) -> World:
    """The quickstart catalogue; its trained generator is kept in `work`."""
    catalogue = generate(products=6000, queries=2500, seed=7)
    texts, space = join_text(catalogue.products, ("title", "category_path", "description")), DocidSpace(SYNTHETIC_CODES)
    vector_ND = torch.from_numpy(
        np.asarray(LsaEncoder.fit(texts, width=32, vocabulary=20_000, seed=0).encode(texts), np.float32)
    )
    books = residual_kmeans(vector_ND, codes_per_level=SYNTHETIC_CODES, seed=0)
    residual_NZ, codes = vector_ND, []
    for level, book_KZ in enumerate(books):
        codes.append(nearest(residual_NZ, book_KZ))
        if level < len(books) - 1:
            residual_NZ = residual_NZ - book_KZ[codes[-1]]
    ids = catalogue.products["product_id"].combine_chunks()
    codes_NL = assign_unique(
        torch.stack(codes, 1).numpy(), residual_NZ.numpy(), [book.numpy() for book in books],
        ids, method="greedy",
    ).codes_NL  # fmt: skip
    folder = work / f"generator-{sft_steps}"
    if not folder.exists():
        train_first(folder, catalogue, ids, codes_NL, space, steps=sft_steps)
    model, tokenizer = load_generator(folder)
    packed_N = space.pack(codes_NL)
    trie = Trie.build(codes_NL, codes_per_level=SYNTHETIC_CODES)
    return World("synthetic", model, tokenizer, trie, ids, packed_N, catalogue.pairs)


def train_first(folder: Path, catalogue, ids, codes_NL, space: DocidSpace, *, steps: int) -> None:
    titles = catalogue.products["title"].to_pylist()
    pairs = catalogue.pairs.filter((pc.field("split") == "train") & (pc.field("relevance") >= _TEACHES["synthetic"]))
    tokenizer = with_docid_tokens(train_tokenizer([*titles, *pairs["query"].to_pylist()], size=2000), space)
    place_P = pc.index_in(pairs["product_id"], ids).to_numpy()
    texts = {"query": pairs["query"].to_pylist(), "title": titles}
    examples = Examples(
        {kind: tokenize(tokenizer, values, length=24) for kind, values in texts.items()},
        {"query": codes_NL[place_P], "title": codes_NL}, starts_word_V=starts_word(tokenizer), keep=0.4,
    )  # fmt: skip
    model = small_t5(
        vocabulary=len(tokenizer) - sum(space.codes_per_level), width=128, layers=2, heads=4, feed_forward=384,
        dropout=0.0, codes_per_level=space.codes_per_level,
    )  # fmt: skip
    fit(model, examples, space=space, steps=steps, batch=256, learning_rate=2e-3)
    save_generator(model, tokenizer, folder)


def prompts_of(world: World, *, split: str, relevant_from: float, length: int) -> tuple[Callable, int]:
    """Prompts of one split by their rows, and how many there are."""
    grades = pc.min_max(world.pairs.filter(pc.field("split") == "train")["relevance"]).as_py()
    pairs = world.pairs.filter(pc.field("split") == split)
    place = pc.index_in(pairs["product_id"], world.product_ids).combine_chunks()
    pairs, place_P = pairs.filter(place.is_valid()), place.drop_null().to_numpy()
    names, first_Q, query_P = np.unique(
        pairs["query_id"].to_numpy().astype(str), return_index=True, return_inverse=True
    )
    relevance_P = pairs["relevance"].to_numpy()
    reward_P = relevance_rewards(relevance_P, grades=None, low=grades["min"], high=grades["max"])
    rows = judged_rows(
        query_P, world.packed_N[place_P], reward_P, relevance_P >= relevant_from, queries=len(names), width=64
    )
    texts = pairs["query"].take(pa.array(first_Q)).to_pylist()
    columns = {
        "input_ids": torch.from_numpy(tokenize(world.tokenizer, texts, length=length)).long(),
        "judged": torch.from_numpy(rows.judged_QJ), "reward": torch.from_numpy(rows.reward_QJ),
        "relevant": torch.from_numpy(rows.relevant_QJ), "number": torch.arange(len(names)),
    }  # fmt: skip
    device = next(world.model.parameters()).device

    def take(at: np.ndarray) -> dict[str, torch.Tensor]:
        prompts = {name: values[torch.as_tensor(at)].to(device) for name, values in columns.items()}
        used = int((prompts["input_ids"] != world.tokenizer.pad_token_id).any(0).sum())
        return prompts | {"input_ids": prompts["input_ids"][:, :used]}

    return take, len(names)


def run_cell(world: World, environment: Environment, objective: Objective, options, seed: int) -> dict:
    """One alignment from the world's weights: figures before and after, of the last steps, and seconds."""
    train, count = prompts_of(world, split="train", relevant_from=options.relevant_from, length=options.tokens)
    judge, judged = prompts_of(world, split=options.split, relevant_from=options.relevant_from, length=options.tokens)
    judged = min(judged, options.queries)
    reference, model = world.model, copy.deepcopy(world.model)

    def figures(of) -> dict[str, float]:
        return measure(of, reference, environment, judge, count=judged, seed=seed)

    before, start = figures(model), time.monotonic()
    history = align(
        model, prompts=train, count=count, objective=objective, space=environment.space, steps=options.steps,
        experience=lambda batch, at: environment.experience(model, reference, batch, objective=objective, seed=at),
        batch=options.batch, updates=options.updates, learning_rate=options.learning_rate, seed=seed,
        stop=lambda step: bool(options.minutes) and time.monotonic() - start > 60 * options.minutes,
    )  # fmt: skip
    seconds, tail = time.monotonic() - start, history[-max(1, len(history) // 10) :]
    training = {name: float(np.mean([record[name] for record in tail])) for name in history[0]}
    return {
        "term": objective.term, "k": objective.injected, "kl_weight": objective.kl_weight,
        "seed": seed, "steps": len(history), "seconds": seconds,
        "before": before, "after": figures(model), "training": training,
        "curve": [[record["reward"], record["kl"], record["entropy"]] for record in history[:: max(1, len(history) // 20)]],
    }  # fmt: skip


def report(figures: dict) -> str:
    runs = figures["runs"]
    cells = list(dict.fromkeys((run.get("term", "policy"), run["k"], run["kl_weight"]) for run in runs))
    of_cell = {
        cell: [run for run in runs if (run.get("term", "policy"), run["k"], run["kl_weight"]) == cell] for cell in cells
    }

    def row(name: str, measured: list[dict]) -> list[str]:
        return [name, *(spread([each[of.key] for each in measured], of.form) for of in MEASURED)]

    names = {
        (term, k, weight): f"{'pairs, ' if term == 'pairs' else ''}k = {k}, KL weight {weight:g}" for term, k, weight in cells
    }  # fmt: skip
    rows = [row("before", [run["before"] for run in runs])]
    rows += [
        row(
            names[cell].replace("k = 0,", "k = 0 (plain GRPO),") if cell[0] == "policy" else names[cell],
            [run["after"] for run in of_cell[cell]],
        )
        for cell in cells
    ]
    flat = "; ".join(
        f"{names[cell]}: {spread([run['training']['without_variance'] for run in of_cell[cell]], '.1%')}"
        for cell in cells
    )
    settings, steps = figures["settings"], "–".join(f"{count:,}" for count in sorted({run["steps"] for run in runs}))
    return (
        f"# Alignment on {figures['name']}\n\n"
        f"Written by `benchmarks/alignment.py`: {figures['generator']}; {steps} steps of "
        f"{settings['batch']} queries, group {settings['group']}, learning rate {settings['learning_rate']:g}, rollouts by "
        f"{settings['source']}, groups {settings['form']}, expert cap {settings['expert_cap']:g}; "
        f"{len({run['seed'] for run in runs})} seeds, mean ± half their range; "
        f"{np.mean([run['seconds'] for run in runs]):.0f} s of training a run. Measured on "
        f"{runs[0]['after']['queries']:,} queries of {settings['split']}. Machine: {figures['machine']}.\n\n"
        + table(["", *(of.heading for of in MEASURED)], rows)
        + f"\nGroups without variance in the last tenth of training, experts included: {flat}.\n\n"
        + "\n".join(f"- {of.heading}: {of.reading}" for of in MEASURED)
    )  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = parser_of(__doc__, page=RESULTS / "alignment.md", stored="the figures of an earlier run")
    parser.add_argument("--serving", help="folder with generator/, trie/ and products.arrow")
    parser.add_argument("--catalog", help="folder with pairs.parquet")
    parser.add_argument("--generator", help="another saved generator for that trie")
    parser.add_argument("--work", help="where the synthetic generator is kept; default a temporary folder")
    parser.add_argument("--sft-steps", type=int, default=800, help="training of the synthetic generator")
    parser.add_argument("--ks", default="0,2,4")
    parser.add_argument("--terms", default="policy", help="policy, pairs")
    parser.add_argument("--beta", type=float, default=0.1, help="of pairs")
    parser.add_argument("--kl-weights", default="1,0")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=0.0, help="ends a run early; 0 = no limit")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--source", default="sample", choices=("sample", "beam"))
    parser.add_argument("--form", default="widened", choices=("widened", "fixed"))
    parser.add_argument("--learning-rate", type=float, default=2.5e-5)
    parser.add_argument("--expert-cap", type=float, default=1.0, help="0 = none")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--relevant-from", type=float, default=2.0, help="grade; Home Depot's recipe has 2.67")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def measured(options, work: Path) -> dict:
    world = served(options) if options.serving else synthetic(work, sft_steps=options.sft_steps)
    world = replace(world, model=world.model.to(options.device).eval())
    rules = Rules(group=options.group, source=options.source)
    environment, runs = Environment(world.trie, rules), []
    weights, ks = map(float, options.kl_weights.split(",")), [int(k) for k in options.ks.split(",")]
    cells = [(term, k, weight) for weight in weights for term in options.terms.split(",") for k in ks]
    for seed in range(options.seeds):
        for term, k, weight in cells:
            objective = Objective(
                term=term,
                beta=options.beta,
                injected=k,
                form=options.form,
                kl_weight=weight,
                expert_cap=options.expert_cap or None,
            )
            runs.append(run_cell(world, environment, objective, options, seed))
            print(json.dumps(rounded({key: runs[-1][key] for key in ("k", "kl_weight", "seed", "seconds", "after")})))
    size = sum(weight.numel() for weight in world.model.parameters())
    settings = asdict(rules) | {
        name: getattr(options, name) for name in ("batch", "updates", "learning_rate", "split", "form", "expert_cap")
    }
    return rounded(
        {"name": world.name, "generator": f"{type(world.model).__name__} of {size / 1e6:.1f} M weights", "settings": settings,
         "machine": machine(options.device), "runs": runs}
    )  # fmt: skip


def main() -> None:
    options = parsed()
    if bool(options.serving) != bool(options.catalog):
        print(json.dumps({"skipped": "--serving and --catalog go together: give both, or neither"}))
        return
    torch.set_num_threads(1)
    if options.render:
        figures = json.loads(options.render.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = measured(options, Path(options.work or folder))
    finish(figures, report, options)


if __name__ == "__main__":
    main()
