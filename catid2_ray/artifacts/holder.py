"""Who holds something in a store (a lease, a release in use), and whether it still lives.

A holder leaves a record and rewrites an object now and then, its heartbeat. Ages are measured by the store's clock, against an
object written just now, so that machines whose clocks differ agree. A process that died on this very machine is known to be
gone at once, by its number and the time of its start.
"""

import contextlib
import getpass
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from catid2_ray.artifacts.store import Listed, Store
from catid2_ray.errors import StorageError


def describe(command: str | None = None) -> dict:
    """The record of this process: id, by (user@host), command, started (UTC) and `process`, by which `is_gone` knows it."""
    return {
        "id": uuid.uuid4().hex,
        "by": f"{_user()}@{socket.gethostname()}",
        "command": command or _command(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "process": _process(os.getpid()),
    }


def sentence(record: dict) -> str:
    """`reindex.py by ann@node1, pid 12, started 2026-01-01T00:00:00Z`."""
    words = {name: record.get(name, "unknown") for name in ("command", "by", "pid", "started")}
    return "{command} by {by}, pid {pid}, started {started}".format(**words)


def is_gone(record: dict) -> bool:
    """Whether the process of a record ran on this very machine and has ended; False for one that cannot be seen from here."""
    process, here = record.get("process"), _process(os.getpid())
    if not process or not here or any(process.get(name) != here[name] for name in ("host", "boot", "namespace")):
        return False
    born = _born(process["pid"])
    return born is not None and born != process["born"]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number that has no name
        return str(os.getuid())


def _command() -> str:
    name, *rest = [Path(sys.argv[0] or "python").name, *sys.argv[1:]]
    return " ".join([name, *[word for word in rest[:1] if not word.startswith("-")]])


def _process(pid: int) -> dict | None:
    """None where the system does not tell (/proc is missing)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace, "pid": pid, "born": _born(pid)}


def _born(pid: int) -> str | None:
    """Ticks from the machine's start to the process's; "" for a process that has ended, None for one that is hidden."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:  # it has ended, or this user may not see it
        try:
            os.kill(pid, 0)  # signal 0 does nothing but look
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return None


def listing_now(store: Store, folder: str) -> tuple[dict[str, Listed], float]:
    """The objects below a folder, and what the store's clock says; this machine's where nothing may be written."""
    probe = f"probe-{uuid.uuid4().hex}"
    try:
        store.write(f"{folder}/{probe}", b"now")
    except StorageError:
        return store.listing(folder), time.time()
    try:
        listed = store.listing(folder)
    finally:
        store.delete(f"{folder}/{probe}")
    now = listed.pop(probe).modified
    return {name: entry for name, entry in listed.items() if not name.startswith("probe-")}, now


class Heartbeat:
    """Calls `beat` every `every_s` seconds in a thread of its own until `stop`; a store that fails is tried again next time."""

    def __init__(self, beat: Callable[[], None], every_s: float):
        self._beat, self._every_s, self._ended = beat, every_s, threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            with contextlib.suppress(StorageError):
                self._beat()

    def stop(self) -> None:
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
