"""What docs/security.md says: no pickle is loaded, no code of a model or of a recipe runs unasked, no secret is shown."""

import ast
import builtins
import io
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401  registers Ray's Arrow types, among them that of pickled objects
import torch

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import check_pairs
from catid2_ray.catalog.products import check_products
from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.cli import guarded, options
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CatidError, InputError, RecipeError, StorageError
from catid2_ray.generator.inputs import Doc2Query
from catid2_ray.generator.model import pretrained_causal, pretrained_t5
from catid2_ray.generator.saved import load_generator, load_to_search
from catid2_ray.generator.states import StateCache
from catid2_ray.generator.vocabulary import load_tokenizer, train_tokenizer, with_docid_tokens
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import cluster, progress
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.training import checkpoints
from catid2_ray.on_ray.training.checkpoints import State
from catid2_ray.quantizer.adapter import LinearAdapter
from catid2_ray.quantizer.coder import TreeCoder, load_coder
from catid2_ray.redaction import HIDDEN, VARIABLES, redacted
from catid2_ray.retrieval.node_vectors import NodeVectors
from tests.conftest import TINY
from tests.stored import unpack
from tests.text_models import save_bert

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "catid2_ray").rglob("*.py"))
SECRET = "a-secret-that-nobody-may-read"


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "what was planted ran"


def as_numpy(trace: Path) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array([Planted(trace)], object), allow_pickle=True)
    return sink.getvalue()


def as_torch(trace: Path) -> bytes:
    sink = io.BytesIO()
    torch.save({"weight": Planted(trace)}, sink)
    return sink.getvalue()


def test_the_planted_files_do_run_where_they_are_unpickled(tmp_path):
    for name, load in (
        ("numpy", lambda f: np.load(f, allow_pickle=True)),
        ("torch", lambda f: torch.load(f, weights_only=False)),
    ):
        trace = tmp_path / name
        load(io.BytesIO({"numpy": as_numpy, "torch": as_torch}[name](trace)))
        assert trace.exists()


def test_a_pickle_in_any_file_of_a_served_release_is_refused(tmp_path, trace):
    store = Store(unpack(tmp_path).store)
    served = releases.release_folder(store, releases.current(store), tmp_path / "cache")
    files = [
        path.relative_to(served)
        for folder, _, names in os.walk(served, followlinks=True)
        for path in (Path(folder, name) for name in names)
        if path.suffix in (".npy", ".safetensors")
    ]
    assert len(files) > 15
    for number, file in enumerate(files):
        folder = tmp_path / f"planted-{number}"
        shutil.copytree(served, folder)  # links become files
        (folder / file).write_bytes((as_numpy if file.suffix == ".npy" else as_torch)(trace))
        with pytest.raises((CatidError, ValueError)):
            open_retriever(folder).retrieve(["hinge"], k=3)
        assert not trace.exists(), file


@pytest.mark.parametrize("load", [load_coder, TreeCoder.load, LinearAdapter.load, load_generator, load_to_search])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter.safetensors"])
def test_a_pickle_in_the_place_of_weights_is_refused(load, name, tmp_path, trace):
    """Of the quantizer, the adapter and a generator, also under the name that transformers gives to pickled weights."""
    store = Store(unpack(tmp_path).store)
    parts = releases.current(store).manifests(store)
    part = parts["quantizer" if load is load_coder else "generator"]
    folder = tmp_path / "planted"
    shutil.copytree(store.path(part.folder), folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / name).write_bytes(as_torch(trace))
    with pytest.raises(CatidError):
        load(folder)


