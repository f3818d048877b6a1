"""Which way of making IDs finds most on Home Depot, by the proxy generator; writes benchmarks/results/ids.md.

    python benchmarks/ids.py --root DATA/home_depot --vectors FOLDER [--encoder FOLDER] [--runs raw:tiger:0,…] [--test]

Package code in one process, without Ray: `quantizer.step.fit`, unique IDs, `evaluation.proxy`. `--vectors` holds products.npy and
queries.npy (float32, rows of length 1, in the order of products.parquet and queries.parquet), made with `--encoder` where they
are missing, and adapted_products.npy and adapted_queries.npy, which `benchmarks/adapter.py` leaves. Every run writes its figures
to `--work`, a folder, and is not run again. A seed is a whole run: order, k-means, labels' shuffling, proxy.

Choices are made on *pooled* queries: those of the validation split and 2,000 of the train split, which the proxy does not learn
from here. Known-item search on the tables beside `--root`, bigbasket and mwpd_gpc, has gold categories; TASKS are its spaces.
`--test` adds the test split to the page, once. Shares are compared by the paired bootstrap over queries. A table of the page
is written from the runs of its space in `--work`, and stays as it is where there are none.
"""

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from harness import KEPT, RESULTS, finish, machine, parser_of, table
from known_item import known_items
from transformers import AutoModel, AutoTokenizer

from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.config.quantizer import QuantizerRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.evaluation.proxy import Questions, ranked, recall_of, train
from catid2_ray.generator.batches import Examples
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.step import fit as fit_generator
from catid2_ray.generator.vocabulary import PAD, starts_word, tokenize, train_tokenizer
from catid2_ray.identifiers.collisions import assign_unique
from catid2_ray.identifiers.quality import id_quality, neighbour_agreement
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.sampler import exchange_paths
from catid2_ray.quantizer.step import SAMPLE_ROWS, LossWeights, epoch_order, fit
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.trie import Trie

KS, HELD_OUT, LEARN_FROM, RELEVANT = (10, 50, 100), 2_000, 2.33, 2.67
BASE = "tiger"
CODES = (256,) * 4  # of Home Depot


class Task(NamedTuple):
    """A space of known-item search. `table`: folder beside `--root`; `codes`: K of each level; `untuned`: vectors of
    WordMean; `reads_words`: a small T5 learns the IDs and is searched, not the proxy."""

    table: str
    codes: tuple[int, ...]
    title: str = "known item"
    untuned: bool = False
    reads_words: bool = False


