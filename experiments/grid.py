"""Makes the runs of a sweep: from its flags to the commands of train.py."""
from argparse import Namespace
from collections import Counter
from itertools import product
from pathlib import Path
from typing import NamedTuple

from data.recipes import recipe
from experiments.results import read_run
from methods import METHODS
from support import flags as train_flags
from support.errors import UserError, nearest
from support.parser import Parser, flag
from support.run import saved_flags, visible

VARIED = {"method": "methods", "rank": "ranks", "lr": "lrs", "seed": "seeds"}
WHOLE = {"ranks": int, "seeds": int, "search_seeds": int}
FIXED = ("out", "overwrite", "resume", "from_peft", "epochs", "task")     # --vary refuses these


class Setting(NamedTuple):
    """Names what a row of the table is about.

    A rank or a value is None where the method has no rank or does not use the flag.
    """
    method: str
    rank: str | None
    varied: tuple[tuple[str, str | None], ...]      # (flag's name, value)


class Trial(NamedTuple):
    """Describes a run that the sweep needs."""
    setting: Setting
    lr: str
    seed: str
    folder: Path
    flags: list[str]            # for train.py


def parse_sweep(argv: list[str] | None, doc: str = "") -> Namespace:
    """Reads the flags of a sweep; `passed_on` holds those that every run gets.

    Raises UserError if a flag is wrong, before any run is made.
    """
    parser = Parser(doc)
    parser.add_argument("--methods", required=True, help=f"methods to run: {', '.join(METHODS)}")
    parser.add_argument("--ranks", help="ranks, which are budgets of parameters (8, or the "
                        "recipe's); full has none")
    parser.add_argument("--lrs", default="x0.5,x1,x2",
                        help="learning rates to try; x2 is twice the method's own (x0.5,x1,x2)")
    parser.add_argument("--seeds", default="0", help="seeds to run (0)")
    parser.add_argument("--search-seeds", help="seeds of --seeds that choose the learning rate; "
                        "the other seeds run with the chosen rate alone (all)")
    parser.add_argument("--vary", action="append", default=[], metavar="FLAG=A,B",
                        help="vary another flag of train.py; a switch takes yes and no")
    parser.add_argument("--one-at-a-time", action="store_true", help="run each value of --vary "
                        "with all else at its default, not every combination")
    parser.add_argument("--metric", help="metric to choose and compare by (the task's main one)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--out", default="runs/sweep", help="folder of all runs (runs/sweep)")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args, args.passed_on = parser.parse_known_args(argv)
    if args.passed_on and not args.passed_on[0].startswith("-"):
        raise UserError(f"{args.passed_on[0]}: lists are comma-separated, as --methods lora,dual")
    given = train_flags.parse_flags(args.passed_on)
    for name in ("overwrite", "resume", "from_peft"):
        if name in given.given:
            raise UserError(f"{flag(name)}: not in a sweep")
    for name, plural in VARIED.items():
        if name in given.given:
            raise UserError(f"--{name}: give --{plural}, comma-separated")
    args.task, args.rank = given.task, given.rank
    if given.recipe is not None and args.ranks is None:
        args.ranks = str(recipe(given.recipe, given.task)["rank"])
    args.vary = [varied(text, given) for text in args.vary]
    for name, times in Counter(name for name, _ in args.vary).items():
        if times > 1:
            raise UserError(f"--vary {name}: is given twice; its values are comma-separated")
    args.search_seeds = args.search_seeds or args.seeds
    for name in (*VARIED.values(), "search_seeds"):
        if getattr(args, name) is not None:
            setattr(args, name, values(flag(name), getattr(args, name), WHOLE.get(name, str)))
    for method in args.methods:
        if method not in METHODS:
            raise UserError(f"--methods {method}: unknown{nearest(method, METHODS)}")
    for name, _ in args.vary:
        if all(name in train_flags.unused_flags(method) for method in args.methods):
            raise UserError(f"--vary {name}: no method of --methods uses it")
    for seed in args.search_seeds:
        if seed not in args.seeds:
            raise UserError(f"--search-seeds {seed}: not one of --seeds")
    if not args.out:
        raise UserError("--out: is empty")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    return args


