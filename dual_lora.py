"""Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates (Xu et al., 2025), 2512.03402.

    W' = W0 + warmup * alpha/sqrt(r1 r2) * ReLU(B A) (.) Sign(D C)               (section 3)

(.) is the Hadamard product, entry by entry; Sign(x) = +1 if x > 0, else -1. A (r1, in) and
B (out, r1) say how far each weight moves, C (r2, in) and D (out, r2) which way; r1 = r2 = r/2 by
default.
Idea: fine-tuning moves every weight by a size and a sign. ReLU and Sign, entry by entry, lift two
thin products to an update of nearly full rank.
Start (section 3.3): ReLU passes no gradient at 0, so a zero A or B would never train. All four
matrices start Gaussian. To begin at W0, `warmup` is 0 in the first step. Every gradient is then 0.
Gradient: Sign's derivative is 0, so backward uses 1, clipping dL/dSign to [-1, 1] (section 3). An
entry whose ReLU is 0 gives no gradient to either product.
A step: on_step raises `warmup` to 1 over 5 steps. At 1 the random update has 1 % of W0's rms.
Cost: LoRA's parameters and 1.30 times its time (25 M parameters, CPU). Forward and backward each
build the update, 1,024 rows at a time (support/dense.py).
Goes wrong: without on_step nothing trains; a random update large beside W0 harms (start_size).
Differs: the paper omits the start's size, r1, r2, the warm-up's length, and C's and D's rate.
"""
import math

import torch
from torch import nn

from support.dense import DenseLinear
from support.errors import UserError, check_whole


class Sign(torch.autograd.Function):
    """Computes Sign(x); straight-through: dL/dx = clip(dL/dSign, -1, 1) (section 3)."""
    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit               # 1, or infinity without the clip
        return (x > 0).to(x.dtype).mul_(2).sub_(1)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.limit, ctx.limit), None


