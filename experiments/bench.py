"""Measures time and memory of every method, side by side, as ratios within one run.

    python -m experiments.bench                   # every part at its default sizes
    python -m experiments.bench layer model --all  # wider layers, a larger model too
    python -m experiments.bench --device cuda --json out.json     # the same on a GPU with 40 GB, in
                                                    bf16: LLaMA 7B's layers, a model of 1 B (--all
                                                    adds nothing)
The parts:
    layer       one adapted nn.Linear: a training step, memory kept for backward, merging
    model       a LLaMA-shaped model: a training step, peak memory
    growth      time and memory over rank, tokens and width; --figure FILE draws them
    sizes       needs of LLaMA 7B and 70B, by the formulas of costs.py
    generate    tokens a second
    load        a checkpoint: time and peak memory
    score       items of `mini` that eval.py scores in a second
    encoder     DeBERTa-v3: forward, backward, the memory that attention holds
peft, transformers and safetensors' own reader stand beside our code if they are installed
(requirements-dev.txt). A method that costs.py has no formulas for is "not mapped"; its time and
memory are measured as any other's.

The contenders of a table take turns, in another order each round. So a machine that slows down
slows all of them. The first round does not count. Times are medians, "+-" is half the distance
between their quartiles, "best" the fastest round. Compare the ratios of one table, not the
seconds of two runs.
"""
import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from data import load_task
from data.task import Setup
from experiments import costs
from experiments.contenders import (AUTOGRAD_DUALS, OURS, RANK, TARGETS, WITH_DORA, llama,
                                    measure_steps, one_layer, one_model, ratio)
from experiments.encoders import SHAPES, encoder_part
from experiments.growth import draw_growth, measure_growth
from experiments.profiling import (flops, kept_for_backward, median_and_spread, megabytes,
                                   peak_resident_bytes, print_table, race, timed)
from experiments.references import (INSTALLED, PEFT, VERSIONS, adapted_by_peft,
                                    generation_of_transformers, load_in_transformers, model_of_peft)
from formats.checkpoint import load_pretrained, open_model, save_pretrained
from generate import generate
from lora import AdapterLinear
from methods import inject
from model import Transformer
from support.errors import UserError, exit_on_user_error, nearest
from support.files import atomic_write, new_file
from support.machine import hardware
from support.parser import Parser, default_device, device
from support.run import PRECISIONS, ROOT

LAYER_WIDTHS, MORE_WIDTHS = [512, 1024], [2048, 4096]
LAYER_TOKENS = [1024, 4096]
NOT_MAPPED = "not mapped"


# ---- part: layer
def layer_part(args: Namespace) -> list[dict]:
    if args.device.startswith("cuda"):
        shapes = [(4096, 4096), (4096, 11008)]                  # LLaMA-7B's q and up
    else:
        shapes = [(width, width) for width in LAYER_WIDTHS + MORE_WIDTHS * args.all]
    return [row for shape in shapes for tokens in LAYER_TOKENS
            for row in layer_table(*shape, tokens, args)]


def layer_table(n_in: int, n_out: int, tokens: int, args: Namespace) -> list[dict]:
    """Measures every contender on one layer. Torch counts the work that has no formula."""
    contenders = {name: one_layer(name, n_in, n_out, tokens, args.device, args.bf16)
                  for name in ["frozen", *OURS, *WITH_DORA, *AUTOGRAD_DUALS]}
    contenders |= {name: one_layer(name, n_in, n_out, tokens, args.device, args.bf16,
                                   adapt=adapted_by_peft) for name in PEFT if "ada" not in name}
    rows = measure_steps(contenders, 9 if max(n_in, n_out) > 1024 else 15, args.device)
    for name, contender in contenders.items():
        layers = contender.layers
        rows[name] |= {
            "n_in": n_in, "n_out": n_out, "tokens": tokens,
            "kept_bytes": kept_for_backward(contender.forward, contender.owned),
            "work": (costs.work(name, n_in, n_out, tokens, RANK) if name in costs.MAPPED else
                     flops(contender.forward_backward) / (4 * tokens * n_in * n_out)),
            "merge_seconds": min(timed([merging(layers[0])], args.device)[0]
                                 for _ in range(5)) if layers else None}
    print_table(f"one layer {n_out} x {n_in}, {tokens} tokens, rank {RANK}: a training step", [{
        "": name, "ms": f"{1e3 * row['seconds']:.2f}", "+-": f"{1e3 * row['spread']:.2f}",
        "/ frozen": f"{ratio(rows, name, 'frozen'):.2f}",
        "/ lora": f"{ratio(rows, name, 'lora'):.2f}",
        "f+b best / full": f"{ratio(rows, name, 'full', 'fb_best'):.2f}",
        "work / frozen": f"{row['work']:.2f}", "parameters": f"{row['trainable']:,}",
        "kept MB": megabytes(row["kept_bytes"]), "peak MB": megabytes(row["peak_bytes"]),
        "merge ms": f"{1e3 * row['merge_seconds']:.1f}" if row["merge_seconds"] else "",
    } for name, row in rows.items()])
    return list(rows.values())


