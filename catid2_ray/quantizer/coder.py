"""Whatever turns products into codes, read back from its folder: a trained or fitted quantizer, or a tree.

A coder's codes may still be shared by several products; what makes IDs of them is the recipe's `quantizer.ids`.
"""

import json
from pathlib import Path

from torch import Tensor

from catid2_ray.errors import ArtifactError
from catid2_ray.quantizer.model import SETTINGS_FILE, Encoded, ResidualQuantizer
from catid2_ray.quantizer.tree import TreeCoder

Coder = ResidualQuantizer | TreeCoder


def load_coder(folder: str | Path) -> Coder:
    """What `save` of either class wrote, on CPU. Raises ArtifactError naming what is missing or does not fit."""
    path = Path(folder) / SETTINGS_FILE
    try:
        kind = json.loads(path.read_text()).get("class", "residual")
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}), so {folder} is no quantizer: train it again") from None
    return TreeCoder.load(folder) if kind == "tree" else ResidualQuantizer.load(folder).eval()


def encode(coder: Coder, embedding_ND: Tensor, category_NH: Tensor, *, rows: int) -> Encoded:
    """Codes N×L and last-level residuals N×Z (N×0 for a tree), each row's the same bits whatever rows are beside it.

    `rows`: the one batch shape that a `ResidualQuantizer` works in.
    """
    if isinstance(coder, TreeCoder):
        return Encoded(coder.encode(embedding_ND, category_NH), embedding_ND.new_empty(len(embedding_ND), 0))
    return coder.encode_padded(embedding_ND, category_NH, rows=rows)
