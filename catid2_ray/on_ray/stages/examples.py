"""Stage 3a: pairs, titles, descriptions, users and made-up queries joined to IDs, as token ids for the generator, part by part.

Pairs and products lie in parts by the same hash of product_id, so the join needs no shuffle: a part of pairs meets the same
part of IDs; only the IDs of what users looked at before (`recent`), and what a teacher names (`teacher`), come from elsewhere.
What is cut or left out is counted.
"""

from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import tuned, tuned_role
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import pair_weights, training_pairs
from catid2_ray.config import EXAMPLE_KINDS, GeneratorRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, RecipeError
from catid2_ray.generator.batches import kinds_without_pairs
from catid2_ray.generator.inputs import Doc2Query, description_spans
from catid2_ray.generator.users import user_width, with_users
from catid2_ray.generator.vocabulary import frame, load_tokenizer, tokenize_cut, train_tokenizer, with_docid_tokens
from catid2_ray.hashing import hash_of_text
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages import recent, teacher
from catid2_ray.on_ray.stages.catalog import PAIR_FILES, part_specs, read_sample
from catid2_ray.on_ray.stages.embed import model_identity
from catid2_ray.schedule import seed_from

KIND = {name: number for number, name in enumerate(EXAMPLE_KINDS)}
_DECIDING = (
    "model",
    "encoder",
    "causal",
    "vocabulary",
    "min_relevance",
    "relevance_weights",
    "query_tokens",
    "tokenizer_rows",
)
_DECIDING_OF = {
    "span": ("span_tokens", "span_windows"),
    "user": ("user_tokens", "user_recent"),
    "synthetic": ("doc2query", "doc2query_per_product", "doc2query_top_k"),
    "teacher": ("teacher_draws", "teacher_queries"),
}
_MISSING = {
    "title": "the catalogue has no product",
    "span": "no product has a description of a few words",
    "user": "no training pair has a user: the pairs' columns are `user` (attributes) and `recent` (product_ids)",
    "synthetic": "generator.doc2query made no text of any title",
    "teacher": "no training query is left to be taught: raise generator.teacher_queries",
}


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The examples artefact: part-*.parquet of schemas.examples, tokenizer/ with the ID tokens as last entries."""
    recipe, kinds = job.recipe.generator, kinds_of(job.recipe.generator, parts["pairs"])
    deciding = [*_DECIDING, *(name for kind in kinds for name in _DECIDING_OF.get(kind, ()))]
    settings = {name: value for name, value in recipe.identity().items() if name in deciding}
    settings |= {**model_identity(recipe.pretrained), "seed": job.recipe.seed, "kinds": list(kinds)}
    if "synthetic" in kinds:
        settings["doc2query_files"] = model_identity(recipe.doc2query)
    sometimes = ()
    if "teacher" in kinds:
        encoder = _query_encoder(job, parts["catalog"])
        settings |= {"query_encoder": encoder, "query_encoder_files": model_identity(encoder["name"])}
        sometimes = ("embeddings", *(["adapter"] if "adapter" in parts else []), *tuned_role(parts))
    parents = STAGES["examples"].reads(parts, *sometimes)
    return job.produce("examples", settings, parents, lambda attempt: _make(job, attempt, parents))


def kinds_of(recipe: GeneratorRecipe, pairs: Manifest) -> tuple[str, ...]:
    """The kinds of examples that are made: those of the recipe, or without a table of pairs what can be made of products."""
    return recipe.kinds if pairs.metrics["pairs_table"] else kinds_without_pairs(recipe.kinds)


def width_of(recipe: GeneratorRecipe, space: DocidSpace) -> int:
    """Tokens of an input: those of a query, and where users stand before it, theirs."""
    if "user" not in recipe.kinds:
        return recipe.query_tokens
    return user_width(
        recipe.query_tokens, attribute_tokens=recipe.user_tokens, recent=recipe.user_recent, levels=space.levels
    )


def _make(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, space, catalog = (
        job.recipe.generator,
        DocidSpace(parents["ids"].metrics["codes_per_level"]),
        parents["catalog"],
    )
    if recipe.model == "small":
        progress.event("fit", what="tokenizer", subwords=recipe.vocabulary)
        tokenizer = train_tokenizer(_texts(job, catalog, parents["pairs"]), size=recipe.vocabulary)
    else:
        tokenizer = load_tokenizer(recipe.pretrained, kind=recipe.kind)
    tokenizer = with_docid_tokens(tokenizer, space)
    with scratch.folder("tokenizer") as local:
        tokenizer.save_pretrained(local)
        files = job.store.upload(local, attempt.name("tokenizer"))
    kinds = kinds_of(recipe, parents["pairs"])
    specs, workers, synthetic = part_specs(catalog, parents["pairs"]), job.recipe.ids.workers, "synthetic" in kinds
    arguments = {
        "store": job.store, "folder": attempt.folder, "catalog": catalog.folder, "ids": parents["ids"].folder,
        "recipe": recipe, "kinds": kinds, "tokenizer": tokenizer, "space": space, "seed": job.recipe.seed,
        "answering": [spec["part"] for spec in specs], "device": "cuda" if job.recipe.cluster.gpus_per_worker else "cpu",
    }  # fmt: skip
    counts = Counter()
    if "user" in kinds and recipe.user_recent:
        counts["recent_without_product"] = recent.exchange(
            job.store, attempt.name("exchange"), specs, ids=parents["ids"].folder,
            teaches=_teaching(recipe), most=recipe.user_recent, parts=catalog.metrics["parts"], workers=workers,
        )  # fmt: skip
    if "teacher" in kinds:
        arguments["taught"] = teacher.exchange(
            job.store, attempt.name("exchange"), specs, ids=parents["ids"].folder,
            vectors=ProductVectors.of(job.store, parents), encoder=_query_encoder(job, parents["catalog"]),
            tuned=tuned(parents), teaches=_teaching(recipe), most=recipe.teacher_queries,
            queries=parents["pairs"].metrics["splits"]["train"]["queries"],
            draws=recipe.teacher_draws, seed=job.recipe.seed, workers=workers,
        )  # fmt: skip
    results = map_parts(
        _MakeExamples, arguments, specs, workers=workers, label="making examples", unit="products", actors=synthetic,
        num_gpus=job.recipe.cluster.gpus_per_worker if synthetic else 0,
    )  # fmt: skip
    job.store.delete_folder(attempt.name("exchange"))
    for result in results:
        counts.update(result["counts"])
    _refuse_absent(recipe, kinds, counts)
    metrics = {name: int(counts[name]) for name in sorted(counts)}
    progress.event("examples", **metrics)
    return attempt.commit(
        files + [result["file"] for result in results],
        rows=sum(result["file"]["rows"] for result in results),
        schema=schemas.fingerprint(schemas.examples(width_of(recipe, space), space.levels)),
        metrics={**metrics, "vocabulary": len(tokenizer)},
    )


def _query_encoder(job: Job, catalog: Manifest) -> dict:
    """Name and tokens of what gives queries vectors in the space of the products'. RecipeError where nothing known does."""
    recipe = job.recipe
    name = recipe.serving.query_encoder or (None if catalog.metrics["width"] else recipe.embedding.encoder)
    if name is None:
        raise RecipeError(
            "generator.mix asks for teacher examples, which need vectors for queries, but the catalogue's embeddings are given "
            "and no encoder is known: set serving.query_encoder to the one that made them, or mix.teacher to 0"
        )
    return {"name": name, "tokens": recipe.embedding.tokens}


