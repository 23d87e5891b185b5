"""Computes what each method costs by its formulas: parameters, multiply-adds, memory.

bench.py prints these beside what it measures. test_costs.py compares them with the multiply-adds
that torch counts and with what autograd keeps.

The symbols for one layer: W0 is (out, in), n tokens pass, r is the rank. AdaLoRA starts with
r0 = 1.5 r, LoRA-Dash uses s = 8 directions, `thin` is in + out, `whole` is in * out. The formulas
leave out what grows neither with `whole` nor with n times a width.

A method without formulas here is not mapped: its costs raise UserError, and bench.py prints "not
mapped" for them.
"""
from model import Config
from support.errors import UserError

MAPPED = ("frozen", "full", "lora", "dora", "adalora", "dash", "dual", "loha", "hira")
DIRECTIONS = 8
LLAMA_7B = Config(vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32,
                  head_dim=128, d_ff=11008, max_positions=2048, tied=False)     # 2302.13971
LLAMA_70B = Config(vocab_size=32000, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8,
                   head_dim=128, d_ff=28672, max_positions=4096, tied=False)    # 2307.09288

SDXL = {"unet": 2_567_463_684, "text encoders": 817_720_320, "vae": 83_653_863}     # 2307.01952
SDXL_BLOCKS, TEXT = {640: 10, 1280: 60}, 2048    # its UNet's blocks by width; of the text


def require_mapped(method: str) -> None:
    """Raises UserError, which names the method, if it has no formulas here."""
    if method not in MAPPED:
        raise UserError(f"{method}: its costs are not mapped in experiments/costs.py")


def start_rank(r: int) -> int:
    """Computes r0, the directions that AdaLoRA starts with."""
    return int(1.5 * r + 0.5)


# ---- one layer
def parameters(method: str, n_in: int, n_out: int, r: int) -> int:
    """Counts the numbers that train; for AdaLoRA those at the start."""
    require_mapped(method)
    thin, r0 = n_in + n_out, start_rank(r)
    return {"frozen": 0, "full": n_in * n_out, "lora": r * thin, "dora": r * thin + n_out,
            "adalora": r0 * (thin + 1), "dash": r * thin + DIRECTIONS, "dual": r * thin,
            "loha": r * thin, "hira": r * thin}[method]


def work(method: str, n_in: int, n_out: int, n: int, r: int) -> float:
    """Counts the multiply-adds of forward and backward, as a multiple of the frozen layer's.

    The frozen layer's are 2 n whole: x W0' in forward, g W0 in backward. Each method adds:

        full        g' x                                                n whole
        lora        two thin products forward, four back                3 n r thin
        dora        lora's; W0 A^T, A A^T for the norm                  + r whole + r^2 thin
        adalora     lora's at rank r0; P'P, Q Q' and their gradients    3 n r0 thin + 3 r0^2 thin
        dash        lora's; its directions are fixed: two and two       + 2 n s thin
        dual, loha  full's; B A and D C, in backward again, and the
                    gradients of the four factors                       n whole + 4 r whole
        hira        full's; B A, in backward again, and its gradients   n whole + 4 r whole
    """
    require_mapped(method)
    thin, whole, r0 = n_in + n_out, n_in * n_out, start_rank(r)
    more = {
        "frozen": 0,
        "full": n * whole,
        "lora": 3 * n * r * thin,
        "dora": 3 * n * r * thin + r * whole + r * r * thin,
        "adalora": 3 * n * r0 * thin + 3 * r0 * r0 * thin,
        "dash": 3 * n * r * thin + 2 * n * DIRECTIONS * thin,
        **dict.fromkeys(("dual", "loha", "hira"), n * whole + 4 * r * whole),
    }[method]
    return 1 + more / (2 * n * whole)


def kept(method: str, n_in: int, n_out: int, n: int, r: int) -> int:
    """Counts the numbers that autograd keeps between forward and backward.

    The count leaves out the weights, and the layer's input x (n, in), which every layer but a
    frozen one keeps.

        lora        h = x A^T (n, r)
        dora        h, and the output before it is scaled (n, out) for the gradient of m
        adalora     h before and after its lam
        dash        h, and the coordinates of x along the directions (n, s)
        dual, loha, hira    nothing: backward builds the update again
    """
    require_mapped(method)
    return {"frozen": 0, "full": 0, "lora": n * r, "dora": n * (r + n_out),
            "adalora": 2 * n * start_rank(r), "dash": n * (r + DIRECTIONS),
            "dual": 0, "loha": 0, "hira": 0}[method]


