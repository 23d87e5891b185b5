"""Draws the two schematic pictures, which need no runs: update shapes, and a training step.

    python -m experiments.shapes --out assets     # shapes.png and step.png, with their numbers

shapes.png: the factors of each method's update to scale, for one layer of SIDE x SIDE at rank RANK.
step.png: where the hooks of the methods stand in one step of train.py's loop.
"""
import math
from pathlib import Path

import torch
from matplotlib.patches import FancyBboxPatch
from torch import nn

from experiments.plots import COLOURS, FORMULAS, LABELS, PRODUCTS, plt, save_figure, symbol
from lora import AdapterLinear
from methods import LISTED, METHODS
from support.errors import exit_on_user_error
from support.parser import Parser

SIDE, RANK, STEPS = 128, 8, 200     # 200 steps: more than LoRA-Dash's pre-launch
GAP = 11                            # between two blocks, in entries
TRAINED, FROM_W0 = "#2f7fc1", "0.78"

# One step of fit() in train.py. A method may have the hooks in HOOKS; `start` comes before it.
STEP = ("loss", "backward", "extra_loss", "backward", "clip", "optimizer.step", "on_step",
        "zero_grad")
HOOKS = {"start": {"adalora": "plans its prunings", "dash": "plans when to choose",
                   "dual": "plans its warm-up"},
         "extra_loss": {"adalora": "pulls P, Q towards orthonormal"},
         "on_step": {"adalora": "prunes directions",
                     "dash": "chooses directions",
                     "dual": "raises its warm-up"}}


# ---- the shapes of the updates
def trained_layer(method: str) -> AdapterLinear:
    """Makes a layer and trains it for STEPS steps, from random factors on random gradients.

    Thus AdaLoRA has pruned, LoRA-Dash has chosen its directions, Dual LoRA has warmed up.
    """
    kind, generator = METHODS[method], torch.Generator().manual_seed(0)
    base = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.float64)
    nn.init.normal_(base.weight, generator=generator)
    layer = kind.layer(base, RANK, 2 * RANK, **kind.defaults)
    trained = [p for p in layer.parameters() if p.requires_grad]
    for p in trained:
        nn.init.normal_(p, generator=generator)
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for step in range(STEPS):
        for p in trained:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        layer.on_step([layer], step, STEPS)
    return layer


def shape_of(method: str) -> dict:
    """Counts the numbers that train, the update's rank, and the columns of each factor.

    The rank is that of trained_layer(), which random factors make as high as the form allows.
    """
    if METHODS[method].layer is None:
        return {"trained": SIDE * SIDE, "rank": SIDE, "factors": {}}
    layer = trained_layer(method)
    return {"trained": sum(p.numel() for p in layer.parameters() if p.requires_grad),
            "rank": int(torch.linalg.matrix_rank((layer.merged_weight() - layer.W0).detach())),
            "factors": {product: factors_of(layer, product) for product in PRODUCTS[method]}}


def factors_of(layer: AdapterLinear, product: str) -> dict:
    """Tells of a product's left and right factors: columns, columns not pruned, do they train."""
    left, *diagonal, right = (getattr(layer, name) for name in product.split())
    of_each_column = diagonal[0] if diagonal else right[:, 0]
    return {"columns": len(right), "kept": int(of_each_column.count_nonzero()),
            "trained": isinstance(left, nn.Parameter)}


