"""The report from lists with known answers: advice, sentences, the paper's figures beside ours, groups, and what is not known."""

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from catid2_ray.evaluation.protocol import Judgements
from catid2_ray.evaluation.reproduce.conditions import Cell, Condition, plan
from catid2_ray.evaluation.reproduce.report import Facts, write
from catid2_ray.evaluation.reproduce.scores import (
    CLAIMS,
    Judged,
    Outcome,
    Run,
    advice,
    by_category,
    by_group,
    compared,
    findings,
    score,
)
from catid2_ray.evaluation.reproduce.tables import beside_table, besides, cost_table
from catid2_ray.evaluation.reproduce.texts import PROXY_NOTE, duration
from tests.unit.evaluation.test_reproduce_conditions import PUBLISHED

Q = 60
PRODUCTS = [f"p{i}" for i in range(200)]
RELEVANT = [{f"p{q}", f"p{q + 100}"} for q in range(Q)]  # of each query one seen and one unseen product
JUDGED = Judged(
    Judgements(
        query_ids=[f"q{q}" for q in range(Q)], queries=["hinge" if q % 2 else "oak hinge" for q in range(Q)], relevant=RELEVANT,
        seen=[{f"p{q}"} for q in range(Q)], unseen=[{f"p{q + 100}"} for q in range(Q)], dropped_pairs=0,
    ),
    [dict.fromkeys(wanted, 1.0) for wanted in RELEVANT], ["ambiguous" if q % 2 else "long_tail" for q in range(Q)],
    {product: "Tools" if int(product[1:]) < 100 else "" for product in PRODUCTS},
)  # fmt: skip


def ranked(found: float, seed: int = 0) -> list[list[str]]:
    """Of each query the seen product first with that probability, else nothing relevant."""
    hit_Q = np.random.default_rng(seed).random(Q) < found
    return [[f"p{q}" if hit else "p199", "p198"] for q, hit in enumerate(hit_Q)]


def outcome(name: str, *lists, why: str = "", train: float = 1.0, table: str = "2", data: str = "us") -> Outcome:
    cell = next(cell for cell in plan([table], [name], data) if cell.row.condition.name == name)
    cost = {"train_seconds": train, "index_seconds": 0.0, "ms_per_query": 2.0, "bytes": 2**20}
    runs = [
        Run(seed, f"artifacts/cell/{name}{seed}/manifest.json", one, None, cost, {}, "a machine", {})
        for seed, one in enumerate(lists)
    ]
    return Outcome(cell, runs, [why] if why else [])


def facts(**changes) -> Facts:
    counts = ("documents", "train_queries", "train_pairs", "test_queries", "test_pairs")
    plain = Facts(
        data="us", locale="us", command="catid2 reproduce --recipe R", about={"catalogue": "200 products"},
        table_1=dict.fromkeys(counts, 7), table_8=[], distance=None, images={}, published=PUBLISHED,
    )  # fmt: skip
    return plain._replace(**changes)


def renamed(one: Outcome, **changes) -> Outcome:
    """The outcome of a condition that is changed so."""
    row = one.cell.row._replace(condition=one.cell.row.condition._replace(**changes))
    return one._replace(cell=one.cell._replace(row=row))


def scored_of(*outcomes):
    return [score(one, JUDGED) for one in outcomes]


def headings_of(markdown: str) -> dict[str, str]:
    """The text below each heading of a Markdown report, by the last heading of that name."""
    return {part.split("\n")[0].lstrip("# "): part for part in re.split(r"\n(?=#)", markdown)}


def test_a_score_is_the_mean_of_its_seeds_query_by_query():
    one = score(outcome("tiger", ranked(1.0), ranked(0.0)), JUDGED)
    assert one.recall(10) == pytest.approx(np.full(Q, 0.25)) and one.half_range(50) == 0.25
    assert score(outcome("tiger", why="no"), JUDGED) is None
    assert one.values["seen"][:, 0] == pytest.approx(np.full(Q, 0.5)) and not one.values["unseen"].any()


def test_groups_and_categories_count_what_they_say():
    one = score(outcome("bm25", [["p1"]] * Q), JUDGED)  # finds what query 1 asks for, and nothing else
    groups = by_group(one, JUDGED, 50)
    assert groups["ambiguous"] == (30, pytest.approx(0.5 / 30)) and groups["long_tail"] == (30, 0.0)
    assert groups["precise_1"] == (0, None) and groups["seen"] == (60, pytest.approx(1 / 60))
    assert by_category(one.outcome.runs, JUDGED, 50) == {"Tools": (60, pytest.approx(1 / 60))}


