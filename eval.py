"""Scores a run or a model, or shows an answer before and after fine-tuning.

    python eval.py --run runs/facts-dual-r8-s0             repeats the score that the run stored
    python eval.py --run runs/facts-dual-r8-s0 --prompt "Tilda Pelfield lives in"
    python eval.py --model data/base --task facts          a pretrained model as it is
"""
import json
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import torch

from common import Parser, UserError, default_device, device, exit_on_user_error
from convert import load_pretrained
from data import TASKS, load_task
from data.task import Task
from generate import generate
from methods import load


def score(model, tokenizer, task: Task, max_eval: int | None = None, split: str = "test",
          batch_size: int = 128) -> dict[str, float]:
    """metric -> value on a task's split, or on at most `max_eval` of its examples."""
    examples = getattr(task, split)
    if max_eval is not None and max_eval < len(examples):
        examples = sample(examples, max_eval)
    return task.score(model, tokenizer, examples, batch_size, task.max_length)


def sample(examples: list, n: int) -> list:
    """n examples, as many of each group, spread evenly over it (at least one of each)."""
    groups = defaultdict(list)
    for example in examples:
        groups[getattr(example, "group", "")].append(example)
    share = max(1, n // len(groups))
    return [group[i * len(group) // share] for group in groups.values()
            for i in range(min(share, len(group)))]


def print_scores(**columns: dict[str, float]) -> None:
    """A table with a row for each metric and a column for each dictionary."""
    print(" " * 14 + "".join(f"{title:>12}" for title in columns))
    for name in next(iter(columns.values())):
        print(f"{name:14}" + "".join(f"{values[name]:12.4f}" for values in columns.values()))


def answer(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """What greedy decoding writes after the prompt."""
    ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(prompt)
    room = model.config.max_positions - len(ids)
    if room < 1:
        raise UserError(f"--prompt: its {len(ids)} tokens fill all of the model's positions")
    return tokenizer.decode(generate(model, [ids], min(max_new_tokens, room))[0])


def read_run(folder: str) -> Namespace:
    """The resolved flags of a run, from its config.json."""
    path = Path(folder) / "config.json"
    try:
        args = json.loads(path.read_text(encoding="utf-8"))["args"]
        for name in ("model", "task", "data", "max_length", "max_eval"):
            args[name]
        return Namespace(**args)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a run folder, it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the config.json of a run: {error!r}") from None


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to look at")
    what.add_argument("--run", help="folder that train.py wrote")
    what.add_argument("--model", help="instead: HF-layout folder, or owner/name on the hub")
    what.add_argument("--task", help=f"with --model: {', '.join(TASKS)}")
    what.add_argument("--data", help="with --model and --task text or jsonl: the file")
    what.add_argument("--max-length", type=int, help="with --model: tokens of an example (256)")
    how = parser.add_argument_group("how")
    how.add_argument("--max-eval", type=int, help="score at most this many examples")
    how.add_argument("--batch-size", type=int, default=128, help="changes the speed only (128)")
    how.add_argument("--prompt", help="show the greedy answer to this text, score nothing")
    how.add_argument("--max-new-tokens", type=int, default=48, help="of that answer (48)")
    how.add_argument("--device", type=device, default=default_device(), help="cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.model is None):
        raise UserError("give one of --run FOLDER and --model PATH")
    for flag in ("task", "data", "max_length"):
        if args.run is not None and getattr(args, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}: a run has its own; use it with --model")
    if args.model is not None and args.task is None and args.prompt is None:
        raise UserError("--model needs --task NAME or --prompt TEXT")
    for flag in ("max_length", "max_eval", "batch_size", "max_new_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    return args


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = args if args.run is None else read_run(args.run)
    model, tokenizer = load_pretrained(run.model, torch.float32, args.device)
    if tokenizer is None:
        raise UserError(f"{run.model}: the folder holds no tokenizer")
    if args.prompt is not None:
        before = answer(model, tokenizer, args.prompt, args.max_new_tokens)
        print(f"before:{before}" if args.run else before)
        if args.run:
            load(model, Path(args.run) / "adapter.safetensors")
            print(f"after: {answer(model, tokenizer, args.prompt, args.max_new_tokens)}")
        return
    max_length = min(256 if run.max_length is None else run.max_length, model.config.max_positions)
    task = load_task(run.task, tokenizer, max_length, run.data)
    if args.run:
        load(model, Path(args.run) / "adapter.safetensors")
    max_eval = run.max_eval if args.max_eval is None else args.max_eval
    print_scores(score=score(model, tokenizer, task, max_eval, batch_size=args.batch_size))


if __name__ == "__main__":
    main()
