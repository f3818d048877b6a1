"""The generator's task with a frozen text encoder: ranks are fed token states, computed once a node. No cluster."""

import fcntl
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertModel

from catid2_ray.config import GeneratorRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import StorageError
from catid2_ray.generator.logits import docid_logits
from catid2_ray.generator.saved import load_generator
from catid2_ray.generator.vocabulary import load_tokenizer, tokenize, with_docid_tokens
from catid2_ray.on_ray.stages.examples import KIND
from catid2_ray.on_ray.stages.token_states import open_states
from catid2_ray.on_ray.stages.train_generator import GeneratorTask
from tests.text_models import save_bert

SPACE = DocidSpace((4, 3, 5))
TEXTS = ["steel hinge", "oak doors 10 ft", "brass hinges", "copper pipe", "oak table"]


class Rows:
    """The five examples, three of queries and two of titles, as a shard gives them."""

    def __init__(self, tokenizer):
        kinds = np.array([KIND["query"]] * 3 + [KIND["title"]] * 2, np.int8)
        codes = np.stack([np.arange(5) % k for k in SPACE.codes_per_level], 1).astype(np.int32)
        self.rows = 5
        self.columns = {"kind": kinds, "weight": np.ones(5, np.float32), "codes": codes,
                        "input_ids": tokenize(tokenizer, TEXTS, length=8)}  # fmt: skip

    def take(self, rows):
        return {name: values[rows] for name, values in self.columns.items()}


def task_of(folder, **settings):
    tokenizer = with_docid_tokens(load_tokenizer(str(folder), kind="encoder_decoder"), SPACE)
    recipe = GeneratorRecipe(
        model="encoder_decoder", encoder=str(folder), width=16, layers=1, heads=2, feed_forward=24, dropout=0,
        **({"query_tokens": 8, "batch": 4} | settings),
    )  # fmt: skip
    books = [np.random.default_rng(level).normal(size=(k, 3)) for level, k in enumerate(SPACE.codes_per_level)]
    return GeneratorTask(recipe, tokenizer, SPACE, {"query": 3, "title": 2}, 5, codebooks=books), Rows(tokenizer)


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CATID2_CACHE", str(tmp_path / "cache"))
    return save_bert(tmp_path / "bert")


def step(task, module, rows):
    order = task.order(rows, seed=1, epoch=0, batch=4, steps=1)
    fed = task.trim(task.prepare(rows.take(order[:4]), seed=2))
    batch = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in fed.items()}
    return fed, task.loss(module, batch, gather=None)[0]


def test_states_give_the_loss_of_the_ids_and_are_computed_once(folder, tmp_path, monkeypatch):
    losses = {}
    for mode in ("frozen", "tuned"):
        task, rows = task_of(folder, encoder_mode=mode, word_keep=1, label_smoothing=0.2, smoothing="near")
        module = task.build()
        fed, losses[mode] = step(task, module.eval(), rows)
        assert ("states" in fed, "input_ids" in fed) == (mode == "frozen", mode == "tuned")
    torch.testing.assert_close(losses["frozen"], losses["tuned"], rtol=2e-3, atol=2e-3)
    assert len(list((tmp_path / "cache" / "token_states").glob("*/cache.json"))) == 1
    task, rows = task_of(folder)
    module = task.build()
    monkeypatch.setattr("catid2_ray.generator.encoder_decoder.ProjectedEncoder.token_states", None)
    step(task, module, rows)


def test_a_frozen_encoder_is_exported_as_it_was_whatever_the_precision(folder, tmp_path, monkeypatch):
    task, _ = task_of(folder)
    module = task.build()
    task.export(module.bfloat16(), tmp_path / "made", [])
    made, was = load_generator(tmp_path / "made")[0], BertModel.from_pretrained(folder)
    for name, weight in made.encoder.text.state_dict().items():
        assert torch.equal(weight, was.state_dict()[name]), name
    whole = task.build()
    monkeypatch.setattr("catid2_ray.on_ray.stages.train_generator.load_text_encoder", None)  # not asked for in float32
    task.export(whole, tmp_path / "whole", [])


