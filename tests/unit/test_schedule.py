"""Seeds and learning rates are pure functions of position: the same in every process, and pinned here.

A changed pin means that a checkpoint of an older version resumes into another run.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.schedule import Phase, Place, Plan, learning_rate_at, seed_from


def test_seeds_are_the_same_in_every_process():
    assert (seed_from(), seed_from(0), seed_from(0, 1)) == (
        1665333220245342802,
        5254295370254170289,
        5973285143095172824,
    )


def test_seeds_of_neighbours_differ_and_fit_63_bits():
    seeds = {seed_from(a, b) for a in range(50) for b in range(50)} | {seed_from(a) for a in range(50)}
    assert len(seeds) == 2550 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(1, 23) != seed_from(12, 3) and seed_from(0, 0) != seed_from(0)
    assert seed_from(True, 2) == seed_from(1, 2)


@settings(max_examples=80, deadline=None)
@given(total=st.integers(1, 400), share=st.floats(0, 0.5), peak=st.floats(1e-6, 1))
def test_the_rate_rises_to_its_peak_then_falls_to_zero(total, share, peak):
    rates = [learning_rate_at(step, total, peak=peak, warmup_share=share) for step in range(total + 1)]
    warmup = math.ceil(share * total)
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[max(warmup - 1, 0)] == pytest.approx(peak) and rates[warmup] == pytest.approx(peak)
    assert all(rates[i] < rates[i + 1] for i in range(warmup - 1))
    assert all(rates[i] > rates[i + 1] for i in range(warmup, total))
    assert min(rates[:total]) > 0
    if warmup < total:
        assert rates[total] == pytest.approx(0, abs=peak * 1e-9)


def test_the_rate_half_way_down():
    assert learning_rate_at(55, 100, peak=2.0, warmup_share=0.1) == pytest.approx(1.0)
    assert learning_rate_at(4, 100, peak=2.0, warmup_share=0.1) == pytest.approx(1.0)
    assert learning_rate_at(0, 1, peak=2.0, warmup_share=0.0) == 2.0


def test_the_other_ways_down():
    given = {"peak": 2.0, "warmup_share": 0.1}
    rates = [learning_rate_at(step, 100, decay="inverse_sqrt", **given) for step in range(100)]
    assert rates[9] == 2.0 and rates[39] == pytest.approx(1.0) and rates == sorted(rates[:10]) + rates[10:]
    assert all(rates[step] > rates[step + 1] for step in range(9, 99))
    assert [learning_rate_at(step, 100, decay="constant", **given) for step in (4, 10, 99)] == [1.0, 2.0, 2.0]
    assert learning_rate_at(3, 100, peak=2.0, warmup_share=0.0, decay="inverse_sqrt") == 1.0


PHASES = (Phase(2, 10, 1.0), Phase(1, 3, 0.5), Phase(3, 8, 0.1))


def test_epochs_and_steps_count_through_all_phases():
    plan = Plan(PHASES, batch=4)
    assert (plan.epochs, plan.steps) == (6, 2 * 3 + 1 + 3 * 2)
    assert [plan.place(epoch) for epoch in range(6)] == [
        Place(0, 0, 3), Place(0, 3, 3), Place(1, 6, 1), Place(2, 7, 2), Place(2, 9, 2), Place(2, 11, 2),
    ]  # fmt: skip
    assert [plan.steps_before(epoch) for epoch in (0, 3, 6)] == [0, 7, 13]
    with pytest.raises(IndexError, match="the plan has 6 epochs"):
        plan.place(6)


@pytest.mark.parametrize("decay", ["cosine", "inverse_sqrt", "constant"])
def test_every_phase_warms_up_and_decays_over_its_own_steps(decay):
    plan, found = Plan(PHASES, batch=4), []
    for epoch in range(plan.epochs):
        steps = range(plan.place(epoch).steps)
        found += [plan.learning_rate(epoch, step, warmup_share=0.4, decay=decay) for step in steps]
    expected = []
    for phase, steps in zip(PHASES, (6, 1, 6)):
        given = {"peak": phase.learning_rate, "warmup_share": 0.4, "decay": decay}
        expected += [learning_rate_at(step, steps, **given) for step in range(steps)]
    assert found == expected
