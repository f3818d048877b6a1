"""Node vectors against dictionaries by prefix, whatever the blocks in which they are summed."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import ArtifactError, InputError, ReleaseError
from catid2_ray.retrieval import node_vectors
from catid2_ray.retrieval.node_vectors import NodeVectors, mean_of
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore
from tests.oracles.lookahead import means_of, tails_of


def unit_vectors(count, width, seed):
    vector_ND = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)


def catalogue(codes_per_level, count, seed, *, shared=True, width=5):
    """(sorted IDs N×L, their trie, their vectors as a store)."""
    random = np.random.default_rng(seed)
    ids_NL = np.stack([random.integers(0, k, count) for k in codes_per_level], 1)
    ids_NL = ids_NL[np.lexsort(ids_NL.T[::-1])] if shared else np.unique(ids_NL, axis=0)
    store = VectorStore(unit_vectors(len(ids_NL), width, seed).astype(np.float16), True)
    return ids_NL, Trie.build(ids_NL, codes_per_level=codes_per_level, shared=shared), store


@settings(max_examples=20, deadline=None)
@given(
    codes_per_level=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 1000),
    block=st.sampled_from([1, 2, 7, 8192]), data=st.data(),
)  # fmt: skip
def test_they_are_the_means_and_tails_of_the_definition(codes_per_level, seed, block, data, tmp_path_factory):
    depth = data.draw(st.integers(1, len(codes_per_level)))
    ids_NL, trie, store = catalogue(codes_per_level, 40, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_vectors, "_BLOCK", block)
        made = NodeVectors.write(tmp_path_factory.mktemp("nodes"), trie, store, depth=depth)
    ids = [tuple(docid) for docid in ids_NL.tolist()]
    expected = means_of(ids, store.vectors_ND, depth)
    for level, mean_nD in enumerate(made.means, 1):
        prefixes = [tuple(one) for one in trie.prefixes(level, np.arange(trie.nodes(level))).tolist()]
        np.testing.assert_array_equal(mean_nD, np.stack([expected[prefix] for prefix in prefixes]))
    left = tails_of(ids, store.vectors_ND, depth)
    for level, tail_KD in enumerate(made.tails, depth):
        rows = [left.get((level, code), np.zeros(store.width)) for code in range(codes_per_level[level])]
        np.testing.assert_array_equal(tail_KD, np.stack(rows))
    assert made.depth == depth and made.width == 5
    made.check(trie)


def test_the_deepest_means_are_the_products_own_vectors(tmp_path):
    _, trie, store = catalogue((4, 5, 6), 30, 1, shared=False)
    made = NodeVectors.write(tmp_path, trie, store, depth=3)
    np.testing.assert_array_equal(made.means[2], store.vectors_ND)
    assert made.nbytes == 2 * 5 * sum(trie.nodes(level) for level in (1, 2, 3))


def test_a_mean_of_rows_reads_released_and_inserted_products_of_any_length():
    vector_ND = unit_vectors(9, 4, 0).astype(np.float16)
    grown = GrownVectors.of(VectorStore(vector_ND[:6], True), vector_ND[6:])
    expected = (vector_ND[[1, 7, 8, 2]].astype(np.float64).sum(0) / 4).astype(np.float16)
    np.testing.assert_array_equal(mean_of(grown, np.array([1, 7, 8, 2])), expected)
    long = VectorStore((vector_ND * 3).astype(np.float16), False)
    np.testing.assert_allclose(mean_of(long, np.arange(9)), vector_ND.astype(float).mean(0), atol=1e-3)
    assert not mean_of(grown, np.empty(0, np.int64)).any()


def test_what_does_not_fit_is_refused(tmp_path):
    _, trie, store = catalogue((3, 3, 3), 20, 2)
    for other, depth in (
        (VectorStore(store.vectors_ND[1:], True), 2),
        (VectorStore(store.vectors_ND, False), 2),
        (store, 4),
    ):
        with pytest.raises(InputError, match="need 20 vectors of length 1 and a depth from 1 to 3, found"):
            NodeVectors.write(tmp_path, trie, other, depth=depth)
    made = NodeVectors.write(tmp_path, trie, store, depth=2)
    with pytest.raises(ReleaseError, match=r"node vectors of \[3, .*, 3\] nodes and codes, the trie has"):
        made.check(catalogue((3, 3, 4), 20, 2)[1])
    np.save(tmp_path / "depth_2.npy", np.zeros((2, 5), np.float16))
    with pytest.raises(
        ArtifactError, match="depth_2.npy: expected float16 .* found float16 .2, 5.. Make the node vectors"
    ):
        NodeVectors.open(tmp_path)
    (tmp_path / "tail_3.npy").unlink()
    np.save(tmp_path / "depth_2.npy", made.means[1])
    with pytest.raises(ArtifactError, match="tail_3.npy cannot be read"):
        NodeVectors.open(tmp_path)
    (tmp_path / "node_vectors.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ArtifactError, match="has format 9, this version reads 1. Make the node vectors again"):
        NodeVectors.open(tmp_path)
