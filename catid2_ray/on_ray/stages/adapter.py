"""Stage 0d: the adapter between embeddings and quantizer, learned from training pairs with Ray Train and DeepSpeed.

Two artefacts: `matched` holds the vectors of training pairs and of the queries kept back, `adapter` the two matrices. The adapter
is kept from release to release until the job's `refresh_adapter`: with another one every vector, and so every ID, is another.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest, verify
from catid2_ray.artifacts.release import tuned, tuned_role
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.config import AdapterRecipe, EmbeddingRecipe, Recipe
from catid2_ray.errors import RecipeError
from catid2_ray.hashing import hash_of_text
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.stages.catalog import part_specs, read_sample
from catid2_ray.on_ray.stages.embed import model_identity, open_encoder
from catid2_ray.on_ray.stages.kept_back import COLUMNS, KeptBack
from catid2_ray.on_ray.training import worker
from catid2_ray.on_ray.training.shards import PartReader
from catid2_ray.quantizer.adapter import CUT, LinearAdapter, Probe, adapter_loss, pair_order

_JUDGED, _PRODUCTS = "judged/", "products.parquet"


def run(job: Job, parts: dict[str, Manifest]) -> Manifest | None:
    """The adapter artefact: adapter.safetensors and history.json; None where the recipe, or `auto`, does without.

    Its metrics say whether it was `adopted`, and `recall` of dense search on queries kept back, `before` and `after`.
    """
    recipe = job.recipe
    refuse_impossible(recipe, parts)
    if why_not := reason_against(recipe, parts):
        progress.event("without_adapter", reason=f"'{why_not}'")
        return None
    settings = {**recipe.adapter.identity(), **_query_encoder(recipe, parts), "seed": recipe.seed}
    if kept := _kept(job, parts, settings):
        return kept
    parents = {"matched": _match(job, parts)}
    return job.produce(
        "adapter", settings, parents, lambda attempt: _train(job, attempt, parents["matched"]), anew=job.refresh_adapter
    )


def refuse_impossible(recipe: Recipe, parts: dict[str, Manifest]) -> None:
    """Raise RecipeError where the recipe asks for an adapter that catalogue and pairs cannot give."""
    if recipe.embedding.adapter == "linear" and (why_not := reason_against(recipe, parts)):
        raise RecipeError(f"embedding.adapter is linear, but {why_not}; or set embedding.adapter=none")


def reason_against(recipe: Recipe, parts: dict[str, Manifest]) -> str | None:
    """Why there is no adapter, None where there is one."""
    if recipe.embedding.adapter == "none":
        return "embedding.adapter is none"
    splits = parts["pairs"].metrics.get("splits")
    if not splits or not splits["train"]["pairs"]:
        return "the catalogue has no pairs of the train split to learn it from: bring pairs.parquet"
    if parts["catalog"].metrics["width"] and not recipe.serving.query_encoder:
        return (
            "the catalogue's embeddings are given and no encoder is known for queries: set serving.query_encoder to the one that "
            "made them"
        )
    return None


def _query_encoder(recipe: Recipe, parts: dict[str, Manifest]) -> dict:
    """What names the encoder of queries where the embeddings do not."""
    name = recipe.serving.query_encoder
    return {"query_encoder": name, **model_identity(name)} if parts["catalog"].metrics["width"] else {}


def _kept(job: Job, parts: dict[str, Manifest], settings: dict) -> Manifest | None:
    """The adapter of the release before, where it was learned with these settings for vectors of this encoder."""
    before = job.previous.parts.get("adapter") if job.previous else None
    if before is None or job.refresh_adapter or {**before.asked, "seed": None} != {**settings, "seed": None}:
        return None
    if _space(parts["embeddings"]) != _space(job.previous.parts["embeddings"]):
        return None
    verify(job.store, before)
    job.committed["adapter"] = before.key
    progress.event("reuse", stage="adapter", key=before.key, kept_from=job.previous.release.name)
    return before


def _space(embeddings: Manifest) -> list:
    """What two tables of vectors have in common where one encoder made them."""
    fitted = [[entry["name"], entry["sha256"]] for entry in embeddings.named("encoder/")]
    return [{**embeddings.asked, "seed": None}, embeddings.metrics["width"], fitted]


def _match(job: Job, parts: dict[str, Manifest]) -> Manifest:
    recipe, parents = job.recipe, STAGES["matched"].reads(parts, *tuned_role(parts))
    settings = {name: getattr(recipe.adapter, name) for name in ("pairs", "products", "queries", "held_out")}
    settings |= {
        "min_relevance": recipe.generator.min_relevance, "relevant_from": recipe.evaluation.min_relevance,
        "seed": recipe.seed, **_query_encoder(recipe, parts),
    }  # fmt: skip
    return job.produce("matched", settings, parents, lambda attempt: _make_matched(job, attempt, parents))


def _make_matched(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    """part-*.parquet of schemas.matched, judged/part-*.parquet of queries kept back, products.parquet to search among."""
    recipe, embeddings, settings = job.recipe, parents["embeddings"], attempt.settings
    width, encoder = embeddings.metrics["width"], recipe.embedding
    kept_back = KeptBack.of(
        parents["pairs"],
        recipe.adapter,
        **{name: settings[name] for name in ("min_relevance", "relevant_from", "seed")},
    )
    if name := settings.get("query_encoder"):
        encoder = encoder.model_copy(update={"encoder": name})
    arguments = {
        "store": job.store, "folder": attempt.folder, "embeddings": embeddings, "recipe": encoder, "kept_back": kept_back,
        "lsa_folder": embeddings.file("encoder") if encoder.encoder == "lsa" else None, "tuned": tuned(parents),
    }  # fmt: skip
    results = map_parts(
        _MatchPart, arguments, part_specs(parents["catalog"], parents["pairs"]), workers=encoder.workers,
        label="embedding queries", unit="products", actors=encoder.encoder != "lsa", num_gpus=encoder.gpus_per_worker,
    )  # fmt: skip
    sample = read_sample(
        job.store, embeddings, ["product_id", "embedding"], rows=settings["products"], seed=recipe.seed
    )  # fmt: skip
    sample = pa.table({"product": _keys(sample["product_id"]), "product_vector": sample["embedding"].combine_chunks()})
    files = [job.store.write_table(attempt.name(_PRODUCTS), sample)]
    files += [file for result in results for file in result["files"]]
    pairs = sum(result["pairs"] for result in results)
    return attempt.commit(
        files, rows=pairs, schema=schemas.fingerprint(schemas.matched(width)),
        metrics={"pairs": pairs, "width": width, "judged_by": kept_back.judged_by},
    )  # fmt: skip


def _keys(texts) -> pa.Array:
    """int64: which text it is."""
    return pa.array(hash_of_text(texts).view(np.int64))


class _MatchPart:
    """Actor: pairs and vectors of a part in; vectors of the pairs that teach, and of those that judge, out.

    Each distinct query of a part is encoded once. The encoder is loaded for the first part that has pairs."""

    def __init__(
        self, *, store: Store, folder: str, embeddings: Manifest, recipe: EmbeddingRecipe, kept_back: KeptBack,
        lsa_folder: str | None, tuned: Manifest | None,
    ):  # fmt: skip
        self.store, self.folder, self.embeddings, self.kept_back = store, folder, embeddings, kept_back
        self.recipe, self.lsa_folder, self.tuned = recipe, lsa_folder, tuned

    @functools.cached_property
    def encoder(self):
        return open_encoder(self.store, self.recipe, self.lsa_folder, self.tuned)

    def __call__(self, spec: dict) -> dict:
        if not spec["pairs"]:
            return {"position": spec["position"], "files": [], "pairs": 0}
        pairs = self.store.read_table(spec["pairs"], columns=COLUMNS)
        chosen = [("", self.kept_back.learned(pairs)), (_JUDGED, self.kept_back.judged(pairs))]
        files, vectors = [], self.store.read_table(
            self.embeddings.file(spec["file"]), columns=["product_id", "embedding"]
        )  # fmt: skip
        for below, rows in chosen:
            if rows.num_rows:
                table = self._with_vectors(rows, vectors, spec["part"])
                entry = self.store.write_table(f"{self.folder}/{below}{spec['file']}", table)
                files.append({**entry, "part": spec["part"]})
        return {"position": spec["position"], "files": files, "pairs": chosen[0][1].num_rows}

    def _with_vectors(self, rows: pa.Table, vectors: pa.Table, part: int) -> pa.Table:
        texts, place_N = np.unique(rows["query"].to_numpy().astype(object), return_inverse=True)
        query_ND = self.encoder.encode(texts.tolist())[place_N]
        at = pc.index_in(rows["product_id"].combine_chunks(), vectors["product_id"].combine_chunks())
        product_ND = matrix(vectors["embedding"])[at.to_numpy(zero_copy_only=False)]
        out = pa.table(
            {
                "part": pa.array(np.full(rows.num_rows, part, np.int32)),
                "index": pa.array(np.arange(rows.num_rows, dtype=np.int32)),
                "query": _keys(rows["query"]),
                "product": _keys(rows["product_id"]),
                "query_vector": fixed_lists(query_ND, pa.float32()),
                "product_vector": fixed_lists(product_ND, pa.float32()),
            }
        )
        return schemas.conform(out, schemas.matched(product_ND.shape[1]), where=f"matched, part {part}")


def open_probe(store: Store, matched: Manifest) -> Probe | None:
    """The queries kept back and what they are searched among; None where no query was kept back."""
    tables = [store.read_table(matched.file(entry["name"])) for entry in matched.named(_JUDGED)]
    if not tables:
        return None
    judged, others = pa.concat_tables(tables), store.read_table(matched.file(_PRODUCTS))
    _, first_Q, query_P = np.unique(matrix(judged["query"]), return_index=True, return_inverse=True)
    keys = np.concatenate([matrix(judged["product"]), matrix(others["product"])])
    vectors = np.concatenate([matrix(judged["product_vector"]), matrix(others["product_vector"])])
    _, first_N, place = np.unique(keys, return_index=True, return_inverse=True)
    return Probe(
        query_QD=matrix(judged["query_vector"])[first_Q], product_ND=vectors[first_N], query_P=query_P,
        product_P=place[: judged.num_rows],
    )  # fmt: skip


def _train(job: Job, attempt: Attempt, matched: Manifest) -> Manifest:
    if not matched.rows or not matched.named(_JUDGED):
        lacking = "teaches" if not matched.rows else "judges"
        progress.event("adapter", adopted=False, reason=f"'no pair {lacking}'")
        return _commit_identity(job, attempt, matched, f"no pair {lacking}")
    recipe = job.recipe.adapter
    run = worker.Run(
        task=AdapterTask(recipe, store=job.store, matched=matched), settings=recipe, seed=job.recipe.seed,
        threads=job.recipe.cluster.threads_per_worker, device="cuda" if job.recipe.cluster.gpus_per_worker else "cpu",
        store=job.store, rows=matched,
    )  # fmt: skip
    files, _ = worker.train(run, job.recipe.cluster, attempt, label="training the adapter")
    history = json.loads(job.store.read(attempt.name("history.json")))
    metrics = {**outcome(history), "pairs": matched.rows, "judged_by": matched.metrics["judged_by"]}
    progress.event("adapter", adopted=metrics["adopted"], **{
        f"recall_{when}": f"{values[str(CUT)]:.4f}" for when, values in metrics["recall"].items()
    })  # fmt: skip
    manifest = attempt.commit(files, metrics=metrics)
    worker.clean(job.store, attempt, alone=job.is_alone())
    return manifest


def _commit_identity(job: Job, attempt: Attempt, matched: Manifest, reason: str) -> Manifest:
    with scratch.folder("adapter") as local:
        LinearAdapter(matched.metrics["width"]).save(local)
        (local / "history.json").write_text("[]")
        return attempt.commit(
            job.store.upload(local, attempt.folder),
            metrics={"adopted": False, "reason": reason, "pairs": matched.rows, "recall": {}},
        )  # fmt: skip


def outcome(history: list[dict]) -> dict:
    """`adopted`, `epoch` (1 is the first, 0 the identity), `recall` before and after, `queries` that judged.

    An adapter is adopted where its best epoch finds more than the vectors as they are."""
    last = history[-1]
    best, before = history[last["best_epoch"]], last["before"]
    adopted = best["score"] > before[str(CUT)]
    epoch, after = (best["epoch"] + 1, best["recall"]) if adopted else (0, before)
    return {
        "adopted": adopted,
        "epoch": epoch,
        "recall": {"before": before, "after": after},
        "queries": last["queries"],
    }


class AdapterTask:
    """`quantizer.adapter.adapter_loss` over the global batch; every rank holds all pairs, so that the batches do not depend on
    the number of workers. Epochs are judged on rank 0."""

    unit = "pairs"
    columns = ["query", "product", "query_vector", "product_vector"]
    reader = PartReader(tuple(columns))
    shards = "whole"

    def __init__(self, recipe: AdapterRecipe, *, store: Store, matched: Manifest):
        self.recipe, self.store, self.matched = recipe, store, matched

    def build(self) -> LinearAdapter:
        return LinearAdapter(self.matched.metrics["width"])

    def parameter_groups(self, module, *, weight_decay: float) -> list[dict]:
        return [{"params": list(module.parameters()), "weight_decay": weight_decay}]

    def start(self, module: LinearAdapter) -> None:
        """Nothing: it begins as the identity."""

    def rows_per_epoch(self, rows: int) -> int:
        return rows

    def order(self, rows, *, seed: int, epoch: int, batch: int, steps: int) -> np.ndarray:
        return pair_order(rows.rows, seed=seed, epoch=epoch)

    def prepare(self, columns: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
        return columns

    def loss(self, engine, batch: dict[str, torch.Tensor], *, gather) -> tuple[torch.Tensor, dict]:
        dtype = next(engine.module.parameters()).dtype
        vectors = (batch[name].to(dtype) for name in ("query_vector", "product_vector"))
        return adapter_loss(engine, *vectors, batch["query"], batch["product"], gather=gather), {}

    def end_epoch(self, module: LinearAdapter, *, epoch: int, means: dict, history: list[dict]) -> tuple[dict, bool]:
        return {}, False

    @functools.cached_property
    def _probe(self) -> Probe:
        return open_probe(self.store, self.matched)

    @functools.cached_property
    def _before(self) -> dict[str, float]:
        return self._probe.recall(None)

    def validate(self, module: LinearAdapter, epoch: int, *, beat: Callable[[], None] = lambda: None) -> dict:
        """Recall of dense search on the queries kept back, and `before` that of the vectors as they are."""
        recall = self._probe.recall(module)
        return {
            "recall": recall,
            "before": self._before,
            "score": recall[str(CUT)],
            "queries": len(self._probe.query_QD),
        }

    def export(self, module: LinearAdapter, folder: Path, history: list[dict]) -> None:
        if not outcome(history)["adopted"]:
            module.reset()
        module.save(folder)
        (folder / "history.json").write_text(json.dumps(history, indent=1))
