"""Generators on a real catalogue: learning curves and recall for several kinds of IDs at equal budgets.

    python benchmarks/generator.py --catalog DATA/home_depot --encoder MODELS/all-MiniLM-L6-v2 --store STORE
        --kinds cat_id2,tiger,cat_id2_shuffled --seeds 3 --examples 1500000 [--ids-seed 0] [--head dense | experts] [--teacher 0.5]
        [--loss trie] [--cache FOLDER] [--runs RUNS] [--keep FOLDER] [--render]

STORE is one in which `catid2 compare-ids` or `reindex` assigned IDs of these kinds and seeds. Model: the pretrained text encoder,
frozen, its token states cached once for all cells, and a T5 decoder of our own. A cell (kind, seed) is one process and one thread;
cells that are done or begun (RUNS/*.json) are not run again, so several processes can share a grid. `--teacher`: share of the
query examples whose product is drawn from the nearest ones (`generator/teacher.py`), in place of a labelled one. Two arms of
equal IDs, seeds and examples are compared by the paired bootstrap over queries. The last line printed is the JSON of all cells.
"""

import functools
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from harness import RESULTS, finish, machine, parser_of, rounded, spread, table, write_page

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.docid import DocidSpace
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.evaluation.protocol import Judgements, evaluate, per_query_recalls
from catid2_ray.generator.batches import Examples
from catid2_ray.generator.encoder_decoder import encoder_decoder
from catid2_ray.generator.logits import READ_VECTORS, with_head
from catid2_ray.generator.saved import save_generator
from catid2_ray.generator.states import StateCache
from catid2_ray.generator.step import fit, level_losses
from catid2_ray.generator.teacher import Nearest, drawn, shares
from catid2_ray.generator.vocabulary import load_tokenizer, marks, starts_word, tokenize
from catid2_ray.hashing import hash_of_text, uniform
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.vectors import ProductVectors, adapted_queries, open_adapter
from catid2_ray.on_ray.stages.assign.buckets import codebooks
from catid2_ray.on_ray.stages.assign.work import open_coder
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import continuations

TRAIN_FROM, RELEVANT_FROM = 2.33, 2.67
KS = (5, 10, 50, 100)
BEGINS = ("quantizer", "adapter")  # what a head that reads vectors begins from
TOKENS, BEAM, CODES = 32, 100, 256
VALIDATION_QUERIES, VALIDATION_PAIRS = 300, 1024
DRAWS = 4  # a teacher's, for each pair of a query


def load_data(options) -> dict:
    """Tables of the catalogue, its tokenised texts, judgements; the same for every cell."""
    root = Path(options.catalog)
    products = pq.read_table(root / "products.parquet", columns=["product_id", "title"])
    pairs = pq.read_table(root / "pairs.parquet")
    names = products["product_id"].combine_chunks()
    train = training_pairs(pairs, TRAIN_FROM)
    place_P = pc.index_in(train["product_id"], names).to_numpy(zero_copy_only=False)
    known_P = ~np.isnan(place_P.astype(float))
    tokenizer = load_tokenizer(options.encoder, kind="encoder_decoder")
    queries = [query for query, known in zip(train["query"].to_pylist(), known_P) if known]
    seen = train["product_id"].unique()
    judged = {
        split: Judgements.from_pairs(pairs, split=split, min_relevance=RELEVANT_FROM, seen=seen, known=names)
        for split in ("validation", "test")
    }
    return {
        "products": products, "names": names.to_numpy(zero_copy_only=False), "tokenizer": tokenizer,
        "queries": queries, "product_P": place_P[known_P].astype(np.int64),
        "query_PT": tokenize(tokenizer, queries, length=TOKENS),
        "title_NT": tokenize(tokenizer, products["title"].to_pylist(), length=TOKENS), "judged": judged,
    }  # fmt: skip


def ids_of(options, kind: str, seed: int, names: np.ndarray) -> np.ndarray:
    """int64 N×L, the IDs that `compare-ids` gave the products, in the order of `names`."""
    store, manifest = Store(options.store), ids_manifest(options, kind, seed)
    parts = [store.read_table(manifest.file(part["name"])) for part in manifest.parts()]
    codes = pa.concat_tables([part.select(["product_id", "codes"]) for part in parts])
    row_N = pc.index_in(pa.array(names), codes["product_id"].combine_chunks()).to_numpy()
    return matrix(codes["codes"]).astype(np.int64)[row_N]


