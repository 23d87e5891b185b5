"""Runs what README.md's and RESULTS.md's results rest on, judges the claims, writes the tables.

    python -m experiments.claims --jobs 2         # all of it: five hours on two cores; the same
                                                    command goes on after a stop
    python -m experiments.claims facts --jobs 2   # one part
    python -m experiments.claims plain --methods vera     # README's row of a method that you added
                                                    to METHODS; `write` puts it there
    python -m experiments.claims write            # the tables and figures of the finished parts

Each part is a few sweeps of ablate.py, which describes how a learning rate is chosen. A run's seed
also draws its facts. The part `choices` varies what the papers leave open, with as many trials for
every method. Its seeds start at 1,000, so no other part sees its facts. TUNED was set from a first
version of that part, which had one seed.
All tables but README's first are older: they were made before Dual LoRA's start took its size from
W0 and before seeds drew the facts.
"""
import shlex
import sys
from pathlib import Path
from typing import Iterable

from experiments.analyze import FIGURES
from experiments.grid import Trial, parse_sweep, search_of, values
from experiments.pages import (PAGES, put_table, row_of_choices, split_page, table_of_methods,
                               table_of_part)
from experiments.plots import save_figure
from experiments.sweep import rest_of, run_sweep
from experiments.table import (Found, best_rates, collect, draw_sweep, markdown, metric_of,
                               saved_sweep, write_results)
from experiments.verdicts import (scores_by_rank, verdict_on_overlap, verdict_on_positions,
                                  verdict_on_spectra, verdicts_on_scores, verdicts_on_slopes)
from methods import METHODS
from support.errors import UserError, exit_on_user_error, nearest
from support.files import atomic_write
from support.parser import Parser
from support.run import ROOT, finished

RUNS = "runs/claims"

# ---- the runs
TUNED = {"lora": "--warmup 60", "lora+": "--warmup 60", "dash": "--warmup 60", "dora": "",
         "adalora": "--gamma 0.01", "dual": ""}         # beside --alpha 4 x rank
# The papers leave these open: as many variations for each method.
CHOICES = {
    "dual": "update-warmup=20 init-std=0.03,0.12 r1=2,6 clip=no direction-lr=0.1,1 alpha=32",
    "lora": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05 lr-ratio=0.5,2",
    "lora+": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05 lr-ratio=4,8",
    "dora": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05 lr-ratio=2 "
            "norm-gradient=yes",
    "adalora": "gamma=0.03,0.1,0.3 init-rank=8,16 t-init=0.02 t-final=0.5 warmup=60 alpha=32",
    "dash": "prelaunch=25,150 directions=4,16 warmup=5,60 alpha=8,32 weight-decay=0.1"}


def tuned(methods: str, rank: int, flags: str) -> list[str]:
    """Makes a sweep for each method, with the settings of TUNED."""
    return [f"--methods {method} --ranks {rank} --alpha {4 * rank} {TUNED[method]} {flags}"
            for method in methods.split(",")]


def plain(methods: Iterable[str]) -> str:
    """Makes the sweep of `python train.py --method X --seed S` for seeds 0, 1 and 2."""
    return f"--methods {','.join(methods)} {PLAIN_FLAGS} --out {RUNS}/plain"


ADAPTERS = ",".join(TUNED)
PLAIN_FLAGS = "--lrs x1 --seeds 0,1,2"
SEARCH_FLAGS = "--search-seeds 0 --seeds 0,1,2"
FACTS_FLAGS = f"--search-seeds 0 --eval-every 50 --snapshot-every 20 --out {RUNS}/facts"
PARTS = {
    "choices": [f"--methods {method} --lrs x0.5,x0.7,x1,x1.4,x2 "
                f"--search-seeds 1000 --seeds 1000,1001,1002 "
                f"--one-at-a-time {' '.join(f'--vary {choice}' for choice in choices.split())} "
                f"--out {RUNS}/choices/{method}" for method, choices in CHOICES.items()],
    "facts": [
        *tuned(ADAPTERS, 8, f"--lrs x0.35,x0.5,x0.7,x1 --seeds 0,1,2,3,4 {FACTS_FLAGS}"),
        *tuned(ADAPTERS, 2, f"--lrs x0.7,x1,x1.4,x2 --seeds 0,1,2,3,4 {FACTS_FLAGS}"),
        *tuned(ADAPTERS, 4, f"--lrs x0.5,x0.7,x1,x1.4 --seeds 0,1,2 {FACTS_FLAGS}"),
        *tuned("lora,dual", 16, f"--lrs x0.35,x0.5,x0.7,x1 --seeds 0,1,2 {FACTS_FLAGS}"),
        f"--methods full --lrs x0.5,x1,x2 --seeds 0,1,2,3,4 {FACTS_FLAGS}"],
    "rank-1": tuned("dash", 1, f"--lrs x0.7,x1,x1.4,x2 {SEARCH_FLAGS} --out {RUNS}/rank-1"),
    "one-rate": tuned("lora,dora,adalora,dash,dual", 8,
                      f"--lrs 7.5e-3 --seeds 0,1,2 --out {RUNS}/one-rate"),
    "mini": [f"--methods {methods} --task mini --lrs {rates} {SEARCH_FLAGS} --out {RUNS}/mini"
             for methods, rates in (("full,lora+", "1e-3,2e-3"), ("lora,dora,dash", "7e-3,1e-2"),
                                    ("adalora", "2e-2,4e-2"), ("dual", "1e-2,1.5e-2"))],
    "plain": [plain(METHODS)],
    "defaults": ["--methods lora,dora,adalora,dash,dual,full --ranks 2,8 --seeds 0,1,2 "
                 f"--out {RUNS}/defaults"]}


