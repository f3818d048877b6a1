"""Vectors of the release before, by the texts that they are of, so that only new and changed texts go through the encoder.

They are a cache and never an input: a vector depends on the encoder and its text alone, so the artefact is the same bit for bit
with and without them (on processors of one kind; an encoder on another kind rounds the last bits otherwise), and its key does
not name them. A worker reads the old part of its number; where the catalogue has another number of parts by now, a first pass
brings the old vectors to the parts that their products belong to today.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catid2_ray.artifacts.manifest import Attempt, Manifest, verify
from catid2_ray.artifacts.store import Store
from catid2_ray.catalog.text import join_text
from catid2_ray.errors import ArtifactError
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.stages.catalog import part_of

_SPREAD_ROWS = 65_536  # vectors that a worker of the first pass holds: 0.2 GB at 768 numbers, and some copies


class KnownVectors(NamedTuple):
    """`row_N`: for each text the row of `vector_MD` that is its vector, −1 where it has none yet."""

    row_N: np.ndarray
    vector_MD: np.ndarray


def nothing_known(texts: int) -> KnownVectors:
    return KnownVectors(np.full(texts, -1), np.empty((0, 0), np.float32))


@dataclass(frozen=True)
class EmbeddedBefore:
    """Where workers find the vectors of the release before.

    `files`: names of its parts by their numbers, the same below `catalog` (the texts) and `embeddings` (the vectors).
    `unchanged`: parts whose products are today's, byte for byte. `text`: the columns that were joined. `pieces`: how many files of
    `exchange` hold the vectors by today's parts; 0 where the number of parts is the same, and none are needed.
    """

    store: Store
    catalog: str
    embeddings: str
    files: dict[int, str]
    unchanged: frozenset[int]
    text: tuple[str, ...]
    exchange: str
    pieces: int = 0

    def look_up(self, part: int, texts: list[str]) -> KnownVectors:
        """What is known of the texts of one of today's parts."""
        if self.pieces:
            tables = [read_group(self.store, self.piece(number), part) for number in range(self.pieces)]
            table = pa.concat_tables(tables)
            keys, vector_MD = table["key"].to_pylist(), matrix(table["embedding"])
        elif part not in self.files:
            return nothing_known(len(texts))
        else:
            vector_MD = self.vectors(self.files[part])
            if part in self.unchanged:
                return KnownVectors(np.arange(len(texts)), vector_MD)
            keys = [text_key(text) for text in join_text(self.products(self.files[part]), self.text)]
        place = {key: row for row, key in enumerate(keys)}
        return KnownVectors(np.array([place.get(text_key(text), -1) for text in texts], np.int64), vector_MD)

    def piece(self, number: int) -> str:
        return f"{self.exchange}-{number:05d}.arrow"

    def products(self, file: str) -> pa.Table:
        return self.store.read_table(f"{self.catalog}/{file}", columns=["product_id", *self.text])

    def vectors(self, file: str) -> np.ndarray:
        return matrix(self.store.read_table(f"{self.embeddings}/{file}", columns=["embedding"])["embedding"])


