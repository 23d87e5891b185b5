"""LoHa: the Hadamard product of FedPara (Hyeon-Woo et al., 2021), arXiv:2108.06098, on adapters.

    W' = W0 + alpha/sqrt(r1 r2) * (B A) (.) (D C)                (section 2.2, proposition 1)

W0 (out, in) is the pretrained weight, frozen. (.) is the Hadamard product, entry by entry.
A (r1, in), B (out, r1), C (r2, in) and D (out, r2) train; r1 = r2 = r/2.
Idea: a product entry by entry of two matrices of rank r1 and r2 may have rank r1 r2. So the
parameters of a LoRA of rank r hold an update of rank up to r^2/4.
Start: C is zero, so the first step sees exactly the pretrained model. A, B and D are random.
Gradient: plain autograd's, of each product weighed by the other. At the first step only C has one.
Nothing happens between two steps.
Cost: LoRA's parameters and 1.27 times its time (25 M parameters, CPU). Forward and backward each
build the update, 1,024 rows at a time, and backward computes dL/dW'.
Goes wrong: four factors multiply, so a rate a little above the best breaks the model (data/base:
2.8e-2 is the best of five, 4e-2 learns nothing).
Differs: FedPara puts the product in W0's place. LyCORIS and PEFT add it to W0, as here; the start
is PEFT's, whose r is r1.
"""
import math

from torch import nn

from support.dense import DenseLinear
from support.errors import check_whole


class LoHaLinear(DenseLinear):
    """W' = W0 + scale (B A) (.) (D C), scale = alpha/sqrt(r1 r2); x (..., in) -> (..., out).

    By hand: A = [1, -1], B = [2; -1], C = [1, 1], D = [1; 3], scale 2.
    B A = [2, -2; -1, 1], D C = [1, 1; 3, 3]. The update is 2 [2, -2; -3, 3] = [4, -4; -6, 6].
    If the rank is odd, D C gets the larger part. Raises UserError if the rank is below 2.
    """

    lr_ratio_parameters = ("B", "D")

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        check_whole("rank, shared by two products,", rank, 2)
        r1, r2 = rank // 2, rank - rank // 2
        self.scale = alpha / math.sqrt(r1 * r2)
        self.A = nn.Parameter(self.empty(r1, base.in_features))
        self.B = nn.Parameter(self.empty(base.out_features, r1))
        self.C = nn.Parameter(self.empty(r2, base.in_features))
        self.D = nn.Parameter(self.empty(base.out_features, r2))
        for matrix in (self.A, self.B, self.D):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.C)

    def delta_weight(self, rows=slice(None)):
        return (self.scale * self.B[rows] @ self.A) * (self.D[rows] @ self.C)   # (out, in)
