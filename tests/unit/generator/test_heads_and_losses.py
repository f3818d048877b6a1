"""Prefix-aware heads give search and training the same scores; smoothing, consistency and first rows do as they say."""

import functools

import numpy as np
import pytest
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError
from catid2_ray.generator.encoder_decoder import encoder_decoder
from catid2_ray.generator.logits import docid_logits, with_head
from catid2_ray.generator.model import init_docid_rows, small_t5
from catid2_ray.generator.step import DocidLoss, cross_entropy, divergence, level_losses, near_codes
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.decoders import decoder_for
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import continuations
from tests.oracles import generators as oracle
from tests.oracles.beam import over_children
from tests.text_models import save_bert

SPACE = DocidSpace((4, 3, 5))
SIZES = {"width": 16, "heads": 2, "feed_forward": 24, "dropout": 0.1, "codes_per_level": SPACE.codes_per_level}
IDS_BT = torch.tensor([[2, 5, 6, 3, 0], [2, 9, 3, 0, 0], [2, 4, 7, 8, 3]])
CODES_BL = torch.tensor([[0, 2, 4], [3, 1, 0], [2, 0, 2]])


@pytest.fixture(scope="module", params=["t5", "encoder_decoder"])
def model(request, tmp_path_factory):
    if request.param == "t5":
        made = small_t5(vocabulary=15, layers=1, **SIZES)
    else:
        made = encoder_decoder(save_bert(tmp_path_factory.mktemp("bert")), layers=1, **SIZES)
    return made.eval()


def adapted(model):
    """A head as after training: its last matrix is no longer 0."""
    with_head(model, "pawa", rank=6, seed=1)
    with torch.no_grad():
        model.pawa.up.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    return model


def test_a_new_head_is_the_plain_one(model):
    plain = docid_logits(model, IDS_BT, CODES_BL, space=SPACE)
    with_head(model, "pawa", rank=6)
    for level in range(3):
        assert torch.equal(docid_logits(model, IDS_BT, CODES_BL, space=SPACE)[level], plain[level])
    adapted(model)
    assert not torch.allclose(docid_logits(model, IDS_BT, CODES_BL, space=SPACE)[2], plain[2], atol=1e-2)
    with pytest.raises(RecipeError, match="head must be one of plain, pawa, dense, experts, found 'wide'"):
        with_head(model, "wide")
    with pytest.raises(RecipeError, match="a causal model has head 'plain'"):
        with_head(torch.nn.Linear(1, 1), "pawa")


def test_the_prefix_changes_what_a_code_is_worth(model):
    adapted(model)
    first = docid_logits(model, IDS_BT[:1], torch.tensor([[0, 2, 4]]), space=SPACE)
    hidden_D, table_VD = torch.ones(16), model.shared.weight
    rows = [len(table_VD) - sum(SPACE.codes_per_level[level:]) for level in range(3)]
    one, other = (model.pawa(1, hidden_D, torch.tensor([code]), table_VD, rows) for code in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3) and len(first) == 3


@torch.no_grad()
def test_teacher_forcing_is_the_search_step_by_step(model):
    decoder = decoder_for(adapted(model), codes_per_level=SPACE.codes_per_level)
    memory, cache = decoder.encode(IDS_BT, IDS_BT != 0), None
    taught = docid_logits(model, IDS_BT, CODES_BL, space=SPACE)
    parent_B1 = torch.zeros(3, 1, dtype=torch.long)
    code_B1 = parent_B1
    for level in range(3):
        hidden_B1D, cache = decoder.decode_step(level, memory, cache, parent_B1, code_B1)
        step_BK = decoder.level_logits(level, hidden_B1D, CODES_BL[:, None, :level])[:, 0]
        torch.testing.assert_close(step_BK, taught[level], atol=1e-5, rtol=1e-5)
        code_B1 = CODES_BL[:, level : level + 1]


