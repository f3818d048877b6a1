"""Scores over the trie's children alone: the search equals slow forms, and the decoder runs where something is to choose."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.exact import exact_scores, replayed
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.lookahead import Ahead, Lookahead
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import TrieTensors, continuations
from catid2_ray.retrieval.vectors import VectorStore
from tests.oracles.beam import Recurrent, Table, beam_of_lists, brute_force, over_children, slow_beam
from tests.unit.retrieval.test_beam import WORDS, assert_same, listed, model_for, random_ids, random_queries
from tests.unit.retrieval.test_live import tried

CODES = (4, 5, 4, 3)
TRIE = {"normalize": "trie"}


class Counting:
    """A decoder that says how many beams each step was asked for."""

    def __init__(self, decoder):
        self.decoder, self.steps = decoder, []
        self.codes_per_level, self.device = decoder.codes_per_level, decoder.device

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def decode_step(self, level, memory, cache, parent_BM, code_BM):
        self.steps.append((level, code_BM.shape[1]))
        return self.decoder.decode_step(level, memory, cache, parent_BM, code_BM)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000), products=st.integers(1, 60), levels=st.integers(1, 4),
    widths=st.lists(st.integers(1, 9), min_size=4, max_size=4), share=st.sampled_from([0.3, 1.0]),
)  # fmt: skip
def test_beams_equal_a_beam_of_python_lists(seed, products, levels, widths, share):
    model, ids = model_for(CODES, seed=seed), random_ids(CODES, products, seed)
    trie, allowed = Trie.build(ids, codes_per_level=CODES), np.random.default_rng(seed).random(len(ids)) < share
    query, mask = random_queries([5, 3, 4], seed)
    result = constrained_beam_search(
        model, trie, query, mask, beam_width=widths[:levels], top_k=9, levels=levels, allowed=allowed, **TRIE
    )
    for row in range(3):
        tokens = query[row][mask[row]].tolist()
        expected = slow_beam(
            model, ids[allowed], tokens, codes_per_level=CODES, widths=widths[:levels], normalize="trie", trie=ids
        )
        assert_same(listed(result, row), expected)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), products=st.integers(1, 40))
def test_a_beam_as_wide_as_the_trie_is_brute_force_and_sums_to_one(seed, products):
    model, ids = model_for(CODES, seed=seed), random_ids(CODES, products, seed)
    trie, (query, mask) = Trie.build(ids, codes_per_level=CODES), random_queries([4], seed)
    result = constrained_beam_search(model, trie, query, mask, beam_width=len(ids), top_k=len(ids), **TRIE)
    assert_same(listed(result, 0), brute_force(model, ids, query[0].tolist(), codes_per_level=CODES, normalize="trie"))
    assert float(result.logp_BK.exp().sum()) == pytest.approx(1, abs=1e-4)
    every = exact_scores(model, trie, query, mask, rows=3, **TRIE)
    whole = replayed(trie, every, [len(ids)] * 4, top_k=len(ids))
    assert_same(listed(result, 0), listed(whole.result, 0))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), products=st.integers(1, 50), width=st.integers(1, 12))
def test_beams_with_one_way_to_go_cost_no_decoder_row_and_change_nothing(seed, products, width):
    ids, (query, mask) = random_ids(CODES, products, seed), random_queries([5, 3], seed)
    trie = Trie.build(ids, codes_per_level=CODES)
    for decoder in (
        T5Decoder(model_for(CODES, seed=seed), codes_per_level=CODES), Recurrent(CODES, WORDS, seed), Table(CODES, 2, seed),
    ):  # fmt: skip
        counting = Counting(decoder)
        search = {"beam_width": width, "top_k": width, **TRIE}
        found = constrained_beam_search(counting, trie, query, mask, **search)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                TrieTensors, "decided", lambda self, level, place, levels: torch.zeros_like(place[0], dtype=torch.bool)
            )
            slow = Counting(decoder)
            expected = constrained_beam_search(slow, trie, query, mask, **search)
        assert torch.equal(found.docid_BKL, expected.docid_BKL)
        torch.testing.assert_close(found.logp_BK, expected.logp_BK, atol=1e-5, rtol=1e-5)
        ways = [np.unique(ids[:, :level], axis=0, return_counts=True)[1] for level in range(1, 4)]
        for level, count in enumerate(ways, 1):
            asked = dict(counting.steps).get(level, 0)
            assert asked <= min(width, int((count > 1).sum())), "no more beams than there are nodes with two ways"
        assert sum(beams for _, beams in counting.steps) <= sum(beams for _, beams in slow.steps)


def test_where_every_second_level_decides_the_others_are_left_out():
    ids = np.array([[c, c, c, 0] for c in range(4)])
    trie, (query, mask) = Trie.build(ids, codes_per_level=CODES), random_queries([4], 0)
    counting = Counting(T5Decoder(model_for(CODES), codes_per_level=CODES))
    found = constrained_beam_search(counting, trie, query, mask, beam_width=4, top_k=4, **TRIE)
    assert counting.steps == [(0, 1)] and int(found.count_B) == 4
    assert float(found.logp_BK.exp().sum()) == pytest.approx(1, abs=1e-5)
    # What has one way at a level but several later keeps its place in the decoder's past.
    ids = np.array([[0, 1, 2, 0], [0, 1, 2, 1], [1, 0, 0, 0], [1, 0, 0, 2], [2, 3, 3, 1]])
    trie, counting = Trie.build(ids, codes_per_level=CODES), Counting(counting.decoder)
    found = constrained_beam_search(counting, trie, query, mask, beam_width=9, top_k=9, **TRIE)
    assert counting.steps == [(0, 1), (1, 2), (2, 2), (3, 2)]
    assert_same(
        listed(found, 0),
        brute_force(counting.decoder.model, ids, query[0].tolist(), codes_per_level=CODES, normalize="trie"),
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), products=st.integers(1, 25), changes=st.integers(1, 12))
def test_newcomers_count_as_one_more_child_and_what_is_withdrawn_still_counts(seed, products, changes):
    """Over the release's children, whatever was withdrawn; a child that the release lacks has log 1 / (C + 1)."""
    rng, ids = np.random.default_rng(seed), random_ids(CODES, products, seed)
    trie, table = Trie.build(ids, codes_per_level=CODES), Table(CODES, 2, seed)
    live = LiveTrie(trie, product_ids=[f"p{row}" for row in range(len(ids))])
    released = {tuple(docid) for docid in ids.tolist()}
    now = set(released)
    for number in range(changes):
        docid = tuple(int(rng.integers(0, codes)) for codes in CODES)
        if rng.random() < 0.4 and (there := sorted(now & released)):
            gone = there[int(rng.integers(0, len(there)))]
            row = int(np.flatnonzero((ids == gone).all(1))[0])
            if tried(live.withdraw, [row]):
                now.discard(gone)
        elif docid not in released | now:
            live.insert(f"n{number}", docid)
            now.add(docid)
    query, mask = random_queries([3, 2], seed)

    def steps(row):
        def step(prefix):
            logits = table.logits[len(prefix)][(row, *prefix)].tolist()
            own = over_children(logits, prefix, released)
            children = sum(one > -np.inf for one in own)
            return [one if one > -np.inf else -np.log1p(children) for one in own]

        return step

    result = constrained_beam_search(table, live.view, query, mask, beam_width=[3, 5, 4, 9], top_k=9, **TRIE)
    for row in range(2):
        assert_same(listed(result, row), beam_of_lists(steps(row), now, [3, 5, 4, 9]) if now else [])