def test_the_cheapest_of_those_that_tie_is_taken_and_proxies_are_no_systems():
    found = scored_of(
        outcome("bm25", ranked(0.6), train=0.0), outcome("dense", ranked(0.62, 1), train=50.0),
        outcome("served", ranked(0.65, 2), train=900.0), outcome("tiger", ranked(1.0), train=9.0),
        outcome("cat_id2", ranked(0.1, 3), train=5.0), outcome("cat_id2_shuffled", ranked(1.0), train=0.0),
    )  # fmt: skip
    said = advice(found, compared(found, 50), 50)
    assert (said.take, said.best) == ("bm25", "served") and set(said.ties) == {"bm25", "dense", "served"}
    assert said.ids == "tiger" and said.id_ties == [], (
        "the control is no way of making IDs, and cat_id2 is shown to find less"
    )
    assert "no difference is shown, of 3 whole systems measured, and this one takes less time to make." in said.sentence
    clear = scored_of(outcome("bm25", ranked(0.1), train=0.0), outcome("served", ranked(1.0), train=900.0))
    assert advice(clear, compared(clear, 50), 50).take == "served"
    assert (
        advice(scored_of(outcome("tiger", ranked(1.0))), compared(scored_of(outcome("tiger", ranked(1.0))), 50), 50)
        is None
    )


def test_the_first_sentence_says_what_it_costs_to_make_and_to_ask():
    found = scored_of(outcome("bm25", ranked(0.1)), outcome("served", ranked(1.0), train=900.0))
    assert advice(found, compared(found, 50), 50).sentence.startswith(
        "Take ours with everything on, as served: recall@50 50.0 % [50.0, 50.0], 15 min to make, 2.0 ms a query. "
    )
    own = renamed(outcome("bm25", ranked(1.0)), name="solr", title="solr", family="run")
    found = scored_of(own)
    assert advice(found, compared(found, 50), 50).sentence == (
        "Take solr: recall@50 50.0 % [50.0, 50.0]. It finds most, of 1 whole system measured, and you have it already."
    )
    slow, fast = outcome("dense", ranked(0.6), train=1.0), outcome("served", ranked(0.65, 2), train=2.0)
    slow = slow._replace(runs=[run._replace(cost=run.cost | {"ms_per_query": 900.0}) for run in slow.runs])
    found = scored_of(slow, fast)
    assert advice(found, compared(found, 50), 50).sentence.endswith(
        "and this one takes less time to make, though a query of the other takes 2.0 ms."
    )
    assert [duration(seconds) for seconds in (0.2, 119, 600, 7200)] == ["0 s", "119 s", "10 min", "2.0 h"]


def test_neither_gdr_nor_a_control_is_taken_or_counted():
    """GDR's products are ranked by vectors, and shuffled categories are there to be compared with alone."""
    control = outcome("cat_id2_shuffled+generator", ranked(1.0), train=0.0)
    found = scored_of(
        outcome("bm25", ranked(0.5)), control, outcome("gdr", ranked(1.0), train=0.0), outcome("tiger", ranked(0.6), train=2.0),
        outcome("cat_id2", ranked(0.5, 1)), outcome("cat_id2_shuffled", ranked(1.0), train=0.0),
    )  # fmt: skip
    said = advice(found, compared(found, 50), 50)
    assert (said.take, said.ties, said.ids, said.id_ties) == ("bm25", ["bm25"], "cat_id2", ["tiger"])
    assert "of 1 whole system measured." in said.sentence and "GDR" not in said.sentence
    alone = scored_of(control)
    assert advice(alone, compared(alone, 50), 50) is None


