"""Draws the update that each method has learnt in one layer, entry by entry, with its factors."""
import math

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from experiments.learnt import Sweep, end_of, trained, updates
from experiments.measures import effective_rank, numerical_rank
from experiments.plots import COLOURS, FORMULAS, LABELS, PRODUCTS, plt, symbol
from methods import adapters

SHOWN = 128             # rows and columns of an update that are drawn
GAP = 6                 # entries between two blocks
DRAWN = ["full", "lora", "dora", "adalora", "dash", "dual"]         # the papers' methods


def draw_updates(sweep: Sweep):
    """Draws the update dW (out, in) of each method in one layer, entry by entry.

    The layer is q of the middle block, the run the first seed. The factors stand to scale: (out, n)
    at the left, (n, in) above, diagonals where the two would meet. All panels share the colours
    of dW: entries over dW's root mean square, since the updates' sizes differ more than their
    shapes. DoRA's m is shown as m / ||W0|| - 1. Trained numbers and rank (numerical_rank) are the
    layer's.
    """
    runs = sweep.need(*DRAWN)
    paths = [path for path in sweep.layers if path.endswith(".q")] or sweep.layers
    path = paths[len(paths) // 2]
    layers = {method: adapters(trained(run, end_of(run)))[path].requires_grad_(False)
              for method, (run, *_) in runs.items() if method != "full"}
    run, *_ = runs["full"]
    dW_of = {"full": updates(run, [path], end_of(run))[path]} | {
        method: layer.merged_weight() - layer.W0 for method, layer in layers.items()}
    shape = tuple(dW_of["full"].shape)
    side = min(SHOWN, max(shape))
    edge = 2 * GAP + max(sum(GAP + len(getattr(layer, product.split()[-1]))
                             for product in PRODUCTS[method]) for method, layer in layers.items())
    figure = plt.figure(figsize=(9, 8.3))
    panels = figure.subplot_mosaic(
        [DRAWN[:3], DRAWN[3:], ["key"] * 3], height_ratios=(1, 1, 0.3),
        gridspec_kw={"left": 0.01, "right": 0.99, "top": 0.99, "bottom": 0.01, "wspace": 0.02,
                     "hspace": 0.02})
    numbers = {"layer": path, "shape": shape}
    for method, dW in dW_of.items():
        axes, sigma = panels[method], torch.linalg.svdvals(dW)
        rank, size = numerical_rank(sigma), dW.square().mean().sqrt().item()
        parameters = dW.numel() if method == "full" else sum(
            p.numel() for p in layers[method].parameters(recurse=False))
        draw_block(axes, dW[:SHOWN, :SHOWN], 0, 0, limit=3 * size, colours="RdBu_r")
        if method in layers:
            draw_factors(axes, layers[method], PRODUCTS[method], side)
        axes.text(-edge, -edge - 21, LABELS[method], weight="bold", fontsize=14,
                  color=COLOURS[method])
        axes.text(-edge, -edge - 4, r"$\Delta W =$ " * (method in layers) + FORMULAS[method],
                  fontsize=10.5)
        large = axes.text(0, side + 3, f"{rank}", fontsize=26, weight="bold", va="top",
                          color=COLOURS[method])
        axes.annotate(f"rank, of {len(sigma)}\n{parameters:,} trained", (1, 0.5),
                      (7, 0), large, "offset points", fontsize=10.5, va="center")
        axes.set(xlim=(-edge, side + 18), ylim=(side + 32, -edge - 36))
        axes.axis("off")
        numbers[method] = {"run": runs[method][0].folder.name, "parameters": parameters,
                           "rank": rank, "effective_rank": effective_rank(sigma),
                           "root_mean_square": size}
    draw_key(figure, panels["key"], f"{path} {shape}"
             + f", its first {SHOWN} rows and columns" * (max(shape) > SHOWN))
    return figure, numbers


def draw_factors(axes, layer, products: list[str], side: int) -> None:
    """Draws a layer's factors left of and above dW, whose upper left corner is at 0, 0."""
    out, n_in = layer.W0.shape
    height, width, reach = min(side, out), min(side, n_in), 0
    for product in products:
        left, *diagonal, above = (getattr(layer, name) for name in product.split())
        first, *middle, last = map(symbol, product.split())
        n, start = len(above), -reach - GAP - len(above)
        kept = start + n
        if diagonal:
            c, order = diagonal[0].abs().sort(descending=True)
            kept = start + int(c.count_nonzero())
            left, above = left[:, order].clone(), above[order].clone()
            left[:, c == 0], above[c == 0] = math.nan, math.nan
            draw_block(axes, diagonal[0][order].diag(), start, start)
            axes.text(start - 2, start + n / 2, middle[0], ha="right", va="center")
        draw_block(axes, left[:height], start, 0)
        draw_block(axes, above[:, :width], 0, start)
        if kept < start + n:
            axes.plot([kept, start + n], [0, height], [0, width], [start + n, kept], color="0.3",
                      linewidth=1)
        axes.text(start + n / 2, height + 3, first, ha="center", va="top")
        axes.text(width + 3, start + n / 2, last, va="center")
        reach += n + GAP
    if hasattr(layer, "magnitude"):
        change = layer.magnitude / layer.W0.norm(dim=1) - 1
        draw_block(axes, change[:height, None].expand(-1, 5), width + GAP, 0)
        axes.text(width + GAP + 7, height / 2, "$m$", va="center")


def draw_block(axes, matrix, x: float, y: float, limit: float = 0, colours: str = "PuOr") -> None:
    """Draws a matrix as a heat map, an entry a unit square, its upper left corner at x, y.

    NaN is grey. Without a limit the colours reach to the matrix's own 99th percentile.
    """
    height, width = matrix.shape
    limit = limit or matrix.nan_to_num().abs().flatten().quantile(0.99).item() or 1.0
    axes.imshow(matrix.numpy(), shades(colours), vmin=-limit, vmax=limit,
                interpolation="nearest", extent=(x, x + width, y + height, y))
    axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, color="0.4", linewidth=0.6))


def shades(name: str):
    """Returns a colour map of few colours, which makes a small file."""
    return plt.get_cmap(name, 15).with_extremes(bad="0.8")


def draw_key(figure, axes, layer: str) -> None:
    """Draws the strip below the panels that says what their parts are."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    for place, colours, ticks, label in (
            (0.02, "RdBu_r", (-3, 0, 3), r"$\Delta W$ over its root mean square"),
            (0.37, "PuOr", (), "a factor, to scale")):
        bar = figure.colorbar(ScalarMappable(Normalize(-3, 3), shades(colours)),
                              cax=axes.inset_axes((place, 0.62, 0.26, 0.16)),
                              orientation="horizontal", ticks=ticks)
        bar.set_label(label, fontsize=10.5)
    axes.add_patch(plt.Rectangle((0.72, 0.62), 0.26, 0.16, facecolor="0.8", edgecolor="0.4"))
    axes.plot([0.72, 0.98], [0.62, 0.78], color="0.3", linewidth=1)
    axes.text(0.85, 0.54, "pruned by AdaLoRA", ha="center", va="top", fontsize=10.5)
    axes.text(0.5, 0, f"{layer}. Rank: singular values above 1 % of the largest. $s$: a constant. "
              "$U$, $V^\\top$: $W_0$'s own. $m$: drawn wider.", ha="center", va="bottom",
              fontsize=9.5, color="0.3")
