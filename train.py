"""Fine-tunes a pretrained model with one method of the LoRA family, and scores it.

    python train.py --method dual                          about a minute on a laptop CPU
    python train.py --method lora --rank 2 --lr 1e-2 --seed 1
    python train.py --method dual --model PATH_OR_HUB_REPO --task jsonl --data FILE --epochs 3
    python train.py --method lora --model PATH --task text --data FILE --steps 200
    python train.py --resume --out runs/facts-dual-r8-s0   goes on with a run that was stopped
    torchrun --nproc-per-node 2 train.py --method dual     the same run in two processes
Everything goes to runs/<task>-<method>-r<rank>-s<seed>/, described in run.py.
"""
import math
import os
import shlex
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections import defaultdict
from functools import lru_cache
from inspect import Parameter
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common import (Parser, UserError, default_device, device, exit_on_user_error, flag, nearest,
                    out_of_memory)
from data import OPTIONS, TASKS, load_task, options_in, options_of
from data.task import (Example, collate, data_fingerprint, encode_all, score_targets,
                       target_loss)
from distributed import everyones, meeting, parallel, rank, start, summed, world
from eval import BATCH_SIZE, MAX_LENGTH, open_model, sample, score
from lora import AdapterLinear
from methods import METHODS, adapters, inject, is_listed, param_groups, save, state
from peft_files import import_peft, peft_method, read_peft_config
from run import (BEFORE, FILES, NEWEST, PRECISIONS, ROOT, Run, check_same, fingerprint,
                 peak_memory_mb, read_config, resumed, stop_requests, versions, visible,
                 weights_dtype)

BASE = ROOT / "data" / "base"
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
    "init_share": "size of the untrained update over W0's, once warmed up",
    "init_std": "standard deviation of the four matrices at the start, instead",
    "clip": "clip the gradient through Sign at 1",
    "direction_lr": "learning rate of C and D over that of A and B",
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
    what.add_argument("--from-peft", metavar="DIR", help="instead of --method and the adapters' "
                      "flags: train on from what PEFT has saved there")
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
                dict(type=float if name == "init_std" else int if default is None else
                     type(default)))
        shown = {None: "from --rank", False: "no", True: "yes"}.get(default, default)
        shown = "from --init-share" if name == "init_std" else shown
        adapter.add_argument(flag(name), **kind, help=f"{', '.join(users)}: {HELP[name]} ({shown})")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--lr", type=float, help="peak learning rate (per method: one for the "
                                               "models that ship, another for larger ones)")
    loop.add_argument("--weight-decay", type=float, help="AdamW's (0)")
    loop.add_argument("--warmup", type=int, help="steps of linear warm-up (6 %% of the run)")
    loop.add_argument("--steps", type=int, help="optimizer steps (per task)")
    loop.add_argument("--epochs", type=float, help="instead of --steps")
    loop.add_argument("--batch-size", type=int, help="examples an optimizer step (per task)")
    loop.add_argument("--grad-accum", type=int, help="micro-batches that a batch is cut into (1)")
    loop.add_argument("--grad-checkpointing", action=BooleanOptionalAction,
                      help="compute each block again in backward: less memory, more time")
    loop.add_argument("--dtype", choices=PRECISIONS,
                      help="of the base model and, by autocast, of the products; adapters stay "
                           "fp32, and so do the weights of full (fp32)")
    loop.add_argument("--compile", action=BooleanOptionalAction,
                      help="torch.compile; needs a C++ compiler")
    loop.add_argument("--max-length", type=int, help=f"tokens of an example ({MAX_LENGTH})")
    loop.add_argument("--loss-on", choices=("answer", "all"), help="which tokens count (per task)")
    loop.add_argument("--seed", type=int,
                      help="of the adapters, the data order, dropout, the facts rewritten (0)")
    loop.add_argument("--device", type=device, help="cpu, cuda, cuda:1 (a GPU if there is one)")
    run = parser.add_argument_group("run")
    run.add_argument("--eval-every", type=int, help="steps between validations (a quarter)")
    run.add_argument("--skip-before", action=BooleanOptionalAction,
                     help="do not score the model before training")
    run.add_argument("--max-eval", type=int, help="score at most this many examples of a split")
    run.add_argument("--eval-batch-size", type=int, help="texts, or beams of them, scored at once: "
                                                         f"speed and memory only ({BATCH_SIZE})")
    run.add_argument("--save-every", type=int, help="steps between checkpoints (100)")
    run.add_argument("--snapshot-every", type=int,
                     help="steps between copies of the adapters, for analyze.py (none)")
    run.add_argument("--out", help="the run's folder (runs/<task>-<method>-r<rank>-s<seed>)")
    run.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    run.add_argument("--resume", action="store_true",
                     help="go on with the run in --out; with all its flags given, begin it if need "
                          "be: the same command again does what is left")
    return parser.parse_args(argv)