def beginning(options, kind: str, seed: int) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The codewords and the adapter's W (None without one) that the IDs were made with."""
    store, parents = Store(options.store), ids_manifest(options, kind, seed).parents
    of = {
        role: next(m for m in manifests(store, role) if m.digest == parents[role]) for role in BEGINS if role in parents
    }
    linear = open_adapter(store, of.get("adapter"))
    return codebooks(open_coder(store, of["quantizer"])), None if linear is None else linear.query_DD.detach().numpy()


def taught(options, data: dict, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and products' places of the teacher's examples: of each query DRAWS for each of its pairs."""
    store, parents = Store(options.store), ids_manifest(options, kind, seed).parents
    found = {
        role: next(m for m in manifests(store, role) if m.digest == parents[role])
        for role in ("embeddings", "adapter") if role in parents
    }  # fmt: skip
    vectors = ProductVectors.of(store, found)
    encode = adapted_queries(
        HuggingFaceEncoder(options.encoder, batch=64, tokens=64).encode, open_adapter(store, found.get("adapter"))
    )
    queries, count_Q = np.unique(np.array(data["queries"], object), return_counts=True)
    tables = [vectors.read(part["name"], ["product_id", "embedding"]) for part in found["embeddings"].parts()]
    products = pa.concat_tables(tables)
    row_N = pc.index_in(pa.array(data["names"]), products["product_id"].combine_chunks()).to_numpy()
    nearest = Nearest(encode(queries.tolist()))
    nearest.show(matrix(products["embedding"])[row_N], 0)
    query_C, place_C = drawn(shares(nearest.score_QM), DRAWS * count_Q, uniform(hash_of_text(queries), seed, 10))
    return tokenize(data["tokenizer"], queries.tolist(), length=TOKENS)[query_C], nearest.row_QM[query_C, place_C]


def ids_manifest(options, kind: str, seed: int) -> Manifest:
    seed = seed if options.ids_seed is None else options.ids_seed
    for manifest in manifests(Store(options.store), "ids"):
        if manifest.recipe["quantizer"]["kind"] == kind and manifest.recipe["seed"] == seed:
            return manifest
    raise SystemExit(f"no IDs of kind {kind!r} and seed {seed} in {options.store}: run `catid2 compare-ids` first")


def manifests(store: Store, role: str) -> list[Manifest]:
    return [
        Manifest(**json.loads(path.read_text()))
        for path in sorted(Path(store.path(f"artifacts/{role}")).glob("*/manifest.json"))
    ]


def ranked(model, trie: Trie, data: dict, queries: list[str], normalize: str) -> list[list[str]]:
    """The products of the best 100 IDs of each query."""
    ids_BT = tokenize(data["tokenizer"], queries, length=TOKENS)
    decoder, answers = decoder_for(model, codes_per_level=trie.codes_per_level), []
    for start in range(0, len(queries), 32):
        part_BT = ids_BT[start : start + 32]
        mask_BT = part_BT != data["tokenizer"].pad_token_id
        used = int(mask_BT.any(0).sum())
        beams = constrained_beam_search(
            decoder, trie, part_BT[:, :used], mask_BT[:, :used], beam_width=BEAM, top_k=max(KS), normalize=normalize
        )
        rows = beams.row_range_BK2[..., 0].tolist()
        answers += [
            data["names"][trie.order_N[row[:count]]].tolist() for row, count in zip(rows, beams.count_B.tolist())
        ]
    return answers


def recalls(model, trie: Trie, data: dict, split: str, normalize: str, most: int | None = None) -> dict:
    judged = data["judged"][split]
    if most and most < len(judged.queries):
        chosen = np.sort(np.random.default_rng(0).permutation(len(judged.queries))[:most])
        columns = ("query_ids", "queries", "relevant", "seen", "unseen")
        judged = Judgements(**{c: [getattr(judged, c)[i] for i in chosen] for c in columns}, dropped_pairs=0)
    found = {"beam": ranked(model, trie, data, judged.queries, normalize)}
    figures = evaluate(judged, found, KS)
    return {group: figures[group]["beam"] for group in ("recall", "recall_seen", "recall_unseen")} | {
        "queries": figures["queries"], "by_query": per_query_recalls(judged, found, KS)["all"]["beam"].tolist(),
    }  # fmt: skip


def check_pairs(data: dict, codes_NL: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and codes of VALIDATION_PAIRS pairs of a validation query and a product relevant to it."""
    judged, row_of = data["judged"]["validation"], {name: row for row, name in enumerate(data["names"])}
    pairs = [(query, row_of[name]) for query, names in zip(judged.queries, judged.relevant) for name in sorted(names)]
    chosen = np.random.default_rng(0).permutation(len(pairs))[:VALIDATION_PAIRS]
    ids_BT = tokenize(data["tokenizer"], [pairs[i][0] for i in chosen], length=TOKENS)
    return torch.from_numpy(ids_BT).long(), torch.from_numpy(codes_NL[[pairs[i][1] for i in chosen]])


def run_cell(options, data: dict, kind: str, seed: int) -> dict:
    """Train one cell and score it; writes nothing but its model where `--keep` asks for it."""
    codes_NL = ids_of(options, kind, seed, data["names"])
    space = DocidSpace(tuple([CODES] * codes_NL.shape[1]))
    trie = Trie.build(codes_NL, codes_per_level=space.codes_per_level)
    model = with_head(encoder_decoder(
        options.encoder, width=options.width, layers=options.layers, heads=options.width // 64,
        feed_forward=4 * options.width, dropout=options.dropout, codes_per_level=space.codes_per_level, seed=seed,
    ), options.head, seed=seed)  # fmt: skip
    if options.head in READ_VECTORS:
        getattr(model, options.head).begin(*beginning(options, kind, seed))
    inputs = {"query": data["query_PT"], "title": data["title_NT"]}
    codes, ratio = {"query": codes_NL[data["product_P"]], "title": codes_NL}, {"title": options.titles}
    if options.teacher:
        inputs["teacher"], row_C = taught(options, data, kind, seed)
        codes["teacher"] = codes_NL[row_C]
        ratio |= {"query": 1 - options.teacher, "teacher": options.teacher * len(data["query_PT"]) / len(row_C)}
    examples = Examples(
        input_ids=inputs, codes=codes, ratio=ratio,
        starts_word_V=starts_word(data["tokenizer"]), keep=options.keep_words, drop_share=options.drop_share,
        **marks(data["tokenizer"])._asdict(),
    )  # fmt: skip
    folders = [Path(options.cache) / name for name in ("states", "states-taught")]
    known = [StateCache(folder) for folder in folders if (folder / "cache.json").exists()]
    cached = examples.with_states(
        model.encoder, folders[options.teacher > 0], known=known[0] if known else None, on_progress=said
    )
    steps = options.examples // options.batch
    check_BT, check_BL = check_pairs(data, codes_NL)
    normalize = "trie" if options.loss == "trie" else "level"
    curve, losses, began, paused = [], [], time.process_time(), 0.0

    def watch(step: int, loss: float) -> None:
        nonlocal paused
        losses.append(loss)
        if (step + 1) % max(1, steps // options.points) == 0:
            stopped = time.process_time()
            model.eval()
            score = recalls(model, trie, data, "validation", normalize, VALIDATION_QUERIES)["recall"]
            with torch.inference_mode():
                checked = float(level_losses(model, check_BT, check_BL, space=space).sum())
            model.train()
            paused += time.process_time() - stopped
            curve.append(
                {"examples": (step + 1) * options.batch, "seconds": time.process_time() - began - paused,
                 "loss": float(np.mean(losses[-100:])), "validation_loss": checked,
                 "recall@10": score["10"], "recall@50": score["50"]}
            )  # fmt: skip
            print(kind, seed, {name: round(value, 4) for name, value in curve[-1].items()}, flush=True)

    fit(
        model, cached, space=space, steps=steps, batch=options.batch, learning_rate=options.learning_rate,
        label_smoothing=options.label_smoothing, seed=seed, on_step=watch,
        continuations=functools.partial(continuations, trie) if options.loss == "trie" else None,
    )  # fmt: skip
    seconds, seen = time.process_time() - began - paused, steps * options.batch
    if options.keep:
        folder = Path(options.keep) / f"{kind}-{seed}"
        save_generator(model, data["tokenizer"], folder / "generator")
        trie.save(folder / "trie")
        with pa.ipc.new_file(str(folder / "products.arrow"), data["products"].schema) as out:
            out.write_table(data["products"].take(pa.array(trie.order_N)))
    found = {split: recalls(model, trie, data, split, normalize) for split in ("validation", "test")}
    return {
        "kind": ", ".join([kind, *arms(options)]), "seed": seed, "examples": seen, "seconds": seconds,
        "examples_per_second": seen / seconds, "curve": curve, **found["test"],
        "by_query": {split: one["by_query"] for split, one in found.items()},
    }  # fmt: skip


def arms(options) -> list[str]:
    """What a cell has that the plain one has not."""
    said = [f"{options.head} head"] if options.head != "plain" else []
    said += [f"teacher {options.teacher:g}"] if options.teacher else []
    return said + (["loss trie"] if options.loss == "trie" else [])


def said(done: int, whole: int) -> None:
    if done == whole or done % 4096 < 128:
        print(f"token states of {done:,} of {whole:,} texts", flush=True)


def report(cells: list[dict], options) -> str:
    groups: dict[tuple, list[dict]] = {}
    for cell in cells:
        groups.setdefault((cell["kind"], cell["examples"]), []).append(cell)
    names = ["IDs", "seeds", "examples", "seconds"]
    names += [f"{word}@{k}" for word in ("", "seen ", "unseen ") for k in KS]
    rows = []
    for (kind, examples), of in groups.items():
        figures = [
            spread([c[g][str(k)] for c in of], ".3f") for g in ("recall", "recall_seen", "recall_unseen") for k in KS
        ]
        rows.append([kind, len(of), examples, f"{np.mean([c['seconds'] for c in of]):.0f}", *figures])
    asked, text = cells[0]["queries"], differences(cells)
    return (
        "# Generators on Home Depot\n\n"
        f"Written by `benchmarks/generator.py`. Encoder: {Path(options.encoder).name}, frozen, its token states cached; decoder: "
        f"{options.layers} T5 layers of width {options.width}, trained from nothing. Batch {options.batch}, learning rate "
        f"{options.learning_rate:g}, {options.titles:g} titles an epoch per title, words kept in a thinned title "
        f"{options.keep_words:g} ({options.drop_share:g} of the titles are thinned), label smoothing "
        f"{options.label_smoothing:g}, dropout {options.dropout:g}. Beam {BEAM}, full IDs, no re-scoring. Categories of this "
        f"catalogue are inferred, not gold. Recall is per product on the test split (relevance ≥ {RELEVANT_FROM}); *seen* "
        f"products are named by a training pair (≥ {TRAIN_FROM}). Mean over seeds ± half the range. Machine: {machine()}; one "
        "thread a cell; budgets are equal in examples; seconds are this thread's own (processor time), without evaluation.\n\n"
        + table(names, rows)
        + f"\n{text}{asked['all']:,} queries, {asked['seen']:,} with a seen and {asked['unseen']:,} with an unseen one.\n\n"
        f"## Learning curves\n\nrecall@50 on {VALIDATION_QUERIES} validation queries, and the loss of {VALIDATION_PAIRS:,} "
        "validation pairs in nats an ID, after so many examples (mean over seeds); ![recall over examples](generator.png)\n\n"
        + "\n".join(map(curve_table, of_budgets(cells)))
    )


def differences(cells: list[dict]) -> str:
    """Each arm less the plain cell of the same IDs, examples and seeds, where both say what each query found."""
    by_arm, rows = {}, []
    for cell in cells:
        if "by_query" in cell:
            by_arm.setdefault((cell["kind"], cell["examples"]), {})[cell["seed"]] = cell["by_query"]
    for (kind, examples), of_seed in by_arm.items():
        base = by_arm.get((kind.split(",")[0], examples), {})
        seeds = sorted(of_seed.keys() & base.keys())
        if "," in kind and seeds:
            for split in ("validation", "test"):
                gain_QK = np.mean([np.subtract(of_seed[s][split], base[s][split]) for s in seeds], 0)
                gains = [f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for i in bootstrap_means(gain_QK)]
                rows.append([kind, examples, len(seeds), split, *gains])
    names = ["IDs", "examples", "seeds", "queries", *(f"@{k}" for k in KS)]
    return table(names, rows, title="Less the plain cell, paired over queries, 95 % intervals") + "\n" if rows else ""


def of_budgets(cells: list[dict]) -> list[list[dict]]:
    """The cells of each number of examples, the fewest first."""
    return [
        [cell for cell in cells if cell["examples"] == count] for count in sorted({cell["examples"] for cell in cells})
    ]


def curve_table(cells: list[dict]) -> str:
    """The learning curves of cells with one budget: recall and loss, mean over seeds."""
    rows = []
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        for figure, form in (("recall@50", ".3f"), ("validation_loss", ".2f")):
            curves = np.array([[point[figure] for point in cell["curve"]] for cell in cells if cell["kind"] == kind])
            rows.append([f"{kind}, {figure}", *(format(value, form) for value in curves.mean(0))])
    return table(["IDs", *(f"{point['examples'] // 1000:,}k" for point in cells[0]["curve"])], rows)


def draw(cells: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    colours = {kind: f"C{number}" for number, kind in enumerate(dict.fromkeys(cell["kind"] for cell in cells))}
    for cell in cells:
        axes.plot(
            [p["examples"] / 1e6 for p in cell["curve"]], [p["recall@50"] for p in cell["curve"]],
            color=colours[cell["kind"]], lw=1, alpha=0.8, marker=".",
        )  # fmt: skip
    for kind, colour in colours.items():
        axes.plot([], [], color=colour, label=kind)
    axes.set(xlabel="training examples, million", ylabel="recall@50, validation", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "generator.md")
    parser.add_argument("--catalog", help="folder with products.parquet and pairs.parquet")
    parser.add_argument("--encoder", help="folder of a sentence encoder")
    parser.add_argument("--store", help="store with the IDs of `catid2 compare-ids`")
    parser.add_argument("--kinds", default="cat_id2,tiger,cat_id2_shuffled")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--ids-seed", type=int, help="the seed whose IDs all cells learn; none = each cell those of its own"
    )
    parser.add_argument("--head", default="plain", help="plain, dense or experts")
    parser.add_argument("--teacher", type=float, default=0.0, help="share of query examples drawn by a teacher")
    parser.add_argument("--loss", default="level", help="level, or trie with the search that goes with it")
    parser.add_argument("--examples", type=int, default=1_000_000, help="budget of a cell")
    parser.add_argument("--points", type=int, default=8, help="points of the learning curve")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--titles", type=float, default=1.0, help="title examples per title and epoch")
    parser.add_argument("--keep-words", type=float, default=0.5)
    parser.add_argument("--drop-share", type=float, default=0.5)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--cache", default="generator_cache", help="folder for token states")
    parser.add_argument(
        "--runs", default="generator_runs", help="folder for one JSON a cell; claimed cells are left alone"
    )
    parser.add_argument("--keep", help="folder for the trained models, their tries and products in trie order")
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: write the page and its picture from --runs"
    )
    options = parser.parse_args()
    runs, named = Path(options.runs), "".join(f"+{arm.replace(' ', '_')}" for arm in arms(options))
    if not options.render:
        if not (options.catalog and options.encoder and options.store):
            print(json.dumps({"skipped": "give --catalog, --encoder and --store"}))
            return
        torch.set_num_threads(1)
        runs.mkdir(parents=True, exist_ok=True)
        data = load_data(options)
        for seed in range(options.seeds):
            for kind in options.kinds.split(","):
                target = runs / f"{kind}{named}-{seed}-{options.examples}.json"
                try:
                    target.touch(exist_ok=False)
                except FileExistsError:
                    continue
                target.write_text(json.dumps(rounded(run_cell(options, data, kind, seed)), indent=1))
    cells = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json")) if path.stat().st_size]
    if options.render:
        write_page(options.out, report(cells, options))
        draw(cells, options.out.with_suffix(".png"))
    finish(cells, None, options)


if __name__ == "__main__":
    main()
