"""A release on trial: what the record says, who may begin, what it becomes, and what a replica makes of it."""

import json

import pytest

from catid2_ray.artifacts import gc, history, trials
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.history import Entry, Left
from catid2_ray.artifacts.store import Store
from catid2_ray.artifacts.trials import Shares
from catid2_ray.config import Recipe
from catid2_ray.errors import CommitConflict, InputError, ReleaseError, StorageError
from catid2_ray.on_ray.commands import reindex
from catid2_ray.on_ray.serve import follow
from catid2_ray.on_ray.serve.follow import Tried
from catid2_ray.on_ray.serve.opened import OutOfMemory
from tests.command import run_here
from tests.storage.test_follow import Fake, point_at, serving, store  # noqa: F401
from tests.stored import two_releases

SEEN = {"r-1": 3, "r-0": 2}


def kept(store, name):  # noqa: F811
    """A release that is stored and was never current."""
    store.write(f"releases/{name}.json", json.dumps({"name": name, "parts": {}, "created": ""}).encode())


@pytest.fixture
def tried(store, monkeypatch):  # noqa: F811
    """r-1 is current, r-2 is stored; releases without parts are whole here."""
    monkeypatch.setattr(releases.Release, "manifests", lambda self, store: {})
    point_at(store, "r-0", "r-1")
    kept(store, "r-2")
    return store


def test_a_trial_begins_changes_and_ends(tried):
    assert trials.running(tried) is None and trials.end(tried) is None
    begun = trials.begin(tried, "r-2", Shares(10, 20), seen=SEEN)
    assert trials.running(tried) == begun and begun.after == Left("r-1", 3, {"r-0": 2})
    more = trials.begin(tried, "r-2", Shares(50))  # knows the changes from before
    assert trials.running(tried) == more and more.shares == Shares(50, 0) and more.after == begun.after
    assert trials.end(tried) == more and trials.running(tried) is None
    assert trials.begin(tried, "r-2", Shares(5)).after == begun.after


def test_a_promotion_moves_the_pointer_as_a_publication_would(tried):
    trials.begin(tried, "r-2", Shares(10), seen=SEEN)
    assert [entry.release for entry in trials.moves(tried, "r-1")] == ["r-0", "r-1"]
    assert trials.moves(tried, "r-2")[-1] == Entry(3, "r-2", False, Left("r-1", 3, {"r-0": 2}))
    trials.promote(tried)
    assert trials.running(tried) is None and releases.pointer(tried) == (3, "r-2")
    assert history.entries(tried)[-1] == Entry(3, "r-2", False, Left("r-1", 3, {"r-0": 2}))
    assert history.sources(history.entries(tried), "r-2") == {"r-0": 2, "r-1": 3}


def test_a_trial_is_over_when_anything_becomes_current(tried):
    trials.begin(tried, "r-2", Shares(10), seen=SEEN)
    point_at(tried, "r-3")
    assert trials.running(tried) is None
    with pytest.raises(ReleaseError, match="no release of .* is on trial"):
        trials.promote(tried)
    with pytest.raises(ReleaseError, match="was never current, and its trial began before r-3 was"):
        trials.begin(tried, "r-2", Shares(10))
    back = trials.begin(tried, "r-1", Shares(10))  # it was current once
    assert back.rolled_back and back.after == Left("r-3", 0, None)
    trials.promote(tried)
    assert history.path(history.entries(tried)) == ["r-0", "r-1"]


@pytest.mark.parametrize(
    "name, shares, error, message",
    [
        ("r-1", Shares(10), ReleaseError, "is current; only another"),
        ("r-9", Shares(10), Exception, "r-9"),
        ("r-2", Shares(101), InputError, "percent must be from 0 to 100"),
        ("r-2", Shares(1, float("nan")), InputError, "shadow must be from 0 to 100"),
        ("r-2", Shares(1), ReleaseError, "was never current"),
    ],
)
def test_what_cannot_be_tried_is_refused(tried, name, shares, error, message):
    with pytest.raises(error, match=message):
        trials.begin(tried, name, shares)
    assert not tried.names("trials")


def test_of_two_changes_at_once_one_is_told(tried, monkeypatch):
    monkeypatch.setattr(trials, "_last", lambda _store, of=None: (0, None))
    trials.begin(tried, "r-2", Shares(10), seen=SEEN)
    with pytest.raises(CommitConflict, match="look and repeat"):
        trials.begin(tried, "r-2", Shares(20), seen=SEEN)


def test_a_session_has_one_release_and_the_shares_are_kept():
    opened = Fake(None, "r-2", None)
    sessions = [f"session {number}" for number in range(4000)]
    ten, half = Tried(opened, Shares(10, 30)), Tried(opened, Shares(50))
    chosen = {session for session in sessions if ten.answers(session)}
    assert 0.08 < len(chosen) / 4000 < 0.12 and chosen == {one for one in sessions if ten.answers(one)}
    assert chosen < {session for session in sessions if half.answers(session)}, "who has it keeps it when more get it"
    others = [session for session in sessions if session not in chosen]
    assert 0.26 < sum(map(ten.shadows, others)) / len(others) < 0.34
    assert not any(Tried(opened, Shares()).answers(session) for session in sessions)
    assert all(Tried(opened, Shares(100)).answers(session) for session in [*sessions, "\ud83d"])


