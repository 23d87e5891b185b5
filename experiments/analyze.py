"""Figures of what the methods learnt, from the folders of saved runs.

    python -m experiments.analyze runs      every figure that these runs allow, into runs/figures
    python -m experiments.analyze runs --figures loss,spectra --out assets
The runs are those of a sweep (ablate.py). Where several ranks were run, a figure of one rank takes
the rank with the most runs; of several, the largest. A figure by step needs snapshots: give
train.py or ablate.py --snapshot-every. Beside each PNG stand its numbers as JSON; what they are is
said once, in the docstring of the figure's function. Weights are (out, in); dW = W' - W0 is what a
run has changed in one layer.
"""
import math
import re
from argparse import Namespace
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import LogLocator
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.stats import linregress
from torch import nn
from tqdm import tqdm

from adalora import budget
from data import OPTIONS
from dual_lora import sign_in_place
from experiments.measures import (change_rates, direction_change, effective_rank, flipped,
                                  indices_of, magnitude_change, normalised, null_rates,
                                  numerical_rank, overlap, switched_off, top)
from experiments.plots import COLOURS, LABELS, line_of, plt, save_figure
from experiments.results import (SavedRun, chosen, main_metric, mean_and_interval, on_validation,
                                 read_runs)
from formats.checkpoint import load_pretrained
from lora_dash import last_prelaunch_step
from methods import METHODS, adapters, merge, state
from support.errors import UserError, exit_on_user_error, nearest
from support.flags import ADAPTER_FLAGS, adapt
from support.parser import Parser, flag
from support.run import fingerprint, load_adapters, read_config, snapshots, weights_dtype


# ---- a sweep
class Lacking(UserError):
    """The runs do not hold what a figure needs."""


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in method, rank, learning rate and seed alone."""
    runs: list[SavedRun]
    chosen: dict[tuple[str, int | None], list[SavedRun]]    # by method and rank: see chosen()
    metric: str

    def score_on(self, split: str) -> str:
        """The name of an axis."""
        share = self.metric in self.runs[0].result["counts"]
        return f"{self.metric}, share of the {split} items" if share else f"{self.metric} ({split})"

    @property
    def ranks(self) -> list[int | None]:
        """[None] where no run has a rank."""
        return sorted({rank for _, rank in self.chosen if rank is not None}) or [None]

    @property
    def in_order(self) -> list[tuple[str, int | None, list[SavedRun]]]:
        """Method, rank and chosen runs, in the order of METHODS and of ranks."""
        order = list(METHODS)
        return sorted(((method, rank, runs) for (method, rank), runs in self.chosen.items()),
                      key=lambda line: (order.index(line[0]), line[1] or 0))

    @property
    def rank(self) -> int | None:
        """Of the figures that show one: the rank with the most runs; of several, the largest."""
        runs = Counter()
        for (_, rank), of_rank in self.chosen.items():
            runs[rank] += len(of_rank)
        return max(self.ranks, key=lambda rank: (runs[rank], rank))

    def at(self, rank: int | None) -> dict[str, list[SavedRun]]:
        """Method -> its chosen runs at the rank, and the runs without a rank (full)."""
        found = {method: self.chosen.get((method, rank), self.chosen.get((method, None)))
                 for method in METHODS}
        return {method: runs for method, runs in found.items() if runs}

    def need(self, *methods: str) -> dict[str, list[SavedRun]]:
        found = self.at(self.rank)
        missing = [method for method in methods if method not in found]
        if missing:
            at = f" at rank {self.rank}" if self.rank else ""
            raise Lacking(f"needs runs of {', '.join(methods)}; missing{at}: {', '.join(missing)}")
        return {method: found[method] for method in methods}

    @property
    def layers(self) -> list[str]:
        """Paths of the layers that all runs adapt; full is looked at in the same ones."""
        targets = ({run.args.targets for run in self.runs if run.args.targets}
                   or {ADAPTER_FLAGS["targets"]})
        return [path for path, module in pretrained(self.runs[0]).named_modules()
                if isinstance(module, nn.Linear) and all(
                    {path, path.rpartition(".")[2]} & set(names.split(",")) for names in targets)]


def read_sweep(folder: str | Path) -> Sweep:
    """UserError: no finished run there, or runs that cannot stand in one figure."""
    runs = read_runs(folder)
    for name in ("model", "from_peft", "task", *OPTIONS, "steps", "batch_size", "loss_on",
                 "max_eval"):
        values = sorted({str(getattr(run.args, name)) for run in runs})
        if len(values) > 1:
            raise UserError(f"{folder}: its runs cannot stand in one figure, they differ in "
                            f"{flag(name)}: {', '.join(values)}")
    settings = {}
    for setting, of_setting in chosen(runs).items():
        method, rank = key = of_setting[0].args.method, of_setting[0].args.rank
        if key in settings:
            names = sorted({name for name, _ in set(setting) ^ set(settings[key][0].setting)})
            raise UserError(f"{folder}: its runs of {method} at rank {rank} cannot be one line, "
                            f"they differ in {', '.join(map(flag, names))}")
        settings[key] = of_setting
    return Sweep(runs, settings, main_metric(runs[0].result))


# ---- what a run has learnt
@lru_cache(maxsize=2)
def open_base(path: str, dtype: torch.dtype, began_with: str) -> nn.Module:
    model = load_pretrained(path, dtype)[0]
    if fingerprint(model.state_dict(), dtype) != began_with:
        raise UserError(f"{path}: not the model that the runs were trained from")
    return model


def pretrained(run: SavedRun) -> nn.Module:
    """The run's base model, read once: whoever changes it takes a copy."""
    return open_base(run.args.model, weights_dtype(run.args.dtype, run.args.method),
                     run.result["base"])