def unused_flags(method: str) -> list[str]:
    """The names of the flags that mean nothing to a method."""
    layer, own = METHODS[method].layer, METHODS[method].hyper
    unused = [name for name in HYPER if name not in own]
    if layer is None:
        unused += ADAPTER_FLAGS
    if layer is None or not layer.fast:
        unused.append("lr_ratio")
    return unused


def check(args: Namespace) -> None:
    """UserError for what is wrong in the flags themselves, before anything is loaded."""
    if args.from_peft is not None:
        for name in ("method", *ADAPTER_FLAGS):
            if getattr(args, name) is not None:
                raise UserError(f"{flag(name)}: --from-peft brings its own")
        args.method = peft_method(read_peft_config(args.from_peft))
    if args.method is None:
        raise UserError(f"--method is missing; known: {', '.join(METHODS)}")
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: unknown{nearest(args.method, METHODS)}")
    for name in unused_flags(args.method):
        if getattr(args, name) is not None:
            raise UserError(f"{flag(name)}: method {args.method} does not use it")
    if args.steps is not None and args.epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    for name in ("rank", "steps", "batch_size", "eval_batch_size", "grad_accum", "max_length",
                 "eval_every", "max_eval", "save_every", "snapshot_every", "epochs", "lr",
                 "lr_ratio"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 10 ** 7:
            raise UserError(f"{flag(name)} {getattr(args, name)}: must be above 0, below 10^7")
    for name, limit in (("weight_decay", math.inf), ("warmup", 10 ** 7), ("seed", 2 ** 32)):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < limit:
            raise UserError(f"{flag(name)} {getattr(args, name)}: must be from 0 to below {limit}")
    if args.out is not None and Path(args.out).exists():
        if not Path(args.out).is_dir():
            raise UserError(f"--out {args.out}: a file stands there")
        if visible(args.out) and not args.overwrite and not args.resume:
            raise UserError(f"--out {args.out} exists; --overwrite replaces it, --resume goes on")
        if args.overwrite and any(Path(args.out, name).exists()
                                  for name in ("config.json", *FILES)):
            read_config(args.out)       # only a run is overwritten, not a model's config.json


def as_flags(args: Namespace) -> list[str]:
    """The command that would give these resolved flags."""
    argv = []
    for name, value in vars(args).items():
        if value is True:
            argv.append(flag(name))
        elif value is False:
            argv += [flag(f"no_{name}")] * (name not in ("resume", "overwrite"))
        elif value is not None and name != "command":
            argv.append(f"{flag(name)}={value}")
    return argv


def fill(args: Namespace, defaults: dict) -> None:
    """Gives each flag that is still None its default."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def ships(model: str) -> bool:
    """It is the model of this repository, which each method's `lr` is for."""
    return Path(model).resolve() == BASE


def default_lr(method: str, model: str) -> float:
    return (not ships(model) and METHODS[method].large_lr) or METHODS[method].lr


def resolve(args: Namespace) -> None:
    """Fills in all that depends on neither the model nor the task."""
    method = METHODS[args.method]
    fill(args, {"model": str(BASE), "task": "facts"})
    fill(args, {"lr": default_lr(args.method, args.model), "weight_decay": 0.0, "grad_accum": 1,
                "seed": 0, "skip_before": False, "save_every": 100, "eval_batch_size": BATCH_SIZE, "dtype": "fp32",
                "grad_checkpointing": False, "compile": False, "device": default_device()})
    if method.layer is not None:
        fill(args, method.hyper | ({"lr_ratio": method.lr_ratio} if method.layer.fast else {}))
    if method.layer is not None and args.from_peft is None:
        fill(args, ADAPTER_FLAGS)
        fill(args, {"alpha": 2.0 * args.rank})
    if max(1.0, args.lr_ratio or 1.0) * args.lr > 1e3:
        raise UserError(f"--lr {args.lr}, --lr-ratio {args.lr_ratio}: a learning rate above 1000")
    fill(args, {name: default for name, default in options_of(args.task).items()
                if default is not Parameter.empty})
    # Found from any folder then:
    for name in ("model", "from_peft", "data", "data_dir", "prompt_template"):
        if getattr(args, name) and os.path.exists(getattr(args, name)):
            setattr(args, name, os.path.abspath(getattr(args, name)))


def verify(args: Namespace) -> None:
    """UserError: no run could have these flags, so its config.json was edited or damaged; or the
    GPU is gone."""
    path, given = f"{args.out}/config.json", Namespace(**vars(args))
    given.method = args.method if args.from_peft is None else None      # check() wants one of both,
    given.epochs = None                                                 # and of steps and epochs
    try:
        again = parse(as_flags(given))
        check(again)
        resolve(again)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    needed = {"steps", "batch_size", "warmup", "eval_every", "loss_on", "max_length"}
    for name, value in vars(again).items():
        own = getattr(args, name, None)
        if own != value and name != "epochs" or own is None and name in needed:
            raise UserError(f"{path}: {name} is {own!r}")
    if not isinstance(getattr(args, "command", None), str):
        raise UserError(f"{path}: has no command")


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
    if args.batch_size < args.grad_accum * world():
        raise UserError(f"--batch-size {args.batch_size}: cannot be cut into {args.grad_accum} "
                        f"micro-batches (--grad-accum) for each of {world()} processes")


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


class TargetLoss(nn.Module):
    """target_loss() in a --dtype, as a module: what can be compiled and run in processes."""

    def __init__(self, model, dtype: str):
        super().__init__()
        self.model, self.bf16 = model, dtype == "bf16"

    def forward(self, tokens, is_target):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            return target_loss(self.model, tokens, is_target)


def fit(model, sequences, args: Namespace, run: Run, validate) -> None:
    """The loop: batch, loss, backward, clip, step, on_step, zero_grad, log."""
    method, layers = contract(model)
    optimizer = torch.optim.AdamW(param_groups(model, args.lr, args.weight_decay,
                                               args.lr_ratio or 1.0))
    peaks = [group["lr"] for group in optimizer.param_groups]
    trainable = [p for p in model.parameters() if p.requires_grad]
    first = run.restore(model, optimizer) if args.resume else 0
    loss_of = TargetLoss(model, args.dtype)
    loss_of = parallel(torch.compile(loss_of) if args.compile else loss_of, method.idle)
    model.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step",
               disable=rank() > 0)
    with stop_requests() as asked_to_stop:
        for step in bar:
            factor = lr_factor(step, args.steps, args.warmup)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            batch = [sequences[i] for i in batch_at(step, len(sequences), args.batch_size,
                                                    args.seed)]
            targets = sum(len(s.tokens) - s.start for s in batch)
            loss = 0.0
            for micro, last in own_slices(batch, args.grad_accum):      # one, unless --grad-accum
                with meeting(loss_of, last):
                    part = loss_of(*collate(micro, args.device)) / targets
                    part.backward()
                loss += part.item()
            extra = method.extra_loss(layers)
            if torch.is_tensor(extra):
                extra.backward()
                extra = extra.detach()
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0).item()
            loss, stopping = summed([loss, asked_to_stop()], args.device)
            stop_unless_finite({"loss": loss, "extra loss": float(extra), "gradient norm": norm},
                               f"step {step}", step, run, bar)
            optimizer.step()
            method.on_step(layers, step, args.steps)
            optimizer.zero_grad()

            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            line = {"step": step, "loss": loss, "lr": args.lr * factor, "grad_norm": norm}
            if torch.is_tensor(extra):
                line["extra_loss"] = extra.item()
            done = step + 1
            validates = done % args.eval_every == 0 and done < args.steps
            snapshots = args.snapshot_every and done % args.snapshot_every == 0
            saves = done % args.save_every == 0 or done == args.steps or stopping
            if validates or snapshots or saves:
                stop_unless_finite(largest(model), f"step {step}", done, run, bar)
            if validates:
                line["valid"] = validate()
                stop_unless_finite(line["valid"], f"step {step}", done, run, bar)
            run.log(line)
            if snapshots:
                run.snapshot(model, done)
            if saves:
                run.checkpoint(model, optimizer, done)
            if stopping:
                bar.close()
                raise KeyboardInterrupt