def test_a_search_that_you_have_is_kept_where_nothing_is_shown_to_find_more():
    own = outcome("bm25", ranked(0.6))
    row = own.cell.row._replace(condition=Condition("solr", "solr, as given", "run"))
    own = own._replace(cell=own.cell._replace(row=row), runs=[run._replace(cost={}) for run in own.runs])
    found = scored_of(own, outcome("served", ranked(0.65, 2), train=0.0))
    said = advice(found, compared(found, 50), 50)
    assert (said.take, said.best) == ("solr", "served")
    assert said.sentence.endswith("but no difference is shown, of 2 whole systems measured, and you have it already.")
    better = own._replace(
        cell=own.cell._replace(row=row._replace(condition=row.condition._replace(name="new"))),
        runs=[own.runs[0]._replace(ranked=ranked(0.65, 2))],
    )
    two = scored_of(own, better)
    assert advice(two, compared(two, 50), 50).take == "new", "of two that you have the one that finds more"
    assert cost_table(found, compared(found, 50), said, 2.0).rows[1][2:] == ["–"] * 6 + ["take"]


def test_sentences_say_what_the_data_says_and_never_more():
    found = scored_of(
        outcome("tiger", ranked(0.9)), outcome("dsi_semantic", ranked(0.1)), outcome("cat_id2", ranked(0.9))
    )
    said = [str(one) for one in findings("T2", found, {10: compared(found, 10)})]
    borne, tie, missing = said
    assert borne.startswith("TIGER over DSI semantic (4.2), recall@10: +") and borne.endswith("borne out.")
    assert missing.startswith(
        "Not known, as the rows in brackets have no figure: CAT-ID² as printed over TIGER as printed (4.2) [cat_id2_256, "
        "paper_tiger]; K 512 over"
    )
    assert missing.count("[") == len(CLAIMS["T2"]) - 2
    assert "+0.00 points (+0.0%) [+0.00, +0.00], p = 1.000" in tie and tie.endswith("no difference is shown.")
    turned = scored_of(outcome("tiger", ranked(0.1)), outcome("dsi_semantic", ranked(0.9)))
    contradicted, *_ = findings("T2", turned, {10: compared(turned, 10)})
    assert str(contradicted).endswith("contradicted.") and contradicted.as_json()["finding"] == "contradicted"


def test_claims_compare_what_differs_in_one_thing():
    pairs = {table: {(claim.one, claim.other) for claim in claims} for table, claims in CLAIMS.items()}
    assert ("on_residual", "random_negatives") in pairs["T5"], "the soft contrast of cat_id2 reads no negatives"
    assert ("cat_id2", "random_negatives") not in pairs["T5"]
    assert {("cat_id2_256", "paper_tiger"), ("cat_id2", "tiger"), ("cat_id2_k512", "cat_id2")} <= pairs["T2"]
    assert ("on_residual", "as_deep") not in pairs["CT"], "they differ in the number of levels, too"
    assert {("on_residual", "tiger"), ("as_deep", "tiger_as_deep"), ("confident", "cat_id2"), ("confident", "dis"),
            ("clusters", "dis"), ("cat_id2", "noise_20")} <= pairs["CT"]  # fmt: skip
    worded = [claim.says for claim in CLAIMS["T3"] if claim.other in ("paper_hcc", "paper_csc", "hcc", "csc")]
    assert len(worded) == 4 and all(re.search(r": TIGER over (HCCL|CSCL) alone \(4.3, 1\)", says) for says in worded)


def test_on_the_paper_s_data_each_figure_stands_beside_the_printed_one_with_a_verdict():
    outcomes = [
        outcome("bm25", ranked(1.0)),
        outcome("mpnet", why="no such model | here"),
        outcome("gdr", why="not built"),
    ]
    made = write(outcomes, JUDGED, facts(), docid_of={}, tables=["1", "2", "7"])
    beside = made.markdown[made.markdown.index("### Beside the paper's") :].split("\n###")[0]
    assert "| BM25, k1 1.2, b 0.75 | @10 | 5.68 | 50.00 [50.00, 50.00] | +44.32 | [FAIL] |" in beside
    assert "| Multilingual MPNet as it is | @5 | 1.70 | – | – | [not run: no such model \\| here] |" in beside
    assert "GDR" not in beside and "[not run: not built]" in made.markdown, "the paper has no such row"
    assert "| ESCI-us, the paper's | 386,392 | 20,001 | 341,460 | 5,800 | 29,351 |" in made.markdown
    assert made.json["tables"]["T2"]["rows"]["bm25"]["recall"]["10"] == 0.5 and made.json["not_run"]["T2/gdr/us"] == [
        "not built"
    ]


