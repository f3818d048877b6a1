"""BM25 against its formula written out, and ties that do not depend on the order of the catalogue."""

import math
from collections import Counter

import pytest

from catid2_ray.errors import InputError
from catid2_ray.evaluation.baselines.bm25 import Bm25

TEXTS = {
    "p1": "stainless steel hinge",
    "p2": "brass hinge with steel pin",
    "p3": "garden hose",
    "p4": "steel steel ruler",
    "p5": "garden hose",
}


def by_formula(query, k1=1.2, b=0.75):
    """Lucene's BM25 over the words left after the stop word "with"."""
    documents = {p: [w for w in text.split() if w != "with"] for p, text in TEXTS.items()}
    mean = sum(map(len, documents.values())) / len(documents)
    scores = {}
    for product, words in documents.items():
        counts = Counter(words)
        score = 0.0
        for word in query.split():
            holding = sum(word in other for other in documents.values())
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(words) / mean))
        if score > 0:
            scores[product] = score
    return sorted(scores, key=lambda p: (-round(scores[p], 6), p))


@pytest.mark.parametrize("query", ["steel hinge", "brass", "garden hose", "steel ruler pin", "unheard", ""])
@pytest.mark.parametrize("k", [1, 2, 10])
def test_ranking_equals_the_formula(query, k):
    for order in (sorted(TEXTS), sorted(TEXTS, reverse=True)):
        index = Bm25(order, [TEXTS[p] for p in order])
        assert index.retrieve([query], k=k) == [by_formula(query)[:k]]


def test_catalogues_without_words_and_no_queries():
    assert Bm25(["a", "b"], ["", "the"]).retrieve(["hinge", ""], k=3) == [[], []]
    assert Bm25(["a"], ["hinge"]).retrieve([], k=3) == []
    with pytest.raises(InputError, match="one text per product, found 2 ids and 1 texts"):
        Bm25(["a", "b"], ["x"])
