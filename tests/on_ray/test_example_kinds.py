"""All kinds of examples made from a small catalogue in this process, against joins by dictionary; then mixed by the task."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import LsaEncoder
from catid2_ray.config import EXAMPLE_KINDS, Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, RecipeError
from catid2_ray.hashing import hash_of_text, uniform
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages import catalog, examples, recent, teacher, validation
from catid2_ray.on_ray.stages.train_generator import GeneratorTask
from catid2_ray.retrieval.trie import Trie
from tests.oracles import teacher as oracle
from tests.oracles.examples import epochs_of, user_tokens
from tests.unit.generator.test_doc2query import save_tiny_doc2query

SPACE = DocidSpace((6, 6, 6))
MIX = {"query": 1.0, "title": 0.5, "span": 0.25, "user": 0.5, "synthetic": 0.1, "teacher": 0.3}
STAGES_OF_PARTS = (catalog, examples, recent, teacher)  # modules that work part by part


def serially(handler, arguments, specs, **_):
    worker = handler(**arguments)
    return [worker({**spec, "position": position}) for position, spec in enumerate(specs)]


def write_source(folder):
    """Products and pairs of the generated shop; every second training pair knows who asked, with one unknown product."""
    made = generate(products=90, queries=40, seed=3)
    pairs, names = made.pairs, made.products["product_id"].to_pylist()
    draw = np.random.default_rng(0)
    recent_of = [
        [names[i] for i in draw.integers(0, 90, row % 5)] + (["gone"] if row % 5 == 3 else []) if row % 2 else []
        for row in range(pairs.num_rows)
    ]
    users = [["age 20"] if row % 4 == 1 else None for row in range(pairs.num_rows)]
    pairs = pairs.append_column("user", pa.array(users, pa.list_(pa.string())))
    pairs = pairs.append_column("recent", pa.array(recent_of, pa.list_(pa.string())))
    pq.write_table(made.products, folder / "products.parquet")
    pq.write_table(pairs, folder / "pairs.parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe, the catalogue, IDs and examples as committed artefacts of a local store, made without Ray."""
    folder = tmp_path_factory.mktemp("shop")
    write_source(folder)
    recipe = Recipe.build(
        {
            "store": str(folder / "store"), "seed": 5,
            "catalog": {"root": str(folder), "rows_per_part": 40},
            "generator": {
                "new_rows": "mean",
                "vocabulary": 400, "min_relevance": 2, "relevance_weights": {2: 0.5, 3: 1.0}, "mix": MIX, "query_tokens": 10,
                "user_tokens": 4, "user_recent": 2, "span_tokens": 6, "span_windows": 2, "doc2query_per_product": 2,
                "doc2query": save_tiny_doc2query(folder / "doc2query"), "teacher_draws": 3,
            },
        }
    )  # fmt: skip
    store = Store(recipe.store)
    job = SimpleNamespace(recipe=recipe, store=store, seen=None)

    def attempt(kind):
        return Attempt(store, kind, settings={}, parents={}, recipe={})

    with pytest.MonkeyPatch.context() as patch:
        for module in STAGES_OF_PARTS:
            patch.setattr(module, "map_parts", serially)
        products = catalog._make_products(job, attempt("catalog"), None)
        pairs = catalog._make_pairs(job, attempt("pairs"), products)
        ids = write_ids(store, attempt("ids"), products)
        embeddings, encoder = write_embeddings(store, attempt("embeddings"), products, folder / "encoder")
        parents = {"catalog": products, "pairs": pairs, "ids": ids, "embeddings": embeddings}
        written = examples._make(job, attempt("examples"), parents)
    return SimpleNamespace(
        recipe=recipe, store=store, **parents, parents=parents, examples=written, job=job, encoder=encoder
    )


def write_ids(store, attempt, products):
    packed_N, start, files = np.random.default_rng(1).permutation(216)[: products.rows], 0, []
    for entry in products.parts():
        names = store.read_table(products.file(entry["name"]), columns=["product_id"])["product_id"]
        codes = SPACE.unpack(packed_N[start : start + len(names)])
        start += len(names)
        table = pa.table({"product_id": names, "codes": fixed_lists(codes, pa.int32())})
        files.append({**store.write_table(attempt.name(entry["name"]), table), "part": entry["part"]})
    return attempt.commit(files, metrics={"codes_per_level": list(SPACE.codes_per_level)})


