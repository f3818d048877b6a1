"""Exact scores equal one step at a time for every kind of decoder, whatever the blocks; a replayed beam is the search's own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.exact import decoder_rows, exact_scores, replayed
from catid2_ray.retrieval.trie import Trie
from tests.oracles.beam import Table, beam_of_lists, step_logp
from tests.oracles.exact import prefix_scores
from tests.oracles.generators import causal_next_logits
from tests.unit.retrieval.test_beam import model_for, other_decoders, random_ids, random_queries
from tests.unit.retrieval.test_environment import SPACE, kinds

CODES = (4, 6, 3)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.sampled_from([1, 3, 7, 1024]),
    widths=st.lists(st.integers(1, 30), min_size=3, max_size=3),
    normalize=st.sampled_from(["level", "vocabulary"]),
)
def test_one_pass_in_blocks_is_one_step_at_a_time_and_gives_every_beam(seed, rows, widths, normalize):
    ids = random_ids(CODES, 30, seed)
    trie = Trie.build(ids, codes_per_level=CODES)
    query, mask = random_queries([5, 3], seed)
    for decoder, step in other_decoders(CODES, query, mask, seed=seed, normalize=normalize).items():
        score_L = exact_scores(decoder, trie, query, mask, rows=rows, normalize=normalize)
        replay = replayed(trie, score_L, widths, top_k=9)
        found = constrained_beam_search(decoder, trie, query, mask, beam_width=widths, top_k=9, normalize=normalize)
        for row in range(2):

            def of_row(prefix, row=row, step=step):
                return step(row, prefix)

            for score_BN, expected_N in zip(score_L, prefix_scores(of_row, ids)):
                np.testing.assert_allclose(score_BN[row], expected_N, atol=1e-4)
            for depth in (1, 2, 3):
                kept = [tuple(docid) for docid in trie.prefixes(depth, replay.kept[row][depth - 1]).tolist()]
                assert kept == [prefix for _, prefix in beam_of_lists(of_row, ids, widths[:depth])]
        count = replay.result.docid_BKL.shape[1]
        for mine, other in zip(replay.result[:3], found[:3]):
            torch.testing.assert_close(mine, other[:, :count], atol=1e-5, rtol=0)
        assert torch.equal(replay.result.count_B, found.count_B)


def test_every_kind_of_generator(tmp_path):
    ids = random_ids((4, 4, 4), 20, 0)
    trie, model = Trie.build(ids, codes_per_level=(4, 4, 4)), model_for((4, 4, 4))
    query, mask = random_queries([5, 3, 6], 0)
    t5_L = exact_scores(model, trie, query, mask, rows=6)
    for row in range(3):
        tokens = query[row][mask[row]].tolist()

        def steps(prefix, tokens=tokens):
            return step_logp(model, tokens, prefix, codes_per_level=(4, 4, 4), normalize="level")

        for score_BN, expected_N in zip(t5_L, prefix_scores(steps, ids)):
            np.testing.assert_allclose(score_BN[row], expected_N, atol=1e-4)
    for other, ids_NT in kinds(tmp_path):
        codes = SPACE.codes_per_level
        ids = random_ids(codes, 20, 1)
        trie, real_NT = Trie.build(ids, codes_per_level=codes), ids_NT != ids_NT[1, -1]
        score_L = exact_scores(other, trie, ids_NT, real_NT, rows=8)
        wide = constrained_beam_search(other, trie, ids_NT, real_NT, beam_width=60, top_k=60)
        exact = replayed(trie, score_L, [60] * 3, top_k=60).result
        assert torch.equal(exact.docid_BKL, wide.docid_BKL[:, : trie.rows])
        torch.testing.assert_close(exact.logp_BK, wide.logp_BK[:, : trie.rows], atol=1e-4, rtol=0)
    real_T = ids_NT[0][real_NT[0]]
    expected_L = prefix_scores(
        lambda prefix: causal_next_logits(other, real_T, prefix, space=SPACE).log_softmax(0).tolist(), ids
    )
    for score_BN, expected_N in zip(score_L, expected_L):
        np.testing.assert_allclose(score_BN[0], expected_N, atol=1e-4)


def test_equal_scores_come_in_id_order_and_shared_ids_bring_all_their_rows():
    trie = Trie.build(np.array([[0, 1], [0, 1], [1, 0], [1, 1]]), codes_per_level=(2, 2), shared=True)
    replay = replayed(trie, [np.zeros((1, 2)), np.zeros((1, 3))], [2, 2], top_k=5)
    assert replay.result.docid_BKL[0].tolist() == [[0, 1], [1, 0]]
    assert replay.result.row_range_BK2[0].tolist() == [[0, 2], [2, 3]]
    chosen_by_s = replayed(
        trie, [np.zeros((1, 2)), np.array([[3.0, 1, 2]])], [2, 2], top_k=5, logp_BN=np.array([[-4.0, -5, -6]])
    )
    assert chosen_by_s.result.docid_BKL[0].tolist() == [[0, 1], [1, 1]] and chosen_by_s.result.logp_BK[0].tolist() == [
        -4,
        -6,
    ]
    none = replayed(trie, [np.full((1, 2), -np.inf), np.zeros((1, 3))], [2, 2], top_k=5)
    assert none.result.count_B.tolist() == [0] and none.result.docid_BKL.shape == (1, 0, 2)


def test_fewer_levels_cost_fewer_rows():
    ids = random_ids(CODES, 30, 3)
    trie = Trie.build(ids, codes_per_level=CODES)
    assert decoder_rows(trie) == 1 + trie.nodes(1) + trie.nodes(2) and decoder_rows(trie, 1) == 1
    query, mask = random_queries([4], 0)
    table = Table(CODES, 1, 0)
    whole, first = (exact_scores(table, trie, query, mask, levels=levels) for levels in (None, 1))
    assert len(first) == 1 and np.array_equal(first[0], whole[0])


def test_logits_that_are_no_numbers_are_refused():
    trie, table = Trie.build(random_ids(CODES, 9, 0), codes_per_level=CODES), Table(CODES, 1, 0)
    table.logits[1][0, int(trie.token[1][0])] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite logits"):
        exact_scores(table, trie, *random_queries([4], 0))
