"""A shuffle through files: each producer writes one file with a record batch per group, each consumer reads its own.

Written whole under a fixed name, a file is the same bytes however often, where and in which order it is made, so a worker
that dies in the middle costs its own part alone. Ray Data's hash shuffle keeps what it received in actors that are not
restarted: with one of them the whole job would be lost.
"""

import numpy as np
import pyarrow as pa

from catid2_ray.artifacts.store import Store


def write_groups(store: Store, name: str, table: pa.Table, group_N: np.ndarray, groups: int) -> None:
    """Write Arrow IPC whose record batch g holds the rows of group g, in the order they came."""
    order_N = np.argsort(group_N, kind="stable")
    bounds = np.searchsorted(group_N[order_N], np.arange(groups + 1)).tolist()
    ordered = table.take(pa.array(order_N)).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for first, end in zip(bounds, bounds[1:]):
            batches = ordered.slice(first, end - first).to_batches()
            assert len(batches) <= 1, "the rows of one group do not fit one record batch"
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema))
    store.write(name, sink.getvalue().to_pybytes(), durable=False)


def read_group(store: Store, name: str, group: int, columns: list[str] | None = None) -> pa.Table:
    """The rows of one group; of a local file, a view of mapped memory."""
    return store.read_with(name, lambda source: pa.Table.from_batches([_reader(source, columns).get_batch(group)]))


def read_groups(store: Store, name: str, columns: list[str]) -> pa.Table:
    """All rows of a file, group after group."""
    return store.read_with(name, lambda source: _reader(source, columns).read_all())


def _reader(source: pa.NativeFile, columns: list[str] | None) -> pa.ipc.RecordBatchFileReader:
    """Reads only these columns, in the order of the file."""
    reader = pa.ipc.open_file(source)
    if columns is None:
        return reader
    places = sorted(reader.schema.get_field_index(column) for column in columns)
    return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=places))