def test_a_tuned_encoder_takes_the_place_of_the_one_that_the_recipe_names(folder, tmp_path):
    tuned = BertModel.from_pretrained(folder)
    with torch.no_grad():
        tuned.encoder.layer[0].output.dense.weight.mul_(1.5)
    tuned.save_pretrained(tmp_path / "tuned")
    task, rows = task_of(folder)
    task.tuned = lambda: str(tmp_path / "tuned")
    module = task.build()
    weight = module.model.encoder.text.encoder.layer[0].output.dense.weight
    assert torch.equal(weight, tuned.encoder.layer[0].output.dense.weight)
    fed, _ = step(task, module, rows)
    plain, _ = task_of(folder)
    other, _ = step(plain, plain.build(), rows)
    assert not np.allclose(fed["states"], other["states"])
    task.export(module.bfloat16(), tmp_path / "made", [])
    made = load_generator(tmp_path / "made")[0].encoder.text.encoder.layer[0].output.dense.weight
    assert torch.equal(made, tuned.encoder.layer[0].output.dense.weight), "in float32, of the tuned one"


def test_the_caches_used_last_stay(folder, tmp_path):
    caches = tmp_path / "cache" / "token_states"

    def opened(number):
        open_states(folder, np.array([[2, 4 + number, 3]], np.int32), pad=0)
        return max(caches.glob("*/cache.json"), key=lambda path: path.parent.stat().st_mtime_ns).parent

    made = [opened(number) for number in range(3)]
    assert opened(0) == made[0], "used again, and so the newest"
    with open(f"{made[1]}.lock", "w") as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        made.append(opened(3))
        assert all(path.exists() for path in made), "one that is being opened stays"
    made.append(opened(4))
    assert [path.exists() for path in made] == [True, False, False, True, True]


def test_a_new_cache_takes_what_the_newest_of_its_encoder_knows(folder, tmp_path, monkeypatch, capsys):
    had = np.array([[2, 4 + number, 3, 0] for number in range(9)], np.int32)
    more = np.concatenate((had[3:], np.array([[2, 5, 6, 3]], np.int32)))
    other = save_bert(tmp_path / "other")
    model = BertModel.from_pretrained(other)
    model.embeddings.word_embeddings.weight.data += 1
    model.save_pretrained(other)
    open_states(folder, had, pad=0)
    open_states(other, more[::-1], pad=0)
    broken = tmp_path / "cache" / "token_states" / "of-an-earlier-version"
    broken.mkdir()
    (broken / "cache.json").write_text("{}")
    capsys.readouterr()
    states = open_states(folder, more, pad=0)
    assert capsys.readouterr().err.count("event=token_states") == 2
    monkeypatch.setenv("CATID2_CACHE", str(tmp_path / "empty"))
    fresh = open_states(folder, more, pad=0)
    assert np.array_equal(states.states, fresh.states) and "done=6 texts=7" not in capsys.readouterr().err
    assert np.array_equal(states.start_U1, fresh.start_U1) and states.about == fresh.about


def test_only_a_share_of_the_titles_loses_words(folder):
    lost = {}
    for share in (0, 0.5, 1):
        task, rows = task_of(folder, word_keep=0.01, word_drop_share=share)
        columns = {name: np.repeat(values, 200, axis=0) for name, values in rows.columns.items()}
        kept_BT = task.prepare(columns, seed=4)["kept"]
        lost[share] = (kept_BT.sum(1) < (columns["input_ids"] != 0).sum(1))[columns["kind"] == KIND["title"]].mean()
    assert lost[0] == 0 and lost[1] > 0.9 and lost[1] * 0.35 < lost[0.5] < lost[1] * 0.65


def test_a_disk_that_is_too_small_is_refused(folder, monkeypatch):
    free = SimpleNamespace(free=10)
    monkeypatch.setattr("catid2_ray.on_ray.stages.token_states.shutil.disk_usage", lambda _: free)
    task, rows = task_of(folder)
    with pytest.raises(StorageError, match="token states need up to 0.0 GB, .*CATID2_CACHE.*encoder_mode=tuned"):
        step(task, task.build(), rows)


def test_the_export_is_loaded_as_it_was(folder, tmp_path):
    task, rows = task_of(folder, head="pawa")
    module = task.build()
    (tmp_path / "export").mkdir()
    task.export(module, tmp_path / "export", [])
    again, _ = load_generator(tmp_path / "export")
    ids_BT, codes_BL = (torch.from_numpy(rows.columns[name]).long() for name in ("input_ids", "codes"))
    for one, other in zip(*(docid_logits(m, ids_BT, codes_BL, space=SPACE) for m in (again, module.model.eval()))):
        assert torch.equal(one, other)
