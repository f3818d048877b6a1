"""A tiny catalogue whose scores are given, so that what is lost where can be counted by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from catid2_ray.errors import InputError
from catid2_ray.evaluation.diagnosis import Diagnosis, diagnose, diagnosis_figures, rows_per_query
from catid2_ray.retrieval.exact import Exact
from catid2_ray.retrieval.products import ProductNames
from catid2_ray.retrieval.rescoring import Expansion, Hit
from catid2_ray.retrieval.trie import Trie

# Products a to f below the first codes 0, 0, 1, 1, 2, 2. The best ID, f's, lies below the worst first code.
TRIE = Trie.build([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]], codes_per_level=(3, 2))
FIRST, WHOLE = [-1.0, -1.1, -1.2], [-4.0, -5.0, -1.5, -4.5, -6.0, -1.25]


def given_scores(expansion=None):
    def exact(queries):
        score_L = [np.array([row] * len(queries), np.float32) for row in (FIRST, WHOLE)]
        return Exact(score_L, score_L)

    def rescored(result, queries, *, k, expansion):
        """By name backwards, of the products of the beams, as many as the settings allow."""
        names = [
            sorted(("abcdef"[row] for row, _ in ranges[:count].tolist()), reverse=True)[: expansion.most]
            for ranges, count in zip(result.row_range_BK2, result.count_B.tolist())
        ]
        return [[Hit(name, "", 0.0) for name in row[:k]] for row in names]

    return SimpleNamespace(
        trie=TRIE, levels=2, widths=[1, 2], expansion=expansion, live=SimpleNamespace(names=ProductNames(list("abcdef"))),
        exact=exact, rescored=rescored,
    )  # fmt: skip


def test_what_a_narrow_beam_prunes_and_what_the_model_ranks_low_are_told_apart():
    found = diagnose(given_scores(), ["one", "two"], [{"f"}, {"a", "c", "d", "zz"}], widths=(2, 10))
    assert list(found.recall) == ["beam 2", "beam 1/2", "beam 10", "exact"] and found.served == "beam 1/2"
    # Beam 1/2 follows code 0 alone; beam 2 follows 0 and 1 and keeps the IDs of c and a.
    assert found.kept["beam 1/2"].tolist() == [[0, 0], [1 / 3, 1 / 3]]
    assert found.kept["beam 2"].tolist() == [[0, 0], [1, 2 / 3]]
    assert found.kept["beam 10"].tolist() == [[1, 1], [1, 1]]
    assert found.recall["beam 2"][:, 0].tolist() == [0, 2 / 3] and found.recall["exact"][:, 0].tolist() == [1, 1]
    assert not found.mixture
    figures = diagnosis_figures(found, split="validation", rows_per_query=rows_per_query(given_scores()))
    assert figures["decoder_rows"] == 2 * 4 and figures["queries"] == 2
    assert figures["recall"]["beam 1/2"]["10"] == pytest.approx(1 / 6) and figures["recall"]["exact"]["10"] == 1
    assert figures["kept"]["beam 2"] == pytest.approx([0.5, 1 / 3]) and "exact" not in figures["kept"]
    assert figures["search_error"]["recall"]["10"][0] == pytest.approx(5 / 6)


def test_the_exact_mixture_is_over_all_products_and_without_bounds():
    # What the release lacks counts neither here nor in `recall`.
    found = diagnose(given_scores(Expansion(most=1)), ["one"], [{"a", "f", "zz"}], widths=(10,))
    assert {search: values[0, 0] for search, values in found.mixture.items()} == {"beam 1/2": 0, "exact": 1}
    both = Diagnosis.joined([Diagnosis.from_json(json.loads(json.dumps(found.as_json()))), found])
    assert both.mixture["exact"].shape == (2, 3) and both.served == "beam 1/2"
    assert diagnosis_figures(both, split="test", rows_per_query=4)["search_error"]["mixture"]["50"] == [1, 1, 1]


def test_a_query_without_a_product_of_the_release_is_refused():
    with pytest.raises(InputError, match="no relevant product of the query 'one'"):
        diagnose(given_scores(), ["one"], [{"zz"}])
