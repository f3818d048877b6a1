"""The model: codes against an oracle, straight-through gradients, row invariance, k-means start, saving, renaming.

Unusual: row invariance is tested bit for bit, on shuffled tables and odd lengths.
"""

import numpy as np
import pytest
import torch

from catid2_ray.errors import ArtifactError, CapacityError, InputError, RecipeError
from catid2_ray.identifiers import realign
from catid2_ray.quantizer.kmeans import nearest, residual_kmeans, squared_error
from catid2_ray.quantizer.model import ResidualQuantizer
from tests.oracles import quantizer as oracle


def build(seed=0, **changes) -> ResidualQuantizer:
    torch.manual_seed(seed)
    return ResidualQuantizer(**{"width": 12, "hidden": (16,), "latent": 6, "codes_per_level": (8, 5, 4)} | changes)


def test_codes_and_residuals_equal_oracle():
    model, embedding_BD = build().double(), torch.randn(40, 12, dtype=torch.float64)
    encoded = model.encode(embedding_BD)
    latent_BZ = model.latents(embedding_BD).detach().numpy()
    codes_BL, residual_BZ = oracle.codes(latent_BZ, [c.detach().numpy() for c in model.codebooks])
    assert encoded.codes_BL.dtype == torch.int64
    np.testing.assert_array_equal(encoded.codes_BL, codes_BL)
    np.testing.assert_allclose(encoded.residual_BZ, residual_BZ, atol=1e-12)
    quantized = model(embedding_BD)
    np.testing.assert_array_equal(quantized.codes_BL, codes_BL)
    torch.testing.assert_close(quantized.residual_LBZ[-1], encoded.residual_BZ)
    expected_BD = model.decoder(quantized.codeword_LBZ.sum(0))
    torch.testing.assert_close(quantized.reconstruction_BD, expected_BD)


def test_ties_go_to_the_lowest_code():
    codebook_KZ = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), codebook_KZ).tolist() == [1, 1]


def test_straight_through_gradient_passes_the_codebooks():
    model, embedding_BD = build(), torch.randn(10, 12)
    quantized = model(embedding_BD)
    quantized.reconstruction_BD.square().sum().backward()
    assert all(c.grad is None or not c.grad.any() for c in model.codebooks)
    assert model.encoder[0].weight.grad.abs().sum() > 0


def test_latent_radius_holds_the_norm():
    model = build(latent_radius=4.0)
    torch.testing.assert_close(model.latents(torch.randn(5, 12)).norm(dim=1), torch.full((5,), 4.0))


@pytest.mark.parametrize("latent", [12, 6])
def test_a_residual_encoder_equals_the_oracle_and_begins_as_the_identity(latent):
    model = build(encoder="residual", latent=latent).double()
    sample_ND = torch.randn(200, 12, dtype=torch.float64) * torch.linspace(2, 0.5, 12, dtype=torch.float64)
    model.initialise(sample_ND, seed=0)
    unit_BD = torch.nn.functional.normalize(sample_ND[:9], dim=1)
    if latent == 12:
        torch.testing.assert_close(model.latents(sample_ND[:9]), unit_BD)
        torch.testing.assert_close(model.reconstructed(model.latents(unit_BD)), unit_BD)
        plain = residual_kmeans(torch.nn.functional.normalize(sample_ND, dim=1), codes_per_level=(8, 5, 4), seed=0)
        torch.testing.assert_close([book.detach() for book in model.codebooks], plain)
    else:
        singular = torch.linalg.svd(sample_ND).Vh[:6].T
        torch.testing.assert_close(model.basis_DZ @ model.basis_DZ.T, singular @ singular.T)
        again = build(encoder="residual", latent=latent).double()
        again.initialise(sample_ND.flip(0), seed=0)
        torch.testing.assert_close(again.basis_DZ, model.basis_DZ)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    expected_BZ, expected_BD = oracle.residual_latents(model, sample_ND[:9].numpy())
    np.testing.assert_allclose(model.latents(sample_ND[:9]).detach(), expected_BZ, atol=1e-10)
    np.testing.assert_allclose(
        model.reconstructed(model.latents(sample_ND[:9])).detach(), expected_BD, rtol=1e-10, atol=1e-9
    )


def test_a_head_for_training_alone_is_not_saved(tmp_path):
    build(encoder="residual", projection=True).save(tmp_path)
    again = ResidualQuantizer.load(tmp_path)
    assert again.projection is None and again.encoder_kind == "residual" and again.basis_DZ.shape == (12, 6)


