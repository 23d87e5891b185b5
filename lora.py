"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    W' = W0 + alpha/r * B A                                            (section 4.1, eq. 3)

W0 (out, in) is the pretrained weight, frozen; A (r, in) and B (out, r) train. The idea: what
fine-tuning adds to a weight has a low rank, so two thin matrices can hold it. B starts at zero:
the first step sees exactly the pretrained model. LoRA+ (Hayou et al., 2024, arXiv:2402.12354) is
the same layer with a higher learning rate for B (see `fast`). Weights are (out, in) everywhere.
"""
import contextlib
import math
from typing import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from support.errors import UserError


def check_whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    """UserError unless `value` is a whole number in low..high."""
    if not isinstance(value, int) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UserError(f"{name} must be a whole number {limits}, not {value!r}")


def full_precision(x):
    """Switches autocast off, for what must be built in float32 (a meta tensor has no autocast)."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


class AdapterLinear(nn.Module):
    """The contract of every method: a frozen nn.Linear, `self.base`, and the update it learns.

        forward(x) = x W'^T + bias    with    W' = merged_weight() = W0 + delta_weight()

    x (..., in) -> (..., out). A method writes delta_weight(), and overrides forward() where the
    same thing has a cheaper form, or to use dropout, which this definition has no place for.
    rank in 1..min(in, out), alpha > 0, dropout in [0, 1): anything else is a UserError.
    """
    fast: tuple[str, ...] = ()   # the parameters whose learning rate LoRA+ multiplies
    idle = False                 # True: some parameters get no gradient for a time

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise UserError(f"an adapter needs an nn.Linear, not {type(base).__name__}")
        check_whole("rank", rank, 1, min(base.in_features, base.out_features))
        if not 0 < alpha < math.inf:
            raise UserError(f"alpha must be above 0 and finite, not {alpha}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, not {dropout}")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.dropout = nn.Dropout(dropout)

    def empty(self, *shape: int):
        """An uninitialised tensor on the base's device: float32, or float64 on a float64 base.

        Not the base's own bf16: its 8 bits would round a small learning rate's steps away.
        In use, a parameter is cast to its input's dtype, as autocast casts any weight.
        """
        dtype = torch.float64 if self.base.weight.dtype == torch.float64 else torch.float32
        return torch.empty(shape, dtype=dtype, device=self.base.weight.device)

    def delta_weight(self):
        """What is added to W0: (out, in), differentiable."""
        raise NotImplementedError

    def merged_weight(self):
        """W' (out, in), in the adapter's dtype: whoever casts it down rounds only once."""
        with full_precision(self.base.weight):
            return self.base.weight + self.delta_weight()

    def forward(self, x):
        return F.linear(x, self.merged_weight().to(self.base.weight.dtype), self.base.bias)

    def rate(self, name: str) -> float:
        """The learning rate of the layer's parameter `name` over the run's, LoRA+'s ratio apart."""
        return 1.0

    @classmethod
    def extra_loss(cls, layers: Iterable["AdapterLinear"]):
        """A scalar that the loop adds to the loss; `layers`: all adapter layers of the model."""
        return 0.0

    @classmethod
    def plan(cls, layers: Iterable["AdapterLinear"], total_steps: int) -> str:
        """What on_step will do when, for people; the loop calls it before its first step.

        UserError: a run too short for the method.
        """
        return ""

    @classmethod
    def on_step(cls, layers: Iterable["AdapterLinear"], step: int, total_steps: int) -> None:
        """The loop calls it after each optimizer.step(), before zero_grad(); step starts at 0."""


class LoRALinear(AdapterLinear):
    """W' = W0 + scale B A, scale = alpha/r; A (r, in), B (out, r); x (..., in) -> (..., out)."""
    fast = ("B",)

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scale = alpha / rank
        self.A = nn.Parameter(self.empty(rank, base.in_features))
        self.B = nn.Parameter(self.empty(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))   # as in the official code; the paper:
        nn.init.zeros_(self.B)                             # "random Gaussian" for A

    def delta_weight(self):
        return self.scale * (self.B @ self.A)   # (out, in)

    def low_rank(self, x):
        """delta_weight() applied to x (..., in) without building it: (..., out)."""
        h = F.linear(x, self.A.to(x.dtype))                       # (..., r)
        # Scaled here, where a token has r numbers, and not after B, where it has `out`.
        return F.linear(self.scale * h, self.B.to(x.dtype))       # (..., out)

    def forward(self, x):
        return self.base(x) + self.low_rank(self.dropout(x))
