"""Defines the flags of train.py: reads them, checks them and fills in what was left out."""
import math
import os
from argparse import BooleanOptionalAction, Namespace
from inspect import Parameter
from pathlib import Path

import torch

from data import (ADAPTERS, BASE, ENCODER, LABELS, OPTIONS, PICTURES, TASKS, base_of,
                  checked_options, options_in, options_of)
from data.recipes import RECIPES, recipe
from data.task import BATCH_SIZE
from dora import MagnitudeLinear
from formats.checkpoint import MAX_LENGTH
from formats.peft import import_peft
from formats.peft_files import find_adapters, read_peft_config
from lora import LoRALinear
from methods import METHODS, adapters, inject, settled, state, train_whole
from support.errors import UserError, nearest
from support.heads import DROPOUTS, dropouts, give_head, set_dropout
from support.parser import Parser, default_device, device, flag
from support.processes import process_count
from support.run import CHECKPOINT, FILES, PRECISIONS, Flags, fingerprint, read_config, visible

TARGETS = "q,k,v,up,down"
ADAPTER_FLAGS = ("rank", "alpha", "dropout", "targets", "dora")
PEFTS_OWN = (*ADAPTER_FLAGS, *LoRALinear.options)           # which --from-peft brings
# Shares of the rates for data/base: on data/encoder the head learns at them too.
LR_SHARES = {BASE: 1.0, ENCODER: 0.3, PICTURES: 0.6}
# The hyperparameters of all methods: name -> (default, help, ...), as each class declares them.
OPTIONS_OF_METHODS = {name: option for method in METHODS.values()
                      for name, option in method.options.items()}


