"""Makes a sweep's result: chosen learning rates, table.md, results.csv and three figures."""
import csv
from argparse import Namespace
from pathlib import Path

from experiments.analyze import FIGURES
from experiments.grid import Setting, Trial, typed
from experiments.learnt import Lacking, Sweep
from experiments.plots import save_figure
from experiments.results import (AVERAGE, LOWER_IS_BETTER, SavedRun, chosen, main_metric,
                                 mean_and_interval, read_run, within_noise)
from support.errors import UserError, nearest
from support.files import atomic_write
from support.machine import hardware

Found = dict[Setting, list[SavedRun]]


def collect(trials: list[Trial]) -> Found:
    """Reads the finished runs of each setting."""
    found: Found = {}
    for t in trials:
        run = read_run(t.folder)
        if run is not None:
            found.setdefault(t.setting, []).append(run)
    return found


def best_rates(found: Found, metric: str) -> Found:
    """Chooses each setting's learning rate on validation and gives the runs with it.

    Raises UserError if two runs of a setting began with different defaults.
    """
    best = {}
    for setting, runs in found.items():
        if len({run.setting for run in runs}) > 1:
            unlike = next(run for run in runs if run.setting != runs[0].setting)
            raise UserError(f"{unlike.folder} and {runs[0].folder} differ in more than learning "
                            "rate and seed: a default has changed between them")
        best[setting], = chosen(runs, metric).values()
    return best


def metric_of(found: Found, name: str | None) -> str:
    """Names the metric to compare by: `name`, else the task's main one.

    Raises UserError if the task has no such metric.
    """
    result = next(iter(found.values()))[0].result
    known = result["after"]
    if name is not None and name not in known:
        raise UserError(f"--metric {name}: the task has no such metric" + nearest(name, known))
    return name or main_metric(result)


def rows_of(best: Found, metric: str) -> list[dict[str, str]]:
    """Makes a row for each setting.

    The best mean of a rank is bold. A "~" marks a setting whose difference from it is noise.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    scores = {setting: [sign * run.result["after"][metric] for run in runs]
              for setting, runs in best.items()}
    rows = []
    for setting, runs in best.items():
        first, n = runs[0], len(runs)
        peers = [other for other in best if other.rank == setting.rank]
        winner = max(peers, key=lambda other: mean_and_interval(scores[other])[0])
        score = plus_minus(runs, metric, limits=True)
        if len(peers) > 1 and setting == winner and n > 1:
            score = f"**{score}**"
        elif min(n, len(scores[winner])) > 1 and setting != winner:
            score += " ~" * within_noise(scores[setting], scores[winner])
        peak = max(run.result["peak_memory_mb"] or 0 for run in runs)
        seconds = sum(run.result["seconds"] for run in runs) / n
        rows.append({
            "method": setting.method, "rank": setting.rank or "",
            **{name: value or "" for name, value in setting.varied},
            "lr": f"{first.args.lr:g}", "seeds": str(n), metric: score,
            **{name: plus_minus(runs, name) for name in beside(first.result, metric)},
            "trainable": f"{first.result['trainable']:,}", "s a run": f"{seconds:.0f}",
            "peak MB": f"{peak:.0f}" if peak else ""})
    return rows


def plus_minus(runs: list[SavedRun], metric: str, limits: bool = False,
               split: str = "after") -> str:
    """Writes mean ± standard deviation of a score; with `limits` also [the interval of the mean].

    split: "before", "valid" or "after", which is the test.
    """
    mean, sd, half = mean_and_interval([run.result[split][metric] for run in runs])
    if sd is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {sd:.3f}" + f" [{mean - half:.3f}, {mean + half:.3f}]" * limits


def beside(result: dict, metric: str) -> list[str]:
    """Names the metrics beside the main one; for a task of several sets the averages alone."""
    return [name for name in result["after"] if name != metric
            and ("/" not in name or f"/{AVERAGE}" in name)]


def markdown(rows: list[dict[str, str]]) -> str:
    """Writes rows as a Markdown table under the names of their columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def notes(args: Namespace, found: Found, best: Found, metric: str,
          failed: dict[str, str]) -> str:
    """Writes the lines below the table that say how to read it."""
    first = next(iter(best.values()))[0]
    edges = at_edge(found, best)
    versions = first.result["versions"]
    alike = {"steps": f"{first.args.steps} steps", "batch_size": f"{first.args.batch_size} a step",
             "loss_on": f"loss on {first.args.loss_on}"}
    for name, _ in args.vary:
        alike.pop(name, None)
    lines = [
        f"task {first.args.task}, {', '.join(alike.values())}; {hardware(first.args.device)}, "
        f"torch {versions['torch']}, {versions['threads']} thread(s) a run",
        f"{metric}: mean ± standard deviation over seeds on the test split; in brackets Student's "
        "95 % interval of the mean",
        "bold: the best of its rank; ~: a tie with it, since Welch's 95 % interval of their "
        "difference holds 0; no interval is corrected for the number of comparisons, and a single "
        "seed gets neither mark",
        f"lr: the best of {', '.join(args.lrs)} by {metric} on validation, averaged over seeds "
        f"{', '.join(args.search_seeds)}; xN is N times the method's own rate"]
    if edges:
        lines.append("the best lr is the highest or lowest one tried, so another may be better: "
                     + ", ".join(edges))
    lines += [f"no result from {name}: {said}" for name, said in failed.items()]
    return "".join(f"- {line}\n" for line in lines)


