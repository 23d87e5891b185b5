"""Draws what an update looks like inside: its singular values, its rows, its signs."""
import math
from collections import defaultdict
from copy import deepcopy
from statistics import fmean

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from scipy.stats import linregress
from tqdm import tqdm

from dual_lora import Sign
from experiments.learnt import (Lacking, Sweep, block_and_module, end_of, merged_and_base,
                                pretrained, saved_at, shared_steps, tensors_in, updates)
from experiments.measures import (direction_change, effective_rank, flipped, magnitude_change,
                                  normalised, numerical_rank, switched_off)
from experiments.plots import COLOURS, LABELS, band, label_ends, line_of, panel_grid, plt
from experiments.results import SavedRun
from methods import METHODS, state
from support.flags import adapt
from support.run import fingerprint, read_config


# ---- singular values
def draw_spectra(sweep: Sweep):
    """Draws the singular values of dW, and the ranks that they come to.

    Left: singular values by index, over the largest. A line is the median over layers and seeds,
    its band holds the middle half of them. Layers that differ in size are shown up to the
    shortest's last. Right: effective_rank() and numerical_rank(). A bar is the mean over layers
    and seeds, its grey line reaches from the least seed to the greatest. Beside Dual LoRA's dW
    stand its two parts, and the dW and Sign(DC) of Gaussian factors of the same shapes: what comes
    of the form alone.
    """
    runs = [run for runs in sweep.at(sweep.rank).values() for run in runs]
    sigmas = defaultdict(list)                          # label -> seeds x layers x (k,)
    paths = sweep.layers
    for run in tqdm(runs, "singular values", unit="run"):
        for label, matrices in matrices_of(run, paths).items():
            sigmas[label].append([torch.linalg.svdvals(matrix) for matrix in matrices])
    k = min(len(sigma) for seeds in sigmas.values() for layers in seeds for sigma in layers)
    styles = {LABELS[method]: {"color": COLOURS[method]} for method in METHODS} | {
        "Dual: ReLU(BA)": {"color": COLOURS["dual"], "linestyle": "--"},
        "Dual: Sign(DC)": {"color": COLOURS["dual"], "linestyle": ":"},
        "random dW": {"color": "0.6"}, "random Sign(DC)": {"color": "0.6", "linestyle": ":"}}
    drawn = {"--": "  - -", ":": "  ···"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    numbers, names = {}, []
    for row, (label, seeds) in enumerate(sigmas.items()):
        low, middle, high = np.percentile([normalised(sigma)[:k] for layers in seeds
                                           for sigma in layers], [25, 50, 75], axis=0)
        left.plot(range(1, k + 1), middle, **styles[label])
        left.fill_between(range(1, k + 1), low, high, color=styles[label]["color"], alpha=0.15,
                          linewidth=0)
        names.append(label + drawn.get(styles[label].get("linestyle"), ""))
        numbers[label] = {"median": middle.tolist(), "25 %": low.tolist(), "75 %": high.tolist()}
        for rank_of, y, alpha in ((effective_rank, row - 0.2, 1), (numerical_rank, row + 0.2, 0.4)):
            means = [fmean(map(rank_of, layers)) for layers in seeds]
            right.barh(y, fmean(means), 0.38, color=styles[label]["color"], alpha=alpha)
            right.plot([min(means), max(means)], [y, y], color="0.5", linewidth=2)
            right.text(max(means) + k / 60, y, f"{fmean(means):.1f}", va="center", fontsize=8)
            numbers[label][rank_of.__name__] = means
    left.set(xlabel="index", ylabel="singular value, over the largest", yscale="log",
             ylim=(1e-3, 1.3))
    left.grid(alpha=0.3)
    right.set(xlabel=f"rank, of at most {k}", xlim=(0, 1.15 * k), yticks=range(len(sigmas)),
              yticklabels=names)
    for name, label in zip(right.get_yticklabels(), sigmas):
        name.set_color(styles[label]["color"])
    right.set_title("solid: effective rank; pale: values above 1 %", fontsize=10)
    right.invert_yaxis()
    return figure, numbers


def matrices_of(run: SavedRun, paths: list[str]) -> dict[str, list]:
    """Maps labels to a matrix (out, in) of each layer: dW, Dual LoRA's parts, and their likes."""
    found = {LABELS[run.args.method]: list(updates(run, paths, end_of(run)).values())}
    if run.args.method == "dual":
        tensors, generator = tensors_in(end_of(run)), torch.Generator().manual_seed(run.args.seed)
        gaussian = {name: torch.randn(tensor.shape, generator=generator)
                    for name, tensor in tensors.items()}
        parts, random = ([dual_products(factors, path) for path in paths]
                         for factors in (tensors, gaussian))
        found |= {"Dual: ReLU(BA)": [BA.relu() for BA, _ in parts],
                  "Dual: Sign(DC)": [Sign.apply(DC, 1) for _, DC in parts],
                  "random dW": [BA.relu() * Sign.apply(DC, 1) for BA, DC in random],
                  "random Sign(DC)": [Sign.apply(DC, 1) for _, DC in random]}
    return found


def dual_products(tensors: dict[str, torch.Tensor], path: str) -> tuple:
    """Returns B A and D C (out, in) of a layer."""
    A, B, C, D = (tensors[f"{path}.{name}"].double() for name in "ABCD")
    return B @ A, D @ C


# ---- magnitude and direction of the rows
def draw_dora(sweep: Sweep):
    """Draws magnitude_change() against direction_change() of the query weights.

    A point is a layer, snapshot and seed, from grey at first to coloured at the end. All panels
    share their axes, which are logarithmic since full moves rows far less than adapters do. Small
    pale points are the other methods'. r is Pearson's. The DoRA paper, section 4.1, found r = -0.62
    for full fine-tuning, +0.83 for LoRA and -0.31 for DoRA. The JSON has the line of least squares
    of every module, and r of each seed, and of the layers at one step: both changes grow from 0,
    which alone makes r of all steps positive.
    """
    runs = {method: of_method for method, of_method in sweep.at(sweep.rank).items()
            if all(len(saved_at(run)) > 1 for run in of_method)}
    if not runs:
        raise Lacking("needs a method's runs with several snapshots (--snapshot-every)")
    figure, panels = panel_grid(len(runs), math.ceil(len(runs) / 2) if len(runs) > 3 else
                                len(runs), 2.7)
    numbers = {method: changes_of(of_method, sweep.layers) for method, of_method in runs.items()}
    points = {method: [np.array([point[name] for point in found["points"]])
                       for name in ("direction", "magnitude", "step")]
              for method, found in numbers.items()}
    for axes, method in zip(panels, points):
        for x, y, _ in points.values():
            axes.scatter(x, y, 4, "0.88", linewidths=0)
        x, y, step = points[method]
        axes.scatter(x, y, 12, step, linewidths=0, cmap=LinearSegmentedColormap.from_list(
            "", ["#bbbbbb", COLOURS[method]]))
        r = numbers[method]["lines"][numbers[method]["shown"]]["r"]
        axes.set_title(f"{LABELS[method]}: r = {r:+.2f}", fontsize=11, color=COLOURS[method])
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.supxlabel("change of direction, mean 1 - cos of the rows (grey: early, coloured: late)",
                     fontsize=10)
    figure.supylabel("change of magnitude, mean of the rows", fontsize=10)
    return figure, numbers


def changes_of(runs: list[SavedRun], paths: list[str]) -> dict:
    """Measures a method's changes in every layer, snapshot and seed, and their lines by module."""
    modules = defaultdict(list)
    for run in tqdm(runs, f"changes of {runs[0].args.method}", unit="run"):
        for step, file in saved_at(run).items():
            for path, (W, W0) in merged_and_base(run, paths, file).items():
                modules[block_and_module(path)[1]].append(
                    {"seed": run.args.seed, "step": step, "layer": path,
                     "direction": direction_change(W, W0), "magnitude": magnitude_change(W, W0)})
    shown = "q" if "q" in modules else min(modules)
    return {"shown": shown, "points": modules[shown], "lines": {
        module: line_through(points) | {
            "r of each seed": [line["r"] for line in lines_by(points, "seed")],
            "r of each step and seed": [line["r"] for line in lines_by(points, "step", "seed")]}
        for module, points in modules.items()}}


def line_through(points: list[dict]) -> dict[str, float]:
    """Fits the line of least squares of magnitude over direction, and Pearson's r.

    Raises Lacking if no layer has changed otherwise than another.
    """
    x = [point["direction"] for point in points]
    if len(set(x)) < 2:
        raise Lacking("needs layers whose directions have changed")
    line = linregress(x, [point["magnitude"] for point in points])
    return {"slope": line.slope, "intercept": line.intercept, "r": line.rvalue}


def lines_by(points: list[dict], *names: str) -> list[dict[str, float]]:
    """Fits a line for each value of the names. Two points or less make none."""
    groups = defaultdict(list)
    for point in points:
        groups[tuple(point[name] for name in names)].append(point)
    return [line_through(group) for group in groups.values() if len(group) > 2]


# ---- Dual LoRA's signs
def draw_signs(sweep: Sweep):
    """Draws how many of Dual LoRA's entries are off, and how many of its signs flip, by step.

    The shares are: entries of B A that ReLU switches off; signs of D C that are others than at the
    start; signs that are others than at the snapshot before. A line is the mean over layers and
    seeds, its band reaches from the least seed to the greatest.
    """
    runs = sweep.need("dual")["dual"]
    steps = [0, *shared_steps(runs)]
    shares = []                                     # seeds x steps x 3
    for run in tqdm(runs, "signs", unit="run"):
        start = before = None
        shares.append([])
        for step in steps:
            tensors = tensors_in(saved_at(run)[step]) if step else start_of(run)
            now = [dual_products(tensors, path) for path in sweep.layers]
            start, before = start or now, before or now
            shares[-1].append([fmean(switched_off(BA) for BA, _ in now), *(
                fmean(flipped(DC, old) for (_, DC), (_, old) in zip(now, then))
                for then in (start, before))])
            before = now
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    numbers = {}
    for i, (label, marker, line) in enumerate((("switched off by ReLU", "o", "--"),
                                               ("flipped since the start", "*", "-"),
                                               ("flipped since the point before", "v", ":"))):
        numbers[label] = band(axes, steps, 100 * np.array(shares)[:, :, i], label=label,
                              **line_of("dual") | {"marker": marker, "linestyle": line})
    axes.set(xlabel="step", ylabel="share of the entries, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    label_ends([axes])
    return figure, numbers


def start_of(run: SavedRun) -> dict[str, torch.Tensor]:
    """Makes again the adapters that training began with: the run's seed does, no file holds them.

    Raises Lacking if they come out otherwise on this machine.
    """
    model = deepcopy(pretrained(run))
    torch.manual_seed(run.args.seed)
    adapt(model, run.args)
    if fingerprint(state(model), torch.float32) != read_config(run.folder)["start"]:
        raise Lacking(f"the start of {run.folder}, made on {run.args.device}, comes out otherwise "
                      "here")
    return state(model)
