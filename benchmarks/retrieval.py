"""Generative retrieval beside and together with BM25 and dense retrieval, on human-graded pairs; no Ray, one thread.

    python benchmarks/retrieval.py --catalog DATA/home_depot --encoder MODELS/all-MiniLM-L6-v2 \
        [--generator FOLDER --trie FOLDER] [--cache FOLDER] [--out benchmarks/results/retrieval.md] [--json FILE]

`--generator`: a saved generator with its tokenizer; `--trie`: the folder of an ids artefact (trie/ with products.arrow
beside it). Without them the three rivals alone are measured. Every weight, the stop level, the width of the beam and the
quota are chosen on the validation split; the test split is asked once. All methods return 100 products (BM25 fewer where
fewer share a word). The beam alone is searched with 8-bit weights too. `--cache` keeps the vectors of
texts. The last line printed is the run's JSON. Data and models are not part of the project: without --catalog it says so and ends.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import fusion
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fusion import BESIDE_PATH, KS, LEXICAL, LISTED, PATHS, RETURNED, Search, Setting, Split
from harness import RESULTS, finish, machine, parser_of, rounded, table

from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.products import check_products
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.evaluation.metrics import bootstrap_means
from catid2_ray.evaluation.protocol import Judgements, per_query_recalls
from catid2_ray.generator.saved import load_generator
from catid2_ray.generator.vocabulary import PAD, tokenize
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

TRAIN_FROM, RELEVANT_FROM = 2.33, 2.67
QUERY_TOKENS, QUERIES_AT_ONCE = 32, 8
RIVALS = ("BM25", "dense", "BM25 + dense")
INT8 = "beam alone, int8"
BLOCK = 2048  # texts whose vectors lie in one file of --cache
TOKENS = 64  # the longest titles are cut; Home Depot's median is 15
EVERYTHING = ("everything, the beams' products", "everything, beams ∪ lists")


def products_in_order(options) -> tuple[pa.Table, Trie | None]:
    """(product_id and title in trie order, or by id where there is no trie; the trie)."""
    products = pq.read_table(Path(options.catalog) / "products.parquet")
    good = check_products(products, width=None, min_category_depth=0, max_category_depth=1).good
    good = good.select(["product_id", "title"])
    if options.trie is None:
        return good, None
    trie = Trie.open(options.trie / "trie")
    names = pa.ipc.open_file(pa.memory_map(str(options.trie / "products.arrow"))).read_all()["product_id"]
    place = pa.compute.index_in(names.combine_chunks(), good["product_id"].combine_chunks())
    if place.null_count or len(names) != trie.rows or len(good) != trie.rows:
        raise SystemExit(
            f"{options.trie} has {trie.rows} IDs for {len(names)} products, {place.null_count} of them not in "
            f"{options.catalog}, which has {len(good)}; take both from one catalogue"
        )
    return good.take(place), trie


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the model's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def text_vectors(encoder: HuggingFaceEncoder, texts: Sequence[str], *, model: str, cache: Path | None) -> np.ndarray:
    """float32 N×D, rows of length 1. `model`: its digest; `cache`: a folder, or None to keep nothing.

    Every block is a file named by the digest of the model and its texts, so that a run that was broken off goes on where it
    stopped, and another model or text is never mistaken for this one.
    """
    vector_ND = np.empty((len(texts), encoder.width), np.float32)
    for start in range(0, len(texts), BLOCK):
        block = list(texts[start : start + BLOCK])
        path = None if cache is None else cache / f"{_digest(model, block)}.npy"
        if path is not None and path.exists():
            vector_ND[start : start + BLOCK] = np.load(path, allow_pickle=False)
            continue
        vector_ND[start : start + BLOCK] = part_ND = encoder.encode(block)
        if path is not None:
            cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            with partial.open("wb") as file:
                np.save(file, part_ND)
            partial.rename(path)
    return vector_ND


def _digest(model: str, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{model} {TOKENS} {len(texts)}".encode())
    for text in texts:
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()[:32]


def splits(options, products: pa.Table, vector_ND: np.ndarray, encoder, model: str) -> dict[str, Split]:
    """The queries of validation and test with every product's dense and lexical score."""
    pairs = pq.read_table(Path(options.catalog) / "pairs.parquet")
    names = products["product_id"].to_pylist()
    row = {name: number for number, name in enumerate(names)}
    index = Bm25(names, products["title"].to_pylist())
    by_id_N = np.array([row[name] for name in index.product_ids])
    queries = {}
    for split in ("validation", "test"):
        judgements = Judgements.from_pairs(
            pairs, split=split, min_relevance=RELEVANT_FROM, known=names,
            seen=training_pairs(pairs, TRAIN_FROM)["product_id"].unique(),
        )  # fmt: skip
        query_QD = text_vectors(encoder, judgements.queries, model=model, cache=options.cache)
        lexical_QN = np.empty((len(judgements.queries), len(names)), np.float32)
        for query, text in enumerate(judgements.queries):
            lexical_QN[query, by_id_N] = index.scores(text)
        relevant = [np.array(sorted(row[name] for name in wanted)) for wanted in judgements.relevant]
        queries[split] = Split(judgements, query_QD, query_QD @ vector_ND.T, lexical_QN, relevant)
    return queries


