"""LoRA-Dash: Unleashing the Power of Task-Specific Directions (Si et al., 2024), arXiv:2409.01035.

    pre-launch   W' = W0 + alpha/r * B A
    dash         W' = W0 + alpha/r * B A + sum_i c_i u_i v_i^T    (section 4; over s chosen i)

W0 (out, in) is the pretrained weight, frozen. Its singular value decomposition is
W0 = sum over all i of sigma_i u_i v_i^T, u_i (out,), v_i (in,). A (r, in) and B (out, r) train
all along, the s coordinates c in the dash.
Idea: a few of W0's own directions u_i v_i^T matter most to the task, and LoRA's first steps tell
which. A direction's rate is how far dW = alpha/r B A moves along it, relative to sigma_i:

    |u_i^T dW v_i| / sigma_i

By hand: sigma = 4 and 1, and dW moves 6 along the first direction, 2 along the second. The rates
are 1.5 and 2: the second is chosen.
Start: B is zero, so the first step sees the pretrained model. c is zero when the dash begins.
Gradient: dL/dc_i = u_i^T G v_i with G = dL/dW'. Before the dash c has none.
A step: on_step ends the pre-launch, once, by choosing the s directions with the highest rates.
Cost: s trained numbers more than LoRA and s (in + out) frozen ones, 1.03 times its time a step
(25 M parameters, CPU), and one decomposition of every adapted W0.
Goes wrong: without on_step it stays LoRA. Dividing by sigma favours small sigmas, which may carry
only noise; a direction of sigma 0 that moved at all comes first.
Differs: the paper adds an eps to sigma_i, its code does not. The code counts calls of forward and
draws a dropout mask for each update; this file counts optimizer steps and draws one mask.
"""
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lora import LoRALinear
from support.errors import UserError, check_whole


class LoRADashLinear(LoRALinear):
    """W' = W0 + scale B A + U diag(coords) Vt: in the dash an update of rank r + s.

    x (..., in) -> (..., out). U (out, s), Vt (s, in): the chosen directions, zero before the dash
    and then frozen; coords (s,) are not multiplied by alpha/r. s = `directions`, at most
    min(in, out). on_step ends the pre-launch after `prelaunch` steps, or fewer in a short run. An
    optimizer gets coords from the start.
    Raises UserError if directions or prelaunch is below 1.
    """

    options = LoRALinear.options | {
        "directions": (8, "train coordinates along this many directions of W0"),
        "prelaunch": (100, "choose the directions after this many steps of plain LoRA")}

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        check_whole("directions", self.directions, 1)
        check_whole("prelaunch", self.prelaunch, 1)
        s = min(self.directions, base.in_features, base.out_features)
        self.coords = nn.Parameter(self.empty(s).zero_())
        self.register_buffer("U", self.empty(base.out_features, s).zero_())
        self.register_buffer("Vt", self.empty(s, base.in_features).zero_())
        self.register_buffer("dashing", self.empty().zero_())       # 0 in pre-launch, then 1

    def delta_weight(self):
        delta = super().delta_weight()                              # (out, in)
        if self.dashing:
            delta = delta + (self.U * self.coords) @ self.Vt
        return delta

    def update(self, x):
        y = super().update(x)
        # In pre-launch coords must get no gradient, not a gradient of 0: Adam would count these
        # steps. After 100 of them it would move coords up to twice as far for 20 steps.
        if self.dashing:
            h = F.linear(x, self.Vt.to(x.dtype))                    # (..., s)
            y = y + F.linear(self.coords.to(x.dtype) * h, self.U.to(x.dtype))
        return y

    def change_rates(self):
        """Returns U (out, k), rates (k,), Vt (k, in) of all k = min(in, out) directions of W0."""
        U, sigma, Vt = torch.linalg.svd(self.W0.to(self.A.dtype), full_matrices=False)
        def along(A, B):    # u_i^T B A v_i for all i at once, without the (out, in) product B A
            return ((U.t() @ B) * (Vt @ A.t())).sum(1)
        change = along(self.A, self.B)
        if self.A0 is not None:
            change = change - along(self.A0, self.B0)
        change = self.scale * change
        rates = (change / sigma).abs()          # sigma 0: inf, or NaN if nothing moved
        return U, rates.nan_to_num(nan=0.0, posinf=torch.inf), Vt

    @torch.no_grad()
    def launch(self) -> None:
        """Fixes the directions with the highest change rates, highest first: the dash begins."""
        U, rates, Vt = self.change_rates()
        chosen = rates.topk(len(self.coords)).indices
        self.U.copy_(U[:, chosen])
        self.Vt.copy_(Vt[chosen])
        self.dashing.fill_(1)

    @classmethod
    def start(cls, layers, total_steps: int) -> str:
        if total_steps < 2:
            raise UserError("LoRA-Dash needs at least 2 steps: one to choose its directions by, "
                            "one to train along them")
        last = max(last_prelaunch_step(total_steps, layer.prelaunch) for layer in layers)
        return f"plain LoRA up to step {last}, then the dash"

    @classmethod
    def on_step(cls, layers, step: int, total_steps: int) -> None:
        due = [layer for layer in layers
               if step >= last_prelaunch_step(total_steps, layer.prelaunch) and not layer.dashing]
        # They cost some 20 x work operations; a progress bar shows if that takes seconds.
        work = sum(layer.W0.numel() * min(layer.W0.shape) for layer in due)
        for layer in tqdm(due, "SVD of the adapted weights", unit="layer", disable=work < 1e10):
            layer.launch()


def last_prelaunch_step(total_steps: int, prelaunch: int) -> int:
    """Returns the step (0 for the first) after which the directions are chosen: prelaunch - 1.

    A run of at most `prelaunch` steps starts its dash after a quarter of its steps instead.
    """
    return (prelaunch if prelaunch < total_steps else max(1, total_steps // 4)) - 1
