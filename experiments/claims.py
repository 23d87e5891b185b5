"""The papers' claims, tested: every run behind README.md's and RESULTS.md's results.

    python -m experiments.claims --jobs 2           all of it: five hours on two cores; given again,
                                                    it goes on
    python -m experiments.claims facts --jobs 2     a part of it
    python -m experiments.claims write              their tables and figures, from the parts that
                                                    are finished

Each part is a few sweeps of ablate.py, which says how a learning rate is chosen. A run's seed also
draws its facts. The choices that a method leaves open are varied on facts of seeds from 1,000 on,
which no other part sees, and with as many trials for every method. TUNED was set from a first
version of that part, which had one seed.
The tables but README's first one were made before Dual LoRA's start took its size from W0 and
before seeds drew the facts; they are to be made again.
"""
import shlex
import sys
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import NamedTuple

from experiments.analyze import FIGURES
from experiments.grid import Trial, parse, search_of, typed
from experiments.learnt import Sweep
from experiments.plots import LABELS, save_figure
from experiments.results import difference, within_noise
from experiments.sweep import rest_of, run
from experiments.table import (Found, at_edge, best_rates, collect, draw, edge, markdown, metric_of,
                               plus_minus, rows_of, saved_sweep, write_results)
from methods import METHODS
from support.errors import UserError, exit_on_user_error, nearest
from support.files import atomic_write
from support.parser import Parser
from support.run import ROOT, finished

# Where each table stands. Those in RESULTS.md are called by the part whose runs they show.
PAGES = {"methods": "README.md", "claims": "README.md", "facts": "RESULTS.md",
         "mini": "RESULTS.md", "choices": "RESULTS.md", "defaults": "RESULTS.md"}
RUNS = "runs/claims"
CEILING = 0.98          # two scores above this are not compared: there was no more to learn
MARGIN = 0.02           # a score this far below another still matches it

# ---- the runs
TUNED = {"lora": "--warmup 60", "lora+": "--warmup 60", "dash": "--warmup 60", "dora": "",
         "adalora": "--gamma 0.01", "dual": ""}         # beside --alpha 4 x rank
CHOICES = {
    "dual": "update-warmup=20 init-std=0.03,0.12 r1=2,6 clip=no direction-lr=0.1,1 alpha=32",
    "lora": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05 lr-ratio=0.5,2",
    "lora+": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05 lr-ratio=4,8",
    "dora": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05 lr-ratio=2 "
            "norm-gradient=yes",
    "adalora": "gamma=0.03,0.1,0.3 init-rank=8,16 t-init=0.02 t-final=0.5 warmup=60 alpha=32",
    "dash": "prelaunch=25,150 directions=4,16 warmup=5,60 alpha=8,32 weight-decay=0.1"}


def tuned(methods: str, rank: int, flags: str) -> list[str]:
    """A sweep a method, each with what suits it."""
    return [f"--methods {method} --ranks {rank} --alpha {4 * rank} {TUNED[method]} {flags}"
            for method in methods.split(",")]


ADAPTERS = ",".join(TUNED)
SEARCH = "--search-seeds 0 --seeds 0,1,2"
FACTS = f"--search-seeds 0 --eval-every 50 --snapshot-every 20 --out {RUNS}/facts"
PARTS = {
    "choices": [f"--methods {method} --lrs x0.5,x0.7,x1,x1.4,x2 "
                f"--search-seeds 1000 --seeds 1000,1001,1002 "
                f"--one-at-a-time {' '.join(f'--vary {choice}' for choice in choices.split())} "
                f"--out {RUNS}/choices/{method}" for method, choices in CHOICES.items()],
    "facts": [
        *tuned(ADAPTERS, 8, f"--lrs x0.35,x0.5,x0.7,x1 --seeds 0,1,2,3,4 {FACTS}"),
        *tuned(ADAPTERS, 2, f"--lrs x0.7,x1,x1.4,x2 --seeds 0,1,2,3,4 {FACTS}"),
        *tuned(ADAPTERS, 4, f"--lrs x0.5,x0.7,x1,x1.4 --seeds 0,1,2 {FACTS}"),
        *tuned("lora,dual", 16, f"--lrs x0.35,x0.5,x0.7,x1 --seeds 0,1,2 {FACTS}"),
        f"--methods full --lrs x0.5,x1,x2 --seeds 0,1,2,3,4 {FACTS}"],
    "rank-1": tuned("dash", 1, f"--lrs x0.7,x1,x1.4,x2 {SEARCH} --out {RUNS}/rank-1"),
    "one-rate": tuned("lora,dora,adalora,dash,dual", 8,
                      f"--lrs 7.5e-3 --seeds 0,1,2 --out {RUNS}/one-rate"),
    "mini": [f"--methods {methods} --task mini --lrs {rates} {SEARCH} --out {RUNS}/mini"
             for methods, rates in (("full,lora+", "1e-3,2e-3"), ("lora,dora,dash", "7e-3,1e-2"),
                                    ("adalora", "2e-2,4e-2"), ("dual", "1e-2,1.5e-2"))],
    # The runs of plain `python train.py --method X --seed S`:
    "plain": [f"--methods full,{ADAPTERS} --lrs x1 --seeds 0,1,2 --out {RUNS}/plain"],
    "defaults": ["--methods lora,dora,adalora,dash,dual,full --ranks 2,8 --seeds 0,1,2 "
                 f"--out {RUNS}/defaults"]}