def search(decoder, tokenizer, trie: Trie, queries: list[str], level: int, width: int) -> Search:
    """Beam search of `width`, stopped after `level` codes, a few queries at once; widths beyond the nodes are cut."""
    ids_QT = tokenize(tokenizer, queries, length=QUERY_TOKENS)
    width, parts = min(width, trie.nodes(level)), []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        ids_BT = ids_QT[start : start + QUERIES_AT_ONCE]
        ids_BT = ids_BT[:, : int((ids_BT != PAD).any(0).sum())]
        settings = {"beam_width": width, "top_k": width, "levels": level}
        parts.append(constrained_beam_search(decoder, trie, ids_BT, ids_BT != PAD, **settings))
    return Search(level, width, fusion.joined(parts))


def rivals(queries: dict[str, Split]) -> tuple[dict, Setting, str]:
    """Lists of the three rivals on the test split, and the weight and scale of BM25 beside dense."""
    asked, every_N = queries["validation"], np.arange(queries["test"].dense_QN.shape[1])
    grids = {
        scale: fusion.best_setting(asked, lambda query: every_N, scale=scale, search=None, paths={}, lexicals=LEXICAL)
        for scale in ("best", "raw")
    }
    scale = max(grids, key=lambda name: grids[name].value)
    test = queries["test"]
    matching = [np.flatnonzero(score_N > 0) for score_N in test.lexical_QN]
    lists = {
        "BM25": [fusion.best_rows(test.lexical_QN[q][row_M], row_M, RETURNED) for q, row_M in enumerate(matching)],
        "dense": fusion.fused_rows(test, 0, scale, RETURNED),
        "BM25 + dense": fusion.fused_rows(test, grids[scale].lexical, scale, RETURNED),
    }
    return lists, grids[scale], scale


def agree(split: Split, tried: list[Search], setting: Setting, trie: Trie, store: VectorStore, scale: str) -> None:
    """Raise SystemExit unless choosing and `retrieval.expansion` rank the same products alike; near-ties may differ."""
    few = split._replace(relevant=split.relevant[:20], dense_QN=split.dense_QN[:20])
    one = next(one for one in tried if (one.level, one.width) == (setting.level, setting.width))
    rows = list(fusion.expanded_rows(few, one, trie, store, setting.quota))
    ours = fusion.rescored_lists(few, one, setting, trie, store, scale)
    plain = fusion.union_lists(few, one, setting, rows.__getitem__, scale)
    for query, (one_K, other_K) in enumerate(zip(ours, plain, strict=True)):
        if len(one_K) != len(other_K) or len(np.intersect1d(one_K, other_K)) < 0.98 * len(one_K):
            raise SystemExit(
                f"validation query {query}: what was tuned and what rescore returns are not the same products"
            )


