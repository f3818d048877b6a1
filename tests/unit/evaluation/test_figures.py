"""The figures have the panels and numbers that they should, also for tables with no category, one level or one code.

How they look is for eyes; here each is drawn once, so that what only fails on drawing fails here.
"""

import io

import numpy as np
import pytest

from catid2_ray.errors import InputError
from catid2_ray.evaluation import figures

NAMES = [{0: "Tools & $aws", 1: "Paint"}, [f"leaf {number}" for number in range(12)]]


def drawn(figure):
    figure.savefig(io.BytesIO(), format="png", dpi=40)
    return [axes for axes in figure.axes if axes.get_visible()]


@pytest.fixture
def catalogue():
    rng = np.random.default_rng(0)
    leaf = rng.integers(0, 12, 150)
    category = np.column_stack([leaf // 6, leaf])
    category[::10, 1] = -1
    return np.column_stack([leaf // 2, rng.integers(0, 4, 150), rng.integers(0, 4, 150)]), category


def test_layers_have_a_panel_per_level_and_per_depth(catalogue):
    codes, category = catalogue
    panels = drawn(figures.layer_distribution(codes, category, NAMES, (6, 4, 5)))
    assert [axes.get_title(loc="left") for axes in panels] == [
        "level a: 6 of 6 codes used",
        "level b: 4 of 4 codes used",
        "level c: 4 of 5 codes used",
        "codes per category, depth 1",
        "codes per category, depth 2",
    ]
    spread = [text.get_text() for text in panels[3].texts]
    assert spread[0] == "3" and len(spread) == 2 * 3, "a category of depth 1 lies on 3 of the first codes"
    assert len(panels[4].texts) == 10 * 3


def test_stacked_bars_add_up_to_the_use_of_each_code(catalogue):
    codes, category = catalogue
    bars = figures.layer_distribution(codes, category, NAMES, (6, 4, 5)).axes[2]
    top = max(part.get_paths()[0].vertices[:, 1].max() for part in bars.collections)
    assert top == np.bincount(codes[:, 2]).max()


@pytest.mark.parametrize("levels", [1, 3])
def test_layers_without_categories(catalogue, levels):
    codes = catalogue[0][:, :levels]
    assert len(drawn(figures.layer_distribution(codes, np.empty((150, 0), int), [], (6, 4, 5)[:levels]))) == levels
    none = figures.layer_distribution(codes, np.full((150, 1), -1), [{}], (6, 4, 5)[:levels])
    assert len(drawn(none)) == levels + 1


def test_latent_maps_are_drawn_side_by_side(catalogue):
    latent = np.random.default_rng(1).normal(size=(150, 6))
    leaf = catalogue[1][:, 1]
    figure = figures.latent_map([("before", latent), ("after", latent * [9, 1, 1, 1, 1, 1])], leaf, NAMES[1], seed=3)
    panels = drawn(figure)
    assert [axes.get_title() for axes in panels] == ["before", "after"]
    assert sum(len(points.get_offsets()) for points in panels[0].collections) == 150
    assert len(panels[0].collections) == 9 and len(figure.legends[0].get_texts()) == 9
    small = [figures.latent_map(latent[:30], np.full(30, -1), {}, seed=3).axes[0].collections[0] for _ in range(2)]
    assert np.array_equal(small[0].get_offsets(), small[1].get_offsets())
    with pytest.raises(InputError, match="5 products or more"):
        figures.latent_map(latent[:4], leaf[:4], NAMES[1], seed=0)


def test_a_large_map_is_a_sample(monkeypatch, catalogue):
    monkeypatch.setattr(figures, "MAP_POINTS", 20)
    latent = np.random.default_rng(1).normal(size=(150, 2))
    panel = figures.latent_map(latent, catalogue[1][:, 0], NAMES[0], seed=0).axes[0]
    assert sum(len(points.get_offsets()) for points in panel.collections) == 20


def test_terms_are_those_that_mark_the_prefix():
    titles = [
        "red drill set",
        "cordless drill kit",
        "drill for wood",
        "wall paint red",
        "paint for wood",
        "gloss paint",
    ]
    codes = np.array([[5, 0], [5, 1], [5, 0], [2, 0], [2, 1], [2, 1]])
    panels = drawn(figures.prefix_terms(titles, codes, terms=3))
    assert [axes.get_title(loc="left") for axes in panels] == ["<a_2>  3 products", "<a_5>  3 products"]
    assert [axes.get_yticklabels()[0].get_text() for axes in panels] == ["paint", "drill"]
    assert panels[0].patches[0].get_width() == 1.0 and panels[0].lines[0].get_xdata()[0] == 0.0
    assert figures.title_words("The 20V MAX* Drill/Driver, 1/2-in.") == ["max", "drill", "driver"]
    assert len(drawn(figures.prefix_terms(titles, codes, str.split, prefixes=1))) == 1
    drawn(figures.prefix_terms(["", ""], np.zeros((2, 1), int)))


def test_training_curves_leave_out_what_is_absent():
    level = {"codes_used": 3, "perplexity": 2.5, "dead": 1}
    history = [{"epoch": epoch, "loss": 2.0 - epoch, "levels": [level, level]} for epoch in range(3)]
    assert [axes.get_title(loc="left") for axes in drawn(figures.training_curves(history))] == [
        "loss", "codes used", "perplexity (codes)", "dead codes",
    ]  # fmt: skip
    history[1] |= {"verdict": "collapsed", "gradient_norm": {"rq": 100.0, "hcc": 0.1}, "anchors": [7, 3], "hcc": None}
    history[2] |= {"hcc": 0.5, "codes_used": [3, 3], "healthy": True}
    figure = figures.training_curves(history)
    panels = {axes.get_title(loc="left"): axes for axes in drawn(figure)}
    assert list(panels) == [
        "loss", "gradient norm", "anchors", "hcc", "codes used", "perplexity (codes)", "dead codes",
    ]  # fmt: skip
    assert [line.get_label() for line in panels["anchors"].lines] == ["depth 1", "depth 2"]
    assert panels["gradient norm"].get_yscale() == "log" and "red and hatched: collapsed" in figure.get_supxlabel()
    assert drawn(figures.training_curves([])) == []


def test_legends_of_training_lie_beside_their_panels():
    """Inside they would cover the lines."""
    level = {"normalised_entropy": 0.9, "quantization_error": 0.1}
    history = [{"epoch": epoch, "gradient_norm": {"reconstruction": 100.0, "dispersion": 0.1}, "levels": [level] * 4}
               for epoch in range(3)]  # fmt: skip
    figure = figures.training_curves(history)
    panels = drawn(figure)
    assert len(panels) == 3 and all(axes.get_legend() for axes in panels)
    for axes in panels:
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 >= axes.get_window_extent().x1 and legend.x1 <= figure.bbox.x1
        others = [other.get_window_extent() for other in panels if other is not axes]
        assert not any(legend.overlaps(other) for other in others)


def run(kind, seed, **other):
    return {
        "kind": kind, "seed": seed, "collision_rate": 0.1 + seed / 100, "shared_rate": 0.2, "largest_shared": 4,
        "codes_used": [8, 6], "perplexity": [7.0, 5.0], "purity": [0.9, 0.8], "ami": [0.5 + seed / 10, 0.4],
        "ami_null": [0.0, 0.0], "seconds": 2.0,
    } | other  # fmt: skip


def test_comparison_shows_the_mean_and_the_range_of_seeds():
    rows = [run("tiger", 0, codes_per_level=[8, 8]), run("tiger", 1, codes_per_level=[8, 8]), run("$x$", 0)]
    panels = drawn(figures.comparison(rows))
    assert len(panels) == 4 and panels[0].get_title(loc="left") == "AMI, 1 token with depth 1"
    ami = panels[0].containers[1]
    assert np.allclose(ami.lines[0].get_xdata(), [0.55, 0.5])
    assert np.allclose(ami.lines[2][0].get_segments()[0][:, 0], [0.5, 0.6])
    assert [text.get_text() for text in panels[3].texts] == ["100 %", "75 %", "8", "6"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["tiger", r"\$x\$"]


def test_comparison_of_a_kind_without_categories_or_codes():
    bare = run("dsi_naive", 0, ami=[], ami_null=[], purity=[], codes_used=[])
    assert len(drawn(figures.comparison([bare]))) == 2
    assert len(drawn(figures.comparison([bare, run("tiger", 0)]))) == 4
