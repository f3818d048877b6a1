"""Stage 3b: train the seq2seq generator, query → ID tokens, with Ray Train and DeepSpeed; export a plain T5 checkpoint."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import fetch
from catid2_ray.config import GeneratorRecipe, StageRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.generator.examples import drop_words, epoch_order, mix_ratios
from catid2_ray.generator.model import pretrained_t5, small_t5
from catid2_ray.generator.step import DocidLoss, parameter_groups
from catid2_ray.generator.vocabulary import load_tokenizer, starts_word
from catid2_ray.on_ray import validation, worker
from catid2_ray.on_ray.embed import model_identity
from catid2_ray.on_ray.examples import KIND
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.on_ray.shards import PartReader
from catid2_ray.schedule import Phase


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The generator artefact: a folder that `T5ForConditionalGeneration.from_pretrained` loads, with its tokenizer."""
    recipe, examples = job.recipe.generator, parts["examples"]
    parents = {"ids": parts["ids"], "examples": examples}
    settings = {**recipe.identity(), **model_identity(recipe.model), "seed": job.recipe.seed}
    if recipe.validate_queries:
        settings["validate_from"] = job.recipe.evaluation.min_relevance
    return job.produce("generator", settings, parents, lambda attempt: _train(job, attempt, parts, parents))


def _train(job: Job, attempt: Attempt, parts: dict[str, Manifest], parents: dict[str, Manifest]) -> Manifest:
    recipe, examples = job.recipe.generator, parents["examples"]
    with tempfile.TemporaryDirectory() as cache:
        folder = fetch(job.store, examples, Path(cache), below=("tokenizer/",))
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    counts = {kind: examples.metrics[f"{kind}_examples"] for kind in recipe.kinds}
    checked = None
    if recipe.validate_queries:
        checked = validation.sample(
            job.store, parts["catalog"], parents["ids"], tokenizer, queries=recipe.validate_queries, seed=job.recipe.seed,
            min_relevance=job.recipe.evaluation.min_relevance, query_tokens=recipe.query_tokens,
        )  # fmt: skip
    space = DocidSpace(parents["ids"].metrics["codes_per_level"])
    task = GeneratorTask(recipe, tokenizer, space, counts, job.recipe.seed, validation=checked)
    run = worker.Run(
        task=task, settings=recipe, seed=job.recipe.seed, threads=job.recipe.cluster.threads_per_worker,
        device="cuda" if job.recipe.cluster.gpus_per_worker else "cpu", store=job.store, rows=examples,
    )  # fmt: skip
    files, figures = worker.train(run, job.recipe.cluster, attempt, label="training the generator")
    chosen = {name: figures[name] for name in ("best_epoch", "best_score", "stopped_early") if name in figures}
    metrics = {"loss": figures["loss"], "epochs": figures["epochs_done"], **chosen, **counts}
    manifest = attempt.commit(files, metrics=metrics)
    worker.clean(job.store, attempt)
    return manifest


