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


def test_scores_are_those_of_the_ranking():
    index = Bm25(list(TEXTS), list(TEXTS.values()))
    score_N = index.scores("steel hinge")
    assert score_N.dtype == "float32" and (score_N[[2, 4]] == 0).all()
    by_score = sorted(zip(-score_N, index.product_ids))
    assert [p for score, p in by_score if score < 0] == by_formula("steel hinge")
    assert index.scores("unheard").tolist() == [0] * 5
    assert Bm25(["a"], [""]).scores("hinge").tolist() == [0]
    unspaced = Bm25(["a", "b"], ["電子レンジ", "電話"])
    assert (unspaced.scores("電子") > 0).tolist() == [True, False]


def test_catalogues_without_words_and_no_queries():
    assert Bm25(["a", "b"], ["", "the"]).retrieve(["hinge", ""], k=3) == [[], []]
    assert Bm25(["a"], ["hinge"]).retrieve([], k=3) == []
    with pytest.raises(InputError, match="one text per product, found 2 ids and 1 texts"):
        Bm25(["a", "b"], ["x"])


JAPANESE = {
    "j1": "折りたたみ傘 レディース 晴雨兼用 UVカット",
    "j2": "ワイヤレスイヤホン Bluetooth 防水",
    "j3": "防水スプレー 靴用",
    "j4": "ﾜｲﾔﾚｽ充電器 ＵＳＢ",
}


@pytest.mark.parametrize(
    "query, best, found",
    [
        ("傘", "j1", "j1"),
        ("折り畳み傘", "j1", "j1"),
        ("防水イヤホン", "j2", "j2 j3 j4"),
        ("ワイヤレス 充電", "j4", "j2 j4"),
        ("usb", "j4", "j4"),
        ("靴", "j3", "j3"),
    ],
)
def test_japanese_is_found_without_spaces(query, best, found):
    ranked = Bm25(list(JAPANESE), list(JAPANESE.values())).retrieve([query, "冷蔵庫"], k=4)
    assert ranked[0][0] == best and sorted(ranked[0]) == found.split() and ranked[1] == []
