"""Stage 3c: what alignment asks, one row a query: its tokens, its judged IDs and what they are worth.

Pairs lie by product, prompts go by query, so a part's pairs are joined to its IDs and spread over buckets by a hash of the
query; a bucket is then made whole, whatever the size of the catalogue. A pair that names a product without an ID is counted.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import default_cache, fetch
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.config import AlignmentRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.rewards import BEHAVIOURS, judged_rows, relevance_rewards
from catid2_ray.generator.vocabulary import load_tokenizer, tokenize_cut
from catid2_ray.hashing import hash_of_text
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.stages.catalog import part_specs

SPLITS = ("train", "validation")
FOLDERS = {"train": "part", "validation": "validation/part"}
_BUCKET_PAIRS = 1_000_000
_REWARDS = ("paid", "clicked", "exposed", "valid", "grades", "judged_max")
_CUTS = ("judged_cut", "scores_cut", "queries_cut")  # what did not fit
_SCORES = ("query_id", "product_id", "score")
_SCORED = pa.schema([("query_id", pa.string()), ("packed", pa.int64()), ("score", pa.float64())])


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The prompts artefact: part-*.parquet of schemas.prompts for training queries, validation/part-*.parquet."""
    recipe, rewards = job.recipe.alignment, job.recipe.alignment.identity()
    settings = {name: rewards[name] for name in _REWARDS} | {"relevant_from": job.recipe.evaluation.min_relevance}
    if recipe.ranker_scores:
        source, name = score_file(recipe.ranker_scores)
        settings["scores"] = source.fingerprint(name)
    parents = STAGES["prompts"].reads(parts)
    return job.produce("prompts", settings, parents, lambda attempt: _make(job, attempt, parents))


def score_file(uri: str) -> tuple[Store, str]:
    """The store and name of the table of scores; InputError where it is not there or lacks a column."""
    folder, _, name = uri.rpartition("/")
    source = Store(folder or ".")
    if not source.exists(name):
        raise InputError(f"alignment.ranker_scores: there is no {uri}; give a parquet file with {', '.join(_SCORES)}")
    present = source.parquet_file(name).schema_arrow.names
    if missing := [column for column in _SCORES if column not in present]:
        raise InputError(f"{uri}: missing column {', '.join(missing)}; found {', '.join(present)}")
    return source, name


