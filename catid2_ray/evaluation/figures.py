"""The pictures of the ID reports: arrays in, a matplotlib Figure out; the paper's Figures 3, 4 and 6 among them.

Nothing here knows pyplot, so no global state and no window: a Figure built by itself draws with Agg. Colours are those
of Okabe and Ito, told apart by the colour-blind; where many groups meet, a marker or a place tells them apart as well.

N products, L levels, H category depth, K codes of a level, Z latent.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.manifold import TSNE

from catid2_ray.docid import LEVEL_LETTERS
from catid2_ray.errors import InputError
from catid2_ray.identifiers.quality import prefix_words

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#B3A100")
OTHERS = "#C4C4C4"
MARKERS = "osD^vPX*"
MAP_POINTS = 2_000  # t-SNE of so many points takes some 10 s on one core
# Name, colour and hatching of epochs that are not healthy: hatched, a collapse is told from narrowing without colours.
VERDICT_COLOURS = {"narrowing": ("orange", "#FBE3B5", None), "collapsed": ("red and hatched", "#F0BFA0", "//")}
_WORD = re.compile(r"[^\W\d_]{2,}")
_TEXT = {"fontsize": 9, "color": "#222222"}


def layer_distribution(codes_NL, category_NH, names_by_depth, codes_per_level) -> Figure:
    """How the codes of each level take up the categories (Figure 3).

    Above, a panel per level: every code as a bar of its products, the fullest first, stacked by the 8 commonest
    categories of depth 1; a level that separates them shows bars of one colour, one that does not shows all in each.
    Below, a panel per depth (at most 3): over how many codes exp(H) the 10 commonest categories spread at each level.

    `category_NH` integers, −1 = none; H may be 0. `names_by_depth`: H maps or lists, category → name.
    """
    codes_NL, category_NH = np.asarray(codes_NL), np.asarray(category_NH)
    levels, depths = codes_NL.shape[1], min(category_NH.shape[1], 3)
    heights = [1.35 * levels + 0.6] + [3.6] * (depths > 0)
    figure = _figure(10, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    bars_L = parts[0].subplots(levels, 1, squeeze=False)[:, 0]
    top = _commonest(category_NH[:, 0], 8) if depths else np.empty(0, int)
    for level, (axes, codes) in enumerate(zip(bars_L, codes_per_level)):
        _stacked_use(axes, codes_NL[:, level], category_NH[:, 0] if depths else None, top, codes)
        title = f"level {LEVEL_LETTERS[level]}: {len(np.unique(codes_NL[:, level])):,} of {codes:,} codes used"
        axes.set_title(title, loc="left", fontsize=9)
    bars_L[-1].set_xlabel("codes, the fullest first; dashed: even use", **_TEXT)
    bars_L[levels // 2].set_ylabel("products", **_TEXT)
    if depths:
        names = [_short(_name(names_by_depth[0], category), 34) for category in top] + ["all others"]
        handles = bars_L[0].collections[: len(names)]
        parts[0].legend(handles, names, loc="outside right upper", fontsize=8, title="category, depth 1", frameon=False)
        for depth, axes in enumerate(parts[1].subplots(1, depths, squeeze=False)[0]):
            _spread(axes, codes_NL, category_NH[:, depth], names_by_depth[depth], depth)
        parts[1].supxlabel("over how many codes, exp(entropy), a category spreads at each level", **_TEXT)
    return figure


def _stacked_use(axes, code_N, category_N, top, codes) -> None:
    """Filled steps, one per category on top of the last; codes in falling order of their products."""
    order_K = np.argsort(-np.bincount(code_N, minlength=codes), kind="stable")
    groups = [] if category_N is None else [category_N == category for category in top]
    rest = np.ones(len(code_N), bool) if category_N is None else ~np.isin(category_N, top)
    below_K, edge = np.zeros(codes), np.arange(codes + 1)
    for index, chosen in enumerate([*groups, rest]):
        above_K = below_K + np.bincount(code_N[chosen], minlength=codes)[order_K]
        colour = OTHERS if index == len(groups) and groups else COLOURS[index % len(COLOURS)]
        axes.fill_between(edge, np.append(below_K, 0), np.append(above_K, 0), step="post", color=colour, linewidth=0)
        below_K = above_K
    axes.axhline(len(code_N) / codes, color="#222222", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, codes), ylim=(0, None))
    _plain(axes)


def _spread(axes, codes_NL, category_N, names, depth) -> None:
    """A table in colour: perplexity of the codes of each level among the products of one category."""
    top, levels = _commonest(category_N, 10), codes_NL.shape[1]
    spread_CL = np.zeros((len(top), levels))
    for row, category in enumerate(top):
        for level in range(levels):
            share = np.unique(codes_NL[category_N == category, level], return_counts=True)[1]
            share = share / share.sum()
            spread_CL[row, level] = np.exp(-(share * np.log(share)).sum())
    if len(top):
        axes.imshow(np.log(spread_CL), cmap="Blues", aspect="auto", vmin=0, vmax=max(np.log(spread_CL).max(), 1e-9))
    for (row, level), value in np.ndenumerate(spread_CL):
        dark = np.log(value) > 0.55 * np.log(spread_CL).max()
        axes.text(level, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(levels), LEVEL_LETTERS[:levels], fontsize=9)
    axes.set_yticks(range(len(top)), [_short(_name(names, category), 24) for category in top], fontsize=8)
    axes.set_title(f"codes per category, depth {depth + 1}", fontsize=9, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def latent_map(latent_NZ, category_N, names, *, seed) -> Figure:
    """t-SNE of latents, coloured by the 8 commonest categories (Figure 4); at most MAP_POINTS products, by `seed`.

    `latent_NZ`: floats N×Z, or a list of (title, latent) of the same N products, a panel each. Distances between
    panels, and between far groups in one, mean nothing. Raises InputError for fewer than 5 products.
    """
    panels = latent_NZ if isinstance(latent_NZ, (list, tuple)) else [("", latent_NZ)]
    panels, category_N = [(title, np.asarray(latent)) for title, latent in panels], np.asarray(category_N)
    if any(len(latent) != len(category_N) for _, latent in panels) or len(category_N) < 5:
        raise InputError(
            f"a map needs 5 products or more, each with a category, found {len(category_N)} categories and "
            f"{[len(latent) for _, latent in panels]} latents"
        )
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(category_N), min(MAP_POINTS, len(category_N)), replace=False))
    category_N = category_N[rows]
    top = _commonest(category_N, 8)
    groups = [(~np.isin(category_N, top), OTHERS, ".", "all others")] + [
        (category_N == category, COLOURS[rank], MARKERS[rank], _short(_name(names, category), 34))
        for rank, category in enumerate(top)
    ]
    figure = _figure(min(5.0 * len(panels), 15), 5.6)
    for axes, (title, latent) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        settings = {"perplexity": min(30, (len(rows) - 1) / 3), "init": "pca" if latent.shape[1] > 1 else "random"}
        place = TSNE(random_state=seed, **settings).fit_transform(latent[rows].astype(np.float32))
        for chosen, colour, marker, label in groups:
            if chosen.any():
                axes.scatter(*place[chosen].T, s=11, c=colour, marker=marker, linewidths=0, alpha=0.8, label=label)
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#BBBBBB")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False, markerscale=1.6)
    return figure


def title_words(title: str) -> list[str]:
    """Lower-case words of two letters or more, without English function words."""
    return [word for word in _WORD.findall(title.lower()) if word not in ENGLISH_STOP_WORDS]


def prefix_terms(
    titles: Sequence[str],
    codes_NL,
    words: Callable[[str], Sequence[str]] = title_words,
    *,
    prefixes: int = 6,
    terms: int = 8,
) -> Figure:
    """The words that mark the fullest first-level codes, a panel each (Figure 6, as bars instead of clouds).

    `words` cuts a title into words; `quality.prefix_words` ranks them. Bars: share of the titles under the prefix
    that have the word; the tick on a bar: the share elsewhere.
    """
    panels = prefix_words([set(words(title)) for title in titles], codes_NL, prefixes=prefixes, terms=terms)
    columns = min(3, max(len(panels), 1))
    rows = max(-(-len(panels) // columns), 1)
    figure = _figure(max(3.4 * columns, 5), rows * (0.23 * terms + 0.75))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels):
        places = range(len(panel["words"]))
        axes.barh(places, panel["share"], color=COLOURS[0], height=0.72)
        axes.plot(panel["elsewhere"], places, "|", markersize=9, markeredgewidth=2, color=COLOURS[1])
        axes.set_yticks(places, [_short(word, 16) for word in panel["words"]], fontsize=9)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"<a_{panel['code']}>  {panel['products']:,} products", fontsize=9, loc="left")
        _plain(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("share of titles with the word; orange: share among all other products", **_TEXT)
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _commonest(category_N, count) -> np.ndarray:
    """The most frequent values from 0 on, the commonest first; ties in rising order."""
    value, frequency = np.unique(category_N[category_N >= 0], return_counts=True)
    return value[np.argsort(-frequency, kind="stable")][:count]


def _name(names: Mapping | Sequence, category) -> str:
    if isinstance(names, Mapping):
        return str(names.get(int(category), f"category {category}"))
    return str(names[category]) if category < len(names) else f"category {category}"


def _short(text: str, length: int) -> str:
    """Cut to `length` characters; a dollar sign would start mathematics."""
    text = text if len(text) <= length else text[: length - 1].rstrip() + "…"
    return text.replace("$", r"\$")


_PER_LEVEL = {
    "codes_used": "codes used",
    "perplexity": "perplexity (codes)",
    "normalised_entropy": "normalised entropy",
    "top_share": "share of top 1 % of codes",
    "dead": "dead codes",
    "quantization_error": "quantisation error",
}
_NOT_DRAWN = {"epoch", "verdict", "levels", "step", "steps", "seconds", *_PER_LEVEL}


def training_curves(history: Sequence[Mapping], *, unit: str = "epoch") -> Figure:
    """A panel per figure of a history.json (one record an epoch, or whatever `unit` names); what no record holds is left out.

    Every plain number is a panel, a mapping (`gradient_norm`) or a list (`anchors`, by depth) is one of several lines,
    `levels` gives a panel per figure with a line per level. Epochs whose `verdict` is not healthy stand on colour.
    """
    epochs = [record.get("epoch", number) for number, record in enumerate(history)]
    panels: dict[str, dict[str, list]] = {}
    keys = dict.fromkeys(key for record in history for key in record if key not in _NOT_DRAWN)
    for key in keys:
        for number, record in enumerate(history):
            for line, value in _lines_of(key, record.get(key)):
                panels.setdefault(key, {}).setdefault(line, [np.nan] * len(history))[number] = value
    for key, title in _PER_LEVEL.items():
        for number, record in enumerate(history):
            for level, figures in enumerate(record.get("levels") or ()):
                if isinstance(figures.get(key), (int, float)):
                    lines = panels.setdefault(title, {})
                    lines.setdefault(LEVEL_LETTERS[level], [np.nan] * len(history))[number] = figures[key]
    rows = max(-(-len(panels) // 3), 1)
    figure = _figure(10, 2.15 * rows + 0.3)
    grid = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes, (title, lines) in zip(grid, panels.items()):
        _curve(axes, title.replace("_", " "), epochs, lines, [record.get("verdict") for record in history])
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    seen = [verdict for verdict in VERDICT_COLOURS if any(record.get("verdict") == verdict for record in history)]
    figure.supxlabel(unit + "".join(f"; {VERDICT_COLOURS[verdict][0]}: {verdict}" for verdict in seen), **_TEXT)
    return figure


def _lines_of(key, value):
    """(line, number) of one history value: '' names a line that is alone."""
    lines = [("", value)]
    if isinstance(value, Mapping):
        lines = list(value.items())
    elif isinstance(value, (list, tuple)):
        word = "depth " if key == "anchors" else ""
        lines = [(f"{word}{place}", part) for place, part in enumerate(value, 1)]
    return [(str(line), part) for line, part in lines if isinstance(part, (int, float)) and not isinstance(part, bool)]


def _curve(axes, title, epochs, lines, verdicts) -> None:
    styles = ("-", "--", "-.", ":")
    for index, (label, values) in enumerate(lines.items()):
        colour, style = COLOURS[index % len(COLOURS)], styles[index % len(styles)]
        axes.plot(
            epochs, values, style, color=colour, marker="." if len(epochs) < 20 else "", linewidth=1.4, label=label
        )
    for epoch, verdict in zip(epochs, verdicts):
        if verdict in VERDICT_COLOURS:
            _, colour, hatch = VERDICT_COLOURS[verdict]
            axes.axvspan(
                epoch - 0.5, epoch + 0.5, facecolor=colour, edgecolor="#E0935F", hatch=hatch, linewidth=0, zorder=0
            )
    positive = [value for values in lines.values() for value in values if value > 0]
    if title == "gradient norm" and positive and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    if len(lines) > 1:
        # Beside the panel: inside it would lie on the lines.
        axes.legend(
            fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, handlelength=1.5
        )
    axes.set_title(title, fontsize=9, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _plain(axes)


def comparison(rows: Sequence[Mapping]) -> Figure:
    """The runs of compare-ids, a line of the picture per kind in the order of `rows`: mean over seeds, bar = range.

    Panels: AMI per depth with its null (hollow), the collision rate, and the codes used at each level, in per cent
    where the rows hold `codes_per_level`, else as counts. Keys as `compare-ids` writes them.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    runs = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    depths = max((len(row.get("ami") or ()) for row in rows), default=0)
    figure = _figure(10, (0.27 * len(kinds) + 1.0) * (1 + (depths > 0)))
    above, below = (figure.subfigures(2, 1)) if depths else (None, figure.subfigures(1, 1))
    for depth, axes in enumerate(
        above.subplots(1, depths, sharey=True, sharex=True, squeeze=False)[0] if depths else ()
    ):
        values = {key: [_at(runs[kind], key, depth) for kind in kinds] for key in ("ami", "ami_null")}
        _ranges(axes, values["ami_null"], COLOURS[1], hollow=True)
        _ranges(axes, values["ami"], COLOURS[0])
        axes.set_title(f"AMI, {depth + 1} token{'s' * (depth > 0)} with depth {depth + 1}", fontsize=9, loc="left")
        _kind_axis(axes, kinds)
    if depths:
        above.supxlabel("filled: mean over seeds, bar: their range; hollow: permuted categories", **_TEXT)
    left, right = below.subplots(1, 2, sharey=True)
    _ranges(left, [[row["collision_rate"] for row in runs[kind]] for kind in kinds], COLOURS[4])
    left.set_title("collision rate", fontsize=9, loc="left")
    left.set_xlim(0, None)
    left.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    _kind_axis(left, kinds)
    _codes_used(right, [runs[kind] for kind in kinds])
    return figure