def write_embeddings(store, attempt, products, folder):
    """The titles' vectors by an encoder fitted to them, which lies beside them."""
    tables = {e["name"]: store.read_table(products.file(e["name"]), columns=["title"]) for e in products.parts()}
    titles = [title for table in tables.values() for title in table["title"].to_pylist()]
    encoder = LsaEncoder.fit(titles, width=8, vocabulary=500, seed=0)
    encoder.save(folder)
    files = store.upload(folder, attempt.name("encoder"))
    for entry in products.parts():
        vector_ND = encoder.encode(tables[entry["name"]]["title"].to_pylist())
        table = pa.table({"embedding": fixed_lists(vector_ND, pa.float32())})
        files.append({**store.write_table(attempt.name(entry["name"]), table), "part": entry["part"]})
    return attempt.commit(files, metrics={"width": 8}), encoder


def read_all(made, manifest, prefix="part-"):
    return pa.concat_tables([made.store.read_table(manifest.file(entry["name"])) for entry in manifest.named(prefix)])


def tokenizer_of(made):
    return AutoTokenizer.from_pretrained(made.store.path(made.examples.file("tokenizer")))


def ids_of(made):
    table = read_all(made, made.ids)
    return dict(zip(table["product_id"].to_pylist(), matrix(table["codes"]).tolist()))


def teaching(made):
    pairs = read_all(made, made.pairs, "pairs/part-").to_pylist()
    return [row for row in pairs if row["split"] == "train" and row["relevance"] >= 2]


def rows_of(made, kind):
    """Counter of (input without padding, codes, weight)."""
    table = read_all(made, made.examples)
    chosen = np.asarray(table["kind"]) == EXAMPLE_KINDS.index(kind)
    columns = matrix(table["input_ids"])[chosen], matrix(table["codes"])[chosen], np.asarray(table["weight"])[chosen]
    return Counter(
        (tuple(int(token) for token in ids if token), tuple(codes.tolist()), float(weight))
        for ids, codes, weight in zip(*columns)
    )


