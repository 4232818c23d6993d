"""Draws the figures of BENCHMARKS.md with matplotlib: `plots.py < figures.json`, a program of its own because Debian's
matplotlib is for Debian's Python. `report.py` says what is in them.

A figure: {path, caption, panels}. A panel: {title, x, y, better, log} and either `lines`: {name: [[x, median, least, greatest]]},
`bars`: {group: {name: [median, least, greatest]}} or `series`: {name: [[x, y]]} with `marks`: [[x, words]].
"""

import json
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

COLOURS = {
    "vublkd": "#1b7837", "qsd": "#d95f02", "stock": "#7570b3", "fio": "#555555", "qemu": "#c51b7d",
    "vublkd-poll0": "#5aae61", "vublkd-pin": "#2166ac", "vublkd-threads": "#e7298a",
}
# The same figures make the same file, and text stays text.
plt.rcParams.update({"svg.hashsalt": "vublk", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                     "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True})
MOST_LINES = 4


def number(value, _=None):
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def lines(axes, panel, names):
    assert len(panel["lines"]) <= MOST_LINES, panel["title"]
    ticks = []
    for name, points in panel["lines"].items():
        xs, mids, lows, highs = zip(*points)
        ticks = list(dict.fromkeys([*ticks, *xs]))
        spread = [[m - l for m, l in zip(mids, lows)], [h - m for m, h in zip(mids, highs)]]
        # Percentiles are words: they stand side by side.
        axes.errorbar(xs, mids, yerr=spread, color=COLOURS[name], label=names[name], marker="o", markersize=4, capsize=2,
                      linewidth=2.4 if name == "vublkd" else 1.4)
    if panel.get("log"):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    if ticks and not isinstance(ticks[0], str):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
        axes.xaxis.set_minor_locator(NullLocator())
    if not panel.get("log"):
        axes.set_ylim(bottom=0)


def bars(axes, panel, names):
    groups = list(panel["bars"])
    have = [name for name in names if any(name in group for group in panel["bars"].values())]
    width = 0.8 / len(have)
    for n, name in enumerate(have):
        at = [g + (n - (len(have) - 1) / 2) * width for g, group in enumerate(groups) if name in panel["bars"][group]]
        found = [panel["bars"][group][name] for group in groups if name in panel["bars"][group]]
        spread = [[m - l for m, l, _ in found], [h - m for m, _, h in found]]
        drawn = axes.bar(at, [m for m, *_ in found], width * 0.92, yerr=spread, color=COLOURS[name], label=names[name],
                         error_kw={"elinewidth": 0.8, "ecolor": "#222"})
        axes.bar_label(drawn, [number(m) for m, *_ in found], fontsize=7, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)


def series(axes, panel, names):
    for name, points in panel["series"].items():
        xs, ys = zip(*points)
        axes.plot(xs, ys, color=COLOURS[name], label=names[name], linewidth=1.2)
    axes.set_ylim(bottom=0)
    top = axes.get_ylim()[1]
    for x, words in panel["marks"]:
        axes.axvline(x, color="#222", linewidth=0.8, linestyle=":")
        axes.text(x, top, f" {words}", fontsize=8, va="top")


def draw(figure):
    panels = figure["panels"]
    columns = figure.get("columns", 2)
    rows = -(-len(panels) // columns)
    drawn, grid = plt.subplots(rows, columns, figsize=(9.2, 3.1 * rows + 0.9), squeeze=False)
    labels = {}
    for axes, panel in zip(grid.flat, panels):
        kind = next(kind for kind in (lines, bars, series) if kind.__name__ in panel)
        kind(axes, panel, figure["names"])
        axes.set_title(panel["title"], fontsize=10)
        axes.set_xlabel(panel.get("x", ""))
        axes.set_ylabel(f"{panel['y']} ({panel['better']} is better)")
        axes.yaxis.set_major_formatter(FuncFormatter(number))
        labels.update(dict(zip(*reversed(axes.get_legend_handles_labels()))))
    for axes in list(grid.flat)[len(panels):]:
        axes.set_visible(False)
    height = drawn.get_size_inches()[1]
    drawn.legend(labels.values(), labels.keys(), loc="upper center", ncols=4, frameon=False)
    drawn.text(0.5, 0.04 / height, figure["caption"], fontsize=6.5, color="#444", ha="center", va="bottom")
    drawn.tight_layout(rect=(0, 0.25 / height, 1, 1 - 0.35 / height))
    drawn.savefig(figure["path"], metadata={"Date": None, "Creator": None})
    plt.close(drawn)


for one in json.load(sys.stdin):
    draw(one)