def test_a_pickle_in_the_place_of_vectors_or_token_states_is_refused(tmp_path, trace):
    for name in ("start.npy", "text.npy", "hash.npy", "ids.npy", "mean_1.npy", "tail_1.npy"):
        (tmp_path / name).write_bytes(as_numpy(trace))
    (tmp_path / "cache.json").write_text(json.dumps({"width": 4}))
    (tmp_path / "node_vectors.json").write_text(json.dumps({"depth": 1, "levels": 1, "width": 4}))
    for load in (StateCache, NodeVectors.open):
        with pytest.raises(CatidError):
            load(tmp_path)


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path, trace):
    network = torch.nn.Linear(2, 2)
    engine = SimpleNamespace(module=network, optimizer=torch.optim.AdamW(network.parameters()))
    checkpoints.save(tmp_path, engine, rank=0)
    (tmp_path / "optimiser-0.pt").write_bytes(as_torch(trace))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        checkpoints.load(tmp_path, engine, State(world=1, batch=4), rank=0, world=1, batch=4, whole_rows=True)


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../outside"])
def test_a_checkpoint_that_names_a_file_outside_its_folder_is_passed_over(name, tmp_path, capfd):
    store = Store(tmp_path / "store")
    (tmp_path / "outside").write_bytes(b"abc")
    state = State(world=1, batch=4, files={name: 3})
    store.write("runs/r/step-1/state.json", json.dumps(asdict(state)).encode())
    assert checkpoints.newest_whole(store, "runs/r") is None
    assert f"{name} has no bytes, expected 3" in capfd.readouterr().err


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in lists"])
@pytest.mark.parametrize(
    "column", ["product_id", "title", "description", "category_path", "value", "brand", "embedding"]
)
def test_a_pickle_in_a_table_of_products_is_not_unpacked(column, nested, tmp_path, trace):
    """Ray gives parquet files a type for pickled objects, which anyone can write."""
    columns = {"product_id": ["p1"], "title": ["hinge"], "category_path": [["Home"]], "embedding": [[0.0, 1.0]]}
    table = pa.table(columns | {column: pickled(trace, nested)})
    pq.write_table(table, tmp_path / "products.parquet")
    read = pq.read_table(tmp_path / "products.parquet")
    with pytest.raises(InputError, match=f"column {column}(: expected| is )"):
        check_products(
            read, width=2, min_category_depth=0, max_category_depth=3, filter_columns={"brand": "string"},
        ).bad.to_pylist()  # fmt: skip


@pytest.mark.parametrize("column", ["query_id", "query", "product_id", "relevance", "split", "behaviour"])
def test_a_pickle_in_a_table_of_pairs_is_not_unpacked(column, trace):
    columns = {name: ["a"] for name in ("query_id", "query", "product_id", "split")} | {"relevance": [1.0]}
    with pytest.raises(InputError, match=f"column {column}: expected"):
        check_pairs(pa.table(columns | {column: pickled(trace, False)}))


def pickled(trace: Path, nested: bool) -> pa.Array:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    array = ArrowPythonObjectArray.from_objects([Planted(trace)])
    return pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), array) if nested else array


