"""Shares what the figures have in common: names, colours, panels, labels, and saving."""
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from PIL import Image

from support.files import atomic_write

matplotlib.use("Agg")           # files only: no window, no display needed
from matplotlib import pyplot as plt  # noqa: E402


class Labels(dict):
    """Maps a method to its name. One of your own is called what METHODS calls it."""

    def __missing__(self, method: str) -> str:
        return method


LABELS = Labels({
    "full": "full", "lora": "LoRA", "lora+": "LoRA+", "dora": "DoRA", "adalora": "AdaLoRA",
    "dash": "LoRA-Dash", "dual": "Dual LoRA", "loha": "LoHa", "hira": "HiRA",
    "frozen": "frozen layer"})
# Okabe and Ito's palette, which colour-blind readers can tell apart; markers for print. Methods of
# one's own share what is left.
COLOURS = defaultdict(lambda: "#44AA99", {
    "full": "#000000", "lora": "#0072B2", "lora+": "#56B4E9", "dora": "#009E73",
    "adalora": "#E69F00", "dash": "#CC79A7", "dual": "#D55E00", "loha": "#882255",
    "hira": "#7A7A00", "frozen": "#999999"})
MARKERS = defaultdict(lambda: "X", {
    "full": "s", "lora": "o", "lora+": "P", "dora": "^", "adalora": "D", "dash": "v", "dual": "*",
    "loha": "p", "hira": "h", "frozen": "."})
# The products that an update is made of, each the layer's attributes from left to right. s is the
# scale: alpha over the rank, or what stands for it.
PRODUCTS = {"full": [], "lora": ["B A"], "dora": ["B A"], "adalora": ["P lam Q"],
            "dash": ["B A", "U coords Vt"], "dual": ["B A", "D C"],
            "loha": ["B A", "D C"], "hira": ["B A"]}
FORMULAS = {"full": "every weight trains",
            "lora": "$s\\,BA$",
            "dora": r"$m\,\frac{W_0+s\,BA}{\|W_0+s\,BA\|}-W_0$",
            "adalora": r"$s\,P\,\mathrm{diag}(\lambda)\,Q$",
            "dash": r"$s\,BA+U\,\mathrm{diag}(c)\,V^\top$",
            "dual": r"$s\,\mathrm{ReLU}(BA)\odot\mathrm{Sign}(DC)$",
            "loha": r"$s\,(BA)\odot(DC)$", "hira": r"$W_0\odot(BA)$"}


def symbol(name: str) -> str:
    """Returns the letter of a factor as it is printed."""
    letter = {"lam": r"\lambda", "coords": "c", "Vt": r"V^\top"}.get(name, name)
    return f"${letter}$"


def line_of(method: str) -> dict:
    """Returns plot()'s arguments for the method's line."""
    return {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5, "linewidth": 1.4}


def panel_grid(n: int, columns: int, row_height: float):
    """Lays out n panels on common axes, row by row. Returns the figure and the list of axes."""
    rows = math.ceil(n / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(9, row_height * rows), sharex=True,
                                  sharey=True, squeeze=False, layout="constrained")
    for axes in panels.flat[n:]:
        axes.remove()
    for axes in panels.flat[max(0, n - columns):n]:     # the lowest of each column
        axes.tick_params(labelbottom=True)
    return figure, list(panels.flat[:n])


def a_panel_each(ranks: list[int | None], ylabel: str):
    """Lays out a panel for each rank. Returns the figure and rank -> axes."""
    figure, panels = panel_grid(len(ranks), min(2, len(ranks)), 4.2 if len(ranks) <= 2 else 3.2)
    for axes, rank in zip(panels, ranks):
        axes.set_title(f"rank {rank}" if rank else "", fontsize=11)
        axes.grid(alpha=0.3)
    figure.supylabel(ylabel, fontsize=10)
    return figure, dict(zip(ranks, panels))


def band(axes, x: list, lines: list[list[float]], **style) -> dict:
    """Draws the mean of the seeds' lines in a band from their least to their greatest."""
    y = np.array(lines)
    axes.plot(x, y.mean(0), **style)
    axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.2, linewidth=0)
    return {"x": x, "seeds": y.tolist(), "mean": y.mean(0).tolist()}


def label_ends(panels, fontsize: float = 9) -> None:
    """Writes the name of each labelled line at the right of its panel, level with its end.

    Names that would overlap are moved apart, and a thin line leads from each end to its name. Call
    it last: the panels' limits must stand.
    """
    panels = list(panels)
    panels[0].figure.draw_without_rendering()       # lays out, which gives the panels' heights
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        lines = [handle if isinstance(handle, plt.Line2D) else handle[0] for handle in handles]
        ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
        to_axes = axes.transAxes.inverted()
        heights = [to_axes.transform(line.get_transform().transform(end))[1]
                   for line, end in zip(lines, ends)]
        height_in_points = axes.get_window_extent().height * 72 / axes.figure.dpi
        places = moved_apart(heights, 1.25 * fontsize / height_in_points)
        for line, label, end, place in zip(lines, labels, ends, places):
            axes.annotate(label, end, (1.04, place), line.get_transform(), "axes fraction",
                          {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.7,
                           "alpha": 0.6, "linestyle": ":", "shrinkA": 1, "shrinkB": 0},
                          color=line.get_color(), fontsize=fontsize, va="center")


def moved_apart(places: list[float], gap: float) -> list[float]:
    """Moves numbers until all are `gap` apart, in their order, with the least squares of moves.

    Less `gap` times its position in the order, each number may equal its neighbour but not pass
    it: neighbours that would pass take their common mean (isotonic regression).
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[list[float]] = []
    for position, i in enumerate(order):
        groups.append([places[i] - gap * position])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    moved = [fmean(group) for group in groups for _ in group]
    found = {i: moved[position] + gap * position for position, i in enumerate(order)}
    return [found[i] for i in range(len(places))]


def save_figure(figure: plt.Figure, path: Path, numbers) -> None:
    """Writes the PNG, and beside it its numbers as JSON."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
        colours = Image.open(temporary).convert("RGB").quantize(256)     # a third of the bytes
        colours.save(temporary, format="png", optimize=True)
    plt.close(figure)
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
