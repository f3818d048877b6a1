"""What a job refuses before any work: paths that other nodes do not see, GPUs, rights, room and versions that are not there."""

import copy
import re
import time

import pytest
import torch

from catid2_ray.artifacts import rights
from catid2_ray.artifacts.store import Store
from catid2_ray.config import ClusterRecipe, Recipe
from catid2_ray.errors import RecipeError, StorageDenied, StorageError
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


def test_all_that_a_job_does_in_a_store_is_tried_and_nothing_is_left(tmp_path):
    store = Store(tmp_path / "store")
    assert abs(rights.check(store)) < 5
    assert store.listing("") == {}


@pytest.mark.parametrize("right", ["create", "read", "listing", "delete"])
def test_a_right_that_is_missing_is_named(right, tmp_path, monkeypatch):
    def refused(self, name, *_):
        raise StorageDenied(f"cannot {right} {self.uri_of(name)}: AccessDenied")

    monkeypatch.setattr(Store, right, refused)
    with pytest.raises(StorageDenied, match=f"cannot {right} .*probe"):
        preflight.check_store(Store(tmp_path / "store"))


def test_a_store_that_overwrites_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Store, "create", lambda self, name, data: self.write(name, data))
    with pytest.raises(StorageError, match="overwrote .*two jobs could both commit"):
        rights.check(Store(tmp_path / "store"))


def test_clocks_that_differ_are_a_line_in_the_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 600)
    preflight.check_store(Store(tmp_path / "store"))
    assert "event=clocks_differ store_ahead_s=600" in capfd.readouterr().err


def test_a_disk_that_is_all_but_full_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "LEAST_FREE", 10**18)
    with pytest.raises(
        StorageError, match=r"only .* GB are free where the store lies .*expected 1e\+09 or more: free some"
    ):
        preflight.check_store(Store(tmp_path / "not" / "yet" / "store"))


def test_a_worker_of_another_image_is_refused(monkeypatch):
    preflight.refuse_other_versions()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv(preflight.VERSIONS, cluster.worker_environment(ClusterRecipe())[preflight.VERSIONS])
    preflight.refuse_other_versions()
    stale = re.sub("code=[^ ]+", "code=0123456789ab", preflight.versions())
    monkeypatch.setenv(preflight.VERSIONS, stale)
    with pytest.raises(RecipeError, match=r"node .* runs code=\w{12} \(the job has code=0123456789ab\)"):
        preflight.refuse_other_versions()
    other = re.sub("torch=[^ ]+", "torch=1.0", preflight.versions())
    monkeypatch.setenv(preflight.VERSIONS, other)
    with pytest.raises(RecipeError, match=r"node .* runs torch=[\d.]+\S* \(the job has torch=1.0\): give all nodes"):
        preflight.refuse_other_versions()