# MWPD's tree has H = 3 levels, so that IDs of three codes have H = L, and IDs of two H > L.
TASKS = {
    "bigbasket": Task("bigbasket", (64,) * 4),
    "mwpd_gpc": Task("mwpd_gpc", (128,) * 4),
    "mwpd_gpc_3": Task(
        "mwpd_gpc", (256,) * 3, "known item, IDs of three codes, as many as the tree has levels (H = L)"
    ),
    "mwpd_gpc_2": Task("mwpd_gpc", (512,) * 2, "known item, IDs of two codes, fewer than the tree has levels (H > L)"),
    "mwpd_gpc_t5": Task("mwpd_gpc", (128,) * 4, "known item, by a small T5 that reads words", reads_words=True),
    "mwpd_gpc_words": Task("mwpd_gpc", (128,) * 4, untuned=True),
}
# The T5: its sizes, and the budget of a run, about five minutes of one core with its search.
T5 = {"width": 128, "layers": 1, "heads": 4, "feed_forward": 512, "dropout": 0.0}
VOCABULARY, TOKENS, STEPS, T5_BATCH, T5_RATE = 8_000, 48, 1_000, 128, 2e-3
# kind: other settings of the budget. The printed kinds begin at random and get what 2 cores allow of the paper's 300 epochs.
PRINTED = {"epochs": 30, "learning_rate": 1e-3}
KINDS = {
    "rq_kmeans": {}, "tiger": {}, "dis": {}, "cat_id2": {}, "cat_id2_shuffled": {}, "ancestors": {}, "on_prefix": {},
    "on_projection": {}, "on_residual": {}, "hcc_csc_dis": {}, "paper_tiger": PRINTED, "cat_id2_paper": PRINTED,
}  # fmt: skip
# Other labels for `cat_id2`, and CQ-SID's query–item term: kind: (settings, the function of LABELS that makes its labels).
ARMS = {
    "5 % flipped": ({"category_noise": 0.05}, None), "20 % flipped": ({"category_noise": 0.2}, None),
    "50 % flipped": ({"category_noise": 0.5}, None), "30 % missing": ({}, "missing_30"), "60 % missing": ({}, "missing_60"),
    "tags": ({}, "tags"), "query–item .03": ({"query_item": 0.03}, None),
    "on_prefix shuffled": ({"category_on": "prefix", "category_noise": 1.0}, None),
    "on_residual shuffled": ({"category_on": "residual", "category_noise": 1.0}, None),
}  # fmt: skip
PLAN = [f"adapted:{kind}:{seed}" for seed in range(3) for kind in list(KINDS)[:5]]
PLAN += [f"{task}:{kind}:{seed}" for task in ("bigbasket", "mwpd_gpc") for seed in range(3) for kind in list(KINDS)[:5]]
PLAN += [f"adapted:{kind}:0" for kind in list(KINDS)[5:]] + [f"raw:{kind}:0" for kind in KINDS]
PLAN += [f"mwpd_gpc:{arm}:{seed}" for seed in range(3) for arm in ARMS]
PLAN += [f"adapted:{arm}:0" for arm in list(ARMS)[:7]]
THREE, BY_LEVEL = ("tiger", "cat_id2", "cat_id2_shuffled"), ("on_prefix", "on_residual")  # eq. 4 as printed is by level
PLAN += [f"{task}:{kind}:{seed}" for task in ("mwpd_gpc_words", "mwpd_gpc_t5") for seed in range(3) for kind in THREE]
DEEP = [*THREE, *BY_LEVEL, *(f"{kind} shuffled" for kind in BY_LEVEL)]
PLAN += [f"{task}:{kind}:{seed}" for task in ("mwpd_gpc_3", "mwpd_gpc_2") for seed in range(3) for kind in DEEP]
PLAN += [f"mwpd_gpc:{kind}:{seed}" for seed in range(3) for kind in BY_LEVEL]
CONTROLS = {"cat_id2": "cat_id2_shuffled", **{kind: f"{kind} shuffled" for kind in BY_LEVEL}}


class Shop(NamedTuple):
    product_ids: list[str]
    titles: list[str]
    vector_ND: np.ndarray
    category_NH: np.ndarray
    learn: Questions
    asked: dict[str, Questions]
    texts: dict[str, list[str]] = {}  # of the queries of `learn` and of each of `asked`, where there are


def vectors(folder: Path, space: str, products: pa.Table, pairs: pa.Table, encoder: str | None) -> tuple:
    """float32 N×D, float32 Q×D and the query_ids of its rows."""
    if not (folder / "products.npy").exists():
        model = HuggingFaceEncoder(encoder, batch=64, tokens=64)
        queries = pairs.group_by(["query_id", "query"]).aggregate([]).sort_by("query_id")
        pq.write_table(queries, folder / "queries.parquet")
        np.save(folder / "queries.npy", model.encode(queries["query"].to_pylist()))
        np.save(folder / "products.npy", model.encode(products["title"].to_pylist()))
    before = "adapted_" if space == "adapted" else ""
    arrays = [np.load(folder / f"{before}{name}.npy").astype(np.float32) for name in ("products", "queries")]
    return *arrays, pq.read_table(folder / "queries.parquet", columns=["query_id"])["query_id"].to_pylist()


