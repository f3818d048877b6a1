"""The search that looks ahead against a slow one by its definition: all weights, filters, ties, live products."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.errors import InputError
from catid2_ray.retrieval import live_nodes, lookahead
from catid2_ray.retrieval.beam import constrained_beam_search
from catid2_ray.retrieval.exact import exact_scores, replayed
from catid2_ray.retrieval.filters import Filter
from catid2_ray.retrieval.live import LiveTrie
from catid2_ray.retrieval.live_view import codes_of, filters_for
from catid2_ray.retrieval.lookahead import Ahead, Lookahead, best_words
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Newcomer, Products
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore
from tests.oracles.beam import Table
from tests.oracles.lookahead import means_of, score_of, slow_lookahead, tails_of
from tests.unit.retrieval.test_beam import listed, random_queries
from tests.unit.retrieval.test_live import histories, tried
from tests.unit.retrieval.test_node_vectors import catalogue, unit_vectors

CODES = (3, 4, 5)


def settings_of(weights) -> Lookahead:
    return Lookahead(logp_weight=weights[0], vector_weight=weights[1], lexical_weight=weights[2])


def same(found, expected):
    assert [docid for _, docid in found] == [docid for _, docid in expected]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-4)


def scored(result, row):
    """(S, ID) of one query's results."""
    return listed(result._replace(logp_BK=result.score_BK), row)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000), depth=st.integers(1, 3), widths=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    weights=st.sampled_from([(1.0, 20.0, 0.0), (0.0, 1.0, 0.0), (0.5, 3.0, 2.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)]),
    share=st.sampled_from([None, 0.3, 0.7]), sparse=st.booleans(),
)  # fmt: skip
def test_beams_are_those_of_the_definition(seed, depth, widths, weights, share, sparse, tmp_path_factory):
    ids_NL, trie, store = catalogue(CODES, 40, seed)
    nodes = NodeVectors.write(tmp_path_factory.mktemp("nodes"), trie, store, depth=depth)
    table, random = Table(CODES, 2, seed), np.random.default_rng(seed)
    query_BD = random.normal(size=(2, 5)).astype(np.float32)
    word_BN = (random.random((2, trie.rows)) * (random.random((2, trie.rows)) < 0.3)).astype(np.float32)
    allowed_N = np.ones(trie.rows, bool) if share is None else random.random(trie.rows) < share
    allowed = None if share is None else allowed_N
    words = best_words(word_BN, trie, filters_for(allowed, trie, 2))
    ahead = Ahead(settings_of(weights), nodes, query_BD, words=words)
    asked = (table, trie, *random_queries([3, 3], seed)) if weights[0] else (None, trie, None, None)
    with pytest.MonkeyPatch.context() as patch:
        if sparse:
            patch.setattr(lookahead, "_ROWS", 3)
            patch.setattr(lookahead, "_reads_all", lambda tables, nodes, device: False)
        result = constrained_beam_search(*asked, beam_width=widths, top_k=7, allowed=allowed, ahead=ahead)
    ids = [tuple(docid) for docid in ids_NL.tolist()]
    means, tails = means_of(ids, store.vectors_ND, depth), tails_of(ids, store.vectors_ND, depth)
    for row in range(2):

        def logp_of(prefix, row=row):
            return sum(table.step_logp(row, prefix[:level], "level")[code] for level, code in enumerate(prefix))

        best = {}
        for docid, word, chosen in zip(ids, word_BN[row], allowed_N):
            best[docid] = max(best.get(docid, 0.0), word if chosen else 0.0)

        def score(prefix, row=row, logp_of=logp_of, best=best):
            return score_of(
                prefix, query_BD[row], means, tails, depth, weights=weights, logp_of=logp_of if weights[0] else None,
                words_of=best if weights[2] else None,
            )  # fmt: skip

        expected = slow_lookahead([docid for docid, chosen in zip(ids, allowed_N) if chosen], score, widths)
        if weights[1] or weights[0]:
            same(scored(result, row), expected[:7])
        for number, (_, docid) in enumerate(scored(result, row)):
            logp = logp_of(docid) if weights[0] else 0.0
            assert float(result.logp_BK[row, number]) == pytest.approx(logp, abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), depth=st.integers(1, 3), weights=st.sampled_from([(0.5, 3.0, 2.0), (0.0, 1.0, 0.0)]))