def test_queries_titles_and_users_meet_their_ids(made):
    tokenizer, codes = tokenizer_of(made), ids_of(made)

    def tokens(text):
        return tokenizer(text, max_length=10, truncation=True)["input_ids"]

    expected, users = Counter(), Counter()
    base = len(tokenizer) - 18
    for row in teaching(made):
        target, weight = tuple(codes[row["product_id"]]), {2.0: 0.5, 3.0: 1.0}[row["relevance"]]
        expected[tuple(tokens(row["query"])), target, weight] += 1
        latest = [codes[name] for name in row["recent"][-2:] if name in codes]
        words = [token for text in row["user"] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if latest or words:
            line = user_tokens(
                tokens(row["query"]), words, latest, base=base, codes_per_level=(6, 6, 6), attribute_tokens=4, most=2
            )
            users[tuple(line), target, weight] += 1
    assert rows_of(made, "query") == expected and rows_of(made, "user") == users
    products = read_all(made, made.catalog)
    titles = Counter(
        (tuple(tokens(title)), tuple(codes[name]), 1.0)
        for name, title in zip(products["product_id"].to_pylist(), products["title"].to_pylist())
    )
    assert rows_of(made, "title") == titles
    metrics = made.examples.metrics
    assert metrics["users_without_history"] == len(teaching(made)) - users.total() > 0
    assert metrics["texts_cut"] > 0 and metrics["pairs_without_product"] == 0
    asked = [name for row in teaching(made) for name in row["recent"][-2:]]
    assert metrics["recent_without_product"] == sum(name not in codes for name in asked)
    words = [tokenizer(" ".join(row["user"]), add_special_tokens=False)["input_ids"] for row in teaching(made)]
    assert metrics["attributes_cut"] == sum(len(ids) > 4 for ids in words)


def test_spans_and_synthetic_queries_meet_their_ids(made):
    tokenizer, codes = tokenizer_of(made), ids_of(made)
    products = read_all(made, made.catalog)
    whole = {
        tuple(codes[name]): tokenizer(text or "", add_special_tokens=False)["input_ids"]
        for name, text in zip(products["product_id"].to_pylist(), products["description"].to_pylist())
    }
    spans = rows_of(made, "span")
    assert spans.total() == made.examples.metrics["span_examples"] > 90
    for (ids, target, weight), count in spans.items():
        text = whole[target]
        assert weight == 1.0 and count == 1 and ids[-1] == 1 and len(ids) <= 7
        assert any(text[start : start + len(ids) - 1] == list(ids[:-1]) for start in range(len(text)))
    synthetic = made.examples.metrics["synthetic_examples"] + made.examples.metrics["synthetic_empty"]
    assert synthetic == 2 * 90 and rows_of(made, "synthetic").total() > 90


def taught_by_oracle(made, *, draws=3):
    """What a teacher's examples should be, query by query."""
    tokenizer, codes = tokenizer_of(made), ids_of(made)
    products, pairs = read_all(made, made.catalog), Counter(row["query"] for row in teaching(made))
    vector_ND, expected = made.encoder.encode(products["title"].to_pylist()), Counter()
    for text, count in pairs.items():
        best = oracle.nearest(made.encoder.encode([text]) @ vector_ND.T, 64)[0]
        share_M = oracle.shares([-score for score, _ in best], 0.05)
        offset = float(uniform(hash_of_text(np.array([text])), 5, 10)[0])
        for place in oracle.draws(share_M, count * draws, offset):
            target = tuple(codes[products["product_id"][best[place][1]].as_py()])
            tokens = tokenizer(text, max_length=10, truncation=True)["input_ids"]
            expected[tuple(tokens), target, 1.0] += 1
    return expected


def test_a_teacher_names_the_nearest_products(made):
    expected, taught = taught_by_oracle(made), rows_of(made, "teacher")
    assert taught.total() == expected.total() == 3 * len(teaching(made)) > 90
    # A point on the edge between two products may fall to either.
    assert (taught - expected).total() <= 0.01 * taught.total()
    titles = {row[1] for row in rows_of(made, "title")}
    assert {row[1] for row in taught} <= titles and len({row[1] for row in taught}) > 20


def test_few_of_many_queries_are_taught_group_by_group(made, monkeypatch):
    monkeypatch.setattr(teacher, "map_parts", serially)
    monkeypatch.setattr(teacher, "_GROUP", 5)
    specs, texts = catalog.part_specs(made.catalog, made.pairs), {row["query"] for row in teaching(made)}

    def taught(folder, most):
        groups = teacher.exchange(
            made.store, folder, specs, ids=made.ids.folder, vectors=ProductVectors.of(made.store, made.parents),
            encoder={"name": "lsa", "tokens": 8}, tuned=None, teaches=examples._teaching(made.recipe.generator), queries=len(texts),
            most=most, draws=3, seed=5, workers=1,
        )  # fmt: skip
        parts = [teacher.answers(made.store, folder, place, groups) for place in range(len(specs))]
        rows = [
            (text, tuple(codes)) for queries, codes_NL in parts for text, codes in zip(queries.to_pylist(), codes_NL)
        ]
        return groups, Counter(rows)

    groups, everything = taught("exchange-all", 1000)
    assert groups == -(-len(texts) // 5) > 2 and {text for text, _ in everything} == texts
    assert everything.total() == made.examples.metrics["teacher_examples"]
    _, few = taught("exchange-few", len(texts) // 2)
    some = {text for text, _ in few}
    assert 0.2 < len(some) / len(texts) < 0.8
    assert few == Counter({row: count for row, count in everything.items() if row[0] in some})


def test_examples_do_not_depend_on_the_order_of_the_work(made, monkeypatch):
    def backwards(handler, arguments, specs, **_):
        results = [handler(**arguments)({**spec, "position": p}) for p, spec in reversed(list(enumerate(specs)))]
        return results[::-1]

    for module in STAGES_OF_PARTS:
        monkeypatch.setattr(module, "map_parts", backwards)
    attempt = Attempt(made.store, "examples", settings={"again": 1}, parents={}, recipe={})
    again = examples._make(made.job, attempt, made.parents)
    assert again.digest == made.examples.digest


def test_a_kind_without_rows_is_refused(made, monkeypatch, tmp_path):
    for module in STAGES_OF_PARTS:
        monkeypatch.setattr(module, "map_parts", serially)
    shop = generate(products=60, queries=30, seed=1)
    pq.write_table(shop.products, tmp_path / "products.parquet")
    pq.write_table(shop.pairs, tmp_path / "pairs.parquet")
    values = {
        "catalog": {"root": str(tmp_path)},
        "generator": {"mix": {"query": 1, "user": 1}, "min_relevance": 2, "vocabulary": 200},
    }
    recipe = Recipe.build(values | {"store": str(tmp_path / "store")})
    job = SimpleNamespace(recipe=recipe, store=Store(recipe.store), seen=None)
    products = catalog._make_products(job, Attempt(job.store, "catalog", settings={}, parents={}, recipe={}), None)
    pairs = catalog._make_pairs(job, Attempt(job.store, "pairs", settings={}, parents={}, recipe={}), products)
    ids = write_ids(job.store, Attempt(job.store, "ids", settings={}, parents={}, recipe={}), products)
    attempt = Attempt(job.store, "examples", settings={}, parents={}, recipe={})
    with pytest.raises(
        InputError, match="mix asks for user examples, but no training pair has a user.*Set mix.user to 0"
    ):
        examples._make(job, attempt, {"catalog": products, "pairs": pairs, "ids": ids})


class Held:
    """Rows as the worker holds them."""

    def __init__(self, table):
        self.columns = {name: matrix(table[name]) for name in GeneratorTask.columns}

    def take(self, index):
        return {name: values[index] for name, values in self.columns.items()}


def task_of(made, **changes):
    recipe = made.recipe.generator.model_copy(update=changes)
    counts = {kind: made.examples.metrics[f"{kind}_examples"] for kind in EXAMPLE_KINDS}
    return GeneratorTask(recipe, tokenizer_of(made), SPACE, counts, 5)


def test_stages_mix_their_kinds_epoch_after_epoch(made):
    stages = [
        {"name": "titles", "mix": {"title": 1}, "epochs": 2},
        {"name": "all", "mix": MIX, "epochs": 3, "learning_rate": 1e-4},
    ]
    recipe = Recipe.build({"catalog": {"synthetic": {}}, "generator": {"doc2query": "m", "stages": stages}}).generator
    task, rows = task_of(made, stages=recipe.stages), Held(read_all(made, made.examples))
    counts = task.counts
    wanted = {kind: round(MIX[kind] * counts["query"]) for kind in EXAMPLE_KINDS}
    assert [tuple(phase) for phase in task.phases(0)] == [
        (2, counts["query"], task.recipe.learning_rate), (3, sum(wanted.values()), 1e-4)
    ]  # fmt: skip
    assert [task.stage_of(epoch) for epoch in range(5)] == [0, 0, 1, 1, 1]
    orders = [task.order(rows, seed=9, epoch=epoch, batch=4, steps=0) for epoch in range(5)]
    kinds = [Counter(EXAMPLE_KINDS[kind] for kind in rows.columns["kind"][order]) for order in orders]
    assert kinds[:2] == [{"title": counts["query"]}] * 2 and kinds[2:] == [wanted] * 3
    for kind in EXAMPLE_KINDS:
        number = EXAMPLE_KINDS.index(kind)
        place = np.flatnonzero(rows.columns["kind"] == number)
        fixed = place[np.random.default_rng((9, 1, sorted(EXAMPLE_KINDS).index(kind))).permutation(len(place))]
        expected = epochs_of(fixed.tolist(), wanted[kind], 3, start=2)
        for order, rows_of_kind in zip(orders[2:], expected):
            assert sorted(order[rows.columns["kind"][order] == number].tolist()) == sorted(rows_of_kind)
    assert np.array_equal(orders[3], task.order(rows, seed=9, epoch=3, batch=4, steps=0))
    assert task.end_epoch(None, epoch=4, means={}, history=[]) == ({"stage": "all"}, False)


def test_only_the_last_stage_is_scored(made):
    stages = [{"name": "titles", "mix": {"title": 1}}, {"name": "queries", "mix": {"query": 1}}]
    recipe = Recipe.build({"catalog": {"synthetic": {}}, "generator": {"stages": stages}}).generator
    task, module = task_of(made, stages=recipe.stages), SimpleNamespace(model=None)
    assert task.validate(module, 0) == {}
    task.validation = SimpleNamespace(figures=lambda model, beat: {"recall@50": 0.4, "score": 0.4})
    assert task.validate(module, 0) == {"recall@50": 0.4}
    assert task.validate(module, 1) == {"recall@50": 0.4, "score": 0.4}


def test_only_titles_lose_words_and_weights_go_along(made):
    task, rows = task_of(made), Held(read_all(made, made.examples))
    columns = rows.take(np.arange(len(rows.columns["kind"])))
    fed = task.prepare(columns, seed=3)
    assert np.array_equal(fed["input_ids"], columns["input_ids"])
    changed = (fed["kept"] != (columns["input_ids"] != 0)).any(1)
    assert set(columns["kind"][changed]) == {EXAMPLE_KINDS.index("title")} and changed.sum() > 50
    assert np.array_equal(fed["weight"], columns["weight"]) and set(fed["weight"]) == {0.5, 1.0}
    assert task.trim(fed)["input_ids"].any(0).all()


def test_a_mix_of_what_is_not_there_is_refused(made):
    task = task_of(made)
    with pytest.raises(RecipeError, match="the mix wants user, but there are no such examples"):
        GeneratorTask(task.recipe, task.tokenizer, SPACE, task.counts | {"user": 0}, 5)


def test_validation_is_the_recall_of_the_search(made, tmp_path):
    """The sample is bounded and seeded; the recall is that of a ranking by the model's own scores over all IDs."""
    tokenizer, codes = tokenizer_of(made), ids_of(made)

    def sample(**changes):
        given = {"queries": 3, "min_relevance": 2, "query_tokens": 10, "seed": 5} | changes
        return validation.sample(made.store, made.catalog, made.pairs, made.ids, tokenizer, **given)

    pairs = [
        row
        for row in read_all(made, made.pairs, "pairs/part-").to_pylist()
        if row["split"] == "validation" and row["relevance"] >= 2
    ]
    everything = sample(queries=1000)
    assert len(everything.packed_P) == len({(row["query_id"], row["product_id"]) for row in pairs})
    small, again = sample(), sample()
    assert small.input_ids_QT.shape == (3, 10) and np.array_equal(small.input_ids_QT, again.input_ids_QT)
    names = list(codes)
    trie = Trie.build(np.array([codes[name] for name in names]), codes_per_level=SPACE.codes_per_level)
    validation._TRIES[made.ids.digest] = trie
    model = task_of(made, width=16, heads=2, feed_forward=16, layers=1).build().model.eval()
    figures = everything.figures(model)
    result = validation.constrained_beam_search(
        model, trie, everything.input_ids_QT, everything.input_ids_QT != 0, beam_width=216, top_k=50
    )
    found = [{tuple(docid) for docid in docids.tolist()} for docids in result.docid_BKL]
    wanted = {}
    for query, packed in zip(everything.query_P.tolist(), SPACE.unpack(everything.packed_P).tolist()):
        wanted.setdefault(query, []).append(tuple(packed) in found[query])
    exact = np.mean([np.mean(hits) for hits in wanted.values()])
    assert figures["score"] == figures["recall@50"] and abs(figures["score"] - exact) < 0.15
    with pytest.raises(InputError, match="no pair of split 'validation' with relevance ≥ 9"):
        sample(min_relevance=9)
