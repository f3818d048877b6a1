"""A pretrained text encoder under our decoder: cached states train alike, the search is exact, one pass gives both."""

import json

import numpy as np
import pytest
import torch

from catid2_ray.catalog.text import HuggingFaceEncoder
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, EncoderError, InputError, RecipeError
from catid2_ray.generator import states
from catid2_ray.generator.batches import Examples, kept_words
from catid2_ray.generator.encoder_decoder import encoder_decoder
from catid2_ray.generator.states import StateCache, TokenStates, dense
from catid2_ray.generator.step import fit, level_losses, parameter_groups
from catid2_ray.generator.vocabulary import load_tokenizer, marks, starts_word, tokenize
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.t5_decoder import T5Decoder
from catid2_ray.retrieval.trie import Trie
from tests.oracles.generators import brute_force
from tests.text_models import save_bert

SPACE = DocidSpace((4, 3, 5))
TEXTS = ["steel hinge", "brass hinges 10 ft", "oak doors", "copper pipe", "oak", "steel hinge"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def build(folder, **changes):
    settings = {"width": 16, "layers": 2, "heads": 2, "feed_forward": 24, "dropout": 0.1, "seed": 1}
    return encoder_decoder(folder, codes_per_level=SPACE.codes_per_level, **(settings | changes))


def rows(folder, seed=0):
    rng = np.random.default_rng(seed)
    ids_NT = tokenize(load_tokenizer(folder, kind="encoder_decoder"), TEXTS, length=8)
    return ids_NT, np.stack([rng.integers(0, k, len(TEXTS)) for k in SPACE.codes_per_level], 1)


def examples(folder, **settings):
    ids_NT, codes_NL = rows(folder)
    tokenizer = load_tokenizer(folder, kind="encoder_decoder")
    pad, special = marks(tokenizer)
    return Examples(
        {"query": ids_NT[:3], "title": ids_NT}, {"query": codes_NL[:3], "title": codes_NL},
        starts_word_V=starts_word(tokenizer), pad=pad, special=special, **settings,
    )  # fmt: skip


def test_a_frozen_encoder_stays_as_it_is_and_a_tuned_one_learns(folder):
    with pytest.raises(EncoderError, match="has <pad>=0 and </s>=None, expected 0 and 1"):
        load_tokenizer(folder)
    with pytest.raises(RecipeError, match="does not divide by 3 heads"):
        build(folder, heads=3)
    with pytest.raises(EncoderError, match="no text encoder could be loaded from 'absent'"):
        build("absent")
    for frozen in (True, False):
        model = build(folder, frozen=frozen)
        before = model.encoder.digest()
        fit(model, examples(folder), space=SPACE, steps=2, batch=4, learning_rate=0.01)
        assert (model.encoder.digest() == before) == frozen
        assert model.train().encoder.text.training != frozen and model.encoder.norm.training
        names = {id(weight): name for name, weight in model.named_parameters()}
        listed = [names[id(w)] for group in parameter_groups(model, weight_decay=0.1) for w in group["params"]]
        assert any("encoder.text" in name for name in listed) != frozen and "encoder.projection.weight" in listed
        assert len(model.lm_head.weight) == 1 + sum(SPACE.codes_per_level)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_batches_are_single_queries_and_a_wide_beam_is_brute_force(folder, tied):
    model = build(folder, tied=tied).eval()
    ids_NT, _ = rows(folder)
    docids = np.stack(np.unravel_index(np.random.default_rng(1).permutation(60)[:12], (4, 3, 5)), 1)
    trie = Trie.build(docids, codes_per_level=SPACE.codes_per_level)
    found = constrained_beam_search(model, trie, ids_NT, ids_NT != 0, beam_width=60, top_k=12)
    for query, ids in enumerate(ids_NT[:3]):
        expected = brute_force(model, docids, ids[ids != 0], space=SPACE)
        assert found.docid_BKL[query].tolist() == [list(docid) for _, docid in expected]
        np.testing.assert_allclose(found.logp_BK[query], [logp for logp, _ in expected], rtol=1e-6, atol=1e-5)
    ids_NT[1, 2] = 15
    with pytest.raises(InputError, match="token 2 of query 1 is 15, the model knows 0 to 14"):
        constrained_beam_search(model, trie, ids_NT, ids_NT != 0, beam_width=60, top_k=12)


def test_8_bit_copies_of_encoder_and_decoder_find_nearly_the_same_scores(folder):
    model = build(folder).eval()
    ids_NT, codes_NL = rows(folder)
    trie = Trie.build(np.unique(codes_NL, axis=0), codes_per_level=SPACE.codes_per_level)
    plain, small = (
        constrained_beam_search(
            T5Decoder(model, codes_per_level=SPACE.codes_per_level, weights=weights), trie, ids_NT, ids_NT != 0,
            beam_width=60, top_k=trie.rows,
        )
        for weights in ("float32", "int8")
    )  # fmt: skip
    for query in range(len(ids_NT)):
        full, eight = (
            {tuple(docid): float(logp) for docid, logp in zip(found.docid_BKL[query].tolist(), found.logp_BK[query])}
            for found in (plain, small)
        )
        assert eight.keys() == full.keys() and eight != full
        assert eight == pytest.approx(full, abs=0.3)


def test_the_loss_is_the_mean_over_single_rows_with_ids_and_with_states(folder, tmp_path):
    model = build(folder).eval()
    ids_NT, codes_NL = rows(folder)
    cache = StateCache.build(model.encoder, ids_NT, tmp_path, batch=2)
    ids, codes = torch.from_numpy(ids_NT).long(), torch.from_numpy(codes_NL)
    single = [
        level_losses(model, ids[row : row + 1, : int((ids[row] != 0).sum())], codes[row : row + 1], space=SPACE)
        for row in range(len(ids))
    ]
    expected_L = torch.stack(single).mean(0)
    for groups in (1, 3):
        torch.testing.assert_close(level_losses(model, ids, codes, space=SPACE, most_groups=groups), expected_L)
        cached_L = level_losses(model, cache.take(np.arange(6)), codes, space=SPACE, most_groups=groups)
        torch.testing.assert_close(cached_L, expected_L, atol=2e-3, rtol=2e-3)


def test_the_dense_vector_of_the_same_pass_is_the_catalogues(folder):
    model = build(folder).eval()
    ids_NT, _ = rows(folder)
    mask_NT = torch.from_numpy(ids_NT != 0)
    memory = T5Decoder(model, codes_per_level=SPACE.codes_per_level).encode(torch.from_numpy(ids_NT).long(), mask_NT)
    expected_NE = HuggingFaceEncoder(folder, batch=4, tokens=8).encode(TEXTS)
    np.testing.assert_allclose(memory.dense_BE.detach(), expected_NE, atol=1e-6)
    half = dense(model.encoder.token_states(torch.from_numpy(ids_NT).long(), mask_NT).half(), mask_NT)
    np.testing.assert_allclose(half.detach(), expected_NE, atol=1e-3)


def test_a_cache_holds_every_texts_states_once_and_drops_tokens(folder, tmp_path):
    model, (ids_NT, _) = build(folder).eval(), rows(folder)
    seen = []
    cache = StateCache.build(model.encoder, ids_NT, tmp_path, batch=2, on_progress=lambda *done: seen.append(done))
    assert seen == [(2, 5), (3, 5), (5, 5)] and len(cache) == 6, "one pass holds texts of at most 4 tokens or of 5 to 8"
    assert len(cache.states) == sum((ids_NT[:5] != 0).sum(1))
    picked = np.array([5, 1, 4])
    states_BTE, mask_BT = cache.take(picked)
    for row, states_TE, mask_T in zip(picked, states_BTE, mask_BT):
        ids_T = torch.from_numpy(ids_NT[row][ids_NT[row] != 0]).long()[None]
        expected_TE = model.encoder.token_states(ids_T, torch.ones_like(ids_T))[0]
        torch.testing.assert_close(states_TE[mask_T].float(), expected_TE, atol=2e-3, rtol=2e-3)
    keep_BT = (ids_NT[picked] != 0) & (np.arange(8) != 1)
    thin_BTE, thin_mask_BT = cache.take(picked, keep_BT)
    for row in range(3):
        real_TE = states_BTE[row][mask_BT[row]]
        assert torch.equal(thin_BTE[row][thin_mask_BT[row]], torch.cat((real_TE[:1], real_TE[2:])))
    with pytest.raises(InputError, match="keep_BT keeps tokens that are padding"):
        cache.take(picked, np.ones_like(keep_BT))


def test_a_cache_is_opened_again_and_never_mistaken(folder, tmp_path):
    model, (ids_NT, _) = build(folder).eval(), rows(folder)
    StateCache.build(model.encoder, ids_NT, tmp_path)

    def never(done, all):
        raise AssertionError("a complete cache was built again")

    again = StateCache.build(model.encoder, ids_NT, tmp_path, on_progress=never)
    with pytest.raises(InputError, match=r"another encoder or of other texts \(6 rows, expected 5\)"):
        StateCache.build(model.encoder, ids_NT[:5], tmp_path)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(ArtifactError, match="holds no complete cache of token states"):
        StateCache(tmp_path)
    built = StateCache.build(model.encoder, ids_NT, tmp_path)
    assert np.array_equal(built.states, again.states) and "width" in json.loads((tmp_path / "cache.json").read_text())
    with pytest.raises(InputError, match="must be padded at their end with 0"):
        StateCache.build(model.encoder, ids_NT[:, ::-1], tmp_path / "left")


def rows_of(texts: int, tokens: int, *, seed: int) -> np.ndarray:
    """Random texts of all lengths from 1 to `tokens`, some of them twice, padded with 0."""
    generator = np.random.default_rng(seed)
    ids_NT = generator.integers(1, 15, (texts, tokens), np.int32)
    ids_NT[np.arange(tokens) >= generator.integers(1, tokens + 1, texts)[:, None]] = 0
    return np.concatenate((ids_NT, ids_NT[: texts // 5]))


FILES = ("states.f16", "ids.npy", "hash.npy", "start.npy", "text.npy", "cache.json")


@pytest.mark.parametrize("change", ["one new text", "texts gone", "many of both", "the same texts in another order"])
def test_states_of_known_texts_are_copied_and_no_bit_differs(change, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "_COPIED", 7)
    encoder, had, more = build(folder).eval().encoder, rows_of(60, 13, seed=1), rows_of(40, 13, seed=2)
    ids_NT = {
        "one new text": np.concatenate((had, more[:1])),
        "texts gone": had[10:50],
        "many of both": np.concatenate((more, had[20:55])),
        "the same texts in another order": had[::-1],
    }[change]
    known = StateCache.build(encoder, had, tmp_path / "known", batch=8)
    StateCache.build(encoder, ids_NT, tmp_path / "fresh", batch=8)
    seen, asked, run = [], [], encoder.token_states
    monkeypatch.setattr(
        encoder, "token_states", lambda ids, mask: asked.extend(map(tuple, (ids * mask).tolist())) or run(ids, mask)
    )
    StateCache.build(encoder, ids_NT, tmp_path / "new", batch=8, known=known, on_progress=lambda *at: seen.append(at))
    for name in FILES:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name
    new = {tuple(ids[ids != 0]) for ids in ids_NT} - {tuple(ids[ids != 0]) for ids in had}
    assert {tuple(token for token in ids if token) for ids in asked} == new
    different = len(np.unique(ids_NT, axis=0))
    assert seen[0] == (different - len(new), different)
    assert seen[-1] == (different, different)


def test_states_that_may_be_others_are_not_copied(folder, tmp_path):
    encoder, had = build(folder).eval().encoder, rows_of(20, 8, seed=1)
    known = StateCache.build(encoder, had, tmp_path / "known", batch=8)

    def copied(name, ids_NT, known, batch=8) -> bool:
        seen = []
        settings = {"batch": batch, "known": known, "on_progress": lambda *at: seen.append(at)}
        StateCache.build(encoder, ids_NT, tmp_path / name, **settings)
        return seen[0][0] > batch  # more than one pass gives

    assert copied("same", had[:-1], known)
    assert not copied("batch", had[:-1], known, batch=4)
    assert not copied("longest", np.pad(had, ((0, 0), (0, 2))), known)
    # Ids are compared: an equal hash alone, were there ever one, brings no states of another text.
    np.save(tmp_path / "known" / "ids.npy", np.asarray(known.ids) % 14 + 1)
    assert not copied("hash", had[:-1], StateCache(tmp_path / "known"))


def test_the_marks_of_a_text_never_fall_with_its_words(folder):
    tokenizer = load_tokenizer(folder, kind="encoder_decoder")
    ids_NT, _ = rows(folder)
    pad, special = marks(tokenizer)
    assert (pad, special) == (0, (2, 3))
    kept_NT = kept_words(
        np.repeat(ids_NT, 50, 0), starts_word(tokenizer), keep=0.4, generator=np.random.default_rng(0), special=special
    ).reshape(len(ids_NT), 50, -1)
    for ids_T, kept_DT in zip(ids_NT, kept_NT):
        assert kept_DT[:, np.isin(ids_T, special)].all() and not kept_DT[:, ids_T == 0].any()
        assert (kept_DT[:, ids_T > 3].sum(1) >= 1).all()
        word_end = np.flatnonzero(ids_T == 4 + 8)  # "##s" falls and stays with its word
        assert (kept_DT[:, word_end] == kept_DT[:, word_end - 1]).all()
    assert 0.2 < kept_NT[1][:, 1].mean() < 0.8


def test_cached_examples_are_the_same_rows_in_the_same_steps(folder, tmp_path):
    model = build(folder, dropout=0.0)
    plain = examples(folder, drop_share=0.5, keep=0.5)
    cached = plain.with_states(model.encoder, tmp_path)
    for step in range(4):
        ids, batch = (rows.batch(seed=3, step=step, batch=4) for rows in (plain, cached))
        assert np.array_equal(batch.codes_BL, ids.codes_BL)
        assert np.array_equal(batch.texts.mask_BT.sum(1), (ids.texts != 0).sum(1))
        halves = [cached.batch(seed=3, step=step, batch=4, rank=rank, workers=2) for rank in (0, 1)]
        for row in range(4):
            half = halves[row // 2].texts
            real, mine = batch.texts.mask_BT[row], half.mask_BT[row % 2]
            assert torch.equal(batch.texts.states_BTE[row][real], half.states_BTE[row % 2][mine])
    whole = examples(folder, drop_share=0.0)
    run = {"space": SPACE, "steps": 6, "batch": 6, "learning_rate": 0.01}
    twin = build(folder, dropout=0.0)
    slow = fit(twin, whole, **run).losses
    fast = fit(model, whole.with_states(model.encoder, tmp_path), **run).losses
    np.testing.assert_allclose(fast, slow, rtol=5e-3)
    assert isinstance(batch.inputs(torch.device("cpu")), TokenStates)
