"""What each method costs, by its formulas: parameters, multiply-adds, memory.

bench.py prints these beside what it measures; test_costs.py holds them against the code itself, whose multiply-adds torch counts, and what autograd keeps of it. For one layer: W0
(out, in), n tokens, rank r; AdaLoRA starts with r0 = 1.5 r, LoRA-Dash dashes along s = 8
directions; `thin` is in + out, `whole` in * out. Left out is what grows neither with `whole` nor
with n times a width.
"""
from model import Config

DIRECTIONS = 8
LLAMA_7B = Config(vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32,
                  head_dim=128, d_ff=11008, max_positions=2048, tied=False)     # 2302.13971
LLAMA_70B = Config(vocab_size=32000, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8,
                   head_dim=128, d_ff=28672, max_positions=4096, tied=False)    # 2307.09288


def start_rank(r: int) -> int:
    return int(1.5 * r + 0.5)


# ---- one layer
def parameters(method: str, n_in: int, n_out: int, r: int) -> int:
    """How many numbers train; AdaLoRA's as many as it starts with."""
    thin, r0 = n_in + n_out, start_rank(r)
    return {"frozen": 0, "full": n_in * n_out, "lora": r * thin, "dora": r * thin + n_out,
            "adalora": r0 * (thin + 1), "dash": r * thin + DIRECTIONS, "dual": r * thin}[method]


def work(method: str, n_in: int, n_out: int, n: int, r: int) -> float:
    """Multiply-adds of forward and backward, over the 2 n whole of the frozen layer: x W0' on the
    way forward, g W0 on the way back. What comes on top:

        full        g' x                                                n whole
        lora        two thin products forward, four back                3 n r thin
        dora        lora's; W0 A' and A A' for the norm                 + r whole + r^2 thin
        adalora     lora's at rank r0; P'P, Q Q' and their gradients    3 n r0 thin + 3 r0^2 thin
        dash        lora's; its directions are fixed: two and two       + 2 n s thin
        dual        full's; B A and D C, in backward again, and the
                    gradients of the four factors                       n whole + 4 r whole
    """
    thin, whole, r0 = n_in + n_out, n_in * n_out, start_rank(r)
    more = {
        "frozen": 0,
        "full": n * whole,
        "lora": 3 * n * r * thin,
        "dora": 3 * n * r * thin + r * whole + r * r * thin,
        "adalora": 3 * n * r0 * thin + 3 * r0 * r0 * thin,
        "dash": 3 * n * r * thin + 2 * n * DIRECTIONS * thin,
        "dual": n * whole + 4 * r * whole,
    }[method]
    return 1 + more / (2 * n * whole)


def kept(method: str, n_in: int, n_out: int, n: int, r: int) -> int:
    """How many numbers autograd keeps between forward and backward beyond the layer's input x
    (n, in), which all but a frozen layer need, and beyond the weights:

        lora        h = x A' (n, r)
        dora        h; for the gradient of m the output before it is scaled (n, out)
        adalora     h before and after its lam
        dash        h, and the coordinates of x along the directions (n, s)
        dual        nothing: backward builds the update again
    """
    return {"frozen": 0, "full": 0, "lora": n * r, "dora": n * (r + n_out),
            "adalora": 2 * n * start_rank(r), "dash": n * (r + DIRECTIONS), "dual": 0}[method]


