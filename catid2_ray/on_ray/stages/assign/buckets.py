"""Workers that resolve: a bucket of prefixes, what overflows it, or the numbers that follow the codes of other modes.

A bucket holds about `ids.bucket_rows` products, of which only those of colliding prefixes are read whole: that bounds the
memory of a worker. What a bucket decides goes to the parts as moves.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import CapacityError
from catid2_ray.hashing import bucket_of, hash_of_text
from catid2_ray.identifiers.collisions import assign_unique, colliding_prefixes
from catid2_ray.identifiers.overflow import closed_regions, is_member
from catid2_ray.identifiers.suffixes import ordinal_suffix, split_clusters
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.groups import read_group, read_groups, write_groups
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.stages.assign.work import Work
from catid2_ray.quantizer.coder import Coder


def codebooks(coder: Coder) -> list[np.ndarray]:
    return [book.detach().numpy() for book in coder.codebooks]


class _Bucket:
    """All rows of one bucket of prefixes, gathered from the parts; what it finds goes back to the parts as moves."""

    def __init__(self, *, work: Work):
        self.work = work

    def parts(self, bucket: int, columns: list[str]) -> Iterator[pa.Table]:
        for position in range(len(self.work.specs)):
            yield read_group(self.work.store, self.work.name("codes", position), bucket, columns)

    def chosen(self, bucket: int, chosen_N: np.ndarray, columns: list[str]) -> pa.Table:
        """`columns` and `position` (of the part) of those rows of the bucket that `chosen_N` marks."""
        pieces, start = [], 0
        for position, table in enumerate(self.parts(bucket, columns)):
            rows = table.filter(pa.array(chosen_N[start : start + table.num_rows]))
            start += table.num_rows
            pieces.append(rows.append_column("position", pa.array(np.full(rows.num_rows, position, np.int32))))
        return pa.concat_tables(pieces).combine_chunks()

    def taken(self, bucket: int) -> np.ndarray:
        """Packed IDs of the bucket that are occupied, sorted."""
        if not self.work.yesterday:
            return np.empty(0, np.int64)
        names = [self.work.name("occupied", position) for position in range(len(self.work.specs))]
        return np.sort(np.concatenate([matrix(read_group(self.work.store, n, bucket)["packed"]) for n in names]))

    @staticmethod
    def moves(rows: pa.Table, packed_P, moved_P=None, cost_P=None) -> pa.Table:
        moved_P = np.ones(len(packed_P), bool) if moved_P is None else moved_P
        cost_P = np.zeros(len(packed_P), np.float32) if cost_P is None else cost_P.astype(np.float32)
        places = {"position": rows["position"], "row": rows["row"]}
        return pa.table(places | {"packed": packed_P, "moved": moved_P, "cost": cost_P})

    def write_moves(self, name: str, moves: pa.Table) -> None:
        rows = moves.drop_columns(["position"]).combine_chunks()
        write_groups(self.work.store, name, rows, matrix(moves["position"]), len(self.work.specs))

    def twins(self, bucket: int) -> dict:
        """Products whose embedding is that of another: they get equal codes, so they meet in one bucket."""
        twin_N = np.concatenate([matrix(table["twin"]) for table in self.parts(bucket, ["twin"])])
        count = np.unique(twin_N, return_counts=True)[1]
        return {"embeddings": len(count), "with_twin": int(count[count > 1].sum())}


class ResolveBucket(_Bucket):
    """Unique IDs for the colliding prefixes of a bucket; those with more products than free codes are only named."""

    def __init__(self, *, work: Work, codebooks: list[np.ndarray]):
        super().__init__(work=work)
        self.codebooks = codebooks

    def __call__(self, spec: dict) -> dict:
        bucket, space = spec["position"], self.work.space
        packed_N = np.concatenate([matrix(table["packed"]) for table in self.parts(bucket, ["packed"])])
        taken_M = self.taken(bucket)
        together = np.concatenate([packed_N, taken_M])
        touched, home_N = colliding_prefixes(together, space), self.work.home_of(packed_N)
        touched_N = is_member(touched, home_N)
        homes, size = np.unique(home_N[touched_N], return_counts=True)
        last = space.codes_per_level[-1]
        taken_H = np.searchsorted(taken_M, (homes + 1) * last) - np.searchsorted(taken_M, homes * last)
        overfull = homes[size > last - taken_H]
        solved_N = touched_N & ~is_member(overfull, home_N)
        taken_M = taken_M[is_member(touched, self.work.home_of(taken_M))]
        rows = self.chosen(bucket, solved_N, ["row", "product_id", "residual"])
        moves, report = self.resolve(packed_N[solved_N], taken_M, rows)
        self.write_moves(self.work.name("moves", bucket), moves)
        return {
            "position": bucket,
            "collisions": len(together) - len(np.unique(together)),
            "products": len(packed_N),
            "overfull": overfull.tolist(),
            "report": {
                "colliding_prefixes": len(touched), "products_in_colliding_prefixes": int(touched_N.sum()),
                "largest_prefix": int(size.max(initial=0)),
                "solved_exactly_instead": report.get("solved_exactly_instead", 0),
            },
            **self.twins(bucket),
        }  # fmt: skip

    def resolve(self, packed_P: np.ndarray, taken_M: np.ndarray, rows: pa.Table) -> tuple[pa.Table, dict]:
        """The rows with IDs of their own, as moves, and `assign_unique`'s report."""
        space = self.work.space
        if not len(packed_P):
            return self.moves(rows, packed_P), {}
        unique = assign_unique(
            space.unpack(packed_P), matrix(rows["residual"]), self.codebooks, rows["product_id"],
            occupied=space.unpack(taken_M) if len(taken_M) else None, method=self.work.recipe.method,
        )  # fmt: skip
        return self.moves(rows, space.pack(unique.codes_NL), unique.moved_N, unique.cost_N), unique.report


