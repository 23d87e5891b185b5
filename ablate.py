"""A grid of runs and what came out: methods x ranks x learning rates x seeds, and any other flag.

    python ablate.py --methods lora,dora,adalora,dash,dual,full --ranks 2,8 --seeds 0,1,2
    python ablate.py --methods lora,dual --task mini --lrs 5e-3,1e-2 --seeds 0,1,2 --search-seeds 0
    python ablate.py --methods dual,lora --vary init-std=0.03,0.06 --vary alpha=16,32 --jobs 2
    python ablate.py --methods dual --one-at-a-time --vary clip=no --vary update-warmup=5,60
    python ablate.py --methods lora,dual --list > commands
    parallel -j 4 < commands                        or xargs -d '\\n' -P 4 -I {} sh -c {} < commands
    sh -c "$(sed -n ${SLURM_ARRAY_TASK_ID}p commands)"          in a Slurm array
Any flag of train.py that is not varied is passed on to every run. Each run has a folder of its own
under --out. The sweep can be given again at any time, after kill -9 too: what is finished is
skipped, what was stopped goes on. --list prints the commands instead of running them, one a line,
for several processes or machines that share a folder; those of seeds that the search leaves out
come once it is done. What the first run refuses ends the sweep, with status 2; of a later one that
fails the line is told, the others go on, and the status is 1.

A method's learning rate, for each rank and setting, is the best of --lrs on validation, on average
over seeds; the test scores are only reported. Into --out go table.md, results.csv (a line a run),
without --vary score.png, rates.png and loss.png with their numbers, and logs/ with what the runs
printed.
"""
import csv
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import analyze
import train
from common import Parser, UserError, atomic_write, exit_on_user_error, flag, nearest
from methods import METHODS
from plots import save_figure
from results import (AVERAGE, LOWER_IS_BETTER, SavedRun, chosen, main_metric, read_run, spread,
                     within_noise)
from run import finished, hardware, locked, saved_flags, visible

VARIED = {"method": "methods", "rank": "ranks", "lr": "lrs", "seed": "seeds"}
WHOLE = {"ranks": int, "seeds": int, "search_seeds": int}
FIXED = ("out", "overwrite", "resume", "from_peft", "epochs", "task")        # not to be varied


class Setting(NamedTuple):
    """What a row of the table is about; None: the method has no rank, or does not use the flag."""
    method: str
    rank: str | None
    varied: tuple[tuple[str, str | None], ...]      # (flag's name, value)


class Trial(NamedTuple):
    """A run that is to be."""
    setting: Setting
    lr: str
    seed: str
    folder: Path
    flags: list[str]            # for train.py


# ---- the grid
def parse(argv: list[str] | None) -> tuple[Namespace, list[str]]:
    """-> our flags, and those for train.py."""
    parser = Parser(__doc__)
    parser.add_argument("--methods", required=True, help=f"comma-separated: {', '.join(METHODS)}")
    parser.add_argument("--ranks", help="budgets (8); full has none")
    parser.add_argument("--lrs", default="x0.5,x1,x2",
                        help="learning rates; x2 is twice the method's own (x0.5,x1,x2)")
    parser.add_argument("--seeds", default="0", help="(0)")
    parser.add_argument("--search-seeds", help="of these, the ones that every learning rate runs "
                        "with; the others run with the chosen rate alone (all)")
    parser.add_argument("--vary", action="append", default=[], metavar="FLAG=A,B",
                        help="another flag of train.py, and its values; yes and no for a switch")
    parser.add_argument("--one-at-a-time", action="store_true", help="the defaults, and each value "
                        "of --vary with all else at its default, instead of every combination")
    parser.add_argument("--metric", help="to choose and compare by (the task's main one)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--out", default="runs/sweep", help="the folder of all runs (runs/sweep)")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args, rest = parser.parse_known_args(argv)
    given = train.parse(rest)
    for name in ("overwrite", "resume", "from_peft"):
        if getattr(given, name):
            raise UserError(f"{flag(name)}: not in a sweep")
    for name, plural in VARIED.items():
        if getattr(given, name) is not None:
            raise UserError(f"--{name}: give --{plural}, comma-separated")
    args.model = given.model or str(train.BASE)
    args.vary = [varied(text, given) for text in args.vary]
    for name, times in Counter(name for name, _ in args.vary).items():
        if times > 1:
            raise UserError(f"--vary {name}: given twice; its values are comma-separated")
    args.search_seeds = args.search_seeds or args.seeds
    for name in (*VARIED.values(), "search_seeds"):
        if getattr(args, name) is not None:
            setattr(args, name, values(flag(name), getattr(args, name), WHOLE.get(name, str)))
    for method in args.methods:
        if method not in METHODS:
            raise UserError(f"--methods {method}: unknown{nearest(method, METHODS)}")
    for name, _ in args.vary:
        if all(name in train.unused_flags(method) for method in args.methods):
            raise UserError(f"--vary {name}: no method of --methods uses it")
    for seed in args.search_seeds:
        if seed not in args.seeds:
            raise UserError(f"--search-seeds {seed}: not one of --seeds")
    if not args.out:
        raise UserError("--out: is empty")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    return args, rest


