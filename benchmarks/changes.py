"""What a live change costs: the change itself, the first search and the first filter after it, and a replica's start after many.

    python benchmarks/changes.py [--rows 2e6] [--newcomers 20000] [--changes 50000] [--repeats 30] [--json FILE]
        [--out benchmarks/results/changes.md]

A catalogue of `--rows` products with vectors (96 numbers), words, node vectors of two depths and three filter columns, and
`--newcomers` inserted since. One thread, medians of processor time in milliseconds, which others on the machine disturb little:
    a change    a product put, replaced, withdrawn; a price; each alone, and the price after `--changes` others
    search      beam 100, one query, looking ahead by vectors and words: the first after a change, and the one after that
    filter      compiling a price range and a brand before any price changed, and the first time after one has
    state       made, and restored on the release, whole
    start       seconds and requests to the store (a local folder) until a replica has a series of `--changes` records, one change
                each (nine of ten prices, one of ten a new product): from the snapshot of its last thousand, and without any
The last line printed is one JSON object.
"""

import json
import statistics
import tempfile
import time

import numpy as np
import pyarrow as pa
from harness import finish, parser_of, rounded, table, where, whole

from catid2_ray.artifacts.store import Store
from catid2_ray.on_ray.machine.live_log import LiveLog, LiveUpdates
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.lexical import LexicalIndex
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.lookahead import Ahead, Lookahead, best_words
from catid2_ray.retrieval.node_vectors import NodeVectors, _means, _tails
from catid2_ray.retrieval.products import Newcomer, Products
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

CODES, WIDTH, VOCABULARY, LENGTH = (256,) * 4, 96, 50_000, 8
CHANGES = ("put", "replace", "withdraw", "price")
PRICE, BRAND = {"column": "price", "from": 10, "to": 50}, {"column": "brand", "in": ["brand 7"]}


def release(rows: int, random: np.random.Generator) -> dict:
    """What a live trie of `rows` products is made of."""
    trie = Trie.from_sorted(np.unique(random.integers(0, 256**4, rows)), codes_per_level=CODES, shared=True)
    rows = trie.rows
    vector_ND = random.normal(size=(rows, WIDTH)).astype(np.float32)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    store = VectorStore(vector_ND.astype(np.float16), True)
    term_P = np.sort(random.integers(0, VOCABULARY, (rows, LENGTH)).astype(np.int32), axis=1).ravel()
    words = LexicalIndex(
        np.arange(rows + 1) * LENGTH, term_P, np.ones(len(term_P), np.float32),
        pa.array([f"w{number:05d}" for number in range(VOCABULARY)]), np.ones(VOCABULARY, np.float32), float(LENGTH),
    )  # fmt: skip
    names = pa.array(np.arange(rows)).cast(pa.string())
    brands = pa.DictionaryArray.from_arrays(
        pa.array(random.integers(0, 5000, rows).astype(np.int32)), pa.array([f"brand {n}" for n in range(5000)])
    )
    index = FilterIndex({"product_id": names, "price": pa.array(random.random(rows) * 100), "brand": brands})
    means = tuple(np.concatenate(list(_means(trie, level, store))) for level in (1, 2))
    nodes = NodeVectors(means, tuple(_tails(trie, store, means[-1], 2)))
    products = Products(names, names, None, store, words)
    return {"base": trie, "product_ids": names, "index": index, "products": products, "nodes": nodes}


class Shop:
    """A live trie, and changes of it drawn at random."""

    def __init__(self, parts: dict, seed: int):
        self.live, self.random, self.came = LiveTrie(**parts), np.random.default_rng(seed), 0

    def newcomers(self, count: int) -> tuple:
        named = [f"n{self.came + number}" for number in range(count)]
        self.came += count
        titles = [" ".join(f"w{number:05d}" for number in self.random.integers(0, VOCABULARY, LENGTH)) for _ in named]
        vector_MD = self.random.normal(size=(count, WIDTH)).astype(np.float32)
        codes_ML = np.stack([self.random.integers(0, 256, count) for _ in CODES], 1)
        return (
            [Newcomer(*one) for one in zip(named, titles, vector_MD)],
            codes_ML,
            {"price": self.random.random(count) * 99},
        )

    def put(self) -> None:
        self.live.put(*self.newcomers(1))

    def replace(self) -> None:
        (made,), codes_ML, columns = self.newcomers(1)
        self.live.put([Newcomer(f"n{self.random.integers(100)}", made.title, made.vector_D)], codes_ML, columns)

    def price(self) -> None:
        self.live.put([], [], changed={str(self.random.integers(self.live.base.rows)): {"price": 20.0}})

    def withdraw(self) -> None:
        self.live.withdraw([str(self.random.integers(self.live.base.rows))])

    def search(self) -> None:
        view = self.live.view
        words = best_words(view.products.all_lexical_scores(["w00007 w00009"]), view, [None])
        ahead = Ahead(Lookahead(logp_weight=0, lexical_weight=0.1), view.nodes, np.ones((1, WIDTH)), words=words)
        constrained_beam_search(None, view, None, None, beam_width=100, top_k=10, ahead=ahead)

    def fill(self, count: int, changes: int) -> None:
        self.live.put(*self.newcomers(count))
        names = self.random.integers(0, self.live.base.rows, changes)
        for name in names.tolist():
            self.live.put([], [], changed={str(name): {"price": 20.0}})


