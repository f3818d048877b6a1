"""What alignment learns in: rewards of real rollouts, rankers by function and by table, and a generator that improves."""

import copy

import numpy as np
import pytest
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.eg_grpo import Groups, Objective, align, group_logps, prompt_order, taken
from catid2_ray.generator.encoder_decoder import encoder_decoder
from catid2_ray.generator.logits import with_head
from catid2_ray.generator.model import pretrained_causal, small_t5
from catid2_ray.generator.vocabulary import load_tokenizer, tokenize, with_docid_tokens
from catid2_ray.retrieval.environment import CalledRanker, Environment, Rules
from catid2_ray.retrieval.trie import Trie
from tests.text_models import bert_tokenizer, save_bert, save_qwen, word_tokenizer

SPACE = DocidSpace((5, 5, 5))
RNG = np.random.default_rng(0)
PACKED = np.sort(RNG.choice(SPACE.capacity, 60, replace=False))
SHARED = np.sort(np.concatenate((PACKED, PACKED[:5])))  # five IDs of two products
TRIE = Trie.from_sorted(SHARED, codes_per_level=SPACE.codes_per_level, shared=True)


def small():
    return small_t5(
        vocabulary=20, width=16, layers=1, heads=2, feed_forward=24, dropout=0.0, codes_per_level=SPACE.codes_per_level
    ).eval()  # fmt: skip


def prompts(count=6):
    """Prompts with three judged IDs each: worth 1, 0.5 and 0."""
    rng = np.random.default_rng(1)
    table = {
        "input_ids": torch.from_numpy(rng.integers(3, 20, (count, 4))),
        "judged": torch.from_numpy(np.stack([rng.choice(PACKED, 3, replace=False) for _ in range(count)])),
        "reward": torch.tensor([[1.0, 0.5, 0.0]]).expand(count, -1),
        "number": torch.arange(count),
    }
    return lambda rows: {name: values[torch.as_tensor(rows)] for name, values in table.items()}


def groups_of(packed_BN):
    codes_BNL = torch.from_numpy(SPACE.unpack(np.ravel(packed_BN)).reshape(*np.shape(packed_BN), 3))
    real_BN = torch.ones(codes_BNL.shape[:2], dtype=torch.bool)
    return Groups(codes_BNL, real_BN, torch.zeros_like(real_BN))


def test_rewards_know_judged_valid_and_invalid_ids():
    batch = prompts()(np.arange(1))
    wrong = next(value for value in range(SPACE.capacity) if value not in PACKED)
    unjudged = next(value for value in PACKED if value not in batch["judged"][0].tolist())
    groups = groups_of([[*batch["judged"][0].tolist(), unjudged, wrong]])
    reward_BN = Environment(TRIE, Rules(valid=0.1, invalid=-0.3)).reward(batch, groups)
    torch.testing.assert_close(reward_BN, torch.tensor([[1.0, 0.5, 0.0, 0.1, -0.3]]))


def test_a_called_ranker_sees_all_products_of_an_id_and_a_table_says_the_same():
    names = [f"p{row}" for row in range(len(SHARED))]
    asked = []

    def ranker(query, product_ids):
        asked.append((query, product_ids))
        return [float(name[1:]) for name in product_ids]

    batch = prompts()(np.arange(2))
    wrong = next(value for value in range(SPACE.capacity) if value not in PACKED)
    groups = groups_of([[PACKED[0], PACKED[40], wrong], [PACKED[50], PACKED[2], PACKED[7]]])
    called = Environment(TRIE, Rules(), ranker=CalledRanker(ranker, lambda n: [f"q{i}" for i in n], names))
    plain = Environment(TRIE, Rules())
    bonus_BN = called.reward(batch, groups) - plain.reward(batch, groups)
    assert asked == [("q0", ["p0", "p1", "p45"]), ("q1", ["p55", "p4", "p5", "p12"])]
    assert bonus_BN[0, 1] == pytest.approx(0.2 * np.tanh(1), rel=1e-4) and not bonus_BN[0, [0, 2]].any()
    assert (bonus_BN[1] > 0).tolist() == [True, False, False]
    table = batch | {
        "scored": torch.tensor([[PACKED[0], PACKED[40], -1], [PACKED[50], PACKED[2], PACKED[7]]]),
        "score": torch.tensor([[1.0, 45, 0], [55, 5, 12]]),
    }
    torch.testing.assert_close(plain.reward(table, groups), called.reward(batch, groups))
    broken = Environment(TRIE, Rules(), ranker=CalledRanker(lambda q, p: [1.0], lambda n: [f"q{i}" for i in n], names))
    with pytest.raises(InputError, match=r"the ranker gave \(1,\) scores for 3 products of the query 'q0'"):
        broken.reward(batch, groups)