def values(name: str, text: str, kind: type = str) -> list[str]:
    """The values of a comma-separated list, each once: 0,00 is one seed."""
    found = [value.strip() for value in text.split(",")]
    if "" in found:
        raise UserError(f"{name} {text}: a value is missing")
    try:
        return list(dict.fromkeys(str(kind(value)) for value in found))
    except ValueError:
        raise UserError(f"{name} {text}: not whole numbers") from None


def varied(text: str, given: Namespace) -> tuple[str, list[str]]:
    """init-std=0.03,0.06 -> init_std, [0.03, 0.06]"""
    name, _, listed = text.partition("=")
    name = name.replace("-", "_")
    known = vars(given).keys() - set(VARIED) - set(FIXED)
    if name not in known:
        raise UserError(f"--vary {text}: train.py has no such flag to vary" + nearest(name, known))
    if getattr(given, name) is not None:
        raise UserError(f"--vary {text}: {flag(name)} is given for all runs, too")
    return name, values(f"--vary {name}", listed)


def settings(args: Namespace) -> list[Setting]:
    """Each combination once: a flag that a method does not use does not multiply its runs."""
    combinations = list(product(*(listed for _, listed in args.vary)))
    if args.one_at_a_time:
        default = [None] * len(args.vary)
        combinations = [default] + [default[:i] + [value] + default[i + 1:]
                                    for i, (_, listed) in enumerate(args.vary) for value in listed]
    found = {}
    for method, rank, combination in product(args.methods, args.ranks or ["8"], combinations):
        unused = train.unused_flags(method)
        own = tuple((name, None if name in unused else value)
                    for (name, _), value in zip(args.vary, combination))
        found[Setting(method, None if "rank" in unused else rank, own)] = None
    return list(found)


def rates(method: str, model: str, lrs: list[str]) -> list[str]:
    """The learning rates with each xN made N times the method's own on that model."""
    own, found = train.default_lr(method, model), {}
    for lr in lrs:
        try:
            rate = own * float(lr[1:]) if lr[0] == "x" else float(lr)
            found[f"{rate:g}"] = None       # one name a rate: 0.01 and 1e-2 are the same run
        except ValueError:
            raise UserError(f"--lrs {lr}: neither a learning rate nor x and a number") from None
    return list(found)


def typed(name: str, value: str) -> str:
    """As train.py takes it: --alpha=32, and for a switch --no-clip or --norm-gradient."""
    return {"yes": flag(name), "no": flag(f"no_{name}")}.get(value, f"{flag(name)}={value}")


def trial(setting: Setting, lr: str, seed: str, args: Namespace, rest: list[str]) -> Trial:
    """UserError: what train.py refuses before it loads model and data; a run in the folder that
    has other flags, or is finished and damaged."""
    own = {"method": setting.method, "rank": setting.rank, "lr": lr, "seed": seed}
    flags = [part for name, value in own.items() if value is not None
             for part in (f"--{name}", value)]
    marks = [setting.method, *([f"r{setting.rank}"] if setting.rank else [])]
    for name, value in setting.varied:
        if value is not None:
            flags.append(typed(name, value))
            marks.append(f"{name}{value}")
    task = train.parse(rest).task or "facts"
    name = "-".join([task, *marks, f"lr{lr}", f"s{seed}"]).replace("/", "_")
    folder = Path(args.out, name)
    flags += [*rest, "--out", str(folder), "--resume"]
    given = train.parse(flags)
    train.check(given)
    if visible(folder):
        saved_flags(given)
        read_run(folder)
    train.resolve(given)
    return Trial(setting, lr, seed, folder, flags)