def draw_shapes():
    """Draws a panel for each method: its formula, its factors to scale, its rank and size."""
    numbers = {method: shape_of(method) for method in PRODUCTS}
    figure, panels = plt.subplots(2, len(PRODUCTS) // 2, figsize=(12, 7.4))
    figure.subplots_adjust(left=0.005, right=0.995, top=0.995, bottom=0.075, wspace=0.04,
                           hspace=0.01)
    for axes, (method, found) in zip(panels.flat, numbers.items()):
        draw_shape(axes, method, found)
    for x, label, look in ((0.10, "trained", {"color": TRAINED}),
                           (0.21, "taken from $W_0$", {"color": FROM_W0}),
                           (0.38, "pruned", {"facecolor": "white", "edgecolor": TRAINED,
                                             "hatch": "/////"}),
                           (0.48, "computed, not stored", {"facecolor": "white",
                                                           "edgecolor": "0.4"})):
        figure.patches.append(plt.Rectangle((x, 0.02), 0.016, 0.026, transform=figure.transFigure,
                                            figure=figure, **look))
        figure.text(x + 0.022, 0.033, label, fontsize=12, va="center")
    figure.text(0.69, 0.033, f"one layer of {SIDE} x {SIDE}, rank {RANK}, to scale", fontsize=12,
                va="center", color="0.35")
    return figure, {"side": SIDE, "rank": RANK, "methods": numbers}


def draw_shape(axes, method: str, found: dict) -> None:
    """Draws one update: a square for dW, its factors at the left and above."""
    # DoRA rescales the rows of W0, HiRA its entries.
    fill = {"full": TRAINED, "dora": FROM_W0, "hira": FROM_W0}.get(method, "white")
    block(axes, 0, 0, SIDE, SIDE, fill, edge="0.4")
    ink = "white" if method == "full" else "black"
    above, below = captions(found)
    for y, words in ((0.2, above), (0.78, below)):
        axes.text(SIDE / 2, y * SIDE, words, fontsize=12, ha="center", va="center", color=ink)
    axes.text(SIDE / 2, 0.5 * SIDE, f"{found['rank']}", fontsize=27, weight="bold", ha="center",
              va="center", color=ink)
    axes.text(SIDE / 2, SIDE + 20, f"{found['trained']:,} trained", fontsize=13, ha="center",
              va="top")
    reach = 0
    for product, sizes in found["factors"].items():
        first, *middle, last = product.split()
        n, kept, start = sizes["columns"], sizes["kept"], -reach - GAP - sizes["columns"]
        colour = TRAINED if sizes["trained"] else FROM_W0
        block(axes, start, 0, kept, SIDE, colour)
        block(axes, 0, start, SIDE, kept, colour)
        if kept < n:
            block(axes, start + kept, 0, n - kept, SIDE, "white", hatch="/////")
            block(axes, 0, start + kept, SIDE, n - kept, "white", hatch="/////")
        if middle:
            axes.plot([start, start + kept], [start, start + kept], color=TRAINED, linewidth=2.5,
                      solid_capstyle="butt")
            block(axes, start, start, n, n, "none", edge="0.4")
            axes.text(start - 3, start + n / 2, symbol(*middle), fontsize=13, ha="right",
                      va="center")
        axes.text(start + n / 2, SIDE + 3, symbol(first), fontsize=12, ha="center", va="top")
        axes.text(SIDE + 4, start + n / 2, symbol(last), fontsize=12, va="center")
        reach += GAP + n
    if method == "dora":
        block(axes, SIDE + GAP, 0, 1, SIDE, TRAINED)
        axes.text(SIDE + GAP + 4, SIDE / 2, symbol("m"), fontsize=12, va="center")
    title = "LoRA, LoRA+" if method == "lora" else LABELS[method]
    axes.text(-53, -95, title, fontsize=17, weight="bold", va="center", color=COLOURS[method])
    axes.text(-53, -64, FORMULAS[method], fontsize=12.5, va="center")
    axes.set(xlim=(-54, SIDE + 20), ylim=(SIDE + 38, -110), aspect="equal")
    axes.axis("off")


def captions(found: dict) -> tuple[str, str]:
    """Returns the words above and below an update's rank."""
    sizes = found["factors"].values()
    if any(product["kept"] < product["columns"] for product in sizes):
        return "mean rank", f"{sum(product['columns'] for product in sizes)} at first"
    kept = [product["kept"] for product in sizes]
    for join, words in ((sum, " + "), (math.prod, " x ")):
        if len(kept) > 1 and join(kept) == found["rank"]:
            return "rank", words.join(map(str, kept))
    return "rank up to" if found["rank"] == SIDE else "rank", ""


def block(axes, x: float, y: float, width: float, height: float, colour: str,
          edge: str = TRAINED, **look) -> None:
    """Draws a rectangle, its upper left corner at x, y."""
    edge = colour if colour == FROM_W0 else edge
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge,
                                 linewidth=0.8, **look))


# ---- one step of training
def overriding(hook: str) -> list[str]:
    """Lists the methods whose class has a hook of its own."""
    common = getattr(AdapterLinear, hook).__func__
    return [method for method in PRODUCTS if (layer := METHODS[method].layer) is not None
            and getattr(layer, hook).__func__ is not common]


def draw_step():
    """Draws one step of the loop as a row of boxes, and which method does what in each hook."""
    used = {hook: overriding(hook) for hook in HOOKS}
    figure = plt.figure(figsize=(12, 2.4))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 12), ylim=(-1.45, 0.95))      # in inches
    axes.axis("off")
    widths = [0.097 * len(name) + 0.24 for name in ("start", *STEP)]
    between = (12 - 0.1 - sum(widths)) / len(STEP)
    x, places = 0.05, []
    for name, width in zip(("start", *STEP), widths):
        if places:
            arrow(axes, (x - between, 0), (x, 0))
        step_box(axes, x, width, name)
        places.append(x)
        x += width + between
    first, last = places[1] + widths[1] / 2, places[-1] + widths[-1] / 2
    axes.plot([last, last, first, first], [0.18, 0.5, 0.5, 0.4], color="0.35", linewidth=1.5)
    arrow(axes, (first, 0.45), (first, 0.18))
    axes.text((first + last) / 2, 0.57, "every step: fit() in train.py", fontsize=13, ha="center",
              va="bottom")
    axes.text(0.05, 0.57, "once", fontsize=13, va="bottom")
    for hook, methods in used.items():
        left = min(places[("start", *STEP).index(hook)], 9.2)       # room for the words
        for line, method in enumerate(methods):
            name = axes.text(left, -0.5 - 0.35 * line, LABELS[method], fontsize=12.5,
                             weight="bold", va="center", color=COLOURS[method])
            axes.annotate(HOOKS[hook][method], (1, 0.5), (5, 0), name, "offset points",
                          fontsize=12.5, va="center")
    none = [LABELS[method] for method in LISTED if method not in sum(used.values(), [])]
    axes.text(6, -0.5 - 0.35 * 2, f"{', '.join(none)} use none of the three", fontsize=12.5,
              ha="center", va="center", color="0.35")
    return figure, {"step": STEP, "hooks": used}


def step_box(axes, x: float, width: float, name: str) -> None:
    """Draws a box with its left edge at x, blue where methods differ."""
    hook = name in HOOKS
    axes.add_patch(FancyBboxPatch((x + 0.06, -0.11), width - 0.12, 0.22, "round,pad=0.06",
                                  facecolor=TRAINED if hook else "0.93",
                                  edgecolor=TRAINED if hook else "0.6"))
    axes.text(x + width / 2, 0, name, fontsize=11.5, ha="center", va="center", family="monospace",
              color="white" if hook else "black", weight="bold" if hook else "normal")


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.35",
                                              "shrinkA": 0, "shrinkB": 0})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("assets"),
                        help="the folder of the pictures (assets)")
    out = parser.parse_args(argv).out
    for name, draw in (("shapes", draw_shapes), ("step", draw_step)):
        figure, numbers = draw()
        save_figure(figure, out / f"{name}.png", numbers)
        print(out / f"{name}.png")


if __name__ == "__main__":
    main()
