"""Stage 3d: align the generator with what searchers do (EG-GRPO); the result is a generator again, made from the trained one.

Every worker rolls out its own queries with the weights of the step, and holds a frozen copy of the generator that it began
with as the reference. The figures before and after are measured by rank 0 while the others wait, hence few queries.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import TUNED, default_cache, fetch
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.config import AlignmentRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.evaluation.alignment_report import measure
from catid2_ray.generator.eg_grpo import AlignmentLoss, Objective, prompt_order
from catid2_ray.generator.encoder_decoder import unrounded
from catid2_ray.generator.saved import load_generator, save_generator
from catid2_ray.generator.step import parameter_groups
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.ranker import open_ranker
from catid2_ray.on_ray.stages import prompts
from catid2_ray.on_ray.training import worker
from catid2_ray.on_ray.training.shards import PartReader
from catid2_ray.retrieval.environment import CalledRanker, Environment, Rules
from catid2_ray.retrieval.trie import Trie
from catid2_ray.schedule import seed_from

_SFT_TO_RL = 40  # CQ-SID: 4e-5 in its last supervised stage, 1e-6 in EG-GRPO
_FIGURES = ("reward", "kl", "entropy", "without_variance", "experts", "clipped", "loss")


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The generator aligned, or as it was trained where the recipe does not ask for it."""
    recipe, trained = job.recipe.alignment, parts["generator"]
    if not recipe.enabled:
        return trained
    parents = STAGES["aligned"].reads({**parts, "trained": trained, "prompts": prompts.run(job, parts)})
    last = job.recipe.generator.plan[-1]
    rate = recipe.learning_rate or (last.learning_rate or job.recipe.generator.learning_rate) / _SFT_TO_RL
    settings = {**recipe.identity(), "learning_rate": rate, "seed": job.recipe.seed}
    del settings["enabled"]
    # What the generator is stays what it was; serving asks for it (artifacts.release).
    settings |= {
        name: trained.settings[name] for name in ("model", "encoder", "encoder_mode", TUNED) if name in trained.settings
    }
    recipe = recipe.model_copy(update={"learning_rate": rate})
    return job.produce(
        "generator", settings, parents, lambda attempt: _align(job, attempt, parents, recipe), stage="aligned"
    )


def _align(job: Job, attempt: Attempt, parents: dict[str, Manifest], recipe: AlignmentRecipe) -> Manifest:
    task = AlignTask(recipe, job.store, parents, seed=job.recipe.seed)
    run = worker.Run(
        task=task, settings=recipe, seed=job.recipe.seed, threads=job.recipe.cluster.threads_per_worker,
        device="cuda" if job.recipe.cluster.gpus_per_worker else "cpu", store=job.store, rows=parents["prompts"],
    )  # fmt: skip
    files, figures = worker.train(run, job.recipe.cluster, attempt, label="aligning the generator")
    kept = {name: figures[name] for name in ("before", "after", "measured_on")}
    metrics = {**kept, "training": {name: figures[name] for name in _FIGURES}, "steps": recipe.steps,
               "learning_rate": recipe.learning_rate, "seconds_training": parents["trained"].metrics["seconds"]}  # fmt: skip
    manifest = attempt.commit(files, metrics=metrics)
    worker.clean(job.store, attempt, alone=job.is_alone())
    return manifest


def objective_of(recipe: AlignmentRecipe) -> Objective:
    return Objective(
        term=recipe.term, beta=recipe.beta, injected=recipe.injected, form=recipe.group_form, ratio=recipe.ratio,
        clip=recipe.clip_ratio, kl=recipe.kl,
        kl_weight=recipe.kl_weight, expert_term=recipe.expert_term, expert_weight=recipe.expert_weight,
        expert_cap=recipe.expert_cap,
    )  # fmt: skip


def rules_of(recipe: AlignmentRecipe) -> Rules:
    return Rules(
        group=recipe.group, source=recipe.rollout, beam_width=recipe.beam_width, temperature=recipe.temperature,
        valid=recipe.valid, invalid=recipe.invalid, least_expert=recipe.expert_min_reward, bonus=recipe.ranker_bonus,
    )  # fmt: skip


