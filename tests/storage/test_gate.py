"""What must be reached before a release is published: a share of BM25's recall, or else of the current release's own."""

import pytest

from catid2_ray.config import Recipe
from catid2_ray.errors import ChurnGateError, QualityGateError
from catid2_ray.on_ray.commands import GateFailed, gate

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


def test_the_gates_have_exit_codes_of_their_own():
    assert GateFailed.exit_code == QualityGateError.exit_code == 7 and ChurnGateError.exit_code == 10
