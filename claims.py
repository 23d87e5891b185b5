"""The papers' claims, tested: every run behind the README's results, and the verdicts.

    python claims.py --jobs 2           all of it, @@ hours on two cores; given again, it goes on
    python claims.py facts --jobs 2     a part of it
    python claims.py write              the README's tables and the figures, from finished parts

Each part is a few sweeps of ablate.py, which says how a learning rate is chosen. What a method
leaves open (choices) was set on facts of another seed than the claims use, with as many trials for
every method; TUNED is what came out.
"""
import csv
import shlex
from pathlib import Path
from statistics import fmean
from typing import Callable, NamedTuple

import ablate
from ablate import Setting
from analyze import FIGURES, Sweep, read_sweep
from common import Parser, UserError, atomic_write, exit_on_user_error, nearest
from methods import METHODS
from plots import LABELS, save_figure
from results import difference, spread

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
RUNS = "runs/claims"
CEILING = 0.98          # two scores above this are not compared: there was no more to learn
MARGIN = 0.02           # a score this far below another still matches it

# ---- the runs
TUNED = {"lora": "--warmup 60", "lora+": "--warmup 60", "dash": "--warmup 60", "dora": "",
         "adalora": "--gamma 0.01", "dual": ""}         # beside --alpha 4 x rank
CHOICES = {
    "dual": "update-warmup=0,20 init-std=0.03,0.12 r1=2,6 clip=no direction-lr=0.1,1 alpha=32",
    "lora": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05,0.1 lr-ratio=0.5,2",
    "lora+": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05,0.1 lr-ratio=4,8",
    "dora": "warmup=5,60 alpha=8,32 weight-decay=0.01,0.1 dropout=0.05,0.1 lr-ratio=2 "
            "norm-gradient=yes",
    "adalora": "gamma=0.01,0.03,0.3 init-rank=8,16 t-init=0.02 t-final=0.5 warmup=60 alpha=8,32",
    "dash": "prelaunch=25,150 directions=4,16 warmup=5,60 alpha=8,32 weight-decay=0.1 dropout=0.05"}


def tuned(methods: str, rank: int, flags: str) -> list[str]:
    """A sweep a method, each with what suits it."""
    return [f"--methods {method} --ranks {rank} --alpha {4 * rank} {TUNED[method]} {flags}"
            for method in methods.split(",")]


ADAPTERS = ",".join(TUNED)
SEARCH = "--search-seeds 0 --seeds 0,1,2"
FACTS = f"--search-seeds 0 --eval-every 50 --snapshot-every 20 --out {RUNS}/facts"
PARTS = {
    "choices": [f"--methods {method} --rewrite-seed 1 --lrs x0.7,x1.4 --one-at-a-time "
                f"{' '.join(f'--vary {choice}' for choice in choices.split())} "
                f"--out {RUNS}/choices/{method}" for method, choices in CHOICES.items()],
    "facts": [
        *tuned(ADAPTERS, 8, f"--lrs x0.5,x0.7,x1 --seeds 0,1,2,3,4 {FACTS}"),
        *tuned(ADAPTERS, 2, f"--lrs x0.7,x1,x1.4 --seeds 0,1,2,3,4 {FACTS}"),
        *tuned(ADAPTERS, 4, f"--lrs x0.5,x0.7,x1 --seeds 0,1,2 {FACTS}"),
        *tuned("lora,dual", 16, f"--lrs x0.5,x0.7,x1 --seeds 0,1,2 {FACTS}"),
        f"--methods full --lrs x0.5,x1,x2 --seeds 0,1,2,3,4 {FACTS}"],
    "rank-1": tuned("dash", 1, f"--lrs x0.7,x1,x1.4 {SEARCH} --out {RUNS}/rank-1"),
    "one-rate": tuned("dora,adalora,dash,dual", 8,      # LoRA's
                      f"--lrs 7.5e-3 --seeds 0,1,2 --out {RUNS}/one-rate"),
    "mini": [f"--methods {methods} --task mini --lrs {rates} {SEARCH} --out {RUNS}/mini"
             for methods, rates in (("full,lora+", "1e-3,2e-3"), ("lora,dora,dash", "7e-3,1e-2"),
                                    ("adalora", "2e-2,4e-2"), ("dual", "1e-2,1.5e-2"))],
    "defaults": ["--methods lora,dora,adalora,dash,dual,full --ranks 2,8 --seeds 0,1,2 "
                 f"--out {RUNS}/defaults"]}


