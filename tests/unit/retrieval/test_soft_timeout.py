"""A search whose time is over gives what ranks best below the level that it has reached, each query by its own time."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catid2_ray.retrieval import retriever as module
from catid2_ray.retrieval.filters import FilterIndex
from catid2_ray.retrieval.lookahead import Lookahead
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Products, arrow_strings
from catid2_ray.retrieval.rescoring import Expansion, first_beams
from catid2_ray.retrieval.retriever import Retriever, Soft
from tests.oracles.beam import Table
from tests.oracles.expansion import dot
from tests.oracles.lookahead import means_of, score_of, slow_lookahead, tails_of
from tests.oracles.soft_timeout import products_below
from tests.unit.retrieval.test_node_vectors import catalogue

CODES, DEPTH, WEIGHTS, QUERIES = (3, 4, 5), 2, (1.0, 20.0, 0.0), ["first query", "second query", "third query"]


class Found(Retriever):
    """Without a tokenizer: a `Table` knows queries by their numbers."""

    def _encoded(self, texts, users=None, view=None):
        ids_BT = torch.ones(len(texts), 1, dtype=torch.long)
        return ids_BT, ids_BT > 0, None


class Clock:
    """Counts the levels after which it is asked."""

    def __init__(self):
        self.levels = 0

    def __call__(self) -> float:
        self.levels += 1
        return float(self.levels)


def answered(retriever, deadlines, **options):
    """Products, and {query: (products, levels)} of those that were answered early, in that order."""
    early = {}

    def tell(number, hits, levels):
        early[number] = [hit.product_id for hit in hits], levels

    hits = retriever.retrieve(QUERIES, soft=Soft(deadlines, tell, clock=Clock()), **options)
    return [[hit.product_id for hit in mine] for mine in hits], early


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000), widths=st.lists(st.integers(1, 7), min_size=3, max_size=3), most=st.sampled_from([1, 9, 1000]),
    deadlines=st.lists(st.sampled_from([1.0, 2.0, 9.0, None]), min_size=3, max_size=3), rescores=st.booleans(),
    share=st.sampled_from([None, 0.5]),
)  # fmt: skip
def test_an_early_answer_is_the_products_below_the_beams_of_its_level(
    seed, widths, most, deadlines, rescores, share, tmp_path_factory
):
    ids_NL, trie, store = catalogue(CODES, 40, seed)
    nodes = NodeVectors.write(tmp_path_factory.mktemp("nodes"), trie, store, depth=DEPTH)
    table, random = Table(CODES, 3, seed), np.random.default_rng(seed)
    query_BD = random.normal(size=(3, 5)).astype(np.float32)
    query_BD /= np.linalg.norm(query_BD, axis=1, keepdims=True)
    names = [f"p{row}" for row in range(trie.rows)]
    retriever = Found(
        table, None, trie, products=Products(arrow_strings(names), base_vectors=store),
        index=FilterIndex({"product_id": arrow_strings(names)}), beam_width=widths,
        expansion=Expansion(a=0.3) if rescores else None, nodes=nodes,
        lookahead=Lookahead(logp_weight=WEIGHTS[0], vector_weight=WEIGHTS[1]), encode_query=lambda texts: query_BD,
    )  # fmt: skip
    allowed_N = np.ones(trie.rows, bool) if share is None else random.random(trie.rows) < share
    filters = None if share is None else [{"products": [names[row] for row in np.flatnonzero(allowed_N)]}] * 3
    whole = [[hit.product_id for hit in hits] for hits in retriever.retrieve(QUERIES, k=6, filters=filters)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "first_beams", functools.partial(first_beams, most=most))
        found, early = answered(retriever, deadlines, k=6, filters=filters)

    ids = [tuple(docid) for docid in ids_NL.tolist()]
    means, tails = means_of(ids, store.vectors_ND, DEPTH), tails_of(ids, store.vectors_ND, DEPTH)
    assert early.keys() == {number for number, until in enumerate(deadlines) if until is not None and until < 3}
    for number, until in enumerate(deadlines):
        if number not in early:
            assert found[number] == whole[number]
            continue

        def logp_of(prefix, number=number):
            return sum(table.step_logp(number, prefix[:level], "level")[code] for level, code in enumerate(prefix))

        def score(prefix, number=number, logp_of=logp_of):
            return score_of(prefix, query_BD[number], means, tails, DEPTH, weights=WEIGHTS, logp_of=logp_of)

        levels = int(until)
        # Without re-scoring the beams are widened to hold k IDs.
        wide = [width if rescores else max(width, 6) for width in widths[:levels]]
        live = [docid for docid, chosen in zip(ids, allowed_N) if chosen]
        beams = [prefix for _, prefix in slow_lookahead(live, score, wide)] if live else []
        rows = products_below(
            beams, list(zip(ids, allowed_N)), k=6, most=most, logp_of=logp_of,
            dense_of=lambda row, number=number: dot(query_BD[number], store.vectors_ND[row].astype(np.float64)),
            **({"a": 0.3, "shape": math.tanh} if rescores else {}),
        )  # fmt: skip
        assert early[number] == ([names[row] for row in rows], levels) and found[number] == early[number][0]


def test_the_search_ends_where_all_queries_are_answered(tmp_path):
    ids_NL, trie, store = catalogue(CODES, 40, 1)
    table, asked = Table(CODES, 3, 1), []
    real = table.level_logits
    table.level_logits = lambda level, *rest: asked.append(level) or real(level, *rest)
    retriever = Found(
        table, None, trie, products=Products(arrow_strings([f"p{row}" for row in range(40)]), base_vectors=store),
        beam_width=5, expansion=Expansion(a=0.1), encode_query=lambda texts: np.ones((len(texts), 5), np.float32),
    )  # fmt: skip
    _, early = answered(retriever, [1.0, 2.0, 2.0], k=3)
    assert asked == [0, 1] and list(early) == [0, 1, 2] and [levels for _, levels in early.values()] == [1, 2, 2]


def test_without_vectors_every_query_waits():
    _, trie, _ = catalogue(CODES, 40, 1)
    retriever = Found(Table(CODES, 3, 1), None, trie, [f"p{row}" for row in range(40)], beam_width=5)
    found, early = answered(retriever, [1.0, 1.0, 1.0], k=3)
    assert early == {} and retriever.hurried is None and [len(mine) for mine in found] == [3, 3, 3]
