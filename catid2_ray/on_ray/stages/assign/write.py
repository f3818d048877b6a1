"""Workers that write a part of IDs, its ledger, and its products by range of IDs for the order of serving."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catid2_ray.artifacts import schemas
from catid2_ray.docid import DocidSpace
from catid2_ray.identifiers import ledger
from catid2_ray.identifiers.realign import apply, arrived, churn_counts
from catid2_ray.on_ray.machine.arrays import fixed_lists, matrix
from catid2_ray.on_ray.machine.groups import read_group, read_groups
from catid2_ray.on_ray.stages.assign.work import Work
from catid2_ray.on_ray.stages.trie_order import TrieOrder


@dataclass(frozen=True)
class Numbers:
    """The token or tokens that follow the coder's codes: each number written in the base, most significant first."""

    codes_per_level: tuple[int, ...] = ()

    def codes(self, number_N: np.ndarray) -> np.ndarray:
        """int64 N×S."""
        space = DocidSpace(self.codes_per_level)
        return space.unpack(number_N)


class WriteIds:
    """Codes and moves of a part in; its IDs, its ledger, and its products by range of IDs out."""

    def __init__(self, *, work: Work, space: DocidSpace, numbers: Numbers, moves: int, order: TrieOrder, shared: bool):
        self.work, self.space, self.numbers, self.moves = work, space, numbers, moves
        self.order, self.shared = order, shared

    def __call__(self, spec: dict) -> dict:
        work, position = self.work, spec["position"]
        products = work.store.read_table(f"{work.catalog}/{spec['file']}", columns=["product_id", "title"])
        before = work.before(position) if work.yesterday else None
        raw_N, final_NL, moved_N, cost_N = self._ids(position, products["product_id"], before)
        final_N = self.space.pack(final_NL)
        ids = pa.table(
            {
                "product_id": products["product_id"], "codes": fixed_lists(final_NL.astype(np.int32), pa.int32()),
                "docid": docid_texts(self.space, final_NL), "moved": moved_N, "cost": cost_N,
            }
        )  # fmt: skip
        ids = schemas.conform(ids, schemas.ids(self.space.levels), where=f"ids, part {spec['part']}")
        ledger_rows = self._ledger(before, products["product_id"], final_NL, cost_N)
        result = {"position": position, "moved": int(moved_N.sum()), "cost": float(cost_N[moved_N].sum())}
        result |= {"ledger": ledger.counts(ledger_rows)}
        new_N = np.ones(len(final_N), bool)
        if before is not None:
            new_N, result["churn"], old_M = self._churn(before, products["product_id"], final_NL)
            self.order.spread(work.store, work.name("addresses", position), pa.table({"packed": old_M}))
        columns = {"packed": final_N, "raw": raw_N, "moved": moved_N, "cost": cost_N, "arrived": new_N}
        for name, values in columns.items():
            products = products.append_column(name, pa.array(values))
        self.order.spread(work.store, work.name("ordered", position), products)
        files = [
            {**work.store.write_table(f"{work.folder}/{spec['file']}", ids), "part": spec["part"]},
            {**work.store.write_table(f"{work.folder}/ledger/{spec['file']}", ledger_rows), "part": spec["part"]},
        ]
        return result | {"files": files}

    def _ids(self, position: int, ids, before):
        """Raw packed codes, IDs N×L, whether de-duplication moved them and at what cost, in the order of the part."""
        work, kept = self.work, None
        if work.yesterday and work.yesterday.keeps:
            kept = ledger.held(before, ids, number=work.number)
        coded = read_groups(work.store, work.name("codes", position), ["row", "packed"])
        raw_N = np.zeros(len(ids), np.int64)
        raw_N[matrix(coded["row"])] = matrix(coded["packed"])
        final_N, number_N = raw_N.copy(), np.zeros(len(ids), np.int64)
        moved_N, cost_N = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
        # Regions come after the buckets and overrule them: they saw all of their products at once.
        for file in range(self.moves):
            moves = read_group(work.store, work.name("moves", file), position)
            row_P = matrix(moves["row"])
            target_N = final_N if work.mode == "unique" else number_N
            target_N[row_P], cost_N[row_P] = matrix(moves["packed"]), matrix(moves["cost"])
            moved_N[row_P] = matrix(moves["moved"]) if work.mode == "unique" else False
        codes_NL = work.space.unpack(final_N) if work.space else np.empty((len(ids), 0), np.int64)
        if self.numbers.codes_per_level:
            codes_NL = np.hstack([codes_NL, self.numbers.codes(number_N)])
        if kept is not None:
            codes_NL[kept.held_N], cost_N[kept.held_N] = kept.codes_NL[kept.held_N], kept.cost_N[kept.held_N]
            raw_N[kept.held_N] = work.space.pack(kept.codes_NL[kept.held_N])
        return raw_N, codes_NL, moved_N, cost_N

    def _ledger(self, before, ids, codes_NL, cost_N) -> pa.Table:
        if before is None:
            return ledger.first(ids, codes_NL, cost_N, number=self.work.number, shared=self.shared)
        return ledger.advance(
            before, ids, codes_NL, cost_N, number=self.work.number, quarantine=self.work.yesterday.quarantine,
            shared=self.shared,
        )  # fmt: skip

    def _churn(self, before: pa.Table, ids, codes_NL):
        """Which products are new to their ID, the counts of the changes, and the packed IDs of yesterday."""
        live = before.filter(pc.not_equal(before["status"], "retired"))
        old_ids, old_NL = live["product_id"], matrix(live["codes"])
        counts = {"after": churn_counts(old_ids, old_NL, ids, codes_NL, self.space.codes_per_level)}
        if (unnamed_LK := self.work.yesterday.unnamed_LK) is not None:
            unnamed_NL = apply(codes_NL, unnamed_LK)
            counts["before"] = churn_counts(old_ids, old_NL, ids, unnamed_NL, self.space.codes_per_level)
        return arrived(old_ids, old_NL, ids, codes_NL), counts, self.space.pack(old_NL)


def docid_texts(space: DocidSpace, codes_NL: np.ndarray) -> pa.Array:
    """`space.text` of every row, a level at a time."""
    tokens, columns, start = space.tokens(), [], 0
    for codes, code_N in zip(space.codes_per_level, codes_NL.T):
        columns.append(pa.array(tokens[start : start + codes]).take(pa.array(code_N)))
        start += codes
    return pc.binary_join_element_wise(*columns, "")