def merging(layer: AdapterLinear) -> Callable:
    """Makes a call that does what merge() does with a layer."""
    return torch.no_grad()(lambda: layer.merged_weight().to(layer.base.weight.dtype))


# ---- part: model
def model_part(args: Namespace) -> list[dict]:
    sizes = ["1 B"] if args.device.startswith("cuda") else ["25 M", "110 M"][:1 + args.all]
    return [row for size in sizes for row in model_table(size, args)]


def model_table(size: str, args: Namespace) -> list[dict]:
    torch.manual_seed(0)
    tokens = torch.randint(3, 8000, (4, 257), device=args.device)      # 256 are read
    pretrained = llama(size).to(args.device, PRECISIONS["bf16" if args.bf16 else "fp32"])
    contenders = {name: one_model(pretrained, name, tokens, args.bf16)
                  for name in ["frozen", *OURS]}
    contenders |= {name: model_of_peft(pretrained, name, tokens, args.bf16) for name in PEFT}
    rows = measure_steps(contenders, 7, args.device)
    for name, row in rows.items():
        ours, targets = name.removeprefix("peft "), [] if name == "frozen" else TARGETS
        row |= {"size": size, "flops_per_token": costs.flops_per_token(
            pretrained.config, ours, targets, RANK, 256, sequences=4)
            if ours in costs.MAPPED else None}
    print_table(f"a model of {size} parameters, 4 sequences of 256 tokens, rank {RANK} on "
                f"{', '.join(TARGETS)}: a training step", [{
                    "": name, "ms": f"{1e3 * row['seconds']:.0f}",
                    "+-": f"{1e3 * row['spread']:.0f}",
                    "/ frozen": f"{ratio(rows, name, 'frozen'):.2f}",
                    "/ full": f"{ratio(rows, name, 'full'):.2f}",
                    "/ lora": f"{ratio(rows, name, 'lora'):.2f}",
                    "work / frozen": f"{ratio(rows, name, 'frozen', 'flops_per_token'):.2f}"
                    if row["flops_per_token"] else NOT_MAPPED,
                    "peak MB": megabytes(row["peak_bytes"]),
                    "parameters": f"{row['trainable']:,}"} for name, row in rows.items()])
    return list(rows.values())


# ---- part: growth
def growth_part(args: Namespace) -> list[dict]:
    rows = measure_growth(args)
    if args.figure:
        draw_growth(rows, args.figure, args.machine)
    return rows


# ---- part: sizes
def sizes_part(args: Namespace) -> list[dict]:
    """Computes the needs for one sequence of 2,048 tokens at rank 32, as in the papers."""
    rows = []
    for size, config in (("7B", costs.LLAMA_7B), ("70B", costs.LLAMA_70B)):
        found = []
        for name in OURS:
            row = {"contender": name, "size": size}
            if name in costs.MAPPED:
                less = costs.memory(config, name, TARGETS, 32, 2048, checkpointing=True)
                row |= costs.memory(config, name, TARGETS, 32, 2048) | {
                    "checkpointed": less["activations"],
                    "trainable": costs.trainable(config, name, TARGETS, 32),
                    "flops_per_token": costs.flops_per_token(config, name, TARGETS, 32, 2048)}
            found.append(row)
        columns = {"million parameters": ("trainable", 1e6), "weights": ("weights", 1e9),
                   "training state": ("training", 1e9), "activations": ("activations", 1e9),
                   "with --grad-checkpointing": ("checkpointed", 1e9),
                   "GFLOP a token": ("flops_per_token", 1e9)}
        print_table(f"LLaMA {size}, --dtype bf16, rank 32 on {', '.join(TARGETS)}, one sequence of "
                    "2,048 tokens: GB by the formulas of costs.py", [{"": row["contender"]} | {
                        title: f"{row[key] / unit:,.1f}" if key in row else NOT_MAPPED
                        for title, (key, unit) in columns.items()} for row in found])
        rows += found
    return rows


