"""What is said of a hit is what the search does: prefixes score as where nothing is pruned, the terms sum up to the score."""

import numpy as np
import pytest

from catid2_ray.errors import QueryError
from catid2_ray.retrieval.explain import explained
from catid2_ray.retrieval.products import Newcomer
from catid2_ray.retrieval.retriever import Retriever
from tests.unit.retrieval import test_served
from tests.unit.retrieval.conftest import TITLES
from tests.unit.retrieval.test_served import copy, encode
from tests.unit.retrieval.test_why import looking_ahead

served = test_served.served


def by_prefix(retriever, query) -> dict:
    """Prefix → (log P, score), of all nodes: the slow way."""
    exact, scores = retriever.exact([query]), {}
    for depth, (logp_Bn, score_Bn) in enumerate(zip(exact.logp_L, exact.score_L), 1):
        prefixes = retriever.trie.prefixes(depth, np.arange(retriever.trie.nodes(depth))).tolist()
        scores |= dict(zip(map(tuple, prefixes), zip(logp_Bn[0].tolist(), score_Bn[0].tolist())))
    return scores


@pytest.mark.parametrize("stop_level", [None, 1])
@pytest.mark.parametrize("ahead", [False, True])
def test_levels_are_those_of_a_search_that_prunes_nothing(served, tmp_path, ahead, stop_level):
    folder = copy(served, tmp_path, stop_level=stop_level)
    if ahead:
        (again := tmp_path / "again").mkdir()
        folder = copy(folder, again, **looking_ahead(folder))
    retriever = Retriever.open(folder, encode_query=encode)
    for query in TITLES[:3]:
        hits = retriever.retrieve([query], k=5)[0]
        expected = by_prefix(retriever, query)
        for hit, said in zip(hits, explained(retriever, query, hits), strict=True):
            docid = retriever.space.parse(hit.docid_text)
            assert "".join(level.token for level in said.levels) == retriever.space.text(docid)[: 5 * retriever.levels]
            for depth, level in enumerate(said.levels, 1):
                assert (level.logp, level.score) == pytest.approx(expected[docid[:depth]], abs=1e-4)
            assert said.levels[-1].logp == pytest.approx(hit.logp, abs=1e-4)
            assert set(said.terms) == {"path", "dense", "BM25"} and sum(said.terms.values()) == pytest.approx(hit.score)


def test_without_rescoring_the_path_is_all_there_is(served, tmp_path):
    retriever = Retriever.open(copy(served, tmp_path, expansion=None, stop_level=None), encode_query=encode)
    hits = retriever.retrieve(["oak door"], k=3)[0]
    for hit, said in zip(hits, explained(retriever, "oak door", hits)):
        assert said.terms == {"path": hit.score} and said.levels[-1].score == pytest.approx(hit.score, abs=1e-5)
    assert explained(retriever, "oak door", []) == []


def test_a_filter_counts_and_changes_since_do_not_hurt(served, tmp_path):
    (again := tmp_path / "again").mkdir()
    plain = copy(served, tmp_path, expansion=None, stop_level=None)
    retriever = Retriever.open(copy(plain, again, **looking_ahead(plain)), encode_query=encode)
    taken = {tuple(docid) for docid in retriever.trie.prefixes(2, np.arange(retriever.trie.nodes(2))).tolist()}
    free = next((a, b) for a in range(4) for b in range(4) if (a, b) not in taken)
    retriever.insert([Newcomer("new", "oak shelf", None)], [free])
    for expression in (None, {"products": ["new", "p2", "p4"]}):
        hits = retriever.retrieve(["oak shelf"], k=3, filters=[expression])[0]
        for hit, said in zip(hits, explained(retriever, "oak shelf", hits, expression=expression), strict=True):
            assert said.levels[-1].score == pytest.approx(hit.score, abs=1e-5)
    assert "new" in {hit.product_id for hit in hits}
    retriever.live.withdraw(["new"])
    gone = {hit.product_id: said for hit, said in zip(hits, explained(retriever, "oak shelf", hits))}
    assert len(gone["new"].levels) < 2 and len(gone["p4"].levels) == 2
    with pytest.raises(QueryError):
        explained(retriever, "oak shelf", hits, expression={"column": "nowhere", "to": 1})