class CountNodes(_Bucket):
    """How many products, and how many occupied IDs, of a bucket lie below given nodes of the ID tree."""

    def __call__(self, spec: dict) -> dict:
        packed = [matrix(table["packed"]) for table in self.parts(spec["position"], ["packed"])]
        counts = [self._count(packed_N, spec) for packed_N in (np.concatenate(packed), self.taken(spec["position"]))]
        return {"position": spec["position"], "products": counts[0], "occupied": counts[1]}

    def _count(self, packed_N: np.ndarray, spec: dict) -> list[int]:
        nodes_M, node_N = np.array(spec["nodes"]), self.work.space.prefix_of(packed_N, spec["depth"])
        place_N = np.searchsorted(nodes_M, node_N[is_member(nodes_M, node_N)])
        return np.bincount(place_N, minlength=len(nodes_M)).tolist()


class ResolveRegions(ResolveBucket):
    """Unique IDs where prefixes overflow: everything below some nodes of the ID tree, read from all parts. Where the spec asks
    for several `turns`, each takes the products that a hash of their ids gives it, and leaves the codes of those before."""

    def __call__(self, spec: dict) -> dict:
        work, turns = self.work, spec.get("turns", 1)
        taken = (self.taken(bucket) for bucket in range(work.buckets))
        taken_M = np.sort(np.concatenate([taken_M[self._inside(taken_M, spec["regions"])] for taken_M in taken]))
        moves, overflowed = [], 0
        for turn in range(turns):
            rows = self._rows(spec["regions"], turn, turns)
            placed, report = self.resolve(matrix(rows["packed"]), taken_M, rows)
            taken_M = np.sort(np.concatenate((taken_M, matrix(placed["packed"]))))
            overflowed += report.get("overflowed", 0)
            moves.append(placed)
        self.write_moves(work.name("moves", work.buckets + spec["position"]), pa.concat_tables(moves))
        return {"position": spec["position"], "overflowed": overflowed}

    def _rows(self, regions: list[list[int]], turn: int, turns: int) -> pa.Table:
        rows = []
        for position in range(len(self.work.specs)):
            name = self.work.name("codes", position)
            inside_N = self._inside(matrix(read_groups(self.work.store, name, ["packed"])["packed"]), regions)
            if rows and not inside_N.any():  # the first says which columns there are
                continue
            table = read_groups(self.work.store, name, ["row", "product_id", "residual", "packed"])
            table = table.filter(pa.array(inside_N))
            if turns > 1:
                table = table.filter(pa.array(bucket_of(hash_of_text(table["product_id"]), turns) == turn))
            rows.append(table.append_column("position", pa.array(np.full(table.num_rows, position, np.int32))))
        return pa.concat_tables(rows).combine_chunks()

    def _inside(self, packed_N: np.ndarray, regions: list[list[int]]) -> np.ndarray:
        inside_N = np.zeros(len(packed_N), bool)
        for depth in {depth for depth, _ in regions}:
            nodes = np.array(sorted(node for at, node in regions if at == depth))
            inside_N |= is_member(nodes, self.work.space.prefix_of(packed_N, depth))
        return inside_N


