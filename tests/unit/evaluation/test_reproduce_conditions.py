"""The plan: every table's rows, names that lead to one cell, words that are unknown, and what the paper prints."""

import json
from importlib import resources

import pytest

from catid2_ray.config import KINDS
from catid2_ray.errors import InputError
from catid2_ray.evaluation.reproduce.conditions import ALSO, NAMES, TABLES, chosen, plan, rows_of
from catid2_ray.evaluation.reproduce.scores import CLAIMS

PUBLISHED = json.loads(resources.files("catid2_ray.evaluation.reproduce").joinpath("published.json").read_text("utf-8"))
ALL = [*TABLES, *ALSO]


def test_cells_have_names_of_their_own_and_kinds_that_there_are():
    cells = plan(ALL, NAMES, "us")
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and "T2/tiger/us" in names and "F5/cat_id2_k64/us" in names
    assert {cell.row.condition.kind for cell in cells if cell.row.condition.kind} <= set(KINDS)
    assert all(
        cell.row.condition.kind or cell.row.condition.family != "ids" or cell.row.condition.missing for cell in cells
    )


def test_every_row_that_the_paper_prints_has_a_cell_and_no_cell_names_a_row_that_it_does_not():
    for table in "23456":
        printed = set().union(*PUBLISHED[table].values())
        ours = {row.paper for row in rows_of(table, NAMES)} - {None}
        assert printed <= ours
        assert table == "2" or ours <= printed


@pytest.mark.parametrize("table", "23456")
def test_recall_as_printed_rises_with_the_cut_off(table):
    for rows in PUBLISHED[table].values():
        for figures in rows.values():
            known = [figure for figure in figures if figure is not None]
            assert known == sorted(known) and known[0] > 0 and known[-1] < 100 and len(figures) == 5


def test_what_the_notes_say_of_the_paper_s_gains_follows_from_its_figures():
    """METHODS, 10.6: best K over TIGER at recall@10, relative."""
    gains = {}
    for locale, rows in PUBLISHED["2"].items():
        best = max(rows["cat_id2_256"][1], rows["cat_id2_512"][1])
        gains[locale] = round(100 * (best / rows["tiger"][1] - 1))
    assert gains == {"us": 33, "es": 7, "jp": 6}


def test_claims_name_rows_of_their_table():
    names = {}
    for cell in plan(ALL, NAMES, "us"):
        names.setdefault(cell.table, set()).add(cell.row.condition.name)
    for table, claims in CLAIMS.items():
        assert {name for claim in claims for name in (claim.one, claim.other)} <= names[table], table


def test_confident_labels_are_a_row_where_the_recipe_says_who_is_sure():
    row = {row.condition.name: row.condition for row in rows_of("CT", NAMES)}["confident"]
    assert row.missing == "reproduce.confidence names no column that says how sure a label is"
    row = {row.condition.name: row.condition for row in rows_of("CT", NAMES, confidence={"sure": 5})}["confident"]
    assert row.missing is None and row.recipe == {"quantizer.category_confidence": {"sure": 5}}


def test_table_4_adds_or_leaves_out_the_category_whatever_the_recipe_embeds():
    for text in (("title",), ("title", "category_path", "description")):
        rows = {row.condition.name: dict(row.condition.recipe) for row in rows_of("4", NAMES, text=text)}
        assert "category_path" in rows["tiger_with_category"]["embedding.text"]
        assert "category_path" not in rows["tiger_without_category"]["embedding.text"]


def test_an_encoder_of_one_s_own_is_a_row_and_may_stand_for_the_paper_s():
    named = {"e5": "intfloat/e5-base-v2", "mpnet": "models/mpnet"}
    rows = {cell.row.condition.name: cell.row for cell in plan(["2"], ["bm25", "mpnet", "dense"], "us", encoders=named)}
    assert list(rows) == ["bm25", "dense", "mpnet", "e5"] and rows["mpnet"].paper == "mpnet"
    assert rows["e5"].condition.recipe["embedding.encoder"] == "intfloat/e5-base-v2"
    assert rows["mpnet"].condition.recipe["embedding.encoder"] == "models/mpnet"
    with pytest.raises(InputError, match="reproduce.encoders: dense is a method's name"):
        plan(["2"], ["bm25"], "us", encoders={"dense": "x"})
    with pytest.raises(InputError, match="reproduce.runs: e5 is a method's name"):
        plan(["2"], ["bm25"], "us", encoders=named, runs=["e5"])


def test_tables_that_the_paper_prints_with_k_256_have_it_on_the_paper_s_data():
    """Whatever the recipe of a locale has: 512 on us and jp. A shop that is called us is none."""
    for data, locale, pinned in (("us", "us", True), ("us", None, False), ("shop", None, False)):
        cells = [cell.row.condition.recipe for cell in plan(["3", "4", "5", "6"], [], data, locale=locale)]
        assert all(("quantizer.codes_per_level" in changes) == pinned for changes in cells)
    assert {"levels": 5}.items() <= cells[-1].items()


def test_only_rows_as_printed_stand_beside_the_paper_s_tiger_and_cat_id2():
    beside = {row.condition.name: row.paper for row in rows_of("2", NAMES) if row.paper in ("tiger", "cat_id2", None)}
    ours = ("tiger", "tiger+generator", "cat_id2", "cat_id2+generator")
    assert beside == dict.fromkeys(ours) | {"paper_tiger": "tiger", "paper_tiger+generator": "tiger"}


def test_an_unknown_method_or_table_or_cell_is_named_with_those_that_there_are():
    with pytest.raises(InputError, match="unknown 'bm26'; known are bm25, "):
        plan(ALL, ["bm25", "bm26"], "us")
    with pytest.raises(InputError, match="unknown 12; choose from 1, 2"):
        plan(["12"], NAMES, "us")
    cells = plan(["2"], NAMES, "us")
    with pytest.raises(InputError, match="no such cell; near it: T2/tiger/us"):
        chosen(cells, "T2/tigger/us")
    assert [cell.name for cell in chosen(cells, "T2/nci/us")] == ["T2/nci/us"] and chosen(cells, None) == cells


def test_what_there_is_no_code_for_says_why():
    missing = [cell.row.condition for cell in plan(["2"], NAMES, "us") if cell.row.condition.missing]
    assert {condition.name for condition in missing} == {"pag", "genret", "chap"}