class Unfinished(UserError):
    """Tells that runs of a part are missing."""


# ---- reading the runs
def read_part(part: str, lines: list[str] | None = None) -> tuple[Found, Found]:
    """Reads all runs of a part, or of some of its sweeps, and those with the chosen rates.

    Raises Unfinished if a run is missing, UserError if one is damaged.
    """
    found, best = {}, {}
    for line in PARTS[part] if lines is None else lines:
        args = parse_sweep(shlex.split(line))
        search = search_of(args)
        require_finished(part, search)
        trials = search + rest_of(args, search)
        require_finished(part, trials)
        of_line = collect(trials)
        found |= of_line
        best |= best_rates(of_line, metric_of(of_line, args.metric))
    return found, best


def require_finished(part: str, trials: list[Trial]) -> None:
    missing = [t.folder for t in trials if not finished(t.folder)]
    if missing:
        raise Unfinished(f"{missing[0]}: no finished run; first: python -m experiments.claims "
                         f"{part}")


def read_plain() -> tuple[Found, Found, list[str]]:
    """Reads the part `plain` of each method that has it, and lists what the others lack."""
    found, best, lacking = {}, {}, []
    for method in METHODS:
        try:
            of_method = read_part(f"plain --methods {method}", [plain([method])])
        except Unfinished as error:
            lacking.append(str(error))
            continue
        found |= of_method[0]
        best |= of_method[1]
    return found, best, lacking


# ---- writing
def summarise(part: str) -> None:
    """Writes a part's table.md, results.csv and figures.

    The sweeps of a part share a folder, and each has left there what it made alone.
    """
    found, best, *_ = read_plain() if part == "plain" else read_part(part)
    out = Path(RUNS, part)
    with atomic_write(out / "table.md") as path:
        path.write_text(table_of_part(found, best), encoding="utf-8")
    write_results(out / "results.csv", found, best)
    draw_sweep(saved_sweep(found, best), out)


def write_pages() -> None:
    """Writes the tables and figures of finished parts, and prints what the others lack.

    Raises UserError if a run is damaged or a page lacks a mark.
    """
    for name in PAGES:
        split_page(name)
    _, best, lacking = read_plain()
    tables = {"methods": table_of_methods(split_page("methods")[1], {
        setting.method: runs for setting, runs in best.items()})}
    parts = {}
    for part in [part for part in PARTS if part != "plain"]:
        try:
            parts[part] = read_part(part)
        except Unfinished as error:
            lacking.append(str(error))
    for line in lacking:
        print(line)
    if "choices" in parts:
        found, best = parts.pop("choices")
        tables["choices"] = markdown(
            [row_of_choices(found, {setting: runs for setting, runs in best.items()
                                    if setting.method == method}) for method in CHOICES])
    tables |= {part: table_of_part(*parts[part]) for part in PAGES if part in parts}
    sweeps = {part: saved_sweep(*of_part) for part, of_part in parts.items()}
    if "facts" in sweeps:
        facts, numbers = sweeps["facts"], {}
        for name, draw_figure in FIGURES.items():
            figure, numbers[name] = draw_figure(facts)
            save_figure(figure, ROOT / "assets" / f"{name}.png", numbers[name])
        if sweeps.keys() >= {"mini", "rank-1", "one-rate"}:
            scores = {part: scores_by_rank(sweep) for part, sweep in sweeps.items()}
            verdicts = [
                *verdicts_on_scores(scores),
                verdict_on_spectra(numbers["spectra"]), verdict_on_positions(numbers["directions"]),
                verdict_on_overlap(numbers["directions"]), *verdicts_on_slopes(numbers["dora"])]
            tables["claims"] = markdown([verdict._asdict() for verdict in verdicts])
    for name, table in tables.items():
        put_table(name, table)
    for name, page in PAGES.items():
        print(f"{page}: {name} {'written' if name in tables else 'left as it was'}")


# ---- the command
@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("part", nargs="?", help=f"part to run: {', '.join(PARTS)}, or write (all)")
    parser.add_argument("--jobs", default="1", help="runs at a time (1)")
    parser.add_argument("--methods", help="methods that the part plain runs: "
                                          f"{', '.join(METHODS)} (all)")
    args = parser.parse_args(argv)
    if args.part not in (None, "write", *PARTS):
        raise UserError(f"{args.part}: no such part{nearest(args.part, [*PARTS, 'write'])}")
    if args.methods is not None and args.part != "plain":
        raise UserError("--methods goes with the part plain alone")
    parts = {args.part: PARTS[args.part]} if args.part in PARTS else {} if args.part else PARTS
    if args.methods is not None:
        parts = {"plain": [plain(values("--methods", args.methods))]}
    failed = False
    for part, lines in parts.items():
        for line in lines:
            try:
                run_sweep([*shlex.split(line), "--jobs", args.jobs])
            except SystemExit as end:
                if end.code != 1:
                    raise
                failed = True               # the sweep has printed the run; the others go on
        if part != "choices" and not failed:            # choices has a folder for each method
            summarise(part)
    if args.part in (None, "write"):
        write_pages()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