def test_a_replica_opens_what_is_tried_and_has_it_open_when_it_is_promoted(tried):
    one = serving(tried)
    one.look_at_trial()
    assert one.trial is None and one.chosen("a") is one.now
    trials.begin(tried, "r-2", Shares(100), seen=SEEN)
    one.look_at_trial()
    opened = one.trial.opened
    assert opened.name == "r-2" and opened.beside and one.chosen("a") is opened and one.now.name == "r-1"
    trials.begin(tried, "r-2", Shares(0))
    one.look_at_trial()
    assert one.trial.opened is opened and one.chosen("a") is one.now
    trials.promote(tried)
    assert one.look() and one.now is opened and one.trial is None and one.last.name == "r-1" and not opened.ended
    one.look_at_trial()
    assert one.now is opened and not opened.ended


def test_a_replica_drops_what_is_no_longer_tried_and_refuses_what_is_bad_once(tried, capfd):
    one = serving(tried, [(ReleaseError, {"r-bad"})])
    trials.begin(tried, "r-2", Shares(100), seen=SEEN)
    one.look_at_trial()
    opened = one.trial.opened
    trials.end(tried)
    one.look_at_trial()
    assert one.trial is None and opened.ended
    kept(tried, "r-bad")
    trials.begin(tried, "r-bad", Shares(100), seen=SEEN)
    one.look_at_trial()
    one.look_at_trial()
    assert one.trial is None and one.trial_refused == ("r-bad", "r-bad is not good")
    assert capfd.readouterr().err.count("event=trial_refused") == 1
    point_at(tried, "r-3")
    assert one.look()
    one.look_at_trial()
    assert one.trial_refused is None and one.now.name == "r-3"


def test_a_trial_without_memory_is_tried_again_and_delays_no_release(tried, monkeypatch, capfd):
    monkeypatch.setattr(follow, "_TRIAL_AGAIN_S", 0.0)
    wrong = [(OutOfMemory, {"r-2"})]
    one = serving(tried, wrong)
    trials.begin(tried, "r-2", Shares(100), seen=SEEN)
    for _ in range(3):
        one.look_at_trial()  # and raises nothing, which the follower would wait for
    assert one.trial is None and one.trial_refused[0] == "r-2"
    assert capfd.readouterr().err.count("event=trial_refused") == 1
    wrong.clear()
    one.look_at_trial()
    assert one.trial.opened.name == "r-2" and one.trial_refused is None


def test_a_trial_that_is_over_leaves_its_memory_to_the_next_release(tried):
    kept(tried, "r-3")
    full = [(OutOfMemory, set())]
    one = serving(tried, full)
    trials.begin(tried, "r-2", Shares(100), seen=SEEN)
    one.look_at_trial()
    opened = one.trial.opened
    point_at(tried, "r-3")
    full[0][1].add("r-3")
    with pytest.raises(OutOfMemory):
        one.look()
    assert one.trial is None and opened.ended and one.chosen("a") is one.now
    full[0][1].clear()
    assert one.look() and one.now.name == "r-3"


def test_a_promotion_that_meets_an_error_is_made_again_with_what_is_open(tried, monkeypatch):
    def away(*, waits):
        raise StorageError("the store is away")

    one = serving(tried)
    trials.begin(tried, "r-2", Shares(100), seen=SEEN)
    one.look_at_trial()
    opened = one.trial.opened
    trials.promote(tried)
    with monkeypatch.context() as patch:
        patch.setattr(opened, "catch_up", away)
        with pytest.raises(StorageError):
            one.look()
    assert one.chosen("a") is opened and one.now.name == "r-1"
    assert one.look() and one.now is opened and one.trial is None and not opened.ended


def test_a_damaged_record_of_a_trial_is_said_and_holds_up_nothing(tried):
    tried.write("trials/0000000001.json", b"{")
    one = serving(tried)
    one.look_at_trial()
    assert one.trial is None and "is no record of a trial" in one.trial_refused[1]


def test_a_first_release_is_not_tried_and_trains_nothing(tiny, tmp_path, no_ray):
    recipe = Recipe.build(tiny | {"store": str(tmp_path / "store")})
    with pytest.raises(ReleaseError, match="nothing to try a release beside: leave --trial out"):
        reindex(recipe, trial=Shares(5))
    assert not Store(recipe.store).exists("artifacts/catalog")


def test_what_is_on_trial_stays_when_old_releases_go_and_the_commands_say_what_is_tried(tmp_path):
    opened, first, second = two_releases(tmp_path)
    where = ("--store", opened.uri)
    history.rollback(opened, first)
    assert run_here("trial", *where).stdout.strip() == "No release is on trial."
    begun = run_here("trial", second, "--percent", 10, "--shadow", 5, *where)
    said = f"Release {second} is on trial: 10 % of the sessions, and 5 % of the others ask it beside."
    assert begun.stdout.strip() == said, begun.stderr
    assert run_here("trial", *where).stdout.strip() == said
    more = run_here("trial", second, "--percent", 20, *where).stdout
    assert more.strip() == said.replace("10 %", "20 %"), "what is left out stays"
    assert run_here("trial", second, *where).stdout == more
    for wrong, message in (([first], "needs a share of the sessions"), (["--percent", 5], "name the one to try"),
                           (["--end", "--shadow", 5], "name the one to try")):  # fmt: skip
        refused = run_here("trial", *wrong, *where)
        assert refused.returncode == 3 and message in refused.stderr.replace("\n", " ")
    assert gc.collect(opened, keep=1, dry_run=True).removed == []
    assert f"Release {second} is current." in run_here("promote", *where).stdout
    assert releases.pointer(opened)[1] == second
    assert "no release" in run_here("promote", *where).stderr
    assert "over" not in run_here("trial", "--end", *where).stdout
    assert run_here("reindex", "--recipe", "x", "--shadow", 5).returncode == 2
