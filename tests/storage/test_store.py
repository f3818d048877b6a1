"""The store keeps the same promises on a local folder and on S3: whole objects, one winner per name, named failures.

Contention is real (threads), the unreachable endpoint is a closed port on localhost.
"""

import contextlib
import os
import pickle
import socket
import threading
import time

import pyarrow as pa
import pytest

from catid2_ray.artifacts import s3
from catid2_ray.artifacts import store as store_module
from catid2_ray.artifacts.store import S3_ENVIRONMENT, Store, sha256_of, stays_inside
from catid2_ray.errors import ArtifactError, CommitConflict, InputError, StorageError
from catid2_ray.on_ray.stages.source import files_of, products_of
from tests.s3_server import LIMITED, SECRET, client


def race(count, work):
    """Run `work(i)` in `count` threads that start together; returns results and raised errors."""
    barrier, results, errors = threading.Barrier(count), [], []

    def one(i):
        barrier.wait()
        try:
            results.append(work(i))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, errors


def test_what_is_written_is_read_and_may_be_overwritten(store):
    assert not store.exists("a/b.txt")
    store.write("a/b.txt", b"one")
    assert store.exists("a/b.txt") and store.read("a/b.txt") == b"one"
    store.write("a/b.txt", b"two")
    assert store.read("a/b.txt") == b"two"
    store.write("a/empty", b"")
    assert store.read("a/empty") == b""


def test_names_lists_files_and_folders_directly_below(store):
    for name in ("top/2.json", "top/10.json", "top/folder/x", "topmost/y"):
        store.write(name, b"{}")
    assert store.names("top") == ["10.json", "2.json", "folder"]
    assert store.names("nothing/here") == []
    assert store.names("top/folder") == ["x"]


def test_names_sees_what_another_store_object_wrote(store):
    assert store.names("shared") == []
    Store(store.uri).write("shared/late", b"x")
    assert store.names("shared") == ["late"] and store.exists("shared/late")


def test_create_twice_conflicts_and_keeps_the_first(store):
    store.create("current/1", b"first")
    with pytest.raises(CommitConflict, match="current/1 exists already: another writer committed first"):
        store.create("current/1", b"second")
    assert store.read("current/1") == b"first"
    store.write("plain", b"written")
    with pytest.raises(CommitConflict):
        store.create("plain", b"created")
    assert store.read("plain") == b"written"


def test_of_many_creators_of_one_name_exactly_one_wins(store):
    def create(i):
        store.create("lock", f"writer {i}".encode())
        return i

    winners, errors = race(8, create)
    assert len(winners) == 1 and store.read("lock") == f"writer {winners[0]}".encode()
    assert [type(error) for error in errors] == [CommitConflict] * 7
    assert store.names("") == ["lock"]


def test_readers_never_see_half_of_a_write(store):
    first, second = b"a" * 300_000, b"b" * 300_000
    store.write("big", first)

    def work(i):
        if i == 0:
            for data in (second, first) * 5:
                store.write("big", data)
            return True
        return all(store.read("big") in (first, second) for _ in range(10))

    results, errors = race(3, work)
    assert results == [True] * 3 and not errors


def test_missing_objects_are_storage_errors_that_name_the_uri(store, tmp_path):
    for action in (lambda: store.read("no/such"), lambda: store.download("no/such", tmp_path / "t" / "x")):
        with pytest.raises(StorageError, match=r"cannot read .*no/such: it does not exist") as caught:
            action()
        assert store.uri in str(caught.value)
    with pytest.raises(StorageError, match=r"cannot read .*no\.parquet"):
        store.read_table("no.parquet")


def test_upload_and_download_keep_bytes_and_describe_files(store, tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "z.bin").write_bytes(os.urandom(1000))
    (source / "inner" / "a.txt").write_text("hello")
    entries = store.upload(source, "place")
    assert [(entry["name"], entry["bytes"]) for entry in entries] == [("place/inner/a.txt", 5), ("place/z.bin", 1000)]
    for entry in entries:
        store.download(entry["name"], tmp_path / "copy" / entry["name"])
        assert sha256_of(tmp_path / "copy" / entry["name"]) == entry["sha256"]
    assert store.names("place") == ["inner", "z.bin"]


def test_delete_folder_takes_all_below_and_nothing_beside(store):
    for name in ("work/a", "work/deep/b", "work2/c"):
        store.write(name, b"x")
    store.delete_folder("work")
    assert not store.exists("work/a") and not store.exists("work/deep/b") and store.exists("work2/c")
    store.delete_folder("never/there")


