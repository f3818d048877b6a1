"""The proxy generator: codewords and search against oracles, learning what was planted, and the refusals of `--score recall`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from catid2_ray.errors import InputError, RecipeError
from catid2_ray.evaluation import metrics, proxy
from catid2_ray.on_ray.stages import score_ids
from catid2_ray.retrieval.trie import Trie
from tests.oracles import proxy as oracle

LEVELS = (4, 3, 5)


def shop(products: int, *, queries: int, seed: int = 0):
    """Vectors around planted IDs, and queries near two products each."""
    rng = np.random.default_rng(seed)
    codes_NL = np.stack([rng.integers(0, codes, products) for codes in LEVELS], 1)
    books = [rng.normal(size=(codes, 8)) / 2**level for level, codes in enumerate(LEVELS)]
    vector_ND = sum(book[codes_NL[:, level]] for level, book in enumerate(books)) + 0.05 * rng.normal(
        size=(products, 8)
    )
    wanted_QW = rng.integers(0, products, (queries, 2))
    asked = proxy.Questions(
        vector_ND[wanted_QW].mean(1).astype(np.float32), np.repeat(np.arange(queries), 2), wanted_QW.ravel()
    )
    return vector_ND.astype(np.float32), codes_NL, asked


def test_codewords_are_the_means_of_what_is_left():
    vector_ND, codes_NL, _ = shop(40, queries=1)
    codes_NL[codes_NL[:, 1] == 2, 1] = 0  # a code that nobody has
    fast = proxy.codewords(vector_ND, codes_NL, LEVELS)
    for mine, slow in zip(fast, oracle.codewords(vector_ND, codes_NL, LEVELS), strict=True):
        np.testing.assert_allclose(mine, slow, atol=1e-5)


def test_the_widest_beam_ranks_all_products_as_the_oracle_does():
    vector_ND, codes_NL, asked = shop(60, queries=5)
    codes_NL = np.unique(codes_NL, axis=0)[np.random.default_rng(3).permutation(len(np.unique(codes_NL, axis=0)))]
    torch.manual_seed(2)
    model = proxy.ProxyGenerator(proxy.codewords(vector_ND[: len(codes_NL)], codes_NL, LEVELS), hidden=16)
    trie = Trie.build(codes_NL, codes_per_level=LEVELS, shared=True)
    found_QW = proxy.ranked(model, trie, asked.query_QD, width=80)
    for query_D, found_W in zip(torch.from_numpy(asked.query_QD), found_QW):

        def scores(level, prefix, query_D=query_D):
            return model.scores(level, query_D[None], torch.tensor([[prefix]], dtype=torch.long))[0, 0].detach()

        expected = oracle.ranked(scores, codes_NL.tolist())
        assert found_W[: len(codes_NL)].tolist() == expected and (found_W[len(codes_NL) :] == -1).all()


def test_products_that_share_an_id_are_all_found():
    vector_ND, codes_NL, asked = shop(300, queries=3)
    trie = Trie.build(codes_NL, codes_per_level=LEVELS, shared=True)
    model = proxy.ProxyGenerator(proxy.codewords(vector_ND, codes_NL, LEVELS), hidden=16)
    assert all(sorted(found) == list(range(300)) for found in proxy.ranked(model, trie, asked.query_QD, width=300))
    assert (proxy.ranked(model, trie, asked.query_QD, width=50) >= 0).all()


def test_recall_is_that_of_the_metrics():
    rng = np.random.default_rng(1)
    found_QW = np.stack([rng.permutation(30)[:12] for _ in range(6)])
    found_QW[0, 5:] = -1
    asked = proxy.Questions(np.zeros((6, 1)), np.array([0, 0, 1, 2, 2, 2, 4, 5]), rng.integers(0, 30, 8))
    relevant = [set(asked.product_P[asked.query_P == query].tolist()) for query in range(6)]
    ranked = [[n for n in row if n >= 0] for row in found_QW.tolist()]
    np.testing.assert_allclose(
        proxy.recall_of(found_QW, asked, (1, 5, 12)), metrics.recalls(ranked, relevant, (1, 5, 12))
    )


def test_it_learns_what_was_planted_and_repeats_exactly():
    vector_ND, codes_NL, asked = shop(400, queries=200)
    learn = proxy.Questions(asked.query_QD[:150], asked.query_P[:300], asked.product_P[:300])
    ask = proxy.Questions(asked.query_QD[150:], asked.query_P[300:] - 150, asked.product_P[300:])
    settings = {"learn": learn, "ask": ask, "ks": (10, 50), "seed": 3, "epochs": 30}
    first, again = (proxy.score(vector_ND, codes_NL, LEVELS, **settings).recall_QK for _ in range(2))
    np.testing.assert_array_equal(first, again)
    mixed = np.random.default_rng(0).permutation(codes_NL)
    assert first.mean(0)[1] > 0.35 > 2 * proxy.score(vector_ND, mixed, LEVELS, **settings).recall_QK.mean(0)[1] * 0.9
    with pytest.raises(InputError, match="needs products, found none"):
        proxy.train(vector_ND[:0], codes_NL[:0], LEVELS, learn, seed=0)


def parts(*, given: bool, **pairs) -> dict:
    metrics_ = {"pairs_table": True, "splits": {"train": {"pairs": 9}, "validation": {"pairs": 3}}} | pairs
    return {
        "catalog": SimpleNamespace(metrics={"width": 8 if given else None}),
        "pairs": SimpleNamespace(metrics=metrics_),
    }


def test_recall_is_refused_where_no_query_has_a_vector_or_a_pair():
    recipe = SimpleNamespace(serving=SimpleNamespace(query_encoder=None))
    score_ids.refuse_without_queries(recipe, parts(given=False))
    with pytest.raises(RecipeError, match="embeddings are given and no encoder is known: set serving.query_encoder"):
        score_ids.refuse_without_queries(recipe, parts(given=True))
    with pytest.raises(InputError, match="the catalogue has none of validation: bring some, or leave --score out"):
        score_ids.refuse_without_queries(recipe, parts(given=False, splits={"train": {"pairs": 9}}))
    with pytest.raises(InputError, match="none of train and validation"):
        score_ids.refuse_without_queries(recipe, parts(given=False, pairs_table=False, splits={}))