def parse_flags(argv: list[str] | None, doc: str = "") -> Namespace:
    """Reads the flags; raises UserError if one is unknown or cannot be read.

    `lora --dora` is read as `dora`.
    """
    parser = Parser(doc)
    what = parser.add_argument_group("model and data")
    what.add_argument("--method", help=f"train by this method: {', '.join(METHODS)}")
    what.add_argument("--model", help="start from this folder in Hugging Face's layout, or "
                      "owner/name on the hub (data/base; mini-nlu: data/encoder; subject: "
                      "data/pictures)")
    what.add_argument("--task", default="facts",
                      help=f"train on and score by this task: {', '.join(TASKS)} (facts)")
    for name, how in OPTIONS.items():
        what.add_argument(flag(name), **how)
    what.add_argument("--recipe", help=f"fill in the flags that are left out as a paper has them "
                                       f"for GLUE: {', '.join(RECIPES)} (data/recipes.py)")
    what.add_argument("--from-peft", metavar="DIR", help="go on from adapters that PEFT saved, in "
                      "a folder or on the hub, with their method, rank, alpha, dropout, targets "
                      "and scaling")
    adapter = parser.add_argument_group("adapters (every method but full)")
    adapter.add_argument("--rank", type=int, default=8,
                         help="train as many parameters as LoRA of this rank; adalora: on average, "
                              "at the end (8; subject: 4)")
    adapter.add_argument("--alpha", type=float,
                         help="scale the update by this; hira has no scale (2 x rank)")
    adapter.add_argument("--dropout", type=float, default=0.0,
                         help="set this share of the adapter's input to 0 in training (0)")
    adapter.add_argument("--targets", default=TARGETS,
                         help="adapt the layers whose names end so, comma-separated; PEFT's names, "
                              "such as q_proj and all-linear, do too "
                              f"({TARGETS}; subject: q,k,v,o)")
    adapter.add_argument("--dora", action=BooleanOptionalAction, default=False,
                         help="put DoRA's magnitude over the method's update: W' = m W / ||W||, "
                              "W = W0 + dW (no)")
    adapter.add_argument("--lr-ratio", type=float, help="multiply the learning rate of B (dual, "
                             "loha: B and D) by this (1; lora+ 16)")
    for name, (default, words, *kind) in OPTIONS_OF_METHODS.items():
        users = ", ".join(key for key, method in METHODS.items() if name in method.options)
        if isinstance(default, bool):
            how, value = dict(action=BooleanOptionalAction), f" ({'yes' if default else 'no'})"
        else:
            how = (dict(choices=kind[0]) if kind and isinstance(kind[0], tuple) else
                   dict(type=kind[0] if kind else type(default)))
            value = "" if default is None else f" ({default})"
        adapter.add_argument(flag(name), **how, help=f"{users}: {words}{value}")
    loop = parser.add_argument_group("loop")
    loop.add_argument("--base-dropout", type=float, help="encoders: set this share of numbers to 0 "
                      "in training, after each layer and in attention (the checkpoint's own)")
    loop.add_argument("--head-dropout", type=float, help="encoders: the same in the head for "
                      "labels (the checkpoint's own)")
    loop.add_argument("--lr", type=float, help="set the peak learning rate (the method's own, "
                                               "another for data/base than for larger models)")
    loop.add_argument("--weight-decay", type=float, default=0.0,
                      help="set AdamW's weight decay (0)")
    loop.add_argument("--warmup", type=int,
                      help="raise the learning rate over the first N steps (6 %% of the run)")
    loop.add_argument("--steps", type=int, help="take N optimizer steps (per task)")
    loop.add_argument("--epochs", type=float,
                      help="go X times through the data, instead of --steps")
    loop.add_argument("--batch-size", type=int, help="use N examples for a step (per task)")
    loop.add_argument("--grad-accum", type=int, default=1,
                      help="cut a batch into N micro-batches (1)")
    loop.add_argument("--grad-checkpointing", action=BooleanOptionalAction, default=False,
                      help="compute each block again in backward: less memory, more time (no)")
    loop.add_argument("--dtype", choices=PRECISIONS, default="fp32",
                      help="hold the base model and multiply in this precision; adapters, and the "
                           "weights of full, stay fp32 (fp32)")
    loop.add_argument("--compile", action=BooleanOptionalAction, default=False,
                      help="use torch.compile, which needs a C++ compiler (no)")
    loop.add_argument("--max-length", type=int,
                      help=f"cut the prompt's start off where an example is longer than N tokens "
                           f"({MAX_LENGTH})")
    loop.add_argument("--loss-on", choices=("answer", "all"),
                      help="train on the answer's tokens, or on the prompt's too (per task; a head "
                           "trains on labels)")
    loop.add_argument("--seed", type=int, default=0,
                      help="seed the adapters, data order, dropout and facts to rewrite (0)")
    loop.add_argument("--device", type=device, default=default_device(),
                      help="run on cpu, cuda or cuda:1 (a GPU if there is one)")
    run = parser.add_argument_group("run")
    run.add_argument("--eval-every", type=int, help="validate every N steps (a quarter of the run)")
    run.add_argument("--skip-before", action=BooleanOptionalAction, default=False,
                     help="do not score the model before training (no)")
    run.add_argument("--max-eval", type=int, help="score about N examples of a split (all)")
    run.add_argument("--eval-batch-size", type=int, default=BATCH_SIZE,
                     help=f"score N texts, or beams of them, at once; changes speed and memory "
                          f"only ({BATCH_SIZE})")
    run.add_argument("--save-every", type=int, default=100,
                     help="write a checkpoint every N steps (100)")
    run.add_argument("--snapshot-every", type=int,
                     help="copy the adapters every N steps, for experiments.analyze (never)")
    run.add_argument("--out", help="write into this folder (runs/<task>-<method>-r<rank>-s<seed>, "
                                   "with a number behind it if that is taken)")
    run.add_argument("--overwrite", action="store_true",
                     help="rename the run that is in --out to NAME.old, and begin anew")
    run.add_argument("--resume", action="store_true",
                     help="go on with the run in --out. A whole command with --resume can be "
                          "given again and again: it begins the run, goes on or is done")
    args = parser.parse_args(argv)
    args.model = args.model or str(base_of(args.task))
    for name, value in ADAPTERS.get(args.task, {}).items():
        if name not in args.given:
            setattr(args, name, value)
    args.targets = ",".join(name.strip() for name in args.targets.split(","))
    for name in ("model", "from_peft", "data", "data_dir", "prompt_template"):
        if getattr(args, name) and os.path.exists(getattr(args, name)):
            setattr(args, name, os.path.abspath(getattr(args, name)))   # found from any folder
    if args.dora and args.method in METHODS:
        args.method, args.dora = settled(args.method, args.dora)
        if not args.dora:
            args.given.discard("dora")      # `lora --dora` is `dora`, which has no such flag
    return args


