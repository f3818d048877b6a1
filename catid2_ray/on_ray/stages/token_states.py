"""A frozen text encoder's token states of a training run's texts, once per node, kept for later runs.

The last few such caches stay; older ones are deleted when a new one is made, since a catalogue's texts change by the day. A new
one takes from the newest of the same encoder the states of all texts that it has, so that only new texts are encoded.

Ranks of one node take turns at the door: the first computes, the others open what it wrote.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from catid2_ray.artifacts.release import default_cache
from catid2_ray.errors import ArtifactError, StorageError
from catid2_ray.generator.encoder_decoder import ProjectedEncoder, load_text_encoder
from catid2_ray.generator.states import StateCache
from catid2_ray.on_ray.machine import progress

_EVERY_S = 30.0
_KEPT = 3  # caches on a node


def open_states(encoder: str, input_ids_NT: np.ndarray, *, pad: int) -> StateCache:
    """The states of these texts by `encoder`, an id or folder, in float32 arithmetic, under the node's cache folder
    (`artifacts.release.default_cache`): about 2·width bytes a token. Blocks while another process computes them.
    StorageError where the disk is too small."""
    text = ProjectedEncoder(load_text_encoder(encoder), width=1, frozen=True, pad=pad).eval()
    text = text.to("cuda" if torch.cuda.is_available() else "cpu")
    ids_NT = np.ascontiguousarray(input_ids_NT, np.int32)
    identity = StateCache.identity(text, tokens=ids_NT.shape[1])
    named = json.dumps(identity, sort_keys=True).encode()
    key = hashlib.sha256(named + hashlib.sha256(ids_NT).digest()).hexdigest()[:24]
    folder = default_cache() / "token_states" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    shown = -_EVERY_S  # what was taken from an earlier cache is said at once

    def show(done: int, texts: int) -> None:
        nonlocal shown
        if done == texts or time.monotonic() - shown > _EVERY_S:
            shown = time.monotonic()
            progress.event("token_states", done=done, texts=texts)

    with open(f"{folder}.lock", "w") as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        known = None
        if not (folder / "cache.json").exists():
            known = _newest(folder.parent, identity)
            _refuse_full_disk(folder, 2 * text.text.config.hidden_size * int((ids_NT != pad).sum()))
            _forget_oldest(folder)
        cache = StateCache.build(text, ids_NT, folder, known=known, on_progress=show)
        os.utime(folder)
        return cache


def _newest(caches: Path, identity: dict) -> StateCache | None:
    """The cache used last of those whose states are today's; it stays readable when another process deletes it."""
    used = {}
    for path in caches.glob("*/cache.json"):
        with contextlib.suppress(FileNotFoundError):
            used[path.parent] = path.parent.stat().st_mtime
    for folder in sorted(used, key=used.get, reverse=True):
        with contextlib.suppress(ArtifactError):  # of an earlier version, or just deleted
            if (cache := StateCache(folder)).matches(identity):
                return cache
    return None


def _forget_oldest(newest: Path) -> None:
    """Delete all but the `_KEPT` − 1 caches used last, beside the one to be made; not those whose door someone holds. Who has
    one open goes on reading: its files are mapped."""
    used = {}
    for path in newest.parent.glob("*/cache.json"):
        with contextlib.suppress(FileNotFoundError):  # another process is faster
            used[path.parent] = path.parent.stat().st_mtime
    for folder in sorted(used.keys() - {newest}, key=used.get, reverse=True)[_KEPT - 1 :]:
        with open(f"{folder}.lock", "w") as door, contextlib.suppress(BlockingIOError):
            fcntl.flock(door, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_full_disk(folder: Path, most: int) -> None:
    """`most`: bytes as if no text occurred twice."""
    free = shutil.disk_usage(folder.parent).free
    if most > 0.9 * free:
        raise StorageError(
            f"the frozen encoder's token states need up to {most / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB free: "
            "point CATID2_CACHE to a larger disk, or set generator.encoder_mode=tuned, which caches nothing"
        )