class Unfinished(UserError):
    """Not all runs of a part are there."""


def read_part(part: str) -> tuple[Found, Found]:
    """All runs of a part, and those with the chosen learning rates. Unfinished: one is missing.
    UserError: one is damaged."""
    found, best = {}, {}
    for line in PARTS[part]:
        args, rest = parse(shlex.split(line))
        search = search_of(args, rest)
        require_finished(part, search)
        trials = search + rest_of(args, rest, search)
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


# ---- what a claim comes to
class Verdict(NamedTuple):
    """A row of the table of claims."""
    claim: str
    paper: str
    runs: str           # the parts that it rests on
    here: str
    verdict: str        # seen, not seen, opposite


Scores = dict[tuple[str, int | None], list[float]]      # by method and rank, a score a seed
Pairs = dict[str, tuple[list[float], list[float]]]      # where -> the scores of two methods there


def scores_of(sweep: Sweep) -> Scores:
    """The main metric on the test split of the chosen learning rate."""
    return {key: [run.result["after"][sweep.metric] for run in runs]
            for key, runs in sweep.chosen.items()}


def pairs(a: str, b: str, parts: dict[str, Scores]) -> Pairs:
    """The scores of methods a and b wherever both were run."""
    return {f"{part} {rank}": (table[a, rank], table[b, rank]) for part, table in parts.items()
            for rank in sorted({rank for method, rank in table if method == a and rank})
            if (b, rank) in table}


def at_ceiling(a: list[float], b: list[float]) -> bool:
    return min(fmean(a), fmean(b)) > CEILING


def beyond_noise(compared: Pairs) -> tuple[int, int, int]:
    """In how many pairs the 95 % interval of the difference is above 0, below it, and of how many:
    those at the ceiling do not count."""
    limits = [difference(a, b)[1:] for a, b in compared.values() if not at_ceiling(a, b)]
    return sum(low > 0 for low, _ in limits), sum(high < 0 for _, high in limits), len(limits)


def higher(compared: Pairs, every: bool = False) -> str:
    """Whether the first of each pair is better. seen: beyond noise in every pair that counts, or in
    more than half and worse in none; opposite: worse in more than half and better in none."""
    above, below, n = beyond_noise(compared)
    return ("seen" if above > (n - 1 if every else n / 2) and not below else
            "opposite" if below > n / 2 and not above else "not seen")


def as_good(compared: Pairs) -> str:
    """seen: no 95 % interval of a difference reaches below -MARGIN; opposite: all are below it."""
    limits = [difference(a, b)[1:] for a, b in compared.values()]
    return ("seen" if all(low >= -MARGIN for low, _ in limits) else
            "opposite" if all(high < -MARGIN for _, high in limits) else "not seen")


def interval(a: list[float], b: list[float]) -> str:
    """The difference of the means ± half the width of Welch's 95 % interval."""
    mean, _, high = difference(a, b)
    return f"{mean:+.3f} ± {high - mean:.3f}"


def shown(compared: Pairs) -> str:
    """Each difference, those at the ceiling in brackets."""
    return ", ".join(f"({where} {interval(a, b)})" if at_ceiling(a, b) else
                     f"{where} {interval(a, b)}" for where, (a, b) in compared.items())


