"""AdaLoRA: Adaptive Budget Allocation (Zhang et al., 2023), arXiv:2303.10512.

    W' = W0 + alpha/r0 * P diag(lam) Q                                 (section 3.1, eq. 3)

W0 (out, in) is the pretrained weight, frozen; P (out, r0), lam (r0,) and Q (r0, in) train: the
shape of a singular value decomposition, kept near one by the penalty ||P'P - I|| + ||QQ' - I||.
The idea: some matrices need more rank than others. All start with r0 = init_rank directions,
more than the budget allows. A direction (column of P, lam, row of Q) is pruned by setting its lam
to 0, wherever in the model the importance is lowest, and can grow back while pruning goes on.
lam starts at zero: the first step sees exactly the pretrained model.

The importance of a direction (section 3.2) is built from each single number w of it, in steps:

    I = |w dL/dw|                           how much the loss would change if w were 0 (eq. 8)
    Ibar = beta1 Ibar + (1 - beta1) I       smoothed over steps, since one batch is noisy (eq. 9)
    Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|           how uncertain Ibar still is (eq. 10)
    s = Ibar * Ubar                         high, or not known well enough to give up (eq. 11)
    S_i = s(lam_i) + mean_j s(P_ji) + mean_j s(Q_ij)     of direction i (eq. 7)

The means make a long column count no more than a short one. All S of the model are then ranked
in one list, and the b(t) highest keep their lam.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from lora import AdapterLinear, check_whole


def budget(step: int, total_steps: int, start: int, target: int, t_init: int, t_final: int) -> int:
    """How many directions the model keeps after optimizer step `step`, 0 for the first (eq. 12)."""
    if step <= t_init:                      # 1. all of them, while the importances settle
        return start
    if step >= total_steps - t_final:       # 3. the target, while the kept ones are fine-tuned
        return target
    share = (step - t_init) / (total_steps - t_final - t_init)
    return int((start - target) * (1 - share) ** 3 + target)    # 2. fast at first, then slowly


def in_steps(t: float, total_steps: int) -> int:
    """t as a number of steps: below 1 it is a share of the run."""
    return int(t * total_steps) if t < 1 else int(t)


class AdaLoRALinear(AdapterLinear):
    """W' = W0 + scale P diag(lam) Q, scale = alpha/(init_rank + 1e-5); rank: kept ones on average.

    x (..., in) -> (..., out). Where the official code differs from the paper, this is the code:
    the 1e-5; the penalty, whose norms are not squared, and averaged over all P and Q of the model;
    importances from the gradients of a step and the weights after it, and only until pruning ends.
    t_init, t_final: length of the first and last phase in steps, below 1 as a share of the run;
    t_final is at least one step. delta_t: steps between two prunings. gamma: the penalty's weight.
    The mask is no state of its own: importances stay as they are in the last phase, and so does
    what they prune. Arguments out of range: UserError; for a schedule that cannot work, check_run.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0,
                 init_rank: int | None = None, t_init: float = 0.1, t_final: float = 0.3,
                 delta_t: int = 1, beta1: float = 0.85, beta2: float = 0.85, gamma: float = 0.1):
        super().__init__(base, rank, alpha, dropout)
        init_rank = round(1.5 * rank) if init_rank is None else init_rank
        check_whole("init_rank", init_rank, rank)
        check_whole("delta_t", delta_t, 1)
        for name, t in (("t_init", t_init), ("t_final", t_final)):
            if not 0 <= t < math.inf or (t >= 1 and t != int(t)):
                raise UserError(f"{name} must be whole steps, or a share below 1, not {t}")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise UserError(f"{name} must be between 0 and 1, not {beta}")
        if not 0 <= gamma < math.inf:
            raise UserError(f"gamma must be at least 0, not {gamma}")
        self.init_rank, self.scale = init_rank, alpha / (init_rank + 1e-5)
        self.t_init, self.t_final, self.delta_t = t_init, t_final, delta_t
        self.beta1, self.beta2, self.gamma = beta1, beta2, gamma
        self.P = nn.Parameter(self.empty(base.out_features, init_rank))
        self.lam = nn.Parameter(self.empty(init_rank))
        self.Q = nn.Parameter(self.empty(init_rank, base.in_features))
        nn.init.normal_(self.P, std=0.02)   # the paper: "random Gaussian"; the code: 0.02
        nn.init.normal_(self.Q, std=0.02)
        nn.init.zeros_(self.lam)
        for name in ("P", "lam", "Q"):
            for average in ("Ibar", "Ubar"):
                self.register_buffer(f"{average}_{name}", torch.zeros_like(getattr(self, name)))

    def delta_weight(self):
        return self.scale * (self.P * self.lam) @ self.Q              # (out, in)

    def forward(self, x):
        y, x = self.base(x), self.dropout(x)
        h = F.linear(x, self.Q.to(x.dtype)) * (self.scale * self.lam).to(x.dtype)   # (..., r0)
        return y + F.linear(h, self.P.to(x.dtype))                    # (..., out)

    def phases(self, total_steps: int) -> tuple[int, int]:
        """t_init and t_final in steps."""
        return in_steps(self.t_init, total_steps), max(1, in_steps(self.t_final, total_steps))

    def learn_importance(self) -> None:
        """Equations 8 to 10, for every number of P, lam and Q."""
        for name in ("P", "lam", "Q"):
            w, Ibar, Ubar = (getattr(self, f"{part}{name}") for part in ("", "Ibar_", "Ubar_"))
            I = (w * (0 if w.grad is None else w.grad)).abs()
            Ibar.lerp_(I, 1 - self.beta1)
            Ubar.lerp_((I - Ibar).abs(), 1 - self.beta2)

    def importance(self):
        """S (r0,), equations 7 and 11."""
        return (self.Ibar_lam * self.Ubar_lam + (self.Ibar_P * self.Ubar_P).mean(0)
                + (self.Ibar_Q * self.Ubar_Q).mean(1))

    @classmethod
    def extra_loss(cls, layers):
        """gamma * mean over all P and Q of ||P'P - I|| or ||QQ' - I|| (eq. 4): a scalar."""
        layers = list(layers)
        grams = torch.stack([gram for layer in layers
                             for gram in (layer.P.t() @ layer.P, layer.Q @ layer.Q.t())])
        identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        return layers[0].gamma * torch.linalg.matrix_norm(grams - identity).mean()

    @classmethod
    def check_run(cls, layers, total_steps: int) -> None:
        for layer in layers:
            t_init, t_final = layer.phases(total_steps)
            if layer.init_rank > layer.rank and t_init + t_final >= total_steps:
                raise UserError(f"AdaLoRA cannot prune: t_init {t_init} and t_final {t_final} "
                                f"leave none of the run's {total_steps} steps")

    @classmethod
    @torch.no_grad()
    def on_step(cls, layers, step: int, total_steps: int) -> None:
        layers = list(layers)
        first = layers[0]
        t_init, t_final = first.phases(total_steps)
        last_phase = step >= total_steps - t_final
        if step == 0:
            cls.check_run(layers, total_steps)
        if not last_phase:
            if all(layer.lam.grad is None for layer in layers):
                raise UserError("AdaLoRA learns importances from gradients: call on_step after "
                                "optimizer.step() and before zero_grad()")
            for layer in layers:
                layer.learn_importance()
        if step <= t_init or (step % first.delta_t != 0 and not last_phase):
            return
        sizes = [layer.init_rank for layer in layers]
        keep = budget(step, total_steps, sum(sizes), sum(layer.rank for layer in layers), t_init,
                      t_final)
        importance = torch.cat([layer.importance() for layer in layers])
        pruned = torch.ones_like(importance, dtype=torch.bool)
        pruned[importance.topk(keep).indices] = False    # exactly `keep`, even where some are equal
        for layer, mask in zip(layers, pruned.split(sizes)):
            layer.lam.masked_fill_(mask, 0)
