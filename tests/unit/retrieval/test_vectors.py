"""Vectors on disk: what is written is read back, scores do not depend on their neighbours, and the text of every refusal."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import ArtifactError, InputError
from catid2_ray.retrieval.arrays import Growing
from catid2_ray.retrieval.vectors import VectorStore
from tests.oracles import expansion as oracle


def store_of(vectors):
    return VectorStore(np.array(vectors, np.float16), False)


@pytest.mark.parametrize("width", [1, 7, 33, 384])
def test_a_score_does_not_depend_on_the_rows_beside_it(width):
    rng = np.random.default_rng(width)
    vectors, query = np.tile(rng.normal(size=width), (700, 1)), rng.normal(size=(2, width)).astype(np.float32)
    store = store_of(vectors)
    rows = [np.arange(700), rng.permutation(700)[:301], np.array([5, 5, 6]), np.arange(0, 700, 2)]
    for asked in rows:
        for b in (0, 1):
            assert len(set(store.scores(query[b : b + 1], asked).tolist())) == 1
    one = store.scores(query[:1], [3])
    assert (store.scores(query[:1], rows[1]) == one).all()
    exact = oracle.dot(query[0], store.vectors_ND[0])
    assert abs(one[0] - exact) <= 1e-6 * np.abs(query[0] * store.vectors_ND[0].astype(float)).sum()


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), normalize=st.booleans(), seed=st.integers(0, 99))
def test_what_is_written_in_blocks_is_read_back(tmp_path_factory, sizes, normalize, seed):
    folder, rng = tmp_path_factory.mktemp("vectors"), np.random.default_rng(seed)
    matrix = (rng.normal(size=(sum(sizes), 6)) * 10.0 ** rng.integers(-3, 4, (sum(sizes), 1))).astype(np.float32)
    matrix[:1] = 0
    blocks = np.split(matrix, np.cumsum(sizes)[:-1])
    if not len(matrix):
        with pytest.raises(InputError, match="a vector store needs at least one row, found none"):
            VectorStore.write(folder, blocks)
        return
    store = VectorStore.write(folder, iter(blocks), normalize=normalize)
    assert (store.rows, store.width, store.normalized) == (*matrix.shape, normalize)
    length_N1 = np.linalg.norm(matrix, axis=1, keepdims=True)
    expected = matrix / np.where(length_N1 > 0, length_N1, 1) if normalize else matrix
    np.testing.assert_allclose(store.vectors_ND, expected, rtol=2**-10, atol=6e-8)
    assert np.load(folder / "vectors.npy").tobytes() == store.vectors_ND.tobytes()
    query = rng.normal(size=(1, 6)).astype(np.float32)
    exact = [oracle.dot(query[0], row) for row in store.vectors_ND]
    np.testing.assert_allclose(store.scores(query, np.arange(store.rows)), exact, rtol=1e-5, atol=1e-2)


def test_very_large_and_very_small_vectors_are_normalized(tmp_path):
    store = VectorStore.write(tmp_path, [np.array([[3e38, 3e38], [1e-38, 0], [3e-45, 0]], np.float32)], normalize=True)
    np.testing.assert_allclose(store.vectors_ND, [[0.5**0.5] * 2, [1, 0], [1, 0]], rtol=1e-3)
    half = VectorStore.write(tmp_path, [np.full((1, 4), 6e4, np.float16)], normalize=True)
    assert half.vectors_ND.tolist() == [[0.5] * 4]


@pytest.mark.parametrize(
    ("blocks", "normalize", "text"),
    [
        ([np.ones((2, 3)), [[1, np.nan, 1.0]]], True, "the vector of row 2 holds nan at place 1; encode it again"),
        ([np.ones((2, 3)), [[1, 1, -np.inf]]], False, "the vector of row 2 holds -inf at place 2"),
        ([np.full((2, 3), 7e4)], False, "the vector of row 0 holds numbers up to 70000, float16 ends at 65504; pass"),
        (
            [np.ones((2, 3)), np.ones((1, 4))],
            True,
            r"the block at row 2 must be floats N×3, found float64 of .* \(1, 4\)",
        ),
        ([np.ones(3)], True, "the block at row 0 must be floats N×D, found float64"),
        ([np.ones((2, 3), int)], True, "must be floats N×D, found int64"),
        ([np.ones((2, 0))], True, "must be floats N×D"),
        ([], True, "a vector store needs at least one row"),
    ],
)
def test_vectors_that_cannot_be_written_are_refused(tmp_path, blocks, normalize, text):
    with pytest.raises(InputError, match=text):
        VectorStore.write(tmp_path, blocks, normalize=normalize)
    with pytest.raises(ArtifactError, match=r"no finished vectors: vectors.json is missing"):
        VectorStore.open(tmp_path)


def damaged(folder, what):
    header, array = folder / "vectors.json", folder / "vectors.npy"
    values = json.loads(header.read_text())
    if what == "short":
        array.write_bytes(array.read_bytes()[:-2])
    elif what == "long":
        array.write_bytes(array.read_bytes() + b"00")
    elif what == "type":
        np.save(array, np.ones((4, 3), np.float32))
    elif what == "order":
        np.save(array, np.asfortranarray(np.load(array)))
    elif what in ("first", "last"):
        matrix = np.load(array)
        matrix[-1 if what == "last" else 0, 1] = np.nan if what == "last" else 3
        np.save(array, matrix)
    elif what == "no array":
        array.unlink()
    else:
        header.write_text(what if what == "{" else json.dumps(values | json.loads(what)))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("short", "cannot be read"), ("long", "no byte more, found float16 .* and 2 bytes more"),
        ("type", "expected 4×3 float16 .* found float32"), ("order", r"found float16 of shape \(4, 3\)"),
        ("first", "expected row 0 to have length 1 or 0, found"), ("last", "expected row 3 .* found nan"),
        ("no array", "cannot be read"), ("{", "is not JSON"), ('{"format": 9}', "has format 9, this version reads 1"),
        ('{"rows": 5}', "expected 5×3 float16"), ('{"rows": "5"}', "contradicts itself"),
        ('{"normalized": 1}', "contradicts itself"), ('{"width": 0}', "contradicts itself"),
    ],
)  # fmt: skip
def test_a_damaged_store_is_refused(tmp_path, what, text):
    VectorStore.write(tmp_path, [np.eye(4, 3) + 0.1], normalize=True)
    damaged(tmp_path, what)
    with pytest.raises(ArtifactError, match=text):
        VectorStore.open(tmp_path)


def test_a_header_without_its_numbers_is_refused(tmp_path):
    VectorStore.write(tmp_path, [np.ones((2, 2))])
    (tmp_path / "vectors.json").write_text("[]")
    with pytest.raises(ArtifactError, match="is no header of this kind: vectors"):
        VectorStore.open(tmp_path)


def test_queries_and_rows_that_do_not_fit_are_refused():
    store = store_of(np.ones((4, 3)))
    refused = [
        ((np.ones((1, 2)), [0]), r"floats B×3, as wide as the products' vectors, found torch.float64 of shape \(1, 2\)"),
        ((np.ones(3), [0]), "floats B×3"), ((np.ones((1, 3), int), [0]), "floats B×3"),
        ((np.array([[1, 1, 1], [1, np.nan, 1]]), [0]), "the query vector of row 1 holds nan at place 1"),
        ((np.full((1, 3), 1e39), [0]), "the query vector of row 0 holds inf"),
        ((np.ones((1, 3)), [4]), "rows must be whole numbers 0…3, found 4 to 4"),
        ((np.ones((1, 3)), [-1]), "found -1 to -1"), ((np.ones((1, 3)), [0.5]), "whole numbers"),
        ((np.ones((2, 3)), [0, 1]), "of one query 1×3 and one list of rows, found 2 queries"),
        ((np.ones((1, 3)), [[0, 1]]), r"rows of shape \(1, 2\)"),
    ]  # fmt: skip
    for arguments, text in refused:
        with pytest.raises(InputError, match=text):
            store.scores(*arguments)
    assert store.scores(np.ones((1, 3)), []).shape == (0,)
    assert store.scores(torch.ones(1, 3, dtype=torch.bfloat16, requires_grad=True), [1]).tolist() == [3]
    store.vectors_ND[2, 0] = np.nan
    with pytest.raises(InputError, match="the dense score of row 2 is nan; the stored vector is damaged"):
        store.scores(np.ones((1, 3)), [0, 1, 2])


def test_rows_that_grow_leave_those_before_as_they_were():
    random, grown = np.random.default_rng(0), Growing.of(np.zeros((0, 2), np.int32))
    seen, rows = [], np.zeros((0, 2), np.int32)
    for step in range(60):
        if step % 9 == 8:
            # Another future of rows that have grown already.
            grown, rows = seen[random.integers(len(seen))]
        more = random.integers(0, 99, (random.integers(0, 9), 2)).astype(np.int32)
        grown, rows = grown.with_rows(more), np.concatenate((rows, more))
        seen.append((grown, rows))
    for one, expected in seen:
        np.testing.assert_array_equal(one.rows, expected)
        assert len(one) == len(expected)
