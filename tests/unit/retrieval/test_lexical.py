"""BM25 over candidates equals bm25s over everything; damaged indexes and rows of another release are refused."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from catid2_ray.catalog.synthetic import generate
from catid2_ray.catalog.text import join_text
from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.evaluation.baselines.bm25 import Bm25
from catid2_ray.retrieval import lexical
from catid2_ray.retrieval.lexical import Block, GrownWords, LexicalIndex, count_words, words
from catid2_ray.retrieval.products import Newcomer, Products
from catid2_ray.retrieval.vectors import VectorStore

MADE = generate(products=90, queries=30, seed=4)
TEXTS = join_text(MADE.products, ("title", "description"))[:86] + [
    "折りたたみ傘 55cm",
    "日傘 oak",
    "東京タワー 傘",
    "手袋",
]
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
        np.testing.assert_allclose(found_BC[b, :45], oracle.scores(query)[row_BC[b, :45]], rtol=1e-5)
        assert (found_BC[b, 45:] == 0).all()
    assert (found_BC[:20] > 0).any() and (found_BC[21:23] == 0).all()


def test_one_more_product_beside_many_reads_none_of_them_again(tmp_path, monkeypatch):
    """Else the next query waits: 1.2 s beside 20,000 newcomers."""
    random = np.random.default_rng(0)
    vectors = VectorStore.write(tmp_path / "v", [random.normal(size=(90, 4)).astype(np.float32)], normalize=True)
    products = Products(
        pa.array([f"p{row}" for row in range(90)]), pa.array(TEXTS), base_vectors=vectors,
        base_lexical=build(tmp_path / "l", TEXTS),
    )  # fmt: skip
    more = [Newcomer(f"n{row}", TEXTS[row % 90], random.normal(size=4).astype(np.float32)) for row in range(2040)]
    many, joined = products.with_newcomers(more[:2000]), []
    real = lexical._joined
    monkeypatch.setattr(
        lexical, "_joined", lambda parts: joined.append(sum(part.rows for part in parts)) or real(parts)
    )
    now = many
    for one in more[2000:]:
        now = now.with_newcomers([one])
    assert sum(joined) <= 40 * 6, "each of the 40 is copied O(log 40) times, and none of the 2,000"
    assert now.grown_words.segments[0] is many.grown_words.segments[0]
    assert np.shares_memory(now.grown_vectors.grown.rows, many.grown_vectors.grown.rows)


def test_scores_of_every_row_are_those_of_candidates(tmp_path):
    index = build(tmp_path, TEXTS)
    every = np.tile(np.arange(index.rows), (len(QUERIES), 1))
    np.testing.assert_allclose(index.everywhere(QUERIES), index.scores(QUERIES, every), rtol=1e-6)
    more = index.more(["oak hinge", "nothing known"])
    np.testing.assert_allclose(more.everywhere(QUERIES), more.scores(QUERIES, every[:, :2]), rtol=1e-6)


@pytest.mark.parametrize("many", [0, 1000])
def test_words_that_grow_are_those_of_one_index(tmp_path, monkeypatch, many):
    """Whatever the segments in which texts came, to the last bit."""
    monkeypatch.setattr(lexical, "_MANY", many)
    index, random = build(tmp_path, TEXTS[:40]), np.random.default_rng(0)
    grown, texts = GrownWords(index), []
    while len(texts) < 50:
        more = [*random.choice(TEXTS, random.integers(1, 4)).tolist(), "zzz unknown"]
        before, grown = grown, grown.with_texts(more)
        assert before.rows == 40 + len(texts)
        texts += more
    assert len(grown.segments) <= 6
    whole, rows = index.more(texts), 40 + len(texts)
    expected = np.hstack((index.everywhere(QUERIES), whole.everywhere(QUERIES)))
    np.testing.assert_array_equal(grown.everywhere(QUERIES), expected)
    row_BC = np.stack([random.permutation(rows) for _ in QUERIES])
    row_BC[:, :3] = -1
    new_BC = row_BC >= 40
    expected = index.scores(QUERIES, np.where(new_BC, -1, row_BC))
    expected += whole.scores(QUERIES, np.where(new_BC, row_BC - 40, -1))
    np.testing.assert_array_equal(grown.scores(QUERIES, row_BC), expected)
    with pytest.raises(InputError, match=f"rows must be −1…{rows - 1}, found {rows}"):
        grown.scores(QUERIES, np.full((len(QUERIES), 1), rows))


def test_words_have_two_letters_and_are_no_stop_words():
    text = "A 3-in. drill, for the M8 x 1.25mm (x_y) İstanbul ß1"
    assert words(text) == ["drill", "m8", "25mm", "x_y", "istanbul", "ss1"]
    assert words("折りたたみ傘 55cm 傘") == ["折り", "りた", "たた", "たみ", "み傘", "55cm", "傘"]


# title | a query that spells the same otherwise | one that does not mean it
SPELLINGS = [
    ("crème brûlée ramequin", "cre\u0300me bru\u0302le\u0301e", "brule"),
    ("무선 이어폰 케이스", "\u1106\u116e\u1109\u1165\u11ab", "유선"),
    ("Wasch\u00admaschine", "waschmaschine", "wasch"),
    ("Kabel\u200bkanal", "kabelkanal", "kanal"),
    ("İNCE DİKİŞ İPİ", "ince dikiş ipi", "nce"),
    ("KIRMIZI", "kırmızı", "kirmiz"),
    ("लकड़ी की अलमारी", "अलमारी", "अलमारा"),
    ("कमल", "कमल", "किमाल"),
    ("மர அலமாரி", "அலமாரி", "அலமார"),
    ("ตู้เสื้อผ้าไม้", "เสื้อผ้า", "กระเป๋า"),
    ("Nike™ shoe", "nike", "niketm"),
    ("1½ inch pipe", "inch", "11"),
    ("of\ufb01ce chair", "office", "ofce"),
]


@pytest.mark.parametrize("title, same, other", SPELLINGS)
def test_two_spellings_of_a_word_meet(tmp_path, title, same, other):
    index = build(tmp_path, [title, "grey sofa", "steel hinge"])
    baseline = Bm25(["a", "b", "c"], [title, "grey sofa", "steel hinge"])
    found_BC = index.scores([same, other], [[0, 1], [0, 1]])
    assert found_BC[0, 0] > 0 and found_BC[0, 1] == 0 and found_BC[1].tolist() == [0, 0]
    assert baseline.retrieve([same, other], k=3) == [["a"], []]


def test_an_index_of_before_keeps_its_own_words(tmp_path):
    texts = ["अलमारी", "oak"]
    counted = count_words(texts, rules=1)
    names = sorted(set(counted.words.to_pylist()))
    block = Block(
        counted.count_N, counted.length_N, np.array([names.index(w) for w in counted.words.to_pylist()], np.int32),
        counted.times,
    )  # fmt: skip
    LexicalIndex.write(
        tmp_path, [block], vocabulary=pa.array(names), frequency_V=[1] * len(names), rows=2, mean_length=1.0
    )
    header = json.loads((tmp_path / "lexical.json").read_text())
    (tmp_path / "lexical.json").write_text(json.dumps({k: v for k, v in header.items() if k != "rules"}))
    index = LexicalIndex.open(tmp_path)
    assert index.rules == 1 and (index.scores(["अलमारी", "oak"], [[0, 1], [0, 1]]) > 0).tolist() == [
        [True, False],
        [False, True],
    ]
    assert (index.more(["अलमारी"]).scores(["अलमारी"], [[0]]) > 0).all()


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
