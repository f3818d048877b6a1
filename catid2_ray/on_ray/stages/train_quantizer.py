"""Stage 1: make a quantizer of the recipe's kind: train it with Ray Train and DeepSpeed, or fit it on a bounded sample.

Whatever the kind, the artefact is a folder that `quantizer.coder.load_coder` reads.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.taxonomy import Taxonomy
from catid2_ray.config import QuantizerRecipe
from catid2_ray.config.older import MEANT
from catid2_ray.errors import RecipeError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages.assign.work import open_coder
from catid2_ray.on_ray.stages.catalog import read_vectors
from catid2_ray.on_ray.training import worker
from catid2_ray.on_ray.training.shards import PartReader
from catid2_ray.quantizer.coder import Coder, TreeCoder, encode
from catid2_ray.quantizer.health import (
    codebook_health,
    gradient_norms,
    level_health,
    persistent,
    revive_dead_codes,
    verdict,
)
from catid2_ray.quantizer.kmeans import residual_kmeans
from catid2_ray.quantizer.model import ResidualQuantizer
from catid2_ray.quantizer.sampler import category_balanced_order, clusters_in_clusters, exchange_paths, mask_categories
from catid2_ray.quantizer.step import Extras, LossWeights, epoch_order, parameter_groups, training_loss
from catid2_ray.schedule import seed_from

_REVIVE_UNTIL = 0.75
_CLUSTERS = (16, 8, 8)  # of labels made of vectors: 16 clusters, 128 and 1,024 inside them
_PROBE_ROWS = 512  # of the sample, for the gradient norms of one epoch


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The quantizer artefact: the coder's files and history.json (one record an epoch; one in all where it is fitted)."""
    recipe = job.recipe.quantizer
    sometimes = [*(["queries"] if recipe.query_item else []), *(["catalog"] if _doubted(recipe) else [])]
    parents = STAGES["quantizer"].reads(parts, *sometimes)
    history = {"warm": job.previous.parts["quantizer"]} if recipe.warm_start and job.previous else {}
    settings = {**deciding(recipe), "seed": job.recipe.seed}
    if recipe.input == "stream" and recipe.coder == "rq_vae":
        settings["passes"] = (
            "whole"  # streamed passes once dropped the same rows each time: such a quantizer is not this one
        )

    def work(attempt: Attempt) -> Manifest:
        if recipe.coder == "rq_vae":
            return _train(job, attempt, parents | history)
        return _fit(job, attempt, parents | history, parts["catalog"])

    return job.produce("quantizer", settings, parents, work, history=history)


_NEVER = object()  # equal to no setting
_TREE_FIELDS = ("branch", "leaf", "tree_categories")
_KMEANS_FIELDS = ("codes_per_level", "balanced")
_FITTED_FIELDS = ("coder", "kmeans_sample", "category_depth", "category_masked", "category_noise")


def deciding(recipe: QuantizerRecipe) -> dict:
    """The settings that decide what this coder becomes: kinds that come to the same are one artefact. Settings that came after
    the first release are left out where they say what was done before, so that artefacts of then keep their keys."""
    values = {
        name: value for name, value in recipe.identity().items() if value != MEANT.get(f"quantizer.{name}", _NEVER)
    }
    if recipe.coder != "rq_vae":
        names = {*_FITTED_FIELDS, *(_TREE_FIELDS if recipe.coder == "tree" else _KMEANS_FIELDS)}
        return {name: values[name] for name in names}
    return {name: value for name, value in values.items() if name not in ("kind", "ids", "balanced", *_TREE_FIELDS)}


def _sample(job: Job, parents: dict[str, Manifest]) -> tuple[np.ndarray, np.ndarray, "_Labels"]:
    """Embeddings and categories of the bounded sample, the latter as training sees them; and what makes them so."""
    recipe = job.recipe.quantizer
    table = read_vectors(
        _vectors(job, parents), ["embedding", "category"], rows=recipe.kmeans_sample, seed=job.recipe.seed
    )
    sample_ND = matrix(table["embedding"])
    labels = _Labels.of(recipe, job.recipe.seed, sample_ND)
    return sample_ND, labels(matrix(table["category"]), sample_ND, part=-1), labels