def _at(runs, key, place) -> list[float]:
    """The numbers at one place of a list in several runs; runs without it are left out."""
    lists = [run.get(key) or () for run in runs]
    return [values[place] for values in lists if len(values) > place and values[place] is not None]


def _ranges(axes, values_of_kinds, colour, *, hollow=False) -> None:
    drawn = [(place, np.asarray(values, float)) for place, values in enumerate(values_of_kinds) if len(values)]
    mean = np.array([values.mean() for _, values in drawn])
    reach = np.array([[values.mean() - values.min(), values.max() - values.mean()] for _, values in drawn]).reshape(
        -1, 2
    )
    axes.errorbar(
        mean, [place for place, _ in drawn], xerr=reach.T.clip(0), linestyle="", marker="o", markersize=5.5, color=colour,
        markerfacecolor="white" if hollow else colour, elinewidth=1.6, capsize=3,
    )  # fmt: skip


def _kind_axis(axes, kinds) -> None:
    axes.set_yticks(range(len(kinds)), [_short(kind, 30) for kind in kinds], fontsize=8)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    _plain(axes)


def _codes_used(axes, runs_of_kinds) -> None:
    levels = max((len(row.get("codes_used") or ()) for runs in runs_of_kinds for row in runs), default=0)
    share_KL = np.full((len(runs_of_kinds), max(levels, 1)), np.nan)
    for (place, level), _ in np.ndenumerate(share_KL):
        used, offered = (_at(runs_of_kinds[place], key, level) for key in ("codes_used", "codes_per_level"))
        if used:
            share = share_KL[place, level] = np.mean(used) / np.mean(offered) if offered else np.nan
            text = f"{100 * share:.0f} %" if offered else f"{np.mean(used):,.0f}"
            axes.text(
                level, place, text, ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "black"
            )
    axes.imshow(share_KL, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    axes.set_xticks(range(share_KL.shape[1]), LEVEL_LETTERS[: share_KL.shape[1]], fontsize=9)
    axes.set_title("codes used, by level", fontsize=9, loc="left")
    axes.tick_params(length=0, labelleft=False)
    axes.spines[:].set_visible(False)
