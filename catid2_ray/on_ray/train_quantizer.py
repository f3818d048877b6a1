"""Stage 1: train the residual quantizer of CAT-ID² with Ray Train and DeepSpeed, and export it as plain safetensors."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.config import QuantizerRecipe
from catid2_ray.on_ray import worker
from catid2_ray.on_ray.arrays import matrix
from catid2_ray.on_ray.catalog import read_sample
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.quantizer.health import level_health, revive_dead_codes
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.step import LossWeights, epoch_order, parameter_groups, training_loss

_REVIVE_UNTIL = 0.75
_CHUNK_ROWS = 2048


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The quantizer artefact: model.safetensors, quantizer.json, history.json (one record an epoch)."""
    recipe, embeddings = job.recipe.quantizer, parts["embeddings"]
    settings = {**recipe.identity(), "seed": job.recipe.seed}
    return job.produce(
        "quantizer", settings, {"embeddings": embeddings}, lambda attempt: _train(job, attempt, embeddings)
    )


def _train(job: Job, attempt: Attempt, embeddings: Manifest) -> Manifest:
    recipe = job.recipe.quantizer
    sample = read_sample(job.store, embeddings, ["embedding"], rows=recipe.kmeans_sample, seed=job.recipe.seed)
    task = QuantizerTask(
        recipe,
        embeddings.metrics["width"],
        embeddings.metrics["category_depth"],
        matrix(sample["embedding"]),
        job.recipe.seed,
    )
    device = "cuda" if job.recipe.cluster.gpus_per_worker else "cpu"
    run = worker.Run(
        task=task, settings=recipe, seed=job.recipe.seed, threads=job.recipe.cluster.threads_per_worker, device=device,
        store=job.store, rows=embeddings,
    )  # fmt: skip
    files, figures = worker.train(run, job.recipe.cluster, attempt, label="training the quantizer")
    metrics = {name: value for name, value in figures.items() if name != "levels"}
    manifest = attempt.commit(files, rows=None, metrics=metrics)
    worker.clean(job.store, attempt)
    return manifest


class QuantizerTask:
    """Eq. 8 over the global batch; codebooks start from k-means on a sample that every rank is handed."""

    columns = ["embedding", "category"]

    def __init__(self, recipe: QuantizerRecipe, width: int, depth: int, sample_ND: np.ndarray, seed: int):
        self.recipe, self.width, self.sample_ND, self.seed = recipe, width, sample_ND, seed
        self.weights = LossWeights(
            **{name: getattr(recipe, name) for name in LossWeights.__dataclass_fields__ if hasattr(recipe, name)},
            category_depth=depth,
        )

    def build(self) -> ResidualQuantizer:
        recipe = self.recipe
        return ResidualQuantizer(
            width=self.width, hidden=recipe.hidden, latent=recipe.latent, codes_per_level=recipe.codes_per_level,
            latent_radius=recipe.latent_radius,
        )  # fmt: skip

    def parameter_groups(self, module, *, weight_decay: float) -> list[dict]:
        return parameter_groups(module, weight_decay=weight_decay)

    def start(self, module: ResidualQuantizer) -> None:
        module.initialise_codebooks(self._sample(module), seed=self.seed)

    def rows_per_epoch(self, rows: int) -> int:
        return rows

    def order(self, rows, *, seed: int, epoch: int) -> np.ndarray:
        return epoch_order(rows.rows, seed=seed, epoch=epoch).numpy()

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        return columns

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]:
        dtype = next(engine.module.parameters()).dtype
        result = training_loss(
            engine,
            batch["embedding"].to(dtype),
            batch["category"].long(),
            weights=self.weights,
            gather=gather,
            chunk=_CHUNK_ROWS,
        )
        return result.total, result.terms

    def end_epoch(self, module: ResidualQuantizer, *, epoch: int) -> tuple[dict, bool]:
        sample_ND, every = self._sample(module), self.recipe.revive_every_epochs
        revived = 0
        if every and (epoch + 1) % every == 0 and epoch + 1 <= _REVIVE_UNTIL * self.recipe.epochs:
            revived = revive_dead_codes(module, sample_ND, seed=self.seed, epoch=epoch)
        refit = self.recipe.refit and epoch + 1 == self.recipe.epochs
        if refit:
            module.initialise_codebooks(sample_ND, seed=self.seed)
        with torch.no_grad():
            codes_SL = module.encode(sample_ND).codes_BL.cpu().numpy()
        health = level_health(codes_SL, self.recipe.codes_per_level)
        figures = {
            "codes_used": [level.codes_used for level in health],
            "perplexity": [round(level.perplexity, 2) for level in health],
            "collision_rate_sample": 1 - len(np.unique(self.recipe.space.pack(codes_SL))) / len(codes_SL),
            "revived": revived,
            "levels": [asdict(level) for level in health],
        }
        return figures, refit or revived > 0

    def export(self, module: ResidualQuantizer, folder: Path, history: list[dict]) -> None:
        exported = module.float().cpu()
        exported.save(folder)
        (folder / "history.json").write_text(json.dumps(history, indent=1))

    def _sample(self, module: ResidualQuantizer) -> torch.Tensor:
        parameter = next(module.parameters())
        return torch.from_numpy(self.sample_ND).to(parameter.device, parameter.dtype)