def _refuse_absent(recipe: GeneratorRecipe, kinds: tuple[str, ...], counts: Counter) -> None:
    if "query" in kinds and counts["query_examples"] == 0:
        raise InputError(
            f"no pair of the train split with relevance ≥ {recipe.min_relevance} names a product of the catalogue "
            f"({counts['pairs_without_product']} name others): check that pairs and products use the same product_id"
        )
    for kind in kinds:
        if counts[f"{kind}_examples"] == 0:
            raise InputError(f"generator.mix asks for {kind} examples, but {_MISSING[kind]}. Set mix.{kind} to 0")


def _teaching(recipe: GeneratorRecipe):
    return partial(training_pairs, min_relevance=recipe.min_relevance, weights=recipe.relevance_weights)


def _texts(job: Job, catalog: Manifest, pairs: Manifest):
    """Titles of a bounded sample, then the training queries of the same parts: what queries will look like."""
    rows = job.recipe.generator.tokenizer_rows
    yield from read_sample(job.store, catalog, ["title"], rows=rows, seed=job.recipe.seed)["title"].to_pylist()
    seen = 0
    for entry in pairs.named(PAIR_FILES):
        taught = _teaching(job.recipe.generator)(job.store.read_table(pairs.file(entry["name"])))
        yield from taught["query"].to_pylist()
        seen += taught.num_rows
        if seen >= rows:
            return


