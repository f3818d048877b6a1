"""The figures of `identifiers.quality` for an ids artefact: exact where a number a product suffices, else on a bounded,
seeded sample of products.
"""

import numpy as np
import pyarrow as pa
import torch

from catid2_ray.docid import DocidSpace
from catid2_ray.identifiers.quality import (
    displacement_of,
    hourglass,
    id_quality,
    neighbour_agreement,
    prefix_agreement,
    reconstruction_error,
)
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.groups import read_groups
from catid2_ray.on_ray.stages.assign.order import Ordered
from catid2_ray.on_ray.stages.assign.work import Work
from catid2_ray.on_ray.stages.catalog import read_vectors
from catid2_ray.quantizer.coder import Coder
from catid2_ray.quantizer.model import ResidualQuantizer

_LABEL_ROWS = 50_000  # products whose categories are compared with their codes
_VECTOR_ROWS = 20_000  # products whose embeddings are looked at


def describe(
    job: Job,
    coder: Coder,
    *,
    work: Work,
    ordered: Ordered,
    space: DocidSpace,
    buckets: list[dict],
) -> dict:
    """`raw`: `id_quality` of the codes before collisions were resolved; `final`: of the IDs, on true labels; and the rest.

    Collisions, use of codes, floor and displacement are exact; agreement with categories is measured on at most 50,000
    products, with embeddings on at most 20,000, among which neighbours are sought. `found`: what the buckets reported.
    """
    columns = ["part", "index", "category", "embedding"]
    sample = read_vectors(work.vectors, columns, rows=_VECTOR_ROWS, seed=job.recipe.seed)
    total = ordered.final["products"]
    labels = sample if sample.num_rows == total else read_vectors(
        work.vectors, columns[:3], rows=_LABEL_ROWS, seed=job.recipe.seed
    )  # fmt: skip
    (raw_NL, final_NL), category_NH = _codes_of(work, space, labels), matrix(labels["category"])
    final = _with_categories(ordered.final, final_NL, category_NH, space)
    raw = _with_categories(ordered.raw, raw_NL, category_NH, work.space) if ordered.raw else final
    near_NL, embedding_ND = _codes_of(work, space, sample)[1], matrix(sample["embedding"])
    encoded = sum(result["products"] for result in buckets)
    figures = {
        "raw": raw,
        "final": final,
        "floor": {
            "collision_rate": 1 - sum(result["embeddings"] for result in buckets) / max(encoded, 1),
            "shared_rate": sum(result["with_twin"] for result in buckets) / max(encoded, 1),
        },
        "hourglass": hourglass(raw["normalised_entropy"]),
        "prefix_agreement": prefix_agreement(final_NL, category_NH, seed=job.recipe.seed),
        "neighbour_agreement": neighbour_agreement(near_NL, embedding_ND, seed=job.recipe.seed),
        "displacement": displacement_of(ordered.cost_P, total),
    }
    if isinstance(coder, ResidualQuantizer):
        with torch.no_grad():
            decoded = coder.decode(
                torch.from_numpy(embedding_ND.copy()), torch.from_numpy(matrix(sample["category"]).copy())
            )
        figures["reconstruction"] = reconstruction_error(embedding_ND, decoded.numpy())
    return figures


_NEED_CATEGORIES = ("purity", "purity_shuffled", "purity_products", "ami", "ami_shuffled")


def _with_categories(exact: dict, codes_NL: np.ndarray, category_NH: np.ndarray, space: DocidSpace) -> dict:
    sampled = id_quality(codes_NL, category_NH, space.codes_per_level)
    return exact | {name: sampled[name] for name in _NEED_CATEGORIES}


def _codes_of(work: Work, space: DocidSpace, sample: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Codes before and after de-duplication of the sampled products, int64 N×L each (before: none where the coder has none)."""
    part_N, index_N = matrix(sample["part"]), matrix(sample["index"])
    levels = work.space.levels if work.space else 0
    raw_NL, final_NL = np.zeros((len(part_N), levels), np.int64), np.zeros((len(part_N), space.levels), np.int64)
    for spec in work.specs:
        rows = np.flatnonzero(part_N == spec["part"])
        if len(rows):
            table = work.store.read_table(f"{work.folder}/{spec['file']}", columns=["codes"])
            final_NL[rows] = matrix(table["codes"])[index_N[rows]]
            coded = read_groups(work.store, work.name("codes", spec["position"]), ["row", "packed"])
            raw_pL = matrix(table["codes"])[:, :levels].astype(np.int64)  # who kept an ID was not coded
            if levels:
                raw_pL[matrix(coded["row"])] = work.space.unpack(matrix(coded["packed"]))
            raw_NL[rows] = raw_pL[index_N[rows]]
    return raw_NL, final_NL