def test_the_scores_of_every_node_are_those_that_the_search_compares(seed, depth, weights, tmp_path_factory):
    _, trie, store = catalogue(CODES, 40, seed)
    nodes = NodeVectors.write(tmp_path_factory.mktemp("nodes"), trie, store, depth=depth)
    random, table, asked = np.random.default_rng(seed), Table(CODES, 2, seed), random_queries([3, 3], seed)
    words = best_words(random.random((2, trie.rows), np.float32), trie, [None, None])
    ahead = Ahead(settings_of(weights), nodes, random.normal(size=(2, 5)), words=words)
    logp_L = exact_scores(table, trie, *asked) if weights[0] else None
    score_L = ahead.every_node(trie, 3, logp_L)
    widths = [2, 3, 5]
    result = constrained_beam_search(table, trie, *asked, beam_width=widths, top_k=5, ahead=ahead)
    replay = replayed(trie, score_L, widths, top_k=5).result
    assert torch.equal(replay.docid_BKL, result.docid_BKL[:, : replay.docid_BKL.shape[1]])
    torch.testing.assert_close(replay.logp_BK, result.score_BK[:, : replay.logp_BK.shape[1]], atol=1e-5, rtol=0)


def test_a_plain_beam_is_a_look_ahead_by_log_p_alone(tmp_path):
    _, trie, store = catalogue(CODES, 40, 7)
    nodes, table = NodeVectors.write(tmp_path, trie, store, depth=2), Table(CODES, 2, 7)
    ahead = Ahead(settings_of((1.0, 0.0, 0.0)), nodes, np.ones((2, 5)))
    search = {"beam_width": 4, "top_k": 9}
    query, mask = random_queries([3, 3], 7)
    plain = constrained_beam_search(table, trie, query, mask, **search)
    looking = constrained_beam_search(table, trie, query, mask, ahead=ahead, **search)
    assert plain.score_BK is None and torch.equal(plain.docid_BKL, looking.docid_BKL)
    assert torch.equal(plain.logp_BK, looking.logp_BK) and torch.equal(plain.logp_BK, looking.score_BK)


def test_equal_scores_are_ordered_by_id_and_early_stops_are_searched():
    ids_NL = np.array([[a, b, c] for a in range(3) for b in range(2) for c in range(2)])
    trie, vector_ND = Trie.build(ids_NL, codes_per_level=(3, 2, 2)), np.tile(np.eye(2, dtype=np.float16)[:1], (12, 1))
    nodes = NodeVectors(tuple(vector_ND[: trie.nodes(level)] for level in (1, 2, 3)), ())
    ahead = Ahead(settings_of((0.0, 1.0, 0.0)), nodes, np.array([[1.0, 0.0]]))
    for levels, count in ((1, 3), (2, 4), (3, 4)):
        result = constrained_beam_search(None, trie, None, None, beam_width=4, top_k=4, levels=levels, ahead=ahead)
        assert result.docid_BKL[0, :count].tolist() == np.unique(ids_NL[:, :levels], axis=0)[:count].tolist()
        assert result.score_BK[0, :count].tolist() == [1.0] * count


@settings(max_examples=40, deadline=None)
@given(history=histories(), seed=st.integers(0, 50), depth=st.integers(1, 3), share=st.sampled_from([None, 0.5]))
def test_after_any_live_changes_it_is_the_trie_rebuilt(history, seed, depth, share, tmp_path_factory):
    codes_per_level, ids, shared, changes = history
    depth, random = min(depth, len(codes_per_level)), np.random.default_rng(seed)
    base = Trie.build(np.array(ids), codes_per_level=codes_per_level, shared=shared)
    # Vectors of one 1 among zeros: sums are exact, so that many scores tie.
    vector_ND = np.eye(4, dtype=np.float16)[random.integers(0, 4, 40)]
    names, of_base = [f"p{row}" for row in range(len(ids))], VectorStore(vector_ND[: len(ids)], True)
    nodes = NodeVectors.write(tmp_path_factory.mktemp("base"), base, of_base, depth=depth)
    live = LiveTrie(base, product_ids=names, products=Products(pa.array(names), base_vectors=of_base), nodes=nodes)
    alive = [True] * len(ids)
    for what, docid, number, looked in changes:
        if what == "insert":
            newcomer = Newcomer(f"p{len(alive)}", "", vector_ND[len(alive)])
            alive += [True] * tried(live.put, [newcomer], [docid])
        elif tried(getattr(live, what), [number % len(alive)]):
            alive[number % len(alive)] = what == "restore"
        if looked:
            assert len(live.view.nodes.depths) in (0, depth)
    rows = np.flatnonzero(live.view.is_live(np.arange(live.view.rows)))
    if not len(rows):
        return
    query_BD, word_BN = np.eye(4)[random.integers(0, 4, 2)], random.integers(0, 3, (2, 40)).astype(np.float32)
    rebuilt = Trie.build(codes_of(live.view, rows), codes_per_level=codes_per_level, shared=shared)
    of_rebuilt = rows[rebuilt.order_N]
    store = VectorStore(vector_ND[of_rebuilt], True)
    fresh = NodeVectors.write(tmp_path_factory.mktemp("rebuilt"), rebuilt, store, depth=depth)
    chosen_N = np.ones(40, bool) if share is None else random.random(40) < share
    table, (query, mask) = Table(codes_per_level, 2, seed), random_queries([3, 2], seed)
    found = []
    for trie, mine, row_R in (
        (live.view, live.view.nodes, np.arange(live.view.rows)),
        (rebuilt, NodeVectors(fresh.means, nodes.tails), of_rebuilt),
    ):
        allowed = None if share is None else chosen_N[row_R]
        words = best_words(word_BN[:, row_R], trie, filters_for(allowed, trie, 2))
        for weights, width in (((0.0, 1.0, 0.0), 3), ((0.0, 2.0, 0.5), 2), ((0.0, 1.0, 0.25), 99)):
            ahead = Ahead(settings_of(weights), mine, query_BD, words=words)
            found.append(
                constrained_beam_search(
                    table, trie, query, mask, beam_width=width, top_k=20, allowed=allowed, ahead=ahead
                )
            )  # fmt: skip
    for one, other in zip(found[:3], found[3:]):
        assert torch.equal(one.docid_BKL, other.docid_BKL) and torch.equal(one.count_B, other.count_B)
        torch.testing.assert_close(one.score_BK, other.score_BK, atol=1e-6, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), depth=st.integers(1, 3), width=st.sampled_from([2, 5, 99]))
