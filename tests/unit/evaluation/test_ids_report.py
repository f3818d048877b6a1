"""The pages and tables: every number is there once its kind ran, text is escaped, the HTML closes what it opens."""

from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from catid2_ray.evaluation.ids_report import compare_page, compare_table, ids_page, judged
from catid2_ray.evaluation.tables import markdown, terminal
from catid2_ray.identifiers import quality
from catid2_ray.on_ray.reports import examples_of

VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Fails at the first end tag that does not close the last open one; collects text and addresses."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)


def run(kind, seed, **other):
    return {
        "kind": kind, "seed": seed, "collision_rate": 0.1 + seed / 50, "shared_rate": 0.2, "largest_shared": 4,
        "codes_used": [256, 250], "perplexity": [207.0, 195.0], "purity": [0.9, 0.8], "ami": [0.5 + seed / 10, 0.4],
        "ami_null": [0.001, -0.002], "seconds": 1234.0,
    } | other  # fmt: skip


ROWS = [
    run("tiger", 0),
    run("tiger", 1),
    run("cat_id2", 0, collision_rate=0.25, ami=[0.7, 0.45], verdict="narrowing"),
    run(
        "dsi_naive",
        0,
        collision_rate=0.3,
        purity=[],
        ami=[],
        ami_null=[],
        codes_used=[10],
        perplexity=[9.5],
        seconds=None,
    ),
]


def console(rows) -> str:
    """The comparison in a terminal of 100 columns."""
    shown = Console(width=100, record=True, force_terminal=False)
    with shown.capture() as capture:
        shown.print(terminal([compare_table(rows, brief=True)]))
    return capture.get()


def test_seeds_become_a_mean_and_half_their_range():
    table = compare_table(ROWS)
    place = {column.heading: number for number, column in enumerate(table.columns)}
    tiger, ours, naive = table.rows
    assert (tiger[0].texts, tiger[1], ours[0].remark) == (["tiger"], "2", "(narrowing)")
    assert tiger[place["collisions"]].places == [("11.00%", "1.00%", True)]
    assert tiger[place["AMI"]].places == [("0.550", "0.050", False), ("0.400", "0.000", False)]
    assert ours[place["AMI"]].places == [("0.700", "", True), ("0.450", "", True)]
    assert tiger[place["codes used"]].best == ours[place["codes used"]].best == [True, True]
    assert naive[place["AMI"]].places == naive[place["s"]].places == []
    assert ours[place["AMI, null"]].best == [False, False]


def test_recall_stands_first_with_its_interval_and_scattered_neighbours_are_named():
    rows = [
        run("tiger", 0, recall=[0.1, 0.3, 0.4], neighbours=[0.8, 0.4, 0.1]),
        run("cat_id2", 0, recall=[0.2, 0.3, 0.5], recall_gain_50=[0.0, -0.01, 0.01], neighbours=[0.9, 0.37, 0.3]),
        run("dis", 0, recall=[0.1, 0.2, 0.3], recall_gain_50=[-0.1, -0.2, -0.05], neighbours=[0.77, 0.39, 0.0]),
    ]
    table = compare_table(rows)
    assert [column.heading for column in table.columns][2:4] == ["recall@10, 50, 100", "@50 − first"]
    assert [row[0].remark for row in table.rows] == ["", "(neighbours apart)", ""]
    assert table.rows[1][2].best == [True, True, True] and table.rows[1][3].texts == ["+0.000", "-0.010", "+0.010"]
    shown = console(rows)
    assert "recall@10" in shown and "codes used" not in shown and "purity" not in shown


def test_the_page_holds_every_figure_and_nothing_from_outside():
    page = compare_page(ROWS, title="A <b> & B", about={"data": "x < y", "steps": "300"})
    found = Balanced(page)
    text = " ".join(found.text)
    for expected in ("A <b> & B", "x < y", "11.00%", "± 1.00%", "0.700", "0.001 -0.002", "1,234", "narrowing"):
        assert expected in text
    assert "A &lt;b&gt; &amp; B" in page and "<script" not in page
    assert len(found.addresses) == 1 and found.addresses[0].startswith("data:image/png;base64,")
    assert found.tags.count("tr") == 1 + 3 + 1 + 4, "a row a kind, then a row a run"


