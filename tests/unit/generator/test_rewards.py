"""Rewards against dictionaries and loops: grades, rows of judgements, the ranker's bonus, the candidates."""

import numpy as np
import pytest
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError
from catid2_ray.generator.rewards import (
    expert_candidates,
    graded,
    judged_rows,
    looked_up,
    ranker_bonus,
    relevance_rewards,
    unpack,
)


def test_grades_become_rewards():
    assert relevance_rewards([1, 2, 3], grades=None, low=1, high=3).tolist() == [0, 0.5, 1]
    assert relevance_rewards([2, 2], grades=None, low=2, high=2).tolist() == [1, 1]
    found = relevance_rewards([0, 1, 1.5, 2, 9], grades=[(1, 0.2), (2, 0.8)], low=0, high=9)
    np.testing.assert_allclose(found, [0.2, 0.2, 0.5, 0.8, 0.8], rtol=1e-6)
    with pytest.raises(RecipeError, match="grades must rise in relevance"):
        relevance_rewards([1], grades=[(2, 0), (1, 1)], low=1, high=2)


def test_rows_hold_the_best_reward_of_each_id_best_first():
    rng = np.random.default_rng(0)
    query_P, packed_P = rng.integers(0, 12, 300), rng.integers(0, 25, 300)
    reward_P, relevant_P = rng.integers(0, 5, 300) / 4, rng.random(300) < 0.4
    rows = judged_rows(query_P, packed_P, reward_P, relevant_P, queries=13, width=9)
    best, relevant = {}, {}
    for query, packed, reward, counts in zip(query_P, packed_P, reward_P, relevant_P):
        best[query, packed] = max(best.get((query, packed), 0), reward)
        relevant[query, packed] = relevant.get((query, packed), 0) + int(counts)
    cut = 0
    for query in range(13):
        mine = sorted((-reward, packed) for (q, packed), reward in best.items() if q == query)
        expected = [(packed, -reward, relevant[query, packed]) for reward, packed in mine][:9]
        cut += max(0, len(mine) - 9)
        found = list(zip(*(table[query, : len(expected)].tolist() for table in rows[:3])))
        assert found == expected
        assert (rows.judged_QJ[query, len(expected) :] == -1).all()
    assert rows.cut == cut > 0
    empty = judged_rows([], [], [], [], queries=2, width=3)
    assert (empty.judged_QJ == -1).all() and empty.cut == 0


def test_rewards_fall_back_to_valid_and_invalid():
    judged_BJ = torch.tensor([[7, 3, -1], [-1, -1, -1]])
    reward_BJ = torch.tensor([[1.0, 0.0, 0.9], [0.9, 0.9, 0.9]])
    packed_BN = torch.tensor([[3, 7, 5, 9], [7, 5, -1, 3]])
    valid_BN = torch.tensor([[True, True, True, False], [True, True, False, True]])
    found = graded(packed_BN, judged_BJ, reward_BJ, valid_BN, valid=0.1, invalid=-0.5)
    torch.testing.assert_close(found, torch.tensor([[0, 1, 0.1, -0.5], [0.1, 0.1, -0.5, 0.1]]))


def test_the_bonus_is_bounded_and_blind_to_scale():
    score_BN = torch.tensor([[1.0, 2.0, 3.0, torch.nan], [4.0, 4.0, 4.0, 4.0], [torch.nan] * 4])
    found = ranker_bonus(score_BN, bound=0.2)
    z = 1 / np.std([1, 2, 3])
    np.testing.assert_allclose(found[0], [0, 0, 0.2 * np.tanh(z), 0], rtol=1e-5, atol=1e-7)
    assert not found[1:].any()
    torch.testing.assert_close(found, ranker_bonus(1000 * score_BN - 7, bound=0.2), rtol=1e-4, atol=1e-6)
    assert (ranker_bonus(torch.randn(50, 8) ** 3, bound=0.2) <= 0.2).all()


def test_scores_are_found_and_the_rest_has_none():
    found = looked_up(torch.tensor([[5, 6]]), torch.tensor([[6, -1]]), torch.tensor([[0.25, 9.0]]), missing=torch.nan)
    assert found[0, 0].isnan() and found[0, 1] == 0.25


def test_candidates_are_good_distinct_and_take_turns():
    judged_BJ = torch.tensor([[4, 8, 9, 2, -1], [1, 2, -1, -1, -1]])
    reward_BJ = torch.tensor([[1, 1, 0.5, 0.2, 0], [0.2, 0.1, 0, 0, 0]])
    first = set()
    for seed in range(40):
        packed_BE, count_B = expert_candidates(judged_BJ, reward_BJ, least=0.5, most=2, seed=seed)
        assert count_B.tolist() == [2, 0] and len(set(packed_BE[0].tolist())) == 2
        first.add(int(packed_BE[0, 0]))
    assert first == {4, 8, 9}


def test_unpacking_is_that_of_the_space():
    space = DocidSpace((4, 3, 5))
    packed = torch.arange(60).view(6, 10)
    expected = space.unpack(packed.numpy().ravel()).reshape(6, 10, 3)
    assert np.array_equal(unpack(packed, space.codes_per_level, space.radix_L).numpy(), expected)
    assert not unpack(torch.tensor([[-1]]), space.codes_per_level, space.radix_L).any()
