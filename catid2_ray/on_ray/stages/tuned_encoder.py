"""Stage 0b: the text encoder fine-tuned on training pairs, by one worker, before anything goes through it.

Two artefacts: `lessons` holds pairs with the texts of their products, `tuned_encoder` the model that `catalog.tuning` trained. It
is kept from release to release until the job's `refresh_encoder`: with another one every vector, and so every ID, is another. A
stopped training begins anew.
"""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.manifest import Attempt, Manifest, verify
from catid2_ray.artifacts.release import TUNED
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.text import HuggingFaceEncoder, join_text
from catid2_ray.catalog.tuning import NEGATIVES_FROM, fine_tune, pairs_with_negatives
from catid2_ray.config import EmbeddingRecipe, Recipe, TuningRecipe
from catid2_ray.errors import RecipeError
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.stages.catalog import part_specs, read_sample
from catid2_ray.on_ray.stages.embed import model_identity
from catid2_ray.on_ray.stages.kept_back import COLUMNS, KeptBack
from catid2_ray.quantizer.adapter import CUT, Probe
from catid2_ray.schedule import seed_from

FEWEST = 32  # pairs; fewer say too little to move an encoder by
_SAMPLE = "products.parquet"
_EVERY_S = 30.0


def run(job: Job, parts: dict[str, Manifest]) -> Manifest | None:
    """The tuned_encoder artefact: tuned_encoder/ (safetensors, JSON) where it was adopted, and history.json. None with a frozen
    encoder.

    Its metrics say whether it was `adopted` and, where not, a `reason`; `recall` of dense search on queries kept back, `before`
    and `after`, among a sample of the products.
    """
    recipe = job.recipe
    if recipe.embedding.encoder_mode == "frozen":
        return None
    refuse_impossible(recipe, parts)
    settings = {
        **recipe.tuning.identity(), **model_identity(recipe.embedding.encoder),
        **{name: recipe.embedding.identity()[name] for name in ("encoder", "text", "tokens")},
        "min_relevance": recipe.generator.min_relevance, "relevant_from": recipe.evaluation.min_relevance, "seed": recipe.seed,
    }  # fmt: skip
    if kept := _kept(job, settings):
        return kept
    lessons = _collect(job, parts, settings)
    return job.produce(TUNED, settings, {"lessons": lessons}, lambda attempt: _tune(job, attempt, lessons))


def refuse_impossible(recipe: Recipe, parts: dict[str, Manifest]) -> None:
    """Raise RecipeError where the recipe asks for a tuned encoder that catalogue and pairs cannot give."""
    if recipe.embedding.encoder_mode == "frozen":
        return
    splits, why_not = parts["pairs"].metrics.get("splits"), None
    if parts["catalog"].metrics["width"]:
        why_not = "the catalogue's embeddings are given, so no encoder makes them: set embedding.source=encoder"
    elif not splits or not splits["train"]["pairs"]:
        why_not = "the catalogue has no pairs of the train split to learn from: bring pairs.parquet"
    if why_not:
        raise RecipeError(f"embedding.encoder_mode is tuned, but {why_not}; or set embedding.encoder_mode=frozen")


def _kept(job: Job, settings: dict) -> Manifest | None:
    """The encoder of the release before, where it was tuned from the same one with these settings."""
    before = job.previous.parts.get(TUNED) if job.previous else None
    if before is None or job.refresh_encoder or {**before.asked, "seed": None} != {**settings, "seed": None}:
        return None
    verify(job.store, before)
    job.committed[TUNED] = before.key
    job.say("reuse", stage=TUNED, key=before.key, kept_from=job.previous.release.name)
    return before


def _collect(job: Job, parts: dict[str, Manifest], settings: dict) -> Manifest:
    names = ("pairs", "products", "queries", "held_out", "text", "min_relevance", "relevant_from", "seed")
    parents = STAGES["lessons"].reads(parts)
    return job.produce(
        "lessons",
        {name: settings[name] for name in names},
        parents,
        lambda attempt: _make_lessons(job, attempt, parents),
    )


