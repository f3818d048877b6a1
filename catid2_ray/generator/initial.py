"""First values of the ID tokens' rows: codewords projected into the embedding's space, so that near codes begin near.

L levels, K codes, Z width of a codeword, D width of a row, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import RecipeError

_LEAST_TEXT_ROWS = 16


def init_docid_rows(
    model: nn.Module, codebooks: Sequence[np.ndarray | None] | None, *, space: DocidSpace, seed: int = 0
) -> None:
    """Set the last ΣK rows of the input table, and of the output table where that is another, in place.

    `codebooks`: per level K×Z or None. A level with codewords gets them centred, projected by D×Z orthonormal columns drawn
    from `seed` (columns of one matrix for all levels where ΣZ ≤ D, so that levels do not overlap), scaled to the spread
    of the table's text rows and set around their mean. Others get the mean plus noise of a fifth of the spread. A table
    without text rows (an EncoderDecoder's) keeps the mean 0 and the spread that it was drawn with, and its rows where
    there are no codewords. Raises RecipeError when a codebook has another number of codes than the level.
    """
    books = list(codebooks or [])[: space.levels]
    books += [None] * (space.levels - len(books))
    for level, (book_KZ, k) in enumerate(zip(books, space.codes_per_level)):
        if book_KZ is not None and len(book_KZ) != k:
            raise RecipeError(
                f"level {level + 1} has {k} codes but a codebook of {len(book_KZ)} codewords; take IDs and codebooks from one "
                "quantizer"
            )
    tables = {id(table): table for table in (model.shared.weight, model.lm_head.weight)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table_VD in tables.values():
            _set_rows(table_VD, books, space, generator)


def _set_rows(table_VD: Tensor, books, space: DocidSpace, generator: torch.Generator) -> None:
    base, width = len(table_VD) - sum(space.codes_per_level), table_VD.shape[1]
    text = base >= _LEAST_TEXT_ROWS
    mean_D = table_VD[:base].mean(0) if text else torch.zeros_like(table_VD[0])
    spread_D = table_VD[:base].std(0) if text else table_VD[base:].std().expand(width)
    noise_KD = torch.randn(len(table_VD) - base, width, generator=generator).to(table_VD)
    projections = iter(_projections([book.shape[1] for book in books if book is not None], width, generator))
    first = 0
    for book_KZ, k in zip(books, space.codes_per_level):
        rows = slice(base + first, base + first + k)
        if book_KZ is not None:
            codeword_KZ = torch.as_tensor(np.asarray(book_KZ, np.float32))
            row_KD = ((codeword_KZ - codeword_KZ.mean(0)) @ next(projections).T).to(table_VD)
            table_VD[rows] = mean_D + row_KD * (spread_D.square().mean().sqrt() / row_KD.std().clamp(min=1e-12))
        elif text:
            table_VD[rows] = mean_D + 0.2 * spread_D * noise_KD[first : first + k]
        first += k


def _projections(widths: list[int], width: int, generator: torch.Generator) -> list[Tensor]:
    """D×Z per level with orthonormal columns (rows where Z > D), of one draw where all columns fit into D."""

    def orthonormal(z: int) -> Tensor:
        q = torch.linalg.qr(torch.randn(max(width, z), min(width, z), generator=generator))[0]
        return q if z <= width else q.T

    if widths and sum(widths) <= width:
        return list(orthonormal(sum(widths)).split(widths, 1))
    return [orthonormal(z) for z in widths]
