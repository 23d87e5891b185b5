"""Draws how well the methods score: by size, learning rate and step, and learnt against lost."""
from collections import defaultdict
from statistics import fmean

import numpy as np
from matplotlib.ticker import LogLocator

from experiments.learnt import Lacking, Sweep
from experiments.plots import COLOURS, LABELS, MARKERS, a_panel_each, band, label_ends, line_of, plt
from experiments.results import SavedRun, mean_and_interval, on_validation

LEARNT, LOST = "new", "kept"        # what the task facts calls them


def draw_loss(sweep: Sweep):
    """Draws the loss on the validation split by optimizer steps done.

    A line is the mean over seeds, its band reaches from the least to the greatest. full, which has
    no rank, stands in every panel.
    """
    figure, panels = a_panel_each(sweep.ranks, "validation loss, nats a token")
    numbers = []
    for rank, axes in panels.items():
        for method, runs in sweep.at(rank).items():
            losses = [losses_of(run) for run in runs]
            steps = sorted(set.intersection(*map(set, losses)))
            lines = [[of_run[step] for step in steps] for of_run in losses]
            numbers.append({"method": method, "rank": rank, **band(
                axes, steps, lines, label=LABELS[method], **line_of(method))})
    figure.supxlabel("step", fontsize=10)
    label_ends(panels.values())
    return figure, numbers


def losses_of(run: SavedRun) -> dict[int, float]:
    """Maps the number of steps done to the validation loss."""
    losses = {line["step"] + 1: line["valid"]["loss"] for line in run.log if "valid" in line}
    return losses | {run.args.steps: run.result["valid"]["loss"]}


def draw_score(sweep: Sweep):
    """Draws the main metric on the test split against the number of trainable parameters.

    A point is the mean over seeds with its 95 % t-interval. full has so many parameters that its
    point would halve the picture, so beside adapters it is a line across.
    """
    rows = [{"method": method, "rank": rank, "lr": runs[0].args.lr,
             "trainable": runs[0].result["trainable"],
             "scores": [run.result["after"][sweep.metric] for run in runs]}
            for method, rank, runs in sweep.in_order]
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for row in rows:
        row["mean"], row["sd"], row["t_interval"] = mean_and_interval(row["scores"])
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        line = [row for row in rows if row["method"] == method]
        trainable, means = ([row[name] for row in line] for name in ("trainable", "mean"))
        halves = [row["t_interval"] or 0 for row in line]
        if method == "full" and len(methods) > 1:
            axes.axhline(means[0], color=COLOURS[method], linestyle="--", linewidth=1.2,
                         label=f"full, {trainable[0]:,}")
            axes.axhspan(means[0] - halves[0], means[0] + halves[0], alpha=0.1, linewidth=0,
                         color=COLOURS[method])
        else:
            axes.errorbar(trainable, means, halves, capsize=3, elinewidth=1,
                          label=LABELS[method], **line_of(method))
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=sweep.score_on("test"),
             ylim=limits([score for row in rows for score in row["scores"]]))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    label_ends([axes])
    return figure, rows


def limits(values: list[float]) -> tuple[float, float]:
    """Returns where an axis begins and ends that shows the values and nothing far from them.

    A long error bar may leave the picture: the interval of two seeds is wider than all scores.
    """
    margin = 0.07 * (max(values) - min(values)) or 0.05
    return min(values) - margin, max(values) + margin


def draw_rates(sweep: Sweep):
    """Draws the main metric on the validation split by learning rate.

    The seeds are those that every rate of the method has at the rank, else all. A point is their
    mean, its bar reaches from the least to the greatest. A ring marks the rate that chosen()
    takes. The JSON has every seed.
    """
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
                          capsize=2, elinewidth=1, label=LABELS[method], **line_of(method))
            axes.plot(runs[0].args.lr, means[rates.index(runs[0].args.lr)], "o", markersize=12,
                      fillstyle="none", color=COLOURS[method])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    figure.supxlabel("learning rate (ringed: the chosen one)", fontsize=10)
    label_ends(panels.values())
    return figure, [{"method": method, "rank": rank, "lr": lr, "seeds": list(of_rate),
                     "scores": list(of_rate.values()), "chosen": lr == runs[0].args.lr}
                    for method, rank, runs in sweep.in_order
                    for lr, of_rate in found[method, rank].items()]


def draw_tradeoff(sweep: Sweep):
    """Draws the new facts learnt against the old facts kept, both on the test split.

    Pale: every run at the figure's rank. Large: the mean over the seeds of each method's chosen
    learning rate, with 95 % t-intervals. A line joins the means of full's rates, each named by its
    rate: full can buy more of the one with less of the other.
    Raises Lacking if the task does not score both.
    """
    if not {LEARNT, LOST} <= sweep.runs[0].result["after"].keys():
        raise Lacking(f"needs a task that scores {LEARNT} and {LOST}, as facts does")
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    rows = rates_of(sweep)
    for row in rows:
        axes.plot(row[LEARNT], row[LOST], MARKERS[row["method"]], markersize=4, alpha=0.35,
                  color=COLOURS[row["method"]], markeredgewidth=0)
    of_full = [row for row in rows if row["method"] == "full"]
    axes.plot(*([fmean(row[name]) for row in of_full] for name in (LEARNT, LOST)), "-",
              color=COLOURS["full"], linewidth=1)
    for row in of_full:
        axes.annotate(f"rate {row['lr']:g}", (fmean(row[LEARNT]), fmean(row[LOST])), (-7, -3),
                      textcoords="offset points", ha="right", va="top", fontsize=8)
    for row in rows:
        if row["chosen"]:
            (x, _, x_half), (y, _, y_half) = map(mean_and_interval, (row[LEARNT], row[LOST]))
            axes.errorbar([x], [y], y_half or 0, x_half or 0, capsize=3, elinewidth=1,
                          label=LABELS[row["method"]],
                          **line_of(row["method"]) | {"markersize": 9})
    axes.set(**{f"{axis}lim": limits([score for row in rows for score in row[name]])
                for axis, name in (("x", LEARNT), ("y", LOST))})
    before = sweep.runs[0].result["before"]
    for write, name, what in ((axes.set_xlabel, LEARNT, "new facts learnt"),
                              (axes.set_ylabel, LOST, "old facts kept")):
        write(f"{what}, share" + (f" (before training {before[name]:.2f})" if before else ""))
    axes.set_title("large: the chosen learning rate, its mean and 95 % interval; "
                   "pale: every run; line: full's rates", fontsize=10)
    axes.grid(alpha=0.3)
    label_ends([axes])
    return figure, rows


def rates_of(sweep: Sweep) -> list[dict]:
    """Lists a row for each method and learning rate at the sweep's rank, the rates in order."""
    rows = []
    for method, chosen in sweep.at(sweep.rank).items():
        runs = [run for run in sweep.runs if (run.args.method, run.args.rank)
                == (method, chosen[0].args.rank)]
        for lr in sorted({run.args.lr for run in runs}):
            of_rate = sorted((run for run in runs if run.args.lr == lr),
                             key=lambda run: run.args.seed)
            rows.append({"method": method, "rank": chosen[0].args.rank, "lr": lr,
                         "chosen": lr == chosen[0].args.lr,
                         "seeds": [run.args.seed for run in of_rate],
                         **{name: [run.result["after"][name] for run in of_rate]
                            for name in (LEARNT, LOST)}})
    return rows
