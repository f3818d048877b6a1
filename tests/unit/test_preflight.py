"""What a job refuses before any work: paths that other nodes do not see, GPUs that are not there."""

import copy

import pytest
import torch

from catid2_ray.config import Recipe
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import cluster, preflight
from tests.conftest import TINY


def recipe(**sections) -> Recipe:
    values = copy.deepcopy(TINY) | {"store": "/everywhere/store"}
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes if isinstance(changes, dict) else changes
    return Recipe.build(values)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"store": "store"}, "store 'store' is a relative path"),
        ({"catalog": {"synthetic": None, "root": "shop"}}, "catalog.root 'shop' is a relative path"),
        ({"alignment": {"enabled": True, "ranker_scores": "a.parquet"}}, "alignment.ranker_scores 'a.parquet' is a relative path"),
        ({"embedding": {"encoder": "./minilm"}}, "embedding.encoder './minilm' is a relative folder"),
        ({"embedding": {"encoder": "here/minilm"}}, "embedding.encoder 'here/minilm' is a relative folder"),
        ({"serving": {"query_encoder": "~/models/a"}}, "serving.query_encoder '~/models/a' is a relative folder"),
        ({"generator": {"model": "models/t5/small"}}, "generator.model 'models/t5/small' is a relative folder"),
        ({"generator": {"model": "encoder_decoder", "encoder": "../bert"}}, "generator.encoder '../bert' is a relative folder"),
        ({"generator": {"model": "causal", "causal": "qwen/"}}, "generator.causal 'qwen/' is a relative folder"),
        ({"generator": {"doc2query": "here"}}, "generator.doc2query 'here' is a relative folder"),
    ],
)  # fmt: skip
def test_on_a_cluster_every_relative_path_is_refused_by_name_and_elsewhere_none(changes, named, tmp_path, monkeypatch):
    (tmp_path / "here" / "minilm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("refused only after Ray was joined"))
    asked = recipe(**changes)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    preflight.refuse(asked, aligns=True)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(RecipeError) as caught, Job.open(asked):
        pass
    assert named in str(caught.value) and "all nodes share" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["lsa", "sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased", "/models/minilm"]
)
def test_ids_of_the_hub_and_absolute_folders_are_no_relative_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    preflight.refuse(recipe(embedding={"encoder": name}), aligns=True)


@pytest.mark.parametrize("section", ["cluster", "embedding"])
def test_gpus_that_are_not_there_are_refused_where_the_work_is_done(section, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = recipe(**{section: {"gpus_per_worker": 1}})
    with pytest.raises(
        RecipeError, match=f"{section}.gpus_per_worker is 1, but this machine has no GPU .*submit the job"
    ):
        preflight.refuse(asked, aligns=True)
    preflight.refuse(asked, aligns=True, runs=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    preflight.refuse(asked, aligns=True)
