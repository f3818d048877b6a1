"""What would fail hours later for want of a file, a right, room on a disk or a GPU, refused before any work: in a moment, and
without Ray. What only a worker can see, the versions it runs, it compares when it starts."""

import functools
import hashlib
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import catid2_ray
from catid2_ray.artifacts import rights
from catid2_ray.artifacts.release import default_cache
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import RecipeError, StorageError
from catid2_ray.on_ray.machine import progress, ranker, scratch

LEAST_FREE = 1_000_000_000  # bytes of each disk that a job writes to
_SKEW_S = 60.0  # S3 counts whole seconds, and refuses what is more than 15 minutes away
VERSIONS = "CATID2_VERSIONS"  # in the environment of workers: what the job's own process runs
_COMPARED = ("torch", "numpy", "pyarrow", "transformers", "deepspeed")

_BUILT_IN = {
    "lsa",
    "small",
    "encoder_decoder",
    "causal",
}  # names of `embedding.encoder` and `generator.model` that are no model's


def refuse(recipe: Recipe, *, aligns: bool, runs: bool = True) -> None:
    """Raise RecipeError naming the setting, for a relative path where the job runs on a cluster, for GPUs that a Ray of the job's
    own would wait for in vain, and, where the job `aligns`, for a ranker that is not permitted or cannot be imported.

    `runs`: this is the machine that works; who only looks at a recipe needs no GPU."""
    if os.environ.get("RAY_ADDRESS"):
        _refuse_relative(recipe)
    elif runs:
        _refuse_missing_gpus(recipe)
    if aligns and recipe.alignment.enabled:
        ranker.open_ranker(recipe.alignment.ranker)


def check_store(store: Store) -> None:
    """Raise StorageError where a job may not do in the store what it will do, or where a disk of this machine is all but full, what
    killed processes left there removed; one line in the log where the clocks differ."""
    scratch.sweep()
    places = {"the store": store.uri} if not store.is_s3 else {}
    places |= {"CATID2_CACHE": str(default_cache()), "TMPDIR": tempfile.gettempdir()}
    for name, place in places.items():
        folder = next(folder for folder in (Path(place), *Path(place).parents) if folder.exists())
        if (free := shutil.disk_usage(folder).free) < LEAST_FREE:
            raise StorageError(
                f"only {free / 1e9:.1f} GB are free where {name} lies ({place}), expected {LEAST_FREE / 1e9:g} or more: free some "
                f"(`catid2 gc` for stores), or set {name} to a larger disk"
            )
    ahead_s = rights.check(store)
    if abs(ahead_s) > _SKEW_S:
        progress.event(
            "clocks_differ", store_ahead_s=round(ahead_s), means="'times in manifests are off; leases are not'"
        )


@functools.cache
def versions() -> str:
    """Of what decides results, in this process: `python=3.11.7 catid2_ray=… code=… torch=…`; `code` is a digest of this package."""
    named = {"python": platform.python_version(), "catid2_ray": catid2_ray.__version__, "code": _code()}
    return " ".join(
        f"{name}={version}" for name, version in (named | {one: metadata.version(one) for one in _COMPARED}).items()
    )


def _code() -> str:
    """An image that was not built anew has another code under the same version."""
    folder, digest = Path(catid2_ray.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def refuse_other_versions() -> None:
    """In a worker: raise RecipeError where this node runs other versions than the job's own process."""
    asked = os.environ.get(VERSIONS, versions())
    if asked != versions():
        pairs = zip(asked.split(), versions().split())
        differ = ", ".join(f"{here} (the job has {there})" for there, here in pairs if there != here)
        raise RecipeError(
            f"node {socket.gethostname()} runs {differ}: give all nodes, and the process that submits, the same image"
        )


def _uris(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    yield "store", recipe.store
    yield "catalog.root", recipe.catalog.root
    if recipe.alignment.enabled:
        yield "alignment.ranker_scores", recipe.alignment.ranker_scores


def _models(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """What is an id on the hub, or a folder."""
    yield "embedding.encoder", recipe.embedding.encoder
    yield "serving.query_encoder", recipe.serving.query_encoder
    for name in ("model", "encoder", "causal", "doc2query"):
        yield f"generator.{name}", getattr(recipe.generator, name)


def _refuse_relative(recipe: Recipe) -> None:
    """In a submitted job the working directory is a copy that Ray deletes, and that other nodes do not see."""
    for name, uri in _uris(recipe):
        if uri and "://" not in uri and not os.path.isabs(uri):
            raise RecipeError(
                f"{name} {uri!r} is a relative path, but this job runs on a cluster, in a copy of the working directory "
                f"that is deleted afterwards: set {name} to s3://… or to an absolute path that all nodes share"
            )
    for name, model in _models(recipe):
        if model and model not in _BUILT_IN and not os.path.isabs(model) and _is_folder(model):
            raise RecipeError(
                f"{name} {model!r} is a relative folder, but this job runs on a cluster, whose other nodes, and the replicas that "
                f"serve the release, do not have it: set {name} to an absolute path that all nodes share, such as one in the "
                "image, or to the id of a model on the Hugging Face hub"
            )


def _is_folder(model: str) -> bool:
    """Ids on the hub are `model` or `owner/model`; what exists here, or has another form, is a folder."""
    return os.path.isdir(model) or model.startswith((".", "~")) or model.count("/") > 1 or model.endswith("/")


def _refuse_missing_gpus(recipe: Recipe) -> None:
    """A Ray that waits for a GPU which is not there waits for ever."""
    needed = {"cluster": recipe.cluster.gpus_per_worker, "embedding": recipe.embedding.gpus_per_worker}
    for section, share in needed.items():
        if share and not torch.cuda.is_available():
            raise RecipeError(
                f"{section}.gpus_per_worker is {share:g}, but this machine has no GPU that torch can use: set it to 0, or submit "
                "the job to a cluster that has (docs/operations.md)"
            )
