"""Health of the codebooks: known answers, verdicts that allow for small samples, revival that is equal everywhere."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from catid2_ray.errors import InputError
from catid2_ray.quantizer.health import (
    codebook_health,
    expected_distinct,
    gradient_norms,
    level_health,
    persistent,
    revive_dead_codes,
    verdict,
)
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.step import LossWeights, training_loss


def build(**changes) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(**{"width": 6, "hidden": (10,), "latent": 4, "codes_per_level": (8, 8, 8)} | changes)


def sample(rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    leaf_N = rng.integers(0, 6, rows)
    embedding_ND = torch.from_numpy(rng.normal(size=(6, 6))[leaf_N] + 0.5 * rng.normal(size=(rows, 6))).float()
    return embedding_ND, torch.from_numpy(np.stack((leaf_N // 3, leaf_N), 1))


def even(codes: int, rows: int, *, used: int | None = None, levels: int = 1):
    """Health of rows drawn evenly from the first `used` codes."""
    codes_NL = np.random.default_rng(1).integers(0, used or codes, (rows, levels))
    return level_health(codes_NL, (codes,) * levels)


def test_level_health_has_known_answers():
    even_use, one = level_health(torch.stack((torch.arange(200) % 4, torch.zeros(200, dtype=torch.int64)), 1), (4, 200))
    assert (even_use.codes_used, even_use.dead, even_use.top_share, even_use.rows) == (4, 0, 0.25, 200)
    assert even_use.perplexity == pytest.approx(4.0) and even_use.normalised_entropy == pytest.approx(1.0)
    assert (one.codes_used, one.dead, one.top_share) == (1, 199, 1.0)
    assert one.perplexity == pytest.approx(1.0) and one.normalised_entropy == pytest.approx(0.0)
    half = level_health(np.array([[0], [0], [1], [2]]), (4,))[0]
    assert half.perplexity == pytest.approx(math.exp(1.5 * math.log(2))) and half.quantization_error is None
    assert level_health(np.zeros((0, 1), np.int64), (4,))[0].perplexity == 0.0


@pytest.mark.parametrize("changes", [{}, {"latent_radius": 2.0}, {"ema": 0.9}])
def test_codebook_health_is_what_a_loop_over_rows_finds(changes):
    embedding_ND, category_NH = sample(60)
    model = build(**changes)
    model.initialise_codebooks(embedding_ND, seed=0)
    found = codebook_health(model, embedding_ND, category_NH)
    errors = np.zeros((60, 3))
    with torch.no_grad():
        latent_NZ = model.latents(embedding_ND).double().numpy()
    for row, residual_Z in enumerate(latent_NZ):
        for level, codebook_KZ in enumerate(model.codebooks):
            distances = [float(((residual_Z - code.numpy()) ** 2).sum()) for code in codebook_KZ.detach().double()]
            errors[row, level] = min(distances)
            residual_Z = residual_Z - codebook_KZ.detach().double().numpy()[int(np.argmin(distances))]
    assert [level.quantization_error for level in found.levels] == pytest.approx(errors.mean(0), rel=1e-4)
    assert found.latent_norm == pytest.approx(np.linalg.norm(latent_NZ, axis=1).mean(), rel=1e-5)
    plain = level_health(model.encode(embedding_ND).codes_BL, model.codes_per_level)
    assert [dataclasses.replace(level, quantization_error=None) for level in found.levels] == plain
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(InputError, match="embeddings must be rows × 6"):
        codebook_health(model, embedding_ND[:, :5])


def test_gradient_norms_are_those_of_separate_backward_passes():
    embedding_ND, category_NH = sample(80)
    model, weights = build(), LossWeights(hierarchical=0.3, dispersion=0.2, cluster_scale=0.5, commitment=0.25)
    parameters = list(model.parameters())
    loss = training_loss(model, embedding_ND, category_NH, weights=weights)
    found = gradient_norms(loss.weighted | {"constant": torch.tensor(3.0)}, iter(parameters))
    assert found.pop("constant") == 0.0 and all(parameter.grad is None for parameter in parameters)
    for name in found:
        model.zero_grad()
        training_loss(model, embedding_ND, category_NH, weights=weights).weighted[name].backward()
        squares = [parameter.grad.square().sum() for parameter in parameters if parameter.grad is not None]
        assert found[name] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-4) and found[name] > 0
    model.zero_grad()
    loss.total.backward()


@pytest.mark.parametrize("possible, rows", [(1, 5), (8, 3), (8, 8), (256, 1000), (8192, 500)])
def test_expected_distinct_is_the_average_of_draws(possible, rows):
    draws = np.random.default_rng(0).integers(0, possible, (200, rows))
    assert expected_distinct(possible, rows) == pytest.approx(np.mean([len(np.unique(d)) for d in draws]), rel=0.02)
    assert expected_distinct(possible, 0) == 0 and expected_distinct(2**62, 1000) == pytest.approx(1000)


@pytest.mark.parametrize("codes", [8, 32, 256, 1024, 8192])
@pytest.mark.parametrize("rows_per_code", [0.05, 0.5, 1, 4, 50])
def test_even_use_is_healthy_and_few_codes_are_not_whatever_the_sample(codes, rows_per_code):
    rows = max(64, min(20_000, int(codes * rows_per_code)))
    assert verdict(even(codes, rows, levels=3)).state == "healthy"
    # A few of the codes that could have been seen are narrow; their fourth root, or one code, is a collapse.
    expected = expected_distinct(codes, rows)
    assert verdict(even(codes, rows, used=int(expected**0.65))).state == "narrowing"
    for used in (1, int(expected**0.25)):
        assert verdict(even(codes, rows, used=used)).state == "collapsed"


def test_a_verdict_names_the_worst_level_and_its_numbers():
    levels = [*even(256, 20_000), *even(256, 20_000, used=60), *even(256, 20_000, used=10), *even(256, 20_000)]
    found = verdict(levels, 0.03)
    assert (found.state, found.level) == ("collapsed", 2)
    assert found.reason == (
        "level 3 of 4 uses 10 of 256 codes with perplexity 9.999, where even use by 20000 rows would show about 256: "
        "below 16, 50% of the entropy"
    )
    assert verdict(levels[:2], 0.03)[:2] == ("narrowing", 1)
    healthy = verdict([levels[0], levels[3]])
    assert healthy[:2] == ("healthy", None)
    assert healthy.reason == "codes used per level by 20000 rows: 256 of 256, 256 of 256"


def uneven(codes: int, rows: int, levels: int = 3):
    """Every code is used, all but one by a single row: what single outliers do to k-means, or a real collapse."""
    codes_NL = np.zeros((rows, levels), np.int64)
    for level in range(levels):
        codes_NL[level * codes : (level + 1) * codes, level] = np.arange(codes)
    return level_health(codes_NL, (codes,) * levels)


def test_single_outliers_hide_no_real_collapse():
    assert verdict(uneven(8, 300)).state == "healthy" and verdict(uneven(8, 4000)).state == "collapsed"
    assert verdict(uneven(256, 10_000)).state == "healthy" and verdict(uneven(256, 20_000)).state == "collapsed"
    # Few rows that hardly differ in their codes: 22 IDs for 300 rows.
    assert verdict(uneven(8, 300), 1 - 22 / 300)[:2] == ("collapsed", None)
    # Few rows that leave codes out.
    assert verdict(even(8, 300, used=2)).state == "collapsed"


def test_what_kmeans_shows_on_a_sound_catalogue_is_healthy():
    """20,000 products of Home Depot, 256 codes a level: perplexity 55 at the last."""
    share_K = np.arange(1, 257) ** -1.1
    levels = level_health(np.random.default_rng(0).choice(256, (20_000, 1), p=share_K / share_K.sum()), (256,))
    assert 45 < levels[0].perplexity < 60 and verdict(levels).state == "healthy"


def test_every_fifth_code_idle_is_narrow_although_use_is_even_otherwise():
    assert verdict(even(256, 20_000, used=200)).state == "narrowing"
    assert verdict(even(256, 20_000, used=210)).state == "healthy"


def test_skewed_but_sound_use_is_healthy():
    """Shares that fall like 1 / √rank over all codes: perplexity 200 of 256."""
    share_K = np.arange(1, 257) ** -0.5
    codes_N1 = np.random.default_rng(0).choice(256, (20_000, 1), p=share_K / share_K.sum())
    assert verdict(level_health(codes_N1, (256,))).state == "healthy"


@pytest.mark.parametrize("rate, state", [(0.0, "healthy"), (0.75, "healthy"), (0.85, "narrowing"), (0.95, "collapsed")])
def test_collisions_count_beyond_what_the_rows_cannot_avoid(rate, state):
    found = verdict(even(256, 5000, levels=4), rate)
    assert (found.state, found.level) == (state, None)
    # 8 × 8 IDs for 5000 rows: 98.7 % collide however good the codes are.
    assert verdict(even(8, 5000, levels=2), 1 - 64 / 5000).state == "healthy"
    assert verdict(even(8, 5000, levels=2), 1 - 5 / 5000).state == "collapsed"


def test_forced_levels_and_tiny_samples_get_no_verdict():
    twelve = dataclasses.replace(even(256, 5000, used=12)[0], forced=True)
    assert verdict([twelve, *even(256, 5000)]).state == "healthy"
    assert verdict(even(8, 20, used=1)).reason == "20 rows are too few for a verdict, it takes 32"
    assert verdict([]).state == "healthy"
    embedding_ND, category_NH = sample()
    levels = codebook_health(build(category_column=1), embedding_ND, category_NH).levels
    assert [level.forced for level in levels] == [True, False, False] and levels[0].codes_used == 6


@pytest.mark.parametrize("states, patience, expected", [
    ("", 1, False), ("c", 1, True), ("cc", 3, False), ("hccc", 3, True), ("ccnc", 2, False), ("ccch", 3, False),
    ("c", 0, False),
])  # fmt: skip
def test_a_collapse_persists_when_it_fills_the_last_epochs(states, patience, expected):
    names = {"c": "collapsed", "h": "healthy", "n": "narrowing"}
    assert persistent([names[state] for state in states], patience) is expected


def test_dead_codes_revive_equally_everywhere():
    embedding_ND, _ = sample()
    models = [build(), build()]
    for model in models:
        model.initialise_codebooks(embedding_ND, seed=1)
        with torch.no_grad():
            model.codebook_1[2:6] = 1e6
    assert codebook_health(models[0], embedding_ND).levels[1].dead >= 4
    revived = []
    for model in models:
        torch.randn(7)  # whatever else was drawn
        revived.append(revive_dead_codes(model, embedding_ND, seed=1, epoch=2))
    assert revived[0] == revived[1] >= 4
    assert all(torch.equal(a, b) for a, b in zip(models[0].codebooks, models[1].codebooks, strict=True))
    assert codebook_health(models[0], embedding_ND).levels[1].dead == 0


def test_revival_restarts_moving_averages_and_spares_the_codes_of_categories():
    embedding_ND, category_NH = sample()
    model = build(ema=0.9, category_column=1)
    model.initialise_codebooks(embedding_ND, category_NH, seed=1)
    first_KZ = model.codebook_0.clone()
    model.codebook_1[2:6] = 1e6
    assert revive_dead_codes(model, embedding_ND, category_NH, seed=1, epoch=0) >= 4
    assert torch.equal(model.codebook_0, first_KZ), "codes 6 and 7 are no category of the sample and stay"
    codes_NL = model.encode(embedding_ND, category_NH).codes_BL
    assert torch.equal(codes_NL[:, 0], category_NH[:, 1])
    for level in range(3):
        share_K = torch.bincount(codes_NL[:, level], minlength=8) / len(codes_NL)
        torch.testing.assert_close(getattr(model, f"share_{level}"), share_K)