def calls(path: Path):
    """(dotted name of the function, its keyword arguments as source, line) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), given, node.lineno


def test_every_reader_says_that_it_takes_no_pickle_and_no_code():
    found = []
    for path in SOURCES:
        for name, given, line in calls(path):
            wanted = {"np.load": ("allow_pickle", "False"), "torch.load": ("weights_only", "True")}.get(name)
            if name.endswith("from_pretrained") and ("Auto" in name or name.startswith("kind.")):
                wanted = ("trust_remote_code", "False")
            if wanted and given.get(wanted[0]) != wanted[1]:
                found.append(f"{path.name}:{line} {name} without {wanted[0]}={wanted[1]}")
            if name in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system", "joblib.load"):
                found.append(f"{path.name}:{line} calls {name}")
            if name.startswith("subprocess.") or given.get("shell") == "True":
                found.append(f"{path.name}:{line} calls {name}")
    assert found == []


def planted_code(folder: Path, trace: Path, *, kind: str) -> str:
    """A model folder that names its own code, of a kind that transformers does not know, so that it would ask."""
    save_bert(folder)
    (folder / "planted.py").write_text(f"open({str(trace)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    code = {
        name: f"planted.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": code}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PlantedTokenizer", "auto_map": {"AutoTokenizer": ["planted.T", "planted.T"]}})
    )
    return str(folder)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: HuggingFaceEncoder(folder, batch=2, tokens=8),
        lambda folder: load_tokenizer(folder),
        lambda folder: Doc2Query(folder),
        lambda folder: pretrained_t5(folder, **_sized()),
        lambda folder: pretrained_causal(folder, **_sized()),
        lambda folder: load_generator(folder),
    ],
    ids=["encoder", "tokenizer", "doc2query", "t5", "causal", "generator"],
)
def test_a_models_own_code_is_never_run_even_if_somebody_at_the_terminal_says_yes(load, tmp_path, trace, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    with pytest.raises(CatidError):
        load(planted_code(tmp_path / "model", trace, kind="planted"))


def _sized() -> dict:
    space = DocidSpace((4, 4))
    return {"tokenizer": with_docid_tokens(train_tokenizer(["oak door"] * 3, size=60), space), "space": space}


def test_a_ranker_that_nobody_permitted_is_not_imported(tmp_path, trace, monkeypatch):
    (tmp_path / "planted_ranker.py").write_text(f"open({str(trace)!r}, 'w')\ndef scores(query, ids): return ids\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("refused only after Ray was started"))
    alignment = {"enabled": True, "steps": 2, "report_every": 1, "ranker": "planted_ranker:scores"}
    recipe = Recipe.build({**TINY, "store": str(tmp_path / "store"), "alignment": alignment})
    for listed in ("", "planted_ranker", "planted_ranker:other, os:system", "planted_ranker:scores.extra"):
        monkeypatch.setenv("CATID2_RANKERS", listed)
        with pytest.raises(RecipeError, match="CATID2_RANKERS does not permit it .*set CATID2_RANKERS=planted_ranker:scores"), \
             Job.open(recipe):  # fmt: skip
            pass
    monkeypatch.setenv("CATID2_RANKERS", "nowhere:scores, json:loads")
    assert cluster.worker_environment(recipe.cluster)["CATID2_RANKERS"] == "nowhere:scores, json:loads"
    permitted = recipe.model_copy(
        update={"alignment": recipe.alignment.model_copy(update={"ranker": "nowhere:scores"})}
    )
    with pytest.raises(RecipeError, match="cannot be imported"), Job.open(permitted):
        pass
    assert not (tmp_path / "store").exists(), "refused before any work"


@pytest.fixture
def secrets(monkeypatch):
    """A secret in every variable that may hold one."""
    made = {name: f"{SECRET}-{number}" for number, name in enumerate(VARIABLES)}
    for name, value in made.items():
        monkeypatch.setenv(name, f"read short\nwrite {value}" if name == "CATID2_KEYS" else value)
    return list(made.values())


def test_messages_and_log_lines_hide_secrets(secrets, capfd):
    text = f"refused: {' '.join(secrets)} at https://ann:pass@host/x?X-Amz-Signature=abc&X-Amz-Credential=id%2Fday"
    error = StorageError(text)
    again = pickle.loads(pickle.dumps(error))  # as from a worker
    progress.event("retry", reason=text)
    options.event("retry", reason=text)
    with pytest.raises(SystemExit):
        guarded(lambda: (_ for _ in ()).throw(again))
    shown = [str(error), repr(again), capfd.readouterr().err]
    for one in shown:
        assert SECRET not in one and "ann:pass" not in one and "abc" not in one and "id%2Fday" not in one
        assert one.count(HIDDEN) >= len(secrets) + 3 and "@host/x" in one


def test_short_values_and_plain_addresses_stay(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    text = "a test of s3://bucket/x at http://127.0.0.1:9000/a@b, mail ann@host"
    assert redacted(text) == text


def test_an_endpoint_with_a_password_is_not_shown(secrets, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://ann:hunter2hunter2@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ann")
    with pytest.raises(StorageError, match="cannot list s3://bucket/x") as caught:
        Store("s3://bucket/x").check()
    assert "hunter2" not in str(caught.value) and SECRET not in str(caught.value)


def test_a_manifest_holds_nothing_of_the_environment(secrets, tmp_path):
    store = Store(tmp_path / "store")
    recipe = Recipe.build({**TINY, "store": str(tmp_path / "store")}).model_dump(mode="json")
    attempt = Attempt(store, "ids", settings={}, parents={}, recipe=recipe)
    manifest = attempt.commit([store.write_file(attempt.name("a"), b"a")], metrics={})
    assert SECRET.encode() not in store.read(manifest.name)


def test_the_environment_of_workers_holds_no_secret(secrets):
    assert SECRET not in json.dumps(cluster.worker_environment(Recipe.build(TINY).cluster))
    assert all(name not in cluster.worker_environment(Recipe.build(TINY).cluster) for name in VARIABLES)
