"""Prints what train.py says: before a run, after it, and when it ends early."""
import os
import shlex
import sys
from argparse import Namespace

import torch

from data.recipes import recipe
from data.task import Task
from methods import METHODS, adapters, is_listed
from support.errors import NotFinite, UserError, out_of_memory
from support.flags import ships
from support.heads import dropouts
from support.processes import process_count
from support.run import CHECKPOINT, Run


def print_header(args: Namespace, run: Run, model, task: Task, plan: str, counts: dict) -> None:
    """Prints what will run: the model, the adapters, the data and the training."""
    name = os.path.relpath(args.model) if os.path.exists(args.model) else args.model
    dora = " with DoRA" if args.dora else ""
    print(f"{args.method}{dora} on {args.task}, from {name}, into {run.folder}")
    share = 100 * counts["trainable"] / counts["total"]
    print(f"trainable {counts['trainable']:,} of {counts['total']:,} parameters ({share:.2f} %)"
          + f", {counts['whole']:,} of them in whole modules" * (counts["whole"] > 0))
    if adapters(model):
        own, method = model.injected, METHODS[args.method]
        print(f"{len(adapters(model))} layers adapted: {args.targets or ','.join(own['targets'])}; "
              f"rank {span(own['rank'])}"
              + (f", alpha {span(own['alpha'])}" if "alpha" in own else "")
              + f", dropout {own['dropout']:g}"
              + "".join(f", {name} {getattr(args, name)}" for name in method.options
                        if getattr(args, name) is not None)
              + (f", lr_ratio {args.lr_ratio:g}" if method.layer.lr_ratio_parameters else ""))
    if own := dropouts(model):
        print("base dropout {base_dropout:g}, head dropout {head_dropout:g}".format(**own))
    if args.recipe is not None:
        same = {name: value for name, value in recipe(args.recipe, args.task).items()
                if getattr(args, name) == value}
        print(f"recipe {args.recipe}: " + ", ".join(
            f"{name} {value if isinstance(value, str) else f'{value:g}'}"
            for name, value in same.items()))
    if plan:
        print(plan)
    print(f"{len(task.train)} train, {len(task.valid)} valid, {len(task.test)} test examples; "
          f"loss on {args.loss_on}"
          + (f"; about {args.max_eval} of each split are scored" if args.max_eval else ""))
    for what, happens in (("cut", f"are cut to --max-length {args.max_length}"),
                          ("apart", "have a target that the tokenizer would join to the prompt's "
                                    "end; it stands apart")):
        if any(numbers := counts.get(what, {}).values()):
            print("{} train and {} other examples".format(*numbers), happens)
    for name in ("trained_on", "missing", "held_out", "chat"):
        if name in task.notes:
            print(f"{name}: {task.notes[name]}")
    large = not ships(args.model) and args.lr == METHODS[args.method].large_lr
    whose = f" ({METHODS[args.method].large_lr_from} for large models)" if large else ""
    print(f"{args.steps} steps of {args.batch_size} examples, peak learning rate {args.lr:g}{whose}"
          f" reached after {args.warmup} steps, seed {args.seed}, {args.dtype}, {args.device}"
          + (f", {process_count()} processes" if process_count() > 1 else ""))


def span(value) -> str:
    """Writes a number; for a dict of numbers, its smallest and its largest."""
    low, high = (f"{end(value.values()) if isinstance(value, dict) else value:g}"
                 for end in (min, max))
    return low if low == high else f"{low} to {high}"


def print_result(args: Namespace, run: Run, task: Task, before: dict | None, after: dict,
                 seconds: float) -> None:
    """Prints the scores before and after, what each means, and a next command."""
    explained_kinds, width = set(), max(20, *map(len, after))
    print(f"{'':{width}}{'before':>12}{'after':>12}")
    for name, value in after.items():
        kind = name.partition("/")[0]
        meaning = "" if kind in explained_kinds else task.meaning.get(kind, "")
        explained_kinds.add(kind)
        print((f"{name:{width}} " + (f"{before[name]:11.4f}" if before else f"{'-':>11}")
               + f" {value:11.4f}   {meaning}").rstrip())
    print(f"{seconds:.0f} s; loss on {args.loss_on}; results in {run.folder}; next:")
    if not is_listed(args.method):
        print(f"  (first add {args.method} to methods.py: eval.py and convert.py look there)")
    print(f"  python eval.py --run {shlex.quote(str(run.folder))} {task.look}")


def script(argv: list[str] | None) -> str:
    """Returns the name of the program: train.py, or a file that adds a method to METHODS."""
    return "train.py" if argv is not None else os.path.relpath(sys.argv[0])


def last_words(stop: KeyboardInterrupt | NotFinite, run: Run, program: str) -> str:
    """Says why a run ended early, and how to go on with it."""
    if isinstance(stop, NotFinite):
        hint = "; a lower --lr may help" * str(stop).startswith("step")
        kept = run.folder / CHECKPOINT
        return f"error: {stop}{hint}; " + (f"the last checkpoint is {kept}" if kept.exists() else
                                           "no checkpoint was saved")
    launcher = "python" if process_count() == 1 else f"torchrun --nproc-per-node {process_count()}"
    return "stopped; " + (f"{launcher} {program} --resume --out {shlex.quote(str(run.folder))} "
                          "goes on" if run.begun else "the run had not begun")


def explained(error: RuntimeError) -> Exception:
    """Returns a UserError for an error of torch that the user can do something about.

    Any other error is returned as it is.
    """
    from torch._dynamo.exc import TorchDynamoException  # here, since the import takes a second
    what = " ".join(str(error).split())[:300]
    if isinstance(error, TorchDynamoException):
        return UserError(f"--compile: {what}")
    if out_of_memory(error):
        return UserError(f"out of memory; a smaller --batch-size, --grad-accum, "
                         f"--grad-checkpointing or --max-length may help: {what}")
    if process_count() > 1 and (isinstance(error, torch.distributed.DistError)
                                or "Connection" in what):
        return UserError(f"another process has ended: {what}")
    return error
