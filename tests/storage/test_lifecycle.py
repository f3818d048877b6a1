"""The life of releases: which there are, the way back, and what gc removes and must not remove."""

import json
import os
import re
import time

import pytest

from catid2_ray.artifacts import copies, gc, history, holder, lease, uses
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt, find, verify
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.errors import ArtifactError, CommitConflict, InputError, LeaseError, ReleaseError
from catid2_ray.evaluation.report import age_text, size_text
from catid2_ray.on_ray.commands import append_items, reindex, run_verb
from catid2_ray.on_ray.commands import publish as publish_recipe
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine.live_log import LiveLog
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.serve.app import AppSettings, RetrieverReplica
from catid2_ray.on_ray.training.worker import clean, run_name
from tests.command import run_here
from tests.stored import two_releases, unpack


def publish(store, chain, *words) -> list[str]:
    """A release of each word, one after the other; their names."""
    return [releases.publish(store, chain(store, word))[0].name for word in words]


def publish_variants(store, chain, make, *words) -> list[str]:
    """Releases that differ in their evaluation alone: on S3 whole ones take seconds each."""
    made, names = chain(store, "all"), []
    for word in words:
        made["evaluation"] = make(
            store, "evaluation", {"figures": word.encode()}, settings={"word": word}, parents=made["evaluation"].parents
        )
        names.append(releases.publish(store, made)[0].name)
    return names


def is_whole(store, name) -> bool:
    for manifest in releases.load(store, name).manifests(store).values():
        verify(store, manifest)
    return True


def files(store) -> set[str]:
    """Of all but the lease."""
    return {name for name in store.listing("") if not name.startswith("lease/")}


def counts(freed) -> dict[str, int]:
    return {kind: count for kind, count, _ in freed.rows}


def test_a_rollback_goes_one_step_back_each_time_and_forth_by_name(store, chain, make):
    a, b, c = publish_variants(store, chain, make, "a", "b", "c")
    assert history.rollback(store) == (releases.load(store, b), c)
    assert releases.current(store).name == b
    assert history.rollback(store).release.name == a, "not forth to what was just left"
    with pytest.raises(
        ReleaseError, match=f"no release of {store.uri} comes before {a}, which is current; others .*: r-"
    ):
        history.rollback(store)
    assert history.rollback(store, c).release.name == c and history.rollback(store, c).before == c
    assert releases.pointer(store) == (6, c)
    with pytest.raises(ReleaseError, match="no release 'r-x'"):
        history.rollback(store, "r-x")
    again = releases.publish(store, releases.load(store, a).manifests(store))[0].name
    assert again == a and history.rollback(store).release.name == c, "what is published again is a new step"


def test_a_release_whose_parts_are_gone_or_cut_is_not_gone_back_to(local_store, chain):
    a, b = publish(local_store, chain, "a", "b")
    generator = releases.load(local_store, a).manifests(local_store)["generator"]
    local_store.write(generator.file("generator.txt"), b"cut")
    with pytest.raises(ArtifactError, match="has 3 bytes, its manifest says"):
        history.rollback(local_store)
    local_store.delete(generator.name)
    with pytest.raises(ReleaseError, match=f"release {a} in .*: its part generator .* is gone"):
        history.rollback(local_store)
    assert releases.pointer(local_store) == (2, b)


def test_the_path_of_the_pointer():
    def path(*moves):
        return history.path(
            [history.Entry(n, move.strip("-"), move.startswith("-")) for n, move in enumerate(moves, 1)]
        )

    assert path("a", "b", "-a", "c", "d", "-c") == ["a", "c"]
    assert path("a", "b", "a", "a") == ["a", "b", "a"]
    assert path("a", "-z", "b") == ["a", "z", "b"], "a release that came from elsewhere"