def read_part(part: str) -> Sweep:
    """The runs of a part. UserError: not all of them are there."""
    folder = Path(RUNS, part)
    sweep = read_sweep(folder)
    for line in PARTS[part]:
        args, _ = ablate.parse(shlex.split(line))
        for setting in ablate.settings(args):
            rank = None if setting.rank is None else int(setting.rank)
            runs = sweep.chosen.get((setting.method, rank), [])
            missing = {int(seed) for seed in args.seeds} - {run.args.seed for run in runs}
            if missing:
                raise UserError(f"{folder}: {ablate.named(setting)} lacks seed "
                                f"{', '.join(map(str, sorted(missing)))}: python claims.py {part}")
    return sweep


# ---- what a claim comes to
class Verdict(NamedTuple):
    """A row of the README's table."""
    claim: str
    here: str
    verdict: str        # seen, not seen, opposite


Scores = dict[tuple[str, int | None], list[float]]      # by method and rank, a score a seed


def scores_of(sweep: Sweep) -> Scores:
    """The main metric on the test split of the chosen learning rate."""
    return {key: [run.result["after"][sweep.metric] for run in runs]
            for key, runs in sweep.chosen.items()}


def pairs(a: str, b: str, tables: list[Scores]) -> list[tuple[list[float], list[float]]]:
    """The scores of methods a and b wherever both were run."""
    return [(table[a, rank], table[b, rank]) for table in tables
            for rank in sorted({rank for method, rank in table if method == a and rank})
            if (b, rank) in table]


def higher(compared: list[tuple[list[float], list[float]]]) -> str:
    """Whether the first of each pair is better. seen: in most pairs the 95 % interval of the
    difference is above 0, in none below; opposite: the other way round. Two means above CEILING
    are no pair."""
    limits = [difference(a, b)[1:] for a, b in compared if min(fmean(a), fmean(b)) <= CEILING]
    above, below = sum(low > 0 for low, _ in limits), sum(high < 0 for _, high in limits)
    if 2 * above > len(limits) and not below:
        return "seen"
    return "opposite" if 2 * below > len(limits) and not above else "not seen"


def as_good(compared: list[tuple[list[float], list[float]]]) -> str:
    """seen: the first mean of each pair is at most MARGIN below the second."""
    return "seen" if all(fmean(a) - fmean(b) >= -MARGIN for a, b in compared) else "not seen"


def shown(compared: list[tuple[list[float], list[float]]]) -> str:
    """The differences of the means ± half the width of Welch's 95 % interval."""
    return ", ".join(f"{mean:+.3f} ± {high - mean:.3f}"
                     for mean, _, high in (difference(a, b) for a, b in compared))


def ranges(table: Scores, methods: list[str], seeds: int) -> list[float]:
    """How far apart the best and the worst method are, a number a seed."""
    scores = [table[method, 8][:seeds] for method in methods]
    return [max(of_seed) - min(of_seed) for of_seed in zip(*scores, strict=True)]


def of_scores(parts: dict[str, Scores]) -> list[Verdict]:
    """The claims about which method scores higher."""
    facts, found = parts["facts"], []

    def beats(a: str, others: list[str], claim: str) -> None:
        compared = {b: pairs(a, b, [facts, parts["mini"]]) for b in others}
        found.append(Verdict(claim, "; ".join(f"to {LABELS[b]} {shown(compared[b])}"
                                              for b in others), higher(sum(compared.values(), []))))

    beats("dual", ["lora", "lora+", "dora"],
          "Dual LoRA beats LoRA, LoRA+ and DoRA at equal parameters, at every budget")
    beats("adalora", ["lora"], "AdaLoRA beats LoRA at the same final budget")
    beats("dash", ["lora"], "LoRA-Dash beats LoRA")
    small = [(parts["rank-1"]["dash", 1], facts["lora", rank]) for rank in (8, 16)]
    found.append(Verdict("LoRA-Dash reaches LoRA's score with 8 to 16 times fewer parameters",
                         f"rank 1 to LoRA's 8 and 16: {shown(small)}", as_good(small)))
    half = [(facts["dora", rank], facts["lora", 2 * rank]) for rank in (2, 4)]
    found.append(Verdict("DoRA at half the rank matches LoRA",
                         f"rank 2 to LoRA's 4, 4 to 8: {shown(half)}", as_good(half)))
    one_rate = parts["one-rate"] | {("lora", 8): facts["lora", 8]}
    methods = [method for method, _ in one_rate]
    before, after = (ranges(table, methods, 3) for table in (one_rate, facts))
    found.append(Verdict(
        "Tuned learning rates shrink the differences",
        f"best less worst of {len(methods)} adapters at rank 8, seeds 0 to 2: {plus_minus(before)} "
        f"at one rate, {plus_minus(after)} with each its own", higher([(before, after)])))
    return found


