"""From parts to the order of serving: all products by ID, one range of IDs at a time, and the trie over them.

This process holds 16 bytes a product (its ID before and after de-duplication as one integer each) and the trie; titles pass
through, a range at a time. What is written does not depend on how many ranges there were.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.docid import DocidSpace
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.groups import read_group
from catid2_ray.on_ray.stages.assign.work import Work
from catid2_ray.on_ray.stages.trie_order import TrieOrder
from catid2_ray.retrieval.trie import Trie

_BATCH_ROWS = 65_536  # of products.arrow
_SAMPLE_ROWS = 50_000  # IDs that decide where ranges begin


class Ordered(NamedTuple):
    """`packed_N`: all IDs, ascending; `raw_N`: the same products' codes before de-duplication; `cost_P`: of those moved;
    `duplicates`: products beyond the first of their ID; `addresses`, `addresses_reused`: IDs of yesterday, and those
    of them that now name a product which they did not name."""

    files: list[dict]
    packed_N: np.ndarray
    raw_N: np.ndarray
    cost_P: np.ndarray
    duplicates: int
    addresses: int
    addresses_reused: int


def near_equal(work: Work, space: DocidSpace, ranges: int) -> TrieOrder:
    """The catalogue cut into near-equal ranges of the packed IDs of `space`, as whole parts of it show them."""
    if ranges == 1:
        return TrieOrder(np.empty(0, np.int64))
    sample, seen = [], 0
    for position in range(len(work.specs)):
        for bucket in range(work.buckets):
            coded = matrix(read_group(work.store, work.name("codes", position), bucket, ["packed"])["packed"])
            sample.append(coded)
        if work.yesterday:
            before = matrix(work.before(position)["codes"])
            sample.append(work.space.pack(before) if len(before) else np.empty(0, np.int64))
        seen += work.specs[position]["rows"]
        if seen >= _SAMPLE_ROWS:
            break
    following = space.capacity // work.space.capacity if work.space else space.capacity
    sorted_S = np.sort(np.concatenate(sample)) * following
    return TrieOrder(sorted_S[np.arange(1, ranges) * len(sorted_S) // ranges])


def write_ordered(work: Work, attempt: Attempt, space: DocidSpace, order: TrieOrder, *, shared: bool) -> Ordered:
    """Write products.arrow (product_id and title in ID order, Arrow IPC for memory mapping) and trie/."""
    store, packed, raw, costs, duplicates, addresses, reused = work.store, [], [], [], 0, 0, 0
    schema = pa.schema([("product_id", pa.string()), ("title", pa.string())])
    total = sum(spec["rows"] for spec in work.specs)

    def of_parts(kind: str) -> list[str]:
        return [work.name(kind, position) for position in range(len(work.specs))]

    with tempfile.TemporaryDirectory() as local:
        folder = Path(local)
        with (
            progress.bar("ordering products", total, "products") as shown,
            pa.OSFile(str(folder / "products.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            waiting = schema.empty_table()
            for number in range(order.ranges):
                rows = order.gather(store, of_parts("ordered"), number)
                packed.append(matrix(rows["packed"]))
                raw.append(matrix(rows["raw"]))
                costs.append(matrix(rows["cost"])[matrix(rows["moved"])])
                duplicates += int((np.diff(packed[-1]) == 0).sum())
                if work.yesterday:
                    old_M = np.unique(matrix(order.gather(store, of_parts("addresses"), number)["packed"]))
                    addresses += len(old_M)
                    reused += len(np.intersect1d(old_M, packed[-1][matrix(rows["arrived"])]))
                waiting = pa.concat_tables([waiting, rows.select(schema.names).cast(schema)])
                waiting = _write_whole_batches(writer, waiting, last=number == order.ranges - 1)
                shown.advance(rows.num_rows)
        packed_N = np.concatenate(packed)
        progress.event("trie", products=len(packed_N))
        if duplicates and not shared:
            files = []
        else:
            trie = Trie.from_sorted(packed_N, codes_per_level=space.codes_per_level, shared=shared)
            trie.save(folder / "trie")
            files = store.upload(folder, attempt.folder)
    return Ordered(files, packed_N, np.concatenate(raw), np.concatenate(costs), duplicates, addresses, reused)


def _write_whole_batches(writer, waiting: pa.Table, *, last: bool) -> pa.Table:
    """Write batches of one size, whatever the ranges were; returns the rows that do not fill one yet."""
    end = waiting.num_rows if last else waiting.num_rows // _BATCH_ROWS * _BATCH_ROWS
    if end:
        writer.write_table(waiting.slice(0, end).combine_chunks(), max_chunksize=_BATCH_ROWS)
    return waiting.slice(end)