def end_of(run: SavedRun) -> Path:
    return run.folder / "adapter.safetensors"


def trained(run: SavedRun, file: Path) -> nn.Module:
    """The model with the adapters of the file; float64, lest rounding look like rank."""
    model = deepcopy(pretrained(run)).double()
    load_adapters(run.folder, model, file)
    return model


def weights(run: SavedRun, paths: list[str], file: Path) -> dict[str, tuple]:
    """path -> W' and W0 (out, in), float64."""
    old, new = pretrained(run), merge(trained(run, file))
    return {path: (new.get_submodule(path).weight.detach(),
                   old.get_submodule(path).weight.detach().double()) for path in paths}


def updates(run: SavedRun, paths: list[str], file: Path) -> dict[str, torch.Tensor]:
    """path -> dW (out, in)."""
    return {path: W - W0 for path, (W, W0) in weights(run, paths, file).items()}


def tensors_in(file: Path) -> dict[str, torch.Tensor]:
    """The adapters as they were saved, where no model is needed."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot read: {error}") from None


def saved_at(run: SavedRun) -> dict[int, Path]:
    """Steps done -> the snapshot after them."""
    return {int(path.stem): path for path in snapshots(run.folder)}


def shared_steps(runs: list[SavedRun]) -> list[int]:
    """After how many steps all of the runs have a snapshot."""
    steps = set.intersection(*(set(saved_at(run)) for run in runs))
    if not steps:
        raise Lacking(f"needs snapshots of {runs[0].args.method} (--snapshot-every)")
    return sorted(steps)


def block_and_module(path: str) -> tuple[int, str]:
    """layers.2.attn.q -> 2, q; -1 for the block of a layer that is in none."""
    block = re.search(r"\.(\d+)\.", path)
    return int(block[1]) if block else -1, path.rpartition(".")[2]


# ---- parts of figures
def a_panel_each(ranks: list[int | None], ylabel: str):
    """-> the figure, rank -> its axes."""
    figure, panels = plt.subplots(1, len(ranks), figsize=(9, 4.2), sharex=True, sharey=True,
                                  squeeze=False, layout="constrained")
    for axes, rank in zip(panels[0], ranks):
        axes.set_title(f"rank {rank}" if rank else "")
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel(ylabel)
    return figure, dict(zip(ranks, panels[0]))


def legend(figure, panels, where: str = "upper") -> None:
    """One for all panels."""
    entries = {label: handle for axes in panels
               for handle, label in zip(*axes.get_legend_handles_labels())}
    labels = [label for label in LABELS.values() if label in entries]
    labels += [label for label in entries if label not in labels]
    figure.legend([entries[label] for label in labels], labels, loc=f"outside {where} center",
                  ncols=7 if len(labels) <= 7 else 5, fontsize=9)


def band(axes, x: list, lines: list[list[float]], **style) -> dict:
    """The mean of the seeds' lines, and a band from their least to their greatest."""
    y = np.array(lines)
    axes.plot(x, y.mean(0), **style)
    axes.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.2, linewidth=0)
    return {"x": x, "seeds": y.tolist(), "mean": y.mean(0).tolist()}


# ---- figures: each returns the picture and its numbers
SHOWN = 128             # rows and columns of an update that are drawn
GAP = 4                 # entries between two blocks
PRODUCTS = {"lora": ["B A"], "dora": ["B A"], "adalora": ["P lam Q"],
            "dash": ["B A", "U coords Vt"], "dual": ["B A", "D C"]}
