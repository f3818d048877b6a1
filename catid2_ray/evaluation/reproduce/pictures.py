"""The pictures of the report: what each method finds, and Figure 5. Told apart without colours by place, marker and text."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from catid2_ray.evaluation.figures import COLOURS, MARKERS
from catid2_ray.evaluation.reproduce.scores import Scored
from catid2_ray.evaluation.reproduce.significance import Compared

_FAMILIES = {
    "lexical": "words",
    "dense": "vectors",
    "fusion": "words and vectors",
    "ids": "IDs, by the proxy",
    "release": "a release in full",
    "generator": "IDs, by a generator in full",
    "run": "another search",
}
_TEXT = {"fontsize": 9, "color": "#222222"}


def overview(scored: Sequence[Scored], comparison: Compared, k: int) -> Figure:
    """A point and an interval for each method, the best on top; its family by marker and colour."""
    order = sorted(scored, key=lambda one: comparison.intervals[one.name].mean)
    figure = Figure(figsize=(9, 0.34 * len(order) + 1.3), layout="constrained")
    axes = figure.subplots()
    families = list(_FAMILIES)
    for place, one in enumerate(order):
        mean, low, high = (100 * x for x in comparison.intervals[one.name])
        look = families.index(one.family)
        axes.plot([low, high], [place, place], color=COLOURS[look], linewidth=2)
        axes.plot(mean, place, MARKERS[look], color=COLOURS[look], markersize=7)
        axes.text(high, place, f"  {mean:.1f}", va="center", **_TEXT)
    axes.set_yticks(range(len(order)), [one.title for one in order], fontsize=8)
    used = sorted({families.index(one.family) for one in order})
    handles = [
        axes.plot([], [], MARKERS[look], color=COLOURS[look], label=_FAMILIES[families[look]])[0] for look in used
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(used), fontsize=8, frameon=False)
    axes.set_xlabel(f"recall@{k} in per cent; lines: 95 % intervals over queries", **_TEXT)
    axes.set(xlim=(0, None), ylim=(-0.6, len(order) - 0.4))
    axes.margins(x=0.12)
    axes.grid(axis="x", color="#E4E4E4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def sweeps(scored: Sequence[Scored], at: Mapping[int, Compared], weights: Mapping[str, tuple]) -> Figure:
    """A column for each weight and for K, a row for each cut-off; points are means over seeds, bars intervals over queries."""
    of = {one.name: one for one in scored}
    panels: list[tuple[str, list[tuple[str, list[tuple[float, str]]]]]] = [
        (letter, [("CAT-ID²", [(value, f"{name}_{value:g}") for value in values])])
        for letter, (name, values) in weights.items()
    ]
    sizes = (64, 128, 256, 512)
    kinds = (("tiger", "TIGER"), ("cat_id2", "CAT-ID²"))
    panels.append(("K", [(title, [(codes, f"{kind}_k{codes}") for codes in sizes]) for kind, title in kinds]))
    cuts = list(at)
    figure = Figure(figsize=(11, 2.6 * len(cuts) + 0.4), layout="constrained")
    grid = figure.subplots(len(cuts), len(panels), squeeze=False, sharey="row")
    for row, k in enumerate(cuts):
        for axes, (letter, lines) in zip(grid[row], panels):
            values = sorted({value for _, points in lines for value, _ in points})
            for line, (title, points) in enumerate(lines):
                known = [(values.index(value), at[k].intervals[name]) for value, name in points if name in of]
                if not known:
                    continue
                look = 0 if title == "CAT-ID²" else 1
                centre = [100 * interval.mean for _, interval in known]
                reach = [[100 * (i.mean - i.low) for _, i in known], [100 * (i.high - i.mean) for _, i in known]]
                axes.errorbar([x + 0.08 * line for x, _ in known], centre, yerr=reach, color=COLOURS[look], marker=MARKERS[look],
                              linestyle="--" if look else "-", capsize=3, label=title)  # fmt: skip
            axes.set_xticks(range(len(values)), [f"{value:g}" for value in values], fontsize=8)
            axes.set_xlabel(letter, **_TEXT)
            axes.grid(axis="y", color="#E4E4E4")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if letter == "K" and axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, frameon=False)
        grid[row][0].set_ylabel(f"recall@{k}, per cent", **_TEXT)
    return figure
