"""Time and memory of every method, side by side, as ratios measured within one run.

    python -m experiments.bench                     every part at its default sizes
    python -m experiments.bench layer model --all   wider layers, a larger model too
    python -m experiments.bench --device cuda --json out.json       the same on a GPU with 40 GB, in
                                                    bf16: LLaMA 7B's layers, a model of 1 B (--all
                                                    adds nothing)
The parts:
    layer       one adapted nn.Linear: a training step, what it keeps for backward, merging
    model       a LLaMA-shaped model: a training step, peak memory
    growth      how time and memory grow with rank, tokens and width; --figure FILE draws it
    sizes       what LLaMA 7B and 70B would need, by the formulas of costs.py
    generate    tokens a second
    load        a checkpoint: time and peak memory
    score       how many items of `mini` eval.py scores in a second
Beside our own stand peft and transformers where they are installed (requirements-dev.txt), and
safetensors' own reader.

The contenders of a table take turns, in another order each round, so that a machine that slows
down slows all of them; the first round does not count. Times are medians, "+-" half the distance
between their quartiles, "best" the fastest round. Compare the ratios of one table, not the
seconds of two runs.
"""
import copy
import ctypes
import json
import random
import statistics
import tempfile
import time
import warnings
import weakref
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

from data import load_task
from data.task import score, target_loss
from dual_lora import DualLoRALinear
from experiments import costs
from experiments.plots import LABELS, line_of, plt, save_figure
from formats.checkpoint import load_pretrained, open_model, save_pretrained
from generate import generate
from lora import AdapterLinear
from methods import METHODS, contract, inject
from model import Config, Transformer
from support.errors import UserError, exit_on_user_error, nearest
from support.files import atomic_write, new_file
from support.machine import hardware
from support.parser import Parser, default_device, device
from support.run import PRECISIONS, ROOT

try:
    import peft
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
except ImportError:
    peft = None

RANK = 8
TARGETS = ["q", "k", "v", "up", "down"]
OURS = [name for name in METHODS if name != "lora+"]        # the same layer as lora
THEIRS = ["peft lora", "peft dora", "peft adalora"]
BARS: list[tuple[str, float, float]] = []                   # what, measured, at most


# ---- measuring
def race(contenders: dict[str, list[Callable]], rounds: int, where: str) -> dict[str, list]:
    """Runs each contender's calls one after the other, in every round: name -> of each round the
    seconds after each of its calls."""
    times: dict[str, list] = {name: [] for name in contenders}
    order = list(contenders)
    for n in tqdm(range(rounds + 1), leave=False, unit="round"):
        random.Random(n).shuffle(order)
        for name in order:
            seconds = timed(contenders[name], where)
            if n > 0:
                times[name].append(seconds)
    return times


def timed(calls: list[Callable], where: str) -> list[float]:
    """Seconds from the first call's beginning to each call's end."""
    if not where.startswith("cuda"):
        start, marks = time.perf_counter(), []
        for call in calls:
            call()
            marks.append(time.perf_counter() - start)
        return marks
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:]):
        call()
        event.record()
    torch.cuda.synchronize()
    return [events[0].elapsed_time(event) / 1000 for event in events[1:]]