SYMBOLS = {"lam": r"\lambda", "coords": "c", "Vt": "V'"}
FORMULAS = {"lora": r"$\frac{\alpha}{r}\,BA$",
            "dora": r"$m\,\frac{W}{\|W\|} - W_0,\;\; W = W_0 + \frac{\alpha}{r}\,BA$",
            "adalora": r"$\frac{\alpha}{r_0}\,P\;\mathrm{diag}(\lambda)\;Q$",
            "dash": r"$\frac{\alpha}{r}\,BA + U\,\mathrm{diag}(c)\,V'$",
            "dual": r"$\frac{\alpha}{\sqrt{r_1 r_2}}\,\mathrm{ReLU}(BA)\odot\mathrm{Sign}(DC)$"}
KEY = """Left and above: the factors, to scale,
each in colours of its own ($U$, $V'$ are
$W_0$'s; the others are trained).
$m$, widened: how far DoRA has changed
the length of each row of $W_0$.
Grey and crossed out: directions that
AdaLoRA has pruned.
Rank: singular values above 1 % of
the largest."""


def draw_updates(sweep: Sweep):
    """The update dW (out, in) that each method has learnt in one layer (q of the middle block, the
    first seed), entry by entry, with its factors to scale: (out, n) at the left, (n, in) above,
    diagonals where the two would meet. dW's colours are of one scale in all panels: entries over
    dW's root mean square, since the updates' sizes differ more than their shapes. DoRA's m is
    shown as m / ||W0|| - 1. Parameters and rank (numerical_rank) are the layer's.
    """
    runs = sweep.need(*PRODUCTS)
    paths = [path for path in sweep.layers if path.endswith(".q")] or sweep.layers
    path = paths[len(paths) // 2]
    layers = {method: adapters(trained(run, end_of(run)))[path].requires_grad_(False)
              for method, (run, *_) in runs.items()}
    shape = tuple(layers["lora"].base.weight.shape)
    side = min(SHOWN, max(shape))
    edge = 2 * GAP + max(sum(GAP + len(getattr(layers[method], product.split()[-1]))
                             for product in PRODUCTS[method]) for method in layers)
    figure, panels = plt.subplots(2, 3, figsize=(9, 6.8), layout="constrained")
    numbers = {"layer": path, "shape": shape}
    for axes, (method, layer) in zip(panels.flat, layers.items()):
        sigma = torch.linalg.svdvals(layer.delta_weight())
        rank, size = numerical_rank(sigma), layer.delta_weight().square().mean().sqrt().item()
        parameters = sum(p.numel() for p in layer.parameters(recurse=False))
        draw_update(axes, layer, PRODUCTS[method], size)
        axes.text(-edge, -edge - 20, LABELS[method], weight="bold", fontsize=12,
                  color=COLOURS[method])
        axes.text(-edge, -edge - 5, f"$\\Delta W =$ {FORMULAS[method]}")
        axes.text(side / 2, side + 16, f"{parameters:,} parameters, rank $\\bf{{{rank}}}$ of "
                  f"{len(sigma)}", ha="center", va="top")
        axes.set(xlim=(-edge, side + 13), ylim=(side + 26, -edge - 30))
        axes.axis("off")
        numbers[method] = {"run": runs[method][0].folder.name, "parameters": parameters,
                           "rank": rank, "effective_rank": effective_rank(sigma),
                           "root_mean_square": size}
    key = panels[1, 2]
    key.axis("off")
    figure.colorbar(ScalarMappable(Normalize(-3, 3), shades("RdBu_r")),
                    key.inset_axes((0.1, 0.8, 0.85, 0.04)), orientation="horizontal",
                    label=r"$\Delta W$ over its root mean square")
    what = f"{path} {shape}" + f": the first {SHOWN} rows\nand columns." * (max(shape) > SHOWN)
    key.text(0.1, 0.6, f"{what}\n{KEY}", transform=key.transAxes, va="top", fontsize=9,
             linespacing=1.4)
    return figure, numbers


def draw_update(axes, layer, products: list[str], size: float) -> None:
    """dW, its upper left corner at 0, 0, and its factors to the left and above."""
    dW = layer.delta_weight()[:SHOWN, :SHOWN]
    (height, width), reach = dW.shape, 0
    draw_block(axes, dW, 0, 0, limit=3 * size, colours="RdBu_r")
    for product in products:
        left, *diagonal, above = (getattr(layer, name) for name in product.split())
        first, *middle, last = (f"${SYMBOLS.get(name, name)}$" for name in product.split())
        n, start = len(above), -reach - GAP - len(above)
        if diagonal:
            c, order = diagonal[0].abs().sort(descending=True)
            kept = start + int(c.count_nonzero())
            left, above = left[:, order].clone(), above[order].clone()
            left[:, c == 0], above[c == 0] = math.nan, math.nan
            draw_block(axes, diagonal[0][order].diag(), start, start)
            axes.text(start - 2, start + n / 2, middle[0], ha="right", va="center")
        draw_block(axes, left[:height], start, 0)
        draw_block(axes, above[:, :width], 0, start)
        if diagonal and kept < start + n:
            axes.plot([kept, start + n], [0, height], [0, width], [start + n, kept], color="0.3",
                      linewidth=1)
        axes.text(start + n / 2, height + 3, first, ha="center", va="top")
        axes.text(width + 3, start + n / 2, last, va="center")
        reach += n + GAP
    if hasattr(layer, "magnitude"):
        change = layer.magnitude / layer.W0.norm(dim=1) - 1
        draw_block(axes, change[:height, None].expand(-1, 5), width + GAP, 0)
        axes.text(width + GAP + 2, height + 3, "$m$", ha="center", va="top")


def draw_block(axes, matrix, x: float, y: float, limit: float = 0, colours: str = "PuOr") -> None:
    """A heat map with an entry as a unit square, its upper left corner at x, y; NaN is grey.
    Without a limit its colours reach to its own 99th percentile."""
    height, width = matrix.shape
    limit = limit or matrix.nan_to_num().abs().flatten().quantile(0.99).item() or 1.0
    axes.imshow(matrix.numpy(), shades(colours), vmin=-limit, vmax=limit,
                interpolation="nearest", extent=(x, x + width, y + height, y))
    axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, color="0.4", linewidth=0.6))


