"""Stage 3a: pairs joined to IDs, as token ids for the generator, part by part.

Pairs and products lie in parts by the same hash of product_id, so the join needs no shuffle: a part of pairs meets the same
part of IDs. Pairs that name a product without an ID are counted, not lost silently.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts import schemas
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.config import GeneratorRecipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.generator.examples import tokenize
from catid2_ray.generator.vocabulary import load_tokenizer, train_tokenizer, with_docid_tokens
from catid2_ray.on_ray import progress
from catid2_ray.on_ray.arrays import fixed_lists, matrix
from catid2_ray.on_ray.catalog import part_specs, read_sample
from catid2_ray.on_ray.embed import model_identity
from catid2_ray.on_ray.parts import map_parts
from catid2_ray.on_ray.pipeline import Job

QUERY, TITLE = 0, 1
_DECIDING = ("model", "vocabulary", "min_relevance", "titles_per_query", "query_tokens", "tokenizer_rows")


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The examples artefact: part-*.parquet of schemas.examples, tokenizer/ with the ID tokens as last entries."""
    recipe = job.recipe.generator
    settings = {name: value for name, value in recipe.identity().items() if name in _DECIDING}
    settings |= {**model_identity(recipe.model), "seed": job.recipe.seed}
    parents = {role: parts[role] for role in ("catalog", "ids")}
    return job.produce("examples", settings, parents, lambda attempt: _make(job, attempt, parents))


def _make(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    recipe, space = job.recipe.generator, DocidSpace(parents["ids"].metrics["codes_per_level"])
    if recipe.model == "small":
        progress.event("fit", what="tokenizer", subwords=recipe.vocabulary)
        tokenizer = train_tokenizer(_texts(job, parents["catalog"]), size=recipe.vocabulary)
    else:
        tokenizer = load_tokenizer(recipe.model)
    tokenizer = with_docid_tokens(tokenizer, space)
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        files = job.store.upload(Path(local), attempt.name("tokenizer"))
    arguments = {
        "store": job.store, "folder": attempt.folder, "catalog": parents["catalog"].folder, "ids": parents["ids"].folder,
        "recipe": recipe, "tokenizer": tokenizer,
    }  # fmt: skip
    results = map_parts(
        _MakeExamples, arguments, part_specs(parents["catalog"]), workers=job.recipe.ids.workers,
        label="making examples", unit="products",
    )  # fmt: skip
    counts = {name: sum(result[name] for result in results) for name in ("queries", "titles", "without_product")}
    if counts["queries"] == 0:
        raise InputError(
            f"no pair of the train split with relevance ≥ {recipe.min_relevance} names a product of the catalogue "
            f"({counts['without_product']} name others): check that pairs and products use the same product_id"
        )
    return attempt.commit(
        files + [result["file"] for result in results],
        rows=sum(result["file"]["rows"] for result in results),
        schema=schemas.fingerprint(schemas.examples(recipe.query_tokens, space.levels)),
        metrics={"query_examples": counts["queries"], "title_examples": counts["titles"],
                 "pairs_without_product": counts["without_product"], "vocabulary": len(tokenizer)},
    )  # fmt: skip


def _texts(job: Job, catalog: Manifest):
    """Titles of a bounded sample, then the training queries of the same parts: what queries will look like."""
    rows = job.recipe.generator.tokenizer_rows
    yield from read_sample(job.store, catalog, ["title"], rows=rows, seed=job.recipe.seed)["title"].to_pylist()
    seen = 0
    for entry in catalog.named("pairs/part-"):
        pairs = training_pairs(job.store.read_table(catalog.file(entry["name"])), job.recipe.generator.min_relevance)
        yield from pairs["query"].to_pylist()
        seen += pairs.num_rows
        if seen >= rows:
            return


class _MakeExamples:
    """Actor: products, pairs and ids of a part in, examples out."""

    def __init__(self, *, store: Store, folder: str, catalog: str, ids: str, recipe: GeneratorRecipe, tokenizer):
        self.store, self.folder, self.catalog, self.ids = store, folder, catalog, ids
        self.recipe, self.tokenizer = recipe, tokenizer

    def __call__(self, spec: dict) -> dict:
        ids = self.store.read_table(f"{self.ids}/{spec['file']}", columns=["product_id", "codes"])
        codes_NL, names = matrix(ids["codes"]), ids["product_id"].combine_chunks()
        texts, codes, without = [], [codes_NL[:0]], 0
        if spec["pairs"]:
            pairs = training_pairs(self.store.read_table(f"{self.catalog}/{spec['pairs']}"), self.recipe.min_relevance)
            place = pc.index_in(pairs["product_id"], names).combine_chunks()
            without = place.null_count
            texts += pairs["query"].filter(place.is_valid()).to_pylist()
            codes.append(codes_NL[place.drop_null().to_numpy()])
        queries = len(texts)
        if self.recipe.titles_per_query:
            texts += self.store.read_table(f"{self.catalog}/{spec['file']}", columns=["title"])["title"].to_pylist()
            codes.append(codes_NL)
        rows = len(texts)
        kind = np.full(rows, TITLE, np.int8)
        kind[:queries] = QUERY
        out = pa.table(
            {
                "part": pa.array(np.full(rows, spec["part"], np.int32)),
                "index": pa.array(np.arange(rows, dtype=np.int32)),
                "kind": kind,
                "input_ids": fixed_lists(tokenize(self.tokenizer, texts, length=self.recipe.query_tokens), pa.int32()),
                "codes": fixed_lists(np.concatenate(codes), pa.int32()),
            }
        )
        schema = schemas.examples(self.recipe.query_tokens, codes_NL.shape[1])
        entry = self.store.write_table(
            f"{self.folder}/{spec['file']}", schemas.conform(out, schema, where=f"examples, part {spec['part']}")
        )
        return {
            "position": spec["position"], "file": {**entry, "part": spec["part"]}, "queries": queries,
            "titles": rows - queries, "without_product": int(without),
        }  # fmt: skip
