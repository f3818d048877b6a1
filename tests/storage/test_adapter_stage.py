"""The adapter's stage without Ray: which pairs teach and which judge, what is adopted, what is kept, and that readers get V d."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.config import AdapterRecipe, Recipe
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.vectors import ProductVectors, adapted_queries, open_adapter
from catid2_ray.on_ray.stages import adapter as stage
from catid2_ray.on_ray.stages.catalog import read_sample, read_vectors
from catid2_ray.quantizer.adapter import LinearAdapter, Probe

ROWS, PARTS, D = 90, 3, 4
SPLITS = {name: {"pairs": 60, "queries": 20, "relevance_max": 3.0} for name in ("train", "validation", "test")}


def vector_of(text: str) -> np.ndarray:
    return np.random.default_rng(list(text.encode())).normal(size=D).astype(np.float32)


class Encoder:
    asked: list[str] = []

    def encode(self, texts):
        Encoder.asked = Encoder.asked + [texts]
        return np.stack([vector_of(text) for text in texts])


def commit(store, kind, files: dict, *, settings=None, parents=None, rows=None, **metrics) -> Manifest:
    attempt = Attempt(store, kind, settings=settings or {}, parents=parents or {}, recipe={})
    entries = [
        {**store.write_table(attempt.name(name), table), "part": part}
        for part, (name, table) in enumerate(files.items())
    ]
    return attempt.commit(entries, rows=rows, metrics=metrics)


@pytest.fixture
def parts(local_store):
    """A catalogue of three parts, and of each of twenty queries a split three pairs: the second is less relevant."""
    catalog, embeddings, pairs = {}, {}, {}
    names = np.array([f"p{row:02d}" for row in range(ROWS)])
    for part, rows in enumerate(np.array_split(np.arange(ROWS), PARTS)):
        file, ids = f"part-{part:05d}.parquet", pa.array(names[rows].tolist())
        catalog[file] = pa.table({"product_id": ids})
        vectors = fixed_lists(np.stack([vector_of(name) for name in names[rows]]), pa.float32())
        place = {
            "part": pa.array(np.full(len(rows), part, np.int32)),
            "index": pa.array(np.arange(len(rows), dtype=np.int32)),
        }
        embeddings[file] = pa.table({"product_id": ids, "embedding": vectors, **place})
        judged = [
            {"query": f"{split} {query}", "product_id": names[rows[(7 * query + part) % len(rows)]], "split": split,
             "relevance": 2.4 if part == 1 else 3.0}
            for split in SPLITS for query in range(20)
        ]  # fmt: skip
        pairs[f"pairs/part-{part:05d}.parquet"] = pa.Table.from_pylist(judged)
    made = {"catalog": commit(local_store, "catalog", catalog, rows=ROWS, width=None)}
    made["embeddings"] = commit(
        local_store, "embeddings", embeddings, settings={"encoder": "shop/encoder", "seed": 0}, rows=ROWS, width=D
    )
    made["pairs"] = commit(local_store, "pairs", pairs, splits=SPLITS)
    return made


def job_of(store, *, previous=None, refresh=False, **sections):
    recipe = Recipe.build({"catalog": {"root": "x"}, "embedding": {"encoder": "shop/encoder"}} | sections)

    def produce(kind, settings, parents, work, **_):
        digests = {role: parent.digest for role, parent in parents.items()}
        return work(Attempt(store, kind, settings=settings, parents=digests, recipe={}))

    return SimpleNamespace(
        recipe=recipe, store=store, produce=produce, previous=previous, refresh_adapter=refresh, committed={}
    )


@pytest.fixture
def matched(local_store, parts, monkeypatch):
    """Makes the artefact of matched pairs, in this process."""

    def serially(handler_class, arguments, specs, **_):
        handler = handler_class(**arguments)
        return [handler(json.loads(json.dumps({**spec, "position": place}))) for place, spec in enumerate(specs)]

    monkeypatch.setattr(stage, "map_parts", serially)
    monkeypatch.setattr(stage, "open_encoder", lambda *_: Encoder())

    def make(**sections) -> Manifest:
        Encoder.asked = []
        return stage._match(job_of(local_store, **sections), parts)

    return make


def rows_of(store, manifest, below) -> pa.Table:
    return pa.concat_tables([store.read_table(manifest.file(entry["name"])) for entry in manifest.named(below)])


def test_training_pairs_teach_and_validation_pairs_judge(local_store, parts, matched):
    made = matched()
    taught, judged = rows_of(local_store, made, "part-"), rows_of(local_store, made, "judged/")
    assert made.rows == taught.num_rows == 60 and made.metrics["judged_by"] == "validation"
    assert judged.num_rows == 40, "relevance 2.4 teaches, but is not relevant"
    texts = {key: f"{split} {query}" for split in SPLITS for query in range(20)
             for key in matrix(stage._keys(pa.array([f"{split} {query}"]))).tolist()}  # fmt: skip
    names = {
        int(key): name
        for name in [f"p{row:02d}" for row in range(ROWS)]
        for key in matrix(stage._keys(pa.array([name])))
    }
    for table, split in ((taught, "train"), (judged, "validation")):
        for row in table.to_pylist():
            assert texts[row["query"]].startswith(split)
            np.testing.assert_array_equal(np.float32(row["query_vector"]), vector_of(texts[row["query"]]))
            np.testing.assert_array_equal(np.float32(row["product_vector"]), vector_of(names[row["product"]]))
    assert all(len(texts) == len(set(texts)) for texts in Encoder.asked), "a query of a part is encoded once"
    probe = stage.open_probe(local_store, made)
    assert probe.query_QD.shape == (20, D) and probe.product_ND.shape == (ROWS, D), "no product is there twice"
    for row, query, product in zip(judged.to_pylist(), probe.query_P, probe.product_P, strict=True):
        np.testing.assert_array_equal(np.float32(row["query_vector"]), probe.query_QD[query])
        np.testing.assert_array_equal(np.float32(row["product_vector"]), probe.product_ND[product])


def test_without_a_validation_split_whole_training_queries_judge(local_store, parts, matched):
    parts["pairs"].metrics["splits"] = SPLITS | {"validation": {"pairs": 0, "queries": 0, "relevance_max": None}}
    made = matched(adapter={"held_out": 0.4})
    taught, judged = rows_of(local_store, made, "part-"), rows_of(local_store, made, "judged/")
    asked, held = (set(table["query"].to_pylist()) for table in (taught, judged))
    assert made.metrics["judged_by"] == "train, held out" and 3 <= len(held) <= 14
    assert not asked & held and len(asked | held) == 20 and taught.num_rows == 3 * len(asked)


def test_of_many_pairs_those_of_some_queries_teach(local_store, parts, matched):
    parts["pairs"].metrics["splits"] = SPLITS | {"train": SPLITS["train"] | {"pairs": 200}}
    made = matched(adapter={"pairs": 100})
    asked = rows_of(local_store, made, "part-")["query"].to_pylist()
    assert made.rows == len(asked) == 3 * len(set(asked)) and 15 <= made.rows <= 45


class Engine:
    def __init__(self, module):
        self.module = module

    def __call__(self, *batch):
        return self.module(*batch)


def trained(task: stage.AdapterTask, store, *, epochs: int) -> tuple[LinearAdapter, list[dict]]:
    """As the training loop does it, on one rank; the history as it is when the export is written."""
    table = rows_of(store, task.matched, "part-")
    columns = {name: np.array(matrix(table[name])) for name in task.columns}
    module, history, best, kept = task.build(), [], -1.0, None
    optimiser = torch.optim.SGD(task.parameter_groups(module, weight_decay=0.0), lr=0.02)
    for epoch in range(epochs):
        order = task.order(SimpleNamespace(rows=len(table)), seed=0, epoch=epoch, batch=20, steps=3)
        for index in order.reshape(3, 20):
            loss, _ = task.loss(
                Engine(module), {name: torch.from_numpy(column[index]) for name, column in columns.items()}, gather=None
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        record = {"epoch": epoch, **task.validate(module, epoch)}
        if record["score"] > best:
            best, kept, best_epoch = record["score"], {k: v.clone() for k, v in module.state_dict().items()}, epoch
        history.append(record)
    history[-1] |= {"best_epoch": best_epoch, "best_score": best}
    module.load_state_dict(kept)
    return module, history


@pytest.mark.parametrize("adopted", [True, False])
def test_what_lowers_recall_is_not_adopted(local_store, matched, tmp_path, monkeypatch, adopted):
    """Judged by the pairs that teach, it is; judged by queries that lie where their products lie already, it cannot be."""
    made, cut = matched(), 10
    monkeypatch.setattr(stage, "CUT", cut)
    task = stage.AdapterTask(AdapterRecipe(), store=local_store, matched=made)
    products_ND, taught = stage.open_probe(local_store, made).product_ND, rows_of(local_store, made, "part-")
    queries, query_P = np.unique(matrix(taught["query"]), return_inverse=True)
    query_QD = np.zeros((len(queries), D), np.float32)
    query_QD[query_P] = matrix(taught["query_vector"])
    place = {tuple(row): n for n, row in enumerate(products_ND.tolist())}
    product_P = np.array([place[tuple(row)] for row in matrix(taught["product_vector"]).tolist()])
    if not adopted:
        query_QD, query_P, product_P = products_ND[:20], np.arange(20), np.arange(20)
    task.__dict__["_probe"] = Probe(query_QD=query_QD, product_ND=products_ND, query_P=query_P, product_P=product_P)
    module, history = trained(task, local_store, epochs=4)
    task.export(module, tmp_path, history)
    outcome, exported = stage.outcome(history), LinearAdapter.load(tmp_path)
    assert outcome["adopted"] == adopted and outcome["queries"] == 20
    before, after = (outcome["recall"][when][str(cut)] for when in ("before", "after"))
    assert (after > before and outcome["epoch"] >= 1) if adopted else (after == before and outcome["epoch"] == 0)
    assert torch.equal(exported.product_DD, torch.eye(D)) != adopted
    assert task.__dict__["_probe"].recall(exported, (cut,))[str(cut)] == pytest.approx(after)
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads(json.dumps(history))


def test_where_nothing_teaches_or_judges_the_vectors_stay(local_store, parts, matched):
    job = job_of(local_store, generator={"min_relevance": 5})
    made = stage.run(job, parts)
    assert made.metrics["adopted"] is False and made.metrics["reason"] == "no pair teaches"
    assert open_adapter(local_store, made) is None
    made = stage.run(job_of(local_store, evaluation={"min_relevance": 5}), parts)
    assert made.metrics["reason"] == "no pair judges"


def test_who_has_an_adapter(local_store, parts):
    def reason(**sections):
        return stage.reason_against(job_of(local_store, **sections).recipe, parts)

    assert reason() is None and reason(embedding={"adapter": "none"}) == "embedding.adapter is none"
    parts["catalog"].metrics["width"] = D
    assert "no encoder is known for queries: set serving.query_encoder" in reason()
    assert reason(serving={"query_encoder": "shop/encoder"}) is None
    assert stage.run(job_of(local_store), parts) is None
    linear = job_of(local_store, embedding={"adapter": "linear"})
    with pytest.raises(
        RecipeError, match="embedding.adapter is linear, but the catalogue's embeddings are given .*; or set"
    ):
        stage.run(linear, parts)
    parts["pairs"].metrics["splits"] = SPLITS | {"train": {"pairs": 0}}
    with pytest.raises(RecipeError, match="linear, but the catalogue has no pairs of the train split"):
        stage.run(linear, parts)


def test_the_adapter_is_kept_until_it_is_to_be_refreshed_or_its_space_is_another(local_store, parts, monkeypatch):
    settings = {**AdapterRecipe().identity(), "seed": 7}
    adapter = commit(local_store, "adapter", {}, settings=settings, parents={"matched": "m"}, adopted=True)
    previous = SimpleNamespace(
        parts=dict(parts) | {"adapter": adapter}, release=SimpleNamespace(name="r-1")
    )  # fmt: skip
    monkeypatch.setattr(stage, "_match", lambda *_: pytest.fail("it is learned anew"))
    today = dict(parts)
    today["pairs"] = commit(local_store, "pairs", {}, settings={"new": True}, splits=SPLITS)
    today["catalog"] = commit(local_store, "catalog", {}, settings={"new": True}, width=None)
    job = job_of(local_store, previous=previous)
    assert stage.run(job, today) is adapter and job.committed == {"adapter": adapter.key}
    other = commit(local_store, "embeddings", {}, settings={"encoder": "another", "seed": 0}, width=D)
    for choices, parts_now in (
        ({"refresh": True}, today), ({"adapter": {"epochs": 2}}, today), ({}, today | {"embeddings": other}),
    ):  # fmt: skip
        with pytest.raises(pytest.fail.Exception, match="it is learned anew"):
            stage.run(job_of(local_store, previous=previous, **choices), parts_now)


def test_everything_after_it_reads_adapted_vectors(local_store, parts, tmp_path):
    adapter = LinearAdapter(D)
    with torch.no_grad():
        for matrix_DD in adapter.parameters():
            matrix_DD += 0.2 * torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    adapter.save(tmp_path)
    for adopted in (True, False):
        attempt = Attempt(local_store, "adapter", settings={"adopted": adopted}, parents={}, recipe={})
        made = attempt.commit(local_store.upload(tmp_path, attempt.folder), metrics={"adopted": adopted})
        vectors = ProductVectors.of(local_store, parts | {"adapter": made})
        columns = ["product_id", "embedding", "index"]
        plain = local_store.read_table(parts["embeddings"].file("part-00001.parquet"), columns=columns)
        found = vectors.read("part-00001.parquet", columns)
        expected_ND = adapter.products(matrix(plain["embedding"])) if adopted else matrix(plain["embedding"])
        np.testing.assert_array_equal(matrix(found["embedding"]), expected_ND)
        assert found.drop_columns("embedding") == plain.drop_columns("embedding") and found.column_names == columns
        assert vectors.read("part-00001.parquet", ["product_id"]).column_names == ["product_id"]
        sampled = {"rows": 40, "seed": 1}
        sample, raw = read_vectors(vectors, columns, **sampled), read_sample(
            local_store, parts["embeddings"], columns, **sampled
        )  # fmt: skip
        assert sample["product_id"] == raw["product_id"]
        same = adapter.products(matrix(raw["embedding"])) if adopted else matrix(raw["embedding"])
        np.testing.assert_array_equal(matrix(sample["embedding"]), same)
        encode = adapted_queries(Encoder().encode, open_adapter(local_store, made))
        expected_1D = adapter.queries(vector_of("oak")[None]) if adopted else vector_of("oak")[None]
        np.testing.assert_array_equal(encode(["oak"]), expected_1D)
