"""Scores a run or a model, or shows its answer to a prompt.

    python eval.py --run runs/facts-dual-r8-s0           # repeats the score that the run stored
    python eval.py --run runs/facts-dual-r8-s0 --prompt "Tilda Pelfield lives in"
    python eval.py --run runs/mini-dora-r8-s0 --predictions out.jsonl   # writes every answer too
    python eval.py --model data/base --task facts        # a pretrained model as it is
    torchrun --nproc-per-node 2 eval.py --model data/base --task mini    # two processes share it
Every share has a 95 % confidence interval beside it (Wilson's). It comes from the number of items
alone, and does not count how much runs of different seeds differ.
"""
import json
import math
import re
from argparse import Namespace
from pathlib import Path

from data import OPTIONS, TASKS, load_task, options_in
from data.dreambooth import draw_one
from data.sheets import save_sheet
from data.subject import draw_four
from data.task import BATCH_SIZE, Scores, Sequence, Setup, encode_start, sample
from diffusion import PictureModel
from encoder import Encoder
from formats.checkpoint import MAX_LENGTH, open_model
from formats.sdxl import SDXL
from generate import generate
from support.errors import NotFinite, UserError, exit_on_user_error, require, stop_unless_finite
from support.files import atomic_write, new_file
from support.heads import give_head
from support.parser import Parser, default_device, device, flag
from support.processes import is_main, join_processes
from support.run import PRECISIONS, check_base, check_same, load_adapters, read_flags, weights_dtype

DRAW = {PictureModel: draw_four, SDXL: draw_one}       # how a model draws a prompt


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % confidence interval of a share of n independent items.

        (share + z^2/2n -+ z sqrt(share (1 - share)/n + z^2/4n^2)) / (1 + z^2/n),  z = 1.96
    """
    z = 1.96
    middle = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)


def print_scores(scores: Scores) -> None:
    """Prints each metric with its interval.

    Metrics called row/column become one table, as in the papers. The line below a row has the
    longer of the two distances from each value to the ends of its interval.
    """
    bounds = {name: wilson_interval(scores.values[name], n) for name, n in scores.counts.items()}
    rows = {name.split("/")[0]: {} for name in scores.values if "/" in name}
    for name, value in scores.values.items():
        if "/" in name:
            row, column = name.split("/")
            rows[row][column] = value
        else:
            print(f"{name:16}{value:10.4f}" + (
                "   95 % [{:.4f}, {:.4f}]".format(*bounds[name]) if name in bounds else ""))
    if rows:
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        print(" " * 16 + "".join(f"{column:>11}" for column in columns))
    for row, values in rows.items():
        print(f"{row:16}" + "".join(f"{values[column]:11.4f}" for column in columns))
        reach = [max(high - values[column], values[column] - low) if high else 0
                 for column in columns
                 for low, high in [bounds.get(f"{row}/{column}", (0, 0))]]
        if any(reach):
            print(f"{'  95 % within':16}" + "".join(
                f"{'+-':>5}{width:6.4f}" if width else " " * 11 for width in reach))


def write_answer(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Returns the text that greedy decoding writes after the prompt, without special tokens.

    Raises UserError if the prompt fills all positions of the model.
    """
    ids = encode_start(prompt, tokenizer)
    room = model.config.max_positions - len(ids)
    if room < 1:
        raise UserError(f"--prompt: its {len(ids)} tokens fill all of the model's positions")
    return tokenizer.decode(generate(model, [ids], min(max_new_tokens, room))[0], special=False)


def draw_answer(model, words, prompt: str, run: str | None) -> Path:
    """Draws a caption before and after a run; returns the PNG file, in its folder.

    Without a run the model is drawn as it is, into the present folder.
    """
    require("PIL")
    draw = DRAW[type(model)]
    rows = {"before" if run else "as it is": draw(model, words, prompt)}
    if run:
        load_adapters(run, model)
        rows["after"] = draw(model, words, prompt)
    name = re.sub(r"\W+", "-", prompt).strip("-")[:80] or "empty"
    path = Path(run or ".", f"prompt-{name}.png")
    save_sheet(path, rows, [prompt])
    return path