# ---- part: generate
def generate_part(args: Namespace) -> list[dict]:
    """Times 64 greedy tokens after prompts of 32. The floor is the products with the weights."""
    results = []
    for size in ("1 M", "25 M"):
        model = load_pretrained(ROOT / "data" / "base")[0] if size == "1 M" else llama(size)
        model.to(args.device, PRECISIONS["bf16" if args.bf16 else "fp32"])
        for batch in (1, 16):
            prompts = torch.randint(3, 900, (batch, 32), device=args.device)
            contenders = {"ours": [lambda: generate(model, prompts.tolist(), 64, eos=[])],
                          "the floor": [products_of_generation(model, batch)]}
            if INSTALLED:
                contenders["transformers"] = [generation_of_transformers(model, prompts, 64)]
            for name, rows in race(contenders, 5, args.device).items():
                seconds, spread = median_and_spread([row[0] for row in rows])
                results.append({"contender": name, "size": size, "batch": batch,
                                "seconds": seconds, "spread": spread})
    print_table("greedy generation of 64 tokens after 32", [{
        "": row["contender"], "model": row["size"], "prompts": str(row["batch"]),
        "ms": f"{1e3 * row['seconds']:.0f}", "+-": f"{1e3 * row['spread']:.0f}",
        "tokens / s": f"{64 * row['batch'] / row['seconds']:.0f}"} for row in results])
    return results


def products_of_generation(model: Transformer, batch: int) -> Callable:
    """Makes a call of generation's matrix products alone.

    All prompts pass each nn.Linear once, then one token of each passes it 63 times. The output head
    sees one token of each 64 times.
    """
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


# ---- part: load
def load_part(args: Namespace) -> list[dict]:
    """Times a checkpoint of the 110 M shape with its own head, in float32.

    Each weight is read once afterwards, since the other readers only map the file and read a
    weight when it is used.
    """
    def read(tensors) -> None:
        for tensor in tensors:
            tensor.sum()

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(llama("110 M", tied=False), folder)
        file = Path(folder, "model.safetensors")
        size = file.stat().st_size
        contenders = {"load_pretrained": lambda: read(load_pretrained(folder)[0].parameters()),
                      "safetensors' load_file": lambda: read(load_file(file).values())}
        if INSTALLED:
            contenders["transformers"] = lambda: read(load_in_transformers(folder).parameters())
        times = race({name: [call] for name, call in contenders.items()}, 5, "cpu")
        peaks = {name: peak_resident_bytes(call) for name, call in contenders.items()}
    rows = [{"contender": name, "seconds": median_and_spread([row[0] for row in times[name]])[0],
             "bytes": size, "peak_bytes": peaks[name]} for name in contenders]
    print_table(f"loading a checkpoint of {size / 2**20:.0f} MB and reading each weight", [{
        "": row["contender"], "ms": f"{1e3 * row['seconds']:.0f}",
        "peak MB": megabytes(row["peak_bytes"]) if row["peak_bytes"] else "",
        "peak / file": f"{row['peak_bytes'] / size:.2f}" if row["peak_bytes"] else ""}
        for row in rows])
    return rows


# ---- part: score
def score_part(args: Namespace) -> list[dict]:
    """Times the test items of `mini` on data/base, with a LoRA beside its weights as in a run."""
    model, tokenizer, max_length = open_model(str(ROOT / "data" / "base"), args.device, None,
                                              torch.float32)
    inject(model, "lora", TARGETS, RANK, 2 * RANK)
    task = load_task("mini", Setup(tokenizer, model.config, max_length))
    seconds = min(timed([lambda: task.score(model, task.test)], args.device)[0]
                  for _ in range(3))
    n = len(task.test)
    print_table("eval.py on `mini`", [{"items": f"{n:,}", "s": f"{seconds:.1f}",
                                       "items / s": f"{n / seconds:.0f}"}])
    return [{"items": n, "seconds": seconds, "items_per_second": n / seconds}]


# ---- the command
BENCH_PARTS = {"layer": layer_part, "model": model_part, "growth": growth_part,
               "sizes": sizes_part, "generate": generate_part, "load": load_part,
               "score": score_part, "encoder": encoder_part}


