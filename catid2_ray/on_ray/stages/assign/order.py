"""From parts to the order of serving: all products by ID, one range of IDs at a time, and the trie over them.

This process holds one range, and 4 bytes for each product whose ID was changed. Codes before de-duplication, which lie in another
order, go through files of the local disk, 8 bytes a product. What is written does not depend on how many ranges there were.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from catid2_ray.artifacts.manifest import Attempt
from catid2_ray.docid import DocidSpace
from catid2_ray.identifiers.quality import CodeFigures
from catid2_ray.on_ray.machine import progress, scratch
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.groups import read_group
from catid2_ray.on_ray.stages.assign.work import Work
from catid2_ray.on_ray.stages.trie_order import TrieOrder
from catid2_ray.retrieval.trie_writer import TrieWriter

_BATCH_ROWS = 65_536  # of products.arrow
_SAMPLE_ROWS = 50_000  # IDs that decide where ranges begin


class Ordered(NamedTuple):
    """`final`, `raw`: `code_figures` of the IDs, and of the codes before de-duplication, None where an ordinal makes the ID and
    codes alone are none yet; `cost_P`: of the products that were moved; `duplicates`: products beyond the first of their ID;
    `addresses`, `addresses_reused`: IDs of yesterday, and those of them that now name a product which they did not name."""

    files: list[dict]
    final: dict
    raw: dict | None
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
    store, costs, duplicates, addresses, reused = work.store, [], 0, 0, 0
    schema = pa.schema([("product_id", pa.string()), ("title", pa.string())])
    total = sum(spec["rows"] for spec in work.specs)
    final, coded = CodeFigures(space), work.space is not None and work.mode not in ("suffix", "digits")

    def of_parts(kind: str) -> list[str]:
        return [work.name(kind, position) for position in range(len(work.specs))]

    with scratch.folder("ids") as local:
        folder = local / "files"
        folder.mkdir()
        raw = _RawCodes(local, order, space, work.space) if coded else None
        with (
            progress.bar("ordering products", total, "products") as shown,
            pa.OSFile(str(folder / "products.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
            TrieWriter(folder / "trie", total, codes_per_level=space.codes_per_level, shared=shared) as trie,
        ):
            waiting = schema.empty_table()
            for number in range(order.ranges):
                rows = order.gather(store, of_parts("ordered"), number)
                packed_n = matrix(rows["packed"])
                final.add(packed_n)
                if raw:
                    raw.add(matrix(rows["raw"]))
                costs.append(matrix(rows["cost"])[matrix(rows["moved"])])
                duplicates += int((np.diff(packed_n) == 0).sum())
                if shared or not duplicates:
                    trie.add(packed_n)
                if work.yesterday:
                    old_M = np.unique(matrix(order.gather(store, of_parts("addresses"), number)["packed"]))
                    addresses += len(old_M)
                    reused += len(np.intersect1d(old_M, packed_n[matrix(rows["arrived"])]))
                waiting = pa.concat_tables([waiting, rows.select(schema.names).cast(schema)])
                waiting = _write_whole_batches(writer, waiting, last=number == order.ranges - 1)
                shown.advance(rows.num_rows)
            progress.event("trie", products=total)
            if shared or not duplicates:
                trie.finish()
        files = store.upload(folder, attempt.folder) if shared or not duplicates else []
        found = raw.figures() if raw else None
    return Ordered(files, final.figures(), found, np.concatenate(costs), duplicates, addresses, reused)


class _RawCodes:
    """Codes before de-duplication, which come in another order than their own: a local file for each range of them."""

    def __init__(self, folder: Path, order: TrieOrder, space: DocidSpace, raw_space: DocidSpace):
        self.splitters, self.space = order.splitters // (space.capacity // raw_space.capacity), raw_space
        self.paths = [folder / f"raw-{number}" for number in range(order.ranges)]

    def add(self, raw_n: np.ndarray) -> None:
        range_n = np.searchsorted(self.splitters, raw_n, side="right")
        for number in np.unique(range_n):
            with open(self.paths[number], "ab") as file:
                file.write(raw_n[range_n == number].astype(np.int64).tobytes())

    def figures(self) -> dict:
        figures = CodeFigures(self.space)
        for path in self.paths:
            if path.exists():
                figures.add(np.sort(np.fromfile(path, np.int64)))
        return figures.figures()


def _write_whole_batches(writer, waiting: pa.Table, *, last: bool) -> pa.Table:
    """Write batches of one size, whatever the ranges were; returns the rows that do not fill one yet."""
    end = waiting.num_rows if last else waiting.num_rows // _BATCH_ROWS * _BATCH_ROWS
    if end:
        writer.write_table(waiting.slice(0, end).combine_chunks(), max_chunksize=_BATCH_ROWS)
    return waiting.slice(end)