@pytest.mark.parametrize("encoder", ["mlp", "residual"])
@pytest.mark.parametrize("rows", [64, 256])
def test_padded_codes_do_not_depend_on_order_or_blocking(rows, encoder):
    model = build(width=48, hidden=(64,), latent=32, codes_per_level=(64, 64, 64, 64), encoder=encoder)
    embedding_ND = torch.randn(613, 48)
    whole = model.encode_padded(embedding_ND, rows=rows)
    order = torch.randperm(613)
    for start, stop in [(0, 613), (0, 1), (100, 357), (5, 612)]:
        some = order[start:stop]
        part = model.encode_padded(embedding_ND[some], rows=rows)
        assert torch.equal(part.codes_BL, whole.codes_BL[some])
        assert torch.equal(part.residual_BZ, whole.residual_BZ[some])
    assert model.encode_padded(embedding_ND[:0], rows=rows).codes_BL.shape == (0, 4)


def test_save_and_load(tmp_path):
    model, embedding_BD = build(latent_radius=2.0), torch.randn(9, 12)
    model.save(tmp_path / "quantizer")
    again = ResidualQuantizer.load(tmp_path / "quantizer")
    assert again.settings() == model.settings()
    torch.testing.assert_close(again(embedding_BD), model(embedding_BD), rtol=0, atol=0)
    (tmp_path / "quantizer" / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"holds no model\.safetensors, so it is no complete quantizer"):
        ResidualQuantizer.load(tmp_path / "quantizer")
    build(latent=5).save(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "quantizer" / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"does not fit quantizer\.json"):
        ResidualQuantizer.load(tmp_path / "quantizer")


def test_bad_settings_and_inputs_are_named():
    with pytest.raises(RecipeError, match=r"must be positive, found 12, \(16,\), 6 and -1\.0"):
        build(latent_radius=-1.0)
    with pytest.raises(RecipeError, match="'residual' needs hidden layers and holds z at length 1.*radius 2.0"):
        build(encoder="residual", latent_radius=2.0)
    with pytest.raises(RecipeError, match="latent 13 must not exceed the embedding's width, 12"):
        build(encoder="residual", latent=13)
    with pytest.raises(RecipeError, match="encoder must be 'mlp' or 'residual', found 'rnn'"):
        build(encoder="rnn")
    with pytest.raises(InputError, match=r"embeddings must be rows × 12, found \(3, 11\)"):
        build().encode(torch.zeros(3, 11))
    with pytest.raises(
        CapacityError, match=r"7 rows cannot start a level of 8 codes .* lower quantizer\.codes_per_level"
    ):
        build().initialise_codebooks(torch.randn(7, 12), seed=0)


def test_kmeans_finds_planted_clusters_and_repeats():
    generator = torch.Generator().manual_seed(1)
    centre_KZ = torch.randn(8, 4, generator=generator) * 20
    point_NZ = centre_KZ.repeat_interleave(30, 0) + torch.randn(240, 4, generator=generator) * 0.1
    first, second = residual_kmeans(point_NZ, codes_per_level=(8, 4), seed=5)
    assert torch.cdist(centre_KZ, first).min(1).values.max() < 0.2
    again = residual_kmeans(point_NZ, codes_per_level=(8, 4), seed=5)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


def test_kmeans_lowers_the_error_level_by_level_and_leaves_no_cluster_empty():
    point_NZ = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    residual_NZ, error = point_NZ, float(point_NZ.square().sum())
    for codebook_KZ in residual_kmeans(point_NZ, codes_per_level=(32, 32, 32), seed=0):
        codes_N = nearest(residual_NZ, codebook_KZ)
        assert len(codes_N.unique()) == 32
        assert float(squared_error(residual_NZ, codebook_KZ, codes_N).sum()) < 0.8 * error
        residual_NZ = residual_NZ - codebook_KZ[codes_N]
        error = float(residual_NZ.square().sum())


def test_kmeans_survives_equal_rows():
    first, second = residual_kmeans(torch.ones(10, 3), codes_per_level=(4, 4), seed=0)
    assert torch.isfinite(first).all() and torch.isfinite(second).all()


def forced(**more) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(width=6, hidden=(8,), latent=3, codes_per_level=(4, 5), category_column=1, **more)


def test_the_category_is_the_first_code_and_unknown_ones_take_the_nearest():
    model, embedding_BD = forced(), torch.randn(5, 6)
    category_BH = torch.tensor([[0, 3], [0, 2], [1, -1], [-1, -1], [1, 0]])
    free_BL = model.encode(embedding_BD).codes_BL
    codes_BL = model.encode(embedding_BD, category_BH).codes_BL
    assert codes_BL[[0, 1, 4], 0].tolist() == [3, 2, 0]
    assert codes_BL[[2, 3], 0].tolist() == free_BL[[2, 3], 0].tolist()
    assert torch.equal(model(embedding_BD, category_BH).codes_BL, codes_BL)
    padded = model.encode_padded(embedding_BD, category_BH, rows=4)
    assert torch.equal(padded.codes_BL, codes_BL)


def test_forced_codewords_start_as_their_categories_means():
    model, sample_ND = forced(), torch.randn(40, 6)
    category_NH = torch.stack((torch.zeros(40, dtype=torch.int64), torch.arange(40) % 3), 1)
    model.initialise_codebooks(sample_ND, category_NH, seed=0)
    latent_NZ = model.latents(sample_ND).detach()
    for category in range(3):
        torch.testing.assert_close(model.codebooks[0][category].detach(), latent_NZ[category::3].mean(0))


