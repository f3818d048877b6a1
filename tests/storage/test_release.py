"""A release holds parts made from each other and nothing else; `current` moves by one winner at a time.

Two chains of artefacts stand for two runs of the job; a mixture takes one part from the other run.
"""

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import verify
from catid2_ray.artifacts.release import (
    PARTS,
    check_parts,
    current,
    fetch,
    load,
    publish,
    release_folder,
    serving_folder,
)
from catid2_ray.errors import ArtifactError, CommitConflict, ReleaseError, StorageError


def test_nothing_published_yet(store):
    with pytest.raises(ReleaseError, match=r"nothing was published to .* yet; run `catid2 reindex") as caught:
        current(store)
    assert store.uri in str(caught.value)


def test_publish_makes_current_and_the_same_parts_do_not_move_it(store, chain):
    parts = chain(store, "one")
    release, moved = publish(store, parts)
    assert moved and current(store) == release and load(store, release.name) == release
    assert release.manifests(store) == parts
    again, moved = publish(store, chain(store, "one"))
    assert not moved and again == release and store.names("current") == ["0000000001.json"]


def test_history_is_a_rollback_list(store, chain):
    one, two = chain(store, "one"), chain(store, "two")
    first, second = publish(store, one)[0], publish(store, two)[0]
    assert first.name != second.name and current(store) == second
    back, moved = publish(store, one)
    assert moved and back == first and current(store) == first
    assert [json.loads(store.read(f"current/{name}"))["release"] for name in store.names("current")] == [
        first.name, second.name, first.name,
    ]  # fmt: skip
    assert len(store.names("releases")) == 2


def test_the_highest_number_is_current_past_ten(local_store, chain):
    release = publish(local_store, chain(local_store, "one"))[0]
    local_store.write("current/0000000010.json", json.dumps({"release": release.name}).encode())
    second = publish(local_store, chain(local_store, "two"))[0]
    assert local_store.names("current")[-1] == "0000000011.json" and current(local_store) == second


@pytest.mark.parametrize("part, other", [("generator", "evaluation"), ("quantizer", "ids"), ("catalog", "embeddings")])
def test_a_mixture_is_refused_and_both_parts_are_named(local_store, chain, part, other):
    """Only these two parts know each other, so the message is exact: `other` was made from another `part`."""
    one, two = chain(local_store, "one"), chain(local_store, "two")
    mixed = {part: two[part], other: one[other]}
    expected = (
        f"parts do not match: {other} was made from {part} {one[part].digest[:12]}, but the release holds {part} "
        f"{two[part].digest[:12]}. Rerun the job so that {other} is made anew"
    )
    with pytest.raises(ReleaseError, match=re.escape(expected)):
        check_parts(mixed)
    with pytest.raises(ReleaseError, match=rf"parts do not match: .*\b{part}\b.*Rerun the job"):
        publish(local_store, one | {part: two[part]})
    assert local_store.names("releases") == [] and local_store.names("current") == []


def test_missing_parts_are_named(local_store, chain):
    parts = chain(local_store, "one")
    del parts["ids"], parts["evaluation"]
    with pytest.raises(ReleaseError, match="a release needs catalog, .*; missing: ids, evaluation"):
        publish(local_store, parts)


def test_a_release_may_do_without_node_vectors(local_store, chain, tmp_path):
    parts = chain(local_store, "one")
    with_them, _ = publish(local_store, parts)
    del parts["node_vectors"]
    release, moved = publish(local_store, parts)
    assert moved and release.name != with_them.name and "node_vectors" not in release.parts
    assert "node_vectors" not in release.manifests(local_store) and "node_vectors" in with_them.manifests(local_store)


def test_node_vectors_are_served_where_the_search_looks_ahead(local_store, chain, tmp_path):
    parts = chain(local_store, "one")
    parts["adapter"].metrics["adopted"] = False
    settings = releases.retriever_settings(parts, release="r")
    assert not (releases.parts_folder(local_store, parts, tmp_path, settings) / "node_vectors").exists()
    ahead = {"lookahead": {"logp_weight": 1.0}, "encoder": {"name": "lsa"}}
    settings = releases.retriever_settings(parts, release="r", beam_width=7, ahead=ahead)
    assert settings["search"] == "lookahead" and settings["beam_width"] == 7 and settings["encoder"] == {"name": "lsa"}
    folder = releases.parts_folder(local_store, parts, tmp_path, settings)
    assert (folder / "node_vectors" / "node_vectors.txt").read_text() == "one node_vectors"
    others = chain(local_store, "two")["node_vectors"]
    with pytest.raises(
        ReleaseError, match="node vectors were made for ids .* so that the node_vectors part is made anew"
    ):
        releases.parts_folder(local_store, parts | {"node_vectors": others}, tmp_path, settings)


