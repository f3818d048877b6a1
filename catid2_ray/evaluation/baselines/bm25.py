"""BM25 over the products' text (bm25s), the lexical retriever that every generative one is measured against.

An in-memory baseline for evaluation, not a search engine: the index keeps 8 bytes per (product, distinct word), the
build holds every word as a Python string for a moment (up to 3 KiB per title), and each query scores all N products
(4·N bytes). 5,000,000 products are the limit; above that, sample the catalogue.
"""

from collections.abc import Sequence
from typing import Protocol

import bm25s
import numpy as np

from catid2_ray.errors import CapacityError, InputError
from catid2_ray.scripts import STOPWORDS, words_of

MAX_PRODUCTS = 5_000_000


class Words(Protocol):
    def __call__(self, text: str, *, indexed: bool) -> list[str]: ...


class Bm25:
    """BM25 of N texts, Lucene's form; k1 1.2 and b 0.75 as in CHAP's baseline (Pyserini's names for them).

    `product_ids`, `texts`: N each, in one order. `words`: how texts and queries are cut into words, `indexed` being true for the
    products' texts; left out, `plain_words`. No stemming. Raises InputError when the two differ in length or are empty,
    CapacityError above MAX_PRODUCTS.
    """

    def __init__(
        self, product_ids: Sequence[str], texts: Sequence[str], *, k1: float = 1.2, b: float = 0.75, words: Words | None = None
    ):  # fmt: skip
        if len(product_ids) != len(texts) or not len(texts):
            raise InputError(f"BM25 needs one text per product, found {len(product_ids)} ids and {len(texts)} texts")
        if len(texts) > MAX_PRODUCTS:
            raise CapacityError(
                f"BM25 in memory takes {MAX_PRODUCTS} products, found {len(texts)}; sample the catalogue"
            )
        # Sorted by id once, a product's position is its rank among equal scores, whatever order the caller had.
        order = np.argsort(np.asarray(product_ids, dtype=object))
        self.product_ids = [str(product_ids[i]) for i in order]
        self._words = words or plain_words
        tokens = [self._words(texts[i], indexed=True) for i in order]
        self._index = None
        if any(tokens):
            self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
            self._index.index(tokens, show_progress=False)

    def retrieve(self, queries: Sequence[str], *, k: int) -> list[list[str]]:
        """For each query its best k product ids, best first; fewer only where fewer score above 0.

        Equal scores stand in the order of their product ids, so results repeat exactly.
        """
        return [self._best(self._words(query, indexed=False), k) for query in queries]

    @property
    def nbytes(self) -> int:
        """Of the index's arrays."""
        arrays = self._index.scores.values() if self._index is not None else ()
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    def scores(self, query: str) -> np.ndarray:
        """float32 N, the score of every product in the order of `self.product_ids`; 0 where no word is shared."""
        return self._scores(self._words(query, indexed=False))

    def _scores(self, tokens: list[str]) -> np.ndarray:
        known = [token for token in tokens if self._index is not None and token in self._index.vocab_dict]
        return self._index.get_scores(known) if known else np.zeros(len(self.product_ids), np.float32)

    def _best(self, tokens: list[str], k: int) -> list[str]:
        score_N = self._scores(tokens)
        if k < 1:
            return []
        matching = np.flatnonzero(score_N > 0)
        if len(matching) > k:
            # Keep every product that ties with the k-th, so the cut cannot depend on the partition's order.
            threshold = np.partition(score_N[matching], len(matching) - k)[len(matching) - k]
            matching = matching[score_N[matching] >= threshold]
        best = matching[np.argsort(-score_N[matching], kind="stable")[:k]]
        return [self.product_ids[i] for i in best]


def plain_words(text: str, *, indexed: bool) -> list[str]:
    """Those of `scripts.words_of` without English stop words."""
    return [word for word in words_of(text, indexed=indexed) if word not in STOPWORDS]