def test_a_kind_that_is_markup_is_text_everywhere():
    rows = [run("<script>|[red]", 0, verdict="<i>")]
    page = Balanced(compare_page(rows, title="t", about={}))
    assert "script" not in page.tags and "i" not in page.tags
    assert "<script>|[red]" in console(rows)
    assert "<script>" not in markdown([compare_table(rows)]) and "\\|[red] (&lt;i&gt;)" in markdown(
        [compare_table(rows)]
    )


def test_the_terminal_table_fits_100_columns():
    rows = [run(kind, seed, codes_used=[256] * 4, purity=[0.9] * 3, ami=[0.5, 0.4, 0.3 + seed / 10], ami_null=[0.001] * 3)
            for kind in ("tiger", "rq_kmeans_balanced") for seed in (0, 1)]  # fmt: skip
    lines = console(rows).splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if "rq_kmeans_balanced" in line).split()
    assert " ".join(row) == "rq_kmeans_balanced 11.00% 20.00% 4 256 256 256 256 .900 .900 .900 .500 .400 .350 1,234"
    assert "±.050 null .001" in console(rows)


def test_markdown_has_a_row_a_kind_and_says_what_the_columns_are():
    lines = markdown([compare_table(ROWS)]).splitlines()
    assert lines[0].startswith("| kind | seeds | collisions |") and len(lines[0].split("|")) == len(lines[2].split("|"))
    assert lines[2].startswith("| tiger | 2 | **11.00%** ±1.00% |") and lines[3].startswith("| cat_id2 (narrowing) |")
    assert lines[4].count("–") == 4, "no category, no time"
    assert markdown([compare_table(ROWS)]).endswith("\n")


def test_nothing_to_compare():
    Balanced(compare_page([], title="empty", about={}))
    assert "kind" in console([]) and markdown([compare_table([])])
    bare = [{"kind": "x", "seed": 0, "collision_rate": 0.0}]
    assert "0.00%" in compare_page(bare, title="bare", about={}) and "x" in console(bare)


@pytest.mark.parametrize("depths", [0, 2])
def test_the_report_of_ids_shows_what_the_numbers_are(depths):
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(60, 4)).astype(np.float32)
    codes, category = rng.integers(0, 4, (60, 3)), rng.integers(0, 3, (60, depths))
    figures = quality.id_quality(codes, category, (4, 4, 4))
    figures |= {
        "floor": {"collision_rate": 0.0, "shared_rate": 0.0},
        "hourglass": quality.hourglass(figures["normalised_entropy"]),
        "prefix_agreement": quality.prefix_agreement(codes, category, pairs=100),
        "neighbour_agreement": quality.neighbour_agreement(codes, embedding, neighbours=3),
        "displacement": quality.displacement_of(np.zeros(0), 60),
        "reconstruction": quality.reconstruction_error(embedding, embedding),
        "added": {"later": [1, "<u>"]},
    }
    examples = [
        {"title": "Red <i>hat", "category": "Hats", "docid": "<a_1><b_2><c_3>", "other_docid": "<a_9><b_1>"},
        {"title": "Blue hat", "category": "Hats", "docid": "<a_1><b_2><c_7>", "other_docid": "<a_8><b_1>"},
        {"title": "Drill", "category": "Tools", "docid": "<a_4><b_2><c_3>"},
    ]
    page = ids_page(figures, {"Codes & layers": Figure(figsize=(1, 1))}, examples, title="IDs of <shop>")
    found = Balanced(page)
    text = " ".join(found.text)
    for expected in (
        "IDs of <shop>",
        f"{figures['collision_rate']:.2%}",
        "Codes & layers",
        "Red <i>hat",
        "added: later",
    ):
        assert expected in text
    assert f"{figures['neighbour_agreement']['share'][0]:.1%}" in text and '[1, "<u>"]' in text
    assert "<mark>&lt;a_1&gt;&lt;b_2&gt;</mark>&lt;c_3&gt;" in page
    assert '<mark class="other"></mark>&lt;a_9&gt;&lt;b_1&gt;' in page
    assert "<mark></mark>&lt;a_4&gt;" in page, "an ID alone in its category shares nothing"
    assert not {"i", "shop", "u"} & set(found.tags)


