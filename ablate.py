"""A grid of runs: methods x ranks x learning rates x seeds, each in a folder of its own.

    python ablate.py --methods lora,dora,dual --ranks 2,8 --lrs 5e-3,1e-2 --seeds 0,1,2
    python ablate.py --methods lora,dual --task mini --list > commands
    parallel -j 4 < commands                        or xargs -d '\\n' -P 4 -I {} sh -c {} < commands
    sh -c "$(sed -n ${SLURM_ARRAY_TASK_ID}p commands)"          in a Slurm array
Any flag of train.py that is not varied is passed on to every run. --list prints the commands
instead of running them, one a line, for several processes or machines that share a folder. A
command, and the whole sweep, can be given again at any time: what is finished is skipped, what was
stopped goes on.
"""
import shlex
import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path

from tqdm import tqdm

import train
from common import Parser, UserError, exit_on_user_error, flag, nearest
from methods import METHODS

VARIED = {"method": "methods", "rank": "ranks", "lr": "lrs", "seed": "seeds"}


def parse(argv: list[str] | None) -> tuple[Namespace, list[str]]:
    """-> our flags, and those for train.py."""
    parser = Parser(__doc__)
    parser.add_argument("--methods", required=True, help=f"comma-separated: {', '.join(METHODS)}")
    parser.add_argument("--ranks", help="budgets (8); full has none")
    parser.add_argument("--lrs", help="learning rates (the method's own)")
    parser.add_argument("--seeds", default="0", help="(0)")
    parser.add_argument("--out", default="runs", help="the folder of the runs (runs)")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args, rest = parser.parse_known_args(argv)
    given = train.parse(rest)
    for name in ("overwrite", "resume", "from_peft"):
        if getattr(given, name):
            raise UserError(f"{flag(name)}: not in a sweep")
    for name, plural in VARIED.items():
        if getattr(given, name) is not None:
            raise UserError(f"--{name}: give --{plural}, comma-separated")
        if getattr(args, plural) is not None:
            values = [value.strip() for value in getattr(args, plural).split(",")]
            if "" in values:
                raise UserError(f"--{plural} {getattr(args, plural)}: a value is missing")
            setattr(args, plural, list(dict.fromkeys(values)))
    for method in args.methods:
        if method not in METHODS:
            raise UserError(f"--methods {method}: unknown{nearest(method, METHODS)}")
    return args, rest


def grid(args: Namespace, rest: list[str]) -> list[list[str]]:
    """The flags of every run; UserError: what train.py refuses before it loads model and data."""
    task = train.parse(rest).task or "facts"
    runs = {}
    for method, rank, lr, seed in product(args.methods, args.ranks or [None], args.lrs or [None],
                                          args.seeds):
        rank = None if METHODS[method].layer is None else rank
        varied = {"method": method, "rank": rank, "lr": lr, "seed": seed}
        flags = [part for name, value in varied.items() if value is not None
                 for part in (f"--{name}", value)]
        marks = [mark + value for mark, value in (("r", rank), ("lr", lr), ("s", seed)) if value]
        name = "-".join([task.replace("/", "-"), method, *marks])
        runs[name] = [*flags, *rest, "--out", str(Path(args.out) / name), "--resume"]
        given = train.parse(runs[name])
        train.check(given)
        train.resolve(given)
    return list(runs.values())


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args, rest = parse(argv)
    commands = [[sys.executable, train.__file__, *flags] for flags in grid(args, rest)]
    if args.list:
        print("\n".join(shlex.join(command) for command in commands))
        return
    failed, bar = [], tqdm(commands, unit="run")
    for command in bar:
        status = subprocess.run(command).returncode
        if status == 130:                       # Ctrl-C reached the run, which said how it goes on
            bar.close()
            print("stopped; the same sweep goes on", file=sys.stderr)
            sys.exit(130)
        failed += [command] * (status != 0)
    for command in failed:
        print(f"failed: {shlex.join(command)}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