def shop(root: Path, folder: Path, space: str, encoder: str | None) -> Shop:
    products, pairs = pq.read_table(root / "products.parquet"), pq.read_table(root / "pairs.parquet")
    vector_ND, query_QD, query_ids = vectors(folder, space, products, pairs, encoder)
    ids = products["product_id"].combine_chunks()
    paths = {tuple(path) for path in products["category_path"].to_pylist() if path}
    taxonomy = Taxonomy.build(sorted(paths), depth=3)
    query_of = pa.array(query_ids)
    pairs = pairs.filter(pc.is_in(pairs["product_id"], ids))
    train_ids = sorted(pairs.filter(pc.field("split") == "train")["query_id"].unique().to_pylist())
    held = set(np.random.default_rng(17).permutation(train_ids)[:HELD_OUT].tolist())

    def questions(chosen: pa.Table) -> Questions:
        chosen = chosen.group_by(["query_id", "product_id"]).aggregate([])
        row_P = pc.index_in(chosen["query_id"].combine_chunks(), query_of).to_numpy()
        query_Q, place_P = np.unique(row_P, return_inverse=True)
        product_P = pc.index_in(chosen["product_id"].combine_chunks(), ids).to_numpy().astype(np.int64)
        return Questions(query_QD[query_Q], place_P, product_P)

    is_held = pc.is_in(pairs["query_id"], pa.array(sorted(held)))
    relevant = pc.greater_equal(pairs["relevance"], RELEVANT)
    teaches = pc.and_(pc.equal(pairs["split"], "train"), pc.greater_equal(pairs["relevance"], LEARN_FROM))
    pooled = pc.and_(relevant, pc.or_(is_held, pc.equal(pairs["split"], "validation")))
    asked = {
        "pooled": questions(pairs.filter(pooled)),
        "test": questions(pairs.filter(pc.and_(relevant, pc.equal(pairs["split"], "test")))),
    }
    learn = questions(pairs.filter(pc.and_(teaches, pc.invert(is_held))))
    return Shop(
        ids.to_pylist(),
        products["title"].to_pylist(),
        vector_ND,
        taxonomy.category_ids(products["category_path"]),
        learn,
        asked,
    )


class WordMean:
    """An encoder that nobody tuned for similarity: the mean of the input rows of a text's tokens, length 1."""

    def __init__(self, encoder: str):
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        self.row_VD = AutoModel.from_pretrained(encoder).get_input_embeddings().weight.detach().float().numpy()

    def encode(self, texts: list[str]) -> np.ndarray:
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        mean_ND = np.stack([self.row_VD[ids or [0]].mean(0) for ids in tokens])
        return mean_ND / np.linalg.norm(mean_ND, axis=1, keepdims=True)


def missing(share: float):
    def labels(data: "Shop", seed: int) -> np.ndarray:
        """A share of the products has no category at all."""
        lost_N = np.random.default_rng((seed, 29)).random(len(data.titles)) < share
        return np.where(lost_N[:, None], -1, data.category_NH)

    return labels


def tags(data: "Shop", seed: int) -> np.ndarray:
    """Of each title the rarest word that at least ten titles have, as its one label; no tree."""
    words = [set(re.findall(r"[a-z]{3,}", title.lower())) for title in data.titles]
    counts = Counter(word for of_title in words for word in of_title)
    number = {word: place for place, word in enumerate(sorted(word for word, count in counts.items() if count >= 10))}
    known = [sorted((counts[word], word) for word in of_title if word in number) for of_title in words]
    return np.array([[number[of_title[0][1]] if of_title else -1] for of_title in known])


LABELS = {"missing_30": missing(0.3), "missing_60": missing(0.6), "tags": tags}


def queries_of(data: "Shop") -> dict[str, torch.Tensor]:
    """A teaching query of each product, for the query–item term."""
    query_ND, has_N = np.zeros(data.vector_ND.shape, np.float32), np.zeros(len(data.vector_ND), bool)
    query_ND[data.learn.product_P], has_N[data.learn.product_P] = data.learn.query_QD[data.learn.query_P], True
    return {"query_ND": torch.from_numpy(query_ND), "has_query_N": torch.from_numpy(has_N)}


def known_item_shop(root: Path, folder: Path, encoder: str | None, *, untuned: bool = False) -> Shop:
    """Titles alone are indexed; queries are those of `known_item.known_items`, which teach where its split is train and are
    asked where it is another; categories are gold."""
    products = pq.read_table(root / "products.parquet")
    row_M, sentences, split_M = known_items(products["title"].to_pylist(), products["description"].to_pylist())
    cached = folder / f"known_item_{root.name}{'_words' if untuned else ''}.npz"
    products = products.take(pa.array(row_M))
    if not cached.exists():
        model = WordMean(encoder) if untuned else HuggingFaceEncoder(encoder, batch=64, tokens=48)
        np.savez(cached, products=model.encode(products["title"].to_pylist()), queries=model.encode(sentences))
    arrays = np.load(cached)
    taught, asked = np.flatnonzero(split_M == 0), np.flatnonzero(split_M > 0)
    learn, ask = (Questions(arrays["queries"][rows], np.arange(len(rows)), rows) for rows in (taught, asked))
    taxonomy = Taxonomy.build(sorted({tuple(path) for path in products["category_path"].to_pylist() if path}), depth=3)
    category_NH = taxonomy.category_ids(products["category_path"])
    names, titles = products["product_id"].to_pylist(), products["title"].to_pylist()
    texts = {split: [sentences[row] for row in rows] for split, rows in (("learn", taught), ("pooled", asked))}
    return Shop(names, titles, arrays["products"], category_NH, learn, {"pooled": ask}, texts)


