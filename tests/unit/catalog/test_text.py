"""Text and encoders: what is joined, unit rows, and a saved encoder that encodes to the same bits."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5Model

from catid2_ray.catalog.text import HuggingFaceEncoder, LsaEncoder, join_text
from catid2_ray.errors import EncoderError, InputError
from catid2_ray.scripts import words_of

TEXTS = [
    f"{size} inch {metal} {thing}" for size in (2, 3, 4) for metal in ("steel", "brass") for thing in ("hinge", "lock")
]


def test_columns_are_joined_in_order_without_nulls():
    table = pa.table(
        {
            "title": ["Hinge", "Lock"],
            "description": pa.array(["Shiny", None]),
            "category_path": pa.array([["Hardware", "Hinges"], []], pa.list_(pa.string())),
        }
    )
    assert join_text(table, ("title", "category_path", "description")) == ["Hinge. Hardware > Hinges. Shiny", "Lock"]
    assert join_text(table, ["description", "title"]) == ["Shiny. Hinge", "Lock"]
    assert join_text(table, ["description"]) == ["Shiny", ""]
    assert join_text(table, ["description", "category_path"]) == ["Shiny. Hardware > Hinges", ""]
    assert join_text(table.slice(0, 0), ["title", "description"]) == []
    with pytest.raises(InputError, match="expected one or more of title, category_path, description"):
        join_text(table, ["brand"])


def test_lsa_rows_are_unit_vectors_and_survive_saving_bit_by_bit(tmp_path):
    encoder = LsaEncoder.fit(TEXTS, width=4, vocabulary=50, seed=1)
    queries = [*TEXTS, "steel hinge", "zzz unheard of", ""]
    vectors = encoder.encode(queries)
    assert vectors.dtype == np.float32 and vectors.shape == (len(queries), 4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.array_equal(vectors[-1], vectors[-2])
    encoder.save(tmp_path / "lsa")
    assert sorted(f.name for f in (tmp_path / "lsa").iterdir()) == [
        "components.npy",
        "idf.npy",
        "mean.npy",
        "vocabulary.json",
        "words.json",
    ]
    loaded = LsaEncoder.load(tmp_path / "lsa")
    assert np.array_equal(loaded.encode(queries), vectors)
    assert np.array_equal(np.concatenate([loaded.encode([q]) for q in queries]), vectors)
    assert np.array_equal(LsaEncoder.fit(TEXTS, width=4, vocabulary=50, seed=1).encode(queries), vectors)
    assert encoder.encode([]).shape == (0, 4)


def test_lsa_encodes_as_scikit_learn_does():
    encoder = LsaEncoder.fit(TEXTS, width=4, vocabulary=50, seed=1)
    vectorizer = TfidfVectorizer(
        vocabulary=encoder.terms, ngram_range=(1, 2), sublinear_tf=True, lowercase=False, token_pattern=None, dtype=np.float32,
        tokenizer=lambda text: words_of(text, single=True),
    )  # fmt: skip
    vectorizer.idf_ = encoder.idf_V
    queries = [*TEXTS, "steel steel steel hinge, a 2 inch steel hinge", "lock"]
    projected = np.asarray(vectorizer.transform(queries) @ encoder.components_DV.T)
    theirs = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(queries), theirs, rtol=1e-6, atol=1e-7)


def test_lsa_puts_like_with_like():
    encoder = LsaEncoder.fit(TEXTS, width=4, vocabulary=50, seed=1)
    steel, brass, other = encoder.encode(["steel hinge", "brass hinge", "brass lock"])
    assert brass @ other > steel @ other


def test_lsa_tells_japanese_titles_apart_though_they_have_no_spaces(tmp_path):
    titles = [
        f"{how}{what}"
        for what in ("折りたたみ傘", "ワイヤレスイヤホン")
        for how in ("防水", "軽量な", "人気の", "黒い")
    ]
    encoder = LsaEncoder.fit(titles, width=2, vocabulary=200, seed=1)
    umbrella, other, earphone = encoder.encode(["大きい折りたたみ傘", "防水の折りたたみ傘", "新型ワイヤレスイヤホン"])
    assert umbrella @ other > 0.9 > 0.5 > umbrella @ earphone
    encoder.save(tmp_path)
    assert np.array_equal(LsaEncoder.load(tmp_path).encode(titles), encoder.encode(titles))


def test_lsa_reads_spellings_of_one_word_alike_and_an_encoder_of_before_by_its_own_words(tmp_path):
    texts = ["लकड़ी की अलमारी", "crème brûlée", "Wasch\u00admaschine", "İNCE DİKİŞ", "oak shelf", "steel hinge"]
    # A dimension for each: of equal ones the processor would choose which is dropped.
    encoder = LsaEncoder.fit(texts, width=len(texts), vocabulary=50, seed=0)
    vector_ND = encoder.encode(texts)
    for row, query in enumerate(["अलमारी", "cre\u0300me", "waschmaschine", "ince dikiş"]):
        assert (vector_ND @ encoder.encode([query])[0]).argmax() == row, query
    encoder.save(tmp_path)
    (tmp_path / "words.json").unlink()
    before = LsaEncoder.load(tmp_path)
    assert before.rules == 1
    before.save(tmp_path / "again")
    assert not (tmp_path / "again" / "words.json").exists()
    assert not np.array_equal(before.encode(["अलमारी"]), encoder.encode(["अलमारी"]))
    assert np.array_equal(before.encode(["oak shelf"]), encoder.encode(["oak shelf"]))


def test_lsa_is_fitted_to_the_same_bits_on_any_number_of_threads():
    """With two threads this fit had other bits than with one, and every ID was another."""
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in draw.integers(0, 3000, 12)) for _ in range(3000)]
    fits = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            fits.append(LsaEncoder.fit(texts, width=64, vocabulary=4000, seed=1).components_DV)
    assert np.array_equal(*fits)


def test_lsa_says_why_it_cannot_be_fitted_or_loaded(tmp_path):
    with pytest.raises(InputError, match="set embedding.width to at most"):
        LsaEncoder.fit(TEXTS, width=64, vocabulary=50, seed=1)
    with pytest.raises(InputError, match="no word in 2 texts"):
        LsaEncoder.fit(["", "-"], width=1, vocabulary=50, seed=1)
    with pytest.raises(EncoderError, match="holds no complete LSA encoder"):
        LsaEncoder.load(tmp_path)
    LsaEncoder.fit(TEXTS, width=4, vocabulary=50, seed=1).save(tmp_path)
    np.save(tmp_path / "mean.npy", np.zeros(3, np.float32))
    with pytest.raises(EncoderError, match="do not belong together"):
        LsaEncoder.load(tmp_path)


@pytest.fixture(scope="module", params=["bert", "t5"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if request.param == "bert":
        config = BertConfig(
            vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        model = BertModel(config)
    else:
        model = T5Model(T5Config(vocab_size=len(words), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def test_a_pretrained_encoder_answers_in_order_whatever_the_batch(folder):
    encoder = HuggingFaceEncoder(folder, batch=4, tokens=16)
    texts = ["steel", *TEXTS, "brass lock steel hinge inch", "4 inch"]
    vectors = encoder.encode(texts)
    assert encoder.width == 8 and vectors.shape == (len(texts), 8) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    one_by_one = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(vectors, one_by_one, atol=1e-5)
    assert np.array_equal(encoder.encode(texts), vectors)
    # The same bits whatever stands beside a text, and in whatever order.
    assert np.array_equal(np.concatenate([encoder.encode([text]) for text in texts]), vectors)
    assert np.array_equal(encoder.encode(texts[::-1])[::-1], vectors)
    assert encoder.encode([]).shape == (0, 8)
    long = " ".join(["steel"] * 40)
    cut = HuggingFaceEncoder(folder, batch=4, tokens=3).encode([long, "steel steel steel"])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-6)


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    with pytest.raises(EncoderError, match=r"encoder '/no/such/folder': no such folder; give the id"):
        HuggingFaceEncoder("/no/such/folder", batch=1, tokens=8)
    with pytest.raises(EncoderError, match="the folder holds no model that transformers can load"):
        HuggingFaceEncoder(str(tmp_path), batch=1, tokens=8)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        EncoderError, match="encoder 'no-such/model': not in the local cache, and HF_HUB_OFFLINE is set"
    ):
        HuggingFaceEncoder("no-such/model", batch=1, tokens=8)