def test_publish_refuses_a_damaged_part(local_store, chain):
    parts = chain(local_store, "one")
    local_store.delete_folder(parts["generator"].folder)
    with pytest.raises(ArtifactError, match=r"generator\.txt is missing though its manifest is committed"):
        publish(local_store, parts)
    assert local_store.names("current") == []


def test_a_part_that_is_gone_or_rebuilt_is_named(local_store, chain, make):
    parts = chain(local_store, "one")
    release = publish(local_store, parts)[0]
    ids = parts["ids"]
    local_store.delete_folder(f"artifacts/ids/{ids.key}")
    with pytest.raises(ReleaseError, match=rf"its part ids \({ids.key}\) is gone; rerun the job and publish again"):
        release.manifests(local_store)
    rebuilt = make(local_store, "ids", {"f": b"something else"}, parents=ids.parents, settings=ids.settings)
    assert rebuilt.key == ids.key
    with pytest.raises(ReleaseError, match="part ids has digest .*it was rebuilt since. Publish again") as caught:
        release.manifests(local_store)
    assert rebuilt.digest[:12] in str(caught.value) and ids.digest[:12] in str(caught.value)


def test_a_release_without_a_part(local_store, chain):
    publish(local_store, chain(local_store, "one"))
    without(local_store, "generator")
    with pytest.raises(ReleaseError, match="has no part 'generator'; publish it again"):
        current(local_store).manifests(local_store)


def without(store, part: str) -> releases.Release:
    """Publish the current release once more, without one of its parts."""
    record = asdict(current(store))
    del record["parts"][part]
    release = releases.Release(**record | {"name": releases._name_of(record["parts"])})
    store.write(f"releases/{release.name}.json", json.dumps(asdict(release)).encode())
    store.write("current/0000000002.json", json.dumps({"release": release.name}).encode())
    return release


def test_an_unknown_release(local_store, chain):
    with pytest.raises(ReleaseError, match="no release 'r-x' in .*; it has none"):
        load(local_store, "r-x")
    name = publish(local_store, chain(local_store, "one"))[0].name
    with pytest.raises(ReleaseError, match=f"it has {name}$"):
        load(local_store, "r-x")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"nothing": 1}', b"\xff"])
@pytest.mark.parametrize("damaged", ["current", "releases"])
def test_a_corrupt_record_is_an_artefact_error_that_names_it(local_store, chain, damaged, content):
    publish(local_store, chain(local_store, "one"))
    name = f"{damaged}/{local_store.names(damaged)[0]}"
    local_store.write(name, content)
    with pytest.raises(ArtifactError, match=rf"{name} is not .* record") as caught:
        current(local_store)
    assert local_store.uri in str(caught.value)


def test_a_publisher_that_was_overtaken_loses_and_nothing_is_lost(store, chain, monkeypatch):
    one, two = chain(store, "one"), chain(store, "two")
    stale = releases.pointer(store)
    first = publish(store, one)[0]
    with monkeypatch.context() as patched:
        patched.setattr(releases, "pointer", lambda store: stale)
        with pytest.raises(CommitConflict, match=r"another job published to .*release r-\w+ is stored but not current"):
            publish(store, two)
    assert current(store) == first and len(store.names("releases")) == 2
    assert publish(store, two)[1] and current(store).manifests(store) == two


def test_of_two_publishers_at_once_one_wins(store, chain, monkeypatch):
    chains = [chain(store, "one"), chain(store, "two")]
    barrier, read, won, lost = threading.Barrier(2), releases.pointer, [], []

    def both_read_first(store):
        pointer = read(store)
        barrier.wait(20)
        return pointer

    def work(parts):
        try:
            won.append(publish(store, parts)[0])
        except CommitConflict as error:
            lost.append(error)

    with monkeypatch.context() as patched:
        patched.setattr(releases, "pointer", both_read_first)
        threads = [threading.Thread(target=work, args=(parts,)) for parts in chains]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(won) == len(lost) == 1 and current(store) == won[0]
    assert store.names("current") == ["0000000001.json"] and len(store.names("releases")) == 2


