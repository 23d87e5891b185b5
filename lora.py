"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), arXiv:2106.09685.

    W' = W0 + alpha/r * B A                                            (section 4.1, eq. 3)

W0 (out, in) is the pretrained weight, frozen; A (r, in) and B (out, r) train.
Idea: fine-tuning adds an update of low rank to a weight, so two thin matrices can hold it.
Dividing alpha by r saves retuning when r changes.
Start: B is zero, so the first step sees exactly the pretrained model. A is random. With
ab_init "pissa" both start at W0's largest singular values (start_at_pissa).
Gradient: plain autograd's. Nothing happens between two steps.
Cost: r (in + out) parameters and two thin products a token; nothing once merged into W0.
Goes wrong: full fine-tuning's learning rate is too low. On the model in data/base 1e-2 is best for
LoRA, 1e-3 for full. A larger alpha needs a lower rate.
Differs: A is Kaiming-uniform as in the official code, where the paper says Gaussian.
LoRA+ (Hayou et al., 2024, arXiv:2402.12354) is the same layer, B's learning rate 16 times A's.

Weights are (out, in) everywhere. W' is the merged weight; ^T transposes.
Read LoRALinear, the last class, first; then AdapterLinear, which all methods share.
"""
import math
from typing import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from support.errors import UserError, check_whole, refuse_not_finite
from support.products import best_factors, full_precision, rebuilt, values_follow


class AdapterLinear(nn.Module):
    """Holds a frozen nn.Linear, `self.base`, and learns an update: the contract of every method.

        forward(x) = x W'^T + bias    with    W' = merged_weight() = W0 + delta_weight()

    x (..., in) -> (..., out). DoRA alone has another W' (dora.py). Dropout acts on the update's
    input in training; the equation holds without it. A method writes delta_weight(). It may
    override update() where the same product has a cheaper form.
    Raises UserError if rank is not in 1..max_rank, alpha not above 0, dropout not in [0, 1), or an
    option is unknown or not one of its choices.
    """
    # The method's own hyperparameters: name -> (default, help). A third part is the tuple
    # of choices, or the type if the default is None.
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
        for name, (default, _, *kind) in self.options.items():
            value = own.get(name, default)
            if kind and isinstance(kind[0], tuple) and value not in kind[0]:
                raise UserError(f"{name} must be one of {', '.join(kind[0])}, not {value!r}")
            setattr(self, name, value)

    @property
    def W0(self):
        """Returns the pretrained weight (out, in).

        Methods read it here and by rows() alone, so that a base may store it in another form.
        """
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
        steps away. Each product casts it to its input's dtype.
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

    def update(self, x):
        """Returns x delta_weight()^T (..., out). Backward builds the update again: none is kept."""
        return rebuilt(x, lambda _: self.delta_weight())

    def forward(self, x):
        return self.base(x) + self.update(self.dropout(x))

    def product(self, x):
        """Returns x (W0 + delta_weight())^T (..., out), without the bias; for dora.py."""
        return self.frozen(x) + self.update(x)

    def squared_norm(self):
        """Returns |w|^2 (out,) of each row w of W0 + delta_weight(); for dora.py."""
        with full_precision(self.W0):
            return torch.linalg.vector_norm(self.W0 + self.delta_weight(), dim=1) ** 2

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
    With G = dL/dW', dL/dA = scale B^T G and dL/dB = scale G A^T. At step 0 B is 0, so only B moves.
    scaling "rslora" takes alpha/sqrt(r), for ranks above 32 (Kalajdzievski 2023, arXiv:2312.03732).
    For ab_init "pissa" see start_at_pissa().
    """
    options = {
        "scaling": ("lora", "scale by alpha / r (lora) or alpha / sqrt(r) (rslora)",
                    ("lora", "rslora")),
        "ab_init": ("kaiming", "start A at random and B at 0; pissa: both at W0's largest singular "
                    "values", ("kaiming", "pissa"))}
    lr_ratio_parameters = ("B",)

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        self.scale = alpha / (rank if self.scaling == "lora" else math.sqrt(rank))
        self.A = nn.Parameter(self.empty(rank, base.in_features))
        self.B = nn.Parameter(self.empty(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        self.register_buffer("A0", None)        # PiSSA's start; None without it
        self.register_buffer("B0", None)
        if self.ab_init == "pissa":
            self.start_at_pissa()

    def delta_weight(self):
        BA = self.B @ self.A
        if self.A0 is not None:
            BA = BA - self.B0 @ self.A0
        return self.scale * BA                                    # (out, in)

    def update(self, x):
        y = self.low_rank(x, self.A, self.B)
        return y if self.A0 is None else y - self.low_rank(x, self.A0, self.B0)

    def low_rank(self, x, A, B):
        """Returns scale x (B A)^T without building B A: x (..., in) -> (..., out)."""
        h = F.linear(x, A.to(x.dtype))                            # (..., r)
        # Scaled here, where a token has r numbers, and not after B, where it has `out`.
        return F.linear(self.scale * h, B.to(x.dtype))            # (..., out)

    @torch.no_grad()
    def start_at_pissa(self) -> None:
        """Starts A and B at W0's r largest singular values.

            W' = W0 + scale (B A - B0 A0)

        They hold most of W0, so that training begins with its main directions. A0 and B0 are
        frozen copies, so W' begins at W0. scale B A is W0's nearest matrix of rank r.
        Cost: one SVD of W0; then two thin products and two matrices more.
        Meng et al. (2024, arXiv:2404.02948, section 3) subtract scale B0 A0 from the stored weight,
        which rounds it. The gradients are the same.
        By hand: W0 = [12, 0; 0, 1], r = 1, scale 3: A = [2, 0], B = [2; 0].
        Raises UserError if r is above W0's smaller side, or W0 is not finite.
        """
        check_whole("rank, for ab_init pissa,", self.rank, 1, min(self.W0.shape))
        if not self.W0.is_meta and not values_follow():           # else the SVD is for nothing
            refuse_not_finite(self.W0, "W0, for ab_init pissa,")
            A, B = best_factors(self.W0.to(self.A.dtype) / self.scale, self.rank)
            self.A.copy_(A)
            self.B.copy_(B)
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()
