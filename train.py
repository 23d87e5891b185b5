"""Fine-tunes a pretrained model with one method of the LoRA family, and scores it.

    python train.py --method dual                        # about a minute on a laptop CPU
    python train.py --method lora --rank 2 --lr 1e-2 --seed 1
    python train.py --method dual --model PATH_OR_HUB_REPO --task jsonl --data FILE --epochs 3
    python train.py --method lora --model PATH --task text --data FILE --steps 200
    python train.py --resume --out runs/facts-dual-r8-s0  # goes on with a run that was stopped
    torchrun --nproc-per-node 2 train.py --method dual   # the same run in two processes
Everything goes to runs/<task>-<method>-r<rank>-s<seed>/, described in support/run.py.

In the code, fit() is the training, prepare() makes what it needs, report() writes the result.
"""
import shlex
import sys
import time
from argparse import Namespace
from functools import lru_cache

import torch
from tqdm import tqdm

from data import load_task, options_in
from data.task import Setup, Task, sample
from formats.checkpoint import open_model
from methods import contract, count, param_groups, save, state
from support.errors import NotFinite, UserError, exit_on_user_error, stop_unless_finite
from support.flags import adapt, check_flags, parse_flags, resolve
from support.machine import peak_memory_mb, versions
from support.messages import explained, last_words, print_header, print_result, script
from support.processes import (gathered, is_main, join_processes, own_parts, process_count,
                               process_number, stop_requests, sum_gradients, summed)
from support.run import (Flags, Run, check_same, fingerprint, read_config, resumed, visible,
                         weights_dtype)


def fit(model, task: Task, args: Flags, run: Run) -> None:
    """Trains the model. Each step: rate, batch, loss, backward, clip, step, hook, log."""
    method, layers = contract(model)            # the method's class, and the layers it acts on
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups(model, args.lr, args.weight_decay,
                                               args.lr_ratio or 1.0))
    peaks = [group["lr"] for group in optimizer.param_groups]
    autocast = torch.autocast(args.device.partition(":")[0], torch.bfloat16,
                              enabled=args.dtype == "bf16")
    first_step = run.restore(model, optimizer) if args.resume else 0
    bar = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps, unit="step",
               disable=not is_main())
    model.train()                       # scoring switches to eval mode, and back
    with stop_requests() as asked_to_stop, bar:
        for step in bar:
            lr_share = schedule(step, args.steps, args.warmup)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * lr_share
            batch = [task.train[i] for i in batch_at(step, len(task.train), args.batch_size,
                                                     args.seed)]
            size, loss = task.size(batch), 0.0          # size: e.g. the batch's target tokens
            for part in own_parts(batch, args.grad_accum):      # one part, unless --grad-accum
                with autocast:
                    part_loss = task.loss(model, part) / size
                part_loss.backward()
                loss += part_loss.item()
            sum_gradients(trainable)                            # over processes; one: unchanged
            loss, stopping = summed([loss, asked_to_stop()], args.device)
            extra = method.extra_loss(layers)           # the same in every process: not summed
            if torch.is_tensor(extra):
                extra.backward()
                extra = extra.detach()
            norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0).item()
            stop_unless_finite({"loss": loss, "extra loss": float(extra), "gradient norm": norm},
                               f"step {step}")
            optimizer.step()
            method.on_step(layers, step, args.steps)            # may read the gradients
            optimizer.zero_grad()

            line = {"step": step, "loss": loss, "lr": args.lr * lr_share, "grad_norm": norm}
            line |= {"extra_loss": extra.item()} if torch.is_tensor(extra) else {}
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            after_step(step + 1, line, model, optimizer, task, args, run, stopping)
        if summed([asked_to_stop()], args.device)[0]:       # asked in the last step
            raise KeyboardInterrupt


def after_step(done: int, line: dict, model, optimizer, task: Task, args: Flags, run: Run,
               stopping) -> None:
    """Logs a step. Validates and saves when that is due after `done` steps.

    Raises NotFinite before a bad weight is saved, and KeyboardInterrupt, as Ctrl-C does, if the run
    was asked to stop.
    """
    last = done == args.steps
    validate_now = done % args.eval_every == 0 and not last
    snapshot_now = args.snapshot_every and done % args.snapshot_every == 0
    save_now = done % args.save_every == 0 or last or stopping
    if validate_now or snapshot_now or save_now:
        stop_unless_finite(largest_values(model), f"step {line['step']}")
    if validate_now:
        line["valid"] = validate(model, task, args)
        stop_unless_finite(line["valid"], f"step {line['step']}")
    run.log(line)
    if snapshot_now:
        run.snapshot(model, done)
    if save_now:
        run.checkpoint(model, optimizer, done)
    if stopping:
        raise KeyboardInterrupt


def validate(model, task: Task, args: Flags) -> dict[str, float]:
    """Returns the mean loss on the validation split, and the task's metrics."""
    examples = sample(task.valid, args.max_eval)
    loss = {"loss": task.mean_loss(model, examples)}
    return loss | task.score(model, examples).values | loss     # not a task's own "loss"


