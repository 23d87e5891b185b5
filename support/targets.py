"""Finds the modules of a model that names mean: the targets to adapt, and what trains whole."""
import re
from typing import Iterable

import torch
from torch import nn

from support.errors import UserError


def listed(names: str | Iterable[str]) -> list[str]:
    """Returns the names once each, sorted; a string holds them with commas between."""
    names = names.split(",") if isinstance(names, str) else names
    return sorted({name.strip() for name in names})


def ends_in(path: str, names: Iterable[str]) -> bool:
    """Says whether one of the names is the path, or its end after a dot."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def of_each(value, paths: Iterable[str], name: str) -> dict:
    """Returns path -> number, from one number for all or a dict with every path."""
    if not isinstance(value, dict):
        return dict.fromkeys(paths, value)
    odd = sorted(map(str, value.keys() ^ set(paths)))
    if odd:
        wrong = ("no adapted layer" if odd[0] in value else
                 "missing: give the full path of every adapted layer")
        raise UserError(f"{name}: {odd[0]} is {wrong}")
    return value


def linear_layers(model) -> dict[str, nn.Linear]:
    """Returns path -> nn.Linear; a module at two paths stands twice."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear)}


def own_targets(targets: list[str], linear: Iterable[str],
                 also_named: dict[str, list[str]]) -> list[str]:
    """Puts the model's own names in the place of a checkpoint's: q for q_proj.

    also_named: path in the checkpoint -> paths of `linear`. The model's own names come first.
    """
    own: set[str] = set()
    for name in targets:
        paths = {path for theirs, ours in also_named.items() if ends_in(theirs, [name])
                 for path in ours}
        known = not paths or any(ends_in(path, [name]) for path in linear)
        own |= {name} if known else targets_for(paths, linear)
    return sorted(own)


def targets_for(paths: Iterable[str], known: Iterable[str]) -> set[str]:
    """Shortens `paths` to their last parts, unless these name other known paths too.

    A last part such as 0 says little: to_out.0 keeps two.
    """
    def leaf(path: str) -> str:
        return re.search(r"[^.]*(\.\d+)*$", path)[0]

    paths = set(paths)
    leaves = {leaf(path) for path in paths}
    return leaves if {p for p in known if leaf(p) in leaves} == paths else paths


def find_layers(linear: dict[str, nn.Linear], targets: list[str]) -> dict[nn.Linear, str]:
    """Finds the nn.Linear modules that `targets` name; returns module -> its first path."""
    missing = [name for name in targets if not any(ends_in(path, [name]) for path in linear)]
    if missing or not targets:
        names = sorted({path.rpartition(".")[2] for path in linear} - {""})
        raise UserError(f"no nn.Linear is named {', '.join(missing) or '(nothing)'}: "
                        f"the model's are {', '.join(names) or 'none'}")
    found = {}
    for path, module in linear.items():
        if ends_in(path, targets):
            found.setdefault(module, path)
    return found


def modules_named(model, names: Iterable[str]) -> dict[str, nn.Module]:
    """Returns path -> module that one of the names names; a module at two paths stands twice."""
    return {path: module for path, module in model.named_modules(remove_duplicate=False)
            if path and ends_in(path, names)}


def find_whole(model, names: list[str], adapted: dict[nn.Linear, str]) -> list[nn.Module]:
    """Finds the modules that `names` name.

    Raises UserError if one is or holds an adapted layer, shares its weight, or is not float32.
    """
    found = modules_named(model, names)
    for name in names:
        if not any(ends_in(path, [name]) for path in found):
            known = {path.rpartition(".")[2] for path, _ in model.named_modules()} - {""}
            raise UserError(f"whole: no module is named {name or '(nothing)'}: the model's are "
                            + ", ".join(sorted(word for word in known if not word.isdigit())))
    own = {p for module in found.values() for p in module.parameters()}
    for base, path in adapted.items():
        if base.weight in own or base.bias in own:
            raise UserError(f"{path}: cannot be adapted and whole at once")
    for path, module in found.items():
        for p in module.parameters():
            if p.dtype in (torch.float16, torch.bfloat16):
                raise UserError(f"whole: {path} is {p.dtype}, which rounds small steps away: make "
                                "it float32 first")
    return list(found.values())
