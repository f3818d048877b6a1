"""The figures of `identifiers.quality` for an ids artefact: exact where a number a product suffices, else on a bounded,
seeded sample of products.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.docid import DocidSpace
from catid2_ray.identifiers.quality import (
    displacement,
    equal_embedding_floor,
    hourglass,
    id_quality,
    neighbour_agreement,
    prefix_agreement,
    reconstruction_error,
)
from catid2_ray.on_ray.arrays import matrix
from catid2_ray.on_ray.catalog import read_sample
from catid2_ray.on_ray.pipeline import Job
from catid2_ray.quantizer.coder import Coder
from catid2_ray.quantizer.model import ResidualQuantizer

_LABEL_ROWS = 50_000  # products whose categories are compared with their codes
_VECTOR_ROWS = 20_000  # products whose embeddings are looked at


def row_hashes(embedding_ND: np.ndarray) -> pa.Array:
    """int64 N, equal for rows that are equal bit for bit, and for others only by chance, about 2^-63 a pair."""
    words_ND = np.ascontiguousarray(embedding_ND, np.float32).view(np.uint32).astype(np.uint64)
    odd_D = np.random.default_rng(0).integers(0, 2**63, words_ND.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    # Mixed before the sum: numbers that differ in their sign alone differ in one high bit, which a product leaves there.
    words_ND = (words_ND + odd_D) * np.uint64(0x9E3779B97F4A7C15)
    words_ND ^= words_ND >> np.uint64(29)
    return pa.array((words_ND * odd_D).sum(1).view(np.int64))


def describe(
    job: Job, embeddings: Manifest, coder: Coder, *, specs: list[dict], raw_NL: np.ndarray, final_NL: np.ndarray,
    space: DocidSpace, twin_N: np.ndarray, moved_N: np.ndarray, cost_N: np.ndarray,
) -> dict:  # fmt: skip
    """`raw`: `id_quality` of the codes before collisions were resolved; `final`: of the IDs, on true labels; and the rest.

    Arrays lie in the order of the parts. Collisions, use of codes, floor and displacement are exact; agreement with
    categories is measured on at most 50,000 products, with embeddings on at most 20,000, among which neighbours are sought.
    """
    starts = {spec["part"]: spec["start"] for spec in specs}
    columns = ["part", "index", "category", "embedding"]
    sample = read_sample(job.store, embeddings, columns, rows=_VECTOR_ROWS, seed=job.recipe.seed)
    labels = sample if sample.num_rows == len(final_NL) else read_sample(
        job.store, embeddings, columns[:3], rows=_LABEL_ROWS, seed=job.recipe.seed
    )  # fmt: skip
    label_rows, category_NH = _places(labels, starts), matrix(labels["category"])
    raw_space = DocidSpace(tuple(space.codes_per_level[: raw_NL.shape[1]]))
    none_N0 = np.empty((len(final_NL), 0), np.int64)
    # Counts on all products; what needs categories on those of the sample.
    raw = _merged(id_quality(raw_NL, none_N0, raw_space.codes_per_level), raw_NL[label_rows], category_NH, raw_space)
    final = _merged(id_quality(final_NL, none_N0, space.codes_per_level), final_NL[label_rows], category_NH, space)
    rows, embedding_ND = _places(sample, starts), matrix(sample["embedding"])
    figures = {
        "raw": raw,
        "final": final,
        "floor": equal_embedding_floor(twin_N[:, None]),
        "hourglass": hourglass(raw["normalised_entropy"]),
        "prefix_agreement": prefix_agreement(final_NL[label_rows], category_NH, seed=job.recipe.seed),
        "neighbour_agreement": neighbour_agreement(final_NL[rows], embedding_ND, seed=job.recipe.seed),
        "displacement": displacement(moved_N, cost_N),
    }
    if isinstance(coder, ResidualQuantizer):
        with torch.no_grad():
            decoded = coder.decode(
                torch.from_numpy(embedding_ND.copy()), torch.from_numpy(matrix(sample["category"]).copy())
            )
        figures["reconstruction"] = reconstruction_error(embedding_ND, decoded.numpy())
    return figures


_NEED_CATEGORIES = ("purity", "purity_shuffled", "purity_products", "ami", "ami_shuffled")


def _merged(exact: dict, codes_NL: np.ndarray, category_NH: np.ndarray, space: DocidSpace) -> dict:
    sampled = id_quality(codes_NL, category_NH, space.codes_per_level)
    return exact | {name: sampled[name] for name in _NEED_CATEGORIES}


def _places(table: pa.Table, starts: dict[int, int]) -> np.ndarray:
    """Where the table's rows stand in arrays over the whole catalogue."""
    parts = pa.array(list(starts), pa.int32())
    start_N = np.array(list(starts.values()))[pc.index_in(table["part"], parts).to_numpy()]
    return start_N + table["index"].to_numpy()
