"""The net state of a series of live changes: what a replica needs of thousands of them, as one object in the store.

A snapshot is made of the one before and the changes since, without a retriever. What comes of it is what comes of all changes, but
for rows that no name means any more. A file is the SHA-256 of what follows, in hex, and an Arrow stream: a row for each product
that was inserted, whose metadata holds the rest as JSON.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from catid2_ray.errors import ArtifactError
from catid2_ray.retrieval.retriever import Retriever

_DIGEST = 64  # hex digits of SHA-256
_SCHEMA = pa.schema([("product", pa.string()), ("vector", pa.binary())])


@dataclass
class Net:
    """The state after change `number`.

    `products`: the last row of each product that was inserted, as its change has it, its vector float32 D, in the order of
    insertion; `hidden`: names of withdrawn products; `columns` and `values`: what changed in place of the release's own products;
    `known`: what `LiveUpdates` knows besides.
    """

    number: int = 0
    products: dict[str, dict] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    columns: dict[str, dict] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)
    known: dict = field(default_factory=dict)

    def take(self, record: dict) -> None:
        """A change that replicas do not refuse."""
        kind = record["kind"]
        if kind == "withdraw":
            self.hidden |= set(record["products"])
        elif kind == "restore":
            self.hidden -= set(record["products"])
        elif kind in ("insert", "put"):
            for one in record["products"]:
                self._insert(one)
            for one in record.get("changed", ()):
                self._change(one)

    def _insert(self, one: dict) -> None:
        name = one["product_id"]
        for place in (self.products, self.columns, self.values):
            place.pop(name, None)
        self.hidden.discard(name)
        kept = {key: one[key] for key in ("product_id", "title", "docid", "value", "columns") if key in one}
        vector = one.get("vector")
        self.products[name] = kept | ({} if vector is None else {"vector": np.asarray(vector, np.float32)})

    def _change(self, one: dict) -> None:
        name = one["product_id"]
        if (product := self.products.get(name)) is not None:
            value = {"value": one["value"]} if "value" in one else {}
            columns = product.get("columns", {}) | one.get("columns", {})
            self.products[name] = product | value | ({"columns": columns} if columns else {})
            return
        if one.get("columns"):
            self.columns[name] = self.columns.get(name, {}) | one["columns"]
        if "value" in one:
            self.values[name] = one["value"]

    def to_bytes(self) -> bytes:
        rest = {"number": self.number, "hidden": sorted(self.hidden), "columns": self.columns, "values": self.values}
        products = [{key: value for key, value in one.items() if key != "vector"} for one in self.products.values()]
        vectors = [one["vector"].tobytes() if "vector" in one else None for one in self.products.values()]
        table = pa.table([list(map(json.dumps, products)), vectors], schema=_SCHEMA)
        table = table.replace_schema_metadata({"rest": json.dumps(rest | {"known": self.known})})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        body = sink.getvalue().to_pybytes()
        return hashlib.sha256(body).hexdigest().encode() + body

    @classmethod
    def of_bytes(cls, data: bytes) -> "Net":
        """Raises ArtifactError for what `to_bytes` did not write."""
        if hashlib.sha256(data[_DIGEST:]).hexdigest().encode() != data[:_DIGEST]:
            raise ArtifactError("its SHA-256 differs from what it says")
        table = pa.ipc.open_stream(data[_DIGEST:]).read_all()
        rest = json.loads(table.schema.metadata[b"rest"])
        products = {}
        for product, vector in zip(table["product"].to_pylist(), table["vector"].to_pylist()):
            one = json.loads(product)
            products[one["product_id"]] = one | (
                {} if vector is None else {"vector": np.frombuffer(vector, np.float32)}
            )
        return cls(**rest | {"hidden": set(rest["hidden"])}, products=products)


def apply_net(net: Net, retriever: Retriever, put) -> None:
    """Bring a retriever that took no change yet to the state. `put`: puts products, as changes hold them, into it."""
    retriever.put([], [], changed=net.columns, values=net.values)
    retriever.withdraw(sorted(net.hidden - net.products.keys()))
    gone = [one for name, one in net.products.items() if name in net.hidden]
    # Of products that are withdrawn several may have had one ID, and a live product has it now.
    holders = _holders(retriever, [one["docid"] for one in gone])
    retriever.withdraw(holders)
    while gone:
        now = {one["docid"]: one for one in reversed(gone)}
        put(list(now.values()))
        retriever.withdraw([one["product_id"] for one in now.values()])
        gone = [one for one in gone if now[one["docid"]] is not one]
    retriever.restore([name for name in holders if name not in net.products])
    put([one for name, one in net.products.items() if name not in net.hidden])


def _holders(retriever: Retriever, docids: Iterable[str]) -> list[str]:
    """Live products of the release itself that have these IDs."""
    codes = [retriever.space.parse(docid) for docid in docids]
    base = retriever.live.base
    if base.shared or not codes:
        return []
    row_M = base.nodes_of(np.array(codes, np.int64))[:, -1].astype(np.int64)
    row_M = np.unique(row_M[row_M >= 0])
    return [retriever.products.name(row) for row in row_M[retriever.live.view.is_live(row_M)].tolist()]
