"""A causal model behind the beam search: equal to brute force and to `generate`, whatever side prompts are padded on."""

import numpy as np
import pytest
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, InputError, RecipeError
from catid2_ray.generator.batches import Examples
from catid2_ray.generator.causal import CausalGenerator
from catid2_ray.generator.model import pretrained_causal
from catid2_ray.generator.step import fit, level_losses
from catid2_ray.generator.vocabulary import load_tokenizer, marks, tokenize, with_docid_tokens
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.trie import Trie
from tests.oracles.generators import brute_force, causal_next_logits, generate_causal
from tests.text_models import save_bert, save_qwen, word_tokenizer

SPACE = DocidSpace((4, 3, 5))
TEXTS = ["steel hinge", "brass pipe 10 ft", "oak"]
DOCIDS = np.stack(np.unravel_index(np.random.default_rng(1).permutation(60)[:14], (4, 3, 5)), 1)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def parts(request, tmp_path_factory):
    folder = save_qwen(tmp_path_factory.mktemp("qwen"), tied=request.param)
    word_tokenizer().save_pretrained(folder + "-words")
    tokenizer = with_docid_tokens(load_tokenizer(folder + "-words", kind="causal"), SPACE)
    model = pretrained_causal(folder, tokenizer=tokenizer, space=SPACE).eval()
    with torch.no_grad():
        rows = torch.randn(12, 24, generator=torch.Generator().manual_seed(2)) * 0.3
        model.shared.weight[-12:] = rows
        model.lm_head.weight[-12:] = rows.flip(0) if not request.param else rows
    return model, tokenizer


def test_new_rows_follow_the_words_and_padding_is_no_word(parts):
    model, tokenizer = parts
    assert len(model.lm_head.weight) == len(tokenizer) == 12 + 12 and marks(tokenizer).pad == 11
    ids_NT = tokenize(tokenizer, TEXTS, length=5)
    assert ids_NT[2].tolist() == [5, 11, 11, 11, 11] and ids_NT[0, 0] == 0
    assert (model.lm_head.weight is model.shared.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_are_single_queries_and_a_wide_beam_is_brute_force(parts, side):
    model, tokenizer = parts
    ids_NT = tokenize(tokenizer, TEXTS, length=6)
    real = [ids[ids != 11] for ids in ids_NT]
    if side == "left":
        ids_NT = np.stack([np.concatenate((np.full(6 - len(ids), 11), ids)) for ids in real])
    trie = Trie.build(DOCIDS, codes_per_level=SPACE.codes_per_level)
    found = constrained_beam_search(model, trie, ids_NT, ids_NT != 11, beam_width=60, top_k=14)
    for query, ids in enumerate(real):
        expected = brute_force(model, DOCIDS, ids, space=SPACE, logits=causal_next_logits)
        assert found.docid_BKL[query].tolist() == [list(docid) for _, docid in expected]
        np.testing.assert_allclose(found.logp_BK[query], [logp for logp, _ in expected], atol=1e-5)


def test_a_narrow_beam_is_that_of_generate(parts):
    model, tokenizer = parts
    ids_NT = tokenize(tokenizer, TEXTS, length=4)
    trie = Trie.build(DOCIDS, codes_per_level=SPACE.codes_per_level)
    found = constrained_beam_search(model, trie, ids_NT, ids_NT != 11, beam_width=3, top_k=3, normalize="vocabulary")
    for query, ids in enumerate(ids_NT):
        expected = generate_causal(model, DOCIDS, ids[ids != 11], space=SPACE, beams=3)
        assert found.docid_BKL[query].tolist() == [list(docid) for _, docid in expected]
        np.testing.assert_allclose(found.logp_BK[query], [logp for logp, _ in expected], atol=1e-5)


def test_the_loss_is_the_models_own_log_probability(parts):
    model, tokenizer = parts
    ids_NT, codes_NL = tokenize(tokenizer, TEXTS, length=6), DOCIDS[:3]
    expected_NL = [
        [
            -float(causal_next_logits(model, ids[ids != 11], codes[:i], space=SPACE).log_softmax(0)[codes[i]])
            for i in range(3)
        ]
        for ids, codes in zip(ids_NT, codes_NL)
    ]
    for ids in (ids_NT, ids_NT[:, ::-1].copy()):  # padded on the left, and the words the other way round
        ids_BT, codes_BL = torch.from_numpy(ids).long(), torch.from_numpy(codes_NL)
        single = [level_losses(model, ids_BT[[row]], codes_BL[[row]], space=SPACE) for row in range(3)]
        found_L = level_losses(model, torch.from_numpy(ids).long(), torch.from_numpy(codes_NL), space=SPACE)
        torch.testing.assert_close(found_L, torch.stack(single).mean(0))
    found_L = level_losses(
        model, torch.from_numpy(ids_NT).long(), torch.from_numpy(codes_NL), space=SPACE, most_groups=2
    )
    np.testing.assert_allclose(found_L.detach(), np.mean(expected_NL, 0), rtol=1e-5)


def test_it_learns_and_what_does_not_fit_is_refused(parts, tmp_path):
    model, tokenizer = parts
    decoder = decoder_for(model, codes_per_level=(4, 3, 5))
    assert decoder_for(decoder, codes_per_level=(4, 3, 5)) is decoder and decoder.vocabulary == 24
    trie, ids_1T = Trie.build(DOCIDS, codes_per_level=SPACE.codes_per_level), np.array([[1, 2]])
    assert constrained_beam_search(decoder, trie, ids_1T, ids_1T > 0, beam_width=9, top_k=4).count_B.tolist() == [4]
    with pytest.raises(InputError, match=r"it has ID levels \[4, 3, 5\], the trie \[4, 3, 6\]"):
        decoder_for(model, codes_per_level=(4, 3, 6))
    with pytest.raises(InputError, match="weights='float32' only, found 'int8'"):
        decoder_for(model, codes_per_level=(4, 3, 5), weights="int8")
    with pytest.raises(EncoderError, match="no causal language model could be loaded from 'absent'"):
        pretrained_causal("absent", tokenizer=tokenizer, space=SPACE)
    model.config.logit_scale = 0.5
    with pytest.raises(RecipeError, match="'qwen2' model sets logit_scale, which the search does not apply"):
        CausalGenerator(model.model, SPACE)
    model.config.logit_scale = None
    with pytest.raises(EncoderError, match="expected 0 and 1 as in every T5"):
        load_tokenizer(save_bert(tmp_path))
    ids_NT = tokenize(tokenizer, TEXTS, length=5)
    examples = Examples({"query": ids_NT}, {"query": DOCIDS[:3]}, pad=11, special=())
    result = fit(model, examples, space=SPACE, steps=25, batch=3, learning_rate=0.01)
    assert np.mean(result.losses[-3:]) < 0.5 * np.mean(result.losses[:2])