def test_gc_keeps_the_last_releases_those_in_use_and_nothing_else(store, chain, make):
    a, b, c, d = publish(store, chain, "a", "b", "c", "d")
    use = uses.served(store, b, command="catid2 serve")
    store.write(f"live/{a}/0000000001.json", b"{}")
    store.write(f"live/{c}/0000000001.json", b"{}")
    attempt = Attempt(store, "generator", settings={"killed": 1}, parents={}, recipe={})
    store.write(attempt.name("half.bin"), b"1234")
    lost = f"artifacts/generator/{releases.load(store, d).parts['generator']['key']}/attempt-lost/half.bin"
    store.write(lost, b"12")
    unnamed = make(store, "quantizer", {"codes": b"compared"}, settings={"kind": "compared"})
    before, listed = files(store), store.listing("")

    would = gc.collect(store, keep=2, dry_run=True)
    assert files(store) == before
    freed = gc.collect(store, keep=2)
    assert freed == would and freed.kept == [d, c, b] and freed.removed == [a] and freed.unread == []
    gone = before - files(store)
    assert freed.bytes == sum(listed[name].bytes for name in gone)
    parts = {part: 1 for part in releases.PARTS} | {"quantizer": 2}
    expected = {
        "moves of the pointer": 1,
        "releases": 1,
        "changes while serving": 1,
        "attempts of killed jobs": 2,
        **parts,
    }
    assert counts(freed) == expected
    assert find(store, "quantizer", unnamed.key) is None and lost in gone and attempt.name("half.bin") in gone
    assert f"live/{c}/0000000001.json" in files(store)
    assert all(is_whole(store, name) for name in (b, c, d))
    assert [row["release"] for row in history.overview(store)].count(b) == 1

    use.end()
    assert gc.collect(store, keep=1).removed == sorted([b, c]) and releases.pointer(store) == (4, d)
    assert gc.collect(store, keep=1).rows == []


def test_gc_keeps_what_a_kept_release_was_made_of_where_a_rerun_looks_for_it(local_store, chain, make):
    made = chain(local_store, "a")
    trained = make(local_store, "generator", {"weights": b"trained"}, settings={"epochs": 1})
    prompts = make(local_store, "prompts", {"prompts": b"of a"})
    before = make(local_store, "generator", {"weights": b"the release before's"}, settings={"epochs": 2})
    parents = {"trained": trained.digest, "prompts": prompts.digest, "warm": before.digest}
    parents |= {role: made[role].digest for role in ("ids", "examples")}
    made["generator"] = make(local_store, "generator", {"weights": b"aligned"}, parents=parents)
    for kind in ("mixture", "evaluation"):
        made[kind] = make(local_store, kind, {"figures": b"1"}, parents={"generator": made["generator"].digest})
    releases.publish(local_store, made)
    # `before`, and those of the chain
    assert counts(gc.collect(local_store, keep=1)) == {"generator": 2, "mixture": 1, "evaluation": 1}
    assert find(local_store, "generator", trained.key) and find(local_store, "prompts", prompts.key)
    assert find(local_store, "generator", before.key) is None


def test_gc_is_refused_while_a_job_is_at_work_and_forgets_those_that_died(store, chain, monkeypatch):
    publish(store, chain, "a")
    with lease.holding(store, command="catid2 reindex"), pytest.raises(LeaseError, match="catid2 reindex"):
        gc.collect(store, keep=1)
    with (
        uses.job(store, command="catid2 compare-ids"),
        pytest.raises(
            LeaseError, match=f"a job reads from {store.uri}: catid2 compare-ids by .*Run gc when it has ended"
        ),
    ):
        gc.collect(store, keep=1)
    died = holder.describe("catid2 compare-ids") | {"expires_s": 60}
    died["process"]["born"] = "1"
    store.write("uses/jobs/died.json", json.dumps(died).encode())
    store.write("uses/releases/r-1/died.json", json.dumps(died).encode())
    assert counts(gc.collect(store, keep=1)) == {"stale uses": 2} and store.names("uses/jobs") == []
    assert lease.look(store).released


def test_gc_refuses_what_would_remove_all(local_store, chain):
    with pytest.raises(ReleaseError, match="nothing was published .* would remove all that was made"):
        gc.collect(local_store, keep=1)
    (name,) = publish(local_store, chain, "a")
    with pytest.raises(InputError, match="found --keep 0"):
        gc.collect(local_store, keep=0)
    local_store.delete(f"releases/{name}.json")
    with pytest.raises(ReleaseError, match=f"the record of release {name}, which is current in .*, is gone"):
        gc.collect(local_store, keep=1)


def test_gc_leaves_alone_what_it_cannot_read(local_store, chain, make):
    publish(local_store, chain, "a")
    newer = make(local_store, "generator", {"weights": b"new"}, settings={"n": 1})
    fields = json.loads(local_store.read(newer.name))
    local_store.write(newer.name, json.dumps(fields | {"format": 99}).encode())
    freed = gc.collect(local_store, keep=1)
    assert freed.rows == [] and freed.unread == [local_store.uri_of(newer.name)]
    assert local_store.exists(newer.file("weights"))


