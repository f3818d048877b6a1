"""Examples of kind teacher: a training query, and products that the nearest vectors name (`generator/teacher.py`).

A query's pairs lie in many parts, its nearest products anywhere. So parts of pairs write their queries by group; a worker takes
the queries of a group, goes once through the vectors of all products, part by part, and writes what it drew by the part whose
examples it joins. Memory: a group's queries (about 2 KiB each), one part's vectors, 1,024 queries × that part.
"""

import functools

import numpy as np
import pyarrow as pa

from catid2_ray.artifacts.manifest import Manifest
from catid2_ray.artifacts.store import Store
from catid2_ray.generator.teacher import Nearest, drawn, shares
from catid2_ray.hashing import bucket_of, hash_of_text, uniform
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.groups import read_group, write_groups
from catid2_ray.on_ray.machine.parts import map_parts
from catid2_ray.on_ray.machine.query_encoder import stored_encoder
from catid2_ray.on_ray.machine.vectors import ProductVectors, adapted_queries, open_adapter

_DRAW_KEPT, _DRAW_PLACE = 9, 10  # numbers of the draws: which queries are taught, and where their sampling begins
_GROUP = 16_384  # queries that go through the products together


def exchange(
    store: Store, folder: str, specs: list[dict], *, ids: str, vectors: ProductVectors, encoder: dict, tuned: Manifest | None,
    teaches, queries: int, most: int, draws: int, seed: int, workers: int,
) -> int:  # fmt: skip
    """Write the taught examples for all parts below `folder`; `answers` reads those of one. Returns the number of groups.

    `specs` as of `part_specs`. `encoder`: name and tokens of what gives queries their vectors, `tuned` where it is
    tuned. `teaches(pairs)`: the rows of a part's pairs that are meant. `queries`: about how many texts these have, of which about
    `most` are taught. `draws`: products for each pair of a query.
    """
    groups = -(-max(1, min(queries, most)) // _GROUP)
    asking = [spec for spec in specs if spec["pairs"]]
    arguments = {
        "store": store, "folder": folder, "teaches": teaches, "kept": min(1.0, most / max(1, queries)), "groups": groups,
        "seed": seed,
    }  # fmt: skip
    map_parts(_Ask, arguments, asking, workers=workers, label="collecting queries to teach", unit="products")
    arguments = {
        "store": store, "folder": folder, "ids": ids, "vectors": vectors, "encoder": encoder, "tuned": tuned, "draws": draws,
        "seed": seed, "asking": [spec["part"] for spec in asking], "specs": specs,
    }  # fmt: skip
    work = [{"group": group, "rows": sum(spec["rows"] for spec in specs)} for group in range(groups)]
    map_parts(
        _Teach, arguments, work, workers=workers, label="looking for nearest products", unit="products", actors=True
    )
    return groups


def answers(store: Store, folder: str, position: int, groups: int) -> tuple[pa.Array, np.ndarray]:
    """(queries, codes int64 N×L) of the examples that join the part at this place among all."""
    tables = [read_group(store, f"{folder}/taught-{group:05d}.arrow", position) for group in range(groups)]
    table = pa.concat_tables(tables).combine_chunks()
    return table["query"].combine_chunks(), matrix(table["codes"]).astype(np.int64)


class _Ask:
    """Worker: pairs of a part in, the texts of the queries that teach and how many pairs of each, by group, out."""

    def __init__(self, *, store: Store, folder: str, teaches, kept: float, groups: int, seed: int):
        self.store, self.folder, self.teaches = store, folder, teaches
        self.kept, self.groups, self.seed = kept, groups, seed

    def __call__(self, spec: dict) -> dict:
        pairs = self.teaches(self.store.read_table(spec["pairs"])).group_by("query").aggregate([([], "count_all")])
        pairs = pairs.rename_columns({"count_all": "pairs"}).select(["query", "pairs"]).sort_by("query")
        hash_N = hash_of_text(pairs["query"])
        if self.kept < 1:
            kept_N = uniform(hash_N, self.seed, _DRAW_KEPT) < self.kept
            pairs, hash_N = pairs.filter(pa.array(kept_N)), hash_N[kept_N]
        write_groups(self.store, _asked(self.folder, spec["part"]), pairs, bucket_of(hash_N, self.groups), self.groups)
        return {"position": spec["position"]}


def _asked(folder: str, part: int) -> str:
    return f"{folder}/asked-{part:05d}.arrow"


class _Teach:
    """Actor: the queries of a group in, the products drawn for each out."""

    def __init__(
        self, *, store: Store, folder: str, ids: str, vectors: ProductVectors, encoder: dict, tuned: Manifest | None,
        draws: int, seed: int, asking: list[int], specs: list[dict],
    ):  # fmt: skip
        self.store, self.folder, self.ids, self.vectors, self.encoder = store, folder, ids, vectors, encoder
        self.tuned, self.draws, self.seed, self.asking, self.specs = tuned, draws, seed, asking, specs

    @functools.cached_property
    def encode(self):
        encode = stored_encoder(self.store, self.encoder, embeddings=self.vectors.embeddings, tuned=self.tuned)
        return adapted_queries(encode, open_adapter(self.store, self.vectors.adapter))

    def __call__(self, spec: dict) -> dict:
        asked = pa.concat_tables(
            [read_group(self.store, _asked(self.folder, part), spec["group"]) for part in self.asking]
        )
        asked = asked.group_by("query").aggregate([("pairs", "sum")]).sort_by("query")
        texts, count_Q = asked["query"].combine_chunks(), asked["pairs_sum"].to_numpy() * self.draws
        query_C, row_C = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if len(texts):
            nearest = Nearest(self.encode(texts.to_pylist()).astype(np.float32))
            for file, first in self._parts():
                nearest.show(matrix(self.vectors.read(file, ["embedding"])["embedding"]), first)
            offset_Q = uniform(hash_of_text(texts), self.seed, _DRAW_PLACE)
            query_C, place_C = drawn(shares(nearest.score_QM), count_Q, offset_Q)
            row_C = nearest.row_QM[query_C, place_C]
        table = pa.table({"query": texts.take(pa.array(query_C)), "codes": self._codes(row_C)})
        place_N = bucket_of(hash_of_text(table["query"]), len(self.specs))
        name = f"{self.folder}/taught-{spec['group']:05d}.arrow"
        write_groups(self.store, name, table, place_N, len(self.specs))
        return {"position": spec["position"]}

    def _parts(self):
        """(file, number of its first product) of all parts."""
        first = 0
        for spec in self.specs:
            yield spec["file"], first
            first += spec["rows"]

    def _codes(self, row_C: np.ndarray) -> pa.Array:
        """The IDs of products by their number among all."""
        codes_CL = None
        for file, first in self._parts():
            codes_NL = matrix(self.store.read_table(f"{self.ids}/{file}", columns=["codes"])["codes"])
            if codes_CL is None:
                codes_CL = np.zeros((len(row_C), codes_NL.shape[1]), np.int32)
            here_C = (row_C >= first) & (row_C < first + len(codes_NL))
            codes_CL[here_C] = codes_NL[row_C[here_C] - first]
        return fixed_lists(codes_CL, pa.int32())
