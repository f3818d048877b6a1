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

    def count(depth: int, nodes_M: np.ndarray) -> np.ndarray:
        spec = {"rows": 0, "depth": depth, "nodes": nodes_M.tolist()}
        found = map_parts(
            CountNodes, {"work": work}, [spec] * work.buckets, workers=work.recipe.workers,
            label=f"counting below {len(nodes_M)} prefixes", unit="products",
        )  # fmt: skip
        return np.sum([result["count"] for result in found], axis=0)

    regions = closed_regions(np.array(overfull), count, work.space)
    size: dict[tuple[int, int], int] = {}
    for depth in {depth for depth, _ in regions}:
        nodes = [node for at, node in regions if at == depth]
        size |= {(depth, node): int(rows) for node, rows in zip(nodes, count(depth, np.array(nodes)))}
    progress.event("overflow", prefixes=len(overfull), regions=len(regions), products=sum(size.values()))
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
        f"prefixes overflow so far that all {products} products and occupied IDs that begin with {codes_d} have to be placed "
        f"together, more than one worker may hold (ids.bucket_rows {work.recipe.bucket_rows}): train a quantizer with more codes "
        f"(quantizer.codes_per_level {list(work.space.codes_per_level)}), or raise ids.bucket_rows"
    )
