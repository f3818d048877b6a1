"""Measures of reproduce against slow oracles, against ir-measures, and against ranx where it is installed (it compiles itself for
minutes); groups; TREC's files."""

import numpy as np
import pytest

from catid2_ray.errors import InputError
from catid2_ray.evaluation.reproduce.measures import (
    BEAMS,
    KS,
    gains_of,
    id_recalls,
    mean_of,
    measured,
    of_beams,
    query_groups,
)
from catid2_ray.evaluation.reproduce.trec import qrels_lines, run_lines
from tests.oracles import measures as oracle


def random_case(seed: int, queries: int = 12):
    """Lists of different lengths, graded judgements, one query without a relevant product, one list without products."""
    rng = np.random.default_rng(seed)
    products = [f"p{i:03d}" for i in range(150)]
    ranked = [rng.permutation(products)[: rng.integers(5, 120)].tolist() for _ in range(queries)]
    gains = [
        {str(p): float(rng.choice([0.0, 0.5, 1.0, 1.67, 2.0])) for p in rng.choice(products, 12, replace=False)}
        for _ in ranked
    ]
    relevant = [{p for p, gain in of.items() if gain >= 1.5} for of in gains]
    ranked[3], relevant[5] = [], set()
    return ranked, relevant, gains


@pytest.mark.parametrize("seed", range(4))
def test_measures_are_those_of_their_definitions(seed):
    ranked, relevant, gains = random_case(seed)
    values = measured(ranked, relevant, gains)
    for q, (products, wanted, gain) in enumerate(zip(ranked, relevant, gains)):
        if not wanted:
            assert all(np.isnan(values[name][q]).all() for name in ("recall", "hit", "mrr"))
            continue
        assert values["hit"][q].tolist() == [oracle.hit(products, wanted, k) for k in KS]
        assert values["mrr"][q] == oracle.mrr(products, wanted, 100)
        assert values["ndcg"][q] == pytest.approx(oracle.ndcg(products, gain, 10))
        assert values["recall"][q].tolist() == [len(wanted & set(products[:k])) / len(wanted) for k in KS]


def test_a_query_whose_judgements_all_gain_nothing_has_no_ndcg():
    values = measured([["a", "b"]], [set()], [{"a": 0.0}])
    assert np.isnan(values["ndcg"]).all()


def test_recall_is_no_hit_rate():
    values = measured([["a"]], [{"a", "b", "c", "d"}], [{"a": 1.0}])
    assert values["recall"][0, 0] == 0.25 and values["hit"][0, 0] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_a_shared_id_is_one_rank_among_ids_and_as_many_as_it_has_products_among_products(seed):
    rng = np.random.default_rng(seed)
    docid_of = {f"p{i}": f"id{i // 4}" for i in range(80)}
    ids = [[f"id{i}" for i in rng.permutation(20)[:15]] for _ in range(6)]
    relevant = [{f"p{i}" for i in rng.choice(80, 5, replace=False)} for _ in ids]
    got = id_recalls(ids, relevant, docid_of)
    for q in range(len(ids)):
        assert got[q].tolist() == [oracle.id_recall(ids[q], relevant[q], docid_of, k) for k in KS]
    # The first five products of the list are those of the first ID and one of the second.
    listed = [f"p{4 * int(name[2:]) + i}" for name in ids[0] for i in range(4)]
    wanted = {listed[4], listed[5]}
    assert measured([listed], [wanted], [{}])["recall"][0, 0] == 0.5
    assert id_recalls([ids[0]], [wanted], docid_of)[0, 0] == 1.0, "recall of IDs flatters"


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_holds_all_products_of_its_ids_and_a_cut_inside_an_id_exposes_by_chance(seed):
    rng = np.random.default_rng(seed)
    docid_of = {f"p{i}": f"id{rng.integers(12)}" for i in range(60)}
    known = sorted(set(docid_of.values()))
    ids = [rng.permutation(known)[: rng.integers(1, len(known))].tolist() for _ in range(5)] + [[], ["id1"]]
    relevant = [set(rng.choice(list(docid_of), 4, replace=False).tolist()) for _ in ids[:-1]] + [set()]
    got = of_beams(ids, relevant, docid_of)
    for q, wanted in enumerate(relevant):
        if not wanted:
            assert all(np.isnan(values[q]).all() for values in got.values())
            continue
        for column, width in enumerate(BEAMS):
            assert (got["beam_hit"][q, column], got["beam_products"][q, column]) == oracle.beam(
                ids[q], wanted, docid_of, width
            )
        for k in (5, 20):
            slow = oracle.expected_recall(ids[q], wanted, docid_of, k, rng)
            assert got["expected"][q, KS.index(k)] == pytest.approx(slow, abs=0.06)


