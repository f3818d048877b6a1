"""Stage 3b: train the seq2seq generator, query → ID tokens, with Ray Train and DeepSpeed; export it as a folder."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import TUNED, adapted, fetch, tuned
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.config import GeneratorRecipe, StageRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.batches import epoch_order, kept_words, mix_ratios, only_kept
from catid2_ray.generator.encoder_decoder import load_text_encoder, unrounded
from catid2_ray.generator.logits import READ_VECTORS
from catid2_ray.generator.model import build_generator
from catid2_ray.generator.saved import save_generator
from catid2_ray.generator.states import TokenStates
from catid2_ray.generator.step import DocidLoss, near_codes, parameter_groups
from catid2_ray.generator.vocabulary import load_tokenizer, marks, starts_word
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.query_encoder import tuned_folder
from catid2_ray.on_ray.machine.vectors import open_adapter
from catid2_ray.on_ray.stages import validation
from catid2_ray.on_ray.stages.assign.buckets import codebooks
from catid2_ray.on_ray.stages.assign.work import open_coder
from catid2_ray.on_ray.stages.embed import model_identity
from catid2_ray.on_ray.stages.examples import KIND, kinds_of
from catid2_ray.on_ray.stages.token_states import open_states
from catid2_ray.on_ray.training import worker
from catid2_ray.on_ray.training.shards import PartReader
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.trie_tensors import continuations
from catid2_ray.schedule import Phase

_VALIDATED, _FEWEST = (
    300,
    50,
)  # queries that choose the epoch where the recipe does not say, and how many it takes at least


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The generator artefact: a folder that `generator.saved.load_generator` loads, with its tokenizer."""
    recipe = job.recipe.generator
    queries = queries_to_validate(recipe, parts["pairs"], relevant_from=job.recipe.evaluation.min_relevance)
    sometimes = {"quantizer": _needs_codewords(recipe), "pairs": bool(queries)}
    sometimes["adapter"] = recipe.head in READ_VECTORS and adapted(parts.get("adapter"))
    # The encoder of the products' vectors is the tuned one, so the generator's is, where it is the same model.
    same = recipe.kind == "encoder_decoder" and recipe.encoder == job.recipe.embedding.encoder
    sometimes[TUNED] = same and tuned(parts) is not None
    parents = STAGES["generator"].reads(parts, *(role for role, needed in sometimes.items() if needed))
    settings = {**recipe.identity(), **model_identity(recipe.pretrained), "seed": job.recipe.seed}
    if sometimes[TUNED]:
        settings[TUNED] = parents[TUNED].digest
    settings["validate_queries"] = queries
    if queries:
        settings["validate_from"] = job.recipe.evaluation.min_relevance
    return job.produce("generator", settings, parents, lambda attempt: _train(job, attempt, parts, parents))


def queries_to_validate(recipe: GeneratorRecipe, pairs: Manifest, *, relevant_from: float) -> int:
    """How many validation queries choose the epoch: as the recipe says, or where it does not, _VALIDATED if there are enough."""
    if recipe.validate_queries is not None:
        return recipe.validate_queries
    judges = (pairs.metrics.get("splits") or {}).get("validation") or {}
    enough = judges.get("queries", 0) >= _FEWEST and (judges.get("relevance_max") or 0) >= relevant_from
    return _VALIDATED if enough else 0


