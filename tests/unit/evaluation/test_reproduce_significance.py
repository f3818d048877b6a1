"""Which differences are shown: Holm against its definition, p against a count of resamples, letters, and equal methods."""

import numpy as np
import pytest

from catid2_ray.evaluation.metrics import Interval
from catid2_ray.evaluation.reproduce.significance import LEVEL, compare, holm, letter_of
from catid2_ray.evaluation.reproduce.verdicts import verdict
from tests.oracles import measures as oracle


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_its_steps_reject(seed):
    p_values = np.random.default_rng(seed).random(9) ** 3
    corrected = holm(p_values)
    assert [p <= LEVEL for p in corrected] == oracle.holm_rejects(p_values, LEVEL)
    assert all(p <= after <= 1 for p, after in zip(p_values, corrected))


def test_a_clear_difference_is_shown_and_lettered_and_a_tie_is_not():
    rng = np.random.default_rng(0)
    base = rng.random(300)
    compared = compare(
        {"bm25": base, "same": base.copy(), "more": base + 0.2 + 0.1 * rng.standard_normal(300)}, resamples=2000
    )
    less = compared.less("more", "bm25")
    assert less.shown and less.low > 0 and less.mean == pytest.approx(0.2, abs=0.02)
    assert compared.less("bm25", "more").mean == -less.mean and compared.less("bm25", "more").high == -less.low
    assert compared.less("same", "bm25").p == 1.0 and not compared.less("same", "bm25").shown
    assert compared.letters() == {"bm25": "", "same": "", "more": "ab"}


def test_p_counts_resamples_on_the_other_side_of_nothing_and_is_never_zero():
    value_Q = np.array([1.0] * 6 + [0.0] * 4)
    compared = compare({"one": value_Q, "other": np.full(10, 0.5)}, resamples=4000, seed=3)
    from catid2_ray.evaluation.metrics import resampled_means

    mean_RM = resampled_means(np.stack([value_Q, np.full(10, 0.5)], 1), resamples=4000, seed=3)
    less_R = np.round(mean_RM[:, 0] - mean_RM[:, 1], 9)
    expected = min(1, 2 * (min((less_R <= 0).sum(), (less_R >= 0).sum()) + 1) / 4001)
    assert compared.less("one", "other").p == expected > 0.3
    far = compare({"one": value_Q + 5, "other": value_Q}, resamples=1000)
    assert far.less("one", "other").p == pytest.approx(2 / 1001)


def test_two_hundred_methods_have_letters_of_their_own():
    assert len({letter_of(place) for place in range(200)}) == 200


def test_a_large_table_can_still_show_a_clear_difference():
    rng = np.random.default_rng(5)
    base = rng.random(100)
    values = {f"m{place}": base + 0.05 * rng.standard_normal(100) for place in range(30)}
    compared = compare(values | {"more": base + 0.3 + 0.05 * rng.standard_normal(100)})
    assert len(compared.letters()["more"]) == 30 and compared.less("more", "m0").corrected < 0.01


def test_a_correction_makes_it_harder_the_more_methods_there_are():
    rng = np.random.default_rng(4)
    base = rng.random(200)
    near = base + 0.012 + 0.08 * rng.standard_normal(200)
    few = compare({"base": base, "near": near}, resamples=4000)
    many = compare({"base": base, "near": near, **{f"m{i}": rng.random(200) for i in range(8)}}, resamples=4000)
    assert few.less("near", "base").p == pytest.approx(many.less("near", "base").p, abs=0.02)
    assert many.less("near", "base").corrected > few.less("near", "base").corrected


@pytest.mark.parametrize(
    "ours, paper, expected",
    [
        (Interval(10.0, 9.0, 11.0), 10.9, "[OK]"),  # inside the interval
        (Interval(10.0, 9.9, 10.1), 10.5, "[OK]"),  # within 5 %
        (Interval(10.0, 9.9, 10.1), 11.5, "[OKish]"),
        (Interval(10.0, 9.9, 10.1), 20.0, "[FAIL]"),
        (Interval(10.0, 9.9, 10.1), 8.0, "[FAIL]"),
        (Interval(10.0, 9.9, 10.1), None, ""),
    ],
)
def test_verdicts(ours, paper, expected):
    assert str(verdict(ours, paper)) == expected


def test_a_cell_without_a_figure_says_why():
    assert str(verdict(None, 5.0, why="no GPU")) == "[not run: no GPU]"
