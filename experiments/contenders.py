"""Makes the contenders of the bench: one layer or a whole model, adapted by a method."""
import copy
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from data.task import target_loss
from dual_lora import DualLoRALinear
from experiments.profiling import addresses, freed_memory_kept, median_and_spread, peak_bytes, race
from methods import METHODS, contract, inject
from model import Config, Transformer

RANK = 8
TARGETS = ["q", "k", "v", "up", "down"]
OURS = [name for name in METHODS if name != "lora+"]        # which has lora's layer
WITH_DORA = [f"{name} with dora" for name in ("adalora", "dash", "dual", "loha", "hira")]
SIZES = {"25 M": dict(vocab_size=8192, d_model=512, n_layers=6, n_heads=8, d_ff=1408),
         "110 M": dict(vocab_size=32000, d_model=768, n_layers=12, n_heads=12, d_ff=2048),
         "1 B": dict(vocab_size=32000, d_model=2048, n_layers=22, n_heads=32, d_ff=5632)}


class Contender:
    """Holds a model in the middle of its training, and runs a step of it in two halves."""

    def __init__(self, model: nn.Module, forward: Callable, inputs: list[torch.Tensor], grad=None,
                 bf16: bool = False):
        """Prepares the model; `grad` is the gradient of forward(model), None for that of a loss."""
        self.model, self.output, self.grad, self.bf16 = model.train(), forward, grad, bf16
        self.owned = addresses(model, *inputs)          # memory that is there before a step
        self.method, self.layers = contract(model)
        # The methods' own state. peft makes its own only when it is first needed.
        self.state = sum(buffer.nbytes for layer in self.layers
                         for buffer in layer.buffers(recurse=False))
        for layer in self.layers:
            if "warmup" in layer._buffers:              # Dual LoRA after its warm-up
                layer.warmup.fill_(1)
            if "dashing" in layer._buffers:             # LoRA-Dash: any directions cost the same
                layer.U.normal_(), layer.Vt.normal_(), layer.dashing.fill_(1)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4) if self.trainable else None
        inner = getattr(model, "base_model", None)      # peft's AdaLoRA prunes in this call
        self.allocate = getattr(inner, "update_and_allocate", None)

    def forward(self):
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return self.output(self.model)

    def forward_backward(self) -> None:
        self.forward().backward(self.grad)
        extra = self.method.extra_loss(self.layers) if self.layers else 0.0
        if torch.is_tensor(extra):
            extra.backward()

    def rest(self) -> None:
        """Does what follows backward in train.py's fit(), at step 500 of 1,000: AdaLoRA prunes."""
        if self.optimizer is None:
            return
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.method.on_step(self.layers, 500, 1000)
        if self.allocate is not None:
            self.allocate(500)
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.forward_backward()
        self.rest()


def measure_steps(contenders: dict[str, Contender], rounds: int, device: str) -> dict[str, dict]:
    """Measures training steps: name -> peak_bytes, time of a step and of forward + backward (fb_).

    The peak is of a contender's first two steps, since Adam's averages appear after the first. It
    includes the buffers of its layers.
    """
    with freed_memory_kept():
        peaks = {name: c.state + peak_bytes(lambda: (c.step(), c.step()), c.owned, device)
                 for name, c in contenders.items()}
        times = race({name: [c.forward_backward, c.rest] for name, c in contenders.items()},
                     rounds, device)
    results = {}
    for name, rows in times.items():
        half, whole = zip(*rows)
        (fb, fb_spread), (step, step_spread) = median_and_spread(half), median_and_spread(whole)
        results[name] = {
            "contender": name, "fb_seconds": fb, "fb_spread": fb_spread, "fb_best": min(half),
            "seconds": step, "spread": step_spread, "best": min(whole), "peak_bytes": peaks[name],
            "trainable": sum(p.numel() for p in contenders[name].trainable)}
    return results


def ratio(rows: dict[str, dict], name: str, other: str, key: str = "seconds") -> float:
    return rows[name][key] / rows[other][key]


def adapted(model: nn.Module, name: str, targets: list[str], rank: int = RANK) -> nn.Module:
    """Adapts a model by the method `name`, one of WITH_DORA too, or freezes it."""
    if name == "frozen":
        return model.requires_grad_(False)
    method, _, dora = name.partition(" with ")
    return inject(model, method, targets, rank, 2 * rank, dora=bool(dora))


# ---- one layer
class OneLayer(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.q = nn.Linear(n_in, n_out, bias=False)

    def forward(self, x):
        return self.q(x)


class NaiveDual(DualLoRALinear):
    """Computes Dual LoRA in plain autograd, beside the frozen layer: x W0' + x dW'."""

    def forward(self, x):
        return self.base(x) + F.linear(x, self.delta_weight())


class MergedDual(DualLoRALinear):
    """Computes Dual LoRA in plain autograd, by the definition: x (W0 + dW)'."""

    def forward(self, x):
        return F.linear(x, self.merged_weight().to(x.dtype), self.base.bias)


AUTOGRAD_DUALS = {"dual, naive": NaiveDual, "dual, merged": MergedDual}


def one_layer(name: str, n_in: int, n_out: int, tokens: int, device: str = "cpu",
              bf16: bool = False, rank: int = RANK, adapt: Callable = adapted) -> Contender:
    """Makes a contender of one nn.Linear; `adapt` adapts it, as adapted() or peft does."""
    torch.manual_seed(0)
    model = OneLayer(n_in, n_out)
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(tokens, n_in, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, n_out, device=device, dtype=dtype) / tokens
    if name in AUTOGRAD_DUALS:
        model.q = AUTOGRAD_DUALS[name](model.q, rank, 2 * rank)
    else:
        model = adapt(model, name, ["q"], rank)
    if name != "full":                                  # full trains in float32, as in train.py
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)

    def forward(model):
        x.grad = None
        return model(x)

    return Contender(model.to(device), forward, [x, grad], grad, bf16)


# ---- a whole model
def llama(size: str, **others) -> Transformer:
    """Makes a LLaMA-shaped model of random weights; `others` change its shape."""
    shape = SIZES[size] | others
    config = Config(**shape, n_kv_heads=shape["n_heads"], max_positions=1024, bos=1, eos=[2],
                    head_dim=shape["d_model"] // shape["n_heads"])
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


def one_model(pretrained: Transformer, name: str, tokens: torch.Tensor,
              bf16: bool = False) -> Contender:
    """Makes a contender of a model; all but `full` share the memory of the frozen weights."""
    if name == "full":
        model = copy.deepcopy(pretrained).float()
    else:
        model = copy.deepcopy(pretrained, {id(p): p for p in pretrained.parameters()})
    adapted(model, name, TARGETS)
    if name == "frozen":        # gradients pass through all blocks, as under an adapter
        model.embed.register_forward_hook(lambda module, _, y: y.requires_grad_())
    everything, count = torch.ones_like(tokens, dtype=torch.bool), tokens[:, 1:].numel()
    return Contender(model, lambda model: target_loss(model, tokens, everything) / count,
                     [tokens, everything], bf16=bf16)
