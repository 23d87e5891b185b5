"""From a name to a model: the table of methods, and what is done with their layers in a model.

    inject(model, "dual", ["q", "v"], rank=8)         any nn.Module with nn.Linear in it
    torch.optim.AdamW(param_groups(model, lr=1e-3))   ... train, with the hooks: fit() in train.py
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

from adalora import AdaLoRALinear
from dora import DoRALinear
from dual_lora import DualLoRALinear
from lora import AdapterLinear, LoRALinear
from lora_dash import LoRADashLinear
from support.errors import UserError, refuse_not_finite
from support.files import atomic_write


@dataclass(frozen=True)
class Method:
    layer: type[AdapterLinear] | None   # None: no adapters, every weight of the model trains
    lr: float                           # default learning rate on the models that ship
    large_lr: float | None = None       # and on other models; None: the same
    large_lr_from: str = "ours"         # who recommends that one
    lr_ratio: float = 1.0               # the `fast` parameters get this many times it

    @property
    def options(self) -> dict[str, tuple]:
        """The method's own hyperparameters: name -> (default, help, ...)."""
        return self.layer.options if self.layer else {}

    @property
    def defaults(self) -> dict:
        return {name: default for name, (default, *_) in self.options.items()}


METHODS = {
    "full": Method(None, 1e-3, 2e-5),
    "lora": Method(LoRALinear, 1.05e-2, 2e-4, "the paper's"),
    "lora+": Method(LoRALinear, 3e-3, 5e-5, lr_ratio=16.0),
    "dora": Method(DoRALinear, 1.5e-2, 2e-4, "the paper's"),
    "adalora": Method(AdaLoRALinear, 2e-2, 1e-3),
    "dash": Method(LoRADashLinear, 1e-2, 2e-4, "the paper's"),
    "dual": Method(DualLoRALinear, 1.4e-2, 2e-3),
}
LISTED = dict(METHODS)


def is_listed(method: str) -> bool:
    """The method stands in this file, and was not added to METHODS by a file of one's own."""
    return METHODS[method] is LISTED.get(method)


def inject(model: nn.Module, method: str, targets: Iterable[str] = (), rank: int = 8,
           alpha: float = 16.0, dropout: float = 0.0, rank_pattern: dict[str, int] | None = None,
           alpha_pattern: dict[str, float] | None = None, **hyper) -> nn.Module:
    """Freezes `model` and puts an adapter layer in the place of every target nn.Linear.

    A target is the last part of module paths, or a whole path: `q` is every layer's q. One module
    at two paths stays one. rank_pattern and alpha_pattern: path -> rank and alpha of a layer that
    has others. For `full` every weight trains, and the arguments after `method` mean nothing.
    UserError: an unknown method or option, a target that matches nothing, a second injection.
    """
    _refuse_injected(model)
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    layer, own = METHODS[method].layer, METHODS[method].defaults
    if set(hyper) - set(own):
        raise UserError(f"{method} has no option {', '.join(sorted(set(hyper) - set(own)))}: "
                        f"its own are {', '.join(own) or 'none'}")
    config, new = {"method": method}, {}
    if layer is not None:
        targets, own = sorted({targets} if isinstance(targets, str) else set(targets)), own | hyper
        ranks, alphas = rank_pattern or {}, alpha_pattern or {}
        found = _find(model, targets)
        strange = (ranks.keys() | alphas.keys()) - set(found.values())
        if strange:
            raise UserError(f"rank_pattern, alpha_pattern: {min(strange)} is no adapted layer")
        if ranks and None in own.values():
            raise UserError(f"rank_pattern: {method} derives more than one size from its rank")
        for base, path in found.items():
            try:
                made = layer(base, ranks.get(path, rank), alphas.get(path, alpha), dropout, **own)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            new[base] = made.train(base.training)
        config |= dict(targets=targets, rank=rank, alpha=alpha, dropout=dropout)
        config |= dict(rank_pattern=ranks) if ranks else {}
        config |= dict(alpha_pattern=alphas) if alphas else {}
        first = next(iter(new.values()))     # knows what a None among its arguments came to
        config |= {name: getattr(first, name, value) for name, value in own.items()}
    model.requires_grad_(layer is None)
    model.injected = config   # a plain attribute, which a copy or a pickle of the model keeps
    return _replace(model, new)


def _refuse_injected(model):
    if any("injected" in module.__dict__ or "kept_adapter" in module.__dict__
           or isinstance(module, AdapterLinear) for module in model.modules()):
        raise UserError("this model has been injected already: start from the pretrained one")


