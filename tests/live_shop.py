"""A retriever without a model, for tests of live changes: a live trie with titles, values and a column, and what it holds."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from catid2_ray.docid import DocidSpace
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import codes_of
from catid2_ray.retrieval.products import Products
from catid2_ray.retrieval.trie import Trie


class Shop:
    """`base`: product → ID (text) of the release, whose titles are the names and whose prices are 1. `failing`: raised by the
    next inserts and puts."""

    def __init__(self, base: Mapping[str, str], *, codes_per_level=(4, 4)):
        self.space, self.base = DocidSpace(codes_per_level), base
        names = sorted(base, key=lambda name: self.space.parse(base[name]))
        codes_NL = np.array([self.space.parse(base[name]) for name in names])
        prices = pa.array([1.0] * len(names), pa.float64())
        self.live = LiveTrie(
            Trie.build(codes_NL, codes_per_level=codes_per_level), product_ids=names,
            index=FilterIndex(pa.table({"product_id": names, "price": prices})),
            products=Products(pa.array(names), pa.array(names), values_N=np.zeros(len(names), np.float32)),
        )  # fmt: skip
        self.failing = None

    @property
    def products(self) -> Products:
        return self.live.view.products

    def insert(self, newcomers, codes_ML, columns=None, *, check_only=False):
        self.put(newcomers, codes_ML, columns, check_only=check_only, only_new=True)

    def put(self, newcomers, codes_ML, columns=None, *, check_only=False, **options):
        if self.failing and not check_only:
            raise self.failing
        self.live.put(newcomers, codes_ML, columns, check_only=check_only, **options)

    def withdraw(self, names, *, check_only=False):
        self.live.withdraw(names, check_only=check_only)

    def restore(self, names, *, check_only=False):
        self.live.restore(names, check_only=check_only)

    def live_state(self):
        return self.live.state()

    def restore_state(self, state):
        self.live.restore_state(state)

    @property
    def rows(self) -> dict[str, int]:
        """Live product → its row."""
        rows = np.flatnonzero(self.live.view.is_live(np.arange(self.live.view.rows))).tolist()
        return {self.products.name(row): row for row in rows}

    @property
    def held(self) -> dict[str, str]:
        """Live product → ID."""
        rows = self.rows
        return dict(zip(rows, map(self.space.text, codes_of(self.live.view, np.array(list(rows.values()))).tolist())))

    @property
    def inserted(self) -> dict[str, str]:
        return {name: docid for name, docid in self.held.items() if name not in self.base}

    @property
    def all(self) -> dict[str, tuple]:
        """Live product → ID, title, value and price; prices are whole numbers from 0 to 19."""
        held, rows = self.held, np.array(list(self.rows.values()))
        price_of = {}
        for price in range(20):
            allowed = self.live.compile({"column": "price", "from": price, "to": price}).allows(rows)
            price_of |= dict.fromkeys(rows[allowed].tolist(), price)
        values = self.products.values.of(rows).tolist()
        return {
            name: (docid, self.products.title(row), value, price_of.get(row))
            for (name, docid), row, value in zip(held.items(), rows.tolist(), values)
        }
