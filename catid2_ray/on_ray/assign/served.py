"""IDs that new products were given while the base release served: an append keeps them, as it keeps those of the ledger.

They enter as rows of yesterday's ledger, tombstones that reserve their ID: a product that is in today's catalogue returns to
it, and the ID of one that is not goes to nobody else before its quarantine is over.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts.store import Store
from catid2_ray.docid import DocidSpace
from catid2_ray.identifiers import ledger
from catid2_ray.on_ray.arrays import fixed_lists, matrix
from catid2_ray.on_ray.base import Base
from catid2_ray.on_ray.live_log import LiveLog


def served_ids(store: Store, base: Base, *, quarantine: int) -> pa.Table | None:
    """Rows of a ledger, by product_id; None where there are none.

    The ledger of the base comes first: who is in it keeps what it says there, and an ID that it reserves is not given twice.
    It is read file by file, so that memory is that of one file and of the products that were inserted. Cost 0: what such an
    ID added was not kept.
    """
    given, ids = LiveLog(store, base.release.name).given(), base.parts["ids"]
    space, number = DocidSpace(tuple(ids.metrics["codes_per_level"])), base.number
    names = pa.array(sorted(given), pa.string())
    packed_M = space.pack(
        np.array([space.parse(given[name]) for name in sorted(given)], np.int64).reshape(-1, space.levels)
    )
    free_M = np.ones(len(names), bool)
    for entry in ids.named("ledger/") if given else []:
        known = store.read_table(ids.file(entry["name"]), columns=["product_id", "codes", "status", "until"])
        live = pc.not_equal(known["status"].cast(pa.string()), "retired")
        reserved = known.filter(pc.or_(live, pc.greater(known["until"], number + 1)))
        free_M &= ~pc.is_in(names, known["product_id"].combine_chunks()).to_numpy(zero_copy_only=False)
        free_M &= ~np.isin(packed_M, space.pack(matrix(reserved["codes"]).astype(np.int64)))
    if not free_M.any():
        return None
    count, codes_ML = int(free_M.sum()), space.unpack(packed_M[free_M]).astype(np.int32)
    return pa.table(
        [
            names.filter(pa.array(free_M)), fixed_lists(codes_ML, pa.int32()),
            pa.DictionaryArray.from_arrays(np.zeros(count, np.int8), ["retired"]), np.full(count, number, np.int32),
            np.full(count, number + 1 + max(1, quarantine), np.int32), np.zeros(count, np.float32),
        ],
        schema=ledger.schema(space.levels),
    )  # fmt: skip
