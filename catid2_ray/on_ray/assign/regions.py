"""Where a prefix has more products than codes: which parts of the ID tree have to be resolved whole, and by whom."""

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError
from catid2_ray.identifiers.overflow import closed_regions
from catid2_ray.on_ray import progress
from catid2_ray.on_ray.assign.buckets import CountNodes, ResolveRegions, codebooks
from catid2_ray.on_ray.assign.work import Work
from catid2_ray.on_ray.parts import map_parts
from catid2_ray.quantizer.coder import Coder


def resolve_regions(work: Work, coder: Coder, overfull: list[int]) -> list[dict]:
    """Resolve the least nodes of the ID tree that hold all that is below them, `overfull` prefixes of L − 1 codes included.

    Nobody leaves or enters such a node, so the result is that of one run over the whole catalogue. Raises CapacityError
    where a node has more products than `ids.bucket_rows`.
    """
    if not overfull:
        return []

    size: dict[tuple[int, int], int] = {}  # products below a node

    def count(depth: int, nodes_M: np.ndarray) -> np.ndarray:
        spec = {"rows": 0, "depth": depth, "nodes": nodes_M.tolist()}
        found = map_parts(
            CountNodes, {"work": work}, [spec] * work.buckets, workers=work.recipe.workers,
            label=f"counting below {len(nodes_M)} prefixes", unit="products",
        )  # fmt: skip
        products_M, occupied_M = (np.sum([one[name] for one in found], axis=0) for name in ("products", "occupied"))
        size.update({(depth, node): int(rows) for node, rows in zip(nodes_M.tolist(), products_M)})
        return products_M + occupied_M

    regions = closed_regions(np.array(overfull), count, work.space)
    total = sum(size[region] for region in regions)
    progress.event("overflow", prefixes=len(overfull), regions=len(regions), products=total)
    specs: list[dict] = []
    for region in sorted(regions, key=lambda region: (-size[region], region)):
        if size[region] > work.recipe.bucket_rows:
            _refuse(work, region, size[region])
        if not specs or specs[-1]["held"] + size[region] > work.recipe.bucket_rows:
            specs.append({"rows": 0, "held": 0, "regions": []})
        specs[-1]["held"] += size[region]
        specs[-1]["regions"].append(list(region))
    arguments = {"work": work, "codebooks": codebooks(coder)}
    return map_parts(
        ResolveRegions, arguments, specs, workers=work.recipe.workers, label="resolving overflow", unit="products"
    )  # fmt: skip


def _refuse(work: Work, region: tuple[int, int], products: int) -> None:
    depth, node = region
    codes_d = DocidSpace(work.space.codes_per_level[:depth]).unpack(np.array([node]))[0].tolist() if depth else []
    raise CapacityError(
        f"prefixes overflow so far that all {products} products whose IDs begin with {codes_d} have to be placed "
        f"together, more than one worker may hold (ids.bucket_rows {work.recipe.bucket_rows}): train a quantizer with more codes "
        f"(quantizer.codes_per_level {list(work.space.codes_per_level)}), or raise ids.bucket_rows"
    )