# ---- running it
class Runner:
    """Runs trials, several at a time, each in a process of its own."""

    def __init__(self, jobs: int, total: int, metric: str | None):
        self.jobs, self.metric, self.stopping = jobs, metric, threading.Event()
        self.first: Trial | None = None         # until it has begun: what it is refused, all are
        self.children: set[subprocess.Popen] = set()
        self.failed: dict[str, str] = {}                # folder -> why
        self.bar = tqdm(total=total, unit="run", smoothing=0)

    def perform(self, trials: list[Trial]) -> None:
        """Those that are not finished. Ctrl-C and SIGTERM are passed on: each run saves, stops.

        UserError: the first was refused before it began; the task has no such metric.
        """
        todo = [t for t in trials if not finished(t.folder)]
        self.bar.initial += len(trials) - len(todo)     # no time was spent on these
        self.bar.update(len(trials) - len(todo))
        usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    waiting = {pool.submit(self.execute, t): t for t in todo}
                    while waiting:
                        done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                        for future in done:
                            self.report(waiting.pop(future), *future.result())
                        self.bar.refresh()
                except BaseException:
                    self.stopping.set()
                    for child in list(self.children):
                        child.terminate()
                    pool.shutdown(cancel_futures=True)
                    self.bar.close()
                    raise
        except KeyboardInterrupt:
            print("stopped; the same sweep goes on", file=sys.stderr)
            sys.exit(130)
        finally:
            signal.signal(signal.SIGTERM, usual)

    def execute(self, trial: Trial) -> tuple[int, str]:
        """-> the exit status, and the last line printed. Waits while another process is at work in
        the folder, and until the first run has begun."""
        while not (self.stopping.is_set() or finished(trial.folder)):
            first = self.first
            if busy(trial.folder) or first not in (None, trial) and not visible(first.folder):
                time.sleep(1)
                continue
            status, said = self.child(trial)
            if not (busy(trial.folder) or finished(trial.folder)):  # else another was quicker
                return status, said
        return 0, ""

    def child(self, trial: Trial) -> tuple[int, str]:
        cores = os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs))} | os.environ
        with open(log_of(trial), "a+b") as log:
            begin = log.tell()
            child = subprocess.Popen([sys.executable, train.__file__, *trial.flags], stdout=log,
                                     stderr=log, env=environment, start_new_session=True)
            self.children.add(child)
            if self.stopping.is_set():          # since it was asked above
                child.terminate()
            status = child.wait()
            self.children.discard(child)
            log.seek(begin)
            lines = log.read().decode(errors="replace").strip().splitlines()
        if status < 0:
            return status, f"ended by signal {-status}"
        return status, lines[-1] if lines else f"exit status {status}"

    def report(self, trial: Trial, status: int, said: str) -> None:
        self.bar.update()
        run = None
        try:
            run = read_run(trial.folder) if status == 0 else None
        except UserError as error:
            said = str(error)
        if trial is self.first:
            if status == 2 and not visible(trial.folder):
                raise UserError(said.removeprefix("error: "))
            self.first = None
        if run is None:
            self.failed[trial.folder.name] = said
            tqdm.write(f"{trial.folder.name}: failed: {said}", file=sys.stderr)
            return
        name = metric_of({trial.setting: [run]}, self.metric)
        tqdm.write(f"{trial.folder.name}: {name} {run.result['valid'][name]:.4f} on validation, "
                   f"{run.result['after'][name]:.4f} on the test, {run.result['seconds']:.0f} s",
                   file=sys.stderr)


def log_of(trial: Trial) -> Path:
    return trial.folder.parent / "logs" / f"{trial.folder.name}.txt"


