"""Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates (Xu et al., 2025), 2512.03402.

    W' = W0 + alpha/sqrt(r1 r2) * ReLU(B A) (.) Sign(D C)                         (section 3)

A (r1, in), B (out, r1): how far each weight moves. C (r2, in), D (out, r2): which way. (.) is
element by element; Sign(x) = +1 if x > 0, else -1. The idea: fine-tuning moves every weight by a
size and a sign; one thin product for each gives an update of nearly full rank.
The start (section 3.3): a zero matrix behind ReLU gets no gradient, ever, so all four are Gaussian
and a factor `warmup` is 0 in the first step, which sees exactly the pretrained model. Their size,
which the paper leaves open, comes from W0: see `start_std`.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from lora import AdapterLinear, check_whole
from support.errors import UserError


def warmup_length(total_steps: int, update_warmup: int) -> int:
    """update_warmup, or a quarter of a run too short for that."""
    return min(update_warmup, max(1, total_steps // 4))


def warmup_after(step: int, total_steps: int, update_warmup: int) -> float:
    """The share of the update in use after optimizer step `step` (0 for the first): 0 to 1."""
    return min(1.0, (step + 1) / max(1, warmup_length(total_steps, update_warmup)))


def sign_(x):
    """In place: +1 where x > 0, else -1; so Sign(0) = -1."""
    return x.gt_(0).mul_(2).sub_(1)


class Sign(torch.autograd.Function):
    """Sign with the straight-through gradient dL/dx = clip(dL/dSign, -limit, limit); the paper's
    limit is 1, and Sign's own gradient 0."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return sign_(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.limit, ctx.limit), None


