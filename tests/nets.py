"""Defines a small network for tests of the methods, and a loop that trains it."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dora import MagnitudeLinear
from methods import METHODS, contract, inject, param_groups

ADAPTED = [name for name, method in METHODS.items() if method.layer is not None]
OVER = [f"{method} with dora" for method in ADAPTED
        if method != "lora" and not issubclass(METHODS[method].layer, MagnitudeLinear)]
# DoRA over each method; one of them is quick.
WITH_DORA = [name if name == "dual with dora" else pytest.param(name, marks=pytest.mark.slow)
             for name in OVER]
EVERY = [*METHODS, *WITH_DORA]
STEPS = 12


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, 2 * width, bias=False)
        self.o = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.o(torch.tanh(self.q(x)).repeat(1, 2) * self.v(x))


class Net(nn.Module):
    """Has what injection must handle.

    That is targets at the root and in a ModuleList, a module at two paths, and a tied weight.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.twin = nn.ModuleDict({"v": self.blocks[0].v})
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.q(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + self.twin["v"](x).chunk(2, -1)[0]))


def net(dtype=torch.float32, seed=0):
    """Makes a Net with the weights of a seed."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def inject_named(model, name, targets, **kwargs):
    """Injects a method, or one of WITH_DORA."""
    method, _, over = name.partition(" with ")
    return inject(model, method, targets, **kwargs, **({"dora": True} if over else {}))


def injected(method, dtype=torch.float32, **kwargs):
    """Makes a Net with adapters on every q and v."""
    torch.manual_seed(1)
    return inject_named(net(dtype), method, ["q", "v"], **dict(rank=4, alpha=8) | kwargs)


def data(n=16):
    """Draws tokens and targets, the same at each call."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(11, (n,), generator=generator),
            torch.randint(11, (n,), generator=generator))


def train(model, steps=STEPS, lr=0.01):
    """Trains as train.py does: backward, step, on_step, zero_grad."""
    method, layers = contract(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr))
    tokens, targets = data()
    for step in range(steps):
        loss = F.cross_entropy(model(tokens).float(), targets) + method.extra_loss(layers)
        loss.backward()
        optimizer.step()
        method.on_step(layers, step, steps)
        optimizer.zero_grad()
    return model


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