def test_runs_of_trainings_go_when_their_result_is_committed_or_nobody_went_on_with_them(local_store, chain):
    publish(local_store, chain, "a")
    key = releases.current(local_store).parts["quantizer"]["key"]
    for run in (f"quantizer-{key}", "generator-0123456789abcdef", "generator-fedcba9876543210"):
        local_store.write(f"runs/{run}/checkpoint/weights", b"12345")
    old = time.time() - 8 * 86_400
    os.utime(local_store.path("runs/generator-fedcba9876543210/checkpoint/weights"), (old, old))
    assert counts(gc.collect(local_store, keep=1, runs_older_than_days=9)) == {"runs of trainings": 1}
    freed = gc.collect(local_store, keep=1)
    assert freed.rows == [("runs of trainings", 1, 5)] and local_store.names("runs") == ["generator-0123456789abcdef"]


@pytest.mark.faults
@pytest.mark.parametrize("removals", range(0, 24, 3))
def test_nothing_that_is_left_dangles_when_gc_is_killed(local_store, chain, monkeypatch, removals, fault):
    a, b = publish(local_store, chain, "a", "b")
    left, whole = [removals], (type(local_store).delete, type(local_store).delete_folder)

    def limited(delete):
        def call(store, name):
            if not name.startswith("lease/"):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            delete(store, name)

        return call

    with monkeypatch.context() as patch:
        for name, delete in zip(("delete", "delete_folder"), whole, strict=True):
            patch.setattr(type(local_store), name, limited(delete))
        with pytest.raises(KeyboardInterrupt):
            gc.collect(local_store, keep=1)
    assert is_whole(local_store, b)
    for name in local_store.names("releases"):
        assert is_whole(local_store, name.removesuffix(".json"))
    for move in history.entries(local_store):
        assert local_store.exists(f"releases/{move.release}.json")
    for kind in releases.PARTS:
        for key in local_store.names(f"artifacts/{kind}"):
            if manifest := find(local_store, kind, key):
                verify(local_store, manifest)
    gc.collect(local_store, keep=1)
    assert gc.collect(local_store, keep=1).rows == [] and local_store.names("releases") == [f"{b}.json"]
    fault(f"gc killed after {removals} removals", times=1, outcome="nothing dangles; the next gc finishes", lost_s=0)


def test_gc_frees_this_nodes_copies_of_what_it_removed(store, chain, tmp_path):
    a, b = publish(store, chain, "a", "b")
    cache = tmp_path / "cache"
    folders = {name: releases.release_folder(store, releases.load(store, name), cache) for name in (a, b)}
    (cache / "generator-of-another-store").mkdir()
    before = {path.name for path in cache.iterdir()}
    freed = counts(gc.collect(store, keep=1, cache=cache))
    assert freed["serving folders on this node"] == 1
    assert freed.get("fetched copies on this node", 0) == (2 if store.is_s3 else 0)  # of generator and ids
    after = {path.name for path in cache.iterdir()}
    assert len(before - after) == (3 if store.is_s3 else 1) and not after - before
    assert not folders[a].exists() and (folders[b] / "generator" / "generator.txt").read_bytes() == b"b generator"


def test_a_replica_s_node_forgets_what_nobody_serves(store, chain, make, tmp_path):
    """Else a node that stays would hold a copy of every night's release."""
    names = publish_variants(store, chain, make, "a", "b") + publish(store, chain, "c")
    cache = tmp_path / "cache"
    folders = {name: releases.release_folder(store, releases.load(store, name), cache) for name in names}
    (cache / "generator-of-another-store").mkdir()
    use = uses.served(store, names[1], command="catid2 serve")
    assert copies.forget(store, cache, serves=names[1:2]) == 0, "the first has no part of its own that is copied"
    assert all(folders[name].exists() for name in names[1:]), "one is served, one is current"
    use.end()
    before = {path.name for path in cache.iterdir()}
    assert copies.forget(store, cache, serves=names[2:]) == 0, (
        "what it serves itself is not on record, so nothing is known"
    )
    freed = copies.forget(store, cache, serves=[])
    gone = before - {path.name for path in cache.iterdir()}
    if not store.is_s3:
        assert not gone and not freed, "a local store is read where it lies"
        return
    assert freed > 0 and not folders[names[1]].exists() and folders[names[2]].exists()
    assert "generator-of-another-store" not in gone and copies.forget(store, cache, serves=[]) == 0
    assert (folders[names[2]] / "generator" / "generator.txt").read_bytes() == b"c generator"
    again = releases.release_folder(store, releases.load(store, names[1]), cache)
    assert (again / "generator" / "generator.txt").read_bytes() == b"all generator", "who goes back late copies anew"