def values(name: str, text: str, kind: type = str) -> list[str]:
    """Splits a comma-separated list into its values, each once: 0,00 is one seed."""
    found = [value.strip() for value in text.split(",")]
    if "" in found:
        raise UserError(f"{name} {text}: a value is missing")
    try:
        return list(dict.fromkeys(str(kind(value)) for value in found))
    except ValueError:
        raise UserError(f"{name} {text}: not whole numbers") from None


def varied(text: str, given: Namespace) -> tuple[str, list[str]]:
    """Splits --vary: init-std=0.03,0.06 -> init_std, [0.03, 0.06]."""
    name, _, listed = text.partition("=")
    name = name.replace("-", "_")
    known = vars(given).keys() - {"given", *VARIED, *FIXED}
    if name not in known:
        raise UserError(f"--vary {text}: train.py has no such flag to vary" + nearest(name, known))
    if name in given.given:
        raise UserError(f"--vary {text}: {flag(name)} is given for all runs, too")
    return name, values(f"--vary {name}", listed)


def settings(args: Namespace) -> list[Setting]:
    """Lists each combination of method, rank and varied flags once.

    A flag that a method does not use adds no combination for it.
    """
    combinations = list(product(*(listed for _, listed in args.vary)))
    if args.one_at_a_time:
        default = [None] * len(args.vary)
        combinations = [default] + [default[:i] + [value] + default[i + 1:]
                                    for i, (_, listed) in enumerate(args.vary) for value in listed]
    found = {}
    ranks = args.ranks or [str(args.rank)]
    for method, rank, combination in product(args.methods, ranks, combinations):
        unused = train_flags.unused_flags(method)
        own = tuple((name, None if name in unused else value)
                    for (name, _), value in zip(args.vary, combination))
        found[Setting(method, None if "rank" in unused else rank, own)] = None
    return list(found)


def flags_of(setting: Setting, args: Namespace) -> list[str]:
    """Returns the flags of train.py that make a setting, and those of all runs."""
    own = {"method": setting.method, "rank": setting.rank}
    flags = [part for name, value in own.items() if value is not None
             for part in (f"--{name}", value)]
    return [*flags, *(typed(name, value) for name, value in setting.varied if value is not None),
            *args.passed_on]


def rates(setting: Setting, args: Namespace) -> list[str]:
    """Turns each xN into N times the learning rate that train.py takes for the setting."""
    given = train_flags.parse_flags(flags_of(setting, args))
    own, found = train_flags.default_lr(given.method, given.model), {}
    for lr in args.lrs:
        try:
            rate = own * float(lr[1:]) if lr[0] == "x" else float(lr)
            found[f"{rate:g}"] = None       # one name a rate: 0.01 and 1e-2 are the same run
        except ValueError:
            raise UserError(f"--lrs {lr}: neither a learning rate nor x and a number") from None
    return list(found)


def typed(name: str, value: str) -> str:
    """Writes a flag as train.py takes it: --alpha=32, --no-clip, --norm-gradient."""
    return {"yes": flag(name), "no": flag(f"no_{name}")}.get(value, f"{flag(name)}={value}")


def trial(setting: Setting, lr: str, seed: str, args: Namespace) -> Trial:
    """Makes a run's folder and flags, and looks at what the folder already holds.

    Raises UserError if train.py would refuse the flags before it loads model and data, if the run
    in the folder has other flags, or if its result is damaged.
    """
    marks = [setting.method, *([f"r{setting.rank}"] if setting.rank else []),
             *(f"{name}{value}" for name, value in setting.varied if value is not None)]
    name = "-".join([args.task, *marks, f"lr{lr}", f"s{seed}"]).replace("/", "_")
    folder = Path(args.out, name)
    flags = [*flags_of(setting, args), "--lr", lr, "--seed", seed, "--out", str(folder), "--resume"]
    given = train_flags.parse_flags(flags)
    train_flags.check_flags(given)
    if visible(folder):
        saved_flags(given)
        read_run(folder)
    return Trial(setting, lr, seed, folder, flags)


def search_of(args: Namespace) -> list[Trial]:
    """Lists the runs of every setting with every learning rate and the search's seeds."""
    return [trial(setting, lr, seed, args) for setting in settings(args)
            for lr in rates(setting, args) for seed in args.search_seeds]
