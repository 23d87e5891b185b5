"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024), arXiv:2402.09353.

    W' = m W / ||W||,   W = W0 + dW                     (eq. 5)

W0 (out, in) is the pretrained weight, frozen. dW is alpha/r B A, LoRA's update, or that of any
other method (dora_over). m (out,) is `magnitude`. ||W|| (out,) is the length of each row of W.
Idea: full fine-tuning changes the length and the direction of each row separately, so each gets
parameters of its own.
Start: dW is zero and m is ||W0||, so the first step sees the pretrained model, up to rounding.
Gradient: ||W|| counts as a constant (section 4.3), which saves memory. With G = dL/dW', for a row g
of G and w of W: dL/dm = g.w / ||w||, dL/dw = m/||w|| g. Between two steps the method of dW does
what it does.
Cost: `out` parameters more than LoRA, and 1.03 times its time a step (25 M parameters, CPU). Over
another method, each forward builds W0 + dW without gradient, for ||W||: in blocks of rows where dW
comes in blocks (support/dense.py), whole for AdaLoRA, LoRA-Dash and PiSSA.
Goes wrong: if W0 is loaded after the layer is made, m still has the old W0's lengths.
Differs: the paper takes the length of columns. Its code takes rows of (out, in), as here; alpha/r
is the code's too.
"""
from functools import cache

import torch
from torch import nn

from lora import AdapterLinear, LoRALinear
from support.products import full_precision


def keep_squared_lengths(layer: "MagnitudeLinear", *_) -> None:
    """Computes ||W0||^2 (out,), when the layer is made and when weights are loaded into it."""
    dtype = layer.empty(0).dtype
    lengths = torch.linalg.vector_norm(layer.W0.detach(), dim=1, dtype=dtype)
    layer.register_buffer("W0_squared", lengths ** 2, persistent=False)


class MagnitudeLinear(AdapterLinear):
    """W' = magnitude * W / ||W||, W = W0 + delta_weight(); x (..., in) -> (..., out).

    Stands before a method's class among the bases: class DoRALinear(MagnitudeLinear, LoRALinear).
    The method gives delta_weight() and product(), and what it does between steps; this class
    rescales their rows.
    By hand, one row: W = [6, 8], of length 10, and m = 20: W' = 20/10 [6, 8] = [12, 16].
    The bias is not scaled. A row of zeros has no direction and stays zero.
    """

    norm_gradient = False

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        keep_squared_lengths(self)
        self.register_load_state_dict_post_hook(keep_squared_lengths)   # magnitude is loaded
        self.magnitude = nn.Parameter(self.W0_squared.sqrt())

    def merged_weight(self):
        with full_precision(self.W0):
            W = super().merged_weight()                     # (out, in)
            return self.ratio(torch.linalg.vector_norm(W, dim=1) ** 2)[:, None] * W

    def ratio(self, squared):
        """Returns m / ||W|| (out,), given ||W||^2. The length of a row of zeros is taken as 1."""
        if not self.norm_gradient:
            squared = squared.detach()          # a constant in backward: section 4.3
        return self.magnitude / squared.masked_fill(squared <= 0, 1).sqrt()

    def forward(self, x):
        # The official code's W0 x + (m/||W|| - 1) W0 drop(x) + m/||W|| dW drop(x) + bias, as
        # m/||W|| W drop(x) + bias + W0 (x - drop(x)).
        dropped = self.dropout(x)
        h = self.product(dropped)                                    # (..., out)
        with torch.set_grad_enabled(self.norm_gradient and torch.is_grad_enabled()):
            squared = self.squared_norm()
        ratio = self.ratio(squared)
        y = ratio * h if self.base.bias is None else torch.addcmul(self.base.bias, ratio, h)
        if self.training and self.dropout.p > 0:
            y = y + self.frozen(x - dropped)
        return y.to(h.dtype)    # ratio is float32


class DoRALinear(MagnitudeLinear, LoRALinear):
    """W' = magnitude * W / ||W||, W = W0 + scale B A, scale = alpha/r; x (..., in) -> (..., out).

    A constant ||W|| saves 24 % of the memory on LLaMA-7B and costs 0.2 points of accuracy (table
    7). norm_gradient computes the full gradient, dL/dw = m/||w|| (g - its part
    along w); a bf16 W0 then costs a float32 copy until backward.
    """

    options = LoRALinear.options | {"norm_gradient": (False, "let the gradient through the norm "
                                                             "too")}

    def squared_norm(self):
        """Returns ||W||^2 (out,). For rows v of W0, b of s B: |v|^2 + 2 b.(v A^T) + b.(b A A^T).

        By hand, W0 = [3, 4], A = [1, 2], b = 2 * 0.5: 25 + 2 * 11 + 5 = 52 = |[4, 6]|^2.
        W (out, in) is never built: A A^T is (r, r), W0 A^T is (out, r).
        It loses precision only where s B A cancels over 99 % of a row.
        """
        if self.A0 is not None:                 # the expansion of B A - B0 A0 would be longer
            return super().squared_norm()
        with full_precision(self.A):
            A, B = self.A, self.scale * self.B
            W0 = self.W0.to(A.dtype)
            return self.W0_squared + (B * (2 * (W0 @ A.t()) + B @ (A @ A.t()))).sum(1)


@cache
def dora_over(layer: type[AdapterLinear]) -> type[MagnitudeLinear]:
    """Returns the class of DoRA over a method's class; over LoRA's it is DoRALinear."""
    if layer is LoRALinear:
        return DoRALinear
    return type(f"DoRA{layer.__name__}", (MagnitudeLinear, layer),
                {"__doc__": f"W' = magnitude * W / ||W||, W = W0 + the update of {layer.__name__}.",
                 "__reduce__": lambda self: (blank, (layer,), self.__dict__)})


def blank(layer: type[AdapterLinear]) -> MagnitudeLinear:
    """Makes an empty layer of dora_over(layer); pickle fills it, as it cannot find that class."""
    made = dora_over(layer)
    return made.__new__(made)
