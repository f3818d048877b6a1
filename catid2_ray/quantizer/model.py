"""The quantizer: encoder MLP, L residual codebooks, decoder MLP (CAT-ID², section 3, eqs. 1–3).

Unusual: `latent_radius` holds z on a sphere. The dispersion loss does not feel the scale of z, so eq. 2 shrinks a free
z until softmax(−‖r − e‖²) is flat and the usage term stops acting; a fixed radius gives the temperature of p a meaning.
Codes are also deterministic: `encode_padded` works in one fixed batch shape, so a row's codes and residual are the same
bits whatever rows travel with it.

Shape letters: B, N rows, D embedding, Z latent, L levels, K codes.
"""

import json
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, InputError, RecipeError
from catid2_ray.quantizer.kmeans import nearest, residual_kmeans

SETTINGS_FILE, WEIGHTS_FILE = "quantizer.json", "model.safetensors"


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
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ResidualQuantizer(nn.Module):
    """RQ-VAE over embeddings of `width`.

    `hidden`: widths of the encoder's hidden layers, mirrored in the decoder (not stated in the paper); `latent`: Z;
    `latent_radius`: norm of z in the unit of the codewords, None = free (not stated in the paper).
    Raises RecipeError for widths or a radius that are not positive, and what `DocidSpace` raises.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: tuple[int, ...],
        latent: int,
        codes_per_level: tuple[int, ...],
        latent_radius: float | None = None,
    ):
        super().__init__()
        self.width, self.hidden, self.latent = int(width), tuple(int(h) for h in hidden), int(latent)
        self.codes_per_level = DocidSpace(tuple(codes_per_level)).codes_per_level
        self.latent_radius = latent_radius
        if min(self.width, self.latent, *self.hidden) < 1 or (latent_radius is not None and not latent_radius > 0):
            raise RecipeError(
                f"width, hidden, latent and latent_radius must be positive, "
                f"found {width}, {self.hidden}, {latent} and {latent_radius}"
            )
        self.encoder = _mlp((self.width, *self.hidden, self.latent))
        self.decoder = _mlp((self.latent, *self.hidden[::-1], self.width))
        scale = (latent_radius or 1.0) / self.latent**0.5
        for level, codes in enumerate(self.codes_per_level):
            start_KZ = torch.randn(codes, self.latent) * (scale / 2**level)
            self.register_parameter(f"codebook_{level}", nn.Parameter(start_KZ))

    @property
    def codebooks(self) -> list[nn.Parameter]:
        """One K_l×Z parameter per level."""
        return [getattr(self, f"codebook_{level}") for level in range(len(self.codes_per_level))]

    def latents(self, embedding_BD: Tensor) -> Tensor:
        """z, B×Z. Raises InputError when the embeddings have another width."""
        if embedding_BD.ndim != 2 or embedding_BD.shape[1] != self.width:
            raise InputError(f"embeddings must be rows × {self.width}, found {tuple(embedding_BD.shape)}")
        latent_BZ = self.encoder(embedding_BD)
        if self.latent_radius is None:
            return latent_BZ
        return self.latent_radius * functional.normalize(latent_BZ, dim=1)

    def forward(self, embedding_BD: Tensor) -> Quantized:
        """Quantize with straight-through gradients: the decoder sees z + sg[ẑ − z] (section 3).

        r_{l+1} = r_l − sg[e_l]: a codeword learns from its own level only, while terms on deeper residuals (eq. 4)
        reach the encoder.
        """
        latent_BZ = residual_BZ = self.latents(embedding_BD)
        residuals, codewords, codes = [], [], []
        for codebook_KZ in self.codebooks:
            codes_B = nearest(residual_BZ.detach(), codebook_KZ.detach())
            codeword_BZ = functional.embedding(codes_B, codebook_KZ)
            residuals.append(residual_BZ)
            codewords.append(codeword_BZ)
            codes.append(codes_B)
            residual_BZ = residual_BZ - codeword_BZ.detach()
        reconstruction_BD = self.decoder(latent_BZ - residual_BZ.detach())
        return Quantized(
            latent_BZ, torch.stack(residuals), torch.stack(codewords), torch.stack(codes, 1), reconstruction_BD
        )

    @torch.no_grad()
    def encode(self, embedding_BD: Tensor) -> Encoded:
        """Codes and last-level residuals; the nearest codeword at each level, ties to the lowest code."""
        residual_BZ, codes = self.latents(embedding_BD), []
        for level, codebook_KZ in enumerate(self.codebooks):
            codes.append(nearest(residual_BZ, codebook_KZ))
            if level < len(self.codes_per_level) - 1:
                residual_BZ = residual_BZ - codebook_KZ[codes[-1]]
        return Encoded(torch.stack(codes, 1), residual_BZ)

    @torch.no_grad()
    def encode_padded(self, embedding_ND: Tensor, *, rows: int) -> Encoded:
        """`encode` in batches of exactly `rows` (the last one padded), so that no result depends on its neighbours.

        Matrix products round differently for different batch shapes; in one shape a row comes out the same bit for bit
        in any order and any blocking of the table.
        """
        batch_RD = embedding_ND.new_zeros((rows, self.width))
        parts = []
        for block_bD in embedding_ND.split(rows):
            batch_RD[: len(block_bD)] = block_bD
            parts.append([part[: len(block_bD)] for part in self.encode(batch_RD)])
        if not parts:
            return self.encode(embedding_ND)
        codes, residuals = zip(*parts, strict=True)
        return Encoded(torch.cat(codes), torch.cat(residuals))

    @torch.no_grad()
    def initialise_codebooks(self, sample_ND: Tensor, *, seed: int) -> None:
        """Residual k-means on the latents of a sample: at the start, and once more at the end (see `step.fit`).

        Raises CapacityError when there are fewer rows than codes.
        """
        found = residual_kmeans(self.latents(sample_ND), codes_per_level=self.codes_per_level, seed=seed)
        for parameter_KZ, codebook_KZ in zip(self.codebooks, found, strict=True):
            parameter_KZ.copy_(codebook_KZ)

    def settings(self) -> dict:
        """The keyword arguments that build this model again."""
        return {
            "width": self.width,
            "hidden": list(self.hidden),
            "latent": self.latent,
            "codes_per_level": list(self.codes_per_level),
            "latent_radius": self.latent_radius,
        }

    def save(self, folder: str | Path) -> None:
        """Write model.safetensors and quantizer.json into `folder`, which is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS_FILE)
        (folder / SETTINGS_FILE).write_text(json.dumps(self.settings(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The model that `save` wrote, on CPU. Raises ArtifactError naming the file that is missing or does not fit."""
        folder = Path(folder)
        for name in (SETTINGS_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder} holds no {name}, so it is no complete quantizer: train it again")
        model = cls(**json.loads((folder / SETTINGS_FILE).read_text()))
        try:
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        except (RuntimeError, OSError) as error:
            raise ArtifactError(f"{folder / WEIGHTS_FILE} does not fit {SETTINGS_FILE}: {error}") from error
        return model
