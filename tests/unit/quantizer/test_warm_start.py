"""A warm start of k-means: codes keep their meaning on a sample that has changed a little, and stay at a fixed point.

Unusual: the same seed on the changed sample is the rival, and names nearly every code anew; figures are over 3 levels.
"""

import copy

import pytest
import torch

from catid2_ray.errors import CapacityError, InputError
from catid2_ray.quantizer.kmeans import balanced_residual_kmeans, category_residual_kmeans, nearest, residual_kmeans
from catid2_ray.quantizer.model import ResidualQuantizer

FORMS = [{}, {"balanced": True}, {"category_column": 0}, {"ema": 0.9}]


def clumps(rows=2000, width=8, count=40, spread=0.3):
    """Rows around `count` centres, of near-equal number, and a category column in which some rows have none."""
    generator = torch.Generator().manual_seed(1)
    centre_CD = torch.randn(count, width, generator=generator)
    embedding_ND = centre_CD.repeat(-(-rows // count), 1)[:rows]
    embedding_ND = embedding_ND + spread * torch.randn(rows, width, generator=generator)
    return embedding_ND, torch.randint(-1, 12, (rows, 1), generator=generator)


def built(embedding_ND, category_NH, *, levels=(16, 16, 16), **form) -> ResidualQuantizer:
    torch.manual_seed(0)
    width = embedding_ND.shape[1]
    model = ResidualQuantizer(width=width, hidden=None, latent=width, codes_per_level=levels, **form)
    model.initialise_codebooks(embedding_ND, category_NH, seed=0)
    return model


def settled(model, embedding_ND, category_NH, rounds=30):
    """Warm rounds on the same sample until the codebooks are the same bits twice."""
    for _ in range(rounds):
        before = [codebook_KZ.detach().clone() for codebook_KZ in model.codebooks]
        model.initialise_codebooks(embedding_ND, category_NH, seed=0, warm=True)
        if all(map(torch.equal, before, model.codebooks)):
            return model
    raise AssertionError(f"no fixed point in {rounds} rounds")


@pytest.mark.parametrize("form", FORMS)
def test_most_codes_stay_on_a_sample_that_has_changed_a_little(form):
    embedding_ND, category_NH = clumps()
    model = built(embedding_ND, category_NH, **form)
    kept_N = torch.randperm(2000, generator=torch.Generator().manual_seed(2))[:1900]
    changed_ND = embedding_ND[kept_N] + 0.02 * torch.randn(1900, 8, generator=torch.Generator().manual_seed(3))
    codes_NL, share = model.encode(embedding_ND, category_NH).codes_BL[kept_N], {}
    for warm in (True, False):
        again = copy.deepcopy(model)
        again.initialise_codebooks(changed_ND, category_NH[kept_N], seed=0, warm=warm)
        same_NL = again.encode(changed_ND, category_NH[kept_N]).codes_BL == codes_NL
        first = 1 if "category_column" in form else 0  # its first code is the category with any start
        share[warm] = same_NL[:, first:].float().mean().item()
    assert share[True] > 0.7
    assert share[False] < 0.2


@pytest.mark.parametrize("form", [{}, {"category_column": 0}, {"ema": 0.9}])
def test_nothing_changes_at_a_fixed_point(form):
    embedding_ND, category_NH = clumps()
    model = settled(built(embedding_ND, category_NH, levels=(16, 8), **form), embedding_ND, category_NH)
    before = copy.deepcopy(model)
    order_N = torch.randperm(2000, generator=torch.Generator().manual_seed(4))
    model.initialise_codebooks(embedding_ND[order_N], category_NH[order_N], seed=9, warm=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name], rtol=0, atol=1e-5)
    encoded, expected = model.encode(embedding_ND, category_NH), before.encode(embedding_ND, category_NH)
    assert torch.equal(encoded.codes_BL, expected.codes_BL)


def test_the_balanced_form_stays_where_clusters_are_even_and_near_it_elsewhere():
    embedding_ND, _ = clumps(rows=1600, count=16, spread=0.05)
    model = settled(built(embedding_ND, None, levels=(16,), balanced=True), embedding_ND, None)
    before = copy.deepcopy(model)
    model.initialise_codebooks(embedding_ND.flip(0), seed=9, warm=True)
    torch.testing.assert_close(model.codebooks[0], before.codebooks[0], rtol=0, atol=1e-5)
    # Prices balance to a tolerance, so elsewhere a round on the same rows moves those between two clusters.
    embedding_ND, _ = clumps()
    model = built(embedding_ND, None, levels=(16, 8), balanced=True)
    codes_NL = model.encode(embedding_ND).codes_BL
    model.initialise_codebooks(embedding_ND, seed=0, warm=True)
    assert (model.encode(embedding_ND).codes_BL == codes_NL).float().mean() > 0.9
    size_K = torch.bincount(model.encode(embedding_ND).codes_BL[:, 0], minlength=16)
    assert (size_K - 125).abs().max() <= 0.05 * 125


def test_deterministic_and_no_seed_is_used():
    embedding_ND, category_NH = clumps()
    for form in FORMS:
        models = [built(embedding_ND[:1500], category_NH[:1500], **form) for _ in range(2)]
        for seed, model in enumerate(models):
            model.initialise_codebooks(embedding_ND, category_NH, seed=seed, warm=True)
        first, second = (model.state_dict() for model in models)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_levels_start_on_the_residuals_of_the_new_levels_and_leave_the_start_alone():
    embedding_ND, _ = clumps()
    start = residual_kmeans(embedding_ND[:500], codes_per_level=(8, 4), seed=0)
    copies = [codebook_KZ.clone() for codebook_KZ in start]
    first_KZ, second_KZ = residual_kmeans(embedding_ND, codes_per_level=(8, 4), seed=0, start=start)
    assert all(map(torch.equal, start, copies))
    [alone_KZ] = residual_kmeans(embedding_ND, codes_per_level=(8,), seed=1, start=start[:1])
    assert torch.equal(first_KZ, alone_KZ)
    residual_NZ = embedding_ND - first_KZ[nearest(embedding_ND, first_KZ)]
    [alone_KZ] = residual_kmeans(residual_NZ, codes_per_level=(4,), seed=1, start=start[1:])
    assert torch.equal(second_KZ, alone_KZ)


def test_a_category_without_rows_keeps_its_codeword():
    embedding_ND, category_NH = clumps()
    model = built(embedding_ND, category_NH, category_column=0)
    before_KZ = model.codebooks[0].detach().clone()
    rest_N = torch.nonzero(category_NH[:, 0] != 5).flatten()
    model.initialise_codebooks(embedding_ND[rest_N], category_NH[rest_N], seed=3, warm=True)
    assert torch.equal(model.codebooks[0][[5, 12, 13, 14, 15]], before_KZ[[5, 12, 13, 14, 15]])


def test_a_code_without_rows_starts_again_on_a_row():
    embedding_ND, _ = clumps(rows=200, count=4, spread=0.01)
    start_KZ = torch.cat((embedding_ND[:4], torch.full((1, 8), 99.0)))
    [codebook_KZ] = residual_kmeans(embedding_ND, codes_per_level=(5,), seed=0, start=[start_KZ])
    assert len(nearest(embedding_ND, codebook_KZ).unique()) == 5


@pytest.mark.parametrize(
    "start, found",
    [
        ([torch.zeros(4, 8)], r"\[\(4, 8\)\]"),
        ([torch.zeros(4, 8), torch.zeros(3, 8)], r"\[\(4, 8\), \(3, 8\)\]"),
        ([torch.zeros(4, 8), torch.zeros(2, 7)], r"\[\(4, 8\), \(2, 7\)\]"),
    ],
)
def test_a_start_of_other_shapes_is_refused(start, found):
    embedding_ND, category_NH = clumps(rows=50)
    for fit in (
        residual_kmeans,
        balanced_residual_kmeans,
        lambda x, **more: category_residual_kmeans(x, category_NH[:, 0] % 4, **more),
    ):
        with pytest.raises(
            InputError, match=rf"cannot start from codebooks of shapes {found}, expected \[\(4, 8\), \(2"
        ):
            fit(embedding_ND, codes_per_level=(4, 2), seed=0, start=start)


def test_a_warm_start_needs_as_many_rows_as_codes_too():
    embedding_ND, _ = clumps()
    model = built(embedding_ND, None)
    with pytest.raises(CapacityError, match="15 rows cannot start a level of 16 codes"):
        model.initialise_codebooks(embedding_ND[:15], seed=0, warm=True)
