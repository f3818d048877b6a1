"""Why a product is found or not is what the search does: its path equals plain lists, its score the sum of its terms."""

import numpy as np
import pytest
from rich.console import Console

from catid2_ray.errors import InputError, QueryError
from catid2_ray.evaluation.look_tables import why_tables
from catid2_ray.evaluation.tables import terminal
from catid2_ray.evaluation.why import why
from catid2_ray.retrieval.node_vectors import NodeVectors
from catid2_ray.retrieval.products import Newcomer
from catid2_ray.retrieval.retriever import MAX_K, Retriever
from catid2_ray.retrieval.trie import Trie
from catid2_ray.retrieval.vectors import VectorStore
from tests.oracles.why import path_of
from tests.unit.retrieval import test_served
from tests.unit.retrieval.conftest import TITLES
from tests.unit.retrieval.test_served import copy, encode

served = test_served.served
PRODUCTS = [f"p{number}" for number in range(6)]


def score_by_prefix(retriever, query) -> dict:
    """Prefix → log P, or S where the search looks ahead, of all IDs."""
    scores = {}
    for depth, score_Bn in enumerate(retriever.exact([query]).score_L, 1):
        prefixes = retriever.trie.prefixes(depth, np.arange(retriever.trie.nodes(depth))).tolist()
        scores |= dict(zip(map(tuple, prefixes), score_Bn[0].tolist()))
    return scores


def looking_ahead(folder) -> dict:
    """The settings of a search that looks ahead; its node vectors are written into `folder`."""
    NodeVectors.write(
        folder / "node_vectors", Trie.open(folder / "trie"), VectorStore.open(folder / "vectors"), depth=1
    )
    return {"search": "lookahead", "lookahead": {"logp_weight": 0.5, "vector_weight": 3.0, "lexical_weight": 0.1}}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("widths", [[1, 1], [2, 1], [2, 3], [6, 6]])
def test_the_path_is_that_of_plain_lists(served, tmp_path, widths, ahead):
    plain = copy(served, tmp_path, expansion=None, stop_level=None, beam_width=widths)
    if ahead:
        (again := tmp_path / "again").mkdir()
        plain = copy(plain, again, **looking_ahead(plain))
    retriever = Retriever.open(plain, encode_query=encode)
    ids = [docid for docid in map(tuple, retriever.trie.prefixes(2, np.arange(retriever.trie.nodes(2))).tolist())]
    searched = [max(width, widths[-1]) for width in widths]  # for so many products
    for query in TITLES[:2]:
        scores = score_by_prefix(retriever, query)
        found = [hit.product_id for hit in retriever.retrieve([query], k=widths[-1])[0]]
        for product in PRODUCTS:
            said = why(retriever, query, product, k=widths[-1], exact=True)
            own = retriever.space.parse(said.docid)
            steps = [(step.candidates, step.rank, step.best, step.last) for step in said.steps]
            for mine, expected in zip(steps, path_of(ids, scores.__getitem__, searched, own), strict=True):
                assert mine[:2] == expected[:2] and mine[2:] == pytest.approx(expected[2:], abs=1e-4)
            assert [step.score for step in said.steps] == pytest.approx(
                [scores[own[:depth]] for depth in (1, 2)], abs=1e-4
            )
            assert sum(step.step for step in said.steps) == pytest.approx(scores[own], abs=1e-4)
            of_level = sorted((-score, prefix) for prefix, score in scores.items() if len(prefix) == 2)
            assert said.steps[-1].of_all == [prefix for _, prefix in of_level].index(own) + 1
            mine = said.standings[0]
            assert (mine.rank is not None) == (product in found) == (said.fell_out is None)
            if mine.rank:
                assert found[mine.rank - 1] == product
            assert said.verdict.startswith("Found" if mine.rank else "Not found")


def test_terms_sum_up_to_the_score_and_are_those_of_the_answer(served, tmp_path):
    narrow = copy(served, tmp_path, stop_level=2, beam_width=[2, 2])
    retriever = Retriever.open(narrow, encode_query=encode)
    answers = {hit.product_id: hit for hit in retriever.retrieve([TITLES[0]], k=MAX_K)[0]}
    lost = 0
    for product in PRODUCTS:
        said = why(retriever, TITLES[0], product)
        mine = said.standings[0]
        assert sum(mine.terms.values()) == pytest.approx(mine.score) and set(mine.terms) == {"path", "dense", "BM25"}
        dense = float(encode([TITLES[0]])[0] @ encode([mine.title])[0])
        assert mine.terms["dense"] == pytest.approx(np.tanh(dense), abs=2e-3)
        assert 0 <= mine.terms["path"] <= 0.1
        if product in answers:
            assert mine.score == pytest.approx(answers[product].score) and mine.rank
        else:
            lost += 1
            assert mine.rank is None and said.fell_out and "lost its path at level" in said.verdict
        assert said.figures()["steps"][0]["level"] == 1
    assert lost


def test_candidates_that_are_cut_are_told_from_paths_that_are_lost(served, tmp_path):
    settings = {"a": 0.1, "lexical_weight": 0.01, "most": 2}
    retriever = Retriever.open(copy(served, tmp_path, expansion=settings), encode_query=encode)
    verdicts = [why(retriever, TITLES[0], product, k=1).verdict for product in PRODUCTS]
    assert sum("not among the products that are ranked" in verdict for verdict in verdicts) == 4
    assert sum(verdict.startswith("Found: it is answer 1") for verdict in verdicts) == 1
    assert sum("Reached, but ranked 2, below the first 1; it loses most by its" in verdict for verdict in verdicts) == 1


def test_changes_since_the_release_count(served, tmp_path):
    retriever = Retriever.open(copy(served, tmp_path, stop_level=None), encode_query=encode)
    taken = {tuple(docid) for docid in retriever.trie.prefixes(2, np.arange(retriever.trie.nodes(2))).tolist()}
    free = next((a, b) for a in range(4) for b in range(4) if (a, b) not in taken)
    retriever.insert([Newcomer("new [x]", "oak [bold]shelf", None)], [free])
    said = why(retriever, "oak shelf", "new [x]", exact=True)
    assert retriever.space.parse(said.docid) == free and said.title == "oak [bold]shelf" and said.steps
    retriever.live.withdraw(["p2"])
    gone = why(retriever, TITLES[0], "p2")
    assert "withdrawn" in gone.verdict and gone.steps == () and len(why_tables(gone)) == 1
    with pytest.raises(InputError, match="no product 'nobody'"):
        why(retriever, TITLES[0], "nobody")
    with pytest.raises(QueryError, match="at least one letter"):
        why(retriever, "?", "p1")
    console = Console(width=80, markup=False, emoji=False, record=True)
    console.print(terminal(why_tables(said)))
    text = console.export_text()
    assert "oak [bold]shelf" in text and all(len(line) <= 80 for line in text.splitlines())