def model_of(recipe: QuantizerRecipe, data: Shop, seed: int, labels: str | None) -> ResidualQuantizer:
    """The kind's quantizer, fitted with `seed`, to the categories or what LABELS makes of them."""
    vector_ND, width = torch.from_numpy(data.vector_ND), data.vector_ND.shape[1]
    torch.manual_seed(seed)
    if recipe.coder == "kmeans":
        model = ResidualQuantizer(width=width, hidden=None, latent=width, codes_per_level=recipe.codes_per_level)
        order = epoch_order(len(vector_ND), seed=seed, epoch=-1 % 2**32)
        model.initialise_codebooks(vector_ND[order[:SAMPLE_ROWS]], seed=seed)
        return model
    category_NH = LABELS[labels](data, seed) if labels else data.category_NH
    if recipe.category_noise:
        category_NH = exchange_paths(category_NH, share=recipe.category_noise, seed=seed)
    model = ResidualQuantizer(
        width=width, hidden=recipe.hidden, latent=recipe.latent_of(width), codes_per_level=recipe.codes_per_level,
        latent_radius=recipe.latent_radius, encoder=recipe.encoder, projection=recipe.category_on == "projection",
    )  # fmt: skip
    names = LossWeights.__dataclass_fields__
    settings = {name: getattr(recipe, name) for name in names if name != "category_depth"}
    weights = LossWeights(**settings, category_depth=category_NH.shape[1])
    fit(
        vector_ND, torch.from_numpy(category_NH).long(), model=model, weights=weights, seed=seed, epochs=recipe.epochs,
        batch=recipe.batch, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay, refit=recipe.refit,
        revive=bool(recipe.revive_every_epochs), **(queries_of(data) if recipe.query_item else {}),
    )  # fmt: skip
    return model.eval()


def found_by_words(data: Shop, codes_NL: np.ndarray, trie: Trie, seed: int) -> dict[str, np.ndarray]:
    """Of each of `asked` int64 Q×100, what `proxy.ranked` gives, by a small T5 over words: it learns from sentences and, half of
    their words left out, from titles, as often one as the other."""
    space = DocidSpace(trie.codes_per_level)
    tokenizer = train_tokenizer([*data.titles, *data.texts["learn"]], size=VOCABULARY)
    model = small_t5(vocabulary=len(tokenizer), codes_per_level=space.codes_per_level, seed=seed, **T5)
    ids = {"query": data.texts["learn"], "title": data.titles}
    examples = Examples(
        input_ids={kind: tokenize(tokenizer, texts, length=TOKENS) for kind, texts in ids.items()},
        codes={"query": codes_NL[data.learn.product_P], "title": codes_NL},
        ratio={"title": len(data.texts["learn"]) / len(data.titles)}, starts_word_V=starts_word(tokenizer),
    )  # fmt: skip
    fit_generator(model, examples, space=space, steps=STEPS, batch=T5_BATCH, learning_rate=T5_RATE, seed=seed)
    decoder, found = decoder_for(model.eval(), codes_per_level=space.codes_per_level), {}
    for split in data.asked:
        token_QT, found[split] = tokenize(tokenizer, data.texts[split], length=TOKENS), []
        for start in range(0, len(token_QT), 32):
            some_BT = token_QT[start : start + 32]
            some_BT = some_BT[:, : (some_BT != PAD).sum(1).max()]
            beams = constrained_beam_search(decoder, trie, some_BT, some_BT != PAD, beam_width=max(KS), top_k=max(KS))
            there_BK = np.arange(max(KS)) < beams.count_B.numpy()[:, None]
            found[split].append(np.where(there_BK, trie.order_N[beams.row_range_BK2[..., 0].numpy()], -1))
        found[split] = np.concatenate(found[split])
    return found


