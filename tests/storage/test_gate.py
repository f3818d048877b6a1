"""What must be reached before a release is published: a share of BM25's recall, or else of the current release's own."""

import pytest

from catid2_ray.artifacts import history
from catid2_ray.artifacts import release as releases
from catid2_ray.config import Recipe
from catid2_ray.errors import ChurnGateError, EncoderError, QualityGateError
from catid2_ray.on_ray import commands
from catid2_ray.on_ray.commands import GateFailed, canary_gate, gate
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import canary
from tests.stored import two_releases

RECIPE = Recipe.build(
    {
        "catalog": {"root": "/shop"},
        "generator": {"epochs": 12},
        "evaluation": {"min_beam_to_bm25": 0.5, "min_to_release": 0.9},
    }
)


def recall(**at_50) -> dict:
    return {"recall": {name: {"50": value} for name, value in at_50.items()}}


@pytest.mark.parametrize(
    "figures, before",
    [
        (recall(beam=0.3, bm25=0.5), None),
        (recall(beam=0.1, served=0.3, bm25=0.5), None),  # what is served is judged
        (recall(beam=0.46), {"beam": {"50": 0.5}}),
        (recall(beam=0.3, bm25=0.5), {"beam": {"50": 0.9}}),  # BM25 is the measure where it was scored
    ],
)
def test_what_reaches_it_passes(figures, before):
    assert gate(RECIPE, figures, before) is None


@pytest.mark.parametrize(
    "figures, before, message",
    [
        (recall(beam=0.2, bm25=0.5), None, r"the beam is 0.200, under 0.5 × BM25's 0.500 .*min_beam_to_bm25"),
        (recall(beam=0.4, served=0.2, bm25=0.5), None, "what is served is 0.200"),
        (
            recall(beam=0.44),
            {"beam": {"50": 0.5}},
            r"under 0.9 × the current release's 0.500 \(evaluation.min_to_release",
        ),
    ],
)
def test_what_does_not_is_refused(figures, before, message):
    with pytest.raises(GateFailed, match=message):
        gate(RECIPE, figures, before)


def test_the_way_out_is_named_with_its_numbers():
    with pytest.raises(GateFailed, match=r"generator.epochs=24\).* set evaluation.min_beam_to_bm25=0.41$"):
        gate(RECIPE, recall(beam=0.208, bm25=0.5), None)
    stages = Recipe.build(
        {"catalog": {"root": "/shop"}, "generator": {"stages": [{"name": "a"}, {"name": "b", "epochs": 3}]}}
    )
    with pytest.raises(GateFailed, match="generator.stages: a epochs=2, b epochs=6"):
        gate(stages, recall(beam=0.2, bm25=0.5), None)


@pytest.mark.parametrize(
    "figures, before, reason",
    [
        (recall(beam=0.1), None, "no release of before"),
        (recall(dense=0.1), {"beam": {"50": 0.5}}, "neither served nor beam"),
        (recall() | {"not_evaluated": "the catalogue has no table of pairs"}, None, "no table of pairs"),
        (recall(served=0.1), {"beam": {"50": 0.5}}, "no release of before"),
    ],
)
def test_where_nothing_can_be_demanded_it_is_said(figures, before, reason):
    assert reason in gate(RECIPE, figures, before)


def asked(**found) -> dict:
    return {"queries": 50, "given_back": 1.0, "empty": 0.0, "ms": 30.0, "ms_before": 25.0} | found


@pytest.mark.parametrize(
    "found, message",
    [
        (
            asked(given_back=0.61),
            r"gives back 61% of the products .* less than 95% .* set evaluation.canary_recall=0.61$",
        ),
        (asked(empty=0.1), r"finds nothing for 10%, more than 2% .* set evaluation.canary_empty=0.1$"),
        (
            asked(ms=90.0),
            r"takes 90 ms a query where the current release takes 25, .* set evaluation.canary_slower=3.6$",
        ),
    ],
)
def test_canary_queries_must_be_answered_and_the_way_out_is_named(found, message):
    with pytest.raises(GateFailed, match=message) as error:
        canary_gate(RECIPE, found, {"recall": 1})
    assert error.value.figures == {"recall": 1}
    name, value = str(error.value).rsplit("evaluation.", 1)[1].split("=")
    canary_gate(Recipe.build({"catalog": {"root": "/shop"}, "evaluation": {name: float(value)}}), found, {})


@pytest.mark.parametrize(
    "found",
    [
        asked(),
        asked(given_back=None),  # an append took the evaluation over
        asked(ms=9.0, ms_before=1.0),  # 8 ms are no matter
        asked(ms=900.0, ms_before=None),
    ],
)
def test_canary_queries_that_are_good_enough(found):
    canary_gate(RECIPE, found, {})


def raising(error):
    raise error


@pytest.fixture
def candidate(tmp_path):
    """A job on a store with a release, and the parts of another one whose evaluation kept answers."""
    store, first, second = two_releases(tmp_path, answers=True)
    history.rollback(store, first)
    job = Job(recipe=RECIPE, store=store)
    job.look()
    return job, releases.load(store, second).manifests(store)


def test_what_the_candidate_answers_decides_before_the_pointer_moves(candidate, monkeypatch, capfd):
    job, parts = candidate
    current = releases.pointer(job.store)
    monkeypatch.setattr(commands.Job, "check_lease", lambda self: None)
    found = commands._published(job, parts, {}, None)
    assert found.figures["canary"]["given_back"] == 1.0 and found.figures["canary"]["ms_before"] > 0
    assert "event=canary queries=3 given_back=1 empty=0 ms=" in capfd.readouterr().err
    assert releases.pointer(job.store)[1] == found.release.name and commands._ask_canaries(job, parts, {}) is None
    history.rollback(job.store, current[1])
    job.look()
    current = releases.pointer(job.store)
    answers = dict.fromkeys(canary.kept_answers(job.store, parts), ["nobody"])
    monkeypatch.setattr(canary, "kept_answers", lambda store, parts: answers)
    with pytest.raises(GateFailed, match="gives back 0% of the products"):
        commands._published(job, parts, {}, None)
    assert releases.pointer(job.store) == current
    with monkeypatch.context() as patch:
        patch.setattr(commands, "open_retriever", lambda folder: raising(EncoderError("no such model on this node")))
        assert commands._ask_canaries(job, parts, {}) is None
    assert "event=no_canary reason='no such model on this node'" in capfd.readouterr().err
    monkeypatch.setattr(canary, "kept_answers", lambda store, parts: {})
    assert commands._published(job, parts, {}, None).figures["canary"] is None
    assert "event=no_canary" in capfd.readouterr().err


def test_what_is_current_may_have_lost_its_record_when_a_ledger_is_begun_anew(candidate, capfd):
    job, parts = candidate
    current = releases.pointer(job.store)[1]
    job.store.delete(f"releases/{current}.json")
    assert commands._ask_canaries(job, parts, {})["given_back"] == 1.0
    assert f"event=no_canary of={current} reason=" in capfd.readouterr().err


def test_the_gates_have_exit_codes_of_their_own():
    assert GateFailed.exit_code == QualityGateError.exit_code == 7 and ChurnGateError.exit_code == 10