# ---- a LLaMA-shaped model
def linears(c: Config) -> dict[str, tuple[int, int]]:
    """(in, out) of the nn.Linear layers of a block."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {"q": (c.d_model, q), "k": (c.d_model, kv), "v": (c.d_model, kv), "o": (q, c.d_model),
            "gate": (c.d_model, c.d_ff), "up": (c.d_model, c.d_ff), "down": (c.d_ff, c.d_model)}


def weights(c: Config) -> int:
    """All numbers of the pretrained model."""
    block = sum(n_in * n_out for n_in, n_out in linears(c).values()) + 2 * c.d_model
    return c.n_layers * block + (1 if c.tied else 2) * c.vocab_size * c.d_model + c.d_model


def trainable(c: Config, method: str, targets: list[str], r: int) -> int:
    if method == "full":
        return weights(c)
    return c.n_layers * sum(parameters(method, *linears(c)[name], r) for name in targets)


def flops_per_token(c: Config, method: str, targets: list[str], r: int, length: int,
                    sequences: int = 1) -> float:
    """Of a training step on `sequences` of `length` tokens, the loss on each of them; two a
    multiply-add.

    Attention compares each token with all `length` (what a causal kernel saves is not taken off):
    2 products forward and 5 back, where the scores are computed again.
    """
    total, n = 0.0, sequences * length
    for name, (n_in, n_out) in linears(c).items():
        own = method if method == "full" or name in targets else "frozen"
        total += 2 * n_in * n_out * work(own, n_in, n_out, n, r)
    total += 7 * length * c.n_heads * c.head_dim
    head = c.vocab_size * c.d_model * (3 if method == "full" else 2)
    return 2 * (c.n_layers * total + head)


def kept_by_block(c: Config, method: str, targets: list[str], r: int, bf16: bool = False) -> float:
    """Bytes a token that autograd keeps of a block.

    Always: what its two norms read, in float32 even with --dtype bf16; q, k, v, the attention's
    output, its log-sums; gate, silu(gate) and up. Where a layer trains, its input, once for all
    that share it (o's is the attention's output); the method's own. For `full` also what the norms
    scale; and with bf16, where its weights and so the stream are float32, each layer casts its
    input for itself.
    """
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    full, trained = method == "full", set(linears(c)) if method == "full" else set(targets)
    size, norms = 2 if bf16 else 4, 2 * c.d_model * (1 + full)
    inputs = c.d_ff * ("down" in trained)
    for sharing in ({"q", "k", "v"} & trained, {"gate", "up"} & trained):
        inputs += c.d_model * (len(sharing) if full and bf16 else bool(sharing))
    own = sum(kept(method, *linears(c)[name], 1, r) for name in trained)
    return 4 * (norms + c.n_heads) + size * (2 * q + 2 * kv + 3 * c.d_ff + inputs + own)


def kept_by_model(c: Config, method: str, targets: list[str], r: int, bf16: bool = False) -> float:
    """Bytes a token that autograd keeps of the model, the loss on every token: its blocks, the
    last norm, the log-probabilities in float32."""
    last = 4 * c.d_model + (method == "full") * (6 if bf16 else 8) * c.d_model
    return (c.n_layers * kept_by_block(c, method, targets, r, bf16) + last + 4 * c.vocab_size)


def memory(c: Config, method: str, targets: list[str], r: int, tokens: int,
           checkpointing: bool = False) -> dict[str, float]:
    """Bytes of a training step with --dtype bf16.

    weights: the frozen base in bf16; for `full` float32, and autocast's bf16 copies of all that
        is multiplied (not of an embedding of its own), which backward needs, but not with
        --grad-checkpointing.
    training: a parameter in float32, its gradient, Adam's two averages; AdaLoRA's own two more,
        LoRA-Dash's frozen directions.
    activations: at most, which is when backward begins: what autograd keeps, and of each token
        two gradients as long as its log-probabilities, float32. With --grad-checkpointing each
        block's input, and those or all of one block, whichever is more.
    """
    n = trainable(c, method, targets, r)
    fixed = DIRECTIONS * c.n_layers * sum(sum(linears(c)[name]) for name in targets)
    block = kept_by_block(c, method, targets, r, bf16=True)
    loss = kept_by_model(c, method, targets, r, bf16=True) - c.n_layers * block + 8 * c.vocab_size
    inputs = c.n_layers * c.d_model * (4 if method == "full" else 2)
    cast = weights(c) - (0 if c.tied else c.vocab_size * c.d_model)
    return {
        "weights": 2 * weights(c) if method != "full" else
                   4 * weights(c) + 2 * cast * (not checkpointing),
        "training": (12 if method == "full" else 16) * n + 8 * n * (method == "adalora")
                    + 4 * fixed * (method == "dash"),
        "activations": tokens * (inputs + max(loss, block) if checkpointing else
                                 c.n_layers * block + loss),
    }
