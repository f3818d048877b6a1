"""A store that fails now and then, for a while, or for good: a job ends with the same bytes, or with the cause named."""

import errno
import pickle
import random
import time

import pyarrow as pa
import pytest

from catid2_ray.artifacts import patience, patient_s3
from catid2_ray.artifacts.store import Store
from catid2_ray.config import Recipe
from catid2_ray.errors import StorageDenied, StorageError
from catid2_ray.on_ray.commands import reindex
from tests.faults.conftest import digests
from tests.faults.faulty_s3 import faulty

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def bad(s3, monkeypatch):
    """A proxy with faults of its own seed, in the environment."""
    with faulty(s3[0], seed=21) as (proxy, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def recipe(small, s3, tmp_path, monkeypatch) -> Recipe:
    monkeypatch.setenv("CATID2_CACHE", str(tmp_path / "cache"))
    return Recipe.build(small | {"store": f"{s3[1]}/{tmp_path.name}"})


def set_in(proxy, **faults) -> None:
    for name, value in faults.items():
        setattr(proxy, name, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, faults",
    [
        ("1 % of requests answered 500 or 503 SlowDown", {"errors": 0.01}),
        ("10 % of requests answered 500 or 503 SlowDown", {"errors": 0.1}),
        ("5 % of connections cut: before, in or after the body", {"cuts": 0.05}),
        ("each reply 60 ms late, in two halves", {"slow_s": 0.06}),
    ],
)
def test_a_whole_job_on_a_store_that_fails_now_and_then(bad, recipe, undisturbed, fault, name, faults):
    set_in(bad, **faults)
    started = time.monotonic()
    reindex(recipe)
    seconds = time.monotonic() - started
    set_in(bad, errors=0, cuts=0, slow_s=0)
    assert digests(Store(recipe.store)) == undisturbed[0]
    assert sum(bad.injected.values()) > 2
    fault(name, times=sum(bad.injected.values()), outcome="same digests", lost_s=max(0.0, seconds - undisturbed[1]))


@pytest.mark.slow
def test_a_store_that_is_away_three_times_once_for_half_a_minute(bad, recipe, undisturbed, fault):
    for_s = {40: 4, 130: 30, 260: 4}

    def go_away(number: int) -> None:
        if number in for_s:
            bad.away_until = time.monotonic() + for_s[number]

    bad.hook = go_away
    started = time.monotonic()
    reindex(recipe)
    seconds = time.monotonic() - started
    assert digests(Store(recipe.store)) == undisturbed[0] and bad.injected["away"] >= 3
    fault(
        "blackouts of 4, 30 and 4 s in a job",
        times=3,
        outcome="same digests",
        lost_s=max(0.0, seconds - undisturbed[1]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("code, cause", [(400, "ExpiredToken"), (403, "AccessDenied")])
def test_credentials_that_end_midway_are_named_and_the_same_command_goes_on(
    bad, recipe, undisturbed, fault, code, cause
):
    def refuse(number: int) -> None:
        if number == 150:
            bad.refuses = code

    bad.hook = refuse
    started = time.monotonic()
    with pytest.raises(StorageDenied, match="refuses what these credentials ask: check that they have not expired"):
        reindex(recipe)
    seconds = time.monotonic() - started
    bad.hook, bad.refuses = lambda number: None, 0
    Store(recipe.store).delete_folder("lease")  # which this process still holds, since it could not give it back
    started = time.monotonic()
    reindex(recipe)
    again = time.monotonic() - started
    assert digests(Store(recipe.store)) == undisturbed[0]
    lost_s = max(0.0, seconds + again - undisturbed[1])
    fault(
        f"credentials end midway ({cause})",
        times=1,
        outcome="refused by name; a rerun ends in the same digests",
        lost_s=lost_s,
    )


@pytest.fixture
def store(bad, s3, tmp_path) -> Store:
    store = Store(f"{s3[1]}/{tmp_path.name}")
    store.write_table("table.parquet", pa.table({"n": list(range(1000))}))
    return store


ASKED = {
    "check": (), "exists": ("table.parquet",), "listing": ("",), "names": ("",), "size": ("table.parquet",),
    "read": ("table.parquet",),
    "write": ("new", b"x"), "create": ("made", b"x"), "delete": ("new",), "read_table": ("table.parquet",),
    "parquet_file": ("table.parquet",), "sha256": ("table.parquet",), "fingerprint": ("table.parquet",),
}  # fmt: skip


@pytest.mark.parametrize("action", ASKED)
def test_a_refusal_is_asked_once_and_a_busy_store_for_as_long_as_it_has_patience(bad, store, action):
    bad.refuses, before = 403, bad.requests
    with pytest.raises(StorageDenied, match=f"{store.uri}.*credentials"):
        getattr(store, action)(*ASKED[action])
    asked = bad.requests - before
    assert asked <= (2 if action == "create" else 1), (
        "a refusal is not tried again; create also looks whether it did write"
    )
    bad.refuses, bad.errors, before, started = 0, 1.0, bad.requests, time.monotonic()
    busy = pytest.raises(StorageError, match=f"{store.uri}.*it answered before, so it is busy or away")
    with store.impatient(0.5), busy as caught:
        getattr(store, action)(*ASKED[action])
    assert not isinstance(caught.value, StorageDenied) and caught.value.transient
    assert time.monotonic() - started < 60 and bad.requests - before > asked
    bad.errors = 0.0
    getattr(store, action)(*ASKED[action])


def test_of_a_create_whose_reply_is_lost_the_writer_knows_that_it_was_its_own(bad, store, fault):
    def once(number: int) -> None:
        if bad.injected["reply lost"] > lost:
            bad.cuts = 0.0

    bad.hook, lost = once, 0
    for number in range(12):
        bad.cuts = 1.0
        store.create(f"made/{number}", str(number).encode())
        lost = bad.injected["reply lost"]
    bad.cuts = 0.0
    assert lost == 12 and [store.read(f"made/{number}") for number in range(12)] == [str(n).encode() for n in range(12)]
    fault("the reply to a conditional write is lost", times=lost, outcome="the writer knows it was its own", lost_s=0)


def test_a_large_download_goes_on_where_connections_are_cut(bad, store, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("catid2_ray.artifacts.store._BLOCK", 50_000)
    data = random.Random(1).randbytes(1_000_000)
    store.write("large", data)
    bad.cuts = 0.2
    store.download("large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == data and store.read("large") == data
    fault("a fifth of a download's requests cut", times=bad.injected["cut in the body"], outcome="same bytes", lost_s=0)


def test_what_never_answered_is_a_wrong_address_and_what_answered_is_away(s3, monkeypatch, tmp_path):
    with faulty(s3[0], seed=1) as (proxy, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        proxy.away_until = float("inf")
        store, started = Store(f"{s3[1]}/{tmp_path.name}"), time.monotonic()
        with pytest.raises(StorageError, match="check AWS_ENDPOINT_URL"):
            store.read("x")
        assert time.monotonic() - started < 60, "the patience of 90 s is for a store that was there"
        proxy.away_until = 0.0
        store.check()
        assert Store(f"{s3[1]}/other").fs.answered, "the same bucket, whoever opens it"
        pickled = pickle.dumps(store)
        monkeypatch.setattr(patient_s3, "REACHED", {None})  # as in a worker that starts
        assert not Store(store.uri).fs.answered
        worker = pickle.loads(pickled)
        proxy.away_until = time.monotonic() + 5
        worker.check()
        assert time.monotonic() > proxy.away_until, "a worker that starts in a blackout waits for its end"


def test_what_is_refused_and_what_passes(fault):
    for error in (
        ConnectionResetError("x"),
        TimeoutError(),
        OSError("AWS Error SLOW_DOWN during GetObject operation: x"),
    ):
        assert patience.passes(error) and not patience.is_refusal(error)
    for error in (
        PermissionError("x"),
        OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
    ):
        assert patience.is_refusal(error) and not patience.passes(error)
    for error in (FileNotFoundError("x"), OSError(28, "No space left on device"), ValueError("x")):
        assert not patience.passes(error) and not patience.is_refusal(error)
    fault(
        "throttling and refusals, in S3's words and pyarrow's", times=5,
        outcome="the one is tried again for as long as there is patience, the other not at all", lost_s=0,
    )  # fmt: skip


@pytest.mark.parametrize("answered", [None, False, True])
def test_a_full_disk_is_this_machine_s_whatever_the_store_is(answered):
    """A copy that no longer fits the cache is no fault of the bucket."""
    error = patience.failure("cannot fetch", OSError(errno.ENOSPC, "No space left on device"), answered=answered)
    assert "CATID2_CACHE" in str(error) and "AWS_ENDPOINT_URL" not in str(error)


def test_waits_are_random_bounded_and_add_up_to_the_budget():
    for budget in (0.05, 3.0, 90.0):
        found = list(patience.waits(budget))
        assert sum(found) <= budget + 1e-6 and max(found) <= 8
    assert len({round(next(patience.waits(9.0)), 6) for _ in range(20)}) > 15
