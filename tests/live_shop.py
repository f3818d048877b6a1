"""A retriever without a model, for tests of live changes: a live trie, and what it holds."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np

from catid2_ray.docid import DocidSpace
from catid2_ray.retrieval.live import LiveTrie, codes_of
from catid2_ray.retrieval.trie import Trie


class Shop:
    """`base`: product → ID (text) of the release. `failing`: raised by the next inserts."""

    def __init__(self, base: Mapping[str, str], *, codes_per_level=(4, 4)):
        self.space, self.base = DocidSpace(codes_per_level), base
        names = sorted(base, key=lambda name: self.space.parse(base[name]))
        codes_NL = np.array([self.space.parse(base[name]) for name in names])
        self.live = LiveTrie(Trie.build(codes_NL, codes_per_level=codes_per_level), product_ids=names)
        self.products, self.failing = SimpleNamespace(base_vectors=None), None

    def insert(self, newcomers, codes_ML, columns):
        if self.failing:
            raise self.failing
        self.live.insert_many([one.product_id for one in newcomers], codes_ML, columns)

    @property
    def held(self) -> dict[str, str]:
        """Live product → ID."""
        view = self.live.view
        rows = np.flatnonzero(view.is_live(np.arange(view.rows)))
        names = [self.live._name(row) for row in rows.tolist()]
        return dict(zip(names, map(self.space.text, codes_of(view, rows).tolist())))

    @property
    def inserted(self) -> dict[str, str]:
        return {name: docid for name, docid in self.held.items() if name not in self.base}