def plus_minus(numbers: list[float]) -> str:
    mean, sd, _ = spread(numbers)
    return f"{mean:.3f} ± {sd:.3f}"


def of_spectra(numbers: dict) -> Verdict:
    dual, sign, full, lora = ({name: fmean(numbers[label][name]) for name in
                               ("numerical_rank", "effective_rank")}
                              for label in ("Dual LoRA", "Dual: Sign(DC)", "full", "LoRA"))
    k = len(numbers["full"]["median"])
    return Verdict(
        "Dual LoRA's update, and its matrix of signs, are nearly of full rank",
        f"singular values above 1 %: {dual['numerical_rank']:.0f} and {sign['numerical_rank']:.0f} "
        f"of {k}, LoRA's {lora['numerical_rank']:.0f}; effective rank "
        f"{dual['effective_rank']:.0f} and {sign['effective_rank']:.0f}, full's "
        f"{full['effective_rank']:.0f}, LoRA's {lora['effective_rank']:.0f}",
        "seen" if min(dual["numerical_rank"], sign["numerical_rank"]) >= 0.9 * k else "not seen")


def of_places(numbers: dict) -> Verdict:
    """Where the directions of the highest change rates lie among the singular values."""
    s, k = numbers["s"], len(numbers["rates"]["full"])

    def share(name: str, start: float) -> float:
        return fmean(place >= start for place in numbers["where"][name])

    small, smallest = (share("task-specific", start) for start in (0.5, 1 - s / k))
    null = share("of a Gaussian dW", 1 - s / k)
    return Verdict(
        "Task-specific directions sit at small but not the smallest singular values",
        f"{small:.0%} in the smaller half, {smallest:.0%} among the {s} smallest of {k} "
        f"(of a Gaussian update {null:.0%})",
        "seen" if small > 0.5 and smallest <= null / 2 else "not seen")


def of_overlap(numbers: dict) -> Verdict:
    """LoRA's overlap with full's task-specific directions, beside that of the smallest sigma, for
    which nothing need be learnt."""
    ranks, steps = ([fmean(seeds) for seeds in numbers[name].values()] for name in
                    ("ranks", "steps"))
    layers, null = numbers["by layer"]["LoRA"], numbers["by layer"]["smallest sigma"]
    beaten = sum(a > b for a, b in zip(layers, null))
    seen = min(ranks + steps) > fmean(null) and beaten == len(layers)
    return Verdict(
        "Directions predicted from LoRA overlap with the task-specific ones, whatever the rank, "
        "step, layer",
        f"{min(ranks):.2f} to {max(ranks):.2f} over ranks, {min(steps):.2f} to {max(steps):.2f} "
        f"over steps; the smallest singular values alone {fmean(null):.2f}, more than LoRA in "
        f"{len(layers) - beaten} of {len(layers)} layers; another seed of full "
        f"{fmean(numbers['by layer']['another seed of full']):.2f}", "seen" if seen else "not seen")


def of_slopes(numbers: dict) -> Verdict:
    r = {method: numbers[method]["lines"]["q"]["r"] for method in ("full", "lora", "dora", "dual")}
    seen = r["full"] < 0 and r["dora"] < 0 and r["lora"] > 0
    opposite = r["full"] > 0 and r["dora"] > 0 and r["lora"] < 0
    return Verdict(
        "Magnitude against direction: a negative slope for full and DoRA, a positive one for LoRA",
        "r = " + ", ".join(f"{value:+.2f} ({LABELS[method]})" for method, value in r.items()),
        "seen" if seen else "opposite" if opposite else "not seen")


