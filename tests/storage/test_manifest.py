"""The manifest is the commit: what has none does not exist, what has one is whole or is called damaged by name."""

import json
import os
from dataclasses import asdict

import pytest

from catid2_ray.artifacts.manifest import FORMAT, Attempt, Manifest, digest_of, find, key_of, verify
from catid2_ray.artifacts.store import Store
from catid2_ray.errors import ArtifactError, StorageError

SETTINGS = {"batch": 4096, "rate": 1e-4}
PARENTS = {"catalog": "c" * 64}


def attempt_at(store, **changes):
    return Attempt(store, "ids", **{"settings": SETTINGS, "parents": PARENTS, "recipe": {"seed": 0}} | changes)


def manifest_name(store, kind="ids"):
    key = store.names(f"artifacts/{kind}")[0]
    return f"artifacts/{kind}/{key}/manifest.json"


def test_an_attempt_without_commit_is_invisible(store):
    attempt = attempt_at(store)
    store.write_file(attempt.name("part-0.parquet"), b"half of it")
    assert find(store, "ids", attempt.key) is None


def test_commit_makes_the_artefact_found_and_whole(store):
    attempt = attempt_at(store)
    entries = [store.write_file(attempt.name(f"part-{i}"), b"x" * i) for i in (2, 1)]
    entries.append(store.write_file(attempt.name("report.json"), b"{}"))
    made = attempt.commit(entries, rows=3, schema="abc", metrics={"collisions": 0})
    found = find(store, "ids", attempt.key)
    assert found == made and found.key == key_of("ids", SETTINGS, PARENTS)
    assert found.recipe == {"seed": 0} and found.settings == SETTINGS and found.parents == PARENTS
    assert found.rows == 3 and found.schema == "abc" and found.metrics["collisions"] == 0
    assert found.metrics["seconds"] >= 0 and found.code_version and found.created.endswith("Z")
    assert [entry["name"] for entry in found.files] == ["part-1", "part-2", "report.json"]
    assert [entry["name"] for entry in found.parts()] == ["part-1", "part-2"]
    assert store.read(found.file("part-2")) == b"xx"
    verify(store, found)


def test_a_half_written_attempt_does_not_touch_a_good_one(store):
    killed = attempt_at(store)
    store.write_file(killed.name("part-0"), b"half")
    good = attempt_at(store)
    made = good.commit([store.write_file(good.name("part-0"), b"whole")], metrics={})
    late = attempt_at(store)
    store.write_file(late.name("part-0"), b"half again")
    assert killed.key == good.key == late.key and len({killed.folder, good.folder, late.folder}) == 3
    assert find(store, "ids", good.key) == made and store.read(made.file("part-0")) == b"whole"
    verify(store, made)


def test_the_second_committer_adopts_the_first(store):
    first, second = attempt_at(store), attempt_at(store)
    a = first.commit([store.write_file(first.name("f"), b"first")], metrics={})
    b = second.commit([store.write_file(second.name("f"), b"second")], metrics={})
    assert b == a and find(store, "ids", a.key) == a and store.read(b.file("f")) == b"first"


def test_the_digest_is_of_the_content_alone(store, make):
    one = make(store, "ids", {"a": b"1", "b": b"2"}, settings={"n": 1})
    same = make(store, "ids", {"b": b"2", "a": b"1"}, settings={"n": 2}, rows=7, metrics={"m": 1})
    assert one.key != same.key and one.digest == same.digest
    for files in ({"a": b"1", "b": b"3"}, {"a": b"1"}, {"a": b"1", "c": b"2"}):
        assert make(store, "ids", files, settings={"files": sorted(files), "n": repr(files)}).digest != one.digest
    assert make(store, "codes", {"a": b"1", "b": b"2"}).digest != one.digest


def test_the_key_covers_all_that_decides_the_result():
    key = key_of("ids", SETTINGS, PARENTS)
    assert len(key) == 16 and int(key, 16) >= 0
    assert key == key_of("ids", dict(reversed(SETTINGS.items())), dict(PARENTS))
    others = [
        key_of("codes", SETTINGS, PARENTS),
        key_of("ids", SETTINGS | {"batch": 2048}, PARENTS),
        key_of("ids", SETTINGS | {"more": None}, PARENTS),
        key_of("ids", SETTINGS, {"catalog": "d" * 64}),
        key_of("ids", SETTINGS, {"other": "c" * 64}),
        key_of("ids", SETTINGS, {}),
    ]
    assert len({key, *others}) == 7