def test_tables_keep_their_rows_and_the_same_rows_give_the_same_bytes(store):
    table = pa.table({"product_id": [f"p{i}" for i in range(1000)], "n": range(1000)})
    entry = store.write_table("one.parquet", table)
    assert entry == {**store.write_table("two.parquet", table), "name": "one.parquet"} and entry["rows"] == 1000
    assert store.read_table("one.parquet") == table
    assert store.read_table("one.parquet", columns=["n"]).column_names == ["n"]
    in_pieces = pa.concat_tables([table.slice(0, 300), table.slice(300, 1), table.slice(301)])
    assert store.write_table("three.parquet", in_pieces)["sha256"] == entry["sha256"]


def test_a_table_is_a_file_or_a_folder_of_files(store):
    table = pa.table({"n": [1]})
    store.write_table("pairs.parquet", table)
    store.write_table("products/part-1.parquet", table)
    store.write_table("products/deep/part-0.parquet", table)
    store.write_table("products/_temporary/part-0.parquet", table)
    store.write("products/README.txt", b"not a table")
    assert files_of(store, "pairs").files == ["pairs.parquet"]
    assert products_of(store).files == ["products/deep/part-0.parquet", "products/part-1.parquet"]
    store.write("empty/products/README.txt", b"no table")
    for name in ("empty", "absent"):
        below = Store(store.uri_of(name))
        assert files_of(below, "pairs") is None
        with pytest.raises(StorageError, match="no table 'products' in .*expected products.parquet, .csv") as caught:
            products_of(below)
        assert below.uri in str(caught.value)


def test_a_fingerprint_changes_with_the_content(store):
    store.write("f", b"aaaa")
    before = store.fingerprint("f")
    assert store.fingerprint("f") == before
    store.write("f", b"aaab")
    assert store.fingerprint("f") != before
    with pytest.raises(StorageError, match="it does not exist"):
        store.fingerprint("gone")


def test_a_pickled_store_carries_no_credentials(s3_store, local_store):
    s3_store.write("a", b"1")
    pickled = pickle.dumps(s3_store)
    assert SECRET.encode() not in pickled and b"tests" not in pickled and b"127.0.0.1" not in pickled
    again = pickle.loads(pickled)
    assert again.uri == s3_store.uri and again.read("a") == b"1"
    local = pickle.loads(pickle.dumps(local_store))
    assert local.root == local_store.root and repr(local) == f"Store({local_store.root!r})"


def test_s3_stores_set_the_checksum_mode_that_all_servers_understand(s3_session, monkeypatch):
    for name, value in s3_session[0].items():
        monkeypatch.setenv(name, value)
    for name in S3_ENVIRONMENT:
        monkeypatch.setenv(name, "kept for the teardown")
        monkeypatch.delenv(name)
    Store(s3_session[1])
    assert {name: os.environ[name] for name in S3_ENVIRONMENT} == S3_ENVIRONMENT


def test_a_uri_with_slashes_is_one_store(s3_session, s3_environment):
    assert Store(f"{s3_session[1]}/a/b/").uri == f"{s3_session[1]}/a/b"


@pytest.mark.parametrize("uri", ["s3://", "s3:///"])
def test_an_s3_uri_without_bucket(uri):
    with pytest.raises(StorageError, match="names no bucket; expected s3://bucket/prefix"):
        Store(uri)


def test_other_schemes_are_refused():
    with pytest.raises(StorageError, match="'gs://bucket': only local folders and s3:// prefixes can be stores"):
        Store("gs://bucket")


