"""Reads what the runs of a sweep have learnt: which of them to compare, and their weights.

Weights are (out, in). dW = W' - W0 is what a run has changed in one layer.
"""
import re
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data import OPTIONS
from experiments.results import SavedRun, chosen, main_metric, read_runs
from formats.checkpoint import load_pretrained
from methods import METHODS, merge
from support.errors import UserError
from support.files import open_regular
from support.flags import TARGETS
from support.parser import flag
from support.run import fingerprint, load_adapters, snapshots, weights_dtype
from support.targets import ends_in


class Lacking(UserError):
    """Says that the runs do not hold what a figure needs."""


@dataclass(frozen=True)
class Sweep:
    """Holds runs that differ in method, rank, learning rate and seed alone."""
    runs: list[SavedRun]
    chosen: dict[tuple[str, int | None], list[SavedRun]]    # by method and rank: see chosen()
    metric: str

    def score_on(self, split: str) -> str:
        """Names the axis of the main metric."""
        share = self.metric in self.runs[0].result["counts"]
        return f"{self.metric}, share of the {split} items" if share else f"{self.metric} ({split})"

    @property
    def ranks(self) -> list[int | None]:
        """Lists the ranks of all runs, or [None] if no run has a rank."""
        return sorted({rank for _, rank in self.chosen if rank is not None}) or [None]

    @property
    def in_order(self) -> list[tuple[str, int | None, list[SavedRun]]]:
        """Lists method, rank and chosen runs in the order of METHODS and of ranks."""
        order = list(METHODS)
        return sorted(((method, rank, runs) for (method, rank), runs in self.chosen.items()),
                      key=lambda line: (order.index(line[0]), line[1] or 0))

    @property
    def rank(self) -> int | None:
        """Names the rank of the figures that show one.

        It is the rank with the most runs; of several such ranks the largest.
        """
        runs = Counter()
        for (_, rank), of_rank in self.chosen.items():
            runs[rank] += len(of_rank)
        return max(self.ranks, key=lambda rank: (runs[rank], rank))

    def at(self, rank: int | None) -> dict[str, list[SavedRun]]:
        """Maps each method to its chosen runs at a rank. Runs without a rank (full) join them."""
        found = {method: self.chosen.get((method, rank), self.chosen.get((method, None)))
                 for method in METHODS}
        return {method: runs for method, runs in found.items() if runs}

    def need(self, *methods: str) -> dict[str, list[SavedRun]]:
        """Maps the methods to their runs at the sweep's rank.

        Raises Lacking if one has none.
        """
        found = self.at(self.rank)
        missing = [method for method in methods if method not in found]
        if missing:
            at = f" at rank {self.rank}" if self.rank else ""
            raise Lacking(f"needs runs of {', '.join(methods)}; missing{at}: {', '.join(missing)}")
        return {method: found[method] for method in methods}

    @property
    def layers(self) -> list[str]:
        """Lists the paths of the layers that all runs adapt. In full's runs the same ones count."""
        targets = {run.args.targets for run in self.runs if run.args.targets} or {TARGETS}
        return [path for path, module in pretrained(self.runs[0]).named_modules()
                if isinstance(module, nn.Linear) and all(
                    ends_in(path, names.split(",")) for names in targets)]


def read_sweep(folder: str | Path) -> Sweep:
    """Reads the finished runs in a folder.

    Raises UserError if there are none, or if they cannot stand in one figure.
    """
    runs = read_runs(folder)
    for name in ("model", "from_peft", "task", *OPTIONS, "steps", "batch_size", "loss_on",
                 "base_dropout", "head_dropout", "max_eval"):
        values = sorted({str(getattr(run.args, name)) for run in runs})
        if len(values) > 1:
            raise UserError(f"{folder}: its runs cannot stand in one figure, they differ in "
                            f"{flag(name)}: {', '.join(values)}")
    settings = {}
    for setting, of_setting in chosen(runs).items():
        method, rank = key = of_setting[0].args.method, of_setting[0].args.rank
        if key in settings:
            names = sorted({name for name, _ in set(setting) ^ set(settings[key][0].setting)})
            raise UserError(f"{folder}: its runs of {method} at rank {rank} cannot be one line, "
                            f"they differ in {', '.join(map(flag, names))}")
        settings[key] = of_setting
    return Sweep(runs, settings, main_metric(runs[0].result))


# ---- the weights of a run
@lru_cache(maxsize=2)
def open_base(path: str, dtype: torch.dtype, began_with: str) -> nn.Module:
    """Loads a base model.

    Raises UserError if its weights are not those that the fingerprint `began_with` stands for.
    """
    model = load_pretrained(path, dtype)[0]
    if fingerprint(model.state_dict(), dtype) != began_with:
        raise UserError(f"{path}: not the model that the runs were trained from")
    return model


def pretrained(run: SavedRun) -> nn.Module:
    """Returns the run's base model, which is read once: take a copy before you change it."""
    return open_base(run.args.model, weights_dtype(run.args.dtype, run.args.method),
                     run.result["base"])


def end_of(run: SavedRun) -> Path:
    """Names the file of the adapters that training ended with."""
    return run.folder / "adapter.safetensors"


def trained(run: SavedRun, file: Path) -> nn.Module:
    """Puts the adapters of a file into the model, in float64 lest rounding look like rank."""
    model = deepcopy(pretrained(run)).double()
    load_adapters(run.folder, model, file)
    return model


def merged_and_base(run: SavedRun, paths: list[str], file: Path) -> dict[str, tuple]:
    """Maps each layer's path to W' and W0 (out, in), both float64."""
    old, new = pretrained(run), merge(trained(run, file))
    return {path: (new.get_submodule(path).weight.detach(),
                   old.get_submodule(path).weight.detach().double()) for path in paths}


def updates(run: SavedRun, paths: list[str], file: Path) -> dict[str, torch.Tensor]:
    """Maps each layer's path to its dW (out, in)."""
    return {path: W - W0 for path, (W, W0) in merged_and_base(run, paths, file).items()}


def tensors_in(file: Path) -> dict[str, torch.Tensor]:
    """Reads the adapters as they were saved, for figures that need no model."""
    try:
        open_regular(file).close()
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot read: {error}") from None


def saved_at(run: SavedRun) -> dict[int, Path]:
    """Maps the number of steps done to the snapshot after them."""
    return {int(path.stem): path for path in snapshots(run.folder)}


def shared_steps(runs: list[SavedRun]) -> list[int]:
    """Lists the steps after which all runs have a snapshot.

    Raises Lacking if there are none.
    """
    steps = set.intersection(*(set(saved_at(run)) for run in runs))
    if not steps:
        raise Lacking(f"needs snapshots of {runs[0].args.method} (--snapshot-every)")
    return sorted(steps)


def block_and_module(path: str) -> tuple[int, str]:
    """Splits layers.2.attn.q into 2 and q. A layer outside all blocks is in block -1."""
    block = re.search(r"\.(\d+)\.", path)
    return int(block[1]) if block else -1, path.rpartition(".")[2]