def goals(found: dict) -> list[tuple[str, float, float]]:
    """Compares the results with what we aim for: (name, measured, at most)."""
    lines = []

    def at(part: str, **place) -> dict[str, dict]:
        return {row["contender"]: row for row in found.get(part, [])
                if place.items() <= row.items()}

    for width, tokens, bar in ((1024, 1024, 1.35), (2048, 4096, 1.15)):
        if rows := at("layer", n_in=width, n_out=width, tokens=tokens):
            name = f"Dual LoRA, forward + backward, {width} wide, {tokens} tokens, best: / "
            lines += [(name + "full", ratio(rows, "dual", "full", "fb_best"), bar),
                      (name + "naive", ratio(rows, "dual", "dual, naive", "fb_best"), 0.75)]
            lines += [(f"{over}, forward + backward, {width} wide, {tokens} tokens: / without",
                       ratio(rows, over, over.removesuffix(" with dora"), "fb_best"), 1.25)
                      for over in WITH_DORA if over in rows]
    for size in dict.fromkeys(row["size"] for row in found.get("model", [])):
        rows, name = at("model", size=size), f"training step of the {size} model: "
        lines += [(name + "DoRA / our LoRA", ratio(rows, "dora", "lora"), 1.15),
                  (name + "AdaLoRA / our LoRA", ratio(rows, "adalora", "lora"), 1.10)]
        if "peft lora" in rows:
            lines.append((name + "LoRA / peft's", ratio(rows, "lora", "peft lora"), 1.0))
    for size in ("1 M", "25 M"):
        if "transformers" in (rows := at("generate", size=size, batch=16)):
            lines.append((f"generation, 16 prompts, {size} model: time / transformers'",
                          ratio(rows, "ours", "transformers"), 0.5))
    texts, length = SHAPES[0]
    if "transformers" in (rows := at("encoder", texts=texts, length=length)):
        name = f"DeBERTa, {texts} texts of {length} tokens: "
        lines += [(name + "time / transformers'", ratio(rows, "ours", "transformers"), 0.85),
                  (name + "memory held by attention / transformers'",
                   ratio(rows, "ours", "transformers", "kept_bytes"), 0.5)]
    loading = at("load").get("load_pretrained")
    if loading and loading["peak_bytes"]:
        lines.append(("loading: peak memory / the model's",
                      loading["peak_bytes"] / loading["bytes"], 1.1))
    return lines


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="part",
                        help=f"parts to run: {', '.join(BENCH_PARTS)} (all)")
    parser.add_argument("--all", action="store_true",
                        help="measure layers 2048 and 4096 wide and the 110 M model too")
    parser.add_argument("--device", type=device, default=default_device(),
                        help="device to measure: cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=PRECISIONS,
                        help="precision (fp32; on a GPU bf16)")
    parser.add_argument("--figure", type=new_file, metavar="FILE.png",
                        help="draw the part growth; its numbers go to FILE.json")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all measurements")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in BENCH_PARTS:
            raise UserError(f"{part}: no part of the bench" + nearest(part, BENCH_PARTS))
    if args.figure:
        if "growth" not in (args.parts or BENCH_PARTS):
            raise UserError("--figure draws the part growth: name it, too")
        numbers = args.figure.with_suffix(".json")
        if args.figure.suffix != ".png" or args.json in (args.figure, numbers) or numbers.is_dir():
            raise UserError("--figure needs a name that ends in .png; its numbers go to the same "
                            "name with .json, so --json needs another")
    if args.device.startswith("cuda"):          # events and synchronize() act on the current one
        torch.cuda.set_device(torch.device(args.device).index or 0)
    args.bf16 = (args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")) == "bf16"
    args.machine = {"device": args.device, "dtype": "bf16" if args.bf16 else "fp32",
                    "machine": hardware(args.device), "threads": torch.get_num_threads(),
                    "torch": torch.__version__, **VERSIONS}
    print(", ".join(f"{name} {value}" for name, value in args.machine.items() if value))
    found = dict(args.machine)
    for part in args.parts or BENCH_PARTS:
        found[part] = BENCH_PARTS[part](args)
        if args.json:                           # after each part, so that a stop loses one at most
            with atomic_write(args.json) as path:
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if lines := goals(found):
        print_table("bars", [{"": name, "measured": f"{value:.2f}", "at most": f"{bar:.2f}",
                              " ": "met" if value <= bar else "not met"}
                             for name, value, bar in lines])


if __name__ == "__main__":
    main()
