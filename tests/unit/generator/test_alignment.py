"""EG-GRPO against its oracle: groups, advantages, the loss under every switch; k = 0 is GRPO; two halves are one whole."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError
from catid2_ray.generator.eg_grpo import (
    AlignmentLoss,
    Experience,
    Groups,
    Objective,
    alignment_loss,
    cap_experts,
    collect,
    form_groups,
    group_advantages,
    group_logps,
    taken,
)
from catid2_ray.generator.model import small_t5
from catid2_ray.generator.step import level_losses
from tests.oracles import alignment as oracle

SPACE = DocidSpace((4, 3, 5))


def small(seed=0, dropout=0.0):
    return small_t5(
        vocabulary=30, width=16, layers=1, heads=2, feed_forward=24, dropout=dropout,
        codes_per_level=SPACE.codes_per_level, seed=seed,
    ).eval()  # fmt: skip


def queries(batch=3, seed=0):
    ids_BT = torch.from_numpy(np.random.default_rng(seed).integers(3, 30, (batch, 6)))
    ids_BT[:, -1] = 1
    ids_BT[0, 3:] = torch.tensor([1, 0, 0])
    return ids_BT


def draws(batch, group, *, generator):
    """Distinct IDs per row, B×G×L."""
    packed = np.stack([generator.choice(SPACE.capacity, group, replace=False) for _ in range(batch)])
    return torch.from_numpy(SPACE.unpack(packed.ravel()).reshape(batch, group, -1))


@pytest.mark.parametrize("form, injected", itertools.product(["widened", "fixed"], [0, 1, 2, 3]))
def test_groups_are_those_of_the_oracle(form, injected):
    generator = np.random.default_rng(injected)
    rollout_BGL = draws(40, 5, generator=generator)
    expert_BEL = draws(40, 4, generator=generator)
    expert_BEL[::2, 0] = rollout_BGL[::2, 1]  # found among those that stay
    expert_BEL[::3, 1] = rollout_BGL[::3, 4]  # found among those that may go
    count_B, experts_B = torch.from_numpy(generator.integers(3, 6, 40)), torch.from_numpy(generator.integers(0, 5, 40))
    groups = form_groups(
        rollout_BGL, count_B, expert_BEL, experts_B, injected=injected, form=form, space=SPACE
    )  # fmt: skip
    assert groups.codes_BNL.shape[1] == 5 + (injected if form == "widened" else 0)
    for row in range(40):
        expected = oracle.members(
            rollout_BGL[row, : count_B[row]].tolist(), expert_BEL[row, : experts_B[row]].tolist(),
            group=5, injected=injected, form=form,
        )  # fmt: skip
        real_N = groups.real_BN[row]
        found = list(zip(map(tuple, groups.codes_BNL[row, real_N].tolist()), groups.expert_BN[row, real_N].tolist()))
        assert found == expected
        assert len({docid for docid, _ in found}) == len(found)


def test_without_experts_groups_are_the_rollouts_and_a_fixed_group_keeps_one():
    rollout_BGL = draws(3, 4, generator=np.random.default_rng(0))
    full, none = torch.full((3,), 4), torch.zeros(3, dtype=torch.long)
    for form in ("widened", "fixed"):
        groups = form_groups(rollout_BGL, full, rollout_BGL, none + 4, injected=0, form=form, space=SPACE)
        assert torch.equal(groups.codes_BNL, rollout_BGL) and groups.real_BN.all() and not groups.expert_BN.any()
    with pytest.raises(RecipeError, match="a group of 4 in fixed form cannot hold 4 experts"):
        form_groups(rollout_BGL, full, rollout_BGL, none, injected=4, form="fixed", space=SPACE)
    with pytest.raises(RecipeError, match="ratio must be token or sequence, found 'word'"):
        Objective(ratio="word")


def test_advantages_are_those_of_the_oracle_and_flat_groups_are_counted():
    generator = torch.Generator().manual_seed(0)
    reward_BN = torch.rand(50, 6, generator=generator).round(decimals=1)
    real_BN = torch.rand(50, 6, generator=generator) < 0.7
    real_BN[:, 0] = True
    reward_BN[:5] = 0.1
    found = group_advantages(reward_BN, real_BN, eps=1e-4)
    for row in range(50):
        rewards = reward_BN[row, real_BN[row]].tolist()
        torch.testing.assert_close(
            found.advantage_BN[row, real_BN[row]], torch.tensor(oracle.advantages(rewards, 1e-4)), atol=1e-4, rtol=1e-4
        )
        assert bool(found.flat_B[row]) == (len(set(rewards)) == 1)
    assert not found.advantage_BN[~real_BN].any() and found.flat_B[:5].all()


def test_only_experts_less_likely_than_every_rollout_are_capped():
    groups = Groups(
        torch.zeros(1, 4, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool),
        torch.tensor([[False, False, True, True]]),
    )  # fmt: skip
    logp_BN = torch.tensor([[-1.0, -5.0, -4.0, -9.0]])
    advantage_BN = torch.tensor([[3.0, -1.0, 3.0, 3.0]])
    assert cap_experts(advantage_BN, logp_BN, groups, cap=1.0).tolist() == [[3, -1, 3, 1]]
    assert cap_experts(advantage_BN, logp_BN, groups, cap=None) is advantage_BN


def experience(seed=0, batch=3):
    """Random groups of six with one empty place, and log-probabilities now, at the rollout and of the reference."""
    generator = torch.Generator().manual_seed(seed)

    def logps():
        return [torch.randn(batch, 6, k, generator=generator).log_softmax(-1) for k in SPACE.codes_per_level]

    codes_BNL = draws(batch, 6, generator=np.random.default_rng(seed))
    real_BN = torch.ones(batch, 6, dtype=torch.bool)
    real_BN[0, 4] = False
    expert_BN = torch.zeros_like(real_BN)
    expert_BN[:, 3] = True
    advantage_BN = torch.randn(batch, 6, generator=generator).masked_fill(~real_BN, 0)
    new, old, reference = logps(), logps(), logps()
    groups = Groups(codes_BNL, real_BN, expert_BN)
    return new, old, Experience(groups, advantage_BN, taken(old, codes_BNL), reference)


def as_lists(new, old, given):
    def of(logps, row, place):
        return [level[row, place].tolist() for level in logps]

    return [
        [
            {
                "codes": given.groups.codes_BNL[row, place].tolist(), "expert": bool(given.groups.expert_BN[row, place]),
                "advantage": float(given.advantage_BN[row, place]), "new": of(new, row, place),
                "old": of(old, row, place), "reference": of(given.reference, row, place),
            }
            for place in given.groups.real_BN[row].nonzero()[:, 0].tolist()
        ]
        for row in range(len(given.groups.real_BN))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "ratio, kl, expert_term", itertools.product(["token", "sequence"], ["exact", "k3"], ["policy", "sft"])
)
def test_the_loss_is_that_of_the_oracle(ratio, kl, expert_term):
    new, old, given = experience()
    objective = Objective(ratio=ratio, kl=kl, expert_term=expert_term, kl_weight=0.7, expert_weight=0.3)
    loss, figures = alignment_loss(new, given, objective)
    expected, kl_mean, entropy = oracle.loss(as_lists(new, old, given), objective)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(figures["kl"]) == pytest.approx(kl_mean, rel=1e-4)
    assert float(figures["entropy"]) == pytest.approx(entropy, rel=1e-4)
    assert 0 < float(figures["clipped"]) < 1


def test_pairs_are_those_of_the_oracle_and_flat_groups_have_none():
    new, old, given = experience()
    given.advantage_BN[1] = 0.5  # all of a group alike
    objective = Objective(term="pairs", beta=0.4, kl_weight=0.7)
    loss, _ = alignment_loss(new, given, objective)
    assert float(loss) == pytest.approx(oracle.loss(as_lists(new, old, given), objective)[0], rel=1e-4)
    leaves = [level.clone().requires_grad_() for level in new]
    alignment_loss(leaves, given, Objective(term="pairs", kl_weight=0.0))[0].backward()
    assert not leaves[0].grad[1].any() and leaves[0].grad[0].any()


@pytest.mark.parametrize("term", ["policy", "pairs"])
def test_two_halves_average_to_the_whole(term):
    new, _, given = experience(batch=4)
    whole = alignment_loss(new, given, Objective(term=term))[0]

    def half(rows):
        groups = Groups(*(part[rows] for part in given.groups))
        part = Experience(
            groups, given.advantage_BN[rows], given.logp_old_BNL[rows], [q[rows] for q in given.reference]
        )
        return alignment_loss([p[rows] for p in new], part, Objective(term=term))[0]

    torch.testing.assert_close(whole, (half(slice(0, 2)) + half(slice(2, 4))) / 2)


def test_token_and_sequence_start_with_one_gradient():
    new, _, given = experience()
    gradients = []
    for ratio in ("token", "sequence"):
        leaves = [level.clone().requires_grad_() for level in new]
        first = given._replace(logp_old_BNL=taken(new, given.groups.codes_BNL))
        alignment_loss(leaves, first, Objective(ratio=ratio))[0].backward()
        gradients.append(torch.cat([leaf.grad.flatten() for leaf in leaves]))
    torch.testing.assert_close(*gradients)


def test_group_logps_are_the_training_losses_and_ignore_padding():
    model, ids_BT = small(), queries()
    codes_BNL = draws(3, 4, generator=np.random.default_rng(1))
    logps = group_logps(model, ids_BT, codes_BNL, space=SPACE)
    assert [tuple(level.shape) for level in logps] == [(3, 4, 4), (3, 4, 3), (3, 4, 5)]
    own_BNL = taken(logps, codes_BNL)
    for row in range(3):
        expected_L = level_losses(model, ids_BT[row : row + 1].expand(4, -1), codes_BNL[row], space=SPACE)
        torch.testing.assert_close(-own_BNL[row].mean(0), expected_L)

    class Other:
        def docid_logits(self, input_ids, codes_BL):
            assert len(input_ids) == len(codes_BL) == 12
            return group_logps(model, input_ids, codes_BL[:, None], space=SPACE)[0][:, 0].split(4, -1)

    torch.testing.assert_close(group_logps(Other(), ids_BT, codes_BNL, space=SPACE)[0], logps[0])


def rolled(model, *, injected=2, seed=0):
    """An experience of three queries in which one rollout of each group is right."""
    generator = np.random.default_rng(seed)
    rollout_BGL, expert_BEL = draws(3, 4, generator=generator), draws(3, 3, generator=generator)
    return collect(
        model, small(), queries(), rollout=lambda ids: (rollout_BGL, torch.full((3,), 4)),
        experts=(expert_BEL, torch.tensor([3, 2, 1])),
        reward=lambda groups: torch.where(groups.expert_BN, 1.0, 0.1) + 0.5 * (groups.codes_BNL[..., 0] == 1),
        objective=Objective(injected=injected), space=SPACE,
    )  # fmt: skip


def test_updates_raise_what_was_rewarded_and_leave_the_reference():
    model = small(dropout=0.5)
    given, figures = rolled(model)
    assert figures["experts"] == pytest.approx(5 / 3) and 0 <= figures["without_variance"] <= 1
    module = AlignmentLoss(model, space=SPACE, objective=Objective(kl_weight=0.1)).train()
    assert not model.training, "dropout would move the first ratio away from 1"
    loss, first = module(queries(), given)
    assert float(first["kl"]) == pytest.approx(0, abs=1e-6) and first["clipped"] == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):  # several updates per rollout: the ratio leaves 1
        optimizer.zero_grad()
        loss, figures = module(queries(), given)
        loss.backward()
        optimizer.step()
    assert figures["kl"] > 0 and figures["clipped"] > 0
    before_BN = given.logp_old_BNL.sum(-1)
    after_BN = taken(group_logps(model, queries(), given.groups.codes_BNL, space=SPACE), given.groups.codes_BNL).sum(-1)
    moved_BN = (after_BN - before_BN).detach()
    assert moved_BN[given.advantage_BN > 0.5].mean() > 0.05 > moved_BN[given.advantage_BN < -0.2].mean()


def test_without_experts_it_is_plain_grpo():
    """Not even candidates that are there change anything, under any switch that concerns experts."""
    model = small()
    given, _ = rolled(model, injected=0)
    expected = None
    for form, term, cap in itertools.product(["widened", "fixed"], ["policy", "sft"], [None, 0.1]):
        objective = replace(Objective(injected=0), form=form, expert_term=term, expert_cap=cap)
        loss = alignment_loss(group_logps(model, queries(), given.groups.codes_BNL, space=SPACE), given, objective)[0]
        expected = loss if expected is None else expected
        assert torch.equal(loss, expected)
    assert given.groups.codes_BNL.shape[1] == 4 and not given.groups.expert_BN.any()
