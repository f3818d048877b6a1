"""The state after many live changes as one object in the store, from which a replica starts.

A file is the SHA-256 of what follows, in hex, a line of JSON, and an Arrow stream for each table that the line names.
"""

import hashlib
import json
from typing import NamedTuple

import pyarrow as pa

from catid2_ray.errors import ArtifactError

_DIGEST = 64  # hex digits of SHA-256


class Snapshot(NamedTuple):
    """`number`: of the last change that it has; `tables`: as `Retriever.live_state` gives them; `known`: what `LiveUpdates` knows
    besides, as JSON."""

    number: int
    tables: dict[str, pa.Table]
    known: dict

    def to_bytes(self) -> bytes:
        streams = {}
        for name, table in self.tables.items():
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            streams[name] = sink.getvalue().to_pybytes()
        sizes = {name: len(stream) for name, stream in streams.items()}
        line = json.dumps({"number": self.number, "tables": sizes, "known": self.known}).encode()
        body = b"\n".join((line, b"".join(streams.values())))
        return hashlib.sha256(body).hexdigest().encode() + body

    @classmethod
    def of_bytes(cls, data: bytes) -> "Snapshot":
        """Raises ArtifactError for what `to_bytes` did not write."""
        digest, body = data[:_DIGEST], memoryview(data)[_DIGEST:]
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ArtifactError("its SHA-256 differs from what it says")
        end = data.index(b"\n", _DIGEST) - _DIGEST
        fields, start, tables = json.loads(bytes(body[:end])), end + 1, {}
        for name, size in fields["tables"].items():
            tables[name] = pa.ipc.open_stream(body[start : start + size]).read_all()
            start += size
        return cls(fields["number"], tables, fields["known"])
