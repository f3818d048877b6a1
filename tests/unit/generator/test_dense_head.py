"""Heads that read the query's vector: one that begins as dense retrieval, and a perceptron beside the decoder. Training, search
and stored models give the same scores."""

import numpy as np
import pytest
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.eg_grpo import group_logps
from catid2_ray.generator.encoder_decoder import encoder_decoder
from catid2_ray.generator.logits import docid_logits, taught_logits, with_head
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.saved import load_generator, save_generator
from catid2_ray.generator.states import TokenStates
from catid2_ray.generator.step import docid_loss
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.trie import Trie
from tests.text_models import bert_tokenizer, save_bert

SPACE = DocidSpace((4, 3, 5))
SIZES = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "feed_forward": 24,
    "dropout": 0.0,
    "codes_per_level": SPACE.codes_per_level,
}
IDS_BT = torch.tensor([[2, 5, 6, 3, 0], [2, 9, 3, 0, 0], [2, 4, 7, 8, 3]])
CODES_BL = torch.tensor([[0, 2, 4], [3, 1, 0], [2, 0, 2]])


@pytest.fixture
def begun(tmp_path):
    return begun_with("dense", tmp_path)


@pytest.fixture(params=["dense", "experts"])
def either(request, tmp_path):
    return begun_with(request.param, tmp_path)


def begun_with(head: str, tmp_path):
    """(model, codebooks, W): the last level has no codewords, as that of a suffix."""
    model = encoder_decoder(save_bert(tmp_path / "bert"), **SIZES).eval()
    width = model.encoder.text.config.hidden_size
    draw = np.random.default_rng(0)
    books = [draw.normal(size=(k, width)).astype(np.float32) for k in SPACE.codes_per_level[:2]] + [None]
    query_EE = np.eye(width, dtype=np.float32) + draw.normal(scale=0.1, size=(width, width)).astype(np.float32)
    getattr(with_head(model, head, width=12, share=0.3, seed=4), head).begin(books, query_EE)
    return model, books, query_EE


def trained(model) -> torch.nn.Module:
    """As after training: its learned part is no longer 0."""
    if not hasattr(model, "dense"):
        return model
    with torch.no_grad():
        model.dense.mix.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.dense.scale_L.mul_(torch.tensor([0.5, 0.7, 1.0]))
    return model


@torch.no_grad()
def test_before_the_first_step_it_is_dense_retrieval(begun):
    model, books, query_EE = begun
    logits = docid_logits(model, IDS_BT, CODES_BL, space=SPACE)
    for row in range(3):
        dense_E = model.encoder(IDS_BT, IDS_BT != 0).dense_BE[row].double().numpy()
        query_E = query_EE.astype(float) @ dense_E
        query_E /= np.linalg.norm(query_E)
        for level in range(2):
            np.testing.assert_allclose(
                logits[level][row], 20 * books[level].astype(float) @ query_E, rtol=1e-4, atol=1e-4
            )
    assert not logits[2].any()


@torch.no_grad()
def test_teacher_forcing_is_the_search_step_by_step(either):
    model = trained(either[0])
    decoder = decoder_for(model, codes_per_level=SPACE.codes_per_level)
    memory, cache = decoder.encode(IDS_BT, IDS_BT != 0), None
    taught = docid_logits(model, IDS_BT, CODES_BL, space=SPACE)
    parent_B1 = code_B1 = torch.zeros(3, 1, dtype=torch.long)
    for level in range(3):
        hidden, cache = decoder.decode_step(level, memory, cache, parent_B1, code_B1)
        step_BK = decoder.level_logits(level, hidden, CODES_BL[:, None, :level])[:, 0]
        torch.testing.assert_close(step_BK, taught[level], atol=1e-5, rtol=1e-5)
        code_B1 = CODES_BL[:, level : level + 1]


@torch.no_grad()
def test_a_wide_beam_ranks_all_ids_by_their_taught_scores(either):
    model = trained(either[0])
    docids = np.stack(np.unravel_index(np.arange(60), SPACE.codes_per_level), 1)
    trie = Trie.build(docids, codes_per_level=SPACE.codes_per_level)
    found = constrained_beam_search(model, trie, IDS_BT, IDS_BT != 0, beam_width=60, top_k=60)
    logps = group_logps(model, IDS_BT, torch.from_numpy(docids)[None].expand(3, -1, -1), space=SPACE)
    for query in range(3):
        logp_N = sum(
            logp[query].gather(1, torch.from_numpy(docids[:, level])[:, None])[:, 0] for level, logp in enumerate(logps)
        )
        torch.testing.assert_close(found.logp_BK[query], logp_N.sort(descending=True).values, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="search with normalize='level'"):
        constrained_beam_search(model, trie, IDS_BT, IDS_BT != 0, beam_width=2, top_k=2, normalize="vocabulary")


