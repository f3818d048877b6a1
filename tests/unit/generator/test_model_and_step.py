"""The model's ID rows are its last ones and survive saving; the loss is the model's own; resuming is exact."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import EncoderError, RecipeError, TrainingError
from catid2_ray.generator.batches import Examples
from catid2_ray.generator.model import pretrained_t5, small_t5
from catid2_ray.generator.step import docid_loss, fit, level_losses
from catid2_ray.generator.vocabulary import load_tokenizer, train_tokenizer, with_docid_tokens
from tests.oracles.beam import step_logp
from tests.text_models import save_mt5

SPACE = DocidSpace((4, 3, 5))
SMALL = {"vocabulary": 30, "width": 16, "layers": 1, "heads": 2, "feed_forward": 24}


def small(**changes):
    return small_t5(**(SMALL | {"dropout": 0.1, "codes_per_level": SPACE.codes_per_level} | changes))


def rows(count=6, seed=0):
    rng = np.random.default_rng(seed)
    ids_BT = rng.integers(3, 30, (count, 7)).astype(np.int32)
    ids_BT[:, -1] = 1
    ids_BT[0, 3:] = (1, 0, 0, 0)
    codes_BL = np.stack([rng.integers(0, k, count) for k in SPACE.codes_per_level], 1)
    return ids_BT, codes_BL


def test_the_vocabulary_is_exact_and_the_seed_decides_the_weights(tmp_path):
    model = small()
    assert model.lm_head.weight.shape[0] == 30 + 12 and model.config.docid_codes_per_level == [4, 3, 5]
    assert torch.equal(model.shared.weight, small().shared.weight)
    assert not torch.equal(model.shared.weight, small(seed=1).shared.weight)
    model.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and again.config.docid_codes_per_level == [4, 3, 5]
    ids_BT, codes_BL = (torch.from_numpy(x).long() for x in rows())
    assert torch.equal(
        docid_loss(model.eval(), ids_BT, codes_BL, space=SPACE), docid_loss(again.eval(), ids_BT, codes_BL, space=SPACE)
    )
    with pytest.raises(RecipeError, match="does not divide by 3 heads"):
        small(heads=3)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_padded_pretrained_vocabulary_is_trimmed_and_extended(tmp_path, scaled):
    tokenizer = train_tokenizer(["steel hinge 10 ft"] * 3, size=64)
    base = len(tokenizer)
    config = T5Config(
        vocab_size=base + 9, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=scaled
    )
    original = T5ForConditionalGeneration(config)
    original.save_pretrained(tmp_path / "plain")
    with pytest.raises(RecipeError, match="call with_docid_tokens first"):
        pretrained_t5(tmp_path / "plain", tokenizer=tokenizer, space=SPACE)
    with_docid_tokens(tokenizer, SPACE)
    model = pretrained_t5(tmp_path / "plain", tokenizer=tokenizer, space=SPACE)
    assert model.shared.weight.shape[0] == model.lm_head.weight.shape[0] == len(tokenizer) == base + 12
    assert model.config.vocab_size == base + 12 and model.config.scale_decoder_outputs == scaled
    assert torch.equal(model.shared.weight[:base], original.shared.weight[:base])
    new_KD = model.shared.weight[base:]
    assert (new_KD - original.shared.weight[:base].mean(0)).abs().max() < 2 and (new_KD[0] != new_KD[1]).all()
    again = pretrained_t5(tmp_path / "plain", tokenizer=tokenizer, space=SPACE)
    assert torch.equal(again.shared.weight, model.shared.weight)
    model.save_pretrained(tmp_path / "carrying")
    carrying = pretrained_t5(tmp_path / "carrying", tokenizer=tokenizer, space=SPACE, seed=9)
    assert torch.equal(carrying.shared.weight, model.shared.weight)
    assert carrying.config.scale_decoder_outputs == scaled


def test_an_mt5_is_loaded_as_the_t5_that_it_is(tmp_path):
    tokenizer = with_docid_tokens(train_tokenizer(["折りたたみ傘 ステンレス 水筒"] * 3, size=64), SPACE)
    base = len(tokenizer) - 12
    sizes = {"vocab_size": base + 5, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    original = MT5ForConditionalGeneration(MT5Config(**sizes, tie_word_embeddings=False)).eval()
    original.save_pretrained(tmp_path / "mt5")
    model = pretrained_t5(tmp_path / "mt5", tokenizer=tokenizer, space=SPACE).eval()
    model.save_pretrained(tmp_path / "carrying")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 4]])}
    with torch.no_grad():
        expected = original(**inputs).logits[..., :base]
        for ours in (model, pretrained_t5(tmp_path / "carrying", tokenizer=tokenizer, space=SPACE).eval()):
            torch.testing.assert_close(ours(**inputs).logits[..., :base], expected)


def test_a_model_as_mt5_is_published_without_tokenizer_json_and_safetensors(tmp_path):
    """A SentencePiece model and a file of torch.load; and what such a file may not hold."""
    texts = ["折りたたみ傘 黒", "sartén negra", "ステンレス 水筒", "black water bottle"] * 20
    original = save_mt5(tmp_path, texts, words=32)
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer("折りたたみ傘 黒")["input_ids"]
    assert ids[-1] == 1 and 2 not in ids and len(ids) > 2
    base = len(tokenizer)
    model = pretrained_t5(tmp_path, tokenizer=with_docid_tokens(tokenizer, SPACE), space=SPACE)
    assert torch.equal(model.shared.weight[:base], original.shared.weight[:base])
    torch.save({"shared.weight": Path("not a tensor")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="no T5 could be loaded from"):
        pretrained_t5(tmp_path, tokenizer=tokenizer, space=SPACE)


def test_a_model_that_cannot_be_had_is_an_error_in_words(tmp_path):
    tokenizer = with_docid_tokens(train_tokenizer(["steel hinge 10 ft"] * 3, size=64), SPACE)
    with pytest.raises(EncoderError, match="no T5 could be loaded from .*build a small T5"):
        pretrained_t5(tmp_path / "absent", tokenizer=tokenizer, space=SPACE)
    T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(EncoderError, match="has 9 vocabulary rows, fewer than the tokenizer's"):
        pretrained_t5(tmp_path, tokenizer=tokenizer, space=SPACE)


@pytest.mark.parametrize("untied", [False, True])
def test_the_loss_is_the_models_own_log_probability(untied):
    model = small().eval()
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.3)
        model.config.tie_word_embeddings = model.config.scale_decoder_outputs = False
    ids_BT, codes_BL = rows()
    found_L = level_losses(model, torch.from_numpy(ids_BT).long(), torch.from_numpy(codes_BL), space=SPACE)
    expected_BL = [
        [
            -step_logp(
                model,
                [int(token) for token in ids if token],
                codes[:level],
                codes_per_level=SPACE.codes_per_level,
                normalize="level",
            )[codes[level]]
            for level in range(3)
        ]
        for ids, codes in zip(ids_BT, codes_BL)
    ]
    np.testing.assert_allclose(found_L.detach().numpy(), np.mean(expected_BL, 0), rtol=1e-4)


def test_levels_are_summed_or_weighed_and_halves_average_to_the_whole():
    model = small().eval()
    ids_BT, codes_BL = (torch.from_numpy(x).long() for x in rows())
    loss_L = level_losses(model, ids_BT, codes_BL, space=SPACE)
    whole = docid_loss(model, ids_BT, codes_BL, space=SPACE)
    halves = [docid_loss(model, ids_BT[part], codes_BL[part], space=SPACE) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, loss_L.sum())
    torch.testing.assert_close(whole, sum(halves) / 2)
    for groups in (1, 2, 99):
        grouped_L = level_losses(model, ids_BT, codes_BL, space=SPACE, most_groups=groups)
        torch.testing.assert_close(grouped_L, loss_L)
    weighed = docid_loss(model, ids_BT, codes_BL, space=SPACE, level_weights=(2, 1, 1))
    torch.testing.assert_close(weighed, (2 * loss_L[0] + loss_L[1] + loss_L[2]) * 3 / 4)
    evenly = docid_loss(model, ids_BT, codes_BL, space=SPACE, level_weights=(5, 5, 5))
    torch.testing.assert_close(evenly, whole)
    weight_B = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0])
    of_each = torch.stack([docid_loss(model, ids_BT[[i]], codes_BL[[i]], space=SPACE) for i in range(6)])
    weighted = docid_loss(model, ids_BT, codes_BL, space=SPACE, weight_B=weight_B)
    torch.testing.assert_close(weighted, (weight_B * of_each).mean())
    smooth = docid_loss(model, ids_BT, codes_BL, space=SPACE, label_smoothing=0.5)
    assert smooth.isfinite() and smooth != whole
    with pytest.raises(RecipeError, match="do not fit a model of 42 vocabulary rows"):
        docid_loss(model, ids_BT, codes_BL, space=DocidSpace((99, 9, 9)))
    with pytest.raises(RecipeError, match="must be 3 numbers"):
        docid_loss(model, ids_BT, codes_BL, space=SPACE, level_weights=(1, 1))


def test_only_id_rows_of_the_projection_are_touched():
    model = small()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    ids_BT, codes_BL = (torch.from_numpy(x).long() for x in rows())
    docid_loss(model, ids_BT, codes_BL, space=SPACE).backward()
    assert not model.lm_head.weight.grad[:30].any() and model.lm_head.weight.grad[30:].any(1).all()


def examples():
    ids_NT, codes_NL = rows(12)
    return Examples({"query": ids_NT}, {"query": codes_NL})


def test_a_small_model_learns_its_rows_and_resuming_is_exact():
    run = {"space": SPACE, "batch": 6, "learning_rate": 0.01, "warmup_share": 0.1, "total_steps": 40}
    whole, parts = small(), small()
    seen = []
    result = fit(whole, examples(), steps=40, on_step=lambda step, loss: seen.append(step), **run)
    assert seen == list(range(40)) and result.step == 40 and not whole.training
    assert np.mean(result.losses[-5:]) < 0.7 * np.mean(result.losses[:2])
    first = fit(parts, examples(), steps=15, **run)
    torch.manual_seed(123)
    second = fit(copy.deepcopy(parts), examples(), steps=40, resume=first, **run)
    assert first.losses + second.losses == result.losses


def test_a_loss_that_is_not_finite_stops_the_training():
    model = small()
    with torch.no_grad():
        model.shared.weight[30:] = torch.nan
    with pytest.raises(TrainingError, match="loss is nan at step 0"):
        fit(model, examples(), space=SPACE, steps=2, batch=6, learning_rate=0.1)