def test_what_the_generator_never_met_has_a_fair_share(seed, depth, width, tmp_path_factory):
    ids_NL, trie, store = catalogue(CODES, 12, seed, shared=False)
    random, names = np.random.default_rng(seed), [f"p{row}" for row in range(trie.rows)]
    nodes = NodeVectors.write(tmp_path_factory.mktemp("nodes"), trie, store, depth=depth)
    live = LiveTrie(trie, product_ids=names, products=Products(pa.array(names), base_vectors=store), nodes=nodes)
    for number in range(12):
        newcomer = Newcomer(f"n{number}", "", unit_vectors(1, 5, seed + number + 1)[0])
        tried(live.put, [newcomer], [[random.integers(k) for k in CODES]])
    live.withdraw(random.choice(live.view.rows, 5, replace=False))
    view = live.view
    rows = np.flatnonzero(view.is_live(np.arange(view.rows)))
    ids, known = [tuple(docid) for docid in codes_of(view, rows).tolist()], {tuple(docid) for docid in ids_NL.tolist()}
    met = {docid[:length] for docid in known for length in range(4)}
    means, tails = means_of(ids, view.products.vectors.unit(rows).numpy(), depth), {}
    for number, tail_KD in enumerate(nodes.tails, depth):
        tails |= {(number, code): vector_D for code, vector_D in enumerate(tail_KD)}
    table, query_BD = Table(CODES, 2, seed), random.normal(size=(2, 5)).astype(np.float32)
    ahead = Ahead(settings_of((0.5, 1.0, 0.0)), view.nodes, query_BD)
    query, mask = random_queries([3, 3], seed)
    result = constrained_beam_search(table, view, query, mask, beam_width=width, top_k=9, ahead=ahead)
    for row in range(2):

        def logp_of(prefix, row=row):
            total = 0.0
            for level, code in enumerate(prefix):
                step = float(table.step_logp(row, prefix[:level], "level")[code])
                siblings = {one for one in met if len(one) == level + 1 and one[:level] == prefix[:level]}
                total += step if prefix[: level + 1] in met else max(step, -np.log(1 + len(siblings)))
            return total

        def score(prefix, row=row, logp_of=logp_of):
            return score_of(prefix, query_BD[row], means, tails, depth, weights=(0.5, 1.0, 0.0), logp_of=logp_of)

        same(scored(result, row), slow_lookahead(ids, score, [width] * 3)[:9])