def _make(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, catalog, ids = job.recipe.alignment, parents["catalog"], parents["ids"]
    buckets, space = -(-catalog.metrics["pairs"] // _BUCKET_PAIRS), DocidSpace(ids.metrics["codes_per_level"])
    exchange = attempt.name("exchange")
    grouped = map_parts(
        _Join,
        {"store": job.store, "exchange": exchange, "catalog": catalog.folder, "ids": ids.folder, "space": space,
         "buckets": buckets, "scores": recipe.ranker_scores},
        part_specs(catalog), workers=job.recipe.ids.workers, label="joining judgements", unit="products",
    )  # fmt: skip
    ranges = [result["range"] for result in grouped if result["range"]]
    if not ranges:
        raise InputError(
            "alignment: no pair of the train split names a product of the catalogue: check that pairs and products use the same "
            "product_id"
        )
    arguments = {
        "store": job.store, "folder": attempt.folder, "exchange": exchange, "parts": len(grouped), "recipe": recipe,
        "examples": parents["examples"], "kind": job.recipe.generator.kind, "relevant_from": job.recipe.evaluation.min_relevance,
        "behaviour": bool(catalog.metrics.get("behaviour")),
        "low": min(low for low, _ in ranges), "high": max(high for _, high in ranges),
    }  # fmt: skip
    specs = [{"rows": sum(result["pairs"] for result in grouped) // buckets} for _ in range(buckets)]
    written = map_parts(
        _MakePrompts, arguments, specs, workers=job.recipe.ids.workers, label="making prompts", unit="pairs"
    )
    job.store.delete_folder(exchange)
    counts = {split: sum(result[split] for result in written) for split in SPLITS}
    return attempt.commit(
        [entry for result in written for entry in result["files"]],
        rows=counts["train"],
        schema=schemas.fingerprint(_schema(parents["examples"], recipe)),
        metrics={"queries": counts["train"], "validation_queries": counts["validation"],
                 "rewards": "behaviour" if arguments["behaviour"] else "relevance",
                 **{name: sum(result[name] for result in written) for name in _CUTS},
                 "pairs_without_product": sum(result["without"] for result in grouped)},
    )  # fmt: skip


def _schema(examples: Manifest, recipe: AlignmentRecipe) -> pa.Schema:
    return schemas.prompts(examples.settings["query_tokens"], recipe.judged_max, scored=bool(recipe.ranker_scores))


class _Join:
    """Pairs and IDs of a part in; judgements (and scores) with packed IDs out, by the query's bucket."""

    def __init__(self, *, store: Store, exchange: str, catalog: str, ids: str, space: DocidSpace, buckets: int, scores):
        self.store, self.exchange, self.catalog, self.ids = store, exchange, catalog, ids
        self.space, self.buckets, self.scores = space, buckets, None
        if scores:
            source, name = score_file(scores)
            self.scores = source.read_table(name, columns=list(_SCORES))

    def __call__(self, spec: dict) -> dict:
        position = spec["position"]
        ids = self.store.read_table(f"{self.ids}/{spec['file']}", columns=["product_id", "codes"])
        names, packed_N = ids["product_id"].combine_chunks(), self.space.pack(matrix(ids["codes"]))
        pairs, without, span = None, 0, None
        if spec["pairs"]:
            pairs = self.store.read_table(f"{self.catalog}/{spec['pairs']}")
            pairs = pairs.filter(pc.is_in(pairs["split"], pa.array(SPLITS)))
            before = pairs.num_rows
            pairs = self._with_ids(pairs, names, packed_N)
            without = before - pairs.num_rows
            taught = pairs.filter(pc.field("split") == "train")["relevance"]
            span = [pc.min(taught).as_py(), pc.max(taught).as_py()] if len(taught) else None
            self._spread(f"{self.exchange}/pairs-{position:05d}.arrow", pairs)
        if self.scores is not None:
            scored = self.scores.filter(pc.is_in(self.scores["product_id"].cast(pa.string()), names))
            scored = self._with_ids(scored, names, packed_N).select(_SCORED.names).cast(_SCORED)
            self._spread(f"{self.exchange}/scores-{position:05d}.arrow", scored)
        return {"position": position, "pairs": pairs.num_rows if pairs else 0, "without": without, "range": span}

    @staticmethod
    def _with_ids(table: pa.Table, names: pa.Array, packed_N: np.ndarray) -> pa.Table:
        place = pc.index_in(table["product_id"].cast(pa.string()), names).combine_chunks()
        table = table.filter(place.is_valid())
        return table.append_column("packed", pa.array(packed_N[place.drop_null().to_numpy()]))

    def _spread(self, name: str, table: pa.Table) -> None:
        key_N = hash_of_text(table["query_id"])
        write_groups(self.store, name, table, (key_N % np.uint64(self.buckets)).astype(np.int64), self.buckets)


class _MakePrompts:
    """The judgements of a bucket of queries in; its prompts out."""

    def __init__(
        self, *, store: Store, folder: str, exchange: str, parts: int, recipe: AlignmentRecipe, examples: Manifest,
        kind: str, relevant_from: float, behaviour: bool, low: float, high: float,
    ):  # fmt: skip
        self.store, self.folder, self.exchange, self.parts, self.recipe = store, folder, exchange, parts, recipe
        self.relevant_from, self.behaviour, self.low, self.high = relevant_from, behaviour, low, high
        self.schema, self.length = _schema(examples, recipe), examples.settings["query_tokens"]
        tokens = fetch(store, examples, default_cache(), below=("tokenizer/",))
        self.tokenizer = load_tokenizer(str(tokens / "tokenizer"), kind=kind)

    def __call__(self, spec: dict) -> dict:
        bucket = spec["position"]
        pairs, scores = self._group("pairs", bucket), self._group("scores", bucket)
        result = {"position": bucket, "files": [], **dict.fromkeys((*_CUTS, *SPLITS), 0)}
        for split in SPLITS:
            table = pairs.filter(pc.field("split") == split) if pairs is not None else None
            if table is None or not table.num_rows:
                continue
            prompts, cuts = self._prompts(table, scores, bucket)
            entry = self.store.write_table(f"{self.folder}/{FOLDERS[split]}-{bucket:05d}.parquet", prompts)
            result["files"].append({**entry, "part": bucket})
            for name, number in cuts.items():
                result[name] += number
            result[split] = prompts.num_rows
        return result

    def _group(self, table: str, bucket: int) -> pa.Table | None:
        names = [f"{self.exchange}/{table}-{part:05d}.arrow" for part in range(self.parts)]
        tables = [read_group(self.store, name, bucket) for name in names if self.store.exists(name)]
        return pa.concat_tables(tables) if tables else None

    def _rewards(self, table: pa.Table) -> np.ndarray:
        if not self.behaviour:
            return relevance_rewards(
                table["relevance"].to_numpy(), grades=self.recipe.grades, low=self.low, high=self.high
            )
        worth = np.array([*(getattr(self.recipe, name) for name in BEHAVIOURS), self.recipe.valid], np.float32)
        place = pc.fill_null(pc.index_in(table["behaviour"], pa.array(BEHAVIOURS)), len(BEHAVIOURS))
        return worth[place.to_numpy()]

    def _prompts(self, table: pa.Table, scores: pa.Table | None, bucket: int) -> tuple[pa.Table, dict[str, int]]:
        names, first_Q, query_P = np.unique(
            table["query_id"].to_numpy().astype(str), return_index=True, return_inverse=True
        )
        texts, width = table["query"].take(pa.array(first_Q)), self.recipe.judged_max
        rows = judged_rows(
            query_P, table["packed"].to_numpy(), self._rewards(table),
            table["relevance"].to_numpy() >= self.relevant_from, queries=len(names), width=width,
        )  # fmt: skip
        tokens, index = tokenize_cut(self.tokenizer, texts.to_pylist(), length=self.length), np.arange(len(names))
        cuts = {"judged_cut": rows.cut, "queries_cut": int(tokens.cut_N.sum())}
        columns = {
            "part": np.full(len(names), bucket, np.int32), "index": index, "number": (bucket << 32) + index,
            "query": texts,
            "input_ids": fixed_lists(tokens.input_ids_NT, pa.int32()),
            "judged": fixed_lists(rows.judged_QJ, pa.int64()), "reward": fixed_lists(rows.reward_QJ, pa.float32()),
            "relevant": fixed_lists(rows.relevant_QJ, pa.int32()),
        }  # fmt: skip
        if self.recipe.ranker_scores:
            known = scores.filter(pc.is_in(scores["query_id"], pa.array(names)))
            place = pc.index_in(known["query_id"], pa.array(names)).to_numpy()
            scored = judged_rows(
                place, known["packed"].to_numpy(), known["score"].to_numpy(), np.zeros(len(place)),
                queries=len(names), width=width,
            )  # fmt: skip
            cuts["scores_cut"] = scored.cut
            columns |= {"scored": fixed_lists(scored.judged_QJ, pa.int64()),
                        "score": fixed_lists(scored.reward_QJ, pa.float32())}  # fmt: skip
        return schemas.conform(pa.table(columns), self.schema, where=f"prompts, bucket {bucket}"), cuts