class Counting(Store):
    """`listings` and `others`: requests so far."""

    listings = others = 0

    def names(self, *arguments, **options):
        self.listings += 1
        return super().names(*arguments, **options)

    def exists(self, name):
        self.others += 1
        return super().exists(name)

    def read(self, name):
        self.others += 1
        return super().read(name)


class Replica:
    """What `LiveUpdates` asks of a retriever."""

    def __init__(self, parts: dict):
        self.live = LiveTrie(**parts)
        self.space, self.put = self.live.space, self.live.put
        self.live_state, self.restore_state = self.live.state, self.live.restore_state


def record(number: int, shop: Shop) -> dict:
    """The change of this number, as PUT /v1/products writes it."""
    if number % 10:
        name, products = str(shop.random.integers(shop.live.base.rows)), []
        changed, did = [{"product_id": name, "columns": {"price": float(number % 90)}}], "changed"
    else:
        ((one,), (codes_L,), columns), changed, did = shop.newcomers(1), [], "inserted"
        product = {"product_id": one.product_id, "title": one.title, "docid": shop.live.space.text(codes_L.tolist())}
        products = [product | {"vector": one.vector_D.tolist(), "columns": {"price": float(columns["price"][0])}}]
        name = one.product_id
    answer, digests = [{"product_id": name, "docid": "", "did": did}], {name: ["0" * 16, f"{number:016d}"]}
    said = {"kind": "put", "products": products, "changed": changed, "content": digests, "answer": answer}
    return said | {"at": 1.0 + number}


def starts(parts: dict, changes: int) -> list[list]:
    """Rows of (how, seconds, listings, other requests)."""
    shop, rows = Shop(parts, 2), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, changes):
            said = json.dumps(record(number, shop)).encode()
            Store(folder).write(f"live/r-1/{number:010d}.json", said, durable=False)
        for how in ("without a snapshot", "from a snapshot"):
            store = Counting(folder)
            updates = LiveUpdates(Replica(parts), LiveLog(store, "r-1"))
            start = time.perf_counter()
            count = updates.catch_up()
            rows.append([how, time.perf_counter() - start, count, store.listings, store.others])
            if how == "without a snapshot":  # the last change completes a thousand, and is written as any is
                updates.change(lambda: record(changes, shop))
                updates.snapshotting.join()
    return rows


def taken(work) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def measured(rows: int, newcomers: int, changes: int, repeats: int) -> dict:
    parts = release(rows, np.random.default_rng(0))
    shop = Shop(parts, 1)
    figures = {**where("changes"), "rows": shop.live.base.rows, "newcomers": newcomers, "changes": changes}
    for name, expression in (("price", PRICE), ("brand", BRAND)):
        times = []
        for _ in range(repeats):
            shop.live.view.filters.index._cache.clear()
            times.append(taken(lambda one=expression: shop.live.compile(one)))
        figures[f"filter {name} before"] = statistics.median(times)
    figures["price, the first ones"] = statistics.median(taken(shop.price) for _ in range(repeats))
    figures[f"{newcomers:,} newcomers at once"] = taken(lambda: shop.fill(newcomers, 0))
    figures[f"{changes:,} prices, one after the other"] = taken(lambda: shop.fill(0, changes))
    shop.search()
    for what in CHANGES:
        change, first, second, filtered = [], [], [], []
        for _ in range(repeats):
            change.append(taken(getattr(shop, what)))
            first.append(taken(shop.search))
            second.append(taken(shop.search))
            filtered.append(taken(lambda: shop.live.compile(PRICE)))
            shop.live.compile(BRAND)
        for name, times in (("change", change), ("first search", first), ("next search", second), ("filter", filtered)):
            figures[f"{what}: {name}"] = statistics.median(times)
    state = []
    figures["state made"] = taken(lambda: state.append(shop.live.state()))
    fresh = LiveTrie(**parts)
    figures["state restored"] = taken(lambda: fresh.restore_state(state[0]))
    figures["search after it"] = taken(lambda: Shop.search(type("Restored", (), {"live": fresh})))
    figures["starts"] = starts(parts, changes)
    return rounded(figures)


def report(figures: dict) -> str:
    rows = [
        [what, *(figures[f"{what}: {one}"] for one in ("change", "first search", "next search", "filter"))]
        for what in CHANGES
    ]
    settings = (*where(""), "rows", "newcomers", "changes", "starts")
    start = ["a replica's start", "seconds", "changes applied one by one", "listings", "other requests"]
    others = [[name, value] for name, value in figures.items() if ": " not in name and name not in settings]
    return (
        f"# Live changes\n\nWritten by `benchmarks/changes.py`: {figures['rows']:,} products, {figures['newcomers']:,} inserted "
        f"since and {figures['changes']:,} prices changed; medians of processor time, ms, one thread. "
        f"Machine: {figures['machine']}.\n\n"
        + table(["one change", "itself", "first search after it", "next search", "first filter by price"], rows)
        + "\n"
        + table(["beside it", "ms"], others)
        + "\n"
        + table(start, figures["starts"], title=f"Ready after {figures['changes']:,} changes")
    )


if __name__ == "__main__":
    parser = parser_of(__doc__, page="")
    parser.add_argument("--rows", type=whole, default=2_000_000)
    parser.add_argument("--newcomers", type=whole, default=20_000)
    parser.add_argument("--changes", type=whole, default=50_000)
    parser.add_argument("--repeats", type=whole, default=30)
    options = parser.parse_args()
    finish(measured(options.rows, options.newcomers, options.changes, options.repeats), report, options)