def test_a_local_artefact_is_read_in_place(local_store, chain, tmp_path):
    ids = chain(local_store, "one")["ids"]
    assert fetch(local_store, ids, tmp_path / "cache") == Path(local_store.path(ids.folder))
    assert not (tmp_path / "cache").exists()
    local_store.write(ids.file("ids.txt"), b"")
    with pytest.raises(ArtifactError, match="has 0 bytes"):
        fetch(local_store, ids, tmp_path / "cache")


def test_fetch_copies_from_s3_once(s3_store, chain, tmp_path, monkeypatch):
    ids = chain(s3_store, "one")["ids"]
    folder = fetch(s3_store, ids, tmp_path / "cache")
    assert (folder / "trie" / "arrays.npy").read_bytes() == b"one" and (folder / "ids.txt").read_bytes() == b"one ids"
    monkeypatch.setattr(type(s3_store), "download", lambda *_: pytest.fail("fetched twice"))
    assert fetch(s3_store, ids, tmp_path / "cache") == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_readers_that_fetch_at_once_share_one_whole_copy(s3_store, chain, tmp_path):
    ids, folders = chain(s3_store, "one")["ids"], []
    threads = [threading.Thread(target=lambda: folders.append(fetch(s3_store, ids, tmp_path / "c"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and len(set(folders)) == 1
    assert list((tmp_path / "c").iterdir()) == [folders[0]]


def test_fetch_refuses_an_object_of_the_right_size_and_wrong_content(s3_store, chain, tmp_path):
    ids = chain(s3_store, "one")["ids"]
    s3_store.write(ids.file("trie/arrays.npy"), b"eno")
    verify(s3_store, ids)
    with pytest.raises(
        ArtifactError, match=r"trie/arrays\.npy is not what its manifest says \(SHA-256 differs\)"
    ) as caught:
        fetch(s3_store, ids, tmp_path / "cache")
    assert s3_store.uri in str(caught.value) and list((tmp_path / "cache").iterdir()) == []


# A store whose downloads are counted in a file, and take long enough for all to meet; `stuck` never ends one.
FETCHING = """
import os, sys, time
from pathlib import Path
from catid2_ray.artifacts.release import fetch
from catid2_ray.artifacts.manifest import find
from catid2_ray.artifacts.store import Store

class Remote(Store):
    is_s3 = property(lambda self: self.remote, lambda self, value: None)
    remote = False

    def download(self, name, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"half")
        with open(sys.argv[2], "a") as count:
            print(os.getpid(), name, file=count)
        time.sleep(600 if sys.argv[4:] else 1.0)
        target.write_bytes(Path(self.path(name)).read_bytes())

store = Remote(sys.argv[1])
(key,) = store.names("artifacts/ids")
ids = find(store, "ids", key)
store.remote = True
print("ready", flush=True)
sys.stdin.readline()
print(fetch(store, ids, Path(sys.argv[3]), below=("ids.txt",)), flush=True)
"""


def fetching(store, folder, *options):
    return subprocess.Popen(
        [sys.executable, "-c", FETCHING, store.root, str(folder / "count"), str(folder / "cache"), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_four_processes_of_a_node_download_once(local_store, chain, tmp_path):
    chain(local_store, "one")
    processes = [fetching(local_store, tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    (folder,) = folders
    assert (Path(folder) / "ids.txt").read_bytes() == b"one ids"
    assert len((tmp_path / "count").read_text().splitlines()) == 1
    assert list((tmp_path / "cache").iterdir()) == [Path(folder)], "neither a lock nor half a copy is left"


@pytest.mark.faults
def test_a_killed_downloader_frees_the_next_one(local_store, chain, tmp_path, fault):
    chain(local_store, "one")
    stuck, waiting = fetching(local_store, tmp_path, "stuck"), fetching(local_store, tmp_path)
    for process in (stuck, waiting):
        assert process.stdout.readline() == "ready\n"
    stuck.stdin.write("go\n")
    stuck.stdin.flush()
    deadline = time.monotonic() + 30
    while not (tmp_path / "count").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    waiting.stdin.write("go\n")
    waiting.stdin.flush()
    time.sleep(0.5)
    assert waiting.poll() is None and len((tmp_path / "count").read_text().splitlines()) == 1
    stuck.kill()
    stuck.communicate()
    folder = Path(waiting.communicate(timeout=60)[0].strip())
    assert (folder / "ids.txt").read_bytes() == b"one ids"
    assert list((tmp_path / "cache").iterdir()) == [folder]
    fault("a download killed in the middle", times=1, outcome="the next one does it whole", lost_s=0)


def test_a_cache_that_cannot_be_locked_is_named(s3_store, chain, tmp_path):
    ids = chain(s3_store, "one")["ids"]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot lock .*file/.*; set CATID2_CACHE to a folder"):
        fetch(s3_store, ids, tmp_path / "file")


@pytest.mark.parametrize("name", ["../../outside.txt", "/outside.txt", "a/../../outside.txt"])
def test_a_fetch_never_writes_outside_its_cache(s3_store, chain, tmp_path, name):
    ids = chain(s3_store, "one")["ids"]
    with pytest.raises(ArtifactError, match="leads out of the store's folders") as caught:
        fetch(s3_store, replace(ids, files=[ids.files[0] | {"name": name}]), tmp_path / "cache")
    assert repr(name) in str(caught.value) and ids.name in str(caught.value)
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "/x", "a\\b"])
def test_a_release_name_that_is_a_path_is_refused(local_store, chain, name):
    release = publish(local_store, chain(local_store, "one"))[0]
    with pytest.raises(ArtifactError, match="is not a plain name") as caught:
        load(local_store, name)
    assert local_store.uri in str(caught.value) and repr(name) in str(caught.value)
    local_store.write("current/0000000002.json", json.dumps({"release": name}).encode())
    with pytest.raises(ArtifactError, match=r"current/0000000002\.json is not a release record .*not a plain name"):
        current(local_store)
    record, place = f"releases/{release.name}.json", {"key": name, "digest": "d"}
    for parts in ({name: place | {"key": "k"}}, release.parts | {"ids": place}):
        local_store.write(record, json.dumps({"name": release.name, "parts": parts}).encode())
        with pytest.raises(ArtifactError, match=f"{record} is not a release record .*not a plain name"):
            load(local_store, release.name)


def test_a_record_of_another_release_is_refused(local_store, chain):
    release = publish(local_store, chain(local_store, "one"))[0]
    local_store.write("releases/r-x.json", local_store.read(f"releases/{release.name}.json"))
    with pytest.raises(ArtifactError, match=f"it is the record of '{release.name}'"):
        load(local_store, "r-x")


def check_serving_folder(folder, release):
    assert (folder / "generator" / "generator.txt").read_bytes() == b"one generator"
    assert (folder / "trie" / "arrays.npy").read_bytes() == b"one"
    assert (folder / "products.arrow").read_bytes() == b"one"
    assert json.loads((folder / "retriever.json").read_text()) == {
        "beam_width": 50, "query_tokens": 24, "codes_per_level": [4, 4, 4], "release": release.name, "word": "one",
    }  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["generator", "products.arrow", "retriever.json", "trie"]


def test_the_serving_folder_of_a_release(store, chain, tmp_path):
    release = publish(store, chain(store, "one"))[0]
    folder = release_folder(store, release, tmp_path / "cache")
    check_serving_folder(folder, release)
    assert release_folder(store, release, tmp_path / "cache") == folder
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_relative_cache_gives_links_that_hold(s3_store, chain, tmp_path, monkeypatch):
    release = publish(s3_store, chain(s3_store, "one"))[0]
    monkeypatch.chdir(tmp_path)
    check_serving_folder(release_folder(s3_store, release, Path("cache")), release)


def test_a_store_built_anew_is_not_served_from_the_old_ones_links(local_store, chain, tmp_path):
    release = publish(local_store, chain(local_store, "one"))[0]
    release_folder(local_store, release, tmp_path / "cache")
    local_store.delete_folder("artifacts")
    assert publish(local_store, chain(local_store, "one"))[0].name == release.name
    check_serving_folder(release_folder(local_store, release, tmp_path / "cache"), release)


def test_a_cache_whose_copies_were_deleted_heals(s3_store, chain, tmp_path):
    parts = chain(s3_store, "one")
    release = publish(s3_store, parts)[0]
    release_folder(s3_store, release, tmp_path / "cache")
    (copy := fetch(s3_store, parts["generator"], tmp_path / "cache")).rename(tmp_path / "gone")
    check_serving_folder(release_folder(s3_store, release, tmp_path / "cache"), release)
    assert copy.exists()


def test_a_generator_of_other_ids_is_not_served(local_store, chain, tmp_path):
    one, two = chain(local_store, "one"), chain(local_store, "two")
    with pytest.raises(
        ReleaseError,
        match=f"the generator was trained on ids {one['ids'].digest[:12]}, not on {two['ids'].digest[:12]}",
    ):
        serving_folder(local_store, two["ids"], one["generator"], tmp_path / "cache", {})


def test_the_serving_folder_holds_what_the_serving_part_has(store, chain, make, tmp_path):
    parts = chain(store, "one")
    ids, embeddings = parts["ids"], make(store, "embeddings", {"encoder/mean.npy": b"mean", "part-00000.parquet": b"p"})
    files = {"serving.json": b"{}", "vectors/vectors.npy": b"v", "columns.arrow": b"c"}
    serving = make(store, "serving", files, parents={"ids": ids.digest})
    generator = parts["generator"]
    options = {"serving": serving, "embeddings": embeddings}
    folder = serving_folder(store, ids, generator, tmp_path / "cache", {}, **options)
    assert (folder / "vectors" / "vectors.npy").read_bytes() == b"v" and (folder / "columns.arrow").read_bytes() == b"c"
    assert (folder / "encoder" / "mean.npy").read_bytes() == b"mean" and not (folder / "lexical").exists()
    for adopted in (False, True):
        adapter = make(
            store, "adapter", {"adapter.safetensors": b"V"}, settings={"adopted": adopted}, metrics={"adopted": adopted}
        )
        folder = serving_folder(store, ids, generator, tmp_path / "cache", {}, **options, adapter=adapter)
        assert (folder / "adapter" / "adapter.safetensors").exists() == adopted
    stranger = make(store, "serving", files, settings={"word": "stranger"}, parents={"ids": "0" * 64})
    with pytest.raises(ReleaseError, match="vectors and columns were laid out for ids 000000000000, not for"):
        serving_folder(store, ids, generator, tmp_path / "cache", {}, serving=stranger)


def test_a_release_of_before_the_serving_part_is_served_by_the_beam_it_was_evaluated_with(local_store, chain, tmp_path):
    publish(local_store, chain(local_store, "one"))
    release = without(local_store, "serving")
    folder = release_folder(local_store, current(local_store), tmp_path / "cache")
    assert json.loads((folder / "retriever.json").read_text()) == {
        "beam_width": 50, "query_tokens": 24, "codes_per_level": [4, 4, 4], "release": release.name,
    }  # fmt: skip


@pytest.mark.parametrize(
    "mode, encoder, tuned, shared",
    [
        ("frozen", "a/b", (None, None), True),
        ("tuned", "a/b", (None, None), False),
        ("frozen", "c/d", (None, None), False),
        ("frozen", "a/b", ("d1", "d1"), True),
        ("frozen", "a/b", ("d1", "d2"), False),
        ("frozen", "a/b", ("d1", None), False),
    ],
)
def test_one_pass_serves_where_the_generator_reads_with_the_products_encoder(
    chain, local_store, mode, encoder, tuned, shared
):
    """`tuned`: digests of the encoder of products, and of that of the generator."""
    parts = chain(local_store, "one")
    parts["serving"].settings["encoder"] = {"name": "a/b", "tokens": 64} | ({"tuned": tuned[0]} if tuned[0] else {})
    parts["generator"].settings.update(model="encoder_decoder", encoder_mode=mode, encoder=encoder)
    if tuned[1]:
        parts["generator"].settings["tuned_encoder"] = tuned[1]
    assert releases.retriever_settings(parts, release="r").get("shared_encoder", False) == shared


def test_the_folder_says_what_the_generator_was_taught_where_it_is_not_what_all_were_before(chain, local_store):
    parts = chain(local_store, "one")
    assert "loss" not in releases.retriever_settings(parts, release="r", beam_width=7)
    parts["generator"].settings.update(loss="level")
    assert "loss" not in releases.retriever_settings(parts, release="r", beam_width=7)
    parts["generator"].settings.update(loss="trie")
    for width in (None, 7):
        settings = releases.retriever_settings(parts, release="r", beam_width=width)
        assert settings["loss"] == "trie" and settings["normalize"] == parts["serving"].asked.get("normalize", "trie")


def test_the_folder_says_what_the_generator_reads_of_users(chain, local_store):
    parts = chain(local_store, "one")
    assert "user" not in releases.retriever_settings(parts, release="r")
    parts["examples"].settings.update(kinds=["query", "user"], user_tokens=12, user_recent=3)
    assert releases.retriever_settings(parts, release="r")["user"] == {"tokens": 12, "recent": 3}


def test_parts_are_the_stages_in_order():
    assert PARTS == (
        "catalog", "pairs", "tuned_encoder", "embeddings", "adapter", "quantizer", "ids", "node_vectors", "examples", "generator",
        "serving", "mixture", "evaluation",
    )  # fmt: skip


def test_a_release_may_do_without_an_adapter_but_its_parts_agree_on_it(local_store, chain, make):
    parts = chain(local_store, "one")
    other = make(local_store, "adapter", {"adapter.safetensors": b"V"}, metrics={"adopted": True})
    with pytest.raises(
        ReleaseError, match="quantizer was made from adapter .*Rerun the job so that quantizer is made anew"
    ):
        publish(local_store, parts | {"adapter": other})
    del parts["adapter"]
    release, _ = publish(local_store, parts)
    assert "adapter" not in release.parts and "adapter" not in release.manifests(local_store)


def test_the_cache_of_a_node(monkeypatch, tmp_path):
    monkeypatch.setenv("CATID2_CACHE", str(tmp_path / "elsewhere"))
    assert releases.default_cache() == tmp_path / "elsewhere"
    monkeypatch.delenv("CATID2_CACHE")
    assert releases.default_cache() == Path.home() / ".cache" / "catid2"


def test_work_that_began_before_another_publication_is_not_published(store, chain):
    one, two = chain(store, "one"), chain(store, "two")
    first = publish(store, one, after=0)[0]
    with pytest.raises(CommitConflict, match="another job published .* rerun to build on top of it"):
        publish(store, two, after=0)
    assert current(store) == first
    assert publish(store, one, after=0) == (first, False)
    assert publish(store, two, after=1)[1]


def test_ids_that_keep_earlier_ones_go_with_what_was_trained_on_those(local_store, chain, make):
    one = chain(local_store, "one")
    fresh = {
        role: make(local_store, role, {"f": b"grown"}, settings={"word": "grown"})
        for role in ("catalog", "pairs", "embeddings")
    }
    parents = {role: fresh[role].digest for role in ("catalog", "embeddings")} | {"quantizer": one["quantizer"].digest}
    files = {"trie/arrays.npy": b"grown", "products.arrow": b"grown"}
    settings = {"metrics": {"codes_per_level": [4, 4, 4]}, "parents": parents}
    stranger = make(local_store, "ids", files, settings={"word": "stranger"}, **settings)
    with pytest.raises(ReleaseError, match="parts do not match: quantizer was made from embeddings"):
        check_parts(one | fresh | {"ids": stranger})
    keeps = {role: [one[role].digest] for role in ("catalog", "pairs", "embeddings", "ids", "serving")}
    grown = make(local_store, "ids", files, settings={"word": "grown"}, extends=keeps, **settings)
    laid_out = {role: (fresh | {"ids": grown})[role].digest for role in ("catalog", "embeddings", "ids")}
    serving = make(local_store, "serving", {"serving.json": b"grown"}, parents=laid_out)
    laid_out.pop("catalog")
    nodes = make(local_store, "node_vectors", {"node_vectors.json": b"grown"}, parents=laid_out)
    release = publish(local_store, one | fresh | {"ids": grown, "node_vectors": nodes, "serving": serving})[0]
    assert release.manifests(local_store)["generator"] == one["generator"]
    serving_folder(local_store, grown, one["generator"], Path(local_store.path("cache")), {})
    with pytest.raises(ReleaseError, match="the generator was trained on ids"):
        serving_folder(local_store, stranger, one["generator"], Path(local_store.path("cache")), {})


def test_a_history_deleted_while_a_job_ran_is_not_called_another_job(local_store, chain):
    publish(local_store, chain(local_store, "one"))
    local_store.delete_folder("current")
    with pytest.raises(ReleaseError, match="what is current in .* was deleted while this job ran.*Rerun to publish it"):
        publish(local_store, chain(local_store, "two"), after=1)
    assert local_store.names("current") == []
