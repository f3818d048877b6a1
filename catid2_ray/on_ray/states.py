"""The token states of a frozen text encoder, cached once per node for all of its training workers.

The folder's name is a digest of the examples and of the encoder, so that a later run over the same texts finds it; where it
is gone, or was left half made, it is made again with the same bytes. Delete it to have the space back.
"""

import contextlib
import fcntl
import shutil
import time
from pathlib import Path

import numpy as np

from catid2_ray.artifacts.manifest import digest_of
from catid2_ray.artifacts.release import default_cache
from catid2_ray.errors import StorageError
from catid2_ray.generator.states import StateCache
from catid2_ray.on_ray import progress

_SAID_EVERY_S = 15.0


def open_states(encoder, input_ids_NT: np.ndarray, examples: str) -> StateCache:
    """The states of all texts of the examples with digest `examples`, made by the first worker of a node that comes.

    `encoder`: a ProjectedEncoder. Raises StorageError where they would not fit on the disk.
    """
    name = f"states-{digest_of([examples, encoder.digest()])[:16]}"
    folder = default_cache().absolute() / name
    with _alone(folder):
        if not (folder / "cache.json").exists():
            _refuse_full_disk(folder, input_ids_NT, encoder)
            progress.event("states", texts=len(input_ids_NT), folder=folder)
        said = time.monotonic()

        def show(done: int, everything: int) -> None:
            nonlocal said
            if time.monotonic() - said >= _SAID_EVERY_S:
                said = time.monotonic()
                progress.event("progress", stage="caching_token_states", done=done, total=everything)

        return StateCache.build(encoder, input_ids_NT, folder, on_progress=show)


@contextlib.contextmanager
def _alone(folder: Path):
    """One process of this node at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _refuse_full_disk(folder: Path, input_ids_NT: np.ndarray, encoder) -> None:
    """An upper bound: as if no text occurred twice. Numbers are float16."""
    needed = int((input_ids_NT != encoder.pad).sum()) * encoder.projection.in_features * 2
    free = shutil.disk_usage(folder.parent).free
    if needed > 0.9 * free:
        raise StorageError(
            f"the frozen encoder's token states need up to {needed / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB free: "
            "point CATID2_CACHE to a larger disk, or set generator.encoder_mode=tuned, which caches nothing"
        )
