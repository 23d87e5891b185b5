"""Lists the methods, and puts their layers into a model, merges, saves and loads them.

    inject(model, "dual", ["q", "v"], rank=8)         any nn.Module with nn.Linear in it
    torch.optim.AdamW(param_groups(model, lr=1e-3))   then train as fit() in train.py does
    save(model, "adapter.safetensors")
    merge(load(pretrained, "adapter.safetensors"))    plain nn.Linear again

To add a method: one import, and one line in METHODS.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from adalora import AdaLoRALinear
from dora import DoRALinear, MagnitudeLinear, dora_over
from dual_lora import DualLoRALinear
from hira import HiRALinear
from loha import LoHaLinear
from lora import AdapterLinear, LoRALinear
from lora_dash import LoRADashLinear
from support.errors import UserError, refuse_not_finite
from support.files import atomic_write, open_regular
from support.products import values_from_file
from support.targets import (find_layers, find_whole, linear_layers, listed, modules_named, of_each,
                             own_targets)


@dataclass(frozen=True)
class Method:
    """Holds a method's layer class and its default learning rates."""
    layer: type[AdapterLinear] | None   # None: no adapters, every weight of the model trains
    lr: float                           # default learning rate on data/base
    large_lr: float | None = None       # default on other models; None: the same
    large_lr_from: str = "ours"         # who recommends large_lr
    lr_ratio: float = 1.0               # multiplies the rate of layer.lr_ratio_parameters

    @property
    def options(self) -> dict[str, tuple]:
        """Returns the method's own hyperparameters: name -> (default, help, ...)."""
        return self.layer.options if self.layer else {}

    @property
    def defaults(self) -> dict:
        """Returns the default of each option."""
        return {name: default for name, (default, *_) in self.options.items()}


METHODS = {
    "full": Method(None, 1e-3, 2e-5),
    "lora": Method(LoRALinear, 1.05e-2, 2e-4, "the paper's"),
    "lora+": Method(LoRALinear, 3e-3, 5e-5, lr_ratio=16.0),
    "dora": Method(DoRALinear, 1.5e-2, 2e-4, "the paper's"),
    "adalora": Method(AdaLoRALinear, 2e-2, 1e-3),
    "dash": Method(LoRADashLinear, 1e-2, 2e-4, "the paper's"),
    "dual": Method(DualLoRALinear, 1.4e-2, 2e-3),
    "loha": Method(LoHaLinear, 1.4e-2, 4e-3),
    "hira": Method(HiRALinear, 5e-2, 4e-3),
}
LISTED = dict(METHODS)


def is_listed(method: str) -> bool:
    """Says whether this file lists the method; a user's own file may add others to METHODS."""
    return METHODS[method] is LISTED.get(method)


def settled(method: str, dora: bool) -> tuple[str, bool]:
    """Returns ("dora", False) for `lora` with DoRA's magnitude, and else the arguments.

    Raises UserError if the method takes no magnitude, or has one.
    """
    layer = METHODS[method].layer
    if dora and (layer is None or issubclass(layer, MagnitudeLinear)):
        raise UserError(f"dora goes over another method's update, not over {method}")
    return ("dora", False) if dora and method == "lora" else (method, dora)