def test_local_uris(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("relative").root == str(tmp_path / "relative")
    assert Store(f"file://{tmp_path}/x").root == str(tmp_path / "x")
    Store("not_there_yet").check()


def use_every_method(store, folder):
    """What a job does with a store, on objects below the root; fails where the store reads or finds another thing than it wrote."""
    table = pa.table({"n": range(1000)})
    store.check()
    assert store.names("work") == [] and store.sizes("work") == {} and not store.exists("work")
    store.write("work/a", b"one")
    store.create("work/b", b"two")
    with pytest.raises(CommitConflict):
        store.create("work/b", b"three")
    store.write_table("work/deep/t.parquet", table)
    (folder / "up").mkdir(parents=True)
    (folder / "up" / "f").write_bytes(b"uploaded")
    store.upload(folder / "up", "work/up")
    store.download("work/up/f", folder / "down" / "f")
    assert (folder / "down" / "f").read_bytes() == b"uploaded" and store.read("work/a") == b"one"
    assert store.read_table("work/deep/t.parquet") == table == store.parquet_file("work/deep/t.parquet").read()
    assert store.read_table("work/deep/t.parquet", columns=["n"]) == table
    assert store.read_with("work/a", lambda source: source.read()) == b"one"
    with store.open_stream("work/a") as source:
        assert source.read() == b"one"
    assert store.names("work") == ["a", "b", "deep", "up"]
    assert store.exists("work") and store.exists("work/a") and store.exists("work/deep") and not store.exists("wor")
    assert files_of(store, "work").files == ["work/deep/t.parquet"]
    store.delete("work2")
    sizes = store.sizes("work")
    assert sorted(sizes) == ["a", "b", "deep/t.parquet", "up/f"] and sizes["b"] == store.size("work/b") == 3
    assert store.fingerprint("work/a") != store.fingerprint("work/b")
    store.write("work2", b"beside")
    store.delete_folder("work")
    assert store.names("") == ["work2"] and not store.exists("work/a")


@pytest.mark.parametrize("prefix", ["[ab]", "a*", "?", "[ ** {x,y} %20 # + &"])
def test_a_store_whose_name_looks_like_a_pattern_is_like_any_other(store, prefix, tmp_path):
    beside = Store(f"{store.uri}/a")  # what [ab], a* and ? match where they are read as patterns
    beside.write("kept", b"kept")
    use_every_method(Store(f"{store.uri}/{prefix}"), tmp_path / "files")
    assert beside.names("") == ["kept"]


def test_names_that_look_like_patterns_are_deleted_alone(store):
    for name in ("run[1]/x", "run1/x", "run*/y", "runs/y"):
        store.write(name, b"x")
    store.delete_folder("run[1]")
    store.delete_folder("run*")
    assert store.names("") == ["run1", "runs"]


def test_others_delete_below_a_store_without_patterns(s3_store):
    store = Store(f"{s3_store.uri}/[ab]")
    for name in ("runs/one/x", "runs/two/x", "runs/three/deep/x", "file"):
        store.write(name, b"x")
    Store(f"{s3_store.uri}/a").write("runs/one/x", b"beside")
    files = pickle.loads(pickle.dumps(store.arrow_fs))
    files.delete_dir(store.path("runs/one"))
    files.delete_dir_contents(store.path("runs/three"))
    files.delete_file(store.path("file"))
    assert store.sizes("") == {"runs/two/x": 1} and Store(f"{s3_store.uri}/a").exists("runs/one/x")


def test_credentials_limited_to_the_prefix_do(s3_session, s3_environment, monkeypatch, tmp_path):
    if os.environ.get("CATID2_TEST_S3"):
        pytest.skip("the server of the environment has no such credentials")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"{LIMITED}ours")
    for forbidden in (s3_session[1], f"{s3_session[1]}/other", f"{s3_session[1]}/ours2"):
        with pytest.raises(StorageError, match="cannot list .*refuses what these credentials ask"):
            Store(forbidden).check()
    Store(f"{s3_session[1]}/ours").check()
    use_every_method(Store(f"{s3_session[1]}/ours"), tmp_path)


def test_a_check_writes_nothing(store):
    store.check()
    assert store.names("") == []
    assert store.is_s3 or not os.path.exists(store.root)


def test_a_listing_longer_than_a_page_is_whole(s3_store, monkeypatch):
    for i in range(5):
        s3_store.write(f"many/{i}/x", b"")
    all_pages = s3.pages
    monkeypatch.setattr(store_module, "pages", lambda *a, **options: all_pages(*a, **{"MaxKeys": 2} | options))
    monkeypatch.setattr(s3, "_DELETED_AT_ONCE", 2)
    assert s3_store.names("many") == ["0", "1", "2", "3", "4"] and len(s3_store.sizes("many")) == 5
    s3_store.delete_folder("many")
    assert s3_store.names("many") == []


@pytest.mark.parametrize("name", ["a", "a.b/c", "..a", "a b/[c]", "é"])
def test_names_that_stay_inside(name):
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name", ["", "/a", "..", "../a", "a/../b", "a/..", "a//b", "a/", ".", "./a", "a\0b", "a\\b", "..\\a", None, 3]
)
def test_names_that_do_not(name):
    assert not stays_inside(name)


@pytest.mark.parametrize("key", ["f/../../x", "f/a//b", "f/a\\b"])
def test_a_listing_with_a_name_that_leads_out_is_refused(s3_environment, s3_store, key):
    s3_store.write("f/good", b"x")
    bucket, _, prefix = s3_store.root.partition("/")
    client(s3_environment).put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"evil")
    with pytest.raises(ArtifactError, match="holds an object .*leads out of its folder") as caught:
        s3_store.sizes("f")
    assert s3_store.uri_of("f") in str(caught.value) and repr(key.removeprefix("f/")) in str(caught.value)