def kept_for_backward(forward: Callable, owned: set[int]) -> int:
    """Bytes that autograd holds between forward and backward, each storage once; `owned`: those
    that are there anyway (parameters, buffers, the input)."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage          # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def addresses(module: nn.Module, *tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(),
                                                     *tensors)}


def flops(call: Callable) -> int:
    """Of the matrix products of a call, as torch counts them."""
    aten = torch.ops.aten           # three that torch leaves out

    def addmm_(total, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    def attention(q, k, v, *_, **__):
        return sdpa_flop_count(q, k, v)

    def attention_backward(grad, q, k, v, *_, **__):
        return sdpa_backward_flop_count(grad, q, k, v)

    with FlopCounterMode(display=False, custom_mapping={
            aten.addmm_: addmm_, aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }) as counter:
        call()
    return counter.get_total_flops()


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that live inside it, and are not `owned`; exact, where the
    memory of the process depends on what the allocator keeps."""

    def __init__(self, owned: set[int]):
        super().__init__()
        self.known, self.now, self.peak = set(owned), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                if size and address not in self.known:
                    self.known.add(address)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, address, size)
        return result

    def free(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def peak_bytes(call: Callable, owned: set[int], where: str) -> int:
    """How far the memory of tensors rises above that of `owned`."""
    if where.startswith("cuda"):
        one = torch.ones(1, 1, device=where, requires_grad=True)
        one.mm(one).backward()          # cuBLAS's workspaces, forward's and backward's, are made
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        call()
        return torch.cuda.max_memory_allocated(where) - before
    with TensorMemory(owned) as memory:
        call()
    return memory.peak


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc keeps what is freed, as torch does on a GPU. Else it hands large blocks back to
    the system and gets them again, page by page, in the next step: that is no method's cost, but
    falls on those whose peak is just above what the process still holds."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):    # not glibc
        mallopt = lambda *_: None                   # noqa: E731
    mmap_max, trim_threshold = -4, -1               # how malloc.h numbers them
    mallopt(mmap_max, 0)                            # no block gets pages of its own
    mallopt(trim_threshold, -1)                     # never trim
    try:
        yield
    finally:
        mallopt(mmap_max, 65536)                    # glibc's own
        mallopt(trim_threshold, 128 * 1024)


def peak_resident_bytes(call: Callable) -> int | None:
    """How far the memory of this process rises; None where the system does not tell."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines()
                    if line.startswith(name))

    try:
        refs.write_text("5")            # Linux alone lets a process reset its peak
    except OSError:
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)      # glibc's
    if trim is not None:
        trim(0)                         # freed memory goes back, else its reuse would go unseen
    refs.write_text("5")
    before = kilobytes("VmRSS")
    call()
    return 1024 * (kilobytes("VmHWM") - before)


def middle(values: list[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles."""
    low, mid, high = statistics.quantiles(values, n=4)
    return mid, (high - low) / 2


def table(title: str, rows: list[dict[str, str]]) -> None:
    """Prints rows under their columns, the first to the left, the others to the right."""
    cells = [list(rows[0]), *[list(row.values()) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


# ---- who takes part
class Contender:
    """A model in the middle of its training, and a step of it in two halves."""

    def __init__(self, model: nn.Module, forward: Callable, inputs: list[torch.Tensor], grad=None,
                 bf16: bool = False):
        """forward(model) gives what `grad` (None: 1, for a loss) is the gradient of."""
        self.model, self.output, self.grad, self.bf16 = model.train(), forward, grad, bf16
        self.owned = addresses(model, *inputs)          # what is there before a step begins
        self.method, self.layers = contract(model)
        # The methods' own state, which peft makes only when it is first needed:
        self.state = sum(buffer.nbytes for layer in self.layers
                         for buffer in layer.buffers(recurse=False))
        for layer in self.layers:
            if "warmup" in layer._buffers:              # Dual LoRA with all of its update
                layer.warmup.fill_(1)
            if "dashing" in layer._buffers:             # any directions take as long as the right
                layer.U.normal_(), layer.Vt.normal_(), layer.dashing.fill_(1)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4) if self.trainable else None
        inner = getattr(model, "base_model", None)      # peft's AdaLoRA has its own on_step
        self.allocate = getattr(inner, "update_and_allocate", None)

    def forward(self):
        where = next(self.model.parameters()).device.type
        with torch.autocast(where, torch.bfloat16, enabled=self.bf16):
            return self.output(self.model)

    def forward_backward(self) -> None:
        self.forward().backward(self.grad)
        extra = self.method.extra_loss(self.layers) if self.layers else 0.0
        if torch.is_tensor(extra):
            extra.backward()

    def rest(self) -> None:
        """What fit() in train.py does after backward, at step 500 of 1,000: AdaLoRA prunes."""
        if self.optimizer is None:
            return
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.method.on_step(self.layers, 500, 1000)
        if self.allocate is not None:
            self.allocate(500)
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.forward_backward()
        self.rest()


def adapted(model: nn.Module, name: str, targets: list[str], rank: int = RANK) -> nn.Module:
    """The model as that contender trains it."""
    if name == "frozen":
        return model.requires_grad_(False)
    if not name.startswith("peft "):
        return inject(model, name, targets, rank, 2 * rank)
    common = dict(target_modules=targets, lora_alpha=2 * rank)
    if name == "peft adalora":
        config = peft.AdaLoraConfig(init_r=costs.start_rank(rank), target_r=rank, total_step=1000,
                                    tinit=100, tfinal=300, deltaT=1, orth_reg_weight=0.1, **common)
    else:
        config = peft.LoraConfig(r=rank, use_dora=name == "peft dora", **common)
    return peft.get_peft_model(model, config)


def measure(contenders: dict[str, Contender], rounds: int, where: str) -> dict[str, dict]:
    """name -> peak_bytes of its first two steps, the buffers of its layers included, and of later
    ones the time of forward and backward (fb_) and of the whole step."""
    with freed_memory_kept():
        peaks = {name: c.state + peak_bytes(lambda: (c.step(), c.step()), c.owned, where)
                 for name, c in contenders.items()}     # Adam's averages appear after the first
        times = race({name: [c.forward_backward, c.rest] for name, c in contenders.items()},
                     rounds, where)
    results = {}
    for name, rows in times.items():
        half, whole = zip(*rows)
        (fb, fb_spread), (step, spread) = middle(half), middle(whole)
        results[name] = {
            "contender": name, "fb_seconds": fb, "fb_spread": fb_spread, "fb_best": min(half),
            "seconds": step, "spread": spread, "best": min(whole), "peak_bytes": peaks[name],
            "trainable": sum(p.numel() for p in contenders[name].trainable)}
    return results


def megabytes(n: int) -> str:
    return f"{n / 2**20:.1f}"


def ratio(rows: dict[str, dict], name: str, other: str, key: str = "seconds") -> float:
    return rows[name][key] / rows[other][key]


# ---- part: layer
class OneLayer(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.q = nn.Linear(n_in, n_out, bias=False)

    def forward(self, x):
        return self.q(x)


class NaiveDual(DualLoRALinear):
    """Dual LoRA in plain autograd, beside the frozen layer as a LoRA is: x W0' + x dW'."""

    def forward(self, x):
        return self.base(x) + F.linear(x, self.delta_weight())


class MergedDual(DualLoRALinear):
    """Dual LoRA in plain autograd, by the definition: x (W0 + dW)'."""

    def forward(self, x):
        return F.linear(x, self.merged_weight().to(x.dtype), self.base.bias)


PLAIN = {"dual, naive": NaiveDual, "dual, merged": MergedDual}


def one_layer(name: str, n_in: int, n_out: int, tokens: int, where: str = "cpu",
              bf16: bool = False, rank: int = RANK) -> Contender:
    torch.manual_seed(0)
    model = OneLayer(n_in, n_out)
    kind = torch.bfloat16 if bf16 else torch.float32
    x = torch.randn(tokens, n_in, device=where, dtype=kind, requires_grad=True)
    grad = torch.randn(tokens, n_out, device=where, dtype=kind) / tokens
    if name in PLAIN:
        model.q = PLAIN[name](model.q, rank, 2 * rank)
    else:
        model = adapted(model, name, ["q"], rank)
    if name != "full":                                  # which trains in float32, as in train.py
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(kind)

    def forward(model):
        x.grad = None
        return model(x)

    return Contender(model.to(where), forward, [x, grad], grad, bf16)


WIDTHS, MORE_WIDTHS = [512, 1024], [2048, 4096]
TOKENS = [1024, 4096]


def layer_part(args: Namespace) -> list[dict]:
    if args.device.startswith("cuda"):
        shapes = [(4096, 4096), (4096, 11008)]                  # LLaMA-7B's q and up
    else:
        shapes = [(width, width) for width in WIDTHS + MORE_WIDTHS * args.all]
    return [row for shape in shapes for tokens in TOKENS
            for row in layer_table(*shape, tokens, args)]


def layer_table(n_in: int, n_out: int, tokens: int, args: Namespace) -> list[dict]:
    names = ["frozen", *OURS, *PLAIN, *(THEIRS[:2] if peft else [])]
    contenders = {name: one_layer(name, n_in, n_out, tokens, args.device, args.bf16)
                  for name in names}
    rows = measure(contenders, 9 if max(n_in, n_out) > 1024 else 15, args.device)
    for name, contender in contenders.items():
        layers = contender.layers
        rows[name] |= {
            "n_in": n_in, "n_out": n_out, "tokens": tokens,
            "kept_bytes": kept_for_backward(contender.forward, contender.owned),
            "work": (costs.work(name, n_in, n_out, tokens, RANK) if name in ["frozen", *OURS] else
                     flops(contender.forward_backward) / (4 * tokens * n_in * n_out)),
            "merge_seconds": min(timed([merging(layers[0])], args.device)[0]
                                 for _ in range(5)) if layers else None}
    table(f"one layer {n_out} x {n_in}, {tokens} tokens, rank {RANK}: a training step", [{
        "": name, "ms": f"{1e3 * row['seconds']:.2f}", "+-": f"{1e3 * row['spread']:.2f}",
        "/ frozen": f"{ratio(rows, name, 'frozen'):.2f}",
        "/ lora": f"{ratio(rows, name, 'lora'):.2f}",
        "f+b best / full": f"{ratio(rows, name, 'full', 'fb_best'):.2f}",
        "work / frozen": f"{row['work']:.2f}", "parameters": f"{row['trainable']:,}",
        "kept MB": megabytes(row["kept_bytes"]), "peak MB": megabytes(row["peak_bytes"]),
        "merge ms": f"{1e3 * row['merge_seconds']:.1f}" if row["merge_seconds"] else "",
    } for name, row in rows.items()])
    bar = {(1024, 1024): 1.35, (2048, 4096): 1.15}.get((n_in, tokens))
    if bar and n_in == n_out:
        what = f"Dual LoRA, forward + backward, {n_in} wide, {tokens} tokens, best: / "
        BARS.append((what + "full", ratio(rows, "dual", "full", "fb_best"), bar))
        BARS.append((what + "naive", ratio(rows, "dual", "dual, naive", "fb_best"), 0.75))
    return list(rows.values())


def merging(layer: AdapterLinear) -> Callable:
    """What merge() does with a layer."""
    return torch.no_grad()(lambda: layer.merged_weight().to(layer.base.weight.dtype))


# ---- part: model
SIZES = {"1 M": None,                               # data/base
         "25 M": dict(vocab_size=8192, d_model=512, n_layers=6, n_heads=8, d_ff=1408),
         "110 M": dict(vocab_size=32000, d_model=768, n_layers=12, n_heads=12, d_ff=2048),
         "1 B": dict(vocab_size=32000, d_model=2048, n_layers=22, n_heads=32, d_ff=5632)}


def llama(size: str, **others) -> Transformer:
    shape = SIZES[size] | others
    config = Config(**shape, n_kv_heads=shape["n_heads"], max_positions=1024, bos=1, eos=[2],
                    head_dim=shape["d_model"] // shape["n_heads"])
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


def one_model(pretrained: Transformer, name: str, tokens: torch.Tensor,
              bf16: bool = False) -> Contender:
    """All contenders share the memory of the frozen weights, except for peft's."""
    if name.startswith("peft "):
        model = adapted(in_transformers(pretrained).to(tokens.device), name,
                        ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
        read, gold = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def loss(model):        # use_cache: what no training needs
            return model(input_ids=read, labels=gold, shift_labels=gold, use_cache=False).loss

        return Contender(model, loss, [read, gold], bf16=bf16)
    if name == "full":
        model = copy.deepcopy(pretrained).float()
    else:
        model = copy.deepcopy(pretrained, {id(p): p for p in pretrained.parameters()})
    adapted(model, name, TARGETS)
    if name == "frozen":        # as under an adapter, gradients pass through all of the blocks
        model.embed.register_forward_hook(lambda module, _, y: y.requires_grad_())
    everything, count = torch.ones_like(tokens, dtype=torch.bool), tokens[:, 1:].numel()
    return Contender(model, lambda model: target_loss(model, tokens, everything) / count,
                     [tokens, everything], bf16=bf16)


def in_transformers(model: Transformer) -> nn.Module:
    """The same weights in transformers' class."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.embed.weight.dtype)


def model_part(args: Namespace) -> list[dict]:
    sizes = ["1 B"] if args.device.startswith("cuda") else ["25 M", "110 M"][:1 + args.all]
    return [row for size in sizes for row in model_table(size, args)]


def model_table(size: str, args: Namespace) -> list[dict]:
    torch.manual_seed(0)
    tokens = torch.randint(3, 8000, (4, 257), device=args.device)      # 256 are read
    pretrained = llama(size).to(args.device, PRECISIONS["bf16" if args.bf16 else "fp32"])
    contenders = {name: one_model(pretrained, name, tokens, args.bf16)
                  for name in ["frozen", *OURS, *(THEIRS if peft else [])]}
    rows = measure(contenders, 7, args.device)
    for name, row in rows.items():
        plain, on = name.removeprefix("peft "), [] if name == "frozen" else TARGETS
        row |= {"size": size, "flops_per_token": costs.flops_per_token(
            pretrained.config, plain, on, RANK, 256, sequences=4)}
    table(f"a model of {size} parameters, 4 sequences of 256 tokens, rank {RANK} on "
          f"{', '.join(TARGETS)}: a training step", [{
              "": name, "ms": f"{1e3 * row['seconds']:.0f}", "+-": f"{1e3 * row['spread']:.0f}",
              "/ frozen": f"{ratio(rows, name, 'frozen'):.2f}",
              "/ full": f"{ratio(rows, name, 'full'):.2f}",
              "/ lora": f"{ratio(rows, name, 'lora'):.2f}",
              "work / frozen": f"{ratio(rows, name, 'frozen', 'flops_per_token'):.2f}",
              "peak MB": megabytes(row["peak_bytes"]),
              "parameters": f"{row['trainable']:,}"} for name, row in rows.items()])
    what = f"training step of the {size} model: "
    BARS.append((what + "DoRA / our LoRA", ratio(rows, "dora", "lora"), 1.15))
    BARS.append((what + "AdaLoRA / our LoRA", ratio(rows, "adalora", "lora"), 1.10))
    if peft:
        BARS.append((what + "LoRA / peft's", ratio(rows, "lora", "peft lora"), 1.0))
    return list(rows.values())


# ---- part: growth
AXES = {"rank": (2, 4, 8, 16, 32, 64, 128), "tokens": (256, 512, 1024, 2048, 4096, 8192),
        "width": (256, 512, 1024, 2048, 4096)}
AT = {"rank": 8, "tokens": 1024, "width": 1024}         # while another one varies


def growth_part(args: Namespace) -> list[dict]:
    """One layer, with one of the three varied at a time."""
    rows = []
    for axis, values in AXES.items():
        found = []
        for value in tqdm(values, desc=axis, leave=False):
            size = AT | {axis: value}
            contenders = {name: one_layer(name, size["width"], size["width"], size["tokens"],
                                          args.device, args.bf16, size["rank"])
                          for name in ["frozen", *OURS]}
            found += [row | size | {"axis": axis}
                      for row in measure(contenders, 5, args.device).values()]
        fixed = ", ".join(f"{name} {value}" for name, value in AT.items() if name != axis)
        for title, key, factor in (("ms", "seconds", 1e3), ("peak MB", "peak_bytes", 2**-20)):
            table(f"{title} of a training step by {axis}; {fixed}", [{"": name} | {
                f"{row[axis]}": f"{factor * row[key]:.1f}" for row in found
                if row["contender"] == name} for name in ["frozen", *OURS]])
        rows += found
    if args.figure:
        draw(rows, args.figure, args.where)
    return rows


def draw(rows: list[dict], path: Path, where: dict) -> None:
    """The fastest step over the frozen layer's, and peak memory; a line a method. `where` it was
    measured goes to its numbers."""
    figure, panels = plt.subplots(2, 3, figsize=(10, 6), sharex="col", layout="constrained")
    for (axis, values), (time_panel, memory_panel) in zip(AXES.items(), panels.T):
        lines = {name: [row for row in rows if row["axis"] == axis and row["contender"] == name]
                 for name in ["frozen", *OURS]}
        floor = [row["best"] for row in lines["frozen"]]
        for name, line in lines.items():
            time_panel.plot(values, [row["best"] / least for row, least in zip(line, floor)],
                            label=LABELS[name], **line_of(name))
            memory_panel.plot(values, [row["peak_bytes"] / 2**20 for row in line], **line_of(name))
        memory_panel.set(xscale="log", yscale="log", xlabel=axis, xticks=values)
        memory_panel.set_xticks([], minor=True)
        memory_panel.set_xticklabels(values)
        memory_panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        memory_panel.yaxis.set_major_formatter("{x:g}")
        memory_panel.yaxis.set_minor_formatter("")
        time_panel.set(ylim=(0.9, None))
        for panel in (time_panel, memory_panel):
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("time of a training step,\nover the frozen layer's")
    panels[1, 0].set_ylabel("peak memory of a step, MB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7)
    save_figure(figure, path, where | {"growth": rows})


# ---- part: sizes
def sizes_part(args: Namespace) -> list[dict]:
    """By the formulas: one sequence of 2,048 tokens, rank 32, as in the papers."""
    rows = []
    for size, config in (("7B", costs.LLAMA_7B), ("70B", costs.LLAMA_70B)):
        found = []
        for name in OURS:
            memory = costs.memory(config, name, TARGETS, 32, 2048)
            less = costs.memory(config, name, TARGETS, 32, 2048, checkpointing=True)
            found.append({
                "contender": name, "size": size, **memory,
                "checkpointed": less["activations"],
                "trainable": costs.trainable(config, name, TARGETS, 32),
                "flops_per_token": costs.flops_per_token(config, name, TARGETS, 32, 2048)})
        table(f"LLaMA {size}, --dtype bf16, rank 32 on {', '.join(TARGETS)}, one sequence of 2,048 "
              "tokens: GB by the formulas of costs.py", [{
                  "": row["contender"], "million parameters": f"{row['trainable'] / 1e6:,.1f}",
                  "weights": f"{row['weights'] / 1e9:.1f}",
                  "training state": f"{row['training'] / 1e9:.1f}",
                  "activations": f"{row['activations'] / 1e9:.1f}",
                  "with --grad-checkpointing": f"{row['checkpointed'] / 1e9:.1f}",
                  "GFLOP a token": f"{row['flops_per_token'] / 1e9:.1f}"} for row in found])
        rows += found
    return rows


# ---- part: generate
def generate_part(args: Namespace) -> list[dict]:
    """64 new tokens after prompts of 32, greedy. The floor: the products with the weights alone."""
    results = []
    for size in ("1 M", "25 M"):
        model = load_pretrained(ROOT / "data" / "base")[0] if size == "1 M" else llama(size)
        model.to(args.device, PRECISIONS["bf16" if args.bf16 else "fp32"])
        for batch in (1, 16):
            prompts = torch.randint(3, 900, (batch, 32), device=args.device)
            contenders = {"ours": [lambda: generate(model, prompts.tolist(), 64, eos=[])],
                          "the floor": [products_of_generation(model, batch)]}
            if peft:
                contenders["transformers"] = [their_generation(model, prompts)]
            found = {}
            for name, rows in race(contenders, 5, args.device).items():
                seconds, spread = middle([row[0] for row in rows])
                found[name] = {"contender": name, "size": size, "batch": batch,
                               "seconds": seconds, "spread": spread}
            results += found.values()
            if peft and batch == 16:
                BARS.append((f"generation, 16 prompts, {size} model: time / transformers'",
                             ratio(found, "ours", "transformers"), 0.5))
    table("greedy generation of 64 tokens after 32", [{
        "": row["contender"], "model": row["size"], "prompts": str(row["batch"]),
        "ms": f"{1e3 * row['seconds']:.0f}", "+-": f"{1e3 * row['spread']:.0f}",
        "tokens / s": f"{64 * row['batch'] / row['seconds']:.0f}"} for row in results])
    return results


def products_of_generation(model: Transformer, batch: int) -> Callable:
    """All prompts pass each nn.Linear once, then 63 times one token of each; the output head sees
    one token of each 64 times."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    head = model.embed.weight if model.head is None else weights.pop()
    inputs = {rows: {W.shape[1]: torch.randn(rows, W.shape[1], device=W.device, dtype=W.dtype)
                     for W in (*weights, head)} for rows in (32 * batch, batch)}

    def call():
        with torch.inference_mode():
            for rows in [32 * batch] + [batch] * 63:
                for W in weights:
                    F.linear(inputs[rows][W.shape[1]], W)
                F.linear(inputs[batch][head.shape[1]], head)

    return call


def their_generation(model: Transformer, prompts: torch.Tensor) -> Callable:
    theirs = in_transformers(model).to(prompts.device).eval()
    theirs.generation_config.eos_token_id = None        # as ours: 64 tokens, whatever they are
    settings = dict(attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=64,
                    pad_token_id=0)

    def call():
        with torch.inference_mode():
            theirs.generate(prompts, **settings)

    return call


# ---- part: load
def load_part(args: Namespace) -> list[dict]:
    """A checkpoint of the 110 M shape with its own head, in float32. Each weight is read once
    afterwards, since the others only map the file, and read it when it is used."""
    def read(tensors) -> None:
        for tensor in tensors:
            tensor.sum()

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(llama("110 M", tied=False), folder)
        file = Path(folder, "model.safetensors")
        size = file.stat().st_size
        contenders = {"load_pretrained": lambda: read(load_pretrained(folder)[0].parameters()),
                      "safetensors' load_file": lambda: read(load_file(file).values())}
        if peft:
            contenders["transformers"] = lambda: read(
                transformers.AutoModelForCausalLM.from_pretrained(folder).parameters())
        times = race({name: [call] for name, call in contenders.items()}, 5, "cpu")
        peaks = {name: peak_resident_bytes(call) for name, call in contenders.items()}
    rows = [{"contender": name, "seconds": middle([row[0] for row in times[name]])[0],
             "bytes": size, "peak_bytes": peaks[name]} for name in contenders]
    table(f"loading a checkpoint of {size / 2**20:.0f} MB and reading each weight", [{
        "": row["contender"], "ms": f"{1e3 * row['seconds']:.0f}",
        "peak MB": megabytes(row["peak_bytes"]) if row["peak_bytes"] else "",
        "peak / file": f"{row['peak_bytes'] / size:.2f}" if row["peak_bytes"] else ""}
        for row in rows])
    if peaks["load_pretrained"]:
        BARS.append(("loading: peak memory / the model's", peaks["load_pretrained"] / size, 1.1))
    return rows


# ---- part: score
def score_part(args: Namespace) -> list[dict]:
    """The test items of `mini` on data/base, with a LoRA beside its weights as in a run."""
    model, tokenizer, max_length = open_model(str(ROOT / "data" / "base"), args.device, None,
                                              torch.float32)
    inject(model, "lora", TARGETS, RANK, 2 * RANK)
    task = load_task("mini", tokenizer, max_length)
    seconds = min(timed([lambda: score(model, tokenizer, task)], args.device)[0]
                  for _ in range(3))
    n = len(task.test)
    table("eval.py on `mini`", [{"items": f"{n:,}", "s": f"{seconds:.1f}",
                                 "items / s": f"{n / seconds:.0f}"}])
    return [{"items": n, "seconds": seconds, "items_per_second": n / seconds}]


# ---- the command
PARTS = {"layer": layer_part, "model": model_part, "growth": growth_part, "sizes": sizes_part,
         "generate": generate_part, "load": load_part, "score": score_part}


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--all", action="store_true", help="also 2048 and 4096 wide, and 110 M")
    parser.add_argument("--device", type=device, default=default_device(), help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=PRECISIONS, help="fp32, on a GPU bf16")
    parser.add_argument("--figure", type=new_file, metavar="FILE.png",
                        help="draw the part growth; its numbers go to FILE.json")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all that was measured")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            raise UserError(f"{part}: no part of the bench" + nearest(part, PARTS))
    if args.figure:
        if "growth" not in (args.parts or PARTS):
            raise UserError("--figure draws the part growth: name it, too")
        numbers = args.figure.with_suffix(".json")
        if args.figure.suffix != ".png" or args.json in (args.figure, numbers) or numbers.is_dir():
            raise UserError("--figure: a name that ends in .png; its numbers go to the same name "
                            "with .json, so --json needs another")
    if args.device.startswith("cuda"):          # events and synchronize() act on the current one
        torch.cuda.set_device(torch.device(args.device).index or 0)
    args.bf16 = (args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")) == "bf16"
    found = {"device": args.device, "dtype": "bf16" if args.bf16 else "fp32",
               "machine": hardware(args.device), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "peft": peft and peft.__version__,
               "transformers": peft and transformers.__version__}
    print(", ".join(f"{name} {value}" for name, value in found.items() if value))
    args.where = dict(found)
    for part in args.parts or PARTS:
        found[part] = PARTS[part](args)
        if args.json:                           # after each, so that a stop loses one at most
            with atomic_write(args.json) as path:
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if BARS:
        table("bars", [{"": what, "measured": f"{value:.2f}", "at most": f"{bar:.2f}",
                        " ": "met" if value <= bar else "not met"} for what, value, bar in BARS])


if __name__ == "__main__":
    main()