def at_edge(found: Found, best: Found) -> list[str]:
    """Names the settings whose best learning rate is the lowest or the highest tried."""
    return [setting_name(setting) for setting, runs in best.items() if edge(found[setting], runs)]


def edge(tried: list[SavedRun], best: list[SavedRun]) -> str:
    """Marks a best learning rate at the edge of those tried: ^ the highest, v the lowest."""
    lrs, lr = {run.args.lr for run in tried}, best[0].args.lr
    if len(lrs) == 1:
        return ""
    return "^" if lr == max(lrs) else "v" if lr == min(lrs) else ""


def setting_name(setting: Setting) -> str:
    """Writes a setting as in a sentence: dual rank 8 --no-clip."""
    return " ".join([setting.method, *([f"rank {setting.rank}"] if setting.rank else []),
                     *(typed(name, value) for name, value in setting.varied if value)])


def write_results(path: Path, found: Found, best: Found) -> None:
    """Writes a line for each run: setting, scores on all splits, time and memory."""
    rows = []
    for setting, runs in found.items():
        for run in runs:
            result = run.result
            rows.append({
                "method": setting.method, "rank": setting.rank, **dict(setting.varied),
                "lr": run.args.lr, "seed": run.args.seed, "chosen": int(run in best[setting]),
                **{f"{split} {name}": value for split in ("before", "valid", "after")
                   for name, value in (result[split] or {}).items()},
                "trainable": result["trainable"], "seconds": result["seconds"],
                "peak_memory_mb": result["peak_memory_mb"], "folder": run.folder.name})
    with atomic_write(path) as temporary, open(temporary, "w", newline="",
                                                encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def saved_sweep(found: Found, best: Found, metric: str | None = None) -> Sweep:
    """Gathers what the figures are drawn from; a method has one setting at a rank."""
    return Sweep([run for runs in found.values() for run in runs],
                 {(runs[0].args.method, runs[0].args.rank): runs for runs in best.values()},
                 metric_of(found, metric))


def draw_sweep(sweep: Sweep, out: Path) -> list[str]:
    """Draws the figures that these runs allow, and names their files."""
    names = []
    for name in ("score", "rates", "loss"):
        try:
            figure, numbers = FIGURES[name](sweep)
        except Lacking:         # rates is not drawn if each method had one rate
            continue
        save_figure(figure, out / f"{name}.png", numbers)
        names.append(f"{name}.png")
    return names