def text_key(text: str) -> bytes:
    """128 bits, which no two texts of a store share by chance."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def embed_texts(
    texts: list[str], known: KnownVectors, encode: Callable[[list[str]], np.ndarray]
) -> tuple[np.ndarray, int]:
    """float32 N×D, and how many texts went through `encode`: those without a vector, equal ones once."""
    missing_N = known.row_N < 0
    new = {text: None for text, missing in zip(texts, missing_N) if missing}
    if not new:
        return known.vector_MD[known.row_N], 0
    vector_UD = np.asarray(encode(list(new)), dtype=np.float32)
    place = {text: row for row, text in enumerate(new)}
    embedding_ND = np.empty((len(texts), vector_UD.shape[1]), np.float32)
    embedding_ND[missing_N] = vector_UD[[place[text] for text, missing in zip(texts, missing_N) if missing]]
    if not missing_N.all():
        embedding_ND[~missing_N] = known.vector_MD[known.row_N[~missing_N]]
    return embedding_ND, len(new)


def open_before(job: Job, attempt: Attempt, parents: dict[str, Manifest]) -> EmbeddedBefore | None:
    """The vectors of the release that the job builds on, where the encoder of this attempt would give the same ones.

    None without a release; with another encoder, other settings or another version of the stage; with a fitted encoder that is
    not that release's (role "encoder" of `parents`); and under `refit_encoder`.
    """
    if job.previous is None or job.refit_encoder:
        return None
    catalog, before = job.previous.parts["catalog"], job.previous.parts["embeddings"]
    if {**before.settings, "seed": None} != {**attempt.settings, "seed": None}:
        return None
    fitted = attempt.settings["encoder"] == "lsa"
    if fitted and ("encoder" not in parents or parents["encoder"].digest != before.digest):
        return None
    rows = [[(entry["name"], entry["rows"]) for entry in manifest.parts()] for manifest in (catalog, before)]
    if before.parents.get("catalog") != catalog.digest or rows[0] != rows[1]:
        return None
    try:
        verify(job.store, catalog)
        verify(job.store, before)
    except ArtifactError as error:
        progress.event("vectors_not_reused", release=job.previous.release.name, reason=f"'{error}'")
        return None
    return _brought_to_parts(job, attempt, catalog, before, parents["catalog"])


def _brought_to_parts(
    job: Job, attempt: Attempt, catalog: Manifest, before: Manifest, today: Manifest
) -> EmbeddedBefore:  # fmt: skip
    parts, workers = today.metrics["parts"], job.recipe.embedding.workers
    pieces = [] if catalog.metrics["parts"] == parts else _pieces(catalog)
    found = EmbeddedBefore(
        store=job.store, catalog=catalog.folder, embeddings=before.folder,
        files={entry["part"]: entry["name"] for entry in catalog.parts()}, unchanged=unchanged_parts(catalog, today),
        text=job.recipe.embedding.text, exchange=attempt.name("exchange/vectors"), pieces=len(pieces),
    )  # fmt: skip
    if pieces:
        map_parts(
            SpreadVectors, {"before": found, "parts": parts}, pieces, workers=workers, label="reading known vectors",
            unit="products",
        )  # fmt: skip
    return found


def unchanged_parts(before: Manifest, today: Manifest) -> frozenset[int]:
    """Numbers of the parts of two catalogues whose files are the same, byte for byte."""
    had = {entry["part"]: entry["sha256"] for entry in before.parts()}
    return frozenset(entry["part"] for entry in today.parts() if had.get(entry["part"]) == entry["sha256"])


def _pieces(catalog: Manifest) -> list[dict]:
    """The parts of a catalogue in groups of at most `_SPREAD_ROWS` rows, or of one part."""
    pieces = []
    for entry in catalog.parts():
        if not pieces or pieces[-1]["rows"] + entry["rows"] > _SPREAD_ROWS:
            pieces.append({"files": [], "rows": 0})
        pieces[-1]["files"].append(entry["name"])
        pieces[-1]["rows"] += entry["rows"]
    return pieces


class SpreadVectors:
    """Some parts of the release before in, their texts' keys and vectors by today's parts out."""

    def __init__(self, *, before: EmbeddedBefore, parts: int):
        self.before, self.parts = before, parts

    def __call__(self, spec: dict) -> dict:
        before, keys, vectors, numbers = self.before, [], [], []
        for file in spec["files"]:
            products = before.products(file)
            keys += [text_key(text) for text in join_text(products, before.text)]
            vectors.append(before.store.read_table(f"{before.embeddings}/{file}", columns=["embedding"]))
            numbers.append(part_of(products["product_id"], self.parts))
        table = pa.concat_tables(vectors).add_column(0, "key", pa.array(keys, pa.binary(16)))
        write_groups(before.store, before.piece(spec["position"]), table, np.concatenate(numbers), self.parts)
        return {"position": spec["position"]}