def _find(model, targets) -> dict[nn.Linear, str]:
    """The nn.Linear modules that one of `targets` names -> their paths, the first of each."""
    linear = [(path, module) for path, module
              in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
    names = {path.rpartition(".")[2] for path, _ in linear if path}
    missing = sorted(set(targets) - names - {path for path, _ in linear})
    if missing or not targets:
        raise UserError(f"no nn.Linear is named {', '.join(missing) or '(nothing)'}: "
                        f"the model's are {', '.join(sorted(names)) or 'none'}")
    found = {}
    for path, module in linear:
        if path in targets or path.rpartition(".")[2] in targets:
            found.setdefault(module, path)
    return found


def _replace(model, new):
    """Puts new[module] wherever a module of `new` stands, the model itself included."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and module in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[module])
    return new.get(model, model)


def adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    """Module path -> adapter layer, each layer once; empty for `full` and when merged."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdapterLinear)}


def contract(model) -> tuple[type[AdapterLinear], list[AdapterLinear]]:
    """The method's class and its layers; for `full` the contract itself, which does nothing."""
    layers = list(adapters(model).values())
    return (type(layers[0]) if layers else AdapterLinear), layers


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Makes every adapter layer a plain nn.Linear of its W', rounded once to the base's dtype.

    Raises UserError, which names the layer, if a W' is not finite, as where float16 overflows; the
    model is as it was then.
    """
    new = {}
    for path, layer in adapters(model).items():
        W = layer.merged_weight().to(layer.base.weight.dtype)
        refuse_not_finite(W, f"{path}: the merged weight, as {W.dtype},")
        new[layer] = linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(W, requires_grad=False), layer.base.bias
        linear.__dict__["kept_adapter"] = layer   # past nn.Module: not a part of the state dict
        linear.train(layer.training)
    return _replace(model, new)


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the adapter layers back as they were: subtracting dW would damage W0 by rounding."""
    kept = {linear: linear.kept_adapter for linear in model.modules()
            if "kept_adapter" in linear.__dict__}
    for linear, layer in kept.items():   # what model.to() and model.eval() did not reach
        layer.to(linear.weight.device).train(linear.training)
    return _replace(model, kept)


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0,
                 lr_ratio: float = 1.0) -> list[dict]:
    """Optimizer groups: each trainable parameter in one, at lr times its layer's rate for it;
    `fast` ones at lr_ratio times that."""
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


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that training changes, by path: parameters and buffers of the adapter layers without
    their base; for `full` every weight. The tensors are the model's own: copy into them."""
    if any("kept_adapter" in module.__dict__ for module in model.modules()):
        raise UserError("the model is merged: unmerge it first")
    if METHODS[model.injected["method"]].layer is not None:
        return {f"{path}.{name}": tensor for path, layer in adapters(model).items()
                for name, tensor in layer.state_dict().items() if not name.startswith("base.")}
    once = {}   # a tied weight has two names, and is stored under the first
    for name, tensor in model.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor.detach()))
    return dict(once.values())


def save(model: nn.Module, path: str | Path) -> None:
    """Writes the adapters (full: every weight) as safetensors; equal runs give equal bytes."""
    if "injected" not in model.__dict__:
        raise UserError(f"{path}: nothing to save: inject the model first")
    tensors = {name: tensor.contiguous() for name, tensor in state(model).items()}
    for name, tensor in tensors.items():
        refuse_not_finite(tensor, f"{path}: {name}")
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"adapter": json.dumps(model.injected, sort_keys=True)})


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Injects a pretrained model as the file says and fills it in; UserError unless all fits.

    After an error the model is as it was.
    """
    _refuse_injected(model)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with safe_open(path, "pt") as file:
            if "adapter" not in (file.metadata() or {}):
                raise UserError("its metadata has no key `adapter`: not written by this program")
            inject(model, **json.loads(file.metadata()["adapter"]))
            own = state(model)
            expected = {name: list(tensor.shape) for name, tensor in own.items()}
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
            for name in sorted(expected.keys() | found.keys()):
                if expected.get(name) != found.get(name):
                    raise UserError(f"{name} is {found.get(name, 'missing')} in the file, "
                                    f"{expected.get(name, 'missing')} in the model")
            for name, tensor in own.items():
                tensor.copy_(file.get_tensor(name))
                refuse_not_finite(tensor, name)
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:
        _replace(model, {layer: layer.base for layer in adapters(model).values()})
        model.__dict__.pop("injected", None)
        for p, flag in flags:
            p.requires_grad_(flag)
        raise UserError(f"{path}: cannot load: {error}") from error
    return model
