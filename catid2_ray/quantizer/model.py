"""The quantizer: encoder MLP, L residual codebooks, decoder MLP (CAT-ID², section 3, eqs. 1–3).

Unusual: `latent_radius` holds z on a sphere. The dispersion loss does not feel the scale of z, so eq. 2 shrinks a free
z until softmax(−‖r − e‖²) is flat and the usage term stops acting; a fixed radius gives the temperature of p a meaning.
Codes are also deterministic: `encode_padded` works in one fixed batch shape, so a row's codes and residual are the same
bits whatever rows travel with it. Without hidden layers it is plain residual k-means on the embedding. The encoder
"residual" begins as the identity, so that training starts from residual k-means of what the text encoder knows instead of
from random layers (benchmarks/results/ids.md has what queries find).

Shape letters: B, N rows, D embedding, Z latent, L levels, K codes, H category depth.
"""

import json
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, InputError, RecipeError
from catid2_ray.quantizer.kmeans import (
    balanced_residual_kmeans,
    category_residual_kmeans,
    nearest,
    residual_kmeans,
)

SETTINGS_FILE, WEIGHTS_FILE = "quantizer.json", "model.safetensors"
_LEAST_SHARE = 1e-12  # a code's share of the rows under which its average is no number worth dividing by


class Quantized(NamedTuple):
    """What training needs. Residuals carry gradient to the encoder, codewords to the codebooks of their own level."""

    latent_BZ: Tensor
    residual_LBZ: Tensor  # input of each level; level 0 is the latent
    codeword_LBZ: Tensor
    codes_BL: Tensor  # int64
    reconstruction_BD: Tensor


