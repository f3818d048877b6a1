"""Prompts from judgements, and the task of the training loop on them, in one process: what Ray would carry is called here."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from transformers import T5ForConditionalGeneration

from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.vocabulary import train_tokenizer, with_docid_tokens
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.ranker import open_ranker
from catid2_ray.on_ray.stages import prompts
from catid2_ray.on_ray.stages.align import AlignTask
from catid2_ray.retrieval.trie import Trie
from tests.conftest import TINY

SPACE = DocidSpace((6, 6, 6))
QUERIES = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("hinge", "lock", "lamp")]


def judgements(names) -> pa.Table:
    """Five products a query, every third query of the validation split; one pair names a product that is not there."""
    rng = np.random.default_rng(2)
    rows = [
        (f"q{q}", query, names[p], float(rng.integers(1, 4)), "validation" if q % 3 == 2 else "train",
         ["paid", "clicked", "exposed", None][p % 4])
        for q, query in enumerate(QUERIES) for p in rng.choice(len(names), 5, replace=False)
    ]  # fmt: skip
    rows.append(("q0", QUERIES[0], "gone", 3.0, "train", "paid"))
    columns = ["query_id", "query", "product_id", "relevance", "split", "behaviour"]
    return pa.table([pa.array(column) for column in zip(*rows)], names=columns)


@pytest.fixture
def shop(tmp_path):
    """Two parts of products, pairs and IDs, a tokenizer and a generator, committed as the stages before would."""
    store = Store(str(tmp_path / "store"))
    rng = np.random.default_rng(0)
    names = [f"p{number:02d}" for number in range(40)]
    packed_N = np.sort(rng.choice(SPACE.capacity, 40, replace=False))
    pairs = judgements(names)

    def attempt(kind):
        return Attempt(store, kind, settings={"query_tokens": 8}, parents={}, recipe={})

    catalog, judged, ids, examples, trained = map(attempt, ("catalog", "pairs", "ids", "examples", "generator"))
    files = {"catalog": [], "pairs": [], "ids": []}
    for part, half in enumerate((names[::2], names[1::2])):
        place_N = np.arange(40)[part::2]
        of_part = pairs.filter(pc.is_in(pairs["product_id"], pa.array(half + (["gone"] if part else []))))
        table = pa.table(
            {"product_id": half, "codes": fixed_lists(SPACE.unpack(packed_N[place_N]).astype(np.int32), pa.int32())}
        )
        for kind, made, name, rows in (
            ("catalog", catalog, f"part-{part:05d}.parquet", pa.table({"product_id": half})),
            ("pairs", judged, f"pairs/part-{part:05d}.parquet", of_part),
            ("ids", ids, f"part-{part:05d}.parquet", table),
        ):
            files[kind].append({**store.write_table(made.name(name), rows), "part": part})
    local = tmp_path / "local"
    Trie.from_sorted(packed_N, codes_per_level=SPACE.codes_per_level).save(local / "ids" / "trie")
    products = pa.table({"product_id": names})
    with pa.OSFile(str(local / "ids" / "products.arrow"), "wb") as sink, pa.ipc.new_file(sink, products.schema) as out:
        out.write_table(products)
    tokenizer = with_docid_tokens(train_tokenizer(QUERIES * 3, size=80), SPACE)
    model = small_t5(
        vocabulary=len(tokenizer) - 18, width=16, layers=1, heads=2, feed_forward=24, dropout=0.1,
        codes_per_level=SPACE.codes_per_level,
    )  # fmt: skip
    for folder in (local / "examples" / "tokenizer", local / "generator"):
        tokenizer.save_pretrained(folder)
    model.save_pretrained(local / "generator")
    metrics = {"codes_per_level": list(SPACE.codes_per_level)}
    return store, pairs, dict(zip(names, packed_N.tolist())), {
        "catalog": catalog.commit(files["catalog"], metrics={}),
        "pairs": judged.commit(files["pairs"], metrics={"pairs": pairs.num_rows, "behaviour": True}),
        "ids": ids.commit([*files["ids"], *store.upload(local / "ids", ids.folder)], metrics=metrics),
        "examples": examples.commit(store.upload(local / "examples", examples.folder), metrics={}),
        "trained": trained.commit(store.upload(local / "generator", trained.folder), metrics={}),
    }  # fmt: skip


def here(handler, arguments, specs, **_):
    """`map_parts` in this process."""
    made = handler(**arguments)
    return [made({**spec, "position": position}) for position, spec in enumerate(specs)]


def make(shop, monkeypatch, **alignment):
    store, _, _, parents = shop
    monkeypatch.setattr(prompts, "map_parts", here)
    recipe = Recipe.build(TINY | {"store": store.uri, "alignment": {"judged_max": 6, **alignment}})
    job = SimpleNamespace(recipe=recipe, store=store)
    made = prompts._make(job, Attempt(store, "prompts", settings=alignment, parents={}, recipe={}), parents)
    return made, recipe


def tables(store, manifest, folder):
    found = [store.read_table(manifest.file(entry["name"])) for entry in manifest.named(f"{folder}-")]
    return pa.concat_tables(found).to_pylist()


@pytest.mark.parametrize("buckets", [1, 3])
def test_prompts_hold_what_was_judged(shop, monkeypatch, buckets):
    store, pairs, packed, _ = shop
    monkeypatch.setattr(prompts, "_BUCKET_PAIRS", -(-pairs.num_rows // buckets))
    made, recipe = make(shop, monkeypatch)
    assert made.rows == 6 and made.metrics["validation_queries"] == 3 and made.metrics["pairs_without_product"] == 1
    assert made.metrics["rewards"] == "behaviour" and not store.exists(f"{made.folder}/exchange")
    worth = {"paid": 1.0, "clicked": 1.0, "exposed": 0.5, None: 0.1}
    for split, folder in prompts.FOLDERS.items():
        for row in tables(store, made, folder):
            mine = [p for p in pairs.to_pylist() if p["query"] == row["query"] and p["product_id"] in packed]
            assert {p["split"] for p in mine} == {split}
            expected = {packed[p["product_id"]]: (worth[p["behaviour"]], int(p["relevance"] >= 2)) for p in mine}
            found = {i: (r, n) for i, r, n in zip(row["judged"], row["reward"], row["relevant"]) if i >= 0}
            assert found.keys() == expected.keys()
            for docid, (reward, relevant) in expected.items():
                assert found[docid] == (pytest.approx(reward), relevant)
            assert row["number"] == (row["part"] << 32) + row["index"]


def test_grades_and_a_table_of_scores(shop, monkeypatch, tmp_path):
    store, pairs, packed, parents = shop
    parents["pairs"].metrics["behaviour"] = False
    scores = pa.table({"query_id": ["q0", "q0", "q4", "q9"], "product_id": ["p03", "p04", "p30", "p01"],
                       "score": [3.0, -1.0, 2.0, 0.0]})  # fmt: skip
    pq.write_table(scores, tmp_path / "scores.parquet")
    made, _ = make(shop, monkeypatch, ranker_scores=f"{tmp_path}/scores.parquet", grades=[[1, 0.2], [3, 0.9]])
    rows = {row["query"]: row for row in tables(store, made, "part")}
    assert rows[QUERIES[0]]["scored"][:3] == [packed["p03"], packed["p04"], -1]
    assert rows[QUERIES[0]]["score"][:2] == [3.0, -1.0] and rows[QUERIES[4]]["scored"][0] == packed["p30"]
    assert {round(r, 4) for row in rows.values() for r, i in zip(row["reward"], row["judged"]) if i >= 0} <= {
        0.2, 0.55, 0.9,
    }  # fmt: skip
    with pytest.raises(InputError, match="there is no .*absent.parquet; give a parquet file with query_id, product_id"):
        prompts.score_file(f"{tmp_path}/absent.parquet")
    pq.write_table(scores.drop(["score"]), tmp_path / "less.parquet")
    with pytest.raises(InputError, match="missing column score; found query_id, product_id"):
        prompts.score_file(f"{tmp_path}/less.parquet")


class Rows:
    """A worker's rows in memory."""

    def __init__(self, store, manifest, columns):
        table = pa.concat_tables([store.read_table(manifest.file(e["name"])) for e in manifest.parts()])
        self.columns, self.rows = {name: matrix(table[name]) for name in columns}, table.num_rows

    def take(self, index):
        return {name: values[index] for name, values in self.columns.items()}