def inject(model: nn.Module, method: str, targets: Iterable[str] = (),
           rank: int | dict[str, int] = 8, alpha: float | dict[str, float] = 16.0,
           dropout: float = 0.0, whole: Iterable[str] = (), dora: bool = False,
           **own) -> nn.Module:
    """Freezes `model` and puts an adapter layer in the place of every target nn.Linear.

    A target is the end of module paths: `q` is every layer's q, `to_out.0` the first of each
    to_out. A model of load_pretrained() knows its checkpoint's names too, such as q_proj, and
    all-linear. A module at two paths gets one adapter. rank and alpha are numbers, or
    {path: number} with every adapted layer. Modules that `whole` names train as they are, beside
    the adapters. dora puts DoRA's magnitude over the method's update; `lora` with it is `dora`.
    `own` holds the method's options. For `full` every weight trains; `whole` says what is counted
    apart, and the other arguments mean nothing. Raises UserError if the method or an option is
    unknown, a name matches nothing, a module is both adapted and whole, the method takes no
    magnitude, or the model is injected already.
    """
    _refuse_injected(model)
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    if not isinstance(dora, bool):
        raise UserError(f"dora must be True or False, not {dora!r}")
    method, dora = settled(method, dora)
    layer, options = METHODS[method].layer, METHODS[method].options
    layer = dora_over(layer) if dora else layer
    if own.keys() - options.keys():
        raise UserError(f"{method} has no option {', '.join(sorted(own.keys() - options.keys()))}: "
                        f"its own are {', '.join(options) or 'none'}")
    config, new, trained, whole = {"method": method}, {}, [], listed(whole)
    config |= dict(dora=True) if dora else {}
    if layer is None:
        find_whole(model, whole, {})
    else:
        own, linear = METHODS[method].defaults | own, linear_layers(model)
        targets = own_targets(listed(targets), linear, getattr(model, "also_named", {}))
        found = find_layers(linear, targets)
        trained = find_whole(model, whole, found)
        ranks, alphas = (of_each(value, found.values(), name)
                         for name, value in (("rank", rank), ("alpha", alpha)))
        for name in ("r1", "r2"):           # the parts of Dual LoRA's rank
            if isinstance(rank, dict) and own.get(name) is not None:
                raise UserError(f"rank is given by layer: leave {name} out, it follows the rank")
        flags = [(p, p.requires_grad) for p in model.parameters()]
        for base, path in tqdm(found.items(), "adapters", delay=3, leave=False):   # PiSSA's SVDs
            try:
                made = layer(base, ranks[path], alphas[path], dropout, **own)
            except UserError as error:
                for p, flag in flags:
                    p.requires_grad_(flag)
                raise UserError(f"{path}: {error}") from None
            new[base] = made.train(base.training)
        config |= dict(targets=targets, rank=rank, dropout=dropout)
        config |= dict(alpha=alpha) if layer.uses_alpha else {}
        first = next(iter(new.values()))     # a layer fills in the options that are None
        config |= own if isinstance(rank, dict) else {name: getattr(first, name) for name in own}
    config |= dict(whole=whole) if whole else {}
    model.requires_grad_(layer is None)
    for module in trained:
        module.requires_grad_(True)
    model.injected = config   # a plain attribute, so a copy or a pickle of the model keeps it
    return _replace(model, new)


def _refuse_injected(model):
    """Raises UserError if the model has adapters, or had them before a merge."""
    if any("injected" in module.__dict__ or "kept_adapter" in module.__dict__
           or isinstance(module, AdapterLinear) for module in model.modules()):
        raise UserError("this model has been injected already: start from the pretrained one")


def _replace(model, new):
    """Puts new[module] in the place of each module in `new`; returns the model, or new[model]."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and module in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[module])
    return new.get(model, model)


def adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    """Returns module path -> adapter layer, each layer once; empty for `full` or once merged."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdapterLinear)}


def contract(model) -> tuple[type[AdapterLinear], list[AdapterLinear]]:
    """Returns the method's class and its layers; for `full`, AdapterLinear and no layers."""
    layers = list(adapters(model).values())
    return (type(layers[0]) if layers else AdapterLinear), layers


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Makes every adapter layer a plain nn.Linear with W', rounded once to the base's dtype.

    Raises UserError, which names the layer, if a W' is not finite, as when float16 overflows. The
    model then stays as it was.
    """
    new = {}
    for path, layer in adapters(model).items():
        W = layer.merged_weight().to(layer.base.weight.dtype)
        refuse_not_finite(W, f"{path}: the merged weight, as {W.dtype},")
        new[layer] = linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(W, requires_grad=False), layer.base.bias
        linear.__dict__["kept_adapter"] = layer   # not as a submodule: stays out of the state dict
        linear.train(layer.training)
    return _replace(model, new)


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the adapter layers back, with W0 as it was; to subtract dW from W' would round it."""
    kept = {linear: linear.kept_adapter for linear in model.modules()
            if "kept_adapter" in linear.__dict__}
    for linear, layer in kept.items():   # model.to() and model.eval() did not reach them
        layer.to(linear.weight.device).train(linear.training)
    return _replace(model, kept)


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0,
                 lr_ratio: float = 1.0) -> list[dict]:
    """Returns groups for an optimizer, with each trainable parameter in one of them.

    A parameter of a layer learns at lr times layer.lr_factor(name). lr_ratio multiplies the rate
    of layer.lr_ratio_parameters. `whole` modules learn at lr. Raises UserError if lr_ratio is not
    1 and no layer has such parameters.
    """
    layers = adapters(model).values()
    if lr_ratio != 1 and not any(layer.lr_ratio_parameters for layer in layers):
        raise UserError("lr_ratio has no effect here: the method has no parameters to speed up")
    rates = {}
    for layer in layers:
        for name, p in layer.named_parameters(recurse=False):
            ratio = lr_ratio if name in layer.lr_ratio_parameters else 1.0
            rates[id(p)] = lr * layer.lr_factor(name) * ratio
    groups: dict[float, list] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault(rates.get(id(p), lr), []).append(p)
    return [dict(params=params, lr=rate, weight_decay=weight_decay)
            for rate, params in groups.items()]