def test_a_search_that_looks_ahead_reads_the_same_log_p(tmp_path):
    ids = random_ids(CODES, 40, 1)
    trie, model = Trie.build(ids, codes_per_level=CODES), model_for(CODES, seed=1)
    query, mask = random_queries([5], 1)
    plain = constrained_beam_search(model, trie, query, mask, beam_width=40, top_k=40, **TRIE)
    vector_ND = np.random.default_rng(0).normal(size=(trie.rows, 3)).astype(np.float32)
    store = VectorStore.write(tmp_path / "vectors", [vector_ND], normalize=True)
    nodes = NodeVectors.write(tmp_path / "nodes", trie, store, depth=2)
    ahead = Ahead(Lookahead(logp_weight=0.3), nodes, vector_ND[:1])
    found = constrained_beam_search(model, trie, query, mask, beam_width=40, top_k=40, ahead=ahead, **TRIE)
    by_id = dict(zip(map(tuple, plain.docid_BKL[0].tolist()), plain.logp_BK[0].tolist()))
    assert int(found.count_B) == trie.rows
    for docid, logp in zip(found.docid_BKL[0].tolist()[: trie.rows], found.logp_BK[0].tolist()):
        assert logp == pytest.approx(by_id[tuple(docid)], abs=1e-4)


def test_continuations_are_the_children_of_each_prefix():
    ids = random_ids(CODES, 30, 3)
    trie = Trie.build(ids, codes_per_level=CODES)
    valid = continuations(trie, torch.from_numpy(ids[::3]))
    for level, valid_BK in enumerate(valid):
        for docid, valid_K in zip(ids[::3], valid_BK):
            same = (ids[:, :level] == docid[:level]).all(1)
            assert valid_K.nonzero()[:, 0].tolist() == sorted(set(ids[same, level].tolist()))
