"""Training: eq. 8 is the sum of its parts, epochs repeat, health figures have known answers, dead codes revive.

Unusual: `fit` runs on 600 generated rows with a planted category tree, so that a healthy outcome is known beforehand.
"""

import math

import numpy as np
import pytest
import torch

from catid2_ray.errors import InputError
from catid2_ray.quantizer.health import level_health, revive_dead_codes
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.step import (
    LossWeights,
    epoch_order,
    fit,
    learning_rate_at,
    parameter_groups,
    training_loss,
)
from tests.oracles import quantizer as oracle

FIT = {"epochs": 4, "batch": 200, "learning_rate": 2e-3, "weight_decay": 1e-4, "seed": 0}


def tree(rows=600, width=16, seed=0):
    """Embeddings around a tree of 4 × 3 categories, and their paths."""
    rng = np.random.default_rng(seed)
    leaf_N = rng.integers(0, 12, rows)
    top, leaf = rng.normal(size=(4, width)), rng.normal(size=(12, width))
    embedding_ND = top[leaf_N // 3] * 2 + leaf[leaf_N] + rng.normal(size=(rows, width)) * 0.5
    return torch.from_numpy(embedding_ND).float(), torch.from_numpy(np.stack((leaf_N // 3, 4 + leaf_N), 1))


def build(**changes):
    torch.manual_seed(0)
    return ResidualQuantizer(**{"width": 16, "hidden": (24,), "latent": 8, "codes_per_level": (16, 16, 16)} | changes)


@pytest.mark.parametrize("distance, power", [("squared", 2), ("plain", 1)])
def test_total_is_equation_8(distance, power):
    embedding_ND, category_NH = tree(30)
    model, embedding_ND = build().double(), embedding_ND.double()
    weights = LossWeights(dispersion=0.3, hierarchical=0.2, cluster_scale=0.7, scale_temperature=2.0, temperature=0.5,
                          scale_distance=distance)  # fmt: skip
    loss = training_loss(model, embedding_ND, category_NH, weights=weights)
    out = model(embedding_ND)
    residual_LBZ, codeword_LBZ = out.residual_LBZ.detach().numpy(), out.codeword_LBZ.detach().numpy()
    expected = {
        "residual_quantization": oracle.residual_quantization(residual_LBZ, codeword_LBZ, commitment=0.25),
        "dispersion": oracle.dispersion(out.reconstruction_BD.detach().numpy(), embedding_ND.numpy(), temperature=0.5),
        "hierarchical": sum(
            oracle.hierarchical_class(residual_LBZ[h], category_NH.tolist(), depth=h, temperature=0.5) for h in (0, 1)
        ),
        "cluster_scale": sum(
            oracle.cluster_scale(oracle.probability(r, c.detach().numpy(), scale_temperature=2.0, power=power))
            for r, c in zip(residual_LBZ, model.codebooks, strict=True)
        ),
    }
    assert {name: float(term) for name, term in loss.terms.items()} == pytest.approx(expected, abs=1e-9)
    factor = {"residual_quantization": 1.0, "dispersion": 0.3, "hierarchical": 0.2, "cluster_scale": 0.7}
    assert float(loss.total.detach()) == pytest.approx(sum(factor[n] * expected[n] for n in factor), abs=1e-9)
    assert not any(term.requires_grad for term in loss.terms.values())


@pytest.mark.parametrize("category_on", ["prefix", "latent", "projection"])
def test_the_category_term_acts_where_it_is_told(category_on):
    embedding_ND, category_NH = tree(30)
    model, embedding_ND = build(projection=True).double(), embedding_ND.double()
    weights = LossWeights(category_on=category_on, category_temperature=0.2, category_decay=0.5)
    loss = training_loss(model, embedding_ND, category_NH, weights=weights)
    out = model(embedding_ND)
    if category_on == "prefix":
        rows = [
            [part.detach().numpy() for part in (out.residual_LBZ, out.codeword_LBZ)],
            out.latent_BZ.detach().numpy(),
        ]
        expected = sum(
            oracle.hierarchical_class(
                oracle.category_rows("prefix", rows[1], *rows[0], level),
                category_NH.tolist(),
                depth=level,
                temperature=0.2,
            )
            for level in (0, 1)
        )
    else:
        rows_BZ = out.latent_BZ if category_on == "latent" else model.projection(out.latent_BZ)
        expected, anchors = oracle.ancestor(rows_BZ.detach().numpy(), category_NH.tolist(), decay=0.5, temperature=0.2)
        assert [int(count) for count in loss.anchors] == [anchors]
    assert float(loss.terms["hierarchical"]) == pytest.approx(expected, abs=1e-9)
    loss.weighted["hierarchical"].backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0, "the encoder learns from it"
    assert not any(book.grad is not None and book.grad.any() for book in model.codebooks), "codewords do not"
    assert (model.projection[0].weight.grad is not None) == (category_on == "projection")


def test_terms_of_weight_zero_are_not_computed():
    embedding_ND, category_NH = tree(20)
    tiger = LossWeights(dispersion=0, hierarchical=0, cluster_scale=0, reconstruction=1.0)
    terms = training_loss(build(), embedding_ND, category_NH, weights=tiger).terms
    assert set(terms) == {"residual_quantization", "reconstruction"}
    shallow = training_loss(build(), embedding_ND, category_NH[:, :0], weights=LossWeights()).terms
    assert "hierarchical" not in shallow


def test_fit_learns_uses_its_codes_and_repeats_exactly():
    embedding_ND, category_NH = tree()
    weights = LossWeights(hierarchical=0.01)
    model, again = build(latent_radius=4.0), build(latent_radius=4.0)
    history = fit(embedding_ND, category_NH, model=model, weights=weights, **FIT)
    assert [record["epoch"] for record in history] == [0, 1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert min(history[-1]["codes_used"]) >= 14
    assert fit(embedding_ND, category_NH, model=again, weights=weights, **FIT) == history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_refit_moves_the_codebooks_to_the_final_latents_and_nothing_else():
    embedding_ND, category_NH = tree()
    left, refitted = build(), build()
    for model, refit in ((left, False), (refitted, True)):
        fit(embedding_ND, category_NH, model=model, weights=LossWeights(), refit=refit, **FIT)
    assert all(torch.equal(a, b) for a, b in zip(left.encoder.parameters(), refitted.encoder.parameters(), strict=True))

    def error(model):
        out = model(embedding_ND)
        return float((out.residual_LBZ[-1] - out.codeword_LBZ[-1]).square().sum())

    assert error(refitted) < error(left)


def test_fit_refuses_tables_of_different_length():
    embedding_ND, category_NH = tree(30)
    with pytest.raises(InputError, match="30 embeddings but 29 category rows"):
        fit(embedding_ND, category_NH[1:], model=build(), weights=LossWeights(), **FIT)


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    order = epoch_order(100, seed=3, epoch=5)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(100, seed=3, epoch=5))
    assert not torch.equal(order, epoch_order(100, seed=5, epoch=3))


def test_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate_at(step, 100, peak=2.0, warmup_share=0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[99] < 0.01
    assert learning_rate_at(0, 100, peak=2.0, warmup_share=0.0) == 2.0
    assert learning_rate_at(0, 1, peak=2.0, warmup_share=0.1) == 2.0


def test_parameter_groups_cover_all_and_spare_the_codebooks():
    model = build()
    decayed, others = parameter_groups(model, weight_decay=0.5)
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert all(any(codebook is p for p in others["params"]) for codebook in model.codebooks)


def test_level_health_has_known_answers():
    even, one = level_health(torch.stack((torch.arange(200) % 4, torch.zeros(200, dtype=torch.int64)), 1), (4, 200))
    assert (even.codes_used, even.dead, even.top_share) == (4, 0, 0.25)
    assert even.perplexity == pytest.approx(4.0) and even.normalised_entropy == pytest.approx(1.0)
    assert (one.codes_used, one.dead, one.top_share) == (1, 199, 1.0)
    assert one.perplexity == pytest.approx(1.0) and one.normalised_entropy == pytest.approx(0.0)
    half = level_health(np.array([[0], [0], [1], [2]]), (4,))[0]
    assert half.perplexity == pytest.approx(math.exp(1.5 * math.log(2)))
    assert level_health(np.zeros((0, 1), np.int64), (4,))[0].perplexity == 0.0


def test_dead_codes_revive_equally_everywhere():
    embedding_ND, _ = tree(400)
    models = [build(), build()]
    for model in models:
        model.initialise_codebooks(embedding_ND, seed=1)
        with torch.no_grad():
            model.codebook_1[3:9] = 1e6
    dead = sum(level.dead for level in level_health(models[0].encode(embedding_ND).codes_BL, (16, 16, 16)))
    assert dead >= 6
    revived = [revive_dead_codes(model, embedding_ND, seed=1, epoch=2) for model in models]
    assert revived[0] == revived[1] >= 6
    assert all(torch.equal(a, b) for a, b in zip(models[0].codebooks, models[1].codebooks, strict=True))
    assert level_health(models[0].encode(embedding_ND).codes_BL, (16, 16, 16))[1].dead == 0
    kept = [codebook.detach().clone() for codebook in models[0].codebooks]
    if not sum(level.dead for level in level_health(models[0].encode(embedding_ND).codes_BL, (16, 16, 16))):
        assert revive_dead_codes(models[0], embedding_ND, seed=1, epoch=3) == 0
        assert all(torch.equal(a, b) for a, b in zip(kept, models[0].codebooks, strict=True))