def blocks(A, B, C, D, spare=0):
    """Walks down the rows of W': yields (rows, M, U, and `spare` buffers), each (n, in).

    M = ReLU(B A), U = M (.) Sign(D C). The next block gets the same memory again: fresh memory
    costs more than the arithmetic. Large blocks suit the matrix products, small ones the cache.
    """
    size = min(max(256, len(B) // 2), 1024, len(B))
    buffers = [A.new_empty(size, A.shape[1]) for _ in range(2 + spare)]
    for i in range(0, len(B), size):
        rows = slice(i, i + size)
        M, U, *rest = (buffer[:len(B) - i] for buffer in buffers)
        torch.mm(B[rows], A, out=M).relu_()
        sign_(torch.mm(D[rows], C, out=U)).mul_(M)
        yield rows, M, U, *rest


def add_product(total, a, b, first):
    """total = a @ b if first, else total + a @ b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)   # beta=0 ignores what total held
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


class DualProduct(torch.autograd.Function):
    """x W'^T + bias: (tokens, in) -> (tokens, out), without ever holding an out x in update.

    Plain autograd through delta_weight() keeps about five such matrices for backward. This keeps
    its inputs alone, and builds W' again block by block. Autocast leaves products that are in
    place or have out= as they are, so a block is float32 until it is complete, and cast once.
    """

    @staticmethod
    def forward(ctx, x, W0, bias, A, B, C, D, scale, limit):
        ctx.save_for_backward(x, W0, A, B, C, D)
        ctx.scale, ctx.limit = scale, limit
        if scale == 0:   # blocks might round differently: this is the pretrained layer to the bit
            return F.linear(x, W0.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y = x.new_empty(len(x), len(B))
        for rows, M, U in blocks(A, B, C, D):
            W = torch.add(W0[rows], U, alpha=scale, out=M).to(x.dtype)
            torch.mm(x, W.t(), out=y[:, rows])
        return y if bias is None else y.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, W0, A, B, C, D = ctx.saved_tensors
        scale = ctx.scale
        limit = ctx.limit / scale if scale else math.inf
        dx = torch.empty_like(x, dtype=A.dtype) if ctx.needs_input_grad[0] else None
        dA, dB, dC, dD = (torch.zeros_like(matrix) for matrix in (A, B, C, D))
        for rows, M, U, buffer in blocks(A, B, C, D, spare=1):
            g = grad[:, rows]                                             # (tokens, n)
            if dx is not None:
                W = torch.add(W0[rows], U, alpha=scale, out=buffer).to(x.dtype)
                add_product(dx, g, W, first=rows.start == 0)
            G = buffer                                                    # dL/dW', (n, in)
            add_product(G, g.t(), x, first=True)
            # `scale` waits for the thin results: clip(scale v, -+1) = scale clip(v, -+1/scale).
            dDC = M.mul_(G).clamp_(-limit, limit)                         # through Sign
            dBA = G.mul_(U.sign_())    # through ReLU: U's sign is Sign(D C), or 0 where it is off
            dC.addmm_(D[rows].t(), dDC)
            dA.addmm_(B[rows].t(), dBA)
            torch.mm(dDC, C.t(), out=dD[rows])
            torch.mm(dBA, A.t(), out=dB[rows])
        dx = dx if dx is None else dx.to(x.dtype)
        return dx, None, None, *(d.mul_(scale) for d in (dA, dB, dC, dD)), None, None


def rms(W) -> float:
    """The root of the mean square of a matrix's entries, summed in float32 or better."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return (torch.linalg.vector_norm(W, dtype=dtype) / math.sqrt(W.numel())).item()


class DualLoRALinear(AdapterLinear):
    """W' = W0 + warmup * scale * ReLU(B A) (.) Sign(D C), scale = alpha/sqrt(r1 r2).

    x (..., in) -> (..., out). r1 + r2 = rank numbers per row and column, as many as LoRA has.
    Dropout, which the paper leaves open, acts on the update alone: W0 x + dW dropout(x), the form
    LoRA has too; it costs a second product with x. The clip in Sign's gradient is not linear:
    where it binds, a loss scaled for fp16, or split in micro-batches, gives other gradients.
    Without `clip` the gradient passes Sign as it is. C and D have direction_lr times the learning
    rate of A and B.
    The four matrices start with a standard deviation such that ||dW|| / ||W0|| is `init_share`
    once the warm-up is over; `init_std` is the explicit override, one number for all layers.
    Raises UserError if rank is below 2, if r1, r2, update_warmup, init_share, init_std or
    direction_lr is out of range, and if W0 is zero, which has no share, while init_std is None.
    """
    fast = ("B", "D")

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0,
                 r1: int | None = None, r2: int | None = None,
                 update_warmup: int = 5, init_share: float = 0.01,
                 init_std: float | None = None, clip: bool = True, direction_lr: float = 0.3):
        super().__init__(base, rank, alpha, dropout)
        largest = min(base.in_features, base.out_features)
        check_whole("rank, shared by magnitude and direction,", rank, 2, largest)
        r1 = r1 if r1 is not None else rank // 2 if r2 is None else rank - r2
        r2 = r2 if r2 is not None else rank - r1
        check_whole("r1", r1, 1, largest)
        check_whole("r2", r2, 1, largest)
        check_whole("update_warmup", update_warmup, 0)
        for name, value in (("init_share", init_share), ("init_std", init_std),
                            ("direction_lr", direction_lr)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0 and finite, not {value}")
        self.r1, self.r2, self.scale = r1, r2, alpha / math.sqrt(r1 * r2)
        self.update_warmup = update_warmup
        self.init_share, self.init_std = init_share, init_std
        self.clip, self.direction_lr = clip, direction_lr
        self.limit = 1.0 if clip else math.inf
        self.A = nn.Parameter(self.empty(r1, base.in_features))
        self.B = nn.Parameter(self.empty(base.out_features, r1))
        self.C = nn.Parameter(self.empty(r2, base.in_features))
        self.D = nn.Parameter(self.empty(base.out_features, r2))
        self.std = self.start_std()
        if self.std is not None:
            for matrix in (self.A, self.B, self.C, self.D):
                nn.init.normal_(matrix, std=self.std)
        self.register_buffer("warmup", self.empty().fill_(float(update_warmup == 0)))
        self.last_cold = None           # see refuse_a_second_cold_step

    def start_std(self) -> float | None:
        """The standard deviation of A, B, C and D at the start; None on torch's meta device.

        An entry of B A is a sum of r1 products of variance std^4, and ReLU keeps half of its
        square, so rms(dW) = scale sqrt(r1 / 2) std^2. Solved for rms(dW) = init_share rms(W0).
        """
        W0 = self.base.weight
        if self.init_std is not None or W0.is_meta:
            return self.init_std
        size = rms(W0)
        if not 0 < size < math.inf:
            raise UserError(f"W0 has the size {size}, of which dW cannot start as a share: give "
                            "init_std")
        return math.sqrt(self.init_share * math.sqrt(2) * size / (self.scale * math.sqrt(self.r1)))

    def start_share(self) -> float:
        """||dW|| / ||W0|| to be expected of an untrained update whose warm-up is over."""
        size = rms(self.base.weight)
        return self.scale * math.sqrt(self.r1 / 2) * self.std ** 2 / size if size else math.inf

    def delta_weight(self):
        magnitude = torch.relu(self.B @ self.A)      # (out, in)
        direction = Sign.apply(self.D @ self.C, self.limit)      # (out, in)
        return self.warmup * self.scale * magnitude * direction

    def forward(self, x):
        W0, bias, product = self.base.weight, self.base.bias, self.product
        if torch.compiler.is_compiling():   # the blocks write in place, which it would have to undo
            product = torch.compiler.disable(product)
        if self.training and self.dropout.p > 0:
            zero = W0.new_zeros(()).expand_as(W0)
            return self.base(x) + product(self.dropout(x), zero, None)
        return product(x, W0, bias)

    def product(self, x, W0, bias):
        """x (W0 + delta_weight())^T + bias: (..., in) -> (..., out)."""
        warmup, device = float(self.warmup), x.device.type
        if warmup == 0 and torch.is_grad_enabled():
            self.refuse_a_second_cold_step()
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = DualProduct.apply(x.reshape(-1, x.shape[-1]), W0, bias, self.A, self.B, self.C, self.D,
                              warmup * self.scale, self.limit)
        return y.reshape(*x.shape[:-1], len(self.B))

    def refuse_a_second_cold_step(self) -> None:
        """At warm-up 0 every gradient is 0, so a loop that never calls on_step would train nothing.

        Told at the next forward by the counters that torch keeps of changes in place: A has
        changed, `warmup` has not. A fused optimizer does not count its changes, so it goes unseen.
        Raises UserError then.
        """
        changes = id(self.A), self.A._version, self.warmup._version
        last, self.last_cold = self.last_cold or changes, changes
        if (last[0], last[2]) == (changes[0], changes[2]) and last[1] != changes[1]:
            raise UserError("Dual LoRA took a step with its warm-up at 0: call on_step after every "
                            "optimizer.step(), or inject with update_warmup=0")

    def rate(self, name: str) -> float:
        return self.direction_lr if name in ("C", "D") else 1.0

    @classmethod
    def plan(cls, layers, total_steps: int) -> str:
        longest = max(layer.update_warmup for layer in layers)
        if total_steps < 2 and longest > 0:
            raise UserError("Dual LoRA's first step is at warm-up 0 and trains nothing: it needs "
                            "at least 2 steps, or update_warmup 0")
        length = warmup_length(total_steps, longest)
        share = max((layer.start_share() for layer in layers if layer.std is not None), default=0)
        return (f"the update warms up from 0 to 1 over {length} steps; " * (length > 0)
                + f"untrained it is at most {100 * share:.2g} % of a layer's weights"
                + "; warning: above 20 % it damages what the model knows" * (share > 0.2))

    @classmethod
    def on_step(cls, layers, step: int, total_steps: int) -> None:
        for layer in layers:
            layer.warmup.fill_(warmup_after(step, total_steps, layer.update_warmup))