class Encoded(NamedTuple):
    """What assignment needs, without gradient."""

    codes_BL: Tensor  # int64
    residual_BZ: Tensor  # input of the last level


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers through `widths`, ReLU between them, none after the last."""
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def complete_folder(folder: str | Path) -> Path:
    """`folder`, which holds both files of a coder, or ArtifactError naming the one that is missing."""
    folder = Path(folder)
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} holds no {name}, so it is no complete quantizer: train it again")
    return folder


class ResidualQuantizer(nn.Module):
    """RQ-VAE over embeddings of `width`.

    `hidden`: widths of the encoder's hidden layers, mirrored in the decoder (not stated in the paper); None = no encoder
    at all, z is the embedding (RQ-KMeans, METHODS 0.3). `latent`: Z. `latent_radius`: norm of z in the unit of the
    codewords, None = free (not stated in the paper). `encoder`: "mlp" as printed, or "residual": z = d + f(d) held at length
    1, d̂ = ẑ + g(ẑ), f and g being 0 until they are trained; for a narrower latent d is first projected on fixed directions,
    which `initialise` takes from a sample. `projection`: with a head over z that only training uses (`step`, category_on
    "projection"); it is not saved. `category_column`: the first code is the row's category id in this
    column, the nearest codeword where it has none (CQ-SID, arXiv 2605.14434). `ema`: decay per step of codebooks that
    follow their rows by moving averages instead of gradients (METHODS 0.6). `balanced`: codes carry prices that make
    their clusters near-equal in size.

    Raises RecipeError for widths or a radius that are not positive, for an encoder of another name, for a residual one with a
    radius or a latent wider than the embedding, and what `DocidSpace` raises.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: tuple[int, ...] | None,
        latent: int,
        codes_per_level: tuple[int, ...],
        latent_radius: float | None = None,
        category_column: int | None = None,
        ema: float | None = None,
        balanced: bool = False,
        encoder: str = "mlp",
        projection: bool = False,
    ):
        super().__init__()
        self.width, self.latent = int(width), int(latent)
        self.hidden = None if hidden is None else tuple(int(h) for h in hidden)
        self.codes_per_level = DocidSpace(tuple(codes_per_level)).codes_per_level
        self.latent_radius, self.category_column = latent_radius, category_column
        self.ema, self.balanced, self.encoder_kind = ema, balanced, encoder
        self._check()
        if self.hidden is None:
            self.encoder = self.decoder = nn.Identity()
        else:
            self.encoder = _mlp((self.width, *self.hidden, self.latent))
            self.decoder = _mlp((self.latent, *self.hidden[::-1], self.width))
        if encoder == "residual":
            for last in (self.encoder[-1], self.decoder[-1]):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
            if self.latent < self.width:
                self.register_buffer("basis_DZ", torch.eye(self.width, self.latent))
        self.projection = _mlp((self.latent, self.latent, self.latent)) if projection else None
        scale = (latent_radius or 1.0) / self.latent**0.5
        for level, codes in enumerate(self.codes_per_level):
            start_KZ = torch.randn(codes, self.latent) * (scale / 2**level)
            if ema is None:
                self.register_parameter(f"codebook_{level}", nn.Parameter(start_KZ))
            else:
                self.register_buffer(f"codebook_{level}", start_KZ)
                self.register_buffer(f"share_{level}", torch.full((codes,), 1 / codes))
            if balanced:
                self.register_buffer(f"price_{level}", torch.zeros(codes))

    def _check(self) -> None:
        positive = min(self.width, self.latent, *(self.hidden or ())) >= 1
        if not positive or (self.latent_radius is not None and not self.latent_radius > 0):
            raise RecipeError(
                f"width, hidden, latent and latent_radius must be positive, "
                f"found {self.width}, {self.hidden}, {self.latent} and {self.latent_radius}"
            )
        if self.encoder_kind not in ("mlp", "residual"):
            raise RecipeError(f"encoder must be 'mlp' or 'residual', found {self.encoder_kind!r}")
        if self.encoder_kind == "residual" and (self.hidden is None or self.latent_radius is not None):
            raise RecipeError(
                f"encoder 'residual' needs hidden layers and holds z at length 1, found hidden {self.hidden} and latent_radius "
                f"{self.latent_radius}: leave the radius out"
            )
        if self.encoder_kind == "residual" and self.latent > self.width:
            raise RecipeError(
                f"encoder 'residual' begins as the identity: latent {self.latent} must not exceed the embedding's width, "
                f"{self.width}; lower quantizer.latent or leave it out"
            )
        if self.hidden is None and self.latent != self.width:
            raise RecipeError(
                f"without hidden layers z is the embedding: latent {self.latent} must be width {self.width}"
            )

    @property
    def codebooks(self) -> list[Tensor]:
        """One K_l×Z parameter (a buffer with `ema`) per level."""
        return [getattr(self, f"codebook_{level}") for level in range(len(self.codes_per_level))]

    @property
    def prices(self) -> list[Tensor | None]:
        """Per level what is taken off the squared distances, K_l, or None."""
        return [getattr(self, f"price_{level}", None) for level in range(len(self.codes_per_level))]

    def latents(self, embedding_BD: Tensor) -> Tensor:
        """z, B×Z. Raises InputError when the embeddings have another width."""
        if embedding_BD.ndim != 2 or embedding_BD.shape[1] != self.width:
            raise InputError(f"embeddings must be rows × {self.width}, found {tuple(embedding_BD.shape)}")
        latent_BZ = self.encoder(embedding_BD)
        if self.encoder_kind == "residual":
            basis_DZ = getattr(self, "basis_DZ", None)
            return functional.normalize(
                latent_BZ + (embedding_BD if basis_DZ is None else embedding_BD @ basis_DZ), dim=1
            )
        if self.latent_radius is None:
            return latent_BZ
        return self.latent_radius * functional.normalize(latent_BZ, dim=1)

    def reconstructed(self, latent_BZ: Tensor) -> Tensor:
        """d̂ of latents, B×D."""
        decoded_BD = self.decoder(latent_BZ)
        if self.encoder_kind == "mlp":
            return decoded_BD
        basis_DZ = getattr(self, "basis_DZ", None)
        return decoded_BD + (latent_BZ if basis_DZ is None else latent_BZ @ basis_DZ.T)

    def forward(self, embedding_BD: Tensor, category_BH: Tensor | None = None) -> Quantized:
        """Quantize with straight-through gradients: the decoder sees z + sg[ẑ − z] (section 3).

        r_{l+1} = r_l − sg[e_l]: a codeword learns from its own level only, while terms on deeper residuals (eq. 4)
        reach the encoder. `category_BH` matters with `category_column` only.
        """
        latent_BZ = residual_BZ = self.latents(embedding_BD)
        residuals, codewords, codes = [], [], []
        for level, codebook_KZ in enumerate(self.codebooks):
            codes_B = self.codes_of(level, residual_BZ.detach(), category_BH)
            codeword_BZ = functional.embedding(codes_B, codebook_KZ)
            residuals.append(residual_BZ)
            codewords.append(codeword_BZ)
            codes.append(codes_B)
            residual_BZ = residual_BZ - codeword_BZ.detach()
        reconstruction_BD = self.reconstructed(latent_BZ - residual_BZ.detach())
        return Quantized(
            latent_BZ, torch.stack(residuals), torch.stack(codewords), torch.stack(codes, 1), reconstruction_BD
        )

    @torch.no_grad()
    def codes_of(self, level: int, residual_BZ: Tensor, category_BH: Tensor | None = None) -> Tensor:
        """int64 B, the codes of one level: nearest codeword, ties to the lowest, or the category where it decides."""
        codes_B = nearest(residual_BZ, self.codebooks[level].detach(), self.prices[level])
        if level or self.category_column is None or category_BH is None:
            return codes_B
        forced_B = category_BH[:, self.category_column].long()
        return torch.where(forced_B >= 0, forced_B, codes_B)

    @torch.no_grad()
    def encode(self, embedding_BD: Tensor, category_BH: Tensor | None = None) -> Encoded:
        """Codes and last-level residuals; see `codes_of`."""
        residual_BZ, codes = self.latents(embedding_BD), []
        for level, codebook_KZ in enumerate(self.codebooks):
            codes.append(self.codes_of(level, residual_BZ, category_BH))
            if level < len(self.codes_per_level) - 1:
                residual_BZ = residual_BZ - codebook_KZ[codes[-1]]
        return Encoded(torch.stack(codes, 1), residual_BZ)

    @torch.no_grad()
    def encode_padded(self, embedding_ND: Tensor, category_NH: Tensor | None = None, *, rows: int) -> Encoded:
        """`encode` in batches of exactly `rows` (the last one padded), so that no result depends on its neighbours.

        Matrix products round differently for different batch shapes; in one shape a row comes out the same bit for bit
        in any order and any blocking of the table.
        """
        batch_RD = embedding_ND.new_zeros((rows, self.width))
        batch_RH = None if category_NH is None else category_NH.new_full((rows, category_NH.shape[1]), -1)
        parts = []
        for start in range(0, len(embedding_ND), rows):
            block_bD = embedding_ND[start : start + rows]
            batch_RD[: len(block_bD)] = block_bD
            if batch_RH is not None:
                batch_RH[: len(block_bD)] = category_NH[start : start + rows]
            parts.append([part[: len(block_bD)] for part in self.encode(batch_RD, batch_RH)])
        if not parts:
            return self.encode(embedding_ND, category_NH)
        codes, residuals = zip(*parts, strict=True)
        return Encoded(torch.cat(codes), torch.cat(residuals))

    @torch.no_grad()
    def decode(self, embedding_ND: Tensor, category_NH: Tensor | None = None) -> Tensor:
        """d̂, N×D: what the codes alone give back."""
        return self(embedding_ND, category_NH).reconstruction_BD

    @torch.no_grad()
    def initialise(self, sample_ND: Tensor, category_NH: Tensor | None = None, *, seed: int) -> None:
        """The start of a training: `initialise_codebooks`, after the directions of a residual encoder with a narrower latent
        were set to the sample's Z principal ones. Those are taken about 0, not about the mean: they lose least of d itself."""
        if hasattr(self, "basis_DZ"):
            sample_64 = sample_ND.double()
            basis_DZ = torch.linalg.eigh(sample_64.T @ sample_64).eigenvectors[:, -self.latent :].flip(1)
            # A direction's sign is free: its largest number is made positive, so that equal samples give equal directions.
            largest_1Z = basis_DZ.gather(0, basis_DZ.abs().argmax(0, keepdim=True))
            self.basis_DZ.copy_(basis_DZ * largest_1Z.sign())
        self.initialise_codebooks(sample_ND, category_NH, seed=seed)

    @torch.no_grad()
    def initialise_codebooks(
        self, sample_ND: Tensor, category_NH: Tensor | None = None, *, seed: int, warm: bool = False
    ) -> None:
        """Residual k-means on the latents of a sample: at the start, and once more at the end (see `step.fit`).

        `warm`: k-means starts from the codebooks that the model has instead of seeds from the sample, so that codes
        keep their meaning. With `category_column` a first codeword starts as the mean of its category, and those of no
        category in the sample as rows of it (`warm`: stay as they are). Raises CapacityError when there are fewer rows
        than codes.
        """
        latent_NZ, levels = self.latents(sample_ND), self.codes_per_level
        start = self.codebooks if warm else None
        if self.balanced:
            balanced = balanced_residual_kmeans(latent_NZ, codes_per_level=levels, seed=seed, start=start)
            codebooks = [level.codebook_KZ for level in balanced]
            for price_K, level in zip(self.prices, balanced, strict=True):
                price_K.copy_(level.price_K)
        elif self.category_column is None or category_NH is None:
            codebooks = residual_kmeans(latent_NZ, codes_per_level=levels, seed=seed, start=start)
        else:
            category_N = category_NH[:, self.category_column].long()
            codebooks = category_residual_kmeans(latent_NZ, category_N, codes_per_level=levels, seed=seed, start=start)
        for parameter_KZ, codebook_KZ in zip(self.codebooks, codebooks, strict=True):
            parameter_KZ.copy_(codebook_KZ)
        self.restart_averages(sample_ND, category_NH)

    @torch.no_grad()
    def renamed(self, rename_LK) -> Self:
        """This model, changed in place: code k of level l is code `rename_LK[l][k]` from now on.

        `rename_LK`: a permutation of 0 … K_l − 1 for each level. Codebooks, shares and prices follow, so `encode` gives
        the renamed codes and the same residuals, bit for bit; only a row equally near to two codewords, to rounding, may
        take the other one, for ties go to the lowest code. An optimiser's state does not follow.

        Raises InputError for another number of levels, for what is no permutation of a level's codes, and when the
        first level of a model with `category_column` would be renamed.
        """
        if len(rename_LK) != len(self.codes_per_level):
            raise InputError(
                f"the renaming has {len(rename_LK)} levels, the quantizer {len(self.codes_per_level)}: hand over one "
                f"permutation for each level"
            )
        rename_LK = [np.array(rename_K) for rename_K in rename_LK]
        for level, (rename_K, codes) in enumerate(zip(rename_LK, self.codes_per_level, strict=True)):
            if rename_K.ndim != 1 or not np.array_equal(np.sort(rename_K), np.arange(codes)):
                raise InputError(
                    f"the renaming of level {level} is no permutation of 0…{codes - 1}: some code would be lost or "
                    f"shared; use the one that was found for this quantizer"
                )
        if self.category_column is not None and not np.array_equal(rename_LK[0], np.arange(self.codes_per_level[0])):
            raise InputError(
                "level 0 cannot be renamed: with category_column the first code is the category's index; leave that "
                "level as it is"
            )
        for level, rename_K in enumerate(rename_LK):
            old_K = torch.from_numpy(np.argsort(rename_K))
            for name in ("codebook", "share", "price"):
                tensor = getattr(self, f"{name}_{level}", None)
                if tensor is not None:
                    tensor.copy_(tensor[old_K.to(tensor.device)])
        return self

    @torch.no_grad()
    def restart_averages(self, sample_ND: Tensor, category_NH: Tensor | None = None) -> None:
        """With `ema`: each code's share of the sample's rows, after codewords were set; else nothing."""
        if self.ema is None:
            return
        codes_NL = self.encode(sample_ND, category_NH).codes_BL
        for level, codes in enumerate(self.codes_per_level):
            count_K = torch.bincount(codes_NL[:, level], minlength=codes)
            getattr(self, f"share_{level}").copy_(count_K / len(sample_ND))

    @torch.no_grad()
    def follow(self, residual_LBZ: Tensor, codes_BL: Tensor, gather=None) -> None:
        """One step of moving averages over the rows of all ranks (METHODS 0.6); codes without rows stay where they are.

        share ← λ·share + (1 − λ)·rows of the code / rows; its sum share·e likewise; e = sum / share.
        """
        for level, codebook_KZ in enumerate(self.codebooks):
            codes_B, residual_BZ = codes_BL[:, level], residual_LBZ[level].detach()
            seen_KZ = residual_BZ.new_zeros(len(codebook_KZ), self.latent + 1)
            rows_BZ = torch.cat((residual_BZ, residual_BZ.new_ones(len(codes_B), 1)), 1)
            seen_KZ.index_add_(0, codes_B, rows_BZ)
            if gather is not None:
                seen_KZ = gather(seen_KZ[None]).sum(0)
            rows = seen_KZ[:, -1].sum().clamp_min(1)
            share_K, keep = getattr(self, f"share_{level}"), self.ema
            new_K = keep * share_K + (1 - keep) * seen_KZ[:, -1] / rows
            sum_KZ = keep * share_K[:, None] * codebook_KZ + (1 - keep) * seen_KZ[:, :-1] / rows
            alive_K1 = new_K[:, None] > _LEAST_SHARE
            mean_KZ = sum_KZ / new_K.clamp_min(_LEAST_SHARE)[:, None]
            # New tensors, since the backward pass of this step may still need the old ones.
            setattr(self, f"codebook_{level}", torch.where(alive_K1, mean_KZ, codebook_KZ))
            setattr(self, f"share_{level}", new_K)

    def settings(self) -> dict:
        """The keyword arguments that build this model again, without a training's head."""
        plain = ("latent_radius", "category_column", "ema", "balanced")
        return {
            "width": self.width,
            "hidden": None if self.hidden is None else list(self.hidden),
            "latent": self.latent,
            "codes_per_level": list(self.codes_per_level),
            "encoder": self.encoder_kind,
            **{name: getattr(self, name) for name in plain},
        }

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and quantizer.json into `folder`, which is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("projection.")}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
        save_file(state, folder / WEIGHTS_FILE)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The model that `save` wrote, on CPU. Raises ArtifactError naming the file that is missing or does not fit."""
        folder = complete_folder(folder)
        model = cls(**json.loads((folder / SETTINGS_FILE).read_text()))
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ArtifactError(f"{folder / WEIGHTS_FILE} does not fit {SETTINGS_FILE}: {error}") from error
        return model