class GeneratorTask:
    """Examples of all kinds as the stages mix them; titles lose words at random, so that they look like queries.

    `counts`: rows of each kind in the whole artefact. `validation`: what to search with after an epoch, or None.
    """

    reader = PartReader(("kind", "weight", "input_ids", "codes"))
    columns = list(reader.columns)
    shards = "whole"  # an example is about a hundred bytes: every rank holds all, and any number of ranks trains alike

    def __init__(
        self,
        recipe: GeneratorRecipe,
        tokenizer: PreTrainedTokenizerFast,
        space: DocidSpace,
        counts: dict[str, int],
        seed: int,
        *,
        validation: validation.Validation | None = None,
    ):
        self.recipe, self.tokenizer, self.space, self.counts, self.seed = recipe, tokenizer, space, counts, seed
        self.validation = validation
        self.ratios = [mix_ratios(counts, stage.mix) for stage in recipe.plan]
        self.starts_word_V = starts_word(tokenizer)

    def stage_of(self, epoch: int) -> int:
        """The number of the stage that an epoch, counted through all of them, lies in."""
        ends = np.cumsum([stage.epochs for stage in self.recipe.plan])
        return min(int(np.searchsorted(ends, epoch, side="right")), len(ends) - 1)

    def _per_epoch(self, stage: int) -> int:
        return max(1, sum(round(ratio * self.counts[kind]) for kind, ratio in self.ratios[stage].items()))

    def phases(self, rows: int) -> list[Phase]:
        """One a stage; all ranks take the same steps, whatever their rows."""
        return [
            Phase(stage.epochs, self._per_epoch(number), stage.learning_rate or self.recipe.learning_rate)
            for number, stage in enumerate(self.recipe.plan)
        ]

    def build(self) -> DocidLoss:
        recipe = self.recipe
        if recipe.model == "small":
            model = small_t5(
                vocabulary=len(self.tokenizer) - sum(self.space.codes_per_level), width=recipe.width, layers=recipe.layers,
                heads=recipe.heads, feed_forward=recipe.feed_forward, dropout=recipe.dropout,
                codes_per_level=self.space.codes_per_level, seed=self.seed,
            )  # fmt: skip
        else:
            model = pretrained_t5(recipe.model, tokenizer=self.tokenizer, space=self.space, seed=self.seed)
        return DocidLoss(
            model, space=self.space, level_weights=recipe.level_weights, label_smoothing=recipe.label_smoothing
        )

    def parameter_groups(self, module: DocidLoss, *, weight_decay: float) -> list[dict]:
        return parameter_groups(module, weight_decay=weight_decay)

    def start(self, module: DocidLoss) -> None:
        """Nothing: weights come from the seed or from the pretrained checkpoint."""

    def rows_per_epoch(self, rows: int) -> int:
        return max(1, round(rows * self._per_epoch(0) / max(1, sum(self.counts.values()))))

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray:
        """Rows of the epoch's stage as it mixes them, shuffled; a pure function of (seed, epoch)."""
        kind_N, ratio = rows.take(slice(None))["kind"], self.ratios[self.stage_of(epoch)]
        places = {kind: np.flatnonzero(kind_N == KIND[kind]) for kind in ratio}
        sizes = {kind: len(place) for kind, place in places.items() if len(place)}
        order = epoch_order(sizes, {kind: ratio[kind] for kind in sizes}, seed=seed, epoch=epoch)
        row_N = np.empty(len(order.row_N), np.int64)
        for number, kind in enumerate(order.kinds):
            here_N = order.kind_N == number
            row_N[here_N] = places[kind][order.row_N[here_N]]
        return row_N

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        input_ids_BT = columns["input_ids"].copy()
        title_B = columns["kind"] == KIND["title"]
        if self.recipe.word_keep < 1 and title_B.any():
            input_ids_BT[title_B] = drop_words(
                input_ids_BT[title_B],
                self.starts_word_V,
                keep=self.recipe.word_keep,
                generator=np.random.default_rng(seed),
            )
        return {"input_ids": input_ids_BT, "codes": columns["codes"], "weight": columns["weight"]}

    def trim(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Without the columns that are padding in every row."""
        used = int(np.flatnonzero((columns["input_ids"] != 0).any(0)).max(initial=0)) + 1
        return {**columns, "input_ids": columns["input_ids"][:, :used]}

    def flops_per_example(self, module: DocidLoss) -> float:
        """6 · weights · tokens (Kaplan et al. 2020, appendix B): the encoder's by query_tokens, which counts padding, the
        decoder's by levels, and each level's rows of the projection. Attention's products of pairs are left out."""
        encoder, decoder = module.model.encoder, module.model.decoder
        embeddings = {id(weight) for weight in (module.model.shared.weight, module.model.lm_head.weight)}

        def weights(part: torch.nn.Module) -> int:
            return sum(weight.numel() for weight in part.parameters() if id(weight) not in embeddings)

        projected = sum(self.space.codes_per_level) * module.model.lm_head.weight.shape[1]
        return 6.0 * (weights(encoder) * self.recipe.query_tokens + weights(decoder) * self.space.levels + projected)

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]:
        return engine(batch["input_ids"].long(), batch["codes"].long(), batch["weight"]), {}

    def validate(self, module: DocidLoss, epoch: int) -> dict:
        """Recall@50 of the real search on the sample; nothing where none was asked for."""
        return {} if self.validation is None else self.validation.figures(module.model)

    def end_epoch(self, module: DocidLoss, *, epoch: int, means: dict, history: list[dict]) -> tuple[dict, bool]:
        """The stage's name, where there are several."""
        plan: tuple[StageRecipe, ...] = self.recipe.plan
        return ({"stage": plan[self.stage_of(epoch)].name} if len(plan) > 1 else {}), False

    def export(self, module: DocidLoss, folder: Path, history: list[dict]) -> None:
        module.model.float().cpu().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "history.json").write_text(json.dumps(history, indent=1))