def of_scores(parts: dict[str, Scores]) -> list[Verdict]:
    """The claims about how well methods score."""
    facts = parts["facts"]
    found = []
    for a, b, which in (
            ("dual", "lora", " at equal parameters, at every budget"),
            ("dual", "lora+", " at every budget"), ("dual", "dora", " at every budget"),
            ("adalora", "lora", " at the same final budget"), ("dash", "lora", "")):
        compared = pairs(a, b, {"facts": facts, "mini": parts["mini"]})
        above, below, n = beyond_noise(compared)
        found.append(Verdict(
            f"{LABELS[a]} beats {LABELS[b]}{which}", LABELS[a], "facts, mini",
            f"{shown(compared)}: better beyond noise in {above}, worse in {below} of {n}",
            higher(compared, every="every" in which)))
    small = {f"LoRA's {rank}": (parts["rank-1"]["dash", 1], facts["lora", rank])
             for rank in (8, 16)}
    found.append(Verdict(
        "LoRA-Dash reaches LoRA's score with 8 to 16 times fewer parameters", "LoRA-Dash",
        "facts, rank-1", f"rank 1, {fmean(parts['rank-1']['dash', 1]):.3f}, less {shown(small)}",
        as_good(small)))
    half = {f"rank {rank} less LoRA's {2 * rank}": (facts["dora", rank], facts["lora", 2 * rank])
            for method, rank in sorted(facts, key=str)
            if method == "dora" and ("lora", 2 * rank) in facts}
    found.append(Verdict("DoRA at half the rank matches LoRA", "DoRA", "facts", shown(half),
                         as_good(half)))
    return found + of_tuning(parts["one-rate"], facts)


def ranges(table: Scores, methods: list[str], rank: int, seeds: int) -> list[float]:
    """How far apart the best and the worst method are, a number a seed."""
    scores = [table[method, rank][:seeds] for method in methods]
    return [max(of_seed) - min(of_seed) for of_seed in zip(*scores, strict=True)]


def of_tuning(one_rate: Scores, facts: Scores) -> list[Verdict]:
    """seen: the best and the worst method are closer together beyond noise when each has its own
    learning rate; opposite: farther apart. For all, and without the one that matters most."""
    methods, (rank, *_) = zip(*one_rate)
    seeds = min(map(len, one_rate.values()))
    found = {}
    for left_out in (None, *methods):
        rest = [method for method in methods if method != left_out]
        found[left_out] = [ranges(table, rest, rank, seeds) for table in (facts, one_rate)]
    least = max(methods, key=lambda left_out: difference(*found[left_out])[0])
    rows = []
    for left_out, without in ((None, ""), (least, f", {LABELS[least]} left out")):
        after, before = found[left_out]
        _, low, high = difference(after, before)
        names = ", ".join(LABELS[method] for method in methods if method != left_out)
        rows.append(Verdict(
            f"Tuned learning rates shrink the differences{without}", "2602.04998",
            "facts, one-rate", f"best less worst of {names} at rank {rank}, from one rate for all, "
            f"LoRA's own, to each its own: {fmean(before):.3f} to {fmean(after):.3f} "
            f"({interval(after, before)})",
            "seen" if high < 0 else "opposite" if low > 0 else "not seen"))
    return rows


def of_spectra(numbers: dict) -> Verdict:
    """seen: nine tenths of the singular values, or more, are above 1 % of the largest, in Dual
    LoRA's update and in its matrix of signs. Beside it signs of a random product as thin."""
    k = len(numbers["full"]["median"])
    above, effective = ({label: fmean(row[name]) for label, row in numbers.items()}
                        for name in ("numerical_rank", "effective_rank"))
    dual, sign = "Dual LoRA", "Dual: Sign(DC)"
    return Verdict(
        "Dual LoRA's update, and its matrix of signs, are nearly of full rank", dual, "facts",
        f"singular values above 1 %: {above[dual]:.0f} and {above[sign]:.0f} of {k} (of random "
        f"factors {above['random dW']:.0f} and {above['random Sign(DC)']:.0f}), LoRA's "
        f"{above['LoRA']:.0f}; effective rank {effective[dual]:.0f} and {effective[sign]:.0f} "
        f"({effective['random dW']:.0f} and {effective['random Sign(DC)']:.0f}), full's "
        f"{effective['full']:.0f}, LoRA's "
        f"{effective['LoRA']:.0f}", "seen" if min(above[dual], above[sign]) >= 0.9 * k
        else "not seen")