def test_rows_of_the_proxy_say_so_in_every_table_of_table_2():
    made = write(
        [outcome("bm25", ranked(1.0)), outcome("dsi_naive", ranked(0.5))], JUDGED, facts(), docid_of={}, tables=["2"]
    )
    below = headings_of(made.markdown)
    for name in ("Our figures", "By kind of query, and for products seen and unseen in training", "By category",
                 "Other measures, and IDs beside products", "Beside the paper's"):  # fmt: skip
        assert "DSI naive (proxy) |" in below[name] and "DSI naive |" not in below[name], name
        assert "BM25, k1 1.2, b 0.75 |" in below[name], name
    assert "not by the paper's T5" in below["Beside the paper's"] and "our preset" not in below["Beside the paper's"]
    assert "at one cut-off" in below["Our figures"] and PROXY_NOTE in made.markdown
    priced = below["Which method to take, and what each costs"]
    assert (
        "MiB read: the index, or the weights" in priced and "query encoder count only in rows of generators" in priced
    )
    assert made.markdown.index("Which method to take") < made.markdown.index("](overview.png)")
    assert made.html.index("Which method to take") < made.html.index("What each method finds")


@pytest.mark.parametrize(("table", "is_ours"), [("3", False), ("4", True), ("5", True), ("6", True)])
def test_our_preset_beside_printed_figures_is_named(table, is_ours):
    cell = next(cell for cell in plan([table], [], "us") if cell.row.paper)
    one = Outcome(cell, outcome("bm25", ranked(0.5)).runs, [])
    found = besides(cell.table, [one], scored_of(one), facts())
    beside = beside_table(cell.table, found)
    assert {10, 50, 100} <= {figure.k for figure in found} and all("(proxy)" in row[0] for row in beside.rows)
    assert ("our preset" in beside.caption) is is_ours and "not by the paper's T5" in beside.caption


def test_the_json_holds_all_tables_as_numbers():
    examples = [{"title": "oak hinge", "category": "Tools", "docid": "<a_1>", "other_docid": "<a_2>"}]
    outcomes = [outcome("bm25", ranked(1.0), ranked(0.0)), outcome("tiger", ranked(0.5)), outcome("dsi_semantic", ranked(0.5)),
                outcome("mpnet", why="no such model")]  # fmt: skip
    for one in outcomes[1:3]:
        for run in one.runs:
            run.cost.update(ids_seconds=0.25, generator_seconds=0.75)
    made = write(outcomes, JUDGED, facts(table_8=examples), docid_of={}, tables=["1", "2", "7", "8"])
    tables = json.loads(json.dumps(made.json, allow_nan=False))["tables"]
    assert tables["1"]["us"]["documents"] == 7 and tables["1"]["ESCI-us, the paper's"]["test_pairs"] == 29351
    assert tables["7"]["dsi_semantic"] == {
        "paper_hours": 15.7, "train_seconds": 1.0, "ids_seconds": 0.25, "generator_seconds": 0.75
    }  # fmt: skip
    assert tables["7"]["bm25"] == {"train_seconds": 1.0} and "mpnet" not in tables["7"] and tables["8"] == examples
    table = tables["T2"]
    row = table["rows"]["bm25"]
    assert row["paper"]["10"] == {"printed": 0.0568, "difference": 0.1932, "verdict": "FAIL"}
    assert table["rows"]["mpnet"]["paper"]["5"] == {"printed": 0.017, "verdict": "not run"}
    assert row["groups"] == {
        "ambiguous": 0.25,
        "precise_1": None,
        "precise_2": None,
        "long_tail": 0.25,
        "seen": 0.5,
        "unseen": 0.0,
    }
    assert row["categories"] == {"Tools": 0.5} and table["categories_queries"] == {"Tools": 60}
    assert table["groups_queries"]["ambiguous"] == 30 and table["groups_queries"]["seen"] == 60
    claims = [one for one in table["claims"] if one["one"] == "tiger" and one["other"] == "dsi_semantic"]
    assert [one.pop("k") for one in claims] == [10, 50] and claims[0] == {
        "one": "tiger", "other": "dsi_semantic", "mean": 0, "low": 0, "high": 0, "p": 1, "finding": "no difference is shown",
        "says": "TIGER over DSI semantic (4.2)",
    }  # fmt: skip
    assert len(table["claims"]) == 2 and len(table["sentences"]) == 3
    elsewhere = write(outcomes, JUDGED, facts(data="shop", locale=None), docid_of={}, tables=["1", "2"]).json["tables"]
    assert "paper" not in elsewhere["T2"]["rows"]["bm25"] and len(elsewhere["1"]) == 4