@pytest.fixture
def stored(tmp_path):
    """The store of an earlier version, with a second release that other settings of serving made."""
    return two_releases(tmp_path)


def test_a_stored_release_is_listed_rolled_back_to_and_outlives_gc(stored, tmp_path):
    store, first, second = stored
    shown = run_here("releases", "--store", store.uri, "--json", tmp_path / "releases.json")
    assert shown.returncode == 0 and re.search(rf"{second} +\*", shown.stdout) and first in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    rows = {row["release"]: row for row in json.loads((tmp_path / "releases.json").read_text())}
    assert rows[second]["current"] and not rows[first]["current"] and rows[first]["documents"] == 150
    assert set(rows[first]["recall"]) == {"served", "beam"} and rows[first]["bytes"] < rows[second]["bytes"]

    LiveLog(store, second).write(1, {"kind": "withdraw", "products": ["p0000001"]})
    back = run_here("rollback", "--store", store.uri)
    assert (
        "Live changes of products that are younger than its catalogue: 1. The service carries over what it lacks"
        in back.stdout
    )
    assert f"Release {first} is current again; it was {second}." in back.stdout and back.returncode == 0
    assert "current already" in run_here("rollback", first, "--store", store.uri).stdout
    nowhere = run_here("rollback", "--store", store.uri)
    assert nowhere.returncode == 5 and f"others that it has: {second}" in nowhere.stderr

    would, did = (run_here("gc", "--store", store.uri, "--keep", 1, *dry) for dry in (["--dry-run"], []))
    assert "What gc would remove" in would.stdout and "What gc removed" in did.stdout
    assert did.stdout.replace("Freed", "Would free").splitlines()[2:] == would.stdout.splitlines()[2:]
    assert f"Releases kept: {first}\n" in did.stdout and store.names("releases") == [f"{first}.json"]
    retriever = open_retriever(releases.release_folder(store, releases.current(store), tmp_path / "cache"))
    assert len(retriever.retrieve(["oak shelf"], k=3, filters=[None])[0]) == 3


def test_a_command_on_a_store_at_work_ends_with_exit_code_9(local_store, chain):
    publish(local_store, chain, "a", "b")
    with lease.holding(local_store, command="catid2 reindex"):
        for command in (["gc", "--keep", 1], ["promote"]):
            ended = run_here(*command, "--store", local_store.uri)
            assert ended.returncode == 9 and "LeaseError: another job works on" in ended.stderr
        assert run_here("releases", "--store", local_store.uri).returncode == 0


def test_a_bad_release_is_left_beside_a_job_whose_own_then_does_not_become_current(local_store, chain):
    """Nobody waits hours for a job in order to go back, or stops it."""
    a, _ = publish(local_store, chain, "a", "b")
    number, _ = releases.pointer(local_store)
    with lease.holding(local_store, command="catid2 reindex"):
        back = run_here("rollback", "--store", local_store.uri)
        assert back.returncode == 0 and f"Release {a} is current again" in back.stdout
        assert "At work beside: catid2 reindex by " in back.stdout and "cannot publish" in back.stdout
        assert run_here("trial", "--end", "--store", local_store.uri).stdout == "No release is on trial.\n"
        with pytest.raises(CommitConflict, match="another job published"):
            releases.publish(local_store, chain(local_store, "c"), after=number)
    assert "At work" not in run_here("rollback", a, "--store", local_store.uri).stdout
    assert releases.current(local_store).name == a and local_store.names("uses/jobs") == []


def test_gc_stops_removing_where_another_job_took_its_lease(local_store, chain, monkeypatch):
    """A machine that stood still: what it would remove may be part of a release by now."""
    publish(local_store, chain, "a", "b")
    monkeypatch.setattr(gc, "_CHECK_S", -1)
    left, check = [3], lease.Lease.check

    def checked(held):
        left[0] -= 1
        if left[0] < 0:
            held.record["id"] = "another"
        check(held)

    monkeypatch.setattr(lease.Lease, "check", checked)
    before = files(local_store)
    with pytest.raises(LeaseError, match="this job lost its lease"):
        gc.collect(local_store, keep=1)
    assert len(before - files(local_store)) == 3