def test_a_wide_beam_ranks_all_ids_by_their_taught_scores(model):
    docids = np.stack(np.unravel_index(np.arange(60), (4, 3, 5)), 1)
    trie = Trie.build(docids, codes_per_level=SPACE.codes_per_level)
    found = constrained_beam_search(adapted(model), trie, IDS_BT, IDS_BT != 0, beam_width=60, top_k=60)
    for query in range(3):
        logits = docid_logits(model, IDS_BT[query : query + 1].expand(60, -1), torch.from_numpy(docids), space=SPACE)
        logp_N = sum(
            -cross_entropy(logits[level], torch.from_numpy(docids[:, level]), smoothing=0.0) for level in range(3)
        )
        order_N = logp_N.argsort(descending=True)
        assert np.array_equal(found.docid_BKL[query], docids[order_N])
        torch.testing.assert_close(found.logp_BK[query], logp_N[order_N].detach(), atol=1e-5, rtol=1e-5)


def test_two_passes_are_held_together(model):
    first, second = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = []
    for a, b in zip(first.double().softmax(-1).tolist(), second.double().softmax(-1).tolist()):
        forward = sum(p * np.log(p / q) for p, q in zip(a, b))
        expected.append(0.5 * forward + 0.5 * sum(q * np.log(q / p) for p, q in zip(a, b)))
    np.testing.assert_allclose(divergence(first, second), expected, rtol=1e-5)
    settings = {"space": SPACE, "consistency": 5.0}
    plain_L = level_losses(model, IDS_BT, CODES_BL, space=SPACE)
    assert torch.equal(level_losses(model, IDS_BT, CODES_BL, **settings), plain_L)
    model.train()
    torch.manual_seed(0)
    passes = [docid_logits(model, IDS_BT, CODES_BL, space=SPACE) for _ in range(2)]
    torch.manual_seed(0)
    found_L = level_losses(model, IDS_BT, CODES_BL, **settings)
    for level in range(3):
        both = [cross_entropy(logits[level], CODES_BL[:, level], smoothing=0.0) for logits in passes]
        expected = (sum(both) / 2 + 5.0 * divergence(passes[0][level], passes[1][level])).mean()
        torch.testing.assert_close(found_L[level], expected)
    model.eval()


def test_smoothing_over_near_codes_is_the_loop(model):
    books = [np.random.default_rng(level).normal(size=(k, 6)) for level, k in enumerate(SPACE.codes_per_level)]
    near = near_codes([*books[:2], None], temperature=0.4)
    assert near[2] is None
    for level in range(2):
        np.testing.assert_allclose(near[level], oracle.near_codes(books[level], 0.4), rtol=1e-5)
        assert (near[level].argmax(1) == torch.arange(len(near[level]))).all()
    scaled = near_codes([100 * books[0]], temperature=0.4)[0]
    torch.testing.assert_close(scaled, near[0])
    logits = docid_logits(model, IDS_BT, CODES_BL, space=SPACE)
    expected_L = []
    for level in range(3):
        k, total = SPACE.codes_per_level[level], 0.0
        for logits_K, code in zip(logits[level], CODES_BL[:, level].tolist()):
            logp = logits_K.double().log_softmax(0).tolist()
            spread = [1 / k] * k if near[level] is None else near[level][code].tolist()
            total -= sum((0.7 * (c == code) + 0.3 * spread[c]) * logp[c] for c in range(k)) / 3
        expected_L.append(total)
    settings = {"label_smoothing": 0.3, "near": near}
    found_L = level_losses(model, IDS_BT, CODES_BL, space=SPACE, **settings)
    np.testing.assert_allclose(found_L.detach(), expected_L, rtol=1e-5)
    module = DocidLoss(model, space=SPACE, level_weights=(2, 1, 1), **settings)
    torch.testing.assert_close(module(IDS_BT, CODES_BL), (found_L * torch.tensor([2, 1, 1])).sum() * 3 / 4)
    assert not any("near" in name for name in module.state_dict())
    with pytest.raises(RecipeError, match="must be positive, found 0"):
        near_codes(books, temperature=0)


