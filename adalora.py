"""AdaLoRA: Adaptive Budget Allocation (Zhang et al., 2023), arXiv:2303.10512.

    W' = W0 + alpha/r0 * P diag(lam) Q           (eq. 3; alpha/r0 as in the official code)

W0 (out, in) is the pretrained weight, frozen; P (out, r0), lam (r0,) and Q (r0, in) train.
Idea: some matrices need more rank than others. All start with r0 = init_rank directions (a column
of P, its lam, a row of Q), more than the budget allows. Step by step the least important directions
of the whole model are pruned: their lam is set to 0.
Start: lam is zero, so the first step sees exactly the pretrained model.
Gradient: at lam = 0 only lam gets one from the loss. A penalty adds to P's and Q's: gamma times the
mean of ||P^T P - I|| and ||Q Q^T - I|| over all layers (eq. 4). It keeps both near orthonormal, as
in a singular value decomposition, so that a lam can be judged alone.
A step, after the optimizer's:
    1. |w dL/dw| of each number, smoothed                   learn_importance, eq. 8 to 10
    2. a score for each direction                           importance, eq. 7 and 11
    3. every delta_t steps: keep the b(t) best, set the other lam to 0        budget, eq. 12
A pruned lam still has a gradient, so a direction can come back.
Cost: r0 (in + out + 1) parameters and two buffers of that size; 1.01 times LoRA's time a step at
rank r, the final average, with r0 = 1.5 r (25 M parameters, CPU).
Goes wrong: by eq. 11, a direction of steady importance scores near 0. A run too short to prune in,
or on_step after zero_grad, is an error.
Differs: see the class.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from lora import AdapterLinear
from support.errors import UserError, check_whole
from support.products import full_precision


def budget(step: int, total_steps: int, start: int, target: int, t_init: int, t_final: int) -> int:
    """Returns b(t): how many directions a pruning after step t leaves in the model (eq. 12).

        start  |-----.
               |      `.
        target |        `------------
               0   t_init   T - t_final   T      t
    """
    if step <= t_init:                      # 1. all of them, while the importances settle
        return start
    if step < total_steps - t_final:        # 2. ever fewer, fast at first
        share = (step - t_init) / (total_steps - t_final - t_init)
        return int((start - target) * (1 - share) ** 3 + target)
    return target                           # 3. the target, while the kept ones are fine-tuned


def in_steps(t: float, total_steps: int) -> int:
    """Returns t in steps: below 1 it is a share of the run, rounded down."""
    return int(t * total_steps + 1e-9) if t < 1 else int(t)      # 1e-9: 0.29 * 100 is 28.999...


class AdaLoRALinear(AdapterLinear):
    """W' = W0 + scale P diag(lam) Q, scale = alpha/(init_rank + 1e-5); x (..., in) -> (..., out).

    init_rank: directions that each layer starts with (1.5 rank); rank: those that it keeps at the
    end, on average over the model. t_init, t_final: length of the first and the last phase in
    steps, below 1 as a share of the run; t_final is at least one step. A pruning comes every
    delta_t steps; right after it the pruned lam train again. The last phase prunes the same ones
    after every step. The layers of a model share all of these.

    As the official code, not the paper: the 1e-5; the penalty averages norms, where the paper sums
    squares; I = |new w * old, clipped gradient|.
    As neither: the last phase begins with a pruning whatever delta_t is, as in peft; exactly the
    budget is kept where importances are equal.
    Raises UserError if an option is out of range; for a schedule that cannot work, see start().
    """

    options = {
        "init_rank": (None, "start each layer with this many directions (1.5 x --rank)", int),
        "t_init": (0.1, "prune nothing in these first steps; below 1, a share of the run"),
        "t_final": (0.3, "keep the target budget in these last steps; below 1, a share"),
        "delta_t": (1, "prune once in this many steps"),
        "beta1": (0.85, "smooth the importance by this"),
        "beta2": (0.85, "smooth the uncertainty of the importance by this"),
        "gamma": (0.01, "weigh the penalty that keeps P and Q orthonormal by this"),
    }

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, **own):
        super().__init__(base, rank, alpha, dropout, **own)
        self.init_rank = int(1.5 * rank + 0.5) if self.init_rank is None else self.init_rank
        self.check_options()
        self.scale = alpha / (self.init_rank + 1e-5)
        self.P = nn.Parameter(self.empty(base.out_features, self.init_rank))
        self.lam = nn.Parameter(self.empty(self.init_rank))
        self.Q = nn.Parameter(self.empty(self.init_rank, base.in_features))
        nn.init.normal_(self.P, std=0.02)   # the paper: "random Gaussian"; the code: 0.02
        nn.init.normal_(self.Q, std=0.02)
        nn.init.zeros_(self.lam)
        for name in ("P", "lam", "Q"):
            for average in ("Ibar", "Ubar"):
                self.register_buffer(f"{average}_{name}", torch.zeros_like(getattr(self, name)))

    def delta_weight(self):
        return self.scale * (self.P * self.lam) @ self.Q              # (out, in)

    def update(self, x):
        h = F.linear(x, self.Q.to(x.dtype)) * (self.scale * self.lam).to(x.dtype)   # (..., r0)
        return F.linear(h, self.P.to(x.dtype))                        # (..., out)

    def learn_importance(self) -> None:
        """Updates Ibar and Ubar of every single number w of P, lam and Q:

            I = |w dL/dw|       how far the loss would move, to first order, if w were 0 (eq. 8)
            Ibar = beta1 Ibar + (1 - beta1) I               one batch is noisy: smoothed (eq. 9)
            Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|      how much I varies around that (eq. 10)

        Both start at 0 and lag, so ranking by them means little before t_init. dL/dw has the
        penalty's part in it.
        By hand, beta1 = beta2 = 0.5, I = 2 and then 6: Ibar = 1, 3.5; Ubar = 0.5, 1.5.
        """
        for name in ("P", "lam", "Q"):
            w = getattr(self, name)
            Ibar, Ubar = getattr(self, f"Ibar_{name}"), getattr(self, f"Ubar_{name}")
            gradient = 0 if w.grad is None else w.grad     # None: the loss did not use this layer
            I = (w * gradient).abs().nan_to_num(nan=0, posinf=0)    # an overflow tells nothing
            Ibar.lerp_(I, 1 - self.beta1)
            Ubar.lerp_((I - Ibar).abs(), 1 - self.beta2)

    def importance(self):
        """Returns S (r0,): S_i = s(lam_i) + mean_j s(P_ji) + mean_j s(Q_ij) for each i (eq. 7),

            s(w) = Ibar * Ubar                                              (eq. 11)

        s is high if w matters and its I still varies: of two with equal Ibar the less certain one
        is kept. But a steady I drives Ubar, and so s, to 0, however large Ibar: a weakness.
        Means, not sums: a direction of a large matrix is not kept for having more numbers.
        """
        return (self.Ibar_lam * self.Ubar_lam + (self.Ibar_P * self.Ubar_P).mean(0)
                + (self.Ibar_Q * self.Ubar_Q).mean(1))

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Returns t_init and t_final in steps."""
        return in_steps(self.t_init, total_steps), max(1, in_steps(self.t_final, total_steps))

    @classmethod
    def extra_loss(cls, layers):
        """Returns gamma * mean over P and Q of ||P^T P - I|| and ||Q Q^T - I|| (eq. 4)."""
        layers = list(layers)
        with full_precision(layers[0].P):
            grams = torch.stack([gram for layer in layers for gram in
                                 (layer.P.t() @ layer.P, layer.Q @ layer.Q.t())])   # (2 n, r0, r0)
            identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
            return layers[0].gamma * torch.linalg.matrix_norm(grams - identity).mean()

    @classmethod
    def start(cls, layers, total_steps: int) -> str:
        layers = list(layers)
        if len({layer.init_rank for layer in layers}) > 1:
            raise UserError("AdaLoRA's layers start with equally many directions: give init_rank")
        t_init, t_final = layers[0].phases(total_steps)
        start, target = (sum(getattr(layer, name) for layer in layers)
                         for name in ("init_rank", "rank"))
        if start > target and t_init + t_final >= total_steps:
            raise UserError(f"AdaLoRA needs steps to prune in: t_init {t_init} and t_final "
                            f"{t_final} leave none of the run's {total_steps}")
        return (f"{start} directions, pruned to {target} in steps {t_init + 1} to "
                f"{total_steps - t_final}" if start > target else "")

    @classmethod
    @torch.no_grad()
    def on_step(cls, layers, step: int, total_steps: int) -> None:
        """Learns what is important, then prunes the whole model down to the budget.

        By hand: two layers with S = (5, 1) and (3, 4), a budget of 3. The second direction of the
        first layer is pruned: the layers keep 1 and 2.
        """
        layers = list(layers)
        if step == 0:
            cls.start(layers, total_steps)        # refuses a schedule that the loop did not check
        t_init, t_final = layers[0].phases(total_steps)
        last_phase = step >= total_steps - t_final
        if not last_phase:
            # The step is done, its gradients are still there: I is old gradient x new weight. The
            # step has moved a pruned lam off 0, so its I is not 0, and its direction can come back.
            if all(layer.lam.grad is None for layer in layers):
                raise UserError("AdaLoRA learns importances from gradients: call on_step after "
                                "optimizer.step() and before zero_grad()")
            for layer in layers:
                layer.learn_importance()
        # In the last phase importances are fixed: each step prunes the same directions.
        if step <= t_init or (step % layers[0].delta_t != 0 and not last_phase):
            return
        sizes = [layer.init_rank for layer in layers]
        keep = budget(step, total_steps, sum(sizes), sum(layer.rank for layer in layers), t_init,
                      t_final)
        importance = torch.cat([layer.importance() for layer in layers])     # one list for all
        pruned = torch.ones_like(importance, dtype=torch.bool)
        pruned[importance.topk(keep).indices] = False
        for layer, mask in zip(layers, pruned.split(sizes)):
            layer.lam.masked_fill_(mask, 0)

    def check_options(self) -> None:
        """Refuses what is out of range."""
        check_whole("init_rank", self.init_rank, self.rank, 2 * self.max_rank)
        check_whole("delta_t", self.delta_t, 1)
        for name in ("t_init", "t_final"):
            t = getattr(self, name)
            if not 0 <= t < math.inf or (t >= 1 and t != int(t)):
                raise UserError(f"{name} must be whole steps, or a share below 1, not {t}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.gamma < math.inf:
            raise UserError(f"gamma must be at least 0 and finite, not {self.gamma}")