def shades(name: str):
    """A colour map of few colours, which makes a small file."""
    return plt.get_cmap(name, 15).with_extremes(bad="0.8")


def draw_loss(sweep: Sweep):
    """Loss on the validation split by optimizer steps done: the mean over seeds, with a band from
    the least to the greatest. full, which has no rank, stands in every panel."""
    figure, panels = a_panel_each(sweep.ranks, "validation loss, nats a token")
    numbers = []
    for rank, axes in panels.items():
        for method, runs in sweep.at(rank).items():
            losses = [losses_of(run) for run in runs]
            steps = sorted(set.intersection(*map(set, losses)))
            lines = [[of_run[step] for step in steps] for of_run in losses]
            numbers.append({"method": method, "rank": rank, **band(
                axes, steps, lines, label=LABELS[method], **line_of(method))})
        axes.set_xlabel("step")
    legend(figure, panels.values())
    return figure, numbers


def losses_of(run: SavedRun) -> dict[int, float]:
    """Steps done -> validation loss."""
    losses = {line["step"] + 1: line["valid"]["loss"] for line in run.log if "valid" in line}
    return losses | {run.args.steps: run.result["valid"]["loss"]}


def draw_score(sweep: Sweep):
    """The main metric on the test split against the number of trainable parameters: the mean over
    seeds with its 95 % t-interval. full is also a line across. Numbers of parameters within 2 % of
    one another are drawn side by side, 3 % apart."""
    rows = [{"method": method, "rank": rank, "lr": runs[0].args.lr,
             "trainable": runs[0].result["trainable"],
             "scores": [run.result["after"][sweep.metric] for run in runs]}
            for method, rank, runs in sweep.in_order]

    def place(row) -> float:
        near = [other for other in rows if abs(other["trainable"] / row["trainable"] - 1) < 0.02]
        return row["trainable"] * 1.03 ** (near.index(row) - (len(near) - 1) / 2)

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for row in rows:
        row["mean"], row["sd"], row["t_interval"] = mean_and_interval(row["scores"])
    for method in methods:
        line = [row for row in rows if row["method"] == method]
        axes.errorbar([place(row) for row in line], [row["mean"] for row in line],
                      [row["t_interval"] or 0 for row in line], capsize=3, label=LABELS[method],
                      **line_of(method))
        if method == "full":
            axes.axhline(line[0]["mean"], color=COLOURS["full"], linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="trainable parameters (nearly as many: side by side)",
             ylabel=sweep.score_on("test"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    legend(figure, [axes])
    return figure, rows


def draw_rates(sweep: Sweep):
    """The main metric on the validation split by learning rate: of the seeds that every rate of the
    method has at the rank (else of all), the mean, and a bar from the least to the greatest.
    Ringed: the rate that chosen() takes. The JSON has every seed."""
    found = defaultdict(lambda: defaultdict(dict))      # method, rank -> lr -> seed -> score
    for run in sorted(sweep.runs, key=lambda run: (run.args.lr, run.args.seed)):
        value = on_validation(run.result, sweep.metric)
        found[run.args.method, run.args.rank][run.args.lr][run.args.seed] = value
    if max(map(len, found.values())) < 2:
        raise Lacking("needs a method's runs with several learning rates")
    figure, panels = a_panel_each(sweep.ranks, sweep.score_on("validation"))
    for rank, axes in panels.items():
        for method, runs in sweep.at(rank).items():
            rates, scores = zip(*found[method, runs[0].args.rank].items())
            shared = set.intersection(*map(set, scores))
            values = [[of_rate[seed] for seed in shared or of_rate] for of_rate in scores]
            means = [fmean(of_rate) for of_rate in values]
            reach = [[mean - min(of_rate), max(of_rate) - mean]
                     for mean, of_rate in zip(means, values)]
            axes.errorbar(rates, means, np.abs(np.transpose(reach)),    # not -1e-17, by rounding
                          capsize=2, label=LABELS[method], **line_of(method))
            axes.plot(runs[0].args.lr, means[rates.index(runs[0].args.lr)], "o", markersize=12,
                      fillstyle="none", color=COLOURS[method])
        axes.set(xscale="log", xlabel="learning rate")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    legend(figure, panels.values())
    return figure, [{"method": method, "rank": rank, "lr": lr, "seeds": list(of_rate),
                     "scores": list(of_rate.values()), "chosen": lr == runs[0].args.lr}
                    for method, rank, runs in sweep.in_order
                    for lr, of_rate in found[method, rank].items()]


def draw_spectra(sweep: Sweep):
    """Left: the singular values of dW by index, over the largest: the median over layers and seeds,
    and a band over the middle half of them; where layers differ in size, up to the shortest's
    last. Right: effective_rank() and numerical_rank(), the mean over layers and seeds, with a bar
    from the least seed to the greatest. Dual LoRA's two parts are shown beside its dW, and dW and
    Sign(DC) of factors that are Gaussian and of the same shapes: what comes of the form alone.
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    numbers = {}
    for row, (label, seeds) in enumerate(sigmas.items()):
        low, middle, high = np.percentile([normalised(sigma)[:k] for layers in seeds
                                           for sigma in layers], [25, 50, 75], axis=0)
        left.plot(range(1, k + 1), middle, label=label, **styles[label])
        left.fill_between(range(1, k + 1), low, high, color=styles[label]["color"], alpha=0.15,
                          linewidth=0)
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
    legend(figure, [left])
    right.set(xlabel=f"rank, of at most {k}", xlim=(0, 1.15 * k), yticks=range(len(sigmas)),
              yticklabels=list(sigmas))
    right.set_title("solid: effective rank; pale: values above 1 %", fontsize=10)
    right.invert_yaxis()
    return figure, numbers


def matrices_of(run: SavedRun, paths: list[str]) -> dict[str, list]:
    """Label -> a matrix (out, in) of each layer: dW, and Dual LoRA's parts and their likes."""
    found = {LABELS[run.args.method]: list(updates(run, paths, end_of(run)).values())}
    if run.args.method == "dual":
        tensors, generator = tensors_in(end_of(run)), torch.Generator().manual_seed(run.args.seed)
        gaussian = {name: torch.randn(tensor.shape, generator=generator)
                    for name, tensor in tensors.items()}
        parts, random = ([dual_products(factors, path) for path in paths]
                         for factors in (tensors, gaussian))
        found |= {"Dual: ReLU(BA)": [BA.relu() for BA, _ in parts],
                  "Dual: Sign(DC)": [sign_in_place(DC) for _, DC in parts],
                  "random dW": [BA.relu() * sign_in_place(DC) for BA, DC in random],
                  "random Sign(DC)": [sign_in_place(DC) for _, DC in random]}
    return found


def draw_dora(sweep: Sweep):
    """magnitude_change() against direction_change() of the query weights: a point a layer, snapshot
    and seed, the darker the later; the line of least squares, its slope, and Pearson's r. DoRA
    paper, section 4.1, which found r = -0.62 for full fine-tuning, +0.83 for LoRA and -0.31 for
    DoRA. The JSON has the line of every other module, too, and r of each seed, and of the layers
    at one step: both changes grow from 0, which alone makes r of all steps positive.
    """
    runs = {method: of_method for method, of_method in sweep.at(sweep.rank).items()
            if all(len(saved_at(run)) > 1 for run in of_method)}
    if not runs:
        raise Lacking("needs a method's runs with several snapshots (--snapshot-every)")
    rows = math.ceil(len(runs) / 4)
    figure, panels = plt.subplots(rows, min(4, len(runs)), figsize=(9, 2.4 * rows), squeeze=False,
                                  layout="constrained")
    numbers = {}
    for method, of_method in runs.items():
        modules = defaultdict(list)
        for run in tqdm(of_method, f"changes of {method}", unit="run"):
            for step, file in saved_at(run).items():
                for path, (W, W0) in weights(run, sweep.layers, file).items():
                    modules[block_and_module(path)[1]].append(
                        {"seed": run.args.seed, "step": step, "layer": path,
                         "direction": direction_change(W, W0),
                         "magnitude": magnitude_change(W, W0)})
        shown = "q" if "q" in modules else min(modules)
        numbers[method] = {"points": modules[shown], "lines": {
            module: line_through(points) | {
                "r of each seed": [line["r"] for line in lines_by(points, "seed")],
                "r of each step and seed": [line["r"] for line in lines_by(points, "step", "seed")]}
            for module, points in modules.items()}}
        line = numbers[method]["lines"][shown]
        x, y, step = (np.array([point[name] for point in modules[shown]])
                      for name in ("direction", "magnitude", "step"))
        axes = panels.flat[len(numbers) - 1]
        axes.scatter(x, y, 14, step, cmap=LinearSegmentedColormap.from_list(
            "", ["#cccccc", COLOURS[method]]))
        axes.axline((0, line["intercept"]), slope=line["slope"], color="0.3", linewidth=1)
        axes.set(xlim=(0, 1.05 * x.max()), ylim=(0, 1.05 * y.max()))
        axes.set_title(f"{LABELS[method]}\nr = {line['r']:+.2f}, slope {line['slope']:.2g}",
                       fontsize=10)
        axes.locator_params(nbins=3)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(runs):]:
        axes.remove()
    figure.supxlabel("change of direction, mean 1 - cos of the rows (the darker, the later)",
                     fontsize=10)
    figure.supylabel("change of magnitude, mean of the rows", fontsize=10)
    return figure, numbers


def line_through(points: list[dict]) -> dict[str, float]:
    """The line of least squares of magnitude over direction, and Pearson's r. Lacking: no layer has
    changed otherwise than another."""
    x = [point["direction"] for point in points]
    if len(set(x)) < 2:
        raise Lacking("needs layers whose directions have changed")
    line = linregress(x, [point["magnitude"] for point in points])
    return {"slope": line.slope, "intercept": line.intercept, "r": line.rvalue}


def lines_by(points: list[dict], *names: str) -> list[dict[str, float]]:
    """A line for each value of what is named; none where two points or less would make it."""
    groups = defaultdict(list)
    for point in points:
        groups[tuple(point[name] for name in names)].append(point)
    return [line_through(group) for group in groups.values() if len(group) > 2]


def draw_budget(sweep: Sweep):
    """AdaLoRA. Left: the directions of all layers that are not pruned, by step, beside the schedule
    budget() (eq. 12); the mean over seeds, with a band from the least to the greatest. Between two
    prunings (delta_t above 1) pruned ones may come back. Right: how many each layer has at the end,
    the mean over seeds."""
    runs = sweep.need("adalora")["adalora"]
    steps, total = shared_steps(runs), runs[0].args.steps
    layers = list(adapters(trained(runs[0], end_of(runs[0]))).values())
    start, target = (sum(getattr(layer, name) for layer in layers) for name in
                     ("init_rank", "rank"))
    schedule = [budget(step, total, start, target, *layers[0].phases(total))
                for step in range(total)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.plot(range(1, total + 1), schedule, color="0.5", label="the schedule")
    kept = band(left, steps, [[sum(kept_in(saved_at(run)[step]).values()) for step in steps]
                              for run in runs],
                label="not pruned", **line_of("adalora") | {"linestyle": "none"})
    left.set(xlabel="step", ylabel="directions of all layers", ylim=(0, None))
    left.legend()
    left.grid(alpha=0.3)
    final = {path: fmean(kept_in(end_of(run))[path] for run in runs) for path in sweep.layers}
    blocks, modules = (list(dict.fromkeys(names)) for names in
                       zip(*map(block_and_module, final)))
    most = layers[0].init_rank
    cells = np.full((len(blocks), len(modules)), np.nan)
    for path, number in final.items():
        block, module = block_and_module(path)
        row, column = blocks.index(block), modules.index(module)
        cells[row, column] = number
        right.text(column, row, f"{number:.3g}", ha="center", va="center",
                   color="black" if number > most / 2 else "white")
    right.imshow(cells, "cividis", vmin=0, vmax=most, aspect="auto")
    right.set(xticks=range(len(modules)), xticklabels=modules, yticks=range(len(blocks)),
              yticklabels=blocks, ylabel="block")
    right.set_title(f"directions left, of {most}", fontsize=10)
    return figure, {"kept": kept, "schedule": schedule, "final": final}


def kept_in(file: Path) -> dict[str, int]:
    """path -> how many of AdaLoRA's directions are not pruned there."""
    return {name.removesuffix(".lam"): int(tensor.count_nonzero())
            for name, tensor in tensors_in(file).items() if name.endswith(".lam")}


def draw_directions(sweep: Sweep):
    """LoRA-Dash's claims (sections 3 and 4), on W0 = sum_i sigma_i u_i v_i', sigma falling with i.

    Above, left: change_rates() of full fine-tuning and of LoRA by i, and null_rates(), what a
    Gaussian dW of that size would have: means over layers and seeds. Right: where (i/k) the s
    directions lie that LoRA-Dash chose, the task-specific ones (the s with the highest rates in
    full fine-tuning), and what would be those of a Gaussian dW; all layers and seeds, as densities.
    Below: the share of the task-specific directions among the s highest rates of a LoRA's dW, by
    its rank, by step, and by layer (in each module the blocks from first to last): the mean over
    layers and over all pairs of a seed of LoRA and one of full, a band from LoRA's least seed to
    its greatest. To compare with: chance, s/k; the s smallest sigma, which the 1/sigma_i in the
    rate favours whatever was learnt; the task-specific directions of another seed of full.
    """
    numbers = find_directions(sweep)
    figure, panels = plt.subplot_mosaic([["rates"] * 3 + ["where"] * 3,
                                         ["ranks"] * 2 + ["steps"] * 2 + ["layers"] * 2],
                                        figsize=(9, 6.6), layout="constrained")
    for name, rates in numbers["rates"].items():
        method, _, null = name.partition(", ")
        panels["rates"].plot(range(1, len(rates) + 1), rates, "--" if null else "-",
                             color=COLOURS[method], linewidth=1.2,
                             label=LABELS[method] + ", if Gaussian" * bool(null))
    panels["rates"].set(yscale="log", xlabel="singular index i", ylabel="change rate")
    panels["where"].hist(list(numbers["where"].values()), np.linspace(0, 1, 11), density=True,
                         color=[COLOURS["dash"], COLOURS["full"], "0.7"],
                         label=list(numbers["where"]))
    panels["where"].set(xlabel="singular index, i/k", ylabel="density")
    for name in ("ranks", "steps"):
        found = numbers[name].values()
        panels[name].plot(list(numbers[name]), list(map(fmean, found)), label="LoRA",
                          **line_of("lora"))
        panels[name].fill_between(list(numbers[name]), list(map(min, found)),
                                  list(map(max, found)), alpha=0.2, color=COLOURS["lora"])
    styles = {"LoRA": line_of("lora"),
              "another seed of full": {"color": "black", "linestyle": "-."},
              "smallest sigma": {"color": "0.4", "linestyle": "--"},
              "chance": {"color": "0.4", "linestyle": ":"}}
    modules = defaultdict(list)
    for i, path in enumerate(numbers["layers"]):
        modules[block_and_module(path)[1]].append(i)
    for name, shares in numbers["by layer"].items():
        for j, indices in enumerate(modules.values()):
            places = j + np.linspace(-0.3, 0.3, len(indices))
            panels["layers"].plot(places, [shares[i] for i in indices], **styles[name])
        for panel in ("ranks", "steps") if name != "LoRA" else ():
            panels[panel].axhline(fmean(shares), label=name, **styles[name])
    panels["steps"].plot(*numbers["LoRA-Dash's choice"], label="LoRA-Dash's choice",
                         **line_of("dash") | {"linestyle": "none"})
    panels["ranks"].set(xlabel="rank of LoRA", ylabel="share of the task-specific found",
                        xticks=list(numbers["ranks"]))
    panels["steps"].set_xlabel("step")
    panels["layers"].set_xlabel("layers of each module")
    panels["layers"].set_xticks(range(len(modules)), list(modules))
    for name, axes in panels.items():
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        if name in ("rates", "where"):
            axes.legend(fontsize=9)
        else:
            axes.set_ylim(0, 1)
    legend(figure, [panels["steps"]], "lower")
    return figure, numbers


def find_directions(sweep: Sweep) -> dict:
    """The numbers of draw_directions()."""
    runs, paths = sweep.need("full", "lora", "dash"), sweep.layers
    svd = {path: torch.linalg.svd(W0, full_matrices=False) for path, (_, W0) in
           weights(runs["full"][0], paths, end_of(runs["full"][0])).items()}
    k = {path: len(sigma) for path, (_, sigma, _) in svd.items()}
    s = min(runs["dash"][0].args.directions, *k.values())

    def highest(run: SavedRun, file: Path) -> dict[str, set]:
        return {path: top(change_rates(dW, *svd[path]), s)
                for path, dW in updates(run, paths, file).items()}

    true = [highest(run, end_of(run)) for run in runs["full"]]          # task-specific

    def shares(found: dict[str, set], true: list = true) -> list[float]:
        """Of each layer's task-specific directions: the mean over full's seeds."""
        return [fmean(overlap(found[path], seed[path]) for seed in true) for path in paths]

    def mean_rates(method: str, measure) -> list[float]:
        rates = [measure(dW, path)[:min(k.values())] for run in runs[method]
                 for path, dW in updates(run, paths, end_of(run)).items()]
        return torch.stack(rates).mean(0).tolist()

    def places(seeds: list[dict]) -> list[float]:
        return [i / k[path] for seed in seeds for path in paths for i in sorted(seed[path])]

    dash = [{path: indices_of(layer.U, svd[path][0]) for path, layer in
             adapters(trained(run, end_of(run))).items()} for run in runs["dash"]]
    generator = torch.Generator().manual_seed(0)
    gaussian = [{path: top(change_rates(torch.randn(
        len(U), Vt.shape[1], generator=generator, dtype=U.dtype), U, sigma, Vt), s)
        for path, (U, sigma, Vt) in svd.items()} for _ in true]
    numbers = {"s": s, "layers": paths, "rates": {}, "ranks": {}, "steps": {}, "by layer": {
        "LoRA": np.mean([shares(highest(run, end_of(run))) for run in runs["lora"]], 0).tolist(),
        "smallest sigma": shares({path: set(range(k[path] - s, k[path])) for path in paths}),
        "chance": [s / k[path] for path in paths]}}
    if len(true) > 1:
        numbers["by layer"]["another seed of full"] = np.mean(
            [shares(seed, [other for other in true if other is not seed]) for seed in true],
            0).tolist()
    for method in ("full", "lora"):
        numbers["rates"][method] = mean_rates(method, lambda dW, path: change_rates(dW, *svd[path]))
        numbers["rates"][f"{method}, null"] = mean_rates(
            method, lambda dW, path: null_rates(dW, svd[path][1]))
    numbers["where"] = {"chosen by LoRA-Dash": places(dash), "task-specific": places(true),
                        "of a Gaussian dW": places(gaussian)}
    for rank in sweep.ranks:
        if "lora" in sweep.at(rank):
            numbers["ranks"][rank] = [fmean(shares(highest(run, end_of(run))))
                                      for run in sweep.at(rank)["lora"]]
    for step in tqdm(shared_steps(runs["lora"]), "LoRA's directions", unit="snapshot"):
        numbers["steps"][step] = [fmean(shares(highest(run, saved_at(run)[step])))
                                  for run in runs["lora"]]
    args = runs["dash"][0].args
    numbers["LoRA-Dash's choice"] = (last_prelaunch_step(args.steps, args.prelaunch) + 1,
                                     fmean(fmean(shares(seed)) for seed in dash))
    return numbers


def draw_signs(sweep: Sweep):
    """Dual LoRA: the share of the entries of B A that ReLU switches off, and of the signs of D C
    that are others than at the start, and than at the snapshot before; by step, the mean over
    layers and seeds, with a band from the least seed to the greatest."""
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
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    numbers = {}
    for i, (label, marker, line) in enumerate((("switched off by ReLU", "o", "--"),
                                               ("flipped since the start", "*", "-"),
                                               ("flipped since the point before", "v", ":"))):
        numbers[label] = band(axes, steps, 100 * np.array(shares)[:, :, i], label=label,
                              **line_of("dual") | {"marker": marker, "linestyle": line})
    axes.set(xlabel="step", ylabel="share of the entries, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure, numbers


def dual_products(tensors: dict[str, torch.Tensor], path: str) -> tuple:
    """-> B A and D C (out, in) of the layer."""
    A, B, C, D = (tensors[f"{path}.{name}"].double() for name in "ABCD")
    return B @ A, D @ C


def start_of(run: SavedRun) -> dict[str, torch.Tensor]:
    """The adapters that training began with: not saved, but made by the run's seed."""
    model, args = deepcopy(pretrained(run)), Namespace(**vars(run.args))
    torch.manual_seed(args.seed)
    adapt(model, args)
    start = [model.injected, fingerprint(state(model), torch.float32)]
    if start != read_config(run.folder)["adapters"]:
        raise Lacking(f"the start of {run.folder}, made on {args.device}, comes out otherwise here")
    return state(model)


FIGURES = {"updates": draw_updates, "loss": draw_loss, "score": draw_score, "rates": draw_rates,
           "spectra": draw_spectra, "dora": draw_dora, "budget": draw_budget,
           "directions": draw_directions, "signs": draw_signs}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", help="the folder that holds the runs' folders")
    parser.add_argument("--figures", help=f"comma-separated: {', '.join(FIGURES)} (all that the "
                                          "runs allow)")
    parser.add_argument("--out", type=Path, help="the folder of the figures (RUNS/figures)")
    args = parser.parse_args(argv)
    asked = list(FIGURES) if args.figures is None else args.figures.split(",")
    for name in asked:
        if name not in FIGURES:
            raise UserError(f"--figures {name}: unknown{nearest(name, FIGURES)}")
    sweep = read_sweep(args.runs)
    for name in asked:
        try:
            figure, numbers = FIGURES[name](sweep)
        except Lacking as error:
            if args.figures is not None:
                raise UserError(f"{name}: {error}") from None
            print(f"{name}: {error}")
            continue
        path = (args.out or Path(args.runs, "figures")) / f"{name}.png"
        save_figure(figure, path, numbers)
        print(path)


if __name__ == "__main__":
    main()