def generative(options, queries: dict[str, Split], trie: Trie, store: VectorStore, weight: Setting, scale: str):
    """(lists on the test split, the setting of each) of everything that asks the generator."""
    model, tokenizer = load_generator(options.generator)
    decoder = decoder_for(model, codes_per_level=trie.codes_per_level)
    asked, test = queries["validation"], queries["test"]
    listed = {name: fusion.fused_rows(split, weight.lexical, scale, LISTED) for name, split in queries.items()}

    def searched(split: Split, level: int, width: int) -> Search:
        return search(decoder, tokenizer, trie, split.judgements.queries, level, width)

    tried = [searched(asked, trie.levels, width) for width in options.beams]
    tried += [searched(asked, level, width) for level in range(1, trie.levels) for width in options.clusters]
    tried = list({(one.level, one.width): one for one in tried}.values())

    def pool(split_name: str, one: Search, quota, union: bool):
        rows = list(fusion.expanded_rows(queries[split_name], one, trie, store, quota))
        if not union:
            return rows.__getitem__
        return lambda query: np.union1d(rows[query], listed[split_name][query])

    def chosen(levels, *, lexicals, quotas=(None,), union=False) -> Setting:
        paths = {path: (0, *steps) if union and path == "logp" else steps for path, steps in PATHS.items()}

        def tuned(one: Search, quota) -> Setting:
            rows_of = pool("validation", one, quota, union)
            return fusion.best_setting(
                asked, rows_of, scale=scale, search=one, paths=paths, lexicals=lexicals, quota=quota
            )

        best = max((tuned(one, None) for one in tried if one.level in levels), key=lambda setting: setting.value)
        one = next(one for one in tried if (one.level, one.width) == (best.level, best.width))
        return max((best, *(tuned(one, quota) for quota in quotas if quota)), key=lambda setting: setting.value)

    beside = tuple(share * weight.lexical for share in BESIDE_PATH)
    full, clusters = (trie.levels,), tuple(range(1, trie.levels))
    quotas = tuple(options.quotas)
    settings = {
        "beam + dense": chosen(full, lexicals=(0,)),
        "cluster + dense": chosen(clusters, lexicals=(0,), quotas=quotas),
        EVERYTHING[0]: chosen(full + clusters, lexicals=beside, quotas=quotas),
        EVERYTHING[1]: chosen(full + clusters, lexicals=beside, quotas=quotas, union=True),
    }  # fmt: skip
    agree(asked, tried, settings[EVERYTHING[0]], trie, store, scale)
    again: dict[tuple[int, int], Search] = {}
    for level, width in {(trie.levels, RETURNED), *((s.level, s.width) for s in settings.values())}:
        again[level, width] = searched(test, level, width)
    beam = next(one for (level, width), one in again.items() if level == trie.levels and width == RETURNED)
    lists = {"beam alone": fusion.beam_lists(test, beam)}
    decoder_8 = decoder_for(model, codes_per_level=trie.codes_per_level, weights="int8")
    beam_8 = search(decoder_8, tokenizer, trie, test.judgements.queries, trie.levels, RETURNED)
    lists[INT8] = fusion.beam_lists(test, beam_8)
    for name, setting in settings.items():
        one = again[setting.level, setting.width]
        if name == EVERYTHING[1]:
            rows_of = pool("test", one, setting.quota, True)
            lists[name] = list(fusion.union_lists(test, one, setting, rows_of, scale))
        else:
            lists[name] = list(fusion.rescored_lists(test, one, setting, trie, store, scale))
    return lists, settings


def figures_of(judgements: Judgements, ranked: dict[str, list[list[str]]]) -> dict:
    """[mean, low, high] of each method's recall, and of everything minus each rival, by group and cut-off."""
    figures = {}
    compared = [(method, rival) for method in EVERYTHING if method in ranked for rival in RIVALS]
    for group, recall_QK in per_query_recalls(judgements, ranked, KS).items():
        asked_Q = ~np.isnan(recall_QK["BM25"][:, 0])
        columns = [recall_QK[method] for method in ranked]
        columns += [recall_QK[method] - recall_QK[rival] for method, rival in compared]
        intervals = iter(bootstrap_means(np.concatenate(columns, 1)[asked_Q]))
        cells = {key: {str(k): list(next(intervals)) for k in KS} for key in (*ranked, *compared)}
        ahead = {method: {rival: cells[method, rival] for rival in RIVALS} for method in EVERYTHING if method in ranked}
        recall = {method: cells[method] for method in ranked}
        figures[group] = {"queries": int(asked_Q.sum()), "recall": recall, "ahead": ahead}
    return figures