def _train(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, embeddings = job.recipe.quantizer, parents["embeddings"]
    sample_ND, category_NH, labels = _sample(job, parents)
    task = QuantizerTask(
        recipe,
        width=embeddings.metrics["width"],
        categories=tuple(embeddings.metrics["categories"]),
        sample_ND=sample_ND,
        category_NH=category_NH,
        labels=labels,
        seed=job.recipe.seed,
        vectors=_vectors(job, parents),
        queries=parents.get("queries"),
        warm=warm_start(job, parents),
    )
    device = "cuda" if job.recipe.cluster.gpus_per_worker else "cpu"
    run = worker.Run(
        task=task, settings=recipe, seed=job.recipe.seed, threads=job.recipe.cluster.threads_per_worker, device=device,
        store=job.store, rows=embeddings,
    )  # fmt: skip
    files, figures = worker.train(run, job.recipe.cluster, attempt, label=f"training the quantizer ({recipe.kind})")
    if queries := parents.get("queries"):
        figures |= {"with_query": queries.metrics["with_query"]}
    manifest = attempt.commit(files, rows=None, metrics=figures)
    worker.clean(job.store, attempt, alone=job.is_alone())
    return manifest


def _fit(job: Job, attempt: Attempt, parents: dict[str, Manifest], catalog: Manifest) -> Manifest:
    """Kinds without training: residual k-means, or a tree, in this process on the sample alone."""
    recipe, embeddings = job.recipe.quantizer, parents["embeddings"]
    sample_ND, category_NH, _ = _sample(job, parents)
    progress.event("fit", what=recipe.kind, rows=len(sample_ND))
    taxonomy = Taxonomy.from_json(job.store.read(catalog.file("taxonomy.json")).decode())
    coder = fit_coder(
        recipe, sample_ND, category_NH, taxonomy, rows=embeddings.rows, seed=job.recipe.seed, warm=warm_start(job, parents)
    )  # fmt: skip
    figures = {"codes_per_level": list(coder.codes_per_level)}
    if coder.codes_per_level:
        codes_NL = encode(coder, torch.from_numpy(sample_ND), torch.from_numpy(category_NH).long(), rows=1024).codes_BL
        figures |= _figures_of(level_health(codes_NL, coder.codes_per_level))
    with scratch.folder("quantizer") as local:
        coder.save(local)
        (local / "history.json").write_text(json.dumps([{"epoch": 0, **figures}], indent=1))
        return attempt.commit(job.store.upload(local, attempt.folder), metrics=figures)


def forced_column(recipe: QuantizerRecipe, categories: tuple[int, ...]) -> int | None:
    """The deepest category column whose ids fit the first level, for kinds that force the first code; else None.

    That the first column fits was checked with the catalogue."""
    if not recipe.force_category:
        return None
    return max(column for column, count in enumerate(categories) if count <= recipe.codes_per_level[0])


def _doubted(recipe: QuantizerRecipe) -> dict[str, float]:
    """The columns that say how sure categories are, and the least that training believes; of other coders none, which read no
    categories or the true ones."""
    return recipe.category_confidence if recipe.coder == "rq_vae" else {}


def _vectors(job: Job, parents: dict[str, Manifest]) -> ProductVectors:
    least = _doubted(job.recipe.quantizer)
    if not least:
        return ProductVectors.of(job.store, parents)
    return _SureVectors(job.store, parents["embeddings"], parents.get("adapter"), parents["catalog"], least)


@dataclass(frozen=True)
class _SureVectors(ProductVectors):
    """Vectors with the categories of which the catalogue is sure: −1 at every depth of a product that has less than `least` in one
    of these columns, or nothing there."""

    catalog: Manifest
    least: Mapping[str, float]

    def read(self, name: str, columns: list[str]) -> pa.Table:
        table = super().read(name, columns)
        if "category" not in columns:
            return table
        sure = self.store.read_table(self.catalog.file(name), columns=list(self.least))
        sure_N = np.ones(table.num_rows, bool)
        for column, least in self.least.items():
            sure_N &= sure[column].cast(pa.float64()).fill_null(-np.inf).to_numpy() >= least
        category_NH = np.where(sure_N[:, None], matrix(table["category"]), -1)
        return table.set_column(columns.index("category"), "category", fixed_lists(category_NH, pa.int32()))


@dataclass(frozen=True)
class _Labels:
    """Category ids as training sees them: made of vectors, cut, masked or exchanged as the recipe says; a pure function of (seed,
    sample, part). `clusters`: codebooks, where labels are made of vectors."""

    depth: int | None
    masked: float
    noise: float
    seed: int
    clusters: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, recipe: QuantizerRecipe, seed: int, sample_ND: np.ndarray) -> "_Labels":
        clusters = ()
        if recipe.category_from == "clusters" and recipe.coder == "rq_vae":  # no other coder reads them
            clusters = tuple(residual_kmeans(torch.tensor(sample_ND), codes_per_level=_CLUSTERS, seed=seed))
        return cls(recipe.category_depth, recipe.category_masked, recipe.category_noise, seed, clusters)

    def __call__(self, category_NH: np.ndarray, embedding_ND: np.ndarray, *, part: int) -> np.ndarray:
        if self.clusters:
            category_NH = clusters_in_clusters(embedding_ND, self.clusters)
        category_NH = category_NH[:, : self.depth]
        if self.masked:
            category_NH = mask_categories(
                category_NH, depth=category_NH.shape[1] - 1, share=self.masked, seed=self.seed
            )
        if self.noise:
            # Parts are uniform samples of the catalogue, so exchanging inside a part is exchanging at random.
            category_NH = exchange_paths(category_NH, share=self.noise, seed=seed_from(self.seed, part + 1))
        return np.ascontiguousarray(category_NH)