def of_places(numbers: dict) -> Verdict:
    """Where the directions of the highest change rates lie among the singular values. seen: in
    each seed most are in the smaller half, but half as many among the s smallest, or fewer, as of
    a Gaussian update."""
    s, k = numbers["s"], len(numbers["rates"]["full"])

    def shares(name: str, start: float) -> list[float]:
        """One a seed: the places stand seed by seed, s of each layer."""
        n = s * len(numbers["layers"])
        places = numbers["where"][name]
        return [fmean(place >= start for place in places[i:i + n])
                for i in range(0, len(places), n)]

    small, smallest = (shares("task-specific", start) for start in (0.5, 1 - s / k))
    null = fmean(shares("of a Gaussian dW", 1 - s / k))
    return Verdict(
        "Task-specific directions sit at small but not the smallest singular values", "LoRA-Dash",
        "facts",
        f"{fmean(small):.0%} in the smaller half, {fmean(smallest):.0%} among the {s} smallest of "
        f"{k} (of a Gaussian update {null:.0%})",
        "seen" if min(small) > 0.5 and max(smallest) <= null / 2 else "not seen")


def of_overlap(numbers: dict) -> Verdict:
    """LoRA's overlap with full's task-specific directions, beside that of the smallest sigma, for
    which nothing need be learnt. seen: larger with every rank, step, seed, and in most layers."""
    ranks, steps = ([share for seeds in numbers[name].values() for share in seeds]
                    for name in ("ranks", "steps"))
    layers, null, chance, another = (numbers["by layer"][name] for name in (
        "LoRA", "smallest sigma", "chance", "another seed of full"))
    beaten = sum(a > b for a, b in zip(layers, null))
    seen = min(ranks + steps) > fmean(null) and 2 * beaten > len(layers)
    return Verdict(
        "Directions predicted from LoRA overlap with the task-specific ones, whatever the rank, "
        "step, layer", "LoRA-Dash", "facts",
        f"{min(ranks):.2f} to {max(ranks):.2f} over ranks, {min(steps):.2f} to {max(steps):.2f} "
        f"over steps; the smallest singular values alone {fmean(null):.2f}, which LoRA exceeds in "
        f"{beaten} of {len(layers)} layers; chance {fmean(chance):.2f}; another seed of full "
        f"{fmean(another):.2f}", "seen" if seen else "not seen")


def of_slopes(numbers: dict) -> list[Verdict]:
    """seen: r has the sign of the claim in every seed, and on average among the layers at one step,
    too: over steps both changes grow from 0, which makes it positive. opposite: the other sign in
    all of these."""
    rows = []
    for method, sign in (("full", "negative"), ("lora", "positive"), ("dora", "negative")):
        line = numbers[method]["lines"]["q"]
        seeds, at_one_step = line["r of each seed"], fmean(line["r of each step and seed"])
        claimed = [-r if sign == "negative" else r for r in (*seeds, at_one_step)]
        rows.append(Verdict(
            f"Change of magnitude against change of direction: {sign} slope for {LABELS[method]}",
            "DoRA", "facts", f"query weights: r = {line['r']:+.2f}, of a seed {min(seeds):+.2f} to "
            f"{max(seeds):+.2f}; at one step {at_one_step:+.2f} on average",
            "seen" if min(claimed) > 0 else "opposite" if max(claimed) < 0 else "not seen"))
    return rows


# ---- the tables
def table_of(found: Found, best: Found) -> str:
    """ablate.py's table of the chosen runs by rank, and what is to be known of it."""
    order = list(METHODS)
    best = dict(sorted(best.items(), key=lambda item: (int(item[0].rank or 0),
                                                       order.index(item[0].method))))
    commits = sorted({(run.result["versions"].get("commit") or "unknown")[:7]
                      for runs in best.values() for run in runs})
    note = (f"Best at the lowest or highest rate tried: "
            f"{', '.join(at_edge(found, best)) or 'none'}. Commit {', '.join(commits)}.")
    return (markdown(rows_of(best, metric_of(found, None)))
            + "\n" + fill(note, 120) + "\n")


def choices_of(found: Found, best: Found) -> dict[str, str]:
    """The validation score of a method's settings, each with the best of its learning rates, the
    best first; bold: beyond noise of the method as it is; ^: no higher rate was tried, v: no lower
    one."""
    as_it_is = next(iter(best))
    scores = {setting: [run.result["valid"]["new"] for run in runs]
              for setting, runs in best.items()}
    told = []
    for setting in sorted(best, key=lambda setting: fmean(scores[setting]), reverse=True):
        flags = " ".join(typed(name, value) for name, value in setting.varied if value)
        score = plus_minus(best[setting], "new", split="valid")
        bold = "" if within_noise(scores[setting], scores[as_it_is]) else "**"
        told.append(f"{f'`{flags}`' if flags else 'as it is'} {bold}{score}{bold}"
                    + edge(found[setting], best[setting]))
    return {"method": f"`{as_it_is.method}`", "validation `new`": "; ".join(told)}


