"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    W' = W0 + alpha/r * B A                                            (section 4.1, eq. 3)

W0 (out, in) is the pretrained weight, frozen; A (r, in) and B (out, r) train.
Idea: fine-tuning adds an update of low rank to a weight, so two thin matrices can hold it.
Dividing alpha by r saves retuning when r changes.
Start: B is zero, so the first step sees exactly the pretrained model. A is random.
Gradient: plain autograd's. A step does nothing else.
Cost: r (in + out) parameters and two thin products a token; nothing once merged into W0.
Goes wrong: with full fine-tuning's learning rate, which is too low. On data/base 1e-2 is best for
LoRA, 1e-3 for full. A larger alpha needs a lower rate.
Differs: A is Kaiming-uniform as in the official code, where the paper says Gaussian.
LoRA+ (Hayou et al., 2024, arXiv:2402.12354) is the same layer, B's learning rate 16 times A's.

Weights are (out, in) everywhere. W' is the merged weight; ^T transposes.
Read LoRALinear, the last class, first; then AdapterLinear, which all methods share.
"""
import contextlib
import math
from typing import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.errors import UserError


def check_whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    """Raises UserError unless `value` is a whole number from low to high."""
    if type(value) is not int or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UserError(f"{name} must be a whole number {limits}, not {value!r}")


def full_precision(x):
    """Returns a context without autocast, to build in float32; a "meta" device has none."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


class AdapterLinear(nn.Module):
    """Holds a frozen nn.Linear, `self.base`, and learns an update: the contract of every method.

        forward(x) = x W'^T + bias    with    W' = merged_weight() = W0 + delta_weight()

    x (..., in) -> (..., out). Dropout acts on the update's input in training; the equation holds
    without it. A method writes delta_weight(). It may override forward() where the same thing has
    a cheaper form.
    Raises UserError if rank is not in 1..max_rank, alpha not above 0, dropout not in [0, 1), or an
    option is unknown.
    """
    # The method's own hyperparameters: name -> (default, help). If the default is None, with its
    # type: (None, help, int).
    options: dict[str, tuple] = {}
    lr_ratio_parameters: tuple[str, ...] = ()   # whose learning rate LoRA+ multiplies
    uses_alpha = True                           # False: the update has no scale to set
    max_rank = 10_000       # above min(in, out) rank adds parameters, but no directions

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise UserError(f"an adapter needs an nn.Linear, not {type(base).__name__}")
        check_whole("rank", rank, 1, self.max_rank)
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise UserError(f"alpha must be above 0 and finite, not {alpha!r}")
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, not {dropout!r}")
        for name in own.keys() - self.options.keys():
            raise UserError(f"{type(self).__name__} has no option {name}")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.dropout = nn.Dropout(dropout)
        for name, (default, *_) in self.options.items():
            setattr(self, name, own.get(name, default))

    @property
    def W0(self):
        """Returns the pretrained weight (out, in). Methods read it only here and by rows()."""
        return self.base.weight

    def rows(self, rows: slice):
        """Returns some rows of W0: (n, in)."""
        return self.W0[rows]

    def frozen(self, x):
        """Returns x W0^T (..., out), without the bias."""
        return F.linear(x, self.W0)

    def empty(self, *shape: int):
        """Makes a tensor on the base's device: float32, or float64 on a float64 base.

        It is not bf16 even if the base is: 8 significant bits would round an optimizer's small
        steps away. forward() casts it to its input's dtype.
        """
        dtype = torch.float64 if self.W0.dtype == torch.float64 else torch.float32
        return torch.empty(shape, dtype=dtype, device=self.W0.device)

    def delta_weight(self):
        """Returns the update, which is added to W0: (out, in), differentiable."""
        raise NotImplementedError

    def merged_weight(self):
        """Returns W' (out, in) in the adapter's dtype, not rounded to the base's."""
        with full_precision(self.W0):
            return self.W0 + self.delta_weight()

    def forward(self, x):
        """Returns x W0^T + bias + dropout(x) delta_weight()^T; backward builds the update again."""
        def update(x):
            with full_precision(x):
                dW = self.delta_weight()
            return F.linear(x, dW.to(x.dtype))
        return self.base(x) + checkpoint(update, self.dropout(x), use_reentrant=False)

    def lr_factor(self, name: str) -> float:
        """Returns a parameter's factor on the learning rate; LoRA+'s ratio multiplies it."""
        return 1.0

    @classmethod
    def extra_loss(cls, layers: Iterable["AdapterLinear"]):
        """Returns a scalar that the loop adds to the loss; `layers` are all of the model's."""
        return 0.0

    @classmethod
    def start(cls, layers: Iterable["AdapterLinear"], total_steps: int) -> str:
        """Returns a sentence on what on_step will do and when; called before the first step.

        Raises UserError if the run is too short for the method.
        """
        return ""

    @classmethod
    def on_step(cls, layers: Iterable["AdapterLinear"], step: int, total_steps: int) -> None:
        """Acts after each optimizer.step() and before zero_grad(); the first step is 0."""


class LoRALinear(AdapterLinear):
    """W' = W0 + scale B A, scale = alpha/r; A (r, in), B (out, r); x (..., in) -> (..., out).

    By hand: A = [1, 2], B = [1; -1], scale 3: dW = 3 B A = [3, 6; -3, -6].
    With G = dL/dW', dL/dA = scale B^T G and dL/dB = scale G A^T. At step 0 B is 0: B moves first.
    """
    lr_ratio_parameters = ("B",)

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        self.scale = alpha / rank
        self.A = nn.Parameter(self.empty(rank, base.in_features))
        self.B = nn.Parameter(self.empty(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def delta_weight(self):
        return self.scale * (self.B @ self.A)   # (out, in)

    def low_rank(self, x):
        """Returns x dW^T without building dW: x (..., in) -> (..., out)."""
        h = F.linear(x, self.A.to(x.dtype))                       # (..., r)
        # Scaled here, where a token has r numbers, and not after B, where it has `out`.
        return F.linear(self.scale * h, self.B.to(x.dtype))       # (..., out)

    def forward(self, x):
        return self.base(x) + self.low_rank(self.dropout(x))