class NumberBucket(_Bucket):
    """One more token for products of equal codes: an ordinal, or the group of a cluster that is too large."""

    def __call__(self, spec: dict) -> dict:
        work, bucket = self.work, spec["position"]
        packed_N = np.concatenate([matrix(table["packed"]) for table in self.parts(bucket, ["packed"])])
        _, of_N, size = np.unique(packed_N, return_inverse=True, return_counts=True)
        largest = work.recipe.cluster_max if work.mode == "cluster" else 1
        chosen_N = size[of_N] > (largest or len(packed_N))
        residual = ["residual"] if work.mode == "cluster" and work.recipe.cluster_split == "kmeans" else []
        rows = self.chosen(bucket, chosen_N, ["row", "product_id", *residual, *["value"][: work.by_value]])
        value_P = matrix(rows["value"]) if work.by_value else None
        names_P, report, number_P = rows["product_id"].to_numpy().astype(str), {}, np.empty(0, np.int64)
        whole = int(size[size <= (largest or len(packed_N))].max(initial=0))
        if len(names_P) and work.mode == "cluster":
            groups = split_clusters(
                packed_N[chosen_N], matrix(rows["residual"]) if residual else None, names_P, t_max=largest,
                method=work.recipe.cluster_split, value_N=value_P, seed=work.seed,
            )  # fmt: skip
            number_P, report = groups.group_N, groups.report
            report = report | {"clusters": len(size), "largest_after": max(report["largest_after"], whole)}
        elif len(names_P):
            number_P = ordinal_suffix(packed_N[chosen_N], names_P, priority_N=value_P).codes_NS[:, 0]
        self.write_moves(work.name("moves", bucket), self.moves(rows, number_P))
        return {
            "position": bucket,
            "collisions": len(packed_N) - len(size),
            "products": len(packed_N),
            "overfull": [],
            "numbers": int(number_P.max(initial=0)) + 1,
            "report": {"largest_group": int(size.max(initial=0)), "groups": len(size), **report},
            **self.twins(bucket),
        }


def resolve_regions(work: Work, coder: Coder, overfull: list[int]) -> list[dict]:
    """Resolve the least nodes of the ID tree that hold all that is below them, `overfull` prefixes of L − 1 codes included.

    Nobody leaves or enters such a node, so the result is that of one run over the whole catalogue; where `ids.turn_rows` cuts
    a node's products into turns, IDs stay unique, and late turns travel further. Raises CapacityError where a node has more
    products than `ids.bucket_rows` and no turns are allowed.
    """
    if not overfull:
        return []

    size: dict[tuple[int, int], int] = {}  # products below a node

    def count(depth: int, nodes_M: np.ndarray) -> np.ndarray:
        spec = {"rows": 0, "depth": depth, "nodes": nodes_M.tolist()}
        counts = map_parts(
            CountNodes, {"work": work}, [spec] * work.buckets, workers=work.recipe.workers,
            label=f"counting below {len(nodes_M)} prefixes", unit="products",
        )  # fmt: skip
        products_M, occupied_M = (np.sum([one[name] for one in counts], axis=0) for name in ("products", "occupied"))
        size.update({(depth, node): int(rows) for node, rows in zip(nodes_M.tolist(), products_M)})
        return products_M + occupied_M

    regions = closed_regions(np.array(overfull), count, work.space)
    total = sum(size[region] for region in regions)
    progress.event("overflow", prefixes=len(overfull), regions=len(regions), products=total)
    specs: list[dict] = []
    most = work.recipe.turn_rows
    for region in sorted(regions, key=lambda region: (-size[region], region)):
        if most and size[region] > most:
            turns = -(-size[region] // most)
            specs.append({"rows": 0, "held": work.recipe.bucket_rows, "regions": [list(region)], "turns": turns})
            progress.event("overflow_in_turns", products=size[region], turns=turns)
            continue
        if not most and size[region] > work.recipe.bucket_rows:
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
        f"together, more than one worker may hold (ids.bucket_rows {work.recipe.bucket_rows}): set ids.turn_rows, which places "
        "them in turns, or raise ids.bucket_rows, or train a quantizer with more codes (quantizer.codes_per_level "
        f"{list(work.space.codes_per_level)})"
    )