def largest(model) -> dict[str, float]:
    """The largest absolute value of each tensor that trains; NaN where it holds one."""
    return {name: tensor.abs().max().item() for name, tensor in state(model).items()
            if tensor.is_floating_point()}


def stop_unless_finite(numbers: dict[str, float], when: str, done: int, run: Run,
                       bar=None) -> None:
    """Ends the run with status 1 if a number is not finite. They come from the weights after `done`
    steps, so a checkpoint of these is not one to go on from."""
    bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
    if not bad:
        return
    if bar is not None:
        bar.close()
    if rank() == 0:
        good = run.folder / (BEFORE if run.newest == done else NEWEST)
        own = run.replacing is None                     # else what is there is the older run's
        said = ", ".join(f"{name} {value}" for name, value in list(bad.items())[:3])
        print(f"error: {when}: {said}; " + "a lower --lr may help; " * (done > 0)
              + (f"the last good state is {good}" if own and good.exists() else
                 "no good state was saved"),
              file=sys.stderr)
    sys.exit(1)


def slices(batch: list, n: int) -> list[list]:
    """The batch as n contiguous slices of (nearly) equal length."""
    cuts = [i * len(batch) // n for i in range(n + 1)]
    return [batch[a:b] for a, b in zip(cuts, cuts[1:])]


def own_slices(batch: list, n: int) -> list[tuple[list, bool]]:
    """Of the batch as n slices for each process, those of this one; and whether it is the last."""
    own = slices(batch, n * world())[n * rank():n * (rank() + 1)]
    return [(micro, i == n - 1) for i, micro in enumerate(own)]


def shown(path: str) -> str:
    """A local path as one would type it here; a hub id as it is."""
    return os.path.relpath(path) if os.path.exists(path) else path


def print_header(args: Namespace, model, task, plan: str, cut: dict) -> dict[str, int]:
    """Says what will run -> the numbers of parameters, trainable and total."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    counts = {"trainable": trainable, "total": total}
    if rank() > 0:
        return counts
    print(f"{args.method} on {args.task}, from {shown(args.model)}, into {args.out}")
    print(f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)")
    if adapters(model):
        own = model.injected
        print(f"{len(adapters(model))} layers adapted: {args.targets or ','.join(own['targets'])}; "
              f"rank {own['rank']}, alpha {own['alpha']:g}, dropout {own['dropout']:g}"
              + "".join(f", {name} {getattr(args, name)}" for name in METHODS[args.method].hyper
                        if getattr(args, name) is not None)
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
    large = not ships(args.model) and args.lr == METHODS[args.method].large_lr
    whose = f" ({METHODS[args.method].large_lr_from} for large models)" if large else ""
    print(f"{args.steps} steps of {args.batch_size}, learning rate {args.lr:g}{whose}, "
          f"warm-up {args.warmup}, seed {args.seed}, {args.dtype}, {args.device}"
          + (f", {world()} processes" if world() > 1 else ""))
    return counts


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.out is not None and (not args.out or args.out.startswith("-")):
        raise UserError(f"--out {args.out}: must not be empty or begin with -")
    if args.resume and (args.out is None or args.overwrite):
        raise UserError("--resume needs --out FOLDER, the run to go on with, and no --overwrite")
    asked = args.method is not None or args.from_peft is not None
    if args.resume and (not asked or visible(args.out)):
        args = resumed(args)
        verify(args)
    else:
        check(args)
        args.resume = False
        resolve(args)
        args.command = shlex.join(["python", script(argv), *(sys.argv[1:] if argv is None else
                                                             argv)])
    start(args.device)
    everyones(None)             # all have seen that --out is free, before the first makes it
    run = Run()
    try:
        train(args, run)
    except KeyboardInterrupt:
        if rank() == 0:
            launcher = "python" if world() == 1 else f"torchrun --nproc-per-node {world()}"
            print("stopped; " + (f"{launcher} {script(argv)} --resume --out {shlex.quote(args.out)} goes "
                                 "on" if run.begun else "the run had not begun"), file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        raise explained(error)
    finally:
        run.release()


def script(argv: list[str] | None) -> str:
    """What was started: train.py, or a file of one's own that adds a method to METHODS."""
    return "train.py" if argv is not None else os.path.relpath(sys.argv[0])


def explained(error: RuntimeError) -> Exception:
    """What the user can do about it, where torch's error tells."""
    from torch._dynamo.exc import TorchDynamoException      # which takes a second to import
    what = " ".join(str(error).split())[:300]
    if isinstance(error, TorchDynamoException):
        return UserError(f"--compile: {what}")
    if out_of_memory(error):
        return UserError(f"out of memory; a smaller --batch-size, --grad-accum, "
                         f"--grad-checkpointing or --max-length may help: {what}")
    if world() > 1 and (isinstance(error, torch.distributed.DistError) or "Connection" in what):
        return UserError(f"another process has ended: {what}")
    return error


def adapt(model, args: Namespace) -> None:
    """Puts the adapters in; fills in what r1, r2 and init_rank come to."""
    method = METHODS[args.method]
    hyper = {name: getattr(args, name) for name in method.hyper}
    if args.from_peft is not None:
        import_peft(model, args.from_peft, **hyper)
    elif method.layer is None:
        inject(model, args.method)
    else:
        inject(model, args.method, args.targets.split(","), args.rank, args.alpha, args.dropout,
               **hyper)
    vars(args).update({name: model.injected[name] for name in hyper})


def train(args: Namespace, run: Run) -> None:
    began = time.time()
    dtype = weights_dtype(args.dtype, args.method)
    model, tokenizer, args.max_length = open_model(args.model, args.device, args.max_length, dtype)
    began_with = {"base": fingerprint(model.state_dict(), dtype), "processes": world()}
    torch.manual_seed(args.seed)
    adapt(model, args)                          # first what may be refused, then what takes minutes
    began_with["adapters"] = [model.injected, fingerprint(state(model), torch.float32)]
    if rank() > 0:                              # the adapters are the same, their dropout is not
        torch.manual_seed(args.seed + rank() * 2 ** 32)
    model.checkpointing = args.grad_checkpointing
    kind, layers = contract(model)
    task = load_task(args.task, tokenizer, args.max_length, **options_in(args))
    resolve_task(args, task)
    plan = kind.plan(layers, args.steps)
    sequences, unseen = (encode_all(split, tokenizer, model, args.max_length, loss_on=args.loss_on)
                         for split in (task.train, sample(task.valid, args.max_eval)))
    held_out = {split: [task.sequences(e, tokenizer, model) for e in getattr(task, split)]
                for split in ("valid", "test")}
    cut = {"train": sum(s.cut for s in sequences),
           "held out": sum(any(s.cut for s in of_example) for of_split in held_out.values()
                           for of_example in of_split)}
    for split, tokens in {"train": sequences, **held_out}.items():
        began_with[f"{split}_data"] = data_fingerprint(getattr(task, split), tokens)

    run.claim(args)
    if args.resume:
        check_same(args.out, **began_with)
    counts = print_header(args, model, task, plan, cut)

    def scores(split: str):
        return score(model, tokenizer, task, args.max_eval, split, args.eval_batch_size)

    def validate() -> dict[str, float]:
        """The task's metrics, and the loss a target token."""
        found = score_targets(model, unseen, args.eval_batch_size)
        loss = sum(s.loss for s in found) / sum(s.tokens for s in found)
        return {"loss": loss} | scores("valid").values

    if args.resume:
        before = read_config(args.out)["before"]
    else:
        before = None if args.skip_before else scores("test").values
        stop_unless_finite(before or {}, "before training", 0, run)
        run.begin({"args": vars(args), "versions": versions(), "before": before, **began_with},
                  args.overwrite)
    fit(model, sequences, args, run, validate)
    after, valid = scores("test"), validate()
    stop_unless_finite(after.values | valid, "after training", args.steps, run)
    if rank() > 0:
        return
    save(model, run.folder / "adapter.safetensors")
    run.finish({
        "method": args.method, "task": args.task, **counts,
        "before": before, "after": after.values, "counts": after.counts,
        "valid": valid, "seconds": round(time.time() - began, 1),
        "peak_memory_mb": peak_memory_mb(args.device), "loss_on": args.loss_on, "seed": args.seed,
        "cut": cut, "notes": task.notes, "base": began_with["base"], "versions": versions(),
        "command": args.command})
    print(f"{'':20}{'before':>12}{'after':>12}")
    for name, value in after.values.items():
        print(f"{name:20} " + (f"{before[name]:11.4f}" if before else f"{'-':>11}")
              + f" {value:11.4f}")
    example = next((e for e in task.test if isinstance(e, Example) and "\n" not in e.prompt), None)
    print(f"{time.time() - began:.0f} s; loss on {args.loss_on}; all of it in {run.folder}; next:")
    if not is_listed(args.method):
        print(f"  (once {METHODS[args.method].layer.__name__} stands in methods.py, where eval.py "
              "and convert.py look for it)")
    print(f"  python eval.py --run {shlex.quote(args.out)}"
          + (f" --prompt {shlex.quote(example.prompt)}" if example else ""))


if __name__ == "__main__":
    main()
