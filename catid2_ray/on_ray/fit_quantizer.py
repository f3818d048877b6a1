"""How a quantizer begins: kinds that are fitted at once, and the weights of the current release for a warm start."""

import numpy as np
import torch

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.config import QuantizerRecipe
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.assign.work import open_coder
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.quantizer.coder import Coder
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.tree import TreeCoder


def fit_coder(
    recipe: QuantizerRecipe, sample_ND: np.ndarray, category_NH: np.ndarray, taxonomy: Taxonomy, *, rows: int, seed: int,
    warm: ResidualQuantizer | None = None,
) -> Coder:  # fmt: skip
    """A kind that is fitted at once. `rows`: products of the whole catalogue, of which the sample is a uniform part;
    `taxonomy`: all its categories, also those that the sample lacks; `warm`: the quantizer to start from."""
    sample, category = torch.from_numpy(sample_ND), torch.from_numpy(category_NH).long()
    if recipe.coder == "tree":
        if not recipe.branch:
            return TreeCoder.empty()
        paths = [path for level in taxonomy.levels for path in level]
        depth = category.shape[1] if recipe.tree_categories and paths else 0
        paths_CH = torch.tensor([taxonomy.path_ids(path)[:depth] for path in paths])
        return TreeCoder.fit(
            sample, category, branch=recipe.branch, leaf=recipe.leaf, category_depth=depth,
            paths_CH=paths_CH if depth else None, total_rows=rows, seed=seed,
        )  # fmt: skip
    width = sample_ND.shape[1]
    model = ResidualQuantizer(
        width=width, hidden=None, latent=width, codes_per_level=recipe.codes_per_level, balanced=recipe.balanced
    )
    if warm is not None:
        take_over(model, warm)
    model.initialise_codebooks(sample, seed=seed, warm=warm is not None)
    return model.eval()


def warm_start(job: Job, parents: dict[str, Manifest]) -> ResidualQuantizer | None:
    return open_coder(job.store, parents["warm"]) if "warm" in parents else None


def take_over(model: ResidualQuantizer, warm: Coder) -> None:
    """Start `model` from the weights of `warm`; RecipeError where it is of another shape."""
    shape = warm.settings() if isinstance(warm, ResidualQuantizer) else {"coder": "tree"}
    differ = [
        f"{name} {value}, there {shape.get(name)}"
        for name, value in model.settings().items()
        if value != shape.get(name)
    ]
    if differ:
        raise RecipeError(
            "quantizer.warm_start needs the current release's quantizer to be of the same shape, but here "
            + "; ".join(differ)
            + ". Set quantizer.warm_start=false for a cold start"
        )
    model.load_state_dict(warm.state_dict())