def largest_values(model) -> dict[str, float]:
    """Returns the largest absolute value of each tensor that trains; NaN if it holds a NaN."""
    return {name: tensor.abs().max().item() for name, tensor in state(model).items()
            if tensor.is_floating_point()}


def schedule(step: int, steps: int, warmup: int) -> float:
    """Returns lr / peak: rises in a line to 1 over `warmup` steps, then falls in a line to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


@lru_cache(maxsize=2)
def epoch_order(epoch: int, n: int, seed: int) -> list[int]:
    own = torch.Generator().manual_seed(seed + 7919 * epoch)        # each epoch another order
    return torch.randperm(n, generator=own).tolist()


def batch_at(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """Returns the indices of a step's examples: epochs of n, reshuffled, one after another.

    They depend on these four numbers alone, so a resumed run needs no state of a data loader.
    """
    return [epoch_order(i // n, n, seed)[i % n]
            for i in range(step * batch_size, (step + 1) * batch_size)]


def prepare(args: Namespace, run: Run):
    """Loads and checks all that a run needs, then begins or resumes the run's folder.

    Returns the model, the task, the settled flags, and the counts for result.json.
    """
    dtype = weights_dtype(args.dtype, args.method)
    model, tokenizer, max_length = open_model(args.model, args.device, args.max_length, dtype)
    began_with = {"base": fingerprint(model.state_dict(), dtype), "processes": process_count()}
    torch.manual_seed(args.seed)
    began_with["adapters"] = adapt(model, args)     # early: a refusal comes before the slow work
    if not is_main():                           # the same adapters, another dropout
        torch.manual_seed(args.seed + process_number() * 2 ** 32)
    model.checkpointing = args.grad_checkpointing
    setup = Setup(tokenizer, model.config, max_length, args.eval_batch_size, args.loss_on,
                  args.compile)
    task = load_task(args.task, setup, **options_in(args))
    args = resolve(args, model, task)
    method, layers = contract(model)
    plan = method.start(layers, args.steps)
    began_with["data"], odd = task.fingerprint(), task.counts()

    run.claim(args)
    if args.resume:
        check_same(run.folder, **began_with)
    else:
        run.note(args=vars(args), versions=versions(), **began_with,
                 start=fingerprint(state(model), torch.float32))
    counts = {**count(model), **odd, "base": began_with["base"]}
    if is_main():
        print_header(args, run, model, task, plan, counts)
    return model, task, args, counts


def score_before(model, task: Task, args: Flags, run: Run) -> dict[str, float] | None:
    """Scores the pretrained model; a resumed run reads the scores from its config.json."""
    if args.resume and "before" in (config := read_config(run.folder)):
        return config["before"]
    if args.skip_before:
        return None
    before = task.score(model, sample(task.test, args.max_eval)).values
    stop_unless_finite(before, "before training")
    run.note(before=before)
    shown = task.show(model, run.folder)
    if is_main():
        print(f"before: {shown}")
    return before


def report(model, task: Task, args: Flags, run: Run, before, counts: dict, began: float) -> None:
    """Scores the trained model, writes the adapters and result.json, and prints the scores."""
    after = task.score(model, sample(task.test, args.max_eval))
    valid = validate(model, task, args)
    for found in (after.values, valid):
        stop_unless_finite(found, "after training")
    shown = task.show(model, run.folder)
    if not is_main():
        return
    save(model, run.folder / "adapter.safetensors")
    seconds = time.time() - began
    run.write("result.json", {
        "method": args.method, "task": args.task, **counts,
        "before": before, "after": after.values, "counts": after.counts,
        "valid": valid, "seconds": round(seconds, 1),
        "peak_memory_mb": peak_memory_mb(args.device), "loss_on": args.loss_on, "seed": args.seed,
        "notes": task.notes, "versions": versions(), "command": args.command})
    print(f"after:  {shown}")
    print_result(args, run, task, before, after.values, seconds)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    began, args = time.time(), parse_flags(argv, __doc__)
    if args.out is not None and (not args.out or args.out.startswith("-")):
        raise UserError(f"--out {args.out}: must not be empty or begin with -")
    if args.resume and (args.out is None or args.overwrite):
        raise UserError("--resume needs --out FOLDER, the run to go on with, and no --overwrite")
    whole_run = args.method is not None or args.from_peft is not None      # not only "go on"
    if args.resume and (not whole_run or visible(args.out)):
        args = resumed(args)
    else:
        check_flags(args)
        args.resume = False
        args.command = shlex.join(["python", script(argv),
                                   *(sys.argv[1:] if argv is None else argv)])
    join_processes(args.device)
    gathered(None)              # every process has checked --out before process 0 makes it
    run = Run()
    try:
        model, task, args, counts = prepare(args, run)
        task.begin(model)
        before = score_before(model, task, args, run)
        fit(model, task, args, run)
        report(model, task, args, run, before, counts, began)
    except (KeyboardInterrupt, NotFinite) as stop:
        if is_main():
            print(last_words(stop, run, script(argv)), file=sys.stderr)
        sys.exit(130 if isinstance(stop, KeyboardInterrupt) else 1)
    except RuntimeError as error:
        raise explained(error)
    finally:
        run.release()


if __name__ == "__main__":
    main()
