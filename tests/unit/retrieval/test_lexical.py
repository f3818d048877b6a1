"""BM25 over candidates equals bm25s over everything; damaged indexes and rows of another release are refused."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import join_text
from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.evaluation.baselines.bm25 import Bm25, _tokenize
from catid2_ray.retrieval.lexical import Block, LexicalIndex, count_words, words

MADE = generate(products=90, queries=30, seed=4)
TEXTS = join_text(MADE.products, ("title", "description"))
QUERIES = [*dict.fromkeys(MADE.pairs["query"].to_pylist())][:20] + [
    "hinge hinge steel",
    "zzz qqq",
    "the of",
    "Ärger 東京",
]


def build(folder, texts, size=40) -> LexicalIndex:
    """As the serving stage does it, `size` rows at a time."""
    counted = [count_words(texts[at : at + size]) for at in range(0, len(texts), size)]
    frequency = Counter(word for part in counted for word in part.words.to_pylist())
    names = sorted(frequency)
    numbers = {name: i for i, name in enumerate(names)}
    blocks = (
        Block(part.count_N, part.length_N, np.array([numbers[w] for w in part.words.to_pylist()], np.int32), part.times)
        for part in counted
    )
    mean = sum(int(part.length_N.sum()) for part in counted) / len(texts)
    return LexicalIndex.write(
        folder, blocks, vocabulary=pa.array(names, pa.string()), frequency_V=[frequency[name] for name in names],
        rows=len(texts), mean_length=mean,
    )  # fmt: skip


def test_scores_are_those_of_bm25s(tmp_path):
    index = build(tmp_path, TEXTS)
    oracle = Bm25([f"{row:04d}" for row in range(len(TEXTS))], TEXTS)
    random = np.random.default_rng(0)
    row_BC = np.stack([random.permutation(len(TEXTS))[:50] for _ in QUERIES])
    row_BC[:, 45:] = -1
    found_BC = index.scores(QUERIES, row_BC)
    for b, query in enumerate(QUERIES):
        known = [token for token in _tokenize([query])[0] if token in oracle._index.vocab_dict]
        expected_N = oracle._index.get_scores(known) if known else np.zeros(len(TEXTS))
        np.testing.assert_allclose(found_BC[b, :45], expected_N[row_BC[b, :45]], rtol=1e-5)
        assert (found_BC[b, 45:] == 0).all()
    assert (found_BC[:20] > 0).any() and (found_BC[21:23] == 0).all()


def test_words_are_those_of_the_baseline():
    texts = [*TEXTS, *QUERIES, "A 3-in. drill, for the M8 x 1.25mm (x_y) İstanbul ß1"]
    assert [words(text) for text in texts] == _tokenize(texts)


def test_texts_without_a_word(tmp_path):
    index = build(tmp_path, ["the", "", "oak"], size=1)
    assert index.scores(["oak", "the"], [[0, 1, 2], [0, 1, 2]])[0].tolist()[:2] == [0, 0]
    empty = build(tmp_path / "empty", ["a", "of"])
    assert empty.scores(["oak"], [[0, 1]]).tolist() == [[0, 0]]


def test_texts_that_come_later_are_weighed_alike(tmp_path):
    index = build(tmp_path, TEXTS)
    later = index.more([TEXTS[7], "zzz unknown words", TEXTS[3]])
    assert later.rows == 3
    old_BC = index.scores(QUERIES, np.tile([7, -1, 3], (len(QUERIES), 1)))
    np.testing.assert_allclose(later.scores(QUERIES, np.tile([0, 1, 2], (len(QUERIES), 1))), old_BC, rtol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    index = build(tmp_path, TEXTS)
    with pytest.raises(InputError, match="rows must be −1…89, found 3 to 90; take index and trie from one release"):
        index.scores(["oak"], [[3, 90]])
    with pytest.raises(InputError, match="one row of them per query"):
        index.scores(["oak", "elm"], [[3]])
    with pytest.raises(InputError, match="3 rows was given 2"):
        LexicalIndex.write(
            tmp_path / "short", [Block(np.zeros(2, int), np.zeros(2, int), np.zeros(0, int), np.zeros(0, int))],
            vocabulary=pa.array([], pa.string()), frequency_V=[], rows=3, mean_length=1.0,
        )  # fmt: skip
    for damage, message in (({"rows": 5}, "its header says"), ({"format": 9}, "has format 9, this version reads 1")):
        header = json.loads((tmp_path / "lexical.json").read_text())
        (tmp_path / "lexical.json").write_text(json.dumps(header | damage))
        with pytest.raises(ArtifactError, match=message):
            LexicalIndex.open(tmp_path)
        (tmp_path / "lexical.json").write_text(json.dumps(header))
    (tmp_path / "term.bin").unlink()
    with pytest.raises(ArtifactError, match="holds no lexical index"):
        LexicalIndex.open(tmp_path)