def parse_evaluation(argv: list[str] | None) -> Namespace:
    """Reads and checks the flags; raises UserError if one is wrong or two do not go together."""
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to look at")
    what.add_argument("--run", help="folder that train.py wrote")
    what.add_argument("--model", help="instead of --run: folder in Hugging Face's layout, or "
                                      "owner/name on the hub")
    what.add_argument("--task", help=f"with --model: {', '.join(TASKS)}")
    for name, options in OPTIONS.items():
        what.add_argument(flag(name), **options)
    what.add_argument("--max-length", type=int,
                      help=f"with --model: most tokens of an example ({MAX_LENGTH})")
    what.add_argument("--dtype", choices=PRECISIONS, default="fp32",
                      help="with --model: precision of its weights (fp32)")
    parser.set_defaults(method=None, seed=0)
    how = parser.add_argument_group("how")
    how.add_argument("--max-eval", type=int,
                     help="score about N examples (the run's own, else all)")
    how.add_argument("--batch-size", type=int, default=BATCH_SIZE,
                     help=f"examples scored at once; changes speed and memory only ({BATCH_SIZE})")
    how.add_argument("--predictions", metavar="FILE", type=new_file,
                     help="write each item with its answer and score, as JSON lines")
    how.add_argument("--prompt", help="show the greedy answer to this text, or pictures of it; "
                                      "score nothing")
    how.add_argument("--max-new-tokens", type=int, default=48,
                     help="with --prompt: most tokens of the answer (48)")
    how.add_argument("--device", type=device, default=default_device(), help="cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.model is None):
        raise UserError("give one of --run FOLDER and --model PATH")
    for name in ("task", "max_length", "dtype", *OPTIONS):
        if args.run is not None and name in args.given - {"beams"}:
            raise UserError(f"{flag(name)}: a run has its own; use it with --model")
    if args.model is not None and args.task is None and args.prompt is None:
        raise UserError("--model needs --task NAME or --prompt TEXT")
    for name in ("task", "max_length", "max_eval", "batch_size", "predictions", *OPTIONS):
        if args.prompt is not None and name in args.given:
            raise UserError(f"{flag(name)}: --prompt scores nothing")
    if args.prompt is None and "max_new_tokens" in args.given:
        raise UserError("--max-new-tokens: use it with --prompt")
    for name in ("max_length", "max_eval", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"{flag(name)} must be at least 1")
    return args


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_evaluation(argv)
    join_processes(args.device)
    run = args if args.run is None else read_flags(args.run)
    dtype = weights_dtype(run.dtype, run.method)
    model, tokenizer, max_length = open_model(run.model, args.device, run.max_length, dtype)
    if args.run:
        check_base(args.run, model, dtype)
    if type(model) in DRAW and args.prompt is not None:
        print(draw_answer(model, tokenizer, args.prompt, args.run))
        return
    if args.prompt is not None:
        if isinstance(model, Encoder):
            raise UserError("--prompt: an encoder writes no text")
        before = write_answer(model, tokenizer, args.prompt, args.max_new_tokens)
        print(f"before:{before}" if args.run else before)
        if args.run:
            load_adapters(args.run, model)
            print(f"after: {write_answer(model, tokenizer, args.prompt, args.max_new_tokens)}")
        return
    if not args.run:
        give_head(model, args.task, args.head, draw=False)
    options = options_in(run)
    if args.beams is not None:
        options["beams"] = args.beams
    loss_on = run.loss_on if args.run else None
    setup = Setup(tokenizer, model.config, max_length, args.batch_size, loss_on)
    task = load_task(run.task, setup, **options)
    if args.predictions is not None and isinstance(task.test[0], Sequence):
        raise UserError(f"--predictions: task {run.task} has no items, it is scored as a whole")
    if args.run:
        check_same(args.run, data=task.fingerprint())
        load_adapters(args.run, model)
    max_eval = run.max_eval if args.max_eval is None else args.max_eval
    scores = task.score(model, sample(task.test, max_eval))
    try:
        stop_unless_finite(scores.values, f"{args.run or args.model}")
    except NotFinite as error:
        raise UserError(f"{error}: the model overflows") from None
    if not is_main():
        return
    if args.predictions is not None:
        with atomic_write(args.predictions) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in scores.predictions),
                            encoding="utf-8")
    items = len(scores.predictions) or min(len(task.test), max_eval or math.inf)
    print(f"{run.task}: {items} test items"
          + (f"; beams {options['beams']}" if options["beams"] else "")
          + (f"; trained with the loss on {run.loss_on}" if args.run else "")
          + (f"; missing: {task.notes['missing']}" if "missing" in task.notes else ""))
    print_scores(scores)


if __name__ == "__main__":
    main()
