"""Reads finished runs, chooses those to compare, and tells differences from noise."""
import json
import math
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from numbers import Real as Number
from pathlib import Path
from statistics import fmean, stdev, variance
from types import NoneType

from scipy.stats import t as student

from support.errors import UserError
from support.files import open_regular
from support.run import finished, read_flags

AVERAGE = "Avg."            # the column of a task of several sets that averages over them
LOWER_IS_BETTER = ("loss", "perplexity")
# Flags in which compared runs may differ. The last five change no score.
OF_ONE_RUN = ("lr", "seed", "out", "command", "resume", "overwrite", "save_every", "snapshot_every",
              "eval_every", "eval_batch_size", "skip_before")


@dataclass(frozen=True)
class SavedRun:
    """Holds what a finished run left in its folder."""
    folder: Path
    args: Namespace         # its resolved flags
    result: dict            # result.json
    log: list[dict]         # a line a step

    @property
    def setting(self) -> tuple:
        """Lists all flags but learning rate and seed, which together name what is compared.

        The model stands there by the fingerprint of its weights, wherever they lie.
        """
        flags = vars(self.args) | {"model": self.result["base"]}
        return tuple(sorted((name, str(value)) for name, value in flags.items()
                            if name not in OF_ONE_RUN))


def read_run(folder: str | Path) -> SavedRun | None:
    """Reads a finished run; None if the folder holds none.

    Raises UserError if its files are damaged.
    """
    folder = Path(folder)
    if not finished(folder):
        return None
    args = read_flags(folder)
    path = folder / "result.json"
    try:
        with open_regular(path) as file:
            result = json.load(file)
        require_types(result, before=(dict, NoneType), after=dict, valid=dict, counts=dict,
                      trainable=int, seconds=Number, peak_memory_mb=(Number, NoneType),
                      versions=dict, base=str)
        require_types(result["valid"], loss=Number)
        for scores in (result["valid"], result["after"]):
            require_types(scores, **{name: Number for name in scores})
        on_validation(result, main_metric(result))
        path = folder / "log.jsonl"
        with open_regular(path) as file:
            log = [json.loads(line) for line in file]
        for line in log:
            require_types(line, step=int)
            if "valid" in line:
                require_types(line["valid"], loss=Number)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not what a run of this version leaves: {error}") from None
    return SavedRun(folder, args, result, log)


def require_types(found, **kinds) -> None:
    """Raises ValueError unless `found` is a dict with these names and types of values."""
    for name, kind in kinds.items():
        if not isinstance(found, dict) or name not in found:
            raise ValueError(f"has no {name}")
        if not isinstance(found[name], kind):
            raise ValueError(f"{name} is {found[name]!r}")


def read_runs(folder: str | Path) -> list[SavedRun]:
    """Reads the finished runs in the folders of a folder, by name; NAME.old was set aside.

    A run's own folder gives that run. Raises UserError if there is none.
    """
    runs = [run for path in (Path(folder), *sorted(Path(folder).glob("*/")))
            if path.suffix != ".old" and (run := read_run(path))]
    if not runs:
        raise UserError(f"{folder}: neither the folder of a finished run, nor one that holds such "
                        "folders")
    return runs


def main_metric(result: dict) -> str:
    """Names the metric that a task is judged by: its average, else its first metric."""
    names = list(result["after"])
    return next((name for name in names if f"/{AVERAGE}" in name), names[0])


def on_validation(result: dict, metric: str) -> float:
    """Finds the validation score that stands for a test metric.

    Validation may cover other sets than the test. Then its own average stands for the metric, or
    the score without the test's group.
    Raises ValueError if there is none.
    """
    valid, row = result["valid"], metric.partition("/")[0]
    for name in valid:
        if name == metric or metric not in valid and (
                name.startswith(f"{row}/{AVERAGE}") or metric.startswith(f"{name}_")):
            return valid[name]
    raise ValueError(f"no validation score stands for {metric}")


def validation(run: SavedRun, metric: str) -> float:
    """Gives the number that learning rates are chosen by; more is better."""
    value = on_validation(run.result, metric)
    return -value if metric in LOWER_IS_BETTER else value


def chosen(runs: list[SavedRun], metric: str | None = None) -> dict[tuple, list[SavedRun]]:
    """Chooses each setting's learning rate and gives its runs: setting -> runs by seed.

    The rate has the best validation score on average over seeds. Only the rates with the most
    seeds count, since a search may have tried others on fewer.
    Raises UserError if a run stands there twice.
    """
    rates: dict[tuple, dict] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        of_rate = rates[run.setting][run.args.lr]
        for other in of_rate:
            if other.args.seed == run.args.seed:
                raise UserError(f"{other.folder} and {run.folder} are the same run")
        of_rate.append(run)

    def quality(runs: list[SavedRun]) -> tuple[int, float]:
        name = metric or main_metric(runs[0].result)
        return len(runs), fmean(validation(run, name) for run in runs)

    return {setting: sorted(max(of_rate.values(), key=quality), key=lambda run: run.args.seed)
            for setting, of_rate in rates.items()}


# ---- statistics
def mean_and_interval(numbers: list[float]) -> tuple[float, float | None, float | None]:
    """Computes mean, standard deviation and half of Student's 95 % interval of the mean.

    The last two are None for a single number.
    """
    n, mean = len(numbers), fmean(numbers)
    if n == 1:
        return mean, None, None
    sd = stdev(numbers)
    return mean, sd, float(student.ppf(0.975, n - 1)) * sd / math.sqrt(n)


def difference(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Computes mean(a) - mean(b) and the limits of Welch's 95 % interval of it.

    Welch's interval lets a and b have different variances. The limits are infinite if a or b is a
    single number.
    """
    mean = fmean(a) - fmean(b)
    if min(len(a), len(b)) < 2:
        return mean, -math.inf, math.inf
    va, vb = variance(a) / len(a), variance(b) / len(b)
    if va + vb == 0:
        return mean, mean, mean
    freedom = (va + vb) ** 2 / (va ** 2 / (len(a) - 1) + vb ** 2 / (len(b) - 1))
    half = float(student.ppf(0.975, freedom)) * math.sqrt(va + vb)
    return mean, mean - half, mean + half


def within_noise(a: list[float], b: list[float]) -> bool:
    """Tells whether the interval of their difference holds 0."""
    _, low, high = difference(a, b)
    return low <= 0 <= high
