"""The constrained search equals brute force, a plain Python beam, and `generate` under a dictionary trie.

Models are random and tiny; embeddings are shrunk so that scores are spread over candidates instead of one-hot.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.generator.model import small_t5
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie
from tests.oracles.beam import Recurrent, Table, beam_of_lists, brute_force, hugging_face, slow_beam

WORDS = 20


def model_for(codes_per_level, *, seed=0, activation="relu", untied=False):
    model = small_t5(
        vocabulary=WORDS,
        width=16,
        layers=2,
        heads=2,
        feed_forward=24,
        dropout=0.1,
        codes_per_level=codes_per_level,
        activation=activation,
        seed=seed,
    )
    if untied:
        rows = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed + 1))
        model.lm_head.weight = torch.nn.Parameter(rows * 0.3)
        model.config.tie_word_embeddings = False
        model.config.scale_decoder_outputs = False
    return model.eval()


def random_ids(codes_per_level, count, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, k, count) for k in codes_per_level], 1)
    return np.unique(ids, axis=0)


def random_queries(lengths, seed):
    rng = np.random.default_rng(seed)
    ids_BT = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in enumerate(lengths):
        ids_BT[row, : length - 1] = rng.integers(2, WORDS, length - 1)
        ids_BT[row, length - 1] = 1
    return torch.from_numpy(ids_BT), torch.from_numpy(ids_BT != 0)


def listed(result, row):
    count = int(result.count_B[row])
    return [(float(logp), tuple(docid)) for logp, docid in zip(result.logp_BK[row], result.docid_BKL[row].tolist())][
        :count
    ]


def assert_same(found, expected):
    assert [docid for _, docid in found] == [docid for _, docid in expected]
    np.testing.assert_allclose([logp for logp, _ in found], [logp for logp, _ in expected], atol=1e-4)


@settings(max_examples=8, deadline=None)
@given(
    codes_per_level=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 1000),
    normalize=st.sampled_from(["level", "vocabulary"]),
    untied=st.booleans(),
)
def test_a_beam_as_wide_as_the_trie_is_brute_force(codes_per_level, seed, normalize, untied):
    model = model_for(codes_per_level, seed=seed, activation=("relu", "gated-gelu")[seed % 2], untied=untied)
    ids = random_ids(codes_per_level, 12, seed)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([4], seed)
    result = constrained_beam_search(model, trie, query, mask, beam_width=len(ids), top_k=99, normalize=normalize)
    expected = brute_force(model, ids, query[0].tolist(), codes_per_level=codes_per_level, normalize=normalize)
    assert result.docid_BKL.shape == (1, 99, len(codes_per_level))
    assert_same(listed(result, 0), expected)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), widths=st.lists(st.integers(1, 7), min_size=3, max_size=3))
def test_narrow_beams_equal_a_beam_of_python_lists(seed, widths):
    codes_per_level = (3, 4, 5)
    model, ids = model_for(codes_per_level, seed=seed), random_ids(codes_per_level, 30, seed)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([5], seed)
    allowed = np.random.default_rng(seed).random(trie.rows) < 0.5
    kept = ids[allowed]
    for subset, chosen in ((ids, None), (kept, allowed)):
        result = constrained_beam_search(model, trie, query, mask, beam_width=widths, top_k=7, allowed=chosen)
        expected = slow_beam(
            model, subset, query[0].tolist(), codes_per_level=codes_per_level, widths=widths, normalize="level"
        )
        assert_same(listed(result, 0), expected)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), levels=st.integers(1, 3))
def test_a_search_that_stops_early_finds_clusters_with_all_their_rows(seed, levels):
    codes_per_level = (3, 4, 5)
    model, ids = model_for(codes_per_level, seed=seed), random_ids(codes_per_level, 30, seed)
    trie = Trie.build(np.repeat(ids, 2, axis=0), codes_per_level=codes_per_level, shared=True)
    query, mask = random_queries([5], seed)
    widths = [2, 3, 4][:levels]
    result = constrained_beam_search(model, trie, query, mask, beam_width=widths, top_k=9, levels=levels)
    expected = slow_beam(
        model, ids, query[0].tolist(), codes_per_level=codes_per_level, widths=widths, normalize="level"
    )
    assert_same(listed(result, 0), expected)
    assert result.docid_BKL.shape == (1, 9, levels) and result.inserted_range_BK2 is None
    assert [tuple(one) for one in result.row_range_BK2[0, : len(expected)].tolist()] == [
        trie.item_range(prefix) for _, prefix in expected
    ]
    assert (result.row_range_BK2[0, len(expected) :] == 0).all()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.1, 0.5]))
def test_each_query_of_a_batch_may_have_its_own_filter(seed, share):
    codes_per_level = (4, 3, 5)
    ids, rng = random_ids(codes_per_level, 30, seed), np.random.default_rng(seed)
    trie, table = Trie.build(ids, codes_per_level=codes_per_level), Table(codes_per_level, 5, seed)
    one, two = (Filter.of(rng.random(trie.rows) < share) for _ in range(2))
    filters = [one, None, rng.random(trie.rows) < share, two, one]
    query, mask = random_queries([3] * 5, seed)
    settings = {"beam_width": [2, 3, 30], "top_k": 9}
    together = constrained_beam_search(table, trie, query, mask, allowed=filters, **settings)
    for row, chosen in enumerate(filters):
        alone = constrained_beam_search(table, trie, query, mask, allowed=chosen, **settings)
        assert all(torch.equal(mine[row], other[row]) for mine, other in zip(together[:4], alone[:4]))
    none = constrained_beam_search(table, trie, query, mask, allowed=[None] * 5, **settings)
    assert torch.equal(none.logp_BK, constrained_beam_search(table, trie, query, mask, **settings).logp_BK)


@settings(max_examples=12, deadline=None)
@given(
    deeper=st.lists(st.integers(1, 12), max_size=3),
    beams=st.integers(2, 10),
    lengths=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    untied=st.booleans(),
)
def test_vocabulary_scores_equal_generate(deeper, beams, lengths, seed, untied):
    """The first level has every code, so that each step has at least as many continuations as beams."""
    codes_per_level = (16, *deeper)
    model = model_for(codes_per_level, seed=seed, activation=("relu", "gated-gelu")[seed % 2], untied=untied)
    ids = np.concatenate((random_ids(codes_per_level, 150, seed), np.arange(16)[:, None] * [1, *([0] * len(deeper))]))
    ids = np.unique(ids, axis=0)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries(lengths, seed)
    result = constrained_beam_search(model, trie, query, mask, beam_width=beams, top_k=beams, normalize="vocabulary")
    codes, scores = hugging_face(model, ids, query, mask.long(), codes_per_level=codes_per_level, beams=beams)
    assert torch.equal(result.docid_BKL, codes)
    torch.testing.assert_close(result.logp_BK, scores, atol=1e-4, rtol=0)


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_a_padded_batch_equals_single_queries_and_rows_name_their_id(lengths, seed):
    codes_per_level = (8, 8, 8)
    model, ids = model_for(codes_per_level, seed=seed), random_ids(codes_per_level, 60, seed)
    trie = Trie.build(ids[::-1], codes_per_level=codes_per_level)
    query, mask = random_queries(lengths, seed)
    together = constrained_beam_search(model, trie, query, mask, beam_width=6, top_k=6)
    for row, length in enumerate(lengths):
        alone = constrained_beam_search(
            model, trie, query[row : row + 1, :length], mask[row : row + 1, :length], beam_width=6, top_k=6
        )
        assert_same(listed(together, row), listed(alone, 0))
    for docid, (first, end) in zip(together.docid_BKL[0].tolist(), together.row_range_BK2[0].tolist()):
        assert (first, end) == trie.item_range(docid) and ids[first].tolist() == docid


def test_beyond_the_count_nothing_is_named():
    ids = np.array([[0, 0], [0, 1], [2, 1]])
    trie, model = Trie.build(ids, codes_per_level=(3, 2)), model_for((3, 2))
    query, mask = random_queries([3, 4], 0)
    result = constrained_beam_search(model, trie, query, mask, beam_width=50, top_k=5)
    assert result.count_B.tolist() == [3, 3]
    assert (result.docid_BKL[:, 3:] == -1).all() and (result.row_range_BK2[:, 3:] == 0).all()
    assert (result.logp_BK[:, 3:] == -torch.inf).all()
    assert result.logp_BK[:, :3].exp().sum() <= 2.0
    nothing = constrained_beam_search(model, trie, query, mask, beam_width=2, top_k=2, allowed=np.zeros(3, bool))
    assert nothing.count_B.tolist() == [0, 0] and (nothing.docid_BKL == -1).all()
    one = constrained_beam_search(model, trie, query, mask, beam_width=2, top_k=2, allowed=np.arange(3) == 2)
    assert one.count_B.tolist() == [1, 1] and one.docid_BKL[0, 0].tolist() == [2, 1]


def test_equal_scores_come_in_id_order_even_at_the_edge_of_the_beam():
    codes_per_level = (4, 4)
    model = model_for(codes_per_level)
    with torch.no_grad():
        model.shared.weight[WORDS:] = model.shared.weight[WORDS]
    ids = random_ids(codes_per_level, 40, 1)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([3], 0)
    result = constrained_beam_search(model, trie, query, mask, beam_width=[2, 5], top_k=5)
    assert result.docid_BKL[0].tolist() == ids[:5].tolist()


def test_a_shared_id_has_one_result_with_all_its_rows():
    trie = Trie.build(np.array([[0, 1], [1, 0], [0, 1]]), codes_per_level=(2, 2), shared=True)
    query, mask = random_queries([3], 0)
    result = constrained_beam_search(model_for((2, 2)), trie, query, mask, beam_width=4, top_k=4)
    assert sorted(result.row_range_BK2[0, :2].tolist()) == [[0, 2], [2, 3]] and int(result.count_B) == 2


def test_the_model_is_left_as_it_was_and_dropout_plays_no_part():
    model = model_for((4, 4)).train()
    trie = Trie.build(random_ids((4, 4), 9, 0), codes_per_level=(4, 4))
    query, mask = random_queries([5], 0)
    first, second = (constrained_beam_search(model, trie, query, mask, beam_width=3, top_k=3) for _ in range(2))
    assert model.training and torch.equal(first.logp_BK, second.logp_BK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_nearly_the_same_scores(dtype):
    codes_per_level = (6, 6)
    ids = random_ids(codes_per_level, 20, 0)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([5, 3], 0)
    full, half = (
        constrained_beam_search(model, trie, query, mask, beam_width=20, top_k=20)
        for model in (model_for(codes_per_level), model_for(codes_per_level).to(dtype))
    )
    assert half.count_B.tolist() == full.count_B.tolist() == [len(ids)] * 2
    torch.testing.assert_close(half.logp_BK[:, 0], full.logp_BK[:, 0], atol=0.15, rtol=0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), shared=st.booleans())
def test_a_filter_at_full_beam_is_brute_force_over_what_it_allows(seed, share, shared):
    codes_per_level = (4, 3, 5)
    model, ids = model_for(codes_per_level, seed=seed), random_ids(codes_per_level, 14, seed)
    rows = np.repeat(ids, 1 + (np.arange(len(ids)) % 3 if shared else 0), axis=0)
    trie = Trie.build(rows, codes_per_level=codes_per_level, shared=shared)
    allowed = np.random.default_rng(seed).random(trie.rows) < share
    query, mask = random_queries([5], seed)
    found = [
        constrained_beam_search(model, trie, query, mask, beam_width=len(ids), top_k=20, allowed=chosen)
        for chosen in (allowed, Filter.of(allowed), torch.from_numpy(allowed))
    ]
    expected = brute_force(model, rows[allowed], query[0].tolist(), codes_per_level=codes_per_level, normalize="level")
    assert_same(listed(found[0], 0), expected)
    assert all(torch.equal(mine, other) for result in found[1:] for mine, other in zip(found[0][:4], result[:4]))


def test_widths_per_level_and_widths_beyond_what_is_valid():
    codes_per_level = (32, 6, 8)
    model, ids = model_for(codes_per_level), random_ids(codes_per_level, 300, 0)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([5], 0)
    widths = [20, 50, 500]
    result = constrained_beam_search(model, trie, query, mask, beam_width=widths, top_k=500)
    expected = slow_beam(
        model, ids, query[0].tolist(), codes_per_level=codes_per_level, widths=widths, normalize="level"
    )
    assert len(expected) < 500
    assert_same(listed(result, 0), expected)


@pytest.mark.parametrize("codes_per_level", [(3, 300), (2, 40_000), (250, 250, 250)])
def test_tries_of_every_integer_type_and_sparse_ones_are_read(codes_per_level):
    model, ids = model_for(codes_per_level), random_ids(codes_per_level, 120, 0)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([5], 0)
    allowed = np.arange(trie.rows) % 3 == 0
    for chosen, subset in ((None, ids), (allowed, ids[allowed])):
        result = constrained_beam_search(model, trie, query, mask, beam_width=6, top_k=6, allowed=chosen)
        expected = slow_beam(
            model,
            subset,
            query[0].tolist(),
            codes_per_level=codes_per_level,
            widths=[6] * len(codes_per_level),
            normalize="level",
        )
        assert_same(listed(result, 0), expected)


def other_decoders(codes_per_level, query_BT, mask_BT, *, seed: int, normalize: str) -> dict:
    """Decoders that are no T5, and of each its oracle: `step(row, prefix)`, log P of every next code for one of two queries."""
    table, recurrent = Table(codes_per_level, 2, seed), Recurrent(codes_per_level, WORDS, seed)
    return {
        table: lambda row, prefix: table.step_logp(row, prefix, normalize),
        recurrent: lambda row, prefix: recurrent.step_logp(query_BT[row][mask_BT[row]].tolist(), prefix),
    }


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    widths=st.lists(st.integers(1, 30), min_size=3, max_size=3),
    normalize=st.sampled_from(["level", "vocabulary"]),
)
def test_other_models_work_behind_the_protocol(seed, widths, normalize):
    codes_per_level = (4, 6, 3)
    ids = random_ids(codes_per_level, 30, seed)
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([5, 3], seed)
    for decoder, step in other_decoders(codes_per_level, query, mask, seed=seed, normalize=normalize).items():
        result = constrained_beam_search(decoder, trie, query, mask, beam_width=widths, top_k=9, normalize=normalize)
        for row in range(2):
            expected = beam_of_lists(lambda prefix, row=row, step=step: step(row, prefix), ids, widths)[:9]
            assert_same(listed(result, row), expected)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), activation=st.sampled_from(["relu", "gated-gelu"]))
def test_int8_weights_find_nearly_the_same_scores_and_leave_the_model_alone(seed, activation):
    codes_per_level = (6, 6)
    ids, model = random_ids(codes_per_level, 20, 0), model_for(codes_per_level, seed=seed, activation=activation)
    before = [weight.clone() for weight in model.parameters()]
    trie = Trie.build(ids, codes_per_level=codes_per_level)
    query, mask = random_queries([5, 3], seed)
    full, small = (
        constrained_beam_search(decoder, trie, query, mask, beam_width=20, top_k=20)
        for decoder in (model, T5Decoder(model, codes_per_level=codes_per_level, weights="int8"))
    )
    assert small.count_B.tolist() == [len(ids)] * 2
    torch.testing.assert_close(small.logp_BK[:, 0], full.logp_BK[:, 0], atol=0.15, rtol=0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))