class DualLoRALinear(DenseLinear):
    """W' = W0 + warmup * scale * ReLU(B A) (.) Sign(D C), scale = alpha/sqrt(r1 r2).

    x (..., in) -> (..., out). By hand: A = [1, -1], B = [2; -1], C = [1, 1], D = [1; 0], scale 2.
    B A = [2, -2; -1, 1], of which ReLU leaves [2, 0; 0, 1]. D C = [1, 1; 0, 0], so Sign gives
    [1, 1; -1, -1]. The update is 2 * [2, 0; 0, -1] = [4, 0; 0, -2].
    Raises UserError if the rank is below 2, an option is out of range, or W0 is zero (start_size).
    """

    def delta_weight(self, rows=slice(None)):
        size = self.warmup * self.scale
        # size >= 0 may stand inside ReLU: there it multiplies r1 columns, and not all of (out, in).
        magnitude = torch.relu((size * self.B[rows]) @ self.A)     # (out, in), or those rows of it
        direction = Sign.apply(self.D[rows] @ self.C, self.limit)
        return magnitude * direction

    options = {
        "r1": (None, "set the rank of the magnitude B A (half of --rank)", int),
        "r2": (None, "set the rank of the direction D C (half of --rank)", int),
        "update_warmup": (5, "let the update grow to its full size over this many steps"),
        "init_share": (0.01, "start the update at this share of the size (rms) of W0"),
        "init_std": (None, "start A, B, C, D with this deviation (from --init-share)", float),
        "clip": (True, "clip the gradient through Sign at 1"),
        "direction_lr": (0.3, "multiply the learning rate of C and D by this"),
    }
    lr_ratio_parameters = ("B", "D")

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        self.check_options()
        self.scale = alpha / math.sqrt(self.r1 * self.r2)
        self.limit = 1.0 if self.clip else math.inf
        self.A = nn.Parameter(self.empty(self.r1, base.in_features))
        self.B = nn.Parameter(self.empty(base.out_features, self.r1))
        self.C = nn.Parameter(self.empty(self.r2, base.in_features))
        self.D = nn.Parameter(self.empty(base.out_features, self.r2))
        self.std, self.start_share = self.start_size()
        for matrix in (self.A, self.B, self.C, self.D):
            nn.init.normal_(matrix, std=self.std)
        self.register_buffer("warmup", self.empty().fill_(float(self.update_warmup == 0)))
        self.last_cold = None
        self.register_forward_pre_hook(check_on_step_ran)

    def check_options(self) -> None:
        """Fills in r1 and r2, which share the rank, and refuses what is out of range."""
        check_whole("rank, shared by magnitude and direction,", self.rank, 2)
        if self.r1 is None:
            self.r1 = self.rank // 2 if self.r2 is None else self.rank - self.r2
        if self.r2 is None:
            self.r2 = self.rank - self.r1
        check_whole("r1", self.r1, 1, self.max_rank)
        check_whole("r2", self.r2, 1, self.max_rank)
        check_whole("update_warmup", self.update_warmup, 0)
        for name in ("init_share", "init_std", "direction_lr"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0 and finite, not {value}")

    def start_size(self) -> tuple[float, float]:
        """Returns the deviation of A, B, C, D at the start, and rms(dW) / rms(W0) at full warm-up.

        An entry of B A is a sum of r1 products of variance std^4, and ReLU keeps half of its mean
        square. So rms(dW) = scale sqrt(r1 / 2) std^2, and std makes it init_share rms(W0).
        """
        if self.W0.is_meta:
            return 1.0, 0.0                                 # no numbers, no size
        norm = torch.linalg.vector_norm(self.W0, dtype=self.A.dtype)
        size = (norm / math.sqrt(self.W0.numel())).item()   # rms(W0)
        if self.init_std is not None:
            dW = self.scale * math.sqrt(self.r1 / 2) * self.init_std ** 2
            return self.init_std, dW / size if size else math.inf
        if not 0 < size < math.inf:
            raise UserError(f"W0 has the size {size:g}: dW cannot be a share of it, give init_std")
        std = math.sqrt(self.init_share * math.sqrt(2) * size / (self.scale * math.sqrt(self.r1)))
        return std, self.init_share

    def lr_factor(self, name: str) -> float:
        return self.direction_lr if name in ("C", "D") else 1.0

    def warmup_steps(self, total_steps: int) -> int:
        """Returns update_warmup, or a quarter of a run too short for that."""
        return min(self.update_warmup, max(1, total_steps // 4))

    @classmethod
    def start(cls, layers, total_steps: int) -> str:
        length = max(layer.warmup_steps(total_steps) for layer in layers)
        share = max(layer.start_share for layer in layers)
        if total_steps < 2 and length > 0:
            raise UserError("Dual LoRA's first step is at warm-up 0 and trains nothing: give at "
                            "least 2 steps, or update_warmup 0")
        return (f"the update grows to full size over {length} steps; " * (length > 0)
                + f"untrained it has at most {100 * share:.3g} % of W0's size"
                + "; warning: above 20 % it damages what the model knows" * (share > 0.2))

    @classmethod
    def on_step(cls, layers, step: int, total_steps: int) -> None:
        for layer in layers:
            layer.warmup.fill_(min(1.0, (step + 1) / max(1, layer.warmup_steps(total_steps))))


def check_on_step_ran(layer: DualLoRALinear, _) -> None:
    """Raises UserError if A has changed since the last forward and warmup is still at 0.

    torch counts a tensor's changes in place, but not those that a fused optimizer makes.
    """
    if layer.warmup > 0 or not torch.is_grad_enabled():
        return
    same, changes = (id(layer.A), layer.warmup._version), layer.A._version
    last_same, last_changes = layer.last_cold or (same, changes)
    layer.last_cold = same, changes
    if last_same == same and last_changes != changes:
        raise UserError("Dual LoRA's A has changed while its warm-up stayed at 0: call on_step "
                        "after every optimizer.step(), or inject with update_warmup=0")