def test_moving_averages_are_those_of_the_loop():
    torch.manual_seed(1)
    model = ResidualQuantizer(width=4, hidden=(4,), latent=2, codes_per_level=(3, 3), ema=0.75)
    assert not [name for name, _ in model.named_parameters() if "codebook" in name]
    sample_ND = torch.randn(30, 4)
    model.initialise_codebooks(sample_ND, seed=0)
    expected = []
    with torch.no_grad():
        quantized = model(sample_ND[:12])
    for level in range(2):
        share_K, codebook_KZ = getattr(model, f"share_{level}").clone(), model.codebooks[level].clone()
        for code in range(3):
            rows_BZ = quantized.residual_LBZ[level][quantized.codes_BL[:, level] == code]
            new = 0.75 * share_K[code] + 0.25 * len(rows_BZ) / 12
            total_Z = 0.75 * share_K[code] * codebook_KZ[code] + 0.25 * rows_BZ.sum(0) / 12
            codebook_KZ[code] = total_Z / new
        expected.append(codebook_KZ)
    model.follow(quantized.residual_LBZ, quantized.codes_BL)
    for level in range(2):
        torch.testing.assert_close(model.codebooks[level], expected[level])


def test_without_an_encoder_the_latent_is_the_embedding(tmp_path):
    model = ResidualQuantizer(width=4, hidden=None, latent=4, codes_per_level=(5, 5), balanced=True)
    sample_ND = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    model.initialise_codebooks(sample_ND, seed=0)
    assert torch.equal(model.latents(sample_ND), sample_ND)
    count_K = torch.bincount(model.encode(sample_ND).codes_BL[:, 0], minlength=5)
    assert count_K.min() >= 36 and count_K.max() <= 44
    model.save(tmp_path)
    again = ResidualQuantizer.load(tmp_path)
    assert torch.equal(again.encode(sample_ND).codes_BL, model.encode(sample_ND).codes_BL)
    with pytest.raises(RecipeError, match="latent 3 must be width 4"):
        ResidualQuantizer(width=4, hidden=None, latent=3, codes_per_level=(5,))


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"codes_per_level": (64, 17)},
        {"latent_radius": 2.0, "ema": 0.9},
        {"hidden": None, "latent": 12, "balanced": True},
        {"category_column": 0},
    ],
)
def test_a_renamed_model_gives_the_renamed_codes_and_the_same_residuals(form, tmp_path):
    model, rng = build(**form), np.random.default_rng(3)
    generator = torch.Generator().manual_seed(3)
    embedding_ND = torch.randn(613, 12, generator=generator)
    category_NH = torch.randint(-1, model.codes_per_level[0], (613, 1), generator=generator)
    model.initialise_codebooks(embedding_ND, category_NH, seed=0)
    before, parameters = model.encode_padded(embedding_ND, category_NH, rows=64), list(model.parameters())
    tables = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rename_LK = [rng.permutation(codes) for codes in model.codes_per_level]
    if "category_column" in form:
        rename_LK[0] = np.arange(model.codes_per_level[0])
    assert model.renamed(rename_LK) is model
    after = model.encode_padded(embedding_ND, category_NH, rows=64)
    np.testing.assert_array_equal(after.codes_BL, realign.apply(before.codes_BL.numpy(), rename_LK))
    assert torch.equal(after.residual_BZ, before.residual_BZ)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    for level, rename_K in enumerate(rename_LK):
        for name in {f"codebook_{level}", f"share_{level}", f"price_{level}"} & set(tables):
            for code, renamed in enumerate(rename_K):
                assert torch.equal(model.state_dict()[name][renamed], tables[name][code])
    model.save(tmp_path)
    assert torch.equal(ResidualQuantizer.load(tmp_path).encode_padded(embedding_ND, category_NH, rows=64)[0], after[0])
    model.renamed(realign.inverse(rename_LK))
    assert all(torch.equal(model.state_dict()[name], tables[name]) for name in tables)


@pytest.mark.parametrize(
    "form, rename_LK, message",
    [
        ({}, [range(8), range(5)], "the renaming has 2 levels, the quantizer 3: hand over one permutation"),
        ({}, [range(8), [0, 1, 2, 3, 3], range(4)], "renaming of level 1 is no permutation of 0…4: some code would be"),
        ({}, [range(8), range(5), range(5)], "renaming of level 2 is no permutation of 0…3"),
        ({}, [range(8), range(5), [[0, 1], [2, 3]]], "renaming of level 2 is no permutation of 0…3"),
        ({"category_column": 0}, [[1, 0, *range(2, 8)], range(5), range(4)], "level 0 cannot be renamed: with categ"),
    ],
)
def test_a_wrong_renaming_is_refused_and_changes_nothing(form, rename_LK, message):
    model = build(**form)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        model.renamed(rename_LK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
