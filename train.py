"""Fine-tunes a pretrained model with one method of the LoRA family, and scores it.

    python train.py --method dual                          about a minute on a laptop CPU
    python train.py --method lora --rank 2 --lr 1e-2 --seed 1
    python train.py --method dual --model PATH_OR_HUB_REPO --task jsonl --data FILE --epochs 3
    python train.py --method lora --model PATH --task text --data FILE --steps 200
    python train.py --resume --out runs/facts-dual-r8-s0   goes on with a run that was stopped
Everything goes to runs/<task>-<method>-r<rank>-s<seed>/: config.json (the resolved flags),
log.jsonl (a line a step), adapter.safetensors, checkpoint.pt, result.json.
"""
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections import defaultdict
from functools import lru_cache
from inspect import Parameter
from pathlib import Path

import torch
from tqdm import tqdm

from common import (Parser, UserError, atomic_write, default_device, device, exit_on_user_error,
                    flag, nearest)
from data import OPTIONS, TASKS, load_task, options_of
from data.task import Example, collate, encode_all, target_loss
from data.world import VERSION
from eval import BATCH_SIZE, MAX_LENGTH, open_model, read_run, score
from lora import AdapterLinear
from methods import METHODS, adapters, inject, param_groups, save, state

ROOT = Path(__file__).resolve().parent
ADAPTER_FLAGS = {"rank": 8, "alpha": None, "dropout": 0.0, "targets": "q,k,v,up,down"}
HYPER = {name: ([key for key, other in METHODS.items() if name in other.hyper], default)
         for method in METHODS.values() for name, default in method.hyper.items()}
HELP = defaultdict(str, {
    "norm_gradient": "let the gradient through the norm too",
    "init_rank": "directions of each layer at the start",
    "t_init": "steps before any pruning; below 1, a share of the run",
    "t_final": "steps after the last of it, likewise",
    "delta_t": "steps between two prunings",
    "beta1": "smoothing of the importance",
    "beta2": "smoothing of its uncertainty",
    "gamma": "weight of the penalty that keeps P and Q orthonormal",
    "directions": "directions of W0 that get a coordinate",
    "prelaunch": "steps of plain LoRA before they are chosen",
    "r1": "rank of the magnitude B A",
    "r2": "rank of the direction D C",
    "update_warmup": "steps over which the update grows from 0 to its full size",
    "init_std": "standard deviation of the four matrices at the start",
})


# ---- flags
def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to train on what")
    what.add_argument("--method", help=f"{', '.join(METHODS)}")
    what.add_argument("--model", help="HF-layout folder, or owner/name on the hub (data/base)")
    what.add_argument("--task", help=f"{', '.join(TASKS)} (facts)")
    for name, how in OPTIONS.items():
        what.add_argument(flag(name), **how)
    adapter = parser.add_argument_group("adapters (every method but full)")
    adapter.add_argument("--rank", type=int, help="budget: as many parameters as LoRA of that rank "
                                                  "(8); adalora: at the end, on average")
    adapter.add_argument("--alpha", type=float, help="scale of the update (2 x rank)")
    adapter.add_argument("--dropout", type=float, help="on the adapter's input (0)")
    adapter.add_argument("--targets", help="layer names, comma-separated (q,k,v,up,down)")
    adapter.add_argument("--lr-ratio", type=float, help="learning rate of B (dual: B and D) over "
                                                        "that of the rest (1; lora+ 16)")
    for name, (users, default) in HYPER.items():
        kind = (dict(action=BooleanOptionalAction) if isinstance(default, bool) else
                dict(type=int if default is None else type(default)))
        shown = "from --rank" if default is None else "no" if default is False else default
        adapter.add_argument(flag(name), **kind, help=f"{', '.join(users)}: {HELP[name]} ({shown})")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--lr", type=float, help="peak learning rate (per method)")
    loop.add_argument("--weight-decay", type=float, help="AdamW's (0)")
    loop.add_argument("--warmup", type=int, help="steps of linear warm-up (6 %% of the run)")
    loop.add_argument("--steps", type=int, help="optimizer steps (per task)")
    loop.add_argument("--epochs", type=float, help="instead of --steps")
    loop.add_argument("--batch-size", type=int, help="examples an optimizer step (per task)")
    loop.add_argument("--grad-accum", type=int, help="micro-batches that a batch is cut into (1)")
    loop.add_argument("--max-length", type=int, help=f"tokens of an example ({MAX_LENGTH})")
    loop.add_argument("--loss-on", choices=("answer", "all"), help="which tokens count (per task)")
    loop.add_argument("--seed", type=int, help="of the adapters, the data order, dropout (0)")
    loop.add_argument("--device", type=device, help="cpu, cuda, cuda:1 (a GPU if there is one)")
    run = parser.add_argument_group("run")
    run.add_argument("--eval-every", type=int, help="steps between validations (a quarter)")
    run.add_argument("--max-eval", type=int, help="score at most this many examples of a split")
    run.add_argument("--eval-batch-size", type=int, help="texts, or beams of them, scored at once: "
                                                         f"speed and memory only ({BATCH_SIZE})")
    run.add_argument("--save-every", type=int, help="steps between checkpoints (100)")
    run.add_argument("--out", help="the run's folder (runs/<task>-<method>-r<rank>-s<seed>)")
    run.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser.parse_args(argv)