def measured(options, folder: str) -> dict:
    started = time.perf_counter()
    products, trie = products_in_order(options)
    model = model_digest(options.encoder)
    encoder = HuggingFaceEncoder(str(options.encoder), batch=64, tokens=TOKENS)
    by_id = products.sort_by("product_id")
    vector_ND = text_vectors(encoder, by_id["title"].to_pylist(), model=model, cache=options.cache)
    place_N = pa.compute.index_in(products["product_id"].combine_chunks(), by_id["product_id"].combine_chunks())
    store = VectorStore.write(folder, [vector_ND[place_N.to_numpy()]], normalize=True)
    queries = splits(options, products, store.vectors_ND.astype(np.float32), encoder, model)
    lists, weight, scale = rivals(queries)
    settings = {"BM25 + dense": weight}
    if trie is not None:
        more, chosen = generative(options, queries, trie, store, weight, scale)
        lists, settings = lists | more, settings | chosen
    names = np.array(products["product_id"].to_pylist(), object)
    judgements = queries["test"].judgements
    ranked = {method: [names[row_K].tolist() for row_K in rows] for method, rows in lists.items()}
    return {
        "benchmark": "retrieval", "machine": machine(), "threads": 1, "catalog": Path(options.catalog).name,
        "products": len(names), "encoder": options.encoder.name, "ids": list(trie.codes_per_level) if trie else None,
        "generator": "/".join(options.generator.parts[-2:]) if options.generator else None, "lexical_scale": scale,
        "validation_queries": len(queries["validation"].relevant), "dropped_pairs": judgements.dropped_pairs,
        "settings": {name: setting._asdict() for name, setting in settings.items()},
        "groups": figures_of(judgements, ranked),
        "returned": {method: float(np.mean([len(row) for row in rows])) for method, rows in ranked.items()},
        "int8_overlap": overlap(lists) if trie else None, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def overlap(lists: dict) -> float:
    """Mean share of the beam's products that the beam with 8-bit weights returns too."""
    return float(np.mean([np.isin(*both).mean() for both in zip(lists["beam alone"], lists[INT8], strict=True)]))


def _interval(mean: float, low: float, high: float, *, sign: str = "") -> str:
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _verdict(low: float, high: float) -> str:
    return "ahead" if low > 0 else "behind" if high < 0 else "no difference shown"


def _setting(name: str, setting: dict) -> list[str]:
    beams = "–"
    if setting["level"]:
        quota = f"{setting['quota']} products each" if setting["quota"] else "all their products"
        beams = f"{setting['width']} of {setting['level']} codes, {quota}"
    path = f"{setting['a']:g} · {setting['path']}" if setting["level"] else "–"
    return [name, beams, path, f"{setting['lexical']:g}", f"{setting['value']:.3f}"]


def report(figures: dict) -> str:
    asked = f"{figures['groups']['all']['queries']:,}"
    model = (
        f"generator `{figures['generator']}` on IDs of {figures['ids']} codes"
        if figures["ids"]
        else "no generator given"
    )
    lexical = "BM25 over the query's best" if figures["lexical_scale"] == "best" else f"BM25 / {fusion.RAW:g}"
    parts = [
        f"# Retrieval on {figures['catalog']}\n",
        f"Written by `benchmarks/retrieval.py`: {figures['products']:,} products, {asked} test queries; {model}; dense: "
        f"{figures['encoder']} as it is, cosine of titles, exhaustive. Machine: {figures['machine']}; one thread.\n",
        f"Relevant: relevance ≥ {RELEVANT_FROM}. *Seen* products are named by a training pair of relevance ≥ {TRAIN_FROM}. "
        f"final = dense + a · path + b · lexical, lexical = {lexical}. Everything that can be chosen was chosen on the "
        f"{figures['validation_queries']} validation queries by the mean recall at {', '.join(map(str, KS))}, once for all "
        f"cut-offs. Each method returns {RETURNED} products; mean returned: "
        + ", ".join(f"{name} {count:.4g}" for name, count in figures["returned"].items())
        + (f". The beam with 8-bit weights returns {figures['int8_overlap']:.1%} of its products" if figures["ids"] else "")
        + ". In brackets: 95 % interval of the bootstrap over queries (10,000 resamples); differences are paired.\n",
    ]  # fmt: skip
    for group, part in figures["groups"].items():
        recalls = [[method, *(_interval(*cells[str(k)]) for k in KS)] for method, cells in part["recall"].items()]
        ahead = [
            [f"{method} − {rival}",
             *(f"{_interval(*cells[str(k)], sign='+')} {_verdict(*cells[str(k)][1:])}" for k in KS)]
            for method, by_rival in part["ahead"].items() for rival, cells in by_rival.items()
        ]  # fmt: skip
        parts.append(f"## {group.capitalize()} products ({part['queries']:,} queries)\n")
        parts.append(table(["method", *(f"recall@{k}" for k in KS)], recalls))
        parts += [table(["difference", *(f"@{k}" for k in KS)], ahead)] if ahead else []
    chosen = [_setting(name, setting) for name, setting in figures["settings"].items()]
    parts += ["## What was chosen\n", table(["method", "beams", "a · path", "b", "mean recall on validation"], chosen)]
    return "\n".join(parts)


def main() -> None:
    parser = parser_of(__doc__, page=RESULTS / "retrieval.md", stored="the figures of an earlier run")
    parser.add_argument("--catalog", help="folder with products.parquet and pairs.parquet")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    parser.add_argument("--generator", type=Path, help="folder of a saved generator")
    parser.add_argument("--trie", type=Path, help="folder with trie/ and products.arrow")
    parser.add_argument("--beams", type=int, nargs="+", default=[100, 300], help="widths tried over whole IDs")
    parser.add_argument("--clusters", type=int, nargs="+", default=[20, 100, 400], help="widths tried at other levels")
    parser.add_argument("--quotas", type=int, nargs="*", default=[10, 30], help="products per beam tried, beside all")
    parser.add_argument("--cache", type=Path, help="folder that keeps vectors of texts")
    options = parser.parse_args()
    if options.render:
        finish(json.loads(options.render.read_text()), report, options)
        return
    if not (options.catalog and options.encoder):
        print(json.dumps({"skipped": "no data: give --catalog FOLDER and --encoder FOLDER"}))
        return
    if (options.generator is None) != (options.trie is None):
        parser.error("--generator and --trie go together; give both, or neither to measure the rivals alone")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = rounded(measured(options, folder))
    finish(figures, report, options)


if __name__ == "__main__":
    main()
