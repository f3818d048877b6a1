"""Stage 3b: train the seq2seq generator, query → ID tokens, with Ray Train and DeepSpeed; export a plain T5 checkpoint."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import fetch
from catid2_ray.config import GeneratorRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.generator.examples import drop_words, epoch_order
from catid2_ray.generator.model import pretrained_t5, small_t5
from catid2_ray.generator.step import DocidLoss, parameter_groups
from catid2_ray.generator.vocabulary import load_tokenizer, starts_word
from catid2_ray.on_ray import worker
from catid2_ray.on_ray.embed import model_identity
from catid2_ray.on_ray.examples import QUERY, TITLE
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.on_ray.shards import PartReader


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The generator artefact: a folder that `T5ForConditionalGeneration.from_pretrained` loads, with its tokenizer."""
    recipe, examples = job.recipe.generator, parts["examples"]
    parents = {"ids": parts["ids"], "examples": examples}
    settings = {**recipe.identity(), **model_identity(recipe.model), "seed": job.recipe.seed}
    return job.produce("generator", settings, parents, lambda attempt: _train(job, attempt, parents))


def _train(job: Job, attempt: Attempt, parts: dict[str, Manifest]) -> Manifest:
    recipe, examples = job.recipe.generator, parts["examples"]
    with tempfile.TemporaryDirectory() as cache:
        folder = fetch(job.store, examples, Path(cache), below=("tokenizer/",))
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    counts = {"query": examples.metrics["query_examples"], "title": examples.metrics["title_examples"]}
    task = GeneratorTask(
        recipe, tokenizer, DocidSpace(parts["ids"].metrics["codes_per_level"]), counts, job.recipe.seed
    )
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
    """Query→ID and title→ID examples; titles lose words at random, so that they look like queries."""

    columns = ["kind", "input_ids", "codes"]
    reader = PartReader(tuple(columns))
    shards = "whole"  # an example is about a hundred bytes: every rank holds all, and any number of ranks trains alike

    def __init__(
        self,
        recipe: GeneratorRecipe,
        tokenizer: PreTrainedTokenizerFast,
        space: DocidSpace,
        counts: dict[str, int],
        seed: int,
    ):
        self.recipe, self.tokenizer, self.space, self.seed = recipe, tokenizer, space, seed
        self.title_share = min(1.0, recipe.titles_per_query * counts["query"] / max(1, counts["title"]))
        self.total = counts["query"] + counts["title"]
        self.per_epoch = counts["query"] + round(self.title_share * counts["title"])
        self.starts_word_V = starts_word(tokenizer)

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
        return max(1, round(rows * self.per_epoch / self.total))

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray:
        kind_N = rows.take(slice(None))["kind"]
        places = {"query": np.flatnonzero(kind_N == QUERY), "title": np.flatnonzero(kind_N == TITLE)}
        sizes = {kind: len(place) for kind, place in places.items() if len(place)}
        order = epoch_order(sizes, {"title": self.title_share} if "title" in sizes else {}, seed=seed, epoch=epoch)
        row_N = np.empty(len(order.row_N), np.int64)
        for number, kind in enumerate(order.kinds):
            here_N = order.kind_N == number
            row_N[here_N] = places[kind][order.row_N[here_N]]
        return row_N

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        input_ids_BT = columns["input_ids"].copy()
        title_B = columns["kind"] == TITLE
        if self.recipe.word_keep < 1 and title_B.any():
            input_ids_BT[title_B] = drop_words(
                input_ids_BT[title_B],
                self.starts_word_V,
                keep=self.recipe.word_keep,
                generator=np.random.default_rng(seed),
            )
        return {"input_ids": input_ids_BT, "codes": columns["codes"]}

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
        return engine(batch["input_ids"].long(), batch["codes"].long()), {}

    def end_epoch(self, module: DocidLoss, *, epoch: int, means: dict, history: list[dict]) -> tuple[dict, bool]:
        return {}, False

    def export(self, module: DocidLoss, folder: Path, history: list[dict]) -> None:
        module.model.float().cpu().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "history.json").write_text(json.dumps(history, indent=1))