def _train(job: Job, attempt: Attempt, parts: dict[str, Manifest], parents: dict[str, Manifest]) -> Manifest:
    recipe, examples = job.recipe.generator, parents["examples"]
    with scratch.folder("tokenizer") as cache:
        folder = fetch(job.store, examples, cache, below=("tokenizer/",))
        tokenizer = load_tokenizer(str(folder / "tokenizer"), kind=recipe.kind)
    counts = {kind: examples.metrics[f"{kind}_examples"] for kind in kinds_of(recipe, parts["pairs"])}
    checked = _validation(job, parts, tokenizer, queries=attempt.settings["validate_queries"])
    space = DocidSpace(parents["ids"].metrics["codes_per_level"])
    task = GeneratorTask(
        recipe, tokenizer, space, counts, job.recipe.seed, validation=checked, codebooks=_codebooks(job, parts, space),
        query_EE=_query_matrix(job, parents.get("adapter")),
        open_trie=functools.partial(validation.open_trie, job.store, replace(parents["ids"], recipe={})),
        tuned=functools.partial(tuned_folder, job.store, replace(parents[TUNED], recipe={})) if TUNED in parents else None,
    )  # fmt: skip
    for stage, steps in zip(recipe.plan, task.steps_per_epoch()):
        if steps == 1:
            progress.event(
                "epochs_of_one_step", stage=f"generator:{stage.name}", batch=recipe.batch, epochs=stage.epochs,
                advice="'lower generator.batch, or raise generator.epochs'",
            )  # fmt: skip
    run = worker.Run(
        task=task, settings=recipe, seed=job.recipe.seed, threads=job.recipe.cluster.threads_per_worker,
        device="cuda" if job.recipe.cluster.gpus_per_worker else "cpu", store=job.store, rows=examples,
    )  # fmt: skip
    files, figures = worker.train(run, job.recipe.cluster, attempt, label="training the generator")
    chosen = {name: figures[name] for name in ("best_epoch", "best_score", "stopped_early") if name in figures}
    metrics = {"loss": figures["loss"], "epochs": figures["epochs_done"], **chosen, **counts}
    manifest = attempt.commit(files, metrics=metrics)
    worker.clean(job.store, attempt, alone=job.is_alone())
    return manifest


def _validation(job: Job, parts: dict[str, Manifest], tokenizer, *, queries: int) -> validation.Validation | None:
    """What rank 0 searches with; None where nothing is to be, or can be, validated, which is then said."""
    recipe, why_not = job.recipe.generator, None
    if not parts["pairs"].metrics["pairs_table"]:
        why_not = "the catalogue has no table of pairs" if queries or recipe.patience else None
    elif queries:
        try:
            return validation.sample(
                job.store, parts["catalog"], parts["pairs"], parts["ids"], tokenizer, queries=queries,
                seed=job.recipe.seed, min_relevance=job.recipe.evaluation.min_relevance, query_tokens=recipe.query_tokens,
                normalize="trie" if recipe.loss == "trie" else "level",
            )  # fmt: skip
        except InputError:
            if recipe.validate_queries:  # who asked for it is told; who did not does without
                raise
            why_not = "no validation pair names a product of the catalogue"
    elif recipe.patience:
        why_not = f"fewer than {_FEWEST} validation queries can judge, and generator.patience has nothing to count"
    if why_not:
        progress.event("not_validated", reason=f"'{why_not}'")
    return None


def _needs_codewords(recipe: GeneratorRecipe) -> bool:
    return recipe.new_rows == "codewords" or recipe.smoothing == "near" or recipe.head in READ_VECTORS


def _query_matrix(job: Job, adapter: Manifest | None) -> np.ndarray | None:
    """The adapter's W, from which a dense head begins; None for the identity."""
    linear = open_adapter(job.store, adapter)
    return None if linear is None else linear.query_DD.detach().numpy()


def _codebooks(job: Job, parts: dict[str, Manifest], space: DocidSpace) -> list[np.ndarray | None] | None:
    """Per level the quantizer's codewords, where the recipe uses them; None for a level whose codes have none, such as a
    suffix's or a tree's."""
    if not _needs_codewords(job.recipe.generator):
        return None
    coder = open_coder(job.store, parts["quantizer"])
    books = codebooks(coder) if hasattr(coder, "codebooks") else []
    fit = [book if len(book) == k else None for book, k in zip(books, space.codes_per_level)]
    return fit + [None] * (space.levels - len(fit))