def unused_flags(method: str) -> list[str]:
    """Lists the flags that a method does not use."""
    layer, options = METHODS[method].layer, METHODS[method].options
    unused = [name for name in OPTIONS_OF_METHODS if name not in options]
    if layer is None:
        unused += ADAPTER_FLAGS
    elif issubclass(layer, MagnitudeLinear):
        unused.append("dora")
    if layer is not None and not layer.uses_alpha:
        unused.append("alpha")
    if layer is None or not layer.lr_ratio_parameters:
        unused.append("lr_ratio")
    return unused


def check_flags(args: Namespace) -> None:
    """Raises UserError if a flag is wrong, before anything is loaded."""
    if args.from_peft is not None:
        for name in ("method", *PEFTS_OWN):
            if name in args.given:
                raise UserError(f"{flag(name)}: --from-peft brings its own")
        args.method = read_peft_config(find_adapters(args.from_peft)).method
    if args.method is None:
        raise UserError(f"--method is missing; known: {', '.join(METHODS)}")
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: unknown{nearest(args.method, METHODS)}")
    for name in unused_flags(args.method):
        if name in args.given:
            raise UserError(f"{flag(name)}: method {args.method} does not use it")
    checked_options(args.task, options_in(args))
    if args.recipe is not None:
        follow_recipe(args)
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
    for name in DROPOUTS:
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            raise UserError(f"{flag(name)} {getattr(args, name)}: must be from 0 to below 1")
    lr, ratio = (args.lr or default_lr(args.method, args.model)), args.lr_ratio or 1.0
    if max(1.0, ratio) * lr > 1e3:
        raise UserError(f"--lr {lr}, --lr-ratio {ratio}: a learning rate above 1000")
    if args.out is not None and Path(args.out).exists():
        if not Path(args.out).is_dir():
            raise UserError(f"--out {args.out}: a file stands there")
        if visible(args.out) and not args.overwrite and not args.resume:
            raise UserError(f"--out {args.out} exists; --overwrite sets it aside, --resume goes on")
        if args.overwrite and any(Path(args.out, name).exists()
                                  for name in ("config.json", *FILES)):
            read_config(args.out)       # only a run is overwritten, not a model's config.json


def follow_recipe(args: Namespace) -> None:
    """Fills in the flags of --recipe that the user left out and the method uses.

    Raises UserError if there is no such recipe for the task.
    """
    decided = args.given | set(unused_flags(args.method))
    decided |= set(PEFTS_OWN) if args.from_peft is not None else set()
    decided |= {"epochs"} if args.steps is not None else set()
    for name, value in recipe(args.recipe, args.task).items():
        if name not in decided:
            setattr(args, name, value)


def ships(model: str) -> bool:
    """Says whether a model comes with this project."""
    return Path(model).resolve() in LR_SHARES


def default_lr(method: str, model: str) -> float:
    """Returns a method's learning rate for a model, used if --lr is not given."""
    chosen = METHODS[method]
    if ships(model) or chosen.large_lr is None:
        return LR_SHARES.get(Path(model).resolve(), 1.0) * chosen.lr
    return chosen.large_lr