def test_a_report_without_pictures_and_examples():
    found = Balanced(ids_page({"collision_rate": 0.5}, {}, [], title="short"))
    assert "50.00%" in found.text and found.addresses == [] and found.tags.count("table") == 1


def verdict_of(page) -> str:
    """The sentence on top, and the class that gives it its colour."""
    return page.split('<p class="verdict ')[1].split("</p>")[0]


@pytest.mark.parametrize(
    "used, word, state", [(16, "healthy", "good"), (5, "narrowing", "look"), (1, "collapsed", "bad")]
)
def test_the_page_of_ids_begins_with_a_verdict(used, word, state):
    rng = np.random.default_rng(0)
    codes_NL = np.stack((rng.integers(0, 16, 3000), rng.integers(0, used, 3000)), 1)
    figures = quality.id_quality(codes_NL, np.zeros((3000, 0), int), (16, 16))
    page = ids_page(figures, {}, [], title="t", judgement=judged(figures, shared=True))
    Balanced(page)
    sentence = verdict_of(page)
    assert sentence.startswith(f'{state}"><b>') and f"IDs are {word}: " in sentence
    assert f"{figures['collision_rate']:.1%} of the 3,000 products collide before any ID is moved." in sentence


def test_a_forced_first_level_is_not_judged_and_collisions_are():
    codes_NL = np.stack((np.zeros(3000, int), np.arange(3000) % 16), 1)
    figures = quality.id_quality(codes_NL, np.zeros((3000, 0), int), (16, 16))
    assert judged(figures, shared=True).state == "collapsed" and judged(figures, forced=True).state == "healthy"
    one_ID = quality.id_quality(np.zeros((3000, 2), int), np.zeros((3000, 0), int), (16, 16))
    assert judged(one_ID, forced=True).state == "collapsed"


def test_the_comparison_begins_with_what_was_shown():
    assert verdict_of(compare_page(ROWS, title="t", about={})) == ('look"><b>!</b> Of the kinds, cat_id2 is narrowing.')
    rows = [run("tiger", 0), run("dis", 0, recall_gain_50=[0.02, 0.01, 0.03])]
    found = verdict_of(compare_page(rows, title="t", about={}))
    assert (
        "dis finds most at 50, +0.020 beside tiger (95 %: +0.010 to +0.030); no kind&#39;s codes narrowed or collapsed."
        in found
    )
    rows[1]["recall_gain_50"] = [0.02, -0.01, 0.05]
    found = verdict_of(compare_page(rows, title="t", about={}))
    assert found.startswith('good"') and "No kind was shown to find more at 50 than tiger" in found


def test_examples_are_of_products_with_a_category_where_there_are_any():
    """Table 8: most products without one would fill its first rows."""
    paths = [None, [], None, ["Tools", "Drills"], ["Tools", "Drills"], ["Paint"]]
    sample = {"title": [f"title {row}" for row in range(6)], "path": paths, "docid": [f"<a_{row}>" for row in range(6)]}
    found = examples_of(sample, [f"<b_{row}>" for row in range(6)])
    assert [(one["category"], one["docid"], one["other_docid"]) for one in found] == [
        ("Tools > Drills", "<a_3>", "<b_3>"), ("Tools > Drills", "<a_4>", "<b_4>"), ("Paint", "<a_5>", "<b_5>"),
    ]  # fmt: skip
    none = examples_of(sample | {"path": [None] * 6}, None)
    assert {one["category"] for one in none} == {"no category"} and "other_docid" not in none[0]
