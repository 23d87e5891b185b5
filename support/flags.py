"""The flags of train.py: what they are, which go together, and what stands for one not given."""
import math
import os
from argparse import BooleanOptionalAction, Namespace
from inspect import Parameter
from pathlib import Path

from data import OPTIONS, TASKS, options_of
from data.task import BATCH_SIZE
from formats.checkpoint import MAX_LENGTH
from formats.peft import import_peft, peft_method, read_peft_config
from methods import METHODS, inject
from support.errors import UserError, nearest
from support.parser import Parser, default_device, device, flag
from support.processes import world
from support.run import FILES, PRECISIONS, ROOT, read_config, visible

BASE = ROOT / "data" / "base"
ADAPTER_FLAGS = {"rank": 8, "alpha": None, "dropout": 0.0, "targets": "q,k,v,up,down"}
# Every method's own hyperparameters, each said once, on its class: name -> (default, help, ...).
OPTIONS_OF_METHODS = {name: option for method in METHODS.values()
                      for name, option in method.options.items()}


def parse(argv: list[str] | None, doc: str = "") -> Namespace:
    parser = Parser(doc)
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
    for name, (default, words, *kind) in OPTIONS_OF_METHODS.items():
        users = ", ".join(key for key, method in METHODS.items() if name in method.options)
        how = (dict(action=BooleanOptionalAction) if isinstance(default, bool) else
               dict(type=kind[0] if kind else type(default)))
        shown = {None: "", False: " (no)", True: " (yes)"}.get(default, f" ({default})")
        adapter.add_argument(flag(name), **how, help=f"{users}: {words}{shown}")
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
    layer, own = METHODS[method].layer, METHODS[method].options
    unused = [name for name in OPTIONS_OF_METHODS if name not in own]
    if layer is None:
        unused += ADAPTER_FLAGS
    if layer is None or not layer.lr_ratio_parameters:
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
                "seed": 0, "skip_before": False, "save_every": 100,
                "eval_batch_size": BATCH_SIZE, "dtype": "fp32",
                "grad_checkpointing": False, "compile": False, "device": default_device()})
    if method.layer is not None:
        fill(args, method.defaults | (
            {"lr_ratio": method.lr_ratio} if method.layer.lr_ratio_parameters else {}))
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


def adapt(model, args: Namespace) -> None:
    """Puts the adapters in; fills in what r1, r2 and init_rank come to."""
    method = METHODS[args.method]
    hyper = {name: getattr(args, name) for name in method.options}
    if args.from_peft is not None:
        import_peft(model, args.from_peft, **hyper)
    elif method.layer is None:
        inject(model, args.method)
    else:
        inject(model, args.method, args.targets.split(","), args.rank, args.alpha, args.dropout,
               **hyper)
    vars(args).update({name: model.injected[name] for name in hyper})
