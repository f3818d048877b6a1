"""The generator's task with a frozen text encoder: ranks are fed token states, computed once a node. No cluster."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from catid2_ray.config import GeneratorRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import StorageError
from catid2_ray.generator.examples import tokenize
from catid2_ray.generator.logits import docid_logits
from catid2_ray.generator.saved import load_generator
from catid2_ray.generator.vocabulary import load_tokenizer, with_docid_tokens
from catid2_ray.on_ray.examples import KIND
from catid2_ray.on_ray.train_generator import GeneratorTask
from tests.unit.generator.text_models import save_bert

SPACE = DocidSpace((4, 3, 5))
TEXTS = ["steel hinge", "oak doors 10 ft", "brass hinges", "copper pipe", "oak table"]


class Rows:
    """The five examples, three of queries and two of titles, as a shard gives them."""

    def __init__(self, tokenizer):
        kinds = np.array([KIND["query"]] * 3 + [KIND["title"]] * 2, np.int8)
        codes = np.stack([np.arange(5) % k for k in SPACE.codes_per_level], 1).astype(np.int32)
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
    # Six a trained weight: the projection for each token, the text's vector once, the decoder for each code.
    sizes = {name: weight.numel() for name, weight in module.model.named_parameters() if weight.requires_grad}
    token = sizes["encoder.projection.weight"] + sizes["encoder.norm.weight"]
    decoder = sum(size for name, size in sizes.items() if name.startswith("decoder."))
    head = sum(task.space.codes_per_level) * module.model.lm_head.weight.shape[1]
    assert task.flops_per_example(module) == 6 * (
        token * task.recipe.query_tokens + sizes["encoder.sentence.weight"] + decoder * task.space.levels + head
    )


def test_a_disk_that_is_too_small_is_refused(folder, monkeypatch):
    free = SimpleNamespace(free=10)
    monkeypatch.setattr("catid2_ray.on_ray.token_states.shutil.disk_usage", lambda _: free)
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
