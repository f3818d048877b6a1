"""Folders on a machine's temporary disk, removed when their work ends; what a killed process left goes with the next one's call.

A folder belongs to whoever holds its lock (flock on the folder itself), which the kernel frees with the process, however it ends:
so no clock and no process id is asked, and containers that share a disk do not take each other's.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from catid2_ray.on_ray.machine import progress

PREFIX = "catid2-scratch-"


@contextlib.contextmanager
def folder(what: str) -> Iterator[Path]:
    """An empty folder of this process, until the block ends; `what` for is part of its name, for a person who looks at the disk."""
    sweep()
    path, lock = _made(f"{PREFIX}{what}-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _made(prefix: str) -> tuple[Path, int]:
    """A new folder and its lock. Another process may sweep it away before it is locked: then the next one."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks: nobody can sweep there either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def sweep() -> None:
    """Remove the folders of this temporary disk whose process is gone; one line in the log where there were any."""
    swept = 0
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # its owner lives, another sweeps it, or it is another user's
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
                swept += 1
            finally:
                os.close(lock)
    if swept:
        progress.event("left_behind_removed", folders=swept, below=tempfile.gettempdir())
