"""Measures and draws how time and memory of one layer grow with rank, tokens and width."""
from argparse import Namespace
from pathlib import Path

from matplotlib.ticker import LogLocator
from tqdm import tqdm

from experiments.contenders import OURS, measure_steps, one_layer
from experiments.plots import LABELS, line_of, plt, save_figure
from experiments.profiling import print_table

AXES = {"rank": (2, 4, 8, 16, 32, 64, 128), "tokens": (256, 512, 1024, 2048, 4096, 8192),
        "width": (256, 512, 1024, 2048, 4096)}
USUAL = {"rank": 8, "tokens": 1024, "width": 1024}      # values while another axis varies


def measure_growth(args: Namespace) -> list[dict]:
    """Measures one layer with one of the three axes varied at a time."""
    rows = []
    for axis, values in AXES.items():
        found = []
        for value in tqdm(values, desc=axis, leave=False):
            size = USUAL | {axis: value}
            contenders = {name: one_layer(name, size["width"], size["width"], size["tokens"],
                                          args.device, args.bf16, size["rank"])
                          for name in ["frozen", *OURS]}
            found += [row | size | {"axis": axis}
                      for row in measure_steps(contenders, 5, args.device).values()]
        fixed = ", ".join(f"{name} {value}" for name, value in USUAL.items() if name != axis)
        for title, key, factor in (("ms", "seconds", 1e3), ("peak MB", "peak_bytes", 2**-20)):
            print_table(f"{title} of a training step by {axis}; {fixed}", [{"": name} | {
                f"{row[axis]}": f"{factor * row[key]:.1f}" for row in found
                if row["contender"] == name} for name in ["frozen", *OURS]])
        rows += found
    return rows


def draw_growth(rows: list[dict], path: Path, machine: dict) -> None:
    """Draws a line for each method: its fastest step over the frozen layer's, and its peak memory.

    machine: what it was measured on, which goes into the JSON beside the picture.
    """
    figure, panels = plt.subplots(2, 3, figsize=(10, 6), sharex="col", layout="constrained")
    for (axis, values), (time_panel, memory_panel) in zip(AXES.items(), panels.T):
        lines = {name: [row for row in rows if row["axis"] == axis and row["contender"] == name]
                 for name in ["frozen", *OURS]}
        floor = [row["best"] for row in lines["frozen"]]
        for name, line in lines.items():
            time_panel.plot(values, [row["best"] / least for row, least in zip(line, floor)],
                            label=LABELS[name], **line_of(name))
            memory_panel.plot(values, [row["peak_bytes"] / 2**20 for row in line], **line_of(name))
        memory_panel.set(xscale="log", yscale="log", xlabel=axis, xticks=values)
        memory_panel.set_xticks([], minor=True)
        memory_panel.set_xticklabels(values)
        memory_panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        memory_panel.yaxis.set_major_formatter("{x:g}")
        memory_panel.yaxis.set_minor_formatter("")
        time_panel.set(ylim=(0.9, None))
        for panel in (time_panel, memory_panel):
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("time of a training step,\nover the frozen layer's")
    panels[1, 0].set_ylabel("peak memory of a step, MB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7)
    save_figure(figure, path, machine | {"growth": rows})
