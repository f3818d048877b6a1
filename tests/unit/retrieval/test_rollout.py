"""Rollouts are valid and distinct; draws have the frequencies of drawing one by one; leaves are found by bisection."""

import collections

import numpy as np
import pytest
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.model import small_t5
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.rollout import beam_rollouts, sample_rollouts
from catid2_ray.retrieval.trie import Trie
from tests.oracles.alignment import inclusion
from tests.oracles.beam import Table

SPACE = DocidSpace((3, 2, 3))
IDS = [(0, 0, 1), (0, 1, 0), (0, 1, 2), (1, 0, 0), (2, 0, 0), (2, 0, 1)]


def trie(ids=IDS, space=SPACE):
    return Trie.build(np.array(ids), codes_per_level=space.codes_per_level)


def asked(count):
    return torch.ones(count, 2, dtype=torch.long), torch.ones(count, 2, dtype=torch.long)


def one_query(copies, seed=0):
    """The same query many times over, so that its draws are independent."""
    table = Table(SPACE.codes_per_level, 1, seed)
    table.logits = [level.expand(copies, *level.shape[1:]) for level in table.logits]
    return table


def constrained(table, temperature):
    """P of each ID when every step is renormalised over the children that exist."""
    found = {}
    for docid in IDS:
        chance = 1.0
        for level in range(3):
            logits = table.logits[level][(0, *docid[:level])] / temperature
            allowed = sorted({other[level] for other in IDS if other[:level] == docid[:level]})
            chance *= float(logits[allowed].softmax(0)[allowed.index(docid[level])])
        found[docid] = chance
    return found


@pytest.mark.parametrize("group, temperature", [(1, 1.0), (2, 1.0), (3, 2.0)])
def test_draws_have_the_frequencies_of_drawing_without_replacement(group, temperature):
    copies = 20_000
    table = one_query(copies)
    found = sample_rollouts(table, trie(), *asked(copies), group=group, seed=5, temperature=temperature)
    drawn = collections.Counter(map(tuple, found.codes_BGL.flatten(0, 1).tolist()))
    expected = inclusion(constrained(table, temperature), group)
    for docid in IDS:
        sigma = np.sqrt(expected[docid] * (1 - expected[docid]) / copies)
        assert drawn[docid] / copies == pytest.approx(expected[docid], abs=5 * sigma + 1e-9), docid
    assert sum(drawn.values()) == group * copies and set(drawn) <= set(IDS)


def t5(space, seed=0):
    return small_t5(
        vocabulary=20, width=16, layers=1, heads=2, feed_forward=24, dropout=0.1, codes_per_level=space.codes_per_level,
        seed=seed,
    ).eval()  # fmt: skip


def test_rollouts_of_a_t5_are_valid_distinct_and_scored_as_the_beam_scores_them():
    space = DocidSpace((12, 12, 12))
    rng = np.random.default_rng(0)
    ids = space.unpack(np.sort(rng.choice(space.capacity, 150, replace=False)))
    model, tree = t5(space), trie(ids, space)
    input_ids = torch.from_numpy(rng.integers(3, 20, (6, 5)))
    mask = torch.ones_like(input_ids)
    every = constrained_beam_search(model, tree, input_ids, mask, beam_width=150, top_k=150)
    logp = [dict(zip(map(tuple, d.tolist()), s.tolist())) for d, s in zip(every.docid_BKL, every.logp_BK)]
    draw = sample_rollouts(model, tree, input_ids, mask, group=16, seed=1)
    beam = beam_rollouts(model, tree, input_ids, mask, group=16, beam_width=150)
    for found in (draw, beam):
        assert found.codes_BGL.shape == (6, 16, 3) and (found.count_B == 16).all()
        assert (tree.nodes_of(found.codes_BGL.flatten(0, 1).numpy()) >= 0).all()
        for row in range(6):
            docids = list(map(tuple, found.codes_BGL[row].tolist()))
            assert len(set(docids)) == 16
            np.testing.assert_allclose(found.logp_BG[row], [logp[row][docid] for docid in docids], atol=1e-4)
    assert torch.equal(beam.codes_BGL, every.docid_BKL[:, :16])
    again = sample_rollouts(model, tree, input_ids, mask, group=16, seed=1)
    assert torch.equal(again.codes_BGL, draw.codes_BGL)
    assert not torch.equal(sample_rollouts(model, tree, input_ids, mask, group=16, seed=2).codes_BGL, draw.codes_BGL)
    draw.codes_BGL.requires_grad, beam.logp_BG.requires_grad_()  # usable in a backward pass


def test_a_trie_with_fewer_ids_gives_them_all():
    found = sample_rollouts(one_query(4), trie(), *asked(4), group=9, seed=0)
    assert (found.count_B == 6).all() and (found.codes_BGL[:, 6:] == -1).all()
    assert (found.logp_BG[:, 6:] == -torch.inf).all()
    for row in found.codes_BGL[:, :6].tolist():
        assert sorted(map(tuple, row)) == IDS


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(InputError, match="group ≥ 1 and a temperature above 0, found 4 and 0"):
        sample_rollouts(one_query(1), trie(), *asked(1), group=4, seed=0, temperature=0)
    broken = one_query(1)
    broken.logits[1] = torch.full_like(broken.logits[1], torch.nan)
    with pytest.raises(InputError, match="NaN or infinite logits"):
        sample_rollouts(broken, trie(), *asked(1), group=4, seed=0)
