"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation (Huang et al., 2025), ICLR.

    W' = W0 + W0 (.) (B A)

W0 (out, in) is the pretrained weight, frozen. (.) is the Hadamard product, entry by entry.
A (r, in) and B (out, r) train.
Idea: B A says by which share of itself each weight changes. The rank of the update is at most W0's
times r, with LoRA's parameters.
Start: B is zero, so the first step sees exactly the pretrained model. A is random, as LoRA's.
Gradient: plain autograd's. With G = dL/dW', dL/dA = B^T (G (.) W0), dL/dB = (G (.) W0) A^T.
Nothing happens between two steps.
Cost: LoRA's parameters and 1.21 times its time (25 M parameters, CPU). Forward and backward each
build the update, 1,024 rows at a time, and backward computes dL/dW'.
Goes wrong: a weight of 0 stays 0. Entries of W0 are far below 1, so B A has to grow far larger than
in LoRA and needs a higher learning rate.
Differs: it has no alpha, as PEFT's has none.
"""
import math

from torch import nn

from support.dense import DenseLinear


class HiRALinear(DenseLinear):
    """W' = W0 + W0 (.) (B A); A (r, in), B (out, r); x (..., in) -> (..., out).

    By hand: W0 = [1, 2; 3, 4], A = [1, 2], B = [1; -1]. B A = [1, 2; -1, -2], and the update is
    [1, 4; -3, -8].
    """

    lr_ratio_parameters = ("B",)
    uses_alpha = False

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        self.A = nn.Parameter(self.empty(rank, base.in_features))
        self.B = nn.Parameter(self.empty(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def delta_weight(self, rows=slice(None)):
        return self.rows(rows) * (self.B[rows] @ self.A)              # (out, in)
