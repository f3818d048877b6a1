"""Stage 5a: what a replica reads beside trie and generator, in the order of the trie's rows: vectors, values, columns, words.

Products lie in parts by a hash of their ids, IDs in trie order: workers bring the rows of a part to their ranges of trie
rows through files, then this process writes one range after the other, so it holds one range, the vocabulary of the
lexical index and a few bytes a product. Only what the recipe's serving section needs is made; often that is the section
itself and nothing else.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.release import fetch, tuned
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.text import join_text
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import ArtifactError, RecipeError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.vectors import ProductVectors
from catid2_ray.on_ray.stages.catalog import part_specs
from catid2_ray.on_ray.stages.embed import model_identity
from catid2_ray.on_ray.stages.trie_order import TrieOrder
from catid2_ray.retrieval.lexical import Block, LexicalIndex, count_words
from catid2_ray.retrieval.products import ProductNames
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore

RANGE_ROWS = 131_072  # trie rows that this process holds at a time
LEXICAL_TEXT = ("title", "description")  # as the baseline BM25 reads them


class Needs(NamedTuple):
    """What the serving section asks for, beside itself."""

    vectors: bool
    value: bool
    columns: tuple[str, ...]
    lexical: bool


def needs_of(settings: dict) -> Needs:
    expansion, ahead = settings["expansion"] or {}, settings.get("lookahead", {})
    return Needs(
        # A search that looks ahead reads them when products come or go.
        vectors=bool(ahead) or expansion.get("dense", "none") != "none",
        value=bool(expansion),
        columns=tuple(settings["filters"]),
        lexical=max(expansion.get("lexical_weight", 0), ahead.get("lexical_weight", 0)) > 0,
    )


def run(job: Job, parts: dict[str, Manifest]) -> Manifest:
    """The serving artefact: serving.json, product_names.npy, and as needed vectors/, value.npy, columns.arrow, lexical/."""
    parents = STAGES["serving"].reads(parts)
    settings = settings_of(job.recipe, parts)
    return job.produce("serving", settings, parents, lambda attempt: _make(job, attempt, parents))


def settings_of(recipe: Recipe, parts: dict[str, Manifest]) -> dict:
    """The serving section with its beams, its search and its query encoder resolved. Raises RecipeError where dense scores are
    asked for and nothing can give queries their vectors.

    A search by the beam alone says nothing of looking ahead: the artefacts of before there was a choice keep their keys.
    """
    settings = recipe.serving.identity() | {"beam_width": recipe.model_dump(mode="json")["serving"]["beam_width"]}
    if settings["beam_width"] is None:
        settings["beam_width"] = recipe.evaluation.beam_width
    looks_ahead = recipe.serving.looks_ahead and "node_vectors" in parts
    for name in ("node_depth", "query_encoder", *([] if looks_ahead else ["search", "lookahead"])):
        del settings[name]
    # What decides about weights is no setting of what is laid out.
    for part, name in (("expansion", "weights"), ("lookahead", "try_logp_weight")):
        if settings.get(part):
            del settings[part][name]
    if recipe.serving.needs_vectors and not has_encoder(recipe, parts):
        raise RecipeError(
            "serving.expansion scores products by their vectors, but the catalogue's embeddings are given and no encoder "
            "is known for queries: set serving.query_encoder to the one that made them, or serving.expansion.dense=none "
            "with order=value"
        )
    needs_vectors = recipe.serving.needs_vectors or looks_ahead
    return settings | {"encoder": encoder_of(recipe, parts) if needs_vectors else None}


def has_encoder(recipe: Recipe, parts: dict[str, Manifest]) -> bool:
    """Whether something can give queries their vectors."""
    return recipe.serving.query_encoder is not None or not parts["catalog"].metrics["width"]


def encoder_of(recipe: Recipe, parts: dict[str, Manifest]) -> dict:
    """What gives queries their vectors, as `machine.query_encoder` takes it. Raises RecipeError for an lsa that was never
    fitted."""
    name = recipe.serving.query_encoder or recipe.embedding.encoder
    encoder = {"name": name} if name == "lsa" else {"name": name, "tokens": recipe.embedding.tokens}
    if name == "lsa" and (parts["catalog"].metrics["width"] or recipe.embedding.encoder != "lsa"):
        raise RecipeError("serving.query_encoder is 'lsa', but the products' vectors were made by another encoder")
    if (encoder_tuned := tuned(parts)) is not None:
        encoder["tuned"] = encoder_tuned.digest
    return encoder | model_identity(name)


def _make(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> Manifest:
    store, needs = job.store, needs_of(attempt.settings)
    files = [store.write_file(attempt.name("serving.json"), json.dumps(attempt.settings, indent=1).encode())]
    with scratch.folder("serving") as local:
        ids, folder = (
            fetch(store, parents["ids"], local / "cache", below=("trie/", "products.arrow")),
            local / "made",
        )
        products = pa.ipc.open_file(pa.memory_map(str(ids / "products.arrow"))).read_all()
        ProductNames(products["product_id"]).save(folder)
        if any(needs):
            progress.event("serving", products=parents["ids"].rows, parts=" ".join(_made(needs)))
            rows = Rows.spread(job, attempt, parents, Trie.open(ids / "trie"), needs)
            rows.write(folder, (attempt.settings["expansion"] or {}).get("unit_vectors", True))
        files += store.upload(folder, attempt.folder)
    store.delete_folder(attempt.name("exchange"))
    return attempt.commit(files, rows=parents["ids"].rows, metrics={"made": sorted(_made(needs))})


def _made(needs: Needs) -> list[str]:
    return [name for name, needed in needs._asdict().items() if needed]


class Rows:
    """All rows by range of trie rows, as `_Spread` left them; read and written range by range. Also what the node vectors
    are made of."""

    def __init__(self, store: Store, folder: str, order: TrieOrder, results: list[dict], rows: int, needs: Needs):
        self.store, self.folder, self.order, self.results = store, folder, order, results
        self.rows, self.needs = rows, needs

    @classmethod
    def spread(cls, job: Job, attempt: Attempt, parents: dict[str, Manifest], trie: Trie, needs: Needs) -> "Rows":
        first_R = np.arange(RANGE_ROWS, trie.rows, RANGE_ROWS)
        space = DocidSpace(trie.codes_per_level)
        codes_RL = trie.prefixes(trie.levels, trie.row_start[-1].holding(first_R))
        order = TrieOrder(np.unique(space.pack(codes_RL)) if len(first_R) else np.empty(0, np.int64))
        arguments = {"store": job.store, "folder": attempt.folder, "parents": parents, "needs": needs, "space": space}
        results = map_parts(
            _Spread, arguments | {"order": order}, part_specs(parents["ids"]), workers=job.recipe.ids.workers,
            label="bringing products to their rows", unit="products",
        )  # fmt: skip
        return cls(job.store, attempt.folder, order, results, trie.rows, needs)

    def range(self, number: int, columns: list[str]) -> pa.Table:
        """The rows of one range in trie order; of a shared ID, in the order of the parts, as the trie has them."""
        names = [_exchange(self.folder, position) for position in range(len(self.results))]
        return self.order.gather(self.store, names, number, columns).select(columns)

    def write(self, folder: Path, unit_vectors: bool) -> None:
        if self.needs.vectors:
            blocks = (matrix(self.range(number, ["embedding"])["embedding"]) for number in range(self.order.ranges))
            written = VectorStore.write(folder / "vectors", blocks, normalize=unit_vectors).rows
            self._check(written)
        if self.needs.value:
            values = [
                matrix(self.range(number, ["value"])["value"].fill_null(-np.inf)) for number in range(self.order.ranges)
            ]
            np.save(folder / "value.npy", np.concatenate(values).astype(np.float32), allow_pickle=False)
            self._check(sum(map(len, values)))
        if self.needs.columns:
            self._write_columns(folder / "columns.arrow")
        if self.needs.lexical:
            self._write_lexical(folder / "lexical")

    def _check(self, rows: int) -> None:
        if rows != self.rows:
            raise ArtifactError(f"{rows} products for {self.rows} rows of the trie; delete the ids artefact and rerun")

    def _write_columns(self, path: Path) -> None:
        columns = list(self.needs.columns)
        first = self.range(0, columns)
        written = 0
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            for number in range(self.order.ranges):
                table = first if not number else self.range(number, columns)
                writer.write_table(table.combine_chunks())
                written += table.num_rows
        self._check(written)

    def _write_lexical(self, folder: Path) -> None:
        words = None
        for position in range(len(self.results)):
            of_part = read_group(self.store, _exchange(self.folder, position, "words"), 0)
            words = of_part if words is None else pa.concat_tables([words, of_part])
            words = words.group_by("word").aggregate([("rows", "sum")]).rename_columns(["word", "rows"])
        words = words.sort_by("word")
        vocabulary = words["word"].combine_chunks()
        vocabulary = pa.concat_arrays(vocabulary.chunks) if isinstance(vocabulary, pa.ChunkedArray) else vocabulary
        LexicalIndex.write(
            folder, (self._block(number, vocabulary) for number in range(self.order.ranges)), vocabulary=vocabulary,
            frequency_V=matrix(words["rows"]), rows=self.rows,
            mean_length=sum(result["words"] for result in self.results) / self.rows,
        )  # fmt: skip

    def _block(self, number: int, vocabulary: pa.Array) -> Block:
        table = self.range(number, ["length", "words", "times"]).combine_chunks()
        count_N = matrix(pc.list_value_length(table["words"]))
        term_P = matrix(pc.index_in(pc.list_flatten(table["words"]), vocabulary))
        return Block(count_N, matrix(table["length"]), term_P.astype(np.int32), matrix(pc.list_flatten(table["times"])))


def _exchange(folder: str, position: int, kind: str = "rows") -> str:
    return f"{folder}/exchange/{kind}-{position:05d}.arrow"


class _Spread:
    """A part in, its rows by range of trie rows out."""

    def __init__(
        self,
        *,
        store: Store,
        folder: str,
        parents: dict[str, Manifest],
        needs: Needs,
        space: DocidSpace,
        order: TrieOrder,
    ):
        self.store, self.folder, self.parents = store, folder, parents
        self.vectors = ProductVectors.of(store, parents)
        self.needs, self.space, self.order = needs, space, order

    def __call__(self, spec: dict) -> dict:
        ids = self._read("ids", spec, ["product_id", "codes"])
        packed_N = self.space.pack(matrix(ids["codes"]))
        columns = {"packed": pa.array(packed_N)}
        names = [name for name in ("value",) if self.needs.value and name not in self.needs.columns]
        if names := [*names, *self.needs.columns]:
            products = self._read("catalog", spec, ["product_id", *names])
            self._same(ids, products, "catalog", spec)
            columns |= {name: products[name] for name in names}
        if self.needs.vectors:
            vectors = self.vectors.read(spec["file"], ["product_id", "embedding"])
            columns["embedding"] = fixed_lists(matrix(vectors["embedding"]), pa.float32())
            self._same(ids, vectors, "embeddings", spec)
        words = self._add_words(columns, spec) if self.needs.lexical else 0
        self.order.spread(self.store, _exchange(self.folder, spec["position"]), pa.table(columns))
        return {"position": spec["position"], "words": words}

    def _read(self, role: str, spec: dict, columns: list[str]) -> pa.Table:
        return self.store.read_table(self.parents[role].file(spec["file"]), columns=columns)

    def _same(self, ids: pa.Table, other: pa.Table, role: str, spec: dict) -> None:
        if ids["product_id"].combine_chunks() != other["product_id"].combine_chunks():
            raise ArtifactError(
                f"part {spec['part']} of ids and of {role} name different products; delete both artefacts and rerun the job"
            )

    def _add_words(self, columns: dict, spec: dict) -> int:
        """Adds length, words and times; writes in how many products each word occurs; returns the number of words."""
        counted = count_words(join_text(self._read("catalog", spec, list(LEXICAL_TEXT)), LEXICAL_TEXT))
        start = pa.array(np.concatenate(([0], np.cumsum(counted.count_N))).astype(np.int32))
        columns["length"] = pa.array(counted.length_N)
        columns["words"] = pa.ListArray.from_arrays(start, counted.words)
        columns["times"] = pa.ListArray.from_arrays(start, pa.array(counted.times))
        occurrences = counted.words.value_counts()
        table = pa.table({"word": occurrences.field("values"), "rows": occurrences.field("counts")})
        name = _exchange(self.folder, spec["position"], "words")
        write_groups(self.store, name, table, np.zeros(table.num_rows, np.int64), 1)
        return int(counted.length_N.sum())