# ---- the README
def table_of(sweep: Sweep) -> str:
    """ablate.py's table of the chosen runs by rank, and which learning rates might be bettered."""
    order = list(METHODS)
    best = {Setting(method, None if rank is None else str(rank), ()): runs
            for (method, rank), runs in sorted(
                sweep.chosen.items(), key=lambda item: (item[0][1] or 0, order.index(item[0][0])))}
    edge = [ablate.named(setting) for setting, runs in best.items() if ablate.at_edge(
        runs, [run for run in sweep.runs if run.setting == runs[0].setting])]
    return (ablate.markdown(ablate.rows_of(best, sweep.metric))
            + f"\nBest at the lowest or highest rate tried: {', '.join(edge) or 'none'}.\n")


def table_of_choices() -> str:
    """The validation score of every setting, with the better of its learning rates."""
    rows = []
    for method in CHOICES:
        path = Path(RUNS, "choices", method, "results.csv")
        with open(path, newline="", encoding="utf-8") as file:
            runs = list(csv.DictReader(file))
        varied = list(runs[0])[2:list(runs[0]).index("lr")]
        scores: dict[str, float] = {}
        for run in runs:
            name = ", ".join(f"{flag.replace('_', '-')} {run[flag]}" for flag in varied
                             if run[flag]) or "as it is"
            scores[name] = max(scores.get(name, 0.0), float(run["valid new"]))
        best = sorted(scores, key=scores.get, reverse=True)
        rows.append({"method": f"`{method}`", "validation `new`": "; ".join(
            f"{name} {scores[name]:.3f}" for name in best)})
    return ablate.markdown(rows)


def inside(text: str, name: str) -> str:
    """What stands in the README between the two marks of the name. UserError: they do not stand
    there once."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f"{README}: needs {begin.strip()} and, later, {end.strip()}, each once")
    return text.split(begin)[1].split(end)[0]


def replaced(text: str, name: str, table: str) -> str:
    """The README with the table between the two marks of the name."""
    inside(text, name)
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    return text.split(begin)[0] + begin + table + end + text.split(end)[1]


def with_scores(rows: str, sweep: Sweep) -> str:
    """The table of methods, its last four cells from the runs at rank 8."""
    lines = []
    for line in rows.splitlines():
        cells = line.strip("|").split("|")
        runs = sweep.at(8).get(cells[0].strip(" `"))
        if runs:
            new = [f"{runs[0].result['trainable']:,}",
                   *(ablate.plus_minus(runs, name) for name in runs[0].result["after"])]
            line = "|".join(["", *cells[:-len(new)], *(f" {cell} " for cell in new), ""])
        lines.append(line + "\n")
    return "".join(lines)


def write() -> None:
    """Tables and figures of the parts that were run; those of the others stay as they are.
    UserError: a part is half done."""
    begun = [part for part in PARTS if Path(RUNS, part).exists()]
    sweeps = {part: read_part(part) for part in begun if part != "choices"}
    text = README.read_text(encoding="utf-8")
    if "choices" in begun:
        text = replaced(text, "choices", table_of_choices())
    for part in sweeps.keys() & {"facts", "mini", "defaults"}:
        text = replaced(text, part, table_of(sweeps[part]))
    if "facts" in sweeps:
        text = replaced(text, "methods", with_scores(inside(text, "methods"), sweeps["facts"]))
        numbers = {}
        for name, draw in FIGURES.items():
            figure, numbers[name] = draw(sweeps["facts"])
            save_figure(figure, ROOT / "assets" / f"{name}.png", numbers[name])
        if sweeps.keys() >= {"mini", "rank-1", "one-rate"}:
            verdicts = [*of_scores({part: scores_of(sweep) for part, sweep in sweeps.items()}),
                        of_spectra(numbers["spectra"]), of_places(numbers["directions"]),
                        of_overlap(numbers["directions"]), of_slopes(numbers["dora"])]
            text = replaced(text, "claims", ablate.markdown([v._asdict() for v in verdicts]))
    with atomic_write(README) as path:
        path.write_text(text, encoding="utf-8")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("part", nargs="?", help=f"{', '.join(PARTS)}, or write (all)")
    parser.add_argument("--jobs", default="1", help="runs at a time (1)")
    args = parser.parse_args(argv)
    if args.part not in (None, "write", *PARTS):
        raise UserError(f"{args.part}: no such part{nearest(args.part, [*PARTS, 'write'])}")
    for part, lines in PARTS.items():
        if args.part in (None, part):
            for line in lines:
                ablate.main([*shlex.split(line), "--jobs", args.jobs])
    if args.part in (None, "write"):
        write()


if __name__ == "__main__":
    main()