def cut(name: str) -> tuple[str, str, str]:
    """What stands before, between and after the two marks of a table's name on its page. UserError:
    they do not stand there once."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    page = ROOT / PAGES[name]
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    table, found, after = rest.partition(end)
    if not found or begin in rest or end in before + after:
        raise UserError(f"{page}: needs {begin.strip()} and, later, {end.strip()}, each once")
    return before + begin, table, end + after


def put(name: str, table: str) -> None:
    """Replaces a table on its page."""
    before, _, after = cut(name)
    with atomic_write(ROOT / PAGES[name]) as path:
        path.write_text(before + table + after, encoding="utf-8")


def with_scores(rows: str, sweep: Sweep) -> str:
    """The table of methods, its last cells, trainable parameters and scores, from the runs."""
    lines = []
    for line in rows.splitlines():
        cells = line.strip("|").split("|")
        runs = sweep.at(sweep.rank).get(cells[0].strip(" `"))
        if runs:
            new = [f"{runs[0].result['trainable']:,}",
                   *(plus_minus(runs, name) for name in runs[0].result["after"])]
            line = "|".join(["", *cells[:-len(new)], *(f" {cell} " for cell in new), ""])
        lines.append(line + "\n")
    return "".join(lines)


def summarise(part: str) -> None:
    """A part's table.md, results.csv and figures: of its sweeps, which share a folder, each has
    left its own there."""
    found, best = read_part(part)
    out = Path(RUNS, part)
    with atomic_write(out / "table.md") as path:
        path.write_text(table_of(found, best), encoding="utf-8")
    write_results(out / "results.csv", found, best)
    draw(saved_sweep(found, best), out)


def write() -> None:
    """Tables and figures of the parts that are finished; of the others it is told what they lack.
    UserError: a run is damaged; a page lacks a mark."""
    for name in PAGES:
        cut(name)
    parts = {}
    for part in PARTS:
        try:
            parts[part] = read_part(part)
        except Unfinished as error:
            print(error)
    tables = {}
    if "choices" in parts:
        found, best = parts.pop("choices")
        tables["choices"] = markdown(
            [choices_of(found, {setting: runs for setting, runs in best.items()
                                if setting.method == method}) for method in CHOICES])
    tables |= {part: table_of(*parts[part]) for part in PAGES if part in parts}
    sweeps = {part: saved_sweep(*of_part) for part, of_part in parts.items()}
    if "plain" in sweeps:
        tables["methods"] = with_scores(cut("methods")[1], sweeps["plain"])
    if "facts" in sweeps:
        facts, numbers = sweeps["facts"], {}
        for name, draw_figure in FIGURES.items():
            figure, numbers[name] = draw_figure(facts)
            save_figure(figure, ROOT / "assets" / f"{name}.png", numbers[name])
        if sweeps.keys() >= {"mini", "rank-1", "one-rate"}:
            verdicts = [*of_scores({part: scores_of(sweep) for part, sweep in sweeps.items()}),
                        of_spectra(numbers["spectra"]), of_places(numbers["directions"]),
                        of_overlap(numbers["directions"]), *of_slopes(numbers["dora"])]
            tables["claims"] = markdown([v._asdict() for v in verdicts])
    for name, table in tables.items():
        put(name, table)
    for name, page in PAGES.items():
        print(f"{page}: {name} {'written' if name in tables else 'left as it was'}")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("part", nargs="?", help=f"{', '.join(PARTS)}, or write (all)")
    parser.add_argument("--jobs", default="1", help="runs at a time (1)")
    args = parser.parse_args(argv)
    if args.part not in (None, "write", *PARTS):
        raise UserError(f"{args.part}: no such part{nearest(args.part, [*PARTS, 'write'])}")
    failed = False
    for part in PARTS if args.part is None else [args.part] * (args.part != "write"):
        for line in PARTS[part]:
            try:
                run([*shlex.split(line), "--jobs", args.jobs])
            except SystemExit as end:
                if end.code != 1:
                    raise
                failed = True               # a run, of which ablate.py has told; the others go on
        if part != "choices" and not failed:            # those have a folder for each method
            summarise(part)
    if args.part in (None, "write"):
        write()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
