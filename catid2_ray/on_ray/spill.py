"""Rows shuffled by product through local files: written in any order, read a part at a time, so that memory holds one part."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from catid2_ray.on_ray.catalog import part_of


class Spill:
    """`parts` Arrow stream files in a folder, one per hash of `product_id`; rows of a part keep the order they came in.

    Write, then read: the first `read` ends writing. Holds `parts` open files.
    """

    def __init__(self, folder: Path, schema: pa.Schema, *, parts: int):
        self.folder, self.schema, self.parts = folder, schema, parts
        folder.mkdir(parents=True)
        self._writers: dict[int, pa.RecordBatchStreamWriter] = {}
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        part_N = part_of(table["product_id"], self.parts)
        order_N = np.argsort(part_N, kind="stable")
        bounds = np.searchsorted(part_N[order_N], np.arange(self.parts + 1)).tolist()
        ordered = table.take(pa.array(order_N)).combine_chunks()
        for part, (first, end) in enumerate(zip(bounds, bounds[1:])):
            if end > first:
                if part not in self._writers:
                    self._writers[part] = pa.ipc.new_stream(str(self._path(part)), self.schema)
                self._writers[part].write_table(ordered.slice(first, end - first))
        self.rows += table.num_rows

    def read(self, part: int) -> pa.Table:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        if not self._path(part).exists():
            return self.schema.empty_table()
        with pa.memory_map(str(self._path(part))) as source:
            return pa.ipc.open_stream(source).read_all()

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:05d}.arrows"