@pytest.mark.parametrize("source", ["sample", "beam"])
def test_alignment_raises_the_reward_of_what_is_rolled_out(source):
    model, asked = small(), prompts()
    reference = copy.deepcopy(model)
    environment = Environment(TRIE, Rules(group=4, source=source, beam_width=8))
    objective = Objective(injected=2, kl_weight=0.01, expert_cap=None)
    settings = {
        "prompts": asked, "count": 6, "objective": objective, "space": SPACE, "steps": 40, "batch": 6, "updates": 2,
        "learning_rate": 2e-2,
        "experience": lambda batch, seed: environment.experience(
            model, reference, batch, objective=objective, seed=seed
        ),
    }  # fmt: skip
    history = align(model, **settings)
    assert len(history) == 40 and {"loss", "reward", "kl", "entropy", "without_variance", "experts"} <= set(history[0])
    first, last = (np.mean([record["reward"] for record in part]) for part in (history[:6], history[-6:]))
    assert last > first + 0.15
    assert history[-1]["kl"] > history[0]["kl"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.load_state_dict(reference.state_dict())
    again = align(model, **settings | {"stop": lambda step: step == 3})
    assert again == history[:3], "a run is a function of its seed"


def kinds(folder):
    """An encoder and decoder with a PAWA head, and a causal model padded on the right; with texts of theirs."""
    encoder = with_head(
        encoder_decoder(
            save_bert(folder / "bert"), width=16, layers=2, heads=2, feed_forward=24, dropout=0.1,
            codes_per_level=SPACE.codes_per_level,
        ),
        "pawa", rank=6,
    )  # fmt: skip
    with torch.no_grad():
        encoder.pawa.up.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    word_tokenizer().save_pretrained(folder / "words")
    words = with_docid_tokens(load_tokenizer(str(folder / "words"), kind="causal"), SPACE)
    causal = pretrained_causal(save_qwen(folder / "qwen", tied=True), tokenizer=words, space=SPACE)
    texts = ["steel hinge", "oak", "copper pipe door"]
    yield encoder.eval(), tokenize(bert_tokenizer(), texts, length=6)
    yield causal.eval(), tokenize(words, texts, length=4)


def test_other_kinds_of_generators_are_rolled_out_as_they_are_trained(tmp_path):
    """The search's log-probability of an ID is the one whose gradient is taken."""
    environment = Environment(TRIE, Rules(group=4))
    for model, ids_NT in kinds(tmp_path):
        ids_BT = torch.from_numpy(ids_NT).long()
        found = environment.rollouts(model, ids_BT, seed=3)
        logps = group_logps(model, ids_BT, found.codes_BGL, space=SPACE)
        torch.testing.assert_close(taken(logps, found.codes_BGL).sum(-1), found.logp_BG, atol=1e-4, rtol=1e-4)
        taken(logps, found.codes_BGL).sum().backward()
        assert model.lm_head.weight.grad.abs().sum() > 0


def test_prompts_come_once_a_pass():
    drawn = np.concatenate([prompt_order(10, rollout=number, batch=4, seed=3) for number in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert not np.array_equal(drawn[:10], drawn[10:])


def test_unknown_rollouts_are_refused():
    with pytest.raises(RecipeError, match="a 'sample' or a 'beam' of at least 2 IDs, found 'greedy' of 8"):
        Rules(source="greedy")