def run(data: Shop, kind: str, seed: int, codes: tuple[int, ...], *, reads_words: bool = False) -> dict:
    settings, labels = ARMS.get(kind, (KINDS.get(kind, {}), None))
    recipe = QuantizerRecipe(kind="cat_id2" if kind in ARMS else kind, codes_per_level=codes, **settings)
    start = time.process_time()
    # Trainings multiply in bfloat16 where the processor can: half of the time. IDs and search are in float32.
    torch.set_float32_matmul_precision("medium")
    model = model_of(recipe, data, seed, labels)
    torch.set_float32_matmul_precision("highest")
    encoded = model.encode_padded(torch.from_numpy(data.vector_ND), rows=1024)
    raw_NL, books = encoded.codes_BL.numpy(), [book.detach().numpy() for book in model.codebooks]
    ids = assign_unique(raw_NL, encoded.residual_BZ.numpy(), books, data.product_ids, method="exact")
    made = time.process_time()
    trie = Trie.build(ids.codes_NL, codes_per_level=recipe.codes_per_level)
    if reads_words:
        found = found_by_words(data, ids.codes_NL, trie, seed)
    else:
        torch.set_float32_matmul_precision("medium")
        proxy = train(data.vector_ND, ids.codes_NL, recipe.codes_per_level, data.learn, seed=seed)
        torch.set_float32_matmul_precision("highest")
        found = {name: ranked(proxy, trie, asked.query_QD) for name, asked in data.asked.items()}
    recalls = {name: recall_of(found[name], asked, KS).round(5).tolist() for name, asked in data.asked.items()}
    scored = time.process_time()
    quality = id_quality(ids.codes_NL[::4], data.category_NH[::4], recipe.codes_per_level)
    near = neighbour_agreement(ids.codes_NL, data.vector_ND, sample=1_000, seed=0)
    return {
        "collisions": 1 - len(np.unique(recipe.space.pack(raw_NL))) / len(raw_NL), "neighbours": near["share"][:2],
        "ami": quality["ami"], "seconds": [round(made - start, 1), round(scored - made, 1)], "recall": recalls,
    }  # fmt: skip


def difference(of_space: dict[str, dict], kind: str, base: str, split: str) -> list[str]:
    """`kind` − `base` at the first two of KS, seeds that both have averaged, with the interval over queries."""
    seeds = [key.split(":")[1] for key in of_space if key.split(":")[0] == kind]
    pairs = [(f"{kind}:{seed}", f"{base}:{seed}") for seed in seeds if f"{base}:{seed}" in of_space]
    if kind == base or not pairs:
        return ["–", "–"]
    gains = [np.subtract(*(of_space[key]["recall"][split] for key in pair)) for pair in pairs]
    return [f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for i in bootstrap_means(np.mean(gains, 0))[:2]]


def page(runs: dict[str, dict], *, test: bool, before: str = "") -> str:
    """A table of all runs that are there, for each split and task; that of the page `before` where a space has no run."""
    about = (
        "# Which IDs find most\n\nWritten by `benchmarks/ids.py`. Home Depot: 54,667 titles by all-MiniLM-L6-v2 (*raw*), or moved "
        "by linear adapters (*adapted*; those learned from all training queries, also from the 2,000 held out here, which is the "
        "same for every kind). Unique IDs, of four levels where nothing else is said. The proxy generator learns from pairs and "
        f"titles and is searched with a beam of 100. *Small T5*: width {T5['width']}, {T5['layers']} + {T5['layers']} layers, "
        f"{STEPS:,} batches of {T5_BATCH}, half sentences, half titles of which half lose half of their words; the same beam. "
        f"Seconds are those of one core. Machine: {machine()}.\n"
    )
    stood = {part.split("\n", 1)[0]: f"### {part.rstrip()}\n" for part in before.partition(KEPT)[0].split("\n### ")[1:]}
    tasks = [
        ("adapted", "pooled", "Home Depot, adapted, pooled queries"),
        ("raw", "pooled", "Home Depot, raw, pooled queries"),
    ]
    tasks += [
        (task, "pooled", f"{task}, {about.title}, products whose sentences taught nothing")
        for task, about in TASKS.items()
    ]
    tasks += [(space, "test", f"Home Depot, {space}, test queries") for space in ("adapted", "raw") if test]
    tables = []
    for space, split, title in tasks:
        of_space = {key.split(":", 1)[1]: value for key, value in runs.items() if key.startswith(f"{space}:")}
        if of_space:
            tables.append(_task_table(of_space, split, title))
        elif title in stood:
            tables.append(stood[title])
    return "\n".join([about, *tables])