def widen(module: nn.Module) -> None:
    """Makes a module float32 if it has fewer bits, as a `whole` module must be."""
    module.to(torch.promote_types(next(module.parameters()).dtype, torch.float32))


def train_whole(model: nn.Module, names: list[str]) -> None:
    """Makes these the `whole` modules of an injected model, which may have had parts of them."""
    if names:
        model.injected["whole"] = names
    for module in whole_modules(model).values():
        module.requires_grad_(True)


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns path -> module that trains as it is, beside the adapters."""
    return modules_named(model, model.injected.get("whole", ()))


def count(model: nn.Module) -> dict[str, int]:
    """Counts parameters: trainable, those of them in `whole` modules, and total."""
    parts = {"trainable": [p for p in model.parameters() if p.requires_grad],
             "whole": {p for module in whole_modules(model).values() for p in module.parameters()},
             "total": model.parameters()}
    return {name: sum(p.numel() for p in parameters) for name, parameters in parts.items()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns all that training changes: path -> tensor, which is the model's, not a copy.

    These are the parameters and buffers of `whole` modules, and of the adapter layers without
    their base; for `full`, every weight. Raises UserError if the model is merged.
    """
    if any("kept_adapter" in module.__dict__ for module in model.modules()):
        raise UserError("the model is merged: unmerge it first")
    found = model.state_dict(keep_vars=True)
    if METHODS[model.injected["method"]].layer is not None:
        found = {f"{path}.{name}": tensor
                 for path, module in (adapters(model) | whole_modules(model)).items()
                 for name, tensor in module.state_dict(keep_vars=True).items()
                 if not name.startswith("base.")}
    once = {}   # a tied weight has two names, and is stored under the first
    for name, tensor in found.items():
        once.setdefault(id(tensor), (name, tensor.detach()))
    return dict(once.values())


def save(model: nn.Module, path: str | Path) -> None:
    """Writes the adapters (full: every weight) as safetensors; equal runs give equal bytes.

    Raises UserError if the model is not injected or is merged, or if a tensor is not finite.
    """
    if "injected" not in model.__dict__:
        raise UserError(f"{path}: nothing to save: inject the model first")
    tensors = {name: tensor.contiguous() for name, tensor in state(model).items()}
    for name, tensor in tensors.items():
        refuse_not_finite(tensor, f"{path}: {name}")
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"adapter": json.dumps(model.injected, sort_keys=True)})


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Injects a pretrained model as the file says, and loads the adapters from it.

    path: the file, or the folder of a run. Raises UserError if the file is damaged or does not fit
    the model, which then stays as it was.
    """
    _refuse_injected(model)
    path = Path(path) / "adapter.safetensors" if Path(path).is_dir() else path
    open_regular(path).close()                  # a pipe would never end
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with safe_open(path, "pt") as file:
            if "adapter" not in (file.metadata() or {}):
                raise UserError("its metadata has no key `adapter`: not written by this program")
            with values_from_file():
                inject(model, **json.loads(file.metadata()["adapter"]))
            tensors = state(model)
            expected = {name: list(tensor.shape) for name, tensor in tensors.items()}
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
            for name in sorted(expected.keys() | found.keys()):
                if expected.get(name) != found.get(name):
                    raise UserError(f"{name} is {found.get(name, 'missing')} in the file, "
                                    f"{expected.get(name, 'missing')} in the model")
            for name, tensor in tensors.items():    # all are checked before one is changed
                read = file.get_tensor(name)
                if read.dtype != tensor.dtype and not (read.is_floating_point()
                                                       and tensor.is_floating_point()):
                    raise UserError(f"{name} is {read.dtype} in the file, {tensor.dtype} in the "
                                    "model")
                refuse_not_finite(read.to(tensor.dtype), name)
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError,
            RecursionError) as error:
        _replace(model, {layer: layer.base for layer in adapters(model).values()})
        model.__dict__.pop("injected", None)
        for p, flag in flags:
            p.requires_grad_(flag)
        raise UserError(f"{path}: cannot load: {error}") from error
    return model