def test_on_other_data_nothing_stands_beside_the_paper_s():
    made = write(
        [outcome("bm25", ranked(1.0), data="shop")], JUDGED, facts(data="shop", locale=None), docid_of={}, tables=["2"]
    )
    assert "Beside the paper's" not in made.html and "[OK]" not in made.html and "[FAIL]" not in made.html


def test_a_page_without_a_single_figure_says_why_and_draws_nothing():
    made = write([outcome("bm25", why="no words")], JUDGED, facts(), docid_of={}, tables=["2", "7"])
    assert "[not run: no words]" in made.html and not made.pictures and "advice" not in made.json


def test_figure_5_draws_what_was_measured_and_its_page_is_whole():
    cells = [
        cell
        for cell in plan(["F5"], [], "us")
        if cell.row.condition.name in ("dispersion_0.1", "dispersion_1", "cat_id2_k64", "tiger_k64")
    ]
    outcomes = [
        Outcome(
            Cell("F5", cell.row, "us"),
            [outcome("tiger", ranked(0.5, place)).runs[0]._replace(manifest=f"a/b/{place}/c")],
            [],
        )
        for place, cell in enumerate(cells)
    ]
    made = write(
        outcomes, JUDGED, facts(images={f"picture {i}": Figure() for i in range(8)}), docid_of={}, tables=["F5"]
    )
    assert set(made.pictures) == {"figure_5.png", *(f"ids_{i}.png" for i in range(1, 9))}
    again = [Outcome(Cell("F5", cell.row, "us"), outcomes[0].runs, []) for cell in cells]
    assert not write(again, JUDGED, facts(), docid_of={}, tables=["F5"]).pictures, (
        "one run alone says nothing of a setting"
    )
    assert "](figure_5.png)" in made.markdown and "](ids_8.png)" in made.markdown
    assert "<script" not in made.html and "http" not in made.html.replace("http-equiv", ""), "it fetches nothing"


def test_cq_sids_table_tells_equal_beams_from_equal_products():
    """Each ID holds four products: of p0 … p3 the relevant one comes last in the list of products, and with the first ID."""
    docid_of = {product: f"id{int(product[1:]) // 4}" for product in PRODUCTS}
    cells = [cell for cell in plan(["CQ"], [], "us") if cell.row.condition.name in ("cq_sid", "cq_rq_vae")]
    lists = [[f"p{4 * (q // 4) + i}" for i in range(4)] + ["p198", "p199"] for q in range(Q)]
    run = Run(0, "a/b/c/d", lists, [[f"id{q // 4}", "id49"] for q in range(Q)], {"train_seconds": 1.0, "index_seconds": 0.0},
              {}, "a machine", {"ids": "digest"})  # fmt: skip
    made = write(
        [Outcome(cell, [run], []) for cell in cells], JUDGED, facts(), docid_of={"digest": docid_of}, tables=["CQ"]
    )
    row = made.json["tables"]["CQ"]["rows"]["cq_sid"]
    assert row["beam_hit"] == {"1": 1.0, "10": 1.0, "100": 1.0} and row["beam_products"] == {"1": 4, "10": 8, "100": 8}
    assert row["recall_expected"]["5"] == row["recall"]["5"] == 0.5
    assert "| CQ-SID | 100.0 (4) | 100.0 (8) | 100.0 (8) | 100.0 | 100.0 | 50.0 | 50.0 |" in made.markdown
    said = made.json["tables"]["CQ"]["sentences"]
    assert "CQ-SID over RQ-VAE, at equal products, recall@10: +0.00 points" in said[0] and "Not known" in said[-1]


def test_money_is_time_at_the_price_that_the_recipe_says():
    found = scored_of(outcome("bm25", ranked(0.6), train=5400.0), outcome("dense", ranked(0.5, 1)))
    priced = cost_table(found, compared(found, 50), None, 0.8)
    names = [column.heading for column in priced.columns]
    row = next(row for row in priced.rows if row[0].startswith("BM25"))
    assert row[names.index("to make it")] == "1.20" and row[names.index("10⁶ queries")] == "0.44"  # 2 ms each
    plain = cost_table(found, compared(found, 50), None, None)
    assert "to make it" not in [column.heading for column in plain.columns] and "machine_hour" in plain.caption
    assert all(len(row) == len(table.columns) for table in (plain, priced) for row in table.rows)
