"""One store over local folders and `s3://` prefixes; nothing else in the code knows which of the two it is.

Writes are whole objects: locally through a temporary file and a rename, on S3 by nature. `create` is the one primitive
of mutual exclusion: it fails where the object exists (S3 `If-None-Match: *`, locally a hard link). A local write is on the
disk when it returns (fsync of the file, then of its folder), so that a manifest never outlives the files it names.

On S3 s3fs writes, lists and reads records, a record in one request; pyarrow's own client reads tables, 1.7 to 3.9 times as
fast, and downloads (benchmarks/results/store.md). No request looks outside the prefix, nor reads a name as a pattern.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from catid2_ray.artifacts import patience
from catid2_ray.artifacts.parquet import ParquetFile
from catid2_ray.artifacts.s3 import LiteralHandler, arrow_client, delete_below, pages
from catid2_ray.errors import ArtifactError, CommitConflict, InputError, StorageError

T = TypeVar("T")

# S3-compatible servers (Ceph, rclone) answer 411 to the chunked checksums that newer clients send by default.
S3_ENVIRONMENT = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}
_HASH_BLOCK = 1 << 20
# A download holds _STREAMS blocks of this size: one connection to a real S3 gives 50-100 MB/s, the disk takes more.
_BLOCK, _STREAMS = 64 << 20, 4
_READERS = 8  # of many small records, each of which takes a round trip
# A table in an object of at most this size is read in one request, a larger one column by column.
_WHOLE = 32 << 20


def stays_inside(name: object) -> bool:
    """Whether a name that somebody else wrote stays below the folder that it is joined to.

    It is relative, with `/` between its parts; no part is empty, `.` or `..`; no NUL, and no backslash, which some systems
    take for a `/`.
    """
    if not isinstance(name, str) or "\0" in name or "\\" in name:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


class Listed(NamedTuple):
    """`modified`: when the object was last written, in seconds since 1970 by the clock of the store."""

    bytes: int
    modified: float


class Store:
    """A root folder or prefix, and names below it (`/`-separated, relative).

    Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL …) and are
    never part of a store's state: a pickled store carries its URI alone. Every failure is a StorageError naming the URI.
    """

    def __init__(self, uri: str | os.PathLike, *, patience_s: float = patience.PATIENCE_S):
        uri = str(uri)
        self._patience_s = patience_s
        self.is_s3 = uri.startswith("s3://")
        if self.is_s3:
            for name, value in S3_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            self.root = uri.removeprefix("s3://").strip("/")
            if not self.root:
                raise StorageError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
            # Here: s3fs takes half a second to import, in every process of a job on a local store too.
            from catid2_ray.artifacts.patient_s3 import PatientS3

            self.fs = PatientS3(
                use_listings_cache=False,
                skip_instance_cache=True,
                config_kwargs={"connect_timeout": 4, "read_timeout": 60, "retries": {"total_max_attempts": 1}},
            )
            self.fs.patience_s, self.fs.where = patience_s, (os.environ.get("AWS_ENDPOINT_URL"), self._bucket)
            self.uri = f"s3://{self.root}"
        elif "://" in uri and not uri.startswith("file://"):
            raise StorageError(f"{uri!r}: only local folders and s3:// prefixes can be stores")
        else:
            self.root = os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
            self.fs = fsspec.filesystem("file", skip_instance_cache=True)
            self.uri = self.root

    def __reduce__(self):
        return (_unpickled, (self.uri, self._patience_s, self.is_s3 and self.fs.answered))

    @contextlib.contextmanager
    def impatient(self, seconds: float = 2.0):
        """In the block a request is given up after so many seconds: for what may as well fail."""
        before, self._patience_s = self._patience_s, seconds
        if self.is_s3:
            self.fs.patience_s = seconds
        try:
            yield
        finally:
            self._patience_s = before
            if self.is_s3:
                self.fs.patience_s = before

    def __repr__(self):
        return f"Store({self.uri!r})"

    def path(self, name: str = "") -> str:
        """The path that `arrow_fs` understands."""
        return f"{self.root}/{name}" if name else self.root

    def uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"

    @property
    def arrow_fs(self) -> pafs.FileSystem:
        """For others who read and write below the root (Ray Train): picklable, without credentials."""
        return pafs.PyFileSystem(LiteralHandler(self.fs)) if self.is_s3 else pafs.LocalFileSystem()

    @functools.cached_property
    def _reader(self) -> pafs.FileSystem:
        return (arrow_client(self.fs, self._bucket) or self.arrow_fs) if self.is_s3 else pafs.LocalFileSystem()

    @property
    def _bucket(self) -> str:
        return self.root.split("/", 1)[0]

    def _key(self, name: str) -> str:
        return self.path(name).partition("/")[2]

    def _patiently(self, attempt):
        """The result of `attempt`, which reads through pyarrow's client: that tries for a few seconds only."""
        started, waits = time.monotonic(), patience.waits(float("inf"))
        while True:
            try:
                result = attempt()
                if self.is_s3:
                    self.fs.answered = True
                return result
            except patience.GaveUp:
                raise
            except OSError as error:
                budget_s = self._patience_s if self.is_s3 and self.fs.answered else 0
                if not patience.passes(error) or time.monotonic() - started + (wait_s := next(waits)) > budget_s:
                    raise
                time.sleep(wait_s)

    @contextlib.contextmanager
    def _doing(self, what: str, name: str):
        try:
            yield
        except (StorageError, InputError):
            raise
        except FileNotFoundError:
            raise StorageError(f"cannot {what} {self.uri_of(name)}: it does not exist") from None
        except Exception as error:
            # botocore and aiohttp raise outside OSError; all of them mean the same to the user.
            if not isinstance(error, OSError) and not type(error).__module__.startswith(
                ("botocore", "aiobotocore", "aiohttp")
            ):
                raise
            message = f"cannot {what} {self.uri_of(name)}: {type(error).__name__}: {error}"
            raise patience.failure(message, error, answered=self.fs.answered if self.is_s3 else None) from None

    def check(self) -> None:
        """Fail early: list what lies below the root, at most one object. Nothing is written, and nothing above is looked at.

        A local root that does not exist yet is fine, a bucket that does not exist is not.
        """
        with self._doing("list", ""):
            if self.is_s3:
                self._first(f"{self._key('')}/".lstrip("/"))
            elif os.path.exists(self.root) and not os.path.isdir(self.root):
                raise StorageError(f"{self.root} is a file; a store is a folder")

    def exists(self, name: str) -> bool:
        """Whether there is an object or a folder of this name.

        On S3 a listing, because HEAD of an absent object is refused to credentials that may list the prefix alone.
        """
        with self._doing("look up", name):
            if not self.is_s3:
                return os.path.exists(self.path(name))
            key = self._key(name)
            first = self._first(key)
            if first is None or first == key or first.startswith(f"{key}/"):
                return first is not None
            return self._first(f"{key}/") is not None

    def size(self, name: str) -> int:
        """Bytes of one object; StorageError where it does not exist."""
        with self._doing("look up", name):
            return self.fs.info(self.path(name))["size"]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object below a folder, by its name relative to the folder; one listing, empty where nothing is."""
        return {name: listed.bytes for name, listed in self.listing(folder).items()}

    def listing(self, folder: str) -> dict[str, Listed]:
        """Size and time of every object below a folder, by its name relative to the folder; one listing."""
        listed, above = {}, self.path(folder)
        with self._doing("look up", folder):
            if self.is_s3:
                prefix = f"{self._key(folder)}/".lstrip("/")
                for page in pages(self.fs, self._bucket, prefix):
                    for entry in page.get("Contents", ()):
                        if not entry["Key"].endswith("/"):
                            written = entry["LastModified"].timestamp()
                            listed[entry["Key"][len(prefix) :]] = Listed(entry["Size"], written)
            else:
                for where, _, files in os.walk(above):
                    for file in files:
                        path = os.path.join(where, file)
                        with contextlib.suppress(FileNotFoundError):  # deleted while the folder was read
                            status = os.stat(path)
                            listed[os.path.relpath(path, above)] = Listed(status.st_size, status.st_mtime)
        self._refuse_outsiders(folder, listed)
        return listed

    def names(self, name: str, *, after: str = "") -> list[str]:
        """Names (not paths) of the entries directly below `name`, sorted, those `after` a name alone; empty where there is
        nothing."""
        with self._doing("list", name):
            if self.is_s3:
                prefix = f"{self._key(name)}/".lstrip("/")
                start = {"StartAfter": prefix + after} if after else {}
                entries = [
                    entry[field][len(prefix) :].removesuffix("/")
                    for page in pages(self.fs, self._bucket, prefix, Delimiter="/", **start)
                    for kind, field in (("Contents", "Key"), ("CommonPrefixes", "Prefix"))
                    for entry in page.get(kind, ())
                ]
            else:
                entries = os.listdir(self.path(name)) if os.path.exists(self.path(name)) else []
        listed = sorted(entry for entry in {*entries} - {""} if entry > after)
        self._refuse_outsiders(name, listed)
        return listed

    def _first(self, prefix: str) -> str | None:
        """The first key of the bucket that begins so."""
        page = next(pages(self.fs, self._bucket, prefix, MaxKeys=1))
        return next((entry["Key"] for entry in page.get("Contents", ())), None)

    def _refuse_outsiders(self, folder: str, names) -> None:
        for name in names:
            if not stays_inside(name):
                raise ArtifactError(
                    f"{self.uri_of(folder)} holds an object {name!r}, whose name leads out of its folder when it is copied to a "
                    "disk; rename or delete that object"
                )

    def read(self, name: str) -> bytes:
        """A record, in one request: pyarrow's client asks for the size first, and an object overwritten in between, which a
        record may be, would be read in half.
        """
        with self._doing("read", name):
            return self.fs.cat_file(self.path(name))

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Records, _READERS of them at a time."""
        if len(names) < 2:
            return [self.read(name) for name in names]
        with concurrent.futures.ThreadPoolExecutor(min(_READERS, len(names))) as pool:
            return list(pool.map(self.read, names))

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """`durable=False`: what no manifest will name need not wait for the disk (8 ms a file)."""
        with self._doing("write", name):
            if self.is_s3:
                self.fs.pipe_file(self.path(name), data)
            else:
                with self._temporary(name) as temporary:
                    temporary.write_bytes(data)
                    self._place(temporary, name, os.replace, durable=durable)

    def create(self, name: str, data: bytes) -> None:
        """Write `name` only if it does not exist; CommitConflict where it does. Never overwrites, whoever else writes."""
        conflict = CommitConflict(f"{self.uri_of(name)} exists already: another writer committed first")
        with self._doing("create", name):
            if not self.is_s3:
                with self._temporary(name) as temporary:
                    temporary.write_bytes(data)
                    try:
                        self._place(temporary, name, os.link)
                    except FileExistsError:
                        raise conflict from None
                return
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except Exception as error:
                if self._is_ours(name, data):
                    return
                raise (conflict if patience.is_conflict(error) else error) from None

    def _is_ours(self, name: str, data: bytes) -> bool:
        """A client that repeats a request whose reply was lost is refused by its own object; records are unique."""
        try:
            with self.impatient():
                return self.fs.cat_file(self.path(name)) == data
        except Exception:
            return False

    @contextlib.contextmanager
    def _temporary(self, name: str):
        target = Path(self.path(name))
        absent = list(itertools.takewhile(lambda folder: not folder.exists(), target.parents))
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in absent:
            _sync(folder.parent)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _place(self, temporary: Path, name: str, place, *, durable: bool = True) -> None:
        """Give a temporary file its name: its bytes reach the disk first, then the name does."""
        if durable:
            _sync(temporary)
        place(temporary, self.path(name))
        if durable:
            _sync(temporary.parent)

    def write_table(self, name: str, table: pa.Table) -> dict:
        """Write parquet; the same rows give the same bytes. Returns the file's manifest entry (name, bytes, sha256, rows)."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", row_group_size=65_536, store_schema=True)
        return {**self.write_file(name, sink.getvalue()), "rows": table.num_rows}

    def write_file(self, name: str, data: bytes) -> dict:
        """Write and return the file's manifest entry (name, bytes, sha256)."""
        self.write(name, data)
        return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        def attempt() -> pa.Table:
            with self._reader.open_input_file(self.path(name)) as source:
                if self.is_s3 and columns is None and source.size() <= _WHOLE:
                    source = pa.BufferReader(source.read_buffer())
                return pq.read_table(source, columns=columns)

        with self._doing("read", name):
            try:
                return self._patiently(attempt)
            except pa.ArrowInvalid as error:
                raise InputError(f"{self.uri_of(name)} is not a whole parquet file: {error}") from None

    def read_with(self, name: str, use: Callable[[pa.NativeFile], T]) -> T:
        """What `use` gives for an Arrow file that is read at random, asked again where reading breaks off; a local one is mapped
        into memory, not read.
        """

        def attempt() -> T:
            opened = self._reader.open_input_file(self.path(name)) if self.is_s3 else pa.memory_map(self.path(name))
            with opened as source:
                return use(source)

        with self._doing("read", name):
            return self._patiently(attempt)

    @contextlib.contextmanager
    def open_stream(self, name: str):
        """An Arrow file for reading from the start on, from S3 some megabytes ahead; a failure in the block is this file's."""
        with self._doing("read", name), self.arrow_fs.open_input_file(self.path(name)) as source:
            yield source

    def parquet_file(self, name: str, *, buffer: int = 0) -> pq.ParquetFile:
        """An opened parquet file (schema, row count, batches); InputError where it is none.

        `buffer`: bytes of a column that are read at a time; 0 = all of a row group, which may be the whole file.
        """
        with self._doing("read", name):
            try:
                opened = self._patiently(
                    lambda: ParquetFile(self.path(name), filesystem=self._reader, buffer_size=buffer)
                )
                opened.where, opened.patiently = self.uri_of(name), self._patiently
                opened.doing = functools.partial(self._doing, "read", name)
                return opened
            except pa.ArrowInvalid as error:
                raise InputError(f"{self.uri_of(name)} is not a whole parquet file: {error}") from None

    def fingerprint(self, name: str) -> str:
        """What changes when a source file changes: its SHA-256 locally, size and ETag on S3 (no download)."""
        with self._doing("read", name):
            if self.is_s3:
                info = self.fs.info(self.path(name))
                return f"{info['size']}:{str(info.get('ETag', info.get('LastModified'))).strip(chr(34))}"
            return sha256_of(Path(self.path(name)))

    def sha256(self, name: str) -> str:
        """Of an object's bytes; reads all of it."""

        def attempt() -> str:
            digest = hashlib.sha256()
            with self._reader.open_input_stream(self.path(name)) as source:
                while block := source.read(_HASH_BLOCK):
                    digest.update(block)
            return digest.hexdigest()

        with self._doing("read", name):
            return self._patiently(attempt)

    def put(self, source: Path, name: str) -> None:
        """Copy one local file, of any size, to `name`."""
        with self._doing("write", name):
            if self.is_s3:
                self.fs.put_file(str(source), self.path(name))
            else:
                with self._temporary(name) as temporary:
                    shutil.copyfile(source, temporary)
                    self._place(temporary, name, os.replace)

    def upload(self, folder: Path, name: str) -> list[dict]:
        """Copy every file of a local folder below `name`; returns their manifest entries, sorted by name."""
        entries = []
        for source in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            target = f"{name}/{source.relative_to(folder).as_posix()}"
            self.put(source, target)
            entries.append({"name": target, "bytes": source.stat().st_size, "sha256": sha256_of(source)})
        return entries

    def delete(self, name: str) -> None:
        """Delete one object; nothing where it does not exist."""
        with self._doing("delete", name), contextlib.suppress(FileNotFoundError):
            if self.is_s3:
                self.fs.rm_file(self.path(name))
            else:
                os.unlink(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete all that lies below a folder; nothing happens where there is none."""
        with self._doing("delete", name):
            if self.is_s3:
                delete_below(self.fs, self.path(name))
            elif os.path.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)

    def download(self, name: str, target: Path) -> None:
        """Copy one object, of any size, to a local file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._doing("read", name):
            if not self.is_s3:
                shutil.copyfile(self.path(name), target)
                return
            with self._patiently(lambda: self._reader.open_input_file(self.path(name))) as source:
                target.write_bytes(b"")

                def copy(start: int) -> None:
                    with open(target, "r+b") as file:
                        file.seek(start)
                        size = min(_BLOCK, source.size() - start)
                        file.write(self._patiently(lambda: source.read_at(size, start)))

                with concurrent.futures.ThreadPoolExecutor(_STREAMS) as pool:
                    for _ in pool.map(copy, range(0, source.size(), _BLOCK)):
                        pass


def _unpickled(uri: str, patience_s: float, was_reached: bool) -> Store:
    store = Store(uri, patience_s=patience_s)
    if store.is_s3:
        store.fs.answered = was_reached
    return store


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and container file systems know no fsync of a folder; that of a file must work.
        if not (error.errno in (errno.EINVAL, errno.ENOTSUP) and os.path.isdir(path)):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while block := source.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