class AlignTask:
    """Rollouts of the prompts of each step; `updates` steps share one. What is opened stays in the worker's process."""

    def __init__(self, recipe: AlignmentRecipe, store: Store, parents: dict[str, Manifest], *, seed: int):
        self.recipe, self.store, self.parents, self.seed = recipe, store, parents, seed
        self.space = DocidSpace(parents["ids"].metrics["codes_per_level"])
        self.objective = objective_of(recipe)
        scored = ["scored", "score"] if recipe.ranker_scores else []
        self.columns = ["number", "input_ids", "judged", "reward", "relevant", *scored]
        self.reader = PartReader(tuple(self.columns))
        self._rolled: dict[bytes, tuple] = {}

    def _generator(self):
        return load_generator(self._folder)[0]

    @cached_property
    def _folder(self) -> Path:
        return fetch(self.store, self.parents["trained"], default_cache())

    @cached_property
    def _tokenizer(self):
        return load_generator(self._folder)[1]

    @cached_property
    def _reference(self):
        return self._generator().requires_grad_(False)

    @cached_property
    def _environment(self) -> Environment:
        folder = fetch(self.store, self.parents["ids"], default_cache(), below=("trie/", "products.arrow"))
        called, function = None, open_ranker(self.recipe.ranker)
        if function is not None:
            products = pa.ipc.open_file(pa.memory_map(str(folder / "products.arrow"))).read_all()["product_id"]
            called = CalledRanker(function, self._texts, products.combine_chunks())
        return Environment(Trie.open(folder / "trie"), rules_of(self.recipe), ranker=called)

    def _table(self, folder: str, columns: list[str]) -> pa.Table:
        manifest = self.parents["prompts"]
        return pa.concat_tables(
            [self.store.read_table(manifest.file(e["name"]), columns=columns) for e in manifest.named(f"{folder}-")]
        )

    def _texts(self, number_B: np.ndarray) -> list[str]:
        return self._asked["query"].take(pc.index_in(pa.array(number_B), self._asked["number"])).to_pylist()

    @cached_property
    def _asked(self) -> pa.Table:
        return self._table(prompts.FOLDERS["train"], ["number", "query"]).combine_chunks()

    def build(self) -> AlignmentLoss:
        return AlignmentLoss(self._generator(), space=self.space, objective=self.objective)

    def parameter_groups(self, module: AlignmentLoss, *, weight_decay: float) -> list[dict]:
        return parameter_groups(module, weight_decay=weight_decay)

    def start(self, module: AlignmentLoss) -> None:
        """Nothing: the weights are the trained generator's."""

    def rows_per_epoch(self, rows: int) -> int:
        return self.recipe.report_every * self.recipe.batch

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray:
        """Each rollout's prompts, `updates` times over; which they are depends on the step, not on the length of a block."""
        updates = self.recipe.updates
        self._rolled.clear()
        first = epoch * steps // updates
        rolled = [
            prompt_order(rows.rows, rollout=first + number, batch=batch, seed=seed)
            for number in range(steps // updates)
        ]
        return np.concatenate([np.tile(order_B, updates) for order_B in rolled])

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        ids_BT = columns["input_ids"]
        used = int(np.flatnonzero((ids_BT != self._tokenizer.pad_token_id).any(0)).max(initial=0)) + 1
        return {**columns, "input_ids": ids_BT[:, :used].astype(np.int64), "seed": np.full(len(ids_BT), seed)}

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]:
        """A rollout is kept by its prompts until its updates are done: a step may come in several pieces (micro_batch)."""
        key = batch["number"].cpu().numpy().tobytes()
        experience, figures, left = self._rolled.pop(key, (None, {}, self.recipe.updates))
        if experience is None:
            model = engine.module.model
            first = next(model.parameters())
            experience, figures = self._environment.experience(
                model, self._reference.to(first.device, first.dtype), batch, objective=self.objective,
                seed=seed_from(int(batch["seed"][0]), int(batch["number"][0])),
            )  # fmt: skip
        if left > 1:
            self._rolled[key] = experience, figures, left - 1
        loss, changing = engine(batch["input_ids"], experience)
        return loss, {**figures, **changing}

    def end_epoch(self, module: AlignmentLoss, *, epoch: int, means: dict, history: list[dict]) -> tuple[dict, bool]:
        """Before the first block's end the start weights are measured, at the last the aligned ones."""
        figures = {}
        if epoch == 0:
            figures["before"] = self._measure(self._reference)
        if epoch + 1 == self.recipe.epochs:
            figures.setdefault("before", history[0]["before"] if history else None)
            figures |= {"after": self._measure(module.model), "measured_on": self._measured_on}
        return figures, False

    @property
    def _measured_on(self) -> str:
        return "validation" if self.parents["prompts"].named(f"{prompts.FOLDERS['validation']}-") else "train"

    @cached_property
    def _validation(self) -> dict[str, np.ndarray]:
        """A seeded sample of the queries that are measured."""
        table = self._table(prompts.FOLDERS[self._measured_on], [*self.columns, "query"])
        count = min(self.recipe.validation_queries, table.num_rows)
        chosen = np.sort(np.random.default_rng([self.seed, 5]).permutation(table.num_rows)[:count])
        table = table.take(pa.array(chosen))
        return {name: matrix(table[name]) for name in self.columns} | {"query": table["query"].to_pylist()}

    def _measure(self, model) -> dict[str, float]:
        first, rows_of = next(model.parameters()), self._validation
        environment = self._environment
        if environment.ranker is not None:
            texts = dict(zip(rows_of["number"].tolist(), rows_of["query"]))
            called = CalledRanker(
                environment.ranker.ranker, lambda number_B: [texts[int(number)] for number in number_B],
                environment.ranker.product_ids,
            )  # fmt: skip
            environment = Environment(environment.trie, environment.rules, ranker=called)

        def asked(rows: np.ndarray) -> dict[str, torch.Tensor]:
            columns = self.prepare({name: rows_of[name][rows] for name in self.columns}, seed=0)
            return {name: torch.from_numpy(np.array(values)).to(first.device) for name, values in columns.items()}

        reference = self._reference.to(first.device, first.dtype)
        return measure(model, reference, environment, asked, count=len(rows_of["number"]), seed=self.seed)

    def export(self, module: AlignmentLoss, folder: Path, history: list[dict]) -> None:
        model = unrounded(module.model, lambda: self._generator().encoder.text)
        save_generator(model, self._tokenizer, folder)
        (folder / "history.json").write_text(json.dumps(history, indent=1))