@pytest.fixture
def synced(monkeypatch):
    """What reached the disk, in order: the paths that os.fsync was called with, and the names files were given."""
    events, fsync = [], os.fsync

    def record(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    for what in ("replace", "link"):
        place = getattr(os, what)
        monkeypatch.setattr(
            os, what, lambda source, target, place=place: (events.append(("name", str(target))), place(source, target))
        )
    return events


@pytest.mark.parametrize("action", ["write", "create", "put"])
def test_a_local_file_is_on_the_disk_before_its_name_and_then_the_name(local_store, tmp_path, synced, action):
    (tmp_path / "source").write_bytes(b"x")
    argument = {"put": (tmp_path / "source", "a/b/c")}.get(action, ("a/b/c", b"x"))
    getattr(local_store, action)(*argument)
    folder = f"{local_store.root}/a/b"
    folders = [str(tmp_path), local_store.root, f"{local_store.root}/a"]
    assert sorted(synced[:3]) == [("sync", name) for name in sorted(folders)], "the new folders' own names"
    (first, temporary), *rest = synced[3:]
    assert first == "sync" and temporary.startswith(f"{folder}/.c.")
    assert rest == [("name", f"{folder}/c"), ("sync", folder)]


def test_a_folder_that_cannot_be_synced_is_no_failure_and_a_file_is(local_store, monkeypatch):
    fsync = os.fsync

    def folders_not(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", folders_not)
    local_store.write("a/b", b"x")
    assert local_store.read("a/b") == b"x"

    def never(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", never)
    with pytest.raises(StorageError, match="cannot create .*a/c: OSError: .*Input/output error"):
        local_store.create("a/c", b"x")
    assert local_store.names("a") == ["b"]


def test_a_large_object_is_downloaded_in_blocks(s3_store, monkeypatch, tmp_path):
    monkeypatch.setattr(store_module, "_BLOCK", 1000)
    for size in (0, 1, 999, 1000, 1001, 7500):
        data = os.urandom(size)
        s3_store.write("big", data)
        s3_store.download("big", tmp_path / "big")
        assert (tmp_path / "big").read_bytes() == data


@pytest.mark.parametrize("whole", [0, 1 << 20])
def test_a_table_reads_the_same_whole_and_column_by_column(s3_store, monkeypatch, whole):
    monkeypatch.setattr(store_module, "_WHOLE", whole)
    table = pa.table({"n": range(5000), "text": [f"t{i}" for i in range(5000)]})
    s3_store.write_table("t.parquet", table)
    assert s3_store.read_table("t.parquet") == table
    s3_store.write("t.parquet", s3_store.read("t.parquet")[:-100])
    with pytest.raises(InputError, match=r"s3://.*t\.parquet is not a whole parquet file"):
        s3_store.read_table("t.parquet")


def test_tables_are_read_at_the_endpoint_of_the_environment(s3_store):
    s3_store.write_table("t.parquet", pa.table({"n": [1]}))
    assert s3_store._reader.type_name == "s3", "pyarrow's own client, not s3fs behind it"


def test_check_passes_on_an_empty_bucket(s3_store):
    s3_store.check()


def test_a_bucket_that_does_not_exist(s3_environment):
    store = Store("s3://no-such-bucket-anywhere/prefix")
    for action in (store.check, lambda: store.write("a", b""), lambda: store.create("a", b"")):
        with pytest.raises(StorageError, match="s3://no-such-bucket-anywhere/prefix") as caught:
            action()
        assert not isinstance(caught.value, CommitConflict)


def test_a_store_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store = Store(tmp_path / "file")
    with pytest.raises(StorageError, match="file is a file; a store is a folder"):
        store.check()
    for action in (lambda: store.write("a", b""), lambda: store.create("a/b", b"")):
        with pytest.raises(StorageError, match="cannot (write|create)") as caught:
            action()
        assert not isinstance(caught.value, CommitConflict)


def test_a_failed_local_write_leaves_no_litter(local_store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="cannot write .*a/b: OSError: .*No space left"):
        local_store.write("a/b", b"x")
    assert os.listdir(f"{local_store.root}/a") == []


@pytest.mark.faults
@pytest.mark.parametrize("action", ["check", "create", "exists", "read", "read_table", "read_with", "download"])
def test_an_unreachable_endpoint_fails_soon_and_names_the_store(s3_environment, monkeypatch, action, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed}")
    store = Store("s3://bucket/prefix")
    arguments = {
        "check": (),
        "create": ("name", b"x"),
        "download": ("name", tmp_path / "x"),
        "read_with": ("name", bytes),
    }.get(action, ("name",))
    started = time.monotonic()
    with (
        pytest.raises(StorageError, match=r"s3://bucket/prefix.*check AWS_ENDPOINT_URL, the credentials") as caught,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(getattr(store, action)(*arguments))
    assert time.monotonic() - started < 30
    assert not isinstance(caught.value, CommitConflict) and SECRET not in str(caught.value)