@pytest.mark.parametrize("width, codewords", [(64, 8), (16, 24)])
def test_near_codewords_get_near_rows(width, codewords):
    space = DocidSpace((30, 20, 5))
    made = small_t5(
        vocabulary=50,
        width=width,
        layers=1,
        heads=2,
        feed_forward=8,
        dropout=0.0,
        codes_per_level=space.codes_per_level,
    )
    rng = np.random.default_rng(0)
    books = [rng.normal(size=(30, codewords)), 0.01 * rng.normal(size=(20, codewords)), None]
    text = made.shared.weight[:50].clone()
    init_docid_rows(made, books, space=space, seed=1)
    assert torch.equal(made.shared.weight[:50], text)
    rows = made.shared.weight[50:].detach().split([30, 20, 5])
    for book, row_KD in zip(books[:2], rows):
        a, b = (torch.pdist(torch.as_tensor(x).double()) for x in (book, row_KD))
        assert np.corrcoef(a, b)[0, 1] > (0.9999 if codewords <= width else 0.5)
        torch.testing.assert_close((row_KD - text.mean(0)).std(), text.std(0).square().mean().sqrt(), rtol=1e-3, atol=0)
        torch.testing.assert_close(row_KD.mean(0), text.mean(0), rtol=1e-3, atol=1e-4)
    assert (rows[2] - text.mean(0)).std() < 0.3 * text.std()
    again = small_t5(
        vocabulary=50,
        width=width,
        layers=1,
        heads=2,
        feed_forward=8,
        dropout=0.0,
        codes_per_level=space.codes_per_level,
    )
    init_docid_rows(again, books, space=space, seed=1)
    assert torch.equal(again.shared.weight, made.shared.weight)
    with pytest.raises(RecipeError, match="level 1 has 30 codes but a codebook of 7 codewords"):
        init_docid_rows(made, [rng.normal(size=(7, 4))], space=space)


def test_a_loss_over_the_trie_is_the_slow_one_and_skips_what_is_decided(model):
    ids = np.array([[0, 2, 4], [0, 2, 1], [0, 1, 0], [3, 1, 0], [2, 0, 2], [2, 0, 3]])
    trie = Trie.build(ids, codes_per_level=SPACE.codes_per_level)
    constrained_beam_search(
        model, trie, IDS_BT, IDS_BT != 0, beam_width=2, top_k=2
    )  # a validation before it is trained on
    settings = {"space": SPACE, "continuations": functools.partial(continuations, trie)}
    logits, codes = docid_logits(model, IDS_BT, CODES_BL, space=SPACE), CODES_BL.tolist()
    expected_L = [
        -sum(over_children(logits[level][row].tolist(), codes[row][:level], ids.tolist())[codes[row][level]] for row in range(3))
        / 3
        for level in range(3)
    ]  # fmt: skip
    np.testing.assert_allclose(level_losses(model, IDS_BT, CODES_BL, **settings).detach(), expected_L, rtol=1e-5)
    weight_B = torch.tensor([2.0, 0.0, 1.0])
    weighed = DocidLoss(model, **settings)(IDS_BT, CODES_BL, weight_B)
    alone = [level_losses(model, IDS_BT[row : row + 1], CODES_BL[row : row + 1], **settings).sum() for row in range(3)]
    torch.testing.assert_close(weighed, (2 * alone[0] + alone[2]) / 3)
    # The second row's last two codes have no rival: they cost nothing and move nothing.
    model.zero_grad()
    loss_L = level_losses(model, IDS_BT[1:2], CODES_BL[1:2], **settings)
    assert loss_L[0] > 0 and loss_L[1:].tolist() == [0, 0]
    loss_L[1:].sum().backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
    model.zero_grad()
    with_passes = level_losses(model.train(), IDS_BT, CODES_BL, consistency=0.5, **settings)
    assert with_passes.isfinite().all() and with_passes.sum() < 1e3
    model.eval()