class GeneratorTask:
    """Examples of all kinds as the stages mix them; titles lose words at random, so that they look like queries.

    `counts`: rows of each kind in the whole artefact. `validation`: what to search with after an epoch, or None.
    `codebooks`: per level K×Z, from which ID rows begin and which say what codes are near, and from which with `query_EE`, the
    adapter's W, a dense head begins. `open_trie`: where the loss compares its continuations alone. `tuned`: gives this
    node's folder of the tuned text encoder, in place of the recipe's. With a frozen text encoder a
    rank is fed its token states instead of ids (`token_states.py`).
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
        codebooks: list[np.ndarray | None] | None = None,
        query_EE: np.ndarray | None = None,
        open_trie: Callable[[], Trie] | None = None,
        tuned: Callable[[], str] | None = None,
    ):
        self.codebooks, self.query_EE, self.marks, self.states = codebooks, query_EE, marks(tokenizer), None
        self.frozen = recipe.model == "encoder_decoder" and recipe.encoder_mode == "frozen"
        self.recipe, self.tokenizer, self.space, self.counts, self.seed = recipe, tokenizer, space, counts, seed
        self.validation, self.open_trie, self.tuned = validation, open_trie, tuned
        self.ratios = [mix_ratios(counts, stage.mix) for stage in recipe.plan]
        self.starts_word_V = starts_word(tokenizer)

    def stage_of(self, epoch: int) -> int:
        """The number of the stage that an epoch, counted through all of them, lies in."""
        ends = np.cumsum([stage.epochs for stage in self.recipe.plan])
        return min(int(np.searchsorted(ends, epoch, side="right")), len(ends) - 1)

    def _per_epoch(self, stage: int) -> int:
        return max(1, sum(round(ratio * self.counts[kind]) for kind, ratio in self.ratios[stage].items()))

    def steps_per_epoch(self) -> list[int]:
        """Of each stage; at least one."""
        return [max(1, self._per_epoch(number) // self.recipe.batch) for number in range(len(self.recipe.plan))]

    def phases(self, rows: int) -> list[Phase]:
        """One a stage; all ranks take the same steps, whatever their rows."""
        return [
            Phase(stage.epochs, self._per_epoch(number), stage.learning_rate or self.recipe.learning_rate)
            for number, stage in enumerate(self.recipe.plan)
        ]

    @property
    def text_encoder(self) -> str | None:
        return self.tuned() if self.tuned else self.recipe.encoder

    def build(self) -> DocidLoss:
        recipe = self.recipe
        model = build_generator(
            recipe.model, tokenizer=self.tokenizer, space=self.space, width=recipe.width, layers=recipe.layers,
            heads=recipe.heads, feed_forward=recipe.feed_forward, dropout=recipe.dropout, encoder=self.text_encoder,
            encoder_mode=recipe.encoder_mode, decoder_layers=recipe.decoder_layers, causal=recipe.causal, head=recipe.head,
            head_rank=recipe.head_rank, head_width=recipe.head_width, head_share=recipe.head_share, seed=self.seed,
            codebooks=self.codebooks if recipe.new_rows == "codewords" else None,
            begin=(self.codebooks, self.query_EE) if recipe.head in READ_VECTORS else None,
        )  # fmt: skip
        near = None
        if recipe.smoothing == "near":
            near = near_codes(self.codebooks, temperature=recipe.smoothing_temperature)
        return DocidLoss(
            model, space=self.space, level_weights=recipe.level_weights, label_smoothing=recipe.label_smoothing, near=near,
            consistency=recipe.passes_weight,
            continuations=functools.partial(continuations, self.open_trie()) if recipe.loss == "trie" else None,
        )  # fmt: skip

    def parameter_groups(self, module: DocidLoss, *, weight_decay: float) -> list[dict]:
        return parameter_groups(module, weight_decay=weight_decay)

    def start(self, module: DocidLoss) -> None:
        """Nothing: weights come from the seed or from the pretrained checkpoint."""

    def rows_per_epoch(self, rows: int) -> int:
        return max(1, round(rows * self._per_epoch(0) / max(1, sum(self.counts.values()))))

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray:
        """Rows of the epoch's stage as it mixes them, shuffled; a pure function of (seed, epoch)."""
        table, ratio = rows.take(slice(None)), self.ratios[self.stage_of(epoch)]
        kind_N = table["kind"]
        if self.frozen and self.states is None:
            self.states = open_states(self.text_encoder, table["input_ids"], pad=self.marks.pad)
        places = {kind: np.flatnonzero(kind_N == KIND[kind]) for kind in ratio}
        sizes = {kind: len(place) for kind, place in places.items() if len(place)}
        order = epoch_order(sizes, {kind: ratio[kind] for kind in sizes}, seed=seed, epoch=epoch)
        row_N = np.empty(len(order.row_N), np.int64)
        for number, kind in enumerate(order.kinds):
            here_N = order.kind_N == number
            row_N[here_N] = places[kind][order.row_N[here_N]]
        return row_N

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        """The whole texts and which of their tokens stay; `trim` takes the others out."""
        ids_BT, title_B = columns["input_ids"], columns["kind"] == KIND["title"]
        kept_BT = ids_BT != self.marks.pad
        generator, share = np.random.default_rng(seed), self.recipe.word_drop_share
        thin_B = title_B if share == 1 else title_B & (generator.random(len(title_B)) < share)
        if self.recipe.word_keep < 1 and thin_B.any():
            kept_BT[thin_B] = kept_words(
                ids_BT[thin_B], self.starts_word_V, keep=self.recipe.word_keep, generator=generator, pad=self.marks.pad,
                special=self.marks.special,
            )  # fmt: skip
        return {"input_ids": ids_BT, "kept": kept_BT, "codes": columns["codes"], "weight": columns["weight"]}

    def trim(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tokens that stay, as ids or states, without columns that are padding in every row."""
        ids_BT, kept_BT = columns["input_ids"], columns["kept"]
        rest = {"codes": columns["codes"], "weight": columns["weight"]}
        if self.states is None:
            return {"input_ids": only_kept(ids_BT, kept_BT, pad=self.marks.pad), **rest}
        states = self.states.take_texts(self.states.find(ids_BT), kept_BT)
        return {"states": states.states_BTE.numpy(), "real": states.mask_BT.numpy(), **rest}

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]:
        inputs = TokenStates(batch["states"], batch["real"]) if "states" in batch else batch["input_ids"].long()
        return engine(inputs, batch["codes"].long(), batch["weight"]), {}

    def validate(self, module: DocidLoss, epoch: int, *, beat: Callable[[], None] = lambda: None) -> dict:
        """Recall@50 of the real search on the sample; nothing where none was asked for. It is a `score`, by which the best epoch
        is chosen, in the last stage alone: what an earlier one made is there to be built upon."""
        if self.validation is None:
            return {}
        figures = self.validation.figures(module.model, beat)
        last = self.stage_of(epoch) + 1 == len(self.recipe.plan)
        return figures if last else {name: value for name, value in figures.items() if name != "score"}

    def end_epoch(self, module: DocidLoss, *, epoch: int, means: dict, history: list[dict]) -> tuple[dict, bool]:
        """The stage's name, where there are several."""
        plan: tuple[StageRecipe, ...] = self.recipe.plan
        return ({"stage": plan[self.stage_of(epoch)].name} if len(plan) > 1 else {}), False

    def export(self, module: DocidLoss, folder: Path, history: list[dict]) -> None:
        model = unrounded(module.model, lambda: load_text_encoder(self.text_encoder))
        save_generator(model, self.tokenizer, folder)
        (folder / "history.json").write_text(json.dumps(history, indent=1))
