"""Draws which directions a run spends its parameters on: AdaLoRA's budget, LoRA-Dash's choice."""
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from tqdm import tqdm

from adalora import budget
from experiments.learnt import (Sweep, block_and_module, end_of, merged_and_base, saved_at,
                                shared_steps, tensors_in, trained, updates)
from experiments.measures import change_rates, indices_of, null_rates, overlap, top
from experiments.plots import COLOURS, band, line_of, plt
from experiments.results import SavedRun
from lora_dash import last_prelaunch_step
from methods import adapters


# ---- AdaLoRA
def draw_budget(sweep: Sweep):
    """Draws how many directions AdaLoRA keeps by step, and how many each layer has at the end.

    Left: the directions of all layers that are not pruned, beside the schedule budget() (eq. 12):
    the mean over seeds, in a band from the least to the greatest. Between two prunings (delta_t
    above 1) pruned ones may come back. Right: the mean over seeds.
    """
    runs = sweep.need("adalora")["adalora"]
    steps, total = shared_steps(runs), runs[0].args.steps
    layers = list(adapters(trained(runs[0], end_of(runs[0]))).values())
    start, target = (sum(getattr(layer, name) for layer in layers) for name in
                     ("init_rank", "rank"))
    schedule = [budget(step, total, start, target, *layers[0].phases(total))
                for step in range(total)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    left.plot(range(1, total + 1), schedule, color="0.5")
    kept = band(left, steps, [[sum(kept_in(saved_at(run)[step]).values()) for step in steps]
                              for run in runs], **line_of("adalora") | {"linestyle": "none"})
    for number, what, place, offset in ((start, "start", "bottom", 4),
                                        (target, "budget", "top", -6)):
        left.axhline(number, color="0.5", linewidth=0.8, linestyle=":")
        left.annotate(f"{what}: {number}, {number / len(layers):g} a layer", (total, number),
                      (0, offset), textcoords="offset points", ha="right", va=place, fontsize=10)
    left.set_title("directions not pruned; line: the schedule", fontsize=10)
    margin = 0.15 * (start - target) or 1
    left.set(xlabel="step", ylabel="directions of all layers",
             ylim=(target - margin, start + margin))
    left.grid(alpha=0.3)
    final = {path: fmean(kept_in(end_of(run))[path] for run in runs) for path in sweep.layers}
    draw_cells(right, final, layers[0].init_rank)
    right.set_title(f"directions left in each layer, of {layers[0].init_rank}", fontsize=10)
    return figure, {"kept": kept, "schedule": schedule, "final": final}


def draw_cells(axes, numbers: dict[str, float], most: int) -> None:
    """Draws a cell for each layer's number, in a row for each block, the fuller the darker."""
    blocks, modules = (list(dict.fromkeys(names)) for names in
                       zip(*map(block_and_module, numbers)))
    cells = np.full((len(blocks), len(modules)), np.nan)
    for path, number in numbers.items():
        block, module = block_and_module(path)
        row, column = blocks.index(block), modules.index(module)
        cells[row, column] = number
        axes.text(column, row, f"{number:.3g}", ha="center", va="center",
                  color="white" if number > 0.7 * most else "black")
    axes.imshow(cells, "Oranges", vmin=0, vmax=most, aspect="auto")
    axes.set(xticks=range(len(modules)), xticklabels=modules, yticks=range(len(blocks)),
             yticklabels=blocks, ylabel="block")


def kept_in(file: Path) -> dict[str, int]:
    """Maps each layer's path to the number of AdaLoRA's directions that are not pruned there."""
    return {name.removesuffix(".lam"): int(tensor.count_nonzero())
            for name, tensor in tensors_in(file).items() if name.endswith(".lam")}


# ---- LoRA-Dash
def draw_directions(sweep: Sweep):
    """Draws whether LoRA finds the task's own directions, and where on W0's spectrum they sit.

    These are LoRA-Dash's claims (sections 3 and 4), on W0 = sum_i sigma_i u_i v_i', sigma falling
    with i. The task-specific directions are the s with the highest change_rates() in full
    fine-tuning. Left: the share of them among the s highest rates of a LoRA's dW: the mean over
    layers and over all pairs of a seed of LoRA and one of full, with a line from LoRA's least seed
    to its greatest. To compare with: chance, s/k; the s smallest sigma, which the 1/sigma_i in the
    rate favours whatever was learnt; another seed of full. Right: where (i/k) the s directions lie
    that LoRA-Dash chose, the task-specific ones, and those of the highest rates of a Gaussian dW;
    all layers and seeds. The JSON also has the shares by step and by layer, change_rates() of full
    and LoRA by i, and their null_rates(): means over layers and seeds.
    """
    numbers = find_directions(sweep)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(1.1, 1),
                                         layout="constrained")
    bars = bars_of(numbers, sweep.rank)
    for y, (label, (shares, colour)) in enumerate(bars.items()):
        left.barh(y, fmean(shares), 0.7, color=colour)
        left.plot([min(shares), max(shares)], [y, y], color="0.2", linewidth=1.5)
        left.text(max(shares) + 0.02, y, f"{fmean(shares):.2f}", va="center", fontsize=9)
    left.set(xlim=(0, 1), yticks=range(len(bars)), yticklabels=list(bars))
    left.set_title(f"share of the task's own {numbers['s']} directions that is found", fontsize=10)
    left.invert_yaxis()
    left.grid(alpha=0.3, axis="x")
    left.set_axisbelow(True)

    colours = [COLOURS["dash"], COLOURS["full"], "0.7"]
    places = list(numbers["where"].values())
    right.hist(places, np.linspace(0, 1, 9), color=colours,
               weights=[np.full(len(found), 100 / len(found)) for found in places])
    names = ("LoRA-Dash's choice", "the task's own", "of a random update")
    for line, (name, colour) in enumerate(zip(names, colours)):
        right.text(0.04, 0.93 - 0.08 * line, name, transform=right.transAxes, fontsize=10,
                   color=colour if colour != "0.7" else "0.5", weight="bold", va="top")
    right.set(xticks=(0, 0.5, 1), xticklabels=("largest", "middle", "smallest"), xlim=(0, 1),
              xlabel="their singular values among $W_0$'s", ylabel="share of the directions, %")
    for label, side in zip(right.get_xticklabels(), ("left", "center", "right")):
        label.set_horizontalalignment(side)
    return figure, numbers


