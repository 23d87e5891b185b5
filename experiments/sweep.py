"""Runs a sweep: what is finished is skipped, what was stopped goes on."""
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

from experiments.grid import Trial, parse, search_of, trial
from experiments.results import on_validation, read_run
from experiments.table import (best_rates, collect, draw, markdown, metric_of, notes, rows_of,
                               saved_sweep, write_results)
from support.errors import UserError
from support.files import atomic_write
from support.run import ROOT, finished, locked, visible

TRAIN = str(ROOT / "train.py")

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
            child = subprocess.Popen([sys.executable, TRAIN, *trial.flags], stdout=log,
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
        tqdm.write(f"{trial.folder.name}: {name} {on_validation(run.result, name):.4f} on "
                   f"validation, {run.result['after'][name]:.4f} on the test, {run.result['seconds']:.0f} s",
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


def rest_of(args: Namespace, rest: list[str], search: list[Trial]) -> list[Trial]:
    """The chosen rate of every setting with the other seeds, once the search is done."""
    found = collect(search)
    best = best_rates(found, metric_of(found, args.metric)) if found else {}
    return [trial(t.setting, t.lr, seed, args, rest) for t in search
            if t.seed == args.search_seeds[0] and t.setting in best
            and float(t.lr) == best[t.setting][0].args.lr
            for seed in args.seeds if seed not in args.search_seeds]


def run(argv: list[str] | None, doc: str = "") -> None:
    """The whole command ablate.py, whose help is `doc`."""
    args, rest = parse(argv, doc)
    search = search_of(args, rest)
    if args.list:
        ready = all(finished(t.folder) for t in search)
        for t in search + (rest_of(args, rest, search) if ready else []):
            print(shlex.join([sys.executable, TRAIN, *t.flags]))
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