def test_a_search_of_an_older_view_finds_the_older_vectors(tmp_path):
    _, trie, store = catalogue(CODES, 40, 5, shared=False)
    nodes, names = NodeVectors.write(tmp_path, trie, store, depth=2), pa.array([f"p{row}" for row in range(trie.rows)])
    live = LiveTrie(trie, product_ids=names, products=Products(names, base_vectors=store), nodes=nodes)
    free = next(code for code in range(5) if trie.nodes_of(np.array([[1, 1, code]]))[0, 2] < 0)
    before = live.view
    live.put([Newcomer("new", "", unit_vectors(1, 5, 9)[0])], [(1, 1, free)])
    assert before.nodes.depths == ()
    after = live.view.nodes.depths[1]
    (node,) = after.changed_X.tolist()
    assert node == trie.nodes_of(np.array([[1, 1, free]]))[0, 1]
    moved_D = after.moved_SD[after.slot_X[0]].copy()
    assert not np.array_equal(moved_D, nodes.means[1][node])
    live.withdraw(["new"])
    back = live.view.nodes.depths[1]
    np.testing.assert_array_equal(back.moved_SD[back.slot_X[0]], nodes.means[1][node])
    np.testing.assert_array_equal(after.moved_SD[after.slot_X[0]], moved_D)
    lacking = LiveTrie(trie, product_ids=names, products=Products(names), nodes=nodes)
    for change in (lambda: lacking.withdraw(["p1"]), lambda: lacking.put([Newcomer("new", "")], [(1, 1, free)])):
        with pytest.raises(InputError, match="products cannot come or go: the release has no vectors of products"):
            change()
    assert lacking.products == trie.rows


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), few=st.sampled_from([0, 2, 256]))
def test_means_of_changed_nodes_are_those_summed_anew(seed, few, tmp_path_factory):
    _, trie, store = catalogue(CODES, 40, seed)
    random, names = np.random.default_rng(seed), [f"p{row}" for row in range(trie.rows)]
    nodes = NodeVectors.write(tmp_path_factory.mktemp("nodes"), trie, store, depth=2)
    live = LiveTrie(trie, product_ids=names, products=Products(pa.array(names), base_vectors=store), nodes=nodes)
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("_FEW", few), ("_BLOCK", 3), ("_NODES", 2)):
            patch.setattr(live_nodes, name, number)
        for step in range(30):
            chosen = random.choice(live.view.rows, 3)
            if step % 3 == 0:
                codes = [[random.integers(k) for k in CODES] for _ in range(4)]
                named = [f"p{number}" for number in random.choice(live.view.rows + 4, 4, replace=False)]
                live.put([Newcomer(one, "", vector) for one, vector in zip(named, unit_vectors(4, 5, step))], codes)
            elif step % 3 == 1:
                live.withdraw(chosen)
            else:
                tried(live.restore, chosen)
    view = live.view
    rows = np.flatnonzero(view.is_live(np.arange(view.rows)))
    ids = [tuple(docid) for docid in codes_of(view, rows).tolist()]
    means = means_of(ids, view.products.vectors.unit(rows).numpy(), 2)
    for depth, found in enumerate(view.nodes.depths, 1):
        vector_nD = nodes.means[depth - 1].copy()
        vector_nD[found.changed_X] = found.moved_SD[found.slot_X]
        of_base = trie.prefixes(depth, np.arange(trie.nodes(depth))).tolist()
        first_n = view.inserted.arrays.row_start[depth][:-1]
        of_inserted = live.space.unpack(view.inserted.packed_D[first_n])[:, :depth].tolist()
        for prefix, vector_D in [*zip(of_base, vector_nD), *zip(of_inserted, found.moved_SD[found.inserted_slot_n])]:
            np.testing.assert_array_equal(vector_D, means.get(tuple(prefix), np.zeros(5, np.float16)))


def test_what_does_not_fit_is_refused(tmp_path):
    _, trie, store = catalogue(CODES, 40, 5)
    nodes = NodeVectors.write(tmp_path, trie, store, depth=2)
    for query_BD in (np.ones((2, 4)), np.ones(5), np.full((1, 5), np.nan)):
        with pytest.raises(InputError, match="looks ahead by query vectors of 5 finite numbers"):
            Ahead(Lookahead(), nodes, query_BD)
    with pytest.raises(InputError, match="a lexical_weight needs the best words"):
        Ahead(Lookahead(lexical_weight=1.0), nodes, np.ones((1, 5)))
    table, (query, mask) = Table(CODES, 2, 7), random_queries([3, 3], 7)
    with pytest.raises(InputError, match="1 query vectors for 2 queries; give one for each"):
        constrained_beam_search(
            table, trie, query, mask, beam_width=2, top_k=2, ahead=Ahead(Lookahead(), nodes, np.ones((1, 5)))
        )


def test_each_query_of_a_batch_may_have_its_own_filter(tmp_path):
    _, trie, store = catalogue(CODES, 40, 3)
    nodes, random = NodeVectors.write(tmp_path, trie, store, depth=2), np.random.default_rng(3)
    one, query_BD = Filter.of(random.random(trie.rows) < 0.3), np.repeat(random.normal(size=(1, 5)), 2, 0)
    word_BN = np.repeat(random.random((1, trie.rows)), 2, 0).astype(np.float32)

    def search(allowed, rows):
        words = best_words(word_BN[rows], trie, filters_for(allowed, trie, len(rows)))
        ahead = Ahead(settings_of((0.0, 1.0, 1.0)), nodes, query_BD[rows], words=words)
        return constrained_beam_search(None, trie, None, None, beam_width=3, top_k=3, allowed=allowed, ahead=ahead)

    together = search([one, None], [0, 1])
    for row, chosen in enumerate((one, None)):
        same(scored(together, row), scored(search(chosen, [row]), 0))