def test_where_each_product_has_an_id_of_its_own_beams_are_lists_and_expected_recall_is_recall():
    ranked, relevant, gains = random_case(7)
    every = sorted({product for products in [*ranked, *relevant] for product in products})
    own, values = dict(zip(every, every)), measured(ranked, relevant, gains)
    got = of_beams(ranked, relevant, own)
    np.testing.assert_allclose(got["expected"], values["recall"])
    np.testing.assert_array_equal(got["beam_hit"][:, 1:], values["hit"][:, [KS.index(10), KS.index(100)]])


def test_the_first_rule_that_holds_is_a_query_s_group():
    titles = ["Steel door hinge", "Oak table 120 cm", "折りたたみ傘 黒"]
    queries = ["hinge", "!!!", "hinge 10 in", "door hinge steel", "oak hinge", "傘 黒"]
    assert query_groups(queries, titles) == [
        "ambiguous",
        "ambiguous",
        "precise_1",
        "precise_2",
        "long_tail",
        "precise_2",
    ]


def test_the_lowest_grade_gains_nothing_and_lower_ones_are_refused():
    assert gains_of([1.0, 2.33, 3.0], 1.0) == pytest.approx([0, 1.33, 2])
    with pytest.raises(InputError, match="0.5 is below the lowest grade 1"):
        gains_of([0.5], 1.0)


def test_a_mean_leaves_queries_out_that_a_figure_is_not_defined_for():
    assert mean_of(np.array([[1.0, np.nan], [0.0, np.nan]])) == [0.5, None]


def test_trec_files_keep_order_and_name_nothing_in_two_columns():
    run = run_lines(["q 1"], [["b%", "a"]], "my run")
    assert run == "q%201 Q0 b%25 1 2 my%20run\nq%201 Q0 a 2 1 my%20run\n"
    assert qrels_lines(["q"], [{"b": 1.33, "a": 0.0}]) == "q 0 a 0\nq 0 b 133\n"


@pytest.mark.parametrize("seed", range(3))
def test_ir_measures_gives_the_same(seed, tmp_path):
    """Through the files, as others would read them; recall, hit rate and MRR at one threshold of relevance."""
    import ir_measures as ir

    ranked, relevant, gains = random_case(seed)
    names = [f"q{i:02d}" for i in range(len(ranked))]
    (tmp_path / "run.txt").write_text(run_lines(names, ranked, "x"))
    (tmp_path / "qrels.txt").write_text(qrels_lines(names, gains))
    wanted = [ir.R(rel=150) @ 10, ir.R(rel=150) @ 50, ir.Success(rel=150) @ 10, ir.RR(rel=150) @ 100, ir.nDCG @ 10]
    theirs = {}
    for one in ir.iter_calc(
        wanted, ir.read_trec_qrels(str(tmp_path / "qrels.txt")), ir.read_trec_run(str(tmp_path / "run.txt"))
    ):
        theirs[one.query_id, str(one.measure)] = one.value
    values = measured(ranked, relevant, gains)
    ours = {
        "R(rel=150)@10": values["recall"][:, 1], "R(rel=150)@50": values["recall"][:, 3],
        "Success(rel=150)@10": values["hit"][:, 1], "RR(rel=150)@100": values["mrr"], "nDCG@10": values["ndcg"],
    }  # fmt: skip
    compared = 0
    for q, name in enumerate(names):
        if not ranked[q] or not relevant[q]:
            continue
        for measure, column in ours.items():
            assert column[q] == pytest.approx(theirs[name, measure]), (name, measure)
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("seed", range(3))
def test_ranx_gives_the_same(seed):
    ranx = pytest.importorskip("ranx")
    ranked, relevant, _ = random_case(seed)
    kept = [q for q in range(len(ranked)) if ranked[q] and relevant[q]]
    qrels = ranx.Qrels({str(q): dict.fromkeys(sorted(relevant[q]), 1) for q in kept})
    run = ranx.Run({str(q): {p: float(len(ranked[q]) - place) for place, p in enumerate(ranked[q])} for q in kept})
    theirs = ranx.evaluate(qrels, run, ["recall@10", "recall@50", "hit_rate@10", "mrr@100"])
    values = measured([ranked[q] for q in kept], [relevant[q] for q in kept], [{} for _ in kept])
    ours = [
        values["recall"][:, 1].mean(),
        values["recall"][:, 3].mean(),
        values["hit"][:, 1].mean(),
        values["mrr"].mean(),
    ]
    assert ours == pytest.approx(list(theirs.values()))