def test_digests_do_not_depend_on_the_process():
    assert digest_of({"b": [1, 2.5, None], "a": "é"}) == digest_of({"a": "é", "b": [1, 2.5, None]})
    assert digest_of([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


@pytest.mark.parametrize(
    "content", [b"", b'{"kind": "ids", "key"', b"[]", b'{"kind": "ids"}', b"\xff\xfe", b'{"surprise": 1}']
)
def test_a_corrupt_manifest_is_an_error_not_a_rerun(local_store, make, content):
    made = make(local_store, "ids", {"f": b"x"})
    local_store.write(manifest_name(local_store), content)
    with pytest.raises(
        ArtifactError, match=r"manifest\.json is not a manifest \(.*delete that folder and rerun"
    ) as caught:
        find(local_store, "ids", made.key)
    assert local_store.uri in str(caught.value)


def test_a_manifest_of_another_format_is_refused(local_store, make):
    made = make(local_store, "ids", {"f": b"x"})
    local_store.write(
        manifest_name(local_store), json.dumps(asdict(made) | {"format": 99, "field_of_then": 1}).encode()
    )
    with pytest.raises(
        ArtifactError, match=f"has format 99, this version reads {FORMAT}: it was written by a newer version"
    ):
        find(local_store, "ids", made.key)


def test_verify_names_a_deleted_file(store, make):
    made = make(store, "ids", {"a": b"1", "b": b"22"})
    store.fs.rm_file(store.path(made.file("b")))
    with pytest.raises(ArtifactError, match=r"/b is missing though its manifest is committed") as caught:
        verify(store, made)
    assert store.uri_of(made.file("b")) in str(caught.value)


def test_verify_names_a_truncated_file(store, make):
    made = make(store, "ids", {"a": b"1", "b": b"22"})
    store.write(made.file("b"), b"2")
    with pytest.raises(ArtifactError, match=r"/b has 1 bytes, its manifest says 2\. Delete its folder and rerun"):
        verify(store, made)


@pytest.mark.faults
def test_verify_tells_a_damaged_artefact_from_an_unreachable_store(s3_store, make, monkeypatch):
    made = make(s3_store, "ids", {"a": b"1"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="cannot look up s3://") as caught:
        verify(Store(s3_store.uri), made)
    assert not isinstance(caught.value, ArtifactError)


def test_manifests_are_immutable(local_store, make):
    made = make(local_store, "ids", {"a": b"1"})
    with pytest.raises(AttributeError):
        made.rows = 3
    assert Manifest(**json.loads(local_store.read(manifest_name(local_store)))) == made


OUTSIDE = ["", "/etc/passwd", "..", "../x", "a/../../x", "a//x", "a\0", "a\\..\\x", "./x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(local_store, make, name):
    made = make(local_store, "ids", {"good": b"x"})
    files = [*made.files, made.files[0] | {"name": name}]
    local_store.write(manifest_name(local_store), json.dumps(asdict(made) | {"files": files}).encode())
    with pytest.raises(ArtifactError, match="the file name .* leads out of the store's folders") as caught:
        find(local_store, "ids", made.key)
    assert local_store.uri_of(made.name) in str(caught.value) and repr(name) in str(caught.value)
    with pytest.raises(ArtifactError, match="leads out"):
        made.file(name)


@pytest.mark.parametrize("folder", OUTSIDE)
def test_a_manifest_whose_folder_lies_outside_the_store_is_refused(local_store, make, folder):
    made = make(local_store, "ids", {})
    local_store.write(manifest_name(local_store), json.dumps(asdict(made) | {"folder": folder}).encode())
    with pytest.raises(ArtifactError, match="the folder .* leads out of the store's folders") as caught:
        find(local_store, "ids", made.key)
    assert local_store.uri_of(made.name) in str(caught.value) and repr(folder) in str(caught.value)


@pytest.mark.parametrize("change", [{"kind": "../../ids"}, {"key": "0" * 16}])
def test_a_manifest_in_the_place_of_another_is_refused(local_store, make, change):
    made = make(local_store, "ids", {"f": b"x"})
    local_store.write(manifest_name(local_store), json.dumps(asdict(made) | change).encode())
    with pytest.raises(ArtifactError, match=rf"says that it is the manifest of .*, expected ids/{made.key}"):
        find(local_store, "ids", made.key)


@pytest.mark.parametrize("files", [[1], [{}], 3, ["name"]])
def test_a_manifest_with_a_damaged_list_of_files_is_no_manifest(local_store, make, files):
    made = make(local_store, "ids", {"f": b"x"})
    local_store.write(manifest_name(local_store), json.dumps(asdict(made) | {"files": files}).encode())
    with pytest.raises(ArtifactError, match="is not a manifest"):
        find(local_store, "ids", made.key)


def test_files_and_their_names_are_on_the_disk_before_the_manifest_exists(local_store, monkeypatch):
    attempt, synced, fsync = attempt_at(local_store), [], os.fsync
    manifest = f"artifacts/ids/{attempt.key}/manifest.json"

    def record(descriptor):
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), local_store.root)
        synced.append((path, local_store.exists(manifest)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    names = [attempt.name(name) for name in ("part-0", "trie/arrays")]
    attempt.commit([local_store.write_file(name, b"x") for name in names], metrics={})
    for name in names:
        folder, _, file = name.rpartition("/")
        (before,) = [place for place, (path, _) in enumerate(synced) if path.startswith(f"{folder}/.{file}.")]
        assert (folder, False) in synced[before:], "the file's bytes, then its name, both before the manifest"
    of_manifest = [path.startswith(f"artifacts/ids/{attempt.key}/.manifest.json.") for path, _ in synced].index(True)
    assert synced[of_manifest][1] is False and not any(exists for _, exists in synced[:of_manifest])
    assert synced[of_manifest + 1 :] == [(f"artifacts/ids/{attempt.key}", True)]


def test_an_artefact_that_takes_over_the_metrics_of_another_is_found(local_store, make):
    first = make(local_store, "ids", {"a": b"1"}, metrics={"number": 1})
    second = make(local_store, "ids", {"a": b"2"}, settings={"k": 2}, metrics=first.metrics | {"number": 2})
    assert find(local_store, "ids", second.key).metrics == second.metrics != first.metrics


def test_a_damaged_name_of_the_check_is_no_manifest_of_before(local_store, make):
    made = make(local_store, "ids", {"a": b"1"})
    data = local_store.read(made.name)
    local_store.write(made.name, data.replace(b"manifest_sha256", b"manifest_sha257"))
    with pytest.raises(ArtifactError, match="is not as it was written"):
        find(local_store, "ids", made.key)