def test_a_step_moves_the_learned_part_and_neither_codewords_nor_the_query_matrix(begun):
    model = begun[0]
    with torch.no_grad():
        states = TokenStates(model.encoder.token_states(IDS_BT, IDS_BT != 0), IDS_BT != 0)
    loss = docid_loss(model, states, CODES_BL, space=SPACE)
    loss.backward()
    assert model.dense.mix.weight.grad.abs().sum() > 0 and model.dense.scale_L.grad[:2].abs().min() > 0
    named = {name for name, _ in model.named_parameters()}
    assert not any("codeword" in name or "query_EE" in name for name in named)
    assert torch.equal(loss, docid_loss(model, IDS_BT, CODES_BL, space=SPACE))


@torch.no_grad()
def test_what_was_saved_scores_alike(either, tmp_path):
    model = trained(either[0])
    save_generator(model, bert_tokenizer(), tmp_path / "saved")
    again, _ = load_generator(tmp_path / "saved")
    for before, after in zip(*(docid_logits(m, IDS_BT, CODES_BL, space=SPACE) for m in (model, again))):
        assert torch.equal(before, after)


def test_what_cannot_begin_is_refused(begun):
    model = begun[0]
    with pytest.raises(RecipeError, match="found widths \\[10, None, None\\]: set quantizer.encoder to residual"):
        model.dense.begin([np.zeros((4, 10), np.float32), None, None], None)
    t5 = small_t5(vocabulary=15, **SIZES)
    for head in ("dense", "experts"):
        with pytest.raises(RecipeError, match=f"head '{head}' needs a text encoder"):
            with_head(t5, head)


@torch.no_grad()
def test_experts_are_a_perceptron_by_hand_and_the_plain_decoder(tmp_path):
    model, books, query_EE = begun_with("experts", tmp_path)
    taught = taught_logits(model, IDS_BT, CODES_BL, space=SPACE)
    joined = docid_logits(model, IDS_BT, CODES_BL, space=SPACE)
    dense_BE, head = model.encoder(IDS_BT, IDS_BT != 0).dense_BE, model.experts
    del model.experts
    plain = docid_logits(model, IDS_BT, CODES_BL, space=SPACE)
    for row in range(3):
        query_E = torch.from_numpy(query_EE) @ dense_BE[row]
        query_E, sum_E = query_E / query_E.norm(), torch.zeros(len(query_E))
        for level in range(3):
            hidden_H = head.of_query[level](query_E) + (head.of_prefix[level - 1](sum_E) if level else 0)
            own_K = head.to_codes[level](torch.nn.functional.gelu(hidden_H))
            torch.testing.assert_close(taught[1][level][row], own_K, atol=1e-5, rtol=1e-5)
            both = 0.7 * plain[level][row].log_softmax(0) + 0.3 * own_K.log_softmax(0)
            torch.testing.assert_close(joined[level][row], both, atol=1e-5, rtol=1e-5)
            if level < 2:
                sum_E = sum_E + torch.from_numpy(books[level][CODES_BL[row, level]])
    assert all(torch.equal(own, other) for own, other in zip(taught[0], plain))


def test_each_expert_is_taught_by_its_own_loss(tmp_path):
    model, *_ = begun_with("experts", tmp_path)
    judged = docid_loss(model, IDS_BT, CODES_BL, space=SPACE)
    model.train()
    model.encoder.eval()
    loss = docid_loss(model, IDS_BT, CODES_BL, space=SPACE)
    apart = [
        sum(torch.nn.functional.cross_entropy(scores_BK, CODES_BL[:, level]) for level, scores_BK in enumerate(scores))
        for scores in taught_logits(model, IDS_BT, CODES_BL, space=SPACE)
    ]
    torch.testing.assert_close(loss, sum(apart) / 2)
    assert judged < 0.7 * apart[0] + 0.3 * apart[1], (
        "a geometric mean, made to sum to 1, is better than its parts' mean"
    )
    loss.backward()
    alone = torch.autograd.grad(apart[1] / 2, model.experts.of_query[0].weight)[0]
    torch.testing.assert_close(model.experts.of_query[0].weight.grad, alone)
    assert not any("codeword" in name or "query_EE" in name for name, _ in model.named_parameters())
