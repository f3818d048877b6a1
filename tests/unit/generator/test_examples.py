"""Word dropout keeps whole words, epochs use every row equally, and a batch depends on (seed, step) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.batches import Examples, epoch_order, kept_words, kinds_without_pairs, mix_ratios, only_kept

# Tokens 3…9 begin a word, 10…15 continue one.
STARTS_V = np.array([True] * 10 + [False] * 6)


def drop_words(ids_BT, starts_word_V, **settings):
    thin_BT = only_kept(ids_BT, kept_words(ids_BT, starts_word_V, **settings))
    return np.pad(thin_BT, ((0, 0), (0, ids_BT.shape[1] - thin_BT.shape[1])))


def split_words(row):
    words = []
    for token in row:
        if token > 1 and (STARTS_V[token] or not words):
            words.append([])
        if token > 1:
            words[-1].append(int(token))
    return words


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(2, 15), max_size=6), min_size=1, max_size=5),
    keep=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
def test_whole_words_fall_and_one_always_stays(rows, keep, seed):
    ids_BT = np.zeros((len(rows), 8), np.int32)
    for row, tokens in enumerate(rows):
        ids_BT[row, : len(tokens) + 1] = [*tokens, 1]
    before = ids_BT.copy()
    thin_BT = drop_words(ids_BT, STARTS_V, keep=keep, generator=np.random.default_rng(seed))
    assert np.array_equal(ids_BT, before)
    for full, thin in zip(ids_BT, thin_BT):
        length = int((thin != 0).sum())
        assert thin[length - 1] == 1 and (thin[length:] == 0).all()
        full_words, thin_words = split_words(full), split_words(thin)
        assert bool(full_words) == bool(thin_words)
        remaining = iter(full_words)
        assert all(word in remaining for word in thin_words)


def test_the_share_of_kept_words_is_as_asked():
    ids_BT = np.tile(np.array([[3, 10, 4, 5, 6, 7, 8, 1]], np.int32), (2000, 1))
    thin_BT = drop_words(ids_BT, STARTS_V, keep=0.5, generator=np.random.default_rng(0))
    assert 2.9 < np.isin(thin_BT, np.arange(3, 10)).sum(1).mean() < 3.1
    assert np.array_equal((thin_BT == 10).sum(1), (thin_BT == 3).sum(1))
    assert np.array_equal(drop_words(ids_BT, STARTS_V, keep=1.0, generator=np.random.default_rng(0)), ids_BT)
    with pytest.raises(RecipeError, match="keep must be in"):
        drop_words(ids_BT, STARTS_V, keep=0.0, generator=np.random.default_rng(0))


def test_over_the_epochs_every_row_is_used_equally_often():
    sizes, ratio = {"query": 10, "title": 6}, {"query": 2.5, "title": 0.5}
    used = {"query": np.zeros(10, int), "title": np.zeros(6, int)}
    for epoch in range(4):
        order = epoch_order(sizes, ratio, seed=1, epoch=epoch)
        assert len(order.kind_N) == 28
        for number, kind in enumerate(order.kinds):
            np.add.at(used[kind], order.row_N[order.kind_N == number], 1)
    assert used["query"].tolist() == [10] * 10 and used["title"].tolist() == [2] * 6
    first, again = (epoch_order(sizes, ratio, seed=1, epoch=0) for _ in range(2))
    assert np.array_equal(first.row_N, again.row_N) and np.array_equal(first.kind_N, again.kind_N)
    assert not np.array_equal(first.row_N, epoch_order(sizes, ratio, seed=1, epoch=1).row_N)


def test_epochs_that_cannot_be_are_refused():
    with pytest.raises(RecipeError, match="name only the kinds"):
        epoch_order({"query": 3}, {"titel": 1.0}, seed=0, epoch=0)
    with pytest.raises(RecipeError, match="empty epoch"):
        epoch_order({"query": 3}, {"query": 0.0}, seed=0, epoch=0)


def tables(**settings):
    rng = np.random.default_rng(0)
    ids = {kind: rng.integers(3, 16, (count, 9)).astype(np.int32) for kind, count in (("query", 11), ("title", 7))}
    for ids_NT in ids.values():
        ids_NT[:, -2:] = (1, 0)
    codes = {kind: rng.integers(0, 4, (len(ids_NT), 2)) for kind, ids_NT in ids.items()}
    return Examples(ids, codes, starts_word_V=STARTS_V, **settings)


def test_a_batch_is_the_same_for_any_number_of_workers_and_any_order_of_asking():
    examples, fresh = tables(), tables()
    for step in (0, 3, 7, 1):
        whole = examples.batch(seed=5, step=step, batch=6)
        halves = [fresh.batch(seed=5, step=step, batch=6, rank=rank, workers=2) for rank in (0, 1)]
        assert np.array_equal(whole.codes_BL, np.concatenate([half.codes_BL for half in halves]))
        for half, rows in zip(halves, (slice(0, 3), slice(3, 6))):
            width = half.texts.shape[1]
            assert np.array_equal(whole.texts[rows, :width], half.texts)
            assert not whole.texts[rows, width:].any() and half.texts.any(0).all()


def test_only_titles_lose_words_and_ids_stay_with_their_texts():
    examples = tables(keep=0.3, drop_share=1.0, ratio={"query": 1.0, "title": 2.0})
    steps = examples.steps_per_epoch(batch=5)
    assert steps == 5
    seen = [examples.batch(seed=2, step=step, batch=5) for step in range(steps)]
    queries = {tuple(row[:8]): tuple(codes) for row, codes in zip(examples.input_ids["query"], examples.codes["query"])}
    whole = 0
    for rows in seen:
        for ids, codes in zip(rows.texts, rows.codes_BL):
            if tuple(ids[:8]) in queries:
                whole += 1
                assert queries[tuple(ids[:8])] == tuple(codes)
    assert whole >= 10


def test_tables_that_do_not_match_are_refused():
    ids = np.ones((3, 4), np.int32)
    with pytest.raises(InputError, match="3 texts but 2 IDs"):
        Examples({"query": ids}, {"query": np.zeros((2, 2), int)})
    with pytest.raises(InputError, match="differ in length"):
        Examples({"query": ids, "title": ids[:, :3]}, {"query": np.zeros((3, 2)), "title": np.zeros((3, 2))})
    with pytest.raises(RecipeError, match="does not divide among 4 workers"):
        tables().batch(seed=0, step=0, batch=6, workers=4)


def test_without_pairs_the_mix_falls_to_titles():
    assert mix_ratios({"query": 10, "title": 20}, {"query": 1, "title": 0.5}) == {"query": 1.0, "title": 0.25}
    assert mix_ratios({"query": 0, "title": 20}, {"query": 1, "title": 0.5}) == {"query": 0.0, "title": 0.5}
    assert mix_ratios({"title": 20}, {"query": 1}) == {"title": 1.0}
    assert mix_ratios({"title": 20, "span": 40}, {"query": 1, "span": 1}) == {"title": 0.0, "span": 0.5}
    assert mix_ratios({"span": 40}, {"query": 1, "span": 1, "user": 2}) == {"span": 1.0}
    assert kinds_without_pairs(("query", "span", "user")) == ("span",)
    assert kinds_without_pairs(("query", "user")) == ("title",)