def check(args: Namespace) -> None:
    """UserError for what is wrong in the flags themselves, before anything is loaded."""
    if args.method is None:
        raise UserError(f"--method is missing; known: {', '.join(METHODS)}")
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: unknown{nearest(args.method, METHODS)}")
    method = METHODS[args.method]
    unused = [name for name in HYPER if name not in method.hyper]
    if method.layer is None:
        unused += ADAPTER_FLAGS
    if method.layer is None or not method.layer.fast:
        unused.append("lr_ratio")
    for name in unused:
        if getattr(args, name) is not None:
            raise UserError(f"{flag(name)}: method {args.method} does not use it")
    if args.steps is not None and args.epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    for name in ("steps", "batch_size", "eval_batch_size", "grad_accum", "max_length",
                 "eval_every", "max_eval", "save_every", "epochs", "lr", "lr_ratio"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise UserError(f"{flag(name)} {getattr(args, name)}: must be above 0")
    for name, limit in (("weight_decay", math.inf), ("warmup", math.inf), ("seed", 2 ** 32)):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < limit:
            raise UserError(f"{flag(name)} {getattr(args, name)}: must be from 0 to below {limit}")
    if args.out is not None and Path(args.out).exists():
        if not Path(args.out).is_dir():
            raise UserError(f"--out {args.out}: a file stands there")
        if not args.overwrite:
            raise UserError(f"--out {args.out} exists; --overwrite replaces it, --resume goes on")


def fill(args: Namespace, defaults: dict) -> None:
    """Gives each flag that is still None its default."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def resolve(args: Namespace) -> None:
    """Fills in all that depends on neither the model nor the task."""
    method = METHODS[args.method]
    fill(args, {"model": str(ROOT / "data" / "base"), "task": "facts",
                "lr": method.lr, "weight_decay": 0.0, "grad_accum": 1,
                "seed": 0, "save_every": 100, "eval_batch_size": BATCH_SIZE,
                "device": default_device()})
    if method.layer is not None:
        fill(args, ADAPTER_FLAGS | {"lr_ratio": method.lr_ratio} | method.hyper)
        fill(args, {"alpha": 2.0 * args.rank})
    if max(1.0, args.lr_ratio or 1.0) * args.lr > 1e3:
        raise UserError(f"--lr {args.lr}, --lr-ratio {args.lr_ratio}: a learning rate above 1000")
    fill(args, {"out": free_folder(args)})
    fill(args, {name: default for name, default in options_of(args.task).items()
                if default is not Parameter.empty})
    for name in ("model", "data", "data_dir", "prompt_template"):   # found from any folder then
        if getattr(args, name) and os.path.exists(getattr(args, name)):
            setattr(args, name, os.path.abspath(getattr(args, name)))


def resolve_task(args: Namespace, task) -> None:
    """Fills in the length of the run, which the task decides where the user does not."""
    if args.loss_on == "answer" and task.loss_on == "all":
        raise UserError(f"--loss-on answer: task {args.task} has no answers")
    fill(args, {"batch_size": task.defaults["batch_size"], "loss_on": task.loss_on})
    if args.steps is None:
        epochs = args.epochs or task.defaults.get("epochs")
        args.steps = (task.defaults["steps"] if epochs is None
                      else math.ceil(epochs * len(task.train) / args.batch_size))
    fill(args, {"warmup": args.steps * 6 // 100, "eval_every": math.ceil(args.steps / 4)})


# ---- the loop
def lr_factor(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at a step: a line up to 1, then a line down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


@lru_cache(maxsize=2)
def epoch_order(epoch: int, n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7919 * epoch)).tolist()


def batch_at(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """The indices of a step's examples: epochs of n, each shuffled anew, laid end to end. They
    depend on nothing but these four numbers, so a resumed run needs no reader's position."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [epoch_order(place // n, n, seed)[place % n] for place in places]


def contract(model) -> tuple[type[AdapterLinear], list[AdapterLinear]]:
    """The method's class and its layers; for `full` the contract itself, which does nothing."""
    layers = list(adapters(model).values())
    return (type(layers[0]) if layers else AdapterLinear), layers


def fit(model, sequences, args: Namespace, run: "Run", validate) -> None:
    """The loop: batch, loss, backward, clip, step, on_step, zero_grad, log."""
    method, layers = contract(model)
    optimizer = torch.optim.AdamW(param_groups(model, args.lr, args.weight_decay,
                                               args.lr_ratio or 1.0))
    peaks = [group["lr"] for group in optimizer.param_groups]
    trainable = [p for p in model.parameters() if p.requires_grad]
    first = run.restore(model, optimizer)
    model.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step")
    for step in bar:
        factor = lr_factor(step, args.steps, args.warmup)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        batch = [sequences[i] for i in batch_at(step, len(sequences), args.batch_size, args.seed)]
        targets = sum(len(s.tokens) - s.start for s in batch)
        loss = 0.0
        for micro in slices(batch, args.grad_accum):            # one slice unless --grad-accum
            part = target_loss(model, *collate(micro, args.device)) / targets
            part.backward()
            loss += part.item()
        extra = method.extra_loss(layers)
        if torch.is_tensor(extra):
            extra.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0).item()
        if not math.isfinite(loss + norm):
            saved = run.folder / "checkpoint.pt"
            print(f"error: step {step}: loss {loss}, extra loss {float(extra)}, gradient norm "
                  f"{norm}; a lower --lr may help; "
                  + (f"the last good state is {saved}" if saved.exists() else "nothing was saved"),
                  file=sys.stderr)
            sys.exit(1)
        optimizer.step()
        method.on_step(layers, step, args.steps)
        optimizer.zero_grad()

        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        line = {"step": step, "loss": loss, "lr": args.lr * factor, "grad_norm": norm}
        if torch.is_tensor(extra):
            line["extra_loss"] = extra.item()
        if (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            line["valid"] = validate()
        run.log(line)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            run.checkpoint(model, optimizer, step + 1)


def slices(batch: list, n: int) -> list[list]:
    """The batch as n contiguous slices of (nearly) equal length, empty ones left out."""
    cuts = [i * len(batch) // n for i in range(n + 1)]
    return [batch[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]


# ---- the run's folder
class Run:
    """The files of one run. Each is written under a temporary name and renamed, except log.jsonl,
    which grows a line a step, flushed at once."""

    def __init__(self, args: Namespace):
        self.folder, self.resume = Path(args.out), args.resume
        if args.overwrite:
            for name in ("result.json", "adapter.safetensors", "checkpoint.pt", "log.jsonl"):
                (self.folder / name).unlink(missing_ok=True)

    def write(self, name: str, content: dict) -> None:
        with atomic_write(self.folder / name) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def log(self, line: dict) -> None:
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def checkpoint(self, model, optimizer, step: int) -> None:
        with atomic_write(self.folder / "checkpoint.pt") as path:
            torch.save({"step": step, "model": state(model), "optimizer": optimizer.state_dict(),
                        "rng": torch.get_rng_state()}, path)

    def restore(self, model, optimizer) -> int:
        """The step to go on from; 0 where there is nothing to go on with."""
        path, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if not self.resume or not path.exists():
            log.write_text("")
            return 0
        try:
            saved = torch.load(path, weights_only=True)
            with torch.no_grad():
                for name, tensor in state(model).items():
                    tensor.copy_(saved["model"][name])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"])
        except Exception as error:          # a broken file can break its reader in any way
            raise UserError(f"{path}: cannot resume from it: {str(error)[:200]}") from None
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        with atomic_write(log) as temporary:
            temporary.write_text("".join(lines[:saved["step"]]), encoding="utf-8")
        return saved["step"]


def free_folder(args: Namespace) -> str:
    rank = "" if args.rank is None else f"-r{args.rank}"
    name = f"runs/{args.task.replace('/', '-')}-{args.method}{rank}-s{args.seed}"
    tries = [name, *(f"{name}-{i}" for i in range(2, 10000))]
    return next(path for path in tries if not Path(path).exists())


def fingerprint(model) -> str:
    """sha256 of all weights in the order of their names: which model a run began with."""
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def versions() -> dict:
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"],
                             capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:                         # no git on this machine
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__,
            "world": VERSION, "commit": commit, "machine": platform.machine(),
            "threads": torch.get_num_threads()}


def peak_memory_mb(device: str) -> float | None:
    """Of the GPU where one is used, else of the process (its weights, data and libraries)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:                     # Windows has no such counter
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10      # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def shown(path: str) -> str:
    """A local path as one would type it here; a hub id as it is."""
    return os.path.relpath(path) if os.path.exists(path) else path


def print_header(args: Namespace, model, task, plan: str, cut: dict) -> tuple[int, int]:
    """Says what will run -> (trainable, total) parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"{args.method} on {args.task}, from {shown(args.model)}, into {args.out}")
    print(f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    if adapters(model):
        print(f"{len(adapters(model))} layers adapted: {args.targets}; rank {args.rank}, "
              f"alpha {args.alpha:g}, dropout {args.dropout:g}"
              + "".join(f", {name} {getattr(args, name)}" for name in METHODS[args.method].hyper)
              + (f", lr_ratio {args.lr_ratio:g}" if METHODS[args.method].layer.fast else ""))
    if plan:
        print(plan)
    print(f"{len(task.train)} train, {len(task.valid)} valid, {len(task.test)} test examples; "
          f"loss on {args.loss_on}")
    if any(cut.values()):
        print(f"{cut['train']} train and {cut['held out']} other examples lose the start of their "
              f"prompt to --max-length {args.max_length}")
    for name in ("trained_on", "missing"):
        if name in task.notes:
            print(f"{name}: {task.notes[name]}")
    print(f"{args.steps} steps of {args.batch_size}, learning rate {args.lr:g}, "
          f"warm-up {args.warmup}, seed {args.seed}, {args.device}")
    return trainable, total


def resumed(args: Namespace) -> Namespace:
    """The flags of the run in --out, which alone decide how a resumed run goes on."""
    given = [name for name, value in vars(args).items()
             if value not in (None, False) and name not in ("out", "resume")]
    if given:
        raise UserError(f"{flag(given[0])}: a resumed run keeps its own flags; give --out alone")
    if args.out is None:
        raise UserError("--resume needs --out FOLDER, the run to go on with")
    if (Path(args.out) / "result.json").exists():
        raise UserError(f"--out {args.out}: the run is finished, there is nothing to resume")
    saved = read_run(args.out)
    missing = vars(args).keys() - vars(saved).keys()
    if missing:
        raise UserError(f"{args.out}/config.json: has no {', '.join(sorted(missing))}")
    saved.out, saved.resume, saved.overwrite = args.out, True, False
    return saved


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.resume:
        args = resumed(args)
    else:
        check(args)
        resolve(args)
        args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    start = time.time()
    model, tokenizer, args.max_length = open_model(args.model, args.device, args.max_length)
    task = load_task(args.task, tokenizer, args.max_length,
                     **{name: getattr(args, name) for name in OPTIONS})
    resolve_task(args, task)
    sequences = encode_all(task.train, tokenizer, model, args.max_length, loss_on=args.loss_on)
    held_out = [task.sequences(e, tokenizer, model) for e in task.valid + task.test]
    cut = {"train": sum(s.cut for s in sequences),
           "held out": sum(any(s.cut for s in of_example) for of_example in held_out)}
    base = fingerprint(model)
    torch.manual_seed(args.seed)
    method = METHODS[args.method]
    if method.layer is None:
        inject(model, args.method, [])
    else:
        inject(model, args.method, args.targets.split(","), args.rank, args.alpha, args.dropout,
               **{name: getattr(args, name) for name in method.hyper})
        vars(args).update({name: model.injected[name] for name in method.hyper})
    kind, layers = contract(model)
    plan = kind.plan(layers, args.steps)

    run = Run(args)
    run.write("config.json", {"args": vars(args), "versions": versions()})
    trainable, total = print_header(args, model, task, plan, cut)

    def scores(split: str):
        return score(model, tokenizer, task, args.max_eval, split, args.eval_batch_size)

    before = scores("test")
    fit(model, sequences, args, run, lambda: scores("valid").values)
    after = scores("test")
    save(model, run.folder / "adapter.safetensors")
    run.write("result.json", {
        "method": args.method, "task": args.task, "trainable": trainable, "total": total,
        "before": before.values, "after": after.values, "counts": after.counts,
        "valid": scores("valid").values,
        "seconds": round(time.time() - start, 1), "peak_memory_mb": peak_memory_mb(args.device),
        "loss_on": args.loss_on, "seed": args.seed, "cut": cut, "notes": task.notes,
        "base": base, "versions": versions(), "command": args.command})
    print(f"{'':20}{'before':>12}{'after':>12}")
    for name, value in after.values.items():
        print(f"{name:20}{before.values[name]:12.4f}{value:12.4f}")
    example = next((e for e in task.test if isinstance(e, Example) and "\n" not in e.prompt), None)
    print(f"{time.time() - start:.0f} s; loss on {args.loss_on}; all of it in {run.folder}; next:")
    print(f"  python eval.py --run {shlex.quote(args.out)}"
          + (f" --prompt {shlex.quote(example.prompt)}" if example else ""))


if __name__ == "__main__":
    main()
