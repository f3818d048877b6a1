"""Expansion and re-scoring against plain Python over every product, and the text of every refusal.

Numbers are small multiples of 1/4 where equality is tested: then float16 and every sum are exact, and ties are common.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError
from catid2_ray.retrieval.beam import BeamResult, constrained_beam_search
from catid2_ray.retrieval.expansion import Candidates, expand, rescore
from catid2_ray.retrieval.filters import Filter, LiveFilter
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import GrownVectors, VectorStore
from tests.oracles import expansion as oracle
from tests.oracles.beam import Table

CODES = (3, 3, 4)


def store_of(vectors, normalized=False):
    return VectorStore(np.array(vectors, np.float16), normalized)


def beams_of(trie, level, chosen, logps):
    """A result of `level` levels: for each query the nodes `chosen`, in this order, with these log-probabilities."""
    most = max(len(nodes) for nodes in chosen)
    docid = torch.full((len(chosen), most, level), -1)
    ranges, logp = torch.zeros(len(chosen), most, 2, dtype=torch.int64), torch.full((len(chosen), most), -torch.inf)
    for b, nodes in enumerate(chosen):
        docid[b, : len(nodes)] = torch.from_numpy(trie.prefixes(level, nodes))
        for k, node in enumerate(nodes):
            ranges[b, k] = torch.tensor([int(trie.row_start[level][node + i]) for i in (0, 1)])
            logp[b, k] = logps[b][k]
    return BeamResult(docid, ranges, logp, torch.tensor([len(nodes) for nodes in chosen]))


quarters = st.integers(-6, 6).map(lambda number: number / 4)


@st.composite
def cases(draw):
    rows, width, queries = draw(st.integers(1, 30)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ids = draw(st.lists(st.tuples(*(st.integers(0, k - 1) for k in CODES)), min_size=rows, max_size=rows))
    trie, level = Trie.build(np.array(ids), codes_per_level=CODES, shared=True), draw(st.integers(0, 3))
    nodes = st.lists(st.integers(0, trie.nodes(level) - 1), max_size=9, unique=True)
    chosen = [draw(nodes) for _ in range(queries)]
    logps = [[-draw(st.integers(0, 20)) / 4 for _ in nodes] for nodes in chosen]
    matrix = st.lists(quarters, min_size=width, max_size=width)
    vectors = draw(st.lists(matrix, min_size=rows, max_size=rows))
    query = draw(st.lists(matrix, min_size=queries, max_size=queries))
    value = draw(st.none() | st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows))
    return trie, beams_of(trie, level, chosen, logps), vectors, query, value, allowed


def listed(candidates, b):
    count = int(candidates.count_B[b])
    return list(zip(candidates.row_BC[b, :count].tolist(), candidates.beam_BC[b, :count].tolist()))


@settings(max_examples=250, deadline=None)
@given(
    case=cases(), quota=st.none() | st.integers(1, 5), most=st.none() | st.integers(1, 8),
    order=st.sampled_from(["dense", "value"]), compiled=st.booleans(), top_k=st.integers(1, 12),
    a=st.sampled_from([0, 0.5, 3, 1e9, -1]), path=st.sampled_from(["softmax", "logp", "root"]),
    dense=st.sampled_from(["tanh", "sigmoid", "dot"]), weight=st.sampled_from([None, 0, 2]),
)  # fmt: skip
def test_candidates_and_ranking_are_the_oracles(case, quota, most, order, compiled, top_k, a, path, dense, weight):
    trie, result, vectors, query, value, allowed = case
    value = value or ([0] * trie.rows if order == "value" else None)
    kept = allowed if allowed is None else Filter.of(np.array(allowed)) if compiled else np.array(allowed)
    candidates = expand(
        result, trie, vectors=store_of(vectors), query_BD=torch.tensor(query), value_N=value, order=order,
        quota=quota, most=most, allowed=kept,
    )  # fmt: skip
    lexical_N = np.arange(trie.rows) % 3 / 2
    lexical = None if weight is None else np.where(candidates.row_BC >= 0, lexical_N[candidates.row_BC], np.nan)
    found = rescore(
        candidates, result, trie, top_k=top_k, a=a, path=path, dense=dense, lexical_BC=lexical,
        lexical_weight=weight or 0,
    )  # fmt: skip
    codes_NL = trie.prefixes(3, trie.row_start[3].holding(np.arange(trie.rows)))
    for b, count in enumerate(result.count_B.tolist()):
        dots = {row: oracle.dot(query[b], vector) for row, vector in enumerate(vectors)}
        values = value or [0] * trie.rows
        ranks = {"dense": lambda row: (-dots[row], -values[row]), "value": lambda row: (-values[row],)}  # noqa: B023
        pairs = oracle.expanded(
            result.row_range_BK2[b, :count].tolist(), rank=ranks[order], quota=quota, most=most, allowed=allowed
        )
        assert listed(candidates, b) == pairs
        assert candidates.dense_BC[b, : len(pairs)].tolist() == [dots[row] for row, _ in pairs]
        ranking = oracle.rescored(
            pairs, dots, result.logp_BK[b, :count].tolist(), top_k=99, a=a, path=path, dense=dense,
            lexical_of=None if weight is None else dict(enumerate(lexical_N)), lexical_weight=weight or 0,
        )  # fmt: skip
        n, final_of = int(found.count_B[b]), {row: final for final, row in ranking}
        rows, finals = found.row_BK[b, :n].tolist(), found.final_BK[b, :n].tolist()
        assert n == min(top_k, len(ranking))
        # Libraries differ in the last digit of tanh and exp, which makes or breaks ties: scores agree, ties go by row.
        for expected in ([final for final, _ in ranking[:n]], [final_of[row] for row in rows]):
            np.testing.assert_allclose(finals, expected, rtol=1e-12, atol=1e-12)
        assert sorted(rows, key=lambda row: (-finals[rows.index(row)], row)) == rows  # noqa: B023
        beam_of = dict(pairs)
        assert found.docid_BKL[b, :n].tolist() == codes_NL[rows].tolist()
        assert found.logp_BK[b, :n].tolist() == [float(result.logp_BK[b, beam_of[row]]) for row in rows]
        assert found.dense_BK[b, :n].tolist() == [dots[row] for row in rows]
        assert found.lexical_BK[b, :n].tolist() == [0 if weight is None else lexical_N[row] for row in rows]
        assert found.row_BK[b, n:].tolist() == [-1] * (top_k - n) and (found.docid_BKL[b, n:] == -1).all()
        for scores in (found.logp_BK, found.dense_BK, found.lexical_BK, found.final_BK):
            assert (scores[b, n:] == -torch.inf).all()
        past = int(candidates.count_B[b])
        assert (candidates.row_BC[b, past:] == -1).all() and (candidates.beam_BC[b, past:] == -1).all()
        assert (candidates.dense_BC[b, past:] == -torch.inf).all()
    assert found.docid_BKL.shape == (len(query), top_k, 3)


@settings(max_examples=60, deadline=None)
@given(case=cases(), level=st.integers(0, 3))
def test_everything_expanded_is_the_dense_ranking(case, level):
    trie, _, vectors, query, _, _ = case
    nodes = list(range(trie.nodes(level)))[::-1]
    result = beams_of(trie, level, [nodes] * len(query), [[-1.0] * len(nodes)] * len(query))
    candidates = expand(result, trie, vectors=store_of(vectors), query_BD=np.array(query))
    for a in (0, 7):
        found = rescore(candidates, result, trie, top_k=trie.rows + 2, a=a, dense="dot", path="logp")
        for b in range(len(query)):
            ranking = oracle.dense_ranking(query[b], vectors)
            assert found.row_BK[b].tolist() == [*ranking, -1, -1]
            assert candidates.row_BC[b].tolist() == ranking and int(found.count_B[b]) == trie.rows


def cluster_case(sizes=(3, 4, 2), width=5, seed=0):
    """Clusters of the first code with so many products each, random vectors of length 1, one query."""
    rng = np.random.default_rng(seed)
    ids = [(cluster, i % 3, i // 3) for cluster, size in enumerate(sizes) for i in range(size)]
    trie = Trie.build(np.array(ids), codes_per_level=CODES, shared=True)
    vectors = rng.normal(size=(trie.rows, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return trie, vectors, rng.normal(size=(1, width))


def test_a_large_a_orders_by_beam_and_leaves_the_dense_order_inside():
    trie, vectors, query = cluster_case()
    result = beams_of(trie, 1, [[2, 0, 1]], [[-1.0, -2.0, -3.0]])
    candidates = expand(result, trie, vectors=store_of(vectors), query_BD=query)
    found = rescore(candidates, result, trie, top_k=9, a=1e6)
    assert found.docid_BKL[0, :, 0].tolist() == [2] * 2 + [0] * 3 + [1] * 4
    for part in (slice(0, 2), slice(2, 5), slice(5, 9)):
        assert (found.dense_BK[0, part].diff() <= 0).all()


def test_a_query_of_zeros_ranks_by_path_then_row():
    trie, vectors, _ = cluster_case()
    result = beams_of(trie, 1, [[1, 2]], [[-1.0, -2.0]])
    candidates = expand(result, trie, vectors=store_of(vectors), query_BD=np.zeros((1, 5)), quota=3)
    found = rescore(candidates, result, trie, top_k=9)
    assert found.row_BK[0].tolist() == [3, 4, 5, 7, 8, -1, -1, -1, -1]
    assert (found.dense_BK[0, :5] == 0).all()


def test_without_vectors_products_come_by_value_and_score_by_path():
    trie, _, _ = cluster_case()
    result = beams_of(trie, 1, [[1, 0]], [[-1.0, -2.0]])
    value = [5, 1, 9, 2, 4, 4, 0, 7, 7]
    candidates = expand(result, trie, value_N=value, order="value", quota=2)
    assert listed(candidates, 0) == [(2, 1), (0, 1), (4, 0), (5, 0)]
    found = rescore(candidates, result, trie, top_k=4, path="logp", dense="dot")
    assert (found.row_BK[0].tolist(), found.final_BK[0].tolist()) == ([4, 5, 0, 2], [-1, -1, -2, -2])


def test_a_product_that_the_generator_has_never_seen_is_reached_by_its_cluster():
    codes, rng = (4, 4, 4), np.random.default_rng(0)
    ids = np.array([(a, b, c) for a in range(4) for b in range(4) for c in range(4)])
    new, decoder = 25, Table(codes, 1, seed=0)
    for level in range(2):
        decoder.logits[level][:] = 0
    # The new product's cluster is the likeliest; its last code, which no training pair had, is all but impossible.
    decoder.logits[0][0, 1], decoder.logits[1][0, 1, 2] = 3, 3
    decoder.logits[2][0, 1, 2, 1] = -40
    trie = Trie.build(ids, codes_per_level=codes)
    vectors = rng.normal(size=(len(ids), 8)) * 0.1
    query = rng.normal(size=(1, 8))
    vectors[new] = query[0] / np.linalg.norm(query)
    words = torch.ones(1, 2, dtype=torch.long)
    alone = constrained_beam_search(decoder, trie, words, words, beam_width=12, top_k=12)
    assert list(ids[new]) == [1, 2, 1] and [1, 2, 1] not in alone.docid_BKL[0].tolist()
    clusters = constrained_beam_search(decoder, trie, words, words, beam_width=3, top_k=3, levels=2)
    assert clusters.docid_BKL.shape == (1, 3, 2)
    store = store_of(vectors)
    candidates = expand(clusters, trie, vectors=store, query_BD=query, quota=1)
    found = rescore(candidates, clusters, trie, top_k=5)
    assert (found.row_BK[0, 0], found.docid_BKL[0, 0].tolist()) == (new, [1, 2, 1])
    # The same, where the product was not even an ID when the generator was trained, and reaches its range later.
    old = Trie.build(np.delete(ids, new, 0), codes_per_level=codes)
    before = constrained_beam_search(decoder, old, words, words, beam_width=3, top_k=3, levels=2)
    assert before.docid_BKL.tolist() == clusters.docid_BKL.tolist()
    assert old.item_range((1, 2)) == (24, 27) and trie.item_range((1, 2)) == (24, 28)


def test_a_batch_answers_as_its_queries_do_alone():
    trie, vectors, _ = cluster_case(sizes=(9, 8, 7), width=33)
    query = np.random.default_rng(1).normal(size=(3, 33)).astype(np.float32)
    result = beams_of(trie, 1, [[0, 2], [1], []], [[-1.0, -2.0], [-0.5], []])
    together = expand(result, trie, vectors=store_of(vectors), query_BD=query, quota=5)
    assert together.count_B.tolist() == [10, 5, 0]
    for b in range(3):
        one = BeamResult(*(None if field is None else field[b : b + 1] for field in result))
        alone = expand(one, trie, vectors=store_of(vectors), query_BD=query[b : b + 1], quota=5)
        count = int(alone.count_B[0])
        for ours, theirs in zip(alone[:3], together[:3]):
            assert torch.equal(ours[0], theirs[b, :count])
        ranked = [rescore(c, r, trie, top_k=4) for c, r in ((alone, one), (together, result))]
        assert all(torch.equal(x[0], y[b]) for x, y in zip(*ranked))


def test_expansion_refuses_what_does_not_fit():
    trie, vectors, query = cluster_case()
    result, store = beams_of(trie, 1, [[2, 0]], [[-1.0, -2.0]]), store_of(vectors)
    good = {"vectors": store, "query_BD": query}
    one = result.row_range_BK2.clone()
    one[0, 1] = torch.tensor([8, 12])
    other = result.row_range_BK2.clone()
    other[0, 1] = torch.tensor([0, 8])
    refused = [
        (result, {}, "order='dense' needs vectors and query_BD, found none"),
        (result, {"vectors": store}, "dense scores need both vectors and query_BD"),
        (result, {"order": "value"}, "order='value' needs value_N, found none"),
        (result, {"order": "row"}, "order must be 'dense' or 'value', found 'row'"),
        (result, good | {"quota": 0}, "quota must be ≥ 1, or None for no bound, found 0"),
        (result, good | {"most": 0}, "most must be ≥ 1"),
        (result, good | {"vectors": store_of(vectors[:5])}, "5 vectors for 9 trie rows; take both from one release"),
        (result, good | {"query_BD": query[:, :3]}, "floats B×5, as wide as the products' vectors"),
        (result, good | {"query_BD": query * np.nan}, "the query vector of row 0 holds nan at place 0"),
        (result, good | {"query_BD": np.ones((2, 5))}, "2 query vectors for 1 queries of the result"),
        (
            result,
            good | {"value_N": [1] * 8},
            r"value_N must be one number for each of 9 trie rows, found int64 of \(8,\)",
        ),
        (result, good | {"value_N": [np.nan] * 9}, "the value of row 0 is NaN; give every product a number"),
        (result, good | {"allowed": np.ones(8, bool)}, "a filter or 9 booleans, one per trie row"),
        (result, good | {"allowed": np.ones(9)}, "found torch.float64"),
        (result, good | {"allowed": Filter.of(np.ones(8, bool))}, "the filter is over 8 rows, the trie has 9"),
        (result._replace(row_range_BK2=one), good, "beam 1 of query 0 has rows 8 to 12, the trie has 9; take"),
        (result._replace(row_range_BK2=other), good, "beam 0 of query 0 shares row 7 with another beam"),
        (result._replace(count_B=torch.tensor([3])), good, "count_B B numbers 0…K"),
    ]
    for beams, settings_, text in refused:
        with pytest.raises(InputError, match=text):
            expand(beams, trie, **settings_)
    nothing = expand(result, trie, **good, allowed=np.zeros(9, bool))
    assert nothing.count_B.tolist() == [0] and nothing.row_BC.shape == (1, 0)
    assert rescore(nothing, result, trie, top_k=2).row_BK.tolist() == [[-1, -1]]


def test_rescoring_refuses_what_does_not_fit():
    trie, vectors, query = cluster_case()
    result = beams_of(trie, 1, [[2, 0]], [[-1.0, -2.0]])
    candidates = expand(result, trie, vectors=store_of(vectors), query_BD=query)
    lexical = np.zeros(candidates.row_BC.shape)
    lexical[0, 3] = np.nan
    dead = result._replace(logp_BK=torch.tensor([[-1.0, -torch.inf]]))
    refused = [
        (candidates, result, {"top_k": 0}, "top_k must be ≥ 1"),
        (candidates, result, {"path": "rank"}, "path one of softmax, logp, root .* found 1, 'rank'"),
        (candidates, result, {"dense": "cosine"}, "dense one of tanh, sigmoid, dot, found"),
        (candidates, result, {"a": np.nan}, "a final score of query 0 is not finite; check a = nan"),
        (
            candidates,
            result,
            {"a": 1e308, "path": "logp", "lexical_BC": lexical * 0 + 1e300},
            "lexical score|final score",
        ),
        (candidates, result, {"lexical_BC": lexical}, "the lexical score of candidate 3 of query 0 is nan"),
        (
            candidates,
            result,
            {"lexical_BC": lexical[:, :2]},
            r"one number per candidate, \(1, 5\), found float64 of \(1, 2\)",
        ),
        (candidates, dead, {}, "a beam of query 0 has a log-probability that is not finite"),
        (candidates, beams_of(trie, 1, [[1, 0]], [[-1.0, -2.0]]), {}, "the candidates are not of this result"),
        (Candidates(*(field.repeat_interleave(2, 0) for field in candidates)), result, {}, "not of this result"),
    ]
    for ours, beams, settings_, text in refused:
        with pytest.raises(InputError, match=text):
            rescore(ours, beams, trie, **({"top_k": 1} | settings_))


@pytest.mark.parametrize("seed", range(4))
def test_a_live_view_ranks_as_a_trie_built_anew_does(seed):
    """Base, inserted and withdrawn products, under a filter: the same products with the same scores, whatever their rows."""
    rng, codes = np.random.default_rng(seed), (4, 3, 5)
    space = DocidSpace(codes)
    ids = space.unpack(rng.permutation(space.capacity)[:50])
    vectors = rng.normal(size=(50, 6)).astype(np.float32)
    value = rng.integers(0, 5, 50).astype(np.float32)
    base = Trie.build(ids[:30], codes_per_level=codes)
    at_base = [*base.order_N.tolist(), *range(30, 50)]  # the product of each row of the view
    live = LiveTrie(base)
    live.insert_many([f"n{i}" for i in range(12)], ids[30:42])
    live.insert_many([f"m{i}" for i in range(8)], ids[42:])
    gone = rng.permutation(50)[:9]
    live.withdraw(gone.tolist())
    kept = np.setdiff1d(np.arange(50), [at_base[row] for row in gone])
    anew = Trie.build(ids[kept], codes_per_level=codes)
    at_anew = kept[anew.order_N]
    allowed_50 = rng.random(50) < 0.7
    query, decoder = rng.normal(size=(2, 6)).astype(np.float32), Table(codes, 2, seed=seed)
    words = torch.ones(2, 2, dtype=torch.long)
    grown = GrownVectors.of(store_of(vectors[at_base[:30]]), vectors[30:])
    cases = (
        (live.view, grown, at_base, LiveFilter.of(allowed_50[at_base], 30)),
        (anew, store_of(vectors[at_anew]), at_anew, Filter.of(allowed_50[at_anew])),
    )
    for levels, order in ((2, "dense"), (1, "value"), (3, "dense")):
        ranked = []
        for trie, stored, product_of, allowed in cases:
            filters = [allowed, None]
            beams = constrained_beam_search(
                decoder, trie, words, words, beam_width=6, top_k=6, levels=levels, allowed=filters
            )
            candidates = expand(
                beams, trie, vectors=stored, query_BD=query, value_N=value[product_of], order=order, quota=4, most=15,
                allowed=filters,
            )  # fmt: skip
            found = rescore(candidates, beams, trie, top_k=20)
            ranked.append([_by_product(found, b, product_of) for b in range(2)])
        for one, other in zip(*ranked):
            assert len(one) == len(other) > 0
            if order == "dense":  # ties of value are cut by row, which the two number differently
                assert one.keys() == other.keys()
                np.testing.assert_allclose([one[key] for key in one], [other[key] for key in one], atol=1e-5)
        assert all(list(docid) == ids[product].tolist() for one in ranked[0] for product, docid in one)
        assert allowed_50[[product for product, _ in ranked[0][0]]].all()


def _by_product(found, b: int, product_of) -> dict:
    """Final scores by (product, docid)."""
    count = int(found.count_B[b])
    columns = (part[b, :count].tolist() for part in (found.row_BK, found.docid_BKL, found.final_BK))
    return {(product_of[row], tuple(docid)): final for row, docid, final in zip(*columns)}