def _make_lessons(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    """part-*.parquet of pairs that teach or judge, with their products' texts; products.parquet, a sample to look among."""
    recipe, settings, catalog = job.recipe, attempt.settings, parents["catalog"]
    kept_back = KeptBack.of(
        parents["pairs"], recipe.tuning, **{name: settings[name] for name in ("min_relevance", "relevant_from", "seed")}
    )
    arguments = {
        "store": job.store, "catalog": catalog.folder, "folder": attempt.folder, "text": recipe.embedding.text,
        "kept_back": kept_back,
    }  # fmt: skip
    results = map_parts(
        _Collect, arguments, part_specs(catalog, parents["pairs"]), workers=recipe.embedding.workers,
        label="collecting pairs", unit="products",
    )  # fmt: skip
    sample = read_sample(
        job.store, catalog, ["product_id", *recipe.embedding.text], rows=settings["products"], seed=recipe.seed
    )
    sample = pa.table({"product_id": sample["product_id"], "text": join_text(sample, recipe.embedding.text)})
    files = [job.store.write_table(attempt.name(_SAMPLE), sample)]
    files += [result["entry"] for result in results if result["entry"]]
    counts = {name: sum(result[name] for result in results) for name in ("pairs", "judging")}
    return attempt.commit(files, rows=counts["pairs"], metrics={**counts, "judged_by": kept_back.judged_by})


def _tune(job: Job, attempt: Attempt, lessons: Manifest) -> Manifest:
    recipe, metrics = job.recipe, {name: lessons.metrics[name] for name in ("pairs", "judging", "judged_by")}
    if lessons.rows < FEWEST or not metrics["judging"]:
        reason = f"only {lessons.rows} pairs teach, of {FEWEST} at least" if metrics["judging"] else "no pair judges"
        job.say(TUNED, adopted=False, reason=f"'{reason}'")
        files = [job.store.write_file(attempt.name("history.json"), b"[]")]
        return attempt.commit(files, metrics={**metrics, "adopted": False, "reason": reason, "recall": {}})
    gpus = recipe.cluster.gpus_per_worker
    arguments = {
        "store": job.store, "folder": attempt.folder, "lessons": lessons, "embedding": recipe.embedding,
        "tuning": recipe.tuning, "seed": recipe.seed, "device": "cuda" if gpus else "cpu",
    }  # fmt: skip
    [tuned] = map_parts(
        _Tune, arguments, [{"rows": lessons.rows}], workers=1, label="tuning the encoder", unit="pairs", actors=True,
        num_gpus=gpus,
    )  # fmt: skip
    metrics |= {name: tuned[name] for name in ("adopted", "epoch", "recall", "queries", "among")}
    recalls = {f"recall_{when}": f"{values[str(CUT)]:.4f}" for when, values in metrics["recall"].items()}
    job.say(TUNED, adopted=metrics["adopted"], **recalls)
    return attempt.commit(tuned["files"], metrics=metrics)


class _Collect:
    """A part in, its pairs that teach and that judge with the texts of their products out."""

    def __init__(self, *, store: Store, catalog: str, folder: str, text: tuple[str, ...], kept_back: KeptBack):
        self.store, self.catalog, self.folder, self.text, self.kept_back = store, catalog, folder, text, kept_back

    def __call__(self, spec: dict) -> dict:
        none = {"position": spec["position"], "entry": None, "pairs": 0, "judging": 0}
        if not spec["pairs"]:
            return none
        pairs = self.store.read_table(spec["pairs"], columns=COLUMNS)
        learned, judged = self.kept_back.learned(pairs), self.kept_back.judged(pairs)
        rows = pa.concat_tables([learned, judged]).select(["query", "product_id"])
        if not rows.num_rows:
            return none
        rows = rows.append_column("judges", pa.array(np.arange(rows.num_rows) >= learned.num_rows))
        products = self.store.read_table(f"{self.catalog}/{spec['file']}", columns=["product_id", *self.text])
        place = pc.index_in(rows["product_id"].combine_chunks(), products["product_id"].combine_chunks())
        rows = rows.append_column("text", pa.array(join_text(products.take(place), self.text), pa.string()))
        entry = self.store.write_table(f"{self.folder}/{spec['file']}", rows)
        return {**none, "entry": {**entry, "part": spec["part"]}, "pairs": learned.num_rows, "judging": judged.num_rows}


class _Tune:
    """Actor: lessons in, the tuned encoder and how it was judged out. A call begins with the encoder as it was, so that one that
    is repeated, because the store was away, gives the same."""

    def __init__(
        self, *, store: Store, folder: str, lessons: Manifest, embedding: EmbeddingRecipe, tuning: TuningRecipe, seed: int,
        device: str,
    ):  # fmt: skip
        self.store, self.folder, self.lessons, self.embedding = store, folder, lessons, embedding
        self.tuning, self.seed, self.device = tuning, seed, device

    def __call__(self, spec: dict) -> dict:
        recipe, tuning = self.embedding, self.tuning
        encoder = HuggingFaceEncoder(recipe.encoder, batch=recipe.batch, tokens=recipe.tokens, device=self.device)
        encoder.refuse_a_part()
        sample, pairs = self._read()
        tables = ((table["product_id"].to_pylist(), table["text"].to_pylist()) for table in (sample, pairs))
        text_of = {name: text for names, texts in tables for name, text in zip(names, texts)}
        row_of = {name: row for row, name in enumerate(sorted(text_of))}
        texts = [text_of[name] for name in row_of]
        teaching, judging = (pairs.filter(pa.array(pairs["judges"].to_numpy() == judges)) for judges in (False, True))
        judge = Judge(encoder, texts, *_asked(judging, row_of), [row_of[name] for name in self._others(sample)])
        index, rows = Bm25(list(row_of), texts), [row_of[name] for name in teaching["product_id"].to_pylist()]
        taught = pairs_with_negatives(
            list(zip(teaching["query"].to_pylist(), rows)), texts, lambda query: _first(index.scores(query)), seed=self.seed
        )  # fmt: skip
        history = fine_tune(
            encoder, taught, epochs=tuning.epochs, batch=tuning.batch, learning_rate=tuning.learning_rate, seed=self.seed,
            score=judge, say=_Says(),
        )  # fmt: skip
        for record, recall in zip(history, judge.recalls, strict=True):
            record["recall"] = recall
        return {"position": spec["position"], **outcome(history), "queries": len(judge.queries),
                "among": len(judge.rows), "files": self._files(encoder, history)}  # fmt: skip

    def _read(self) -> tuple[pa.Table, pa.Table]:
        """The sample of products, and the pairs in an order that does not depend on the parts."""
        pairs = [self.store.read_table(self.lessons.file(part["name"])) for part in self.lessons.parts()]
        pairs = pa.concat_tables(pairs).sort_by([("query", "ascending"), ("product_id", "ascending")])
        return self.store.read_table(self.lessons.file(_SAMPLE)), pairs

    def _others(self, sample: pa.Table) -> list[str]:
        """The products that are searched beside those that the queries ask for."""
        order = np.random.default_rng(seed_from(self.seed, 1)).permutation(sample.num_rows)
        return sample["product_id"].take(pa.array(order[: self.tuning.judged_products])).to_pylist()

    def _files(self, encoder: HuggingFaceEncoder, history: list[dict]) -> list[dict]:
        with scratch.folder("encoder") as local:
            (local / "history.json").write_text(json.dumps(history, indent=1))
            if outcome(history)["adopted"]:
                encoder.save(local / TUNED)
            return self.store.upload(local, self.folder)


def outcome(history: list[dict]) -> dict:
    """`adopted`, `epoch` (0: the encoder as it was), `recall` before and after; of equal epochs the earlier one."""
    best = max(history, key=lambda record: record["score"])
    return {
        "adopted": best["epoch"] > 0,
        "epoch": best["epoch"],
        "recall": {"before": history[0]["recall"], "after": best["recall"]},
    }


class Judge:
    """What the encoder is worth as it is now: called, its recall at CUT; `recalls` keeps those at all cuts."""

    def __init__(
        self, encoder: HuggingFaceEncoder, texts: list[str], queries: list[str], query_P: np.ndarray, row_P: np.ndarray,
        others: list[int],
    ):  # fmt: skip
        """Pair p: `queries[query_P[p]]` asks for `texts[row_P[p]]`. `others`: rows that are searched beside all `row_P`."""
        self.encoder, self.texts, self.queries, self.query_P, self.recalls = encoder, texts, queries, query_P, []
        self.rows = np.unique(np.concatenate([row_P, np.array(others, np.int64)]))
        self.product_P = np.searchsorted(self.rows, row_P)

    def __call__(self) -> float:
        probe = Probe(
            query_QD=self.encoder.encode(self.queries),
            product_ND=self.encoder.encode([self.texts[row] for row in self.rows]),
            query_P=self.query_P, product_P=self.product_P,
        )  # fmt: skip
        self.recalls.append(probe.recall(None))
        return self.recalls[-1][str(CUT)]


def _asked(judging: pa.Table, row_of: dict[str, int]) -> tuple[list[str], np.ndarray, np.ndarray]:
    queries, query_P = np.unique(judging["query"].to_numpy().astype(object), return_inverse=True)
    return queries.tolist(), query_P, np.array([row_of[name] for name in judging["product_id"].to_pylist()], np.int64)


def _first(score_N: np.ndarray) -> list[int]:
    """The rows of the first products, best first, of equals the first row; only those that share a word."""
    first = np.argsort(-score_N, kind="stable")[:NEGATIVES_FROM]
    return first[score_N[first] > 0].tolist()


class _Says:
    """A line in the log every _EVERY_S seconds."""

    def __init__(self):
        self.last = time.monotonic()

    def __call__(self, step: int, steps: int, loss: float) -> None:
        if step == steps or time.monotonic() - self.last > _EVERY_S:
            self.last = time.monotonic()
            progress.event("tuning", step=f"{step}/{steps}", loss=round(loss, 4))