def bars_of(numbers: dict, rank: int | None) -> dict[str, tuple[list[float], str]]:
    """Maps the labels of the left panel to shares, one a seed or layer mean, and a colour."""
    first, found = next(iter(numbers["steps"].items()))
    layers = numbers["by layer"]
    bars = {"chance": ([fmean(layers["chance"])], "0.7"),
            f"the {numbers['s']} smallest\nsingular values": ([fmean(layers["smallest sigma"])],
                                                              "0.7"),
            f"LoRA rank {rank}\nafter {first} steps": (found, COLOURS["lora"])}
    bars |= {f"LoRA rank {rank}": (shares, COLOURS["lora"])
             for rank, shares in numbers["ranks"].items()}
    bars["LoRA-Dash's choice"] = ([numbers["LoRA-Dash's choice"][1]], COLOURS["dash"])
    if "another seed of full" in layers:
        bars["another seed\nof full"] = ([fmean(layers["another seed of full"])], COLOURS["full"])
    return bars


def find_directions(sweep: Sweep) -> dict:
    """Finds the numbers of draw_directions()."""
    runs, paths = sweep.need("full", "lora", "dash"), sweep.layers
    svd = {path: torch.linalg.svd(W0, full_matrices=False) for path, (_, W0) in
           merged_and_base(runs["full"][0], paths, end_of(runs["full"][0])).items()}
    k = {path: len(sigma) for path, (_, sigma, _) in svd.items()}
    s = min(runs["dash"][0].args.directions, *k.values())

    def highest(run: SavedRun, file: Path) -> dict[str, set]:
        return {path: top(change_rates(dW, *svd[path]), s)
                for path, dW in updates(run, paths, file).items()}

    true = [highest(run, end_of(run)) for run in runs["full"]]          # task-specific

    def shares(found: dict[str, set], true: list = true) -> list[float]:
        """Returns the share found of each layer's task-specific directions, the mean over full."""
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