@dataclass(frozen=True)
class _LabelledParts(PartReader):
    """Parts of the embeddings with labels as training sees them, joined to the same parts of the queries."""

    labels: _Labels = None
    queries: Manifest | None = None
    vectors: ProductVectors | None = None

    def __call__(self, store: Store, file: str) -> pa.Table:
        table = self.vectors.read(Path(file).name, ["part", "index", "embedding", "category"])
        part = table["part"][0].as_py()
        category_NH = self.labels(matrix(table["category"]), matrix(table["embedding"]), part=part)
        table = table.set_column(3, "category", fixed_lists(category_NH, pa.int32()))
        if self.queries is None:
            return table
        found = store.read_table(self.queries.file(Path(file).name), columns=["query", "has_query"])
        return table.append_column("query", found["query"]).append_column("has_query", found["has_query"])


class QuantizerTask:
    """Eq. 8 over the global batch; codebooks start from k-means on a sample that every rank is handed."""

    unit = "products"

    def __init__(
        self, recipe: QuantizerRecipe, *, width: int, categories: tuple[int, ...], sample_ND: np.ndarray,
        category_NH: np.ndarray, seed: int, labels: "_Labels | None" = None, vectors: ProductVectors | None = None,
        queries: Manifest | None = None, warm: ResidualQuantizer | None = None,
    ):  # fmt: skip
        self.recipe, self.width, self.seed, self.warm = recipe, width, seed, warm
        self.sample_ND, self.category_NH = sample_ND, category_NH
        self.column = forced_column(recipe, categories[: recipe.category_depth])
        self.columns = ["embedding", "category", *(["query", "has_query"] if queries else [])]
        self.reader = _LabelledParts(tuple(self.columns), labels, queries, vectors)
        self.weights = LossWeights(
            **{name: getattr(recipe, name) for name in LossWeights.__dataclass_fields__ if name != "category_depth"},
            category_depth=category_NH.shape[1],
        )

    def build(self) -> ResidualQuantizer:
        recipe = self.recipe
        return ResidualQuantizer(
            width=self.width, hidden=recipe.hidden, latent=recipe.latent_of(self.width), codes_per_level=recipe.codes_per_level,
            latent_radius=recipe.latent_radius, category_column=self.column, ema=recipe.ema, encoder=recipe.encoder,
            projection=recipe.category_on == "projection" and recipe.hierarchical > 0,
        )  # fmt: skip

    def parameter_groups(self, module, *, weight_decay: float) -> list[dict]:
        return parameter_groups(module, weight_decay=weight_decay)

    def start(self, module: ResidualQuantizer) -> None:
        if self.warm is not None:
            take_over(module, self.warm)
        else:
            module.initialise(*self._sample(module), seed=self.seed)

    def rows_per_epoch(self, rows: int) -> int:
        return rows

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray:
        if self.recipe.sampler == "uniform":
            return epoch_order(rows.rows, seed=seed, epoch=epoch).numpy()
        return category_balanced_order(
            rows.take(slice(None))["category"], batch=batch, steps=steps, uniform=self._uniform(batch),
            seed=seed_from(seed, epoch),
        )  # fmt: skip

    def _uniform(self, batch: int) -> int | None:
        return None if self.recipe.sampler == "uniform" else max(1, round(batch * self.recipe.uniform_share))

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        return columns

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]:
        dtype = next(engine.module.parameters()).dtype
        extras = Extras(uniform=self._uniform(len(batch["embedding"])))
        if "query" in batch:
            extras = Extras(
                uniform=extras.uniform, query_BD=batch["query"].to(dtype), has_query_B=batch["has_query"].bool()
            )
        result = training_loss(
            engine, batch["embedding"].to(dtype), batch["category"].long(), weights=self.weights, extras=extras,
            gather=gather,
        )  # fmt: skip
        anchors = {f"anchors_{depth + 1}": count for depth, count in enumerate(result.anchors)}
        return result.total, {**result.terms, **anchors}

    def end_epoch(
        self, module: ResidualQuantizer, *, epoch: int, means: dict, history: list[dict]
    ) -> tuple[dict, bool]:
        recipe, (sample_ND, category_NH) = self.recipe, self._sample(module)
        every, revived = recipe.revive_every_epochs, 0
        norms = self._gradient_norms(module, sample_ND, category_NH)
        if every and (epoch + 1) % every == 0 and epoch + 1 <= _REVIVE_UNTIL * recipe.epochs:
            revived = revive_dead_codes(module, sample_ND, category_NH, seed=self.seed, epoch=epoch)
        refit = recipe.refit and epoch + 1 == recipe.epochs
        if refit:
            module.initialise_codebooks(sample_ND, category_NH, seed=self.seed, warm=self.warm is not None)
        health = codebook_health(module, sample_ND, category_NH)
        with torch.no_grad():
            codes_SL = module.encode(sample_ND, category_NH).codes_BL.cpu().numpy()
        collisions = 1 - len(np.unique(recipe.space.pack(codes_SL))) / len(codes_SL)
        # Where products share IDs on purpose, collisions are no fault.
        judged = verdict(health.levels, collisions if recipe.ids == "unique" else None)
        figures = {
            **_figures_of(health.levels),
            "collision_rate_sample": collisions,
            "latent_norm": float(f"{health.latent_norm:.4g}"),
            "gradient_norm": norms,
            "anchors": [round(means.pop(name), 1) for name in sorted(means) if name.startswith("anchors_")],
            "revived": revived,
            "verdict": judged.state,
            "reason": judged.reason,
        }
        states = [record["verdict"] for record in history] + [judged.state]
        if recipe.collapse_patience and persistent(states, recipe.collapse_patience):
            figures["stop"] = (
                f"the codes collapsed and stayed so for {recipe.collapse_patience} epochs (quantizer.collapse_patience), the "
                f"last being {epoch + 1} of {recipe.epochs}: {judged.reason}. Codes used per level {figures['codes_used']} of "
                f"{list(recipe.codes_per_level)}, perplexity {figures['perplexity']}, mean norm of z {health.latent_norm:.3g}, "
                f"gradient norms {norms}. Lower quantizer.hierarchical or learning_rate, raise cluster_scale or dispersion, "
                "or, with encoder mlp, set latent_radius"
            )
        return figures, refit or revived > 0

    def _gradient_norms(self, module: ResidualQuantizer, sample_ND: torch.Tensor, category_NH: torch.Tensor) -> dict:
        """Of each weighted term, on a few rows of the sample, which has no queries; says which term moves the weights."""
        was, _ = module.training, module.eval()
        loss = training_loss(module, sample_ND[:_PROBE_ROWS], category_NH[:_PROBE_ROWS], weights=self.weights)
        norms = gradient_norms(loss.weighted, [p for p in module.parameters() if p.requires_grad])
        module.train(was)
        return {name: float(f"{norm:.4g}") for name, norm in norms.items()}

    def export(self, module: ResidualQuantizer, folder: Path, history: list[dict]) -> None:
        exported = module.float().cpu()
        exported.save(folder)
        (folder / "history.json").write_text(json.dumps(history, indent=1))

    def _sample(self, module: ResidualQuantizer) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = next(module.parameters())
        # Copies: what a worker was sent may be read-only, and torch warns of tensors that share such memory.
        sample_ND = torch.tensor(self.sample_ND, device=parameter.device, dtype=parameter.dtype)
        return sample_ND, torch.tensor(self.category_NH, device=parameter.device, dtype=torch.long)


def _figures_of(levels) -> dict:
    return {
        "codes_used": [level.codes_used for level in levels],
        "perplexity": [round(level.perplexity, 2) for level in levels],
        "levels": [asdict(level) for level in levels],
    }


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
    model.load_state_dict(model.state_dict() | warm.state_dict())  # a head for training alone was not saved