# ---- a LLaMA-shaped model
def linears(c: Config) -> dict[str, tuple[int, int]]:
    """Lists (in, out) of each nn.Linear layer in a block."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {"q": (c.d_model, q), "k": (c.d_model, kv), "v": (c.d_model, kv), "o": (q, c.d_model),
            "gate": (c.d_model, c.d_ff), "up": (c.d_model, c.d_ff), "down": (c.d_ff, c.d_model)}


def model_numbers(c: Config) -> int:
    """Counts the numbers of the pretrained model."""
    block = sum(n_in * n_out for n_in, n_out in linears(c).values()) + 2 * c.d_model
    return c.n_layers * block + (1 if c.tied else 2) * c.vocab_size * c.d_model + c.d_model


def trainable(c: Config, method: str, targets: list[str], r: int) -> int:
    """Counts the numbers of the model that train."""
    if method == "full":
        return model_numbers(c)
    return c.n_layers * sum(parameters(method, *linears(c)[name], r) for name in targets)


def flops_per_token(c: Config, method: str, targets: list[str], r: int, length: int,
                    sequences: int = 1) -> float:
    """Counts the floating-point operations of a training step, two for each multiply-add.

    The step sees `sequences` of `length` tokens and has a loss on every token. Attention compares
    each token with all `length`; the savings of a causal kernel are ignored. It has 2 products in
    forward and 5 in backward, which computes the scores again.
    """
    total, n = 0.0, sequences * length
    for name, (n_in, n_out) in linears(c).items():
        own = method if method == "full" or name in targets else "frozen"
        total += 2 * n_in * n_out * work(own, n_in, n_out, n, r)
    total += 7 * length * c.n_heads * c.head_dim
    head = c.vocab_size * c.d_model * (3 if method == "full" else 2)
    return 2 * (c.n_layers * total + head)


def kept_by_block(c: Config, method: str, targets: list[str], r: int, bf16: bool = False) -> float:
    """Counts the bytes for each token that autograd keeps in a block.

    Every method keeps the inputs of the two norms, in float32 even with --dtype bf16; q, k, v, the
    attention's output and its log-sums; gate, silu(gate) and up. A layer that trains keeps its
    input, once for all layers that share it; o's input is the attention's output. A method adds its
    own numbers. `full` also keeps what the norms scale. With bf16 its weights, and so the residual
    stream, are float32, and each layer casts its input for itself.
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
    """Counts the bytes for each token that autograd keeps in the model, with a loss on every token.

    These are the blocks, the last norm, and the log-probabilities in float32.
    """
    last = 4 * c.d_model + (method == "full") * (6 if bf16 else 8) * c.d_model
    return (c.n_layers * kept_by_block(c, method, targets, r, bf16) + last + 4 * c.vocab_size)


def memory(c: Config, method: str, targets: list[str], r: int, tokens: int,
           checkpointing: bool = False) -> dict[str, float]:
    """Counts the bytes of a training step with --dtype bf16.

    weights: the frozen base in bf16. `full` has float32 weights and, for backward, autocast's bf16
        copies of all that is multiplied; an untied embedding is not. --grad-checkpointing spares
        these copies.
    training: each parameter in float32, its gradient and Adam's two averages. AdaLoRA adds two
        averages of its own, LoRA-Dash its frozen directions.
    activations: the peak, reached when backward begins. It holds what autograd keeps, and for each
        token two float32 gradients as long as its log-probabilities. --grad-checkpointing keeps
        each block's input, and the larger of the loss's part and all of one block.
    """
    n = trainable(c, method, targets, r)
    fixed = DIRECTIONS * c.n_layers * sum(sum(linears(c)[name]) for name in targets)
    block = kept_by_block(c, method, targets, r, bf16=True)
    loss = kept_by_model(c, method, targets, r, bf16=True) - c.n_layers * block + 8 * c.vocab_size
    inputs = c.n_layers * c.d_model * (4 if method == "full" else 2)
    cast = model_numbers(c) - (0 if c.tied else c.vocab_size * c.d_model)
    return {
        "weights": 2 * model_numbers(c) if method != "full" else
                   4 * model_numbers(c) + 2 * cast * (not checkpointing),
        "training": (12 if method == "full" else 16) * n + 8 * n * (method == "adalora")
                    + 4 * fixed * (method == "dash"),
        "activations": tokens * (inputs + max(loss, block) if checkpointing else
                                 c.n_layers * block + loss),
    }


# ---- SDXL
def sdxl_trainable(method: str, r: int) -> int:
    """Counts the numbers that train on to_q, to_k, to_v and to_out.0 of SDXL's UNet.

    A block attends to its own tokens, then to the text's: of eight layers two read the text.
    """
    return sum(n * (6 * parameters(method, C, C, r) + 2 * parameters(method, TEXT, C, r))
               for C, n in SDXL_BLOCKS.items())


def sdxl_memory(method: str, r: int) -> dict[str, float]:
    """Counts the bytes of a training step with --dtype bf16, as memory() does.

    The UNet and the text encoders are bf16, the VAE float32. Left out: AdaLoRA's averages,
    LoRA-Dash's directions, and activations, which grow with the picture.
    """
    return {"weights": 2 * (SDXL["unet"] + SDXL["text encoders"]) + 4 * SDXL["vae"],
            "training": 16 * sdxl_trainable(method, r)}
