"""Draws what the models of task subject draw: a row of pictures for each method and rank."""
import textwrap
from statistics import fmean

import torch

from data import load_task
from data.pictures import draw
from data.subject import SEEN
from data.task import Setup
from experiments.learnt import Lacking, Sweep, end_of, pretrained, trained
from experiments.plots import LABELS, plt
from formats.tokenizer import load_tokenizer


def draw_pictures(sweep: Sweep):
    """Draws the same captions from the same noise by each method's run of the lowest seed.

    The numbers are the means of the test scores over seeds, in the order of the rows.
    """
    first = sweep.runs[0]
    if first.args.task != "subject":
        raise Lacking("needs runs of task subject")
    words, base = load_tokenizer(first.args.model), pretrained(first)
    task = load_task("subject", Setup(words, base.config, 0), subject=first.args.subject)
    rows = {"the four\npictures": draw([shot.scene for shot in task.train[:len(SEEN)]]),
            "before": task.pictures(base, task.shown)}
    numbers = []
    for method, rank, runs in sweep.in_order:
        run = min(runs, key=lambda run: run.args.seed)
        label = LABELS[method] + (f"\nrank {rank}" if rank else "")
        rows[label] = task.pictures(trained(run, end_of(run)).float(), task.shown)
        numbers.append({"method": method, "rank": rank, "lr": run.args.lr, "seeds": len(runs),
                        **{name: fmean(run.result["after"][name] for run in runs)
                           for name in run.result["after"]}})
    return grid_of(rows, [shot.caption for shot in task.shown]), numbers


def grid_of(rows: dict[str, torch.Tensor], titles: list[str]):
    """Lays out rows of pictures (n, 3, side, side), with a name left of each and titles above."""
    figure, panels = plt.subplots(len(rows), len(titles), figsize=(1.1 * len(titles) + 0.8,
                                  1.1 * len(rows) + 0.5), squeeze=False, layout="constrained")
    for line, (name, pictures) in zip(panels, rows.items()):
        for axes in line:
            axes.set_axis_off()
        for axes, picture in zip(line, pictures):
            axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        line[0].text(-0.1, 0.5, name, ha="right", va="center", fontsize=9,
                     transform=line[0].transAxes)
    for axes, title in zip(panels[0], titles):
        axes.set_title(textwrap.fill(title, 14), fontsize=8, va="bottom")
    return figure
