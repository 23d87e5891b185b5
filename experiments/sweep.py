"""Runs a sweep: finished runs are skipped, stopped ones go on."""
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from experiments.grid import Trial, parse_sweep, search_of, trial
from experiments.results import on_validation, read_run
from experiments.table import (best_rates, collect, draw_sweep, markdown, metric_of, notes, rows_of,
                               saved_sweep, write_results)
from support.errors import UserError
from support.files import atomic_write
from support.run import ROOT, finished, visible

TRAIN = [sys.executable, str(ROOT / "train.py")]


class Runner:
    """Runs trials, `jobs` at a time, each in a process of its own."""

    def __init__(self, jobs: int, total: int, metric: str | None, train: list[str]):
        self.jobs, self.metric, self.train = jobs, metric, train
        self.running: dict[subprocess.Popen, tuple[Trial, int]] = {}    # and its log's old length
        self.failed: dict[str, str] = {}                                # folder -> reason
        self.bar = tqdm(total=total, unit="run", smoothing=0)

    def perform(self, trials: list[Trial], first_decides: bool = False) -> None:
        """Runs the trials that are not finished. Ctrl-C and SIGTERM let each run save and stop.

        first_decides: the first run goes alone until its folder holds files. A refusal before that
        concerns every run.
        Raises UserError if the first run is refused, or if the task does not have the metric.
        """
        todo = [t for t in trials if not finished(t.folder)]
        self.bar.initial += len(trials) - len(todo)     # the bar's speed leaves these out
        self.bar.update(len(trials) - len(todo))
        first = todo[0] if todo and first_decides else None
        usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while todo or self.running:
                if first is not None and visible(first.folder):
                    first = None
                while todo and len(self.running) < (self.jobs if first is None else 1):
                    self.begin(todo.pop(0))
                ended = [child for child in self.running if child.poll() is not None]
                for child in ended:
                    t, log_length = self.running.pop(child)
                    said = last_line(t, log_length, child.returncode)
                    if t is first and child.returncode == 2 and not visible(t.folder):
                        raise UserError(said.removeprefix("error: "))
                    self.report(t, child.returncode, said)
                    first = None if t is first else first
                if not ended:
                    self.bar.refresh()
                    time.sleep(0.1)
        except BaseException as error:
            self.bar.close()
            for child in self.running:
                child.terminate()
            for child in self.running:
                child.wait()
            if not isinstance(error, KeyboardInterrupt):
                raise
            print("stopped; the same sweep goes on", file=sys.stderr)
            sys.exit(130)
        finally:
            signal.signal(signal.SIGTERM, usual)

    def begin(self, t: Trial) -> None:
        """Starts a run, which adds what it prints to its log."""
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        with open(log_of(t), "ab") as log:
            log_length = log.tell()
            child = subprocess.Popen([*self.train, *t.flags], stdout=log, stderr=log,
                                     env={"OMP_NUM_THREADS": str(threads)} | os.environ,
                                     start_new_session=True)        # Ctrl-C reaches only us
            self.running[child] = t, log_length

    def report(self, t: Trial, status: int, said: str) -> None:
        """Prints a run's scores, or why it failed."""
        self.bar.update()
        run = None
        try:
            run = read_run(t.folder) if status == 0 else None
        except UserError as error:
            said = str(error)
        if run is None:
            self.failed[t.folder.name] = said
            tqdm.write(f"{t.folder.name}: failed: {said}", file=sys.stderr)
            return
        name = metric_of({t.setting: [run]}, self.metric)
        tqdm.write(f"{t.folder.name}: {name} {on_validation(run.result, name):.4f} on validation, "
                   f"{run.result['after'][name]:.4f} on the test, {run.result['seconds']:.0f} s",
                   file=sys.stderr)


def log_of(t: Trial) -> Path:
    return t.folder.parent / "logs" / f"{t.folder.name}.txt"


def last_line(t: Trial, log_length: int, status: int) -> str:
    """Reads the last line of a run's log; the first `log_length` bytes are from an earlier start.

    A run that printed nothing or was killed is described by its exit status.
    """
    lines = log_of(t).read_bytes()[log_length:].decode(errors="replace").strip().splitlines()
    if status < 0:
        return f"ended by signal {-status}"
    return lines[-1] if lines else f"exit status {status}"


def rest_of(args: Namespace, search: list[Trial]) -> list[Trial]:
    """Lists the runs of the other seeds with each setting's chosen rate, once that is known."""
    found = collect(search)
    best = best_rates(found, metric_of(found, args.metric)) if found else {}
    return [trial(t.setting, t.lr, seed, args) for t in search
            if t.seed == args.search_seeds[0] and t.setting in best
            and float(t.lr) == best[t.setting][0].args.lr
            for seed in args.seeds if seed not in args.search_seeds]


def run_sweep(argv: list[str] | None, doc: str = "", train: list[str] = TRAIN) -> None:
    """Runs all of ablate.py, whose help is `doc`. train: the command that makes a run."""
    args = parse_sweep(argv, doc)
    search = search_of(args)
    if args.list:
        ready = all(finished(t.folder) for t in search)
        for t in search + (rest_of(args, search) if ready else []):
            print(shlex.join([*train, *t.flags]))
        return
    log_of(search[0]).parent.mkdir(parents=True, exist_ok=True)
    later = len({t.setting for t in search}) * (len(args.seeds) - len(args.search_seeds))
    runner = Runner(args.jobs, len(search) + later, args.metric, train)
    with runner.bar:
        if done := collect(search):
            metric_of(done, args.metric)
        runner.perform(search, first_decides=not done)
        trials = search + rest_of(args, search)
        runner.perform(trials[len(search):])

    found = collect(trials)
    if found:
        metric = metric_of(found, args.metric)
        best = best_rates(found, metric)
        out = Path(args.out)
        command = shlex.join(["python", "ablate.py", *(sys.argv[1:] if argv is None else argv)])
        rows = markdown(rows_of(best, metric))
        text = f"    {command}\n\n{rows}\n{notes(args, found, best, metric, runner.failed)}"
        with atomic_write(out / "table.md") as path:
            path.write_text(text, encoding="utf-8")
        write_results(out / "results.csv", found, best)
        figures = [] if args.vary else draw_sweep(saved_sweep(found, best, metric), out)
        print(text)
        print(f"{out}: {', '.join(['table.md', 'results.csv', *figures])}")
    if runner.failed:
        sys.exit(1)