def late(query: str, product_ids: list[str]) -> list[float]:
    assert query in QUERIES
    return [float(name[1:]) for name in product_ids]


def test_the_task_rolls_out_updates_measures_and_exports(shop, monkeypatch, tmp_path):
    settings = {
        "enabled": True,
        "steps": 8,
        "report_every": 4,
        "updates": 2,
        "batch": 4,
        "group": 4,
        "learning_rate": 0.01,
    }
    monkeypatch.setenv("CATID2_RANKERS", "tests.on_ray.test_align_task:late")
    made, recipe = make(shop, monkeypatch, **settings, ranker="tests.on_ray.test_align_task:late", kl_weight=0.05)
    store, _, _, parents = shop
    task = AlignTask(recipe.alignment, store, {**parents, "prompts": made}, seed=0)
    module = task.build()
    rows = Rows(store, made, task.columns)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)

    class Engine:
        def __init__(self):
            self.module = module

        def __call__(self, *inputs):
            return module(*inputs)

    history, asked = [], []
    assert recipe.alignment.epochs == 2 and task.rows_per_epoch(6) == 16
    for epoch in range(2):
        order = task.order(rows, seed=1, epoch=epoch, batch=4, steps=4)
        assert np.array_equal(order.reshape(2, 2, 4)[:, 0], order.reshape(2, 2, 4)[:, 1]), "two updates a rollout"
        asked.append(order.reshape(2, 2, 4)[:, 0].ravel())
        sums = {}
        for step in range(4):
            batch = task.prepare(rows.take(order[4 * step : 4 * step + 4]), seed=10 * epoch + step)
            tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
            loss, terms = task.loss(Engine(), tensors, gather=None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums = {name: sums.get(name, 0) + float(value) / 4 for name, value in terms.items()}
        figures, changed = task.end_epoch(module, epoch=epoch, means=sums, history=history)
        assert not changed
        history.append({"epoch": epoch, **sums, **figures})
    assert sorted(np.concatenate(asked)[:6]) == list(range(6))
    assert {"reward", "kl", "entropy", "without_variance", "experts", "clipped"} <= set(history[0])
    assert history[0]["before"]["kl"] == pytest.approx(0, abs=1e-6) and history[1]["before"] == history[0]["before"]
    assert history[1]["after"]["kl"] > 0.001 and history[1]["measured_on"] == "validation"
    assert history[1]["after"]["queries"] == 3
    (tmp_path / "out").mkdir()
    task.export(module, tmp_path / "out", history)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (
        again.config.docid_codes_per_level == [6, 6, 6]
        and len(json.loads((tmp_path / "out/history.json").read_text())) == 2
    )
    assert not torch.equal(again.shared.weight, task._reference.shared.weight)


def test_pieces_of_a_step_keep_their_rollouts_apart(shop, monkeypatch):
    made, recipe = make(shop, monkeypatch, enabled=True, updates=2, batch=4, group=4)
    task = AlignTask(recipe.alignment, shop[0], {**shop[3], "prompts": made}, seed=0)
    module = task.build()
    rows, rolled = Rows(shop[0], made, task.columns), []
    order = task.order(rows, seed=1, epoch=0, batch=4, steps=4)
    whole = type(task._environment).experience
    monkeypatch.setattr(
        type(task._environment), "experience",
        lambda self, *a, **k: rolled.append(a[2]["number"].tolist()) or whole(self, *a, **k),
    )  # fmt: skip
    engine = type("Engine", (), {"module": module, "__call__": lambda self, *inputs: module(*inputs)})()
    for step in range(4):
        batch = task.prepare(rows.take(order[4 * step : 4 * step + 4]), seed=step)
        for start in (0, 2):  # as with micro_batch 2
            piece = {
                name: torch.from_numpy(np.ascontiguousarray(values[start : start + 2]))
                for name, values in batch.items()
            }
            assert torch.isfinite(task.loss(engine, piece, gather=None)[0])
    number_N = rows.columns["number"]
    assert rolled == [number_N[order[at : at + 2]].tolist() for at in (0, 2, 8, 10)] and not task._rolled


def test_a_ranker_that_cannot_be_called_is_refused(monkeypatch):
    names = ["tests.on_ray.test_align_task:late", "nowhere:score", "tests.on_ray.test_align_task:QUERIES"]
    monkeypatch.setenv("CATID2_RANKERS", ", ".join(names))
    assert open_ranker(None) is None
    assert open_ranker("tests.on_ray.test_align_task:late")("red hinge", ["p03"]) == [3.0]
    with pytest.raises(RecipeError, match="'nowhere:score' cannot be imported .*on the path of every worker"):
        open_ranker("nowhere:score")
    with pytest.raises(RecipeError, match="is a list, expected a function"):
        open_ranker("tests.on_ray.test_align_task:QUERIES")