class _Rows(NamedTuple):
    """Examples of one kind in a part: inputs (of any length), the product's row in the part (beyond these: the teacher's), what
    each counts."""

    input_ids_NT: np.ndarray
    product_N: np.ndarray
    weight_N: np.ndarray


class _MakeExamples:
    """Actor: products, pairs and ids of a part in, examples out, kind after kind."""

    def __init__(
        self, *, store: Store, folder: str, catalog: str, ids: str, recipe: GeneratorRecipe, kinds: tuple[str, ...],
        tokenizer, space: DocidSpace, seed: int, answering: list[int], device: str, taught: int = 0,
    ):  # fmt: skip
        self.store, self.folder, self.catalog, self.ids, self.recipe = store, folder, catalog, ids, recipe
        self.kinds, self.tokenizer, self.space, self.seed, self.answering = kinds, tokenizer, space, seed, answering
        self.taught = taught
        self.doc2query = None
        if "synthetic" in kinds:
            self.doc2query = Doc2Query(recipe.doc2query, top_k=recipe.doc2query_top_k, device=device)

    def __call__(self, spec: dict) -> dict:
        ids = self.store.read_table(f"{self.ids}/{spec['file']}", columns=["product_id", "codes"])
        codes_NL, names = matrix(ids["codes"]), ids["product_id"].combine_chunks()
        rows, counts = self._of_pairs(spec, names)
        columns = ["title", *(["description"] if "span" in self.kinds else [])]
        products = self.store.read_table(f"{self.catalog}/{spec['file']}", columns=columns)
        if "title" in self.kinds:
            rows["title"] = self._whole(products["title"], np.arange(len(names)), counts)
        if "span" in self.kinds:
            rows["span"] = self._spans(products["description"], names, counts)
        if "synthetic" in self.kinds:
            rows["synthetic"] = self._synthetic(products["title"], spec["part"], counts)
        if "teacher" in self.kinds:
            texts, taught_NL = teacher.answers(self.store, f"{self.folder}/exchange", spec["position"], self.taught)
            rows["teacher"] = self._whole(texts, len(codes_NL) + np.arange(len(texts)), counts)
            codes_NL = np.concatenate([codes_NL, taught_NL])
        kinds = [kind for kind in EXAMPLE_KINDS if kind in rows]
        number_N = np.repeat([KIND[kind] for kind in kinds], [len(rows[kind].product_N) for kind in kinds])
        out = pa.table(
            {
                "part": pa.array(np.full(len(number_N), spec["part"], np.int32)),
                "index": pa.array(np.arange(len(number_N), dtype=np.int32)),
                "kind": pa.array(number_N.astype(np.int8)),
                "weight": pa.array(np.concatenate([rows[kind].weight_N for kind in kinds]).astype(np.float32)),
                "input_ids": fixed_lists(np.concatenate([self._wide(rows[kind]) for kind in kinds]), pa.int32()),
                "codes": fixed_lists(codes_NL[np.concatenate([rows[kind].product_N for kind in kinds])], pa.int32()),
            }
        )
        schema = schemas.examples(width_of(self.recipe, self.space), self.space.levels)
        entry = self.store.write_table(
            f"{self.folder}/{spec['file']}", schemas.conform(out, schema, where=f"examples, part {spec['part']}")
        )
        counts |= {f"{kind}_examples": len(rows[kind].product_N) for kind in kinds}
        return {"position": spec["position"], "file": {**entry, "part": spec["part"]}, "counts": counts}

    def _wide(self, rows: _Rows) -> np.ndarray:
        missing = width_of(self.recipe, self.space) - rows.input_ids_NT.shape[1]
        return np.pad(rows.input_ids_NT, ((0, 0), (0, missing)), constant_values=self.tokenizer.pad_token_id)

    def _whole(self, texts, product_N: np.ndarray, counts: dict, weight_N: np.ndarray | None = None) -> _Rows:
        """One example a text; texts that are too long are cut and counted."""
        tokenized = tokenize_cut(self.tokenizer, pa.array(texts).to_pylist(), length=self.recipe.query_tokens)
        counts["texts_cut"] = counts.get("texts_cut", 0) + int(tokenized.cut_N.sum())
        return _Rows(tokenized.input_ids_NT, product_N, np.ones(len(product_N)) if weight_N is None else weight_N)

    def _of_pairs(self, spec: dict, names: pa.Array) -> tuple[dict[str, _Rows], dict]:
        """The query examples and, where the mix wants them, those with a user before the query."""
        counts: dict[str, int] = {}
        if not spec["pairs"]:
            nothing = self._whole([], np.zeros(0, np.int64), counts)
            return dict.fromkeys([kind for kind in ("query", "user") if kind in self.kinds], nothing), counts
        pairs = _teaching(self.recipe)(self.store.read_table(spec["pairs"]))
        place = pc.index_in(pairs["product_id"].combine_chunks(), names)
        known_P = place.is_valid().to_numpy(zero_copy_only=False)
        counts["pairs_without_product"] = int((~known_P).sum())
        pairs = pairs.filter(pa.array(known_P)).combine_chunks()
        weight_N = pair_weights(pairs["relevance"], self.recipe.relevance_weights)
        rows = {"query": self._whole(pairs["query"].combine_chunks(), place.drop_null().to_numpy(), counts, weight_N)}
        if "user" in self.kinds:
            rows["user"] = self._users(spec, pairs, known_P, rows["query"], counts)
        return rows, counts

    def _users(self, spec: dict, pairs: pa.Table, known_P: np.ndarray, queries: _Rows, counts: dict) -> _Rows:
        attributes = np.full(pairs.num_rows, "", object)
        if "user" in pairs.column_names:
            attributes = pc.binary_join(pairs["user"], " ").to_numpy(zero_copy_only=False)
        row_R, codes_RL = np.zeros(0, np.int64), np.zeros((0, self.space.levels), np.int64)
        if self.recipe.user_recent:
            row_R, codes_RL = recent.answers(self.store, f"{self.folder}/exchange", spec["part"], self.answering)
            kept_R = known_P[row_R]
            row_R, codes_RL = (np.cumsum(known_P) - 1)[row_R[kept_R]], codes_RL[kept_R]
        has_N = np.not_equal(attributes, "") | (np.bincount(row_R, minlength=pairs.num_rows) > 0)
        counts["users_without_history"] = int((~has_N).sum())
        kept_R = has_N[row_R]
        prompted = with_users(
            self.tokenizer, queries.input_ids_NT[has_N], attributes[has_N].tolist(), (np.cumsum(has_N) - 1)[row_R[kept_R]],
            codes_RL[kept_R], space=self.space, attribute_tokens=self.recipe.user_tokens, recent=self.recipe.user_recent,
        )  # fmt: skip
        counts["attributes_cut"] = int(prompted.cut_N.sum())
        return _Rows(prompted.input_ids_NT, queries.product_N[has_N], queries.weight_N[has_N])

    def _spans(self, descriptions, names: pa.Array, counts: dict) -> _Rows:
        fits = self.recipe.query_tokens - sum(map(len, frame(self.tokenizer)))
        spans = description_spans(
            self.tokenizer, descriptions.to_pylist(), hash_of_text(names),
            tokens=min(self.recipe.span_tokens or fits, fits), windows=self.recipe.span_windows,
            length=self.recipe.query_tokens, seed=self.seed,
        )  # fmt: skip
        counts["spans_too_short"] = spans.too_short
        return _Rows(spans.input_ids_ST, spans.row_S, np.ones(len(spans.row_S)))

    def _synthetic(self, titles, part: int, counts: dict) -> _Rows:
        each = self.recipe.doc2query_per_product
        texts = self.doc2query.queries(titles.to_pylist(), count=each, seed=seed_from(self.seed, 5, part))
        said_N = np.array([bool(text) for text in texts], bool)
        counts["synthetic_empty"] = int((~said_N).sum())
        return self._whole([text for text in texts if text], np.repeat(np.arange(len(titles)), each)[said_N], counts)