def busy(folder: Path) -> bool:
    """Another process is at work there."""
    if not folder.exists():
        return False
    try:
        lock = locked(folder)
    except UserError:
        return True
    if lock is not None:
        os.close(lock)
    return False


# ---- what came out
Found = dict[Setting, list[SavedRun]]


def collect(trials: list[Trial]) -> Found:
    """The runs of each setting that are finished."""
    found: Found = {}
    for t in trials:
        run = read_run(t.folder)
        if run is not None:
            found.setdefault(t.setting, []).append(run)
    return found


def best_rates(found: Found, metric: str) -> Found:
    """Of each setting the runs with the learning rate that is best on validation. UserError: runs
    of one setting that were begun with other defaults."""
    best = {}
    for setting, runs in found.items():
        if len({run.setting for run in runs}) > 1:
            unlike = next(run for run in runs if run.setting != runs[0].setting)
            raise UserError(f"{unlike.folder} and {runs[0].folder} differ in more than learning "
                            "rate and seed: a default has changed between them")
        best[setting], = chosen(runs, metric).values()
    return best


def metric_of(found: Found, name: str | None) -> str:
    """--metric, or the task's main one. UserError: the task does not have it."""
    result = next(iter(found.values()))[0].result
    known = result["after"].keys() & result["valid"].keys()
    if name is not None and name not in known:
        raise UserError(f"--metric {name}: the task has no such metric" + nearest(name, known))
    return name or main_metric(result)


def rows_of(best: Found, metric: str) -> list[dict[str, str]]:
    """A row a setting. Of the settings of a rank the best mean is bold, and "~" stands where the
    difference from it is within noise."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    scores = {setting: [sign * run.result["after"][metric] for run in runs]
              for setting, runs in best.items()}
    rows = []
    for setting, runs in best.items():
        first, n = runs[0], len(runs)
        peers = [other for other in best if other.rank == setting.rank]
        winner = max(peers, key=lambda other: spread(scores[other])[0])
        shown = plus_minus(runs, metric, limits=True)
        if len(peers) > 1 and setting == winner and n > 1:
            shown = f"**{shown}**"
        elif min(n, len(scores[winner])) > 1 and setting != winner:
            shown += " ~" * within_noise(scores[setting], scores[winner])
        peak = max(run.result["peak_memory_mb"] or 0 for run in runs)
        seconds = sum(run.result["seconds"] for run in runs) / n
        rows.append({
            "method": setting.method, "rank": setting.rank or "",
            **{name: value or "" for name, value in setting.varied},
            "lr": f"{first.args.lr:g}", "seeds": str(n), metric: shown,
            **{name: plus_minus(runs, name) for name in beside(first.result, metric)},
            "trainable": f"{first.result['trainable']:,}", "s a run": f"{seconds:.0f}",
            "peak MB": f"{peak:.0f}" if peak else ""})
    return rows


def plus_minus(runs: list[SavedRun], metric: str, limits: bool = False,
               split: str = "after") -> str:
    """Mean ± standard deviation of a score on "before", "valid" or "after" (the test), with limits
    [the interval of the mean]."""
    mean, sd, half = spread([run.result[split][metric] for run in runs])
    if sd is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {sd:.3f}" + f" [{mean - half:.3f}, {mean + half:.3f}]" * limits


def beside(result: dict, metric: str) -> list[str]:
    """The metrics beside the main one: of a task of several sets the averages alone."""
    return [name for name in result["after"] if name != metric
            and ("/" not in name or name.endswith(f"/{AVERAGE}"))]


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def notes(args: Namespace, found: Found, best: Found, metric: str,
          failed: dict[str, str]) -> str:
    """What a reader must know of the table."""
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
        f"{metric} on the test split: mean ± standard deviation over seeds [Student's 95 % "
        "interval of the mean]; bold: the best of its rank; ~: a tie with it, Welch's 95 % "
        "interval of the difference holds 0 (not corrected for the number of comparisons); one "
        "seed decides nothing, and has neither",
        f"lr: of {', '.join(args.lrs)} (xN: N times the method's own) the best {metric} on "
        f"validation, on average over seeds {', '.join(args.search_seeds)}"]
    if edges:
        lines.append("the best lr is the highest or lowest one tried, so another may be better: "
                     + ", ".join(edges))
    lines += [f"no result from {name}: {said}" for name, said in failed.items()]
    return "".join(f"- {line}\n" for line in lines)


def at_edge(found: Found, best: Found) -> list[str]:
    """The settings whose best learning rate is the lowest or the highest of several."""
    return [named(setting) for setting, runs in best.items() if edge(found[setting], runs)]


def edge(tried: list[SavedRun], best: list[SavedRun]) -> str:
    """^: the best learning rate is the highest of several, v: the lowest."""
    lrs, lr = {run.args.lr for run in tried}, best[0].args.lr
    if len(lrs) == 1:
        return ""
    return "^" if lr == max(lrs) else "v" if lr == min(lrs) else ""


def named(setting: Setting) -> str:
    return " ".join([setting.method, *([f"rank {setting.rank}"] if setting.rank else []),
                     *(typed(name, value) for name, value in setting.varied if value)])


def write_results(path: Path, found: Found, best: Found) -> None:
    """A line a run: its setting, its scores before, on validation and after, what it took."""
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


def saved_sweep(found: Found, best: Found, metric: str | None = None) -> analyze.Sweep:
    """What the figures are drawn from: a method has one setting at a rank."""
    return analyze.Sweep([run for runs in found.values() for run in runs],
                         {(runs[0].args.method, runs[0].args.rank): runs for runs in best.values()},
                         metric_of(found, metric))


def draw(sweep: analyze.Sweep, out: Path) -> list[str]:
    names = []
    for name in ("score", "rates", "loss"):
        try:
            figure, numbers = analyze.FIGURES[name](sweep)
        except analyze.Lacking:                 # rates, where each method had one
            continue
        save_figure(figure, out / f"{name}.png", numbers)
        names.append(f"{name}.png")
    return names


# ---- the command
def search_of(args: Namespace, rest: list[str]) -> list[Trial]:
    """Every learning rate of every setting, with the search's seeds."""
    return [trial(setting, lr, seed, args, rest) for setting in settings(args)
            for lr in rates(setting.method, dict(setting.varied).get("model", args.model), args.lrs)
            for seed in args.search_seeds]