def _task_table(of_space: dict[str, dict], split: str, title: str) -> str:
    rows = []
    for kind in dict.fromkeys(key.split(":")[0] for key in of_space):
        mine = [value for key, value in of_space.items() if key.split(":")[0] == kind]
        recall_SK = np.array([np.mean(one["recall"][split], 0) for one in mine])
        means = {
            name: np.mean([one[name] for one in mine], 0) for name in ("neighbours", "ami", "seconds", "collisions")
        }
        rows.append([
            kind, len(mine), " ".join(f"{value:.3f}" for value in recall_SK.mean(0)),
            f"± {np.ptp(recall_SK[:, 1]) / 2:.3f}" if len(mine) > 1 else "–", *difference(of_space, kind, BASE, split),
            *(" ".join(f"{value:.2f}" for value in means[name]) for name in ("neighbours", "ami")),
            f"{means['collisions']:.1%}", " + ".join(f"{value:.0f}" for value in means["seconds"]),
        ])  # fmt: skip
    names = [
        "kind", "seeds", "recall@10, 50, 100", "half the seeds' range @50", f"@10 − {BASE}", f"@50 − {BASE}",
        "neighbours with c1, c1c2", "AMI by depth", "collisions", "seconds: IDs + proxy",
    ]  # fmt: skip
    text = [table(names, rows, title=title)]
    for kind, control in CONTROLS.items():
        less = difference(of_space, kind, control, split)
        if "–" not in less:
            text.append(f"`{kind}` − its shuffled control: {less[0]} at 10, {less[1]} at 50.\n")
    return "\n".join(text)


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "ids.md")
    parser.add_argument("--root", type=Path, help="folder with products.parquet and pairs.parquet")
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--encoder", help="sentence encoder, by id or folder, where the vectors are missing")
    parser.add_argument("--work", type=Path, help="folder with a JSON a run; default: VECTORS/ids")
    parser.add_argument("--runs", help=f"SPACE:KIND:SEED,… ; default: {len(PLAN)} of them; none = only write the page")
    parser.add_argument("--test", action="store_true", help="show the test split, too")
    options = parser.parse_args()
    if not options.root or not options.vectors:
        print(json.dumps({"skipped": "no data: give --root FOLDER --vectors FOLDER"}))
        return
    torch.set_num_threads(1)
    work, shops = options.work or options.vectors / "ids", {}
    work.mkdir(parents=True, exist_ok=True)
    for key in PLAN if options.runs is None else [key for key in options.runs.split(",") if key != "none"]:
        path = work / f"{key.replace(':', '-')}.json"
        if path.exists():
            continue
        space, kind, seed = key.split(":")
        if space not in shops and space in ("raw", "adapted"):
            shops = {space: shop(options.root, options.vectors, space, options.encoder)}
        elif space not in shops:
            root, untuned = options.root.parent / TASKS[space].table, TASKS[space].untuned
            shops = {space: known_item_shop(root, options.vectors, options.encoder, untuned=untuned)}
        codes, reads_words = (TASKS[space].codes, TASKS[space].reads_words) if space in TASKS else (CODES, False)
        figures = run(shops[space], kind, int(seed), codes, reads_words=reads_words)
        path.write_text(json.dumps(figures))
        print(key, figures["seconds"], np.mean(figures["recall"]["pooled"], 0).round(3).tolist(), flush=True)
    runs = {path.stem.replace("-", ":"): json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
    order = {kind: place for place, kind in enumerate([*KINDS, *ARMS])}
    runs = dict(sorted(runs.items(), key=lambda one: (order.get(one[0].split(":")[1], 99), one[0])))
    summary = {key: {**value, "recall": {split: np.mean(rows, 0).tolist() for split, rows in value["recall"].items()}}
               for key, value in runs.items()}  # fmt: skip
    before = options.out.read_text() if options.out.exists() else ""
    finish(summary, lambda _: page(runs, test=options.test, before=before), options)


if __name__ == "__main__":
    main()
