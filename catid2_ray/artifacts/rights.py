"""Whether a store lets a job do all that it will do, asked before the work: list, read, write, write only if absent, delete."""

import contextlib
import time
import uuid

from catid2_ray.artifacts.store import Store
from catid2_ray.errors import CommitConflict, StorageError


def check(store: Store) -> float:
    """How many seconds the store's clock is ahead of this machine's. Leaves nothing behind.

    StorageError where a right is missing, StorageDenied where the store says so, naming the object and what was tried; and where
    the store overwrites what must be written only if it is absent: two jobs could then both commit.
    """
    name = f"probe/{uuid.uuid4().hex}"
    before = time.time()
    store.create(name, b"one")
    try:
        with contextlib.suppress(CommitConflict):
            store.create(name, b"two")
            raise StorageError(
                f"{store.uri} overwrote an object that was to be written only if absent (If-None-Match: *): two jobs could both "
                "commit there. Use a store that knows conditional writes (AWS S3, Ceph from 19, MinIO, or a file system with hard "
                "links)"
            )
        if store.read(name) != b"one":
            raise StorageError(f"{store.uri_of(name)} does not hold what was written to it a moment ago")
        listed = store.listing("probe").get(name.removeprefix("probe/"))
        if listed is None:
            raise StorageError(f"{store.uri_of('probe')} does not list what was written to it a moment ago")
        return listed.modified - (before + time.time()) / 2
    finally:
        store.delete(name)