def test_gc_keeps_live_changes_that_a_kept_release_has_to_carry(local_store, chain, make):
    """Those of the release before the one that was left, made since the catalogue was read and not carried over by anybody yet."""
    a, b, c, d = publish_variants(local_store, chain, make, "a", "b", "c", "d")
    for move in history.entries(local_store)[1:]:
        after = {"release": {b: a, c: b, d: c}[move.release], "seen": 0, "older": {a: 1}}
        local_store.write(move.name, json.dumps({"release": move.release, "after": after}).encode())
    for release, changes in ((a, 1), (b, 2)):
        for number in range(1, changes + 1):
            LiveLog(local_store, release).write(number, {"kind": "withdraw", "products": ["p1"]})
    moves = history.entries(local_store)
    assert history.younger(local_store, moves, d) == 2, "of a its only change was in the tables"
    gc.collect(local_store, keep=1)
    assert history.younger(local_store, moves, d) == 2 and local_store.names("live") == [b]


def test_a_release_that_cannot_be_read_is_listed_with_its_reason(local_store, chain):
    a, _ = publish(local_store, chain, "a", "b")
    local_store.delete(releases.load(local_store, a).manifests(local_store)["ids"].name)
    shown = run_here("releases", "--store", local_store.uri)
    assert (
        shown.returncode == 0 and f"{a} cannot be read: release {a} in {local_store.uri}: its part ids" in shown.stdout
    )
    assert "Nothing was published" in run_here("releases", "--store", f"{local_store.uri}-empty").stdout


def test_sizes_and_ages_as_a_person_reads_them():
    sizes = {
        0: "0 B",
        999: "999 B",
        1_000: "1.0 kB",
        34_400_000: "34 MB",
        9_960_000: "10 MB",
        999_600: "1.0 MB",
        None: "–",
    }
    assert {size: size_text(size) for size in sizes} == sizes
    ages = {0: "0 s", 59: "59 s", 3_599: "59 min", 86_399: "23 h", 86_400 * 31: "31 d", None: "–"}
    assert {age: age_text(age) for age in ages} == ages


def test_a_replica_names_its_release_from_start_to_end(stored):
    store, _, second = stored
    (bare,) = [one for one in RetrieverReplica.func_or_class.__mro__ if one.__qualname__ == "RetrieverReplica"][-1:]
    replica = bare(AppSettings(store=store.uri))
    assert uses.of_releases(store) == {second: 1}
    replica.__del__()
    assert uses.of_releases(store) == {}


def test_jobs_that_make_hold_the_lease_and_those_that_compare_keep_gc_away(tmp_path):
    recipe = unpack(tmp_path)
    store = Store(recipe.store)
    with Job.open(recipe) as job:
        for begin in (reindex, append_items, publish_recipe, lambda recipe: run_verb(recipe, "embed_catalog")):
            with pytest.raises(LeaseError, match="another job works on"):
                begin(recipe)
        assert job.is_alone()
        with Job.open(recipe, lease=False) as reader:
            reader.check_lease()
            assert not job.is_alone() and not reader.is_alone()
            attempt = Attempt(store, "quantizer", settings={}, parents={}, recipe={})
            store.write(f"runs/{run_name(attempt)}/checkpoint", b"of both")
            clean(store, attempt, alone=job.is_alone())
            assert store.names(f"runs/{run_name(attempt)}"), "they may be the other's, too"
        clean(store, attempt, alone=job.is_alone())
        assert not store.names(f"runs/{run_name(attempt)}")
        job.look()
        job.pointer -= 1  # as if a rollback had come beside it
        with pytest.raises(CommitConflict, match="another release became current .*nothing was put on trial"):
            job.put_on_trial(releases.current(store).manifests(store), Shares(5))
        job.lease.record["id"] = "another"  # as if this job had hung until another took its lease
        with pytest.raises(LeaseError, match="this job lost its lease"):
            job.publish(releases.current(store).manifests(store))
    with Job.open(recipe, lease=False) as reader, pytest.raises(LeaseError, match="a job reads from"):
        assert reader.is_alone()
        gc.collect(store, keep=1)
    assert releases.pointer(store)[0] == 1


def test_figures_go_to_a_file_or_an_object(store):
    store.write("made", b"")
    run = run_here("releases", "--store", store.uri, "--json", f"{store.uri}/figures.json")
    assert run.returncode == 0 and json.loads(store.read("figures.json")) == [], run.stderr