def adapt(model, args: Namespace) -> list:
    """Puts the head and the adapters that the flags ask for into the model.

    Returns what record() does, for config.json. Raises UserError if model and flags do not go
    together.
    """
    whole = give_head(model, args.task, args.head)
    set_dropout(model, args)
    method = METHODS[args.method]
    options = {name: value for name in method.options
               if (value := getattr(args, name)) is not None}
    if args.from_peft is not None and args.resume and not (
            Path(args.from_peft) / "adapter_config.json").exists():
        return adapt_again(model, args, options)
    if args.from_peft is not None:
        import_with_head(model, args, options)
    elif method.layer is None:
        inject(model, args.method, whole=whole)
    else:
        alpha = 2.0 * args.rank if args.alpha is None else args.alpha
        inject(model, args.method, args.targets, args.rank, alpha, args.dropout, whole,
               bool(args.dora), **options)
    return record(model, args)


def record(model, args: Namespace) -> list:
    """Returns model.injected, and a fingerprint of what --from-peft brought, else None.

    What a method draws or computes may differ in its last bits on another machine.
    """
    read = args.from_peft is not None
    return [model.injected, fingerprint(state(model), torch.float32) if read else None]


def import_with_head(model, args: Namespace, options: dict) -> None:
    """Puts PEFT's adapters into the model; their head for labels stays if it fits the task.

    Raises UserError if they bring a head and the task needs none.
    """
    import_peft(model, args.from_peft, **options)
    whole = give_head(model, args.task, args.head)
    if model.injected.get("whole") and not whole:
        raise UserError(f"--from-peft {args.from_peft}: brings a head for labels, for which task "
                        f"{args.task} has no use" + " without --head" * (args.task in LABELS))
    train_whole(model, whole)


def adapt_again(model, args: Namespace, options: dict) -> list:
    """Does adapt() for a resumed run of --from-peft whose folder is gone, or was on the hub.

    The run's config.json has what inject() needs. The adapters' values come from its checkpoint.
    Raises UserError if there is no checkpoint, and no adapters on the hub either.
    """
    if not (Path(args.out) / CHECKPOINT).exists():
        try:
            import_with_head(model, args, options)
        except UserError as error:
            raise UserError(f"{args.out}: has no checkpoint yet, so it needs --from-peft again: "
                            f"{error}") from None
        return record(model, args)
    began = read_config(args.out).get("adapters")
    try:
        inject(model, **began[0])
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{args.out}/config.json: adapters: {error}") from None
    return began


def resolve(args: Namespace, model, task) -> Flags:
    """Fills in the flags that the user left out, from the method, its layers and the task.

    A flag that the run does not use becomes None. Raises UserError if a batch has too few examples
    to be cut for --grad-accum and the processes.
    """
    flags, method = dict(vars(args)), METHODS[args.method]
    flags.pop("given", None)

    def fill(**defaults) -> None:
        flags.update({name: value for name, value in defaults.items() if flags[name] is None})

    layers = list(adapters(model).values())
    if args.from_peft is None and layers:
        fill(alpha=model.injected.get("alpha"))
    fill(lr=default_lr(args.method, args.model), lr_ratio=method.lr_ratio,
         **{name: getattr(layers[0], name) for name in method.options},
         **{name: default for name, default in options_of(args.task).items()
            if default is not Parameter.empty})
    flags |= dict.fromkeys(unused_flags(args.method))
    flags |= dict.fromkeys(PEFTS_OWN) if args.from_peft is not None else {}
    flags |= dict(max_length=task.setup.max_length, loss_on=task.loss_on)
    flags |= dict.fromkeys(DROPOUTS) | dropouts(model)
    fill(batch_size=task.defaults["batch_size"])
    if flags["steps"] is None:
        epochs = args.epochs or task.defaults.get("epochs")
        flags["steps"] = (task.defaults["steps"] if epochs is None
                          else math.ceil(epochs * len(task.train) / flags["batch_size"]))
    fill(warmup=flags["steps"] * 6 // 100, eval_every=math.ceil(flags["steps"] / 4))
    if flags["batch_size"] < args.grad_accum * process_count():
        raise UserError(f"--batch-size {flags['batch_size']}: cannot be cut into {args.grad_accum} "
                        f"micro-batches (--grad-accum) for each of {process_count()} processes")
    return Flags(**flags)