def rest_of(args: Namespace, rest: list[str], search: list[Trial]) -> list[Trial]:
    """The chosen rate of every setting with the other seeds, once the search is done."""
    found = collect(search)
    best = best_rates(found, metric_of(found, args.metric)) if found else {}
    return [trial(t.setting, t.lr, seed, args, rest) for t in search
            if t.seed == args.search_seeds[0] and t.setting in best
            and float(t.lr) == best[t.setting][0].args.lr
            for seed in args.seeds if seed not in args.search_seeds]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args, rest = parse(argv)
    search = search_of(args, rest)
    if args.list:
        ready = all(finished(t.folder) for t in search)
        for t in search + (rest_of(args, rest, search) if ready else []):
            print(shlex.join([sys.executable, train.__file__, *t.flags]))
        return
    log_of(search[0]).parent.mkdir(parents=True, exist_ok=True)
    later = len({t.setting for t in search}) * (len(args.seeds) - len(args.search_seeds))
    runner = Runner(args.jobs, len(search) + later, args.metric)
    with runner.bar:
        if done := collect(search):
            metric_of(done, args.metric)
        else:
            runner.first = search[0]
        runner.perform(search)
        trials = search + rest_of(args, rest, search)
        runner.perform(trials[len(search):])

    found = collect(trials)
    if found:
        metric = metric_of(found, args.metric)
        best = best_rates(found, metric)
        out = Path(args.out)
        command = shlex.join(["python", "ablate.py", *(sys.argv[1:] if argv is None else argv)])
        table = markdown(rows_of(best, metric))
        text = f"    {command}\n\n{table}\n{notes(args, found, best, metric, runner.failed)}"
        with atomic_write(out / "table.md") as path:
            path.write_text(text, encoding="utf-8")
        write_results(out / "results.csv", found, best)
        figures = [] if args.vary else draw(saved_sweep(found, best, metric), out)
        print(text)
        print(f"{out}: {', '.join(['table.md', 'results.csv', *figures])}")
    if runner.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
